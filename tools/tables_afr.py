"""The tables of attentive feature reuse."""

import importlib.util
import itertools
from typing import NamedTuple

import numpy as np

import afr
from data import read_log
from tools.figures import curves, legend_of, log_of, name_axes, plain, save, side_by_side
from tools.papers import AFR_TABLE1, AFR_TABLE2, AFR_TRANSFER
from tools.reading import (
    SHORT_UNITS,
    UNITS,
    differing,
    headed,
    images_of,
    in_bold,
    label,
    read_each,
    setting_text,
    show,
    table,
)

AFR_BUDGET = {"image_size": 84, "queries": 15, "precision": "fp32", "iterations": 60000, "meta_batch": 4}
AFR_ORDER = ("classification", "depth", "vanishing", "normals")  # of columns, the paper's
MEASURES = ("cross-entropy", "NIL")  # of classification, in the paper's Table 2
BY_PROTOCOL = (afr.KEYS[:2], afr.KEYS[2:])  # of accuracy, and of NIL or error: paper protocol, inductive
OPTIONS = {
    "steps": 5,
    "lr": 1e-3,
    "attention_lr": 1e-3,
    "lr_halve_every": 0,
    "inner_clip": 20.0,
    "first_order": False,
    "head": "modulated",
    "embed": "support",
    "attention_blocks": 2,
    "attention_width": 16,
    "kl_weight": 1.0,
}


def read_afr(folders):
    """All runs of afr.py under the folders -> list of dicts (see read_run)."""
    return read_each(folders, read_run)


def read_run(file, run):
    """A result file and its content -> what the tables need of it; None if it is of another script.

    `scores`: {(measure, stratum or transfer mode): array over tasks}, where a measure is one of afr.KEYS; `data`: {stratum or
    mode: what its images were made from}.
    """
    if "nil_or_error" not in run:
        return None
    args = run["args"]
    budget = args | {"iterations": run["iterations"]}
    return {
        "method": run["method"],
        "options": flags_of(args),
        "seed": args["seed"],
        "first_seed": 0,
        "modes": run["modes"],
        "tasks": args["tasks"],
        "filters": args["filters"],
        "ways": run["ways"],
        "shots": run["shots"],
        "file": file,
        "synthetic": run["synthetic"],
        "budget": tuple((k, budget[k]) for k in AFR_BUDGET),
        "scores": scores_of(run),
        "domains": run["domains"],
        "data": images_by_stratum(run),
        "transfer": list(run["transfer"]),
        "parameters": sum(run["parameters"].values()),
        "seconds": run["seconds_per_iteration"],
        "test_tasks": run["test_tasks"],
    }


def flags_of(args):
    """The flags of a run that differ from the defaults -> dict."""
    alpha = [afr.ALPHA[kind] for kind in args["tasks"]]
    if args["algorithm"] == "maml":
        alpha = [0.01 for kind in args["tasks"]]
    weights = [afr.LOSS_WEIGHTS[kind] for kind in args["tasks"]]
    flags = differing(args, OPTIONS | {"alpha": alpha, "loss_weights": weights})
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = " ".join(map(str, value))
    return flags


def scores_of(run):
    """{(measure, stratum or transfer mode): array over tasks} of a result."""
    strata = run["strata"]
    scores = {}
    for key, name in zip(afr.KEYS, afr.PER_TASK):
        for i, stratum in enumerate(strata):  # which take turns
            scores[key, stratum] = np.array(run[name][i :: len(strata)])
        for mode, found in run["transfer"].items():
            scores[key, mode] = np.array(found[name])
    return scores


def images_by_stratum(run):
    """{stratum or transfer mode: what its images were made from} of a result."""
    strata = run["strata"]
    of_high_level_tasks = strata == run["args"]["tasks"]  # else strata are modes
    images = images_of(run)
    if of_high_level_tasks:
        data = dict.fromkeys(strata, images[0])
    else:
        data = dict(zip(strata, images))
    for mode, found in run["transfer"].items():
        data[mode] = images_of(run | found)[0]
    return data


def afr_about(run):
    """What is not the paper's data, and what is not the default budget -> Markdown."""
    budget = dict(run["budget"])
    words = []
    for key in ("image_size", "queries", "precision"):
        if budget[key] != AFR_BUDGET[key]:
            words.append(f"{budget[key]} {UNITS[key]} instead of {AFR_BUDGET[key]}")
    if any(budget[key] != AFR_BUDGET[key] for key in ("iterations", "meta_batch")):
        ours = "{iterations:,} iterations of {meta_batch} subtasks".format(**budget)
        default = "{iterations:,} of {meta_batch}".format(**AFR_BUDGET)
        words.append(f"{ours} instead of our default's {default}")
    images = "Synthetic images" if run["synthetic"] else ""
    if "scenes" in run["modes"]:
        images = "Ray-cast scenes, not MMT; synthetic"
    return in_bold([images, ", ".join(words)])


