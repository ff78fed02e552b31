"""Tests: test_documents."""

import argparse
import ast
import difflib
import importlib
import io
import json
import re
import shlex
import subprocess
import tokenize
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
from tests import density
from tests.helpers import (
    HERE,
    RESULTS,
    TINY,
    Here,
    call,
    get_args,
    here,
    readme_blocks,
    run_all,
)
from tools import attention_report, bench, bench_gpu, inspect_gradients, reading


def documents():
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


PLAIN = (
    *("mmaml", "kml", "mprotonet", "afr", "transference"),
    *("modgrad", "modgrad_completion", "modgrad_multishot", "modgrad_rl"),
)


@pytest.mark.parametrize("script", PLAIN)
def test_scripts_are_not_dense(script):
    """One statement, one line, one idea: measured by tokens, which long lines cannot hide."""
    text = (HERE / f"{script}.py").read_text()
    found = density.measure(text)
    assert found["per_line"] <= (11 if script == "kml" else 12), found
    assert found["longest"][0] <= 40, found
    assert found["nesting"][0] <= 3, found
    assert not density.oddities(text), density.oddities(text)


def test_files_can_be_read_in_one_sitting():
    """No file is longer than 900 lines; data.py, which all scripts share, 200."""
    for path in [
        *HERE.glob("*.py"),
        *HERE.glob("fewshot/*.py"),
        *HERE.glob("tools/*.py"),
        *HERE.glob("tests/*.py"),
    ]:
        lines = len(path.read_text().splitlines())
        assert lines <= (200 if path.name == "data.py" else 900), path


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
        elif words[0] in ("tools.attention_report", "tools.pictures", "tools.cells"):
            importlib.import_module(words[0])  # other tests run them, on runs of their own
            continue
        elif words[0] == "data.py":
            words += ["--synthetic", "--image-size", "28", "--cache-dir", cache]
        elif words[0] == "tools.inspect_modulation":
            first = next(i for i, c in enumerate(dict.fromkeys(commands)) if " kml.py" in c)
            words = [words[0], str(tmp_path / str(first)), "--tasks", "10", "--cache-dir", cache]
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
    rows = re.findall(r"^\| `--([\w-]+)` \|[^|]*\| ([^|]*?) \| ([^|]*?) \|", documents(), re.MULTILINE)
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
        assert result["versions"]["commit"]
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


def test_readme_says_what_the_result_files_say(tmp_path):
    readme = documents()
    runs = {"/".join(run["file"].relative_to(RESULTS).parts[:-1]): run for run in reading.read([RESULTS])}
    for method in ("maml", "mmaml", "mmaml+kml"):
        run_ = runs[f"28px/2mode/5shot/{method}"]
        shown = re.search(rf"^\| {re.escape(reading.label(run_))} \| \d.*$", readme, re.MULTILINE).group()
        for protocol in ("paper", "inductive"):
            for modes in (run_["modes"], *([mode] for mode in run_["modes"])):
                assert reading.show(reading.score(run_, protocol, modes)) in shown

    alone = {
        ("Multi-ProtoNet", mode): runs[f"42px/{mode}/5shot/multi-protonet"]
        for mode in ("omniglot", "miniimagenet")
    }
    family = {
        name: runs[f"42px/2mode/5shot/{name.lower()}"] for name in ("ProtoNet", "MProtoNet", "MProtoNet+KML")
    }
    modes = family["ProtoNet"]["modes"]
    family["Multi-ProtoNet"] = reading.joined("Multi-ProtoNet", modes, alone)
    family = dict(zip(family, reading.on_the_same_tasks(list(family.values()), modes)))
    for name, run_ in family.items():
        shown = re.search(
            rf"^\| {re.escape(name)} \| .* \| \d\d\.\d\d ± 0\.4\d \| .*$", readme, re.MULTILINE
        ).group()
        for protocol in ("paper", "inductive"):
            for of in (modes, *([mode] for mode in modes)):
                assert reading.show(reading.score(run_, protocol, of)) in shown, (name, protocol, of)
    said = " ".join(readme.split())
    for one, two in (
        ("KML", "ProtoNet"),
        ("KML", "MProtoNet"),
        ("MProtoNet", "ProtoNet"),
        ("KML", "Multi-ProtoNet"),
        ("ProtoNet", "Multi-ProtoNet"),
    ):
        gain = reading.show(
            reading.difference(
                *(family[name.replace("KML", "MProtoNet+KML")] for name in (one, two)), "paper", modes
            ),
            "+",
        )
        assert f"{one} - {two} is {gain}" in said, (one, two, gain)
    halfway = {mode: runs[f"42px/5000/{mode}/5shot/multi-protonet"] for mode in modes}
    assert reading.show(reading.score(halfway["miniimagenet"], "paper", ["miniimagenet"])) in said
    for mode, words in (
        ("miniimagenet", "ProtoNet of both modes minus it {}"),
        ("omniglot", "(after 5,000 iterations {})"),
    ):
        gain = reading.show(reading.difference(family["ProtoNet"], halfway[mode], "paper", [mode]), "+")
        assert words.format(gain) in said
    gain = reading.show(
        reading.difference(family["ProtoNet"], family["Multi-ProtoNet"], "paper", ["omniglot"]), "+"
    )
    assert f"On Omniglot the two differ by {gain}" in said

    def difference(one, two):
        return reading.show(reading.difference(runs[one], runs[two], "paper", runs[one]["modes"]), "+")

    for one, two in (("mmaml+kml", "mmaml"), ("mmaml+kml", "maml"), ("mmaml", "maml")):
        assert (
            f"{one.removeprefix('mmaml+').upper()} - {two.upper()} {difference(*(f'28px/2mode/5shot/{x}' for x in (one, two)))}"
            in readme
        )
    pairs = [re.findall(r"`([^`]*)`", line) for line in re.findall(r"<!-- (.*?) -->", readme)]
    for one, two in pairs:  # <!-- `run` `other run` -->: what is said next, for each seed
        said = " and ".join(
            difference(f"residual/seed{seed}/{one}", f"residual/seed{seed}/{two}") for seed in (0, 1)
        )
        assert f"<!-- `{one}` `{two}` -->{said}" in readme.replace("\n", " "), f"{one} - {two}: {said}"
    assert len(pairs) >= 4


