"""MMAML+KML: model-agnostic meta-learning whose network is rebuilt for each task by kernel modulation.

Paper: Abdollahzadeh, Malekzadeh, Cheung: Revisit Multimodal Meta-Learning through the Lens of Multi-Task
Learning, NeurIPS 2021, Section 5 and Algorithm 2. The supplement's other experiments are left out.

The idea. MAML learns an initialisation theta from which a few gradient steps on a task's few labelled images
(the *support* set) lead to a network that classifies more images of the task (the *query* set). One
initialisation must serve every task; when these come from unlike data sets (*modes*: characters, birds,
photographs), that is much to ask. So a small second network looks at the support images, says in 128 numbers
v what kind of task it is, and from v makes a change of theta: *each entry* of each kernel has its own factor,
    W^ = W * (1 + M(v))        b^ = b + db(v)        M(v) = outer(g1(v), g2(v)), reshaped like W
The 1 makes M a residual: W keeps what all modes share, M says how this task departs from it. (FiLM, in
mmaml.py, has one factor per output channel: it turns a filter up or down; KML can make it another filter.)
The outer product takes 329,595 generator parameters, not the 50.1 million of a linear layer per kernel entry.
It limits M: seen as a C_out x 9 C_in matrix, M has rank 1 in layer 1 (all filters get the same pattern of 27
entries, each filter scaled by a factor of its own) and rank 3 in layers 2 to 4.

The inner loop adapts theta *under* a fixed M: the network of each step is modulate(theta, omega). Algorithm 2
has no inner loop; both released codes modulate in the forward pass, and put together they adapt theta so. A
step of theta then moves an entry of W-hat by (1 + M)^2 times its own gradient. --adapt modulated is the other
reading of lines 7 and 8: W-hat itself is what steps.

    paper        here                        shape or keys           where
    theta        group(params, "base")       conv{l} norm{l} head    the network that adapts
    S_T, Q_T     task.support_*, .query_*    (N*K, 3, S, S) ...      N ways, K shots, Q queries, S pixels
    h, v_T       encode_task, v              (128,)                  Section 5.1
    g            modulation                  generator.conv{l}.*     Eq. 8, 9, Figure 4
    M^l, db^l    omega["conv{l}.weight"]...  like W^l, like b^l      Eq. 8, 9
    theta^       modulate                    like theta              Eq. 6, 7

Read it beside mmaml.py (`diff mmaml.py kml.py`): one modulation in place of another, nothing else.
Run:  python kml.py --synthetic --quick       two minutes on two CPU cores, no download; prints accuracies
      python kml.py --modes omniglot miniimagenet --shots 5
"""
import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    LAYOUTS,
    Episodes,
    Task,
    atomic_write,
    canonical_mode,
    cores,
    fail,
    in_threads,
    recorded,
)

METHODS = {"none": "MAML", "kml": "MMAML+KML"}      # --modulation: the method's name in the paper's tables
LAYERS = (1, 2, 3, 4)
EMBEDDING = 128                                     # length of the task embedding v
PARTS = ("base", "encoder", "generator")            # of the parameters
PROTOCOLS = {"paper": "BatchNorm statistics of the query images together, as in all published numbers",
             "inductive": "BatchNorm statistics of the adapted network on the support images"}
QUICK = {"image_size": 28, "meta_batch": 4, "iterations": 220, "test_tasks": 200}
TABLE, PAPER = "KML's Table 1", {    # overall accuracy in %, 5 ways, (1-shot, 5-shot); modes by first letters
    "MAML": {"FM": (40.53, 54.11), "MO": (65.18, 74.18), "FMO": (54.40, 66.51), "ACFMO": (47.19, 58.13)},
    "MMAML": {"FM": (39.11, 52.02), "MO": (67.67, 73.52), "FMO": (57.35, 64.21), "ACFMO": (49.53, 58.89)},
    "MMAML+KML": {"FM": (40.73, 53.72), "MO": (68.01, 77.02), "FMO": (57.68, 67.12), "ACFMO": (50.31, 60.51)}}
LEAST = {"ways": 2, "shots": 1, "queries": 1, "image_size": 8, "channels": 1, "meta_batch": 1, "log_every": 1,
         "save_every": 1, "test_tasks": 2, "val_tasks": 2, "workers": 1}      # of numbers; else 0