def afr_score(run, key, name, sign="", minus=None):
    """A cell: mean and interval of a measure of a stratum or a transfer mode; or of its paired difference from another run's."""
    values = run["scores"].get((key, name))
    if minus is not None:
        values = gains(run, minus, key, name)
    if values is None:
        return show(None)
    found = afr.summary(values, [name], run["domains"])[name]
    return show((found["mean"], found["ci95"]), sign)


PAIRS = (
    ("ANIL", "MAML"),
    ("AM", "MAML"),
    ("AM", "ANIL"),
    ("P-AM", "ANIL"),
    ("P-AM", "AM"),
    ("AM, constant", "ANIL"),
    ("AM", "AM, constant"),
)


def gains(one, two, key, name):
    """A measure of run one minus that of two, task by task: task j is the same in every run -> array, or None where there is none."""
    x = one["scores"].get((key, name))
    y = two["scores"].get((key, name))
    if x is None or y is None or one["data"][name] != two["data"][name]:
        return None
    return x[: len(y)] - y[: len(x)]


def both_tables(about, title, first, second):
    """Two tables, each (rows, columns), under a title -> Markdown; the second is left out where it has no rows."""
    parts = [headed(title, about), table(*first)]
    rows, columns = second
    if rows:
        parts.append(table(rows, columns))
    return "\n".join(parts)


def afr_classification(runs):
    """Runs of one setting -> Markdown: Table 2, left (1 or 5 shots) and right (cross-entropy and NIL, transfer)."""
    first = runs[0]
    order = list(afr.METHODS.values())

    def place(run):
        return order.index(run["method"]), run["filters"], label(run)

    runs = sorted(runs, key=place)
    counts = sorted({run["test_tasks"] for run in runs})
    tasks = " or ".join(f"{n:,}" for n in counts)
    about = [
        afr_about(first),
        f"{tasks} test tasks; accuracy in %, 95 % interval over tasks; each cell paper protocol / inductive.",
    ]
    title = setting_text(first["modes"], first["ways"], first["shots"])
    columns, differences = classification_columns(runs)
    return both_tables(about, title, (runs, columns), (compared(runs), differences))


def curves_file(run):
    """The name of the figure of accuracy against iterations, of runs of the setting and budget of `run`."""
    budget = dict(run["budget"])
    words = ["synthetic"] if run["synthetic"] else []
    words += ["+".join(run["modes"]), f"{run['ways']}way", f"{run['shots']}shot"]
    for key in ("image_size", "queries", "precision"):
        if budget[key] != AFR_BUDGET[key]:
            words.append(f"{budget[key]}{SHORT_UNITS[key]}")
    words.append("{iterations}x{meta_batch}".format(**budget))
    return f"curves-afr-{'-'.join(words)}.png"


def named(run, seed=True):
    """A run's label, with its filters where they are not 32."""
    return label(run, seed) + (f", {run['filters']} filters" if run["filters"] != 32 else "")


def cell_of(name, keys):
    """Of a stratum or a transfer mode, the cell that shows measures `keys` of a run -> function of the run."""
    return lambda run: " / ".join(afr_score(run, key, name) for key in keys)


def minus_of(name, keys):
    """Of a stratum or a transfer mode, the cell that shows differences in measures `keys` -> function of a pair of runs."""

    def cell(pair):
        one, two = pair
        return " / ".join(afr_score(one, key, name, "+", two) for key in keys)

    return cell


def published_in_table2(first, stratum, i):
    """The paper's column of a stratum and MEASURES[i] -> {head: function of a run}, {} if it has none. first: a run of the table."""
    papers_task = first["modes"] == ["miniimagenet"] and first["ways"] == 5 and first["shots"] in (1, 5)
    if not papers_task or first["synthetic"]:
        return {}
    shots = (1, 5).index(first["shots"])  # where they stand in the paper's pairs
    what = MEASURES[i]

    def cell(run):
        if run["options"] or run["filters"] != 32:
            return "-"
        if stratum == "miniimagenet":
            return AFR_TABLE2[run["method"]]["M"][shots][i]
        return AFR_TRANSFER[run["method"]][i]

    if stratum == "miniimagenet":
        return {f"paper's Table 2, {what}": cell}
    if first["shots"] == 1:
        return {f"paper, mini-Places, {what}": cell}
    return {}


