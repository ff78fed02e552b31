"""Result files -> runs, their statistics, and Markdown: what all tables share."""

import math
import re
from pathlib import Path

import numpy as np

from data import fail, read_log, read_result
from tools.papers import SETTINGS

# Rows of a table, by family; tables.py has the pairs whose differences it shows. Multi-X: one X for each mode, trained on it alone.
FAMILIES = {
    "MAML": ("MAML", "Multi-MAML", "MMAML", "MMAML+KML"),
    "ProtoNet": ("ProtoNet", "Multi-ProtoNet", "MProtoNet", "MProtoNet+KML"),
}
# What the paper's runs have. A run with other options is a variant, and says so in its row; a run of another budget stands in
# another table.
OPTIONS = {
    "lr": 1e-3,
    "no_norm_affine": False,
    "first_order": False,
    "inner_clip": 20.0,
    "inner_lr": 0.05,
    "conv4_lr": None,
    "inner_steps": 5,
    "no_residual": False,
    "embed": "support",
    "transductive": False,
    "generator": "outer",
    "init_scale": 1.0,
    "distance_scale": 1.0,
    "adapt": "theta",
    "repeat_tasks": False,
}
HALVING = {"MAML": 0, "ProtoNet": 10000}
MULTI_MAML = {"omniglot": {"inner_lr": 0.4, "inner_steps": 1}, "": {"inner_lr": 0.01}}
BUDGET = {"image_size": 84, "channels": 32, "queries": 15, "precision": "fp32"}
ITERATIONS = {"MAML": (60000, 10), "ProtoNet": (30000, 10)}  # and tasks in each
MULTI_ITERATIONS = {"omniglot": (60000, 10), "": (80000, 4)}  # of Multi-MAML
UNITS = {
    "image_size": "px",
    "channels": "channels in layer 1",
    "queries": "queries per class",
    "precision": "precision",
    "episodes": "episodes",
}


def read_each(folders, take):
    """take(file, result) of every result.json under the folders, where it is not None -> list.

    Ends with one line if a file is not whole: `take` may raise what a missing or misshapen entry raises.
    """
    taken = []
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = take(file, read_result(file))
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            why = f"{type(error).__name__}: {error}"
            fail(f"{file} is not a whole result file ({why}): delete it, run its command again")
        if run is not None:
            taken.append(run)
    return taken


def read(folders):
    """All runs of the KML family under the folders -> list of dicts (see read_run)."""
    return read_each(folders, read_run)


def read_run(file, run):
    """A result file and its content -> what the tables need of it; None if its script makes no table of the KML paper.

    `scores` is {protocol: {mode: array of its tasks' accuracies}}, `options` what differs from the paper's method,
    `budget` what two runs must have in common to stand in one table.
    """
    if "algorithm" in run.get("args", {}):
        return None  # modgrad.py has a MAML of its own
    family = "MAML" if run["method"] in FAMILIES["MAML"] else "ProtoNet"
    if run["method"] not in FAMILIES[family]:
        return None
    args = run["args"]
    method, options, full = row_of(run, family)
    done = run["iterations"], args["meta_batch"]
    budget = {k: args.get(k, v) for k, v in BUDGET.items()}
    budget |= {"steps": "paper" if done == full else done, "synthetic": run["synthetic"]}
    return read_few_shot(file, run) | {
        "method": method,
        "family": family,
        "options": options,
        "note": run.get("note"),
        "budget": tuple(budget.items()),
    }


def row_of(run, family):
    """A result -> the method whose row it fills, its flags beside that method's, and the paper's (iterations, tasks in each)."""
    args = run["args"]
    modes = run["modes"]
    if run["method"] == "MMAML+KML":
        args = {"adapt": "modulated"} | args  # so were runs from before there was this flag
    usual = OPTIONS | {"lr_halve_every": HALVING[family]}
    options = {k: args[k] for k, v in usual.items() if args.get(k, v) != v}
    if run["method"] == "ProtoNet" and len(modes) == 1:
        return "Multi-ProtoNet", options, ITERATIONS[family]
    if run["method"] == "MAML" and len(modes) == 1:
        own = MULTI_MAML.get(modes[0], MULTI_MAML[""])
        if own.items() <= options.items():
            others = {k: v for k, v in options.items() if k not in own}
            return "Multi-MAML", others, MULTI_ITERATIONS.get(modes[0], MULTI_ITERATIONS[""])
    return run["method"], options, ITERATIONS[family]


