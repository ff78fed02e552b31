"""Result files -> runs, their statistics, and Markdown: what all tables share."""

import itertools
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
    "conv_lr": None,
    "conv4_lr": None,  # what runs from before --conv-lr have in its place
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
SHORT_UNITS = {
    "image_size": "px",
    "channels": "channels",
    "queries": "queries",
    "precision": "",
    "episodes": "episodes",
}
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
    files = {file for folder in folders for file in Path(folder).rglob("result.json")}
    for file in sorted(files):
        try:
            run = take(file, read_result(file))
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            why = f"{type(error).__name__}: {error}"
            fail(f"{file} is not a whole result file ({why}): delete it, run its command again")
        if run is not None:
            taken.append(run)
    return taken


def read(folders):
    """All runs of the KML family under the folders -> list of dicts (see read_run).

    Left out are those in a folder called `exercises`: their script had a line changed, which their flags do not say.
    """
    runs = read_each(folders, read_run)
    return [run for run in runs if "exercises" not in run["file"].parts]


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
    budget["steps"] = "paper" if done == full else done
    budget["synthetic"] = run["synthetic"]
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
    options = differing(args, OPTIONS | {"lr_halve_every": HALVING[family]})
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
    scores = {}
    for protocol, values in protocols.items():
        if values is not None:
            scores[protocol] = by_mode(values, modes)
    return {
        "modes": modes,
        "seed": run["args"]["seed"],
        "ways": run["ways"],
        "shots": run["shots"],
        "file": file,
        "data": dict(zip(modes, images_of(run))),
        "tasks": (modes, len(run["per_task"]), run.get("tasks_sha256")),
        "scores": scores,
        "parameters": sum(run["parameters"].values()),
        "seconds": float(run["seconds_per_iteration"]),
    }


def differing(args, usual):
    """The flags of a run that have another value than usual -> dict; a flag that the run does not have counts as usual."""
    found = {}
    for flag, value in usual.items():
        if args.get(flag, value) != value:
            found[flag] = args[flag]
    return found


def setting_text(modes, ways, shots):
    """What is classified, as titles have it."""
    return f"{' + '.join(modes)}, {ways}-way {shots}-shot"


def by_mode(values, modes):
    """Values of tasks, whose modes take turns -> {mode: array}."""
    found = {}
    for m, mode in enumerate(modes):
        found[mode] = np.array(values[m :: len(modes)], dtype=float)
    return found


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


def joined(name, modes, singles):
    """Multi-MAML or Multi-ProtoNet, called `name` with its flags: its runs on single modes as one."""
    of = [singles.get((name, mode)) for mode in modes]
    parts = [run for run in of if run]
    if len(parts) < len(of):
        lacking = [mode for mode, run in zip(modes, of) if run is None]
        if not parts:
            return absent(name, lacking)
        return absent(parts[0]["method"], lacking) | {"options": parts[0]["options"]}
    scores = {}
    for protocol in ("paper", "inductive"):
        measured = [run["scores"].get(protocol) for run in of]
        if None not in measured:
            scores[protocol] = {mode: found[mode] for mode, found in zip(modes, measured)}
    return absent(of[0]["method"]) | {
        "options": of[0]["options"],
        "scores": scores,
        "data": {mode: run["data"][mode] for mode, run in zip(modes, of)},
        "variant": any(run.get("variant") for run in of),
        "parameters": sum(run["parameters"] for run in of),
    }


def on_the_same_tasks(runs, modes):
    """Cut the scores of all runs to the test tasks that every run has -> the runs, so that differences of means add up.

    Test task j of a mode is the same for every run: of each mode, the first n tasks are kept, n the smallest number there.
    """
    measured = [run["scores"]["paper"] for run in runs if run["scores"]]
    count = {}
    for mode in modes:
        count[mode] = min(len(scores[mode]) for scores in measured)
    cut = []
    for run in runs:
        scores = {}
        for protocol, of in run["scores"].items():
            scores[protocol] = {mode: x[: count[mode]] for mode, x in of.items()}
        cut.append(run | {"scores": scores})
    return cut


def interval(strata):
    """Arrays of values, one per mode -> mean of their means, half width of its 95 % interval."""
    means = [x.mean() for x in strata]
    variances = [x.var(ddof=1) / len(x) for x in strata]
    half_width = 1.96 * math.sqrt(sum(variances)) / len(strata)
    return float(np.mean(means)), half_width


def score(run, protocol, modes):
    """Accuracy over `modes`, in % -> (mean, interval), or None where there is none."""
    if protocol not in run["scores"]:
        return None
    of = run["scores"][protocol]
    return interval([of[mode] for mode in modes])


def number_of_tasks(run):
    """How many test tasks a run has, all modes together."""
    return sum(map(len, run["scores"]["paper"].values()))


def images_of(run):
    """What the images of a run's modes are, from its result file -> list. The fingerprint of real images is left out: it was made of
    file times once, so that a copy of an archive had another. Which classes and images were drawn is in tasks_sha256."""
    if run["synthetic"]:
        return list(run["data"])
    return [re.sub(r"-[0-9a-f]{12}$", "", name) for name in run["data"]]


def difference(a, b, protocol, modes):
    """Accuracy of run a minus that of b on the tasks they share -> (mean, interval), or None where there are none."""
    if protocol not in a["scores"] or protocol not in b["scores"]:
        return None
    if any(a["data"][mode] != b["data"][mode] for mode in modes):
        return None
    one = a.get("tasks")  # modes, number, hash
    two = b.get("tasks")
    if one and two and one[:2] == two[:2] and one != two:
        return None
    return interval([gains(a, b, protocol, mode) for mode in modes])


