"""Result files -> the tables of the KML, ModGrad and attentive-feature-reuse papers, their numbers beside ours, and figures.

    python -m tools.tables [FOLDER ...] [--out results]

reads every result.json and transference.json under the folders (default: runs), prints the tables as Markdown and writes them to
<out>/tables.md. With matplotlib installed it also draws, for each table of few-shot classification with several runs, accuracy
on training and validation tasks against iterations; ModGrad's Figure 6 where there are several numbers of shots, and its Figures
5 and 8; and attentive feature reuse's Figure 5 where runs were validated.

Runs stand in one table when they share setting (modes, ways, shots), family (MAML or ProtoNet) and budget (image size,
iterations, ...). A budget other than the paper's stands in the table's head. With several modes, a method that has no run is shown as missing.
Intervals, 95 %, are over test tasks; modes are strata: overall is the mean of the modes' means, its interval
1.96 sqrt(sum_m s_m^2 / n_m) / M. Differences are paired: the same formula on the differences task by task.
"""

import argparse
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np

import transference
from data import atomic_write, fail, student
from tools.figures import curves
from tools.papers import SETTINGS, TABLE1, TABLE2
from tools.reading import (
    FAMILIES,
    absent,
    budget_text,
    difference,
    gains,
    headed,
    interval,
    joined,
    label,
    number_of_tasks,
    on_the_same_tasks,
    read,
    score,
    setting_name,
    show,
    slug,
    table,
    title,
)
from tools.tables_afr import afr_tables, read_afr
from tools.tables_completion import completion_tables
from tools.tables_modgrad import modgrad_tables, read_modgrad
from tools.tables_multishot import multishot_tables
from tools.tables_rl import rl_tables

PAIRS = (
    (3, 2),
    (3, 0),
    (3, 1),
    (2, 0),
    (0, 1),
)  # KML - FiLM, KML - none, KML - Multi, FiLM - none, none - Multi


def pairs(runs, methods):
    """Which runs to compare: the methods among each other; a variant, or another seed, with the runs of its seed that
    have no flags: of its own method, and of the family's first."""
    usual = {(run["method"], run["seed"]): run for run in runs if not run["options"]}
    main = {run["method"]: run for run in runs if label(run) == run["method"]}
    found = []
    for i, j in PAIRS:
        found.append((main.get(methods[i]), main.get(methods[j])))
    for run in runs:
        if label(run) == run["method"]:
            continue
        for method in dict.fromkeys((run["method"], methods[0])):
            found.append((run, usual.get((method, run["seed"]))))
    for several in of_method(runs, methods[1]):
        if several["options"]:
            found += [(run, several) for run in runs if run["seed"] == run.get("first_seed")]
    return [pair for pair in found if is_measured(*pair)]


def of_method(runs, method):
    """Those of the runs that are of a method."""
    return [run for run in runs if run["method"] == method]


def is_measured(one, two):
    """Whether a pair is of two runs, and both have results."""
    if not one or not two or one is two:
        return False
    return bool(one["scores"] and two["scores"])


def by_seed(rows, reference, modes):
    """Where runs have several seeds: a line for each configuration, its seeds side by side in each cell -> Markdown, or "".

    The base of the differences is the configuration of `reference` with the most seeds; of several, the one with the
    shortest label: without flags, or with a tuned `--lr` alone.
    """
    runs = {}
    for run in rows:
        if run["scores"] and run["seed"] is not None:
            runs.setdefault(label(run, seed=False), {})[run["seed"]] = run
    seeds = sorted({seed for of_name in runs.values() for seed in of_name})
    if len(seeds) < 2:
        return ""
    plain = [name for name in runs if name.split(",")[0] == reference]
    plain.sort(key=lambda name: (-len(runs[name]), len(name)))
    base = runs[plain[0]] if plain else {}

    def scores(name, protocol):
        found = []
        for seed in seeds:
            run = runs[name].get(seed)
            found.append(show(score(run, protocol, modes) if run else None))
        return ", ".join(found)

    def minus(name, protocol):
        found = []
        for seed in seeds:
            run = runs[name].get(seed)
            other = base.get(seed)
            compared = None
            if run and other and run is not other:
                compared = difference(run, other, protocol, modes)
            found.append(show(compared, "+"))
        return ", ".join(found)

    at = f"seeds {', '.join(map(str, seeds[:-1]))} and {seeds[-1]}"
    columns = {
        "configuration": lambda name: name,
        f"overall, paper protocol, {at}": lambda name: scores(name, "paper"),
        f"minus {reference} of the same seed": lambda name: minus(name, "paper"),
        f"overall, inductive, {at}": lambda name: scores(name, "inductive"),
        f"minus {reference}, inductive": lambda name: minus(name, "inductive"),
    }
    return table(runs, columns) + means_over_seeds(runs, base, reference, seeds, modes)


