"""The tables of attentive feature reuse."""

import importlib.util
from typing import NamedTuple

import numpy as np

import afr
from data import read_log
from tools.papers import AFR_TABLE1, AFR_TABLE2, AFR_TRANSFER
from tools.reading import UNITS, images_of, label, read_each, show, table

AFR_BUDGET = {"image_size": 84, "queries": 15, "precision": "fp32", "iterations": 60000, "meta_batch": 4}
AFR_ORDER = ("classification", "depth", "vanishing", "normals")  # of columns, the paper's


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
    budget = {k: args[k] for k in AFR_BUDGET if k != "iterations"} | {"iterations": run["iterations"]}
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
    alpha = [0.01 if args["algorithm"] == "maml" else afr.ALPHA[kind] for kind in args["tasks"]]
    weights = [afr.LOSS_WEIGHTS[kind] for kind in args["tasks"]]
    usual = OPTIONS | {"alpha": alpha, "loss_weights": weights}
    differs = {k: args[k] for k, v in usual.items() if args.get(k, v) != v}
    return {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in differs.items()}


def scores_of(run):
    """{(measure, stratum or transfer mode): array over tasks} of a result."""
    strata = run["strata"]
    scores = {}
    for key, tasks in zip(afr.KEYS, afr.PER_TASK):
        scores |= {(key, stratum): np.array(run[tasks][i :: len(strata)]) for i, stratum in enumerate(strata)}
        scores |= {(key, mode): np.array(found[tasks]) for mode, found in run["transfer"].items()}
    return scores


def images_by_stratum(run):
    """{stratum or transfer mode: what its images were made from} of a result."""
    strata = run["strata"]
    of_high_level_tasks = strata == run["args"]["tasks"]  # else strata are modes
    images = images_of(run)
    data = dict.fromkeys(strata, images[0]) if of_high_level_tasks else dict(zip(strata, images))
    return data | {mode: images_of(run | found)[0] for mode, found in run["transfer"].items()}


def afr_about(run):
    """What is not the paper's data, and what is not the default budget -> Markdown."""
    budget, usual = dict(run["budget"]), AFR_BUDGET
    words = [
        f"{budget[k]} {UNITS[k]} instead of {usual[k]}"
        for k in ("image_size", "queries", "precision")
        if budget[k] != usual[k]
    ]
    if any(budget[k] != usual[k] for k in ("iterations", "meta_batch")):
        words.append(
            "{iterations:,} iterations of {meta_batch} subtasks".format(**budget)
            + " instead of our default's {iterations:,} of {meta_batch}".format(**usual)
        )
    marks = [
        "Ray-cast scenes, not MMT; synthetic"
        if "scenes" in run["modes"]
        else "Synthetic images" * run["synthetic"],
        ", ".join(words),
    ]
    return " ".join(f"**{x}.**" for x in marks if x)


def afr_score(run, key, name, sign="", minus=None):
    """A cell: mean and interval of a measure of a stratum or a transfer mode; or of its paired difference from another run's."""
    values = run["scores"].get((key, name))
    if minus is not None and values is not None:
        other = minus["scores"].get((key, name))
        same = other is not None and run["data"][name] == minus["data"][name]
        values = (
            values[: len(other)] - other[: len(values)] if same else None
        )  # task j is the same in every run
    found = None if values is None else afr.summary(values, [name], run["domains"])[name]
    return show(found and (found["mean"], found["ci95"]), sign)


PAIRS = (
    ("ANIL", "MAML"),
    ("AM", "MAML"),
    ("AM", "ANIL"),
    ("P-AM", "ANIL"),
    ("P-AM", "AM"),
    ("AM, constant", "ANIL"),
    ("AM", "AM, constant"),
)


def afr_classification(runs):
    """Runs of one setting -> Markdown: Table 2, left (1 or 5 shots) and right (cross-entropy and NIL, transfer)."""
    first = runs[0]
    order = list(afr.METHODS.values())
    runs = sorted(runs, key=lambda run: (order.index(run["method"]), run["filters"], label(run)))
    counts = " or ".join(f"{n:,}" for n in sorted({run["test_tasks"] for run in runs}))
    about = [
        afr_about(first),
        f"{counts} test tasks; accuracy in %, 95 % interval over tasks; each cell paper protocol / inductive.",
    ]
    title = f"{' + '.join(first['modes'])}, {first['ways']}-way {first['shots']}-shot"
    columns, differences = classification_columns(runs)
    pairs = compared(runs)
    text = f"### {title}\n\n{' '.join(x for x in about if x)}\n\n{table(runs, columns)}"
    return text + ("\n" + table(pairs, differences) if pairs else "")


