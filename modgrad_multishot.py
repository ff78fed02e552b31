"""The ModGrad cell on multi-shot learning: many drawings a class, up to 100 steps. With MAML, first-order MAML, Reptile.

Paper: Simon, Koniusz, Nock, Harandi: On Modulating the Gradient for Meta-Learning, ECCV 2020, Section 5.1, Figure 5.
The protocol is that of LEAP (Flennerhag et al., ICLR 2019) and, where it says nothing, of LEAP's released code.

The idea. Given hundreds of images a task can simply be trained for, batch after batch, and the question is how *fast* a
start and a way to step let it learn. A task is an alphabet never seen before, 20 of its characters the classes; it is
trained for 100 steps of 20 images; its training loss against the step and the accuracy on held-out drawings at the end
are what Figure 5 shows. So long a training is expensive to differentiate through, which is what the rivals differ in:
    modgrad    the gradient is modulated entry by entry (see modgrad.py); differentiated through the steps
    maml       plain steps; differentiated through
    fomaml     plain steps, whose gradients count as constants: the last point's gradient is handed to the start
    reptile    plain steps; the start moves towards where they end, and no gradient of the outer loss is needed

    paper          here                        shape or keys                     where
    theta          group(params, "base")       conv{l} norm{l} head              Conv-4
    D_trn          task.support_x, .support_y  (K, B, 1, S, S), (K, B)           a batch of B images for each of K steps
    D_val          task.query_x, .query_y      (N*Q, 1, S, S), (N*Q,)            N ways, Q held-out drawings of each
    v              v                           (300,)                            Eq. 9
    phi_1, phi_2   cell                        generator.{layer}.rows, .cols     Eq. 6, 7
    M              modulation                  like the adapted parameters       Eq. 8
    alpha, K       --alpha, --steps            0.1, see below                    Eq. 5

What is drawn. The paper says that classes have 1 to 25 samples; Omniglot has 20 drawings a character, of which LEAP holds
out 5. Here a class has 1 to 15 training drawings, each number as likely, and 5 others are held out (--shots 15 15 is
LEAP's: all equal). Of 50 alphabets 46 have 20 characters: 25 for training (P), 10 for testing, 11 for validation (LEAP).
What the paper does not give and is chosen here: ModGrad trains through --steps 5 (as LEAP's code does for its MAML), on the
layers, step size and cells of its mini-ImageNet runs; MAML is not in its figure. Every algorithm is *tested* for 100 steps. With
these cells M starts at 0.0001 in the mean, half its entries 0: until the generator has learned, ModGrad's steps do nothing.
Of LEAP's code this keeps the network, its initialisation, and the random turns of all images, held-out ones too. It departs in that
- the outer loss of modgrad, maml and fomaml is that of the held-out drawings (Algorithm 1; the code's FOMAML takes the last
  training batch), and the accuracy is one on held-out drawings (in the code `if self.train` asks whether a method exists, which is
  always so: its test stays on the others, by running BatchNorm statistics);
- each visit to an alphabet draws its characters, their numbering, and what is held out anew (the code: once for a run), and a step's
  images with replacement (the code: each image nearly as often);
- strokes are bright on dark; inner gradients' entries are held within +-20 (--inner-clip).
LEAP itself is left out: its 83.3 % in the tables is the paper's.

Read it beside modgrad.py: the same steps, more of them, and two algorithms that do not differentiate through them.
Run:  python modgrad_multishot.py --synthetic --quick     a minute or two on two CPU cores, no download; prints accuracies
      python modgrad_multishot.py --algorithm reptile
A task of five steps takes a CPU core 0.3 (reptile) to 0.6 s (maml): the protocol two to four hours for modgrad and maml,
which train through 5 steps, over a day for fomaml and reptile, of 100; at `--channels 16 --steps 5 --meta-batch 5` all
take 5 to 12 minutes, and a few more for the test. It was never run on a GPU.
"""
import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    Alphabets,
    Task,
    atomic_write,
    canonical_mode,
    cores,
    fail,
    in_threads,
    student,
)