def means_over_seeds(runs, base, reference, seeds, modes):
    """The mean difference from the reference of configurations with three seeds or more -> Markdown, or "".

    Of two seeds an interval that covers training would be ten points wide, and say nothing.
    """
    pairs = {}
    for name, of_name in runs.items():
        shared = [seed for seed in seeds if seed in of_name and seed in base]
        if of_name is not base and len(shared) > 2:
            pairs[name] = [(of_name[seed], base[seed]) for seed in shared]
    if not pairs:
        return ""
    columns = {
        "configuration": lambda name: name,
        f"minus {reference}, mean over seeds, 95 % interval over training and tasks": lambda name: show(
            over_seeds(pairs[name], modes), "+"
        ),
        "seeds": lambda name: len(pairs[name]),
    }
    return "\n" + table(pairs, columns)


def over_seeds(pairs, modes):
    """Mean difference of pairs of runs, one pair per seed, by the paper's protocol -> (mean, interval), or None.

    Seeds are the outer level: their differences vary with training, which gives Student's t over n seeds. All seeds
    share their test tasks, so the interval over tasks, of the differences averaged over seeds, is added in quadrature.
    """
    means = []
    per_mode = {mode: [] for mode in modes}
    for one, two in pairs:
        found = difference(one, two, "paper", modes)
        if found is None:
            return None
        means.append(found[0])
        for mode in modes:
            per_mode[mode].append(gains(one, two, "paper", mode))
    n = len(pairs)
    training = student(n) * np.std(means, ddof=1) / math.sqrt(n)
    over_pairs = []
    for found in per_mode.values():
        count = min(map(len, found))  # of test tasks: a pair may have fewer
        over_pairs.append(np.mean([x[:count] for x in found], 0))
    _, tasks = interval(over_pairs)
    return float(np.mean(means)), math.hypot(training, tasks)


