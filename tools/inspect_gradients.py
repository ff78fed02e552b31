"""What inner steps do with their gradients: accuracy when gradients are corrupted, and what modulation lets through.

    python -m tools.inspect_gradients RUN [RUN ...] --gradient-noise 0.01 0.03 0.1 0.3 --spectrum --out results/gradients

for runs of modgrad.py (folders with a checkpoint), in the terms of the ModGrad paper:

    --gradient-noise    Section 5.4, Figure 9: noise is added to every entry of the inner gradients, at test only, and the
                        networks are evaluated on the same test tasks. A level SIGMA is the noise's *standard deviation* (the
                        paper's eta is its variance, SIGMA^2). As in the released code one noise is drawn for an episode and
                        added in each of its steps, before modulation. All algorithms alike; but CAVIA's gradient has 100
                        entries where MAML's has as many as the network, so equal levels are not equal disturbances.
    "step scaled"       Whatever makes steps smaller makes their noise smaller too. So beside each run of MAML stands the same
                        network with its step size scaled, at test, until its first step is as long as ModGrad's (median of
                        the norm over validation tasks, the first ModGrad run given). If this curve falls as gently as
                        ModGrad's, the size of the step has done it, and no knowledge of the task. (MAML of several steps
                        meets its noise in each of them; like is compared with like for MAML of one step on the same layers,
                        `--algorithm maml --adapt conv3 conv4 --steps 1`.)
    --spectrum          Section 3 calls M a low-pass filter. Singular values of the inner gradient of each adapted kernel,
                        seen as a matrix (C_out, C_in * 9), before and after modulation, the largest being 1, means over
                        test tasks; and how many singular values carry 90 % of the energy.

Writes gradients.json, and figures if matplotlib is installed.
"""

import argparse
import importlib.util
import json
import os
import textwrap
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import modgrad
from data import Episodes, Task, atomic_write, fail, flags_of_run, read_tensors

ENERGY = 0.9


def load(folder):
    """A run's folder -> its arguments, its last parameters, iterations done."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        fail(f"there is no {path}: train with modgrad.py first, or name the folder of a run")
    try:
        checkpoint = read_tensors(path)
        recorded = checkpoint["identity"]
        params, done = checkpoint["params"], checkpoint["iteration"]
        method = recorded["method"]
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(f"{path} is no checkpoint ({type(error).__name__}): name the folder of a run")
    if recorded.get("algorithm") not in modgrad.STEPS or "backbone" not in recorded:
        fail(f"{folder} is a run of {method}: only those of modgrad.py are inspected here")
    return flags_of_run(recorded, modgrad), params, done


def adapted(params, options):
    """What inner steps change, at its start -> dict."""
    if options.algorithm == "cavia":
        return {"context": torch.zeros(options.context)}
    return {k: params[k] for k in modgrad.adapted_keys(options, params)}


def draw_noise(like, sigma, number):
    """Noise of standard deviation sigma for test task `number`: at every level the same pattern -> dict of tensors."""
    rng = torch.Generator().manual_seed(number)
    noise = {}
    for k, w in like.items():
        noise[k] = sigma * torch.randn(w.shape, generator=rng).to(w.device)
    return noise


def task_of(episodes, j):
    """Task j."""
    return Task(*(x[0] for x in episodes.tasks(j, 1)))


@torch.no_grad()
def accuracies(params, options, episodes, count, levels):
    """Of the first `count` test tasks at each level of noise, in % -> array (levels, 2, count): paper's protocol, inductive."""
    like = adapted(params, options)
    found = np.zeros((len(levels), 2, count))
    for j in tqdm(range(count), desc=f"{options.method}: tasks with noise", disable=None, leave=False):
        task = task_of(episodes, j)
        for i, sigma in enumerate(levels):
            noise = draw_noise(like, sigma, j) if sigma else None
            _, *logits = modgrad.task_loss(params, task, options, True, noise)
            for protocol, x in enumerate(logits):
                right = (x.argmax(-1) == task.query_y).double()
                found[i, protocol, j] = 100 * right.mean().item()
    return found


