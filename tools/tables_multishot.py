"""ModGrad's tables of multi-shot learning: its Figure 5."""

import importlib.util
import sys

import numpy as np

import modgrad_multishot
from tools.figures import against_steps
from tools.papers import MULTISHOT
from tools.reading import UNITS, differing, images_of, label, read_each, table, trials_block

BUDGET = {
    "ways": 20,
    "queries": 5,
    "batch": 20,
    "image_size": 28,
    "channels": 64,
    "precision": "fp32",
    "test_steps": 100,
    "iterations": 1000,
    "meta_batch": 20,
}
UNITS = UNITS | {
    "ways": "ways",
    "batch": "images per step",
    "channels": "channels in each layer",
    "test_steps": "steps in testing",
    "iterations": "iterations",
    "meta_batch": "tasks per iteration",
}
OPTIONS = {
    "rank": 5,
    "context": 300,
    "inner_clip": 20.0,
    "first_order": False,
    "lr_halve_every": 0,
    "start_at_one": False,
    "seed": 0,
}
NUMBERS = ("method", "accuracy", "accuracy_inductive", "loss", "curve", "after", "seconds_per_iteration")
PER_TASK = ("per_task", "per_task_inductive", "per_task_loss", "per_task_alphabet")


def read_run(file, run):
    """A result file and its content -> what the tables need of it; None if it is of another script."""
    if "curve" not in run:
        return None
    args = run["args"]
    budget = args | {"iterations": run["iterations"]}
    return {
        "file": file,
        "options": differing(args, usual(args["algorithm"])),
        "seed": None,
        "alpha": args["alpha"],
        "setting": (tuple(run["modes"]), run["synthetic"], tuple(run["shots"])),
        "budget": tuple((k, budget[k]) for k in BUDGET),
        "tasks": run["test_tasks"],
        "what": (images_of(run), run["tasks_sha256"]),
        **{k: run[k] for k in NUMBERS},
        **{k: np.array(run[k]) for k in PER_TASK},
    }


def usual(algorithm):
    """The flags that a run of this algorithm has by default, but for --adapt, which is in the method's name -> dict."""
    defaults = modgrad_multishot.DEFAULTS[algorithm]
    flags = OPTIONS | dict(zip(("steps", "alpha", "adapt", "outer", "lr"), defaults))
    idle = ["adapt"] if algorithm == "modgrad" else ["adapt", "rank", "context"]
    return {name: value for name, value in flags.items() if name not in idle}


def multishot_tables(folders, out, figures):
    """The runs of modgrad_multishot.py under the folders -> parts of tables.md: ModGrad's Figure 5, one for each budget.

    Appends to `figures` (function, its arguments). Runs in a folder called `trials` are trials of step sizes on validation
    alphabets.
    """
    groups = {}
    trials = {}
    for run in read_each(folders, read_run):
        if "trials" in run["file"].parts:
            trials.setdefault((*run["setting"], run["budget"]), []).append(run)
            continue
        group = groups.setdefault((*run["setting"], run["tasks"], run["budget"]), {})
        if group.setdefault(label(run), run) is not run:
            print(f"note: {run['file']} repeats another run and is left out", file=sys.stderr)
    parts = []
    for (*setting, tasks, budget), runs in sorted(groups.items()):
        rows = in_order(runs)
        parts.append(block(*setting, tasks, dict(budget), rows))
        if importlib.util.find_spec("matplotlib"):
            file = out / figure_file(*setting, tasks, dict(budget))
            about = "; ".join(budget_words(setting[1], dict(budget)))
            figures.append((against_steps, rows, about, file))
            parts.append(f"![Training loss and accuracy against steps]({file.name})\n")
    for key in sorted(trials):
        modes, synthetic, shots, budget = key
        about = "".join(f"**{x}.** " for x in budget_words(synthetic, dict(budget)))
        setting = f"multi-shot, {' + '.join(modes)}, {of_shots(dict(budget), shots)}"
        parts.append(trials_block(trials[key], setting, about + "Intervals over alphabets."))
    return parts


def in_order(runs):
    """Runs by name -> the same, in the order of the script's methods, each method's variants after it."""
    methods = list(modgrad_multishot.METHODS.values())

    def place(name):
        method = runs[name]["method"]
        return methods.index(method.split(" on ")[0]), method, name

    return {name: runs[name] for name in sorted(runs, key=place)}


