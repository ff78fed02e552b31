"""MAML and MMAML: model-agnostic meta-learning, and its multimodal form by feature-wise modulation (FiLM).

Papers: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning, ICML 2017. Vuorio, Sun, Hu, Lim: Multimodal MAML
via Task-Aware Modulation, NeurIPS 2019; here in the terms of Section 5.1 of the KML paper (see kml.py).

The idea. MAML learns an initialisation theta. From it, a few gradient steps on a task's few labelled images
(the *support* set) lead to a network that classifies more images of the task (the *query* set). One
initialisation has to serve every task, which is hard when tasks come from unlike data sets (*modes*:
characters, birds, photographs). So MMAML's second, small network looks at the support images, describes the
task by 128 numbers v, and makes from v a scale and a shift for each channel of each layer:
    Y-hat_i = (1 + scale_i(v)) * Y_i + shift_i(v)       Y_i: channel i of a layer, after BatchNorm
With the 1, a scale and a shift of 0 leave the network as it is. A scale turns a whole filter up or down. (Without
BatchNorm this equals one factor on all 9 * C_in entries of kernel i: the KML paper's Eq. 5.) In
kml.py each entry has its own factor.

The inner loop adapts theta *under* a fixed scale and shift. With --adapt modulated, the steps change these too.
FiLM has to come *after* BatchNorm. Before BatchNorm it would be undone: the channel's mean would contain the
shift, its deviation the factor 1 + scale (if positive), and BatchNorm removes both.

A class of Omniglot is turned by a random multiple of 90 degrees in each task, in testing too. The same command,
given again, continues a run that was stopped; on a CPU it ends with the same bits as a run that never stopped.

Two defaults depart from MMAML's released code. BatchNorm has a scale and a shift here, as in KML's code; in MMAML's
it has none (--no-norm-affine). And all tasks of an iteration are different here. MMAML's and KML's codes load a
batch of tasks of each mode and draw from it with replacement, so with two modes about 2 of 10 tasks are repeats.
--repeat-tasks draws training tasks so, too; test tasks are always different.

    paper        here                        shape or keys           where
    theta        group(params, "base")       conv{l} norm{l} head    the network that adapts
    S_T, Q_T     task.support_*, .query_*    (N*K, 3, S, S) ...      N ways, K shots, Q queries, S pixels
    h, v_T       encode_task, v              (128,)                  Section 5.1
    g            modulation                  generator.film{l}       Section 5.1
    eta, gamma   1 + film{l}.scale, .shift   (C_l,), (C_l,)          Eq. 3 (gamma is the shift here)

Read it beside kml.py (`diff mmaml.py kml.py`): one modulation in place of another, nothing else.
Run:  python mmaml.py --synthetic --quick     two minutes on two CPU cores, no download; prints accuracies
      python mmaml.py --modes omniglot miniimagenet --shots 5    MMAML; with --modulation none, MAML
Left out: MMAML's regression and reinforcement learning, and its recurrent task encoders.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    Episodes,
    Run,
    add_data_flags,
    add_device_flags,
    add_run_flags,
    canonical_mode,
    complete,
    fail,
    in_threads,
    new_parser,
    parse,
    recorded,
)

# --modulation: the method's name in the KML paper's tables
METHODS = {"none": "MAML", "film": "MMAML"}
MODULATION = "film"  # the default
LAYERS = (1, 2, 3, 4)
EMBEDDING = 128  # length of the task embedding v
PARTS = ("base", "encoder", "generator")  # of the parameters
PROTOCOLS = {
    "paper": "BatchNorm statistics of the query images together, as in the papers' numbers",
    "inductive": "BatchNorm statistics of the adapted network on the support images",
}
QUICK = {"image_size": 28, "meta_batch": 4, "iterations": 220, "test_tasks": 200}
MODES_HELP = "omniglot miniimagenet fc100 cub aircraft, or folders of yours under the data root"
ADAPT_HELP = "what inner steps change: theta alone, or FiLM's scale and shift too (C: theta)"
EMBED_HELP = (
    "where v comes from. support: the support images (P). constant, a control of ours: one learned vector"
)
CONV_HELP = "step sizes of the kernels of layers 1 to 4, a control of ours; --inner-lr unless given"
REPEAT_HELP = "draw training tasks with replacement from a batch of tasks (C: yes, test tasks too)"


# --------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors. The base network: four times [3x3 convolution of stride 2,
# BatchNorm, ReLU] with 32, 64, 128, 256 channels, the mean over the remaining pixels, and a linear layer (the head).


def group(params, name):
    """One part of all parameters: "base" (theta: what the inner loop adapts), "encoder" or "generator"."""
    if name == "base":
        return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def conv_norm(params, l, x, moments=None):
    """Convolution l and BatchNorm: x (n, C_in, S, S) -> (n, C_out, S/2, S/2), rounded up; and the (mean, 1/std) used.

    Unless given, the moments are those of the convolution's output on this batch, in training and in testing,
    because running averages would mix tasks. Scale and shift are not passed to torch.native_batch_norm: with them inside,
    torch 2.13's vmap gets second derivatives wrong.
    """
    W, b = params[f"conv{l}.weight"], params[f"conv{l}.bias"]
    y = F.conv2d(x, W, b, stride=2, padding=1).to(W.dtype)  # bf16, if chosen, ends here
    if moments is None:
        y, *moments = torch.native_batch_norm(y, None, None, None, None, True, 0.0, 1e-5)
    else:
        mean, invstd = moments
        y = (y - mean[:, None, None]) * invstd[:, None, None]
    if f"norm{l}.scale" in params:
        scale, shift = params[f"norm{l}.scale"], params[f"norm{l}.shift"]
        y = y * scale[:, None, None] + shift[:, None, None]
    return y, moments


def linear(params, name, x):
    """A linear layer: x (..., n_in) -> (..., n_out), always in float32: bf16 is for convolutions."""
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(W.dtype), W, b)


def forward(params, x, stats=None):
    """The base network f: images x (n, 3, S, S) -> logits (n, N), and the moments that each BatchNorm used.

    stats: the moments of another call, to normalise by them instead of this batch's own.
    """
    used = []
    for l in LAYERS:
        x, moments = conv_norm(params, l, x, stats[l - 1] if stats else None)
        used.append(moments)
        if f"film{l}.scale" in params:  # Eq. 3, where eta = 1 + scale; after BatchNorm, as in MMAML's code
            scale, shift = params[f"film{l}.scale"], params[f"film{l}.shift"]
            x = x * (1 + scale[:, None, None]) + shift[:, None, None]
        x = F.relu(x)
    return linear(params, "head", x.mean((2, 3))), used


def encode_task(params, support_x):
    """The task encoder h: support images (N*K, 3, S, S) -> task embedding v (128,). It never sees a label.

    With --embed constant v is a parameter, the same for all tasks. A gain that is left then cannot come from
    knowledge of the task: it comes from another parametrisation of the same weights.
    """
    if "encoder.constant" in params:
        return params["encoder.constant"]
    # Floating-point sums depend on the order of the images, and v should not.
    order = support_x.sum((1, 2, 3)).argsort()
    x = support_x[order]
    encoder = group(params, "encoder")
    for l in LAYERS:
        x = F.relu(conv_norm(encoder, l, x)[0])
    return F.relu(linear(encoder, "linear", x.mean((2, 3)))).mean(0)


def generator_sizes(args, l, c_in, c_out):
    """Outputs of the linear layer that makes omega for layer l: a scale and a shift per channel."""
    return {f"film{l}": 2 * c_out}


def modulation(params, v):
    """The generator g: task embedding v (128,) -> omega, a scale and a shift (C_out,) for each layer."""
    omega = {}
    for l in LAYERS:
        scale, shift = linear(params, f"generator.film{l}", v).chunk(2)
        omega[f"film{l}.scale"] = scale
        omega[f"film{l}.shift"] = shift
    return omega


def modulate(theta, omega):
    """Theta with omega beside it: FiLM leaves theta alone, and `forward` applies omega to each layer's activations."""
    return theta | omega


