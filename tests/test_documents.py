"""Tests: test_documents."""

import ast
import difflib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import tokenize
import types
from pathlib import Path

import numpy as np
import pytest

import afr
import kml
import mmaml
import modgrad_completion
import modgrad_multishot
import modgrad_rl
import mprotonet
from fewshot import published as fewshot_published
from fewshot import scenes as fewshot_scenes
from fewshot import tool
from tests import density
from tests.helpers import (
    HERE,
    RESULTS,
    TINY,
    Here,
    call,
    fails,
    get_args,
    here,
    make_params,
    make_task,
    readme_blocks,
    run_all,
)
from tools import attention_report, bench, documents, tables


def read_documents():
    """README and what it links to, as one text."""
    names = ("README.md", "RESULTS.md", "docs/protocol.md", "docs/speed.md")
    return "\n".join((HERE / name).read_text() for name in names)


def committed(name):
    """The text of a file as it was committed last, or as it lies here where there is no git."""
    command = ["git", "-C", str(HERE), "show", f"HEAD:./{name}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return shown.stdout if shown.returncode == 0 else (HERE / name).read_text()


def code_lines(path, source=None):
    """The lines of a script without comments, docstrings and blank lines."""
    source = source or Path(path).read_text()
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            for i in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[i] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return [line.rstrip() for line in lines if line.strip()]


def test_the_diff_shows_one_idea():
    """Guards the committed pair, which is teaching material: `diff mmaml.py kml.py` shows the modulation and no more.

    A change of yours to one of them is not wrong. To commit it, make it in the other file too, or raise the numbers.
    """
    one, two = (code_lines(name, committed(name)) for name in ("mmaml.py", "kml.py"))
    matcher = difflib.SequenceMatcher(None, one, two, autojunk=False)
    changes = [c for c in matcher.get_opcodes() if c[0] != "equal"]
    assert len(changes) <= 6
    assert sum(c[2] - c[1] for c in changes) <= 25
    assert sum(c[4] - c[3] for c in changes) <= 25


PLAIN = sorted([*HERE.glob("*.py"), *HERE.glob("fewshot/*.py"), *HERE.glob("tools/*.py")])


@pytest.mark.parametrize("file", PLAIN, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_files_are_not_dense(file):
    """One statement, one line, one idea: measured by tokens, which long lines cannot hide."""
    text = file.read_text()
    found = density.measure(text)
    assert found["per_line"] <= 11, found
    assert found["longest"][0] <= 40, found
    assert found["nesting"][0] <= 3, found
    assert not density.oddities(text), density.oddities(text)


def test_files_can_be_read_in_one_sitting():
    """No file is longer than 1,000 lines; data.py, which all scripts share, 240."""
    for path in [
        *HERE.glob("*.py"),
        *HERE.glob("fewshot/*.py"),
        *HERE.glob("tools/*.py"),
        *HERE.glob("tests/*.py"),
    ]:
        lines = len(path.read_text().splitlines())
        assert lines <= (240 if path.name == "data.py" else 1000), path


def test_arrows_point_one_way():
    """Scripts import data, data imports fewshot; nothing in fewshot imports data, and scripts do not import each other."""
    scripts = {path.stem for path in HERE.glob("*.py")} - {"data", "test_all", "conftest"}
    for path in [*HERE.glob("*.py"), *HERE.glob("fewshot/*.py")]:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        if path.parent.name == "fewshot":
            assert not imported & ({"data", "tools"} | scripts), path
        elif path.stem in scripts:
            allowed = {"mprotonet"} if path.stem == "transference" else set()
            assert not imported & (scripts | {"fewshot", "tools"}) - allowed, path
        elif path.stem == "data":
            assert not imported & (scripts | {"tools"}), path


def test_readme_shows_the_real_diff():
    shown = readme_blocks("diff")
    assert shown
    real = "\n".join(
        line
        for one, two in (("mmaml.py", "kml.py"), ("kml.py", "mprotonet.py"))
        for line in difflib.unified_diff(code_lines(HERE / one), code_lines(HERE / two), n=0, lineterm="")
    )
    for block in shown:
        assert {line[0] for line in block.splitlines()} <= set("+-")
        removed, added = ([line for line in block.splitlines() if line[0] == sign] for sign in "-+")
        for lines in (removed, added):
            assert "\n".join(lines) in real, block
    assert any("1 + M" in block for block in shown)
    assert any("prototypes" in block for block in shown)


def readme_commands():
    """Every line of README's sh blocks that starts a script of ours."""
    lines = [
        line.split(" #")[0].strip()
        for block in readme_blocks("sh")
        for line in block.replace("\\\n", " ").split("\n")
    ]
    return [line for line in lines if re.search(r"\bpython3? +(\w+\.py|-m tools\.)|^bash ", line)]


def test_readme_commands_run(tmp_path, cache, monkeypatch, capsys):
    """As they stand, with a tiny budget appended; those on real images without their download. In this process, which saves
    two seconds a command."""
    monkeypatch.chdir(tmp_path)
    for name, few in (
        ("SCENES_FORMAT", "readme"),  # caches are named by it
        ("SCENE_IMAGES", 96),
        ("SCENE_DOMAINS", dict.fromkeys(fewshot_published.SPLITS, 2)),
        ("SCENE_CLASSES", dict.fromkeys(fewshot_published.SPLITS, 6)),
    ):
        monkeypatch.setattr(fewshot_scenes, name, few)
    monkeypatch.setattr(attention_report, "SUBTASKS", 4)
    commands = readme_commands()
    assert any("kml.py" in c for c in commands)
    assert any("mmaml.py" in c for c in commands)
    understood = set()
    for number, command in enumerate(dict.fromkeys(commands)):
        if command.startswith("bash run_all.sh "):  # which cells there are; another test runs some
            done = run_all(*shlex.split(command.replace("run_all.sh", "run_all.sh --dry-run"))[2:])
            assert "--out runs" in done.stdout, command
            continue
        words = shlex.split(re.split(r"\bpython3? +(?:-m +(?=tools\.)|(?=\w+\.py))", command)[1])
        stand_ins = {"birds": "cub", "cars": "aircraft"}  # modes that have no drawn stand-in of their own
        words = [stand_ins.get(word, word) for word in words]
        alike = re.sub(
            r"\d[\d.e-]*", "#", command
        )  # differs from one that was run in numbers only: that it is understood is enough
        if alike in understood and "--out" not in words:
            importlib.import_module(words[0].removesuffix(".py")).get_args([*words[1:], "--synthetic"])
            continue
        understood.add(alike)
        if words[0] in ("kml.py", "mmaml.py", "mprotonet.py", "modgrad.py"):
            words += [*TINY, "--image-size", "16", "--test-tasks", "10", "--cache-dir", cache]
            words += (
                ["--keep-every", "3"]
                if "runs/example" in words
                else []
                if "--out" in words
                else ["--out", str(tmp_path / str(number))]
            )
        elif words[0] == "afr.py":
            words += [
                "--image-size",
                "16",
                "--filters",
                "4",
                "--meta-batch",
                "1",
                "--iterations",
                "4",
                "--steps",
                "1",
                "--queries",
                "3",
                "--synthetic",
                "--test-tasks",
                "12",
                "--val-tasks",
                "12",
                "--cache-dir",
                cache,
            ]
            words += [] if "--out" in words else ["--out", str(tmp_path / str(number))]
        elif words[0] == "modgrad_completion.py":
            words += [
                "--synthetic",
                "--iterations",
                "4",
                "--image-size",
                "11",
                "--hidden",
                "4",
                "--test-tasks",
                "10",
                "--cache-dir",
                cache,
            ]
        elif words[0] == "modgrad_rl.py":
            if "cheetah-dir" in words:
                pytest.importorskip("gymnasium")
            words += [
                "--iterations",
                "1",
                "--meta-batch",
                "2",
                "--rollouts",
                "2",
                "--horizon",
                "4",
                "--test-tasks",
                "2",
                "--workers",
                "1",
            ]
            words += [] if "--out" in words else ["--out", str(tmp_path / str(number))]
        elif words[0] == "modgrad_multishot.py":
            words += [
                "--synthetic",
                "--iterations",
                "2",
                "--image-size",
                "16",
                "--channels",
                "2",
                "--context",
                "4",
                "--steps",
                "2",
                "--test-steps",
                "3",
                "--meta-batch",
                "2",
                "--test-tasks",
                "6",
                "--cache-dir",
                cache,
            ]
        elif words[0] == "transference.py":  # of the example run, made just before
            words += ["--source-tasks", "2", "--target-tasks", "2", "--alpha", "0.001", "--cache-dir", cache]
        elif words[0] in ("tools.attention_report", "tools.pictures"):  # of the runs made just before
            words += ["--cache-dir", cache]
        elif words[0] == "data.py":
            words += ["--synthetic", "--image-size", "28", "--cache-dir", cache]
        elif words[0] == "tools.inspect_modulation":
            words += ["--tasks", "10", "--cache-dir", cache]
        elif words[0] == "tools.inspect_gradients":
            words += [
                "--tasks",
                "10",
                "--step-tasks",
                "2",
                "--cache-dir",
                cache,
            ]  # of the runs made just before
        elif words[0] == "tools.tables":
            words[1:] = [str(tmp_path), "--out", str(tmp_path)]
        elif words[0] == "tools.bench":
            monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Here())
            words += ["--scripts", "mprotonet"] * ("train" in words) + [
                "--seconds",
                "0.1",
                "--image-size",
                "16",
                "--meta-batch",
                "1",
                "--rounds",
                "1",
                "--shots",
                "1",
                "--synthetic",
                "--cache-dir",
                cache,
            ]
        try:
            call(importlib.import_module(words[0].removesuffix(".py")), monkeypatch, *words[1:])
        except SystemExit as stop:
            assert not stop.code, f"{command}: {capsys.readouterr().err}"


def test_readme_defaults_are_the_defaults():
    """The table of defaults: `--flag` | paper | ours | released code."""
    rows = re.findall(r"^\| `--([\w-]+)` \|[^|]*\| ([^|]*?) \| ([^|]*?) \|", read_documents(), re.MULTILINE)
    assert len(rows) >= 15
    for module, column in ((kml, 0), (mmaml, 0), (mprotonet, 1)):
        args = vars(get_args(module))
        for flag, *ours in rows:
            value = args.get(flag.replace("-", "_"), "")
            assert ours[column] == {True: "on", False: "off"}.get(
                value if isinstance(value, bool) else None, str(value)
            ), flag


def test_ci_runs_the_test_command_of_the_readme():
    command = next(line for block in readme_blocks("sh") for line in block.split("\n") if "pytest" in line)
    assert command in (HERE / ".ci" / "run").read_text()


def test_no_absolute_paths():
    for path in [
        *HERE.glob("*.py"),
        *HERE.glob("*.md"),
        *HERE.glob("*.txt"),
        *HERE.glob("results/**/*.json"),
    ]:
        assert not re.search(r"(^|[^a-z.])/(work|tmp|root|home)/", path.read_text()), path


def test_committed_results_are_whole():
    """Each result file names its protocol, its tasks and its commit, and its means follow from its tasks."""
    paths, hashes = list(RESULTS.glob("**/result.json")), {}
    assert len(paths) >= 3
    for path in paths:
        result = json.loads(path.read_text())
        rl, reuse = "env" in result, "nil_or_error" in result
        assert result["synthetic"] is ("scenes" in result.get("modes", ())), (
            "ray-cast scenes are said to be synthetic, and nothing else is here"
        )
        if rl:
            assert result["returns"] == [modgrad_rl.summary(np.array(row)) for row in result["per_task"]]
        elif "pixels" in result:
            assert result["error"] == modgrad_completion.summary(np.array(result["per_task"]))
        scored = (
            ()
            if rl or "pixels" in result
            else (("accuracy", "per_task"), ("accuracy_inductive", "per_task_inductive"))
        )
        for key, tasks in scored:
            if "curve" in result:  # multi-shot: means of alphabets' means
                assert result[key] == modgrad_multishot.summary(
                    np.array(result[tasks]), np.array(result["per_task_alphabet"])
                )
            elif result[tasks] is not None:
                values, strata = np.array(result[tasks]), result.get("strata", result["modes"])
                found = (
                    afr.summary(values, strata, result["domains"]) if reuse else kml.summary(values, strata)
                )
                assert {k: found[k] for k in result[key]} == result[key]
        assert len(result["per_task"][0] if rl else result["per_task"]) == result["test_tasks"]
        # a copy without git's history names no commit: then a file beside the seeds does
        noted = path.parents[2] / "commit.txt"
        assert result["versions"]["commit"] or noted.read_text().strip()
        assert (path.parent / "log.jsonl").exists()
        setting = (
            (result["env"], result["test_tasks"])
            if rl
            else (*result["modes"], result["pixels"], result["order"], result["test_tasks"])
            if "pixels" in result
            else (*result["modes"], result["ways"], *result["shots"], result["test_tasks"])
            if "curve" in result
            else (
                *result["modes"],
                result["ways"],
                result["shots"],
                result["test_tasks"],
                *(result["args"]["tasks"] if reuse else ["classification"]),
            )
        )
        assert hashes.setdefault(setting, result["tasks_sha256"]) == result["tasks_sha256"], (
            "not the same test tasks"
        )


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_tables_between_markers_are_those_of_the_result_files(name, monkeypatch):
    """`python -m tools.documents` would change nothing; and no other table of results is there."""
    monkeypatch.chdir(HERE)
    text = (HERE / name).read_text()
    assert documents.filled(text) == text, "run: python -m tools.documents"
    by_hand = {"README.md": 2, "RESULTS.md": 5, "docs/speed.md": 0}  # files, tools; "In one page"
    rest = documents.MARKED.sub("", text)
    assert len(documents.markdown_tables(rest)) == by_hand[name]


def test_numbers_of_the_prose_stand_in_the_tables():
    """Each number with an interval, in every section of RESULTS.md, stands in a table of the section.

    Those of "In one page" and of README stand in tables of RESULTS.md.
    """
    number = re.compile(r"[+-]?\d+\.\d+ (?:± \d+\.\d+|\(\S+ to \S+\))")

    def numbers(lines):
        return set(number.findall(" ".join(lines)))

    lines = (HERE / "RESULTS.md").read_text().split("\n")
    sections = {"": []}
    for line in lines:
        if line.startswith("## "):
            sections[line] = []
        sections[list(sections)[-1]].append(line)
    one_page = numbers(sections.pop("## In one page"))
    shown = set()
    said = set()
    for head, lines in sections.items():
        tables = numbers(line for line in lines if line.startswith("|"))
        prose = numbers(line for line in lines if not line.startswith("|"))
        assert not prose - tables, head
        shown |= tables
        said |= prose
    assert len(said) > 60
    assert len(one_page) > 20
    assert not one_page - shown
    claims = documents.MARKED.sub("", (HERE / "README.md").read_text())
    claims = re.findall(r"by (\d+\.\d+ ± \d+\.\d+)", claims)
    assert claims
    assert all(f"+{claim}" in shown for claim in claims)


def test_runs_on_one_mode_each_as_one(tmp_path, monkeypatch, capsys):
    """RUN/* of a marker is what the tables call Multi-X: the same difference, made in two ways."""
    monkeypatch.chdir(HERE)
    pairs = "protonet - single/* = joint - separate"
    shown = documents.differences(RESULTS / "five-modes" / "seed0", pairs)
    _, row = documents.markdown_tables(shown)[0]
    text, _ = tables.make([RESULTS / "five-modes"], RESULTS)
    names = "ProtoNet, `--lr 0.004` - Multi-ProtoNet, `--lr 0.004`"
    found = [cells for table in documents.markdown_tables(text) for cells in table if cells[0] == names]
    assert row == ["joint - separate", found[0][1]]
    for name in ("protonet", "single/omniglot", "single/fc100"):
        shutil.copytree(RESULTS / "five-modes" / "seed0" / name, tmp_path / name)
    fails(capsys, lambda: documents.differences(tmp_path, pairs), "lacks miniimagenet birds cars")


def test_a_marker_that_asks_for_what_is_not_there(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    for marker, *words in (
        ("table 1 of results/nowhere", "results/nowhere", "not there"),
        ("table 9 of results/cheetah", "table 9", "there are 3"),
        ("table 1 of results/cheetah\ncolumns: methods", "'methods'", "there are: method;"),
        ("table 1 of results/cheetah\nrows: MAML; TRPO", "'TRPO'", "there are: MAML;"),
        ("table 1 of results/cheetah\ncolours: blue", "'colours'", "columns"),
        ("differences of results/five-modes\npairs: kml - tadam", "kml - tadam", "no folder"),
    ):
        text = f"<!-- {marker} -->\n<!-- end of table -->\n"
        assert documents.MARKED.search(text)
        fails(capsys, lambda text=text: documents.filled(text), *words)
    closing = "<!-- end of table -->\n"
    text = f"<!-- table 1 of results/cheetah -->\nprose\n<!-- table 2 of results/cheetah -->\n{closing}"
    for broken in (
        text,
        "<!-- table 1 of results/cheetah -->\n",
        f"<!-- table 1 of results\nbad line -->\n{closing}",
    ):
        fails(capsys, lambda broken=broken: documents.filled(broken), "a marker is not whole")


def test_transference_results_name_their_commit_or_the_readme_says_that_they_do_not():
    readme, nameless = read_documents(), set()
    for file in RESULTS.glob("transference/*/transference.json"):
        if not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", json.loads(file.read_text()).get("commit", "")):
            nameless.add(file.parent.name)
    assert nameless == {"half", "self095", "sweep"}
    assert "`half`, `self095` and `sweep` name no commit" in readme


def test_committed_tables_are_those_of_the_result_files(tmp_path):
    done = here("tools.tables", RESULTS, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tables.md").read_text()
    assert text == (RESULTS / "tables.md").read_text()
    notes = {json.loads(path.read_text()).get("note", "") for path in RESULTS.glob("**/result.json")} - {""}
    assert notes and all(note in text for note in notes), (
        "how a run departed from its command is said beside its numbers"
    )
    assert all((RESULTS / file).exists() for file in re.findall(r"\((curves[^)]*)\)", text))


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len((HERE / "README.md").read_text().splitlines()) <= 250
    for name in ("README.md", "RESULTS.md", "docs/protocol.md", "docs/speed.md"):
        file = HERE / name
        for link in re.findall(r"\]\(([^)#]+)", file.read_text()):
            if not link.startswith("http"):
                assert (file.parent / link).exists(), f"{name}: {link}"


def test_readme_shows_what_kml_prints(capsys):
    """The block under "One command": its layout and its settings are what report() prints; its numbers are its own."""
    readme = (HERE / "README.md").read_text()
    (block,) = re.findall(r"^```\n(MMAML\+KML SYNTHETIC .*?)^```", readme, re.M | re.S)
    rows = re.findall(r"^(\w+) +([\d.]+) \+- ([\d.]+) +([\d.]+) \+- ([\d.]+)$", block, re.M)
    assert len(rows) == 3
    args = get_args(kml, "--synthetic", "--quick")
    seconds = float(re.search(r"of ([\d.]+) s$", block, re.M)[1])
    result = {"iterations": args.iterations, "seconds_per_iteration": seconds}
    for key, i in (("accuracy", 1), ("accuracy_inductive", 3)):
        result[key] = {row[0]: {"mean": float(row[i]), "ci95": float(row[i + 1])} for row in rows}
    kml.report(result, args)
    assert capsys.readouterr().out in block
    progress = block.split("\n\n")[0].splitlines()
    assert all(line.startswith(f"{args.title} ") and f"/{args.iterations} " in line for line in progress)


EXERCISES = {  # README, "Change one line": the script, its line, what to write
    "one scale": (kml, "theta[key] * (1 + M)", "theta[key] * (1 + M.mean((1, 2, 3), keepdim=True))"),
    "gate": (
        mmaml,
        "x * (1 + scale[:, None, None]) + shift[:, None, None]",
        "x * torch.sigmoid(scale[:, None, None]) + shift[:, None, None]",
    ),
    "product": (kml, "theta[key] * (1 + M)", "theta[key] * M"),
}


def exercise(name):
    """A script with its line changed, as a module."""
    script, line, instead = EXERCISES[name]
    text = (HERE / f"{script.__name__}.py").read_text()
    assert text.count(f"= {line}\n") == 1
    assert f"`{instead}`" in " ".join((HERE / "README.md").read_text().split())
    made = types.ModuleType(script.__name__)
    exec(compile(text.replace(f"= {line}\n", f"= {instead}\n"), script.__file__, "exec"), made.__dict__)
    return made


def test_the_exercises_do_what_the_readme_says():
    task = make_task(ways=3, shots=5, size=28)

    def logits(module, args, params):
        return module.task_loss(params, task, args)[1]

    def distance(one, two):
        return (one - two).abs().max().item()

    one, product, gate = exercise("one scale"), exercise("product"), exercise("gate")
    plain = logits(kml, *make_params(kml, "none"))
    args, params = make_params(kml, "kml")
    assert distance(logits(kml, args, params), plain) > 1e-2
    assert distance(logits(one, args, params), plain) < 1e-5, "MAML, up to BatchNorm's epsilon"
    args, _ = make_params(kml, "kml", "--adapt", "modulated")
    assert distance(logits(one, args, params), plain) > 1e-4, "the scale changes the effect of a step"
    theta = kml.group(params, "base")
    hat = product.modulate(theta, kml.modulation(params, kml.encode_task(params, task.support_x)))
    for l in kml.LAYERS:
        assert 0.003 < hat[f"conv{l}.weight"].norm() / theta[f"conv{l}.weight"].norm() < 0.03, (
            "about 100 times smaller"
        )
    args, params = make_params(mmaml, "film")
    assert distance(logits(gate, args, params), logits(mmaml, args, params)) > 1e-2


def test_every_command_of_the_documents_is_understood():
    """Those in blocks, in tables and in the text, by the flags of their script."""
    seen = set()
    for name in (*documents.DOCUMENTS, "docs/protocol.md"):
        text = (HERE / name).read_text()
        blocks = "\n".join(re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
        lines = [*blocks.split("\n"), *re.findall(r"`(python[^`\n]+)`", text)]
        seen |= {m[1] for line in lines if (m := re.search(r"\bpython3? +(\w+\.py\b[^#]*)", line))}
    seen = {command for command in seen if "RUN" not in command}  # a run's folder, to be filled in
    assert len(seen) > 60
    for command in sorted(seen):
        script, *words = shlex.split(command)
        module = tool if script == "data.py" else importlib.import_module(script.removesuffix(".py"))
        try:
            module.get_args(words)
        except SystemExit:
            assert words in (["verify"], ["prepare"]), command


def test_the_documents_tool_writes_tables_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    text, file = (HERE / "README.md").read_text(), tmp_path / "page.md"
    file.write_text(text.replace("| 63.05 ± 0.53,", "| 99.99 ± 0.53,", 1))
    assert file.read_text() != text
    call(documents, monkeypatch, file)
    assert file.read_text() == text
    fails(capsys, lambda: call(documents, monkeypatch, tmp_path / "none.md"), "is not there")