SHOWN = ("modulation", "ways", "shots", "image_size", "seed", "synthetic")      # what a report says anyway


def get_args(argv=None):
    about = __doc__.split("\n")[0] + " P: the paper's value; C: the released code's, ours unless it says so."
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.error = fail
    p.add_argument("--modulation", default=list(METHODS)[-1], choices=METHODS, help="none is plain MAML")
    p.add_argument("--modes", nargs="+", default=["omniglot", "miniimagenet"], metavar="MODE",
                   help="omniglot miniimagenet fc100 cub aircraft, or folders of yours under the data root")
    p.add_argument("--ways", type=int, default=5, help="N, classes in a task (C: 5)")
    p.add_argument("--shots", type=int, default=1, help="K, support images a class (P, C: 1 and 5)")
    p.add_argument("--queries", type=int, default=15, help="Q, query images a class (C: 15)")
    p.add_argument("--image-size", type=int, default=84, help="S, pixels (C: 84)")
    p.add_argument("--channels", type=int, default=32, help="of layer 1, doubled in each next (C: 32)")
    p.add_argument("--no-norm-affine", action="store_true", help="BatchNorm without scale and shift (C: so)")
    p.add_argument("--adapt", default="theta", choices=("theta", "modulated"),
                   help="what inner steps change: theta under a fixed M, or theta-hat itself (C: theta)")
    p.add_argument("--inner-steps", type=int, default=5, help="gradient steps on the support (C: 5)")
    p.add_argument("--inner-lr", type=float, default=0.05, help="their step size (C: 0.05)")
    p.add_argument("--inner-clip", type=float, default=20.0, help="of their gradient's entries (C: 20)")
    p.add_argument("--first-order", action="store_true", help="hold the inner gradients constant (C: no)")
    p.add_argument("--meta-batch", type=int, default=10, help="T, tasks an iteration (C: 10)")
    p.add_argument("--repeat-tasks", action="store_true",
                   help="draw an iteration's tasks with replacement (C: yes, at test too)")
    p.add_argument("--iterations", type=int, default=60000, help="updates of all parameters (C: 60000)")
    p.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (C: 1e-3)")
    p.add_argument("--lr-halve-every", type=int, default=0, help="iterations; 0 is never (C: never)")
    p.add_argument("--seed", type=int, default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-tasks", type=int, default=1000, help="over all modes together (P: 1000)")
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never (C: never)")
    p.add_argument("--val-tasks", type=int, default=100, help="over all modes together")
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="keeps images decoded once")
    p.add_argument("--synthetic", action="store_true", help="procedural stand-ins for the modes: no download")
    p.add_argument("--quick", action="store_true", help=f"about two minutes on two CPU cores: {QUICK}")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--workers", type=int, default=cores(), help="CPU: tasks at a time, one thread each")
    p.add_argument("--eager", action="store_true", help="GPU: kernel by kernel, not a recorded graph")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16: convolutions only")
    p.add_argument("--out", help="folder of the run (runs/<name>); the same command continues it")
    p.add_argument("--log-every", type=int, default=50, help="iterations")
    p.add_argument("--save-every", type=int, default=1000, help="iterations between checkpoints")
    p.add_argument("--keep-every", type=int, default=0, help="iterations between kept parameters")
    p.add_argument("--stop-after", type=float, help="seconds; then write a checkpoint and end")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint as it is")
    start.add_argument("--overwrite", action="store_true", help="start afresh, dropping what --out holds")
    defaults = vars(p.parse_args([]))
    if p.parse_known_args(argv)[0].quick:
        p.set_defaults(**QUICK)
    args = p.parse_args(argv)
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    args.method = METHODS[args.modulation]
    if args.adapt == "modulated" and args.modulation == "none":
        fail("--adapt modulated --modulation none: plain MAML has nothing modulated; leave one of them out")
    changed = {k: v for k, v in identity(args).items() if k != "modes" and v != defaults.get(k, v)}
    if args.out is None:                                # named by its method and what is not default
        words = [f"{k}={v}" for k, v in changed.items()]
        args.out = os.path.join("runs", "-".join([args.method, *args.modes, *words]).lower())
    flags = {f"--{k.replace('_', '-')}": v for k, v in changed.items() if k not in SHOWN}
    args.variant = [flag if v is True else f"{flag} {v}" for flag, v in flags.items()]
    mark = ["SYNTHETIC"] if args.synthetic else []
    args.title = " ".join([args.method, *mark, "+".join(args.modes), *args.variant])
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    args.device = {"auto": (gpus + ["cpu"])[0], "cuda": (gpus + ["cuda"])[0]}.get(args.device, args.device)
    if args.device not in ("cpu", *gpus):
        fail(f"--device {args.device}: not there; choose from {' '.join(['cpu', *gpus])}")
    for key, value in vars(args).items():
        least = LEAST.get(key, 0) * (len(args.modes) if key.endswith("_tasks") else 1)
        if isinstance(value, (int, float)) and not least <= value < 2 ** 63:
            fail(f"--{key.replace('_', '-')} {value}: give a number from {least} on")
    return args


