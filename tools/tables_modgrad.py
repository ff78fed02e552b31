"""ModGrad's tables of few-shot classification: its Tables 2, 4 and 5 and its Figure 6."""

import importlib.util
import sys

import modgrad
from tools import reading
from tools.figures import against_shots, curves
from tools.papers import MODGRAD
from tools.reading import (
    SHORT_UNITS,
    UNITS,
    by_mode,
    difference,
    differing,
    headed,
    in_bold,
    label,
    number_of_tasks,
    of_one_seed,
    read_each,
    read_few_shot,
    score,
    setting_text,
    show,
    table,
    trials_block,
    without_step_size,
)

BUDGET = {"image_size": 84, "channels": 64, "queries": 15, "precision": "fp32", "episodes": 50000}
DEEP = {"resnet34": {"image_size": 224, "episodes": 100000}}
OPTIONS = {
    "rank": 5,
    "context": 300,
    "lr": 1e-3,
    "lr_halve_every": 3333,
    "inner_clip": 20.0,
    "first_order": False,
    "augment": False,
    "start_at_one": False,
}
OF_OTHER_SCRIPTS = {"pixels", "env", "curve", "nil_or_error"}  # entries of a result file


def read_modgrad(folders):
    """All runs of modgrad.py under the folders -> list of dicts (see read_run)."""
    runs = read_each(folders, read_run)
    first_seed = min((run["seed"] for run in runs), default=0)
    return [run | {"first_seed": first_seed} for run in runs]


def read_run(file, run):
    """A result file and its content -> what the tables need of it; None if it is of another script.

    `scores` are {protocol: {mode: array}} of the last parameters, `best` the same of those best on validation classes, or None.
    """
    if "algorithm" not in run.get("args", {}) or OF_OTHER_SCRIPTS & set(run):
        return None
    args = run["args"]
    best = run.get("best_on_validation")
    steps, alpha, _ = modgrad.DEFAULTS[args["algorithm"]]
    usual = {"steps": steps, "alpha": alpha} | OPTIONS
    if args["algorithm"] == "cavia":
        usual["context"] = 100
    if best:
        protocols = {"paper": best["per_task"], "inductive": best["per_task_inductive"]}
        scores = {name: by_mode(x, run["modes"]) for name, x in protocols.items()}
        best = {"scores": scores, "iteration": best["iteration"]}
    return read_few_shot(file, run) | {
        "method": run["method"],
        "options": differing(args, usual),
        "alpha": args["alpha"],
        "budget": budget_of(run),
        "best": best,
    }


def budget_of(run):
    """What two runs must have in common to stand in one table: pairs (what, None or (ours, the paper's))."""
    args = run["args"]
    usual = BUDGET | DEEP.get(args["backbone"], {})
    episodes = run["iterations"] * args["meta_batch"]
    if abs(episodes - usual["episodes"]) < args["meta_batch"]:  # 50,000 are not a multiple of 3
        episodes = usual["episodes"]
    done = usual | args | {"episodes": episodes}
    budget = {}
    for key, theirs in usual.items():
        ours = done[key]
        budget[key] = None if ours == theirs else (ours, theirs)
    return (*budget.items(), ("synthetic", run["synthetic"]))


def budget_text(budget):
    """What is not the paper's -> Markdown, "" if nothing is. `budget`: see budget_of."""
    budget = dict(budget)
    words = []
    for key in BUDGET:
        if not budget[key]:
            continue
        ours, theirs = budget[key]
        if key == "precision":
            words.append(f"{ours} instead of {theirs}")
        else:
            unit = UNITS[key].replace("layer 1", "each layer")
            words.append(f"{ours:,} {unit} instead of {theirs:,}")
    images = "Synthetic images" if budget["synthetic"] else ""
    return in_bold([images, ", ".join(words)])


def plain(run):
    """A run's method and flags, but for its step size, which makes no other method of it."""
    return label(without_step_size(run), False)


def in_order(runs):
    """Runs by seed, and in the order of the paper's table."""
    names = list(MODGRAD)

    def row(name):
        return names.index(name) if name in names else len(names)

    def place(run):
        return run["seed"], row(label(run, False)), row(run["method"]), label(run)

    return sorted(runs, key=place)


def on_the_same_tasks(runs):
    """Cut the scores of all runs, `best` included, to the test tasks that every run has -> the runs."""
    modes = runs[0]["modes"]
    kept = [run["best"] for run in runs if run["best"]]
    cut = reading.on_the_same_tasks([*runs, *kept], modes)
    best = iter(cut[len(runs) :])
    found = []
    for run in cut[: len(runs)]:
        if run["best"]:
            run = run | {"best": next(best)}
        found.append(run)
    return found


def accuracies(runs):
    """The runs of one setting and budget -> Markdown: the accuracy of each."""
    first = runs[0]
    modes = first["modes"]
    comparable = modes == ["miniimagenet"] and first["ways"] == 5 and first["shots"] in (1, 5)
    known = comparable and not dict(first["budget"])["synthetic"]

    def last(protocol, modes):
        return lambda run: show(score(run, protocol, modes))

    def best(protocol):
        return lambda run: show(score(run["best"], protocol, modes)) if run["best"] else "-"

    def published(run):
        one_shot, five_shots = MODGRAD.get(plain(run), (None, None))
        value = five_shots if run["shots"] == 5 else one_shot
        return f"{value:.2f}" if isinstance(value, float) else show(value)

    columns = {
        "method": label,
        "last, paper protocol": last("paper", modes),
        "last, inductive": last("inductive", modes),
    }
    if any(run["best"] for run in runs):
        columns["best on validation, paper protocol"] = best("paper")
        columns["best on validation, inductive"] = best("inductive")
    if known:
        columns["ModGrad's paper"] = published
    if len(modes) > 1:
        columns |= {f"{mode}, last, paper protocol": last("paper", [mode]) for mode in modes}
    columns["parameters"] = lambda run: f"{run['parameters']:,}"
    columns["s per iteration"] = lambda run: f"{run['seconds']:.2g}"
    return table(runs, columns)


