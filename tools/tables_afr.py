"""The tables of attentive feature reuse."""

import importlib.util
from pathlib import Path

import numpy as np

import afr
from data import fail, read_log, read_result
from tools.papers import AFR_TABLE1, AFR_TABLE2, AFR_TRANSFER
from tools.reading import UNITS, images_of, label, show, table

AFR_BUDGET = {"image_size": 84, "queries": 15, "precision": "fp32", "iterations": 60000, "meta_batch": 4}
AFR_ORDER = ("classification", "depth", "vanishing", "normals")  # of columns, the paper's


def read_afr(folders):
    """All runs of afr.py under the folders -> list of dicts. `scores`: {(measure, stratum or transfer mode): array over tasks}, where
    a measure is one of afr.KEYS; `data`: {stratum or mode: what its images were made from}."""
    runs = []
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = read_result(file)
            if "nil_or_error" not in run:
                continue
            args, strata = run["args"], run["strata"]
            usual = {
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
                "alpha": [0.01 if args["algorithm"] == "maml" else afr.ALPHA[kind] for kind in args["tasks"]],
                "loss_weights": [afr.LOSS_WEIGHTS[kind] for kind in args["tasks"]],
            }
            flags = {
                k: " ".join(map(str, args[k])) if isinstance(args[k], list) else args[k]
                for k, v in usual.items()
                if args.get(k, v) != v
            }
            scores = {
                (key, stratum): np.array(run[tasks][i :: len(strata)])
                for key, tasks in zip(afr.KEYS, afr.PER_TASK)
                for i, stratum in enumerate(strata)
            }
            scores |= {
                (key, mode): np.array(found[tasks])
                for mode, found in run["transfer"].items()
                for key, tasks in zip(afr.KEYS, afr.PER_TASK)
            }
            data = (
                dict.fromkeys(strata, images_of(run)[0])
                if strata == args["tasks"]
                else dict(zip(strata, images_of(run)))
            )
            runs.append(
                {
                    "method": run["method"],
                    "options": flags,
                    "seed": args["seed"],
                    "first_seed": 0,
                    "modes": run["modes"],
                    "tasks": args["tasks"],
                    "filters": args["filters"],
                    "ways": run["ways"],
                    "shots": run["shots"],
                    "file": file,
                    "synthetic": run["synthetic"],
                    "budget": tuple(
                        (k, args[k] if k != "iterations" else run["iterations"]) for k in AFR_BUDGET
                    ),
                    "scores": scores,
                    "domains": run["domains"],
                    "data": data
                    | {mode: images_of(run | found)[0] for mode, found in run["transfer"].items()},
                    "transfer": list(run["transfer"]),
                    "parameters": sum(run["parameters"].values()),
                    "seconds": run["seconds_per_iteration"],
                    "test_tasks": run["test_tasks"],
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError, IndexError) as error:
            fail(
                f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again"
            )
    return runs


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


def afr_classification(runs):
    """Runs of one setting -> Markdown: Table 2, left (1 or 5 shots) and right (cross-entropy and NIL, transfer)."""
    first, order = runs[0], list(afr.METHODS.values())
    runs = sorted(runs, key=lambda run: (order.index(run["method"]), run["filters"], label(run)))
    known = (
        first["modes"] == ["miniimagenet"]
        and first["ways"] == 5
        and first["shots"] in (1, 5)
        and not first["synthetic"]
    )

    def name(run):
        return label(run) + f", {run['filters']} filters" * (run["filters"] != 32)

    def both(name, keys, sign="", of=lambda x: (x, None)):
        return lambda x: " / ".join(afr_score(of(x)[0], key, name, sign, of(x)[1]) for key in keys)

    columns, pair = (
        {"method": name},
        {"difference, task by task": lambda pair: f"{name(pair[0])} - {name(pair[1])}"},
    )
    for stratum in [*first["modes"], *dict.fromkeys(mode for run in runs for mode in run["transfer"])]:
        where = (
            f"{stratum}, "
            if len(first["modes"]) > 1
            else f"transfer to {stratum}, "
            if stratum not in first["modes"]
            else ""
        )
        for i, (what, keys) in enumerate((("cross-entropy", afr.KEYS[:2]), ("NIL", afr.KEYS[2:]))):
            columns[f"{where}{what}, paper protocol / inductive"] = both(stratum, keys)
            pair[f"{where}{what}, paper protocol / inductive"] = both(stratum, keys, "+", lambda x: x)
            if known and stratum == "miniimagenet":
                columns[f"paper's Table 2, {what}"] = lambda run, i=i: (
                    "-" if run["options"] else AFR_TABLE2[run["method"]]["M"][first["shots"] == 5][i]
                )
            elif known and first["shots"] == 1:
                columns[f"paper, mini-Places, {what}"] = lambda run, i=i: (
                    "-" if run["options"] else AFR_TRANSFER[run["method"]][i]
                )
    columns |= {
        "parameters": lambda run: f"{run['parameters']:,}",
        "s per iteration": lambda run: f"{run['seconds']:.2g}",
    }
    plain = {(run["method"], run["filters"], run["seed"]): run for run in runs if not run["options"]}
    plain |= {
        (f"{run['method']}, constant", run["filters"], run["seed"]): run
        for run in runs
        if run["options"] == {"embed": "constant"}
    }
    pairs = [
        (plain.get((one, *rest)), plain.get((two, *rest)))
        for rest in dict.fromkeys(key[1:] for key in plain)
        for one, two in (
            ("ANIL", "MAML"),
            ("AM", "MAML"),
            ("AM", "ANIL"),
            ("P-AM", "ANIL"),
            ("P-AM", "AM"),
            ("AM, constant", "ANIL"),
            ("AM", "AM, constant"),
        )
    ]
    pairs = [both for both in pairs if None not in both]
    counts = " or ".join(f"{n:,}" for n in sorted({run["test_tasks"] for run in runs}))
    return (
        f"### {' + '.join(first['modes'])}, {first['ways']}-way {first['shots']}-shot\n\n{afr_about(first)} {counts} test tasks; accuracy in %, 95 % "
        "interval over tasks; each cell paper protocol / inductive.\n\n".replace("  ", " ")
        + table(runs, columns).replace(", paper protocol / inductive", "")
        + ("\n" + table(pairs, pair).replace(", paper protocol / inductive", "") if pairs else "")
    )


def afr_multi(runs):
    """Runs of one setting, single and multi meta-task -> Markdown: Table 1."""
    first = runs[0]

    def kind(run):
        return "multi" if len(run["tasks"]) > 1 else "single"

    rows = {}  # single meta-task: a run for each task, one row for all
    for run in runs:
        group = rows.setdefault(
            (
                kind(run),
                "+".join(run["tasks"]) if kind(run) == "multi" and len(run["tasks"]) < 4 else "",
                run["method"],
                label(run, False) if run["options"] else run["method"],
                run["filters"],
                run["seed"],
            ),
            {},
        )
        for task in run["tasks"]:
            group.setdefault(task, run)
    rows = dict(
        sorted(
            rows.items(),
            key=lambda row: (
                row[0][0] != "single",
                row[0][1],
                list(afr.METHODS.values()).index(row[0][2]),
                *map(str, row[0][3:]),
            ),
        )
    )
    tasks = [task for task in AFR_ORDER if any(task in group for group in rows.values())]

    for task in tasks:  # all numbers of a column are of the same test tasks
        holders = [group for group in rows.values() if task in group]
        count = min(len(group[task]["scores"][key, task]) for group in holders for key in afr.KEYS)
        for group in holders:
            cut = {key: x[:count] if key[1] == task else x for key, x in group[task]["scores"].items()}
            group[task] = group[task] | {"scores": cut}

    def name(key):
        return (
            f"{key[0]} meta-task{f' ({key[1]})' * bool(key[1])}, {key[3]}, {key[4]} filters"
            + f", seed {key[5]}" * bool(key[5])
        )

    def cell(task, keys):
        return lambda key: (
            " / ".join(afr_score(rows[key][task], k, task) for k in keys) if task in rows[key] else "-"
        )

    def published(task, i):
        def number(key):
            numbers = AFR_TABLE1.get(key[0], {}).get(key[3], {}).get(key[4])
            return (
                "-"
                if numbers is None or key[1]
                else numbers[AFR_ORDER.index(task)][i] * (1000 if i and task != "depth" else 1)
            )

        return lambda key: x if isinstance(x := number(key), str) else f"{x:.4g}"

    columns, differences = (
        {"run": name},
        {"difference, task by task": lambda pair: f"{name(pair[0])} - {name(pair[1])}"},
    )

    def difference(task, keys):
        def made(pair):
            one, two = (rows[key].get(task) for key in pair)
            return " / ".join(afr_score(one, k, task, "+", two) for k in keys) if one and two else "-"

        return made

    for task in tasks:
        two = (("accuracy", afr.KEYS[:2]), ("NIL" if task == "classification" else "error", afr.KEYS[2:]))
        for i, (what, keys) in enumerate(two):
            columns[f"{task}, {what}"] = cell(task, keys)
            differences[f"{task}, {what}"] = difference(task, keys)
            if not (task == "classification" and i):
                columns[f"MMT, {task}, {what}"] = published(task, i)
    pairs = [
        (one, two)
        for one in rows
        for two in rows
        if one != two
        and one[4:] == two[4:]
        and (
            (one[:2] == two[:2] and (one[3], two[3]) in (("AM", "ANIL"), ("P-AM", "ANIL"), ("P-AM", "AM")))
            or (one[0] == "multi" and two[0] == "single" and one[2:] == two[2:])
        )
    ]
    return (
        f"### {' + '.join(first['modes'])}: single and multi meta-task, {first['ways']}-way {first['shots']}-shot\n\n{afr_about(first)} "
        "*Accuracy* in % (of regressions: outputs within 1e-3 of labels in [0, 1]), *error*: mean squared error in thousandths; paper protocol / "
        "inductive; 95 % interval over test tasks, of regressions over the test domains. In the columns MMT are the paper's numbers, on other data.\n\n".replace(
            "  ", " "
        )
        + table(rows, columns)
        + ("\n" + table(pairs, differences) if pairs else "")
    )


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