# --------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors. The base network: four times [3x3 convolution of stride 2,
# BatchNorm, ReLU] with 32, 64, 128, 256 channels, the mean over the pixels left, a linear layer (the head).

def group(params, name):
    """One part of all parameters: "base" (theta: what the inner loop adapts), "encoder" or "generator"."""
    if name == "base":
        return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def conv_norm(params, l, x, moments=None):
    """Convolution l and BatchNorm: x (n, C_in, S, S) -> (n, C_out, S/2, S/2), and the (mean, 1/std) it used.

    Unless given, these are of the batch x itself, in training and testing: running averages would mix tasks.
    Scale and shift stay outside the call: with them inside, torch 2.13's vmap gets second derivatives wrong.
    """
    W, b = params[f"conv{l}.weight"], params[f"conv{l}.bias"]
    y = F.conv2d(x, W, b, stride=2, padding=1).to(W.dtype)      # bf16, if chosen, ends here
    if moments is None:
        y, *moments = torch.native_batch_norm(y, None, None, None, None, True, 0.0, 1e-5)
    else:
        y = (y - moments[0][:, None, None]) * moments[1][:, None, None]
    if f"norm{l}.scale" in params:
        y = y * params[f"norm{l}.scale"][:, None, None] + params[f"norm{l}.shift"][:, None, None]
    return y, moments


def linear(params, name, x):
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):      # bf16 is for convolutions: 1 + M needs more
        return F.linear(x.to(W.dtype), W, b)


def forward(params, x, stats=None):
    """The base network f: images x (n, 3, S, S) -> logits (n, N), and the moments each BatchNorm used, which
    another call takes as `stats` to normalise by them instead of its own batch's."""
    used = []
    for l in LAYERS:
        x, moments = conv_norm(params, l, x, stats[l - 1] if stats else None)
        used.append(moments)
        x = F.relu(x)
    return linear(params, "head", x.mean((2, 3))), used


def encode_task(params, support_x):
    """The task encoder h: support images (N*K, 3, S, S) -> task embedding v (128,). It never sees a label.
    A mean over images has no order, but sums in floating point have one: so the images are sorted first."""
    x, encoder = support_x[support_x.sum((1, 2, 3)).argsort()], group(params, "encoder")
    for l in LAYERS:
        x = F.relu(conv_norm(encoder, l, x)[0])
    return F.relu(linear(encoder, "linear", x.mean((2, 3)))).mean(0)


def generator_sizes(l, c_in, c_out):
    """Outputs of the linear layers behind omega for layer l: rows x cols = W's entries (near-square), db."""
    rows, cols = (c_out, 9 * c_in) if l == 1 else (3 * c_out, 3 * c_in)
    return {f"conv{l}.rows": rows, f"conv{l}.cols": cols, f"conv{l}.bias": c_out}


def modulation(params, v):
    """The generator g: task embedding v (128,) -> omega, an M for each kernel, a db for each bias (8, 9)."""
    omega = {}
    for l in LAYERS:
        rows, cols = (linear(params, f"generator.conv{l}.{factor}", v) for factor in ("rows", "cols"))
        omega[f"conv{l}.weight"] = torch.outer(rows, cols)
        omega[f"conv{l}.bias"] = linear(params, f"generator.conv{l}.bias", v)
    return omega


