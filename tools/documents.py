"""Tables between markers: README.md, RESULTS.md and docs/speed.md have their tables from result files, never by hand.

    python -m tools.documents [DOCUMENT ...]

writes every table that stands between markers anew. A marker is an HTML comment, which a reader of the page does not see:

    <!-- table 2 of results/five-modes
    columns: configuration = method; seeds
    rows: ProtoNet, `--lr 0.004` = ProtoNet -->
    | method | seeds |
    ...
    <!-- end of table -->

    2 of       which of the tables that are made of the places named next: folders of result files, as for tables.py; or files
               of other tools, bench-*.json, modulation.json or gradients.json; or a folder of trials, whose subfolders NAME-FLAGVALUE hold logs
    columns    which columns, in this order, and after " = " what stands in their heads; all, if not given
    without    the columns that are left out
    rows       which rows, by their first cell, and after " = " what stands there; if not given, all but missing methods

A table of chosen differences, task by task and by the paper protocol, is made of two runs each, which lie in the folder named,
or in its folders seed0, seed1, ...:

    <!-- differences of results/five-modes
    pairs: kml - mprotonet = KML - FiLM; kml - protonet = KML - ProtoNet -->

A run RUN/* is Multi-X: the runs in RUN, on one mode each, as one.

`<!-- validation of results/five-modes/seed0 -->` (or several folders) shows how runs came along: accuracy on validation tasks against iterations.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from data import atomic_write, fail, read_log
from tools import bench, bench_gpu, inspect_gradients, reading, tables

DOCUMENTS = ("README.md", "RESULTS.md", "docs/speed.md")
MARKED = re.compile(
    r"(<!-- (table \d+|differences|validation) of (\S[^\n]*?)((?:\n\w+: [^\n]*?)*) -->\n)(.*?)(<!-- end of table -->)",
    re.DOTALL,
)
OPENING = re.compile(r"<!-- (?:table \d+|differences|validation) of ")
KEYS = ("columns", "without", "rows", "pairs")
TRIAL = re.compile(r"(.+)-(lr|inner|alpha)([\d.e-]+)")  # the name of a trial's folder
FLAGS = {"lr": "--lr", "inner": "--inner-lr", "alpha": "--alpha"}


def markdown_tables(text):
    """Markdown -> its tables, each a list of rows, each a list of cells; the row of dashes is left out."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        rows = [line.strip("| ").split(" | ") for line in block.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def modulation_run(row):
    """What a table calls a run that inspect_modulation.py measured."""
    form = "W * M" if row.get("no_residual") else "W * (1 + M)"  # kml.py has no such flag
    constant = ", constant v" if row.get("embed") == "constant" else ""
    longer = ", 10,000 iterations" if row["iteration"] == 10000 else ""
    return f"{form}{constant}, seed {row['seed']}{longer}"


def change(what):
    """What a column shows of a row: by how much accuracy changes with another v, or with filters scaled back."""

    def cell(row):
        if what not in row["change"]:  # of a single mode there is no other
            return "-"
        return "{mean:+.2f} ± {ci95:.2f}".format(**row["change"][what]["overall"])

    return cell


def modulation_table(rows):
    """What inspect_modulation.py wrote -> Markdown: accuracy with a task's own v, and the change with another."""

    columns = {
        "run": modulation_run,
        "its own v": lambda row: f"{row['accuracy']['its own v']['overall']['mean']:.2f}",
        "its mode's mean v": change("its mode's mean"),
        "the mean of both modes": change("the mean of all"),
        "the other mode's mean": change("another mode's mean"),
    }
    return reading.table(rows, columns)


def norms_table(rows):
    """The same -> Markdown: by what factor modulation changes the norms of filters, median (smallest to largest).

    The last column is the change in accuracy when filters are scaled back to their former norms.
    """

    def factor(layer):
        return lambda row: "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["outputs"][layer]["norm"])

    columns = {"run": modulation_run}
    columns |= {layer: factor(layer) for layer in rows[0]["outputs"]}
    columns["accuracy with former norms"] = change("filters scaled back")
    return reading.table(rows, columns)


def validations(file):
    """A log -> {iteration: accuracy on validation tasks, in %, by the paper protocol}."""
    found = {}
    for entry in read_log(file):
        if "validation" in entry:
            measured = entry["validation"]
            of = measured["paper"] if "paper" in measured else measured["accuracy"]  # as afr.py writes it
            overall = of.get("overall", of)  # multi-shot has no modes
            found[entry["iteration"]] = overall["mean"]
    return found


