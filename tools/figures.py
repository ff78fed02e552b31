"""The figure beside a table: accuracy of the training tasks against iterations. Needs matplotlib."""

import sys

import numpy as np

from data import read_log
from tools.reading import budget_text, label, title


def curves(runs, singles, file):
    """Training accuracy of each run against iterations, a panel a mode -> PNG `file`. Points are means over log lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    modes = runs[0]["modes"]
    figure, panels = plt.subplots(
        1, len(modes), figsize=(5 * len(modes) + 2, 4), squeeze=False, layout="constrained"
    )
    alone = [run for (_, mode), run in singles.items() if mode in modes and len(modes) > 1]
    styles = {
        name: {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        for i, name in enumerate(sorted({label(run) for run in [*runs, *alone]}))
    }
    for mode, axis in zip(modes, panels[0]):
        for run in (run for run in sorted([*runs, *alone], key=label) if mode in run["modes"]):
            log = run["file"].parent / "log.jsonl"
            lines = read_log(log)
            if not lines:
                print(f"note: {log} cannot be read: no curve of it", file=sys.stderr)
                continue
            lines = [
                (line["iteration"], line["accuracy"][mode]) for line in lines if mode in line["accuracy"]
            ]
            of = max(1, len(lines) // 40)  # at most about 40 points: fewer, less noisy ones
            points = np.array(lines[len(lines) % of :]).reshape(-1, of, 2).mean(1)
            axis.plot(*points.T, **styles[label(run)], label=label(run).replace("`", ""), linewidth=1.3)
        axis.set(title=mode, xlabel="iterations", ylabel="accuracy on training tasks, %")
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in panels[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside right center", fontsize="small")
    about = budget_text(runs[0]["budget"], runs[0]["family"]).replace("**", "")
    figure.suptitle(f"{title(runs[0])}\n{about}".strip(), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)
