"""Tests: test_tables."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import afr
import kml
import mmaml
import modgrad
import modgrad_completion
import modgrad_multishot
import modgrad_rl
import mprotonet
from fewshot.flags import identity
from tests.helpers import HERE, RESULTS, TINY, call, get_args, here, make_result, run_all, wait_for_a_line
from tools import (
    papers,
    reading,
    tables,
    tables_completion,
    tables_modgrad,
    tables_multishot,
    tables_rl,
)


def test_intervals_and_paired_differences_of_the_tables_agree_with_a_bootstrap():
    rng = np.random.default_rng(0)
    hard = {"a": rng.normal(95, 4, 300), "b": rng.normal(50, 9, 300)}  # what both methods find hard
    one, two = (
        {
            "scores": {"paper": {m: x + rng.normal(gain, 2, 300) for m, x in hard.items()}},
            "data": {"a": 1, "b": 2},
        }
        for gain in (1, 0)
    )
    resample = [{m: rng.integers(0, 300, 300) for m in "ab"} for _ in range(2000)]
    mean, width = reading.score(one, "paper", ["a", "b"])
    means = [np.mean([one["scores"]["paper"][m][at[m]].mean() for m in "ab"]) for at in resample]
    assert math.isclose(mean, np.mean(means), abs_tol=0.05)
    assert math.isclose(width, 1.96 * np.std(means), rel_tol=0.1)
    mean, paired = reading.difference(one, two, "paper", ["a", "b"])
    gains = {m: one["scores"]["paper"][m] - two["scores"]["paper"][m] for m in "ab"}
    means = [np.mean([gains[m][at[m]].mean() for m in "ab"]) for at in resample]
    assert math.isclose(mean, np.mean(means), abs_tol=0.05)
    assert math.isclose(paired, 1.96 * np.std(means), rel_tol=0.1)
    assert paired < width / 1.5, "pairing takes out what both find hard"
    shorter = {
        "scores": {"paper": {m: x[:200] for m, x in two["scores"]["paper"].items()}},
        "data": two["data"],
    }
    assert reading.difference(one, shorter, "paper", ["a"])[0] == gains["a"][:200].mean()
    assert reading.difference(one, shorter, "inductive", ["a"]) is None
    assert reading.difference(one, shorter | {"data": {"a": 1, "b": 3}}, "paper", ["a", "b"]) is None, (
        "other images"
    )
    assert (
        reading.difference(
            *(run | {"tasks": ("ab", 300, sha)} for run, sha in ((one, "x"), (two, "y"))), "paper", ["a"]
        )
        is None
    ), "other tasks"
    assert reading.images_of({"synthetic": False, "data": ["omniglot-42-08c3dcbf50bd"]}) == ["omniglot-42"]
    assert reading.images_of({"synthetic": True, "data": ["omniglot-42-08c3dcbf50bd"]}) == [
        "omniglot-42-08c3dcbf50bd"
    ]


def test_tables_are_exactly_as_expected(tmp_path):
    both = ["omniglot", "miniimagenet"]
    flags = {"shots": 5, "iterations": 4000, "meta_batch": 4, "image_size": 42}
    make_result(tmp_path / "p", "ProtoNet", both, [90, 40, 92, 44], [88, 40, 92, 40], **flags)
    make_result(tmp_path / "k", "MProtoNet+KML", both, [94, 42, 98, 44], [94, 40, 94, 44], **flags)
    make_result(tmp_path / "q", "MProtoNet+KML", both, [94, 44, 98, 46], **flags, embed="query", seed=1)
    make_result(tmp_path / "o", "ProtoNet", both[:1], [96, 98, 90], [96, 96, 90], **flags)
    make_result(tmp_path / "m", "ProtoNet", both[1:], [41, 42], [40, 42], **flags)
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tables.md").read_text() + "\n" == done.stdout
    expected = """\
# KML: tables from result files

*s per iteration* is each run's own clock, whatever else its machine was doing; bench.py measures speed.

### ProtoNet family, 2mode (omniglot + miniimagenet), 5-way 5-shot

**42 px instead of 84, 4,000 iterations of 4 tasks instead of 30,000 of 10.** 4 test tasks; accuracy in %, 95 % interval over tasks.

| method | overall, paper protocol | overall, inductive | KML's Table 1 | omniglot, paper / inductive | miniimagenet, paper / inductive | parameters | s per iteration |
| --- | --- | --- | --- | --- | --- | --- | --- |
| ProtoNet | 66.50 ± 2.19 | 65.00 ± 1.96 | 75.12 ± 0.41 | 91.00 ± 1.96 / 90.00 ± 3.92 | 42.00 ± 3.92 / 40.00 ± 0.00 | 1,110 | 0.25 |
| Multi-ProtoNet | 69.25 ± 1.10 | 68.50 ± 0.98 | 75.33 ± 0.46 | 97.00 ± 1.96 / 96.00 ± 0.00 | 41.50 ± 0.98 / 41.00 ± 1.96 | 2,220 | - |
| MProtoNet: missing | - | - | 75.72 ± 0.47 | - / - | - / - | - | - |
| MProtoNet+KML | 69.50 ± 2.19 | 68.00 ± 1.96 | 79.82 ± 0.40 | 96.00 ± 3.92 / 94.00 ± 0.00 | 43.00 ± 1.96 / 42.00 ± 3.92 | 1,110 | 0.25 |
| MProtoNet+KML, `--embed query`, seed 1 | 70.50 ± 2.19 | - | - | 96.00 ± 3.92 / - | 45.00 ± 1.96 / - | 1,110 | 0.25 |