def common_flags(runs, keys):
    """Flags that all runs of one family, budget, ways and shots have in common are no variants: they leave the runs'
    `options` for `common`, a remark above the table. The smallest seed, `first_seed`, is not named in rows; the remark names it, unless it is 0."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[k] for k in keys), []).append(run)
    for group in groups.values():
        shared = shared_options(group)
        seed = min(run["seed"] for run in group)
        one_seed = all(run["seed"] == seed for run in group)
        said = dict(shared)
        if seed and one_seed:
            said["seed"] = seed
        flags = label({"method": "", "options": said, "seed": None})
        remarks = [f"All{flags.removeprefix(',')}."] if flags else []
        if seed and not one_seed:
            remarks.append(f"Seed {seed}, where a row names none.")
        variant = bool(set(shared) - {"lr_halve_every"})  # which belongs to a shorter budget
        for run in group:
            run["options"] = {k: v for k, v in run["options"].items() if k not in shared}
            run |= {"first_seed": seed, "common": " ".join(remarks), "variant": variant}


def shared_options(runs):
    """The flags that all runs have, with the same value -> dict."""
    shared = {}
    for name, value in runs[0]["options"].items():
        if all(run["options"].get(name) == value for run in runs):
            shared[name] = value
    return shared


def block(runs, singles):
    """The runs of one setting, family and budget -> Markdown: accuracies, then paired differences, then seeds beside each other.

    `singles`: {(Multi-X with its flags, mode): its run on that mode alone}, of the same ways, shots, family and budget.
    """
    first = runs[0]
    methods = FAMILIES[first["family"]]
    modes = first["modes"]
    rows = in_order(runs, singles)
    count = max(number_of_tasks(run) for run in rows if run["scores"])
    about = [
        budget_text(first["budget"], first["family"]),
        first.get("common", ""),
        f"{count:,} test tasks;",
        "accuracy in %, 95 % interval over tasks.",
        *sorted({run["note"] for run in runs if run.get("note")}),
    ]
    parts = [
        headed(title(first), about),
        accuracies(rows, first),
        differences(pairs(rows, methods), first),
        by_seed(rows, methods[0], modes),
    ]
    return "\n".join(part for part in parts if part)


def in_order(runs, singles):
    """Runs, cut to the same tasks: methods (with several modes all, in the paper's order), then variants and other seeds."""
    methods = FAMILIES[runs[0]["family"]]
    modes = runs[0]["modes"]
    usual = {run["method"]: run for run in runs if label(run) == run["method"]}
    if len(modes) > 1:
        usual = {method: usual.get(method) or absent(method) for method in methods}
        usual[methods[1]] = joined(methods[1], modes, singles)
    variants = []
    if len(modes) > 1:
        names = names_of(singles, modes)
        variants = [joined(name, modes, singles) for name in names if name != methods[1]]

    def place(run):
        return methods.index(run["method"]), label(run, seed=False), run["seed"] or 0

    rest = [run for run in runs if run not in usual.values()] + variants
    return on_the_same_tasks([*usual.values(), *sorted(rest, key=place)], modes)


def names_of(singles, modes):
    """What the runs on one of the modes alone are called, with their flags -> list, each name once."""
    return list(dict.fromkeys(name for name, mode in singles if mode in modes))


def published_of(first):
    """What KML's paper has of a run's setting -> (Table 1 {method: accuracy at 1 and 5 shots}, Table 2 {mode: the same})."""
    papers_task = first["ways"] == 5 and first["shots"] in (1, 5)
    if not papers_task or dict(first["budget"])["synthetic"]:
        return {}, {}
    setting = setting_name(first["modes"])
    table2 = TABLE2 if setting == "2mode-dagger" else {}
    return TABLE1.get(setting, {}), table2


def is_variant(run):
    """Whether a run has flags that the paper's has not: its own, or those that all runs of its table share."""
    return bool(run["options"]) or run.get("variant", False)


def accuracies(rows, first):
    """Runs -> Markdown: the accuracy of each, overall and by mode, and the paper's beside it."""
    modes = first["modes"]
    several = modes if len(modes) > 1 else []
    table1, table2 = published_of(first)
    place = 1 if first["shots"] == 5 else 0  # in the paper's pairs, 1-shot and 5-shot

    def missing(run):
        if run["scores"]:
            return ""
        of = f" ({', '.join(run['missing'])})" if run.get("missing") else ""
        return f": missing{of}"

    def overall(protocol):
        return lambda run: show(score(run, protocol, modes))

    def of_mode(mode):
        def cell(run):
            found = [score(run, protocol, [mode]) for protocol in ("paper", "inductive")]
            return " / ".join(map(show, found))

        return cell

    def published(numbers):
        return lambda run: "-" if is_variant(run) else show(numbers[run["method"]][place])

    columns = {
        "method": lambda run: label(run) + missing(run),
        "overall, paper protocol": overall("paper"),
        "overall, inductive": overall("inductive"),
    }
    if table1:
        columns["KML's Table 1"] = published(table1)
    columns |= {f"{mode}, paper / inductive": of_mode(mode) for mode in several}
    if table2:
        columns |= {f"KML's Table 2, {mode}": published(table2[mode]) for mode in several}
    columns["parameters"] = lambda run: f"{run['parameters']:,}" if run["parameters"] else "-"
    columns["s per iteration"] = lambda run: f"{run['seconds']:.2g}" if run["seconds"] else "-"
    return table(rows, columns)


def differences(compared, first):
    """Pairs of runs -> Markdown: their differences, task by task, and the paper's beside them; "" if there are none."""
    modes = first["modes"]
    several = modes if len(modes) > 1 else []
    table1, _ = published_of(first)
    place = 1 if first["shots"] == 5 else 0  # in the paper's pairs, 1-shot and 5-shot

    def minus(protocol, modes):
        return lambda pair: show(difference(*pair, protocol, modes), "+")

    def published(pair):
        if any(is_variant(run) for run in pair):
            return "-"
        one, two = (table1[run["method"]][place][0] for run in pair)
        return f"{one - two:+.2f}"

    columns = {
        "difference, task by task": lambda pair: f"{label(pair[0])} - {label(pair[1])}",
        "overall, paper protocol": minus("paper", modes),
        "overall, inductive": minus("inductive", modes),
    }
    if table1:
        columns["KML's Table 1"] = published
    columns |= {f"{mode}, paper protocol": minus("paper", [mode]) for mode in several}
    return table(compared, columns) if compared else ""


def transference_part(record):
    """What one transference.json holds -> Markdown."""
    of = record["setting"]
    few = min(transference.FEW_SOURCES, of["source_tasks"])
    shares = [*transference.HEAD, *map(transference.shares_row, record["found"])]
    if of["alpha"] == "auto":
        size = f"self-transference {of['self_transference']}"
    else:
        size = f"alpha {of['alpha']}"
    parts = [
        f"### {record['about']}, {' and '.join(of['at'])}",
        f"Step on {of['update']} parameters, {size}; 95 % intervals over resampled sources and targets.",
        "\n".join(shares),
        *transference.other_tables(record["found"], few),
    ]
    return "".join(f"{part}\n\n" for part in parts)


def transference_tables(folders):
    """What transference.py measured under the folders -> parts of tables.md, with links to its figures, relative to the FOLDER
    that was searched: they work where --out is this folder."""
    parts = []
    places = {file: place for place in folders for file in Path(place).rglob("transference.json")}
    for file, place in sorted(places.items()):
        try:
            parts.append(transference_part(json.loads(file.read_text())))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, IndexError) as error:
            why = f"{type(error).__name__}: {error}"
            fail(f"{file} is not a whole file of transference.py ({why}): delete it, run its command again")
        for picture in sorted(file.parent.glob("transference-*.png")):
            parts.append(f"![{picture.stem}]({picture.relative_to(place)})\n")
    return parts