def init_params(args):
    """Draw all parameters from the seed -> flat dict. The base network's are the same for every modulation.

    As in MMAML's code: Xavier and zero for the base, PyTorch's default for the rest. The mean of FiLM's
    |scale| starts at 0.09.
    """
    rng = torch.Generator().manual_seed(args.seed)
    params = {}
    widths = [3] + [args.channels * 2**i for i in range(len(LAYERS))]
    layers = list(zip(LAYERS, widths, widths[1:]))

    def xavier(name, *shape):
        params[f"{name}.weight"] = torch.nn.init.xavier_uniform_(torch.empty(shape), generator=rng)
        params[f"{name}.bias"] = torch.zeros(shape[0])

    def default(name, *shape):
        root = math.sqrt(math.prod(shape[1:]))  # PyTorch's: uniform within 1 / root of the number of inputs
        weight, bias = torch.rand(shape, generator=rng), torch.rand(shape[0], generator=rng)
        params[f"{name}.weight"] = (2 * weight - 1) / root
        params[f"{name}.bias"] = (2 * bias - 1) / root

    def norm(name, c):
        params[f"{name}.scale"] = torch.ones(c)
        params[f"{name}.shift"] = torch.zeros(c)

    for l, c_in, c_out in layers:
        xavier(f"conv{l}", c_out, c_in, 3, 3)
        if not args.no_norm_affine:
            norm(f"norm{l}", c_out)
    xavier("head", args.ways, widths[-1])
    if args.modulation == "none":
        return params
    for l, c_in, c_out in layers:
        default(f"encoder.conv{l}", c_out, c_in, 3, 3)
        norm(f"encoder.norm{l}", c_out)
        for name, outputs in generator_sizes(args, l, c_in, c_out).items():
            default(f"generator.{name}", outputs, EMBEDDING)
    default("encoder.linear", EMBEDDING, widths[-1])
    if args.embed == "constant":
        params = {k: w for k, w in params.items() if not k.startswith("encoder.")}
        # Its norm is about that of the encoder's v at the start of training.
        params["encoder.constant"] = torch.rand(EMBEDDING, generator=rng) / 4
    return params


