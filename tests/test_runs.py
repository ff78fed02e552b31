"""Tests: test_runs."""

import json
import math
import os
import re
import shlex
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
from data import Episodes, Task, flags_of_run
from fewshot import parallel as fewshot_parallel
from fewshot import plots
from fewshot import published as fewshot_published
from fewshot import run as fewshot_run
from fewshot.flags import identity
from modgrad_completion import Completions
from modgrad_multishot import Alphabets
from tests.helpers import (
    CASES,
    HERE,
    ROOT,
    TINY,
    call,
    fails,
    get_args,
    here,
    make_params,
    make_task,
    real,
    run,
    wait_for_a_line,
)
from tools import baselines

SMALL_RUNS = {
    kml: "--meta-batch 2 --queries 2 --channels 2 --image-size 16",
    mmaml: "--meta-batch 2 --queries 2 --channels 2 --image-size 16",
    mprotonet: "--meta-batch 2 --queries 2 --channels 2 --image-size 16",
    modgrad: "--queries 2 --channels 2 --image-size 16",
    modgrad_completion: "--meta-batch 2 --context 10",
    modgrad_multishot: "--meta-batch 2 --channels 2 --steps 2 --image-size 16",
    afr: "--meta-batch 2 --queries 2 --filters 2 --image-size 16",
}


@pytest.mark.parametrize("module", SMALL_RUNS, ids=lambda module: module.__name__)
def test_bf16_casts_are_not_cached(module, tmp_path, cache, monkeypatch):
    """Threads share autocast's cache and empty it for each other: with it, equal runs had different bits."""
    words = f"--synthetic --precision bf16 --iterations 2 --test-tasks 4 {SMALL_RUNS[module]}".split()
    caching = []
    autocast = torch.autocast

    def watched(*args, **kwargs):
        made = autocast(*args, **kwargs)
        if made._enabled:
            caching.append(made._cache_enabled)
        return made

    monkeypatch.setattr(torch, "autocast", watched)
    call(module, monkeypatch, *words, "--cache-dir", cache, "--out", tmp_path)
    assert caching
    assert not any(caching)


@pytest.mark.parametrize("module, modulation", CASES)
def test_a_run_from_start_to_end(module, modulation, tmp_path, cache, monkeypatch, capsys):
    words = [
        *TINY,
        "--modulation",
        modulation,
        "--out",
        tmp_path,
        "--cache-dir",
        cache,
        "--val-every",
        4,
        "--val-tasks",
        4,
        "--keep-every",
        3,
    ]
    call(module, monkeypatch, *words)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == module.METHODS[modulation]
    assert result["synthetic"] is True
    assert "SYNTHETIC" in printed
    assert result["test_tasks"] == len(result["per_task"]) == len(result["per_task_inductive"]) == 8
    assert result["per_task_mode"] == [0, 1] * 4
    rows = result["accuracy"]
    assert list(rows) == ["overall", "omniglot", "miniimagenet"]
    assert math.isclose(rows["omniglot"]["mean"], np.mean(result["per_task"][::2]), abs_tol=1e-3)
    assert math.isclose(rows["overall"]["mean"], np.mean(result["per_task"]), abs_tol=1e-3)
    assert set(result["parameters"]) == {"base", "encoder", "generator"}
    assert (result["parameters"]["generator"] > 0) == (modulation != "none")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|", result["versions"]["commit"])
    assert {
        "iterations",
        "seconds_train",
        "seconds_per_iteration",
        "tasks_sha256",
        "protocol",
        "args",
    } <= set(result)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    assert [("validation" in line) for line in lines] == [False, True, False]
    assert all(line["synthetic"] and set(line["accuracy"]) == {"omniglot", "miniimagenet"} for line in lines)
    assert all((line["gradient_norm"]["encoder"] > 0) == (modulation != "none") for line in lines)
    assert sorted(p.name for p in tmp_path.glob("params-*")) == ["params-3.pt", "params-6.pt"]
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    kept = torch.load(tmp_path / "params-6.pt", weights_only=True)
    assert all(torch.equal(w, kept[k]) for k, w in checkpoint["params"].items())

    monkeypatch.setattr(module, "run_tasks", lambda *_: pytest.fail("a finished run is not run again"))
    call(module, monkeypatch, *words)
    assert f"{rows['overall']['mean']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("module, modulation", [(kml, "kml"), (mmaml, "film"), (mprotonet, "kml")])
