"""The ModGrad cell on image completion: all of a face from a few of its pixels. With CAVIA, MAML and CNP.

Paper: Simon, Koniusz, Nock, Harandi: On Modulating the Gradient for Meta-Learning, ECCV 2020, Section 5.2, Table 3,
Figure 7. The protocol is that of CAVIA (Zintgraf et al., ICML 2019) and CNP (Garnelo et al., ICML 2018).

The idea. An image is a function from a place (row, column) to a colour, and a *task* is one image: learn the function
from k *context* pixels, be judged on all of them. A small fully connected network, the same for all images, is adapted
to the context by inner steps, and meta-trained so that the adapted network has a small error on the whole image. So it
learns what faces look like, and the context says which face this is. The four algorithms differ in what is adapted:
    modgrad    one layer, by one step whose gradient is modulated entry by entry (see modgrad.py)
    maml       all layers, by 5 plain gradient steps
    cavia      a context vector beside the input, from zero, by 5 plain gradient steps
    cnp        nothing: an encoder makes that vector, as a mean over the context pixels, in one forward pass

    paper          here                        shape or keys                     where
    theta          group(params, "base")       fc1 .. fc5 head                   five layers of 128 ReLU units
    D_trn          task.support_x, .support_y  (k, 2), (k, 3)                    context: places and colours
    D_val          task.query_x, .query_y      (S*S, 2), (S*S, 3)                all pixels, context included
    v              v                           (128,)                            Eq. 9
    phi_1, phi_2   cell                        generator.{layer}.rows, .cols     Eq. 6, 7
    M              modulation                  like the adapted parameters       Eq. 8
    alpha, K       --alpha, --steps            0.1, 1                            Eq. 5

Read it beside modgrad.py: the same inner steps on another network and another loss.
Run:  python modgrad_completion.py --synthetic --quick     a minute or two on two CPU cores, no download; prints errors
      python modgrad_completion.py --pixels 100 --algorithm cavia
      python modgrad_completion.py --picture faces.png --runs RUN RUN ...
What the paper does not give and is chosen here: the CNP's encoder has three layers and its decoder is the same network as
the rivals', trained by the same squared error (its paper predicts a variance, too); the sister networks of a cell are as
in modgrad.py.
"""
import argparse
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

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import Completions, Task, atomic_write, canonical_mode, fail

METHODS = {"modgrad": "ModGrad", "maml": "MAML", "cavia": "CAVIA", "cnp": "CNP"}
LAYERS = ("fc1", "fc2", "fc3", "fc4", "fc5")
PARTS = ("base", "encoder", "generator")            # of the parameters; only the CNP has an encoder
PROTOCOL = "mean squared error over all pixels and colours, the context included; colours in [0, 1]"
QUICK = {"iterations": 400, "test_tasks": 200}
TABLE, PAPER = "ModGrad's Table 3", defaultdict(dict, {      # CelebA, mean squared error by (pixels, order)
    "CNP": {(10, "random"): 0.039, (100, "random"): 0.016, (10, "ordered"): 0.057, (100, "ordered"): 0.047},
    "MAML": {(10, "random"): 0.040, (100, "random"): 0.017, (10, "ordered"): 0.055, (100, "ordered"): 0.047},
    "CAVIA": {(10, "random"): 0.037, (100, "random"): 0.014, (10, "ordered"): 0.053, (100, "ordered"): 0.047},
    "ModGrad": {(10, "random"): 0.034, (100, "random"): 0.012, (10, "ordered"): 0.048, (100, "ordered"): 0.043}})
# (steps, their size, adapted layers): numbers of steps, and ModGrad's size, from its paper; MAML's and CAVIA's sizes from CAVIA's.
DEFAULTS = {"modgrad": (1, 0.1, ["fc5"]), "maml": (5, 0.1, ["all"]), "cavia": (5, 1.0, []), "cnp": (0, 0.0, [])}
LEAST = {"image_size": 4, "hidden": 1, "pixels": 1, "meta_batch": 1, "log_every": 1, "save_every": 1, "test_tasks": 2,
         "val_tasks": 2, "rank": 1, "context": 1}      # of arguments that are numbers; else 0
SHOWN = ("adapt", "pixels", "order", "image_size", "seed", "synthetic")         # what a report says anyway


def column(i):
    """A column of DEFAULTS for a help text."""
    return ", ".join(f"{algorithm} {' '.join(row[i]) if i == 2 else row[i]}" for algorithm, row in DEFAULTS.items())