@torch.no_grad()
def first_steps(params, options, episodes, count):
    """The first inner step of the first `count` tasks -> list of (gradient, change of what is adapted), two dicts."""
    step = modgrad.STEPS[options.algorithm]

    def recorded(params, fast, loss, args, noisy):
        after = step(params, fast, loss, args, noisy)
        gradient = noisy(torch.func.grad(loss)(fast))
        seen.append((gradient, {k: after[k] - fast[k] for k in fast}))
        return after

    found = []
    with mock.patch.dict(modgrad.STEPS, {options.algorithm: recorded}):
        for j in range(count):
            seen = []
            modgrad.task_loss(params, task_of(episodes, j), options)
            found.append(seen[0])
    return found


def flat(tensors):
    """All entries of a dict of tensors, in a row."""
    return torch.cat([w.flatten() for w in tensors.values()])


def norm(tensors):
    """The norm of all entries of a dict of tensors."""
    return flat(tensors).norm().item()


def step_length(params, options, episodes, count):
    """Median length of the first inner step."""
    steps = first_steps(params, options, episodes, count)
    return float(np.median([norm(change) for _, change in steps]))


def spectrum(steps):
    """Steps from `first_steps` -> {kernel: {"raw", "modulated": singular values relative to the largest, mean over tasks,
    "rank raw", "rank modulated": how many carry 90 % of the energy, mean over tasks, "tasks raw", ...: so many tasks, whose step
    is not zero}}."""
    first, _ = steps[0]
    kernels = [k for k, w in first.items() if w.dim() == 4]
    found = {}
    for k in kernels:
        raw = [gradient[k] for gradient, _ in steps]
        modulated = [change[k] for _, change in steps]
        found[k] = spectrum_of("raw", raw) | spectrum_of("modulated", modulated)
    return found


def spectrum_of(name, kernels):
    """The steps of one kernel, each seen as a matrix (C_out, C_in * 9) -> those entries of `spectrum` that bear this name."""
    matrices = torch.stack([kernel.flatten(1) for kernel in kernels])
    values = torch.linalg.svdvals(matrices.double())  # (tasks, C_out)
    values = values[values[:, 0] > 0]  # M can be zero everywhere: such a step has no spectrum
    found = {f"tasks {name}": len(values)}
    if not len(values):
        return found | {name: [0.0] * len(kernels[0]), f"rank {name}": 0.0}
    energy = values.square().cumsum(1) / values.square().sum(1, keepdim=True)
    rank = (energy < ENERGY).sum(1) + 1
    found[name] = (values / values[:, :1]).mean(0).tolist()
    found[f"rank {name}"] = rank.double().mean().item()
    return found


class Inspected(NamedTuple):
    """A run under inspection: its row in gradients.json, and what it is measured with."""

    row: dict
    params: dict
    options: argparse.Namespace
    test: Episodes


def inspect(runs, args):
    """-> a dict for each run, and for each run of MAML with its step scaled (see above)."""
    inspected = [describe(*runs[folder], args) for folder in args.runs]
    lengths = [one.row["step_length"] for one in inspected if one.options.algorithm == "modgrad"]
    if not args.gradient_noise:
        return [one.row for one in inspected]
    rows = []
    for one in inspected:
        both = [one]
        if one.options.algorithm == "maml" and lengths:
            both.append(scaled(one, lengths[0]))
        for each in both:
            add_noise(each, args)
            rows.append(each.row)
    return rows


def describe(options, params, done, args):
    """What is known of a run without noise: its setting, the length of its first step, its spectrum -> Inspected."""
    options.data_root, options.cache_dir = args.data_root, args.cache_dir
    options.device = "cpu"
    options.allow_shared_classes = True  # training on these images has decided that
    test, validation = Episodes.of(options, "test"), Episodes.of(options, "val")
    is_at_one = getattr(options, "start_at_one", False)
    row = {
        "run": f"{options.method}, started at one" if is_at_one else options.method,
        "algorithm": options.algorithm,
        "modes": options.modes,
        "shots": options.shots,
        "ways": options.ways,
        "image_size": options.image_size,
        "seed": options.seed,
        "iteration": done,
        "synthetic": options.synthetic,
        "steps": options.steps,
        "alpha": options.alpha,
        "adapted": len(flat(adapted(params, options))),
        "step_length": step_length(params, options, validation, args.step_tasks),
    }
    if args.spectrum and options.algorithm != "cavia":
        row["spectrum"] = spectrum(first_steps(params, options, test, args.step_tasks))
    return Inspected(row, params, options, test)


