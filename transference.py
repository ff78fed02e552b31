"""Transference: does a training step on one task help or harm another? KML's analysis of episodic training.

Paper: Abdollahzadeh and others: Revisit Multimodal Meta-Learning through the Lens of Multi-Task Learning, NeurIPS
2021, Sections 4 and 6: Algorithm 1, Equations 1 and 2, Figures 1, 2 and 5.

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
    i = j        self-transference           what a step on the target itself would do: the paper's baseline

The paper calls a transfer *neutral* if it changes the target's accuracy by less than 0.05 points. It does not say which
change of the loss that is. Here it is |LR - 1| < 0.05 / |s|, where s is the slope of the accuracy change (in points)
against LR - 1, fitted by least squares over all pairs (i, j), after each target's mean is subtracted from both. Accuracy
moves in steps of whole images, so s is uncertain, and so is what counts as neutral. Intervals therefore come from resampled
sources and targets, with s fitted anew each time. Normally s < 0: accuracy rises as the loss falls. Where the interval of s
is not all below 0, there is no neutral zone, and of the shares only that with LR < 1 is given.

What can be compared between two networks? alpha is chosen for each state in the same way: so that a step on a validation
task takes the loss of this same task to 0.95 of what it was (median over tasks). (One step cannot take every network's loss
there: then give a --self-transference nearer to 1.) --sweep shows how the shares depend on alpha. But a source's step is
alpha times *its* gradient. Where a network fits its training tasks well, this gradient is short, and transfer looks neutral.
So a second table is printed, with LR(i -> i) of the source tasks, and the share of pairs whose gradients agree. This share
needs no alpha: the share with LR < 1 tends to it when alpha goes to 0. Intervals are over the tasks, for one trained
network. They say nothing about other training runs of the same method, or about other alphas.

This is a measurement on the networks of mprotonet.py, so it imports that script; no training script imports another.
Run:  python mprotonet.py --synthetic --quick --modes miniimagenet fc100 --keep-every 110 --out runs/example
      python transference.py --checkpoint runs/example --source-tasks 60 --target-tasks 10 --out runs/example
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import mprotonet
from data import (
    Episodes,
    Task,
    atomic_write,
    canonical_mode,
    cores,
    fail,
    flags_of_run,
    in_threads,
    new_parser,
    plots,
    read_tensors,
    resolve_device,
    user_path,
)

NEUTRAL = 0.05  # points of accuracy
SMALL = 1e-30  # a task whose loss is 0 has no gradient: its cosines are 0
SWEEP = (0.25, 0.5, 2.0, 4.0)  # times alpha
FEW_SOURCES = 60  # for all but the first table: steps, --sweep, --matrix, --along
COMPARED = ("positive", "negative", "below_one", "mean")
SHARES = ("positive", "negative", "neutral", "below_one")
USUAL = {  # flags of mprotonet.py that a label names only where they differ from this
    "no_residual": False,
    "embed": "support",
    "transductive": False,
    "generator": "outer",
    "init_scale": 1.0,
    "distance_scale": 1.0,
    "no_norm_affine": False,
    "repeat_tasks": False,
    "lr": 1e-3,
    "seed": 0,
}


# ------------------------------------------------------------------------------------------------ Algorithm 1


def gradient(params, task, options, update):
    """The query loss's gradient -> dict over what `update` names: all parameters, or the base network's."""
    moving = params if update == "all" else mprotonet.group(params, "base")

    def loss(moved):
        return mprotonet.task_loss(params | moved, task, options)[0]

    return torch.func.grad(loss)(moving)


def sgd_step(params, gradients, alpha):
    """Equation 1 -> parameters after one step."""
    return params | {k: params[k] - alpha * g for k, g in gradients.items()}


def losses_and_accuracies(params, targets, options):
    """Losses (J,) and accuracies in % (J,) of the target tasks, a list."""
    losses, accuracies = [], []
    for task in targets:
        loss, logits, *_ = mprotonet.task_loss(params, task, options)
        correct = logits.argmax(-1) == task.query_y
        losses.append(loss)
        accuracies.append(100 * correct.to(loss.dtype).mean())
    return torch.stack(losses), torch.stack(accuracies)


def loss_of(params, task, options):
    """The query loss () of one task."""
    losses, _ = losses_and_accuracies(params, [task], options)
    return losses[0]


def measure(state, sources, targets, alpha, update):
    """Algorithm 1, all sources to all targets -> LR (I, J), change of accuracy in points (I, J). All steps start from `state`."""
    params, options = state.params, state.options
    targets = single(targets)
    loss, accuracy = losses_and_accuracies(params, targets, options)  # 3, 4: the targets before

    def one(source):
        gradients = gradient(params, source, options, update)  # 6, 7: the source task's loss
        moved = sgd_step(params, gradients, alpha)  # 8: a step
        after, accurate = losses_and_accuracies(moved, targets, options)  # 9: the targets after
        return after / loss, accurate - accuracy  # 10: Equation 2

    ratios, gains = over_tasks(one, sources, options.device, f"{state.method}: source tasks")
    return ratios, gains


def what_steps_are(state, sources, targets, alpha, update):
    """What is behind the loss ratios: directions and lengths of the sources' gradients.

    Returns cosines between the gradients of sources and targets (I, J); LR(i -> i) of the sources (I,); the base
    network's share of their squared gradients, in % (I,).
    """
    params, options = state.params, state.options

    def flat(gradients):
        return torch.cat([g.reshape(-1) for g in gradients.values()])

    with torch.no_grad():
        of_targets = [flat(gradient(params, task, options, update)) for task in single(targets)]
    towards = torch.stack(of_targets)
    towards = towards / towards.norm(dim=1, keepdim=True).clamp(min=SMALL)

    def one(source):
        gradients = gradient(params, source, options, update)
        before = loss_of(params, source, options)
        after = loss_of(sgd_step(params, gradients, alpha), source, options)
        whole = flat(gradients)
        base = flat(mprotonet.group(gradients, "base"))
        cosines = towards @ whole / whole.norm().clamp(min=SMALL)
        share = 100 * base.square().sum() / whole.square().sum()
        return cosines, after / before, share

    return over_tasks(one, sources, options.device, "gradients")


def self_transference(state, batch, alphas, update):
    """LR(j -> j) of every task j of the batch at every step size -> (J, len(alphas))."""
    params, options = state.params, state.options

    def one(task):
        gradients = gradient(params, task, options, update)
        before = loss_of(params, task, options)
        after = [loss_of(sgd_step(params, gradients, alpha), task, options) for alpha in alphas]
        return (torch.stack(after) / before,)

    (ratios,) = over_tasks(one, batch, options.device, "self-transference")
    return ratios


def choose_alpha(state, batch, update, level):
    """The smallest step size (found to 5 %) at which the median self-transference of the batch is `level`.

    Larger steps overshoot: the loss of a target falls and rises again. So the search goes upwards in powers of two, from
    an eighth of the step at which a loss that fell in a straight line would reach the level; then it is refined twice.
    """
    first = straight_step(state, batch, update, level)
    if not 0 < first < math.inf:
        fail(f"{state.name}: no gradient moves a validation task's loss, or one is 0: give --alpha")
    first = 2.0 ** math.floor(math.log2(first / 8))
    medians = {}

    def smallest(alphas):
        """The first of ascending step sizes that is enough, or None."""
        ratios = self_transference(state, batch, alphas, update)
        found = np.nan_to_num(np.median(ratios, 0), nan=np.inf)
        medians.update(zip(alphas, found))
        enough = [alpha for alpha, median in zip(alphas, found) if median <= level]
        return enough[0] if enough else None

    small = [first * 2**k for k in range(6)]
    large = [first * 2**k for k in range(6, 14)]
    best = smallest(small) or smallest(large)
    if best is None:
        least = medians[min(medians, key=medians.get)]
        best_step = f"the lowest median self-transference is {least:.4f}, not {level}"
        remedy = f"give --alpha, or for all states a --self-transference above {least:.4f}"
        fail(f"{state.name}: {best_step}: {remedy}")
    for k in (4, 16):  # in quarters, then in sixteenths of a factor of 2
        finer = [best * 2 ** (-i / k) for i in (3, 2, 1, 0)]
        best = smallest(finer) or best
    return float(best)


def straight_step(state, batch, update, level):
    """Median over tasks of the step size that would take the loss to `level` times its value, were it linear in the step."""

    def one(task):
        gradients = gradient(state.params, task, state.options, update)
        loss = loss_of(state.params, task, state.options)
        squares = sum(g.square().sum() for g in gradients.values())
        return ((1 - level) * loss / squares,)

    (steps,) = over_tasks(one, batch, state.options.device, "step size", numbers=False)
    return float(steps.median())


# ------------------------------------------------------------------------------------------------- tasks, states


def tasks_of(args, options, mode, split, count):
    """Draw tasks of one mode -> (episodes, Task with a leading dimension `count`)."""
    sizes = options.ways, options.shots, options.queries, options.image_size
    seed = args.seed if split == "train" else None
    where = args.device, args.data_root, args.cache_dir, options.synthetic
    episodes = Episodes([mode], split, *sizes, seed, *where, allow_shared=args.allow_shared_classes)
    return episodes, episodes.tasks(0, count)


def single(batch):
    """A batch of tasks as a list of tasks."""
    return [Task(*fields) for fields in zip(*batch)]


def some(batch, count):
    """The first tasks of a batch."""
    return Task(*(x[:count] for x in batch))


def over_tasks(function, batch, device, what, numbers=True):
    """Apply a function to every task of a batch -> its tuple of results, stacked; as float64 arrays, or as tensors.

    Under vmap, 20 tasks at a time, on a GPU; in threads on a CPU.
    """

    def one(task):
        with torch.no_grad():  # each thread has a switch of its own
            return function(task)

    if device != "cpu":
        with torch.no_grad():
            columns = torch.func.vmap(function, chunk_size=20)(batch)
    else:
        tasks = in_threads(one, single(batch), cores())
        bar = tqdm(tasks, total=len(batch.mode), desc=what, disable=None, leave=False)
        columns = [torch.stack(column) for column in zip(*bar)]
    return [x.double().cpu().numpy() if numbers else x for x in columns]


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
        words = [self.method]
        for key, usual in USUAL.items():
            value = getattr(self.options, key, usual)
            if value != usual:
                words.append(f"{key}={value}")
        return " ".join(words)

    @property
    def name(self):
        return f"{self.label}, {self.iteration:,} iterations"


def load(place):
    """Read a run's folder or an exported file.

    Returns its identity, the iteration of its parameters, the number of iterations of the run, the parameters, and
    {iteration: path} of the parameters that were kept.
    """
    path = Path(place)
    file = path / "checkpoint.pt" if path.is_dir() else path
    try:
        checkpoint = read_tensors(file)
        identity = checkpoint["identity"]
        done = checkpoint["iteration"]
        params = checkpoint["params"]
        method = identity["method"]
    except FileNotFoundError:
        fail(f"there is no {file}: train it with mprotonet.py, or name an exported file")
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(f"{file} is no checkpoint ({type(error).__name__}): name the folder of an mprotonet.py run")
    if method not in mprotonet.METHODS.values():
        fail(f"{place} is a run of {method}: transference is measured on runs of mprotonet.py")
    if identity.get("embed") == "other":
        fail(f"{place} was trained with --embed other, and needs another task's images: name another run")
    kept = {}
    for file in path.glob("params-*.pt"):
        kept[int(re.search(r"\d+", file.name).group())] = file
    return identity, done, checkpoint.get("of", done), params, kept


def states(place, at, device):
    """The states of one run that are asked for by `at` -> list of State."""
    identity, done, of, final, kept = load(place)
    options = flags_of_run(identity, mprotonet)
    options.device = device
    found = []
    for moment in at:
        iteration = iteration_of(moment, of)
        if iteration == done:
            params = final
        elif Path(place).is_file():
            continue  # an exported file is one moment
        elif iteration in kept:
            params = read_kept(kept[iteration])
        elif iteration > of:
            fail(f"--at {moment}: {place} has only {of} iterations; give half, final or a kept one")
        else:
            there = f"{place} has no params-{iteration}.pt (kept: {sorted(kept) or 'none'})"
            fail(f"{there}: train with --keep-every {math.gcd(iteration, of)}, or give --at final")
        params = {k: w.to(device, torch.float32) for k, w in params.items()}
        found.append(State(identity["method"], iteration, of, options, params, Path(place)))
    return found


def iteration_of(moment, of):
    """The iteration that a value of --at means, in a run of `of` iterations."""
    named = {"half": of // 2, "final": of}
    if moment in named:
        return named[moment]
    if moment.isdigit() and int(moment):
        return int(moment)
    fail(f"--at {moment}: give half, final or a number of iterations")


def read_kept(file):
    """The parameters that a run kept."""
    try:
        return read_tensors(file)
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(f"{file} is damaged ({type(error).__name__}): delete it, or give another --at")


def export(state, folder):
    """Write one state in half precision, as a file that --checkpoint takes; --at half and final find it again."""
    identity = {k: v for k, v in vars(state.options).items() if k != "device"}
    label = state.label.replace(" ", "-")
    run = f"{label}-{identity['shots']}shot-{identity['image_size']}px-seed{identity['seed']}"
    path = Path(folder) / f"{'+'.join(identity['modes'])}-{run}-{state.iteration}.pt".lower()
    params = {k: w.half().cpu() for k, w in state.params.items()}
    content = {"identity": identity, "iteration": state.iteration, "of": state.of, "params": params}
    atomic_write(path, content)
    print(f"written: {path}")


# --------------------------------------------------------------------------------------------------- statistics


def neutral_band(ratios, gains):
    """Half width b of the neutral zone |LR - 1| < b, and the slope that it follows from, for arrays (I, J).

    The slope is that of gain (points) on LR - 1, each target (column) about its own mean. If the slope is 0:
    inf, 0.
    """
    x = ratios - ratios.mean(0)
    y = gains - gains.mean(0)
    spread = (x**2).sum()
    slope = float((x * y).sum() / spread) if spread > 0 else 0.0
    return (NEUTRAL / abs(slope) if slope else math.inf), slope


def shares(ratios, band):
    """Shares of positive, negative and neutral transfer, in % of the sources -> (3, J) for ratios (I, J)."""
    positive = ratios <= 1 - band
    negative = ratios >= 1 + band
    neutral = ~positive & ~negative
    return 100 * np.stack([x.mean(0) for x in (positive, negative, neutral)])


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


def resampled(shape, draws):
    """Yield indices of sources and targets (I, J), drawn with replacement."""
    rng = np.random.default_rng(0)
    I, J = shape
    for _ in range(draws):
        rows = rng.integers(0, I, I)
        yield np.ix_(rows, rng.integers(0, J, J))


def describe(ratios, gains, draws=1000):
    """LR (I, J) and gains (I, J) -> {name: [number, ends of its 95 % interval]}, and the shares of each target.

    Intervals are from resampled sources and targets. The three shares and the band are None where the slope is not
    certainly negative.
    """
    if not np.isfinite(ratios).all():
        cause = "a target's loss is 0, or the step is too large"
        fail(f"a loss ratio is not finite: {cause}; give a smaller --alpha, or another mode of targets")
    found = statistics(ratios, gains)
    samples = []
    for at in resampled(ratios.shape, draws):
        samples.append(list(statistics(ratios[at], gains[at]).values()))
    samples = np.nan_to_num(samples, posinf=1e9)
    ends = np.percentile(samples, (2.5, 97.5), axis=0).T
    numbers = {}
    for name, end in zip(found, ends):
        numbers[name] = [float(found[name]), *map(float, end)]
    per_target = shares(ratios, found["band"]).round(2).tolist()
    if not numbers["slope"][2] < 0:
        numbers |= dict.fromkeys(("positive", "negative", "neutral", "band"))
        per_target = None
    return numbers | {"per_target": per_target}


def agreement(cosines, draws=1000):
    """Cosines (I, J) -> [share of positive ones in %, ends of its 95 % interval], from resampled sources and targets."""
    samples = [(cosines[at] > 0).mean() for at in resampled(cosines.shape, draws)]
    ends = np.percentile(samples, (2.5, 97.5))
    return [100 * float(x) for x in ((cosines > 0).mean(), *ends)]


def compare(one, two, draws=1000):
    """Rows of two states, measured on the same sources and targets -> {name: [difference, ends of its 95 % interval]}.

    Both are resampled alike. Shares are None where one of the two has none (see `describe`). A row is
    (LR (I, J), gains (I, J), what `describe` says of them).
    """

    def difference(at):
        first = statistics(one[0][at], one[1][at])
        second = statistics(two[0][at], two[1][at])
        return [first[name] - second[name] for name in COMPARED]

    shape = one[0].shape
    found = difference(np.ix_(*map(range, shape)))
    samples = [difference(at) for at in resampled(shape, draws)]
    ends = np.percentile(samples, (2.5, 97.5), axis=0).T
    numbers = dict.fromkeys(COMPARED)
    for name, x, end in zip(COMPARED, found, ends):
        if one[2][name] and two[2][name]:
            numbers[name] = [float(x), *map(float, end)]
    return numbers


# ------------------------------------------------------------------------------------------------------ tables


HEAD = (
    "| state | alpha | positive, % | negative, % | neutral, % | LR < 1, % | mean LR | median LR | self-transference |",
    "|" + " --- |" * 9,
)
STEPS_HEAD = (
    "| state | gradients that agree, % | median cosine | median LR of a source task to itself | base network's share of the squared "
    "gradient, % |"
)

DIFFERENCES_HEAD = ("states", "positive, %", "negative, %", "LR < 1, %", "mean LR")
SWEEP_HEAD = ("state", "times alpha", "positive, %", "negative, %", "neutral, %", "LR < 1, %")


def cell(numbers, digits=1, sign=""):
    """A number with the ends of its interval as text, "-" for None."""
    if not numbers:
        return "-"
    return "{:{s}.{d}f} ({:{s}.{d}f} to {:{s}.{d}f})".format(*numbers, d=digits, s=sign)


def line_of(*cells):
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def shares_row(row):
    """A state's `row`, as `measure_state` makes it -> its line in the table of shares, Markdown."""
    numbers = [cell(row["all"][name]) for name in SHARES]
    numbers += [cell(row["all"]["mean"], 4), f"{row['all']['median'][0]:.4f}"]
    return line_of(row["state"], f"{row['alpha']:.3g}", *numbers, f"{row['self']['median']:.4f}")


