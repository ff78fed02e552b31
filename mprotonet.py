"""ProtoNet, MProtoNet and MProtoNet+KML: prototypes replace MAML's inner loop; FiLM or KML modulates.

Papers: Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning, NeurIPS 2017. Abdollahzadeh and
others: Revisit Multimodal Meta-Learning through the Lens of Multi-Task Learning, NeurIPS 2021, Sections 5 and 6.

The idea. A network f maps images to features. A class is represented by the mean of its support images'
features, its *prototype*, and a query image belongs to the class whose prototype is nearest. So an average does
here what gradient steps do in kml.py. But now f is the same for every task, of whatever *mode* (characters,
birds, photographs), unless a second network looks at the support images, describes the task by 128 numbers v,
and changes f: the activations of each channel (film, as in mmaml.py) or each kernel entry (kml, as in kml.py):
    film   Y-hat = (1 + scale(v)) * Y + shift(v)            after BatchNorm; this is MProtoNet
    kml    W-hat = W * (1 + M(v)),  b-hat = b + db(v)       M(v) = outer(g1(v), g2(v)); this is MProtoNet+KML
As a C_out x 9 C_in matrix, M has rank 1 in layer 1 and rank 3 in layers 2 to 4: see kml.py.

    paper        here                        shape or keys           where
    theta        group(params, "base")       conv{l} norm{l}         the network f; no head
    S_T, Q_T     task.support_*, .query_*    (N*K, 3, S, S) ...      N ways, K shots, Q queries, S pixels
    h, v_T       encode_task, v              (128,)                  KML Section 5.1
    g            modulation                  generator.*             KML Section 5.1; Eq. 8, 9, Figure 4
    M^l, db^l    omega["conv{l}.weight"]...  a matrix, (C_out,)      KML Eq. 8, 9
    theta-hat    modulate                    like theta              KML Eq. 6, 7
    c_k          prototypes                  (N, D)                  Snell Eq. 1; D = 9,216 at 84 pixels
    d            squared_distances           (N*Q, N)                Snell Eq. 2

Read it beside kml.py (`diff kml.py mprotonet.py`): prototypes in place of the head and the inner loop.
Run:  python mprotonet.py --synthetic --quick     a minute on two CPU cores, no download; prints accuracies
      python mprotonet.py --modes omniglot miniimagenet --shots 5 --modulation film

The released KML code departs from its paper's method in three ways. Each is a flag here, and off by default:
--no-residual, --embed query, --transductive; --official is all three. Its ProtoNet, without modulation, is transductive
too: --modulation none --official. (It also repeats tasks: --repeat-tasks. Its bugs are left out: see docs/protocol.md.)
"""

import math
from typing import NamedTuple

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
    uniform,
)

# --modulation: the method's name in the paper's tables
METHODS = {"none": "ProtoNet", "film": "MProtoNet", "kml": "MProtoNet+KML"}
MODULATION = "kml"  # the default
LAYERS = (1, 2, 3, 4)
EMBEDDING = 128  # length of the task embedding v
PARTS = ("base", "encoder", "generator")  # of the parameters
PROTOCOLS = {
    "paper": "BatchNorm statistics of the query images together, as in the papers' numbers",
    "inductive": "BatchNorm statistics of the adapted network on the support images",
}
QUICK = {"image_size": 28, "meta_batch": 4, "iterations": 220, "test_tasks": 200}
# In help texts, P is the paper's value, and C is that of KML's released code.
MODES_HELP = "omniglot miniimagenet fc100 cub aircraft, or folders of yours under the data root"
EMBED_HELP = (
    "where v comes from. support: the support images (P). query: in each pass, the images of that pass (C). Two are "
    "controls of ours, blind to the task. constant: one learned vector. other: another task's images"
)
EMBEDDINGS = ("support", "query", "constant", "other")
GENERATOR_HELP = (
    "how kml makes M. outer: an outer product (P, C). full: a linear layer with all entries of a kernel's M"
)
OFFICIAL_HELP = (
    "the method of C: --no-residual --embed query --transductive; without modulation the last alone"
)
INIT_SCALE_HELP = (
    "factor of the initial base kernels (P, C: 1); 0.01 makes them as small as --no-residual does"
)
DISTANCE_SCALE_HELP = (
    "logits are minus this times the squared distances (P, C: 1). With 1 the softmax starts saturated. With 0.01 at 84 "
    "pixels, or 0.1 at 28, it starts about as soft as it ends"
)
REPEAT_HELP = "draw training tasks with replacement from a batch of tasks (C: yes, test tasks too)"