def gains(a, b, protocol, mode):
    """Accuracy of run a minus that of b, task by task: task j of a mode is the same in every run -> array."""
    x = a["scores"][protocol][mode]
    y = b["scores"][protocol][mode]
    return x[: len(y)] - y[: len(x)]


def show(value, sign=""):
    """(mean, interval), or None -> the text of a cell."""
    if value is None:
        return "-"
    mean, half_width = value
    return f"{mean:{sign}.2f} ± {half_width:.2f}"


def flag_text(name, value):
    """A flag as a command has it."""
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    values = value if isinstance(value, list) else [value]
    return " ".join([flag, *map(str, values)])


def label(run, seed=True):
    """What a row calls a run: its method, its flags and, if it is to be named, a seed other than the table's first."""
    words = [run["method"]]
    flags = [flag_text(name, value) for name, value in run["options"].items()]
    if flags:
        words.append(f"`{' '.join(flags)}`")
    if seed and run["seed"] != run.get("first_seed", run["seed"]):
        words.append(f"seed {run['seed']}")
    return ", ".join(words)


def without_step_size(run):
    """The run without its flag --alpha, so that its label is that of runs with other step sizes."""
    options = dict(run["options"])
    options.pop("alpha", None)
    return run | {"options": options}


def of_one_seed(ours, runs):
    """Pairs of runs to compare: each of `ours` with every other run of its seed."""
    pairs = []
    for one, two in itertools.product(ours, runs):
        if two is not one and two["seed"] == one["seed"]:
            pairs.append((one, two))
    return pairs


def markdown(lines):
    """Lists of cells, the second of them dashes -> a Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(rows, columns):
    """Objects and {head: function that makes the object's cell} -> a Markdown table."""
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        lines.append([str(cell(row)) for cell in columns.values()])
    return markdown(lines)


def in_bold(remarks):
    """Remarks -> Markdown, each a sentence in bold; those without text are left out."""
    return " ".join(f"**{remark}.**" for remark in remarks if remark)


def headed(title, about):
    """A title and the remarks beneath it, of which those without text are left out -> Markdown."""
    remarks = " ".join(remark for remark in about if remark)
    return f"### {title}\n\n{remarks}\n"


def budget_text(budget, family):
    """What is not the paper's -> Markdown, "" if nothing is."""
    budget = dict(budget)
    words = []
    for key, usual in BUDGET.items():
        if budget[key] != usual:
            words.append(f"{budget[key]} {UNITS[key]} instead of {usual}")
    if budget["steps"] != "paper":
        ours, batch = budget["steps"]
        theirs, usual = ITERATIONS[family]
        words.append(f"{ours:,} iterations of {batch} tasks instead of {theirs:,} of {usual}")
    images = "Synthetic images" if budget["synthetic"] else ""
    return in_bold([images, ", ".join(words)])


def setting_name(modes):
    """The paper's name of a list of modes, or else their own names."""
    for name, of in SETTINGS.items():
        if of == set(modes) and len(of) == len(modes):
            return name
    return "+".join(modes)


def title(run):
    """The head of a run's table."""
    name = setting_name(run["modes"])
    if name in SETTINGS:
        name += f" ({' + '.join(run['modes'])})"
    return f"{run['family']} family, {name}, {run['ways']}-way {run['shots']}-shot"


def slug(run):
    """A run's table as a file name."""
    budget = dict(run["budget"])
    words = ["synthetic"] if budget["synthetic"] else []
    words += [run["family"], setting_name(run["modes"])]
    words += [f"{run['ways']}way", f"{run['shots']}shot"]
    words += [f"{budget[key]}{SHORT_UNITS[key]}" for key, usual in BUDGET.items() if budget[key] != usual]
    if budget["steps"] != "paper":
        words.append("{}x{}".format(*budget["steps"]))
    return "-".join(words).lower()


def last_validation(run):
    """The accuracy on validation classes that a trial's log ends with -> {"mean", "ci95"}; exit if there is none."""
    folder = run["file"].parent
    try:
        measured = [line["validation"] for line in read_log(folder / "log.jsonl") if "validation" in line]
        last = measured[-1]
        if "accuracy" in last:
            return last["accuracy"]  # multi-shot
        return last["paper"]["overall"]  # few-shot
    except (OSError, ValueError, KeyError, IndexError):
        fail(f"{folder} is a trial without validation in its log: train it with --val-every, or remove it")


def trials_block(runs, setting, about):
    """Trials of step sizes -> Markdown: what each method was tried with, the last validation accuracy in its log, the best bold.
    A trial is a run in a folder called `trials`; it stands in no other table. Each run: {"file", "method", "options", "seed", "alpha"}."""
    found = {}
    for run in runs:
        last = last_validation(run)
        trials = found.setdefault(label(without_step_size(run)), [])
        trials.append((run["alpha"], last["mean"], last["ci95"]))

    def cells(name):
        best = max(found[name], key=lambda trial: trial[1])
        shown = []
        for trial in sorted(found[name]):
            text = "{:g}: {:.2f} ± {:.2f}".format(*trial)
            shown.append(f"**{text}**" if trial is best else text)
        return ", ".join(shown)

    head = f"### Trials of step sizes on validation classes, {setting}\n\n{about}\n\n"
    columns = {"method": str, "size of an inner step: accuracy in %, paper protocol": cells}
    return head + table(sorted(found), columns)
