"""MAML and MMAML: model-agnostic meta-learning, and its multimodal form with feature-wise linear modulation (FiLM).

Papers: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning, ICML 2017. Vuorio, Sun, Hu, Lim: Multimodal Model-Agnostic
Meta-Learning via Task-Aware Modulation, NeurIPS 2019; here in the terms of the KML paper (see kml.py), Section 5.1.

The idea. MAML learns an initialisation theta from which a few gradient steps on a task's few labelled images (the
*support* set) give a network that classifies further images (the *query* set) of that task. One initialisation must
serve every task. When tasks come from unlike data sets (*modes*: characters, birds, photographs), that is much to ask.
So MMAML's small second network looks at the support images first, says in 128 numbers what kind of task this is (v),
and turns them into a scale and a shift for every channel of every layer, which the base network applies from then on:
    Y^_i = (1 + scale_i(v)) * Y_i + shift_i(v)          Y_i: channel i of a layer, after BatchNorm
That is one factor for all 9 * C_in entries of kernel i: FiLM turns a filter up or down. (kml.py gives every entry its
own factor, and can turn it into another filter.) theta then adapts by gradient steps; scale and shift stay.

FiLM has to come *after* BatchNorm. On the convolution's own output it would be undone at once: BatchNorm subtracts any
shift of a channel with its mean and divides any scale out with its deviation.

    paper        here                     shape                          where
    theta        base(params)             conv{l}, norm{l}, head         the network that adapts
    S_T, Q_T     task.support_*, query_*  (N*K, 3, S, S), (N*Q, 3, S, S) N ways, K shots, Q queries, S pixels
    h, v_T       encode_task, v           (128,)                         Section 5.1
    g            modulation               generator.film{l}              Section 5.1
    eta, gamma   1 + film{l}.scale,       (C_l,), (C_l,)                 Eq. 3. The papers disagree on which is called
                 film{l}.shift                                           gamma, hence these names
    T            --meta-batch             tasks per update               Algorithm 2, line 3

Read it beside kml.py (`diff mmaml.py kml.py`): one modulation in place of another, nothing else.
Run:   python mmaml.py --synthetic --quick                       two minutes on two CPU cores, nothing to download
       python mmaml.py --modes omniglot miniimagenet --shots 5   MMAML; with --modulation none, MAML
Left out: MMAML's regression and reinforcement learning; its recurrent task encoders.
"""
import argparse
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Episodes, Task, atomic_write, fail

METHODS = {"none": "MAML", "film": "MMAML"}          # --modulation: the method's name in the paper's tables
LAYERS = (1, 2, 3, 4)
EMBEDDING = 128                                     # length of v
QUICK = {"image_size": 28, "meta_batch": 4, "iterations": 150, "test_tasks": 200}
PAPER = {   # KML paper, Table 1: overall accuracy in % at 1 and 5 shots, 5 ways, 84 px, 60,000 iterations
    "fc100 miniimagenet": {"MAML": (40.53, 54.11), "MMAML": (39.11, 52.02), "MMAML+KML": (40.73, 53.72)},
    "miniimagenet omniglot": {"MAML": (65.18, 74.18), "MMAML": (67.67, 73.52), "MMAML+KML": (68.01, 77.02)},
    "fc100 miniimagenet omniglot": {"MAML": (54.40, 66.51), "MMAML": (57.35, 64.21), "MMAML+KML": (57.68, 67.12)},
    "aircraft cub fc100 miniimagenet omniglot":
        {"MAML": (47.19, 58.13), "MMAML": (49.53, 58.89), "MMAML+KML": (50.31, 60.51)},
}