def classification_columns(runs):
    """The columns of a table of accuracies, and of one of differences -> two dicts {head: function that makes a cell}."""
    modes = runs[0]["modes"]
    transfer = [mode for run in runs for mode in run["transfer"]]
    columns = {"method": named}
    differences = {"difference, task by task": lambda pair: f"{named(pair[0])} - {named(pair[1])}"}
    for stratum in [*modes, *dict.fromkeys(transfer)]:
        where = f"{stratum}, " if len(modes) > 1 else ""
        if stratum not in modes:
            where = f"transfer to {stratum}, "
        for i, what in enumerate(MEASURES):
            keys = BY_PROTOCOL[i]
            columns[where + what] = cell_of(stratum, keys)
            differences[where + what] = minus_of(stratum, keys)
            columns |= published_in_table2(runs[0], stratum, i)
    columns["parameters"] = lambda run: f"{run['parameters']:,}"
    columns["s per iteration"] = lambda run: f"{run['seconds']:.2g}"
    return columns, differences


def compared(runs):
    """Which runs to compare: those of PAIRS that differ in nothing else -> list of pairs."""
    plain = {}
    for run in runs:
        others = run["filters"], run["seed"]
        if not run["options"]:
            plain[(run["method"], *others)] = run
        elif run["options"] == {"embed": "constant"}:
            plain[(f"{run['method']}, constant", *others)] = run
    found = []
    for others in dict.fromkeys(key[1:] for key in plain):
        for one, two in PAIRS:
            if (one, *others) in plain and (two, *others) in plain:
                found.append((plain[one, *others], plain[two, *others]))
    return found


class Row(NamedTuple):
    """What the runs in a row of Table 1 have in common."""

    kind: str  # single or multi meta-task
    some: str  # of a multi meta-task: which high-level tasks, where not all four
    method: str
    name: str  # the method with its flags
    filters: int
    seed: int

    def __str__(self):
        some = f" ({self.some})" if self.some else ""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.kind} meta-task{some}, {self.name}, {self.filters} filters{seed}"


def row_of(run):
    """The row of Table 1 that a run belongs to."""
    tasks = run["tasks"]
    kind = "multi" if len(tasks) > 1 else "single"
    some = "+".join(tasks) if 1 < len(tasks) < 4 else ""
    name = label(run, False)
    return Row(kind, some, run["method"], name, run["filters"], run["seed"])


def rows_of(runs):
    """Runs, single and multi meta-task -> {Row: {high-level task: its run}}: a row of single meta-tasks has a run for each."""
    rows = {}
    for run in runs:
        group = rows.setdefault(row_of(run), {})
        for task in run["tasks"]:
            group.setdefault(task, run)
    methods = list(afr.METHODS.values())

    def place(row):
        method = methods.index(row.method)
        others = map(str, (row.name, row.filters, row.seed))
        return row.kind != "single", row.some, method, *others

    return {row: rows[row] for row in sorted(rows, key=place)}


def on_the_same_tasks(rows, tasks):
    """Cut the scores of each high-level task to the test tasks that every run has; changes `rows`."""
    for task in tasks:
        holders = [group for group in rows.values() if task in group]
        counts = []
        for group in holders:
            scores = group[task]["scores"]
            counts += [len(scores[key, task]) for key in afr.KEYS]
        count = min(counts)
        for group in holders:
            cut = dict(group[task]["scores"])
            for key in afr.KEYS:
                cut[key, task] = cut[key, task][:count]
            group[task] = group[task] | {"scores": cut}


def rows_to_compare(rows):
    """Pairs of rows: attention against none or another, and multi meta-task against single, where they differ in nothing else."""
    methods = (("AM", "ANIL"), ("P-AM", "ANIL"), ("P-AM", "AM"))
    found = []
    for one, two in itertools.permutations(rows, 2):
        if one[4:] != two[4:]:  # filters, seed
            continue
        attention = one[:2] == two[:2] and (one.name, two.name) in methods
        kinds = one.kind, two.kind
        several = kinds == ("multi", "single") and one[2:] == two[2:]
        if attention or several:
            found.append((one, two))
    return found


def published_in_table1(task, i):
    """The cell that shows the paper's number of a high-level task; i: 0 accuracy, 1 error -> function of a row."""

    def cell(row):
        by_method = AFR_TABLE1.get(row.kind, {})
        numbers = by_method.get(row.name, {}).get(row.filters)
        if numbers is None or row.some:
            return "-"
        number = numbers[AFR_ORDER.index(task)][i]
        if i and task != "depth":
            number *= 1000  # to thousandths, which those of depth are in already
        return f"{number:.4g}"

    return cell