| difference, task by task | overall, paper protocol | overall, inductive | KML's Table 1 | omniglot, paper protocol | miniimagenet, paper protocol |
| --- | --- | --- | --- | --- | --- |
| MProtoNet+KML - ProtoNet | +3.00 ± 1.39 | +3.00 ± 2.77 | +4.70 | +5.00 ± 1.96 | +1.00 ± 1.96 |
| MProtoNet+KML - Multi-ProtoNet | +0.25 ± 1.10 | -0.50 ± 0.98 | +4.49 | -1.00 ± 1.96 | +1.50 ± 0.98 |
| ProtoNet - Multi-ProtoNet | -2.75 ± 1.47 | -3.50 ± 2.19 | -0.21 | -6.00 ± 0.00 | +0.50 ± 2.94 |
"""
    assert done.stdout.startswith(expected)
    assert "Missing altogether: 2mode-dagger 1-shot (MAML family)" in done.stdout


def test_tables_of_modgrad_are_exactly_as_expected(tmp_path):
    flags = {"image_size": 42, "iterations": 1000, "shots": 5}
    best = {"iteration": 800, "per_task": [60.0, 70.0], "per_task_inductive": [60.0, 60.0]}
    for name, method, last, more in (
        ("a", "MAML", [50, 54], {"algorithm": "maml"}),
        ("b", "ModGrad", [60, 70], {}),
        (
            "c",
            "MAML on conv3+conv4",
            [56, 64],
            {"algorithm": "maml", "adapt": ["conv3", "conv4"], "steps": 1, "alpha": 0.1},
        ),
        ("d", "ModGrad", [61, 71], {"steps": 3}),
        ("e", "ModGrad", [70, 72], {"shots": 10}),
    ):
        make_result(
            tmp_path / name,
            method,
            ["miniimagenet"],
            last,
            [x - 1 for x in last],
            args=vars(get_args(modgrad))
            | {"synthetic": False}
            | flags
            | {
                "steps": 5 if more.get("algorithm") == "maml" else 1,
                "alpha": 0.01 if more.get("algorithm") == "maml" else 0.1,
            }
            | more,
            best=best if name in "ab" else None,
            **{**flags, **{k: more[k] for k in more if k == "shots"}},
        )
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    expected = """\
### ModGrad and its baselines, miniimagenet, 5-way 5-shot

**42 px instead of 84, 3,000 episodes instead of 50,000.** 2 test tasks; accuracy in %, 95 % interval over tasks. *Last* parameters, and those *best on validation* classes among those kept.

| method | last, paper protocol | last, inductive | best on validation, paper protocol | best on validation, inductive | ModGrad's paper | parameters | s per iteration |
| --- | --- | --- | --- | --- | --- | --- | --- |
| ModGrad | 65.00 ± 9.80 | 64.00 ± 9.80 | 65.00 ± 9.80 | 60.00 ± 0.00 | 69.17 ± 0.69 | 1,110 | 0.25 |
| MAML | 52.00 ± 3.92 | 51.00 ± 3.92 | 65.00 ± 9.80 | 60.00 ± 0.00 | 64.59 ± 0.88 | 1,110 | 0.25 |
| ModGrad, `--steps 3` | 66.00 ± 9.80 | 65.00 ± 9.80 | - | - | 68.42 | 1,110 | 0.25 |
| MAML on conv3+conv4, `--steps 1 --alpha 0.1` | 60.00 ± 7.84 | 59.00 ± 7.84 | - | - | - | 1,110 | 0.25 |

| difference, task by task | last, paper protocol | last, inductive | best on validation, paper protocol | best on validation, inductive |
| --- | --- | --- | --- | --- |
| ModGrad - MAML | +13.00 ± 5.88 | +13.00 ± 5.88 | +0.00 ± 0.00 | +0.00 ± 0.00 |
| ModGrad - ModGrad, `--steps 3` | -1.00 ± 0.00 | -1.00 ± 0.00 | - | - |
| ModGrad - MAML on conv3+conv4, `--steps 1 --alpha 0.1` | +5.00 ± 1.96 | +5.00 ± 1.96 | - | - |
"""
    assert expected in done.stdout
    assert "5-way 10-shot" in done.stdout
    (figure,) = re.findall(r"\((modgrad-shots[^)]*)\)", done.stdout)
    assert (tmp_path / "out" / figure).exists()


def make_afr_result(folder, words, values, transfer=None):
    """A result file as afr.py writes it; `values`: {measure: per-task list}, a single number standing for two tasks of each stratum."""
    args = get_args(afr, *words)
    n = len(args.strata)

    def of(values, strata, n=n):
        found = {key: [float(x) for x in values[key]] for key in afr.KEYS}
        return dict(zip(afr.PER_TASK, found.values())) | {
            key: kml.summary(np.array(x), strata) for key, x in found.items()
        }

    result = {
        "method": args.method,
        "modes": args.modes,
        "ways": args.ways,
        "shots": args.shots,
        "synthetic": args.synthetic,
        "strata": args.strata,
        "domains": {},
        "data": [f"{mode}-abc" for mode in args.modes],
        "iterations": args.iterations,
        "seconds_per_iteration": 0.5,
        "test_tasks": 2 * n,
        "parameters": {"backbone": 1000, "head": 100, "attention": 0},
        "args": vars(args),
        **of(values, args.strata),
        "transfer": {mode: {"data": [f"{mode}-abc"], **of(transfer, [mode])} for mode in args.transfer},
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    line = {stratum: {"mean": 3.0, "ci95": 1.0} for stratum in args.strata}
    (folder / "log.jsonl").write_text(
        "\n".join(json.dumps({"iteration": t, "validation": dict.fromkeys(afr.KEYS, line)}) for t in (1, 2))
    )


def measured_as(*values):
    return dict(zip(afr.KEYS, values))


def test_tables_of_attentive_feature_reuse_are_exactly_as_expected(tmp_path):
    words = ["--modes", "miniimagenet", "--image-size", 42, "--iterations", 500, "--transfer", "fc100"]
    make_afr_result(
        tmp_path / "a",
        [*words, "--algorithm", "maml"],
        measured_as([40, 50], [40, 48], [41, 51], [41, 49]),
        measured_as([30, 40], [30, 38], [31, 41], [31, 39]),
    )
    make_afr_result(
        tmp_path / "b",
        words,
        measured_as([44, 52], [44, 50], [43, 53], [43, 51]),
        measured_as([30, 42], [30, 40], [31, 43], [31, 41]),
    )
    make_afr_result(
        tmp_path / "c",
        [*words, "--alpha", 0.5],
        measured_as([10, 20], [10, 20], [10, 20], [10, 20]),
        measured_as([1, 2], [1, 2], [1, 2], [1, 2]),
    )
    make_afr_result(
        tmp_path / "d",
        [*words, "--embed", "constant"],
        measured_as([44, 51], [44, 51], [44, 51], [44, 51]),
        measured_as([5, 6], [5, 6], [5, 6], [5, 6]),
    )
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (
        """\
