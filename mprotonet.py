"""ProtoNet, MProtoNet and MProtoNet+KML: prototypes in place of MAML's inner loop, FiLM or kernel modulation.

Papers: Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning, NeurIPS 2017. Abdollahzadeh and
others: Revisit Multimodal Meta-Learning through the Lens of Multi-Task Learning, NeurIPS 2021, Section 5, 6.

The idea. A network f maps images to features. A class is the mean of its support images' features, its
*prototype*, and a query image belongs to the class whose prototype is nearest. What gradient steps do in
kml.py, an average does here. But f is now the same for every task, of whatever *mode* (characters, birds,
photographs), unless a second network looks at the support images, says in 128 numbers v what kind of task it
is, and changes f: each channel's activations (film, as in mmaml.py) or each kernel entry (kml, as in kml.py):
    film   Y^ = (1 + scale(v)) * Y + shift(v)        after BatchNorm; this is MProtoNet
    kml    W^ = W * (1 + M(v)),  b^ = b + db(v)      M(v) = outer(g1(v), g2(v)); this is MProtoNet+KML
As a C_out x 9 C_in matrix M has rank 1 in layer 1, rank 3 in layers 2 to 4: see kml.py.

    paper        here                        shape or keys           where
    theta        group(params, "base")       conv{l} norm{l}         the network f; no head
    S_T, Q_T     task.support_*, .query_*    (N*K, 3, S, S) ...      N ways, K shots, Q queries, S pixels
    h, v_T       encode_task, v              (128,)                  KML Section 5.1
    g            modulation                  generator.*             KML Section 5.1; Eq. 8, 9, Figure 4
    M^l, db^l    omega["conv{l}.weight"]...  like W^l, like b^l      KML Eq. 8, 9
    theta^       modulate                    like theta              KML Eq. 6, 7
    c_k          prototypes                  (N, D)                  Snell Eq. 1; D = 9,216 at 84 pixels
    d            squared_distances           (N*Q, N)                Snell Eq. 2

Read it beside kml.py (`diff kml.py mprotonet.py`): prototypes in place of the head and the inner loop.
Run:  python mprotonet.py --synthetic --quick     a minute on two CPU cores, no download; prints accuracies
      python mprotonet.py --modes omniglot miniimagenet --shots 5 --modulation film
The released KML code does three things that its paper does not say. Here they are flags, and off:
--no-residual, --embed query, --transductive; --official is all three. (Their bugs are left out: README.) Its
ProtoNet, without modulation, is transductive too: --modulation none --official.
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

METHODS = {"none": "ProtoNet", "film": "MProtoNet", "kml": "MProtoNet+KML"}     # --modulation: name in tables
LAYERS = (1, 2, 3, 4)
EMBEDDING = 128                                     # length of the task embedding v
PARTS = ("base", "encoder", "generator")            # of the parameters
PROTOCOLS = {"paper": "BatchNorm statistics of the query images together, as in all published numbers",
             "inductive": "BatchNorm statistics of the adapted network on the support images"}
QUICK = {"image_size": 28, "meta_batch": 4, "iterations": 220, "test_tasks": 200}
TABLE, PAPER = "KML's Table 1", {    # overall accuracy in %, 5 ways, (1-shot, 5-shot); modes by first letters
    "ProtoNet": {"FM": (43.05, 57.70), "MO": (69.55, 75.12), "FMO": (58.14, 66.84), "ACFMO": (49.31, 58.91)},
    "MProtoNet": {"FM": (43.57, 56.03), "MO": (70.60, 75.72), "FMO": (59.62, 67.51), "ACFMO": (51.75, 59.95)},
    "MProtoNet+KML": {"FM": (44.40, 59.31), "MO": (73.69, 79.82), "FMO": (62.08, 70.03),
                      "ACFMO": (56.72, 64.91)}}
LEAST = {"ways": 2, "shots": 1, "queries": 1, "image_size": 8, "channels": 1, "meta_batch": 1, "log_every": 1,
         "save_every": 1, "test_tasks": 2, "val_tasks": 2, "workers": 1}      # of numbers; else 0
SHOWN = ("modulation", "ways", "shots", "image_size", "seed", "synthetic")      # what a report says anyway


def get_args(argv=None):
    about = __doc__.split("\n")[0] + " P: the paper's value; C: the released code's, ours unless it says so."
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.error = fail
    p.add_argument("--modulation", default=list(METHODS)[-1], choices=METHODS, help="none is plain ProtoNet")
    p.add_argument("--modes", nargs="+", default=["omniglot", "miniimagenet"], metavar="MODE",
                   help="omniglot miniimagenet fc100 cub aircraft, or folders of yours under the data root")
    p.add_argument("--ways", type=int, default=5, help="N, classes in a task (C: 5)")
    p.add_argument("--shots", type=int, default=1, help="K, support images a class (P, C: 1 and 5)")
    p.add_argument("--queries", type=int, default=15, help="Q, query images a class (C: 15)")
    p.add_argument("--image-size", type=int, default=84, help="S, pixels (C: 84)")
    p.add_argument("--channels", type=int, default=32, help="of layer 1, doubled in each next (C: 32)")
    p.add_argument("--no-norm-affine", action="store_true", help="BatchNorm without scale and shift (C: so)")
    p.add_argument("--generator", default="outer", choices=("outer", "full"),
                   help="kml's M: an outer product (P, C), or a linear layer for all of each kernel's M")
    p.add_argument("--no-residual", action="store_true", help="kml: W * M, not W * (1 + M) (P: no, C: yes)")
    p.add_argument("--embed", default="support", choices=("support", "query", "constant"),
                   help="v of the query pass is of the support images (P), of the query images (C), or, in "
                        "both passes, one learned vector, blind to the task: the control neither has")
    p.add_argument("--transductive", action="store_true", help="move prototypes by soft labels (P no, C yes)")
    p.add_argument("--official", action="store_true",
                   help="as C: --no-residual --embed query --transductive; without modulation the last alone")
    p.add_argument("--init-scale", type=float, default=1.0,
                   help="of the initial base kernels (P, C: 1); 0.01 is the size of W * M's kernels")
    p.add_argument("--distance-scale", type=float, default=1.0,
                   help="logits are minus this times the squared distances (P, C: 1)")
    p.add_argument("--meta-batch", type=int, default=10, help="T, tasks an iteration (C: 10)")
    p.add_argument("--repeat-tasks", action="store_true",
                   help="draw an iteration's tasks with replacement (C: yes, at test too)")
    p.add_argument("--iterations", type=int, default=30000, help="updates of all parameters (C: 30000)")
    p.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (C: 1e-3)")
    p.add_argument("--lr-halve-every", type=int, default=10000, help="iterations; 0 is never (C: 10000)")
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
    if p.parse_known_args(argv)[0].official:
        p.set_defaults(transductive=True)
        if p.parse_known_args(argv)[0].modulation != "none":
            p.set_defaults(no_residual=True, embed="query")
    args = p.parse_args(argv)
    for flag, of in {"generator": ("kml",), "no_residual": ("kml",), "embed": ("kml", "film")}.items():
        if getattr(args, flag) != defaults[flag] and args.modulation not in of:
            fail(f"--{flag.replace('_', '-')} (also set by --official) means nothing with --modulation "
                 f"{args.modulation}: give --modulation {' or '.join(of)}")
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    args.method = METHODS[args.modulation]
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
# BatchNorm, ReLU] with 32, 64, 128, 256 channels; the features are the last layer's, all pixels of them.

def group(params, name):
    """One part of all parameters: "base" (theta), "encoder" or "generator"."""
    if name == "base":
        return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def conv_norm(params, l, x, moments=None):
    """Convolution l and BatchNorm: x (n, C_in, S, S) -> (n, C_out, S/2, S/2), and the (mean, 1/std) it used.

    Unless given, these are of the batch x itself, in training and testing: running averages would mix tasks.
    (Scale and shift may go into the call, a tenth faster, as nothing is differentiated twice: see kml.py.)
    """
    scale, shift = params.get(f"norm{l}.scale"), params.get(f"norm{l}.shift")
    W, b = params[f"conv{l}.weight"], params[f"conv{l}.bias"]
    y = F.conv2d(x, W, b, stride=2, padding=1).to(W.dtype)      # bf16, if chosen, ends here
    if moments is None:
        y, *moments = torch.native_batch_norm(y, scale, shift, None, None, True, 0.0, 1e-5)
        return y, moments
    y = (y - moments[0][:, None, None]) * moments[1][:, None, None]
    return y if scale is None else y * scale[:, None, None] + shift[:, None, None], moments


def linear(params, name, x):
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):      # bf16 is for convolutions: 1 + M needs more
        return F.linear(x.to(W.dtype), W, b)


def forward(params, x, stats=None):
    """The base network f: images x (n, 3, S, S) -> features (n, D), and the moments each BatchNorm used,
    which another call takes as `stats` to normalise by them instead of its own batch's."""
    used = []
    for l in LAYERS:
        x, moments = conv_norm(params, l, x, stats[l - 1] if stats else None)
        used.append(moments)
        if f"film{l}.scale" in params:                                  # Eq. 3: after BatchNorm, before ReLU
            x = x * (1 + params[f"film{l}.scale"][:, None, None]) + params[f"film{l}.shift"][:, None, None]
        x = F.relu(x)
    return x.flatten(1).to(params["conv1.weight"].dtype), used