def trials_table(folder):
    """Logs of trials -> Markdown: a row per configuration, its accuracy on validation tasks at each value, the best in bold.

    Accuracies are in %, by the paper protocol, at the last validation of each log.
    """
    found = {}
    flag = None
    for file in sorted(Path(folder).glob("*/log.jsonl")):
        found_in_name = TRIAL.fullmatch(file.parent.name)
        if not found_in_name:
            fail(
                f"{file.parent} lies among trials, whose folders are named NAME-lrVALUE: move it, or rename it"
            )
        name, kind, value = found_in_name.groups()
        if flag not in (None, FLAGS[kind]):
            fail(f"{folder} has trials of {flag} and of {FLAGS[kind]}: keep them in two folders")
        flag = FLAGS[kind]
        measured = validations(file)
        if measured:
            found.setdefault(name, {})[float(value)] = measured[max(measured)]
    values = sorted({value for of in found.values() for value in of})

    def cell(value):
        def show(name):
            if value not in found[name]:
                return "-"
            best = max(found[name].values())
            text = f"{found[name][value]:.2f}"
            return f"**{text}**" if found[name][value] == best else text

        return show

    columns = {"configuration": lambda name: name}
    columns |= {f"`{flag} {value:g}`": cell(value) for value in values}
    return reading.table(found, columns)


def validation_table(places):
    """Logs of the runs in folders -> Markdown: accuracy in % on validation tasks (paper protocol) at each validation."""
    found = {}
    for place in places:
        for file in sorted(Path(place).glob("*/log.jsonl")):
            found[file.parent.name] = validations(file)
    iterations = sorted({i for of in found.values() for i in of})

    def cell(iteration):
        return lambda run: f"{found[run][iteration]:.2f}" if iteration in found[run] else "-"

    columns = {"iteration": lambda run: run} | {f"{i:,}": cell(i) for i in iterations}
    return reading.table(found, columns)


def bench_tables(file):
    """What bench.py measured -> Markdown, with the tables that it prints."""
    record = json.loads(file.read_text())
    if "card" in record:  # of `bench gpu`
        return bench_gpu.gpu_table(record)
    args = argparse.Namespace(**record["args"])
    parts = []
    for part, show in bench.TABLES.items():
        if part in record:
            parts.append(show(record[part], args))
    return "\n".join(parts)


def modulation_tables(files):
    """Files modulation.json -> Markdown, with both tables of what they hold."""
    rows = []
    for file in files:
        rows += json.loads(file.read_text())
    text = modulation_table(rows)
    measured = [row for row in rows if "filters scaled back" in row["change"]]  # older files have no norms
    return f"{text}\n{norms_table(measured)}" if measured else text


def gradients_tables(file):
    """A file gradients.json -> Markdown, with the tables of noise and of spectra."""
    found = json.loads(file.read_text())["found"]
    measured = [row for row in found if row.get("spectrum")]
    return f"{inspect_gradients.noise_table(found)}\n\n{inspect_gradients.spectrum_table(measured)}\n"


def source(places):
    """Names of folders, or of files modulation.json, or one name of another kind -> Markdown with all tables made of them."""
    paths = [Path(place) for place in places]
    for path in paths:
        if not path.exists():
            fail(
                f"a marker asks for tables of {path}, which is not there: run this from the repository's root"
            )
    first = paths[0]
    if all(path.name == "modulation.json" for path in paths):
        return modulation_tables(paths)
    if first.name == "gradients.json":
        return gradients_tables(first)
    if first.name.startswith("bench-"):
        return bench_tables(first)
    if not first.is_dir():
        fail(f"a marker asks for tables of {first}, which is no folder of results, nor a file of a tool")
    if any(TRIAL.fullmatch(child.name) for child in first.iterdir()):
        return trials_table(first)
    text, _ = tables.make(paths, Path("results"))
    return text


def chosen(words, known, places):
    """ "a = b; c" -> {"a": "b", "c": "c"}; each must be one of `known`."""
    found = {}
    for word in words.split("; "):
        old, _, new = word.partition(" = ")
        if old not in known:
            fail(f"a marker of tables of {places} asks for {old!r}; there are: {'; '.join(known)}")
        found[old] = new or old
    return found


def chosen_columns(head, places, options):
    """Which columns of a table to show -> {place in a row: what stands in the head}."""
    left_out = chosen(options["without"], head, places) if "without" in options else ()
    if "columns" in options:
        names = chosen(options["columns"], head, places)
        return {head.index(old): new for old, new in names.items()}
    return {place: name for place, name in enumerate(head) if name not in left_out}


def chosen_rows(rows, places, options):
    """Which rows of a table to show -> list of rows; if the marker names none, all but missing methods."""
    if "rows" not in options:
        return [row for row in rows if ": missing" not in row[0]]
    by_name = {row[0]: row for row in rows}
    shown = []
    for old, new in chosen(options["rows"], by_name, places).items():
        _, *cells = by_name[old]
        shown.append([new, *cells])
    return shown


def render(number, text, places, options):
    """Table `number` of the Markdown that was made of `places`, with options {key of KEYS: text} -> Markdown."""
    found = markdown_tables(text)
    if not 1 <= number <= len(found):
        fail(f"a marker asks for table {number} of {places}, of which there are {len(found)}")
    head, *rows = found[number - 1]
    columns = chosen_columns(head, places, options)
    lines = [list(columns.values()), ["---"] * len(columns)]
    for row in chosen_rows(rows, places, options):
        lines.append([row[place] for place in columns])
    return reading.markdown(lines)


