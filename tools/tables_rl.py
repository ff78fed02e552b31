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
from tools.reading import label, read_each, table

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
    budget = {"iterations": run["iterations"]} | {k: args[k] for k in BUDGET if k != "iterations"}
    scores = np.array(run["per_task"], dtype=float)  # (updates + 1, tasks): returns
    if len(scores) < 2 or scores.shape[1] != run["test_tasks"]:
        raise ValueError("its returns are not those of its tasks")
    return run | {
        "options": {k: args[k] for k, v in usual(args, run["env"]).items() if args.get(k, v) != v},
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
        if group.setdefault((label(run, False), run["seed"]), run) is not run:
            print(f"note: {run['file']} repeats another run and is left out", file=sys.stderr)
    parts = []
    for (env, *_), group in sorted(groups.items(), key=str):
        runs = in_order(group.values())
        differs = budget_words(runs[0]["budget"], env)
        parts.append(block(env, runs, differs))
        if importlib.util.find_spec("matplotlib"):
            protocol = protocol_of(env)
            words = [str(v) for k, v in runs[0]["budget"].items() if v != protocol[k]]
            usual_shape = 100, 3  # test tasks, test updates: the flags' defaults
            tasks, updates = runs[0]["test_tasks"], len(runs[0]["scores"]) - 1
            if (tasks, updates) != usual_shape:
                words.append(f"{tasks}tasks-{updates}updates")
            file = out / f"{'-'.join(['rl', env, *words])}.png"
            figures.append((rl_curves, runs, "; ".join(differs), file))
            parts.append(f"![Returns]({file.name})\n")
    return parts


def in_order(runs):
    """Runs by seed, and in the order of the paper's figure; where there are several seeds, labels name them."""
    names = list(RL)

    def place(run):
        method = names.index(run["method"]) if run["method"] in names else len(names)
        return run["seed"], method, label(run, False)

    several = len({run["seed"] for run in runs}) > 1
    return [run | {"first_seed": -1 if several else run["seed"]} for run in sorted(runs, key=place)]


def protocol_of(env):
    """The protocol's budget in an environment -> dict."""
    return {k: v for k, (v, _) in BUDGET.items()} | {"horizon": modgrad_rl.HORIZON[env]}


def budget_words(budget, env):
    """What of a run's budget is not the protocol's, a list."""
    protocol = protocol_of(env)
    differs = {k: v for k, v in protocol.items() if budget[k] != v}
    words = [f"{budget[k]:g} {BUDGET[k][1]} instead of {v:g}" for k, v in differs.items()]
    if list(differs)[:2] == ["iterations", "meta_batch"]:
        steps = f"{budget['iterations']:,} iterations of {budget['meta_batch']} tasks instead of 500 of 40"
        words[:2] = [steps]
    return words


def block(env, runs, differs):
    """The runs of one environment and budget -> Markdown: returns, then differences from ModGrad, task by task."""
    updates = len(runs[0]["scores"])
    heads = ["before", *(f"after {k} update{'s' * (k > 1)}" for k in range(1, updates))]

    def returns(k):
        return lambda run: mean(run["scores"][k])

    columns = {"method": label} | {head: returns(k) for k, head in enumerate(heads)}
    columns["gain of 1 update"] = lambda run: mean(run["scores"][1] - run["scores"][0], "+")
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
        wanted = modgrad_rl.goals(Directions, args, "test", 0, run["test_tasks"]).flatten().numpy()
        for sign, word in ((1, "forwards"), (-1, "backwards")):
            chosen = wanted == sign
            if chosen.sum() > 1:  # for an interval
                parts.append((f"{label(run)}, {word} ({chosen.sum()} tasks)", run["scores"][:, chosen]))

    def returns(k):
        return lambda part: mean(part[1][k])

    columns = {"method, direction": lambda part: part[0]} | {head: returns(k) for k, head in enumerate(heads)}
    return "\n" + table(parts, columns)


def differences(runs, heads):
    """ModGrad minus the others of its seed, task by task -> Markdown, "" if there are none."""
    ours = [run for run in runs if label(run, False) == "ModGrad"]
    pairs = [(one, two) for one in ours for two in runs if two is not one and two["seed"] == one["seed"]]
    if not pairs:
        return ""

    def minus(k):
        return lambda pair: mean(pair[0]["scores"][k] - pair[1]["scores"][k], "+")

    columns = {"difference, task by task": lambda pair: f"{label(pair[0])} - {label(pair[1])}"}
    columns |= {head: minus(k) for k, head in enumerate(heads)}
    return "\n" + table(pairs, columns)


def mean(returns, sign=""):
    """Returns of tasks -> their mean and 95 % interval, as text."""
    return f"{returns.mean():{sign}.2f} ± {1.96 * returns.std(ddof=1) / math.sqrt(len(returns)):.2f}"
