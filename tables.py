"""Result files -> the tables of the KML, ModGrad and attentive-feature-reuse papers, their numbers beside ours, and figures.

    python tables.py [FOLDER ...] [--out results]

reads every result.json and transference.json under the folders (default: runs), prints the tables as Markdown and writes them to
<out>/tables.md; with matplotlib installed also a figure for each table, accuracy of the training tasks against iterations,
ModGrad's Figure 6 where there are several numbers of shots, its Figures 5 and 8, and attentive feature reuse's Figure 5 where runs were
validated.

Runs stand in one table when they share setting (modes, ways, shots), family (MAML or ProtoNet) and budget (image size,
iterations, ...). A budget other than the paper's stands in the table's head. A method that has no run is shown as missing.
Intervals, 95 %, are over test tasks; modes are strata: overall is the mean of the modes' means, its interval
1.96 sqrt(sum_m s_m^2 / n_m) / M. Differences are paired: the same formula on the differences task by task.
"""
import argparse
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

import afr
import modgrad
import modgrad_completion
import modgrad_multishot
import modgrad_rl
import transference
from data import atomic_write, fail

# Rows of a table, and the pairs whose differences it shows. Multi-X: one X for each mode, trained on it alone.
FAMILIES = {"MAML": ("MAML", "Multi-MAML", "MMAML", "MMAML+KML"),
            "ProtoNet": ("ProtoNet", "Multi-ProtoNet", "MProtoNet", "MProtoNet+KML")}
PAIRS = ((3, 2), (3, 0), (3, 1), (2, 0), (0, 1))        # KML - FiLM, KML - none, KML - Multi, FiLM - none, none - Multi
SETTINGS = {"2mode-dagger": {"miniimagenet", "fc100"}, "2mode": {"omniglot", "miniimagenet"},
            "3mode": {"omniglot", "miniimagenet", "fc100"},
            "5mode": {"omniglot", "miniimagenet", "fc100", "cub", "aircraft"}}
TABLE1 = {      # KML paper, Table 1: overall accuracy and interval in %, 1-shot and 5-shot
    "2mode-dagger": {
        "MAML": ((40.53, 0.68), (54.11, 0.63)), "Multi-MAML": ((39.27, 0.76), (53.51, 0.72)),
        "MMAML": ((39.11, 0.62), (52.02, 0.63)), "MMAML+KML": ((40.73, 0.66), (53.72, 0.60)),
        "ProtoNet": ((43.05, 0.58), (57.70, 0.59)), "Multi-ProtoNet": ((43.42, 0.56), (56.73, 0.64)),
        "MProtoNet": ((43.57, 0.59), (56.03, 0.64)), "MProtoNet+KML": ((44.40, 0.65), (59.31, 0.62))},
    "2mode": {
        "MAML": ((65.18, 0.61), (74.18, 0.57)), "Multi-MAML": ((66.77, 0.68), (73.07, 0.61)),
        "MMAML": ((67.67, 0.63), (73.52, 0.71)), "MMAML+KML": ((68.01, 0.59), (77.02, 0.66)),
        "ProtoNet": ((69.55, 0.54), (75.12, 0.41)), "Multi-ProtoNet": ((70.17, 0.61), (75.33, 0.46)),
        "MProtoNet": ((70.60, 0.56), (75.72, 0.47)), "MProtoNet+KML": ((73.69, 0.52), (79.82, 0.40))},
    "3mode": {
        "MAML": ((54.40, 0.56), (66.51, 0.54)), "Multi-MAML": ((56.01, 0.66), (65.92, 0.62)),
        "MMAML": ((57.35, 0.61), (64.21, 0.57)), "MMAML+KML": ((57.68, 0.59), (67.12, 0.55)),
        "ProtoNet": ((58.14, 0.49), (66.84, 0.44)), "Multi-ProtoNet": ((59.89, 0.50), (67.03, 0.44)),
        "MProtoNet": ((59.62, 0.54), (67.51, 0.47)), "MProtoNet+KML": ((62.08, 0.54), (70.03, 0.43))},
    "5mode": {
        "MAML": ((47.19, 0.49), (58.13, 0.48)), "Multi-MAML": ((48.33, 0.58), (59.20, 0.52)),
        "MMAML": ((49.53, 0.50), (58.89, 0.47)), "MMAML+KML": ((50.31, 0.49), (60.51, 0.47)),
        "ProtoNet": ((49.31, 0.53), (58.91, 0.51)), "Multi-ProtoNet": ((50.69, 0.57), (59.88, 0.54)),
        "MProtoNet": ((51.75, 0.52), (59.95, 0.42)), "MProtoNet+KML": ((56.72, 0.46), (64.91, 0.38))}}
TABLE2 = {      # KML paper, Table 2: the same of each mode of 2mode-dagger
    "miniimagenet": {
        "MAML": ((44.11, 0.88), (59.34, 0.78)), "Multi-MAML": ((41.70, 0.91), (60.03, 0.88)),
        "MMAML": ((42.70, 0.86), (56.93, 0.78)), "MMAML+KML": ((44.01, 0.82), (58.95, 0.76)),
        "ProtoNet": ((45.62, 0.82), (61.74, 0.75)), "Multi-ProtoNet": ((47.19, 0.58), (61.11, 0.53)),
        "MProtoNet": ((47.06, 0.80), (60.56, 0.77)), "MProtoNet+KML": ((48.34, 0.86), (61.20, 0.77))},
    "fc100": {
        "MAML": ((37.01, 0.82), (49.01, 0.73)), "Multi-MAML": ((36.84, 0.81), (47.08, 0.74)),
        "MMAML": ((35.50, 0.75), (47.11, 0.77)), "MMAML+KML": ((37.47, 0.86), (48.45, 0.76)),
        "ProtoNet": ((40.36, 0.76), (53.66, 0.77)), "Multi-ProtoNet": ((39.61, 0.54), (52.35, 0.57)),
        "MProtoNet": ((40.09, 0.77), (51.50, 0.83)), "MProtoNet+KML": ((40.48, 0.77), (54.42, 0.76))}}
# What the paper's runs have. A run with other options is a variant, and says so in its row; a run of another budget stands in
# another table.
OPTIONS = {"lr": 1e-3, "no_norm_affine": False, "first_order": False, "inner_clip": 20.0, "inner_lr": 0.05,
           "inner_steps": 5, "no_residual": False, "embed": "support", "transductive": False, "generator": "outer",
           "init_scale": 1.0, "distance_scale": 1.0, "adapt": "theta", "repeat_tasks": False}
HALVING = {"MAML": 0, "ProtoNet": 10000}
MULTI_MAML = {"omniglot": {"inner_lr": 0.4, "inner_steps": 1}, "": {"inner_lr": 0.01}}
BUDGET = {"image_size": 84, "channels": 32, "queries": 15, "precision": "fp32"}
MODGRAD = {     # ModGrad paper, Table 2, 4 (steps) and 5 (u): accuracy and, if given, interval in %, 1-shot and 5-shot
    "ModGrad": ((53.20, 0.86), (69.17, 0.69)), "MAML": ((47.89, 1.20), (64.59, 0.88)), "Meta-SGD": ((50.50, 1.90), (64.00, 0.90)),
    "CAVIA": ((51.82, 0.65), (65.85, 0.55)), "T-Net": ((51.70, 1.84), None),                # CAVIA's with 512 channels
    "ModGrad, wrn28-10, `--augment`": ((65.72, 0.21), (81.17, 0.20)),
    "ModGrad, `--steps 2`": (52.66, 68.80), "ModGrad, `--steps 3`": (53.54, 68.42), "ModGrad, `--steps 4`": (52.87, 68.34),
    "ModGrad, `--steps 5`": (52.76, 68.24), "ModGrad, `--rank 1`": (53.13, 68.43), "ModGrad, `--rank 10`": (52.53, 67.62)}
MODGRAD_BUDGET = {"image_size": 84, "channels": 64, "queries": 15, "precision": "fp32", "episodes": 50000}
MODGRAD_DEEP = {"resnet34": {"image_size": 224, "episodes": 100000}}
AFR_TABLE1 = {  # attentive feature reuse, Table 1, on MMT: classification, depth (error in 1e-3), vanishing, normals: accuracy, error
    "single": {"ANIL": {32: ((37.7,), (86.5, 0.543), (10.5, 0.1058), (8.9, 0.0936)), 64: ((38.42,), (81.4, 0.384), (11.1, 0.103), (12.03, 0.095))},
               "AM": {32: ((39.6,), (87.8, 0.495), (17.6, 0.0823), (11.4, 0.0841)), 64: ((39.45,), (88.6, 0.361), (16.8, 0.071), (14.5, 0.082))}},
    "multi": {"ANIL": {32: ((37.88,), (80.71, 0.698), (11.3, 0.1183), (9.4, 0.0842)), 64: ((39.94,), (76.1, 0.867), (13.8, 0.103), (12.5, 0.066))},
              "AM": {32: ((39.07,), (78.06, 0.852), (17.4, 0.081), (13.6, 0.0621)), 64: ((39.99,), (85.3, 0.527), (16.2, 0.088), (12.5, 0.0613))}}}
