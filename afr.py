"""Attentive feature reuse: a network that weighs its own feature maps, task by task. AM and P-AM, beside MAML and ANIL.

Paper: Lekkala and Itti: Attentive Feature Reuse for Multi Task Meta learning, 2020, arXiv:2006.07438.

The idea. Several *high-level tasks* (classify, estimate depth, normals, a vanishing point) share one backbone, and each has
a head of its own; a *subtask* is a few-shot problem within one of them: classes never seen, or a domain never seen. ANIL
adapts the head alone to a subtask (Eq. 2). The attention module h then looks at the support set as the backbone sees it,
and at its labels, and says which feature maps this subtask does not need:
    w = h(x, y)          activations of every block <- (1 - w) * activations, in a second forward pass
The backbone learns from the pass without w (Eq. 4), h from the pass with it (Eq. 5), in which the backbone is held fixed.
P-AM makes of w a Gaussian: in training it is drawn as the query set with its labels suggests it (q), and the one that the
support set suggests (p) is pulled towards q; at test there is only p.

    paper          here                        shape or keys                     where
    Phi            group(params, "backbone")   conv{l} norm{l}                   B = 4 blocks of C filters
    theta_j, g_j   head.{task}.*, predict      linear, or a decoder              a head for each of --tasks
    Psi_j, h_j     attention.{task}.*          B*C outputs, P-AM twice as many   an attention module for each of --tasks
    x, x-bar       embed(...)                  (n, C, S/16, S/16)                f(I) and f(I, 1 - w)
    w, z_w         w                           (B, C)                            Section 4.2
    alpha          --alpha                     a number for each of --tasks      Eq. 2
    beta, gamma    --lr, --attention-lr        Adam's                            Eq. 4, 5
    D_train/test   task.support_*, .query_*    (n, 3, S, S) ...                  the paper's "train" and "test" of a subtask

Read it beside modgrad.py: there the gradient is weighed, here the feature maps.
Run:  python afr.py --synthetic --quick     about two minutes on two CPU cores, no download; prints accuracies
      python afr.py --shots 5 --algorithm maml
      python afr.py --tasks classification depth normals vanishing --modes scenes        ray-cast scenes, no download

Where the paper is read in a way of ours:
- w starts at 0. The paper multiplies by 1 - w and starts "w" at ones, with which nothing would pass; it then says that
  f(I, 1) is f(I). So its ones are the effective weights, 1 - w. The last layer of h starts at zero, hence w does.
- KL[q || p], not the printed KL[p || q], and it is minimised with the expected loss: this is the bound (Garnelo et al.,
  2018, which the paper follows). As the loss is a mean over the queries, the KL of their set is divided by their number. A
  loss weight, which of squared errors says how certain a label is, does not weigh the KL.
- The head of Eq. 5 is adapted through the network with w, as it will be at test; --head plain takes Eq. 4's.
- Where subtasks differ in domain only, heads learn without an inner loop, and adapt at test (Fig. 4b, 4c); --algorithm maml
  differs from anil there at test alone. A batch of these is one domain too, so that BatchNorm and w see in training what they
  see at test; its support images are for w, the loss is that of the query images.
- Within 1e-3 of the label: labels are scaled to [0, 1] (depth by 10 m), or this would mean nothing.
What it does not give (its appendix is not public), and why ours:
- kernels of the backbone and linear heads start as in MAML's own code: uniform by Xavier's rule (Glorot and Bengio, 2010), biases
  at zero;
- alpha 0.01 as in MAML; 0.1 where the head alone moves, as ANIL's few parameters bear it; for regressions chosen by hand, not
  tuned (small for the vanishing point, whose linear head has slopes for every place, and for normals, where 0.03 diverges);
- 5 steps, 84 pixels, 4 subtasks of each task an iteration, 60,000 iterations: what MAML trains 1-shot tasks with (it tests with 10
  steps). Inner gradients' entries within +-20, as in the other scripts. Adam, 1e-3: the usual;
- loss weights 1 and, for squared errors of labels in [0, 1], 10. What matters is how hard each high-level task pulls at the shared
  backbone. With heads that start like any other layer, the regressions' gradients there are 6 to 90 times classification's at the
  start, and classification stays at chance. So the last layer of each regression's head starts small (0.2 of a decoder's, 0.05 of the
  vanishing point's), with a bias of 0.5, the middle of the labels' range: this brings the four norms within a factor of 10. The log
  shows the norm of each task's gradient at the backbone;
- attention of 2 blocks of width 16, on embeddings averaged over places: so a module of AM adds 14 % (C = 32) or 7 % (C = 64)
  of the parameters in classification, the paper's "1.1x"; on flattened embeddings, with C = 32, it would outgrow the network;
- P-AM starts with a deviation of 0.1, small beside the weights' 1, and predicts with the mean of p: one pass, no noise;
- leaky ReLUs in decoders and in the CNN for label images, whose few filters could all die; no BatchNorm there.
Left out: BMAML, EMAML and the other rows of Table 2 that are of other papers; the MMT data, never released.
"""
import argparse
import importlib.util
import io
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
    KINDS,
    MetaTasks,
    Task,
    atomic_write,
    canonical_mode,
    cores,
    fail,
    in_threads,
    student,
)

METHODS = {("maml", "none"): "MAML", ("anil", "none"): "ANIL", ("anil", "am"): "AM", ("anil", "pam"): "P-AM"}
PARTS = ("backbone", "head", "attention")           # of the parameters
PROTOCOLS = {"paper": "BatchNorm statistics of the query images together, as in all published numbers",
             "inductive": "BatchNorm statistics of the adapted network on the support images"}
KEYS = ("accuracy", "accuracy_inductive", "nil_or_error", "nil_or_error_inductive")         # of what is measured: see `measures`
PER_TASK = ("per_task", "per_task_inductive", "per_task_nil_or_error", "per_task_nil_or_error_inductive")
QUICK = {"image_size": 28, "iterations": 250, "test_tasks": 240}
TABLE, PAPER = "paper's Table 2", defaultdict(dict, {        # mini-ImageNet, 5 ways, in %: (CE, NIL) of 1-shot and of 5-shot
    "MAML": {"M": ((48.7, 49.1), (63.1, "-"))}, "ANIL": {"M": ((48.1, 49.5), (61.0, "-"))},
    "AM": {"M": ((51.1, 52.3), (64.6, "-"))}, "P-AM": {"M": ((48.9, 50.2), (63.17, "-"))}})