def modulate(theta, omega):
    """theta^: each kernel entry times its own 1 + M (Eq. 6), each bias plus its own db (Eq. 7); not the head.

    db enters a BatchNorm, which subtracts it again with the batch's mean: here it does nothing and learns
    nothing (its gradient is zero up to rounding); it is kept because the paper has it.
    """
    kernels = {k: theta[k] * (1 + M.reshape(theta[k].shape)) for k, M in omega.items() if "weight" in k}
    biases = {k: theta[k] + db for k, db in omega.items() if "bias" in k}
    return theta | kernels | biases


def init_params(args):
    """All parameters, drawn from the seed -> flat dict. The base network's are the same for every modulation.

    As in MMAML's code: Xavier and zero for the base, PyTorch's default for the rest; |M| starts near 0.006.
    """
    rng, params = torch.Generator().manual_seed(args.seed), {}
    widths = [3] + [args.channels * 2 ** i for i in range(len(LAYERS))]
    layers = list(zip(LAYERS, widths, widths[1:]))

    def xavier(*shape):
        return torch.nn.init.xavier_uniform_(torch.empty(shape), generator=rng)

    def default(name, *shape):
        root = math.sqrt(math.prod(shape[1:]))          # uniform within 1 / root of the number of inputs
        params[f"{name}.weight"] = (2 * torch.rand(shape, generator=rng) - 1) / root
        params[f"{name}.bias"] = (2 * torch.rand(shape[0], generator=rng) - 1) / root

    for l, c_in, c_out in layers:
        params |= {f"conv{l}.weight": xavier(c_out, c_in, 3, 3), f"conv{l}.bias": torch.zeros(c_out)}
        if not args.no_norm_affine:
            params |= {f"norm{l}.scale": torch.ones(c_out), f"norm{l}.shift": torch.zeros(c_out)}
    params |= {"head.weight": xavier(args.ways, widths[-1]), "head.bias": torch.zeros(args.ways)}
    for l, c_in, c_out in layers if args.modulation != "none" else ():
        default(f"encoder.conv{l}", c_out, c_in, 3, 3)
        params |= {f"encoder.norm{l}.scale": torch.ones(c_out), f"encoder.norm{l}.shift": torch.zeros(c_out)}
        for name, outputs in generator_sizes(l, c_in, c_out).items():
            default(f"generator.{name}", outputs, EMBEDDING)
    if args.modulation != "none":
        default("encoder.linear", EMBEDDING, widths[-1])
    return params


# ------------------------------------------------------------------------------------------------- algorithm

def task_loss(params, task, args, evaluate=False):
    """ONE task: infer what kind it is, modulate, adapt to the support set, be evaluated on the query set.

    Returns the query loss, whose gradient trains everything (encoder and generator have no other teacher),
    the query logits (N*Q, N) and, if `evaluate`, the inductive ones. Numbers: lines of KML's Algorithm 2.
    """
    theta, omega = group(params, "base"), {}
    if args.modulation != "none":
        v = encode_task(params, task.support_x)                                     # 5: v = h(S)
        omega = modulation(params, v)                                               # 6: omega = g(v)
    if args.adapt == "modulated":                       # the other reading: the steps change the product
        theta, omega = modulate(theta, omega), {}

    def support_loss(theta):
        logits, _ = forward(modulate(theta, omega), task.support_x)                 # 7: theta-hat
        return F.cross_entropy(logits, task.support_y)
    # MAML's inner loop: a few gradient steps on theta, for this task only, while omega stays what it is.
    # The steps stay in the graph: the query loss is differentiated through them (that is second order).
    for _ in range(args.inner_steps):                                               # 8: adapt to S
        grads = torch.func.grad(support_loss)(theta)
        for k, g in grads.items():
            g = (g.detach() if args.first_order else g).clamp(-args.inner_clip, args.inner_clip)
            theta = theta | {k: theta[k] - args.inner_lr * g}

    adapted = modulate(theta, omega)
    logits, _ = forward(adapted, task.query_x)
    loss = F.cross_entropy(logits, task.query_y)                                    # 8: loss on Q
    if not evaluate:
        return loss, logits
    _, stats = forward(adapted, task.support_x)
    return loss, logits, forward(adapted, task.query_x, stats)[0]