def block(modes, synthetic, shots, tasks, budget, runs):
    """The runs of one setting and budget, by name -> Markdown: results, then differences from the first, task by task."""
    K = budget["test_steps"]
    protocol = (budget["ways"], K) == (20, 100)
    known = modes == ("omniglot",) and not synthetic and protocol
    leap = ""
    if known:
        leap = (
            f" LEAP, which is not here, has {MULTISHOT['LEAP']} in the paper. Its code, which the paper builds on, evaluates "
            "training drawings, with running BatchNorm statistics (but for MAML)."
        )
    text = (
        f"### Multi-shot, {' + '.join(modes)}, {of_shots(budget, shots)}\n\n"
        + "".join(f"**{x}.** " for x in budget_words(synthetic, budget))
        + f"{tasks:,} test tasks; accuracy in % on held-out drawings after {K} steps, and after fewer (paper protocol); training "
        f"loss: the mean of the {K} steps; 95 % intervals over alphabets.{leap}\n\n" + results(runs, known)
    )
    first = next(iter(runs.values()))
    if first["method"] == "ModGrad" and len(runs) > 1:
        text += "\n" + differences(runs)
    return text


def results(runs, known):
    """Runs by name -> Markdown: accuracy after all steps and after fewer, and the training loss. known: the paper has numbers."""
    first = next(iter(runs.values()))
    columns = {
        "method": lambda name: name,
        "inductive": lambda name: spread(runs[name]["accuracy_inductive"]),
        "paper protocol": lambda name: spread(runs[name]["accuracy"]),
    }
    if known:
        columns["ModGrad's Figure 5"] = lambda name: published(runs[name])
    for i, k in enumerate(first["after"]["steps"][:-1]):
        columns[f"after {k}"] = lambda name, i=i: f"{runs[name]['after']['mean'][i]:.2f}"
    columns["training loss"] = lambda name: spread(runs[name]["loss"], 3)
    columns["s per iteration"] = lambda name: f"{runs[name]['seconds_per_iteration']:.2g}"
    return table(runs, columns)


def published(run):
    """The paper's accuracy, of runs that differ from its in no more than the size of the step."""
    if set(run["options"]) - {"alpha"}:
        return "-"
    return MULTISHOT[run["method"]] or "-"


def differences(runs):
    """Runs by name -> Markdown: the first minus each of the others, task by task."""
    first, *others = runs
    base = runs[first]

    def minus(key, digits=2):
        def cell(name):
            if base["what"] != runs[name]["what"]:
                return "-"  # other tasks
            values = base[key] - runs[name][key]
            return spread(modgrad_multishot.summary(values, base["per_task_alphabet"]), digits, "+")

        return cell

    columns = {
        "difference, task by task": lambda name: f"{first} - {name}",
        "inductive": minus("per_task_inductive"),
        "paper protocol": minus("per_task"),
        "training loss": minus("per_task_loss", 3),
    }
    return table(others, columns)


def spread(value, digits=2, sign=""):
    """{"mean", "ci95"} -> text."""
    return f"{value['mean']:{sign}.{digits}f} ± {value['ci95']:.{digits}f}"


def of_shots(budget, shots):
    """A setting's ways and shots, as text."""
    return f"{budget['ways']}-way, {shots[0]} to {shots[1]} shots"


def budget_words(synthetic, budget):
    """What of a run's budget is not the protocol's, a list."""
    words = ["Synthetic images"] if synthetic else []
    words += [f"{budget[k]} {UNITS[k]} instead of {v}" for k, v in BUDGET.items() if budget[k] != v]
    return words


def figure_file(modes, synthetic, shots, tasks, budget):
    """The name of the figure of loss and accuracy against steps."""
    words = ["synthetic"] if synthetic else []
    words += ["+".join(modes), f"{shots[0]}to{shots[1]}"]
    for key, theirs in BUDGET.items():
        if budget[key] != theirs:
            words.append(f"{key}{budget[key]}".replace("_", ""))
    return f"modgrad-multishot-{'-'.join(words)}-{tasks}tasks.png"