METHODS = {"modgrad": "ModGrad", "maml": "MAML", "fomaml": "FOMAML", "reptile": "Reptile"}
LAYERS = ("conv1", "conv2", "conv3", "conv4")
PARTS = ("base", "encoder", "generator")            # of the parameters; no algorithm here has an encoder
PROTOCOLS = {"paper": "BatchNorm statistics of the held-out images together",
             "inductive": "BatchNorm statistics of the adapted network on its last ten training batches, nearly LEAP's"}
QUICK = {"channels": 16, "steps": 5, "meta_batch": 2, "iterations": 150, "test_steps": 50, "test_tasks": 20}
TABLE, PAPER = "ModGrad's Figure 5", defaultdict(lambda: "", {"ModGrad": 85.1, "LEAP": 83.3, "Reptile": 76.4})    # accuracy, %
MARKS = (1, 2, 5, 10, 20, 50, 100)                  # steps after which the accuracy is measured, besides the last
# (steps, their size, adapted layers, outer optimiser, its rate): ModGrad's optimiser from its paper, all of the others from LEAP's code.
DEFAULTS = {"modgrad": (5, 0.1, ["conv3", "conv4"], "adam", 1e-3), "maml": (5, 0.1, ["all"], "sgd", 0.5),
            "fomaml": (100, 0.1, ["all"], "sgd", 0.5), "reptile": (100, 0.1, ["all"], "sgd", 0.1)}
LEAST = {"ways": 2, "queries": 1, "batch": 2, "image_size": 16, "channels": 1, "meta_batch": 1, "log_every": 1, "save_every": 1,
         "test_tasks": 2, "val_tasks": 2, "rank": 1, "context": 1, "steps": 1, "test_steps": 1, "workers": 1}     # of numbers; else 0
SHOWN = ("adapt", "ways", "shots", "image_size", "seed", "synthetic")           # what a report says anyway


def column(i):
    """A column of DEFAULTS for a help text."""
    return ", ".join(f"{algorithm} {' '.join(row[i]) if i == 2 else row[i]}" for algorithm, row in DEFAULTS.items())