# ============================================================================================================
# Below this line every script has the same text: running tasks, training, evaluation, files.

def run_tasks(params, batch, args, vectorise, evaluate=False):
    """task_loss of T tasks -> losses (T,), accuracies in % (T, 1); if `evaluate`, (T, 2): paper's, inductive.

    In training it adds the mean loss's gradient to .grad (Algorithm 2, 10-12: the sum's). vmap fills a GPU.
    On a CPU each task has a thread of its own, and gradients are added in the order of the tasks.
    """
    T, weights = len(batch.mode), list(params.values())

    def one(task):
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16"):
            loss, *logits = task_loss(params, task, args, evaluate)
        return loss, torch.stack([100 * (x.argmax(-1) == task.query_y).float().mean() for x in logits])

    def one_in_a_thread(task):
        with torch.set_grad_enabled(not evaluate):      # each thread has a switch of its own
            loss, accuracies = one(task)
        gradients = () if evaluate else torch.autograd.grad(loss / T, weights)
        return loss.detach(), accuracies.detach(), gradients

    if vectorise:
        losses, accuracies = torch.func.vmap(one)(batch)
        if not evaluate:
            losses.mean().backward()
        return losses.detach(), accuracies
    losses, accuracies = [], []
    tasks = [Task(*(x[i] for x in batch)) for i in range(T)]
    for loss, accuracy, gradients in in_threads(one_in_a_thread, tasks, args.workers):
        losses.append(loss)
        accuracies.append(accuracy)
        for w, g in zip(weights, gradients):
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
            w.grad += g
    return torch.stack(losses), torch.stack(accuracies)


def evaluate(params, episodes, count, args):
    """Accuracy in % of the first `count` tasks -> array (2, count): row 0 by the paper's protocol, where a
    prediction knows the other queries; row 1 inductive, unless task_loss has none. See PROTOCOLS."""
    rows = []
    with torch.no_grad(), tqdm(total=count, desc=f"{episodes.split} tasks", disable=None, leave=False) as bar:
        for first in range(0, count, 20):
            batch = episodes.tasks(first, min(20, count - first))
            rows.append(run_tasks(params, batch, args, args.device != "cpu", evaluate=True)[1])
            bar.update(len(batch.mode))
    return torch.cat(rows).T.double().cpu().numpy().round(4)


def summary(per_task, modes):
    """Accuracies of tasks, modes taking turns -> {"overall" and each mode: {"mean", "ci95"}}, in %. Modes are
    strata: overall is the mean of their means, its 95 % interval 1.96 sqrt(sum_m s_m^2 / n_m) / M."""
    strata = [per_task[m::len(modes)] for m in range(len(modes))]
    means, variances = [x.mean() for x in strata], [x.var(ddof=1) / len(x) for x in strata]
    rows = [("overall", np.mean(means), sum(variances) / len(modes) ** 2), *zip(modes, means, variances)]
    return {name: {"mean": round(float(x), 4), "ci95": round(1.96 * math.sqrt(v), 4)} for name, x, v in rows}


def identity(args):
    """What makes two runs the same run: the method, and the arguments that change what is learned."""
    other = ("iterations", "test_tasks", "val_tasks", "val_every", "device", "data_root", "cache_dir", "out",
             "log_every", "save_every", "keep_every", "stop_after", "eval_only", "overwrite", "quick",
             "official", "title", "variant", "workers", "eager")
    return {"method": args.method} | {k: v for k, v in vars(args).items() if k not in other}


