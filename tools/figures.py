"""The figures beside the tables. They need matplotlib."""

import itertools
import math
import sys

import numpy as np

from data import read_log
from tools.reading import label, score


def curves(runs, heading, file, name_of=label):
    """Accuracy of each configuration against iterations -> PNG `file`: on training tasks and, below, on validation tasks, a panel
    per mode.

    Of several seeds: their mean, and a band from the lowest to the highest. A run may have some of the modes only. name_of: a
    function of a run and of whether its seed is to be named.
    """
    logs = {}
    for run in sorted(runs, key=label):
        logs.setdefault(name_of(run, False), []).append(log_lines(run))
    modes = max((run["modes"] for run in runs), key=len)
    sources = {"training": training_points}
    all_logs = itertools.chain(*logs.values())
    all_lines = itertools.chain(*all_logs)
    if any("validation" in line for line in all_lines):
        sources["validation"] = validation_points
    figure, panels = grid(len(sources), len(modes))
    colour_map = "tab10" if len(logs) <= 10 else "tab20"
    colours = pyplot().get_cmap(colour_map).colors
    for (kind, mode), axis in zip(itertools.product(sources, modes), panels):
        for (name, of_seeds), colour in zip(logs.items(), itertools.cycle(colours)):
            found = [sources[kind](lines, mode) for lines in of_seeds]
            draw_seeds(axis, found, name, colour)
        axis.set(title=mode, xlim=(0, None))
        name_axes(axis, "iterations", f"accuracy on {kind} tasks, %")
    legend_of(figure, panels, "outside lower center", ncols=2)
    save(figure, f"{heading}\n{seeds_text(runs)}", file)


def pyplot():
    """matplotlib's pyplot, which is to draw into files: no screen is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def grid(rows, columns):
    """A figure with panels in rows and columns -> (figure, list of its panels, row by row). What is one panel wide is laid flat."""
    if columns == 1:
        rows, columns = 1, rows
    size = max(8, 4.2 * columns), 3.6 * rows + 1.4
    figure, panels = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    return figure, list(panels.flat)


def side_by_side(count, width, height):
    """A figure of so many inches, with panels side by side -> (figure, list of its panels)."""
    size = width, height
    figure, panels = pyplot().subplots(1, count, figsize=size, squeeze=False, layout="constrained")
    return figure, list(panels[0])


def name_axes(axis, x, y):
    """Name the two axes of a panel, and draw its grid."""
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)


def with_intervals(axis, x, mean, half_widths, name, **style):
    """Draw means with their intervals, joined by a line, which the legend calls `name`."""
    axis.errorbar(x, mean, half_widths, label=plain(name), marker="o", capsize=2, **style)


def legend_of(figure, panels, place, **style):
    """Give a figure one legend of the lines in all its panels, each name once."""
    lines = {}
    for axis in panels:
        for line in axis.get_lines():
            lines.setdefault(line.get_label(), line)
    figure.legend(lines.values(), lines, loc=place, fontsize="small", **style)


def save(figure, title, file):
    """Give a figure its title, and write it to PNG `file`."""
    figure.suptitle(title.strip(), fontsize="medium")
    figure.savefig(file, dpi=110)
    pyplot().close(figure)


def plain(name):
    """A row's name without the marks of Markdown, for a legend."""
    return name.replace("`", "")


def log_of(run):
    """The path of a run's log."""
    return run["file"].parent / "log.jsonl"


def log_lines(run):
    """The lines of a run's log, or [] and a note where there is none."""
    lines = read_log(log_of(run))
    if not lines:
        print(f"note: {log_of(run)} cannot be read: no curve of it", file=sys.stderr)
    return lines


def seeds_text(shown):
    """What lines and bands are where there are several seeds -> text for a title."""
    seeds = sorted({run["seed"] for run in shown})
    if len(seeds) < 2:
        return ""
    return f"Seeds {', '.join(map(str, seeds))}, as far as run: a line is their mean, a band goes from the lowest to the highest."


def training_points(lines, mode):
    """Lines of a log -> [(iteration, accuracy in % on training tasks of a mode)], neighbours averaged."""
    points = []
    for line in lines:
        if mode in line.get("accuracy", {}):
            points.append((line["iteration"], line["accuracy"][mode]))
    return thinned(points, 40).tolist() if points else []


def validation_points(lines, mode):
    """Lines of a log -> [(iteration, accuracy in % on validation tasks of a mode, paper protocol)]."""
    points = []
    for line in lines:
        measured = line.get("validation", {})
        accuracy = measured.get("paper") or measured.get("accuracy", {})  # afr.py has the second
        if mode in accuracy:
            points.append((line["iteration"], accuracy[mode]["mean"]))
    return points


def draw_seeds(axis, found, name, colour):
    """Draw the mean of the seeds' points, which the legend calls `name`; of several seeds also the band that they fill.

    found: for each seed [(iteration, value)], or [] where nothing was measured.
    """
    measured = [np.array(points).T for points in found if points]
    if not measured:
        return
    iterations, values = on_common_iterations(measured)
    mean = values.mean(0)
    axis.plot(iterations, mean, label=plain(name), color=colour, linewidth=1.5)
    if len(measured) > 1:
        lowest = values.min(0)
        highest = values.max(0)
        band = {"color": colour, "alpha": 0.15, "linewidth": 0}
        axis.fill_between(iterations, lowest, highest, **band)