# Attentive feature reuse: tables from result files

### miniimagenet, 5-way 1-shot

**42 px instead of 84, 500 iterations of 4 subtasks instead of our default's 60,000 of 4.** 2 test tasks; accuracy in %, 95 % interval over tasks; each cell paper protocol / inductive.

| method | cross-entropy | paper's Table 2, cross-entropy | NIL | paper's Table 2, NIL | transfer to fc100, cross-entropy | paper, mini-Places, cross-entropy | transfer to fc100, NIL | paper, mini-Places, NIL | parameters | s per iteration |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| MAML | 45.00 ± 9.80 / 44.00 ± 7.84 | 48.7 | 46.00 ± 9.80 / 45.00 ± 7.84 | 49.1 | 35.00 ± 9.80 / 34.00 ± 7.84 | 31.2 | 36.00 ± 9.80 / 35.00 ± 7.84 | 33.8 | 1,100 | 0.5 |
| AM | 48.00 ± 7.84 / 47.00 ± 5.88 | 51.1 | 48.00 ± 9.80 / 47.00 ± 7.84 | 52.3 | 36.00 ± 11.76 / 35.00 ± 9.80 | 33.5 | 37.00 ± 11.76 / 36.00 ± 9.80 | 34.3 | 1,100 | 0.5 |
| AM, `--alpha 0.5` | 15.00 ± 9.80 / 15.00 ± 9.80 | - | 15.00 ± 9.80 / 15.00 ± 9.80 | - | 1.50 ± 0.98 / 1.50 ± 0.98 | - | 1.50 ± 0.98 / 1.50 ± 0.98 | - | 1,100 | 0.5 |
| AM, `--embed constant` | 47.50 ± 6.86 / 47.50 ± 6.86 | - | 47.50 ± 6.86 / 47.50 ± 6.86 | - | 5.50 ± 0.98 / 5.50 ± 0.98 | - | 5.50 ± 0.98 / 5.50 ± 0.98 | - | 1,100 | 0.5 |