AFR_TRANSFER = {"MAML": (31.2, 33.8), "ANIL": (32.7, 33.9), "AM": (33.5, 34.3), "P-AM": (32.6, 34.1)}   # Table 2, mini-Places, CE and NIL
AFR_BUDGET = {"image_size": 84, "queries": 15, "precision": "fp32", "iterations": 60000, "meta_batch": 4}
AFR_ORDER = ("classification", "depth", "vanishing", "normals")                  # of columns, the paper's
UNITS = {"image_size": "px", "channels": "channels in layer 1", "queries": "queries a class", "precision": "precision",
         "episodes": "episodes"}
ITERATIONS = {"MAML": (60000, 10), "ProtoNet": (30000, 10)}          # and tasks in each
MULTI_ITERATIONS = {"omniglot": (60000, 10), "": (80000, 4)}         # of Multi-MAML


# ------------------------------------------------------------------------------------------------------- reading
def read(folders):
    """All runs under the folders -> list of dicts (see read_run)."""
    files = sorted({file for folder in folders for file in Path(folder).rglob("result.json")})
    return [run for run in map(read_run, files) if run]


def read_run(file):
    """One result.json -> what the tables need of it; None if it is of a script that makes no table of the KML paper.

    `scores` is {protocol: {mode: array of its tasks' accuracies}}, `options` what differs from the paper's method,
    `budget` what two runs must have in common to stand in one table.
    """
    try:
        run = json.loads(file.read_text())
        method = run["method"] if "algorithm" not in run.get("args", {}) else ""       # modgrad.py has a MAML of its own
        family = "MAML" if method in FAMILIES["MAML"] else "ProtoNet"
        if method not in FAMILIES[family]:
            return None
        modes, args = run["modes"], run["args"]
        if method == "MMAML+KML":
            args = {"adapt": "modulated"} | args        # so were runs from before there was this flag
        usual = OPTIONS | {"lr_halve_every": HALVING[family]}
        options = {k: args[k] for k, v in usual.items() if args.get(k, v) != v}
        steps = ITERATIONS[family]
        if method == "ProtoNet" and len(modes) == 1:
            method = "Multi-ProtoNet"
        elif method == "MAML" and len(modes) == 1:
            own = MULTI_MAML.get(modes[0], MULTI_MAML[""])
            if own.items() <= options.items():
                method, options = "Multi-MAML", {k: v for k, v in options.items() if k not in own}
                steps = MULTI_ITERATIONS.get(modes[0], MULTI_ITERATIONS[""])
        done = run["iterations"], args["meta_batch"]
        protocols = {"paper": run["per_task"], "inductive": run["per_task_inductive"]}
        return {"method": method, "modes": modes, "family": family, "options": options, "seed": args["seed"],
                "ways": run["ways"], "shots": run["shots"], "file": file, "data": dict(zip(modes, images_of(run))),
                "tasks": (modes, len(run["per_task"]), run.get("tasks_sha256")), "note": run.get("note"),
                "budget": tuple((k, args.get(k, v)) for k, v in BUDGET.items())
                + (("steps", "paper" if done == steps else done), ("synthetic", run["synthetic"])),
                "scores": {protocol: {mode: np.array(x[m::len(modes)]) for m, mode in enumerate(modes)}
                           for protocol, x in protocols.items() if x is not None},
                "parameters": sum(run["parameters"].values()), "seconds": run["seconds_per_iteration"]}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        fail(f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again")


def absent(method, modes=()):
    """What stands in a table for a run that is not there; `modes`: of which it would be made."""
    return {"method": method, "options": {}, "seed": None, "missing": modes, "scores": {}, "data": {}, "parameters": None,
            "seconds": None}


def joined(method, modes, singles):
    """Multi-MAML or Multi-ProtoNet: its runs on single modes as one."""
    of = [singles.get((method, mode)) for mode in modes]
    if None in of:
        return absent(method, [mode for mode, run in zip(modes, of) if run is None])
    return absent(method) | {
        "scores": {protocol: {mode: run["scores"][protocol][mode] for mode, run in zip(modes, of)}
                   for protocol in ("paper", "inductive") if all(protocol in run["scores"] for run in of)},
        "data": {mode: run["data"][mode] for mode, run in zip(modes, of)},
        "parameters": sum(run["parameters"] for run in of)}


def on_the_same_tasks(runs, modes):
    """Cut the scores of all runs to the test tasks that every run has -> the runs, so that differences of means add up.

    Test task j of a mode is the same for every run: of each mode, the first n tasks are kept, n the smallest number there.
    """
    measured = [run["scores"]["paper"] for run in runs if run["scores"]]
    count = {mode: min(len(scores[mode]) for scores in measured) for mode in modes}
    cut = []
    for run in runs:
        scores = {protocol: {mode: x[:count[mode]] for mode, x in of.items()} for protocol, of in run["scores"].items()}
        cut.append(run | {"scores": scores})
    return cut


# ---------------------------------------------------------------------------------------------------- statistics
def interval(strata):
    """Arrays of values, one a mode -> mean of their means, half width of its 95 % interval."""
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
    if not all(protocol in run["scores"] for run in (a, b)) or any(a["data"][m] != b["data"][m] for m in modes):
        return None
    one, two = a.get("tasks"), b.get("tasks")                               # modes, number, hash
    if one and two and one[:2] == two[:2] and one != two:
        return None
    pairs = [(a["scores"][protocol][m], b["scores"][protocol][m]) for m in modes]
    return interval([x[:len(y)] - y[:len(x)] for x, y in pairs])        # task j is the same in every run


# ------------------------------------------------------------------------------------------------------ Markdown
def show(value, sign=""):
    return "-" if value is None else f"{value[0]:{sign}.2f} ± {value[1]:.2f}"


def label(run, seed=True):
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in run["options"].items()]
    return ", ".join([run["method"], *([f"`{' '.join(flags)}`"] if flags else []),
                      *([f"seed {run['seed']}"] if seed and run["seed"] != run.get("first_seed", run["seed"]) else [])])


def table(rows, columns):
    """Objects and {head: function that makes the object's cell} -> a Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *([str(cell(row)) for cell in columns.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def budget_text(budget, family):
    """What is not the paper's -> Markdown, "" if nothing is."""
    budget = dict(budget)
    words = [f"{budget[key]} {UNITS[key]} instead of {usual}" for key, usual in BUDGET.items() if budget[key] != usual]
    if budget["steps"] != "paper":
        (ours, batch), (theirs, usual) = budget["steps"], ITERATIONS[family]
        words.append(f"{ours:,} iterations of {batch} tasks instead of {theirs:,} of {usual}")
    return " ".join(f"**{x}.**" for x in ("Synthetic images" * budget["synthetic"], ", ".join(words)) if x)


def pairs(runs, methods):
    """Which runs to compare: the methods among each other; a variant, or another seed, with what differs from it
    in nothing else."""
    usual = {(run["method"], run["seed"]): run for run in runs if not run["options"]}
    main = {run["method"]: run for run in runs if label(run) == run["method"]}
    found = [(main.get(methods[i]), main.get(methods[j])) for i, j in PAIRS]
    for run in runs:
        if label(run) != run["method"]:
            found += [(run, usual.get((method, run["seed"]))) for method in dict.fromkeys((run["method"], methods[0]))]
    return [(a, b) for a, b in found if a and b and a is not b and a["scores"] and b["scores"]]


