"""ModGrad: a second network decides, entry by entry, how far each parameter follows its gradient. With its rivals.

Paper: Simon, Koniusz, Nock, Harandi: On Modulating the Gradient for Meta-Learning, ECCV 2020, Sections 3 and 5.1.

The idea. From the few images of a support set a gradient is a noisy thing, and MAML follows all of it alike. ModGrad
learns what to follow: in a step, each entry of the gradient has a factor of its own, made for this task,
    theta <- theta - alpha * M(v) * gradient(theta)         M = ReLU(outer(h1 a1, h2 a2))          Eq. 5, 8
by a *cell* for each adapted layer. Two sister networks turn a context v into u columns h each and, by softmax, a
mixture a of them; the outer product of the two mixed columns has as many entries as the layer's kernel. v says what
the task is: from v = 0 a trial step is made, and v is then the negative gradient, with respect to v, of the loss
after that step (Eq. 9), the direction in which the step would have been a better one. A step of ModGrad so takes two
forward and two backward passes. M starts near 1e-4, so that at first hardly anything adapts: this is the released code's
start, entry by entry. --start-at-one starts it near 1, where ModGrad begins as MAML on the same layers.

    paper          here                        shape or keys                     where
    theta          group(params, "base")       conv{l} norm{l} head              the network
    D_trn, D_val   task.support_*, .query_*    (N*K, 3, S, S) ...                N ways, K shots, Q queries, S pixels
    v              v                           (300,)                            Eq. 9
    phi_1, phi_2   cell                        generator.{layer}.rows, .cols     Eq. 6, 7
    u              --rank                      5                                 Eq. 6
    M              modulation                  like the adapted parameters       Eq. 8
    alpha, K       --alpha, --steps            0.1, 1                            Eq. 5

--algorithm also takes the rivals of the paper's Figure 9. Their inner steps stand one under the other, below. (LEO, in
its Table 1, moves a code z from which the classifier is decoded, z <- z - alpha * gradient(z), on features of a network
trained before; it is left out.) `--algorithm maml --adapt conv3 conv4` is the control that the paper lacks: MAML on
ModGrad's two layers, that is M = 1.

Read it beside mmaml.py: MAML's inner loop, with other steps in it.
Run:  python modgrad.py --synthetic --quick     about two minutes on two CPU cores, no download; prints accuracies
      python modgrad.py --shots 5 --algorithm maml
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

METHODS = {"modgrad": "ModGrad", "maml": "MAML", "metasgd": "Meta-SGD", "cavia": "CAVIA", "tnet": "T-Net"}
PARTS = ("base", "encoder", "generator")            # of the parameters; no algorithm here has an encoder
PROTOCOLS = {"paper": "BatchNorm statistics of the query images together, as in all published numbers",
             "inductive": "BatchNorm statistics of the adapted network on the support images"}
QUICK = {"image_size": 28, "channels": 32, "iterations": 220, "lr_halve_every": 0, "test_tasks": 200, "val_every": 100,
         "keep_every": 100}
TABLE, PAPER = "ModGrad's Table 2", defaultdict(dict, {      # mini-ImageNet, accuracy in %, 5 ways, (1-shot, 5-shot)
    "ModGrad": {"M": (53.20, 69.17)}, "ModGrad, wrn28-10": {"M": (65.72, 81.17)}, "MAML": {"M": (47.89, 64.59)},
    "Meta-SGD": {"M": (50.50, 64.00)}, "CAVIA": {"M": (51.82, 65.85)},      # CAVIA's with 512 channels
    "T-Net": {"M": (51.70, "-")}})                                          # (M)T-Net's
# What the algorithms differ in besides their step: (steps, their size, adapted layers). For ModGrad the paper's; MAML's of its
# own paper; those of the others are the usual ones of their papers' mini-ImageNet runs.
DEFAULTS = {"modgrad": (1, 0.1, "last two"), "maml": (5, 0.01, "all"), "metasgd": (1, 0.01, "all"),
            "cavia": (5, 1.0, "context"), "tnet": (5, 0.01, "all")}
CONTEXT_LAYER = 3                                   # whose channels CAVIA's context scales and shifts
NORMALISE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))         # ImageNet's mean and deviation of red, green, blue
LEAST = {"ways": 2, "shots": 1, "queries": 1, "image_size": 16, "channels": 1, "meta_batch": 1, "log_every": 1,
         "save_every": 1, "test_tasks": 2, "val_tasks": 2, "rank": 1, "context": 1, "steps": 1, "workers": 1}  # of numbers; else 0
SHOWN = ("algorithm", "backbone", "adapt", "ways", "shots", "image_size", "seed", "synthetic")      # what a report says anyway


def column(i):
    """A column of DEFAULTS for a help text."""
    return ", ".join(f"{algorithm} {row[i]}" for algorithm, row in DEFAULTS.items())


def get_args(argv=None):
    about = __doc__.split("\n")[0] + " P: the paper's value; C: the released code's, ours unless it says so."
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.error = fail
    p.add_argument("--algorithm", default="modgrad", choices=METHODS, help="the inner step")
    p.add_argument("--modes", nargs="+", default=["miniimagenet"], metavar="MODE",
                   help="omniglot miniimagenet fc100 cub aircraft, or folders of yours under the data root")
    p.add_argument("--ways", type=int, default=5, help="N, classes in a task (C: 5)")
    p.add_argument("--shots", type=int, default=1, help="K, support images a class (P, C: 1 and 5)")
    p.add_argument("--queries", type=int, default=15, help="Q, query images a class (C: 15)")
    p.add_argument("--image-size", type=int, default=84, help="S, pixels (C: 84)")
    p.add_argument("--backbone", default="conv4", choices=("conv4", "resnet34", "wrn28-10"), help="the network")
    p.add_argument("--channels", type=int, default=64, help="of each layer of conv4 (P: 64)")
    p.add_argument("--steps", type=int, help=f"K, inner steps (P: 1 for ModGrad): {column(0)}")
    p.add_argument("--alpha", type=float, help=f"their size (P: 0.1 for ModGrad): {column(1)}")
    p.add_argument("--adapt", nargs="+", metavar="LAYER", help="layers that the steps change, as conv3 conv4 head; all; or "
                   f"'last two' convolutions: {column(2)}")
    p.add_argument("--rank", type=int, default=5, help="u, columns that are mixed in a ModGrad cell (P: 5)")
    p.add_argument("--start-at-one", action="store_true", help="ModGrad's M starts near 1, as MAML, not near 0 (C: near 0)")
    p.add_argument("--context", type=int, help="length of v (P: 300), of CAVIA's context (100)")
    p.add_argument("--inner-clip", type=float, default=20.0, help="of the inner gradient's entries (MMAML's; C: no clip)")
    p.add_argument("--first-order", action="store_true", help="hold the inner gradients constant (P: no)")
    p.add_argument("--meta-batch", type=int, default=3, help="T, tasks (episodes) an iteration (C: 3)")
    p.add_argument("--iterations", type=int, default=16667, help="updates (C: 50,000 episodes in threes)")
    p.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (C: 1e-3)")
    p.add_argument("--lr-halve-every", type=int, default=3333, help="iterations; 0 is never (P: 10,000 episodes)")
    p.add_argument("--seed", type=int, default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-tasks", type=int, default=600, help="over all modes together (P: 600)")
    p.add_argument("--augment", action="store_true", help="crop, mirror, recolour training images (P: the deep networks)")
    p.add_argument("--val-every", type=int, default=1000, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=200, help="over all modes together")
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
    p.add_argument("--keep-every", type=int, default=1000, help="iterations between kept parameters, of which those "
                   "best on validation classes are tested too; 0 keeps none (of the deep networks each takes 100 to 500 MB)")
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
    steps, alpha, adapt = DEFAULTS[args.algorithm]
    usual = {"steps": steps, "alpha": alpha, "context": 100 if args.algorithm == "cavia" else 300}
    for key, value in usual.items():
        defaults[key] = value
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    layers = layer_shapes(args)
    convolutions = [layer for layer, shape in layers.items() if len(shape) == 4 and not layer.endswith("short")]
    if args.algorithm == "cavia" and args.adapt:
        fail("--algorithm cavia adapts its context alone: leave --adapt out")
    named = {"all": ["all"], "last two": convolutions[-2:], "context": []}
    defaults["adapt"] = named[adapt]
    args.adapt = named[adapt] if args.adapt is None else named.get(" ".join(args.adapt), args.adapt)
    args.method += f" on {'+'.join(args.adapt)}" * (args.adapt != defaults["adapt"])
    args.method += f", {args.backbone}" * (args.backbone != "conv4")
    for layer in args.adapt:
        if layer not in ("all", *layers):
            fail(f"--adapt {layer}: not there; choose from all, 'last two', {' '.join(layers)}")
    if args.algorithm == "cavia" and args.backbone != "conv4":
        fail(f"--algorithm cavia --backbone {args.backbone}: its context modulates a layer of conv4; choose conv4")
    if not args.adapt and args.algorithm != "cavia":
        fail("--adapt context is CAVIA's: name layers")
    if args.start_at_one and args.algorithm != "modgrad":
        fail(f"--start-at-one --algorithm {args.algorithm}: M is ModGrad's; leave one of them out")
    if args.algorithm == "modgrad" and "all" in args.adapt:
        fail("--algorithm modgrad --adapt all: a cell is for kernels and biases; name the layers, as conv3 conv4 head")
    changed = {k: "+".join(v) if isinstance(v, list) else v for k, v in identity(args).items()
               if k not in ("modes", "algorithm") and v != defaults.get(k, v)}
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
    if args.keep_every and args.val_every and (args.val_every % args.log_every or args.keep_every % args.val_every):
        fail(f"--keep-every {args.keep_every} --val-every {args.val_every} --log-every {args.log_every}: parameters that are kept "
             "must be validated: give each as a multiple of the next, or --keep-every 0")
    return args


# --------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors. A network is a list of blocks, each a function of (params, x, norm) whose
# parameters begin with its name; the last is the linear head. `norm` is BatchNorm by name (see Norm).

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
    if f"generator.{name}.transform" in params:         # T-Net: a 1x1 convolution after each layer's, which no step changes
        x = F.conv2d(x, params[f"generator.{name}.transform"])
    return x.to(W.dtype)                                # bf16, if chosen, ends here


def linear(params, name, x):
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):      # bf16 is for convolutions
        return F.linear(x.to(W.dtype), W, b)


def conv4_block(params, name, x, norm):
    """Convolution, BatchNorm, 2x2 max-pool, ReLU: x (n, C_in, S, S) -> (n, C, S/2, S/2)."""
    x = norm(params, name.replace("conv", "norm"), conv(params, name, x))
    if f"{name}.film" in params:                        # CAVIA: FiLM made from the context, gamma * x + beta
        gamma, beta = params[f"{name}.film"].chunk(2)
        x = gamma[:, None, None] * x + beta[:, None, None]
    return F.relu(F.max_pool2d(x, 2))                   # as after ReLU, on a quarter of the numbers


def stem_block(params, name, x, norm):
    """ResNet-34's: 7x7 convolution of stride 2, BatchNorm, ReLU, 3x3 max-pool of stride 2."""
    return F.max_pool2d(F.relu(norm(params, f"{name}.norm", conv(params, f"{name}.conv", x, 2))), 3, 2, 1)