| difference, task by task | cross-entropy | NIL | transfer to fc100, cross-entropy | transfer to fc100, NIL |
| --- | --- | --- | --- | --- |
| AM - MAML | +3.00 ± 1.96 / +3.00 ± 1.96 | +2.00 ± 0.00 / +2.00 ± 0.00 | +1.00 ± 1.96 / +1.00 ± 1.96 | +1.00 ± 1.96 / +1.00 ± 1.96 |
| AM - AM, `--embed constant` | +0.50 ± 0.98 / -0.50 ± 0.98 | +0.50 ± 2.94 / -0.50 ± 0.98 | +30.50 ± 10.78 / +29.50 ± 8.82 | +31.50 ± 10.78 / +30.50 ± 8.82 |
"""
        in done.stdout
    )


def test_tables_of_single_and_multi_meta_task(tmp_path):
    scenes = ["--modes", "scenes", "--shots", 5, "--iterations", 500, "--val-every", 100, "--test-tasks", 600]
    for name, more, first, second in (("am", [], 39, 0.4), ("none", ["--modulation", "none"], 36, 0.5)):
        make_afr_result(
            tmp_path / f"d-{name}",
            [*scenes, "--tasks", "depth", *more],
            measured_as([first, first + 4], [first] * 2, [second, second + 0.2], [second] * 2),
        )
        make_afr_result(
            tmp_path / f"c-{name}",
            [*scenes, *more],
            measured_as([first + 1, first + 5], [first] * 2, [first] * 2, [first] * 2),
        )
    multi = [*scenes, "--tasks", *afr.KINDS, "--modulation", "none"]
    make_afr_result(
        tmp_path / "multi",
        multi,
        *[measured_as(*[[30, 40, 50, 60, 32, 44, 58, 60]] * 2, *[[31, 0.6, 70, 80, 33, 0.6, 70, 80]] * 2)],
    )
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("### scenes: single and multi meta-task, 5-way 5-shot") :]
    assert (
        "**Ray-cast scenes, not MMT; synthetic.** **500 iterations of 4 subtasks instead of our default's 60,000 of 4.**"
        in table
    )
    cells = {
        line.split(" | ")[0][2:]: line.strip("| ").split(" | ")
        for line in table.splitlines()
        if line.startswith("| ")
    }
    head = cells["run"]
    single = dict(zip(head, cells["single meta-task, AM, 32 filters"]))
    assert single["depth, accuracy"] == "41.00 ± 3.92 / 39.00 ± 0.00"
    assert single["classification, accuracy"] == "42.00 ± 3.92 / 39.00 ± 0.00"
    assert single["depth, error"] == "0.50 ± 0.20 / 0.40 ± 0.00"
    assert (
        single["MMT, depth, accuracy"],
        single["MMT, depth, error"],
        single["MMT, normals, error"],
        single["vanishing, error"],
    ) == ("87.8", "0.495", "84.1", "-")
    several = dict(zip(head, cells["multi meta-task, ANIL, 32 filters"]))
    assert (several["depth, accuracy"], several["normals, error"]) == (
        "42.00 ± 3.92 / 42.00 ± 3.92",
        "70.00 ± 0.00 / 70.00 ± 0.00",
    )
    assert several["MMT, vanishing, error"] == "118.3"
    head = cells["difference, task by task"]
    gain = dict(zip(head, cells["single meta-task, AM, 32 filters - single meta-task, ANIL, 32 filters"]))
    assert (gain["depth, accuracy"], gain["classification, accuracy"]) == ("+3.00 ± 0.00 / +3.00 ± 0.00",) * 2
    assert gain["depth, error"] == "-0.10 ± 0.00 / -0.10 ± 0.00"
    more = dict(zip(head, cells["multi meta-task, ANIL, 32 filters - single meta-task, ANIL, 32 filters"]))
    assert more["depth, accuracy"].startswith("+4.00 ± 0.00") and more["classification, accuracy"].startswith(
        "-8.00 ± 1.96"
    )
    (figure,) = re.findall(r"\((afr-validation[^)]*)\)", table)
    assert Image.open(tmp_path / "out" / figure).width > 800


def test_tables_list_the_trials_of_step_sizes(tmp_path):
    for name, alpha, accuracy in (("a", 0.1, 40), ("b", 0.01, 42), ("c", 1, 30)):
        make_result(
            tmp_path / "trials" / name,
            "MAML",
            ["miniimagenet"],
            [0, 0],
            [0, 0],
            args=vars(get_args(modgrad, "--algorithm", "maml", "--alpha", alpha)),
        )
        lines = [
            {
                "iteration": t,
                "accuracy": {"miniimagenet": 1},
                "validation": {"paper": {"overall": {"mean": accuracy - 6 + t, "ci95": 1.5}}},
            }
            for t in (1, 6)
        ]
        (tmp_path / "trials" / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "| MAML | **0.01: 42.00 ± 1.50**, 0.1: 40.00 ± 1.50, 1: 30.00 ± 1.50 |" in done.stdout
    assert "ModGrad and its baselines" not in done.stdout, "trials are no results"
    (tmp_path / "trials" / "a" / "log.jsonl").write_text("")
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n"), "--val-every" in done.stderr) == (2, 1, True)


def test_tables_of_modgrad_tell_seeds_and_backbones(tmp_path):
    base = vars(get_args(modgrad)) | {"steps": 1, "alpha": 0.1}
    for name, method, more in (
        ("a", "ModGrad", {}),
        ("b", "ModGrad", {"seed": 1}),
        (
            "c",
            "ModGrad, resnet34",
            {"backbone": "resnet34", "image_size": 224, "iterations": 33333, "augment": True},
        ),
    ):
        make_result(
            tmp_path / name,
            method,
            ["miniimagenet"],
            [60, 70],
            [60, 62],
            args=base | more,
            iterations=more.get("iterations", 16667),
        )
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, "left out" in done.stderr) == (0, False)
    assert done.stdout.count("instead of") == 0, "all of these are the paper's budgets"
    assert "| ModGrad, seed 1 | 65.00" in done.stdout
    assert "| ModGrad, resnet34, `--augment` | 65.00" in done.stdout


def test_tables_mark_what_is_not_the_papers(tmp_path):
    modes = ["fc100", "miniimagenet"]
    x = [40, 60, 44, 62]
    make_result(tmp_path / "1", "MMAML", modes, x, x)
    make_result(tmp_path / "2", "MMAML", modes, x, x, synthetic=True)
    make_result(tmp_path / "3", "MAML", ["fc100"], x, x, inner_lr=0.01, meta_batch=4, iterations=80000)
    make_result(tmp_path / "4", "MAML", ["miniimagenet"], x, x, inner_lr=0.01, meta_batch=4, iterations=80000)
    make_result(tmp_path / "5", "MAML", ["omniglot"], x, x)  # not with Multi-MAML's settings
    make_result(tmp_path / "6", "MMAML+KML", modes, x, x, lr=0.01)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "result.json").write_text('{"method": "ModGrad"}')
    make_result(
        tmp_path / "8", "T-Net", modes, x[::-1], x, args=vars(get_args(modgrad, "--algorithm", "maml"))
    )  # modgrad.py's
    text = here("tools.tables", tmp_path, "--out", tmp_path).stdout
    usual, synthetic = (
        re.search(
            rf"### MAML family, 2mode-dagger[^\n]*\n\n{words}4 test tasks.*?(?=\n#|\Z)", text, re.DOTALL
        ).group()
        for words in ("", r"\*\*Synthetic images.\*\* ")
    )
    assert "instead" not in usual
    assert "| MMAML | 51.50 ± 2.19 | 51.50 ± 2.19 | 39.11 ± 0.62 |" in usual, "the 1-shot number"
    assert "42.70 ± 0.86" in usual, "Table 2 beside it"
    assert "| Multi-MAML | " in usual
    assert "| MMAML+KML: missing |" in usual
    assert "| MMAML+KML, `--lr 0.01` | " in usual
    assert "KML's Table" not in synthetic
    assert "omniglot, 5-way 1-shot" in text
    assert text.count("| MMAML | ") == 2
    for i in "12345678":
        shutil.rmtree(tmp_path / i)
    for seed, name, method, mode in (
        (3, "a", "MMAML", modes),
        (3, "b", "MAML", modes),
        (3, "c", "MAML", modes[:1]),
        (3, "d", "MAML", modes[1:]),
    ):
        own = {"inner_lr": 0.01, "meta_batch": 4, "iterations": 80000} if len(mode) == 1 else {}
        make_result(tmp_path / name, method, mode, x, x, first_order=True, seed=seed, **own)
    text = here(
        "tools.tables", tmp_path, "--out", tmp_path
    ).stdout  # what all have in common makes no variant
    assert "All `--first-order --seed 3`. 4 test tasks" in text
    assert "| MMAML - MAML |" in text
    assert "| MAML - Multi-MAML |" in text
    (tmp_path / "a" / "log.jsonl").unlink()
    done = here("tools.tables", tmp_path, "--out", tmp_path)
    assert (done.returncode, "no curve of it" in done.stderr) == (0, True)
    make_result(tmp_path / "1", "MMAML", modes, x, x)
    (tmp_path / "1" / "result.json").write_text('{"method": "MMAML", ')
    done = here("tools.tables", tmp_path, "--out", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is not a whole result file" in done.stderr
    done = here("tools.tables", tmp_path / "none", "--out", tmp_path)
    assert (done.returncode, "run_all.sh" in done.stderr) == (2, True)


def test_tables_of_several_seeds(tmp_path):
    both = ["omniglot", "miniimagenet"]
    for seed, gain in ((0, 1), (1, 3)):
        make_result(
            tmp_path / f"p{seed}", "ProtoNet", both, [90, 40, 92, 44], [88, 40, 92, 40], shots=5, seed=seed
        )
        make_result(
            tmp_path / f"k{seed}",
            "MProtoNet+KML",
            both,
            [90 + gain, 40, 92, 44 + gain],
            [88, 40, 92, 40],
            shots=5,
            seed=seed,
            embed="constant",
        )
    make_result(
        tmp_path / "s", "ProtoNet", both, [90, 40, 92, 46], [88, 40, 92, 40], shots=5, seed=1, lr=0.004
    )
    text = here("tools.tables", tmp_path, "--out", tmp_path).stdout
    assert (
        """\