def named(run):
    """A run's label, with its filters where they are not 32."""
    return label(run) + (f", {run['filters']} filters" if run["filters"] != 32 else "")


def classification_columns(runs):
    """The columns of a table of accuracies, and of one of differences -> two dicts {head: function that makes a cell}."""
    first = runs[0]
    comparable = first["modes"] == ["miniimagenet"] and first["ways"] == 5 and first["shots"] in (1, 5)
    known = comparable and not first["synthetic"]
    columns = {"method": named}
    differences = {"difference, task by task": lambda pair: f"{named(pair[0])} - {named(pair[1])}"}

    def cell(stratum, keys):
        return lambda run: " / ".join(afr_score(run, key, stratum) for key in keys)

    def minus(stratum, keys):
        return lambda pair: " / ".join(afr_score(pair[0], key, stratum, "+", pair[1]) for key in keys)

    def published(of):
        return lambda run: "-" if run["options"] or run["filters"] != 32 else of(run["method"])

    for stratum in [*first["modes"], *dict.fromkeys(mode for run in runs for mode in run["transfer"])]:
        where = f"{stratum}, " if len(first["modes"]) > 1 else ""
        if stratum not in first["modes"]:
            where = f"transfer to {stratum}, "
        for i, (what, keys) in enumerate((("cross-entropy", afr.KEYS[:2]), ("NIL", afr.KEYS[2:]))):
            columns[where + what] = cell(stratum, keys)
            differences[where + what] = minus(stratum, keys)
            if known and stratum == "miniimagenet":
                five = first["shots"] == 5
                columns[f"paper's Table 2, {what}"] = published(
                    lambda name, i=i, five=five: AFR_TABLE2[name]["M"][five][i]
                )
            elif known and first["shots"] == 1:
                columns[f"paper, mini-Places, {what}"] = published(lambda name, i=i: AFR_TRANSFER[name][i])
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
    kind = "multi" if len(run["tasks"]) > 1 else "single"
    some = "+".join(run["tasks"]) if kind == "multi" and len(run["tasks"]) < 4 else ""
    name = label(run, False) if run["options"] else run["method"]
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
        return row.kind != "single", row.some, methods.index(row.method), *map(str, row[3:])

    return {row: rows[row] for row in sorted(rows, key=place)}


def on_the_same_tasks(rows, tasks):
    """Cut the scores of each high-level task to the test tasks that every run has; changes `rows`."""
    for task in tasks:
        holders = [group for group in rows.values() if task in group]
        count = min(len(group[task]["scores"][key, task]) for group in holders for key in afr.KEYS)
        for group in holders:
            scores = group[task]["scores"]
            cut = {key: x[:count] if key[1] == task else x for key, x in scores.items()}
            group[task] = group[task] | {"scores": cut}


def rows_to_compare(rows):
    """Pairs of rows: attention against none or another, and multi meta-task against single, where they differ in nothing else."""
    methods = (("AM", "ANIL"), ("P-AM", "ANIL"), ("P-AM", "AM"))
    found = []
    for one in rows:
        for two in rows:
            if one == two or one[4:] != two[4:]:
                continue
            attention = one[:2] == two[:2] and (one.name, two.name) in methods
            several = (one.kind, two.kind) == ("multi", "single") and one[2:] == two[2:]
            if attention or several:
                found.append((one, two))
    return found


