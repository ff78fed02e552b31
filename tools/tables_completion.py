"""ModGrad's tables of image completion: its Table 3."""

import math
import sys

import numpy as np

import modgrad_completion
from tools.papers import COMPLETION
from tools.reading import differing, images_of, label, read_each, table

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
    flags = differing(args, {"steps": steps, "alpha": alpha} | OPTIONS)
    row = run["method"], label({"method": "", "options": flags, "seed": None})
    data = tuple(run["modes"]), run["synthetic"], args["image_size"]
    training = run["iterations"], args["meta_batch"]
    budget = *data, args["precision"], *training, run["test_tasks"]
    column = run["order"], run["pixels"]
    errors = np.array(run["per_task"])
    return file, budget, row, column, (errors, images_of(run))


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
    if size != 32:
        about.append(f"{size} px instead of 32")
    if precision != "fp32":
        about.append(precision)
    if (iterations, batch) != (50000, 25):
        about.append(f"{iterations:,} iterations of {batch} images instead of 50,000 of 25")
    published = "; in brackets ModGrad's Table 3" if known else ""
    return (
        f"### Image completion, {' + '.join(modes)}\n\n"
        + "".join(f"**{x}.** " for x in about)
        + f"{tasks:,} test images; mean squared error over all pixels, 95 % interval over images{published}.\n\n"
        + both_tables(cells, known)
    )


def columns_of(cells):
    """{(row, column): ...} -> its columns, those of the paper first."""
    there = {column for _, column in cells}
    papers = [column for column in ORDERS if column in there]
    return papers + sorted(there - set(ORDERS))


def rows_of(cells):
    """{(row, column): ...} -> its rows, in the order of the paper's table."""
    names = list(COMPLETION)

    def place(row):
        method, _ = row
        return names.index(method) if method in names else len(names), row

    return sorted({row for row, _ in cells}, key=place)


def both_tables(cells, known):
    """Errors, and ModGrad's minus the others' -> Markdown. known: the paper has numbers for them."""
    rows = rows_of(cells)

    def error(column):
        order, pixels = column

        def cell(row):
            text = mean(cells[row, column][0]) if (row, column) in cells else "missing"
            numbers = COMPLETION.get("".join(row), {})
            if known and (pixels, order) in numbers:
                text += f" ({numbers[pixels, order]:.3f})"
            return text

        return cell

    def against(column):
        def cell(row):
            _, flags = row
            ours = cells.get((("ModGrad", flags), column))
            theirs = cells.get((row, column))
            if ours is None or theirs is None or ours[1] != theirs[1]:
                return "-"
            return mean(ours[0] - theirs[0], "+")

        return cell

    head = {column: "{1} {0} pixels".format(*column) for column in columns_of(cells)}
    errors = {"method": "".join}
    errors |= {name: error(column) for column, name in head.items()}
    text = table(rows, errors)
    others = [row for row in rows if row[0] != "ModGrad"]
    if others:
        differences = {"difference, image by image": lambda row: f"ModGrad{row[1]} - {''.join(row)}"}
        differences |= {name: against(column) for column, name in head.items()}
        text += "\n" + table(others, differences)
    return text


def mean(errors, sign=""):
    """Errors of images -> their mean and 95 % interval, as text."""
    half_width = 1.96 * errors.std(ddof=1) / math.sqrt(len(errors))
    return f"{errors.mean():{sign}.4f} ± {half_width:.4f}"