def other_tables(found, few):
    """Tables of what there is: steps, differences between states, --sweep, --matrix -> list of Markdown.

    few: how many source tasks the steps and --sweep are of.
    """
    tables = [steps_table(found, few)]
    for rows, title, head in (
        (difference_rows(found), "Differences, on the same source and target tasks", DIFFERENCES_HEAD),
        (sweep_rows(found), f"The same at other step sizes, {few} source tasks", SWEEP_HEAD),
    ):
        if rows:
            tables.append([title, "", line_of(*head), "|" + " --- |" * len(head), *rows])
    tables += [matrix_table(row) for row in found if "matrix" in row]
    return ["\n".join(lines) for lines in tables]


def steps_table(found, few):
    """What the steps are -> lines."""
    lines = [f"What the steps of {few} source tasks are like", "", STEPS_HEAD, "|" + " --- |" * 5]
    for row in found:
        steps = row["steps"]
        numbers = f"{steps['cosine']:.3f}", f"{steps['own']:.4f}", f"{steps['base']:.1f}"
        lines.append(line_of(row["state"], cell(steps["agree"]), *numbers))
    return lines


def difference_rows(found):
    """A line for each pair of states of one moment."""
    lines = []
    for row in found:
        for other, numbers in row.get("minus", {}).items():
            cells = [cell(numbers[name], 4 if name == "mean" else 1, "+") for name in COMPARED]
            lines.append(line_of(f"{row['state']} - {other}", *cells))
    return lines