def read_few_shot(file, run):
    """What tables need of any result of few-shot classification: modes, seed, scores by protocol and mode, and so on."""
    modes = run["modes"]
    protocols = {"paper": run["per_task"], "inductive": run["per_task_inductive"]}
    return {
        "modes": modes,
        "seed": run["args"]["seed"],
        "ways": run["ways"],
        "shots": run["shots"],
        "file": file,
        "data": dict(zip(modes, images_of(run))),
        "tasks": (modes, len(run["per_task"]), run.get("tasks_sha256")),
        "scores": {name: by_mode(x, modes) for name, x in protocols.items() if x is not None},
        "parameters": sum(run["parameters"].values()),
        "seconds": float(run["seconds_per_iteration"]),
    }


def by_mode(values, modes):
    """Values of tasks, whose modes take turns -> {mode: array}."""
    return {mode: np.array(values[m :: len(modes)], dtype=float) for m, mode in enumerate(modes)}


def absent(method, modes=()):
    """What stands in a table for a run that is not there; `modes`: those whose runs alone are missing."""
    return {
        "method": method,
        "options": {},
        "seed": None,
        "missing": modes,
        "scores": {},
        "data": {},
        "parameters": None,
        "seconds": None,
    }


def joined(method, modes, singles):
    """Multi-MAML or Multi-ProtoNet: its runs on single modes as one."""
    of = [singles.get((method, mode)) for mode in modes]
    if None in of:
        return absent(method, [mode for mode, run in zip(modes, of) if run is None])
    return absent(method) | {
        "scores": {
            protocol: {mode: run["scores"][protocol][mode] for mode, run in zip(modes, of)}
            for protocol in ("paper", "inductive")
            if all(protocol in run["scores"] for run in of)
        },
        "data": {mode: run["data"][mode] for mode, run in zip(modes, of)},
        "variant": any(run.get("variant") for run in of),
        "parameters": sum(run["parameters"] for run in of),
    }


def on_the_same_tasks(runs, modes):
    """Cut the scores of all runs to the test tasks that every run has -> the runs, so that differences of means add up.

    Test task j of a mode is the same for every run: of each mode, the first n tasks are kept, n the smallest number there.
    """
    measured = [run["scores"]["paper"] for run in runs if run["scores"]]
    count = {mode: min(len(scores[mode]) for scores in measured) for mode in modes}
    cut = []
    for run in runs:
        scores = {
            protocol: {mode: x[: count[mode]] for mode, x in of.items()}
            for protocol, of in run["scores"].items()
        }
        cut.append(run | {"scores": scores})
    return cut


def interval(strata):
    """Arrays of values, one per mode -> mean of their means, half width of its 95 % interval."""
    means, variances = [x.mean() for x in strata], [x.var(ddof=1) / len(x) for x in strata]
    return float(np.mean(means)), 1.96 * math.sqrt(sum(variances)) / len(strata)


def score(run, protocol, modes):
    """Accuracy over `modes`, in % -> (mean, interval), or None where there is none."""
    return interval([run["scores"][protocol][mode] for mode in modes]) if protocol in run["scores"] else None


def images_of(run):
    """What the images of a run's modes are, from its result file -> list. The fingerprint of real images is left out: it was made of
    file times once, so that a copy of an archive had another. Which classes and images were drawn is in tasks_sha256."""
    return [name if run["synthetic"] else re.sub(r"-[0-9a-f]{12}$", "", name) for name in run["data"]]