# ------------------------------------------------------------------------------------------------- algorithm


def step_size(key, args):
    """Alpha, the step size of one tensor of theta: --inner-lr; for kernels that of their layer in --conv-lr, if given."""
    if args.conv_lr is not None:
        for l, alpha in zip(LAYERS, args.conv_lr):
            if key == f"conv{l}.weight":
                return alpha
    return args.inner_lr


def task_loss(params, task, args, evaluate=False):
    """ONE task: infer what kind of task it is, modulate, adapt to the support set, evaluate on the query set.

    Returns the query loss (); the query logits (N*Q, N); and, if `evaluate`, the inductive logits. All parameters
    learn from the query loss alone. Its gradient reaches encoder and generator through the modulated network that
    classifies the query images and, unless --first-order is given, through the gradients of the inner steps.
    Numbers in comments are lines of KML's Algorithm 2.
    """
    theta = group(params, "base")
    omega = {}  # no modulation
    if args.modulation != "none":
        v = encode_task(params, task.support_x)  # 5: v = h(S), (128,)
        omega = modulation(params, v)  # 6: omega = g(v)
    if args.adapt == "modulated":  # the steps change theta, scale and shift together
        theta, omega = modulate(theta, omega), {}

    def support_loss(theta):
        logits, _ = forward(modulate(theta, omega), task.support_x)  # (N*K, N)
        return F.cross_entropy(logits, task.support_y)

    # Algorithm 2 does not show MAML's inner loop. It stands here: theta <- theta - alpha * gradient(theta), for
    # this task only, while omega is fixed. The steps stay in the graph, so the query loss is differentiated
    # through them: that is second order.
    for _ in range(args.inner_steps):
        gradient = torch.func.grad(support_loss)(theta)
        stepped = {}
        for key, g in gradient.items():
            if args.first_order:
                g = g.detach()
            g = g.clamp(-args.inner_clip, args.inner_clip)
            stepped[key] = theta[key] - step_size(key, args) * g
        theta = stepped

    adapted = modulate(theta, omega)  # 7: theta-hat
    logits, _ = forward(adapted, task.query_x)  # (N*Q, N)
    loss = F.cross_entropy(logits, task.query_y)  # 8: loss on Q
    if not evaluate:
        return loss, logits
    _, stats = forward(adapted, task.support_x)
    inductive, _ = forward(adapted, task.query_x, stats)
    return loss, logits, inductive


