"""Transference: does a training step on one task help or harm another? KML's analysis of episodic training.

Paper: Abdollahzadeh and others: Revisit Multimodal Meta-Learning through the Lens of Multi-Task Learning, NeurIPS
2021, Section 4 and 6: Algorithm 1, Equation 1 and 2, Figure 1, 2 and 5.

The idea. In episodic training each task i makes a gradient step on the shared parameters. Take one such step alone,
and look at another task j, of classes that are never trained on: its loss after the step, over its loss before, is the
loss ratio LR(i -> j). Below 1, task i has taught the network something that j can use (positive transfer); above 1, the
opposite (negative). Many source tasks i give a histogram.

    paper        here                        what
    theta^t      State.params                all meta-parameters at iteration t of a training run
    T_i, T_j     sources, targets            tasks of the source mode's training classes, the target mode's test classes
    alpha        alpha                       size of the one SGD step; the paper does not give it (see --alpha)
    Eq. 1        sgd_step                    theta_i^(t+1) = theta^t - alpha * gradient of task i's query loss
    Eq. 2        measure                     LR(i -> j) = loss of j after the step on i / loss of j before
    i = j        self-transference           what a step on the target itself would do: the most to hope for

*Neutral* is what changes the target's accuracy by less than 0.05 points, says the paper; which loss change that is, it does
not say. Here |LR - 1| < 0.05 / |s|, where s is the slope of the accuracy change (in points) on LR - 1, least squares over all
pairs, each target about its own mean. Accuracy moves in steps of whole images, so s is uncertain, and with it what counts as
neutral: intervals are from resampled sources and targets with s found anew each time. Where s is not certainly negative (a
lower loss, a higher accuracy), there is no neutral zone to be had, and only the share with LR < 1 is given.

What compares two networks, and what does not. alpha is chosen for each state alike, so that a step on a target itself takes
its loss to 0.95 in the median (on validation tasks; --self-transference, as not every network's loss can be taken there by
one step); --sweep shows how the shares depend on it. The step that is made is a source's, though: alpha times *its* gradient,
and that is short where a network fits its training tasks well, which looks like neutral transfer. So what the steps are is
printed too: LR(i -> i) of the source tasks, and, free of any step size, the share of pairs whose gradients agree, to which LR
< 1 comes down when alpha goes to 0. And intervals are over tasks, of one trained network each: they say nothing of other
training runs of the same method, nor of alpha.

This is a measurement on the networks of mprotonet.py, so it imports that script, as no training script does.
Run:  python mprotonet.py --synthetic --quick --modes miniimagenet fc100 --keep-every 110 --out runs/example
      python transference.py --checkpoint runs/example --source-tasks 60 --target-tasks 10 --out runs/example
"""

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import mprotonet
from data import Episodes, Task, atomic_write, canonical_mode, cores, fail, in_threads, read_tensors

NEUTRAL = 0.05  # points of accuracy
SWEEP = (0.25, 0.5, 2.0, 4.0)  # times alpha
ALONG_SOURCES = 60
COMPARED = ("positive", "negative", "below_one", "mean")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        metavar="RUN",
        help="folders of mprotonet.py runs, or files that --export wrote; several are overlaid",
    )
    p.add_argument(
        "--at",
        nargs="+",
        default=["half", "final"],
        metavar="T",
        help="which states: half (of the iterations, the "
        "paper's middle of training), final, or a kept iteration (mprotonet.py --keep-every)",
    )
    p.add_argument(
        "--source",
        default="miniimagenet",
        help="mode whose training classes make the source tasks (paper: this)",
    )
    p.add_argument(
        "--target", default="fc100", help="mode whose test classes make the target tasks (paper: this)"
    )
    p.add_argument("--source-tasks", type=int, default=300, help="paper: 300")
    p.add_argument("--target-tasks", type=int, default=20, help="paper: 1 in each figure")
    p.add_argument(
        "--update",
        default="all",
        choices=("all", "base"),
        help="what the step changes: all meta-parameters, or the base network alone",
    )
    p.add_argument("--alpha", default="auto", help="step size; auto: see --self-transference")
    p.add_argument(
        "--self-transference",
        type=float,
        default=0.95,
        help="with --alpha auto: the median LR(j -> j) of validation targets",
    )
    p.add_argument(
        "--sweep", action="store_true", help=f"the shares at {', '.join(map(str, SWEEP))} times alpha too"
    )
    p.add_argument(
        "--matrix", nargs="*", metavar="MODE", help="also every mode to every mode (the run's, or these)"
    )
    p.add_argument(
        "--along",
        action="store_true",
        help="also chosen source tasks along all kept states of training (Fig. 2)",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=1000,
        help="of the source tasks: not a run's, whose tasks it has trained on",
    )
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="decoded images")
    p.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--out", default="results/transference", help="folder of transference.json and the figures"
    )
    p.add_argument(
        "--export", metavar="FOLDER", help="only write the states there, in half precision, each as one file"
    )
    args = p.parse_args(argv)
    for name in ("source_tasks", "target_tasks"):
        if getattr(args, name) < 2:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number from 2 on")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if args.device not in devices:
        fail(f"--device {args.device}: not there; choose from {' '.join(devices)}")
    if not 0 < args.self_transference < 1:
        fail(f"--self-transference {args.self_transference}: give a number between 0 and 1")
    if args.alpha != "auto":
        try:
            args.alpha = float(args.alpha)
        except ValueError:
            fail(f"--alpha {args.alpha}: give a number, or auto")
        if not 0 <= args.alpha < math.inf:
            fail(f"--alpha {args.alpha}: give a number from 0 on")
    return args