def load(path, args):
    """The checkpoint at `path`. That of another run is an error, which names the difference."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        here, there = identity(args), checkpoint["identity"]
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(f"{path} is no checkpoint ({type(error).__name__}): choose another --out, or --overwrite")
    for key in here | there:
        if here.get(key) != there.get(key):
            fail(f"{path.parent} has {key} {there.get(key)}, not {here.get(key)}: give another --out")
    return checkpoint


def train(params, args, checkpoint, stop):
    """Run the iterations that are missing, from the checkpoint on -> iterations done, seconds of training."""
    done, before, window = 0, 0.0, []
    optimizer = torch.optim.Adam(params.values(), lr=args.lr, fused=True)
    if checkpoint:
        done, before, window = (checkpoint[k] for k in ("iteration", "seconds", "window"))
        optimizer.load_state_dict(checkpoint["optimizer"])
    if done >= args.iterations or args.eval_only:
        return done, before
    episodes, validation = Episodes.of(args, "train"), args.val_every and Episodes.of(args, "val")
    out, T, M, start, begun = Path(args.out), args.meta_batch, len(args.modes), done, time.perf_counter()
    deadline, ending = begun + (math.inf if args.stop_after is None else args.stop_after), False
    log = out / "log.jsonl"     # lines from after the checkpoint, if the run was killed, will come again
    lines = log.read_text().splitlines() if checkpoint and log.exists() else []
    lines = [line for line in lines if json.loads(line)["iteration"] <= done]
    for number in (signal.SIGINT, signal.SIGTERM):      # the first ends the run cleanly, a second one at once
        signal.signal(number, lambda n, _: (stop.append(f"signal {n}"), signal.signal(n, signal.SIG_DFL)))

    def step(batch):
        return run_tasks(params, batch, args, args.device != "cpu")
    if args.device != "cpu" and not args.eager:
        step = recorded(step, params)
    with tqdm(total=args.iterations, initial=done, desc=args.title, disable=None) as bar:
        while not ending:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = args.lr * 0.5 ** (done // (args.lr_halve_every or math.inf))
            batch = episodes.repeated(done, T) if args.repeat_tasks else episodes.tasks(done * T, T)
            losses, accuracies = step(batch)
            optimizer.step()
            window.append(torch.stack([losses, accuracies[:, 0]]))     # stays on the device until logged
            done += 1
            bar.update()
            if done - start == 20:
                window[-1].cpu()                            # wait for the device
                left = (time.perf_counter() - begun) / 20 * (args.iterations - done) / 60
                bar.write(f"about {left:.0f} min to the end" + "; try --quick?" * (left > 120), sys.stderr)
            if time.perf_counter() > deadline:
                stop.append("--stop-after")
            ending = bool(stop) or done == args.iterations
            if done % args.log_every == 0 or done == args.iterations:
                losses, accuracies = torch.stack([x.cpu() for x in window]).unbind(1)     # (iterations, T)
                seconds = time.perf_counter() - begun       # the copy has waited for the device
                mode = torch.arange((done - len(window)) * T, done * T).view(losses.shape) % M
                shown = {args.modes[m]: accuracies[mode == m].mean().item() for m in mode.unique()}
                norms = {p: math.hypot(*(w.grad.norm() for w in group(params, p).values())) for p in PARTS}
                if not math.isfinite(losses.sum() + sum(norms.values())):
                    fail(f"not finite near iteration {done}: lower --lr, in another --out")
                line = {"iteration": done, "loss": losses.mean().item(), "accuracy": shown,
                        "gradient_norm": norms, "seconds": before + seconds, "synthetic": args.synthetic}
                if args.val_every and done // args.val_every > (done - len(window)) // args.val_every:
                    rows = evaluate(params, validation, args.val_tasks, args)
                    line["validation"] = dict(zip(PROTOCOLS, [summary(x, args.modes) for x in rows]))
                    begun = time.perf_counter() - seconds       # seconds count training alone
                lines.append(json.dumps(line))
                atomic_write(log, "\n".join(lines) + "\n")
                window, shown = [], {k: f"{x:.1f}%" for k, x in shown.items()}
                bar.set_postfix(loss=f"{line['loss']:.3f}", **shown)
                if bar.disable:                                 # not a terminal: lines instead of a bar
                    print(f"{args.title} {done}/{args.iterations}", bar.postfix, flush=True)
            if args.keep_every and done % args.keep_every == 0:
                atomic_write(out / f"params-{done}.pt", {k: w.detach().cpu() for k, w in params.items()})
            if done % args.save_every == 0 or ending:
                weights = {k: w.detach().cpu() for k, w in params.items()}
                atomic_write(out / "checkpoint.pt", {
                    "identity": identity(args), "iteration": done, "optimizer": optimizer.state_dict(),
                    "seconds": before + time.perf_counter() - begun, "window": window, "params": weights})
    return done, before + time.perf_counter() - begun


def report(result, args):
    """Print what was measured, under which protocol, with its interval.

    The paper's number stands beside it only where the run is that cell of the paper's table.
    """
    same = args.ways == 5 and args.shots in (1, 5) and args.image_size == 84 and not args.variant
    known = same and set(args.modes) <= set(LAYOUTS) and not args.synthetic
    setting = "".join(sorted(mode[0].upper() for mode in args.modes))       # MO: miniimagenet, omniglot
    paper = PAPER[result["method"]].get(setting, ("", ""))[args.shots == 5] if known else ""
    print(f"\n{args.title}: {args.ways}-way {args.shots}-shot, {args.image_size} px, {result['test_tasks']} "
          f"test tasks, after {result['iterations']} iterations of {result['seconds_per_iteration']} s\n"
          f"{'accuracy in %':16}{'paper protocol':18}{'inductive':18}" + TABLE * bool(paper))
    for name, row in result["accuracy"].items():
        both = row, (result["accuracy_inductive"] or {}).get(name)
        cells = [f"{x['mean']:.2f} +- {x['ci95']:.2f}" if x else "-" for x in both]
        print(f"{name:16}{cells[0]:18}{cells[1]:18}{paper if name == 'overall' else ''}")


def main():
    args = get_args()
    if args.device == "cpu":
        torch.set_num_threads(1)            # run_tasks has tasks side by side instead
    out, stop, test = Path(args.out), [], Episodes.of(args, "test")
    for file in out.glob("*") if args.overwrite else ():
        if file.name in ("checkpoint.pt", "log.jsonl", "result.json") or file.match("params-*.pt"):
            file.unlink()
    checkpoint = load(out / "checkpoint.pt", args) if (out / "checkpoint.pt").exists() else None
    if args.eval_only and not checkpoint:
        fail(f"--eval-only, but there is no {out / 'checkpoint.pt'}: train first, or name the run by --out")
    params = checkpoint["params"] if checkpoint else init_params(args)
    params = {k: w.to(args.device).requires_grad_() for k, w in params.items()}
    done, seconds = train(params, args, checkpoint, stop)
    if stop and done < args.iterations:
        print(f"stopped by {stop[0]} at iteration {done} of {args.iterations}; the same command continues")
        return
    for number in (signal.SIGINT, signal.SIGTERM):      # training is saved; evaluation may be cut anywhere
        signal.signal(number, signal.SIG_DFL)
    file, tasks = out / "result.json", test.sha256(args.test_tasks)
    result = json.loads(file.read_text()) if checkpoint and file.exists() else {}
    if [result.get(k) for k in ("iterations", "tasks_sha256", "data")] != [done, tasks, test.folders]:
        rows = list(evaluate(params, test, args.test_tasks, args))
        device = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        git = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40 2>{os.devnull}'
        result = {
            "method": args.method, "modes": args.modes, "ways": args.ways, "shots": args.shots,
            "synthetic": args.synthetic, "protocol": PROTOCOLS, "test_tasks": args.test_tasks,
            "tasks_sha256": tasks, "data": test.folders, "accuracy": summary(rows[0], args.modes),
            "accuracy_inductive": summary(rows[1], args.modes) if rows[1:] else None, "iterations": done,
            "seconds_train": round(seconds, 1), "seconds_per_iteration": round(seconds / max(done, 1), 4),
            "parameters": {part: sum(w.numel() for w in group(params, part).values()) for part in PARTS},
            "args": {k: v for k, v in vars(args).items() if k not in ("data_root", "cache_dir", "out")},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "device": device,
                         "threads": torch.get_num_threads(), "commit": os.popen(git).read().strip()},
            "per_task": rows[0].tolist(), "per_task_inductive": rows[1].tolist() if rows[1:] else None,
            "per_task_mode": [j % len(args.modes) for j in range(args.test_tasks)]}
        atomic_write(file, json.dumps(result))
    report(result, args)


if __name__ == "__main__":
    main()