def test_a_stopped_run_continues_to_the_same_bits(module, modulation, tmp_path, cache, monkeypatch):
    words = [*TINY, "--modulation", modulation, "--cache-dir", cache, "--iterations", 7]
    call(module, monkeypatch, *words, "--out", tmp_path / "whole")
    whole = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    for at in (1, 3, 4, 6):
        out = tmp_path / f"stopped{at}"
        original, seen = module.run_tasks, []

        def interrupted(*args, at=at, seen=seen, original=original, **kwargs):
            seen.append(1)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGTERM)  # arrives in the middle of iteration `at`
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "run_tasks", interrupted)
        call(module, monkeypatch, *words, "--out", out)
        monkeypatch.setattr(module, "run_tasks", original)
        assert torch.load(out / "checkpoint.pt", weights_only=True)["iteration"] == at
        assert not (out / "result.json").exists()
        call(module, monkeypatch, *words, "--out", out)
        again = torch.load(out / "checkpoint.pt", weights_only=True)
        assert all(torch.equal(w, again["params"][k]) for k, w in whole["params"].items())
        results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "whole", out)]
        assert results[0]["per_task"] == results[1]["per_task"]
        logs = [
            [
                (line["iteration"], line["loss"], line["accuracy"])
                for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            ]
            for folder in (tmp_path / "whole", out)
        ]
        assert logs[0] == logs[1]


@pytest.mark.parametrize("module", SMALL_RUNS, ids=lambda module: module.__name__)
def test_which_tasks_are_drawn_when_and_at_what_rate(module, tmp_path, cache, monkeypatch):
    """Iteration t trains on tasks t T to (t + 1) T - 1 of training classes; validation and test each see tasks 0, 1, ... of
    their own, once; the learning rate is halved where --lr-halve-every says; and so after a continuation."""
    drawn, rates = [], []
    for sampler in (Episodes, Completions, Alphabets):

        def tasks(self, first, count, original=sampler.tasks):
            drawn.append((self.split, first, count))
            return original(self, first, count)

        monkeypatch.setattr(sampler, "tasks", tasks)
    for optimizer in (torch.optim.Adam, torch.optim.SGD):

        def step(self, *args, original=optimizer.step, **kwargs):
            rates.append([group["lr"] for group in self.param_groups])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(optimizer, "step", step)
    words = f"--synthetic {SMALL_RUNS[module]} --lr 0.004 --lr-halve-every 2 --log-every 2 --val-every 2 --keep-every 0"
    words = f"{words} --val-tasks 22 --test-tasks 24 --iterations 3".split()
    words += {
        kml: ["--inner-steps", 1],
        mmaml: ["--inner-steps", 1],
        modgrad_multishot: ["--test-steps", 2],
        afr: ["--attention-lr", 0.012],
    }.get(module, [])
    T = get_args(module, *words).meta_batch

    def numbers(split):
        return [j for name, first, count in drawn if name == split for j in range(first, first + count)]

    def trained():
        return [(first, count) for name, first, count in drawn if name == "train"]

    call(module, monkeypatch, *words, "--cache-dir", cache, "--out", tmp_path)
    assert trained() == [(t * T, T) for t in range(3)]
    assert numbers("val") == list(range(22))
    assert numbers("test") == list(range(24))
    drawn.clear()
    call(module, monkeypatch, *words, "--iterations", 6, "--cache-dir", cache, "--out", tmp_path)
    assert trained() == [(t * T, T) for t in range(3, 6)]
    assert numbers("val") == [*range(22), *range(22)]
    assert numbers("test") == list(range(24))
    assert [rate[0] for rate in rates] == [0.004, 0.004, 0.002, 0.002, 0.001, 0.001]
    if module is afr:
        assert [rate[1] for rate in rates] == [0.012, 0.012, 0.006, 0.006, 0.003, 0.003]


@pytest.mark.parametrize("module", SMALL_RUNS, ids=lambda module: module.__name__)
def test_the_seed_draws_the_parameters(module):
    one, again, two = (
        module.init_params(get_args(module, *SMALL_RUNS[module].split(), "--seed", seed))
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(w, again[k]) for k, w in one.items())
    drawn = [k for k, w in one.items() if w.unique().numel() > 2]
    assert len(drawn) >= 5
    assert not any(torch.equal(one[k], two[k]) for k in drawn)


