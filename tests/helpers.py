"""Tests: helpers."""

import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import afr
import kml
import mmaml
import mprotonet
from data import Episodes, Task
from fewshot import cache as fewshot_cache
from fewshot import published as fewshot_published
from fewshot import scenes as fewshot_scenes

HERE = Path(__file__).parents[1]


ROOT = Path(os.environ.get("FEWSHOT_DATA", HERE / "data")).resolve()


FACTS = ROOT.parent / "facts"  # the reference split lists, where they lie beside the images


MODULATED_MAML = [(kml, "kml"), (mmaml, "film")]


MODULATED = [*MODULATED_MAML, (mprotonet, "kml"), (mprotonet, "film")]


CASES = [(kml, "none"), (mmaml, "none"), (mprotonet, "none"), *MODULATED]


def real(*modes):
    return pytest.mark.skipif(
        any(fewshot_cache.find_source(mode, ROOT) is None for mode in modes),
        reason=f"needs the real images of {', '.join(modes)} under FEWSHOT_DATA",
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One folder of decoded images for all tests, and for all processes that run them side by side."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a folder of its own in the one of all
        base = base.parent
    folder = base / "shared-cache"
    folder.mkdir(exist_ok=True)
    return str(folder)


def get_args(module, *words):
    return module.get_args([str(word) for word in words])


def make_task(seed=0, ways=3, shots=2, queries=3, size=16, tasks=None, dtype=torch.float64):
    """A task of noise images, or a batch of `tasks` of them."""
    rng, lead = torch.Generator().manual_seed(seed), () if tasks is None else (tasks,)
    x = [torch.rand(*lead, ways * k, 3, size, size, generator=rng).to(dtype) for k in (shots, queries)]
    y = [torch.arange(ways).repeat_interleave(k).expand(*lead, -1) for k in (shots, queries)]
    return Task(x[0], y[0], x[1], y[1], torch.zeros(lead, dtype=torch.int64))


def make_params(module, modulation, *words, seed=0, dtype=torch.float64):
    inner = [] if module is mprotonet else ["--inner-steps", 2]
    args = get_args(
        module, "--modulation", modulation, "--channels", 4, "--ways", 3, "--seed", seed, *inner, *words
    )
    return args, {k: w.to(dtype).requires_grad_() for k, w in module.init_params(args).items()}


def drawn_alike(ours, theirs):
    """Two sets of draws of one distribution: the largest distance of their cumulative shares (Kolmogorov, Smirnov)."""
    ours, theirs = ours.detach().flatten().double().sort()[0], theirs.detach().flatten().double().sort()[0]
    at = torch.cat([ours, theirs])
    shares = [torch.searchsorted(x, at, right=True) / len(x) for x in (ours, theirs)]
    limit = 1.95 * math.sqrt(
        1 / len(ours) + 1 / len(theirs)
    )  # exceeded once in 1,000 draws; the seeds are fixed
    return (shares[0] - shares[1]).abs().max() < limit


def relative_distance(one, two):
    """Norm of the difference of two dicts of tensors, relative to the norm of the second."""
    difference = math.hypot(*((one[k] - two[k]).norm() for k in two))
    return difference / math.hypot(*(w.norm() for w in two.values()))


AFR = {
    "MAML": ["--algorithm", "maml"],
    "ANIL": ["--modulation", "none"],
    "AM": [],
    "P-AM": ["--modulation", "pam"],
}


def make_afr(method, *words, dtype=torch.float64, trained=True):
    """Parameters of a small network; `trained`: an attention module that does something, its last layer not zero."""
    args = get_args(
        afr,
        *AFR[method],
        "--filters",
        4,
        "--ways",
        3,
        "--image-size",
        16,
        "--device",
        "cpu",
        "--steps",
        2,
        *words,
    )
    params = {k: w.to(dtype).requires_grad_() for k, w in afr.init_params(args).items()}
    rng = torch.Generator().manual_seed(5)
    for k, w in params.items():
        if trained and k.startswith("attention.") and ".out." in k:
            w.data += 0.5 * torch.randn(w.shape, generator=rng).to(dtype)
    return args, params


def make_afr_task(kind, tasks=None, seed=0):
    """A subtask of noise, with a hole in each label image."""
    task = make_task(seed=seed, tasks=tasks)
    if kind == "classification":
        return task
    rng, made = torch.Generator().manual_seed(seed + 9), []
    for y in (task.support_y, task.query_y):
        labels = torch.rand(
            *y.shape, *{"vanishing": (2,), "depth": (1, 16, 16), "normals": (3, 16, 16)}[kind], generator=rng
        ).double()
        if kind != "vanishing":
            labels[..., 3:5, 6:9] = -1
        made.append(labels)
    return task._replace(support_y=made[0], query_y=made[1])


@pytest.fixture
def few_scenes(monkeypatch):
    """Some of the domains and images: enough to sample from, and quick to draw."""
    monkeypatch.setattr(fewshot_scenes, "SCENES_FORMAT", "few")  # caches are named by it
    monkeypatch.setattr(fewshot_scenes, "SCENE_IMAGES", 32)
    monkeypatch.setattr(fewshot_scenes, "SCENE_DOMAINS", {"train": 3, "val": 2, "test": 2})
    monkeypatch.setattr(fewshot_scenes, "SCENE_CLASSES", {"train": 4, "val": 4, "test": 4})


def episodes(cache, modes=("omniglot", "miniimagenet"), split="train", size=28, seed=0, **kwargs):
    options = {"ways": 5, "shots": 1, "queries": 15, "synthetic": True, "cache_dir": cache} | kwargs
    return Episodes(list(modes), split, image_size=size, seed=seed, **options)


def picture(path, size=12, colour=None, mode="RGB", seed=0, spot=False):
    """Write (or return, for path None) the bytes of a small picture; the format follows the path's ending.

    colour: of all of it; noise if None. spot: whether its lower right corner is white.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    image = Image.fromarray(pixels) if colour is None else Image.new("RGB", (size, size), colour)
    if spot:
        image.paste("white", (size - 3, size - 3, size, size))
    file = io.BytesIO()
    image.convert(mode).save(
        file, {".jpg": "JPEG", ".webp": "WEBP"}.get(Path(path or "x.png").suffix, "PNG"), quality=90
    )
    if path is None:
        return file.getvalue()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(file.getvalue())


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def prepared(mode, tmp_path, size=8):
    """Run the import -> {split: [(class, count)]}, {split: pixels}."""
    folder = fewshot_cache.prepare(mode, size, tmp_path / "root", tmp_path / "cache")
    return json.loads((folder / "classes.json").read_text()), {
        s: np.load(folder / f"{s}.npy") for s in fewshot_published.SPLITS
    }


def miniimagenet_pickle(names, protocol):
    images = np.random.default_rng(0).integers(0, 256, (2 * len(names), 84, 84, 3), np.uint8)
    rows = {name: [2 * i, 2 * i + 1] for i, name in enumerate(names)}
    rows[names[0]] = np.array([0, 1])  # indices as an array, and as numpy integers
    rows[names[1]] = list(np.array([2, 3]))
    return images, pickle.dumps({"image_data": images, "class_dict": rows}, protocol=protocol)


def cub_names():
    return [f"{i:03d}.Bird_{i}" for i in range(1, 201)]


def run(*command, cwd=HERE, timeout=280, **kwargs):
    env = dict(os.environ, PYTHONPATH=str(HERE)) | kwargs.pop("env", {})
    if str(command[0]).startswith(("tools.", "tests.")):
        command = ["-m", *command]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=env,
        **kwargs,
    )


def wait_for_a_line(log, process, seconds=120):
    """Wait until a running process has written to its log, or has ended, or the time is over."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if log.exists() and log.read_text():
            return
        time.sleep(0.1)


def here(script, *words):
    """As `run`, in this process: without the seconds that a new one takes to import PyTorch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [script, *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as stop:
            code = stop.code or 0
    return subprocess.CompletedProcess(script, code, out.getvalue(), err.getvalue())


def fails(capsys, call, *words):
    """The call ends with status 2 and one line on stderr that holds the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    lines = capsys.readouterr().err.strip("\n").split("\n")
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines


TINY = shlex.split(
    "--synthetic --image-size 8 --channels 2 --meta-batch 2 --queries 2 --iterations 6 "
    "--test-tasks 8 --log-every 2 --save-every 4"
)


def call(module, monkeypatch, *words):
    """Run a script's main() in this process; the signal handlers that it leaves behind are put back."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Here:
    """Stands in for a pool of one fresh process, in which bench.py measures memory: starting one takes seconds."""

    Process = staticmethod(multiprocessing.get_context("spawn").Process)
    Pool = __enter__ = lambda self, *_: self
    __exit__ = lambda self, *_: None
    apply = staticmethod(lambda function, arguments: function(*arguments))


def run_all(*words, **kwargs):
    return subprocess.run(
        ["bash", str(HERE / "run_all.sh"), *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
        **kwargs,
    )


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


RESULTS = HERE / "results"


def make_result(folder, method, modes, per_task, inductive=(), args=None, best=None, **flags):
    """A result file as the scripts write it, with accuracies of our choice."""
    family = {"MAML": kml.METHODS | mmaml.METHODS, "ProtoNet": mprotonet.METHODS}
    module = mmaml if method in family["MAML"].values() else mprotonet
    args = args or vars(get_args(module, "--modes", *modes)) | flags
    default = {"MAML": (60000, 10), "ProtoNet": (30000, 10)}["MAML" if module is mmaml else "ProtoNet"]
    result = {
        "method": method,
        "modes": modes,
        "ways": 5,
        "shots": args["shots"],
        "synthetic": args["synthetic"],
        "per_task": list(per_task),
        "per_task_inductive": list(inductive) or None,
        "test_tasks": len(per_task),
        "iterations": flags.get("iterations", default[0]),
        "seconds_per_iteration": 0.25,
        "parameters": {"base": 1000, "encoder": 100, "generator": 10},
        "args": args,
        "data": [f"{mode}-84-abc" for mode in modes],
        "best_on_validation": best,
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        {"iteration": i, "accuracy": {mode: 20 + i + m for m, mode in enumerate(modes)}} for i in range(1, 90)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