def get_args(argv=None):
    about = __doc__.split("\n")[0] + " P: the paper's value; L: that of LEAP and its code, ours unless it says so."
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.error = fail
    p.add_argument("--algorithm", default="modgrad", choices=METHODS, help="inner step and outer loss")
    p.add_argument("--modes", nargs=1, default=["omniglot"], metavar="MODE", help="a data set of alphabets: omniglot (P, L)")
    p.add_argument("--ways", type=int, default=20, help="N, characters of an alphabet in a task (P, L: 20)")
    p.add_argument("--shots", type=int, nargs=2, default=[1, 15], metavar=("LEAST", "MOST"),
                   help="training drawings a class, any number from LEAST to MOST (P: 1 to 25, of 20 that there are; L: 15 15)")
    p.add_argument("--queries", type=int, default=5, help="Q, held-out drawings a class (L: 5)")
    p.add_argument("--batch", type=int, default=20, help="B, images a step (L: 20)")
    p.add_argument("--image-size", type=int, default=28, help="S, pixels (L: 28)")
    p.add_argument("--channels", type=int, default=64, help="of each layer (L: 64)")
    p.add_argument("--steps", type=int, help=f"K, inner steps in training (L: 100, MAML 5): {column(0)}")
    p.add_argument("--test-steps", type=int, default=100, help="steps in testing (L: 100)")
    p.add_argument("--alpha", type=float, help=f"their size (L: 0.1): {column(1)}")
    p.add_argument("--adapt", nargs="+", metavar="LAYER", help=f"layers that the steps change, as conv4 head; or all: {column(2)}")
    p.add_argument("--rank", type=int, default=5, help="u, columns that are mixed in a ModGrad cell (P: 5 elsewhere)")
    p.add_argument("--context", type=int, default=300, help="length of v (P: 300 elsewhere)")
    p.add_argument("--start-at-one", action="store_true", help="ModGrad's M starts near 1, as MAML, not near 0 (C: near 0)")
    p.add_argument("--inner-clip", type=float, default=20.0, help="of the inner gradient's entries (L: none)")
    p.add_argument("--first-order", action="store_true", help="hold the inner gradients constant (maml: this is fomaml)")
    p.add_argument("--meta-batch", type=int, default=20, help="T, tasks an iteration (L: 20)")
    p.add_argument("--iterations", type=int, default=1000, help="updates (L: 1,000)")
    p.add_argument("--outer", choices=("adam", "sgd"), help=f"outer optimiser (P: adam; L: sgd): {column(3)}")
    p.add_argument("--lr", type=float, help=f"its learning rate (P: 1e-3; L: 0.1, FOMAML and MAML 0.5): {column(4)}")
    p.add_argument("--lr-halve-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--seed", type=int, default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-tasks", type=int, default=100, help="over all alphabets together (L: one of each of 10 alphabets)")
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=22, help="over all alphabets together")
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="keeps images decoded once")
    p.add_argument("--synthetic", action="store_true", help="procedural characters in invented alphabets: no download")
    p.add_argument("--quick", action="store_true", help=f"about two minutes on two CPU cores: {QUICK}")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--workers", type=int, default=cores(), help="CPU: tasks at a time, one thread each")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16: the network's layers only")
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
    args.method = METHODS[args.algorithm]
    for key, value in zip(("steps", "alpha", "adapt", "outer", "lr"), DEFAULTS[args.algorithm]):
        defaults[key] = value
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    if args.algorithm == "reptile" and args.adapt != ["all"]:
        fail("--algorithm reptile --adapt: what its steps do not change would never be trained: leave --adapt out")
    if args.algorithm == "modgrad" and "all" in args.adapt:
        fail("--algorithm modgrad --adapt all: a cell is for kernels and biases; name the layers, as conv3 conv4 head")
    for layer in args.adapt:
        if layer not in ("all", *LAYERS, "head"):
            fail(f"--adapt {layer}: not there; choose from all {' '.join(LAYERS)} head")
    if not 1 <= args.shots[0] <= args.shots[1]:
        fail(f"--shots {args.shots[0]} {args.shots[1]}: give two numbers from 1 on, the smaller one first")
    unused = {"modgrad": [], "maml": ["rank", "context", "start_at_one"]}
    for key in unused.get(args.algorithm, ["rank", "context", "first_order", "start_at_one"]):
        if getattr(args, key) != defaults[key]:
            print(f"note: {args.method} does not use --{key.replace('_', '-')}, so it stays {defaults[key]}", file=sys.stderr)
        setattr(args, key, defaults[key])               # and does not make it another run
    args.method += f" on {'+'.join(args.adapt)}" * (args.adapt != defaults["adapt"])
    changed = {k: '+'.join(map(str, v)) if isinstance(v, list) else v for k, v in identity(args).items()
               if k not in ("modes", "algorithm") and v != defaults.get(k, v)}
    if args.out is None:                                # named by its method and what is not default
        words = [f"{k}={v}" for k, v in changed.items()]
        args.out = os.path.join("runs", "-".join([args.method, *args.modes, *words]).lower())
    flags = {f"--{k.replace('_', '-')}": v for k, v in changed.items() if k not in SHOWN}
    args.variant = [flag if v is True else f"{flag} {str(v).replace('+', ' ')}" for flag, v in flags.items()]
    mark = ["SYNTHETIC"] if args.synthetic else []
    args.title = " ".join([args.method, *mark, *args.modes, *args.variant])
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    args.device = {"auto": (gpus + ["cpu"])[0], "cuda": (gpus + ["cuda"])[0]}.get(args.device, args.device)
    if args.device not in ("cpu", *gpus):
        fail(f"--device {args.device}: not there; choose from {' '.join(['cpu', *gpus])}")
    for key, value in vars(args).items():
        if isinstance(value, (int, float)) and not LEAST.get(key, 0) <= value < 2 ** 63:
            fail(f"--{key.replace('_', '-')} {value}: give a number from {LEAST.get(key, 0)} on")
    return args