def get_args(argv=None):
    """The command line. Help gives the paper's value (P), the released code's (C) and ours where they differ."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument("--modulation", default=list(METHODS)[-1], choices=METHODS, help="none is plain MAML")
    p.add_argument("--modes", nargs="+", default=["omniglot", "miniimagenet"], metavar="MODE",
                   help="omniglot miniimagenet fc100 cub aircraft, or folders of yours under the data root")
    p.add_argument("--ways", type=number(2), default=5, help="N, classes in a task (P, C: 5)")
    p.add_argument("--shots", type=number(1), default=1, help="K, support images a class (P, C: 1 and 5)")
    p.add_argument("--queries", type=number(1), default=15, help="Q, query images a class (C: 15)")
    p.add_argument("--image-size", type=number(8), default=84, help="S, pixels (C: 84)")
    p.add_argument("--channels", type=number(1), default=32, help="of the first layer, doubled in each next (C: 32)")
    p.add_argument("--no-norm-affine", action="store_true", help="BatchNorm without scale and shift (C); ours has them")
    p.add_argument("--inner-steps", type=number(0), default=5, help="gradient steps on the support set (C: 5)")
    p.add_argument("--inner-lr", type=number(0.0), default=0.05, help="their step size (C: 0.05)")
    p.add_argument("--inner-clip", type=number(0.0), default=20.0, help="bound on each entry of their gradient (C: 20)")
    p.add_argument("--first-order", action="store_true", help="take the inner gradients for constants (P, C: no)")
    p.add_argument("--meta-batch", type=number(1), default=10, help="T, tasks an iteration (C: 10)")
    p.add_argument("--iterations", type=number(0), default=60000, help="updates of all parameters by Adam (C: 60000)")
    p.add_argument("--lr", type=number(0.0), default=1e-3, help="Adam's learning rate, constant (C: 1e-3)")
    p.add_argument("--seed", type=number(0), default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-tasks", type=number(2), default=1000, help="over all modes (P: 1000)")
    p.add_argument("--val-every", type=number(0), default=0, help="iterations; 0 never (C: never)")
    p.add_argument("--val-tasks", type=number(2), default=100)
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or variable FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="for images decoded once")
    p.add_argument("--synthetic", action="store_true", help="procedural stand-ins for the modes: no download")
    p.add_argument("--quick", action="store_true", help=f"about two minutes on two CPU cores: {QUICK}")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--out", help="folder of the run (runs/<name>); the same command continues what it finds there")
    p.add_argument("--log-every", type=number(1), default=50, help="iterations")
    p.add_argument("--save-every", type=number(1), default=1000, help="iterations between checkpoints")
    p.add_argument("--keep-every", type=number(0), default=0, help="iterations between parameters kept for good")
    p.add_argument("--stop-after", type=number(0.0), help="seconds; then write a checkpoint and end")
    p.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint as it is")
    p.add_argument("--overwrite", action="store_true", help="start afresh, dropping what --out holds")
    defaults = vars(p.parse_args([]))
    if p.parse_known_args(argv)[0].quick:
        p.set_defaults(**QUICK)
    args = p.parse_args(argv)
    if args.out is None:
        words = [Path(__file__).stem, "+".join(args.modes), f"{args.ways}way", f"{args.shots}shot"]
        words += [f"{key}_{value}" for key, value in identity(args).items()
                  if value != defaults.get(key, value) and key not in ("modes", "ways", "shots")]
        args.out = "runs/" + "-".join(words).lower().replace("_true", "")
    return args


def number(least):
    """Argument type: a number not below `least`, whole if `least` is."""
    def parse(text):
        try:
            value = type(least)(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * isinstance(least, int)}number >= {least}")
        return value
    return parse


# --------------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors. The base network: four times [3x3 convolution, stride 2 -> BatchNorm -> ReLU]
# with 32, 64, 128, 256 channels, mean over the remaining pixels, one linear layer (the head).

def conv_norm(params, l, x, moments=None):
    """Convolution l and BatchNorm: x (n, C_in, S, S) -> (n, C_out, S/2, S/2), and the (mean, 1/std) it was normalised by.

    Without given moments they are those of the batch x itself, in training and testing alike: there are no running
    averages, which would have to be kept per task. (F.batch_norm calls the same kernel but withholds the moments.)
    The affine part stands outside the call because torch 2.13 gets its second derivative under vmap wrong.
    """
    y = F.conv2d(x, params[f"conv{l}.weight"], params[f"conv{l}.bias"], stride=2, padding=1)
    if moments is None:
        y, *moments = torch.native_batch_norm(y, None, None, None, None, True, 0.0, 1e-5)
    else:
        mean, rstd = moments
        y = (y - mean[:, None, None]) * rstd[:, None, None]
    if f"norm{l}.scale" in params:
        y = y * params[f"norm{l}.scale"][:, None, None] + params[f"norm{l}.shift"][:, None, None]
    return y, moments


def forward(params, x, stats=None):
    """The base network f: images x (n, 3, S, S) -> logits (n, N), and the BatchNorm moments of each layer.

    stats: None, or what an earlier call returned, to normalise by those moments instead of the batch's own.
    """
    used = []
    for l in LAYERS:
        x, moments = conv_norm(params, l, x, stats[l - 1] if stats else None)
        used.append(moments)
        if f"film{l}.scale" in params:                                          # Eq. 3, after BatchNorm, before ReLU
            x = x * (1 + params[f"film{l}.scale"][:, None, None]) + params[f"film{l}.shift"][:, None, None]
        x = F.relu(x)
    return linear(params, "head", x.mean((2, 3))), used


def linear(params, name, x):
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def encode_task(params, support_x):
    """The task encoder h: support images (N*K, 3, S, S) -> task embedding v (128,). It never sees a label.

    Its own four convolutions, one linear layer per image, and the mean over images: what it says does not depend on
    the order of the images. Sorting them by brightness makes that exact in floating point, where sums have an order.
    """
    x = support_x[support_x.sum((1, 2, 3)).argsort()]
    encoder = {k.removeprefix("encoder."): w for k, w in params.items() if k.startswith("encoder.")}
    for l in LAYERS:
        x, _ = conv_norm(encoder, l, x)
        x = F.relu(x)
    return F.relu(linear(encoder, "linear", x.mean((2, 3)))).mean(0)


def generator_sizes(l, c_in, c_out):
    """Outputs of the linear layer that makes omega for layer l: a scale and a shift for each channel."""
    return {f"film{l}": 2 * c_out}


def modulation(params, v):
    """The generator g: task embedding v (128,) -> omega, a scale and a shift (C_out,) for each layer (Section 5.1)."""
    omega = {}
    for l in LAYERS:
        omega[f"film{l}.scale"], omega[f"film{l}.shift"] = linear(params, f"generator.film{l}", v).chunk(2)
    return omega


def modulate(theta, omega):
    """FiLM leaves theta alone: omega goes along with it, for `forward` to apply to the activations of each layer."""
    return theta | omega


def init_params(args):
    """All parameters, drawn from the seed -> flat dict. The base network's are the same whatever the modulation.

    Base: Xavier-uniform weights, zero biases. Encoder and generator: PyTorch's defaults, +-1/sqrt(inputs), which the
    released code leaves as they are; scales start near 0.05, so training starts from nearly plain MAML.
    """
    rng, params = torch.Generator().manual_seed(args.seed), {}
    widths = [3] + [args.channels * 2 ** i for i in range(len(LAYERS))]

    def uniform(*shape, fan_in):
        return (2 * torch.rand(shape, generator=rng) - 1) / math.sqrt(fan_in)

    for l, c_in, c_out in zip(LAYERS, widths, widths[1:]):
        params[f"conv{l}.weight"] = torch.nn.init.xavier_uniform_(torch.empty(c_out, c_in, 3, 3), generator=rng)
        params[f"conv{l}.bias"] = torch.zeros(c_out)
        if not args.no_norm_affine:
            params |= {f"norm{l}.scale": torch.ones(c_out), f"norm{l}.shift": torch.zeros(c_out)}
    params["head.weight"] = torch.nn.init.xavier_uniform_(torch.empty(args.ways, widths[-1]), generator=rng)
    params["head.bias"] = torch.zeros(args.ways)
    if args.modulation == "none":
        return params
    for l, c_in, c_out in zip(LAYERS, widths, widths[1:]):
        params[f"encoder.conv{l}.weight"] = uniform(c_out, c_in, 3, 3, fan_in=9 * c_in)
        params[f"encoder.conv{l}.bias"] = uniform(c_out, fan_in=9 * c_in)
        params |= {f"encoder.norm{l}.scale": torch.ones(c_out), f"encoder.norm{l}.shift": torch.zeros(c_out)}
        for name, outputs in generator_sizes(l, c_in, c_out).items():
            params[f"generator.{name}.weight"] = uniform(outputs, EMBEDDING, fan_in=EMBEDDING)
            params[f"generator.{name}.bias"] = uniform(outputs, fan_in=EMBEDDING)
    params["encoder.linear.weight"] = uniform(EMBEDDING, widths[-1], fan_in=widths[-1])
    params["encoder.linear.bias"] = uniform(EMBEDDING, fan_in=widths[-1])
    return params


def base(params):
    """theta: the parameters of the base network, the ones that the inner loop adapts."""
    return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}


# ------------------------------------------------------------------------------------------------------- algorithm

def task_loss(params, task, args, evaluate=False):
    """ONE task: infer what kind it is, modulate, adapt on the support set, judge on the query set.

    Returns the query loss, a scalar whose gradient trains everything (the encoder and the generator have no other
    teacher), and the query logits (N*Q, N). evaluate=True adds the inductive logits: see `evaluate` below.
    Numbers on the right are lines of Algorithm 2 in the KML paper.
    """
    theta, omega = base(params), {}
    if args.modulation != "none":
        v = encode_task(params, task.support_x)                                             # 5: v = h(S)
        omega = modulation(params, v)                                                       # 6: omega = g(v)
    fast = modulate(theta, omega)                                                           # 7: theta^

    def support_loss(adapted):
        logits, _ = forward(fast | adapted, task.support_x)
        return F.cross_entropy(logits, task.support_y)

    # MAML's inner loop: a few steps of plain gradient descent, on this task's own copy of theta^. The gradients stay
    # in the graph, so that the outer gradient knows how the steps depend on where they began: that is second order.
    for _ in range(args.inner_steps):                                                       # 8: adapt to S
        grads = torch.func.grad(support_loss)({k: fast[k] for k in theta})
        if args.first_order:
            grads = {k: g.detach() for k, g in grads.items()}
        clip = args.inner_clip
        fast = fast | {k: fast[k] - args.inner_lr * g.clamp(-clip, clip) for k, g in grads.items()}

    logits, _ = forward(fast, task.query_x)
    loss = F.cross_entropy(logits, task.query_y)                                            # 8: loss on Q
    if not evaluate:
        return loss, logits
    _, stats = forward(fast, task.support_x)
    inductive_logits, _ = forward(fast, task.query_x, stats)
    return loss, logits, inductive_logits


# =================================================================================================================
# Below this line the text is the same in every script: running tasks, training, evaluation, files.

def accuracy(logits, labels):
    """Share of right answers in percent, over the last dimension of labels."""
    return 100 * (logits.argmax(-1) == labels).float().mean(-1)


def each_task(function, batch, vectorise):
    """Apply `function` to each of the T tasks of a batch -> its outputs, stacked. vmap fills a GPU; a CPU prefers a loop."""
    if vectorise:
        return torch.func.vmap(function)(batch)
    return [torch.stack(outputs) for outputs in zip(*(function(Task(*(x[i] for x in batch)))
                                                      for i in range(len(batch.mode))))]


def meta_gradient(params, batch, args, vectorise):
    """Add to .grad the gradient of the mean query loss (Algorithm 2, lines 10-12) -> losses (T,), accuracies (T,)."""
    def one(task):
        with torch.autocast(task.query_x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss, logits = task_loss(params, task, args)
        if not vectorise:
            (loss / len(batch.mode)).backward()     # task by task: memory does not grow with the meta-batch
        return loss if vectorise else loss.detach(), accuracy(logits, task.query_y)

    losses, accuracies = each_task(one, batch, vectorise)
    if vectorise:
        losses.mean().backward()
    return losses.detach(), accuracies


def evaluate(params, episodes, count, args, stop=()):
    """Accuracy in percent of the first `count` tasks -> array (2, count): row 0 paper protocol, row 1 inductive.

    Paper protocol: the query images are normalised by their own batch's statistics, as all published numbers are;
    so each prediction knows the other queries. Inductive: by those of the adapted network on the support set, so
    that it does not. Same tasks, same adaptation, same parameters.
    """
    params = {k: w.detach() for k, w in params.items()}
    vectorise, chunk, rows = episodes.device.type != "cpu", 20, []

    def one(task):
        with torch.autocast(task.query_x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            _, *logits = task_loss(params, task, args, evaluate=True)
        return torch.stack([accuracy(l, task.query_y) for l in logits]),

    with torch.no_grad(), tqdm(total=count, desc=f"{episodes.split} tasks", disable=None, leave=False) as bar:
        for first in range(0, count, chunk):
            batch = episodes.tasks(first, min(chunk, count - first))
            rows.append(each_task(one, batch, vectorise)[0])
            bar.update(len(batch.mode))
            if stop:
                print("stopped during evaluation; the same command evaluates again")
                raise SystemExit(0)
    return torch.cat(rows).T.double().cpu().numpy()


def summary(per_task, modes):
    """Per-task accuracies, modes taking turns -> {"overall" and each mode: mean, ci95}, in percent.

    Modes are strata: overall is the mean of their means, its 95 % interval 1.96 sqrt(sum_m s_m^2 / n_m) / M. (Pooling
    all tasks, as the released code does, would count the difference between the modes as uncertainty.)
    """
    means, errors = [], []
    for m in range(len(modes)):
        values = per_task[m::len(modes)]
        means.append(values.mean())
        errors.append(values.std(ddof=1) / math.sqrt(len(values)))
    rows = {"overall": (np.mean(means), math.sqrt(sum(e * e for e in errors)) / len(modes))}
    rows |= {mode: (mean, error) for mode, mean, error in zip(modes, means, errors)}
    return {name: {"mean": round(float(mean), 4), "ci95": round(1.96 * float(error), 4)}
            for name, (mean, error) in rows.items()}


NOT_IDENTITY = ("iterations test_tasks val_tasks val_every device data_root cache_dir quick out log_every save_every "
                "keep_every stop_after eval_only overwrite").split()


def identity(args):
    """What makes two runs the same run: the method and every argument that changes the parameters it ends with."""
    return {"method": METHODS[args.modulation]} | {k: v for k, v in vars(args).items() if k not in NOT_IDENTITY}


def save(path, content):
    """torch.save, whole or not at all. Tensors and plain values only, so that weights_only=True can load it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def load(path, args):
    """The checkpoint at `path`, or None; another run's checkpoint is an error that names the difference."""
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # a damaged file can raise nearly anything
        fail(f"{path} cannot be read ({str(error).splitlines()[0]}): choose another --out, or --overwrite")
    for key in (there := checkpoint["identity"]) | identity(args):
        if there.get(key) != identity(args).get(key):
            fail(f"{args.out} holds another run: {key} is {there.get(key)}, this command says "
                 f"{identity(args).get(key)}: choose another --out, or --overwrite")
    return checkpoint


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def train(params, args, checkpoint, stop):
    """Run the iterations that are still missing, from the checkpoint on -> iterations done, seconds they took."""
    out, T, M = Path(args.out), args.meta_batch, len(args.modes)
    done, seconds, window = (checkpoint[k] for k in ("iteration", "seconds", "window")) if checkpoint else (0, 0.0, [])
    if done > args.iterations:
        fail(f"{out} has {done} iterations, more than --iterations {args.iterations}: choose another --out")
    if done == args.iterations or args.eval_only:
        return done, seconds
    episodes, validation = make_episodes(args, "train"), make_episodes(args, "val") if args.val_every else None
    optimizer = torch.optim.Adam(params.values(), lr=args.lr)
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if checkpoint and log.exists() else []
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    atomic_write(log, "".join(line for line in lines if json.loads(line)["iteration"] <= done))
    groups = {name: [k for k in params if k.startswith(f"{name}.")] for name in ("encoder", "generator")}
    groups = {"base": list(base(params))} | {name: keys for name, keys in groups.items() if keys}
    start, begun, vectorise = done, time.perf_counter() - seconds, args.device != "cpu"
    deadline = time.perf_counter() + (args.stop_after or math.inf)
    with tqdm(total=args.iterations, initial=done, desc=title(args), disable=None) as bar:
        while done < args.iterations and not stop:
            optimizer.zero_grad()
            window.append(torch.stack(meta_gradient(params, episodes.tasks(done * T, T), args, vectorise)))
            optimizer.step()
            done += 1
            bar.update()
            if done - start == 20:
                left = (time.perf_counter() - begun - seconds) / 20 * (args.iterations - done)
                hint = "; for a first look try --quick" if left > 7200 else ""
                bar.write(f"about {duration(left)} to the end{hint}", file=sys.stderr)
            if time.perf_counter() > deadline:
                stop.append("--stop-after")
            if done % args.log_every == 0 or done == args.iterations:
                losses, hits = torch.stack(window).unbind(1)                    # (iterations since the last line, T)
                turns = (done - len(window)) * T + torch.arange(hits.numel()).view(hits.shape)
                if not losses.isfinite().all():
                    fail(f"the loss is not finite near iteration {done}: lower --lr or --inner-lr; "
                         f"{out / 'checkpoint.pt'} keeps the last good state")
                line = {"iteration": done, "loss": losses.mean().item(),
                        "accuracy": {mode: hits.cpu()[turns % M == m].mean().item() for m, mode in enumerate(args.modes)},
                        "gradient_norm": {name: torch.stack([params[k].grad.norm() for k in keys]).norm().item()
                                          for name, keys in groups.items()},
                        "seconds": time.perf_counter() - begun, "synthetic": args.synthetic}
                if args.val_every and done // args.val_every > (done - len(window)) // args.val_every:
                    clock = time.perf_counter()
                    measured = evaluate(params, validation, args.val_tasks, args)
                    line["validation"] = {name: summary(rows, args.modes)
                                          for name, rows in zip(("paper", "inductive"), measured)}
                    begun += time.perf_counter() - clock                        # seconds are seconds of training
                window = []
                with open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")
                shown = {mode: f"{value:.1f}" for mode, value in line["accuracy"].items()}
                bar.set_postfix({"loss": f"{line['loss']:.3f}"} | shown)
                if bar.disable:
                    print(f"{title(args)} {done}/{args.iterations} loss {line['loss']:.3f} " +
                          " ".join(f"{mode} {value}" for mode, value in shown.items()), flush=True)
            if args.keep_every and done % args.keep_every == 0:
                save(out / f"params-{done}.pt", {k: w.detach().cpu() for k, w in params.items()})
            if done % args.save_every == 0 or done == args.iterations or stop:
                save(out / "checkpoint.pt", {
                    "identity": identity(args), "iteration": done, "seconds": time.perf_counter() - begun,
                    "window": window, "params": {k: w.detach().cpu() for k, w in params.items()},
                    "optimizer": optimizer.state_dict()})
    return done, time.perf_counter() - begun