class State(NamedTuple):
    """Meta-parameters at one moment of a training run."""

    method: str
    iteration: int
    of: int  # iterations of the run, as far as it has come
    options: argparse.Namespace
    params: dict
    folder: Path

    @property
    def label(self):
        """Method, with the flags and the seed in which the run differs from the usual."""
        usual = {
            "no_residual": False,
            "embed": "support",
            "transductive": False,
            "generator": "outer",
            "init_scale": 1.0,
            "lr": 1e-3,
            "seed": 0,
        }
        other = [
            f"{k}={getattr(self.options, k)}" for k, v in usual.items() if getattr(self.options, k, v) != v
        ]
        return " ".join([self.method, *other])

    @property
    def name(self):
        return f"{self.label}, {self.iteration:,} iterations"


def load(place):
    """A run's folder, or an exported file -> {iteration: path of its parameters}, and what the checkpoint says."""
    path = Path(place)
    file = path / "checkpoint.pt" if path.is_dir() else path
    try:
        checkpoint = read_tensors(file)
        identity, done, params = checkpoint["identity"], checkpoint["iteration"], checkpoint["params"]
    except FileNotFoundError:
        fail(f"there is no {file}: train it with mprotonet.py, or name an exported file")
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(f"{file} is no checkpoint ({type(error).__name__}): name the folder of an mprotonet.py run")
    if identity["method"] not in mprotonet.METHODS.values():
        fail(f"{place} is a run of {identity['method']}: transference is measured on runs of mprotonet.py")
    kept = (
        {int(re.search(r"\d+", p.name).group()): p for p in path.glob("params-*.pt")} if path.is_dir() else {}
    )
    return identity, done, checkpoint.get("of", done), params, kept