# --------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors. The base network: four times [3x3 convolution of stride 2,
# BatchNorm, ReLU] with 32, 64, 128, 256 channels; the features are all pixels of the last layer.


def group(params, name):
    """One part of all parameters: "base" (theta), "encoder" or "generator"."""
    if name == "base":
        return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def conv_norm(params, l, x, moments=None):
    """Convolution l and BatchNorm: x (n, C_in, S, S) -> (n, C_out, S/2, S/2), rounded up; and the (mean, 1/std) used.

    Unless given, the moments are those of the convolution's output on this batch, in training and in testing,
    because running averages would mix tasks. Here native_batch_norm applies scale and shift, which is a tenth faster.
    (In kml.py it cannot: torch 2.13's vmap would get second derivatives wrong.)
    """
    W, b = params[f"conv{l}.weight"], params[f"conv{l}.bias"]
    scale, shift = params.get(f"norm{l}.scale"), params.get(f"norm{l}.shift")
    y = F.conv2d(x, W, b, stride=2, padding=1).to(W.dtype)  # bf16, if chosen, ends here
    if moments is None:
        y, *moments = torch.native_batch_norm(y, scale, shift, None, None, True, 0.0, 1e-5)
        return y, moments
    mean, invstd = moments
    y = (y - mean[:, None, None]) * invstd[:, None, None]
    if scale is not None:
        y = y * scale[:, None, None] + shift[:, None, None]
    return y, moments


def linear(params, name, x):
    """A linear layer: x (..., n_in) -> (..., n_out), always in float32: bf16 is for convolutions."""
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(W.dtype), W, b)


def forward(params, x, stats=None):
    """The base network f: images x (n, 3, S, S) -> features (n, D), and the moments that each BatchNorm used.

    stats: the moments of another call, to normalise by them instead of this batch's own.
    """
    used = []
    for l in LAYERS:
        x, moments = conv_norm(params, l, x, stats[l - 1] if stats else None)
        used.append(moments)
        if f"film{l}.scale" in params:  # KML's Eq. 3, eta = 1 + scale; after BatchNorm, see mmaml.py
            scale, shift = params[f"film{l}.scale"], params[f"film{l}.shift"]
            x = x * (1 + scale[:, None, None]) + shift[:, None, None]
        x = F.relu(x)
    return x.flatten(1), used


def class_means(features, members):
    """Prototypes (Snell, Eq. 1): features (n, D), class weights of each image (n, N) -> weighted means (N, D)."""
    with torch.autocast(features.device.type, enabled=False):
        return members.T @ features / members.sum(0)[:, None]


def squared_distances(x, y):
    """Distances of rows x (n, D) to rows y (N, D) -> (n, N), as |x|^2 - 2 x.y + |y|^2, with no (n, N, D) tensor."""
    with torch.autocast(x.device.type, enabled=False):
        x_squared = x.square().sum(1, keepdim=True)
        return x_squared - 2 * x @ y.T + y.square().sum(1)


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
    """Output sizes of the generator's linear layers for layer l.

    FiLM: a scale and a shift per channel. KML: db, and rows and cols, whose outer product is M; with --generator
    full all entries of M at once, which takes 152 times the parameters.
    """
    if args.modulation == "film":
        return {f"film{l}": 2 * c_out}
    if l == 1:
        rows, cols = c_out, 9 * c_in
    else:
        rows, cols = 3 * c_out, 3 * c_in
    if args.generator == "full":
        return {f"conv{l}.full": rows * cols, f"conv{l}.bias": c_out}
    return {f"conv{l}.rows": rows, f"conv{l}.cols": cols, f"conv{l}.bias": c_out}


