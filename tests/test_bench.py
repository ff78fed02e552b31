"""Tests: test_bench."""

import argparse
import functools
import json
import time

import numpy as np
import torch

import afr
from data import Task
from tests.helpers import AFR, Here, call, fails, run
from tools import baselines, bench, bench_gpu


def test_bench_says_what_it_measured(tmp_path, cache):
    done = run(
        "tools.bench",
        "train",
        "--synthetic",
        "--scripts",
        "mprotonet",
        "--image-size",
        16,
        "--shots",
        2,
        "--rounds",
        2,
        "--meta-batch",
        2,
        "--cache-dir",
        cache,
        "--json",
        tmp_path / "bench.json",
    )
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| mprotonet.py")]
    assert len(rows) == 1
    found = json.loads((tmp_path / "bench.json").read_text())
    for row, line in zip(found["train"], rows):
        assert all(len(values) == 2 and min(values) > 0 for values in row["samples"].values())
        middle = {k: np.median(values) for k, values in row["samples"].items()}
        floor = min(middle["floor"], middle["floor, PyTorch's own layout"])
        assert f"| {floor / middle['ours']:.2f} | {middle['plain'] / middle['ours']:.2f} |" in line
        assert f"| {middle['ours, 1 worker'] / middle['ours']:.2f} |" in line


def test_bench_beside_a_busy_process_and_peers(tmp_path, cache, monkeypatch, capsys):
    words = [
        "--synthetic",
        "--image-size",
        16,
        "--shots",
        2,
        "--rounds",
        1,
        "--meta-batch",
        2,
        "--cache-dir",
        cache,
    ]
    call(bench, monkeypatch, "train", "--scripts", "mprotonet", *words, "--busy")
    assert "mprotonet.py --modulation kml, 16 px, busy" in capsys.readouterr().out

    def absent(*args):
        raise ImportError("No module named 'higher'")

    monkeypatch.setattr(bench, "PEERS", {"mmaml": ("higher", absent)})
    fails(
        capsys,
        lambda: call(bench, monkeypatch, "peers", *words),
        "No module named 'higher': pip install higher",
    )
    monkeypatch.setattr(
        bench,
        "PEERS",
        {"mmaml": ("higher", absent), "mprotonet": ("itself", lambda *given: lambda: time.sleep(0.01))},
    )
    call(bench, monkeypatch, "peers", *words, "--json", tmp_path / "peers.json")
    out = capsys.readouterr().out
    assert "| mmaml.py --modulation none | 2 | - | higher | No module named 'higher' | - |" in out
    (_, row) = json.loads((tmp_path / "peers.json").read_text())["peers"]
    assert f"{np.median(row['samples']['itself']) / np.median(row['samples']['ours']):.2f} |" in out


def test_bench_gpu_says_what_it_needs_and_runs_without_a_gpu_at_tiny_shapes(tmp_path, monkeypatch, capsys):
    if not torch.cuda.is_available():
        fails(capsys, lambda: call(bench, monkeypatch, "gpu"), "there is no GPU here")
    monkeypatch.setattr(
        bench_gpu,
        "gpu_plan",
        lambda args: [
            ("mprotonet", 5, "tf32", "vmap"),
            ("mprotonet", 5, "tf32", "captured"),
            ("mprotonet", 5, "bf16", "loop"),
            ("kml", 1, "tf32", "vmap"),
        ],
    )
    monkeypatch.setattr(bench_gpu, "GPU_SCRIPTS", {"kml": [], "mprotonet": []})
    call(bench, monkeypatch, "gpu", "--smoke", "--device", "cpu", "--json", tmp_path / "gpu.json")
    out, record = capsys.readouterr().out, json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["same"] for row in record["equivalence"])
    assert [len(row.get("samples", [])) for row in record["rows"]] == [10, 0, 10, 10]
    assert record["rows"][1]["failed"] == "needs a GPU"
    assert f"| mprotonet.py | 5 | {np.median(record['rows'][0]['samples']):.1f} | needs a GPU |" in out
    call(
        bench,
        monkeypatch,
        "gpu",
        "--smoke",
        "--device",
        "cpu",
        "--budget",
        0,
        "--json",
        tmp_path / "gpu.json",
    )
    assert all(
        row["failed"].startswith("not tried")
        for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]
    )


def test_bench_variants(tmp_path, cache, monkeypatch, capsys):
    words = [
        "variants",
        "--synthetic",
        "--scripts",
        "mprotonet",
        "--image-size",
        16,
        "--shots",
        1,
        "--rounds",
        2,
        "--meta-batch",
        2,
        "--cache-dir",
        cache,
    ]
    call(bench, monkeypatch, *words, "--json", tmp_path / "bench.json")
    out = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "bench.json").read_text())["variants"]
    assert list(found["samples"]) == ["loop", "vmap", "unfold"]
    assert all(
        len(x) == 2 and f"{np.median(x):.4g} ({min(x):.4g} to {max(x):.4g})" in out
        for x in found["samples"].values()
    )
    fails(
        capsys,
        functools.partial(call, bench, monkeypatch, *words, "--variants", "captured", "--device", "cpu"),
        "CUDA graph",
    )


def test_bench_steps(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Here())
    call(
        bench,
        monkeypatch,
        "steps",
        "--synthetic",
        "--modes",
        "miniimagenet",
        "--image-size",
        16,
        "--shots",
        1,
        "--rounds",
        2,
        "--cache-dir",
        cache,
        "--json",
        tmp_path / "bench.json",
    )
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())["steps"]
    assert [row["algorithm"] for row in found] == [
        "MAML",
        "MAML on conv3+conv4",
        "ModGrad",
        "Meta-SGD",
        "CAVIA",
        "T-Net",
    ]
    middle = [np.median(row["samples"]) for row in found]
    assert min(middle) > 0
    (shown,) = (line for line in out.splitlines() if line.startswith("| ModGrad"))
    assert f"| {middle[2] / middle[0]:.2f} | {middle[2] / middle[1]:.2f} |" in shown


def test_bench_reuse(tmp_path, cache, monkeypatch, capsys):
    words = [
        "--synthetic",
        "--modes",
        "miniimagenet",
        "--image-size",
        16,
        "--shots",
        1,
        "--cache-dir",
        cache,
        "--queries",
        2,
        "--meta-batch",
        1,
    ]
    call(bench, monkeypatch, "reuse", *words, "--rounds", 2, "--json", tmp_path / "bench.json")
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())["reuse"]
    assert [row["method"] for row in found] == list(AFR)
    maml, _, am, _ = found
    for what in ("train", "test"):
        assert f"| {np.median(maml[what]) / np.median(am[what]):.2f} | " in next(
            line for line in out.splitlines() if line.startswith("| AM")
        )
    assert f"| {am['parameters']:,} | {am['parameters'] / maml['parameters']:.2f} |" in out
    args = argparse.Namespace(
        synthetic=True,
        modes=["miniimagenet"],
        image_size=16,
        cache_dir=cache,
        queries=2,
        meta_batch=1,
        ways=5,
        precision="fp32",
        data_root="nowhere",
        device="cpu",
    )
    for flags in bench.REUSE:  # what is timed is what test does
        _, test, options, params = baselines.prepare_reuse(flags, args, 1)
        task = Task(*(x[0] for x in afr.MetaTasks(options, "train").tasks(0, 1)[0]))
        with torch.no_grad():
            torch.testing.assert_close(
                test(), afr.outputs_of_test(params, task, options, "classification")[0]
            )