def scaled(one, length):
    """The same network with its step size scaled, so that its first step has this length -> Inspected."""
    alpha = one.options.alpha * length / one.row["step_length"]
    row = {key: value for key, value in one.row.items() if key != "spectrum"}
    row |= {"run": f"{row['run']}, step scaled", "alpha": alpha, "step_length": length}
    options = argparse.Namespace(**vars(one.options) | {"alpha": alpha})
    return Inspected(row, one.params, options, one.test)


def add_noise(one, args):
    """Measure accuracy at each level of noise, and add it to the row."""
    modes = one.options.modes
    per_task = accuracies(one.params, one.options, one.test, args.tasks, args.gradient_noise)
    noise = {}
    for sigma, x in zip(args.gradient_noise, per_task):
        noise[str(sigma)] = {
            "accuracy": modgrad.summary(x[0], modes),
            "accuracy_inductive": modgrad.summary(x[1], modes),
            "change": modgrad.summary(x[0] - per_task[0, 0], modes),
            "per_task": x[0].round(4).tolist(),
        }
    one.row["noise"] = noise
    one.row["tasks_sha256"] = one.test.sha256(args.tasks)


def label(row):
    """A run's name and its steps, as tables and figures show them."""
    word = "steps" if row["steps"] > 1 else "step"
    return f"{row['run']} ({row['steps']} {word} of {row['alpha']:.3g})"