def make_episodes(args, split):
    seed = args.seed if split == "train" else None
    return Episodes(args.modes, split, args.ways, args.shots, args.queries, args.image_size, seed, args.device,
                    args.data_root, args.cache_dir, args.synthetic)


def title(args):
    return f"{METHODS[args.modulation]} {'SYNTHETIC ' * args.synthetic}{'+'.join(args.modes)}"


def report(result, args):
    """Print a result: what was measured, under which protocol, with its interval, beside the paper's number."""
    paper = PAPER.get(" ".join(sorted(args.modes)), {}).get(result["method"])
    note = f"{paper[args.shots == 5]:.2f}" if paper and args.ways == 5 and args.shots in (1, 5) and not args.synthetic else ""
    print(f"\n{title(args)}: {args.ways}-way {args.shots}-shot, {args.image_size} px, {result['iterations']} iterations, "
          f"{result['seconds_per_iteration']:.3f} s each, {result['test_tasks']} test tasks, accuracy in %")
    print(f"{'':16}{'paper protocol':>16}{'inductive':>16}{'in the paper' if note else '':>16}")
    for name, row in result["accuracy"].items():
        cells = [f"{r['mean']:.2f} +-{r['ci95']:.2f}" for r in (row, result["accuracy_inductive"][name])]
        print(f"{name:16}{cells[0]:>16}{cells[1]:>16}{note if name == 'overall' else '':>16}")