def by_seed(rows, reference, modes):
    """Where a configuration was trained from several seeds: a line for each, a column a seed -> Markdown, or ""."""
    seeds = sorted({run["seed"] for run in rows if run["scores"] and run["seed"] is not None})
    runs = {(label(run, seed=False), run["seed"]): run for run in rows if run["scores"] and run["seed"] is not None}
    if len(seeds) < 2:
        return ""

    def cells(protocol, minus):
        def cell(name):
            of = [(runs.get((name, seed)), runs.get((reference, seed))) for seed in seeds]
            return ", ".join(show(difference(run, base, protocol, modes), "+") if run and base and minus and run is not base else
                             show(score(run, protocol, modes)) if run and not minus else "-" for run, base in of)
        return cell
    at = f"seeds {' and '.join(map(str, seeds))}"
    return table(dict.fromkeys(name for name, _ in runs), {
        "configuration": lambda name: name, f"overall, paper protocol, {at}": cells("paper", False),
        f"minus {reference} of the same seed": cells("paper", True), f"overall, inductive, {at}": cells("inductive", False),
        f"minus {reference}, inductive": cells("inductive", True)})


def common_flags(runs, keys):
    """Flags, and a seed, that all runs of one family, budget, ways and shots have in common are no variants: they leave the
    runs' `options` for `common`, a remark above the table; `first_seed` is the seed that goes without saying."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[k] for k in keys), []).append(run)
    for group in groups.values():
        first = group[0]["options"]
        shared = {k: v for k, v in first.items() if all(run["options"].get(k) == v for run in group)}
        seed = min(run["seed"] for run in group)
        flags = label({"method": "", "options": shared | ({"seed": seed} if seed else {}), "seed": None})
        for run in group:
            run["options"] = {k: v for k, v in run["options"].items() if k not in shared}
            run |= {"first_seed": seed, "common": f"All{flags.removeprefix(',')}." if flags else ""}


def block(runs, singles):
    """The runs of one setting, family and budget -> Markdown: accuracies, then paired differences.

    `singles`: {(method, mode): its run on that mode alone}, of the same ways, shots, family and budget.
    """
    first, methods = runs[0], FAMILIES[runs[0]["family"]]
    modes, shots, setting = first["modes"], first["shots"], setting_name(first["modes"])
    several = modes if len(modes) > 1 else []
    comparable = first["ways"] == 5 and shots in (1, 5) and not dict(first["budget"])["synthetic"]
    table1, table2 = TABLE1.get(setting, {}) if comparable else {}, comparable and setting == "2mode-dagger"

    order = {run["method"]: run for run in runs if label(run) == run["method"]}
    if several:
        order = {m: order.get(m) or absent(m) for m in methods} | {methods[1]: joined(methods[1], modes, singles)}
    rest = [run for run in runs if run not in order.values()]
    rows = [*order.values(), *sorted(rest, key=lambda run: (methods.index(run["method"]), label(run, seed=False), run["seed"]))]
    rows = on_the_same_tasks(rows, modes)

    def published(where):
        return lambda run: show(where[run["method"]][shots == 5] if where and not run["options"] else None)

    def missing(run):
        return ": missing" + f" ({', '.join(run['missing'])})" * bool(run["missing"]) if not run["scores"] else ""
    columns = {"method": lambda run: label(run) + missing(run),
               "overall, paper protocol": lambda run: show(score(run, "paper", modes)),
               "overall, inductive": lambda run: show(score(run, "inductive", modes))}
    columns |= {"KML's Table 1": published(table1)} if table1 else {}
    columns |= {f"{m}, paper / inductive": lambda run, m=m: " / ".join(
        show(score(run, protocol, [m])) for protocol in ("paper", "inductive")) for m in several}
    columns |= {f"KML's Table 2, {m}": published(TABLE2[m]) for m in several if table2}
    columns |= {"parameters": lambda run: f"{run['parameters']:,}" if run["parameters"] else "-",
                "s an iteration": lambda run: f"{run['seconds']:.2g}" if run["seconds"] else "-"}

    def published_difference(pair):
        return "-" if any(run["options"] for run in pair) else "{:+.2f}".format(
            table1[pair[0]["method"]][shots == 5][0] - table1[pair[1]["method"]][shots == 5][0])
    differences = {"difference, task by task": lambda pair: f"{label(pair[0])} - {label(pair[1])}",
                   "overall, paper protocol": lambda pair: show(difference(*pair, "paper", modes), "+"),
                   "overall, inductive": lambda pair: show(difference(*pair, "inductive", modes), "+")}
    differences |= {"KML's Table 1": published_difference} if table1 else {}
    differences |= {f"{m}, paper protocol": lambda pair, m=m: show(difference(*pair, "paper", [m]), "+") for m in several}

    count = max(sum(map(len, run["scores"]["paper"].values())) for run in rows if run["scores"])
    about = [budget_text(first["budget"], first["family"]), first.get("common", ""), f"{count:,} test tasks;",
             "accuracy in %, 95 % interval over tasks.", *sorted({run["note"] for run in runs if run.get("note")})]
    compared = pairs(rows, methods)
    return (f"### {title(first)}\n\n{' '.join(x for x in about if x)}\n\n{table(rows, columns)}"
            + "".join(f"\n{more}" for more in (table(compared, differences) if compared else "", by_seed(rows, methods[0], modes))
                      if more))


def setting_name(modes):
    names = [name for name, of in SETTINGS.items() if of == set(modes) and len(of) == len(modes)]
    return names[0] if names else "+".join(modes)


def title(run):
    name, modes = setting_name(run["modes"]), " + ".join(run["modes"])
    return f"{run['family']} family, {name}{f' ({modes})' * (name in SETTINGS)}, {run['ways']}-way {run['shots']}-shot"


# ------------------------------------------------------------------------------------------------------- ModGrad
def read_modgrad(folders):
    """All runs of modgrad.py under the folders -> list of dicts, whose `scores` are {protocol: {mode: array}} of the last
    parameters, `best` the same of those best on validation classes, or None."""
    runs = []
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = json.loads(file.read_text())
            if "algorithm" not in run.get("args", {}) or {"pixels", "env", "curve", "nil_or_error"} & set(run):
                continue
            args, modes, best = run["args"], run["modes"], run.get("best_on_validation")
            steps, alpha, _ = modgrad.DEFAULTS[args["algorithm"]]
            usual = {"steps": steps, "alpha": alpha, "rank": 5, "context": 100 if args["algorithm"] == "cavia" else 300, "lr": 1e-3,
                     "lr_halve_every": 3333, "inner_clip": 20.0, "first_order": False, "augment": False}
            scores = [{protocol: {mode: np.array(x[key][m::len(modes)]) for m, mode in enumerate(modes)}
                       for protocol, key in (("paper", "per_task"), ("inductive", "per_task_inductive"))} for x in (run, best) if x]
            budget = MODGRAD_BUDGET | MODGRAD_DEEP.get(args["backbone"], {})
            episodes = run["iterations"] * args["meta_batch"]
            if abs(episodes - budget["episodes"]) < args["meta_batch"]:         # 50,000 are not a multiple of 3
                episodes = budget["episodes"]
            done = {k: args.get(k, v) for k, v in budget.items()} | {"episodes": episodes}
            runs.append({
                "method": run["method"], "options": {k: args[k] for k, v in usual.items() if args.get(k, v) != v}, "seed": args["seed"],
                "alpha": args["alpha"], "modes": modes, "ways": run["ways"], "shots": run["shots"], "file": file,
                "data": dict(zip(modes, images_of(run))), "tasks": (modes, len(run["per_task"]), run.get("tasks_sha256")),
                "budget": (*((k, None if done[k] == v else (done[k], v)) for k, v in budget.items()), ("synthetic", run["synthetic"])),
                "scores": scores[0], "best": {"scores": scores[1], "iteration": best["iteration"]} if best else None,
                "parameters": sum(run["parameters"].values()), "seconds": run["seconds_per_iteration"]})
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            fail(f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again")
    return [run | {"first_seed": min(other["seed"] for other in runs)} for run in runs]


def modgrad_budget_text(budget):
    """What is not the paper's -> Markdown, "" if nothing is. `budget`: {what: None, or (ours, the paper's)}."""
    budget = dict(budget)
    words = ["{:,} {} instead of {:,}".format(budget[key][0], UNITS[key].replace("layer 1", "each layer"), budget[key][1])
             if key != "precision" else f"{budget[key][0]} instead of {budget[key][1]}" for key in MODGRAD_BUDGET if budget[key]]
    return " ".join(f"**{x}.**" for x in ("Synthetic images" * budget["synthetic"], ", ".join(words)) if x)


def modgrad_block(runs):
    """The runs of one setting and budget -> Markdown: accuracies, then differences from ModGrad, task by task."""
    first = runs[0]
    modes, shots, several = first["modes"], first["shots"], first["modes"] if len(first["modes"]) > 1 else []
    names = list(MODGRAD)
    runs = sorted(runs, key=lambda run: (run["seed"], *[names.index(x) if x in names else len(names) for x in (label(run, False), run["method"])],
                                         label(run)))
    known = modes == ["miniimagenet"] and first["ways"] == 5 and shots in (1, 5) and not dict(first["budget"])["synthetic"]

    def plain(run):                                     # a step size is no other method
        return label(run | {"options": {k: v for k, v in run["options"].items() if k != "alpha"}}, False)

    def published(run):
        value = MODGRAD.get(plain(run), (None, None))[shots == 5] if known else None
        return f"{value:.2f}" if isinstance(value, float) else show(value)

    def best(run, protocol):
        return show(score(run["best"], protocol, modes)) if run["best"] else "-"
    columns = {"method": label, "last, paper protocol": lambda run: show(score(run, "paper", modes)),
               "last, inductive": lambda run: show(score(run, "inductive", modes)),
               "best on validation, paper protocol": lambda run: best(run, "paper"),
               "best on validation, inductive": lambda run: best(run, "inductive")}
    columns |= {"ModGrad's paper": published} if known else {}
    columns |= {f"{m}, last, paper protocol": lambda run, m=m: show(score(run, "paper", [m])) for m in several}
    columns |= {"parameters": lambda run: f"{run['parameters']:,}", "s an iteration": lambda run: f"{run['seconds']:.2g}"}
    ours = [run for run in runs if plain(run) == "ModGrad"]
    pairs = [(one, two) for one in ours for two in runs if two is not one and two["seed"] == one["seed"]]

    def of_best(pair, protocol):
        if not all(run["best"] for run in pair):
            return None
        return difference(*(run | {"scores": run["best"]["scores"]} for run in pair), protocol, modes)
    differences = {"difference, task by task": lambda pair: f"{label(pair[0])} - {label(pair[1])}",
                   "last, paper protocol": lambda pair: show(difference(*pair, "paper", modes), "+"),
                   "last, inductive": lambda pair: show(difference(*pair, "inductive", modes), "+"),
                   "best on validation, paper protocol": lambda pair: show(of_best(pair, "paper"), "+"),
                   "best on validation, inductive": lambda pair: show(of_best(pair, "inductive"), "+")}
    counts = sorted({sum(map(len, run["scores"]["paper"].values())) for run in runs})
    about = [modgrad_budget_text(first["budget"]), f"{' or '.join(f'{n:,}' for n in counts)} test tasks;",
             "accuracy in %, 95 % interval over tasks. *Last* parameters, and those *best on validation* classes among those kept."]
    return (f"### ModGrad and its rivals, {' + '.join(modes)}, {first['ways']}-way {shots}-shot\n\n{' '.join(x for x in about if x)}\n\n"
            + table(runs, columns) + ("\n" + table(pairs, differences) if pairs else ""))


def completion_tables(folders):
    """The runs of modgrad_completion.py under the folders -> parts of tables.md: ModGrad's Table 3, one for each budget."""
    groups, orders = {}, [("random", 10), ("random", 100), ("ordered", 10), ("ordered", 100)]
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = json.loads(file.read_text())
            if "pixels" not in run:
                continue
            args = run["args"]
            usual = dict(zip(("steps", "alpha", "adapt"), modgrad_completion.DEFAULTS[args["algorithm"]])) | {
                "rank": 5, "context": 128, "hidden": 128, "inner_clip": 10.0, "first_order": False, "lr": 1e-3, "lr_halve_every": 0, "seed": 0}
            flags = {k: args[k] for k, v in usual.items() if k != "adapt" and args.get(k, v) != v}
            name = run["method"], label({"method": "", "options": flags, "seed": None})         # of rows
            key = (tuple(run["modes"]), run["synthetic"], args["image_size"], args["precision"], run["iterations"], args["meta_batch"],
                   run["test_tasks"])
            cells = groups.setdefault(key, {})
            if (name, (run["order"], run["pixels"])) in cells:
                print(f"note: {file} repeats another run and is left out", file=sys.stderr)
            cells.setdefault((name, (run["order"], run["pixels"])), (np.array(run["per_task"]), images_of(run)))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            fail(f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again")
    parts = []
    for (modes, synthetic, size, precision, iterations, batch, tasks), cells in sorted(groups.items()):
        columns = [order for order in orders if any(order == other for _, other in cells)]
        columns += sorted({order for _, order in cells} - set(orders))
        names = list(modgrad_completion.PAPER)
        rows = sorted({name for name, _ in cells}, key=lambda name: (names.index(name[0]) if name[0] in names else len(names), name))
        known = modes == ("celeba",) and not synthetic

        def score(cell, sign=""):
            return f"{cell.mean():{sign}.4f} ± {1.96 * cell.std(ddof=1) / math.sqrt(len(cell)):.4f}"

        def made(name, order, cells=cells, score=score):
            return score(cells[name, order][0]) if (name, order) in cells else "missing"

        def published(name, order, known=known):
            numbers = modgrad_completion.PAPER.get("".join(name), {})
            return f" ({numbers[order[::-1]]:.3f})" if known and order[::-1] in numbers else ""

        def against(name, order, cells=cells, score=score):
            pair = [cells.get((x, order)) for x in (("ModGrad", name[1]), name)]
            return score(pair[0][0] - pair[1][0], "+") if None not in pair and pair[0][1] == pair[1][1] else "-"
        about = [*(["Synthetic images"] if synthetic else []), *([f"{size} px instead of 32"] if size != 32 else []), *([precision] if precision != "fp32" else []),
                 *([f"{iterations:,} iterations of {batch} images instead of 50,000 of 25"] if (iterations, batch) != (50000, 25) else [])]
        head = {order: f"{order[1]} {order[0]} pixels" for order in columns}
        parts.append(
            f"### Image completion, {' + '.join(modes)}\n\n" + "".join(f"**{x}.** " for x in about) +
            f"{tasks:,} test images; mean squared error over all pixels, 95 % interval over images"
            + "; in brackets ModGrad's Table 3" * known + ".\n\n"
            + table(rows, {"method": "".join} | {head[o]: lambda name, o=o: made(name, o) + published(name, o) for o in columns})
            + "\n" + table([name for name in rows if name[0] != "ModGrad"], {"difference, image by image": lambda name: f"ModGrad - {''.join(name)}"} | {
                head[o]: lambda name, o=o: against(name, o) for o in columns}))
    return parts


MULTISHOT_BUDGET = {"ways": 20, "queries": 5, "batch": 20, "image_size": 28, "channels": 64, "precision": "fp32", "test_steps": 100,
                    "iterations": 1000, "meta_batch": 20}
MULTISHOT_UNITS = UNITS | {"ways": "ways", "batch": "images a step", "channels": "channels in each layer", "test_steps": "steps in testing",
                           "iterations": "iterations", "meta_batch": "tasks an iteration"}
MULTISHOT_OPTIONS = {"rank": 5, "context": 300, "inner_clip": 20.0, "first_order": False, "lr_halve_every": 0, "seed": 0}


def multishot_tables(folders, out, figures):
    """The runs of modgrad_multishot.py under the folders -> parts of tables.md: ModGrad's Figure 5, one for each budget; appends to
    `figures` (function, its arguments). Runs in a folder called `trials` are trials of step sizes on validation alphabets."""
    groups, trials, parts, methods = {}, {}, [], list(modgrad_multishot.METHODS.values())
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = json.loads(file.read_text())
            if "curve" not in run:
                continue
            args = run["args"]
            usual = MULTISHOT_OPTIONS | dict(zip(("steps", "alpha", "adapt", "outer", "lr"), modgrad_multishot.DEFAULTS[args["algorithm"]]))
            idle = ("adapt",) if args["algorithm"] == "modgrad" else ("adapt", "rank", "context")      # layers are in the method's name
            options = {k: args[k] for k, v in usual.items() if k not in idle and args.get(k, v) != v}
            budget = tuple((k, run["iterations"] if k == "iterations" else args[k]) for k in MULTISHOT_BUDGET)
            if "trials" in file.parts:
                trials.setdefault((tuple(run["modes"]), run["synthetic"], tuple(run["shots"]), budget), []).append(
                    {"file": file, "method": run["method"], "options": options, "seed": None, "alpha": args["alpha"]})
                continue
            runs = groups.setdefault((tuple(run["modes"]), run["synthetic"], tuple(run["shots"]), run["test_tasks"], budget), {})
            name = label({"method": run["method"], "options": options, "seed": None})
            if name in runs:
                print(f"note: {file} repeats another run and is left out", file=sys.stderr)
            runs.setdefault(name, {"what": (images_of(run), run["tasks_sha256"]), **{
                k: run[k] for k in ("method", "accuracy", "accuracy_inductive", "loss", "curve", "after", "seconds_per_iteration")}, **{
                k: np.array(run[k]) for k in ("per_task", "per_task_inductive", "per_task_loss", "per_task_alphabet")}})
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            fail(f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again")
    for (modes, synthetic, shots, tasks, budget), runs in sorted(groups.items()):
        budget = dict(budget)
        K, known = budget["test_steps"], modes == ("omniglot",) and not synthetic and (budget["ways"], budget["test_steps"]) == (20, 100)
        rows = sorted(runs.items(), key=lambda row: (methods.index(row[1]["method"].split(" on ")[0]), row[1]["method"], row[0]))

        def spread(value, digits=2, sign=""):
            return "{:{}.{d}f} ± {:.{d}f}".format(value["mean"], sign, value["ci95"], d=digits)

        def against(key, digits=2, base=rows[0][1], spread=spread):
            def cell(row):
                if base["what"] != row[1]["what"]:
                    return "-"                              # other tasks
                return spread(modgrad_multishot.summary(base[key] - row[1][key], base["per_task_alphabet"]), digits, "+")
            return cell
        columns = {"method": lambda row: row[0], "inductive": lambda row, f=spread: f(row[1]["accuracy_inductive"]),
                   "paper protocol": lambda row, f=spread: f(row[1]["accuracy"])}
        columns |= {"ModGrad's Figure 5": lambda row: modgrad_multishot.PAPER[row[1]["method"]] or "-"} if known else {}
        columns |= {f"after {k}": lambda row, i=i: f"{row[1]['after']['mean'][i]:.2f}" for i, k in enumerate(rows[0][1]["after"]["steps"][:-1])}
        columns |= {"training loss": lambda row, f=spread: f(row[1]["loss"], 3), "s an iteration": lambda row: f"{row[1]['seconds_per_iteration']:.2g}"}
        differences = {"difference, task by task": lambda row, base=rows[0][0]: f"{base} - {row[0]}", "inductive": against("per_task_inductive"),
                       "paper protocol": against("per_task"), "training loss": against("per_task_loss", 3)}
        words = multishot_words(synthetic, budget)
        parts.append(
            f"### Multi-shot, {' + '.join(modes)}, {budget['ways']}-way, {shots[0]} to {shots[1]} shots\n\n" + "".join(f"**{x}.** " for x in words)
            + f"{tasks:,} test tasks; accuracy in % on held-out drawings after {K} steps, and after fewer (paper protocol); training loss: the mean of "
            f"the {K} steps; 95 % intervals over alphabets." + f" LEAP, which is not here, has {modgrad_multishot.PAPER['LEAP']} in the paper. Its "
            "code, which the paper builds on, judges training drawings, by running BatchNorm statistics (but for MAML)." * known
            + f"\n\n{table(rows, columns)}" + (f"\n{table(rows[1:], differences)}" if rows[0][1]["method"] == "ModGrad" and rows[1:] else ""))
        if importlib.util.find_spec("matplotlib"):
            slug = [*["synthetic"] * synthetic, "+".join(modes), f"{shots[0]}to{shots[1]}", *(f"{k}{budget[k]}" for k, v in MULTISHOT_BUDGET.items() if budget[k] != v)]
            figures.append((against_steps, dict(rows), "; ".join(words), out / f"modgrad-multishot-{'-'.join(slug).replace('_', '')}-{tasks}tasks.png"))
            parts.append(f"![Training loss and accuracy against steps]({figures[-1][-1].name})\n")
    for (modes, synthetic, shots, budget), runs in sorted(trials.items()):
        setting = f"multi-shot, {' + '.join(modes)}, {dict(budget)['ways']}-way, {shots[0]} to {shots[1]} shots"
        about = " ".join(f"**{x}.**" for x in multishot_words(synthetic, dict(budget))) + " Intervals over alphabets."
        parts.append(trials_block(runs, setting, about))
    return parts


def multishot_words(synthetic, budget):
    """What of a run's budget is not the protocol's, a list."""
    return ["Synthetic images"] * synthetic + [f"{budget[k]} {MULTISHOT_UNITS[k]} instead of {v}" for k, v in MULTISHOT_BUDGET.items() if budget[k] != v]


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
        right.errorbar(run["after"]["steps"], run["after"]["mean"], run["after"]["ci95"], marker="o", capsize=2, label=name)
    top = 1.2 * max(run["curve"]["mean"][0] for run in runs.values())      # what diverges leaves the picture
    left.set(xlabel="steps made", ylabel="loss of the next training batch", ylim=(0, top))
    right.set(xlabel="steps made", ylabel="accuracy on held-out drawings, %, paper protocol", xscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", fontsize="small", ncols=3)
    figure.suptitle(f"Alphabets not trained on\n{about}".strip(), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


# What the runs of an environment must have in common to stand in one table, with the protocol's value, and how to say it.
RL_BUDGET = {"iterations": (500, "iterations"), "meta_batch": (40, "tasks an iteration"), "rollouts": (20, "rollouts"), "horizon": (None, "steps"),
             "hidden": (100, "units"), "gamma": (0.95, "discount")}


def rl_tables(folders, out, figures):
    """The runs of modgrad_rl.py under the folders -> parts of tables.md: ModGrad's Figure 8, one for each environment and budget;
    appends to `figures` (function, its arguments)."""
    groups = {}
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = json.loads(file.read_text())
            if "env" not in run:
                continue
            args, env = run["args"], run["env"]
            alpha, _ = modgrad_rl.DEFAULTS[args["algorithm"]]
            if env != "navigation":
                alpha = modgrad_rl.CHEETAH_ALPHA.get(args["algorithm"], alpha)
            context = (5 if env == "navigation" else 50) if args["algorithm"] == "cavia" else 128
            usual = {"alpha": alpha, "context": context, "rank": 5, "updates": 1, "first_order": False, "gae_lambda": 1.0, "max_kl": 0.01,
                     "cg_steps": 10, "cg_damping": 1e-5, "fisher_fraction": 0.25, "line_search": 15}
            usual = {k: v for k, v in usual.items() if args["algorithm"] != "maml" or k not in ("context", "rank")}
            budget = {"iterations": run["iterations"]} | {k: args[k] for k in RL_BUDGET if k != "iterations"}
            run |= {"options": {k: args[k] for k, v in usual.items() if args.get(k, v) != v}, "seed": args["seed"], "file": file,
                    "budget": budget, "scores": np.array(run["per_task"])}
            key = (env, *budget.values(), run["tasks_sha256"], len(run["scores"]))
            group = groups.setdefault(key, {})
            if (label(run, False), run["seed"]) in group:
                print(f"note: {file} repeats another run and is left out", file=sys.stderr)
            group.setdefault((label(run, False), run["seed"]), run)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            fail(f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again")
    parts = []
    for (env, *_), group in sorted(groups.items(), key=str):
        names = list(modgrad_rl.PAPER)
        runs = sorted(group.values(), key=lambda run: (run["seed"], names.index(run["method"]) if run["method"] in names else len(names), label(run, False)))
        runs = [run | {"first_seed": -1 if len({run["seed"] for run in runs}) > 1 else run["seed"]} for run in runs]
        first, updates = runs[0], len(runs[0]["scores"])

        def score(x, sign=""):
            return f"{x.mean():{sign}.2f} ± {1.96 * x.std(ddof=1) / math.sqrt(len(x)):.2f}"
        usual = {k: v for k, (v, _) in RL_BUDGET.items()} | {"horizon": modgrad_rl.HORIZON[env]}
        other = [f"{first['budget'][k]:g} {RL_BUDGET[k][1]} instead of {v:g}" for k, v in usual.items() if first["budget"][k] != v]
        if other[:2] == [x for x in other if "iteration" in x] and len(other) > 1:
            other[:2] = [f"{first['budget']['iterations']:,} iterations of {first['budget']['meta_batch']} tasks instead of 500 of 40"]
        heads = ["before", *(f"after {k} update{'s' * (k > 1)}" for k in range(1, updates))]
        columns = {"method": label} | {head: lambda run, k=k, score=score: score(run["scores"][k]) for k, head in enumerate(heads)}
        columns |= {"gain of 1 update": lambda run, score=score: score(run["scores"][1] - run["scores"][0], "+")}
        columns |= {"ModGrad's Figure 8, after 1 update": lambda run, env=env: modgrad_rl.PAPER.get(run["method"], {}).get(env, "-"),
                    "s an iteration": lambda run: f"{run['seconds_per_iteration']:.2g}"}
        ours = [run for run in runs if label(run, False) == "ModGrad"]
        pairs = [(one, two) for one in ours for two in runs if two is not one and two["seed"] == one["seed"]]
        text = (f"### Reinforcement learning, {env}\n\n" + "".join(f"**{x}.** " for x in other)
                + f"{first['test_tasks']:,} test tasks; return of a rollout, not discounted, 95 % interval over tasks; gain: task by task.\n\n" + table(runs, columns))
        if pairs:
            text += "\n" + table(pairs, {"difference, task by task": lambda pair: f"{label(pair[0])} - {label(pair[1])}"} | {
                head: lambda pair, k=k, score=score: score(pair[0]["scores"][k] - pair[1]["scores"][k], "+") for k, head in enumerate(heads)})
        parts.append(text)
        if importlib.util.find_spec("matplotlib"):
            words = [str(v) for k, v in first["budget"].items() if v != usual[k]]
            file = out / f"{'-'.join(['rl', env, *words])}.png"
            figures.append((rl_curves, runs, "; ".join(other), file))
            parts.append(f"![Returns]({file.name})\n")
    return parts


def rl_curves(runs, about, file):
    """ModGrad's Figure 8: left, returns of training tasks before (dotted) and after the update against iterations; right, of test
    tasks against updates, 95 % intervals -> PNG `file`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    methods = sorted({label(run, False) for run in runs})
    for run in runs:
        style = {"color": f"C{methods.index(label(run, False))}", "alpha": 1.0 if run["seed"] == min(r["seed"] for r in runs) else 0.5}
        log = run["file"].parent / "log.jsonl"
        try:
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            of = max(1, len(lines) // 50)                   # at most about 50 points
            points = np.array([[line["iteration"], line["returns"][0], line["returns"][-1]] for line in lines[len(lines) % of:]]).reshape(-1, of, 3).mean(1)
            left.plot(points[:, 0], points[:, 2], linewidth=1.4, **style)
            left.plot(points[:, 0], points[:, 1], ":", linewidth=1, **style)
        except (OSError, ValueError, KeyError):
            print(f"note: {log} cannot be read: no curve of it", file=sys.stderr)
        scores = run["scores"]
        right.errorbar(range(len(scores)), scores.mean(1), 1.96 * scores.std(1, ddof=1) / math.sqrt(scores.shape[1]), capsize=2, marker="o",
                       markersize=3, label=label(run).replace("`", ""), **style)
    left.set(xlabel="iterations", ylabel="return on training tasks, before (dotted) and after")
    right.set(xlabel="inner updates", ylabel="return on test tasks", xticks=range(len(runs[0]["scores"])))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small", ncols=3)
    figure.suptitle(f"{runs[0]['env']}\n{about}".strip(), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def against_shots(runs, file):
    """ModGrad's Figure 6: accuracy against the number of shots, a line for each configuration -> PNG `file`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in sorted({label(run) for run in runs}):
        of = sorted((run["shots"], *score(run, "paper", run["modes"])) for run in runs if label(run) == name)
        axis.errorbar(*zip(*((shots, mean) for shots, mean, _ in of)), [half for *_, half in of], marker="o", capsize=2, label=name.replace("`", ""))
    axis.set(xlabel="shots", ylabel="accuracy in %, paper protocol, last parameters", xticks=sorted({run["shots"] for run in runs}))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    figure.suptitle(f"{' + '.join(runs[0]['modes'])}, {runs[0]['ways']}-way\n{modgrad_budget_text(runs[0]['budget']).replace('**', '')}".strip(),
                    fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def trials_block(runs, setting, about):
    """Trials of step sizes -> Markdown: what each method was tried with, the last validation accuracy in its log, the best bold.
    A trial is a run in a folder called `trials`; it stands in no other table. Each run: {"file", "method", "options", "seed", "alpha"}."""
    found = {}
    for run in runs:
        try:
            lines = [json.loads(line) for line in (run["file"].parent / "log.jsonl").read_text().splitlines()]
            last = [line["validation"] for line in lines if "validation" in line][-1]
            last = last["accuracy"] if "accuracy" in last else last["paper"]["overall"]       # multi-shot, few-shot
        except (OSError, ValueError, KeyError, IndexError):
            fail(f"{run['file'].parent} is a trial without validation in its log: train it with --val-every, or remove it")
        name = label(run | {"options": {k: v for k, v in run["options"].items() if k != "alpha"}})
        found.setdefault(name, []).append((run["alpha"], last["mean"], last["ci95"]))

    def cells(name):
        best = max(found[name], key=lambda trial: trial[1])
        shown = [f"{alpha:g}: {mean:.2f} ± {half:.2f}" for alpha, mean, half in sorted(found[name])]
        return ", ".join(f"**{text}**" if trial is best else text for text, trial in zip(shown, sorted(found[name])))
    return (f"### Trials of step sizes on validation classes, {setting}\n\n{about}\n\n"
            + table(sorted(found), {"method": str, "size of an inner step: accuracy in %, paper protocol": cells}))


def modgrad_tables(found, out, figures):
    """Runs of read_modgrad -> the parts of tables.md that are about them; appends to `figures` (function, its arguments)."""
    groups, trials = {}, {}
    for run in found:
        if "trials" in run["file"].parts:
            trials.setdefault(tuple(str(run[k]) for k in ("modes", "budget", "ways", "shots")), []).append(run)
            continue
        group = groups.setdefault(tuple(run[k] if k != "modes" else tuple(run[k]) for k in ("modes", "budget", "ways", "shots")), {})
        if label(run) in group:
            print(f"note: {run['file']} repeats {group[label(run)]['file']} and is left out", file=sys.stderr)
        group.setdefault(label(run), run)
    parts = [modgrad_block(list(groups[key].values())) for key in sorted(groups, key=str)]
    for _, (first, *others) in sorted(trials.items()):
        setting = f"{' + '.join(first['modes'])}, {first['ways']}-way {first['shots']}-shot"
        parts.append(trials_block([first, *others], setting, modgrad_budget_text(first["budget"])))
    for key in dict.fromkeys(key[:-1] for key in sorted(groups, key=str)):
        runs = [run for other, group in groups.items() if other[:-1] == key for run in group.values()]
        if len({run["shots"] for run in runs}) > 1 and importlib.util.find_spec("matplotlib"):
            budget = dict(key[1])
            words = ["synthetic"] * budget["synthetic"] + ["+".join(key[0]), f"{key[2]}way", *(str(budget[k][0]) for k in MODGRAD_BUDGET if budget[k])]
            figures.append((against_shots, runs, out / f"modgrad-shots-{'-'.join(words)}.png"))
            parts.append(f"![Accuracy against shots]({figures[-1][-1].name})\n")
    return parts


# -------------------------------------------------------------------------------------------- attentive feature reuse
def read_afr(folders):
    """All runs of afr.py under the folders -> list of dicts. `scores`: {(measure, stratum or transfer mode): array over tasks}, where
    a measure is one of afr.KEYS; `data`: {stratum or mode: what its images were made from}."""
    runs = []
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = json.loads(file.read_text())
            if "nil_or_error" not in run:
                continue
            args, strata = run["args"], run["strata"]
            usual = {"steps": 5, "lr": 1e-3, "attention_lr": 1e-3, "lr_halve_every": 0, "inner_clip": 20.0, "first_order": False, "head": "modulated",
                     "embed": "support", "attention_blocks": 2, "attention_width": 16, "kl_weight": 1.0,
                     "alpha": [0.01 if args["algorithm"] == "maml" else afr.ALPHA[kind] for kind in args["tasks"]],
                     "loss_weights": [afr.LOSS_WEIGHTS[kind] for kind in args["tasks"]]}
            flags = {k: " ".join(map(str, args[k])) if isinstance(args[k], list) else args[k] for k, v in usual.items() if args.get(k, v) != v}
            scores = {(key, stratum): np.array(run[tasks][i::len(strata)]) for key, tasks in zip(afr.KEYS, afr.PER_TASK) for i, stratum in enumerate(strata)}
            scores |= {(key, mode): np.array(found[tasks]) for mode, found in run["transfer"].items() for key, tasks in zip(afr.KEYS, afr.PER_TASK)}
            data = dict.fromkeys(strata, images_of(run)[0]) if strata == args["tasks"] else dict(zip(strata, images_of(run)))
            runs.append({
                "method": run["method"], "options": flags, "seed": args["seed"], "first_seed": 0, "modes": run["modes"], "tasks": args["tasks"],
                "filters": args["filters"], "ways": run["ways"], "shots": run["shots"], "file": file, "synthetic": run["synthetic"],
                "budget": tuple((k, args[k] if k != "iterations" else run["iterations"]) for k in AFR_BUDGET), "scores": scores,
                "domains": run["domains"], "data": data | {mode: images_of(run | found)[0] for mode, found in run["transfer"].items()}, "transfer": list(run["transfer"]),
                "parameters": sum(run["parameters"].values()), "seconds": run["seconds_per_iteration"], "test_tasks": run["test_tasks"]})
        except (ValueError, KeyError, TypeError, AttributeError, OSError, IndexError) as error:
            fail(f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again")
    return runs


def afr_about(run):
    """What is not the paper's data, and what is not the default budget -> Markdown."""
    budget, usual = dict(run["budget"]), AFR_BUDGET
    words = [f"{budget[k]} {UNITS[k]} instead of {usual[k]}" for k in ("image_size", "queries", "precision") if budget[k] != usual[k]]
    if any(budget[k] != usual[k] for k in ("iterations", "meta_batch")):
        words.append("{iterations:,} iterations of {meta_batch} subtasks".format(**budget)
                     + " instead of our default's {iterations:,} of {meta_batch}".format(**usual))
    marks = ["Ray-cast scenes, not MMT; synthetic" if "scenes" in run["modes"] else "Synthetic images" * run["synthetic"], ", ".join(words)]
    return " ".join(f"**{x}.**" for x in marks if x)


def afr_score(run, key, name, sign="", minus=None):
    """A cell: mean and interval of a measure of a stratum or a transfer mode; or of its paired difference from another run's."""
    values = run["scores"].get((key, name))
    if minus is not None and values is not None:
        other = minus["scores"].get((key, name))
        same = other is not None and run["data"][name] == minus["data"][name]
        values = values[:len(other)] - other[:len(values)] if same else None                # task j is the same in every run
    found = None if values is None else afr.summary(values, [name], run["domains"])[name]
    return show(found and (found["mean"], found["ci95"]), sign)


def afr_classification(runs):
    """Runs of one setting -> Markdown: Table 2, left (1 or 5 shots) and right (cross-entropy and NIL, transfer)."""
    first, order = runs[0], list(afr.METHODS.values())
    runs = sorted(runs, key=lambda run: (order.index(run["method"]), run["filters"], label(run)))
    known = first["modes"] == ["miniimagenet"] and first["ways"] == 5 and first["shots"] in (1, 5) and not first["synthetic"]

    def name(run):
        return label(run) + f", {run['filters']} filters" * (run["filters"] != 32)

    def both(name, keys, sign="", of=lambda x: (x, None)):
        return lambda x: " / ".join(afr_score(of(x)[0], key, name, sign, of(x)[1]) for key in keys)
    columns, pair = {"method": name}, {"difference, task by task": lambda pair: f"{name(pair[0])} - {name(pair[1])}"}
    for stratum in [*first["modes"], *dict.fromkeys(mode for run in runs for mode in run["transfer"])]:
        where = f"{stratum}, " if len(first["modes"]) > 1 else f"transfer to {stratum}, " if stratum not in first["modes"] else ""
        for i, (what, keys) in enumerate((("cross-entropy", afr.KEYS[:2]), ("NIL", afr.KEYS[2:]))):
            columns[f"{where}{what}, paper protocol / inductive"] = both(stratum, keys)
            pair[f"{where}{what}, paper protocol / inductive"] = both(stratum, keys, "+", lambda x: x)
            if known and stratum == "miniimagenet":
                columns[f"paper's Table 2, {what}"] = lambda run, i=i: "-" if run["options"] else afr.PAPER[run["method"]]["M"][first["shots"] == 5][i]
            elif known and first["shots"] == 1:
                columns[f"paper, mini-Places, {what}"] = lambda run, i=i: "-" if run["options"] else AFR_TRANSFER[run["method"]][i]
    columns |= {"parameters": lambda run: f"{run['parameters']:,}", "s an iteration": lambda run: f"{run['seconds']:.2g}"}
    plain = {(run["method"], run["filters"], run["seed"]): run for run in runs if not run["options"]}
    plain |= {(f"{run['method']}, constant", run["filters"], run["seed"]): run for run in runs if run["options"] == {"embed": "constant"}}
    pairs = [(plain.get((one, *rest)), plain.get((two, *rest))) for rest in dict.fromkeys(key[1:] for key in plain)
             for one, two in (("ANIL", "MAML"), ("AM", "MAML"), ("AM", "ANIL"), ("P-AM", "ANIL"), ("P-AM", "AM"),
                             ("AM, constant", "ANIL"), ("AM", "AM, constant"))]
    pairs = [both for both in pairs if None not in both]
    counts = " or ".join(f"{n:,}" for n in sorted({run["test_tasks"] for run in runs}))
    return (f"### {' + '.join(first['modes'])}, {first['ways']}-way {first['shots']}-shot\n\n{afr_about(first)} {counts} test tasks; accuracy in %, 95 % "
            "interval over tasks; each cell paper protocol / inductive.\n\n".replace("  ", " ")
            + table(runs, columns).replace(", paper protocol / inductive", "") + ("\n" + table(pairs, pair).replace(", paper protocol / inductive", "") if pairs else ""))


def afr_multi(runs):
    """Runs of one setting, single and multi meta-task -> Markdown: Table 1."""
    first = runs[0]

    def kind(run):
        return "multi" if len(run["tasks"]) > 1 else "single"
    rows = {}                                               # single meta-task: a run for each task, one row for all
    for run in runs:
        group = rows.setdefault((kind(run), "+".join(run["tasks"]) if kind(run) == "multi" and len(run["tasks"]) < 4 else "", run["method"],
                                 label(run, False) if run["options"] else run["method"], run["filters"], run["seed"]), {})
        for task in run["tasks"]:
            group.setdefault(task, run)
    rows = dict(sorted(rows.items(), key=lambda row: (row[0][0] != "single", row[0][1], list(afr.METHODS.values()).index(row[0][2]), *map(str, row[0][3:]))))
    tasks = [task for task in AFR_ORDER if any(task in group for group in rows.values())]

    for task in tasks:                                      # all numbers of a column are of the same test tasks
        holders = [group for group in rows.values() if task in group]
        count = min(len(group[task]["scores"][key, task]) for group in holders for key in afr.KEYS)
        for group in holders:
            cut = {key: x[:count] if key[1] == task else x for key, x in group[task]["scores"].items()}
            group[task] = group[task] | {"scores": cut}

    def name(key):
        return f"{key[0]} meta-task{f' ({key[1]})' * bool(key[1])}, {key[3]}, {key[4]} filters" + f", seed {key[5]}" * bool(key[5])

    def cell(task, keys):
        return lambda key: " / ".join(afr_score(rows[key][task], k, task) for k in keys) if task in rows[key] else "-"

    def published(task, i):
        def number(key):
            numbers = AFR_TABLE1.get(key[0], {}).get(key[3], {}).get(key[4])
            return "-" if numbers is None or key[1] else numbers[AFR_ORDER.index(task)][i] * (1000 if i and task != "depth" else 1)
        return lambda key: x if isinstance(x := number(key), str) else f"{x:.4g}"
    columns, differences = {"run": name}, {"difference, task by task": lambda pair: f"{name(pair[0])} - {name(pair[1])}"}

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
    pairs = [(one, two) for one in rows for two in rows if one != two and one[4:] == two[4:] and (
        one[:2] == two[:2] and (one[3], two[3]) in (("AM", "ANIL"), ("P-AM", "ANIL"), ("P-AM", "AM"))
        or one[0] == "multi" and two[0] == "single" and one[2:] == two[2:])]
    return (f"### {' + '.join(first['modes'])}: single and multi meta-task, {first['ways']}-way {first['shots']}-shot\n\n{afr_about(first)} "
            "*Accuracy* in % (of regressions: outputs within 1e-3 of labels in [0, 1]), *error*: mean squared error in thousandths; paper protocol / "
            "inductive; 95 % interval over test tasks, of regressions over the test domains. In the columns MMT are the paper's numbers, on other data.\n\n".replace("  ", " ")
            + table(rows, columns) + ("\n" + table(pairs, differences) if pairs else ""))


def validation_curves(runs, file):
    """Attentive feature reuse's Figure 5: of each high-level task, validation accuracy or error against iterations -> PNG `file`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    tasks = [task for task in AFR_ORDER if any(task in run["tasks"] for run in runs)]
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks) + 3, 4), squeeze=False, layout="constrained")
    names = [f"{'multi' if len(run['tasks']) > 1 else 'single'} meta-task, {label(run).replace('`', '')}, {run['filters']} filters" for run in runs]
    styles = {name: f"C{i % 10}" for i, name in enumerate(sorted(set(names)))}
    for task, axis in zip(tasks, panels[0]):
        key = "accuracy" if task == "classification" else "nil_or_error"
        for run, name in sorted(zip(runs, names), key=lambda pair: pair[1]):
            if task in run["tasks"]:
                lines = [json.loads(line) for line in (run["file"].parent / "log.jsonl").read_text().splitlines()]
                points = [(line["iteration"], line["validation"][key][task]["mean"]) for line in lines if "validation" in line]
                axis.plot(*zip(*points), color=styles[name], label=name, linewidth=1.3)
        axis.set(title=task, xlabel="iterations", ylabel="accuracy, %" if task == "classification" else "mean squared error, thousandths")
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in panels[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside right upper", fontsize="small")
    figure.suptitle(f"Validation, {' + '.join(runs[0]['modes'])}\n{afr_about(runs[0]).replace('**', '')}".strip(), fontsize="medium")
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
        groups.setdefault((multi, tuple(run["modes"]), run["ways"], run["shots"], run["synthetic"], run["budget"]), []).append(run)
    for number, key in enumerate(sorted(groups, key=str), 1):
        parts.append((afr_multi if key[0] else afr_classification)(groups[key]))
        of = [run for run in groups[key] if key[0] and validated(run)]
        if of and importlib.util.find_spec("matplotlib"):
            figures.append((validation_curves, of, out / f"afr-validation-{number}.png"))
            parts.append(f"![Validation against iterations]({figures[-1][-1].name})\n")
    return parts


# --------------------------------------------------------------------------------------------------- transference
def transference_tables(folders):
    """What transference.py measured under the folders -> parts of tables.md, with links to its figures, relative to the folder
    they were found in: that is where tables.md is meant to be."""
    parts = []
    places = {file: place for place in folders for file in Path(place).rglob("transference.json")}
    for file, place in sorted(places.items()):
        try:
            record = json.loads(file.read_text())
            of, few = record["setting"], min(transference.ALONG_SOURCES, record["setting"]["source_tasks"])
            lines = [*transference.HEAD, *map(transference.shares_row, record["found"])]
            size = f"alpha {of['alpha']}" if of["alpha"] != "auto" else f"self-transference {of['self_transference']}"
            parts.append(f"### {record['about']}, {' and '.join(of['at'])}\n\nStep on {of['update']} parameters, {size}; 95 % intervals over resampled sources "
                         "and targets.\n\n" + "\n".join(lines) + "\n\n" + "".join(f"{x}\n\n" for x in transference.other_tables(record["found"], few)))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, IndexError) as error:
            fail(f"{file} is not a whole file of transference.py ({type(error).__name__}: {error}): delete it, run its command again")
        for picture in sorted(file.parent.glob("transference-*.png")):
            parts.append(f"![{picture.stem}]({picture.relative_to(place)})\n")
    return parts


# ------------------------------------------------------------------------------------------------------- figures
def curves(runs, singles, file):
    """Training accuracy of each run against iterations, a panel a mode -> PNG `file`. Points are means over log lines."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    modes = runs[0]["modes"]
    figure, panels = plt.subplots(1, len(modes), figsize=(5 * len(modes) + 2, 4), squeeze=False, layout="constrained")
    alone = [run for (_, mode), run in singles.items() if mode in modes and len(modes) > 1]
    styles = {name: {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
              for i, name in enumerate(sorted({label(run) for run in [*runs, *alone]}))}
    for mode, axis in zip(modes, panels[0]):
        for run in (run for run in sorted([*runs, *alone], key=label) if mode in run["modes"]):
            log = run["file"].parent / "log.jsonl"
            try:
                lines = [json.loads(line) for line in log.read_text().splitlines()]
            except (OSError, ValueError):
                print(f"note: {log} cannot be read: no curve of it", file=sys.stderr)
                continue
            lines = [(line["iteration"], line["accuracy"][mode]) for line in lines if mode in line["accuracy"]]
            of = max(1, len(lines) // 40)                   # at most about 40 points: fewer, less noisy ones
            points = np.array(lines[len(lines) % of:]).reshape(-1, of, 2).mean(1)
            axis.plot(*points.T, **styles[label(run)], label=label(run).replace("`", ""), linewidth=1.3)
        axis.set(title=mode, xlabel="iterations", ylabel="accuracy on training tasks, %")
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in panels[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside right center", fontsize="small")
    about = budget_text(runs[0]["budget"], runs[0]["family"]).replace("**", "")
    figure.suptitle(f"{title(runs[0])}\n{about}".strip(), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def slug(run):
    """A run's table as a file name."""
    budget = dict(run["budget"])
    steps = [] if budget["steps"] == "paper" else ["{}x{}".format(*budget["steps"])]
    words = [*(["synthetic"] if budget["synthetic"] else []), run["family"], setting_name(run["modes"]),
             f"{run['ways']}way", f"{run['shots']}shot", *(str(budget[k]) for k in BUDGET if budget[k] != BUDGET[k]), *steps]
    return "-".join(words).lower()


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument("folders", nargs="*", default=["runs"], metavar="FOLDER", help="where result files are (runs)")
    p.add_argument("--out", default="results", help="folder of tables.md and the figures")
    args = p.parse_args()
    groups, out = {}, Path(args.out)
    found = read(args.folders)
    common_flags(found, ("family", "budget", "ways", "shots"))
    for run in found:
        group = groups.setdefault(tuple(run[k] for k in ("family", "budget", "ways", "shots")), {})
        table_of = group.setdefault(tuple(run["modes"]), {})
        if label(run) in table_of:
            print(f"note: {run['file']} repeats {table_of[label(run)]['file']} and is left out", file=sys.stderr)
        table_of.setdefault(label(run), run)
    figures, reuse = [], read_afr(args.folders)
    other, more = read_modgrad(args.folders), [*completion_tables(args.folders), *multishot_tables(args.folders, out, figures),
                                              *rl_tables(args.folders, out, figures)]
    transfer = transference_tables(args.folders)
    if not groups and not other and not more and not reuse and not transfer:
        fail(f"no result.json of a table under {' '.join(args.folders)}: try bash run_all.sh --quick --synthetic first")
    if importlib.util.find_spec("matplotlib") is None:
        print("note: matplotlib is not installed, so there are no figures", file=sys.stderr)
    parts, seen = [], set()
    for group in (groups[key] for key in sorted(groups, key=lambda key: (key[0], dict(key[1])["synthetic"], str(key[1:])))):
        singles = {(run["method"], modes[0]): run for modes, runs in group.items() if len(modes) == 1
                   for run in runs.values() if label(run) in ("Multi-MAML", "Multi-ProtoNet")}
        for modes in sorted(group, key=lambda modes: (len(modes) == 1, len(modes), modes)):
            runs = list(group[modes].values())
            if all(run is singles.get((run["method"], modes[0])) for run in runs) and any(
                    len(other) > 1 and modes[0] in other for other in group):
                continue                                # stands as a part of Multi-X in the tables of several modes
            parts.append(block(runs, singles))
            if not dict(runs[0]["budget"])["synthetic"]:
                seen.add((runs[0]["family"], setting_name(runs[0]["modes"]), runs[0]["shots"]))
            if importlib.util.find_spec("matplotlib"):
                file = out / f"curves-{slug(runs[0])}.png"
                figures.append((curves, runs, singles, file))
                parts.append(f"![Accuracy against iterations]({file.name})\n")
    lacking = [f"{setting} {shots}-shot ({family} family)" for family in FAMILIES for setting in SETTINGS for shots in (1, 5)
               if (family, setting, shots) not in seen]
    if lacking:
        parts.append(f"Missing altogether: {', '.join(lacking)}.\n")
    if transfer:
        parts += ["# Transference: tables from result files\n", *transfer]
    if other or more:
        parts += ["# ModGrad: tables from result files\n", *modgrad_tables(other, out, figures), *more]
    if reuse:
        parts += ["# Attentive feature reuse: tables from result files\n", *afr_tables(reuse, out, figures)]
    text = ("# KML: tables from result files\n\n*s an iteration* is each run's own clock, whatever else its machine was doing; "
            "bench.py measures speed.\n\n" + "\n".join(parts))
    print(text)
    atomic_write(out / "tables.md", text)
    for function, *arguments in figures:
        function(*arguments)
    print(f"written to {out / 'tables.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
