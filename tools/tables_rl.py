"""ModGrad's tables of reinforcement learning: its Figure 8."""

import argparse
import importlib.util
import math
import sys

import numpy as np

import modgrad_rl
from fewshot.cheetah import directions
from tools.figures import rl_curves
from tools.papers import RL
from tools.reading import differing, label, of_one_seed, read_each, table

# What the runs of an environment must have in common to stand in one table, with the protocol's value, and how to say it.
BUDGET = {
    "iterations": (500, "iterations"),
    "meta_batch": (40, "tasks per iteration"),
    "rollouts": (20, "rollouts"),
    "horizon": (None, "steps"),
    "hidden": (100, "units"),
    "gamma": (0.95, "discount"),
}
OPTIONS = {
    "context": 128,
    "rank": 5,
    "updates": 1,
    "first_order": False,
    "start_at_one": False,
    "gae_lambda": 1.0,
    "max_kl": 0.01,
    "cg_steps": 10,
    "cg_damping": 1e-5,
    "fisher_fraction": 0.25,
    "line_search": 15,
}


def read_run(file, run):
    """A result file and its content -> the result with what the tables need besides; None if it is of another script."""
    if "env" not in run:
        return None
    args = run["args"]
    done = args | {"iterations": run["iterations"]}
    budget = {key: done[key] for key in BUDGET}
    scores = np.array(run["per_task"], dtype=float)  # (updates + 1, tasks): returns
    if len(scores) < 2 or scores.shape[1] != run["test_tasks"]:
        raise ValueError("its returns are not those of its tasks")
    return run | {
        "options": differing(args, usual(args, run["env"])),
        "seed": args["seed"],
        "file": file,
        "budget": budget,
        "scores": scores,
        "group": (run["env"], *budget.values(), run["tasks_sha256"], len(scores)),
    }


def usual(args, env):
    """The flags that a run of this algorithm has by default -> dict."""
    algorithm = args["algorithm"]
    alpha, _ = modgrad_rl.DEFAULTS[algorithm]
    if env != "navigation":
        alpha = modgrad_rl.CHEETAH_ALPHA.get(algorithm, alpha)
    flags = {"alpha": alpha, "halve_test_lr": algorithm == "maml"} | OPTIONS
    if algorithm == "cavia":
        flags["context"] = 5 if env == "navigation" else 50
    if algorithm == "maml":  # which has none
        del flags["context"], flags["rank"]
    return flags


def rl_tables(folders, out, figures):
    """The runs of modgrad_rl.py under the folders -> parts of tables.md: one for each environment and budget.

    Appends to `figures` (function, its arguments).
    """
    groups = {}
    for run in read_each(folders, read_run):
        group = groups.setdefault(run["group"], {})
        row = label(run, False), run["seed"]
        if group.setdefault(row, run) is not run:
            print(f"note: {run['file']} repeats another run and is left out", file=sys.stderr)
    parts = []
    for (env, *_), group in sorted(groups.items(), key=str):
        runs = in_order(group.values())
        differs = budget_words(runs[0]["budget"], env)
        parts.append(block(env, runs, differs))
        if importlib.util.find_spec("matplotlib"):
            file = out / figure_file(runs[0])
            figures.append((rl_curves, runs, "; ".join(differs), file))
            parts.append(f"![Returns]({file.name})\n")
    return parts


def figure_file(run):
    """The name of the figure of a run and those of its group."""
    words = ["rl", run["env"]]
    for key, theirs in protocol_of(run["env"]).items():
        if run["budget"][key] != theirs:
            words.append(str(run["budget"][key]))
    usual_shape = 100, 3  # test tasks, test updates: the flags' defaults
    tasks, updates = run["test_tasks"], len(run["scores"]) - 1
    if (tasks, updates) != usual_shape:
        words.append(f"{tasks}tasks-{updates}updates")
    return f"{'-'.join(words)}.png"


def in_order(runs):
    """Runs by seed, and in the order of the paper's figure; where there are several seeds, labels name them."""
    names = list(RL)

    def place(run):
        method = names.index(run["method"]) if run["method"] in names else len(names)
        return run["seed"], method, label(run, False)

    found = []
    several = len({run["seed"] for run in runs}) > 1
    for run in sorted(runs, key=place):
        first_seed = -1 if several else run["seed"]
        found.append(run | {"first_seed": first_seed})
    return found