def class_means(features, members):
    """Prototypes (Snell, Eq. 1): features (n, D), the share of each in each class (n, N) -> means (N, D)."""
    with torch.autocast(features.device.type, enabled=False):
        return members.T @ features / members.sum(0)[:, None]


def squared_distances(x, y):
    """Of rows x (n, D) from rows y (N, D) -> (n, N), as |x|^2 - 2 x.y + |y|^2: needs no (n, N, D)."""
    with torch.autocast(x.device.type, enabled=False):
        return x.square().sum(1, keepdim=True) - 2 * x @ y.T + y.square().sum(1)


def encode_task(params, support_x):
    """The task encoder h: support images (N*K, 3, S, S) -> task embedding v (128,). It never sees a label.
    A mean over images has no order, but sums in floating point have one: so the images are sorted first.
    With --embed constant v is a parameter, the same for all tasks: what modulation gains then is not
    knowledge of the task, but another parametrisation of the same weights.
    """
    if "encoder.constant" in params:
        return params["encoder.constant"]
    x, encoder = support_x[support_x.sum((1, 2, 3)).argsort()], group(params, "encoder")
    for l in LAYERS:
        x = F.relu(conv_norm(encoder, l, x)[0])
    return F.relu(linear(encoder, "linear", x.mean((2, 3)))).mean(0)