def basic_block(params, name, x, norm):
    """ResNet's (He et al., CVPR 2016): two 3x3 convolutions around a shortcut."""
    stride = 1 if f"{name}.short.weight" not in params or name == "stage1.block1" else 2
    y = F.relu(norm(params, f"{name}.norm1", conv(params, f"{name}.conv1", x, stride)))
    y = norm(params, f"{name}.norm2", conv(params, f"{name}.conv2", y))
    if f"{name}.short.weight" in params:
        x = norm(params, f"{name}.normshort", conv(params, f"{name}.short", x, stride))
    return F.relu(x + y)


def wide_block(params, name, x, norm):
    """Wide ResNet's (Zagoruyko and Komodakis, BMVC 2016): BatchNorm and ReLU come before each convolution."""
    stride = 1 if f"{name}.short.weight" not in params or name == "stage1.block1" else 2
    y = F.relu(norm(params, f"{name}.norm1", x))
    if f"{name}.short.weight" in params:
        x = conv(params, f"{name}.short", y, stride)
    y = F.relu(norm(params, f"{name}.norm2", conv(params, f"{name}.conv1", y, stride)))
    return x + conv(params, f"{name}.conv2", y)


def pool_block(params, name, x, norm):
    return (F.relu(norm(params, name, x)) if f"{name}.scale" in params else x).mean((2, 3))