| configuration | overall, paper protocol, seeds 0 and 1 | minus ProtoNet of the same seed | overall, inductive, seeds 0 and 1 | minus ProtoNet, inductive |
| --- | --- | --- | --- | --- |
| ProtoNet | 66.50 ± 2.19, 66.50 ± 2.19 | -, - | 65.00 ± 1.96, 65.00 ± 1.96 | -, - |
| ProtoNet, `--lr 0.004` | -, 67.00 ± 3.10 | -, +0.50 ± 0.98 | -, 65.00 ± 1.96 | -, +0.00 ± 0.00 |
| MProtoNet+KML, `--embed constant` | 67.00 ± 2.50, 68.00 ± 3.46 | +0.50 ± 0.69, +1.50 ± 2.08 | 65.00 ± 1.96, 65.00 ± 1.96 | +0.00 ± 0.00, +0.00 ± 0.00 |
"""
        in text
    )


def test_tables_know_the_scripts():
    """The paper's numbers, and which options are the paper's, are the same in scripts and tables."""
    for module in (kml, mmaml, mprotonet):
        args = vars(get_args(module))
        family = "ProtoNet" if module is mprotonet else "MAML"
        assert all(args.get(k, v) == v for k, v in (reading.OPTIONS | reading.BUDGET).items())
        assert args["lr_halve_every"] == reading.HALVING[family]
        assert (args["iterations"], args["meta_batch"]) == reading.ITERATIONS[family]
        technical = {"modes", "ways", "shots", "meta_batch", "seed", "synthetic"}
        assert set(identity(get_args(module))) <= {
            "method",
            *technical,
            *reading.OPTIONS,
            *reading.BUDGET,
            "lr_halve_every",
            "modulation",
        }


@pytest.mark.parametrize(
    "module, known",
    [
        (modgrad, tables_modgrad.OPTIONS | tables_modgrad.BUDGET),
        (modgrad_completion, tables_completion.OPTIONS),
        (modgrad_multishot, tables_multishot.OPTIONS | tables_multishot.BUDGET),
        (modgrad_rl, tables_rl.OPTIONS | tables_rl.BUDGET),
    ],
)
def test_tables_of_modgrad_know_every_flag(module, known):
    """A flag that changes a run is named in its row or above the table: else a variant would pass as the method."""
    setting = "method algorithm adapt modes ways shots seed synthetic"  # adapt: in the method's name
    by_method = "alpha steps outer lr meta_batch backbone"  # have defaults of their own for each method
    of_columns = "env order pixels image_size precision"
    elsewhere = f"{setting} {by_method} {of_columns}".split()
    unknown = set(identity(get_args(module))) - set(known) - set(elsewhere)
    assert not unknown


def test_runs_of_a_changed_script_stand_in_no_table(tmp_path):
    """They can be compared (documents.differences), but would pass as runs of the script as it is."""
    (original,) = (RESULTS / "2mode-maml-4000" / "seed0" / "maml").glob("result.json")
    for name in ("maml", "exercises/maml"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(original, tmp_path / name)
    assert [run["file"].parent for run in reading.read([tmp_path])] == [tmp_path / "maml"]


def test_a_flag_of_a_run_in_no_table_of_its_own_takes_the_papers_number_away():
    """W * M for all runs of a table is said above it, and is no less a variant than in a row."""
    shared = {"no_residual": True, "lr_halve_every": 1000}
    runs = [{"key": 0, "seed": 0, "options": dict(shared)}, {"key": 0, "seed": 1, "options": dict(shared)}]
    tables.common_flags(runs, ["key"])
    assert [run["options"] for run in runs] == [{}, {}]
    assert all(map(tables.is_variant, runs))
    runs = [{"key": 0, "seed": 0, "options": {"lr_halve_every": 1000}}]
    tables.common_flags(runs, ["key"])
    assert not tables.is_variant(runs[0]), "halving earlier belongs to a shorter budget"


def check_modgrad_cells(found):
    """What the cells' flags make of modgrad.py's defaults, by the part of the paper."""
    seen = {}
    for line, cell in found:
        words = shlex.split(line.split("  #")[0])
        assert words[1] == "modgrad.py"
        args = modgrad.get_args(words[2:])
        _, part, shots, _ = cell.split("/")
        assert (shots, args.modes) == (f"{args.shots}shot", ["miniimagenet"])
        seen.setdefault(part, []).append(
            (args.shots, args.method, args.steps, args.rank, args.iterations * args.meta_batch // 1000)
        )
    wide = {
        "ModGrad": 1,
        "MAML": 5,
        "Meta-SGD": 1,
        "CAVIA": 5,
        "T-Net": 5,
        "MAML on conv3+conv4": 1,
        "ModGrad, wrn28-10": 1,
    }
    assert set(seen["table2"]) == {
        (shots, method, steps, 5, 50) for shots in (1, 5) for method, steps in wide.items()
    }
    assert set(seen["table4"]) == {
        (shots, "ModGrad", steps, 5, 50) for shots in (1, 5) for steps in (2, 3, 4, 5)
    }
    assert set(seen["table5"]) == {(shots, "ModGrad", 1, rank, 50) for shots in (1, 5) for rank in (1, 10)}
    assert set(seen["figure6"]) == {
        *((shots, "MAML", steps, 5, 50) for shots in (5, 10, 15, 20) for steps in (5, 10, 20, 30)),
        *((shots, "ModGrad", 1, 5, 50) for shots in (10, 15, 20)),
        *((shots, "ModGrad, resnet34", 1, 5, 99) for shots in (1, 5)),
        *((shots, "MAML, resnet34", steps, 5, 99) for shots in (1, 5) for steps in (5, 10, 20, 30)),
    }
    assert sum(map(len, seen.values())) == len(found)


def check_afr_cells(found):
    """Table 2: four methods of 1 and 5 shots, and their transfer. Table 1: each task alone and all, with and without attention."""
    seen = set()
    for line, cell in found:
        words = shlex.split(line.split("  #")[0])
        assert words[1] == "afr.py"
        args, (_, part, where, name) = afr.get_args(words[2:]), cell.split("/")
        assert args.iterations * args.meta_batch == 240000
        if part == "table2":
            assert (where, args.modes, args.transfer, args.filters) == (
                f"{args.shots}shot",
                ["miniimagenet"],
                ["fc100"],
                32,
            )
            assert name == args.method.lower() + "-constant" * (args.embed == "constant")
            seen.add((part, args.shots, name))
        else:
            assert (args.modes, args.shots, args.synthetic, where) == (
                ["scenes"],
                5,
                True,
                f"{args.filters}filters",
            )
            assert name == f"{args.tasks[0] if len(args.tasks) == 1 else 'multi'}-{args.modulation}"
            seen.add((part, args.filters, args.method, len(args.tasks), args.tasks[0]))
    assert seen == {
        *(
            ("table2", shots, method)
            for shots in (1, 5)
            for method in ("maml", "anil", "am", "am-constant", "p-am")
        ),
        *(
            ("table1", filters, method, 1, task)
            for filters in (32, 64)
            for method in ("ANIL", "AM")
            for task in afr.KINDS
        ),
        *(
            ("table1", filters, method, 4, "classification")
            for filters in (32, 64)
            for method in ("ANIL", "AM")
        ),
    }
    assert len(found) == len(seen) == 30


def test_run_all_lists_every_cell():
    lines = run_all("--dry-run").stdout.splitlines()
    cells = [line.split("--out runs/")[1].split("  ")[0] for line in lines]
    assert len(set(cells)) == len(cells) == 175 + 4 + 30
    check_afr_cells([(line, cell) for line, cell in zip(lines, cells) if cell.startswith("afr/")])
    check_modgrad_cells(
        [
            (line, cell)
            for line, cell in zip(lines, cells)
            if cell.startswith("modgrad/") and cell.split("/")[1] not in ("table3", "figure5", "figure8")
        ]
    )
    table3 = [(line, cell) for line, cell in zip(lines, cells) if "table3" in cell]
    for line, cell in table3:
        words = shlex.split(line.split("  #")[0])
        args = modgrad_completion.get_args(words[2:])
        control = "-same-layer" if args.adapt == ["fc5"] and args.algorithm == "maml" else ""
        assert (words[1], cell) == (
            "modgrad_completion.py",
            f"modgrad/table3/{args.order}-{args.pixels}/{args.algorithm}{control}",
        )
        assert args.iterations == 50000
        assert (args.steps, args.alpha) == (1, 0.1) or not control, "ModGrad's step"
    assert len(table3) == 20
    figure8 = [(line, cell) for line, cell in zip(lines, cells) if "figure8" in cell]
    for line, cell in figure8:
        words = shlex.split(line.split("  #")[0])
        args = modgrad_rl.get_args(words[2:])
        assert (words[1], cell) == (
            "modgrad_rl.py",
            f"modgrad/figure8/{args.env}/{args.algorithm}{'-seed1' * args.seed}",
        )
    assert len(figure8) == 12
    figure5 = [
        (shlex.split(line.split("  #")[0]), cell) for line, cell in zip(lines, cells) if "figure5" in cell
    ]
    assert [cell for _, cell in figure5] == [
        f"modgrad/figure5/{algorithm}" for algorithm in modgrad_multishot.METHODS
    ]
    for words, cell in figure5:
        args = modgrad_multishot.get_args(words[2:])
        assert (words[1], args.algorithm, args.iterations, args.meta_batch) == (
            "modgrad_multishot.py",
            cell.split("/")[-1],
            1000,
            20,
        )
    lines, cells = (
        [x for x, cell in zip(xs, list(cells)) if cell.startswith("kml/")] for xs in (lines, cells)
    )
    assert len(cells) == 88
    for line, cell in zip(lines, cells):
        words = shlex.split(line.split("  #")[0])
        module = {"kml.py": kml, "mmaml.py": mmaml, "mprotonet.py": mprotonet}[words[1]]
        args = module.get_args(words[2:])
        paper, setting, shots, method = cell.split("/")
        assert (paper, shots) == ("kml", f"{args.shots}shot")
        assert set(args.modes) == papers.SETTINGS.get(setting, {setting})
        assert (
            mprotonet.METHODS[args.modulation].lower() == method.replace("multi-", "")
            if module is mprotonet
            else module.METHODS[args.modulation].lower() == method.replace("multi-", "")
        )
        if method == "multi-maml":
            own = reading.MULTI_MAML.get(setting, reading.MULTI_MAML[""])
            assert own == {
                k: getattr(args, k) for k, v in reading.OPTIONS.items() if getattr(args, k, v) != v
            }
            assert (args.iterations, args.meta_batch) == reading.MULTI_ITERATIONS.get(
                setting, reading.MULTI_ITERATIONS[""]
            )
        else:
            assert {k: getattr(args, k, v) for k, v in reading.OPTIONS.items()} == reading.OPTIONS
    some = run_all(
        "--dry-run", "--only", "kml/2mode/5shot/*", "--only", "kml/*/5shot/multi-maml"
    ).stdout.splitlines()
    assert len(some) == 6 + 5
    quick = run_all("--dry-run", "--quick", "--synthetic", "--only", "*/multi-maml").stdout.splitlines()
    assert all(
        "--quick --synthetic" in line and "--iterations" not in line and "runs/quick/synthetic/" in line
        for line in quick
    )
    for words, said in (
        (["--only", "nothing"], "no cell"),
        (["--only", ""], "empty"),
        (["--jobs", "00"], "--jobs 0"),
        (["--jobs", "x"], "--jobs x"),
        (["--nonsense"], "--nonsense"),
        (["--out"], "value"),
    ):
        done = run_all(*words)
        assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (2, 1, True)


STAND_IN = """#!/usr/bin/env bash
# In place of Python: the cells are the real ones; a script leaves a result file at once, or ends as the file `fate` in its folder says.
case "$*" in
    "-m tools.cells"*) exec {python} "$@" ;;
    "-m tools.tables"*) echo "tables of $3"; exit ;;
    "-c "*) echo 6; exit ;;     # cores
