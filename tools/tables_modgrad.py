"""The tables of ModGrad's paper: few-shot, completion, multi-shot, reinforcement learning."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np

import modgrad
import modgrad_completion
import modgrad_multishot
import modgrad_rl
from data import fail, read_log, read_result
from tools.papers import COMPLETION, MODGRAD, MULTISHOT, RL
from tools.reading import UNITS, difference, images_of, label, score, show, table

MODGRAD_BUDGET = {"image_size": 84, "channels": 64, "queries": 15, "precision": "fp32", "episodes": 50000}
MODGRAD_DEEP = {"resnet34": {"image_size": 224, "episodes": 100000}}


def read_modgrad(folders):
    """All runs of modgrad.py under the folders -> list of dicts, whose `scores` are {protocol: {mode: array}} of the last
    parameters, `best` the same of those best on validation classes, or None."""
    runs = []
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = read_result(file)
            if "algorithm" not in run.get("args", {}) or {"pixels", "env", "curve", "nil_or_error"} & set(
                run
            ):
                continue
            args, modes, best = run["args"], run["modes"], run.get("best_on_validation")
            steps, alpha, _ = modgrad.DEFAULTS[args["algorithm"]]
            usual = {
                "steps": steps,
                "alpha": alpha,
                "rank": 5,
                "context": 100 if args["algorithm"] == "cavia" else 300,
                "lr": 1e-3,
                "lr_halve_every": 3333,
                "inner_clip": 20.0,
                "first_order": False,
                "augment": False,
                "start_at_one": False,
            }
            scores = [
                {
                    protocol: {mode: np.array(x[key][m :: len(modes)]) for m, mode in enumerate(modes)}
                    for protocol, key in (("paper", "per_task"), ("inductive", "per_task_inductive"))
                }
                for x in (run, best)
                if x
            ]
            budget = MODGRAD_BUDGET | MODGRAD_DEEP.get(args["backbone"], {})
            episodes = run["iterations"] * args["meta_batch"]
            if abs(episodes - budget["episodes"]) < args["meta_batch"]:  # 50,000 are not a multiple of 3
                episodes = budget["episodes"]
            done = {k: args.get(k, v) for k, v in budget.items()} | {"episodes": episodes}
            runs.append(
                {
                    "method": run["method"],
                    "options": {k: args[k] for k, v in usual.items() if args.get(k, v) != v},
                    "seed": args["seed"],
                    "alpha": args["alpha"],
                    "modes": modes,
                    "ways": run["ways"],
                    "shots": run["shots"],
                    "file": file,
                    "data": dict(zip(modes, images_of(run))),
                    "tasks": (modes, len(run["per_task"]), run.get("tasks_sha256")),
                    "budget": (
                        *((k, None if done[k] == v else (done[k], v)) for k, v in budget.items()),
                        ("synthetic", run["synthetic"]),
                    ),
                    "scores": scores[0],
                    "best": {"scores": scores[1], "iteration": best["iteration"]} if best else None,
                    "parameters": sum(run["parameters"].values()),
                    "seconds": run["seconds_per_iteration"],
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            fail(
                f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again"
            )
    return [run | {"first_seed": min(other["seed"] for other in runs)} for run in runs]


def modgrad_budget_text(budget):
    """What is not the paper's -> Markdown, "" if nothing is. `budget`: {what: None, or (ours, the paper's)}."""
    budget = dict(budget)
    words = [
        "{:,} {} instead of {:,}".format(
            budget[key][0], UNITS[key].replace("layer 1", "each layer"), budget[key][1]
        )
        if key != "precision"
        else f"{budget[key][0]} instead of {budget[key][1]}"
        for key in MODGRAD_BUDGET
        if budget[key]
    ]
    return " ".join(f"**{x}.**" for x in ("Synthetic images" * budget["synthetic"], ", ".join(words)) if x)


def modgrad_block(runs):
    """The runs of one setting and budget -> Markdown: accuracies, then differences from ModGrad, task by task."""
    first = runs[0]
    modes, shots, several = first["modes"], first["shots"], first["modes"] if len(first["modes"]) > 1 else []
    names = list(MODGRAD)
    runs = sorted(
        runs,
        key=lambda run: (
            run["seed"],
            *[names.index(x) if x in names else len(names) for x in (label(run, False), run["method"])],
            label(run),
        ),
    )
    known = (
        modes == ["miniimagenet"]
        and first["ways"] == 5
        and shots in (1, 5)
        and not dict(first["budget"])["synthetic"]
    )

    def plain(run):  # a step size is no other method
        return label(run | {"options": {k: v for k, v in run["options"].items() if k != "alpha"}}, False)

    def published(run):
        value = MODGRAD.get(plain(run), (None, None))[shots == 5] if known else None
        return f"{value:.2f}" if isinstance(value, float) else show(value)

    def best(run, protocol):
        return show(score(run["best"], protocol, modes)) if run["best"] else "-"

    columns = {
        "method": label,
        "last, paper protocol": lambda run: show(score(run, "paper", modes)),
        "last, inductive": lambda run: show(score(run, "inductive", modes)),
        "best on validation, paper protocol": lambda run: best(run, "paper"),
        "best on validation, inductive": lambda run: best(run, "inductive"),
    }
    columns |= {"ModGrad's paper": published} if known else {}
    columns |= {
        f"{m}, last, paper protocol": lambda run, m=m: show(score(run, "paper", [m])) for m in several
    }
    columns |= {
        "parameters": lambda run: f"{run['parameters']:,}",
        "s per iteration": lambda run: f"{run['seconds']:.2g}",
    }
    ours = [run for run in runs if plain(run) == "ModGrad"]
    pairs = [(one, two) for one in ours for two in runs if two is not one and two["seed"] == one["seed"]]

    def of_best(pair, protocol):
        if not all(run["best"] for run in pair):
            return None
        return difference(*(run | {"scores": run["best"]["scores"]} for run in pair), protocol, modes)

    differences = {
        "difference, task by task": lambda pair: f"{label(pair[0])} - {label(pair[1])}",
        "last, paper protocol": lambda pair: show(difference(*pair, "paper", modes), "+"),
        "last, inductive": lambda pair: show(difference(*pair, "inductive", modes), "+"),
        "best on validation, paper protocol": lambda pair: show(of_best(pair, "paper"), "+"),
        "best on validation, inductive": lambda pair: show(of_best(pair, "inductive"), "+"),
    }
    counts = sorted({sum(map(len, run["scores"]["paper"].values())) for run in runs})
    about = [
        modgrad_budget_text(first["budget"]),
        f"{' or '.join(f'{n:,}' for n in counts)} test tasks;",
        "accuracy in %, 95 % interval over tasks. *Last* parameters, and those *best on validation* classes among those kept.",
    ]
    return (
        f"### ModGrad and its baselines, {' + '.join(modes)}, {first['ways']}-way {shots}-shot\n\n{' '.join(x for x in about if x)}\n\n"
        + table(runs, columns)
        + ("\n" + table(pairs, differences) if pairs else "")
    )


def completion_tables(folders):
    """The runs of modgrad_completion.py under the folders -> parts of tables.md: ModGrad's Table 3, one for each budget."""
    groups, orders = {}, [("random", 10), ("random", 100), ("ordered", 10), ("ordered", 100)]
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = read_result(file)
            if "pixels" not in run:
                continue
            args = run["args"]
            usual = dict(zip(("steps", "alpha", "adapt"), modgrad_completion.DEFAULTS[args["algorithm"]])) | {
                "rank": 5,
                "context": 128,
                "hidden": 128,
                "inner_clip": 10.0,
                "first_order": False,
                "lr": 1e-3,
                "lr_halve_every": 0,
                "seed": 0,
            }
            flags = {k: args[k] for k, v in usual.items() if k != "adapt" and args.get(k, v) != v}
            name = run["method"], label({"method": "", "options": flags, "seed": None})  # of rows
            key = (
                tuple(run["modes"]),
                run["synthetic"],
                args["image_size"],
                args["precision"],
                run["iterations"],
                args["meta_batch"],
                run["test_tasks"],
            )
            cells = groups.setdefault(key, {})
            if (name, (run["order"], run["pixels"])) in cells:
                print(f"note: {file} repeats another run and is left out", file=sys.stderr)
            cells.setdefault(
                (name, (run["order"], run["pixels"])), (np.array(run["per_task"]), images_of(run))
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            fail(
                f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again"
            )
    parts = []
    for (modes, synthetic, size, precision, iterations, batch, tasks), cells in sorted(groups.items()):
        columns = [order for order in orders if any(order == other for _, other in cells)]
        columns += sorted({order for _, order in cells} - set(orders))
        names = list(COMPLETION)
        rows = sorted(
            {name for name, _ in cells},
            key=lambda name: (names.index(name[0]) if name[0] in names else len(names), name),
        )
        known = modes == ("celeba",) and not synthetic

        def score(cell, sign=""):
            return f"{cell.mean():{sign}.4f} ± {1.96 * cell.std(ddof=1) / math.sqrt(len(cell)):.4f}"

        def made(name, order, cells=cells, score=score):
            return score(cells[name, order][0]) if (name, order) in cells else "missing"

        def published(name, order, known=known):
            numbers = COMPLETION.get("".join(name), {})
            return f" ({numbers[order[::-1]]:.3f})" if known and order[::-1] in numbers else ""

        def against(name, order, cells=cells, score=score):
            pair = [cells.get((x, order)) for x in (("ModGrad", name[1]), name)]
            return (
                score(pair[0][0] - pair[1][0], "+") if None not in pair and pair[0][1] == pair[1][1] else "-"
            )

        about = [
            *(["Synthetic images"] if synthetic else []),
            *([f"{size} px instead of 32"] if size != 32 else []),
            *([precision] if precision != "fp32" else []),
            *(
                [f"{iterations:,} iterations of {batch} images instead of 50,000 of 25"]
                if (iterations, batch) != (50000, 25)
                else []
            ),
        ]
        head = {order: f"{order[1]} {order[0]} pixels" for order in columns}
        parts.append(
            f"### Image completion, {' + '.join(modes)}\n\n"
            + "".join(f"**{x}.** " for x in about)
            + f"{tasks:,} test images; mean squared error over all pixels, 95 % interval over images"
            + "; in brackets ModGrad's Table 3" * known
            + ".\n\n"
            + table(
                rows,
                {"method": "".join}
                | {head[o]: lambda name, o=o: made(name, o) + published(name, o) for o in columns},
            )
            + "\n"
            + table(
                [name for name in rows if name[0] != "ModGrad"],
                {"difference, image by image": lambda name: f"ModGrad - {''.join(name)}"}
                | {head[o]: lambda name, o=o: against(name, o) for o in columns},
            )
        )
    return parts


MULTISHOT_BUDGET = {
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
MULTISHOT_UNITS = UNITS | {
    "ways": "ways",
    "batch": "images a step",
    "channels": "channels in each layer",
    "test_steps": "steps in testing",
    "iterations": "iterations",
    "meta_batch": "tasks per iteration",
}
MULTISHOT_OPTIONS = {
    "rank": 5,
    "context": 300,
    "inner_clip": 20.0,
    "first_order": False,
    "lr_halve_every": 0,
    "seed": 0,
}


def multishot_tables(folders, out, figures):
    """The runs of modgrad_multishot.py under the folders -> parts of tables.md: ModGrad's Figure 5, one for each budget; appends to
    `figures` (function, its arguments). Runs in a folder called `trials` are trials of step sizes on validation alphabets."""
    groups, trials, parts, methods = {}, {}, [], list(modgrad_multishot.METHODS.values())
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = read_result(file)
            if "curve" not in run:
                continue
            args = run["args"]
            usual = MULTISHOT_OPTIONS | dict(
                zip(("steps", "alpha", "adapt", "outer", "lr"), modgrad_multishot.DEFAULTS[args["algorithm"]])
            )
            idle = (
                ("adapt",) if args["algorithm"] == "modgrad" else ("adapt", "rank", "context")
            )  # layers are in the method's name
            options = {k: args[k] for k, v in usual.items() if k not in idle and args.get(k, v) != v}
            budget = tuple((k, run["iterations"] if k == "iterations" else args[k]) for k in MULTISHOT_BUDGET)
            if "trials" in file.parts:
                trials.setdefault(
                    (tuple(run["modes"]), run["synthetic"], tuple(run["shots"]), budget), []
                ).append(
                    {
                        "file": file,
                        "method": run["method"],
                        "options": options,
                        "seed": None,
                        "alpha": args["alpha"],
                    }
                )
                continue
            runs = groups.setdefault(
                (tuple(run["modes"]), run["synthetic"], tuple(run["shots"]), run["test_tasks"], budget), {}
            )
            name = label({"method": run["method"], "options": options, "seed": None})
            if name in runs:
                print(f"note: {file} repeats another run and is left out", file=sys.stderr)
            runs.setdefault(
                name,
                {
                    "what": (images_of(run), run["tasks_sha256"]),
                    **{
                        k: run[k]
                        for k in (
                            "method",
                            "accuracy",
                            "accuracy_inductive",
                            "loss",
                            "curve",
                            "after",
                            "seconds_per_iteration",
                        )
                    },
                    **{
                        k: np.array(run[k])
                        for k in ("per_task", "per_task_inductive", "per_task_loss", "per_task_alphabet")
                    },
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            fail(
                f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again"
            )
    for (modes, synthetic, shots, tasks, budget), runs in sorted(groups.items()):
        budget = dict(budget)
        K, known = (
            budget["test_steps"],
            modes == ("omniglot",) and not synthetic and (budget["ways"], budget["test_steps"]) == (20, 100),
        )
        rows = sorted(
            runs.items(),
            key=lambda row: (methods.index(row[1]["method"].split(" on ")[0]), row[1]["method"], row[0]),
        )

        def spread(value, digits=2, sign=""):
            return "{:{}.{d}f} ± {:.{d}f}".format(value["mean"], sign, value["ci95"], d=digits)

        def against(key, digits=2, base=rows[0][1], spread=spread):
            def cell(row):
                if base["what"] != row[1]["what"]:
                    return "-"  # other tasks
                return spread(
                    modgrad_multishot.summary(base[key] - row[1][key], base["per_task_alphabet"]), digits, "+"
                )

            return cell

        columns = {
            "method": lambda row: row[0],
            "inductive": lambda row, f=spread: f(row[1]["accuracy_inductive"]),
            "paper protocol": lambda row, f=spread: f(row[1]["accuracy"]),
        }
        columns |= {"ModGrad's Figure 5": lambda row: MULTISHOT[row[1]["method"]] or "-"} if known else {}
        columns |= {
            f"after {k}": lambda row, i=i: f"{row[1]['after']['mean'][i]:.2f}"
            for i, k in enumerate(rows[0][1]["after"]["steps"][:-1])
        }
        columns |= {
            "training loss": lambda row, f=spread: f(row[1]["loss"], 3),
            "s per iteration": lambda row: f"{row[1]['seconds_per_iteration']:.2g}",
        }
        differences = {
            "difference, task by task": lambda row, base=rows[0][0]: f"{base} - {row[0]}",
            "inductive": against("per_task_inductive"),
            "paper protocol": against("per_task"),
            "training loss": against("per_task_loss", 3),
        }
        words = multishot_words(synthetic, budget)
        parts.append(
            f"### Multi-shot, {' + '.join(modes)}, {budget['ways']}-way, {shots[0]} to {shots[1]} shots\n\n"
            + "".join(f"**{x}.** " for x in words)
            + f"{tasks:,} test tasks; accuracy in % on held-out drawings after {K} steps, and after fewer (paper protocol); training loss: the mean of "
            f"the {K} steps; 95 % intervals over alphabets."
            + f" LEAP, which is not here, has {MULTISHOT['LEAP']} in the paper. Its "
            "code, which the paper builds on, judges training drawings, by running BatchNorm statistics (but for MAML)."
            * known
            + f"\n\n{table(rows, columns)}"
            + (f"\n{table(rows[1:], differences)}" if rows[0][1]["method"] == "ModGrad" and rows[1:] else "")
        )
        if importlib.util.find_spec("matplotlib"):
            slug = [
                *["synthetic"] * synthetic,
                "+".join(modes),
                f"{shots[0]}to{shots[1]}",
                *(f"{k}{budget[k]}" for k, v in MULTISHOT_BUDGET.items() if budget[k] != v),
            ]
            figures.append(
                (
                    against_steps,
                    dict(rows),
                    "; ".join(words),
                    out / f"modgrad-multishot-{'-'.join(slug).replace('_', '')}-{tasks}tasks.png",
                )
            )
            parts.append(f"![Training loss and accuracy against steps]({figures[-1][-1].name})\n")
    for (modes, synthetic, shots, budget), runs in sorted(trials.items()):
        setting = (
            f"multi-shot, {' + '.join(modes)}, {dict(budget)['ways']}-way, {shots[0]} to {shots[1]} shots"
        )
        about = (
            " ".join(f"**{x}.**" for x in multishot_words(synthetic, dict(budget)))
            + " Intervals over alphabets."
        )
        parts.append(trials_block(runs, setting, about))
    return parts


def multishot_words(synthetic, budget):
    """What of a run's budget is not the protocol's, a list."""
    return ["Synthetic images"] * synthetic + [
        f"{budget[k]} {MULTISHOT_UNITS[k]} instead of {v}"
        for k, v in MULTISHOT_BUDGET.items()
        if budget[k] != v
    ]


# What the runs of an environment must have in common to stand in one table, with the protocol's value, and how to say it.
RL_BUDGET = {
    "iterations": (500, "iterations"),
    "meta_batch": (40, "tasks per iteration"),
    "rollouts": (20, "rollouts"),
    "horizon": (None, "steps"),
    "hidden": (100, "units"),
    "gamma": (0.95, "discount"),
}


def rl_tables(folders, out, figures):
    """The runs of modgrad_rl.py under the folders -> parts of tables.md: ModGrad's Figure 8, one for each environment and budget;
    appends to `figures` (function, its arguments)."""
    groups = {}
    for file in sorted({file for folder in folders for file in Path(folder).rglob("result.json")}):
        try:
            run = read_result(file)
            if "env" not in run:
                continue
            args, env = run["args"], run["env"]
            alpha, _ = modgrad_rl.DEFAULTS[args["algorithm"]]
            if env != "navigation":
                alpha = modgrad_rl.CHEETAH_ALPHA.get(args["algorithm"], alpha)
            context = (5 if env == "navigation" else 50) if args["algorithm"] == "cavia" else 128
            usual = {
                "alpha": alpha,
                "context": context,
                "rank": 5,
                "updates": 1,
                "first_order": False,
                "gae_lambda": 1.0,
                "max_kl": 0.01,
                "cg_steps": 10,
                "cg_damping": 1e-5,
                "fisher_fraction": 0.25,
                "line_search": 15,
            }
            usual = {
                k: v for k, v in usual.items() if args["algorithm"] != "maml" or k not in ("context", "rank")
            }
            budget = {"iterations": run["iterations"]} | {k: args[k] for k in RL_BUDGET if k != "iterations"}
            run |= {
                "options": {k: args[k] for k, v in usual.items() if args.get(k, v) != v},
                "seed": args["seed"],
                "file": file,
                "budget": budget,
                "scores": np.array(run["per_task"]),
            }
            key = (env, *budget.values(), run["tasks_sha256"], len(run["scores"]))
            group = groups.setdefault(key, {})
            if (label(run, False), run["seed"]) in group:
                print(f"note: {file} repeats another run and is left out", file=sys.stderr)
            group.setdefault((label(run, False), run["seed"]), run)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            fail(
                f"{file} is not a whole result file ({type(error).__name__}: {error}): delete it, run its command again"
            )
    parts = []
    for (env, *_), group in sorted(groups.items(), key=str):
        names = list(RL)
        runs = sorted(
            group.values(),
            key=lambda run: (
                run["seed"],
                names.index(run["method"]) if run["method"] in names else len(names),
                label(run, False),
            ),
        )
        runs = [
            run | {"first_seed": -1 if len({run["seed"] for run in runs}) > 1 else run["seed"]}
            for run in runs
        ]
        first, updates = runs[0], len(runs[0]["scores"])

        def score(x, sign=""):
            return f"{x.mean():{sign}.2f} ± {1.96 * x.std(ddof=1) / math.sqrt(len(x)):.2f}"

        usual = {k: v for k, (v, _) in RL_BUDGET.items()} | {"horizon": modgrad_rl.HORIZON[env]}
        other = [
            f"{first['budget'][k]:g} {RL_BUDGET[k][1]} instead of {v:g}"
            for k, v in usual.items()
            if first["budget"][k] != v
        ]
        if other[:2] == [x for x in other if "iteration" in x] and len(other) > 1:
            other[:2] = [
                f"{first['budget']['iterations']:,} iterations of {first['budget']['meta_batch']} tasks instead of 500 of 40"
            ]
        heads = ["before", *(f"after {k} update{'s' * (k > 1)}" for k in range(1, updates))]
        columns = {"method": label} | {
            head: lambda run, k=k, score=score: score(run["scores"][k]) for k, head in enumerate(heads)
        }
        columns |= {
            "gain of 1 update": lambda run, score=score: score(run["scores"][1] - run["scores"][0], "+")
        }
        columns |= {
            "ModGrad's Figure 8, after 1 update": lambda run, env=env: RL.get(run["method"], {}).get(
                env, "-"
            ),
            "s per iteration": lambda run: f"{run['seconds_per_iteration']:.2g}",
        }
        ours = [run for run in runs if label(run, False) == "ModGrad"]
        pairs = [(one, two) for one in ours for two in runs if two is not one and two["seed"] == one["seed"]]
        text = (
            f"### Reinforcement learning, {env}\n\n"
            + "".join(f"**{x}.** " for x in other)
            + f"{first['test_tasks']:,} test tasks; return of a rollout, not discounted, 95 % interval over tasks; gain: task by task.\n\n"
            + table(runs, columns)
        )
        if pairs:
            text += "\n" + table(
                pairs,
                {"difference, task by task": lambda pair: f"{label(pair[0])} - {label(pair[1])}"}
                | {
                    head: lambda pair, k=k, score=score: score(
                        pair[0]["scores"][k] - pair[1]["scores"][k], "+"
                    )
                    for k, head in enumerate(heads)
                },
            )
        parts.append(text)
        if importlib.util.find_spec("matplotlib"):
            words = [str(v) for k, v in first["budget"].items() if v != usual[k]]
            file = out / f"{'-'.join(['rl', env, *words])}.png"
            figures.append((rl_curves, runs, "; ".join(other), file))
            parts.append(f"![Returns]({file.name})\n")
    return parts


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
        right.errorbar(
            run["after"]["steps"],
            run["after"]["mean"],
            run["after"]["ci95"],
            marker="o",
            capsize=2,
            label=name,
        )
    top = 1.2 * max(run["curve"]["mean"][0] for run in runs.values())  # what diverges leaves the picture
    left.set(xlabel="steps made", ylabel="loss of the next training batch", ylim=(0, top))
    right.set(xlabel="steps made", ylabel="accuracy on held-out drawings, %, paper protocol", xscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", fontsize="small", ncols=3)
    figure.suptitle(f"Alphabets not trained on\n{about}".strip(), fontsize="medium")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def rl_curves(runs, about, file):
    """ModGrad's Figure 8: left, returns of training tasks before (dotted) and after the update against iterations; right, of test
    tasks against updates, 95 % intervals -> PNG `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    methods = sorted({label(run, False) for run in runs})
    for run in runs:
        style = {
            "color": f"C{methods.index(label(run, False))}",
            "alpha": 1.0 if run["seed"] == min(r["seed"] for r in runs) else 0.5,
        }
        log = run["file"].parent / "log.jsonl"
        try:
            lines = read_log(log)
            of = max(1, len(lines) // 50)  # at most about 50 points
            points = (
                np.array(
                    [
                        [line["iteration"], line["returns"][0], line["returns"][-1]]
                        for line in lines[len(lines) % of :]
                    ]
                )
                .reshape(-1, of, 3)
                .mean(1)
            )
            left.plot(points[:, 0], points[:, 2], linewidth=1.4, **style)
            left.plot(points[:, 0], points[:, 1], ":", linewidth=1, **style)
        except (OSError, ValueError, KeyError):
            print(f"note: {log} cannot be read: no curve of it", file=sys.stderr)
        scores = run["scores"]
        right.errorbar(
            range(len(scores)),
            scores.mean(1),
            1.96 * scores.std(1, ddof=1) / math.sqrt(scores.shape[1]),
            capsize=2,
            marker="o",
            markersize=3,
            label=label(run).replace("`", ""),
            **style,
        )
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
        axis.errorbar(
            *zip(*((shots, mean) for shots, mean, _ in of)),
            [half for *_, half in of],
            marker="o",
            capsize=2,
            label=name.replace("`", ""),
        )
    axis.set(
        xlabel="shots",
        ylabel="accuracy in %, paper protocol, last parameters",
        xticks=sorted({run["shots"] for run in runs}),
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    figure.suptitle(
        f"{' + '.join(runs[0]['modes'])}, {runs[0]['ways']}-way\n{modgrad_budget_text(runs[0]['budget']).replace('**', '')}".strip(),
        fontsize="medium",
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


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


def modgrad_tables(found, out, figures):
    """Runs of read_modgrad -> the parts of tables.md that are about them; appends to `figures` (function, its arguments)."""
    groups, trials = {}, {}
    for run in found:
        if "trials" in run["file"].parts:
            trials.setdefault(tuple(str(run[k]) for k in ("modes", "budget", "ways", "shots")), []).append(
                run
            )
            continue
        group = groups.setdefault(
            tuple(run[k] if k != "modes" else tuple(run[k]) for k in ("modes", "budget", "ways", "shots")), {}
        )
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
            words = ["synthetic"] * budget["synthetic"] + [
                "+".join(key[0]),
                f"{key[2]}way",
                *(str(budget[k][0]) for k in MODGRAD_BUDGET if budget[k]),
            ]
            figures.append((against_shots, runs, out / f"modgrad-shots-{'-'.join(words)}.png"))
            parts.append(f"![Accuracy against shots]({figures[-1][-1].name})\n")
    return parts