def kml_tables(runs, out, figures):
    """Runs of KML's methods -> parts of tables.md: one block of tables, and one figure, per setting, family and budget."""
    keys = ("family", "budget", "ways", "shots")
    common_flags(runs, keys)
    groups = {}
    for run in runs:
        group = groups.setdefault(tuple(run[k] for k in keys), {})
        alike = group.setdefault(tuple(sorted(run["modes"])), {})
        first = alike.setdefault(label(run), run)
        if first is not run:
            print(f"note: {run['file']} repeats {first['file']} and is left out", file=sys.stderr)

    def place(key):
        family, budget, *_ = key
        return family, dict(budget)["synthetic"], str(key[1:])

    parts = []
    seen = set()
    for key in sorted(groups, key=place):
        parts += group_tables(groups[key], out, figures, seen)
    lacking = lacking_settings(seen)
    if lacking:
        parts.append(f"Missing altogether: {', '.join(lacking)}.\n")
    return parts


def lacking_settings(seen):
    """The settings of the paper that are not among those seen, (family, setting, shots) -> list of their names."""
    found = []
    for family, setting, shots in itertools.product(FAMILIES, SETTINGS, (1, 5)):
        if (family, setting, shots) not in seen:
            found.append(f"{setting} {shots}-shot ({family} family)")
    return found