def multi_columns(rows, tasks):
    """The columns of Table 1, and of its differences -> two dicts {head: function that makes a row's, or a pair's, cell}."""
    columns = {"run": str}
    differences = {"difference, task by task": lambda pair: f"{pair[0]} - {pair[1]}"}

    def cell(task, keys):
        def of(row):
            if task not in rows[row]:
                return "-"
            return " / ".join(afr_score(rows[row][task], key, task) for key in keys)

        return of

    def minus(task, keys):
        def of(pair):
            one, two = (rows[row].get(task) for row in pair)
            return " / ".join(afr_score(one, key, task, "+", two) for key in keys) if one and two else "-"

        return of

    def published(task, i):
        def of(row):
            numbers = AFR_TABLE1.get(row.kind, {}).get(row.name, {}).get(row.filters)
            if numbers is None or row.some:
                return "-"
            in_thousandths = i and task != "depth"
            return f"{numbers[AFR_ORDER.index(task)][i] * (1000 if in_thousandths else 1):.4g}"

        return of

    for task in tasks:
        second = "NIL" if task == "classification" else "error"
        for i, (what, keys) in enumerate((("accuracy", afr.KEYS[:2]), (second, afr.KEYS[2:]))):
            columns[f"{task}, {what}"] = cell(task, keys)
            differences[f"{task}, {what}"] = minus(task, keys)
            if what != "NIL":
                columns[f"MMT, {task}, {what}"] = published(task, i)
    return columns, differences


def afr_multi(runs):
    """Runs of one setting, single and multi meta-task -> Markdown: Table 1."""
    first = runs[0]
    rows = rows_of(runs)
    tasks = [task for task in AFR_ORDER if any(task in group for group in rows.values())]
    on_the_same_tasks(rows, tasks)
    columns, differences = multi_columns(rows, tasks)
    pairs = rows_to_compare(rows)
    setting = f"{first['ways']}-way {first['shots']}-shot"
    about = [
        afr_about(first),
        "*Accuracy* in % (of regressions: outputs within 1e-3 of labels in [0, 1]), *error*: mean squared error in thousandths; "
        "paper protocol / inductive; 95 % interval over test tasks, of regressions over the test domains. In the columns MMT are "
        "the paper's numbers, on other data.",
    ]
    title = f"{' + '.join(first['modes'])}: single and multi meta-task, {setting}"
    text = f"### {title}\n\n{' '.join(x for x in about if x)}\n\n{table(rows, columns)}"
    return text + ("\n" + table(pairs, differences) if pairs else "")


def validation_curves(runs, file):
    """Attentive feature reuse's Figure 5: of each high-level task, validation accuracy or error against iterations -> PNG `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [task for task in AFR_ORDER if any(task in run["tasks"] for run in runs)]
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(4.5 * len(tasks) + 3, 4), squeeze=False, layout="constrained"
    )
    names = [
        f"{'multi' if len(run['tasks']) > 1 else 'single'} meta-task, {label(run).replace('`', '')}, {run['filters']} filters"
        for run in runs
    ]
    styles = {name: f"C{i % 10}" for i, name in enumerate(sorted(set(names)))}
    for task, axis in zip(tasks, panels[0]):
        key = "accuracy" if task == "classification" else "nil_or_error"
        for run, name in sorted(zip(runs, names), key=lambda pair: pair[1]):
            if task in run["tasks"]:
                lines = read_log(run["file"].parent / "log.jsonl")
                points = [
                    (line["iteration"], line["validation"][key][task]["mean"])
                    for line in lines
                    if "validation" in line
                ]
                axis.plot(*zip(*points), color=styles[name], label=name, linewidth=1.3)
        axis.set(
            title=task,
            xlabel="iterations",
            ylabel="accuracy, %" if task == "classification" else "mean squared error, thousandths",
        )
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in panels[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside right upper", fontsize="small")
    figure.suptitle(
        f"Validation, {' + '.join(runs[0]['modes'])}\n{afr_about(runs[0]).replace('**', '')}".strip(),
        fontsize="medium",
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def validated(run):
    """Whether the log of a run holds validation measures."""
    log = run["file"].parent / "log.jsonl"
    return log.exists() and '"validation"' in log.read_text()


def afr_tables(runs, out, figures):
    """Runs of read_afr -> the parts of tables.md that are about them; appends to `figures` (function, its arguments)."""
    groups, parts = {}, []
    for run in runs:
        multi = run["tasks"] != ["classification"] or "scenes" in run["modes"]
        groups.setdefault(
            (multi, tuple(run["modes"]), run["ways"], run["shots"], run["synthetic"], run["budget"]), []
        ).append(run)
    for number, key in enumerate(sorted(groups, key=str), 1):
        parts.append((afr_multi if key[0] else afr_classification)(groups[key]))
        of = [run for run in groups[key] if key[0] and validated(run)]
        if of and importlib.util.find_spec("matplotlib"):
            figures.append((validation_curves, of, out / f"afr-validation-{number}.png"))
            parts.append(f"![Validation against iterations]({figures[-1][-1].name})\n")
    return parts