def run_of(folder, name):
    """The run that lies in folder/name, as the tables need it; of NAME/*, the runs on single modes in NAME as one."""
    if not name.endswith("/*"):
        (run,) = reading.read_each([folder / name], reading.read_few_shot)
        return run
    runs = reading.read_each([folder / name.removesuffix("/*")], reading.read_few_shot)
    found = {"modes": [], "scores": {"paper": {}, "inductive": {}}, "data": {}}
    for run in runs:
        found["modes"] += run["modes"]
        found["data"] |= run["data"]
        for protocol, of in run["scores"].items():
            found["scores"][protocol] |= of
    return found


def check_modes(names, one, two):
    """Exit if `names`, a pair RUN - OTHER/*, compares runs of which the second lacks modes of the first."""
    lacking = [mode for mode in one["modes"] if mode not in two["modes"]]
    if names.endswith("/*") and lacking:
        fail(f"a marker asks for {names}, whose second part lacks {' '.join(lacking)}")


def is_there(folder, name):
    """Whether folder/name is a finished run, or for NAME/* whether NAME holds some."""
    path = "*/result.json" if name.endswith("/*") else "result.json"
    return any((folder / name.removesuffix("/*")).glob(path))


def pairs_of_runs(place, folders, pairs):
    """Pairs of runs as a marker has them -> {name: {folder: (run, other run)}}, of those of the folders that have both.

    RUN/* is Multi-X: the runs on single modes in RUN.
    """
    rows = {}
    for pair in pairs.split("; "):
        names, _, shown = pair.partition(" = ")
        if names.count(" - ") != 1:
            fail(f"a marker of differences of {place} has the pair {names!r}: write RUN - OTHER = NAME")
        one, two = names.split(" - ")
        found = {}
        for folder in folders:
            if is_there(folder, one) and is_there(folder, two):
                found[folder] = run_of(folder, one), run_of(folder, two)
                check_modes(names, *found[folder])
        if not found:
            fail(f"a marker asks for {names} in {place}: no folder there has both runs")
        rows[shown or names] = found
    return rows


def shared_modes(one, two):
    """The modes that both runs have, in the order of the first."""
    return [mode for mode in one["modes"] if mode in two["modes"]]


def differences(place, pairs):
    """Chosen pairs of runs, "a - b = name; c - d", under a folder -> Markdown: their differences of each seed, and the mean.

    The mean over seeds is given from three seeds on, with an interval that covers training too (tables.over_seeds).
    """
    folders = sorted(place.glob("seed[0-9]*")) or [place]
    rows = pairs_of_runs(place, folders, pairs)

    def of_seed(folder):
        def cell(name):
            if folder not in rows[name]:
                return "-"
            one, two = rows[name][folder]
            found = reading.difference(one, two, "paper", shared_modes(one, two))
            return reading.show(found, "+")

        return cell

    def mean(name):
        measured = list(rows[name].values())
        if len(measured) < 3:
            return "-"
        shared = shared_modes(*measured[0])
        return reading.show(tables.over_seeds(measured, shared), "+")

    columns = {"difference, task by task, paper protocol": lambda name: name}
    if folders == [place]:
        return reading.table(rows, columns | {"overall": of_seed(place)})
    columns |= {f"seed {folder.name.removeprefix('seed')}": of_seed(folder) for folder in folders}
    if any(len(of) > 2 for of in rows.values()):
        columns["mean over seeds, training included"] = mean
    return reading.table(rows, columns)


def options_of(lines, places):
    """The lines "key: value" of a marker -> {key of KEYS: text}; exit if there is another key."""
    options = dict(line.split(": ", 1) for line in lines.strip().splitlines())
    unknown = [key for key in options if key not in KEYS]
    if unknown:
        fail(f"a marker of tables of {places} has {unknown[0]!r}: it can have {', '.join(KEYS)}")
    return options


def made_anew(kind, places, options):
    """A marker's kind ("table 2", "differences", "validation"), its places and options -> its table, Markdown."""
    if kind == "differences":
        if "pairs" not in options:
            fail(f"a marker of differences of {places} has no line 'pairs: RUN - OTHER = NAME'")
        return differences(Path(places), options["pairs"])
    if kind == "validation":
        return render(1, validation_table(places.split()), places, options)
    number = int(kind.removeprefix("table "))
    return render(number, source(places.split()), places, options)


def filled(text):
    """A document -> the document with its tables made anew."""

    def anew(match):
        opening, kind, places, lines, _, closing = match.groups()
        options = options_of(lines, places)
        return opening + made_anew(kind, places, options) + closing

    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        fail(
            "a marker is not whole: each needs lines 'key: value', and a table with <!-- end of table --> after it"
        )
    return MARKED.sub(anew, text)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument("documents", nargs="*", default=DOCUMENTS, metavar="DOCUMENT", help=", ".join(DOCUMENTS))
    for file in map(Path, p.parse_args().documents):
        if not file.is_file():
            fail(f"{file} is not there: run this from the repository's root")
        text = file.read_text()
        atomic_write(file, filled(text))
        print(f"{file}: {len(MARKED.findall(text))} tables", file=sys.stderr)


if __name__ == "__main__":
    main()