def runs_on_one_mode(group):
    """{modes: runs by label} -> {(name, mode): run} of those that are a part of Multi-X, called `name` with its flags."""
    found = {}
    for modes, runs in group.items():
        if len(modes) > 1:
            continue
        for run in runs.values():
            name = label(run)
            if name.startswith("Multi-") and run["seed"] == run["first_seed"]:
                found[name, modes[0]] = run
    return found


def group_tables(group, out, figures, seen):
    """{modes: runs by label} of one family, budget, ways and shots -> parts of tables.md.

    A run on one mode alone has no table of its own where it stands as a part of Multi-X in a table of several modes.
    `seen` collects the settings of the paper that have results.
    """
    singles = runs_on_one_mode(group)
    joint = {mode for modes in group if len(modes) > 1 for mode in modes}

    def place(modes):
        return len(modes) == 1, len(modes), modes

    parts = []
    for modes in sorted(group, key=place):
        runs = list(group[modes].values())
        part_of_another = all(run is singles.get((label(run), modes[0])) for run in runs)
        if part_of_another and modes[0] in joint:
            continue
        parts.append(block(runs, singles))
        first = runs[0]
        if not dict(first["budget"])["synthetic"]:
            seen.add((first["family"], setting_name(first["modes"]), first["shots"]))
        shown = runs + alone(modes, singles)
        if len(shown) > 1 and importlib.util.find_spec("matplotlib"):
            file = out / f"curves-{slug(first)}.png"
            about = budget_text(first["budget"], first["family"]).replace("**", "")
            figures.append((curves, shown, f"{title(first)}\n{about}", file))
            parts.append(f"![Accuracy against iterations]({file.name})\n")
    return parts


def alone(modes, singles):
    """The runs on one of several modes alone, for the figure of those modes."""
    if len(modes) == 1:
        return []
    return [run for (_, mode), run in singles.items() if mode in modes]


def make(folders, out):
    """All tables of the result files under the folders -> (Markdown, figures); Markdown is "" where there is none.

    out: the folder that the Markdown is meant for. A figure is (function, *arguments), which draws it there.
    """
    figures = []
    runs = read(folders)
    few_shot = read_modgrad(folders)
    reuse = read_afr(folders)
    others = [
        *completion_tables(folders),
        *multishot_tables(folders, out, figures),
        *rl_tables(folders, out, figures),
    ]
    transfer = transference_tables(folders)
    if not any((runs, few_shot, reuse, others, transfer)):
        return "", []
    parts = [
        "# KML: tables from result files\n",
        "*s per iteration* is each run's own clock, whatever else its machine was doing; bench.py measures speed.\n",
        *kml_tables(runs, out, figures),
    ]
    if transfer:
        parts += ["# Transference: tables from result files\n", *transfer]
    if few_shot or others:
        parts += ["# ModGrad: tables from result files\n", *modgrad_tables(few_shot, out, figures), *others]
    if reuse:
        parts += ["# Attentive feature reuse: tables from result files\n", *afr_tables(reuse, out, figures)]
    return "\n".join(parts), figures


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument(
        "folders", nargs="*", default=["runs"], metavar="FOLDER", help="where result files are (runs)"
    )
    p.add_argument("--out", default="results", help="folder of tables.md and the figures")
    args = p.parse_args()
    out = Path(args.out)
    text, figures = make(args.folders, out)
    if not text:
        fail(
            f"no result.json or transference.json that a table could show under {' '.join(args.folders)}: try bash run_all.sh --quick --synthetic first"
        )
    if importlib.util.find_spec("matplotlib") is None:
        print("note: matplotlib is not installed, so there are no figures", file=sys.stderr)
    print(text)
    atomic_write(out / "tables.md", text)
    for function, *arguments in figures:
        function(*arguments)
    print(f"written to {out / 'tables.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