# ---------------------------------------------------------------------------------------- training, evaluation


def run_tasks(params, batch, args, vectorise, evaluate=False):
    """Run task_loss on T tasks -> losses (T,), accuracies in % (T, 1); if `evaluate` (T, 2): paper's, inductive.

    In training it adds the gradient of the mean loss to .grad. (KML's Algorithm 2 has the sum.)
    `vectorise`: all tasks at once, by vmap, which fills a GPU. Else, for the CPU, each task runs in a thread of
    its own, and gradients are added in the order of the tasks.
    """
    T = len(batch.mode)
    weights = list(params.values())
    device = args.device.split(":")[0]

    def one(task):
        with torch.autocast(device, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
            loss, *logits = task_loss(params, task, args, evaluate)
        correct = [(x.argmax(-1) == task.query_y).float() for x in logits]
        return loss, torch.stack([100 * x.mean() for x in correct])

    def one_in_a_thread(task):
        with torch.set_grad_enabled(not evaluate):  # each thread has a switch of its own
            loss, accuracies = one(task)
        gradients = () if evaluate else torch.autograd.grad(loss / T, weights)
        return loss.detach(), accuracies.detach(), gradients

    if vectorise:
        losses, accuracies = torch.func.vmap(one)(batch)
        if not evaluate:
            losses.mean().backward()
        return losses.detach(), accuracies
    losses, accuracies = [], []
    tasks = [type(batch)(*fields) for fields in zip(*batch)]  # task j has entry j of every field
    for loss, accuracy, gradients in in_threads(one_in_a_thread, tasks, args.workers):
        losses.append(loss)
        accuracies.append(accuracy)
        for w, g in zip(weights, gradients):
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
            w.grad += g
    return torch.stack(losses), torch.stack(accuracies)


def evaluate(params, episodes, count, args):
    """Accuracies in % of the first `count` tasks -> array (2, count).

    Row 0 is by the paper's protocol, where a prediction depends on the other queries; row 1 is inductive.
    """
    accuracies = []
    starts = range(0, count, 20)  # 20 tasks at a time: enough to fill a GPU
    for first in tqdm(starts, desc=f"{episodes.split} tasks, 20 at a time", disable=None, leave=False):
        batch = episodes.tasks(first, min(20, count - first))
        with torch.no_grad():
            _, found = run_tasks(params, batch, args, args.device != "cpu", evaluate=True)
        accuracies.append(found)
    return torch.cat(accuracies).T.double().cpu().numpy().round(4)


def summary(per_task, modes):
    """Accuracies of tasks, where modes (data sets) take turns -> {"overall" and each mode: {"mean", "ci95"}}, in %.

    Overall is the mean of the modes' means, with +- 1.96 sqrt(sum_m s_m^2 / n_m) / len(modes): modes are strata.
    """
    found = {"overall": None}
    means, variances = [], []
    for m, mode in enumerate(modes):
        x = per_task[m :: len(modes)]
        means.append(x.mean())
        variances.append(x.var(ddof=1) / len(x))
        found[mode] = interval(means[-1], variances[-1])
    found["overall"] = interval(np.mean(means), sum(variances) / len(modes) ** 2)
    return found


def interval(mean, variance):
    """A mean and the half width of its 95 % interval."""
    half_width = 1.96 * math.sqrt(variance)
    return {"mean": round(float(mean), 4), "ci95": round(half_width, 4)}


def gradient_norm(params, part):
    """Euclidean norm of the gradient of one part of the parameters."""
    norms = [w.grad.norm() for w in group(params, part).values()]
    return math.hypot(*norms)


def size(params, part):
    """Number of parameters in one part of them."""
    return sum(w.numel() for w in group(params, part).values())


def train(params, args, run):
    """Take --iterations Adam steps on the mean query loss of --meta-batch tasks, from where the run left off."""
    T = args.meta_batch
    optimizer = torch.optim.Adam(params.values(), lr=args.lr, fused=True)
    run.restore(optimizer)
    episodes = Episodes.of(args, "train")
    held_out = Episodes.of(args, "val") if args.val_every else None

    def step(batch):
        return run_tasks(params, batch, args, args.device != "cpu")

    def validate():
        rows = evaluate(params, held_out, args.val_tasks, args)
        return {protocol: summary(row, args.modes) for protocol, row in zip(PROTOCOLS, rows)}

    if args.device != "cpu" and not args.eager:
        step = recorded(step, params)
    for iteration in run.iterations():
        if args.lr_halve_every:
            optimizer.param_groups[0]["lr"] = args.lr * 0.5 ** (iteration // args.lr_halve_every)
        if args.repeat_tasks:
            batch = episodes.repeated(iteration, T)
        else:
            batch = episodes.tasks(first=iteration * T, count=T)

        optimizer.zero_grad()
        losses, accuracies = step(batch)
        optimizer.step()

        run.observe(torch.stack([losses, accuracies[:, 0]]))
        if run.log_now():
            log(params, args, run, validate)
        run.save(params, optimizer)


def log(params, args, run, validate):
    """Write a log line: the mean loss since the last one, the accuracy of each mode, gradient norms."""
    losses, accuracies = run.observed().unbind(1)  # both (iterations, T)
    mode = run.turns(losses.shape, len(args.modes))
    accuracy = {}
    for m in mode.unique():  # a short stretch may lack a mode
        accuracy[args.modes[m]] = accuracies[mode == m].mean().item()
    loss = losses.mean().item()
    norms = {part: gradient_norm(params, part) for part in PARTS}
    values = {"loss": loss, "accuracy": accuracy, "gradient_norm": norms, "synthetic": args.synthetic}
    shown = {"loss": f"{loss:.3f}"} | {name: f"{x:.1f}%" for name, x in accuracy.items()}
    run.log(values, shown, validate)


def measure(params, test, args, run):
    """Evaluate on the test tasks and write result.json -> its content."""
    rows = evaluate(params, test, args.test_tasks, args)
    accuracies = [summary(row, args.modes) for row in rows]
    per_task = rows.tolist()
    return run.write_result(
        {
            "modes": args.modes,
            "ways": args.ways,
            "shots": args.shots,
            "synthetic": args.synthetic,
            "protocol": PROTOCOLS,
            "tasks_sha256": test.sha256(args.test_tasks),
            "data": test.folders,
            "accuracy": accuracies[0],
            "accuracy_inductive": accuracies[1],
            "parameters": {part: size(params, part) for part in PARTS},
            "per_task": per_task[0],
            "per_task_inductive": per_task[1],
            "per_task_mode": [j % len(args.modes) for j in range(args.test_tasks)],
        }
    )


def report(result, args):
    """Print what was measured, under which protocol, with its interval."""
    setting = f"{args.ways}-way {args.shots}-shot, {args.image_size} px, {args.test_tasks} test tasks"
    training = f"{result['iterations']} iterations of {result['seconds_per_iteration']} s"
    print(f"\n{args.title}: {setting}, after {training}")
    print(f"{'accuracy in %':16}{'paper protocol':18}inductive")
    for name, row in result["accuracy"].items():
        both = [row, result["accuracy_inductive"][name]]
        cells = ["{mean:.2f} +- {ci95:.2f}".format(**x) for x in both]
        print(f"{name:16}{cells[0]:18}{cells[1]}")


# ------------------------------------------------------------------------------------------------------ flags


def get_args(argv=None):
    """Read the command line -> args. `title`, `variant` and `method` are worked out from it."""
    p = new_parser(__doc__, "P: the KML paper's value; C: that of MMAML's code.")
    add_algorithm_flags(p)
    p.add_argument("--seed", type=int, default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-tasks", type=int, default=1000, help="over all modes together (P: 1000)")
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never (C: never)")
    p.add_argument("--val-tasks", type=int, default=100, help="over all modes together")
    add_data_flags(p)
    add_device_flags(p, graph=True)
    add_run_flags(p, QUICK)
    args, defaults = parse(p, argv, QUICK)
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    args.method = METHODS[args.modulation]
    check(args)
    data = "+".join(args.modes)
    if args.synthetic:
        data = f"SYNTHETIC {data}"
    shown = ("modulation", "ways", "shots", "image_size", "seed", "synthetic")
    complete(args, defaults, data, shown, named=("modes",), least={"image_size": 8})
    return args


def add_algorithm_flags(p):
    """Add the flags that decide what is learned."""
    p.add_argument("--modulation", default=MODULATION, choices=METHODS, help="none is plain MAML")
    p.add_argument(
        "--modes", nargs="+", default=["omniglot", "miniimagenet"], metavar="MODE", help=MODES_HELP
    )
    p.add_argument("--ways", type=int, default=5, help="N, classes per task (C: 5)")
    p.add_argument("--shots", type=int, default=1, help="K, support images per class (P, C: 1 and 5)")
    p.add_argument("--queries", type=int, default=15, help="Q, query images per class (C: 15)")
    p.add_argument("--image-size", type=int, default=84, help="S, pixels (C: 84)")
    p.add_argument(
        "--channels", type=int, default=32, help="of layer 1, doubled in each layer after it (C: 32)"
    )
    p.add_argument(
        "--no-norm-affine",
        action="store_true",
        help="train the base network without BatchNorm's scale and shift (C: without)",
    )
    p.add_argument("--embed", default="support", choices=("support", "constant"), help=EMBED_HELP)
    p.add_argument("--adapt", default="theta", choices=("theta", "modulated"), help=ADAPT_HELP)
    p.add_argument("--inner-steps", type=int, default=5, help="gradient steps on the support set (C: 5)")
    p.add_argument("--inner-lr", type=float, default=0.05, help="alpha, the inner step size (C: 0.05)")
    p.add_argument("--conv-lr", type=float, nargs=4, metavar="A", help=CONV_HELP)
    p.add_argument(
        "--inner-clip", type=float, default=20.0, help="bound on each entry of the inner gradient (C: 20)"
    )
    p.add_argument("--first-order", action="store_true", help="leave out second derivatives (C: no)")
    p.add_argument("--meta-batch", type=int, default=10, help="T, tasks per iteration (C: 10)")
    p.add_argument("--repeat-tasks", action="store_true", help=REPEAT_HELP)
    p.add_argument("--iterations", type=int, default=60000, help="updates of all parameters (C: 60000)")
    p.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (C: 1e-3)")
    p.add_argument("--lr-halve-every", type=int, default=0, help="iterations; 0 is never (C: never)")


def check(args):
    """Exit if flags contradict each other."""
    if args.adapt == "modulated" and args.modulation == "none":
        fail("--adapt modulated --modulation none: plain MAML modulates nothing; leave one of them out")
    if args.embed == "constant" and args.modulation == "none":
        fail("--embed constant --modulation none: plain MAML has no v; leave one of them out")


def main():
    args = get_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # run_tasks runs tasks side by side instead
    test = Episodes.of(args, "test")
    run = Run(args, test)
    params = run.params(init_params(args))
    if run.unfinished:
        train(params, args, run)
    if run.finished():
        same = {"tasks_sha256": test.sha256(args.test_tasks), "data": test.folders}
        result = run.result(**same)  # of an earlier call on the same test tasks, or None
        if result is None:
            result = measure(params, test, args, run)
        report(result, args)


if __name__ == "__main__":
    main()