esac
script=$1
while [ $# -gt 0 ]; do [ "$1" != --out ] || out=$2; shift; done
echo "$script ${{FEWSHOT_CORES:-all}}" >>"$out/calls"
case "$(cat "$out/fate" 2>/dev/null)" in
    "") echo done >"$out/result.json" ;;
    stopped) rm -f "$out/result.json" ;;
    *) exit 3 ;;
esac
"""


def test_run_all_keeps_account_of_its_cells(tmp_path):
    """Which cells are run, run again and skipped; how they share the cores; what is said of them at the end."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    out = tmp_path / "runs"
    at = out / "kml/2mode/5shot"
    words = ["--only", "kml/2mode/5shot/m*proto*", "--only", "kml/2mode/5shot/protonet", "--out", out]
    env = {k: v for k, v in os.environ.items() if k not in ("FEWSHOT_CORES", "OMP_NUM_THREADS")}

    def go(*more):
        command = ["bash", str(HERE / "run_all.sh"), *map(str, [*words, *more])]
        options = {"capture_output": True, "text": True, "check": False, "timeout": 60}
        return subprocess.run(command, env=env | {"PYTHON": str(python)}, **options)

    def begun(done):
        return re.findall(r"^\[\d/3\] .*5shot/(\S+)$", done.stdout, re.M)

    def fate(cell, what):
        (at / cell).mkdir(parents=True, exist_ok=True)
        (at / cell / "fate").write_text(what)

    cells = [line.split("5shot/")[1] for line in go("--dry-run").stdout.splitlines()]
    assert sorted(cells) == ["mprotonet", "mprotonet+kml", "protonet"]
    fate("mprotonet", "failed")
    fate("protonet", "stopped")
    done = go("--jobs", "2")
    assert (done.returncode, len(begun(done))) == (1, 3), "a failed cell does not stop the others"
    said = done.stdout[done.stdout.index("tables of") :].splitlines()
    assert said[0] == f"tables of {out}"
    assert said[2:] == [
        "kml/2mode/5shot/mprotonet (status 3)",
        "kml/2mode/5shot/protonet (not at its end; the same command continues)",
    ]
    for cell in cells:
        assert (at / cell / "calls").read_text() == "mprotonet.py 3\n", "two at a time share six cores"
    fate("mprotonet", "")
    done = go("--jobs", "2")
    assert sorted(begun(done)) == ["mprotonet", "protonet"], "what is not finished is tried again"
    assert (done.returncode, done.stdout.count("(status"), done.stdout.count("not at its end")) == (1, 0, 1)
    fate("protonet", "")
    done = go("--jobs", "2")
    assert (done.returncode, begun(done)) == (0, ["protonet"])
    assert (at / "protonet/calls").read_text().splitlines()[-1] == "mprotonet.py all", (
        "alone it has all cores"
    )
    assert begun(go()) == []
    assert all(line.endswith("    # finished") for line in go("--dry-run").stdout.splitlines())
    (at / "mprotonet/result.json").unlink()
    assert begun(go()) == ["mprotonet"], "its result is gone"
    assert len(begun(go("--", "--iterations", "9"))) == 3, "another command is another run"