def states(place, at, device):
    """The states of one run that are asked for by `at` -> list of State."""
    identity, done, of, final, kept = load(place)
    found = []
    for moment in at:
        wanted = {"half": of // 2, "final": of}.get(moment) or (int(moment) if moment.isdigit() else None)
        if wanted is None:
            fail(f"--at {moment}: give half, final or a number of iterations")
        if wanted == done:
            params = final
        elif Path(place).is_file():
            continue  # an exported file is one moment
        elif wanted in kept:
            try:
                params = read_tensors(kept[wanted])
            except Exception as error:  # noqa: BLE001
                fail(f"{kept[wanted]} is damaged ({type(error).__name__}): delete it, or give another --at")
        else:
            fail(
                f"{place} has no params-{wanted}.pt (kept: {sorted(kept) or 'none'}): train with --keep-every "
                f"{math.gcd(wanted, of)}, or give --at final"
            )
        params = {k: w.to(device, torch.float32) for k, w in params.items()}
        options = argparse.Namespace(
            **{"distance_scale": 1.0} | identity, device=device
        )  # older runs do not name it
        found.append(State(identity["method"], wanted, of, options, params, Path(place)))
    return found


def export(state, folder):
    """Write one state in half precision, as a file that --checkpoint takes; --at half and final find it again."""
    identity = {k: v for k, v in vars(state.options).items() if k != "device"}
    modes, name = "+".join(identity["modes"]), f"{state.label.replace(' ', '-')}-{identity['shots']}shot"
    path = (
        Path(folder)
        / f"{modes}-{name}-{identity['image_size']}px-seed{identity['seed']}-{state.iteration}.pt".lower()
    )
    atomic_write(
        path,
        {
            "identity": identity,
            "iteration": state.iteration,
            "of": state.of,
            "params": {k: w.half().cpu() for k, w in state.params.items()},
        },
    )
    print(f"written: {path}")


# -------------------------------------------------------------------------------------------------- Algorithm 1
def tasks_of(args, options, mode, split, count):
    """Tasks of one mode -> (episodes, Task with a leading dimension `count`)."""
    episodes = Episodes(
        [mode],
        split,
        options.ways,
        options.shots,
        options.queries,
        options.image_size,
        args.seed if split == "train" else None,
        args.device,
        args.data_root,
        args.cache_dir,
        options.synthetic,
    )
    return episodes, episodes.tasks(0, count)


def gradient(params, task, options, update):
    """Of the task's query loss -> dict over what `update` names: all parameters, or the base network's."""
    moving = params if update == "all" else mprotonet.group(params, "base")
    return torch.func.grad(lambda moved: mprotonet.task_loss(params | moved, task, options)[0])(moving)


def sgd_step(params, gradients, alpha):
    """Equation 1 -> parameters after one step."""
    return params | {k: params[k] - alpha * g for k, g in gradients.items()}


def judge(params, targets, options):
    """Losses (J,) and accuracies in % (J,) of the target tasks, a list."""
    losses, accuracies = [], []
    for task in targets:
        loss, logits, *_ = mprotonet.task_loss(params, task, options)
        losses.append(loss)
        accuracies.append(100 * (logits.argmax(-1) == task.query_y).to(loss.dtype).mean())
    return torch.stack(losses), torch.stack(accuracies)


def single(batch):
    return [Task(*(x[i] for x in batch)) for i in range(len(batch.mode))]


def over_tasks(function, batch, device, what):
    """function(task) for every task of the batch, stacked: under vmap, 20 tasks at a time, on a GPU; in threads on a CPU."""
    if device != "cpu":
        return torch.func.vmap(function, chunk_size=20)(batch)

    def one(task):
        with torch.no_grad():  # each thread has a switch of its own
            return function(task)

    rows = list(
        tqdm(
            in_threads(one, single(batch), cores()),
            total=len(batch.mode),
            desc=what,
            disable=None,
            leave=False,
        )
    )
    return tuple(torch.stack(column) for column in zip(*rows))


def measure(state, sources, targets, alpha, update):
    """Algorithm 1, all sources to all targets -> LR (I, J), change of accuracy in points (I, J). Steps are undone."""
    params, options, targets = state.params, state.options, single(targets)
    loss, accuracy = judge(params, targets, options)  # 3, 4: the targets before

    def one(source):
        gradients = gradient(params, source, options, update)  # 6, 7: the source task's loss
        after, accurate = judge(
            sgd_step(params, gradients, alpha), targets, options
        )  # 8, 9: a step; the targets after
        return after / loss, accurate - accuracy  # 10: Equation 2

    with torch.no_grad():
        ratios, gains = over_tasks(one, sources, options.device, f"{state.method}: source tasks")
    return ratios.double().cpu().numpy(), gains.double().cpu().numpy()


def what_steps_are(state, sources, targets, alpha, update):
    """-> cosines between the gradients of sources and targets (I, J); LR(i -> i) of the sources (I,); the base network's share of
    their squared gradients, in % (I,)."""
    params, options = state.params, state.options

    def flat(gradients):
        return torch.cat([g.reshape(-1) for g in gradients.values()])

    towards = torch.stack([flat(gradient(params, task, options, update)) for task in single(targets)])
    towards = towards / towards.norm(dim=1, keepdim=True)

    def one(source):
        gradients = gradient(params, source, options, update)
        before, after = (
            judge(p, [source], options)[0][0] for p in (params, sgd_step(params, gradients, alpha))
        )
        whole, base = flat(gradients), flat(mprotonet.group(gradients, "base"))
        return (
            towards @ whole / whole.norm(),
            after / before,
            100 * base.square().sum() / whole.square().sum(),
        )

    with torch.no_grad():
        return tuple(x.double().cpu().numpy() for x in over_tasks(one, sources, options.device, "gradients"))


def self_transference(state, batch, alphas, update):
    """LR(j -> j) of every task j of the batch at every step size -> (J, len(alphas))."""

    def one(task):
        gradients = gradient(state.params, task, state.options, update)
        before = judge(state.params, [task], state.options)[0]
        return (
            torch.cat(
                [
                    judge(sgd_step(state.params, gradients, alpha), [task], state.options)[0]
                    for alpha in alphas
                ]
            )
            / before,
        )

    with torch.no_grad():
        return over_tasks(one, batch, state.options.device, "self-transference")[0].double().cpu().numpy()


def choose_alpha(state, batch, update, level):
    """The smallest step size at which the median self-transference of the batch is `level`, to 5 %. (Larger steps overshoot: the loss
    of a target falls and rises again.) Searched upwards in powers of two, from an eighth of where a loss that fell in a straight
    line would be there, and twice more finely."""

    def straight(task):
        gradients = gradient(state.params, task, state.options, update)
        loss, squares = (
            judge(state.params, [task], state.options)[0],
            sum(g.square().sum() for g in gradients.values()),
        )
        return ((1 - level) * loss[0] / squares,)

    with torch.no_grad():
        first = float(over_tasks(straight, batch, state.options.device, "step size")[0].median())
    if not 0 < first < math.inf:
        fail(f"{state.name}: no gradient moves the loss (step size {first}): give --alpha")
    first, medians = 2.0 ** math.floor(math.log2(first / 8)), {}

    def smallest(alphas):
        """Of ascending step sizes the first that is enough, or None."""
        found = np.nan_to_num(np.median(self_transference(state, batch, alphas, update), 0), nan=np.inf)
        medians.update(zip(alphas, found))
        return next((alpha for alpha, median in zip(alphas, found) if median <= level), None)

    best = smallest([first * 2**k for k in range(6)]) or smallest([first * 2**k for k in range(6, 14)])
    if best is None:
        least = min(medians, key=medians.get)
        fail(
            f"{state.name}: the best step takes a target's own loss to {medians[least]:.4f}, none to {level}: give "
            f"--self-transference, as {(1 + medians[least]) / 2:.2f}, for all states alike"
        )
    for k in (4, 16):
        best = smallest([best * 2 ** (-i / k) for i in (3, 2, 1, 0)]) or best
    return float(best)


# --------------------------------------------------------------------------------------------------- statistics
def neutral_band(ratios, gains):
    """Half width b of the neutral zone |LR - 1| < b, and the slope of gain (points) on LR - 1 that it follows from, for
    arrays (I, J), each target (column) about its own mean. Where no gain goes with the loss: inf, 0."""
    x, y = ratios - ratios.mean(0), gains - gains.mean(0)
    spread = (x**2).sum()
    slope = float((x * y).sum() / spread) if spread > 0 else 0.0
    return (NEUTRAL / abs(slope) if slope else math.inf), slope


def shares(ratios, band):
    """Of positive, negative and neutral transfer, in % of the sources -> (3, J) for ratios (I, J)."""
    positive, negative = ratios <= 1 - band, ratios >= 1 + band
    return 100 * np.stack([positive.mean(0), negative.mean(0), (~positive & ~negative).mean(0)])


def statistics(ratios, gains):
    """LR (I, J) and gains (I, J) -> {name: number}."""
    band, slope = neutral_band(ratios, gains)
    positive, negative, neutral = shares(ratios, band).mean(1)
    return {
        "positive": positive,
        "negative": negative,
        "neutral": neutral,
        "slope": slope,
        "band": band,
        "below_one": 100 * (ratios < 1).mean(),
        "mean": ratios.mean(),
        "median": np.median(ratios),
    }


def describe(ratios, gains, draws=1000):
    """LR (I, J) and gains (I, J) -> {name: [number, ends of its 95 % interval]}, from resampled sources and targets; the
    three shares and the band are None where the sign of the slope is not certain. And the shares of each target."""
    if not np.isfinite(ratios).all():
        fail(
            "a loss ratio is not finite: a target's loss is 0, or the step is too large; give a smaller --alpha"
        )
    rng, (I, J) = np.random.default_rng(0), ratios.shape
    found, samples = statistics(ratios, gains), []
    for _ in range(draws):
        at = np.ix_(rng.integers(0, I, I), rng.integers(0, J, J))
        samples.append(list(statistics(ratios[at], gains[at]).values()))
    ends = np.percentile(np.nan_to_num(samples, posinf=1e9), (2.5, 97.5), axis=0).T
    numbers = {name: [float(x), *map(float, end)] for (name, x), end in zip(found.items(), ends)}
    per_target = shares(ratios, found["band"]).round(2).tolist()
    if not numbers["slope"][2] < 0:
        numbers |= dict.fromkeys(("positive", "negative", "neutral", "band"))
        per_target = None
    return numbers | {"per_target": per_target}


def agreement(cosines, draws=1000):
    """Cosines (I, J) -> [share of positive ones in %, ends of its 95 % interval], from resampled sources and targets."""
    rng, (I, J) = np.random.default_rng(0), cosines.shape
    samples = [
        (cosines[np.ix_(rng.integers(0, I, I), rng.integers(0, J, J))] > 0).mean() for _ in range(draws)
    ]
    return [100 * float(x) for x in ((cosines > 0).mean(), *np.percentile(samples, (2.5, 97.5)))]


def compare(one, two, draws=1000):
    """Rows of two states, measured on the same sources and targets -> {name: [number of one minus that of two, ends of its 95 %
    interval]}: both are resampled alike. Shares are None where one of the two has none (see `describe`). A row is
    (LR (I, J), gains (I, J), what `describe` says of them)."""
    pairs = [row[:2] for row in (one, two)]
    rng, (I, J) = np.random.default_rng(0), pairs[0][0].shape

    def difference(at):
        first, second = (statistics(ratios[at], gains[at]) for ratios, gains in pairs)
        return [first[name] - second[name] for name in COMPARED]

    found, samples = difference(np.ix_(range(I), range(J))), []
    for _ in range(draws):
        samples.append(difference(np.ix_(rng.integers(0, I, I), rng.integers(0, J, J))))
    ends = np.percentile(samples, (2.5, 97.5), axis=0).T
    return {
        name: [float(x), *map(float, end)] if one[2][name] and two[2][name] else None
        for name, x, end in zip(COMPARED, found, ends)
    }


def cell(numbers, digits=1, sign=""):
    return "{:{s}.{d}f} ({:{s}.{d}f} to {:{s}.{d}f})".format(*numbers, d=digits, s=sign) if numbers else "-"


SHARES = ("positive", "negative", "neutral", "below_one")
HEAD = (
    "| state | alpha | positive, % | negative, % | neutral, % | LR < 1, % | mean LR | median LR | self-transference |",
    "|" + " --- |" * 9,
)


def shares_row(row):
    """Of the table of a state's shares, as `main` makes `row` -> a line of Markdown."""
    numbers = [cell(row["all"][k]) for k in SHARES] + [
        cell(row["all"]["mean"], 4),
        f"{row['all']['median'][0]:.4f}",
    ]
    return f"| {row['state']} | {row['alpha']:.3g} | {' | '.join(numbers)} | {row['self']['median']:.4f} |"


def other_tables(found, few):
    """What the steps are and --sweep (of `few` source tasks), differences between states, --matrix -> list of Markdown, what there is."""
    tables = []
    lines = [
        "| {} | {} | {:.3f} | {:.4f} | {:.1f} |".format(
            row["state"], cell(row["steps"]["agree"]), *(row["steps"][k] for k in ("cosine", "own", "base"))
        )
        for row in found
    ]
    head = (
        "| state | gradients that agree, % | median cosine | median LR of a source task to itself | base network's share of the squared "
        "gradient, % |"
    )
    tables.append([f"What the steps are, of {few} source tasks", "", head, "|" + " --- |" * 5, *lines])
    lines = [
        f"| {row['state']} - {other} | {' | '.join(cell(numbers[k], 4 if k == 'mean' else 1, '+') for k in COMPARED)} |"
        for row in found
        for other, numbers in row.get("minus", {}).items()
    ]
    if lines:
        tables.append(
            [
                "Differences, on the same source and target tasks",
                "",
                "| states | positive, % | negative, % | LR < 1, % | mean LR |",
                "|" + " --- |" * 5,
                *lines,
            ]
        )
    lines = [
        f"| {row['state']} | {factor} | {' | '.join(cell(numbers[k]) for k in SHARES)} |"
        for row in found
        for factor, numbers in row.get("sweep", {}).items()
    ]
    if lines:
        tables.append(
            [
                f"The same at other step sizes, {few} source tasks",
                "",
                "| state | times alpha | positive, % | negative, % | neutral, % | LR < 1, % |",
                "|" + " --- |" * 6,
                *lines,
            ]
        )
    for row in found:
        if "matrix" in row:
            modes = list(row["matrix"]["cells"])
            tables.append(
                [
                    f"{row['state']}, alpha {row['matrix']['alpha']:.3g}: share of LR < 1 in %; median LR",
                    "",
                    f"| from \\ to | {' | '.join(modes)} |",
                    "|" + " --- |" * (len(modes) + 1),
                ]
            )
            for source, to in row["matrix"]["cells"].items():
                tables[-1].append(
                    f"| {source} | {' | '.join(cell(x['below_one']) + '; ' + cell(x['median'], 4) for x in to.values())} |"
                )
    return ["\n".join(lines) for lines in tables]


# ------------------------------------------------------------------------------------------------------ figures
def names(episodes, number):
    """Of the classes of a task."""
    return ", ".join(episodes.class_names[0][c] for c in episodes.indices(0, number, 1)[0][0])


def histogram(found, file, about):
    from matplotlib import pyplot as plt

    moments = list(dict.fromkeys(row["moment"] for row in found))
    figure, axes = plt.subplots(
        1, len(moments), figsize=(7 * len(moments), 4.2), squeeze=False, layout="constrained"
    )
    for moment, axis in zip(moments, axes[0]):
        rows = [row for row in found if row["moment"] == moment]
        low, high = np.percentile(np.concatenate([np.ravel(row["LR"]) for row in rows]), (0.5, 99.5))
        bins = np.linspace(min(low, 0.999), max(high, 1.001), 61)
        for row in rows:
            parts = [
                f"{name} {row['all'][k][0]:.0f} %"
                for name, k in (("P", "positive"), ("N", "negative"), ("Nu", "neutral"))
                if row["all"][k]
            ] or [f"LR < 1: {row['all']['below_one'][0]:.0f} %"]
            axis.hist(
                np.clip(np.ravel(row["LR"]), bins[0], bins[-1]),
                bins,
                alpha=0.45,
                density=True,
                label=f"{row['state']}: {', '.join(parts)}",
            )
        axis.axvline(1, color="black", linewidth=1)
        axis.set(
            xlabel="loss ratio LR: below 1 the source task helped (tails in the outermost bars)",
            ylabel="density of (source, target) pairs",
            title=moment,
        )
        axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.suptitle(textwrap.fill(about, 70 * len(moments)), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def panels(rows, file):
    """Pictures of tasks, [(title, Task), ...] -> the support images of each."""
    from matplotlib import pyplot as plt

    task = rows[0][1]
    ways, size = len(task.support_y.unique()), task.support_x.shape[-1]
    shots = len(task.support_x) // ways
    figure, axes = plt.subplots(
        len(rows),
        1,
        figsize=(10, (10 * shots / ways * 0.9 + 0.4) * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, task) in zip(axes[:, 0], rows):  # a column a class, its K images below each other
        tiles = torch.ones(shots, ways, 3, size + 2, size + 2)
        tiles[..., 1:-1, 1:-1] = task.support_x.cpu().view(ways, shots, 3, size, size).transpose(0, 1)
        axis.imshow(tiles.permute(0, 3, 1, 4, 2).reshape(shots * (size + 2), ways * (size + 2), 3).numpy())
        axis.set_title(title, fontsize="small")
        axis.axis("off")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def curves(along, file, about):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(along), figsize=(6 * len(along), 4), squeeze=False, layout="constrained", sharey=True
    )
    for axis, (name, rows) in zip(axes[0], along.items()):
        t, LR = [row["iteration"] for row in rows], np.array([row["LR"] for row in rows])
        axis.fill_between(
            t, *np.percentile(LR, (10, 90), axis=1), alpha=0.25, label="80 % of the source tasks"
        )
        axis.plot(t, np.median(LR, 1), label="their median", linewidth=1)
        for which, style in (("best", "--"), ("worst", ":")):
            axis.plot(
                t,
                LR[:, rows[0][which]],
                style,
                label=f"the source task that is {which} at half",
                linewidth=1.5,
            )
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xlabel="training iterations", ylabel="LR to one target task", title=name)
        axis.legend(fontsize="x-small")
    figure.suptitle(textwrap.fill(about, 60 * len(along)), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------- main
def main():
    args = get_args()
    found, measured, out, figures = [], [], Path(args.out), importlib.util.find_spec("matplotlib") is not None
    runs = [
        (moment, state)
        for moment in args.at
        for place in args.checkpoint
        for state in states(place, [moment], args.device)
    ]
    if not runs:
        fail(f"none of {' '.join(args.checkpoint)} has a state at {' '.join(args.at)}")
    if args.export:
        for _, state in runs:
            export(state, args.export)
        return
    if (
        len({(s.options.synthetic, s.options.ways, s.options.shots, s.options.image_size) for _, s in runs})
        > 1
    ):
        fail("the runs differ in ways, shots, image size or --synthetic: their tasks are not the same")
    places = {}
    for _, state in runs:
        other = places.setdefault((state.label, state.iteration), state)
        if other.folder != state.folder:
            differ = [
                k for k in vars(other.options) if getattr(state.options, k, None) != getattr(other.options, k)
            ]
            fail(
                f"{other.folder} and {state.folder} are both called {state.label} (they differ in {' '.join(differ) or 'nothing'}): "
                "measure them apart"
            )
        if state.folder.is_dir() and not (state.folder / "result.json").exists():
            print(
                f"note: {state.folder} is not finished; half and final are of the {state.of:,} iterations that there are",
                file=sys.stderr,
            )
    args.source, args.target = (canonical_mode(mode, args.data_root) for mode in (args.source, args.target))
    if not figures:
        print("note: matplotlib is not installed, so there are no figures", file=sys.stderr)
    options = runs[0][1].options
    about = (
        f"{'SYNTHETIC ' * options.synthetic}{args.source} (training classes) to {args.target} (test classes), {options.ways}-way "
        f"{options.shots}-shot, {options.image_size} px, {args.source_tasks} source and {args.target_tasks} target tasks"
    )
    source_episodes, sources = tasks_of(args, options, args.source, "train", args.source_tasks)
    target_episodes, targets = tasks_of(args, options, args.target, "test", args.target_tasks)
    _, validation = tasks_of(args, options, args.target, "val", args.target_tasks)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out}: {error.strerror}; give another folder")
    print(f"transference, {about}, step on {args.update} parameters\n")
    print("\n".join(HEAD))
    for moment, state in runs:
        alpha = (
            args.alpha
            if args.alpha != "auto"
            else choose_alpha(state, validation, args.update, args.self_transference)
        )
        ratios, gains = measure(state, sources, targets, alpha, args.update)
        own = self_transference(state, targets, [alpha], args.update)[:, 0]
        row = {
            "state": state.name,
            "moment": moment,
            "alpha": alpha,
            "all": describe(ratios, gains),
            "self": {"median": float(np.median(own)), "LR": own.round(6).tolist()},
            "LR": ratios.round(6).tolist(),
            "gain": gains.round(4).tolist(),
        }
        print(shares_row(row), flush=True)
        few = Task(*(x[:ALONG_SOURCES] for x in sources))
        cosines, to_itself, base = what_steps_are(state, few, targets, alpha, args.update)
        row["steps"] = {
            "agree": agreement(cosines),
            "cosine": float(np.median(cosines)),
            "own": float(np.median(to_itself)),
            "base": float(np.median(base)),
        }
        found.append(row)
        measured.append((ratios, gains))
        save(args, options, about, found, {})  # what is measured is kept, whatever comes
        if args.sweep:
            row["sweep"] = {
                str(factor): describe(*measure(state, few, targets, factor * alpha, args.update))
                for factor in SWEEP
            }
        if args.matrix is not None:
            row["matrix"] = matrix(args, state)
    for i, j in (
        (i, j)
        for j, two in enumerate(found)
        for i, one in enumerate(found)
        if i > j and one["moment"] == two["moment"]
    ):
        one, two = found[i], found[j]
        one.setdefault("minus", {})[two["state"]] = compare(
            (*measured[i], one["all"]), (*measured[j], two["all"])
        )
    print("\n" + "\n\n".join(other_tables(found, min(ALONG_SOURCES, args.source_tasks))))
    along = trajectories(args, runs, sources, targets) if args.along else {}
    save(args, options, about, found, along)
    if figures:
        import matplotlib

        matplotlib.use("Agg")
        histogram(found, out / "transference-histogram.png", about)
        for row in found[:1]:
            LR = np.array(row["LR"])
            best, worst = (int(x) for x in (LR[:, 0].argmin(), LR[:, 0].argmax()))
            panels(
                [
                    (f"target task 0: {args.target}, {names(target_episodes, 0)}", single(targets)[0]),
                    (
                        f"source task {best}, the best, LR {LR[best, 0]:.4f}: {names(source_episodes, best)}",
                        single(sources)[best],
                    ),
                    (
                        f"source task {worst}, the worst, LR {LR[worst, 0]:.4f}: {names(source_episodes, worst)}",
                        single(sources)[worst],
                    ),
                ],
                out / "transference-tasks.png",
            )
        if along:
            curves(
                along,
                out / "transference-training.png",
                about + "; each state with the step size chosen for it" * (args.alpha == "auto"),
            )
    print(f"\nwritten to {out}: transference.json{', figures' * figures}", file=sys.stderr)


def save(args, options, about, found, along):
    setting = {
        k: v for k, v in vars(args).items() if k not in ("data_root", "cache_dir", "out", "checkpoint")
    }
    git = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40 2>{os.devnull}'
    record = {
        "about": about,
        "setting": setting,
        "commit": os.popen(git).read().strip(),
        "synthetic": options.synthetic,
        "modes": options.modes,
        "shots": options.shots,
        "image_size": options.image_size,
        "found": found,
        "along": along,
    }
    atomic_write(Path(args.out) / "transference.json", json.dumps(record, allow_nan=False))


def matrix(args, state):
    """Every mode to every mode -> {"alpha", "cells": {source: {target: describe(...)}}}, with one step size: that at which the
    median self-transference is --self-transference over the validation tasks of all modes together."""
    modes = [canonical_mode(mode, args.data_root) for mode in args.matrix or state.options.modes]
    some = [
        tasks_of(args, state.options, mode, "val", max(2, args.target_tasks // len(modes)))[1]
        for mode in modes
    ]
    alpha = (
        args.alpha
        if args.alpha != "auto"
        else choose_alpha(state, Task(*map(torch.cat, zip(*some))), args.update, args.self_transference)
    )
    targets = {mode: tasks_of(args, state.options, mode, "test", args.target_tasks)[1] for mode in modes}
    cells = {}
    for source in modes:
        sources = tasks_of(args, state.options, source, "train", min(ALONG_SOURCES, args.source_tasks))[1]
        cells[source] = {
            target: describe(*measure(state, sources, batch, alpha, args.update))
            for target, batch in targets.items()
        }
    return {"alpha": alpha, "cells": cells}


def trajectories(args, runs, sources, targets):
    """Figure 2: LR of source tasks to the first target at every kept state -> {method: [{"iteration", "alpha", "LR"}, ...]}."""
    few, target, found = Task(*(x[:ALONG_SOURCES] for x in sources)), Task(*(x[:1] for x in targets)), {}
    _, validation = tasks_of(args, runs[0][1].options, args.target, "val", args.target_tasks)
    for place in dict.fromkeys(str(state.folder) for _, state in runs):
        _, done, of, _, kept = load(place)
        rows = []
        for state in states(place, [str(t) for t in sorted({*kept, done})], args.device):
            alpha = (
                args.alpha
                if args.alpha != "auto"
                else choose_alpha(state, validation, args.update, args.self_transference)
            )
            rows.append(
                {
                    "iteration": state.iteration,
                    "alpha": alpha,
                    "LR": measure(state, few, target, alpha, args.update)[0][:, 0].round(6).tolist(),
                }
            )
        half = min(rows, key=lambda row: abs(row["iteration"] - of / 2))
        for row in rows:
            row |= {"best": int(np.argmin(half["LR"])), "worst": int(np.argmax(half["LR"]))}
        found[state.label] = found.get(state.label, []) + rows  # exported files: a state each
    return found


if __name__ == "__main__":
    main()
