"""Figures. Matplotlib is imported only when one is drawn, because nothing else needs it."""

import importlib.util
import io
import textwrap

import numpy as np
import torch

from fewshot.files import atomic_write


def installed():
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def pyplot():
    """Matplotlib's pyplot, for files, not for windows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def run_curves(lines, title, file):
    """Draw what a run logged against iterations: its loss; and accuracy per mode, or returns, with validation as dots.

    (Not of image completion, which has an error in place of an accuracy.)
    lines: of log.jsonl, as dicts. file: where the PNG goes, a path or an open file.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 3.8), layout="constrained")
    of = max(1, len(lines) // 100)  # 100 to 199 points of a long log: fewer, less noisy ones
    t = smooth([line["iteration"] for line in lines], of)
    left.plot(t, smooth([line["loss"] for line in lines], of), color="black", linewidth=1.3)
    left.set_ylabel("loss on training tasks")
    colours = {}
    for name, values in scores_of(lines).items():
        (drawn,) = right.plot(*points(lines, values, of), linewidth=1.3, label=name)
        colours[name] = drawn.get_color()
    for name, (iterations, means) in validation_of(lines).items():
        style = {"color": colours.get(name, "black"), "linestyle": ":", "marker": "o", "markersize": 4}
        right.plot(iterations, means, label=f"{name}, validation", **style)
    right.set_ylabel("return" if "returns" in lines[0] else "accuracy, %")
    for axis in (left, right):
        axis.set_xlabel("iterations")
        axis.grid(alpha=0.3)
    if right.get_lines():
        figure.legend(fontsize="small", loc="outside right center")
    plain = title.replace("$", r"\$")  # a mode's name is no formula
    figure.suptitle("\n".join(textwrap.wrap(plain, 120)), fontsize="medium")
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def smooth(values, of):
    """Means of `of` successive values; those at the beginning that fill no group are left out."""
    return np.array(values[len(values) % of :]).reshape(-1, of).mean(1)


def points(lines, values, of):
    """Iterations and values of the lines that have a value, smoothed."""
    pairs = [(line["iteration"], value) for line, value in zip(lines, values) if value is not None]
    iterations, found = zip(*pairs)
    of = min(of, len(found))
    return smooth(iterations, of), smooth(found, of)


def scores_of(lines):
    """What a log says of training tasks beside the loss -> {name: a value, or None, for each line}."""
    if "returns" in lines[0]:
        return {
            "before adapting": [line["returns"][0] for line in lines],
            "after adapting": [line["returns"][-1] for line in lines],
        }
    first = lines[0].get("accuracy")
    if first is None:
        return {}
    if not isinstance(first, dict):
        return {"training tasks": [line["accuracy"] for line in lines]}
    names = sorted({name for line in lines for name in line["accuracy"]})
    return {name: [line["accuracy"].get(name) for line in lines] for name in names}


def validation_of(lines):
    """What a log says of validation tasks, by the paper's protocol -> {name: (iterations, means)}."""
    found = {}
    for line in lines:
        measured = line.get("validation", {})
        if isinstance(measured, list):  # of reinforcement learning: returns before and after each update
            measured = {"before adapting": measured[0], "after adapting": measured[-1]}
        else:
            measured = measured.get("paper", measured.get("accuracy", {}))
        if isinstance(measured.get("mean"), float):  # one summary, not one per mode
            measured = {"training tasks": measured}
        for name, value in measured.items():
            if isinstance(value, dict) and isinstance(value.get("mean"), float):
                iterations, means = found.setdefault(name, ([], []))
                iterations.append(line["iteration"])
                means.append(value["mean"])
    return found


def histogram(found, file, about):
    """Draw Figure 1 and 5: how often each loss ratio occurs, a panel for each moment."""
    plt = pyplot()
    moments = list(dict.fromkeys(row["moment"] for row in found))
    size = (7 * len(moments), 4.2)
    figure, axes = plt.subplots(1, len(moments), figsize=size, squeeze=False, layout="constrained")
    for moment, axis in zip(moments, axes[0]):
        rows = [row for row in found if row["moment"] == moment]
        values = np.concatenate([np.ravel(row["LR"]) for row in rows])
        low, high = np.percentile(values, (0.5, 99.5))
        bins = np.linspace(min(low, 0.999), max(high, 1.001), 61)
        for row in rows:
            inside = np.clip(np.ravel(row["LR"]), bins[0], bins[-1])
            axis.hist(inside, bins, alpha=0.45, density=True, label=f"{row['state']}: {legend_of(row)}")
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xlabel("loss ratio LR: below 1 the source task helped (tails in the outermost bars)")
        axis.set_ylabel("density of (source, target) pairs")
        axis.set_title(moment)
        axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    save_figure(figure, file, about, 70 * len(moments))


def legend_of(row):
    """The shares of a state, as a figure's legend has them."""
    parts = []
    for name, key in (("P", "positive"), ("N", "negative"), ("Nu", "neutral")):
        if row["all"][key]:
            parts.append(f"{name} {row['all'][key][0]:.0f} %")
    return ", ".join(parts) or f"LR < 1: {row['all']['below_one'][0]:.0f} %"


def panels(rows, file):
    """Draw tasks, [(title, Task), ...]: the support images of each, a column for each class."""
    plt = pyplot()
    task = rows[0][1]
    ways = len(task.support_y.unique())
    shots = len(task.support_x) // ways
    size = task.support_x.shape[-1]
    height = 10 * shots / ways * 0.9 + 0.4
    shape = {"figsize": (10, height * len(rows)), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(rows), 1, **shape)
    for axis, (title, task) in zip(axes[:, 0], rows):
        tiles = torch.ones(shots, ways, 3, size + 2, size + 2)
        images = task.support_x.cpu().view(ways, shots, 3, size, size)
        tiles[..., 1:-1, 1:-1] = images.transpose(0, 1)
        picture = tiles.permute(0, 3, 1, 4, 2).reshape(shots * (size + 2), ways * (size + 2), 3)
        axis.imshow(picture.numpy())
        axis.set_title(title, fontsize="small")
        axis.axis("off")
    write_figure(figure, file)


def curves(along, file, about):
    """Draw Figure 2: loss ratios of source tasks to one target, along training."""
    plt = pyplot()
    shape = {"figsize": (6 * len(along), 4), "squeeze": False, "layout": "constrained", "sharey": True}
    figure, axes = plt.subplots(1, len(along), **shape)
    for axis, (name, rows) in zip(axes[0], along.items()):
        t = [row["iteration"] for row in rows]
        LR = np.array([row["LR"] for row in rows])
        low, high = np.percentile(LR, (10, 90), axis=1)
        axis.fill_between(t, low, high, alpha=0.25, label="80 % of the source tasks")
        axis.plot(t, np.median(LR, 1), label="their median", linewidth=1)
        for which, style in (("best", "--"), ("worst", ":")):
            label = f"the source task that is {which} halfway in training"
            axis.plot(t, LR[:, rows[0][which]], style, label=label, linewidth=1.5)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xlabel="training iterations", ylabel="LR to one target task", title=name)
        axis.legend(fontsize="x-small")
    save_figure(figure, file, about, 60 * len(along))


def save_figure(figure, file, about, width):
    """Give a figure its title, broken into lines of `width` letters, and write it."""
    figure.suptitle(textwrap.fill(about, width), fontsize="medium")
    write_figure(figure, file)


def write_figure(figure, file):
    """Write a figure as PNG, whole or not at all, and forget it."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    pyplot().close(figure)
    atomic_write(file, content.getvalue())