def generator_sizes(args, l, c_in, c_out):
    """Outputs of the linear layers behind omega for layer l. FiLM: a scale and a shift for each channel. KML:
    rows x cols = W's entries (near-square), or these at once (152 times the parameters), and db."""
    rows, cols = (c_out, 9 * c_in) if l == 1 else (3 * c_out, 3 * c_in)
    sizes = {"film": {f"film{l}": 2 * c_out}, "full": {f"conv{l}.full": rows * cols, f"conv{l}.bias": c_out},
             "outer": {f"conv{l}.rows": rows, f"conv{l}.cols": cols, f"conv{l}.bias": c_out}}
    return sizes[args.generator if args.modulation == "kml" else "film"]


def modulation(params, v):
    """The generator g: task embedding v (128,) -> omega: for FiLM a scale and a shift (C_out,) a layer,
    for KML an M for each kernel (Eq. 8) and a db for each bias (Eq. 9)."""
    made = {k.removesuffix(".weight"): linear(params, f"generator.{k.removesuffix('.weight')}", v)
            for k in group(params, "generator") if k.endswith(".weight")}
    omega = {}
    for l in LAYERS:
        if f"film{l}" in made:
            omega[f"film{l}.scale"], omega[f"film{l}.shift"] = made[f"film{l}"].chunk(2)
            continue
        outer = f"conv{l}.rows" in made
        M = torch.outer(made[f"conv{l}.rows"], made[f"conv{l}.cols"]) if outer else made[f"conv{l}.full"]
        omega |= {f"conv{l}.weight": M, f"conv{l}.bias": made[f"conv{l}.bias"]}
    return omega