# --------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors: Conv-4 on images of one channel. `norm` is BatchNorm by name.

class Norm:
    """BatchNorm for one forward pass: with the statistics of the batch x itself, in training and testing, which it keeps in
    `used`; or, given `stats` from another pass, with those. Scale and shift stay outside the call: with them inside, torch
    2.13's vmap gets second derivatives wrong."""

    def __init__(self, stats=None):
        self.stats, self.used = stats, {}

    def __call__(self, params, name, x):
        if self.stats is None:
            x, *self.used[name] = torch.native_batch_norm(x, None, None, None, None, True, 0.0, 1e-5)
        else:
            mean, invstd = self.stats[name]
            x = (x - mean[:, None, None]) * invstd[:, None, None]
        return x * params[f"{name}.scale"][:, None, None] + params[f"{name}.shift"][:, None, None]


def conv(params, name, x, stride=1):
    W = params[f"{name}.weight"]
    x = F.conv2d(x, W, params.get(f"{name}.bias"), stride, W.shape[-1] // 2)
    return x.to(W.dtype)                                # bf16, if chosen, ends here


def linear(params, name, x):
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):      # bf16 is for convolutions
        return F.linear(x.to(W.dtype), W, b)


def conv4_block(params, name, x, norm):
    """Convolution, 2x2 max-pool, BatchNorm, ReLU, in the order of LEAP's code: x (n, C_in, S, S) -> (n, C, S/2, S/2)."""
    x = F.max_pool2d(conv(params, name, x), 2)
    return F.relu(norm(params, name.replace("conv", "norm"), x))


def head_block(params, name, x, norm):
    return linear(params, name, x.flatten(1))


def run_blocks(params, x, norm, first=0):
    """The network from its block `first` on; all of it: images (n, 1, S, S) -> logits (n, N)."""
    for name in LAYERS[first:]:
        x = conv4_block(params, name, x, norm)
    return head_block(params, "head", x, norm)


def group(params, name):
    """One part of all parameters: "base" (theta), "encoder" or "generator"."""
    if name == "base":
        return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def adapted_keys(args, params):
    """Keys of the parameters that inner steps change."""
    return [k for k in group(params, "base") if "all" in args.adapt or k.split(".")[0] in args.adapt]