def modulation(params, v):
    """The generator g: task embedding v (128,) -> omega.

    For FiLM omega is a scale and a shift (C_out,) for each layer; for KML an M for each kernel (Eq. 8) and a db
    for each bias (Eq. 9).
    """
    omega = {}
    for l in LAYERS:
        if f"generator.film{l}.weight" in params:
            scale, shift = linear(params, f"generator.film{l}", v).chunk(2)
            omega[f"film{l}.scale"] = scale
            omega[f"film{l}.shift"] = shift
            continue
        if f"generator.conv{l}.full.weight" in params:
            M = linear(params, f"generator.conv{l}.full", v)
        else:
            rows = linear(params, f"generator.conv{l}.rows", v)  # (3 C_out,); in layer 1 (C_out,)
            cols = linear(params, f"generator.conv{l}.cols", v)  # (3 C_in,); in layer 1 (9 C_in,)
            M = torch.outer(rows, cols)  # as many entries as the kernel
        omega[f"conv{l}.weight"] = M
        omega[f"conv{l}.bias"] = linear(params, f"generator.conv{l}.bias", v)
    return omega


def modulate(theta, omega, residual=1):
    """Make KML's theta-hat: multiply each kernel entry by its own 1 + M (Eq. 6), add db to the bias (Eq. 7).

    FiLM leaves theta alone: its omega stands beside it, and `forward` applies it to each layer's activations.

    residual = 0 is --no-residual: W * M, as in the released code. Kernels then start about 100 times smaller, which
    has two effects. First, the outputs of the convolutions have a variance near 1e-6, below BatchNorm's epsilon
    of 1e-5. After BatchNorm, the median channel has a deviation of 0.2 to 0.4 and not of 1, so the size of
    a kernel acts as a gate for its channel, and as a temperature of the distances. (--init-scale 0.01 and
    --distance-scale are controls for this.) Second, a step of encoder and generator changes the kernel about 100
    times more, relative to its size, because the size of Adam's steps does not depend on the gradient's. (Steps of
    W have no such effect, because M scales them down too.) The bias offset db has no effect, because BatchNorm
    subtracts it (see kml.py).
    """
    modulated = dict(theta)
    for key, change in omega.items():
        if key.startswith("film"):
            modulated[key] = change
        elif "weight" in key:
            M = change.reshape(theta[key].shape)
            modulated[key] = theta[key] * (residual + M)
        else:
            modulated[key] = theta[key] + change
    return modulated