def differences(runs):
    """The runs of one setting and budget -> Markdown: ModGrad minus the others of its seed, task by task; "" if there are none."""
    modes = runs[0]["modes"]
    ours = [run for run in runs if plain(run) == "ModGrad"]
    pairs = of_one_seed(ours, runs)
    if not pairs:
        return ""

    def last(protocol):
        return lambda pair: show(difference(*pair, protocol, modes), "+")

    def best(protocol):
        def cell(pair):
            if not all(run["best"] for run in pair):
                return "-"
            one, two = (run | {"scores": run["best"]["scores"]} for run in pair)
            return show(difference(one, two, protocol, modes), "+")

        return cell

    columns = {
        "difference, task by task": lambda pair: f"{label(pair[0])} - {label(pair[1])}",
        "last, paper protocol": last("paper"),
        "last, inductive": last("inductive"),
    }
    if any(run["best"] for run in runs):
        columns["best on validation, paper protocol"] = best("paper")
        columns["best on validation, inductive"] = best("inductive")
    return "\n" + table(pairs, columns)


def block(runs):
    """The runs of one setting and budget -> Markdown: accuracies, then differences from ModGrad, task by task."""
    first = runs[0]
    runs = on_the_same_tasks(in_order(runs))
    about = [
        budget_text(first["budget"]),
        f"{number_of_tasks(runs[0]):,} test tasks;",
        "accuracy in %, 95 % interval over tasks.",
    ]
    if any(run["method"] == "CAVIA" for run in runs):
        about.append("The paper's CAVIA has 512 channels.")
    if any(run["best"] for run in runs):
        about.append("*Last* parameters, and those *best on validation* classes among those kept.")
    setting = setting_text(first["modes"], first["ways"], first["shots"])
    head = headed(f"ModGrad and its baselines, {setting}", about)
    return f"{head}\n{accuracies(runs)}{differences(runs)}"


def modgrad_tables(found, out, figures):
    """Runs of read_modgrad -> the parts of tables.md that are about them; appends to `figures` (function, its arguments).

    Runs in a folder called `trials` are trials of step sizes on validation classes.
    """
    groups = {}
    trials = {}
    for run in found:
        key = tuple(run["modes"]), run["budget"], run["ways"], run["shots"]
        if "trials" in run["file"].parts:
            trials.setdefault(key, []).append(run)
            continue
        first = groups.setdefault(key, {}).setdefault(label(run), run)
        if first is not run:
            print(f"note: {run['file']} repeats {first['file']} and is left out", file=sys.stderr)
    parts = []
    for key in sorted(groups, key=str):
        runs = list(groups[key].values())
        parts.append(block(runs))
        if len(runs) > 1 and importlib.util.find_spec("matplotlib"):
            file = out / curves_file(*key)
            figures.append((curves, runs, heading(runs[0]), file))
            parts.append(f"![Accuracy against iterations]({file.name})\n")
    for (modes, budget, ways, shots), runs in sorted(trials.items(), key=str):
        parts.append(trials_block(runs, setting_text(modes, ways, shots), budget_text(budget)))
    parts += shots_figures(groups, out, figures)
    return parts


def shots_figures(groups, out, figures):
    """Figure 6 of each setting and budget where a configuration has several numbers of shots -> parts of tables.md."""
    if not importlib.util.find_spec("matplotlib"):
        return []
    parts = []
    for key in dict.fromkeys(key[:-1] for key in sorted(groups, key=str)):  # of any number of shots
        runs = []
        for other, group in groups.items():
            if other[:-1] == key:
                runs += group.values()
        if has_several_shots(runs):
            file = out / shots_file(*key)
            about = budget_text(key[1]).replace("**", "")
            figures.append((against_shots, runs, about, file))
            parts.append(f"![Accuracy against shots]({file.name})\n")
    return parts


def has_several_shots(runs):
    """Whether a configuration has several numbers of shots among the runs: else there is no line to draw."""
    shots = {}
    for run in runs:
        shots.setdefault(label(run), set()).add(run["shots"])
    return any(len(of) > 1 for of in shots.values())


def heading(run):
    """The title of a figure of runs of the setting and budget of `run`."""
    about = budget_text(run["budget"]).replace("**", "")
    return f"ModGrad and its baselines, {setting_text(run['modes'], run['ways'], run['shots'])}\n{about}"


def curves_file(modes, budget, ways, shots):
    """The name of the figure of accuracy against iterations."""
    return f"curves-modgrad-{file_words(modes, budget, ways, f'{shots}shot')}.png"


def shots_file(modes, budget, ways):
    """The name of the figure of accuracy against shots."""
    return f"modgrad-shots-{file_words(modes, budget, ways)}.png"


def file_words(modes, budget, ways, *more):
    """What tells the figure of one setting and budget from others, in its file's name."""
    differs = dict(budget)
    words = ["synthetic"] if differs["synthetic"] else []
    words += ["+".join(modes), f"{ways}way", *more]
    words += [f"{differs[k][0]}{SHORT_UNITS[k]}" for k in BUDGET if differs[k]]
    return "-".join(words)