def sweep_rows(found):
    """A line for each state and factor of --sweep."""
    lines = []
    for row in found:
        for factor, numbers in row.get("sweep", {}).items():
            cells = [cell(numbers[name]) for name in SHARES]
            lines.append(line_of(row["state"], factor, *cells))
    return lines


def matrix_table(row):
    """Every mode to every mode -> lines."""
    matrix = row["matrix"]
    modes = list(matrix["cells"])
    title = f"{row['state']}, alpha {matrix['alpha']:.3g}: share of LR < 1 in %; median LR"
    lines = [title, "", line_of("from \\ to", *modes), "|" + " --- |" * (len(modes) + 1)]
    for source, to in matrix["cells"].items():
        cells = [f"{cell(numbers['below_one'])}; {cell(numbers['median'], 4)}" for numbers in to.values()]
        lines.append(line_of(source, *cells))
    return lines


# ------------------------------------------------------------------------------------------------------ figures


def names(episodes, number):
    """Names of the classes of a task."""
    classes, *_ = episodes.indices(0, number, 1)
    return ", ".join(episodes.class_names[0][c] for c in classes[0])


def draw(args, experiment, found, along):
    """Draw all figures into --out."""
    out, about = Path(args.out), experiment.about
    plots.histogram(found, out / "transference-histogram.png", about)
    LR = np.array(found[0]["LR"])[:, 0]
    sources, targets = single(experiment.sources), single(experiment.targets)
    shown = [(f"target task 0: {args.target}, {names(experiment.target_episodes, 0)}", targets[0])]
    for which, i in (("best", LR.argmin()), ("worst", LR.argmax())):
        classes = names(experiment.source_episodes, i)
        shown.append((f"source task {i}, the {which}, LR {LR[i]:.4f}: {classes}", sources[i]))
    plots.panels(shown, out / "transference-tasks.png")
    if along:
        chosen = "; each state with the step size chosen for it" if args.alpha == "auto" else ""
        plots.curves(along, out / "transference-training.png", about + chosen)