def init_params(args):
    """All parameters, drawn from the seed -> flat dict. The base network's are the same for every algorithm."""
    rng, params = torch.Generator().manual_seed(args.seed), {}

    def default(name, n_out, n_in):
        root = math.sqrt(n_in)                          # PyTorch's: uniform within 1 / root of the number of inputs
        params[f"{name}.weight"] = (2 * torch.rand(n_out, n_in, generator=rng) - 1) / root
        params[f"{name}.bias"] = (2 * torch.rand(n_out, generator=rng) - 1) / root

    c_in, c = 1, args.channels
    for layer in LAYERS:
        default(layer, c, 9 * c_in)
        params[f"{layer}.weight"] = params[f"{layer}.weight"].view(c, c_in, 3, 3)
        params |= {f"{layer.replace('conv', 'norm')}.scale": torch.ones(c), f"{layer.replace('conv', 'norm')}.shift": torch.zeros(c)}
        c_in = c
    default("head", args.ways, c * (args.image_size // 16) ** 2)
    if args.algorithm == "modgrad":
        for k in adapted_keys(args, params):
            layer, part = k.split(".")
            n_out, *n_in = params[k].shape
            sizes = {"bias": n_out}
            if part == "weight":                        # a 3x3 kernel (C_out, C_in, 3, 3) seen as near-square
                sizes = {"rows": 3 * n_out, "cols": 3 * n_in[0]} if len(n_in) == 3 and n_in[0] > 3 else {"rows": n_out, "cols": math.prod(n_in)}
            for factor, n in sizes.items():             # phi: Linear, ReLU, Linear; sizes of modgrad.py
                default(f"generator.{layer}.{factor}.1", n, args.context)
                default(f"generator.{layer}.{factor}.2", args.rank + args.rank * n, n)
                if args.start_at_one:
                    params[f"generator.{layer}.{factor}.2.bias"][args.rank:] = 1.0
    # Channels last is how convolutions like their kernels best.
    return {k: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for k, w in params.items()}


# ------------------------------------------------------------------------------------------------- inner steps
# Each takes (params, fast, loss, args, noisy): what is adapted so far, the loss on the step's batch as a function of it, and
# `noisy`, which clips a gradient. Each returns what is adapted then. The text of the first two is that of modgrad.py.

def maml_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * gradient(theta)                                            (Finn et al., ICML 2017)"""
    gradient = noisy(torch.func.grad(loss)(fast))
    return {k: fast[k] - args.alpha * gradient[k] for k in fast}


def modgrad_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * M(v) * gradient(theta)                                     (Eq. 5; Algorithm 1, 9-13)"""
    gradient = noisy(torch.func.grad(loss)(fast))                                       # 10

    def step(v):
        M = modulation(params, v, fast)
        return {k: fast[k] - args.alpha * M[k] * gradient[k] for k in fast}
    v = next(iter(fast.values())).new_zeros(args.context)                               # 9
    v = -torch.func.grad(lambda v: loss(step(v)))(v)                                    # 11: Eq. 9
    return step(v.detach() if args.first_order else v)                                  # 12, 13


def fomaml_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * g, where g is the gradient as a number, not as a function: so d theta_K / d theta_0 = 1, and
    nothing of the step needs to be kept                                          (Finn et al., ICML 2017, Section 5.2)"""
    with torch.no_grad():
        gradient = noisy(torch.func.grad(loss)(fast))
    return {k: fast[k] - args.alpha * gradient[k] for k in fast}


def reptile_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * g: plain SGD                                                    (Nichol et al., 2018)"""
    return fomaml_step(params, fast, loss, args, noisy)


STEPS = {"modgrad": modgrad_step, "maml": maml_step, "fomaml": fomaml_step, "reptile": reptile_step}


# ------------------------------------------------------------------------------------------------ outer losses
# Each takes (params, fast, logits, task): the start, what is adapted after the last step, logits of the held-out images. Its gradient
# with respect to params, the mean over tasks, is what the outer optimiser gets.

def query_outer(params, fast, logits, task):
    """L(D_val; theta_K). Its gradient goes back through the steps as far as they let it: all of the way for ModGrad and MAML;
    for FOMAML, d theta_K / d theta_0 = 1, it is the gradient at theta_K."""
    return F.cross_entropy(logits, task.query_y)


def reptile_outer(params, fast, logits, task):
    """|theta - theta_K|^2 / 2 for a constant theta_K, whose gradient is theta - theta_K: a step of size epsilon (--lr) of SGD
    is theta <- theta + epsilon * mean(theta_K - theta)                       (Nichol et al., 2018, Algorithm 2)"""
    return sum((params[k] - w.detach()).square().sum() for k, w in fast.items()) / 2


OUTER = {"modgrad": query_outer, "maml": query_outer, "fomaml": query_outer, "reptile": reptile_outer}


def cell(params, name, v):
    """A sister network phi and its mixture: context v -> h a, a column (n,)                (Eq. 6, 7)."""
    out = linear(params, f"{name}.2", F.relu(linear(params, f"{name}.1", v)))
    n = params[f"{name}.1.weight"].shape[0]
    u = len(out) // (n + 1)
    return out[u:].view(n, u) @ out[:u].softmax(0)


def modulation(params, v, like):
    """The generator: context v -> M, a factor for each entry of the parameters `like`  (Eq. 8, then ReLU).

    Kernels' are >= 0. Factors of biases may have any sign: Eq. 8 speaks of the outer product alone. (The released code
    cuts these off at 0 too.)
    """
    M = {}
    for k, w in like.items():
        layer, part = k.rsplit(".", 1)
        if part == "weight":
            rows, cols = (cell(params, f"generator.{layer}.{factor}", v) for factor in ("rows", "cols"))
            M[k] = F.relu(torch.outer(rows, cols)).view(w.shape)
        else:
            M[k] = cell(params, f"generator.{layer}.{part}", v)
    return M


# ------------------------------------------------------------------------------------------------- algorithm

def marks(steps):
    """Numbers of steps after which a test measures the accuracy."""
    return [k for k in MARKS if k < steps] + [steps]


def task_loss(params, task, args, evaluate=False):
    """ONE task: adapt what --adapt names by a step on each of the task's batches, be judged on its held-out drawings.

    Returns the outer loss, whose gradient trains everything, and the logits (N*Q, N) of the held-out drawings. If `evaluate`,
    in place of that loss the losses (K,) of the batches, each before its step, and logits (marks, N*Q, N) after several numbers
    of steps, the last included; then (N*Q, N), the inductive ones. Numbers: lines of Algorithm 1.
    """
    keys = adapted_keys(args, params)
    fast, losses, held_out = {k: params[k] for k in keys}, [], []                       # 6: theta^0
    moved = {k.split(".")[0].replace("norm", "conv") for k in keys}
    first = [name in moved for name in (*LAYERS, "head")].index(True)

    def noisy(gradient):
        gradient = {k: g.clamp(-args.inner_clip, args.inner_clip) for k, g in gradient.items()}
        return {k: g.detach() for k, g in gradient.items()} if args.first_order else gradient
    for k, (x, y) in enumerate(zip(task.support_x, task.support_y), 1):                 # 8
        for name in LAYERS[:first]:                     # blocks before the first adapted one: run once a step
            x = conv4_block(params, name, x, Norm())

        def support_loss(fast, x=x, y=y):
            return F.cross_entropy(run_blocks(params | fast, x, Norm(), first), y)
        if evaluate:
            losses.append(support_loss(fast))
        fast = STEPS[args.algorithm](params, fast, support_loss, args, noisy)           # 9-13
        if evaluate and k in marks(len(task.support_x)):
            held_out.append(run_blocks(params | fast, task.query_x, Norm()))
    if not evaluate:
        logits = run_blocks(params | fast, task.query_x, Norm())
        return OUTER[args.algorithm](params, fast, logits, task), logits                # 16, 17
    norm = Norm()
    run_blocks(params | fast, task.support_x[-10:].flatten(0, 1), norm)
    return torch.stack(losses), torch.stack(held_out), run_blocks(params | fast, task.query_x, Norm(norm.used))


# ============================================================================================================
# From here on the text is that of the other scripts, with curves beside their accuracies.

def run_tasks(params, batch, args, vectorise, evaluate=False):
    """task_loss of T tasks -> losses (T,) and accuracies (T,) in % on held-out drawings; if `evaluate`: losses (T, K), accuracies
    (T, marks) of the paper's protocol, (T,) inductive.

    In training it adds the mean outer loss's gradient to .grad. vmap fills a GPU. On a CPU each task has a thread of its own,
    and gradients are added in the order of the tasks.
    """
    T, weights = len(batch.mode), list(params.values())

    def one(task):
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16"):
            loss, *logits = task_loss(params, task, args, evaluate)
        shown = loss if evaluate else F.cross_entropy(logits[0], task.query_y)          # Reptile's outer loss is a distance
        return loss, shown, *(100 * (x.argmax(-1) == task.query_y).float().mean(-1) for x in logits)

    def one_in_a_thread(task):
        with torch.set_grad_enabled(not evaluate):      # each thread has a switch of its own
            loss, *found = one(task)
        gradients = () if evaluate else torch.autograd.grad(loss / T, weights)
        return [x.detach() for x in found], gradients

    if vectorise:
        loss, *columns = torch.func.vmap(one)(batch)
        if not evaluate:
            loss.mean().backward()
        return [x.detach() for x in columns]
    rows = []
    tasks = [Task(*(x[i] for x in batch)) for i in range(T)]
    for found, gradients in in_threads(one_in_a_thread, tasks, args.workers):
        rows.append(found)
        for w, g in zip(weights, gradients):
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
            w.grad += g
    return [torch.stack(column) for column in zip(*rows)]


def evaluate(params, episodes, count, args):
    """The first `count` tasks -> losses (count, K), accuracies in % (count, marks), inductive (count,), as arrays."""
    rows = []
    with torch.no_grad(), tqdm(total=count, desc=f"{episodes.split} tasks", disable=None, leave=False) as bar:
        for first in range(0, count, 10):
            batch = episodes.tasks(first, min(10, count - first))
            rows.append(run_tasks(params, batch, args, args.device != "cpu", evaluate=True))
            bar.update(len(batch.mode))
    return [torch.cat(x).double().cpu().numpy().round(4) for x in zip(*rows)]


def summary(per_task, alphabets):
    """Values of tasks (n, ...) and their alphabets (n,) -> {"mean", "ci95"}. Tasks of one alphabet are alike: the mean is that
    of the alphabets' means m, and the half width of its 95 % interval t s(m) / sqrt(number of alphabets), t Student's."""
    means = np.stack([per_task[alphabets == a].mean(0) for a in np.unique(alphabets)])
    return {"mean": means.mean(0).round(4).tolist(), "ci95": (student(len(means)) * means.std(0, ddof=1) / math.sqrt(len(means))).round(4).tolist()}


def identity(args):
    """What makes two runs the same run: the method, and the arguments that change what is learned."""
    other = ("iterations", "test_tasks", "val_tasks", "val_every", "device", "data_root", "cache_dir", "out",
             "log_every", "save_every", "keep_every", "stop_after", "eval_only", "overwrite", "quick",
             "test_steps", "title", "variant", "workers")
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


def measured(rows, alphabets):
    """What `evaluate` returned -> {"accuracy", "accuracy_inductive": after the last step; "curve": its training losses before
    each step, "after": accuracies after several numbers of steps; "loss": the mean of the curve}, each with an interval."""
    losses, accuracies, inductive = rows
    return {"accuracy": summary(accuracies[:, -1], alphabets), "accuracy_inductive": summary(inductive, alphabets),
            "loss": summary(losses.mean(1), alphabets), "curve": summary(losses, alphabets),
            "after": {"steps": marks(losses.shape[1])} | summary(accuracies, alphabets)}


def train(params, args, checkpoint, stop):
    """Run the iterations that are missing, from the checkpoint on -> iterations done, seconds of training."""
    done, before, window = 0, 0.0, []
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[args.outer](params.values(), lr=args.lr, fused=True)
    if checkpoint:
        done, before, window = (checkpoint[k] for k in ("iteration", "seconds", "window"))
        optimizer.load_state_dict(checkpoint["optimizer"])
    if done >= args.iterations or args.eval_only:
        return done, before
    episodes, validation = Alphabets.of(args, "train"), args.val_every and Alphabets.of(args, "val")
    out, T, start, begun = Path(args.out), args.meta_batch, done, time.perf_counter()
    deadline, ending = begun + (math.inf if args.stop_after is None else args.stop_after), False
    log = out / "log.jsonl"     # lines from after the checkpoint, if the run was killed, will come again
    lines = log.read_text().splitlines() if checkpoint and log.exists() else []
    lines = [line for line in lines if json.loads(line)["iteration"] <= done]
    for number in (signal.SIGINT, signal.SIGTERM):      # the first ends the run cleanly, a second one at once
        signal.signal(number, lambda n, _: (stop.append(f"signal {n}"), signal.signal(n, signal.SIG_DFL)))
    with tqdm(total=args.iterations, initial=done, desc=args.title, disable=None) as bar:
        while not ending:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = args.lr * 0.5 ** (done // (args.lr_halve_every or math.inf))
            losses, accuracies = run_tasks(params, episodes.tasks(done * T, T), args, args.device != "cpu")
            optimizer.step()
            window.append(torch.stack([losses, accuracies]).mean(1))        # stays on the device until logged
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
                loss, accuracy = torch.stack([x.cpu() for x in window]).mean(0).tolist()
                seconds = time.perf_counter() - begun       # the copy has waited for the device
                norms = {p: math.hypot(*(w.grad.norm() for w in group(params, p).values())) for p in PARTS}
                if not math.isfinite(loss + sum(norms.values())):
                    fail(f"not finite near iteration {done}: lower --lr, in another --out")
                line = {"iteration": done, "loss": loss, "accuracy": accuracy, "gradient_norm": norms,
                        "seconds": before + seconds, "synthetic": args.synthetic}
                if args.val_every and done // args.val_every > (done - len(window)) // args.val_every:
                    rows = evaluate(params, validation, args.val_tasks, args)
                    line["validation"] = measured(rows, validation.alphabets(0, args.val_tasks))
                    begun = time.perf_counter() - seconds       # seconds count training alone
                lines.append(json.dumps(line))
                atomic_write(log, "\n".join(lines) + "\n")
                window = []
                bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1f}%")
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
    """Print what was measured, under which protocol, with its interval, beside the paper's number."""
    known = args.modes == ["omniglot"] and args.ways == 20 and args.test_steps == 100 and not args.synthetic and not args.variant
    paper, after, curve = PAPER[result["method"]] if known else "", result["after"], result["curve"]
    print(f"\n{args.title}: {args.ways}-way, {args.shots[0]} to {args.shots[1]} shots, {args.image_size} px, {result['test_tasks']} test "
          f"tasks of {len(result['alphabets'])} alphabets, after {result['iterations']} iterations of {result['seconds_per_iteration']} s\n"
          f"accuracy in % after {args.test_steps} steps on held-out drawings: "
          + ", ".join("{} {mean:.2f} +- {ci95:.2f}".format(name, **result[key]) for name, key in (
              ("inductive", "accuracy_inductive"), ("paper protocol", "accuracy"))) + f"; {TABLE}: {paper}" * bool(paper))
    print("steps             " + "".join(f"{k:8}" for k in after["steps"]))
    print("accuracy after    " + "".join(f"{x:8.2f}" for x in after["mean"]))
    print("loss of last batch" + "".join(f"{x:8.3f}" if x < 1000 else f"{x:8.1e}" for x in (curve["mean"][k - 1] for k in after["steps"])) + "    (before its step)")


def main():
    args = get_args()
    out, stop, test = Path(args.out), [], Alphabets.of(args, "test")
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
        rows, alphabets = evaluate(params, test, args.test_tasks, args), test.alphabets(0, args.test_tasks)
        device = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        git = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40 2>{os.devnull}'
        result = {
            "method": args.method, "modes": args.modes, "ways": args.ways, "shots": args.shots,
            "synthetic": args.synthetic, "protocol": PROTOCOLS, "test_tasks": args.test_tasks,
            "tasks_sha256": tasks, "data": test.folders, "iterations": done,
            **measured(rows, alphabets),
            "seconds_train": round(seconds, 1), "seconds_per_iteration": round(seconds / max(done, 1), 4),
            "parameters": {part: sum(w.numel() for w in group(params, part).values()) for part in PARTS},
            "args": {k: v for k, v in vars(args).items() if k not in ("data_root", "cache_dir", "out")},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "device": device,
                         "threads": torch.get_num_threads(), "commit": os.popen(git).read().strip()},
            "per_task": rows[1][:, -1].tolist(), "per_task_inductive": rows[2].tolist(),
            "per_task_loss": rows[0].mean(1).round(4).tolist(), "per_task_alphabet": alphabets.tolist(), "alphabets": test.names}
        atomic_write(file, json.dumps(result))
    report(result, args)


if __name__ == "__main__":
    main()
