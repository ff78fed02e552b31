"""The figures beside the tables. They need matplotlib."""

import math
import sys

import numpy as np

from data import read_log
from tools.reading import budget_text, label, score, title

KINDS_OF_LINES = ("-", "--", ":", "-.")


def curves(runs, singles, file):
    """Training accuracy of each run against iterations, a panel per mode -> PNG `file`. Points are means over log lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    modes = runs[0]["modes"]
    figure, panels = plt.subplots(
        1, len(modes), figsize=(5 * len(modes) + 2, 4), squeeze=False, layout="constrained"
    )
    alone = [run for (_, mode), run in singles.items() if mode in modes and len(modes) > 1]
    shown = sorted([*runs, *alone], key=label)
    methods = sorted({label(run, False) for run in shown})
    seeds = sorted({run["seed"] for run in shown})

    def style(run):
        """A colour for each method, a kind of line for each seed."""
        turn, colour = divmod(methods.index(label(run, False)), 10)
        kind = (seeds.index(run["seed"]) + turn) % len(KINDS_OF_LINES)
        return {"color": f"C{colour}", "linestyle": KINDS_OF_LINES[kind]}

    for mode, axis in zip(modes, panels[0]):
        for run in (run for run in shown if mode in run["modes"]):
            log = run["file"].parent / "log.jsonl"
            points = []
            for line in read_log(log):
                if mode in line.get("accuracy", {}):
                    points.append((line["iteration"], line["accuracy"][mode]))
            if not points:
                print(f"note: {log} cannot be read: no curve of it", file=sys.stderr)
                continue
            name = label(run).replace("`", "")
            axis.plot(*thinned(points, 40).T, **style(run), label=name, linewidth=1.3)
        axis.set(title=mode, xlabel="iterations", ylabel="accuracy on training tasks, %")
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in panels[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside right center", fontsize="small")
    about = budget_text(runs[0]["budget"], runs[0]["family"]).replace("**", "")
    figure.suptitle(f"{title(runs[0])}\n{about}".strip(), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def against_steps(runs, about, file):
    """ModGrad's Figure 5: training loss and accuracy on held-out drawings against steps on new alphabets -> PNG `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for name, run in runs.items():
        name = name.replace("`", "")
        mean, half = (np.array(run["curve"][k]) for k in ("mean", "ci95"))
        left.plot(range(len(mean)), mean, label=name, linewidth=1.3)
        left.fill_between(range(len(mean)), mean - half, mean + half, alpha=0.15)
        right.errorbar(
            run["after"]["steps"],
            run["after"]["mean"],
            run["after"]["ci95"],
            marker="o",
            capsize=2,
            label=name,
        )
    top = 1.2 * max(run["curve"]["mean"][0] for run in runs.values())  # what diverges leaves the picture
    left.set(xlabel="steps made", ylabel="loss of the next training batch", ylim=(0, top))
    right.set(xlabel="steps made", ylabel="accuracy on held-out drawings, %, paper protocol", xscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", fontsize="small", ncols=3)
    figure.suptitle(f"Alphabets not trained on\n{about}".strip(), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def rl_curves(runs, about, file):
    """ModGrad's Figure 8: left, returns of training tasks before (dotted) and after the update against iterations; right, of test
    tasks against updates, 95 % intervals -> PNG `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    methods = sorted({label(run, False) for run in runs})
    first_seed = min(run["seed"] for run in runs)
    for run in runs:
        style = {
            "color": f"C{methods.index(label(run, False))}",
            "alpha": 1.0 if run["seed"] == first_seed else 0.5,
        }
        returns_of_training(left, run, style)
        returns_of_tests(right, run, style)
    left.set(xlabel="iterations", ylabel="return on training tasks, before (dotted) and after")
    right.set(xlabel="inner updates", ylabel="return on test tasks", xticks=range(len(runs[0]["scores"])))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small", ncols=3)
    figure.suptitle(f"{runs[0]['env']}\n{about}".strip(), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def returns_of_training(axis, run, style):
    """Draw the returns of a run's training tasks against iterations: dotted before the inner update, a line after it."""
    log = run["file"].parent / "log.jsonl"
    try:
        points = [(line["iteration"], line["returns"][0], line["returns"][-1]) for line in read_log(log)]
        iterations, before, after = thinned(points, 50).T
    except (OSError, ValueError, KeyError):
        print(f"note: {log} cannot be read: no curve of it", file=sys.stderr)
        return
    axis.plot(iterations, after, linewidth=1.4, **style)
    axis.plot(iterations, before, ":", linewidth=1, **style)


def returns_of_tests(axis, run, style):
    """Draw the mean return of a run's test tasks against inner updates, with 95 % intervals over tasks."""
    scores = run["scores"]  # (updates + 1, tasks)
    updates = range(len(scores))
    half_widths = 1.96 * scores.std(1, ddof=1) / math.sqrt(scores.shape[1])
    name = label(run).replace("`", "")
    axis.errorbar(
        updates, scores.mean(1), half_widths, capsize=2, marker="o", markersize=3, label=name, **style
    )


def thinned(points, least):
    """Points (n, k) of a log -> means of neighbours: `least` to twice as many points, fewer and less noisy ones.

    What does not fill a mean is left out at the log's beginning.
    """
    each = max(1, len(points) // least)
    points = np.array(points[len(points) % each :])
    return points.reshape(-1, each, points.shape[-1]).mean(1)


def against_shots(runs, about, file):
    """ModGrad's Figure 6: accuracy against the number of shots, a line for each configuration -> PNG `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in sorted({label(run) for run in runs}):
        of = sorted((run["shots"], *score(run, "paper", run["modes"])) for run in runs if label(run) == name)
        axis.errorbar(
            *zip(*((shots, mean) for shots, mean, _ in of)),
            [half for *_, half in of],
            marker="o",
            capsize=2,
            label=name.replace("`", ""),
        )
    axis.set(
        xlabel="shots",
        ylabel="accuracy in %, paper protocol, last parameters",
        xticks=sorted({run["shots"] for run in runs}),
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    figure.suptitle(
        f"{' + '.join(runs[0]['modes'])}, {runs[0]['ways']}-way\n{about}".strip(),
        fontsize="medium",
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)