# --------------------------------------------------------------------------------------------------- experiment


class Experiment:
    """The source, target and validation tasks, the same for all states, and the line that describes them."""

    def __init__(self, args, options):
        self.options = options
        self.about = about(args, options)
        self.source_episodes, self.sources = tasks_of(args, options, args.source, "train", args.source_tasks)
        self.target_episodes, self.targets = tasks_of(args, options, args.target, "test", args.target_tasks)
        _, self.validation = tasks_of(args, options, args.target, "val", args.target_tasks)
        self.few = some(self.sources, FEW_SOURCES)


def about(args, options):
    """What is measured, in one line."""
    modes = f"{args.source} (training classes) to {args.target} (test classes)"
    if options.synthetic:
        modes = f"SYNTHETIC {modes}"
    task = f"{options.ways}-way {options.shots}-shot, {options.image_size} px"
    return f"{modes}, {task}, {args.source_tasks} source and {args.target_tasks} target tasks"


def rounded(ratios):
    """Loss ratios as transference.json has them."""
    return ratios.round(6).tolist()


def alpha_of(args, state, validation):
    """The step size: as typed, or chosen for this state."""
    if args.alpha != "auto":
        return args.alpha
    return choose_alpha(state, validation, args.update, args.self_transference)


def measure_state(args, state, moment, experiment):
    """Measure one state -> its row, as transference.json has it; its LR and gains."""
    targets, update = experiment.targets, args.update
    alpha = alpha_of(args, state, experiment.validation)
    ratios, gains = measure(state, experiment.sources, targets, alpha, update)
    own = self_transference(state, targets, [alpha], update)[:, 0]
    row = {
        "state": state.name,
        "moment": moment,
        "alpha": alpha,
        "all": describe(ratios, gains),
        "self": {"median": float(np.median(own)), "LR": rounded(own)},
        "LR": rounded(ratios),
        "gain": gains.round(4).tolist(),
    }
    print(shares_row(row), flush=True)
    cosines, to_itself, base = what_steps_are(state, experiment.few, targets, alpha, update)
    if np.isnan(to_itself).all():
        fail(f"{state.name}: the loss of every source task is 0, so none makes a step; give another --source")
    row["steps"] = {
        "agree": agreement(cosines),
        "cosine": float(np.median(cosines)),
        "own": float(np.nanmedian(to_itself)),  # nan: a task whose loss is 0
        "base": float(np.nanmedian(base)),
    }
    return row, ratios, gains