def on_common_iterations(measured):
    """[(iterations, values)] of each seed -> the iterations of all seeds where all have begun and none has ended (n,), and the
    values there (seeds, n), on straight lines between what was measured."""
    of_seeds = [iterations for iterations, _ in measured]
    begin = max(iterations[0] for iterations in of_seeds)
    end = min(iterations[-1] for iterations in of_seeds)
    every = np.unique(np.concatenate(of_seeds))
    inside = (begin <= every) & (every <= end)
    common = every[inside]
    values = [np.interp(common, *seed) for seed in measured]
    return common, np.array(values)


def against_steps(runs, about, file):
    """ModGrad's Figure 5: training loss and accuracy on held-out drawings against steps on new alphabets -> PNG `file`."""
    figure, (left, right) = side_by_side(2, 11, 4.8)
    for name, run in runs.items():
        mean = np.array(run["curve"]["mean"])
        half = np.array(run["curve"]["ci95"])
        steps = range(len(mean))
        left.plot(steps, mean, label=plain(name), linewidth=1.3)
        left.fill_between(steps, mean - half, mean + half, alpha=0.15)
        after = run["after"]
        with_intervals(right, after["steps"], after["mean"], after["ci95"], name)
    first = max(run["curve"]["mean"][0] for run in runs.values())
    left.set(ylim=(0, 1.2 * first))  # what diverges leaves the picture
    right.set(xscale="log")
    name_axes(left, "steps made", "loss of the next training batch")
    name_axes(right, "steps made", "accuracy on held-out drawings, %, paper protocol")
    lines, names = right.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", fontsize="small", ncols=3)
    save(figure, f"Alphabets not trained on\n{about}", file)


def rl_curves(runs, about, file):
    """ModGrad's Figure 8: left, returns of training tasks before (dotted) and after the update against iterations; right, of test
    tasks against updates, 95 % intervals -> PNG `file`."""
    figure, (left, right) = side_by_side(2, 10, 4.6)
    methods = sorted({label(run, False) for run in runs})
    first_seed = min(run["seed"] for run in runs)
    for run in runs:
        colour = methods.index(label(run, False))
        opacity = 1.0 if run["seed"] == first_seed else 0.5
        style = {"color": f"C{colour}", "alpha": opacity}
        returns_of_training(left, run, style)
        returns_of_tests(right, run, style)
    right.set(xticks=range(len(runs[0]["scores"])))
    name_axes(left, "iterations", "return on training tasks, before (dotted) and after")
    name_axes(right, "inner updates", "return on test tasks")
    figure.legend(loc="outside lower center", fontsize="small", ncols=3)
    save(figure, f"{runs[0]['env']}\n{about}", file)


def returns_of_training(axis, run, style):
    """Draw the returns of a run's training tasks against iterations: dotted before the inner update, a line after it."""
    points = []
    try:
        for line in read_log(log_of(run)):
            returns = line["returns"]
            points.append((line["iteration"], returns[0], returns[-1]))
        iterations, before, after = thinned(points, 50).T
    except (OSError, ValueError, KeyError):
        print(f"note: {log_of(run)} cannot be read: no curve of it", file=sys.stderr)
        return
    axis.plot(iterations, after, linewidth=1.4, **style)
    axis.plot(iterations, before, ":", linewidth=1, **style)


def returns_of_tests(axis, run, style):
    """Draw the mean return of a run's test tasks against inner updates, with 95 % intervals over tasks."""
    scores = run["scores"]  # (updates + 1, tasks)
    updates = range(len(scores))
    deviations = scores.std(1, ddof=1)
    half_widths = 1.96 * deviations / math.sqrt(scores.shape[1])
    with_intervals(axis, updates, scores.mean(1), half_widths, label(run), markersize=3, **style)


def thinned(points, least):
    """Points (n, k) of a log -> means of neighbours: `least` to twice as many points, fewer and less noisy ones.

    What does not fill a mean is left out at the log's beginning.
    """
    each = max(1, len(points) // least)
    rest = len(points) % each
    points = np.array(points[rest:])
    neighbours = points.reshape(-1, each, points.shape[-1])
    return neighbours.mean(1)


def against_shots(runs, about, file):
    """ModGrad's Figure 6: accuracy against the number of shots, a line for each configuration -> PNG `file`."""
    figure, (axis,) = side_by_side(1, 8, 5)
    first = runs[0]
    lines = {}
    for run in runs:
        point = run["shots"], *score(run, "paper", first["modes"])
        lines.setdefault(label(run), []).append(point)
    for name in sorted(lines):
        shots, means, half_widths = zip(*sorted(lines[name]))
        with_intervals(axis, shots, means, half_widths, name)
    axis.set(xticks=sorted({run["shots"] for run in runs}))
    name_axes(axis, "shots", "accuracy in %, paper protocol, last parameters")
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    modes = " + ".join(first["modes"])
    save(figure, f"{modes}, {first['ways']}-way\n{about}", file)