def protocol_of(env):
    """The protocol's budget in an environment -> dict."""
    budget = {key: value for key, (value, _) in BUDGET.items()}
    budget["horizon"] = modgrad_rl.HORIZON[env]
    return budget


def budget_words(budget, env):
    """What of a run's budget is not the protocol's, a list."""
    protocol = protocol_of(env)
    differs = {k: v for k, v in protocol.items() if budget[k] != v}
    words = [f"{budget[k]:g} {BUDGET[k][1]} instead of {v:g}" for k, v in differs.items()]
    if list(differs)[:2] == ["iterations", "meta_batch"]:
        steps = f"{budget['iterations']:,} iterations of {budget['meta_batch']} tasks instead of 500 of 40"
        words[:2] = [steps]
    return words


def update_heads(updates):
    """Heads of the columns of returns: before the inner updates, and after each of them -> list."""
    heads = ["before"]
    for k in range(1, updates + 1):
        heads.append(f"after {k} update" if k == 1 else f"after {k} updates")
    return heads


def block(env, runs, differs):
    """The runs of one environment and budget -> Markdown: returns, then differences from ModGrad, task by task."""
    heads = update_heads(len(runs[0]["scores"]) - 1)

    def returns(k):
        return lambda run: mean(run["scores"][k])

    def gain(run):
        before, after, *_ = run["scores"]
        return mean(after - before, "+")

    columns = {"method": label}
    columns |= {head: returns(k) for k, head in enumerate(heads)}
    columns["gain of 1 update"] = gain
    columns["ModGrad's Figure 8, after 1 update"] = lambda run: published(run, env)
    columns["s per iteration"] = lambda run: f"{run['seconds_per_iteration']:.2g}"
    parted = by_direction(runs, heads) if env == "cheetah-dir" else ""
    return (
        f"### Reinforcement learning, {env}\n\n"
        + "".join(f"**{x}.** " for x in differs)
        + f"{runs[0]['test_tasks']:,} test tasks; return of a rollout, not discounted, 95 % interval over tasks; gain: task by task.\n\n"
        + table(runs, columns)
        + differences(runs, heads)
        + parted
    )


def published(run, env):
    """The paper's return, of runs that differ from its in no more than the size of the step."""
    if set(run["options"]) - {"alpha"}:
        return "-"
    return RL.get(run["method"], {}).get(env, "-")


class Directions:
    """The goals of half-cheetahs without the simulator, which need not be installed where results are read."""

    tasks = staticmethod(directions)


def by_direction(runs, heads):
    """The returns of half-cheetahs that should run forwards, and of those that should run backwards -> Markdown."""
    parts = []
    for run in runs:
        args = argparse.Namespace(**run["args"])
        goals = modgrad_rl.goals(Directions, args, "test", 0, run["test_tasks"])
        wanted = goals.flatten().numpy()
        for sign, word in ((1, "forwards"), (-1, "backwards")):
            chosen = wanted == sign
            if chosen.sum() > 1:  # for an interval
                parts.append((f"{label(run)}, {word} ({chosen.sum()} tasks)", run["scores"][:, chosen]))

    def returns(k):
        return lambda part: mean(part[1][k])

    columns = {"method, direction": lambda part: part[0]}
    columns |= {head: returns(k) for k, head in enumerate(heads)}
    return "\n" + table(parts, columns)


def differences(runs, heads):
    """ModGrad minus the others of its seed, task by task -> Markdown, "" if there are none."""
    ours = [run for run in runs if label(run, False) == "ModGrad"]
    pairs = of_one_seed(ours, runs)
    if not pairs:
        return ""

    def minus(k):
        def cell(pair):
            one, two = (run["scores"][k] for run in pair)
            return mean(one - two, "+")

        return cell

    columns = {"difference, task by task": lambda pair: f"{label(pair[0])} - {label(pair[1])}"}
    columns |= {head: minus(k) for k, head in enumerate(heads)}
    return "\n" + table(pairs, columns)


def mean(returns, sign=""):
    """Returns of tasks -> their mean and 95 % interval, as text."""
    half_width = 1.96 * returns.std(ddof=1) / math.sqrt(len(returns))
    return f"{returns.mean():{sign}.2f} ± {half_width:.2f}"