def head_block(params, name, x, norm):
    return linear(params, name, x.flatten(1))


def architecture(args):
    """-> [(name of block, function, channels in, channels out), ...]; a convolution's name begins with its block's."""
    if args.backbone == "conv4":
        widths = [3] + [args.channels] * 4
        blocks = [(f"conv{l}", conv4_block, widths[l - 1], widths[l]) for l in (1, 2, 3, 4)]
        return [*blocks, ("head", head_block, args.channels * (args.image_size // 16) ** 2, args.ways)]
    wide = args.backbone == "wrn28-10"
    stages, c = ((160, 4), (320, 4), (640, 4)) if wide else ((64, 3), (128, 4), (256, 6), (512, 3)), 16 if wide else 64
    blocks = [("conv1", lambda params, name, x, norm: conv(params, name, x), 3, 16) if wide else ("stem", stem_block, 3, 64)]
    for s, (width, depth) in enumerate(stages, 1):
        for b in range(1, depth + 1):
            blocks.append((f"stage{s}.block{b}", wide_block if wide else basic_block, c, width))
            c = width
    return [*blocks, ("norm", pool_block, c, c), ("head", head_block, c, args.ways)]


def layer_shapes(args):
    """Layers that can be adapted, in the order of the forward pass -> {name: shape of its weight}."""
    shapes = {}
    for name, block, c_in, c_out in architecture(args):
        if block in (basic_block, wide_block):
            shapes |= {f"{name}.conv1": (c_out, c_in, 3, 3), f"{name}.conv2": (c_out, c_out, 3, 3)}
            shapes |= {f"{name}.short": (c_out, c_in, 1, 1)} if c_in != c_out else {}
        elif block is head_block:
            shapes[name] = (c_out, c_in)
        elif block is stem_block:
            shapes[f"{name}.conv"] = (c_out, c_in, 7, 7)
        elif block is not pool_block:
            shapes[name] = (c_out, c_in, 3, 3)
    return shapes


def run_blocks(params, x, norm, args, first=0, last=None):
    """The blocks first .. last - 1 of the network; all of them: images (n, 3, S, S) -> logits (n, N)."""
    for name, block, *_ in architecture(args)[first:last]:
        x = block(params, name, x, norm)
    return x


def normalise(x):
    """Images in [0, 1] -> with ImageNet's mean 0 and deviation 1 for each colour. (No tensor of constants: a copy of one to
    the device would make the host wait.)"""
    return torch.stack([(colour - m) / d for colour, m, d in zip(x.unbind(-3), *NORMALISE)], -3)


def group(params, name):
    """One part of all parameters: "base" (theta), "encoder" or "generator"."""
    if name == "base":
        return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def adapted_keys(args, params):
    """Keys of the parameters that inner steps change."""
    if "all" in args.adapt:
        return list(group(params, "base"))
    return [k for k in group(params, "base") if k.rsplit(".", 1)[0] in args.adapt]


def factors(args, layer):
    """Sizes (n1, n2) of the two factors whose outer product is M for a layer's weight (ModGrad's n = n1 * n2)."""
    c_out, c_in, *size = layer_shapes(args)[layer]
    if len(size) == 2 and size[0] == 3 and c_in > 3:
        return 3 * c_out, 3 * c_in                      # a 3x3 kernel (C_out, C_in, 3, 3) seen as near-square
    return c_out, c_in * math.prod(size)


def init_params(args):
    """All parameters, drawn from the seed -> flat dict. The base network's are the same for every algorithm.

    conv4 and every linear layer start as PyTorch's own layers do, as in ModGrad's released code. The size of the kernels
    matters. BatchNorm makes the network blind to it, but the larger a kernel is, the less a gradient step turns it: the
    step changes it, relative to its size, by 1 / |W|^2. The deep networks start as in their authors' code: kernels are
    normal with variance 2 / (C_out * places), and there are no biases.
    """
    rng, params = torch.Generator().manual_seed(args.seed), {}

    def default(name, *shape):
        root = math.sqrt(math.prod(shape[1:]))          # PyTorch's: uniform within 1 / root of the number of inputs
        params[f"{name}.weight"] = (2 * torch.rand(shape, generator=rng) - 1) / root
        params[f"{name}.bias"] = (2 * torch.rand(shape[0], generator=rng) - 1) / root

    def he_normal(name, c_out, c_in, *places):
        std = math.sqrt(2 / (c_out * math.prod(places)))
        params[f"{name}.weight"] = std * torch.randn(c_out, c_in, *places, generator=rng)

    def norm(name, c):
        params.update({f"{name}.scale": torch.ones(c), f"{name}.shift": torch.zeros(c)})

    for name, block, c_in, c_out in architecture(args):
        for layer, shape in layer_shapes(args).items():
            if layer == name or layer.startswith(f"{name}."):
                draw = default if block in (conv4_block, head_block) else he_normal
                draw(layer, *shape)
        if block is conv4_block:
            norm(name.replace("conv", "norm"), c_out)
        elif block is stem_block:
            norm(f"{name}.norm", c_out)
        elif block in (basic_block, wide_block):
            norm(f"{name}.norm1", c_in if block is wide_block else c_out)
            norm(f"{name}.norm2", c_out)
            if block is basic_block and c_in != c_out:
                norm(f"{name}.normshort", c_out)
        elif block is pool_block and args.backbone == "wrn28-10":
            norm(name, c_out)

    if args.algorithm == "modgrad":
        for k in adapted_keys(args, params):
            layer, part = k.rsplit(".", 1)
            sizes = {"weight": dict(zip(("rows", "cols"), factors(args, layer))) if part == "weight" else {},
                     "bias": {"bias": len(params[k])}}.get(part, {part: params[k].numel()})
            for factor, n in sizes.items():             # phi: Linear, ReLU, Linear; sizes of the released code
                default(f"generator.{layer}.{factor}.1", n, args.context)
                default(f"generator.{layer}.{factor}.2", args.rank + args.rank * n, n)
                if args.start_at_one:
                    params[f"generator.{layer}.{factor}.2.bias"][args.rank:] = 1.0
    elif args.algorithm == "metasgd":
        params |= {f"generator.{k}": torch.full(params[k].shape, args.alpha) for k in adapted_keys(args, params)}
    elif args.algorithm == "cavia":
        default("generator.film", 2 * args.channels, args.context)
        params["generator.film.weight"] *= math.sqrt(3)         # CAVIA's: Kaiming's uniform without a ReLU's gain
    elif args.algorithm == "tnet":
        for layer, shape in layer_shapes(args).items():
            if len(shape) == 4:
                params[f"generator.{layer}.transform"] = torch.eye(shape[0])[:, :, None, None]
    # Channels last is how convolutions like their kernels best.
    return {k: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for k, w in params.items()}


# ----------------------------------------------------------------------------------------------- inner steps
# Each takes (params, fast, loss, args, noisy): what is adapted so far, the support loss as a function of it, and `noisy`, which
# clips a gradient (and corrupts it, where task_loss is given noise). Each returns what is adapted then.

def maml_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * gradient(theta)                                            (Finn et al., ICML 2017)"""
    gradient = noisy(torch.func.grad(loss)(fast))
    return {k: fast[k] - args.alpha * gradient[k] for k in fast}


def metasgd_step(params, fast, loss, args, noisy):
    """theta <- theta - rate * gradient(theta): a learned rate for each entry, the same for all tasks    (Li et al., 2017)"""
    gradient = noisy(torch.func.grad(loss)(fast))
    return {k: fast[k] - params[f"generator.{k}"] * gradient[k] for k in fast}


def cavia_step(params, fast, loss, args, noisy):
    """v <- v - alpha * gradient(v): only a context moves, which scales and shifts channels (Zintgraf et al., ICML 2019)"""
    gradient = noisy(torch.func.grad(loss)(fast))
    return {"context": fast["context"] - args.alpha * gradient["context"]}


def tnet_step(params, fast, loss, args, noisy):
    """W <- W - alpha * gradient(W) of x -> T W x; T stays, and shapes the gradient      (Lee and Choi, ICML 2018)"""
    return maml_step(params, fast, loss, args, noisy)


def modgrad_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * M(v) * gradient(theta)                                     (Eq. 5; Algorithm 1, 9-13)"""
    gradient = noisy(torch.func.grad(loss)(fast))                                       # 10

    def step(v):
        M = modulation(params, v, fast)
        return {k: fast[k] - args.alpha * M[k] * gradient[k] for k in fast}
    v = next(iter(fast.values())).new_zeros(args.context)                               # 9
    v = -torch.func.grad(lambda v: loss(step(v)))(v)                                    # 11: Eq. 9
    return step(v.detach() if args.first_order else v)                                  # 12, 13


STEPS = {"modgrad": modgrad_step, "maml": maml_step, "metasgd": metasgd_step, "cavia": cavia_step, "tnet": tnet_step}


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

def task_loss(params, task, args, evaluate=False, noise=None):
    """ONE task: adapt what --adapt names to the support set by --steps inner steps, be judged on the query set.

    Returns the query loss, whose gradient trains everything, the query logits (N*Q, N) and, if `evaluate`, the
    inductive ones. `noise`: dict like what is adapted, added to every inner gradient. Numbers: lines of Algorithm 1.
    """
    support_x, query_x = normalise(task.support_x), normalise(task.query_x)
    keys = adapted_keys(args, params)
    if args.algorithm == "cavia":
        fast = {"context": params["generator.film.weight"].new_zeros(args.context)}
    else:
        fast = {k: params[k] for k in keys}                                             # 6: theta^0

    def merged(fast):
        if args.algorithm != "cavia":
            return params | fast
        return params | {f"conv{CONTEXT_LAYER}.film": linear(params, "generator.film", fast["context"])}
    # Blocks before the first adapted one see the same support images in every step: they are run once.
    moving = [any(k.startswith(name) for k in keys) or name == f"conv{CONTEXT_LAYER}" and args.algorithm == "cavia"
              for name, *_ in architecture(args)]
    first = moving.index(True)
    trunk = run_blocks(params, support_x, Norm(), args, 0, first)

    def support_loss(fast):
        return F.cross_entropy(run_blocks(merged(fast), trunk, Norm(), args, first), task.support_y)

    def noisy(gradient):
        gradient = {k: g.clamp(-args.inner_clip, args.inner_clip) for k, g in gradient.items()}
        gradient = {k: g.detach() for k, g in gradient.items()} if args.first_order else gradient
        return {k: g + noise[k] for k, g in gradient.items()} if noise else gradient
    for _ in range(args.steps):                                                         # 8
        fast = STEPS[args.algorithm](params, fast, support_loss, args, noisy)           # 9-13

    adapted = merged(fast)
    logits = run_blocks(adapted, query_x, Norm(), args)
    loss = F.cross_entropy(logits, task.query_y)                                        # 16, 17
    if not evaluate:
        return loss, logits
    norm = Norm()
    run_blocks(adapted, support_x, norm, args)
    return loss, logits, run_blocks(adapted, query_x, Norm(norm.used), args)


def augment(batch, number, args):
    """--augment: the images of training batch `number` -> the batch, each image cropped (to 60 to 100 % of its side), mirrored
    by chance, changed in brightness, contrast and saturation by up to 40 %: what is usual for the deep networks since Qiao et
    al., CVPR 2018 (the paper gives no amounts). Drawn from seed and `number`, so that a run continued is the same run."""
    if not args.augment:
        return batch
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + number)

    def change(x):                                                                      # (T, n, 3, S, S)
        images = x.flatten(0, 1)
        crop, right, down, mirror, *jitter = torch.rand(7, len(images), generator=rng).to(x.device)
        crop = 1 - 0.4 * crop
        zero, flip = torch.zeros_like(crop), torch.where(mirror < 0.5, -crop, crop)
        rows = [flip, zero, (2 * right - 1) * (1 - crop), zero, crop, (2 * down - 1) * (1 - crop)]
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        brightness, contrast, saturation = ((0.6 + 0.8 * u)[:, None, None, None] for u in jitter)
        images = images * brightness
        for strength, axes in ((contrast, (1, 2, 3)), (saturation, 1)):         # about the image's mean, each pixel's grey
            mean = images.mean(axes, keepdim=True)
            images = mean + strength * (images - mean)
        return images.clamp(0, 1).view_as(x)
    return batch._replace(support_x=change(batch.support_x), query_x=change(batch.query_x))


def best_on_validation(test, args):
    """Of the parameters kept along training, those of the highest validation accuracy (paper protocol), on the test tasks ->
    what result.json says of them; None where none were validated. They stand beside the last parameters, never for them."""
    out, found = Path(args.out), []
    log = out / "log.jsonl"
    for line in map(json.loads, log.read_text().splitlines() if log.exists() else ()):
        file = out / f"params-{line['iteration']}.pt"
        if "validation" in line and file.exists():
            found.append((line["validation"]["paper"]["overall"]["mean"], -line["iteration"], file))
    if not found:
        return None
    accuracy, iteration, file = max(found)                                              # the earliest of equals
    try:
        params = {k: w.to(args.device) for k, w in torch.load(file, map_location="cpu", weights_only=True).items()}
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(f"{file} is damaged ({type(error).__name__}): delete it, and the same command tests the best of the others")
    rows = evaluate(params, test, args.test_tasks, args)
    return {"iteration": -iteration, "validation": accuracy, "accuracy": summary(rows[0], args.modes),
            "accuracy_inductive": summary(rows[1], args.modes), "per_task": rows[0].tolist(), "per_task_inductive": rows[1].tolist()}


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
            batch = augment(episodes.tasks(done * T, T), done, args)
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
    if best := result.get("best_on_validation"):
        cells = [f"{best[key]['overall']['mean']:.2f} +- {best[key]['overall']['ci95']:.2f}" for key in ("accuracy", "accuracy_inductive")]
        print(f"{'best on val.':16}{cells[0]:18}{cells[1]:18}overall, after {best['iteration']} iterations: the highest validation "
              f"accuracy of those kept")


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
            "per_task_mode": [j % len(args.modes) for j in range(args.test_tasks)],
            "best_on_validation": best_on_validation(test, args)}
        atomic_write(file, json.dumps(result))
    report(result, args)


if __name__ == "__main__":
    main()