def modulate(theta, omega, one=1):
    """KML's theta^: each kernel entry times its own 1 + M (Eq. 6), each bias plus its own db (Eq. 7). FiLM
    leaves theta alone: its omega goes along, for `forward` to apply to the activations of each layer.

    one = 0 is --no-residual, W * M as the released code has it. Kernels then start about 100 times smaller,
    which has two effects. First, the outputs of the convolutions have a variance near 1e-6, below
    BatchNorm's epsilon of 1e-5. They are not normalised to a deviation of 1, but to 0.2 to 0.5 in the
    median channel, so the size of a kernel acts as a gate for its channel, and as a temperature of the
    distances. (--init-scale 0.01 and --distance-scale are controls for this.) Second, the steps of encoder
    and generator, which Adam gives a size of their own, are about 100 times larger relative to the kernel.
    (Not those of W: M multiplies them.) The bias offset db does nothing: BatchNorm subtracts it (kml.py).
    """
    kernels = {k: theta[k] * (one + M.reshape(theta[k].shape)) for k, M in omega.items() if "weight" in k}
    biases = {k: theta[k] + db for k, db in omega.items() if "bias" in k}
    return theta | omega | kernels | biases


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
        params |= {f"conv{l}.weight": xavier(c_out, c_in, 3, 3) * args.init_scale,
                   f"conv{l}.bias": torch.zeros(c_out)}
        if not args.no_norm_affine:
            params |= {f"norm{l}.scale": torch.ones(c_out), f"norm{l}.shift": torch.zeros(c_out)}
    for l, c_in, c_out in layers if args.modulation != "none" else ():
        for name, outputs in generator_sizes(args, l, c_in, c_out).items():
            default(f"generator.{name}", outputs, EMBEDDING)
    if args.embed == "constant":
        params["encoder.constant"] = torch.rand(EMBEDDING, generator=rng) / 4   # as long as h's v is at first
    elif args.modulation != "none":
        for l, c_in, c_out in layers:
            default(f"encoder.conv{l}", c_out, c_in, 3, 3)
            params |= {f"encoder.norm{l}.scale": torch.ones(c_out),
                       f"encoder.norm{l}.shift": torch.zeros(c_out)}
        default("encoder.linear", EMBEDDING, widths[-1])
    # Channels last is how convolutions like their kernels best, where there is no second derivative.
    return {k: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for k, w in params.items()}


# ------------------------------------------------------------------------------------------------- algorithm

def task_loss(params, task, args, evaluate=False):
    """ONE task: infer what kind it is, modulate, average the support set by class, be judged on the query.

    Returns the query loss, whose gradient trains everything (encoder and generator have no other teacher),
    the query logits (N*Q, N) and, if `evaluate`, the inductive ones. Numbers: lines of KML's Algorithm 2.
    """
    theta, omega, one = group(params, "base"), {}, 0 if args.no_residual else 1
    if args.modulation != "none":
        v = encode_task(params, task.support_x)                                     # 5: v = h(S)
        omega = modulation(params, v)                                               # 6: omega = g(v)
    fast = modulate(theta, omega, one)                                              # 7: theta^

    # In place of MAML's inner loop: a prototype for each class, the mean of its support images' features.
    support, stats = forward(fast, task.support_x)                                  # 8: adapt to S
    members = (task.support_y[:, None] == torch.arange(args.ways, device=support.device)).to(support.dtype)
    prototypes = class_means(support, members)
    if args.embed == "query":       # C: for the query pass the query images themselves say what the task is
        fast = modulate(theta, modulation(params, encode_task(params, task.query_x)), one)

    def classify(stats=None):
        query, _ = forward(fast, task.query_x, stats)
        logits = -args.distance_scale * squared_distances(query, prototypes)
        if args.transductive:       # C, done right: one step of soft k-means (Ren et al., ICLR 2018, Eq. 3)
            both = torch.cat([support, query]), torch.cat([members, logits.softmax(1)])
            logits = -args.distance_scale * squared_distances(query, class_means(*both))
        return logits
    logits = classify()
    loss = F.cross_entropy(logits, task.query_y)                                    # 8: loss on Q
    if not evaluate or args.transductive or args.embed == "query":      # with these, queries see each other
        return loss, logits
    return loss, logits, classify(stats)


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