def noise_table(rows):
    """-> Markdown: accuracy at each level, and what the highest level costs."""
    levels = list(rows[0]["noise"])
    heads = ["run", *(f"noise {sigma}" for sigma in levels), f"change at {levels[-1]}"]
    lines = [table_row(heads), "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [label(row)]
        for found in row["noise"].values():
            cells.append("{mean:.2f} ± {ci95:.2f}".format(**found["accuracy"]["overall"]))
        change = row["noise"][levels[-1]]["change"]["overall"]
        cells.append("{mean:+.2f} ± {ci95:.2f}".format(**change))
        lines.append(table_row(cells))
    return "\n".join(lines)


def table_row(cells):
    """Cells -> a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def spectrum_table(rows):
    """-> Markdown: how many singular values of each kernel's step carry 90 % of its energy."""
    lines = ["| run | kernel | of | raw | modulated |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        for kernel, found in row.get("spectrum", {}).items():
            ranks = [f"{found['rank raw']:.2f}", f"{found['rank modulated']:.2f}"]
            cells = [label(row), kernel, str(len(found["raw"])), *ranks]
            lines.append(table_row(cells))
    return "\n".join(lines)


def draw(rows, about, args, out):
    """Rows of what was found -> gradient-noise.png and gradient-spectrum.png in `out`, as far as they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    if "noise" in rows[0]:
        noise_figure(rows, f"{about}, {args.tasks} test tasks, 95 % intervals", out / "gradient-noise.png")
    with_spectrum = [row for row in rows if row.get("spectrum")]
    if with_spectrum:
        what = f"{about}, mean of {args.step_tasks} test tasks"
        spectra_figure(with_spectrum, what, out / "gradient-spectrum.png")


def noise_figure(rows, about, file):
    """Accuracy against the level of noise, a line for each run; dotted where its step was scaled."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for row in rows:
        levels = [float(sigma) for sigma in row["noise"]]
        scores = [x["accuracy"]["overall"] for x in row["noise"].values()]
        means = [x["mean"] for x in scores]
        halves = [x["ci95"] for x in scores]
        style = ":" if "scaled" in row["run"] else "-"
        look = {"capsize": 2, "linewidth": 1.4, "linestyle": style, "label": label(row)}
        axis.errorbar(levels, means, halves, **look)
    axis.set_xscale("symlog", linthresh=min(s for s in levels if s))
    axis.set_xticks(levels, [f"{s:g}" for s in levels])
    axis.minorticks_off()
    axis.set(
        xlabel="standard deviation of the noise on each entry of the inner gradient",
        ylabel="accuracy in %, paper protocol",
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="x-small", ncols=2)
    figure.suptitle(textwrap.fill(about, 90), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def spectra_figure(rows, about, file):
    """Singular values of each adapted kernel's gradient, raw (dotted) and modulated; a panel per kernel, a colour per run."""
    from matplotlib import pyplot as plt

    kernels = sorted({kernel for row in rows for kernel in row["spectrum"]})
    size = (4.5 * len(kernels), 4)
    figure, axes = plt.subplots(
        1, len(kernels), figsize=size, squeeze=False, layout="constrained", sharey=True
    )
    for kernel, axis in zip(kernels, axes[0]):
        draw_spectra(axis, rows, kernel)
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", fontsize="x-small", ncols=2)
    figure.suptitle(textwrap.fill(about, 60 * len(kernels)), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_spectra(axis, rows, kernel):
    """The panel of one kernel."""
    for i, row in enumerate(rows):
        if kernel not in row["spectrum"]:
            continue
        for name, style in (("raw", ":"), ("modulated", "-")):
            values = row["spectrum"][kernel][name]
            places = range(1, len(values) + 1)
            what = f"{label(row)}, {name}"
            axis.plot(places, values, style, color=f"C{i}", label=what, linewidth=1.4)
    axis.set(
        yscale="log",
        ylim=(1e-4, 1.2),
        title=kernel,
        xlabel="singular value",
        ylabel="relative to the largest",
    )
    axis.grid(alpha=0.3)


def get_args(argv=None):
    """The command line -> its flags, checked; 0 is among the levels of noise."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders of modgrad.py runs")
    p.add_argument(
        "--gradient-noise",
        nargs="+",
        type=float,
        default=[],
        metavar="SIGMA",
        help="standard deviations; 0 is always among them",
    )
    p.add_argument(
        "--spectrum", action="store_true", help="singular values of the first inner step, raw and modulated"
    )
    p.add_argument(
        "--tasks", type=int, default=600, help="test tasks, over all modes together (the paper: 600)"
    )
    p.add_argument("--step-tasks", type=int, default=50, help="tasks for lengths and spectra of steps")
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="decoded images")
    p.add_argument("--out", default="results/gradients", help="folder of gradients.json and the figures")
    args = p.parse_args(argv)
    check(args)
    if args.gradient_noise:
        args.gradient_noise = sorted({0.0, *args.gradient_noise})
    return args


def check(args):
    """Exit if there is nothing to do, or a flag is out of range."""
    levels = args.gradient_noise
    if not levels and not args.spectrum:
        fail("nothing to do: give --gradient-noise SIGMA ..., --spectrum, or both")
    are_in_range = all(0 <= sigma < float("inf") for sigma in levels)
    if levels and not (are_in_range and any(levels)):
        given = " ".join(map(str, levels))
        fail(f"--gradient-noise {given}: give numbers of 0 or more, at least one above it")
    for key, least in (("tasks", 10), ("step_tasks", 2)):
        value = getattr(args, key)
        if value < least:
            fail(f"--{key.replace('_', '-')} {value}: give {least} or more")


def setting_of(options):
    """What decides on test tasks: modes, ways, shots, queries, image size, --synthetic."""
    shape = (options.ways, options.shots, options.queries, options.image_size)
    return (*options.modes, *shape, options.synthetic)


def main():
    args = get_args()
    out = Path(args.out)
    runs = {folder: load(folder) for folder in args.runs}
    settings = {setting_of(options) for options, _, _ in runs.values()}
    if len(settings) > 1:
        fail(
            "the runs differ in modes, ways, shots, queries, image size or --synthetic: their tasks are not the same"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out}: {error.strerror}; give another folder")
    rows = inspect(runs, args)
    o, _, _ = runs[args.runs[0]]
    about = "SYNTHETIC " if o.synthetic else ""
    about += f"{'+'.join(o.modes)}, {o.ways}-way {o.shots}-shot, {o.image_size} px"
    print(f"{about}; last parameters")
    if args.gradient_noise:
        what = "Accuracy in % (paper protocol) with noise on the inner gradients"
        print(f"\n{what}, {args.tasks} test tasks\n\n{noise_table(rows)}")
    if args.spectrum:
        what = f"Singular values with {100 * ENERGY:.0f} % of the energy of the first step"
        print(f"\n{what}, mean of {args.step_tasks} test tasks\n\n{spectrum_table(rows)}")
    left_out = ("data_root", "cache_dir", "out", "runs")
    kept = {flag: value for flag, value in vars(args).items() if flag not in left_out}
    record = {"setting": kept, "found": rows}
    atomic_write(out / "gradients.json", json.dumps(record, allow_nan=False) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(rows, about, args, out)
    else:
        print("note: matplotlib is not installed, so there are no figures")


if __name__ == "__main__":
    main()