def test_run_all_runs_a_failing_and_a_sound_cell(tmp_path, cache):
    """With the real Python: the scripts, their folders, the tables."""
    words = ["--synthetic", "--only", "kml/2mode/5shot/mproto*", "--out", tmp_path / "runs"]
    words += ["--jobs", "2", "--", *TINY[1:], "--cache-dir", cache]
    bad = tmp_path / "runs" / "kml" / "2mode" / "5shot" / "mprotonet"
    bad.mkdir(parents=True)
    (bad / "checkpoint.pt").write_bytes(b"rubbish")
    done = run_all(*words)
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("kml/2mode/5shot/mprotonet (status 2)")
    assert done.stdout.count("(status") == 1
    assert "is no checkpoint" in (bad / "output.txt").read_text()
    assert json.loads((bad.parent / "mprotonet+kml" / "result.json").read_text())["iterations"] == 6
    table = (tmp_path / "runs" / "tables.md").read_text()
    assert "**Synthetic images.**" in table
    assert "| ProtoNet: missing |" in table
    assert "| MProtoNet: missing |" in table
    assert re.search(r"\| MProtoNet\+KML \| \d", table)
    done = run_all("--dry-run", *words)
    assert [line.endswith("# finished") for line in done.stdout.splitlines()] == [False, True]