def main():
    args = get_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        fail("--device cuda, but PyTorch sees no GPU: use --device cpu, or install PyTorch with CUDA")
    stop, out = [], Path(args.out)
    for name in (signal.SIGINT, signal.SIGTERM):        # the first asks for a clean end, a second one ends at once
        signal.signal(name, lambda number, frame: (stop.append(signal.Signals(number).name), signal.signal(number, signal.SIG_DFL)))
    test = make_episodes(args, "test")
    args.modes = test.modes
    if args.overwrite:
        for file in ("checkpoint.pt", "log.jsonl", "result.json"):
            (out / file).unlink(missing_ok=True)
    checkpoint = load(out / "checkpoint.pt", args)
    if args.eval_only and not checkpoint:
        fail(f"--eval-only, but {out} holds no checkpoint.pt: train first, or name the run with --out")
    params = checkpoint["params"] if checkpoint else init_params(args)
    params = {k: w.to(args.device).requires_grad_() for k, w in params.items()}
    done, seconds = train(params, args, checkpoint, stop)
    if stop and done < args.iterations:
        print(f"stopped by {stop[0]} at iteration {done} of {args.iterations}; the same command continues")
        return
    stop.clear()
    result, tasks = json.loads((out / "result.json").read_text()) if (out / "result.json").exists() else {}, test.sha256(args.test_tasks)
    if (result.get("iterations"), result.get("tasks_sha256")) != (done, tasks):
        per_task, per_task_inductive = evaluate(params, test, args.test_tasks, args, stop).round(4)
        sizes = {name: sum(w.numel() for k, w in params.items() if k.startswith(f"{name}.")) for name in ("encoder", "generator")}
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        result = {
            "method": METHODS[args.modulation], "modes": args.modes, "ways": args.ways, "shots": args.shots,
            "synthetic": args.synthetic, "protocol": "accuracy: BatchNorm statistics of the batch at hand, query images "
            "together (paper); accuracy_inductive: of the adapted network on the support set",
            "test_tasks": args.test_tasks, "tasks_sha256": tasks, "accuracy": summary(per_task, args.modes),
            "accuracy_inductive": summary(per_task_inductive, args.modes), "iterations": done,
            "seconds_train": round(seconds, 1), "seconds_per_iteration": round(seconds / max(done, 1), 4),
            "parameters": {"base": sum(w.numel() for w in base(params).values())} | sizes, "args": vars(args),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "commit": git.stdout.strip(),
                         "device": torch.cuda.get_device_name() if args.device != "cpu" else
                         f"{platform.machine()} CPU, {torch.get_num_threads()} threads"},
            "per_task": per_task.tolist(), "per_task_inductive": per_task_inductive.tolist(),
            "per_task_mode": [j % len(args.modes) for j in range(args.test_tasks)]}
        atomic_write(out / "result.json", json.dumps(result))
    report(result, args)


if __name__ == "__main__":
    main()