def get_args(argv=None):
    about = __doc__.split("\n")[0] + " P: the paper's value; C: that of CAVIA's code, ours unless it says so."
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.error = fail
    p.add_argument("--algorithm", default="modgrad", choices=METHODS, help="the inner step")
    p.add_argument("--modes", nargs=1, default=["celeba"], metavar="MODE", help="a data set: celeba (P), or any other")
    p.add_argument("--pixels", type=int, default=10, help="k, context pixels (P: 10 and 100)")
    p.add_argument("--order", default="random", choices=("random", "ordered"), help="ordered: the first k, row by row")
    p.add_argument("--image-size", type=int, default=32, help="S, pixels (C: 32)")
    p.add_argument("--hidden", type=int, default=128, help="units of each of the five layers (P: 128)")
    p.add_argument("--steps", type=int, help=f"K, inner steps (P: 1 for ModGrad, 5): {column(0)}")
    p.add_argument("--alpha", type=float, help=f"their size (P: 0.1 for ModGrad): {column(1)}")
    p.add_argument("--adapt", nargs="+", metavar="LAYER", help=f"layers that the steps change, as fc5 head; or all: {column(2)}")
    p.add_argument("--rank", type=int, default=5, help="u, columns that are mixed in a ModGrad cell (P: 5)")
    p.add_argument("--context", type=int, default=128, help="length of v, of CAVIA's and CNP's vector (P, C: 128)")
    p.add_argument("--start-at-one", action="store_true", help="ModGrad's M starts near 1, as MAML, not near 0 (C: near 0)")
    p.add_argument("--inner-clip", type=float, default=10.0, help="of the inner gradient's entries (C: none, but 10 for "
                   "those of each task's outer gradient)")
    p.add_argument("--first-order", action="store_true", help="hold the inner gradients constant (P, C: no)")
    p.add_argument("--meta-batch", type=int, default=25, help="T, images an iteration (C: 25)")
    p.add_argument("--iterations", type=int, default=50000, help="updates (C: 50,000)")
    p.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (C: 1e-3)")
    p.add_argument("--lr-halve-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--seed", type=int, default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-tasks", type=int, default=1000, help="held-out images")
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=200, help="images")
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="keeps images decoded once")
    p.add_argument("--synthetic", action="store_true", help="procedural faces: no download")
    p.add_argument("--quick", action="store_true", help=f"about two minutes on two CPU cores: {QUICK}")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16: the network's layers only")
    p.add_argument("--out", help="folder of the run (runs/<name>); the same command continues it")
    p.add_argument("--log-every", type=int, default=50, help="iterations")
    p.add_argument("--save-every", type=int, default=1000, help="iterations between checkpoints")
    p.add_argument("--keep-every", type=int, default=0, help="iterations between kept parameters")
    p.add_argument("--stop-after", type=float, help="seconds; then write a checkpoint and end")
    p.add_argument("--picture", metavar="FILE", help="train nothing: draw test images as completed by --runs, a PNG")
    p.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="folders of runs")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint as it is")
    start.add_argument("--overwrite", action="store_true", help="start afresh, dropping what --out holds")
    defaults = vars(p.parse_args([]))
    if p.parse_known_args(argv)[0].synthetic:
        p.set_defaults(test_tasks=800)                  # all that there are
    if p.parse_known_args(argv)[0].quick:
        p.set_defaults(**QUICK)
    args = p.parse_args(argv)
    if bool(args.picture) != bool(args.runs):
        fail("--picture FILE and --runs RUN ... belong together")
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    args.method = METHODS[args.algorithm]
    usual = dict(zip(("steps", "alpha", "adapt"), DEFAULTS[args.algorithm]))
    if args.algorithm == "cnp" and not (args.steps is args.alpha is None):
        fail("--algorithm cnp makes no inner steps: leave --steps and --alpha out")
    for key, value in usual.items():
        defaults[key] = value
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    if args.algorithm in ("cavia", "cnp") and args.adapt:
        fail(f"--algorithm {args.algorithm} adapts no layer: leave --adapt out")
    if args.algorithm != "cnp" and args.steps < 1:
        fail(f"--steps {args.steps}: give a number from 1 on")
    for layer in args.adapt:
        if layer not in ("all", *LAYERS, "head"):
            fail(f"--adapt {layer}: not there; choose from all {' '.join(LAYERS)} head")
    unused = {"modgrad": [], "cavia": ["rank", "start_at_one"], "maml": ["rank", "context", "start_at_one"],
              "cnp": ["rank", "first_order", "inner_clip", "start_at_one"]}
    for key in unused[args.algorithm]:
        if getattr(args, key) != defaults[key]:
            print(f"note: {args.method} does not use --{key.replace('_', '-')}, so it stays {defaults[key]}", file=sys.stderr)
        setattr(args, key, defaults[key])               # and does not make it another run
    args.method += f" on {'+'.join(args.adapt)}" * (args.adapt != defaults["adapt"])
    changed = {k: '+'.join(v) if isinstance(v, list) else v for k, v in identity(args).items()
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

def linear(params, name, x):
    """A layer of a cell or an encoder: in single precision, as bf16 is for the network's own layers."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(params[f"{name}.weight"].dtype), params[f"{name}.weight"], params[f"{name}.bias"])


def forward(params, x, context=None):
    """Places x (n, 2), and what is known of the image, context (C,), beside each -> colours (n, 3)."""
    if context is not None:
        x = torch.cat([x, context.expand(len(x), -1)], 1)
    for name in LAYERS:
        x = F.relu(F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"]))
    return F.linear(x, params["head.weight"], params["head.bias"]).to(params["head.weight"].dtype)       # bf16, if chosen, ends here


def encode(params, x, y):
    """The CNP's encoder: context places (k, 2) and colours (k, 3), in any order -> what they say of the image (C,)."""
    h = torch.cat([x, y], 1)
    for i in (1, 2):
        h = F.relu(linear(params, f"encoder.fc{i}", h))
    return linear(params, "encoder.fc3", h).mean(0)


def group(params, name):
    """One part of all parameters: "base" (theta), "encoder" or "generator"."""
    if name == "base":
        return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def adapted_keys(args, params):
    """Keys of the parameters that inner steps change."""
    return [k for k in group(params, "base") if "all" in args.adapt or k.split(".")[0] in args.adapt]


def init_params(args):
    """All parameters, drawn from the seed -> flat dict.

    As PyTorch's own layers: uniform within 1 / root of the number of inputs. (CAVIA's code has a MAML of its own there, whose
    base is uniform within 1 / root of the number of *outputs*: the first layer is an eighth of ours in size, the last 6.5
    times as large. Ours starts like the others, so that the algorithms differ in nothing else.)
    """
    rng, params = torch.Generator().manual_seed(args.seed), {}

    def default(name, n_out, n_in):
        root = math.sqrt(n_in)
        params[f"{name}.weight"] = (2 * torch.rand(n_out, n_in, generator=rng) - 1) / root
        params[f"{name}.bias"] = (2 * torch.rand(n_out, generator=rng) - 1) / root

    n_in = 2 + (args.context if args.algorithm in ("cavia", "cnp") else 0)
    for name in LAYERS:
        default(name, args.hidden, n_in)
        n_in = args.hidden
    default("head", 3, n_in)
    if args.algorithm == "cnp":
        for i, (n_out, n_in) in enumerate(((args.hidden, 5), (args.hidden, args.hidden), (args.context, args.hidden)), 1):
            default(f"encoder.fc{i}", n_out, n_in)
    elif args.algorithm == "modgrad":
        for k in adapted_keys(args, params):
            layer, part = k.split(".")
            for factor, n in zip(("rows", "cols"), params[k].shape) if part == "weight" else (("bias", len(params[k])),):
                default(f"generator.{layer}.{factor}.1", n, args.context)      # phi: Linear, ReLU, Linear
                default(f"generator.{layer}.{factor}.2", args.rank + args.rank * n, n)
                if args.start_at_one:
                    params[f"generator.{layer}.{factor}.2.bias"][args.rank:] = 1.0
    return params


# ----------------------------------------------------------------------------------------------- inner steps
# Each takes (params, fast, loss, args, noisy): what is adapted so far, the support loss as a function of it, and `noisy`, which
# clips a gradient. Each returns what is adapted then. The text is that of modgrad.py.

def maml_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * gradient(theta)                                            (Finn et al., ICML 2017)"""
    gradient = noisy(torch.func.grad(loss)(fast))
    return {k: fast[k] - args.alpha * gradient[k] for k in fast}


def cavia_step(params, fast, loss, args, noisy):
    """v <- v - alpha * gradient(v): only a context moves, an input beside the place (Zintgraf et al., ICML 2019)"""
    gradient = noisy(torch.func.grad(loss)(fast))
    return {"context": fast["context"] - args.alpha * gradient["context"]}


def modgrad_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * M(v) * gradient(theta)                                     (Eq. 5; Algorithm 1, 9-13)"""
    gradient = noisy(torch.func.grad(loss)(fast))                                       # 10

    def step(v):
        M = modulation(params, v, fast)
        return {k: fast[k] - args.alpha * M[k] * gradient[k] for k in fast}
    v = next(iter(fast.values())).new_zeros(args.context)                               # 9
    v = -torch.func.grad(lambda v: loss(step(v)))(v)                                    # 11: Eq. 9
    return step(v.detach() if args.first_order else v)                                  # 12, 13


STEPS = {"modgrad": modgrad_step, "maml": maml_step, "cavia": cavia_step}


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

def task_loss(params, task, args):
    """ONE task: adapt to the context pixels, be judged on all pixels of the image.

    Returns the mean squared error, whose gradient trains everything, and the colours (S*S, 3). Numbers: lines of
    Algorithm 1.
    """
    if args.algorithm == "cnp":
        colours = forward(params, task.query_x, encode(params, task.support_x, task.support_y))
        return F.mse_loss(colours, task.query_y), colours
    if args.algorithm == "cavia":
        fast = {"context": params["fc1.weight"].new_zeros(args.context)}
    else:
        fast = {k: params[k] for k in adapted_keys(args, params)}                       # 6: theta^0

    def support_loss(fast):
        return F.mse_loss(forward(params | fast, task.support_x, fast.get("context")), task.support_y)

    def noisy(gradient):
        gradient = {k: g.clamp(-args.inner_clip, args.inner_clip) for k, g in gradient.items()}
        return {k: g.detach() for k, g in gradient.items()} if args.first_order else gradient
    for _ in range(args.steps):                                                         # 8
        fast = STEPS[args.algorithm](params, fast, support_loss, args, noisy)           # 9-13
    colours = forward(params | fast, task.query_x, fast.get("context"))
    return F.mse_loss(colours, task.query_y), colours                                   # 16, 17


@torch.no_grad()
def draw_picture(args):
    """Figure 7: a row for each of the first test images: its context, what each run makes of it, and the truth -> PNG."""
    columns, cell, count, options = [], 96, 8, None
    for folder in args.runs:
        try:
            checkpoint = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
            run = argparse.Namespace(**checkpoint["identity"], data_root=args.data_root, cache_dir=args.cache_dir, device="cpu", test_tasks=count)
            setting = run.modes, run.pixels, run.order, run.image_size, run.synthetic
        except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
            fail(f"--runs {folder}: has no checkpoint of a completion run ({type(error).__name__}): name another folder")
        if options and setting != options:
            fail("--runs: they differ in data set, pixels, order, image size or --synthetic; name runs of one setting")
        options, episodes = setting, Completions.of(run, "test")
        batch = episodes.tasks(0, count)
        made = torch.stack([task_loss(checkpoint["params"], Task(*(x[i] for x in batch)), run)[1] for i in range(count)])
        columns.append((f"{run.method}\n{run.steps} step{'s' * (run.steps != 1)}" if run.steps else f"{run.method}\n", made.clamp(0, 1)))
    S, (_, context) = episodes.size, episodes.indices(0, count)
    seen = torch.ones(count, S * S, 3) * torch.tensor([0.2, 0.3, 0.6])                  # blue: not given
    for i, places in enumerate(torch.from_numpy(context)):
        seen[i, places] = batch.query_y[i, places]
    columns = [(f"context:\n{run.pixels} {run.order}", seen), *columns, ("truth\n", batch.query_y)]
    picture = Image.new("RGB", (len(columns) * (cell + 4), count * (cell + 4) + 46), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((2, 2), f"{'SYNTHETIC ' * run.synthetic}{'+'.join(run.modes)}, first test images", "black")
    for c, (head, images) in enumerate(columns):
        pen.text((c * (cell + 4) + 2, 17), head, "black")
        for i, image in enumerate((images.view(count, S, S, 3) * 255).round().byte().numpy()):
            tile = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(tile, (c * (cell + 4) + 2, i * (cell + 4) + 46))
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(args.picture, content.getvalue())
    print(f"written: {args.picture}")


# ============================================================================================================
# From here on the text is that of the other scripts, with an error in place of their accuracies.

def run_tasks(params, batch, args, train=False):
    """task_loss of T tasks, all together: their matrices are small -> losses (T,), which are the errors.

    In training it adds the mean loss's gradient to .grad."""
    def one(task):
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16"):
            return task_loss(params, task, args)[0]
    losses = torch.func.vmap(one)(batch)
    if train:
        losses.mean().backward()
    return losses.detach()


def evaluate(params, episodes, count, args):
    """Errors of the first `count` tasks -> array (count,)."""
    rows = []
    with torch.no_grad(), tqdm(total=count, desc=f"{episodes.split} images", disable=None, leave=False) as bar:
        for first in range(0, count, 20):
            batch = episodes.tasks(first, min(20, count - first))
            rows.append(run_tasks(params, batch, args))
            bar.update(len(batch.mode))
    return torch.cat(rows).double().cpu().numpy().round(7)


def summary(per_task):
    """Errors of tasks -> {"mean", "ci95"}: half the width of a 95 % interval, 1.96 s / sqrt(n)."""
    return {"mean": round(float(per_task.mean()), 6), "ci95": round(1.96 * float(per_task.std(ddof=1)) / math.sqrt(len(per_task)), 6)}


def identity(args):
    """What makes two runs the same run: the method, and the arguments that change what is learned."""
    other = ("iterations", "test_tasks", "val_tasks", "val_every", "device", "data_root", "cache_dir", "out",
             "log_every", "save_every", "keep_every", "stop_after", "eval_only", "overwrite", "quick",
             "picture", "runs", "title", "variant")
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
    episodes, validation = Completions.of(args, "train"), args.val_every and Completions.of(args, "val")
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
            losses = run_tasks(params, episodes.tasks(done * T, T), args, train=True)
            optimizer.step()
            window.append(losses.mean())                        # stays on the device until logged
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
                loss = torch.stack([x.cpu() for x in window]).mean().item()
                seconds = time.perf_counter() - begun       # the copy has waited for the device
                norms = {p: math.hypot(*(w.grad.norm() for w in group(params, p).values())) for p in PARTS}
                if not math.isfinite(loss + sum(norms.values())):
                    fail(f"not finite near iteration {done}: lower --lr, in another --out")
                line = {"iteration": done, "loss": loss, "gradient_norm": norms, "seconds": before + seconds,
                        "synthetic": args.synthetic}
                if args.val_every and done // args.val_every > (done - len(window)) // args.val_every:
                    line["validation"] = summary(evaluate(params, validation, args.val_tasks, args))
                    begun = time.perf_counter() - seconds       # seconds count training alone
                lines.append(json.dumps(line))
                atomic_write(log, "\n".join(lines) + "\n")
                window = []
                bar.set_postfix(error=f"{loss:.4f}")
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
    known = args.modes == ["celeba"] and args.image_size == 32 and not args.synthetic and not args.variant
    paper = PAPER[result["method"]].get((args.pixels, args.order), "") if known else ""
    print(f"\n{args.title}: {args.pixels} {args.order} context pixels of {args.image_size} x {args.image_size}, {result['test_tasks']} "
          f"test images, after {result['iterations']} iterations of {result['seconds_per_iteration']} s\n{result['protocol']}\n"
          f"{'error':16}{'{mean:.4f} +- {ci95:.4f}'.format(**result['error']):20}" + f"{TABLE}: {paper}" * bool(paper))


def main():
    args = get_args()
    if args.picture:
        draw_picture(args)
        return
    out, stop, test = Path(args.out), [], Completions.of(args, "test")
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
        errors = evaluate(params, test, args.test_tasks, args)
        device = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        git = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40 2>{os.devnull}'
        result = {
            "method": args.method, "modes": args.modes, "pixels": args.pixels, "order": args.order,
            "synthetic": args.synthetic, "protocol": PROTOCOL, "test_tasks": args.test_tasks,
            "tasks_sha256": tasks, "data": test.folders, "error": summary(errors), "iterations": done,
            "seconds_train": round(seconds, 1), "seconds_per_iteration": round(seconds / max(done, 1), 4),
            "parameters": {part: sum(w.numel() for w in group(params, part).values()) for part in PARTS},
            "args": {k: v for k, v in vars(args).items() if k not in ("data_root", "cache_dir", "out")},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "device": device,
                         "threads": torch.get_num_threads(), "commit": os.popen(git).read().strip()},
            "per_task": errors.tolist()}
        atomic_write(file, json.dumps(result))
    report(result, args)


if __name__ == "__main__":
    main()