def test_a_killed_run_continues_from_its_last_checkpoint(tmp_path, cache, monkeypatch):
    words = [*TINY, "--cache-dir", cache]
    call(kml, monkeypatch, *words, "--out", tmp_path / "whole")
    original, seen = kml.run_tasks, []

    def killed(*args, **kwargs):
        seen.append(1)
        if len(seen) == 6:
            raise MemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(kml, "run_tasks", killed)
    with pytest.raises(MemoryError):
        call(kml, monkeypatch, *words, "--out", tmp_path / "b", "--log-every", 1)
    assert len((tmp_path / "b" / "log.jsonl").read_text().splitlines()) == 5  # one more than the checkpoint
    monkeypatch.setattr(kml, "run_tasks", original)
    call(kml, monkeypatch, *words, "--out", tmp_path / "b", "--log-every", 1)
    lines = [
        json.loads(line)["iteration"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()
    ]
    assert lines == [1, 2, 3, 4, 5, 6]
    one, two = (
        torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["params"] for n in ("whole", "b")
    )
    assert all(torch.equal(w, two[k]) for k, w in one.items())


def test_growing_runs_identity_and_overwrite(tmp_path, cache, monkeypatch, capsys):
    words = [*TINY, "--cache-dir", cache, "--out", tmp_path]
    call(kml, monkeypatch, *words)
    first = json.loads((tmp_path / "result.json").read_text())
    call(kml, monkeypatch, *words, "--test-tasks", 12)  # more tasks: the same first ones
    more = json.loads((tmp_path / "result.json").read_text())
    assert more["per_task"][:8] == first["per_task"]
    call(kml, monkeypatch, *words, "--iterations", 8)  # may grow
    assert json.loads((tmp_path / "result.json").read_text())["iterations"] == 8
    fails(capsys, lambda: call(kml, monkeypatch, *words, "--lr", 0.5), "has lr 0.001, not 0.5", "--out")
    fails(capsys, lambda: call(mmaml, monkeypatch, *words), "MMAML+KML, not MMAML")
    assert (tmp_path / "checkpoint.pt").exists()
    for name in ("params-6.pt", "mine.pt"):
        (tmp_path / name).write_bytes(b"")
    call(kml, monkeypatch, *words, "--lr", 0.5, "--iterations", 1, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "checkpoint.pt",
        "log.jsonl",
        "mine.pt",
        "result.json",
    ]
    assert json.loads((tmp_path / "result.json").read_text())["iterations"] == 1
    call(kml, monkeypatch, *words, "--lr", 0.5, "--iterations", 9, "--eval-only")
    assert json.loads((tmp_path / "result.json").read_text())["iterations"] == 1
    fails(capsys, lambda: call(kml, monkeypatch, *words, "--eval-only", "--overwrite"), "not allowed with")
    for rubbish in (b"rubbish", b"", (tmp_path / "checkpoint.pt").read_bytes()[:999]):
        (tmp_path / "checkpoint.pt").write_bytes(rubbish)
        fails(capsys, lambda: call(kml, monkeypatch, *words), "no checkpoint", "--overwrite")
    torch.save({"params": 1}, tmp_path / "checkpoint.pt")
    fails(capsys, lambda: call(kml, monkeypatch, *words), "no checkpoint (KeyError)")
    (tmp_path / "checkpoint.pt").unlink()
    call(kml, monkeypatch, *words, "--lr", 0.25)  # a result without its checkpoint is not this run's
    assert json.loads((tmp_path / "result.json").read_text())["args"]["lr"] == 0.25
    fails(
        capsys,
        lambda: call(
            kml, monkeypatch, *TINY, "--cache-dir", cache, "--out", tmp_path / "none", "--eval-only"
        ),
        "--eval-only",
        "train first",
    )


@pytest.mark.parametrize(
    "module",
    [kml, mmaml, mprotonet, modgrad, modgrad_completion, modgrad_multishot, modgrad_rl, afr],
    ids=lambda module: module.__name__,
)
def test_quick_is_a_preset_that_flags_override(module):
    synthetic = [] if module is modgrad_rl else ["--synthetic"]
    quick = get_args(module, *synthetic, "--quick")
    assert {key: getattr(quick, key) for key in module.QUICK} == module.QUICK
    assert get_args(module, *synthetic, "--quick", "--iterations", 3).iterations == 3
    assert get_args(module, *synthetic).iterations != quick.iterations


MAML_VARIANTS = (
    "--no-norm-affine",
    "--adapt modulated",
    "--embed constant",
    "--repeat-tasks",
    "--inner-lr 0.5",
    "--image-size 28",
)
VARIANTS = {  # flags that make another run than the paper's
    kml: MAML_VARIANTS,
    mmaml: MAML_VARIANTS,
    mprotonet: (
        "--no-residual",
        "--embed query",
        "--transductive",
        "--init-scale 0.01",
        "--distance-scale 0.25",
        "--image-size 28",
    ),
    modgrad: (
        "--start-at-one",
        "--steps 2",
        "--alpha 0.3",
        "--adapt conv4",
        "--first-order",
        "--image-size 28",
    ),
    afr: ("--embed constant", "--filters 64", "--alpha 0.05", "--first-order", "--image-size 28"),
}


@pytest.mark.parametrize(
    "module, words",
    [
        (kml, ""),
        (kml, "--modulation none"),
        (mmaml, ""),
        (mprotonet, "--modulation none"),
        (modgrad, "--algorithm maml"),
        (modgrad, "--algorithm cavia"),
        (modgrad_completion, "--algorithm cavia"),
        (modgrad_multishot, "--algorithm reptile"),
        (modgrad_rl, "--env cheetah-dir --algorithm cavia"),
        (afr, "--algorithm maml"),
        (afr, "--modulation pam"),
    ],
)
def test_a_flag_newer_than_a_run_has_its_algorithms_default(module, words):
    now = identity(get_args(module, *words.split()))
    for newer in now.keys() - {"method", "algorithm", "modulation", "env"}:
        recorded = {key: value for key, value in now.items() if key != newer}
        before = "modulated" if (now["method"], newer) == ("MMAML+KML", "adapt") else now[newer]
        assert vars(flags_of_run(recorded, module)) == now | {newer: before}
    assert flags_of_run(now | {"dropped": 3}, module).dropped == 3, "what an old run recorded is kept"


@pytest.mark.parametrize(
    "module, flags", [(module, flags) for module, of in VARIANTS.items() for flags in ("", "--seed 3", *of)]
)
def test_a_variant_is_named_in_the_title(module, flags, capsys):
    args = get_args(module, *flags.split())
    score = {"overall": {"mean": 70.0, "ci95": 0.5}}
    result = {
        "method": args.method,
        "test_tasks": 1000,
        "iterations": 9,
        "seconds_per_iteration": 1.0,
        "accuracy": score,
        "accuracy_inductive": score,
        "best_on_validation": None,
        "nil_or_error": score,
        "nil_or_error_inductive": score,
        "transfer": {},
    }
    module.report(result, args)
    printed = capsys.readouterr().out
    if flags not in ("", "--seed 3", "--image-size 28", "--adapt conv4"):
        assert flags in printed.split("\n")[1]
    assert "conv4" in printed or flags != "--adapt conv4"


def test_defaults_are_the_contract():
    """DESIGN 3 and the released code's settings (FACTS 3)."""
    args = vars(get_args(kml))
    want = {
        "ways": 5,
        "shots": 1,
        "queries": 15,
        "image_size": 84,
        "channels": 32,
        "meta_batch": 10,
        "iterations": 60000,
        "lr": 1e-3,
        "seed": 0,
        "test_tasks": 1000,
        "val_every": 0,
        "val_tasks": 100,
        "inner_steps": 5,
        "inner_lr": 0.05,
        "inner_clip": 20.0,
        "first_order": False,
        "adapt": "theta",
        "repeat_tasks": False,
        "precision": "fp32",
        "save_every": 1000,
        "keep_every": 0,
    }
    assert want == {k: args[k] for k in want}
    assert get_args(kml, "--modes", "CIFAR", "Bird", "OmniGlot").modes == ["fc100", "cub", "omniglot"]


def test_signals_end_a_real_process_cleanly(tmp_path, cache):
    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / number.name
        process = subprocess.Popen(
            [
                sys.executable,
                "kml.py",
                *TINY,
                "--iterations",
                "1000000",
                "--cache-dir",
                cache,
                "--out",
                str(out),
            ],
            cwd=HERE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_a_line(out / "log.jsonl", process)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "the same command continues" in said
        assert "Traceback" not in errors
        assert torch.load(out / "checkpoint.pt", weights_only=True)["iteration"] > 0


def test_stop_after(tmp_path, cache, monkeypatch, capsys):
    call(
        kml,
        monkeypatch,
        *TINY,
        "--iterations",
        100000,
        "--stop-after",
        1,
        "--cache-dir",
        cache,
        "--out",
        tmp_path,
    )
    assert "stopped by --stop-after" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_signal_after_the_last_look_still_leaves_a_checkpoint(tmp_path, cache, monkeypatch, capsys):
    """It comes when the iteration has been saved, or not: the next one ends with a checkpoint."""
    original = fewshot_run.Run.save

    def save(self, params, optimizer=None):
        original(self, params, optimizer)
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fewshot_run.Run, "save", save)
    words = *TINY, "--save-every", 1000, "--cache-dir", cache, "--out", tmp_path
    call(kml, monkeypatch, *words)
    assert "stopped by signal 15 at iteration 3 of 6" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 3


def test_validation_counts_for_stop_after(tmp_path, cache, monkeypatch, capsys):
    clock = [0.0]  # seconds; validating takes ten, and nothing else takes any
    monkeypatch.setattr(fewshot_run.time, "perf_counter", lambda: clock[0])
    original = kml.evaluate

    def slow(params, episodes, count, args):
        clock[0] += 10
        return original(params, episodes, count, args)

    monkeypatch.setattr(kml, "evaluate", slow)
    words = *TINY, "--val-every", 2, "--val-tasks", 4, "--stop-after", 15, "--iterations", 100
    call(kml, monkeypatch, *words, "--cache-dir", cache, "--out", tmp_path)
    assert "stopped by --stop-after at iteration 5 of 100" in capsys.readouterr().out


def test_a_diverging_run_says_so(tmp_path, cache, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(kml, monkeypatch, *TINY, "--lr", 1e18, "--cache-dir", cache, "--out", tmp_path)
    assert stop.value.code == 2
    assert "not finite" in capsys.readouterr().err


def test_the_same_network_as_a_module_computes_the_same():
    """bench.py peers compares like with like: PlainNetwork is the scripts' base network."""
    for module in (mmaml, mprotonet):
        _, params = make_params(module, "none")
        network = baselines.PlainNetwork(params).double()
        state = {}
        for l in module.LAYERS:
            names = {
                f"layers.{3 * (l - 1)}.weight": f"conv{l}.weight",
                f"layers.{3 * (l - 1)}.bias": f"conv{l}.bias",
                f"layers.{3 * l - 2}.weight": f"norm{l}.scale",
                f"layers.{3 * l - 2}.bias": f"norm{l}.shift",
            }
            state |= {there: params[here].detach() for there, here in names.items()}
        if module is mmaml:
            state |= {f"head.{part}": params[f"head.{part}"].detach() for part in ("weight", "bias")}
        network.load_state_dict(state)
        x = make_task().query_x
        torch.testing.assert_close(network(x), module.forward(params, x)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("module", [kml, mprotonet, modgrad])
def test_a_recorded_graph_computes_what_was_recorded(module):
    args = get_args(module, "--image-size", 32, "--channels", 4, "--device", "cuda")
    params = {k: w.to(args.device).requires_grad_() for k, w in module.init_params(args).items()}
    replay = fewshot_parallel.recorded(lambda batch: module.run_tasks(params, batch, args, True), params)
    for seed in (0, 1):
        batch = Task(
            *(x.to(args.device) for x in make_task(seed, ways=5, size=32, tasks=2, dtype=torch.float32))
        )
        losses = replay(batch)[0].clone()
        found = {k: w.grad.clone() for k, w in params.items()}
        for w in params.values():
            w.grad = None
        torch.testing.assert_close(losses, module.run_tasks(params, batch, args, True)[0])
        for k, w in params.items():
            torch.testing.assert_close(found[k], w.grad, rtol=1e-2, atol=1e-4)


def test_data_tool(tmp_path, cache):
    done = here("data.py", "list", "--data-root", tmp_path)
    assert done.returncode == 0
    assert all(mode in done.stdout for mode in fewshot_published.LAYOUTS)
    out = tmp_path / "episode.png"
    done = here(
        "data.py",
        "show",
        "cub",
        "--synthetic",
        "--image-size",
        28,
        "--cache-dir",
        cache,
        "--shots",
        2,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == ((2 + 6) * 86 + 12, 5 * 86 + 16)
    done = here("data.py", "prepare")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@real("omniglot", "miniimagenet")
def test_real_images_from_end_to_end(tmp_path, monkeypatch, capsys):
    call(
        kml,
        monkeypatch,
        *shlex.split(
            "--modes omniglot miniimagenet --shots 5 --image-size 28 --channels 8 --meta-batch 2 --iterations 2 "
            "--test-tasks 4"
        ),
        "--data-root",
        ROOT,
        "--cache-dir",
        HERE / ".cache",
        "--out",
        tmp_path,
    )
    printed = capsys.readouterr().out
    assert "77.02" not in printed, "28 px and 8 channels are not the paper's cell"
    assert json.loads((tmp_path / "result.json").read_text())["synthetic"] is False


def forget_flag(folder, flag):
    """Make a run one that was trained before there was a flag."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    del checkpoint["identity"][flag]
    torch.save(checkpoint, folder / "checkpoint.pt")


def test_a_run_goes_on_where_a_flag_is_newer_than_it(tmp_path, cache, monkeypatch, capsys):
    words = *TINY, "--cache-dir", cache, "--out", tmp_path
    call(kml, monkeypatch, *words, "--iterations", 2)
    for flag in ("repeat_tasks", "conv_lr"):
        forget_flag(tmp_path, flag)
    call(kml, monkeypatch, *words, "--iterations", 3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 3
    result = json.loads((tmp_path / "result.json").read_text())
    del result["args"]["repeat_tasks"], result["crc32"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    call(kml, monkeypatch, *words, "--iterations", 3)
    assert json.loads((tmp_path / "result.json").read_text()) == result, "it was printed, not measured anew"

    def again(*flags):
        return lambda: call(kml, monkeypatch, *words, "--iterations", 3, *flags)

    for flag, flags in {"repeat_tasks": ["--repeat-tasks"], "conv_lr": ["--conv-lr", 0, 0, 0.1, 0.3]}.items():
        forget_flag(tmp_path, flag)
        fails(capsys, again(*flags), f"older than --{flag.replace('_', '-')}: leave it out")
    forget_flag(tmp_path, "adapt")
    fails(capsys, again(), "older than --adapt, and did what is now --adapt modulated: give that")


@pytest.mark.parametrize("module, words", [(kml, ["--adapt", "modulated"]), (mmaml, [])])
def test_a_run_from_before_adapt_goes_on_as_it_began(tmp_path, cache, monkeypatch, module, words):
    words = *TINY, *words, "--cache-dir", cache, "--out", tmp_path
    call(module, monkeypatch, *words, "--iterations", 2)
    forget_flag(tmp_path, "adapt")
    call(module, monkeypatch, *words, "--iterations", 3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 3


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path, cache, monkeypatch, ignored):
    """SIGHUP in the middle of training, as SIGTERM; but under nohup, which ignores it, the run goes on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        hang_up(tmp_path, cache, monkeypatch)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "result.json").exists() == ignored
    if not ignored:
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 3


def hang_up(tmp_path, cache, monkeypatch):
    """Train, and send this process SIGHUP in the third iteration."""
    original = kml.run_tasks
    seen = []

    def hung_up(*args, **kwargs):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGHUP)
        return original(*args, **kwargs)

    monkeypatch.setattr(kml, "run_tasks", hung_up)
    call(kml, monkeypatch, *TINY, "--cache-dir", cache, "--out", tmp_path)


def test_a_result_without_its_checkpoint_is_not_reported_as_this_runs(tmp_path, cache, monkeypatch):
    words = [*TINY, "--cache-dir", cache, "--out", tmp_path]
    call(kml, monkeypatch, *words)
    (tmp_path / "checkpoint.pt").unlink()
    call(kml, monkeypatch, *words, "--lr", 0.1, "--stop-after", 0)
    assert not (tmp_path / "result.json").exists()
    call(kml, monkeypatch, *words, "--lr", 0.1)
    assert json.loads((tmp_path / "result.json").read_text())["args"]["lr"] == 0.1


def test_two_processes_with_one_folder(tmp_path, cache):
    """The second refuses and names the first; a lock does not outlive its process."""
    words = [*TINY, "--cache-dir", cache, "--out", tmp_path]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(folder=str(tmp_path))], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    done = run("kml.py", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"in use by process {holder.pid}" in done.stderr
    holder.kill()
    holder.wait()
    assert run("kml.py", *words).returncode == 0


HOLD = """
import pathlib, sys, time
from fewshot.run import lock
held = lock(pathlib.Path("{folder}"))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.curves
def test_a_run_draws_its_curves_or_says_how(tmp_path, cache, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    words = [*TINY, "--val-every", 2, "--val-tasks", 4, "--cache-dir", cache, "--out", tmp_path]
    call(kml, monkeypatch, *words)
    assert f"curves: {tmp_path / 'curves.png'}" in capsys.readouterr().err
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000
    monkeypatch.setattr(plots, "installed", lambda: False)
    call(kml, monkeypatch, *words, "--lr", 0.5, "--overwrite")
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()  # it would be another run's