def init_params(args):
    """Draw all parameters from the seed -> flat dict. The base network's are the same for every modulation.

    As in MMAML's code: Xavier and zero for the base, PyTorch's default for the rest. The mean of |M| starts at
    0.006, its root mean square at 0.01 (--generator full: 0.09 and 0.11).
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
        params[f"conv{l}.weight"] *= args.init_scale
        if not args.no_norm_affine:
            norm(f"norm{l}", c_out)
    if args.modulation != "none":
        for l, c_in, c_out in layers:
            for name, outputs in generator_sizes(args, l, c_in, c_out).items():
                default(f"generator.{name}", outputs, EMBEDDING)
        if args.embed == "constant":  # its norm is about that of the encoder's first v
            params["encoder.constant"] = torch.rand(EMBEDDING, generator=rng) / 4
        else:
            for l, c_in, c_out in layers:
                default(f"encoder.conv{l}", c_out, c_in, 3, 3)
                norm(f"encoder.norm{l}", c_out)
            default("encoder.linear", EMBEDDING, widths[-1])
    for key, w in params.items():
        if w.dim() == 4:  # without second derivatives, convolutions are fastest with channels last
            params[key] = w.to(memory_format=torch.channels_last)
    return params


# ------------------------------------------------------------------------------------------------- algorithm


def task_loss(params, task, args, evaluate=False):
    """ONE task: infer what kind of task it is, modulate, average the support set by class, classify the query set.

    Returns the query loss (), from which alone all parameters learn, those of encoder and generator too; the query
    logits (N*Q, N); and, if `evaluate`, the inductive logits. Numbers in comments are lines of KML's Algorithm 2.
    """
    theta = group(params, "base")
    residual = 0 if args.no_residual else 1  # the 1 of W * (1 + M)
    omega = {}  # no modulation
    if args.modulation != "none":
        shown = task.other_x if args.embed == "other" else task.support_x
        v = encode_task(params, shown)  # 5: v = h(S), (128,)
        omega = modulation(params, v)  # 6: omega = g(v)
    adapted = modulate(theta, omega, residual)  # 7: theta-hat

    # 8: in place of MAML's inner loop, a prototype for each class: the mean of its support images' features.
    support, stats = forward(adapted, task.support_x)  # (N*K, D)
    classes = torch.arange(args.ways, device=support.device)
    members = (task.support_y[:, None] == classes).to(support.dtype)  # (N*K, N), one-hot
    prototypes = class_means(support, members)  # (N, D)
    if args.embed == "query":  # C: for the query pass, the query images themselves say what the task is
        v = encode_task(params, task.query_x)
        adapted = modulate(theta, modulation(params, v), residual)

    def classify(moments=None):
        query, _ = forward(adapted, task.query_x, moments)  # (N*Q, D)
        logits = -args.distance_scale * squared_distances(query, prototypes)  # (N*Q, N)
        if args.transductive:  # C, done right: one step of soft k-means (Ren et al., ICLR 2018, Eq. 3)
            features = torch.cat([support, query])
            soft_members = torch.cat([members, logits.softmax(1)])
            moved = class_means(features, soft_members)
            logits = -args.distance_scale * squared_distances(query, moved)
        return logits

    logits = classify()
    loss = F.cross_entropy(logits, task.query_y)  # 8: loss on Q
    depends_on_queries = args.transductive or args.embed == "query"  # they move prototypes, or set v
    if not evaluate or depends_on_queries:
        return loss, logits
    return loss, logits, classify(stats)


# The control `--embed other`: v varies from task to task as the task's own would, but knows nothing of the task.


class BlindTask(NamedTuple):
    """A Task, and the support images of another task."""

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor
    mode: torch.Tensor
    other_x: torch.Tensor  # (N*K, 3, S, S)


class BlindEpisodes(Episodes):
    """Episodes whose tasks come with the support images of another task, of any mode (rarely, of their own task).

    The other task is drawn at random from the task's own block: BLOCK = 256 tasks of each mode.
    """

    def tasks(self, first, count):
        span = self.BLOCK * len(self.modes)  # tasks of a block
        name = f"other task {'+'.join(self.modes)} {self.split} {self.seed}"
        others = []
        for number in range(first, first + count):
            block, place = divmod(number, span)
            u = uniform(name, block, span)[place]
            other_number = block * span + int(u * span)
            other = super().tasks(other_number, 1)
            others.append(other.support_x)
        return BlindTask(*super().tasks(first, count), torch.cat(others))


def episodes_of(args, split):
    """The sampler that --embed asks for."""
    return (BlindEpisodes if args.embed == "other" else Episodes).of(args, split)


# ---------------------------------------------------------------------------------------- training, evaluation


def run_tasks(params, batch, args, vectorise, evaluate=False):
    """Run task_loss on T tasks -> losses (T,), accuracies in % (T, 1), or (T, 2) where there are inductive logits too.

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

    Row 0 is by the paper's protocol, where a prediction depends on the other queries; row 1 is inductive, and
    is missing where queries set v or prototypes (--transductive, --embed query).
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
    episodes = episodes_of(args, "train")
    held_out = episodes_of(args, "val") if args.val_every else None

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
    has_inductive = len(rows) == 2
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
            "accuracy_inductive": accuracies[1] if has_inductive else None,
            "parameters": {part: size(params, part) for part in PARTS},
            "per_task": per_task[0],
            "per_task_inductive": per_task[1] if has_inductive else None,
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
        both = [row, (result["accuracy_inductive"] or {}).get(name)]
        cells = ["{mean:.2f} +- {ci95:.2f}".format(**x) if x else "-" for x in both]
        print(f"{name:16}{cells[0]:18}{cells[1]}")