ALPHA = {"classification": 0.1, "depth": 0.01, "normals": 0.003, "vanishing": 0.001}        # of the head alone
LOSS_WEIGHTS = {"classification": 1.0, "depth": 10.0, "normals": 10.0, "vanishing": 10.0}
DECODER = {"depth": (4, 1), "normals": (8, 3)}      # filters of a decoder's blocks, channels of its output
REPORTED = 150                                      # test subtasks whose w --attention-report shows (P: 150)
LABEL_FILTERS = 4                                   # of the CNN that makes a vector of a label image
LEAST = {"ways": 2, "shots": 1, "queries": 1, "image_size": 16, "filters": 1, "meta_batch": 1, "log_every": 1,
         "save_every": 1, "test_tasks": 2, "val_tasks": 2, "steps": 1, "attention_blocks": 1, "attention_width": 1,
         "report_tasks": 2, "workers": 1}           # of numbers; else 0
SHOWN = ("algorithm", "modulation", "modes", "tasks", "ways", "shots", "image_size", "seed", "synthetic")  # what a report says anyway


def get_args(argv=None):
    about = __doc__.split("\n")[0] + " P: the paper's value; where it gives none, ours is argued above."
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.error = fail
    p.add_argument("--algorithm", default="anil", choices=("maml", "anil"), help="what inner steps change: all, or the head")
    p.add_argument("--modulation", choices=("none", "am", "pam"), help="the attention module (am; with maml: none)")
    p.add_argument("--tasks", nargs="+", default=["classification"], choices=KINDS, help="high-level tasks; several: the "
                   "paper's multi meta-task")
    p.add_argument("--modes", nargs="+", metavar="MODE", help="data sets (miniimagenet; with other tasks than "
                   "classification: scenes, which are ray-cast, or a folder of yours of images with depth: see data.py)")
    p.add_argument("--ways", type=int, default=5, help="N, classes in a subtask (P: 5)")
    p.add_argument("--shots", type=int, default=1, help="K, support images a class (P: 1 and 5); of a domain: N * K")
    p.add_argument("--queries", type=int, default=15, help="Q, query images a class; of a domain: N * Q")
    p.add_argument("--image-size", type=int, default=84, help="S, pixels")
    p.add_argument("--filters", type=int, default=32, help="C, of each of the four blocks (P: 32 and 64)")
    p.add_argument("--steps", type=int, default=5, help="inner steps, in training and testing")
    p.add_argument("--alpha", type=float, nargs="+", metavar="A", help=f"their size, for each of --tasks ({ALPHA}; "
                   "maml: 0.01 for each)")
    p.add_argument("--inner-clip", type=float, default=20.0, help="of the inner gradient's entries")
    p.add_argument("--first-order", action="store_true", help="hold the inner gradients constant (P: no)")
    p.add_argument("--head", default="modulated", choices=("modulated", "plain"), help="what Eq. 5's head adapts to")
    p.add_argument("--embed", default="support", choices=("support", "constant"), help="w is of the support set (P), or one "
                   "learned vector for all subtasks: a control the paper does not have")
    p.add_argument("--attention-blocks", type=int, default=2, help="blocks of query, key and value")
    p.add_argument("--attention-width", type=int, default=16, help="of each block")
    p.add_argument("--kl-weight", type=float, default=1.0, help="of P-AM's KL (P: 1)")
    p.add_argument("--loss-weights", type=float, nargs="+", metavar="L", help=f"for each of --tasks ({LOSS_WEIGHTS})")
    p.add_argument("--meta-batch", type=int, default=4, help="T, subtasks of each of --tasks in an iteration")
    p.add_argument("--iterations", type=int, default=60000, help="updates")
    p.add_argument("--lr", type=float, default=1e-3, help="beta, Adam's learning rate of backbone and heads")
    p.add_argument("--attention-lr", type=float, default=1e-3, help="gamma, of the attention modules")
    p.add_argument("--lr-halve-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--seed", type=int, default=0, help="of initial parameters, training subtasks and P-AM's draws")
    p.add_argument("--test-tasks", type=int, default=600, help="over all modes or --tasks together")
    p.add_argument("--transfer", nargs="+", default=[], metavar="MODE", help="classify these test classes too (P: mini-Places)")
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=240, help="over all modes or --tasks together")
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="keeps images decoded once")
    p.add_argument("--synthetic", action="store_true", help="procedural stand-ins for the modes: no download")
    p.add_argument("--quick", action="store_true", help=f"about two minutes on two CPU cores: {QUICK}")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--workers", type=int, default=cores(), help="CPU: tasks at a time, one thread each")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16: convolutions only")
    p.add_argument("--report-tasks", type=int, default=10, help="test subtasks on whose data --attention-report trains weights")
    p.add_argument("--out", help="folder of the run (runs/<name>); the same command continues it")
    p.add_argument("--log-every", type=int, default=50, help="iterations")
    p.add_argument("--save-every", type=int, default=1000, help="iterations between checkpoints")
    p.add_argument("--keep-every", type=int, default=0, help="iterations between kept parameters")
    p.add_argument("--stop-after", type=float, help="seconds; then write a checkpoint and end")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint as it is")
    start.add_argument("--attention-report", action="store_true", help="of the checkpoint: the paper's Figure 3")
    start.add_argument("--overwrite", action="store_true", help="start afresh, dropping what --out holds")
    defaults = vars(p.parse_args([]))
    known = p.parse_known_args(argv)[0]
    if known.quick:
        p.set_defaults(**QUICK | {"iterations": QUICK["iterations"] // len(known.tasks)})
    args = p.parse_args(argv)
    alone = args.tasks == ["classification"]
    if len(set(args.tasks)) < len(args.tasks):
        fail(f"--tasks names one twice: {' '.join(args.tasks)}")
    if args.algorithm == "maml" and args.modulation not in (None, "none"):
        fail(f"--algorithm maml --modulation {args.modulation}: the attention modules stand on ANIL; leave one of them out")
    usual = {"modulation": "none" if args.algorithm == "maml" else "am", "modes": ["miniimagenet"] if alone else ["scenes"],
             "alpha": [0.01 if args.algorithm == "maml" else ALPHA[kind] for kind in args.tasks],
             "loss_weights": [LOSS_WEIGHTS[kind] for kind in args.tasks]}
    for key, value in usual.items():
        defaults[key] = value if key != "modulation" else None
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    for key in ("alpha", "loss_weights"):
        if len(getattr(args, key)) != len(args.tasks) or not all(0 <= x < math.inf for x in getattr(args, key)):
            fail(f"--{key.replace('_', '-')} {' '.join(map(str, getattr(args, key)))}: give a number from 0 on for each of "
                 f"--tasks {' '.join(args.tasks)}")
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    args.transfer = [canonical_mode(mode, args.data_root) for mode in args.transfer]
    cast = "scenes" in args.modes
    if (not alone or cast) and len(args.modes) > 1:
        fail(f"--modes {' '.join(args.modes)}: with --tasks {' '.join(args.tasks)} give one")
    if args.transfer and "classification" not in args.tasks:
        fail("--transfer is about classification: have it in --tasks")
    if args.transfer and cast:
        fail("--transfer: from ray-cast scenes to another data set is not offered; leave it out")
    if args.attention_report and args.modulation == "none":
        fail("--attention-report is about attention modules: give --modulation am or pam")
    args.synthetic |= cast                                  # in no case real images
    if args.embed == "constant" and args.modulation == "none":
        fail("--embed constant is about attention modules: give --modulation am or pam")
    args.method = METHODS[args.algorithm, args.modulation]
    unused = ["head", "attention_blocks", "attention_width", "attention_lr", "kl_weight"] if args.modulation == "none" else [
        *["attention_blocks", "attention_width"] * (args.embed == "constant"), *["kl_weight"] * (args.modulation == "am")]
    for key in unused:
        if getattr(args, key) != defaults[key]:
            print(f"note: {args.method} does not use --{key.replace('_', '-')}, so it stays {defaults[key]}", file=sys.stderr)
        setattr(args, key, defaults[key])               # and does not make it another run
    args.strata = args.modes if alone and not cast else args.tasks          # what results are told apart by
    changed = {k: "+".join(map(str, v)) if isinstance(v, list) else v for k, v in identity(args).items()
               if k not in ("modes", "algorithm", "modulation") and v != defaults.get(k, v)}
    if args.out is None:                                # named by its method and what is not default
        words = [f"{k}={v}" for k, v in changed.items()]
        args.out = os.path.join("runs", "-".join([args.method, *args.modes, *words]).lower())
    flags = {f"--{k.replace('_', '-')}": v for k, v in changed.items() if k not in SHOWN}
    args.variant = [flag if v is True else f"{flag} {str(v).replace('+', ' ')}" for flag, v in flags.items()]
    args.title = " ".join([args.method, data_name(args), *args.variant])
    if not alone:
        args.title += f": {'+'.join(args.tasks)}"
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    args.device = {"auto": (gpus + ["cpu"])[0], "cuda": (gpus + ["cuda"])[0]}.get(args.device, args.device)
    if args.device not in ("cpu", *gpus):
        fail(f"--device {args.device}: not there; choose from {' '.join(['cpu', *gpus])}")
    for key, value in vars(args).items():
        least = LEAST.get(key, 0) * (len(args.strata) if key in ("test_tasks", "val_tasks") else 1)
        if isinstance(value, (int, float)) and not least <= value < 2 ** 63:
            fail(f"--{key.replace('_', '-')} {value}: give a number from {least} on")
        if key in ("test_tasks", "val_tasks") and value % len(args.tasks):
            fail(f"--{key.replace('_', '-')} {value}: give a multiple of {len(args.tasks)}, the number of --tasks")
    return args


def data_name(args):
    """The data sets, and what they are if not real."""
    mark = "RAY-CAST, NOT MMT, " if "scenes" in args.modes else "SYNTHETIC " * args.synthetic
    return mark + "+".join(args.modes)


# --------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors. `norm` is BatchNorm by name (see Norm).

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


def conv(params, name, x):
    W = params[f"{name}.weight"]
    return F.conv2d(x, W, params[f"{name}.bias"], padding=1).to(W.dtype)        # bf16, if chosen, ends here


def linear(params, name, x):
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):      # bf16 is for convolutions
        return F.linear(x.to(W.dtype), W, b)


def embed(params, x, norm, w=None):
    """f_Phi(I, 1 - w): images (n, 3, S, S) -> activations of the last block, (n, C, S/16, S/16). w (B, C); None is 0.

    What is weighed is the input of the next block's convolution. BatchNorm behind that cancels a factor that is the same for
    all maps of a block, but for the last: it is the maps' weights beside each other that count."""
    for l in (1, 2, 3, 4):
        x = norm(params, f"norm{l}", conv(params, f"conv{l}", x))
        x = F.relu(F.max_pool2d(x, 2))                  # as after ReLU, on a quarter of the numbers
        if w is not None:
            x = x * (1 - w[l - 1])[:, None, None]
    return x


def predict(params, kind, x, args):
    """g_theta: activations (n, C, s, s) -> logits (n, N), vanishing points (n, 2), depth (n, 1, S, S) or normals (n, 3, S, S)."""
    if kind not in DECODER:
        return linear(params, f"head.{kind}", x.flatten(1))
    for i, halvings in enumerate((3, 2, 1, 0), 1):      # back up the sizes that the backbone went down
        W, odd = params[f"head.{kind}.up{i}.weight"], (args.image_size >> halvings) - 2 * x.shape[-1]
        x = F.conv_transpose2d(x, W, params[f"head.{kind}.up{i}.bias"], 2, output_padding=odd).to(W.dtype)
        x = conv(params, f"head.{kind}.conv{i}", F.leaky_relu(x, 0.1))
        x = F.leaky_relu(x, 0.1) if halvings else x
    return x


def label_vectors(params, kind, y, args):
    """Labels as vectors for h: one-hot (n, N), the vanishing point (n, 2), or of a label image (n, F) by a CNN of 3 blocks."""
    if kind == "classification":
        return (y[:, None] == torch.arange(args.ways, device=y.device)).to(params["conv1.weight"].dtype)
    if kind == "vanishing":
        return y
    y = y.clamp(min=0)                                  # -1 is: not known
    for i in (1, 2, 3):
        y = F.max_pool2d(F.leaky_relu(conv(params, f"attention.{kind}.label{i}", y), 0.1), 2)
    return y.mean((2, 3))


def attention(params, kind, x, y, args):
    """h_Psi: embeddings (n, C, s, s) and labels of n samples, in any order -> w (1, B, C); P-AM: mean, log deviation (2, B, C).

    Blocks of dot-product attention (Vaswani et al., 2017) among the samples, one fed to the next as in a perceptron."""
    if args.embed == "constant":                        # blind to the subtask
        return params[f"attention.{kind}.out.bias"].view(-1, 4, args.filters)
    tokens = torch.cat([x.mean((2, 3)), label_vectors(params, kind, y, args)], 1)               # (n, C + label's)
    for i in range(1, args.attention_blocks + 1):
        q, k, v = (linear(params, f"attention.{kind}.block{i}.{part}", tokens) for part in ("query", "key", "value"))
        with torch.autocast(x.device.type, enabled=False):
            tokens = F.relu((q @ k.T / math.sqrt(k.shape[1])).softmax(1) @ v)                   # (n, width)
    return linear(params, f"attention.{kind}.out", tokens.mean(0)).view(-1, 4, args.filters)


def group(params, name):
    """One part of all parameters: "backbone" (Phi), "head" (theta) or "attention" (Psi)."""
    if name == "backbone":
        return {k: w for k, w in params.items() if not k.startswith(("head.", "attention."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def init_params(args):
    """All parameters, drawn from the seed -> flat dict. A backbone or a head is the same whatever else there is."""
    params = {}

    def default(rng, name, *shape):
        root = math.sqrt(math.prod(shape[1:]))          # PyTorch's: uniform within 1 / root of the number of inputs
        params[f"{name}.weight"] = (2 * torch.rand(shape, generator=rng) - 1) / root
        params[f"{name}.bias"] = (2 * torch.rand(shape[0], generator=rng) - 1) / root

    def xavier(rng, name, *shape):
        params[f"{name}.weight"] = torch.nn.init.xavier_uniform_(torch.empty(shape), generator=rng)
        params[f"{name}.bias"] = torch.zeros(shape[0])

    def kernel(rng, name, *shape, inputs=None, out=None):
        params[f"{name}.weight"] = math.sqrt(2 / (inputs or math.prod(shape[1:]))) * torch.randn(shape, generator=rng)
        params[f"{name}.bias"] = torch.zeros(out or shape[0])

    def small(name, scale):
        """Let a regression begin in the middle of its labels' range: see the docstring of this file on loss weights."""
        params[f"{name}.weight"] *= scale
        params[f"{name}.bias"] = torch.full_like(params[f"{name}.bias"], 0.5)

    rng, widths = torch.Generator().manual_seed(args.seed), [3] + [args.filters] * 4
    for l in (1, 2, 3, 4):
        xavier(rng, f"conv{l}", widths[l], widths[l - 1], 3, 3)
        params |= {f"norm{l}.scale": torch.ones(widths[l]), f"norm{l}.shift": torch.zeros(widths[l])}
    for kind in args.tasks:
        rng = torch.Generator().manual_seed(1_000_003 * args.seed + 1 + KINDS.index(kind))
        if kind in DECODER:
            filters, channels = DECODER[kind]
            for i in (1, 2, 3, 4):                      # each output of a transposed convolution of stride 2 has one tap
                c = args.filters if i == 1 else filters
                kernel(rng, f"head.{kind}.up{i}", c, filters, 2, 2, inputs=c, out=filters)
                kernel(rng, f"head.{kind}.conv{i}", filters if i < 4 else channels, filters, 3, 3)
            small(f"head.{kind}.conv4", 0.2)
        else:
            outputs, inputs = args.ways if kind == "classification" else 2, args.filters * (args.image_size // 16) ** 2
            xavier(rng, f"head.{kind}", outputs, inputs)
            if kind == "vanishing":
                small(f"head.{kind}", 0.05)
        if args.modulation == "none":
            continue
        maps = 4 * args.filters
        bias = [torch.zeros(maps)] + [torch.full((maps,), math.log(0.1))] * (args.modulation == "pam")
        params[f"attention.{kind}.out.bias"] = torch.cat(bias)
        if args.embed == "constant":
            continue
        for i in (1, 2, 3) if kind in DECODER else ():
            kernel(rng, f"attention.{kind}.label{i}", LABEL_FILTERS, LABEL_FILTERS if i > 1 else channels, 3, 3)
        width = args.filters + {"classification": args.ways, "vanishing": 2}.get(kind, LABEL_FILTERS)
        for i in range(1, args.attention_blocks + 1):
            for part in ("query", "key", "value"):
                default(rng, f"attention.{kind}.block{i}.{part}", args.attention_width, width)
            width = args.attention_width
        params[f"attention.{kind}.out.weight"] = torch.zeros(len(bias) * maps, width)
    # Channels last is how convolutions like their kernels best.
    return {k: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for k, w in params.items()}


# ------------------------------------------------------------------------------------------------- algorithm

def criterion(kind, outputs, y):
    """Cross-entropy for classification, else the mean squared error over what is known of the labels: -1 is not."""
    if kind == "classification":
        return F.cross_entropy(outputs, y)
    known = (y >= 0).to(outputs.dtype)
    return ((outputs - y).square() * known).sum() / known.sum().clamp(min=1)


def gaussian_kl(q, p):
    """KL[q || p] of Gaussians with independent entries, each given as mean and log deviation (2, ...)."""
    (m, s), (n, t) = q, p
    return (t - s + ((2 * s).exp() + (m - n).square()) / (2 * (2 * t).exp()) - 0.5).sum()


def adapt(params, task, args, kind, w=None):
    """theta' <- theta - alpha * gradient(theta) on the support set (Eq. 2); with --algorithm maml Phi as well (Eq. 1).

    -> all parameters, adapted; and, where the backbone does not move, the support embeddings f(I, 1 - w), else None."""
    deep, alpha = args.algorithm == "maml", args.alpha[args.tasks.index(kind)]
    x = None if deep else embed(params, task.support_x, Norm(), w)
    fast = {k: v for k, v in params.items() if k.startswith(f"head.{kind}.") or deep and not k.startswith("head.")}

    def support_loss(fast):
        moved = params | fast
        return criterion(kind, predict(moved, kind, embed(moved, task.support_x, Norm(), w) if deep else x, args), task.support_y)
    for _ in range(args.steps):
        gradient = torch.func.grad(support_loss)(fast)
        for k, g in gradient.items():
            g = (g.detach() if args.first_order else g).clamp(-args.inner_clip, args.inner_clip)
            fast = fast | {k: fast[k] - alpha * g}
    return params | fast, x


def task_loss(params, task, args, kind, epsilon=None):
    """ONE subtask of the high-level task `kind`, in training. epsilon (B, C): what P-AM draws from N(0, 1).

    Returns the loss, whose gradient trains everything: Phi and theta by the pass without w, Psi by that with w; and the
    query outputs. Subtasks that differ in domain alone have no inner loop here (Fig. 4b)."""
    def inner(params, w=None):
        return adapt(params, task, args, kind, w) if kind == "classification" else (params, None)
    adapted, x = inner(params)                                                                  # theta'; x = f(I)
    query = embed(adapted, task.query_x, Norm())
    outputs = predict(adapted, kind, query, args)
    loss, kl = criterion(kind, outputs, task.query_y), 0.0                                      # Eq. 3, 4: of Phi and theta
    if args.modulation != "none":
        fixed = {k: v if k.startswith("attention.") else v.detach() for k, v in params.items()}
        x = embed(fixed, task.support_x, Norm()) if x is None else x.detach()
        prior = attention(params, kind, x, task.support_y, args)                                # w = h(x, y), or p(z)
        w = prior[0]
        if args.modulation == "pam":
            posterior = attention(params, kind, query.detach(), task.query_y, args)             # q(z)
            w = posterior[0] + posterior[1].exp() * epsilon
            kl = args.kl_weight * gaussian_kl(posterior, prior) / len(query)
        adapted, _ = inner(fixed, w if args.head == "modulated" else None)
        outputs = predict(adapted, kind, embed(adapted, task.query_x, Norm(), w), args)         # of x-bar = f(I, 1 - w)
        loss = loss + criterion(kind, outputs, task.query_y)                                    # Eq. 5: of Psi
    return args.loss_weights[args.tasks.index(kind)] * loss + kl, outputs


def test_outputs(params, task, args, kind, w=None):
    """ONE subtask in testing (Fig. 4c, 4e): w from the support set, unless given; then all heads adapt to it, through the network
    with w. -> query outputs by both protocols; for classification also NIL's, by the backbone as it was, by both."""
    if args.modulation != "none" and w is None:
        x = embed(params, task.support_x, Norm())
        w = attention(params, kind, x, task.support_y, args)[0]                                 # of P-AM: the mean of p(z)
    adapted, _ = adapt(params, task, args, kind, w if args.head == "modulated" else None)
    outputs = [predict(adapted, kind, query, args) for query in embeddings(adapted, task, w)[1:]]
    if kind == "classification":
        x, *queries = embeddings(params, task, w)
        outputs += [nil(x, query, task.support_y, args) for query in queries]
    return outputs


def embeddings(params, task, w=None):
    """-> of the support images; of the query images by their own BatchNorm statistics; of these by the support images'."""
    norm = Norm()
    x = embed(params, task.support_x, norm, w)
    return x, embed(params, task.query_x, Norm(), w), embed(params, task.query_x, Norm(norm.used), w)


def nil(x, query, y, args):
    """No inner loop, no head (Raghu et al., ICLR 2020): a class's score is the mean cosine of a query with its support images."""
    x, query = (F.normalize(e.flatten(1), dim=1) for e in (x, query))
    members = (y[:, None] == torch.arange(args.ways, device=y.device)).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return query @ x.T @ members / members.sum(0)                                           # (N*Q, N)


def measures(kind, outputs, y):
    """Of classification the accuracy in %. Else the share, in %, of outputs within 1e-3 of their labels; and for the outputs of a
    test then, of the same, the mean squared errors in thousandths."""
    if kind == "classification":
        return [100 * (x.argmax(-1) == y).float().mean() for x in outputs]
    known = y >= 0
    within = [100 * (((x - y).abs() <= 1e-3) & known).sum() / known.sum().clamp(min=1) for x in outputs]
    return within + [1000 * criterion(kind, x, y) for x in outputs] * (len(outputs) > 1)


def measured(rows, args, episodes):
    """Measures of tasks, a row for each of KEYS -> what log and result files hold of them. Of unlike high-level tasks there is no
    overall."""
    found = [summary(row, args.strata, episodes.domains) for row in rows]
    return dict(zip(KEYS, [{k: v for k, v in row.items() if k != "overall" or len(args.tasks) == 1} for row in found]))


def transfer(params, args):
    """--transfer: test classes of data sets that were not trained on -> {mode: as result.json has it of its own}."""
    found = {}
    for mode in args.transfer:
        i = args.tasks.index("classification")
        only = {"modes": [mode], "strata": [mode], "tasks": ["classification"], "alpha": args.alpha[i:i + 1]}
        other = argparse.Namespace(**vars(args) | only)
        test = MetaTasks(other, "test")
        rows = evaluate(params, test, args.test_tasks, other)
        found[mode] = {"data": test.folders, "tasks_sha256": test.sha256(args.test_tasks), **measured(rows, other, test),
                       **dict(zip(PER_TASK, rows.tolist()))}
    return found


def draws(number, args):
    """P-AM's epsilon (T, J, B, C) for iteration `number`: from seed and number, so that a run continued is the same run."""
    if args.modulation != "pam":
        return None
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + 100 + number)       # up to 4 are those of heads: see init_params
    return torch.randn(args.meta_batch, len(args.tasks), 4, args.filters, generator=rng).to(args.device)


def best_weights(params, task, x, y, args, kind, steps=100, batch=100, rate=0.02):
    """Channel weights trained alone, from 1, on all data (x, y) of a test subtask, network and adapted head fixed -> w (B, C).

    The paper gives neither optimiser nor steps: Adam, over random batches, BatchNorm with each one's statistics."""
    with torch.no_grad():
        adapted, _ = adapt(params, task, args, kind)
    adapted, rng = {k: v.detach() for k, v in adapted.items()}, torch.Generator().manual_seed(0)
    w = torch.zeros(4, args.filters, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=rate)
    for _ in range(steps):
        of = torch.randperm(len(x), generator=rng)[:batch].to(x.device)
        optimizer.zero_grad()
        criterion(kind, predict(adapted, kind, embed(adapted, x[of], Norm(), w), args), y[of]).backward()
        optimizer.step()
    return w.detach()


def relative(w):
    """w (B, C) of the same network in which the maps of all blocks but the last are kept, in the mean, as they are: BatchNorm
    cancels a factor that all maps of a block have in common (see `embed`)."""
    kept = 1 - w[:-1]
    return torch.cat([1 - kept / kept.mean(1, keepdim=True), w[-1:]])


def attention_report(params, test, args):
    """Figure 3, of each of --tasks: w of many test subtasks; and, of the first --report-tasks, how far w points where channel
    weights go that are trained on all data of the subtask: cosine, and share of equal signs. As what w would have without
    looking at the subtask, the same of the w of the next one. Writes <out>/attention.json and, with matplotlib, attention.png."""
    found, out = {}, Path(args.out)
    with tqdm(total=(REPORTED + args.report_tasks) * len(args.tasks), desc="attention", disable=None, leave=False) as bar:
        for kind, sampler in zip(args.tasks, test.of):
            w = []
            for j in range(max(REPORTED, args.report_tasks + 1)):
                task = Task(*(x[0] for x in sampler.tasks(j, 1)))
                with torch.no_grad():
                    w.append(attention(params, kind, embed(params, task.support_x, Norm()), task.support_y, args)[0])
                bar.update()
            best, rows = [], []
            for j in range(args.report_tasks):
                task = Task(*(x[0] for x in sampler.tasks(j, 1)))
                best.append(best_weights(params, task, *sampler.everything(j), args, kind))
                pairs = [(relative(mine), relative(best[j])) for mine in (w[j], w[j + 1])]
                rows.append(torch.stack([x for one, two in pairs for x in (
                    F.cosine_similarity(one, two, 1), (one.sign() == two.sign()).float().mean(1))], 1))
                bar.update()
            rows = torch.stack(rows).double().cpu().numpy()                 # (tasks, B, 4)
            names = ("cosine", "same_sign", "cosine_next", "same_sign_next")
            found[kind] = {"w": torch.stack(w).tolist(), "best": torch.stack(best).tolist(), **{name: {
                f"block{l + 1}": summary(rows[:, l, i], [kind], {})["overall"] for l in range(4)} for i, name in enumerate(names)}}
            spread = torch.stack(w)
            print(f"\n{args.title}, {kind}: w of {len(w)} test subtasks; {args.report_tasks} beside weights trained on all data\n"
                  f"{'block':8}{'w: mean, size, of which by subtask':38}{'cosine':18}{'next one':18}{'same sign':18}next one")
            for l in range(4):
                of = spread[:, l]
                size = f"{of.mean():+.4f}, {of.square().mean().sqrt():.4f}, {of.std(0, correction=0).square().mean().sqrt():.4f}"
                cells = [found[kind][name][f"block{l + 1}"] for name in ("cosine", "cosine_next", "same_sign", "same_sign_next")]
                cells = ["{mean:.3f} +- {ci95:.3f}".format(**x).ljust(18) for x in cells]
                print(f"{l + 1:<8}{size:38}{''.join(cells)}")
    atomic_write(out / "attention.json", json.dumps({"method": args.method, "synthetic": args.synthetic, "modes": args.modes,
                                                     "report_tasks": args.report_tasks, "found": found}) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("note: matplotlib is not installed, so there is no figure")
        return
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, panels = plt.subplots(2, len(found), figsize=(2 + 7 * len(found), 7), squeeze=False, layout="constrained")
    for (kind, of), top, bottom in zip(found.items(), *panels):
        w, C = np.array(of["w"]), args.filters
        for l in range(4):
            at = np.tile(l * C + np.arange(C), len(w))
            top.plot(at, w[:, l].ravel(), ".", markersize=2, alpha=0.2, color=f"C{l}", label=f"block {l + 1}")
        top.set(title=f"{kind}: w of {len(w)} test subtasks", xlabel="feature map", ylabel="w")
        legend = top.legend(loc="upper right", fontsize="small")
        for handle in legend.legend_handles:
            handle.set(alpha=1, markersize=8)
        best, mine, at = np.array(of["best"])[0, 3], w[0, 3], np.arange(C)
        for values, side, label in ((mine, -0.2, "predicted"), (best, 0.2, "trained on all data")):
            most = np.abs(values).max().clip(1e-12)
            bottom.bar(at + side, values / most, 0.4, label=f"{label}, divided by {most:.2g}")
        bottom.axhline(0, color="black", linewidth=0.8)
        bottom.set(title="the last block's, first test subtask, each scaled to 1", xlabel="feature map", ylabel="w, scaled")
        bottom.legend(fontsize="small")
    figure.suptitle(f"{args.title}, {args.ways}-way {args.shots}-shot")
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    plt.close(figure)
    atomic_write(out / "attention.png", content.getvalue())
    print(f"written: {out / 'attention.png'}")


# ============================================================================================================
# Below this line every script has the same text: running tasks, training, evaluation, files.

def run_tasks(params, batches, args, vectorise, evaluate=False, epsilon=None):
    """task_loss of the subtasks of each high-level task -> losses (T * J,), measures (T * J, 1), the J tasks taking turns; if
    `evaluate`, test_outputs of them: no losses (zeros), measures (T * J, 4), a column for each of KEYS.

    In training it adds to .grad the gradient of the sum over high-level tasks of their mean losses (Eq. 3). vmap fills a GPU.
    On a CPU each subtask has a thread of its own, and gradients are added in the order of the subtasks.
    """
    columns, weights = [], list(params.values())
    for j, (kind, batch) in enumerate(zip(args.tasks, batches)):
        T = len(batch.mode)

        def one(task, epsilon, kind=kind):
            with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16"):
                if evaluate:
                    outputs = test_outputs(params, task, args, kind)
                    return torch.zeros((), device=task.query_x.device), torch.stack(measures(kind, outputs, task.query_y))
                loss, outputs = task_loss(params, task, args, kind, epsilon)
            return loss, torch.stack(measures(kind, [outputs], task.query_y))

        def one_in_a_thread(given, one=one, T=T):
            with torch.set_grad_enabled(not evaluate):      # each thread has a switch of its own
                loss, found = one(*given)
            gradients = () if evaluate else torch.autograd.grad(loss / T, weights, allow_unused=True)
            return loss.detach(), found.detach(), gradients

        noise = None if epsilon is None else epsilon[:, j]
        if vectorise:
            losses, found = torch.func.vmap(one, (0, None if noise is None else 0))(batch, noise)
            if not evaluate:
                losses.mean().backward()
            columns.append((losses.detach(), found.detach()))
            continue
        losses, found = [], []
        tasks = [(Task(*(x[i] for x in batch)), noise if noise is None else noise[i]) for i in range(T)]
        for loss, measure, gradients in in_threads(one_in_a_thread, tasks, args.workers):
            losses.append(loss)
            found.append(measure)
            for w, g in zip(weights, gradients):
                if g is not None:                           # the other high-level tasks' heads have none
                    w.grad = torch.zeros_like(w) if w.grad is None else w.grad
                    w.grad += g
        columns.append((torch.stack(losses), torch.stack(found)))
    return tuple(torch.stack(column, 1).flatten(0, 1) for column in zip(*columns))


def evaluate(params, episodes, count, args):
    """Measures of the first `count` tasks -> array (4, count), see KEYS and `measures`; by the paper's protocol, where a
    prediction knows the other queries, and inductive. See PROTOCOLS."""
    rows, step = [], 20 * len(episodes.of)
    with torch.no_grad(), tqdm(total=count, desc=f"{episodes.split} tasks", disable=None, leave=False) as bar:
        for first in range(0, count, step):
            batches = episodes.tasks(first, min(step, count - first))
            rows.append(run_tasks(params, batches, args, args.device != "cpu", evaluate=True)[1])
            bar.update(len(rows[-1]))
    return torch.cat(rows).T.double().cpu().numpy().round(4)


def units(scores, domains):
    """Scores of tasks -> what an interval is over: these; or, where they take turns in a few domains, the means of each one's, as
    tasks of one domain share images. (Of one domain there is nothing but its tasks.)"""
    return np.array([scores[d::domains].mean() for d in range(min(domains, len(scores)))]) if domains > 1 else scores


def summary(per_task, modes, domains):
    """Measures of tasks, modes taking turns -> {"overall" and each mode: {"mean", "ci95"}}. Modes are strata: overall is the
    mean of their means, its 95 % interval 1.96 sqrt(sum_m s_m^2 / n_m) / M. domains: {mode: how many}, see `units`; few, they
    have Student's t in place of 1.96."""
    strata = [units(per_task[m::len(modes)], domains.get(mode, 0)) for m, mode in enumerate(modes)]
    wider = [student(len(x)) / 1.96 if domains.get(mode, 0) > 1 else 1.0 for x, mode in zip(strata, modes)]
    means, variances = [x.mean() for x in strata], [w ** 2 * x.var(ddof=1) / len(x) for x, w in zip(strata, wider)]
    rows = [("overall", np.mean(means), sum(variances) / len(modes) ** 2), *zip(modes, means, variances)]
    return {name: {"mean": round(float(x), 4), "ci95": round(1.96 * math.sqrt(v), 4)} for name, x, v in rows}


def backbone_gradients(params, batches, args, epsilon):
    """How hard each high-level task pulls at the shared backbone: {task: norm of the gradient of its weighted loss, on one
    batch}. Overwrites .grad. Tasks whose norms differ by orders of magnitude do not train together."""
    found = {}
    for j, kind in enumerate(args.tasks):
        only = {"tasks": [kind], "alpha": args.alpha[j:j + 1], "loss_weights": args.loss_weights[j:j + 1]}
        noise = None if epsilon is None else epsilon[:, j:j + 1]
        for w in params.values():
            w.grad = None
        run_tasks(params, batches[j:j + 1], argparse.Namespace(**vars(args) | only), args.device != "cpu", epsilon=noise)
        found[kind] = math.hypot(*(w.grad.norm() for w in group(params, "backbone").values()))
    return found


def identity(args):
    """What makes two runs the same run: the method, and the arguments that change what is learned."""
    other = ("iterations", "test_tasks", "val_tasks", "val_every", "device", "data_root", "cache_dir", "out",
             "log_every", "save_every", "keep_every", "stop_after", "eval_only", "overwrite", "quick",
             "official", "title", "variant", "workers", "strata", "transfer", "attention_report", "report_tasks")
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
    beta_gamma = [p for p in ([v for k, v in params.items() if k.startswith("attention.") == psi] for psi in (False, True)) if p]
    optimizer = torch.optim.Adam([{"params": p} for p in beta_gamma], lr=args.lr, fused=True)
    if checkpoint:
        done, before, window = (checkpoint[k] for k in ("iteration", "seconds", "window"))
        optimizer.load_state_dict(checkpoint["optimizer"])
    if done >= args.iterations or args.eval_only:
        return done, before
    episodes, validation = MetaTasks(args, "train"), args.val_every and MetaTasks(args, "val")
    out, T, M, start, begun = Path(args.out), args.meta_batch * len(args.tasks), len(args.strata), done, time.perf_counter()
    deadline, ending = begun + (math.inf if args.stop_after is None else args.stop_after), False
    log = out / "log.jsonl"     # lines from after the checkpoint, if the run was killed, will come again
    lines = log.read_text().splitlines() if checkpoint and log.exists() else []
    lines = [line for line in lines if json.loads(line)["iteration"] <= done]
    for number in (signal.SIGINT, signal.SIGTERM):      # the first ends the run cleanly, a second one at once
        signal.signal(number, lambda n, _: (stop.append(f"signal {n}"), signal.signal(n, signal.SIG_DFL)))
    with tqdm(total=args.iterations, initial=done, desc=args.title, disable=None) as bar:
        while not ending:
            optimizer.zero_grad()
            for of, lr in zip(optimizer.param_groups, (args.lr, args.attention_lr)):
                of["lr"] = lr * 0.5 ** (done // (args.lr_halve_every or math.inf))
            batches, epsilon = episodes.tasks(done * T, T), draws(done, args)
            losses, accuracies = run_tasks(params, batches, args, args.device != "cpu", epsilon=epsilon)
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
                shown, each = ({args.strata[m]: x[mode == m].mean().item() for m in mode.unique()} for x in (accuracies, losses))
                norms = {p: math.hypot(*(w.grad.norm() for w in group(params, p).values())) for p in PARTS}
                if not math.isfinite(losses.sum() + sum(norms.values())):
                    fail(f"not finite near iteration {done}: lower --lr, in another --out")
                balance = backbone_gradients(params, batches, args, epsilon) if len(args.tasks) > 1 else {}
                line = {"iteration": done, "loss": losses.mean().item(), "losses": each, "accuracy": shown, "backbone_gradient": balance,
                        "gradient_norm": norms, "seconds": before + seconds, "synthetic": args.synthetic}
                if args.val_every and done // args.val_every > (done - len(window)) // args.val_every:
                    rows = evaluate(params, validation, args.val_tasks, args)
                    line["validation"] = measured(rows, args, validation)
                    begun = time.perf_counter() - seconds       # seconds count training alone
                lines.append(json.dumps(line))
                atomic_write(log, "\n".join(lines) + "\n")
                window, shown = [], {k: f"{x:.1f}%" for k, x in shown.items()}
                if balance:
                    shown["backbone gradients"] = " ".join(f"{x:.2g}" for x in balance.values())
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
    """Print what was measured, under which protocols, with intervals, beside the paper's numbers."""
    known = args.modes == ["miniimagenet"] and args.ways == 5 and args.shots in (1, 5) and not args.synthetic
    known = known and args.image_size == 84 and not args.variant
    paper = PAPER[result["method"]].get("M", (("", ""),) * 2)[args.shots == 5] if known else ("", "")
    print(f"\n{args.title}: {args.ways}-way {args.shots}-shot, {args.image_size} px, {result['test_tasks']} "
          f"test tasks, after {result['iterations']} iterations of {result['seconds_per_iteration']} s")
    kinds = dict(zip(args.strata, args.tasks)) if len(args.tasks) > 1 else dict.fromkeys(["overall", *args.strata], *args.tasks)
    parts = [(name, kinds[name], name, result) for name in result["accuracy"]]
    parts += [(f"transfer to {mode}", "classification", "overall", found) for mode, found in result["transfer"].items()]
    for head, keys, classes, number in (
            ("accuracy in %", KEYS[:2], True, paper[0]), ("NIL, accuracy in %", KEYS[2:], True, paper[1]),
            ("% within 1e-3", KEYS[:2], False, ""), ("squared error, thousandths", KEYS[2:], False, "")):
        rows = [(title, [found[key][of] for key in keys]) for title, kind, of, found in parts
                if (kind == "classification") == classes]
        if rows:
            print(f"{head:28}{'paper protocol':20}{'inductive':20}" + TABLE * bool(number))
        for title, both in rows:
            cells = [f"{x['mean']:.2f} +- {x['ci95']:.2f}" for x in both]
            print(f"{title:28}{cells[0]:20}{cells[1]:20}{number if title == 'overall' else ''}")


def main():
    args = get_args()
    if args.device == "cpu":
        torch.set_num_threads(1)            # run_tasks has subtasks side by side instead
    out, stop, test = Path(args.out), [], MetaTasks(args, "test")
    for file in out.glob("*") if args.overwrite else ():
        if file.name in ("checkpoint.pt", "log.jsonl", "result.json") or file.match("params-*.pt"):
            file.unlink()
    checkpoint = load(out / "checkpoint.pt", args) if (out / "checkpoint.pt").exists() else None
    if (args.eval_only or args.attention_report) and not checkpoint:
        flag = "--eval-only" if args.eval_only else "--attention-report"
        fail(f"{flag}, but there is no {out / 'checkpoint.pt'}: train first, or name the run by --out")
    params = checkpoint["params"] if checkpoint else init_params(args)
    params = {k: w.to(args.device).requires_grad_() for k, w in params.items()}
    if args.attention_report:
        attention_report(params, test, args)
        return
    done, seconds = train(params, args, checkpoint, stop)
    if stop and done < args.iterations:
        print(f"stopped by {stop[0]} at iteration {done} of {args.iterations}; the same command continues")
        return
    for number in (signal.SIGINT, signal.SIGTERM):      # training is saved; evaluation may be cut anywhere
        signal.signal(number, signal.SIG_DFL)
    file, tasks = out / "result.json", test.sha256(args.test_tasks)
    result = json.loads(file.read_text()) if checkpoint and file.exists() else {}
    ready = [*(result.get(k) for k in ("iterations", "tasks_sha256", "data")), list(result.get("transfer", ()))]
    if ready != [done, tasks, test.folders, args.transfer]:
        rows = list(evaluate(params, test, args.test_tasks, args))
        device = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        git = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40 2>{os.devnull}'
        result = {
            "method": args.method, "modes": args.modes, "ways": args.ways, "shots": args.shots,
            "synthetic": args.synthetic, "protocol": PROTOCOLS, "test_tasks": args.test_tasks,
            "tasks_sha256": tasks, "data": test.folders, **measured(rows, args, test), "strata": args.strata, "iterations": done,
            "domains": test.domains,
            "seconds_train": round(seconds, 1), "seconds_per_iteration": round(seconds / max(done, 1), 4),
            "parameters": {part: sum(w.numel() for w in group(params, part).values()) for part in PARTS},
            "args": {k: v for k, v in vars(args).items() if k not in ("data_root", "cache_dir", "out")},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "device": device,
                         "threads": torch.get_num_threads(), "commit": os.popen(git).read().strip()},
            **dict(zip(PER_TASK, np.array(rows).tolist())), "transfer": transfer(params, args),
            "per_task_mode": [j % len(args.strata) for j in range(args.test_tasks)]}
        atomic_write(file, json.dumps(result))
    report(result, args)


if __name__ == "__main__":
    main()