def test_readmes_tables_of_modgrad_are_those_of_the_result_files():
    """Tables and numbers of the section stand in the result files; without result files it has none of either."""
    readme = documents()
    section = re.split(r"\n##? ", readme[readme.index("## ModGrad and its baselines at 84 px") :])[0]
    known = (RESULTS / "tables.md").read_text().split("\n")
    for file in sorted(RESULTS.glob("modgrad*/gradients/*/gradients.json")):
        found = json.loads(file.read_text())["found"]
        known += inspect_gradients.noise_table(found).split("\n")
        known += inspect_gradients.spectrum_table(
            [row for row in found if row["algorithm"] in ("modgrad", "maml")]
        ).split("\n")
    lines = [line for line in section.split("\n") if line.startswith("|")]
    assert bool(lines) == any(RESULTS.glob("modgrad*/**/result.json"))
    assert not [line for line in lines if line not in known]
    said = re.findall(
        r"[+-]\d+\.\d+ ± \d+\.\d+", " ".join(line for line in section.split("\n") if not line.startswith("|"))
    )
    assert not [number for number in said if number not in "\n".join(lines)], (
        "what the text says stands in its tables"
    )


@pytest.mark.parametrize(
    "head, least, numbers",
    [
        ("\n## Transference between tasks\n", 12, 8),
        ("\n## 2D navigation\n", 13, 4),
        ("\n## Half-cheetah, forwards or backwards\n", 9, 2),
        ("\n## Multi-shot learning on real alphabets\n", 20, 2),
        ("\n## Image completion on real faces\n", 11, 4),
    ],
)
def test_readmes_tables_of_a_section_are_those_of_the_result_files(head, least, numbers):
    readme = documents()
    section = re.split(r"\n##? ", readme[readme.index(head) + 1 :])[0]
    known = (RESULTS / "tables.md").read_text().split("\n")
    lines = [line for line in section.split("\n") if line.startswith("|")]
    assert len(lines) >= least
    assert not [line for line in lines if line not in known]
    text = " ".join(line for line in section.split("\n") if not line.startswith("|"))
    said = re.findall(r"[+-]?\d+\.\d+ (?:± \d+\.\d+|\(\S+ to \S+\))", text)
    assert len(said) >= numbers
    assert not [number for number in said if number not in "\n".join(lines)], (
        "what the text says stands in its tables"
    )


def test_readme_shows_the_measured_speeds():
    readme, shown = documents().split("\n"), 0
    for path in RESULTS.glob("bench-*.json"):
        record = json.loads(path.read_text())
        args = argparse.Namespace(**record.get("args", {}))
        if path.name == "bench-gpu.json":
            assert set(bench_gpu.gpu_table(record).split("\n")) <= set(readme)
        for part, table in (
            ("train", bench.train_table),
            ("peers", bench.peers_table),
            ("variants", bench.variants_table),
            ("steps", bench.steps_table),
            ("reuse", bench.reuse_table),
        ):
            if part in record:
                assert args.synthetic is False
                rows = table(record[part], args).split("\n")
                assert set(rows) <= set(readme), path
                shown += len(rows) - 2
    assert shown == 3 + 2 + 2 * 2 + 2 + 12 + 8


def test_transference_results_name_their_commit_or_the_readme_says_that_they_do_not():
    readme, nameless = documents(), set()
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
    by_seed = text[text.index("| configuration") :].split("\n\n")[0]
    assert by_seed in documents()
    assert all((RESULTS / file).exists() for file in re.findall(r"\((curves[^)]*)\)", text))


def test_readme_says_what_was_found_inside_the_modulation():
    readme = documents()
    found = [
        row
        for folder in ("residual", "42px")
        for row in json.loads((RESULTS / folder / "modulation.json").read_text())
    ]
    assert len(found) == 5
    for row in found:
        assert row["synthetic"] is False
        change = [
            row["change"][k]["overall"] for k in ("its mode's mean", "the mean of all", "another mode's mean")
        ]
        cells = [
            f"{row['accuracy']['its own v']['overall']['mean']:.2f}",
            *(f"{x['mean']:+.2f} ± {x['ci95']:.2f}" for x in change),
        ]
        name = "W * M" if row["no_residual"] else "W * (1 + M)"
        long = ", 10,000 iterations" * (row["iteration"] == 10000)
        assert f"| {name}, seed {row['seed']}{long} | {' | '.join(cells)} |" in readme


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len((HERE / "README.md").read_text().splitlines()) <= 250
    for name in ("README.md", "RESULTS.md", "docs/protocol.md", "docs/speed.md"):
        file = HERE / name
        for link in re.findall(r"\]\(([^)#]+)", file.read_text()):
            if not link.startswith("http"):
                assert (file.parent / link).exists(), f"{name}: {link}"