# ------------------------------------------------------------------------------------------------------ flags


def get_args(argv=None):
    """Read the command line -> args. `title`, `variant` and `method` are worked out from it."""
    p = new_parser(__doc__, "P: the paper's value; C: that of KML's code.")
    add_algorithm_flags(p)
    p.add_argument("--seed", type=int, default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-tasks", type=int, default=1000, help="over all modes together (P: 1000)")
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never (C: never)")
    p.add_argument("--val-tasks", type=int, default=100, help="over all modes together")
    add_data_flags(p)
    add_device_flags(p, graph=True)
    add_run_flags(p, QUICK)
    args, defaults = parse(p, argv, QUICK, official)
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    args.method = METHODS[args.modulation]
    check(args, defaults)
    data = "+".join(args.modes)
    if args.synthetic:
        data = f"SYNTHETIC {data}"
    shown = ("modulation", "ways", "shots", "image_size", "seed", "synthetic")
    complete(args, defaults, data, shown, named=("modes",), least={"image_size": 8})
    return args


def add_algorithm_flags(p):
    """Add the flags that decide what is learned."""
    p.add_argument("--modulation", default=MODULATION, choices=METHODS, help="none is plain ProtoNet")
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
    p.add_argument("--no-norm-affine", action="store_true", help="BatchNorm without scale and shift (C: off)")
    p.add_argument("--generator", default="outer", choices=("outer", "full"), help=GENERATOR_HELP)
    p.add_argument("--no-residual", action="store_true", help="kml: W * M, not W * (1 + M) (P: off; C: on)")
    p.add_argument("--embed", default="support", choices=EMBEDDINGS, help=EMBED_HELP)
    p.add_argument(
        "--transductive", action="store_true", help="move prototypes by soft labels (P: off; C: on)"
    )
    p.add_argument("--official", action="store_true", help=OFFICIAL_HELP)
    p.add_argument("--init-scale", type=float, default=1.0, help=INIT_SCALE_HELP)
    p.add_argument("--distance-scale", type=float, default=1.0, help=DISTANCE_SCALE_HELP)
    p.add_argument("--meta-batch", type=int, default=10, help="T, tasks per iteration (C: 10)")
    p.add_argument("--repeat-tasks", action="store_true", help=REPEAT_HELP)
    p.add_argument("--iterations", type=int, default=30000, help="updates of all parameters (C: 30000)")
    p.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (C: 1e-3)")
    p.add_argument("--lr-halve-every", type=int, default=10000, help="iterations; 0 is never (C: 10000)")


def official(typed):
    """What --official presets."""
    if not typed.official:
        return {}
    if typed.modulation == "none":
        return {"transductive": True}
    return {"transductive": True, "no_residual": True, "embed": "query"}


def check(args, defaults):
    """Exit if flags contradict each other."""
    meant_for = {"generator": ("kml",), "no_residual": ("kml",), "embed": ("kml", "film")}
    for flag, modulations in meant_for.items():
        if getattr(args, flag) != defaults[flag] and args.modulation not in modulations:
            fail(
                f"--{flag.replace('_', '-')} means nothing with --modulation {args.modulation} (--official may have set it): "
                f"give --modulation {' or '.join(modulations)}"
            )


def main():
    args = get_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # run_tasks runs tasks side by side instead
    test = episodes_of(args, "test")
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