def difference(a, b, protocol, modes):
    """Accuracy of run a minus that of b on the tasks they share -> (mean, interval), or None where there are none."""
    if not all(protocol in run["scores"] for run in (a, b)) or any(
        a["data"][m] != b["data"][m] for m in modes
    ):
        return None
    one, two = a.get("tasks"), b.get("tasks")  # modes, number, hash
    if one and two and one[:2] == two[:2] and one != two:
        return None
    pairs = [(a["scores"][protocol][m], b["scores"][protocol][m]) for m in modes]
    return interval([x[: len(y)] - y[: len(x)] for x, y in pairs])  # task j is the same in every run


def show(value, sign=""):
    return "-" if value is None else f"{value[0]:{sign}.2f} ± {value[1]:.2f}"


def label(run, seed=True):
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in run["options"].items()]
    return ", ".join(
        [
            run["method"],
            *([f"`{' '.join(flags)}`"] if flags else []),
            *([f"seed {run['seed']}"] if seed and run["seed"] != run.get("first_seed", run["seed"]) else []),
        ]
    )


def table(rows, columns):
    """Objects and {head: function that makes the object's cell} -> a Markdown table."""
    lines = [
        list(columns),
        ["---"] * len(columns),
        *([str(cell(row)) for cell in columns.values()] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def budget_text(budget, family):
    """What is not the paper's -> Markdown, "" if nothing is."""
    budget = dict(budget)
    words = [
        f"{budget[key]} {UNITS[key]} instead of {usual}"
        for key, usual in BUDGET.items()
        if budget[key] != usual
    ]
    if budget["steps"] != "paper":
        (ours, batch), (theirs, usual) = budget["steps"], ITERATIONS[family]
        words.append(f"{ours:,} iterations of {batch} tasks instead of {theirs:,} of {usual}")
    return " ".join(f"**{x}.**" for x in ("Synthetic images" * budget["synthetic"], ", ".join(words)) if x)


def setting_name(modes):
    names = [name for name, of in SETTINGS.items() if of == set(modes) and len(of) == len(modes)]
    return names[0] if names else "+".join(modes)


def title(run):
    name, modes = setting_name(run["modes"]), " + ".join(run["modes"])
    return f"{run['family']} family, {name}{f' ({modes})' * (name in SETTINGS)}, {run['ways']}-way {run['shots']}-shot"


def slug(run):
    """A run's table as a file name."""
    budget = dict(run["budget"])
    steps = [] if budget["steps"] == "paper" else ["{}x{}".format(*budget["steps"])]
    words = [
        *(["synthetic"] if budget["synthetic"] else []),
        run["family"],
        setting_name(run["modes"]),
        f"{run['ways']}way",
        f"{run['shots']}shot",
        *(str(budget[k]) for k in BUDGET if budget[k] != BUDGET[k]),
        *steps,
    ]
    return "-".join(words).lower()


def trials_block(runs, setting, about):
    """Trials of step sizes -> Markdown: what each method was tried with, the last validation accuracy in its log, the best bold.
    A trial is a run in a folder called `trials`; it stands in no other table. Each run: {"file", "method", "options", "seed", "alpha"}."""
    found = {}
    for run in runs:
        try:
            lines = read_log(run["file"].parent / "log.jsonl")
            last = [line["validation"] for line in lines if "validation" in line][-1]
            last = (
                last["accuracy"] if "accuracy" in last else last["paper"]["overall"]
            )  # multi-shot, few-shot
        except (OSError, ValueError, KeyError, IndexError):
            fail(
                f"{run['file'].parent} is a trial without validation in its log: train it with --val-every, or remove it"
            )
        name = label(run | {"options": {k: v for k, v in run["options"].items() if k != "alpha"}})
        found.setdefault(name, []).append((run["alpha"], last["mean"], last["ci95"]))

    def cells(name):
        best = max(found[name], key=lambda trial: trial[1])
        shown = [f"{alpha:g}: {mean:.2f} ± {half:.2f}" for alpha, mean, half in sorted(found[name])]
        return ", ".join(
            f"**{text}**" if trial is best else text for text, trial in zip(shown, sorted(found[name]))
        )

    return f"### Trials of step sizes on validation classes, {setting}\n\n{about}\n\n" + table(
        sorted(found), {"method": str, "size of an inner step: accuracy in %, paper protocol": cells}
    )