def multi_columns(rows, tasks):
    """The columns of Table 1, and of its differences -> two dicts {head: function that makes a row's, or a pair's, cell}."""
    columns = {"run": str}
    differences = {"difference, task by task": lambda pair: f"{pair[0]} - {pair[1]}"}

    def cell(task, keys):
        of_run = cell_of(task, keys)
        return lambda row: of_run(rows[row][task]) if task in rows[row] else "-"

    def minus(task, keys):
        of_runs = minus_of(task, keys)

        def of(pair):
            runs = [rows[row].get(task) for row in pair]
            return of_runs(runs) if all(runs) else "-"

        return of

    for task in tasks:
        second = "NIL" if task == "classification" else "error"
        for i, what in enumerate(("accuracy", second)):
            keys = BY_PROTOCOL[i]
            columns[f"{task}, {what}"] = cell(task, keys)
            differences[f"{task}, {what}"] = minus(task, keys)
            if what != "NIL":
                columns[f"MMT, {task}, {what}"] = published_in_table1(task, i)
    return columns, differences


def in_papers_order(tasks):
    """High-level tasks, each once, in the order of the paper's columns -> list."""
    return [task for task in AFR_ORDER if task in tasks]


def afr_multi(runs):
    """Runs of one setting, single and multi meta-task -> Markdown: Table 1."""
    first = runs[0]
    rows = rows_of(runs)
    tasks = in_papers_order({task for group in rows.values() for task in group})
    on_the_same_tasks(rows, tasks)
    columns, differences = multi_columns(rows, tasks)
    setting = f"{first['ways']}-way {first['shots']}-shot"
    about = [
        afr_about(first),
        "*Accuracy* in % (of regressions: outputs within 1e-3 of labels in [0, 1]), *error*: mean squared error in thousandths; "
        "paper protocol / inductive; 95 % interval over test tasks, of regressions over the test domains. In the columns MMT are "
        "the paper's numbers, on other data.",
    ]
    title = f"{' + '.join(first['modes'])}: single and multi meta-task, {setting}"
    return both_tables(about, title, (rows, columns), (rows_to_compare(rows), differences))


def name_of_line(run):
    """What a legend calls a run."""
    kind = "multi" if len(run["tasks"]) > 1 else "single"
    return f"{kind} meta-task, {plain(label(run))}, {run['filters']} filters"


def validation_points(run, task):
    """The log of a run -> [(iteration, accuracy or error on validation tasks of a high-level task)]."""
    key = "accuracy" if task == "classification" else "nil_or_error"
    points = []
    for line in read_log(log_of(run)):
        if "validation" in line:
            points.append((line["iteration"], line["validation"][key][task]["mean"]))
    return points


def validation_curves(runs, file):
    """Attentive feature reuse's Figure 5: of each high-level task, validation accuracy or error against iterations -> PNG `file`."""
    tasks = in_papers_order({task for run in runs for task in run["tasks"]})
    names = sorted({name_of_line(run) for run in runs})
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    figure, panels = side_by_side(len(tasks), 4.5 * len(tasks) + 3, 4)
    for task, axis in zip(tasks, panels):
        for run in sorted(runs, key=name_of_line):
            if task in run["tasks"]:
                name = name_of_line(run)
                points = validation_points(run, task)
                axis.plot(*zip(*points), color=colours[name], label=name, linewidth=1.3)
        axis.set(title=task)
        unit = "accuracy, %" if task == "classification" else "mean squared error, thousandths"
        name_axes(axis, "iterations", unit)
    legend_of(figure, panels, "outside right upper")
    about = afr_about(runs[0]).replace("**", "")
    save(figure, f"Validation, {' + '.join(runs[0]['modes'])}\n{about}", file)


def validated(run):
    """Whether the log of a run holds validation measures."""
    log = log_of(run)
    return log.exists() and '"validation"' in log.read_text()


def afr_tables(runs, out, figures):
    """Runs of read_afr -> the parts of tables.md that are about them; appends to `figures` (function, its arguments)."""
    groups = {}
    parts = []
    for run in runs:
        multi = run["tasks"] != ["classification"] or "scenes" in run["modes"]
        setting = tuple(run["modes"]), run["ways"], run["shots"]
        key = multi, *setting, run["synthetic"], run["budget"]
        groups.setdefault(key, []).append(run)
    for number, key in enumerate(sorted(groups, key=str), 1):
        multi = key[0]
        make = afr_multi if multi else afr_classification
        parts.append(make(groups[key]))
        shown = [run for run in groups[key] if validated(run)]
        least = 1 if multi else 2  # a curve of one run is in its own folder
        if len(shown) < least or not importlib.util.find_spec("matplotlib"):
            continue
        if multi:
            file = out / f"afr-validation-{number}.png"
            figures.append((validation_curves, shown, file))
        else:
            file = out / curves_file(shown[0])
            first = shown[0]
            setting = setting_text(first["modes"], first["ways"], first["shots"])
            about = afr_about(first).replace("**", "")
            heading = f"Attentive feature reuse, {setting}\n{about}"
            figures.append((curves, shown, heading, file, named))
        parts.append(f"![Validation against iterations]({file.name})\n")
    return parts