def sweep(args, state, alpha, experiment):
    """The shares at other step sizes -> {factor: describe(...)}."""
    found = {}
    for factor in SWEEP:
        measured = measure(state, experiment.few, experiment.targets, factor * alpha, args.update)
        found[str(factor)] = describe(*measured)
    return found


def matrix(args, state):
    """Every mode to every mode -> {"alpha", "cells": {source: {target: describe(...)}}}, with one step size.

    With --alpha auto it takes the median LR(j -> j) over the validation tasks of all modes to --self-transference.
    """
    options = state.options
    modes = [canonical_mode(mode, args.data_root) for mode in args.matrix or options.modes]
    of_each = max(2, args.target_tasks // len(modes))
    validation = [tasks_of(args, options, mode, "val", of_each)[1] for mode in modes]
    alpha = alpha_of(args, state, Task(*map(torch.cat, zip(*validation))))
    targets = {mode: tasks_of(args, options, mode, "test", args.target_tasks)[1] for mode in modes}
    cells = {}
    for source in modes:
        _, sources = tasks_of(args, options, source, "train", min(FEW_SOURCES, args.source_tasks))
        cells[source] = {}
        for target, batch in targets.items():
            measured = measure(state, sources, batch, alpha, args.update)
            cells[source][target] = describe(*measured)
    return {"alpha": alpha, "cells": cells}


def trajectories(args, runs, experiment):
    """Figure 2: LR of source tasks to the first target at every kept state.

    Returns {label: [{"iteration", "alpha", "LR", "best", "worst"}, ...]}; the last two are the
    indices of the source tasks of lowest and highest LR in the middle of training.
    """
    target = some(experiment.targets, 1)
    found, middle = {}, {}
    for place in dict.fromkeys(str(state.folder) for _, state in runs):
        _, done, of, _, kept = load(place)
        moments = [str(t) for t in sorted({*kept, done})]
        for state in states(place, moments, args.device):
            alpha = alpha_of(args, state, experiment.validation)
            ratios, _ = measure(state, experiment.few, target, alpha, args.update)
            row = {"iteration": state.iteration, "alpha": alpha, "LR": rounded(ratios[:, 0])}
            found.setdefault(state.label, []).append(row)  # exported files are a state each
            middle[state.label] = of / 2
    for label, rows in found.items():
        rows.sort(key=lambda row: row["iteration"])
        LR = min(rows, key=lambda row: abs(row["iteration"] - middle[label]))["LR"]
        for row in rows:
            row |= {"best": int(np.argmin(LR)), "worst": int(np.argmax(LR))}
    return found


def check_runs(runs):
    """Exit if runs cannot be compared; note those that are not finished."""
    settings = set()
    for _, state in runs:
        of = state.options
        settings.add((of.synthetic, of.ways, of.shots, of.image_size))
    if len(settings) > 1:
        fail("the runs differ in ways, shots, image size or --synthetic: their tasks are not the same")
    first = {}
    for _, state in runs:
        other = first.setdefault((state.label, state.iteration), state)
        if other.folder != state.folder:
            refuse_namesakes(other, state)
        if state.folder.is_dir() and not (state.folder / "result.json").exists():
            meant = f"half and final refer to its {state.of:,} iterations so far"
            print(f"note: {state.folder} is not finished; {meant}", file=sys.stderr)


def refuse_namesakes(one, two):
    """Exit because two runs would have the same name in the tables."""
    theirs, ours = vars(one.options), vars(two.options)
    differ = [key for key in theirs if ours.get(key) != theirs[key]]
    same = f"{one.folder} and {two.folder} are both called {two.label}"
    fail(f"{same} (they differ in {' '.join(differ) or 'nothing'}): measure them separately")


def save(args, experiment, found, along):
    """Write transference.json."""
    hidden = ("data_root", "cache_dir", "out", "checkpoint", "allow_shared_classes")
    git = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40 2>{os.devnull}'
    options = experiment.options
    with os.popen(git) as answer:
        commit = answer.read().strip()
    record = {
        "about": experiment.about,
        "setting": {k: v for k, v in vars(args).items() if k not in hidden},
        "commit": commit,
        "synthetic": options.synthetic,
        "modes": options.modes,
        "shots": options.shots,
        "image_size": options.image_size,
        "found": found,
        "along": along,
    }
    atomic_write(Path(args.out) / "transference.json", json.dumps(record, allow_nan=False))


# -------------------------------------------------------------------------------------------------- flags, main


AT_HELP = (
    "which states: half (of the iterations, the paper's middle of training), final, or a kept iteration "
    "(mprotonet.py --keep-every)"
)
SHARED_HELP = "accept data sets in which a class, or copies of a file, are in two splits"
CHECKPOINT_HELP = "folders of mprotonet.py runs, or files that --export wrote; several are compared"
UPDATE_HELP = "what the step changes: all meta-parameters, or the base network alone"
LEVEL_HELP = "--alpha auto takes the smallest step at which the median LR(j -> j) of validation tasks is this"
SOURCES_HELP = f"of the first table (paper: 300); the others have at most {FEW_SOURCES} of them"
SWEEP_HELP = f"the shares at {', '.join(map(str, SWEEP))} times alpha too"
ALONG_HELP = "also LR of source tasks at every kept state of training (Fig. 2)"
SEED_HELP = "of the source tasks; a run's own seed would give the tasks that it has trained on"
OUT_HELP = "folder of transference.json and the figures"
EXPORT_HELP = "write each state to this folder as one file in half precision, and do nothing else"


def get_args(argv=None):
    """Read the command line -> args."""
    p = new_parser(__doc__, "")
    p.add_argument("--checkpoint", nargs="+", required=True, metavar="RUN", help=CHECKPOINT_HELP)
    p.add_argument("--at", nargs="+", default=["half", "final"], metavar="T", help=AT_HELP)
    p.add_argument("--source", default="miniimagenet", help="mode of the source tasks: training classes")
    p.add_argument("--target", default="fc100", help="mode of the target tasks: test classes")
    p.add_argument("--source-tasks", type=int, default=300, help=SOURCES_HELP)
    p.add_argument("--target-tasks", type=int, default=20, help="paper: 1 in each figure")
    p.add_argument("--update", default="all", choices=("all", "base"), help=UPDATE_HELP)
    p.add_argument("--alpha", default="auto", help="step size; auto: see --self-transference")
    p.add_argument("--self-transference", type=float, default=0.95, help=LEVEL_HELP)
    p.add_argument("--sweep", action="store_true", help=SWEEP_HELP)
    p.add_argument("--matrix", nargs="*", metavar="MODE", help="each mode to each mode (the run's, or these)")
    p.add_argument("--along", action="store_true", help=ALONG_HELP)
    p.add_argument("--seed", type=int, default=1000, help=SEED_HELP)
    root = os.environ.get("FEWSHOT_DATA") or "data"
    p.add_argument("--data-root", type=user_path, default=root, help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", type=user_path, default=".cache", help="decoded images")
    p.add_argument("--allow-shared-classes", action="store_true", help=SHARED_HELP)
    p.add_argument("--device", default="auto", help="auto is the first GPU, or the CPU")
    p.add_argument("--out", type=user_path, default="results/transference", help=OUT_HELP)
    p.add_argument("--export", type=user_path, metavar="FOLDER", help=EXPORT_HELP)
    args = p.parse_args(argv)
    check(args)
    return args


def check(args):
    """Exit if a flag is out of range. Reads --alpha as a number."""
    for name in ("source_tasks", "target_tasks"):
        if getattr(args, name) < 2:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: give 2 or more")
    args.device = resolve_device(args.device)
    if not 0 < args.self_transference < 1:
        fail(f"--self-transference {args.self_transference}: give a number between 0 and 1")
    if args.alpha == "auto":
        return
    try:
        args.alpha = float(args.alpha)
    except ValueError:
        fail(f"--alpha {args.alpha}: give a number, or auto")
    if not 0 <= args.alpha < math.inf:
        fail(f"--alpha {args.alpha}: give 0 or more")


def make_folder(out):
    """Make the folder of --out, before minutes are spent on what is to be written there."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out}: {error.strerror}; give another folder")


def chosen_states(args):
    """The states that --checkpoint and --at name -> [(moment, State)]."""
    runs = []
    for moment in args.at:
        for place in args.checkpoint:
            runs += [(moment, state) for state in states(place, [moment], args.device)]
    if not runs:
        fail(f"none of {' '.join(args.checkpoint)} has a state at {' '.join(args.at)}")
    return runs


def add_differences(found, measured):
    """Add to each row its difference from each earlier one of the same moment."""
    for i, later in enumerate(found):
        for j, earlier in enumerate(found[:i]):
            if earlier["moment"] == later["moment"]:
                rows = (*measured[i], later["all"]), (*measured[j], earlier["all"])
                later.setdefault("minus", {})[earlier["state"]] = compare(*rows)


def main():
    args = get_args()
    torch.backends.cudnn.allow_tf32 = False  # a step changes entries by less than a GPU's TF32 tells apart
    runs = chosen_states(args)
    if args.export:
        for _, state in runs:
            export(state, args.export)
        return
    check_runs(runs)
    args.source = canonical_mode(args.source, args.data_root)
    args.target = canonical_mode(args.target, args.data_root)
    figures = plots.installed()
    if not figures:
        print("note: matplotlib is not installed, so there are no figures", file=sys.stderr)
    experiment = Experiment(args, runs[0][1].options)
    make_folder(args.out)
    print(f"transference, {experiment.about}, step on {args.update} parameters\n")
    print("\n".join(HEAD))
    found, measured = [], []
    for moment, state in runs:
        row, ratios, gains = measure_state(args, state, moment, experiment)
        found.append(row)
        measured.append((ratios, gains))
        save(args, experiment, found, {})  # what is measured is kept, whatever comes
        if args.sweep:
            row["sweep"] = sweep(args, state, row["alpha"], experiment)
        if args.matrix is not None:
            row["matrix"] = matrix(args, state)
    add_differences(found, measured)
    print("\n" + "\n\n".join(other_tables(found, min(FEW_SOURCES, args.source_tasks))))
    along = trajectories(args, runs, experiment) if args.along else {}
    save(args, experiment, found, along)
    if figures:
        draw(args, experiment, found, along)
    written = "transference.json, figures" if figures else "transference.json"
    print(f"\nwritten to {args.out}: {written}", file=sys.stderr)


if __name__ == "__main__":
    main()