def test_run_all_stops_with_a_checkpoint(tmp_path, cache):
    words = [
        "--synthetic",
        "--only",
        "kml/2mode/5shot/*maml",
        "--out",
        tmp_path,
        "--",
        *TINY[1:],
        "--iterations",
        "1000000",
        "--cache-dir",
        cache,
    ]
    process = subprocess.Popen(
        ["bash", str(HERE / "run_all.sh"), *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHON": sys.executable},
        start_new_session=True,
    )
    out = tmp_path / "kml" / "2mode" / "5shot" / "maml"
    wait_for_a_line(out / "log.jsonl", process)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: to the whole group
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped; the same command continues" in said
    assert torch.load(out / "checkpoint.pt", weights_only=True)["iteration"] > 0
    assert not (out.parent / "mmaml").exists(), "nothing is begun after the signal"


def test_inspect_modulation(tmp_path, cache, monkeypatch):
    for name, module, words in (
        ("kml", kml, []),
        ("constant", mprotonet, ["--embed", "constant"]),
        ("none", mprotonet, ["--modulation", "none"]),
    ):
        out = "--out", tmp_path / name
        call(module, monkeypatch, *TINY, "--test-tasks", 10, "--cache-dir", cache, *out, *words)
    checkpoint = torch.load(tmp_path / "kml" / "checkpoint.pt", weights_only=True)
    del checkpoint["identity"]["conv_lr"], checkpoint["identity"]["repeat_tasks"]
    torch.save(checkpoint, tmp_path / "kml" / "checkpoint.pt")  # as a run from before these flags wrote it
    folders, out = (tmp_path / "kml", tmp_path / "constant"), ("--out", tmp_path / "m.json")
    done = here("tools.inspect_modulation", *folders, "--cache-dir", cache, "--tasks", 10, *out)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    one, constant = json.loads((tmp_path / "m.json").read_text())
    assert all(0 <= x["mode"] <= x["task"] <= x["size"] for x in one["M"].values())
    assert all(x["task"] < 1e-6 < x["size"] for x in constant["M"].values()), (
        "M of a constant v knows no task"
    )
    params = torch.load(tmp_path / "constant" / "checkpoint.pt", weights_only=True)["params"]
    for name, row in (("kml", one), ("constant", constant)):
        reported = json.loads((tmp_path / name / "result.json").read_text())["accuracy"]
        assert math.isclose(
            row["accuracy"]["its own v"]["overall"]["mean"], reported["overall"]["mean"], abs_tol=0.01
        )
    assert len({x["overall"]["mean"] for x in constant["accuracy"].values()}) == 1, (
        "whatever v it is given is the constant"
    )
    M = mprotonet.modulation(params, params["encoder.constant"])["conv3.weight"]
    assert math.isclose(constant["M"]["conv3"]["size"], M.square().mean().sqrt(), rel_tol=1e-5)
    done = here("tools.inspect_modulation", tmp_path / "none")
    assert (done.returncode, "run of ProtoNet" in done.stderr) == (2, True)
    (tmp_path / "none" / "checkpoint.pt").write_bytes(b"rubbish")
    done = here("tools.inspect_modulation", tmp_path / "none")
    assert (done.returncode, done.stderr.count("\n"), "is no checkpoint" in done.stderr) == (2, 1, True)


def test_the_completion_table_shows_the_papers_numbers():
    table = (RESULTS / "tables.md").read_text()
    table = table[table.index("### Image completion, celeba") :]
    for method, numbers in papers.COMPLETION.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
        assert re.findall(r"\((\S+)\)", row) == [
            f"{numbers[k]:.3f}" for k in ((10, "random"), (100, "random"), (10, "ordered"), (100, "ordered"))
        ]


def test_a_table_names_the_seed_that_its_rows_do_not_name(tmp_path):
    x = [4, 6, 4, 2]
    for seed in (1, 2):
        make_result(tmp_path / str(seed), "MMAML", ["fc100", "cub"], x, x, seed=seed)
    text = here("tools.tables", tmp_path, "--out", tmp_path).stdout
    assert "Seed 1, where a row names none. 4 test" in text


def test_differences_in_the_tables_are_those_of_the_means():
    """Every number of a table is of the same test tasks: so a difference is the difference of two means, to the rounding."""
    means, checked = {}, 0
    for line in (RESULTS / "tables.md").read_text().split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(("### ", "| method |")):
            means = {}
        elif line.startswith("| ") and re.match(r"\d+\.\d+ ± ", cells[1]):
            found = [re.match(r"([\d.]+) ±", cell) for cell in cells[1:3]]
            means[cells[0]] = [float(x[1]) if x else None for x in found]
        elif line.startswith("| ") and re.match(r"[+-]\d", cells[1]) and means:
            one, two = next(((a, b) for a in means for b in means if f"{a} - {b}" == cells[0]), (None, None))
            if one is None:
                continue
            for column, cell in enumerate(cells[1:3]):
                if "±" in cell and None not in (means[one][column], means[two][column]):
                    gap = means[one][column] - means[two][column]
                    assert abs(gap - float(cell.split(" ± ")[0])) < 0.0101, line
                    checked += 1
    assert checked >= 40


def test_multi_x_without_an_inductive_column(tmp_path):
    """Runs with --transductive have no inductive accuracies: nor has what is joined of them."""
    both, flags = ["omniglot", "miniimagenet"], {"shots": 5, "transductive": True}
    make_result(tmp_path / "p", "ProtoNet", both, [90, 40, 92, 44], **flags)
    make_result(tmp_path / "o", "ProtoNet", both[:1], [96, 98, 90], **flags)
    make_result(tmp_path / "m", "ProtoNet", both[1:], [41, 42, 43], **flags)
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.split("\n") if line.startswith("| Multi-ProtoNet"))
    assert row.startswith("| Multi-ProtoNet | 69.25 ± 1.10 | - |")


def test_multi_x_with_flags_is_a_row_of_its_own(tmp_path):
    """Networks trained on one mode each with the same flags stand together, and are compared with all joint networks."""
    both = ["omniglot", "miniimagenet"]
    make_result(tmp_path / "p", "ProtoNet", both, [90, 40, 92, 44], shots=5, lr=0.004)
    make_result(tmp_path / "k", "MProtoNet+KML", both, [91, 42, 93, 45], shots=5)
    make_result(tmp_path / "o", "ProtoNet", both[:1], [96, 98, 90], shots=5, lr=0.004)
    make_result(tmp_path / "m", "ProtoNet", both[1:], [41, 42, 43], shots=5, lr=0.004)
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = {line.split(" | ")[0]: line for line in done.stdout.split("\n")}
    assert rows["| Multi-ProtoNet, `--lr 0.004`"].startswith(
        "| Multi-ProtoNet, `--lr 0.004` | 69.25 ± 1.10 |"
    )
    minus = rows["| ProtoNet, `--lr 0.004` - Multi-ProtoNet, `--lr 0.004`"]
    assert minus.startswith("| ProtoNet, `--lr 0.004` - Multi-ProtoNet, `--lr 0.004` | -2.75 ±")
    assert "| MProtoNet+KML - Multi-ProtoNet, `--lr 0.004`" in rows
    assert "### ProtoNet family, omniglot, " not in done.stdout, (
        "a part of another row has no table of its own"
    )
    shutil.rmtree(tmp_path / "m")
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert "| Multi-ProtoNet, `--lr 0.004`: missing (miniimagenet) |" in done.stdout, (
        "no part is lost in silence"
    )


def test_the_interval_over_seeds_covers_training():
    """Seeds vary more than tasks: Student's t of three differences, and the interval over tasks in quadrature."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 5, 400)  # all seeds have the same test tasks
    pairs = []
    for gain in (0.0, 1.0, 5.0):
        run = {"scores": {"paper": {"a": 60 + gain + shared}}, "data": {"a": "x"}}
        base = {"scores": {"paper": {"a": np.full(400, 60.0)}}, "data": {"a": "x"}}
        pairs.append((run, base))
    mean, half = tables.over_seeds(pairs, ["a"])
    of_tasks = 1.96 * shared.std(ddof=1) / 20
    of_training = 4.303 * np.std([0, 1, 5], ddof=1) / math.sqrt(3)
    assert math.isclose(mean, 2 + shared.mean())
    assert math.isclose(half, math.hypot(of_tasks, of_training), rel_tol=1e-3)
