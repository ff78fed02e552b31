"""ModGrad's tables of image completion: its Table 3."""

import math
import sys

import numpy as np

import modgrad_completion
from tools.papers import COMPLETION
from tools.reading import images_of, label, read_each, table

OPTIONS = {
    "rank": 5,
    "context": 128,
    "hidden": 128,
    "inner_clip": 10.0,
    "first_order": False,
    "lr": 1e-3,
    "lr_halve_every": 0,
    "start_at_one": False,
    "seed": 0,
}
ORDERS = [("random", 10), ("random", 100), ("ordered", 10), ("ordered", 100)]  # the paper's columns


def read_run(file, run):
    """A result file and its content -> (file, budget, row, column, (errors of its images, what the images are)); None: another script's.

    Runs of one budget stand in one table. A row is (method, its flags), a column (order, number of pixels).
    """
    if "pixels" not in run:
        return None
    args = run["args"]
    steps, alpha, _ = modgrad_completion.DEFAULTS[args["algorithm"]]
    usual = {"steps": steps, "alpha": alpha} | OPTIONS
    flags = {k: args[k] for k, v in usual.items() if args.get(k, v) != v}
    row = run["method"], label({"method": "", "options": flags, "seed": None})
    steps = run["iterations"], args["meta_batch"], run["test_tasks"]
    budget = (tuple(run["modes"]), run["synthetic"], args["image_size"], args["precision"], *steps)
    return file, budget, row, (run["order"], run["pixels"]), (np.array(run["per_task"]), images_of(run))


def completion_tables(folders):
    """The runs of modgrad_completion.py under the folders -> parts of tables.md: ModGrad's Table 3, one for each budget."""
    groups = {}
    for file, budget, row, column, errors in read_each(folders, read_run):
        cells = groups.setdefault(budget, {})
        if (row, column) in cells:
            print(f"note: {file} repeats another run and is left out", file=sys.stderr)
        cells.setdefault((row, column), errors)
    return [block(budget, cells) for budget, cells in sorted(groups.items())]


def block(budget, cells):
    """{(row, column): errors and images} of one budget -> Markdown: errors, then differences from ModGrad, image by image."""
    modes, synthetic, size, precision, iterations, batch, tasks = budget
    known = modes == ("celeba",) and not synthetic
    about = ["Synthetic images"] if synthetic else []
    about += [f"{size} px instead of 32"] if size != 32 else []
    about += [precision] if precision != "fp32" else []
    if (iterations, batch) != (50000, 25):
        about.append(f"{iterations:,} iterations of {batch} images instead of 50,000 of 25")
    published = "; in brackets ModGrad's Table 3" if known else ""
    return (
        f"### Image completion, {' + '.join(modes)}\n\n"
        + "".join(f"**{x}.** " for x in about)
        + f"{tasks:,} test images; mean squared error over all pixels, 95 % interval over images{published}.\n\n"
        + both_tables(cells, known)
    )


def both_tables(cells, known):
    """Errors, and ModGrad's minus the others' -> Markdown. known: the paper has numbers for them."""
    shown = [order for order in ORDERS if any(order == column for _, column in cells)]
    shown += sorted({column for _, column in cells} - set(ORDERS))
    names = list(COMPLETION)
    rows = sorted(
        {row for row, _ in cells},
        key=lambda row: (names.index(row[0]) if row[0] in names else len(names), row),
    )

    def error(column):
        def cell(row):
            numbers = COMPLETION.get("".join(row), {})
            published = f" ({numbers[column[::-1]]:.3f})" if known and column[::-1] in numbers else ""
            return (mean(cells[row, column][0]) if (row, column) in cells else "missing") + published

        return cell

    def against(column):
        def cell(row):
            ours, theirs = (cells.get((x, column)) for x in (("ModGrad", row[1]), row))
            comparable = ours is not None and theirs is not None and ours[1] == theirs[1]
            return mean(ours[0] - theirs[0], "+") if comparable else "-"

        return cell

    head = {(order, pixels): f"{pixels} {order} pixels" for order, pixels in shown}
    errors = {"method": "".join} | {head[column]: error(column) for column in shown}
    text = table(rows, errors)
    others = [row for row in rows if row[0] != "ModGrad"]
    if others:
        differences = {"difference, image by image": lambda row: f"ModGrad{row[1]} - {''.join(row)}"}
        differences |= {head[column]: against(column) for column in shown}
        text += "\n" + table(others, differences)
    return text


def mean(errors, sign=""):
    """Errors of images -> their mean and 95 % interval, as text."""
    return f"{errors.mean():{sign}.4f} ± {1.96 * errors.std(ddof=1) / math.sqrt(len(errors)):.4f}"
