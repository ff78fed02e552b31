"""Figures. Matplotlib is imported only when one is drawn, because nothing else needs it."""

import importlib.util
import io
import textwrap

import numpy as np
import torch

from fewshot.files import atomic_write

DPI = 110  # pixels per inch of a figure's size


def installed():
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def pyplot():
    """Matplotlib's pyplot, for files, not for windows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# ------------------------------------------------------------------------------------- the curves of a run


def run_curves(lines, title, file):
    """Draw what a run logged against iterations: its loss; and accuracy per mode, or returns, with validation as dots.

    (Not of image completion, which has an error in place of an accuracy.)
    lines: of log.jsonl, as dicts. file: where the PNG goes, a path or an open file.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 3.8), layout="constrained")
    of = max(1, len(lines) // 100)  # 100 to 199 points of a long log: fewer, less noisy ones
    draw_losses(left, lines, of)
    draw_scores(right, lines, of)
    for axis in (left, right):
        axis.set_xlabel("iterations")
        axis.grid(alpha=0.3)
    if right.get_lines():
        figure.legend(fontsize="small", loc="outside right center")
    plain = title.replace("$", r"\$")  # a mode's name is no formula
    broken = textwrap.fill(plain, 120)
    figure.suptitle(broken, fontsize="medium")
    figure.savefig(file, dpi=DPI, format="png")
    plt.close(figure)


def draw_losses(axis, lines, of):
    """Draw the loss on training tasks, `of` logged lines per point."""
    iterations = [line["iteration"] for line in lines]
    losses = [line["loss"] for line in lines]
    axis.plot(smooth(iterations, of), smooth(losses, of), color="black", linewidth=1.3)
    axis.set_ylabel("loss on training tasks")


def draw_scores(axis, lines, of):
    """Draw accuracies or returns: on training tasks a curve, `of` logged lines per point; on validation tasks dots."""
    colours = {}
    for name, values in scores_of(lines).items():
        (curve,) = axis.plot(*points(lines, values, of), linewidth=1.3, label=name)
        colours[name] = curve.get_color()
    dots = {"linestyle": ":", "marker": "o", "markersize": 4}
    for name, (iterations, means) in validation_of(lines).items():
        colour = colours.get(name, "black")
        axis.plot(iterations, means, label=f"{name}, validation", color=colour, **dots)
    axis.set_ylabel("return" if "returns" in lines[0] else "accuracy, %")


def smooth(values, of):
    """Means of `of` successive values; those at the beginning that fill no group are left out."""
    left_out = len(values) % of
    groups = np.array(values[left_out:]).reshape(-1, of)
    return groups.mean(1)


def points(lines, values, of):
    """Iterations and values of the lines that have a value, smoothed."""
    pairs = []
    for line, value in zip(lines, values):
        if value is not None:
            pairs.append((line["iteration"], value))
    iterations, found = zip(*pairs)
    of = min(of, len(found))
    return smooth(iterations, of), smooth(found, of)


def scores_of(lines):
    """What a log says of training tasks beside the loss -> {name: a value, or None, for each line}."""
    if "returns" in lines[0]:
        returns = [line["returns"] for line in lines]
        return {
            "before adapting": [each[0] for each in returns],
            "after adapting": [each[-1] for each in returns],
        }
    if lines[0].get("accuracy") is None:
        return {}
    accuracies = [line["accuracy"] for line in lines]
    if not isinstance(accuracies[0], dict):
        return {"training tasks": accuracies}
    scores = {}
    for name in sorted(set().union(*accuracies)):
        scores[name] = [accuracy.get(name) for accuracy in accuracies]
    return scores


def validation_of(lines):
    """What a log says of validation tasks, by the paper's protocol -> {name: (iterations, means)}."""
    found = {}
    for line in lines:
        for name, summary in summaries_of(line).items():
            if isinstance(summary, dict) and isinstance(summary.get("mean"), float):
                iterations, means = found.setdefault(name, ([], []))
                iterations.append(line["iteration"])
                means.append(summary["mean"])
    return found


def summaries_of(line):
    """What one line of a log says of validation tasks -> {name: summary}, by the names of `scores_of`."""
    measured = line.get("validation", {})
    if isinstance(measured, list):  # of reinforcement learning: returns before and after each update
        return {"before adapting": measured[0], "after adapting": measured[-1]}
    measured = measured.get("paper", measured.get("accuracy", {}))
    if isinstance(measured.get("mean"), float):  # one summary, not one per mode
        return {"training tasks": measured}
    return measured


# --------------------------------------------------------------------------------- figures of transference


def histogram(found, file, about):
    """Draw Figure 1 and 5: how often each loss ratio occurs, a panel for each moment."""
    moments = list(dict.fromkeys(row["moment"] for row in found))
    figure, axes = row_of_panels(len(moments), 7, 4.2)
    for moment, axis in zip(moments, axes):
        rows = [row for row in found if row["moment"] == moment]
        draw_ratios(axis, rows)
        axis.set_title(moment)
    save_figure(figure, file, about, 70 * len(moments))


def draw_ratios(axis, rows):
    """Draw how often each loss ratio occurs in some states of a network, one moment's rows."""
    ratios = [np.ravel(row["LR"]) for row in rows]
    low, high = np.percentile(np.concatenate(ratios), (0.5, 99.5))
    first = min(low, 0.999)  # a ratio of 1 is always inside
    last = max(high, 1.001)
    bins = np.linspace(first, last, 61)
    for row, values in zip(rows, ratios):
        inside = np.clip(values, bins[0], bins[-1])
        label = f"{row['state']}: {legend_of(row)}"
        axis.hist(inside, bins, alpha=0.45, density=True, label=label)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("loss ratio LR: below 1 the source task helped (tails in the outermost bars)")
    axis.set_ylabel("density of (source, target) pairs")
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    axis.legend(fontsize="x-small", frameon=False, **below)


def legend_of(row):
    """The shares of a state, as a figure's legend has them."""
    shares = row["all"]
    parts = []
    for name, key in (("P", "positive"), ("N", "negative"), ("Nu", "neutral")):
        if shares[key]:
            parts.append(f"{name} {shares[key][0]:.0f} %")
    return ", ".join(parts) or f"LR < 1: {shares['below_one'][0]:.0f} %"


def panels(rows, file):
    """Draw tasks, [(title, Task), ...]: the support images of each, a column for each class."""
    _, task = rows[0]
    ways = len(task.support_y.unique())
    shots = len(task.support_x) // ways
    height = 10 * shots / ways * 0.9 + 0.4
    shape = {"figsize": (10, height * len(rows)), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(len(rows), 1, **shape)
    for axis, (title, task) in zip(axes[:, 0], rows):
        axis.imshow(mosaic(task.support_x.cpu(), ways, shots))
        axis.set_title(title, fontsize="small")
        axis.axis("off")
    write_figure(figure, file)


def mosaic(images, ways, shots):
    """Lay out images (ways * shots, 3, S, S), sorted by class, a column for each class, white lines between -> (H, W, 3)."""
    size = images.shape[-1]
    cell = size + 2
    tiles = torch.ones(shots, ways, 3, cell, cell)
    by_class = images.view(ways, shots, 3, size, size)
    tiles[..., 1:-1, 1:-1] = by_class.transpose(0, 1)
    rows = tiles.permute(0, 3, 1, 4, 2)  # (shots, cell, ways, cell, 3)
    return rows.reshape(shots * cell, ways * cell, 3).numpy()


def curves(along, file, about):
    """Draw Figure 2: loss ratios of source tasks to one target, along training."""
    figure, axes = row_of_panels(len(along), 6, 4, sharey=True)
    for axis, (name, rows) in zip(axes, along.items()):
        draw_ratios_along(axis, rows)
        axis.set_title(name)
    save_figure(figure, file, about, 60 * len(along))


def draw_ratios_along(axis, rows):
    """Draw one network's loss ratios: most of the source tasks, their median, and two single ones."""
    iterations = [row["iteration"] for row in rows]
    LR = np.array([row["LR"] for row in rows])  # (iterations, source tasks)
    low, high = np.percentile(LR, (10, 90), axis=1)
    axis.fill_between(iterations, low, high, alpha=0.25, label="80 % of the source tasks")
    axis.plot(iterations, np.median(LR, 1), label="their median", linewidth=1)
    for which, style in (("best", "--"), ("worst", ":")):
        source = rows[0][which]
        label = f"the source task that is {which} halfway in training"
        axis.plot(iterations, LR[:, source], style, label=label, linewidth=1.5)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xlabel("training iterations")
    axis.set_ylabel("LR to one target task")
    axis.legend(fontsize="x-small")


# ------------------------------------------------------------------------------------ laying out and writing


def row_of_panels(count, width, height, **more):
    """Make a figure of panels side by side, each of this width and height in inches -> the figure and its axes."""
    shape = {"figsize": (width * count, height), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(1, count, **shape, **more)
    return figure, axes[0]


def save_figure(figure, file, about, width):
    """Give a figure its title, broken into lines of `width` letters, and write it."""
    figure.suptitle(textwrap.fill(about, width), fontsize="medium")
    write_figure(figure, file)


def write_figure(figure, file):
    """Write a figure as PNG, whole or not at all, and forget it."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    pyplot().close(figure)
    atomic_write(file, content.getvalue())
