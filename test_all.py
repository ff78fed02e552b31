"""The tests: python -m pytest -q test_all.py. Under five minutes on two CPU cores, no network, no GPU needed.

They prove the mathematics (identities, gradients, invariances), the protocol, the importers on small archives of the
published layouts, the command lines as users type them, and the bad inputs. Those on real images need FEWSHOT_DATA (or
./data) to hold them and are skipped otherwise.
"""
import argparse
import ast
import contextlib
import csv
import difflib
import functools
import hashlib
import http.server
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tokenize
import traceback
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import afr
import bench
import data
import inspect_gradients
import inspect_modulation
import kml
import mmaml
import modgrad
import modgrad_completion
import modgrad_multishot
import modgrad_rl
import mprotonet
import tables
import transference
from data import Alphabets, Completions, Episodes, Task

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("FEWSHOT_DATA", HERE / "data")).resolve()
FACTS = ROOT.parent / "facts"                   # the reference split lists, where they lie beside the images
MODULATED_MAML = [(kml, "kml"), (mmaml, "film")]
MODULATED = [*MODULATED_MAML, (mprotonet, "kml"), (mprotonet, "film")]
CASES = [(kml, "none"), (mmaml, "none"), (mprotonet, "none"), *MODULATED]


def real(*modes):
    return pytest.mark.skipif(any(data.find_source(mode, ROOT) is None for mode in modes),
                              reason=f"needs the real images of {', '.join(modes)} under FEWSHOT_DATA")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


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
    args = get_args(module, "--modulation", modulation, "--channels", 4, "--ways", 3, "--seed", seed, *inner, *words)
    return args, {k: w.to(dtype).requires_grad_() for k, w in module.init_params(args).items()}


# ------------------------------------------------------------------------------------------------------- mathematics

@pytest.mark.parametrize("module, modulation", MODULATED)
def test_zero_modulation_is_the_plain_network(module, modulation):
    args, params = make_params(module, modulation)
    for k, w in params.items():
        if k.startswith("generator."):
            w.data.zero_()
    (plain, _), task = make_params(module, "none"), make_task()
    omega = module.modulation(params, module.encode_task(params, task.support_x))
    assert omega
    assert all((w == 0).all() for w in omega.values())
    for one, two in zip(module.task_loss(params, task, args, evaluate=True),
                        module.task_loss(module.group(params, "base"), task, plain, evaluate=True)):
        assert torch.equal(one, two)


def test_maml_is_the_same_in_both_scripts():
    (args, params), task = make_params(kml, "none"), make_task()
    assert all(torch.equal(w, mmaml.init_params(args)[k].double()) for k, w in params.items())
    assert torch.equal(kml.task_loss(params, task, args)[1], mmaml.task_loss(params, task, args)[1])


def test_modulations_share_the_base_initialisation():
    base = kml.init_params(get_args(kml, "--modulation", "none"))
    for module, modulation in CASES:
        params = module.init_params(get_args(module, "--modulation", modulation))
        assert all(torch.equal(w, base[k]) for k, w in module.group(params, "base").items())
    for words in ([], ["--no-residual"], ["--embed", "constant"]):      # nor does the control draw another generator
        other = mprotonet.init_params(get_args(mprotonet, *words))
        params = mprotonet.init_params(get_args(mprotonet))
        assert all(torch.equal(w, other[k]) for k, w in params.items() if not k.startswith("encoder."))


def test_film_on_a_convolution_is_a_scaled_kernel():
    """KML paper, Eq. 3 to 5."""
    rng = torch.Generator().manual_seed(0)
    x, W = torch.rand(5, 3, 9, 9, generator=rng).double(), torch.randn(4, 3, 3, 3, generator=rng).double()
    b, eta, gamma = torch.randn(3, 4, generator=rng).double()
    film = eta[:, None, None] * F.conv2d(x, W, b) + gamma[:, None, None]
    torch.testing.assert_close(film, F.conv2d(x, eta[:, None, None, None] * W, eta * b + gamma))


def test_batchnorm_cancels_film_before_it_and_the_bias_offset():
    _, params = make_params(kml, "kml")
    x, eta, gamma = make_task().query_x, 1 + torch.rand(4).double(), torch.randn(4).double()
    before, _ = kml.conv_norm(params, 1, x)
    params |= {"conv1.weight": params["conv1.weight"] * eta[:, None, None, None], "conv1.bias": gamma}
    # BatchNorm divides by sqrt(variance + 1e-5): the 1e-5 is what little of the scale survives
    torch.testing.assert_close(kml.conv_norm(params, 1, x)[0], before, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        params["conv1.bias"] = gamma + 10
        shifted = kml.conv_norm(params, 1, x)[0]
        params["conv1.bias"] = gamma
        torch.testing.assert_close(shifted, kml.conv_norm(params, 1, x)[0], atol=1e-10, rtol=0)


def test_the_bias_offset_learns_nothing_and_all_else_learns():
    args, params = make_params(kml, "kml")
    loss, _ = kml.task_loss(params, make_task(), args)
    loss.backward()
    for k, w in params.items():
        dead = ".bias." in k or re.fullmatch(r"(encoder\.)?conv\d\.bias", k)        # a bias before a BatchNorm
        assert (w.grad.abs().max() < 1e-10) == bool(dead), k


def test_kernel_modulation_is_the_outer_product_reshaped():
    """Eq. 6 to 8: entry by entry, on one layer."""
    _, params = make_params(kml, "kml")
    v = torch.rand(128).double()
    omega = kml.modulation(params, v)
    theta = kml.group(params, "base")
    fast = kml.modulate(theta, omega)
    rows = params["generator.conv2.rows.weight"] @ v + params["generator.conv2.rows.bias"]
    cols = params["generator.conv2.cols.weight"] @ v + params["generator.conv2.cols.bias"]
    W, C = theta["conv2.weight"], len(cols)
    for o, i, y, x in [(0, 0, 0, 0), (3, 1, 2, 0), (7, 3, 2, 2), (5, 0, 1, 1)]:
        flat = ((o * W.shape[1] + i) * 3 + y) * 3 + x
        assert torch.isclose(fast["conv2.weight"][o, i, y, x], W[o, i, y, x] * (1 + rows[flat // C] * cols[flat % C]))
    assert torch.linalg.matrix_rank(omega["conv2.weight"]) == 1
    torch.testing.assert_close(fast["conv2.bias"], theta["conv2.bias"] + omega["conv2.bias"])
    assert fast["head.weight"] is theta["head.weight"]


def test_parameter_counts():
    """FACTS: 388,416 in convolutions; generators of 329,595 (KML) and 123,840 (FiLM); 152 times fewer than full layers."""
    params = kml.init_params(get_args(kml))
    count = lambda parts: sum(w.numel() for w in parts.values())
    kernels = {k: w for k, w in params.items() if re.fullmatch(r"conv\d\.weight", k)}
    assert count(kernels) + sum(len(w) for w in kernels.values()) == 388416
    assert count(kml.group(params, "generator")) == 329595
    assert count(mmaml.group(mmaml.init_params(get_args(mmaml)), "generator")) == 123840
    full = sum((128 + 1) * (w.numel() + len(w)) for w in kernels.values())
    assert round(full / 329595) == 152


@pytest.mark.parametrize("vectorise", [False, True], ids=["loop", "vmap"])
@pytest.mark.parametrize("module, modulation", CASES)
def test_meta_gradient_agrees_with_central_differences(module, modulation, vectorise):
    """Second order, float64, base network, encoder and generator each along a random direction.

    The step is small because the gradient of a ReLU network jumps: a wide step would cross kinks.
    """
    args, params = make_params(module, modulation, seed=3)
    batch, rng = make_task(seed=3, tasks=2, size=24), torch.Generator().manual_seed(3)
    module.run_tasks(params, batch, args, vectorise)
    for part in kml.PARTS:
        direction = {k: torch.randn(w.shape, generator=rng).double() for k, w in params.items()
                     if k in module.group(params, "base") and part == "base" or k.startswith(f"{part}.")}
        if not direction:
            continue

        def loss(step, direction=direction):
            moved = {k: w.detach() + step * direction.get(k, 0) for k, w in params.items()}
            return np.mean([module.task_loss(moved, Task(*(x[i] for x in batch)), args)[0].item() for i in range(2)])

        expected = (loss(1e-7) - loss(-1e-7)) / 2e-7
        found = sum((params[k].grad * d).sum().item() for k, d in direction.items())
        assert math.isclose(found, expected, rel_tol=2e-5, abs_tol=1e-7), part


@pytest.mark.parametrize("module, modulation", CASES)
def test_loop_and_vmap_agree(module, modulation):
    for evaluate in (False, True):
        args, params = make_params(module, modulation)
        both = []
        for vectorise in (False, True):
            for w in params.values():
                w.grad = None
            with torch.set_grad_enabled(not evaluate):
                losses, accuracies = module.run_tasks(params, make_task(tasks=3), args, vectorise, evaluate)
            both.append([losses, accuracies] + ([] if evaluate else [w.grad for w in params.values()]))
        for one, two in zip(*both):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", bench.VARIANTS)
@pytest.mark.parametrize("module, modulation", [(kml, "kml"), (mmaml, "film"), (mprotonet, "kml")])
def test_the_benchmarks_variants_compute_the_same(module, modulation, variant):
    """Gradients of one meta-batch, float64: the loop is the reference; a second batch, as a graph is recorded with the first."""
    device = "cuda:0" if variant == "captured" else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("a CUDA graph needs a GPU")
    args, params = make_params(module, modulation, "--device", device)
    params = {k: w.detach().to(device).requires_grad_() for k, w in params.items()}
    first, second = (Task(*(x.to(device) for x in make_task(seed=seed, tasks=2))) for seed in (0, 1))
    module.run_tasks(params, second, args, False)
    expected = {k: w.grad.clone() for k, w in params.items()}
    compiler = {"backend": "eager"} if variant == "compiled" else {}            # as traced, without generating code
    gradients = bench.prepare_variant(variant, module, args, params, first, **compiler)
    for batch in (first, second):
        for w in params.values():
            w.grad = None
        gradients(batch)
    for k, w in params.items():
        torch.testing.assert_close(w.grad, expected[k], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("module, modulation", CASES)
def test_the_number_of_workers_changes_no_bit(module, modulation):
    """Losses, accuracies and gradients of 1, 2 and 3 threads are those of a plain loop with one thread."""
    args, params = make_params(module, modulation, "--ways", 5, dtype=torch.float32)
    batch = make_task(ways=5, shots=5, queries=5, size=28, tasks=5, dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    single = [module.task_loss(params, Task(*(x[i] for x in batch)), args) for i in range(5)]
    for loss, _ in single:
        (loss / 5).backward()
    torch.set_num_threads(threads)
    wanted = [w.grad for w in params.values()]
    for args.workers in (1, 2, 3):
        for w in params.values():
            w.grad = None
        losses, accuracies = module.run_tasks(params, batch, args, vectorise=False)
        assert torch.equal(losses, torch.stack([loss.detach() for loss, _ in single]))
        assert all(torch.equal(w.grad, g) for w, g in zip(params.values(), wanted))
        assert all(w.grad.stride() == w.stride() for w in params.values()), "as Adam's fused step expects"
        with torch.no_grad():
            tested, both = module.run_tasks(params, batch, args, vectorise=False, evaluate=True)
        assert torch.equal(tested, losses)
        assert torch.equal(both[:, 0], accuracies[:, 0])
    assert torch.get_num_threads() == threads, "the main thread's own number stays"


META_CASES = [(kml, []), (mmaml, []), (kml, ["--modulation", "none"]), (mprotonet, []), (mprotonet, ["--official"]), (modgrad, []),
              *((modgrad, ["--algorithm", algorithm]) for algorithm in ("maml", "metasgd", "cavia", "tnet"))]


@contextlib.contextmanager
def only_on_the_device():
    """Autocast, which does not know the meta device, does nothing: all else is as on a GPU."""
    with mock.patch.object(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()):
        yield


@pytest.mark.parametrize("module, words", META_CASES)
@pytest.mark.parametrize("evaluate", [False, True])
def test_what_a_gpu_runs_never_touches_the_host(module, words, evaluate):
    """run_tasks on the meta device, whose tensors have no values: one made on the host, .item(), or a shape that depends on
    values fails here, as they would make a GPU wait."""
    args = get_args(module, "--shots", 2, "--image-size", 32, "--channels", 4, *words)
    params = {k: w.to("meta").requires_grad_() for k, w in module.init_params(args).items()}
    batch = make_task(ways=5, shots=2, queries=3, size=32, tasks=2, dtype=torch.float32)
    batch = Task(*(x.to("meta") for x in batch))
    args.device = "meta"
    with only_on_the_device(), torch.set_grad_enabled(not evaluate):
        losses, accuracies = module.run_tasks(params, batch, args, vectorise=True, evaluate=evaluate)
    assert losses.device.type == accuracies.device.type == "meta"
    assert evaluate or all(w.grad is not None and w.grad.shape == w.shape for w in params.values())


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("modulation", ["none", "am", "pam"])
def test_what_a_gpu_runs_of_attentive_feature_reuse_never_touches_the_host(modulation, evaluate):
    args = get_args(afr, "--shots", 2, "--image-size", 32, "--filters", 4, "--meta-batch", 2, "--modulation", modulation)
    params = {k: w.to("meta").requires_grad_() for k, w in afr.init_params(args).items()}
    batch = Task(*(x.to("meta") for x in make_task(ways=5, shots=2, queries=3, size=32, tasks=2, dtype=torch.float32)))
    epsilon = afr.draws(0, args)
    epsilon = epsilon if epsilon is None else epsilon.to("meta")
    args.device = "meta"
    with only_on_the_device(), torch.set_grad_enabled(not evaluate):
        losses, found = afr.run_tasks(params, [batch], args, True, evaluate=evaluate, epsilon=epsilon)
    assert found.device.type == losses.device.type == "meta"


@pytest.mark.parametrize("module", [kml, mprotonet, modgrad])
def test_training_waits_for_the_device_at_log_steps_alone(module, tmp_path, cache, monkeypatch):
    """Counts what would make the host wait for a GPU (.item(), .tolist(), .cpu(), bool()) in each iteration of train()."""
    waits, done = [], []
    step = torch.optim.Adam.step

    def count(name):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, **kwargs):
            ignored = (os.path.join("optim", "adam.py"), os.path.join("optim", "optimizer.py"), data.__file__)      # the last: on a CPU alone
            if not any(frame.filename.endswith(ignored) for frame in traceback.extract_stack(limit=12)):
                waits.append((len(done), name))
            return original(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, counted)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        count(name)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *args, **kwargs: (step(*args, **kwargs), done.append(1))[0])
    words = ["--synthetic", "--image-size", "16", "--channels", 2, "--meta-batch", 2, "--queries", 2, "--iterations", 12,
             "--log-every", 5, "--save-every", 100, "--val-every", 0, "--keep-every", 0, "--out", tmp_path, "--cache-dir", cache]
    args = get_args(module, *words)
    params = {k: w.requires_grad_() for k, w in module.init_params(args).items()}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.train(params, args, None, [])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len(done) == 12
    assert {iteration for iteration, _ in waits} == {5, 10, 12}, "after iterations 5, 10 and the last, and nowhere else"


def test_a_run_of_any_number_of_workers_is_the_same_run(tmp_path, cache, monkeypatch):
    found = []
    for workers in (1, 3):
        call(kml, monkeypatch, *TINY, "--cache-dir", cache, "--out", tmp_path / str(workers), "--workers", workers)
        checkpoint = torch.load(tmp_path / str(workers) / "checkpoint.pt", weights_only=True)
        log = [json.loads(line) for line in (tmp_path / str(workers) / "log.jsonl").read_text().splitlines()]
        result = json.loads((tmp_path / str(workers) / "result.json").read_text())
        found.append((checkpoint, [line | {"seconds": 0} for line in log], result["per_task"]))
    (one, *rest), (two, *others) = found
    assert all(torch.equal(w, two["params"][k]) for k, w in one["params"].items())
    assert one["identity"] == two["identity"]
    assert rest == others


def test_cores_that_may_be_used(tmp_path, monkeypatch):
    """The affinity of the process, and what a container's quota leaves of it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpu.cfs_period_us").write_text("100000")
    file = tmp_path / "quota"
    for text, found in (("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1), ("-1", 8), ("200000", 2), ("nonsense", 8)):
        file.write_text(text + "\n")
        assert data.cores([file]) == found, text
    assert data.cores([tmp_path / "nothing"]) == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert data.cores([]) == 5                      # macOS and Windows


def test_threads_keep_the_order_and_pass_on_errors():
    def late(i):
        time.sleep(0.02 * (3 - i))
        return i, torch.get_num_threads()
    assert list(data.in_threads(late, range(4), 4)) == [(i, 1) for i in range(4)]
    with pytest.raises(ZeroDivisionError):
        list(data.in_threads(lambda x: 1 / x, [1, 0], 2))


def test_first_order_holds_the_inner_gradients_constant():
    """The first-order gradient is the query gradient at the adapted parameters (Finn et al. 2017, Section 5.2)."""
    args, params = make_params(kml, "none", "--first-order", "--inner-lr", 0.1)
    task = make_task()
    fast = {k: w.detach().requires_grad_() for k, w in params.items()}
    for _ in range(2):
        loss = F.cross_entropy(kml.forward(fast, task.support_x)[0], task.support_y)
        grads = torch.autograd.grad(loss, list(fast.values()))
        fast = {k: (w - 0.1 * g).detach().requires_grad_() for (k, w), g in zip(fast.items(), grads)}
    F.cross_entropy(kml.forward(fast, task.query_x)[0], task.query_y).backward()
    loss, _ = kml.task_loss(params, task, args)
    loss.backward()
    second, again = make_params(kml, "none", "--inner-lr", 0.1)
    kml.task_loss(again, task, second)[0].backward()
    for k, w in params.items():
        torch.testing.assert_close(w.grad, fast[k].grad, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(again["conv4.weight"].grad, params["conv4.weight"].grad, rtol=1e-2)


def adapted_by_hand(module, theta, omega, task, clip):
    """Two inner steps of size 0.1 on `theta` under a fixed omega, by torch.autograd.grad -> the parameters for the queries."""
    for _ in range(2):
        logits, _ = module.forward(module.modulate(theta, omega), task.support_x)
        grads = torch.autograd.grad(F.cross_entropy(logits, task.support_y), list(theta.values()), create_graph=True)
        theta = {k: theta[k] - 0.1 * g.clamp(-clip, clip) for k, g in zip(theta, grads)}
    return module.modulate(theta, omega)


@pytest.mark.parametrize("module, modulation", MODULATED_MAML)
@pytest.mark.parametrize("adapt", ["theta", "modulated"])
def test_what_the_inner_loop_adapts(module, modulation, adapt):
    """The whole of task_loss, written again with torch.autograd.grad; and the clamp of the inner gradients."""
    for clip in (20, 1e-3):
        args, params = make_params(module, modulation, "--inner-lr", 0.1, "--inner-clip", clip, "--adapt", adapt)
        task, theta = make_task(), module.group(params, "base")
        omega = module.modulation(params, module.encode_task(params, task.support_x))
        if adapt == "modulated":
            theta, omega = module.modulate(theta, omega), {}
        adapted = adapted_by_hand(module, theta, omega, task, clip)
        loss, logits = module.task_loss(params, task, args)
        torch.testing.assert_close(logits, module.forward(adapted, task.query_x)[0])
        found = torch.autograd.grad(loss, params["encoder.linear.weight"])[0]
        wanted = F.cross_entropy(module.forward(adapted, task.query_x)[0], task.query_y)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, params["encoder.linear.weight"])[0])


def test_a_step_of_theta_under_m_is_a_step_of_the_kernels_by_the_square_of_1_plus_m():
    """kml.py's docstring; and with M of 0.3 the two readings of --adapt do not predict the same."""
    args, params = make_params(kml, "kml", "--inner-steps", 1, "--inner-lr", 0.1)
    other, _ = make_params(kml, "kml", "--inner-steps", 1, "--inner-lr", 0.1, "--adapt", "modulated")
    for k, w in params.items():
        if k.endswith(("rows.bias", "cols.bias")):
            w.data.fill_(0.3 ** 0.5)
    task, theta = make_task(), kml.group(params, "base")
    omega = kml.modulation(params, kml.encode_task(params, task.support_x))
    start = {k: w.detach().requires_grad_() for k, w in kml.modulate(theta, omega).items()}
    loss = F.cross_entropy(kml.forward(start, task.support_x)[0], task.support_y)
    grads = dict(zip(start, torch.autograd.grad(loss, list(start.values()))))
    rate = {k: (1 + omega[k].view(w.shape)) ** 2 if k in omega and "weight" in k else 1.0 for k, w in start.items()}
    ends = {k: w - 0.1 * rate[k] * grads[k] for k, w in start.items()}
    torch.testing.assert_close(kml.task_loss(params, task, args)[1], kml.forward(ends, task.query_x)[0])
    plain = {k: w - 0.1 * grads[k] for k, w in start.items()}
    torch.testing.assert_close(kml.task_loss(params, task, other)[1], kml.forward(plain, task.query_x)[0])
    assert not torch.allclose(kml.task_loss(params, task, args)[1], kml.task_loss(params, task, other)[1], rtol=1e-3)


@pytest.mark.parametrize("module, modulation", MODULATED)
def test_omega_depends_on_the_support_images_alone(module, modulation):
    _, params = make_params(module, modulation, dtype=torch.float32)
    task, other = make_task(dtype=torch.float32, shots=5), make_task(seed=1, dtype=torch.float32)
    omega = lambda t: module.modulation(params, module.encode_task(params, t.support_x))
    here = omega(task)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    for same in (task._replace(query_x=other.query_x, query_y=other.query_y.flip(0), support_y=task.support_y.flip(0)),
                 task._replace(support_x=task.support_x[order], support_y=task.support_y[order])):
        assert all(torch.equal(w, here[k]) for k, w in omega(same).items())         # bit by bit
    assert not any(torch.equal(w, here[k]) for k, w in omega(other).items())
    args, _ = make_params(module, modulation)
    module.task_loss(params, task, args)[0].backward()
    for part in ("encoder.conv1.weight", "encoder.linear.weight", *(k for k in params if "rows" in k or "film" in k)):
        assert params[part].grad.abs().max() > 0, part


@pytest.mark.parametrize("module, modulation", CASES)
def test_inductive_predictions_do_not_know_the_other_queries(module, modulation):
    args, params = make_params(module, modulation)
    task, other = make_task(), make_task(seed=1)
    _, paper, inductive = module.task_loss(params, task, args, evaluate=True)
    order = torch.tensor([5, 0, 8, 1, 7, 3, 2, 6, 4])
    keep = torch.tensor([0, 4])
    mixed = other.query_x.clone()
    mixed[4] = task.query_x[4]
    for x, y, at, rows in [(task.query_x[order], task.query_y[order], slice(None), order),
                           (task.query_x[keep], task.query_y[keep], slice(None), keep), (mixed, task.query_y, [4], [4])]:
        _, p, i = module.task_loss(params, task._replace(query_x=x, query_y=y), args, evaluate=True)
        torch.testing.assert_close(i[at], inductive[rows], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(p[4], paper[4], rtol=1e-3)            # the papers' protocol does know them


def test_stats_of_a_batch_reproduce_its_own_normalisation():
    _, params = make_params(kml, "none")
    x = make_task().query_x
    logits, stats = kml.forward(params, x)
    torch.testing.assert_close(kml.forward(params, x, stats)[0], logits)
    y = F.conv2d(x, params["conv1.weight"], params["conv1.bias"], stride=2, padding=1)
    torch.testing.assert_close(stats[0][0], y.mean((0, 2, 3)))
    torch.testing.assert_close(stats[0][1], (y.var((0, 2, 3), correction=0) + 1e-5) ** -0.5)


def test_no_norm_affine_leaves_scale_and_shift_out():
    args, params = make_params(kml, "kml", "--no-norm-affine")
    assert not [k for k in params if k.startswith("norm")]
    assert torch.isfinite(kml.task_loss(params, make_task(), args)[0])


def test_intervals():
    """Strata by mode (DESIGN 4), against a hand computation and a bootstrap within strata."""
    rng = np.random.default_rng(0)
    per_task = np.stack([rng.normal(95, 4, 400), rng.normal(50, 9, 400)], 1).reshape(-1)
    rows = kml.summary(per_task, ["a", "b"])
    a, b = per_task[::2], per_task[1::2]
    assert rows["a"] == {"mean": round(a.mean(), 4), "ci95": round(1.96 * a.std(ddof=1) / 20, 4)}
    assert rows["overall"]["mean"] == round((a.mean() + b.mean()) / 2, 4)
    assert math.isclose(rows["overall"]["ci95"], math.hypot(rows["a"]["ci95"], rows["b"]["ci95"]) / 2, abs_tol=1e-3)
    means = [(rng.choice(a, 400).mean() + rng.choice(b, 400).mean()) / 2 for _ in range(2000)]
    assert math.isclose(rows["overall"]["ci95"], 1.96 * np.std(means), rel_tol=0.1)


@pytest.mark.parametrize("module", [kml, mprotonet])
def test_bf16_stays_close_to_fp32(module):
    losses = []
    for precision in ("fp32", "bf16"):
        args, params = make_params(module, "kml", "--precision", precision, dtype=torch.float32)
        losses.append(module.run_tasks(params, make_task(tasks=2, dtype=torch.float32), args, False)[0])
        assert all(w.grad is not None and w.grad.dtype == torch.float32 for w in params.values())
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        omega = module.modulation(params, module.encode_task(params, make_task(dtype=torch.float32).support_x))
    assert all(w.dtype == torch.float32 for w in omega.values()), "1 + M has too few digits in bf16"


@pytest.mark.parametrize("module, modulation", MODULATED)
def test_the_benchmarks_plain_rival_computes_the_same(module, modulation):
    args, params = make_params(module, modulation)
    task = make_task()
    loss = bench.plain_loss(module, args, params, task.support_x, task.support_y, task.query_x, task.query_y)
    expected, _ = module.task_loss(params, task, args)
    torch.testing.assert_close(loss, expected)
    for one, two in zip(torch.autograd.grad(loss, list(params.values())), torch.autograd.grad(expected, list(params.values()))):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------- prototype networks

def test_a_prototype_is_the_mean_of_its_class():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 5, generator=rng), torch.tensor([2, 0, 1, 1, 2, 0, 0, 1, 2, 2, 1, 0])
    means = torch.stack([x[y == n].mean(0) for n in range(3)])
    torch.testing.assert_close(mprotonet.class_means(x, F.one_hot(y).float()), means)
    (args, params), task = make_params(mprotonet, "kml"), make_task(shots=4)
    order = torch.randperm(12, generator=rng)
    mixed = task._replace(support_x=task.support_x[order], support_y=task.support_y[order])
    torch.testing.assert_close(mprotonet.task_loss(params, mixed, args)[1], mprotonet.task_loss(params, task, args)[1])


def test_distances_agree_with_a_loop():
    x, y = torch.randn(4, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    loop = [[sum((a - b) ** 2 for a, b in zip(p, q)) for q in y.tolist()] for p in x.tolist()]
    torch.testing.assert_close(mprotonet.squared_distances(x, y), torch.tensor(loop, dtype=torch.float64))


def test_prototype_networks_on_hand_made_numbers(monkeypatch):
    """Features on a line: support 0, 2 of class 0 and 5, 7 of class 1; queries 2 and 5. And one step of soft k-means."""
    monkeypatch.setattr(mprotonet, "forward", lambda params, x, stats=None: (x.flatten(1), None))
    points = lambda *values: torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)
    task = Task(points(0, 5, 2, 7), torch.tensor([0, 1, 0, 1]), points(2, 5), torch.tensor([0, 1]), torch.tensor(0))
    args = get_args(mprotonet, "--modulation", "none", "--ways", 2)
    loss, logits, _ = mprotonet.task_loss({}, task, args, evaluate=True)
    assert logits.tolist() == [[-1, -16], [-16, -1]]                            # prototypes 1 and 6
    assert math.isclose(loss, math.log(1 + math.exp(-15)))
    args = get_args(mprotonet, "--modulation", "none", "--ways", 2, "--transductive")
    p = 1 / (1 + math.exp(-15))                                                 # of each query for its own class
    near, far = (0 + 2 + 2 * p + 5 * (1 - p)) / 3, (5 + 7 + 2 * (1 - p) + 5 * p) / 3
    _, logits = mprotonet.task_loss({}, task, args, evaluate=True)
    expected = [[-(q - c) ** 2 for c in (near, far)] for q in (2, 5)]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64))


def test_no_residual_multiplies_by_m_alone():
    for generator in ("outer", "full"):
        _, params = make_params(mprotonet, "kml", "--generator", generator)
        theta, v = mprotonet.group(params, "base"), torch.rand(128).double()
        omega = mprotonet.modulation(params, v)
        for l in (1, 4):
            W, M = theta[f"conv{l}.weight"], omega[f"conv{l}.weight"].reshape(theta[f"conv{l}.weight"].shape)
            torch.testing.assert_close(mprotonet.modulate(theta, omega, 0)[f"conv{l}.weight"], W * M)
            torch.testing.assert_close(mprotonet.modulate(theta, omega)[f"conv{l}.weight"], W + W * M)
    g = {part: params[f"generator.conv4.full.{part}"] for part in ("weight", "bias")}
    torch.testing.assert_close(omega["conv4.weight"], g["weight"] @ v + g["bias"])


def test_whose_steps_no_residual_makes_larger():
    """README's reading: relative to the kernel, without the residual those of the generator, about a hundredfold, not W's."""
    change = {}
    for words in ([], ["--no-residual"]):
        args = get_args(mprotonet, "--device", "cpu", "--image-size", 16, *words)
        params = mprotonet.init_params(args)
        v, base = mprotonet.encode_task(params, make_task(size=16, dtype=torch.float32).support_x), mprotonet.group(params, "base")
        kernel = lambda params, base=base, v=v, args=args: mprotonet.modulate(
            mprotonet.group(params, "base"), mprotonet.modulation(params, v), 0 if args.no_residual else 1)["conv3.weight"]
        here, rng = kernel(params), torch.Generator().manual_seed(0)
        for part in ("generator.", "conv3"):            # a first step of Adam: the learning rate, up or down, for each entry
            moved = {k: w + 1e-3 * (torch.rand(w.shape, generator=rng) - 0.5).sign() if k.startswith(part) else w for k, w in params.items()}
            change[part, bool(words)] = ((kernel(moved) - here).norm() / here.norm()).item()
    assert 40 < change["generator.", True] / change["generator.", False] < 400
    assert 0.7 < change["conv3", True] / change["conv3", False] < 1.4


@pytest.mark.parametrize("module", [kml, mprotonet])
def test_ranks_of_m(module):
    """As a C_out x 9 C_in matrix: rank 1 in layer 1 (one pattern of 27 entries for all filters), rank 3 in layers 2 to 4."""
    _, params = make_params(module, "kml")
    omega = module.modulation(params, torch.rand(128, generator=torch.Generator().manual_seed(0)).double())
    theta = module.group(params, "base")
    ranks = [torch.linalg.matrix_rank(omega[f"conv{l}.weight"].view_as(theta[f"conv{l}.weight"]).flatten(1)).item() for l in module.LAYERS]
    assert ranks == [1, 3, 3, 3]
    first = omega["conv1.weight"].view_as(theta["conv1.weight"])
    torch.testing.assert_close(first / first[:, :1, :1, :1], (first / first[:, :1, :1, :1])[:1].expand_as(first))


def test_batchnorm_does_not_hide_the_size_of_kernels_without_the_residual():
    """W * M at the start: outputs of variance near 1e-6 beside an epsilon of 1e-5. With the residual epsilon is nothing."""
    task, found = make_task(ways=5, shots=5, size=42, dtype=torch.float32), {}
    for name, words in (("residual", []), ("product", ["--no-residual"])):
        args = get_args(mprotonet, *words)
        params = mprotonet.init_params(args)
        omega = mprotonet.modulation(params, mprotonet.encode_task(params, task.support_x))
        modulated = mprotonet.modulate(mprotonet.group(params, "base"), omega, 0 if args.no_residual else 1)
        found[name] = inspect_modulation.output_variances(mprotonet, modulated, task.support_x)
    for variance in found["product"].values():
        assert 1e-8 < variance.median() < 1e-5
        deviation = (variance / (variance + 1e-5)).sqrt()
        assert deviation.median() < 0.6
        assert deviation.max() > 2 * deviation.min(), "a gate for each channel"
    assert all(variance.median() > 1e-4 for variance in found["residual"].values())


def test_the_scale_of_distances_is_a_temperature():
    (args, params), (scaled, _), task = make_params(mprotonet, "none"), make_params(mprotonet, "none", "--distance-scale", 0.25), make_task()
    one, two = mprotonet.task_loss(params, task, args, evaluate=True), mprotonet.task_loss(params, task, scaled, evaluate=True)
    torch.testing.assert_close(two[1], 0.25 * one[1])
    torch.testing.assert_close(two[2], 0.25 * one[2])
    torch.testing.assert_close(two[0], F.cross_entropy(0.25 * one[1], task.query_y))


def test_what_the_query_pass_is_modulated_by(monkeypatch):
    """--embed support, query, constant, and --no-residual as task_loss uses them: the kernels of each pass."""
    original, used = mprotonet.forward, []

    def spy(params, x, stats=None):
        used.append(params["conv1.weight"])
        return original(params, x, stats)
    monkeypatch.setattr(mprotonet, "forward", spy)

    def kernels(task, *words):
        args, params = make_params(mprotonet, "kml", *words)
        used.clear()
        mprotonet.task_loss(params, task, args)
        return params, *used
    task, other = make_task(), make_task(seed=1)
    swapped = task._replace(query_x=other.query_x)
    params, support, query = kernels(task)
    assert torch.equal(support, query)
    assert torch.equal(query, kernels(swapped)[2])
    assert not torch.equal(query, kernels(other)[2])
    _, support, query = kernels(task, "--embed", "query")
    assert not torch.equal(support, query)
    assert not torch.equal(query, kernels(swapped, "--embed", "query")[2])
    assert torch.equal(support, kernels(swapped, "--embed", "query")[1])
    _, support, query = kernels(task, "--embed", "constant")
    assert torch.equal(support, query)
    assert torch.equal(query, kernels(other, "--embed", "constant")[2])
    torch.testing.assert_close(kernels(task, "--no-residual")[1], kernels(task)[1] - params["conv1.weight"])


def test_flags_of_the_released_code(capsys):
    official = vars(get_args(mprotonet, "--official", "--out", "x"))
    spelled = vars(get_args(mprotonet, "--no-residual", "--embed", "query", "--transductive", "--out", "x"))
    assert {k for k in official if official[k] != spelled[k]} == {"official"}
    assert "official" not in mprotonet.identity(get_args(mprotonet, "--official"))
    for words in (["--embed", "query"], ["--transductive"]):
        args, params = make_params(mprotonet, "kml", *words)
        assert len(mprotonet.task_loss(params, make_task(), args, evaluate=True)) == 2, "no inductive logits"
    baseline = get_args(mprotonet, "--modulation", "none", "--official")
    assert (baseline.transductive, baseline.no_residual, baseline.embed) == (True, False, "support")
    for words in ("--modulation none --embed query", "--modulation film --no-residual", "--modulation film --official",
                  "--modulation none --generator full"):
        fails(capsys, functools.partial(mprotonet.get_args, words.split()), "means nothing with --modulation", "kml")


def test_the_outer_product_saves_parameters_152_times():
    args, widths = get_args(mprotonet), (3, 32, 64, 128, 256)
    count = {}
    for args.generator in ("outer", "full"):
        sizes = [mprotonet.generator_sizes(args, l, widths[l - 1], widths[l]) for l in mprotonet.LAYERS]
        count[args.generator] = sum(129 * n for size in sizes for n in size.values())       # 128 weights and a bias each
    assert count["outer"] == 329595
    assert round(count["full"] / count["outer"]) == 152
    made = mprotonet.init_params(get_args(mprotonet, "--generator", "full", "--channels", 4))
    sizes = [mprotonet.generator_sizes(args, l, c, 4 * 2 ** (l - 1)) for l, c in zip((1, 2, 3, 4), (3, 4, 8, 16))]
    assert sum(w.numel() for w in mprotonet.group(made, "generator").values()) == sum(129 * n for s in sizes for n in s.values())


def test_initial_scale_changes_no_prediction_and_its_share_of_a_step():
    """BatchNorm cancels the scale of a kernel, up to its 1e-5; what it leaves is a larger gradient: the idea of --init-scale."""
    (args, params), (_, small) = make_params(mprotonet, "none"), make_params(mprotonet, "none", "--init-scale", 0.5)
    one, two = (mprotonet.task_loss(p, make_task(), args) for p in (params, small))
    torch.testing.assert_close(one[1], two[1], rtol=5e-3, atol=5e-2)
    one[0].backward()
    two[0].backward()
    torch.testing.assert_close(small["conv2.weight"], 0.5 * params["conv2.weight"])
    torch.testing.assert_close(small["conv2.weight"].grad, 2 * params["conv2.weight"].grad, rtol=0.1, atol=1e-2)


# ----------------------------------------------------------------------------------------------------------- ModGrad

def make_modgrad(algorithm, *words, dtype=torch.float64):
    args = get_args(modgrad, "--algorithm", algorithm, "--channels", 4, "--ways", 3, "--image-size", 16, "--device", "cpu", "--context", 6, *words)
    return args, {k: w.to(dtype).requires_grad_() for k, w in modgrad.init_params(args).items()}


def test_modgrad_parameter_counts():
    """FACTS 5, the paper's shapes; and those of the deep networks, known from their papers' implementations."""
    count = lambda parts: sum(w.numel() for w in parts.values())
    params = modgrad.init_params(get_args(modgrad))
    assert count(modgrad.group(params, "base")) == 121093
    assert count(modgrad.group(params, "generator")) == 1056926
    assert {k.rsplit(".", 3)[0] for k in modgrad.group(params, "generator")} == {"conv3", "conv4"}
    for backbone, size, without_head in (("resnet34", 64, 21284672), ("wrn28-10", 32, 36472784)):
        args = get_args(modgrad, "--backbone", backbone, "--image-size", size, "--algorithm", "maml", "--adapt", "last two")
        params = modgrad.init_params(args)
        assert sum(w.numel() for k, w in params.items() if not k.startswith("head")) == without_head
        assert args.adapt == {"resnet34": ["stage4.block3.conv1", "stage4.block3.conv2"], "wrn28-10": ["stage3.block4.conv1", "stage3.block4.conv2"]}[backbone]
        with torch.no_grad():
            assert modgrad.run_blocks(params, torch.rand(2, 3, size, size), modgrad.Norm(), args).shape == (2, 5)


def drawn_alike(ours, theirs):
    """Two sets of draws of one distribution: the largest distance of their cumulative shares (Kolmogorov, Smirnov)."""
    ours, theirs = ours.detach().flatten().double().sort()[0], theirs.detach().flatten().double().sort()[0]
    at = torch.cat([ours, theirs])
    shares = [torch.searchsorted(x, at, right=True) / len(x) for x in (ours, theirs)]
    limit = 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))           # exceeded once in 1,000 draws; the seeds are fixed
    return (shares[0] - shares[1]).abs().max() < limit


def test_modgrads_conv4_starts_as_pytorchs_own_layers():
    """The released code leaves its layers as PyTorch makes them."""
    params = modgrad.init_params(get_args(modgrad, "--seed", 1))
    torch.manual_seed(0)
    for l, c_in in ((1, 3), (2, 64), (3, 64), (4, 64)):
        weights, biases = params[f"conv{l}.weight"], params[f"conv{l}.bias"]
        layers = [torch.nn.Conv2d(c_in, 64, 3, padding=1) for _ in range(20)]
        assert drawn_alike(weights, torch.cat([layer.weight for layer in layers]))
        assert drawn_alike(biases, torch.cat([layer.bias for layer in layers]))
        he = torch.randn(weights.shape) * math.sqrt(2 / (9 * c_in))
        assert not drawn_alike(weights, he), "or this would not tell"
    heads = [torch.nn.Linear(1600, 5) for _ in range(20)]
    assert drawn_alike(params["head.weight"], torch.cat([head.weight for head in heads]))


@pytest.mark.parametrize("backbone", ["resnet34", "wrn28-10"])
def test_the_deep_networks_start_as_their_authors_code(backbone):
    """Normal kernels of variance 2 / (C_out * places), He's rule by outputs; no biases."""
    args = get_args(modgrad, "--backbone", backbone, "--algorithm", "maml", "--adapt", "last two")
    params, seen = modgrad.init_params(args), 0
    torch.manual_seed(0)
    for layer, shape in modgrad.layer_shapes(args).items():
        if len(shape) == 4 and layer.startswith(("stem", "stage1.block1", "stage2.block1")):
            wanted = torch.nn.init.kaiming_normal_(torch.empty(shape), mode="fan_out", nonlinearity="relu")
            assert drawn_alike(params[f"{layer}.weight"], wanted), layer
            assert f"{layer}.bias" not in params
            seen += 1
    assert seen >= 5


def test_cavias_film_is_gamma_x_plus_beta_and_starts_as_in_its_code():
    args = get_args(modgrad, "--algorithm", "cavia")
    params = modgrad.init_params(args)
    weight, bias = params["generator.film.weight"], params["generator.film.bias"]
    torch.manual_seed(0)
    wanted = torch.nn.init.kaiming_uniform_(torch.empty(2000, 100), nonlinearity="linear")
    assert drawn_alike(weight, wanted)
    assert drawn_alike(bias, torch.nn.Linear(100, 2000).bias)
    gamma, _ = bias.chunk(2)                            # the context starts at 0
    assert 0.09 < gamma.abs().max() <= 0.1
    x, norm = torch.randn(2, 64, 8, 8), modgrad.Norm()
    film = {"conv3.film": torch.cat([torch.full((64,), 0.5), torch.full((64,), -0.25)])}
    plain = {k: w for k, w in params.items() if k.startswith(("conv3", "norm3"))}
    normalised = norm(plain, "norm3", modgrad.conv(plain, "conv3", x))
    wanted = F.relu(F.max_pool2d(0.5 * normalised - 0.25, 2))
    torch.testing.assert_close(modgrad.conv4_block(plain | film, "conv3", x, modgrad.Norm()), wanted)


def relative_distance(one, two):
    """Norm of the difference of two dicts of tensors, relative to the norm of the second."""
    difference = math.hypot(*((one[k] - two[k]).norm() for k in two))
    return difference / math.hypot(*(w.norm() for w in two.values()))


def test_start_at_one_starts_as_maml_on_the_same_layers(capsys):
    """The first inner step is MAML's to 5 %; without the flag it is next to nothing, as in the released code."""
    words = ["--image-size", 28, "--shots", 5, "--steps", 1, "--alpha", 0.1, "--device", "cpu"]
    task = make_task(ways=5, shots=5, size=28, dtype=torch.float32)
    steps = {}
    for name, more in (("maml", ["--algorithm", "maml", "--adapt", "conv3", "conv4"]), ("one", ["--start-at-one"]), ("zero", [])):
        args = get_args(modgrad, *words, *more)
        params = modgrad.init_params(args)
        fast = {k: params[k] for k in modgrad.adapted_keys(args, params)}

        def loss(fast, params=params, args=args):
            logits = modgrad.run_blocks(params | fast, task.support_x, modgrad.Norm(), args)
            return F.cross_entropy(logits, task.support_y)
        after = modgrad.STEPS[args.algorithm](params, fast, loss, args, lambda gradient: gradient)
        steps[name] = {k: (after[k] - fast[k]).detach() for k in fast if "weight" in k}     # a bias learns nothing before BatchNorm
    assert relative_distance(steps["one"], steps["maml"]) < 0.05
    assert relative_distance(steps["zero"], steps["maml"]) > 0.95
    fails(capsys, lambda: get_args(modgrad, "--start-at-one", "--algorithm", "maml"), "M is ModGrad's")


def test_modulation_of_the_gradient_by_hand():
    """Eq. 6 to 8: with u = 1 the softmax is 1 and M is one outer product; with u = 2 a mixture of columns."""
    below = []
    for rank in (1, 2):
        _, params = make_modgrad("modgrad", "--rank", rank)
        v = torch.randn(6, generator=torch.Generator().manual_seed(rank)).double()

        def column(name, params=params, v=v, rank=rank):
            hidden = (params[f"{name}.1.weight"] @ v + params[f"{name}.1.bias"]).clamp(min=0)
            out = params[f"{name}.2.weight"] @ hidden + params[f"{name}.2.bias"]
            a, h = out[:rank].exp() / out[:rank].exp().sum(), out[rank:].reshape(-1, rank)
            return sum(a[i] * h[:, i] for i in range(rank))
        rows, cols, bias = (column(f"generator.conv3.{part}") for part in ("rows", "cols", "bias"))
        M = modgrad.modulation(params, v, {k: params[k] for k in ("conv3.weight", "conv3.bias")})
        expected = torch.stack([r * cols for r in rows]).clamp(min=0)
        torch.testing.assert_close(M["conv3.weight"].reshape(12, 12), expected)
        torch.testing.assert_close(M["conv3.bias"], bias)                      # ReLU is for the outer product
        below.append(((bias < 0).any() and (expected == 0).any()).item())
    assert any(below), "or this would not tell"


def test_the_rivals_are_maml_where_they_should_be():
    """M = 1 is MAML on the same layers; so are Meta-SGD with equal rates, on all, and T-Net with identity transforms."""
    task = make_task()
    for steps in (1, 2):
        words = ["--steps", steps, "--alpha", 0.1]
        args, params = make_modgrad("maml", *words, "--adapt", "conv3", "conv4")
        ours, cells = make_modgrad("modgrad", *words)
        for k, w in cells.items():
            if k.startswith("generator."):
                w.data.fill_(1.0 if k.endswith("2.bias") else 0.0)
        expected, found = (modgrad.task_loss(p, task, a, evaluate=True) for a, p in ((args, params), (ours, cells)))
        for one, two in zip(expected, found):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
        args, params = make_modgrad("maml", *words)
        expected = modgrad.task_loss(params, task, args)
        for rival in ("metasgd", "tnet"):
            args, params = make_modgrad(rival, *words)
            torch.testing.assert_close(modgrad.task_loss(params, task, args), expected, rtol=1e-6, atol=1e-8)     # rates are float32


def test_context_is_the_gradient_of_the_loss_after_a_trial_step(monkeypatch):
    """Eq. 9, against central differences in float64."""
    args, params = make_modgrad("modgrad")
    task, seen, original = make_task(), [], modgrad.modulation
    monkeypatch.setattr(modgrad, "modulation", lambda params, v, like: seen.append(v) or original(params, v, like))
    modgrad.task_loss(params, task, args)
    v = seen[-1].detach()                               # the context of the step that is taken
    fast = {k: params[k].detach() for k in modgrad.adapted_keys(args, params)}

    def loss(fast):
        logits = modgrad.run_blocks(params | fast, modgrad.normalise(task.support_x), modgrad.Norm(), args)
        return F.cross_entropy(logits, task.support_y)
    gradient = torch.func.grad(loss)(fast)

    def after(v):
        M = original(params, v, fast)
        return loss({k: fast[k] - args.alpha * M[k] * gradient[k] for k in fast}).item()
    for i in range(6):
        e = 1e-6 * torch.eye(6).double()[i]
        assert math.isclose(v[i], -(after(e) - after(-e)) / 2e-6, rel_tol=1e-4, abs_tol=1e-9)


@pytest.mark.parametrize("algorithm", modgrad.METHODS)
@pytest.mark.parametrize("vectorise", [False, True], ids=["loop", "vmap"])
def test_meta_gradients_of_modgrad_and_its_rivals(algorithm, vectorise):
    args, params = make_modgrad(algorithm, "--steps", 2, "--alpha", 0.1)
    batch, rng = make_task(seed=3, tasks=2), torch.Generator().manual_seed(3)
    modgrad.run_tasks(params, batch, args, vectorise)
    for part in ("base", "generator"):
        direction = {k: torch.randn(w.shape, generator=rng).double() for k, w in params.items()
                     if k.startswith("generator.") == (part == "generator")}
        if not direction:
            continue

        def loss(step, direction=direction):
            moved = {k: w.detach() + step * direction.get(k, 0) for k, w in params.items()}
            return np.mean([modgrad.task_loss(moved, Task(*(x[i] for x in batch)), args)[0].item() for i in range(2)])
        expected = (loss(1e-7) - loss(-1e-7)) / 2e-7
        found = sum((params[k].grad * d).sum().item() for k, d in direction.items() if params[k].grad is not None)
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-7), part


def test_only_what_is_named_moves(monkeypatch):
    task, seen, original = make_task(), [], modgrad.run_blocks
    monkeypatch.setattr(modgrad, "run_blocks", lambda params, *rest: seen.append(params) or original(params, *rest))
    for words, moves in ((["modgrad"], {"conv3", "conv4"}), (["modgrad", "--adapt", "conv2", "head"], {"conv2", "head"}),
                         (["maml", "--adapt", "head"], {"head"}), (["cavia"], set()),
                         (["maml"], {f"{x}{l}" for x in ("conv", "norm") for l in (1, 2, 3, 4)} | {"head"})):
        args, params = make_modgrad(*words)
        modgrad.task_loss(params, task, args)
        moved = {k for k in modgrad.group(params, "base") if not torch.equal(seen[-1][k], params[k])}
        assert moved <= {f"{layer}.{part}" for layer in moves for part in ("weight", "bias", "scale", "shift")}
        assert {k.split(".")[0] for k in moved} == moves
        assert all(torch.equal(seen[-1][k], w) for k, w in params.items() if k.startswith("generator."))


@pytest.mark.parametrize("algorithm", modgrad.METHODS)
def test_noise_of_level_zero_changes_nothing_and_other_noise_does(algorithm):
    args, params = make_modgrad(algorithm)
    task = make_task()
    like = {"context": torch.zeros(6).double()} if algorithm == "cavia" else {k: params[k] for k in modgrad.adapted_keys(args, params)}
    none = modgrad.task_loss(params, task, args)[1]
    assert torch.equal(none, modgrad.task_loss(params, task, args, noise={k: torch.zeros_like(w) for k, w in like.items()})[1])
    assert not torch.allclose(none, modgrad.task_loss(params, task, args, noise={k: torch.ones_like(w) for k, w in like.items()})[1])


@pytest.mark.parametrize("algorithm", modgrad.METHODS)
def test_modgrad_inductive_predictions_do_not_know_the_other_queries(algorithm):
    args, params = make_modgrad(algorithm)
    task, keep = make_task(), torch.tensor([0, 4])
    _, paper, inductive = modgrad.task_loss(params, task, args, evaluate=True)
    _, p, i = modgrad.task_loss(params, task._replace(query_x=task.query_x[keep], query_y=task.query_y[keep]), args, evaluate=True)
    torch.testing.assert_close(i, inductive[keep], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(p, paper[keep], rtol=1e-3)


@pytest.mark.parametrize("algorithm", ["modgrad", "cavia"])
def test_a_modgrad_run_from_start_to_end_and_its_continuation(algorithm, tmp_path, cache, monkeypatch, capsys):
    words = [*TINY, "--image-size", 16, "--algorithm", algorithm, "--context", 5, "--cache-dir", cache, "--modes", "miniimagenet"]
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "whole")
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["method"] == modgrad.METHODS[algorithm]
    assert result["parameters"]["generator"] > 0
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 3)
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"] for name in ("whole", "part"))
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    for bad, said in (("--val-every 75", "a multiple"), ("--log-every 0", "--log-every 0"), ("--adapt conv9", "choose from all"), ("--adapt all", "a cell is for kernels"), ("--image-size 8", "--image-size 8")):
        fails(capsys, functools.partial(modgrad.get_args, bad.split()), said)
    fails(capsys, lambda: modgrad.get_args(["--algorithm", "cavia", "--backbone", "resnet34"]), "choose conv4")


def test_parameters_best_on_validation_stand_beside_the_last(tmp_path, cache, monkeypatch, capsys):
    words = [*TINY, "--image-size", 16, "--algorithm", "maml", "--cache-dir", cache, "--iterations", 12, "--val-tasks", 10,
             "--test-tasks", 20, "--lr", 0.05, "--out", tmp_path / "run"]
    call(modgrad, monkeypatch, *words, "--val-every", 2, "--keep-every", 4)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    validated = {line["iteration"]: line["validation"]["paper"]["overall"]["mean"] for line in log}
    kept = {t: validated[t] for t in (4, 8, 12)}
    best = result["best_on_validation"]
    assert best["validation"] == max(kept.values())
    assert best["iteration"] == min(t for t, x in kept.items() if x == max(kept.values()))
    args = get_args(modgrad, *words)
    params = torch.load(tmp_path / "run" / f"params-{best['iteration']}.pt", weights_only=True)
    assert modgrad.evaluate(params, Episodes.of(args, "test"), 20, args).tolist() == [best["per_task"], best["per_task_inductive"]]
    assert best["accuracy"] == modgrad.summary(np.array(best["per_task"]), args.modes)
    shown = capsys.readouterr().out
    assert f"best on val.    {best['accuracy']['overall']['mean']:.2f}" in shown
    for file in (tmp_path / "run").glob("params-*.pt"):
        file.unlink()
    assert modgrad.best_on_validation(Episodes.of(args, "test"), args) is None


def test_augmentation(tmp_path, cache, monkeypatch):
    args = get_args(modgrad, "--augment")
    ramp = torch.linspace(0.4, 0.6, 32).expand(2, 15, 3, 32, 32)
    batch = Task(ramp, None, ramp[:, :5], None, None)
    assert modgrad.augment(batch, 7, get_args(modgrad)) is batch
    one, two = modgrad.augment(batch, 7, args), modgrad.augment(batch, 7, args)
    assert torch.equal(one.support_x, two.support_x), "a function of seed and number: a run continued is the same run"
    assert not torch.equal(one.support_x, modgrad.augment(batch, 8, args).support_x)
    assert not torch.equal(one.support_x, modgrad.augment(batch, 7, get_args(modgrad, "--augment", "--seed", 1)).support_x)
    x = one.support_x.flatten(0, 1)
    assert x.min() >= 0 and x.max() <= 1
    slope = (x[..., 2:-2, 3:-2] - x[..., 2:-2, 2:-3]).flatten(1)
    rising = (slope > 0).all(1)
    assert (rising | (slope < 0).all(1)).all() and 0 < rising.sum() < len(x), "mirrored or not, a ramp stays a ramp"
    steep = slope.abs().mean(1) / (0.2 / 31)
    assert steep.min() > 0.6 * 0.6 * 0.6 * 0.99 and steep.max() < 1.4 * 1.4 * 1.01      # crop, contrast, brightness
    y, x = torch.meshgrid(torch.linspace(0.4, 0.6, 32), torch.linspace(0.4, 0.6, 32), indexing="ij")
    colours = torch.stack([y, x, 0.5 * torch.ones_like(x)]).expand(1, 40, 3, 32, 32)                 # red falls, green goes right
    made = modgrad.augment(Task(colours, None, colours[:, :1], None, None), 3, args).support_x[0][..., 4:-4, 4:-4]
    red, green, blue = made.unbind(1)
    own = red - blue, green - blue                      # what the mean of a pixel's colours does not move
    down = [(c[:, 1:] - c[:, :-1]).mean((1, 2)) for c in own]
    right = [(c[:, :, 1:] - c[:, :, :-1]).mean((1, 2)) for c in own]
    assert (down[0] > 0).all() and down[1].abs().max() < 1e-5, "never upside down"
    assert right[0].abs().max() < 1e-5 and 0 < (right[1] > 0).sum() < 40
    torch.testing.assert_close(down[0], right[1].abs(), rtol=1e-3, atol=1e-5)                        # the same crop both ways
    heights, sides = own[0].mean((1, 2)), own[1].mean((1, 2))
    assert heights.std() > 0.005 and sides.std() > 0.005 and abs(np.corrcoef(heights, sides)[0, 1]) < 0.6, "places of the crop, each way"
    bright, slope = made.mean((1, 2, 3)), down[0] / (0.2 / 31)
    assert (slope / bright).std() > 0.1 * (slope / bright).mean(), "contrast and saturation, not brightness alone"
    grey = modgrad.augment(Task(torch.full((1, 9, 3, 8, 8), 0.5), None, torch.full((1, 1, 3, 8, 8), 0.5), None, None), 0, args).support_x[0]
    assert (grey - grey[:, :1, :1, :1]).abs().max() < 1e-5, "no edges, no colour appear"
    assert 0.29 < grey.min() < 0.45, "darker"
    assert 0.55 < grey.max() < 0.71, "brighter"
    words = [*TINY, "--image-size", 16, "--algorithm", "maml", "--steps", 1, "--augment", "--cache-dir", cache]
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "whole")
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 3)
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"] for name in ("whole", "part"))
    assert all(torch.equal(w, two[k]) for k, w in one.items())


def test_spectrum_and_length_of_a_step():
    """Against numpy, and M = 1: there modulation lets everything through, and a step is as long as MAML's."""
    class Some:
        def tasks(self, first, count):
            return make_task(seed=first, tasks=count)
    args, params = make_modgrad("modgrad")
    for k, w in params.items():
        if k.startswith("generator."):
            w.data.fill_(1.0 if k.endswith("2.bias") else 0.0)
    plain, same = make_modgrad("maml", "--steps", 1, "--alpha", 0.1, "--adapt", "conv3", "conv4")
    steps, of_maml = (inspect_gradients.first_steps(p, a, Some(), 3) for a, p in ((args, params), (plain, same)))
    assert args.algorithm in modgrad.STEPS and modgrad.STEPS["modgrad"] is modgrad.modgrad_step
    found = inspect_gradients.spectrum(steps)
    assert set(found) == {"conv3.weight", "conv4.weight"}
    for k, x in found.items():
        np.testing.assert_allclose(x["raw"], x["modulated"], rtol=1e-9)
        values = [np.linalg.svd(gradient[k].detach().numpy().reshape(4, 36), compute_uv=False) for gradient, _ in steps]
        np.testing.assert_allclose(x["raw"], np.mean([v / v[0] for v in values], 0), rtol=1e-9)
        ranks = [1 + next(i for i in range(4) if (v[:i + 1] ** 2).sum() >= 0.9 * (v ** 2).sum()) for v in values]
        assert x["rank raw"] == x["rank modulated"] == np.mean(ranks)
    for (gradient, change), (_, maml) in zip(steps, of_maml):
        for k, w in change.items():
            torch.testing.assert_close(w, -0.1 * gradient[k])
            torch.testing.assert_close(w, maml[k])
    length = np.median([inspect_gradients.norm(c) for _, c in steps])
    assert math.isclose(inspect_gradients.step_length(same, plain, Some(), 3), length, rel_tol=1e-9)


def test_noise_on_gradients():
    args, params = make_modgrad("maml", "--adapt", "conv3", dtype=torch.float32)
    like = inspect_gradients.adapted(params, args)
    assert set(like) == {"conv3.weight", "conv3.bias"}
    small, large = (torch.cat([w.flatten() for w in inspect_gradients.draw_noise({"w": torch.zeros(10 ** 5)}, sigma, 3).values()]) for sigma in (0.1, 0.2))
    torch.testing.assert_close(large, 2 * small)                        # levels differ in size alone
    assert math.isclose(small.std(), 0.1, rel_tol=0.02), "SIGMA is a standard deviation"
    assert not torch.equal(small, inspect_gradients.draw_noise({"w": torch.zeros(10 ** 5)}, 0.1, 4)["w"]), "each task has its own"


def test_inspect_gradients_from_end_to_end(tmp_path, cache, monkeypatch, capsys):
    for name, words in (("modgrad", []), ("maml", ["--steps", 2]), ("cavia", [])):
        call(modgrad, monkeypatch, *TINY, "--channels", 8, "--image-size", 16, "--test-tasks", 10, "--algorithm", name, "--context", 5, *words,
             "--cache-dir", cache, "--out", tmp_path / name)
    call(modgrad, monkeypatch, *TINY, "--image-size", 16, "--test-tasks", 2, "--shots", 2, "--cache-dir", cache, "--out", tmp_path / "other")
    runs = [str(tmp_path / name) for name in ("modgrad", "maml", "cavia")]
    words = ["--gradient-noise", "0.5", "50", "--tasks", "10", "--step-tasks", "2", "--cache-dir", cache, "--out", str(tmp_path / "out")]
    done = here("inspect_gradients.py", *runs, *words, "--spectrum")
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    found = json.loads((tmp_path / "out" / "gradients.json").read_text())["found"]
    assert [row["run"] for row in found] == ["ModGrad", "MAML", "MAML, step scaled", "CAVIA"]
    for name, row in zip(("modgrad", "maml", None, "cavia"), found):
        assert list(row["noise"]) == ["0.0", "0.5", "50.0"]
        assert row["noise"]["0.0"]["change"]["overall"] == {"mean": 0, "ci95": 0}
        if name:                                        # without noise: what modgrad.py itself has found
            result = json.loads((tmp_path / name / "result.json").read_text())
            assert row["noise"]["0.0"]["per_task"] == result["per_task"]
            assert row["tasks_sha256"] == result["tasks_sha256"]
        score, change = row["noise"]["50.0"]["accuracy"]["overall"], row["noise"]["50.0"]["change"]["overall"]
        assert f"| {score['mean']:.2f} ± {score['ci95']:.2f} | {change['mean']:+.2f} ± {change['ci95']:.2f} |" in done.stdout
    assert any(row["noise"]["50.0"]["per_task"] != row["noise"]["0.0"]["per_task"] for row in found)
    ours, maml, scaled, cavia = found
    assert math.isclose(scaled["alpha"] / maml["alpha"], ours["step_length"] / maml["step_length"], rel_tol=1e-9)
    assert (cavia["adapted"], "spectrum" in cavia) == (5, False)
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"gradient-noise.png", "gradient-spectrum.png"}
    for bad, said in (([runs[0]], "nothing to do"), ([tmp_path / "none", "--spectrum"], "there is no"), ([*runs, tmp_path / "other", "--spectrum"], "the runs differ"),
                      ([runs[0], "--gradient-noise", "-1"], "from 0 on"), ([runs[0], "--gradient-noise", "0"], "above it"), ([runs[0], "--spectrum", "--step-tasks", "1"], "--step-tasks")):
        fails(capsys, functools.partial(call, inspect_gradients, monkeypatch, *bad), said)


# ------------------------------------------------------------------------------------------------------- completion

def make_completion(algorithm, *words, dtype=torch.float64):
    args = get_args(modgrad_completion, "--algorithm", algorithm, "--hidden", 6, "--context", 5, "--image-size", 5, "--device", "cpu", *words)
    return args, {k: w.to(dtype).requires_grad_() for k, w in modgrad_completion.init_params(args).items()}


def make_image_task(k=7, size=5, tasks=None, seed=0):
    rng, T = torch.Generator().manual_seed(seed), tasks or 1
    places = torch.cartesian_prod(*[torch.arange(size) / size] * 2).double()
    colours, seen = torch.rand(T, size * size, 3, generator=rng).double(), torch.randperm(size * size, generator=rng)[:k]
    batch = Task(places[seen].expand(T, -1, -1), colours[:, seen], places.expand(T, -1, -1), colours, torch.zeros(T))
    return batch if tasks else Task(*(x[0] for x in batch))


def test_completions(cache):
    made = {}
    for order in ("random", "ordered"):
        words = ["--pixels", 9, "--order", order, "--image-size", 12, "--synthetic", "--cache-dir", cache]
        args = get_args(modgrad_completion, *words)
        made[order] = test = Completions.of(args, "test")
        batch = test.tasks(250, 12)                                     # across the border of two blocks
        assert [x.shape for x in batch[:4]] == [(12, 9, 2), (12, 9, 3), (12, 144, 2), (12, 144, 3)]
        at = (batch.support_x * 12).round().long()
        assert (batch.support_x >= 0).all() and (batch.support_x < 1).all()
        rows = at[..., 0] * 12 + at[..., 1]
        assert all(len(set(row.tolist())) == 9 for row in rows)
        for i in range(12):
            torch.testing.assert_close(batch.support_y[i], batch.query_y[i, rows[i]])
            assert (batch.query_y[i] * 255).round().byte().equal(test.images[test.order[250 + i]])
        assert torch.equal(test.tasks(255, 3).support_x, batch.support_x[5:8]), "a task does not depend on how many are asked for"
        if order == "ordered":
            assert all(row.tolist() == list(range(9)) for row in rows)
        else:
            assert len({tuple(row.tolist()) for row in rows}) == 12
        assert sorted(test.indices(0, len(test.images))[0]) == list(range(len(test.images))), "each image once"
        assert len(set(test.order[:20] // data.SYNTHETIC_IMAGES)) > 8, "of all classes"
        assert test.sha256(40) == Completions.of(get_args(modgrad_completion, *words, "--algorithm", "cnp", "--seed", 5), "test").sha256(40)
    assert made["random"].sha256(40) != made["ordered"].sha256(40)
    args = get_args(modgrad_completion, *words, "--order", "random")
    one, two = (Completions.of(argparse.Namespace(**vars(args) | {"seed": seed}), "train") for seed in (0, 1))
    assert not np.array_equal(one.indices(0, 50)[0], two.indices(0, 50)[0])
    drawn = one.indices(0, 20000)[0]
    assert 0 <= drawn.min() < 5 and len(one.images) - 5 <= drawn.max() < len(one.images)
    assert np.bincount(one.indices(0, 200)[1].reshape(-1), minlength=144).min() > 0, "every pixel is context at times"


def test_completions_bad_input(cache, capsys):
    words = ["--image-size", 4, "--synthetic", "--cache-dir", cache]
    fails(capsys, lambda: Completions.of(get_args(modgrad_completion, *words, "--pixels", 17), "test"), "has 16; give")
    for split in ("test", "val"):
        fails(capsys, lambda split=split: Completions.of(get_args(modgrad_completion, *words, f"--{split}-tasks", 10 ** 4), split), f"--{split}-tasks", "at most")
    assert Completions.of(get_args(modgrad_completion, *words), "test").images.shape[0] == get_args(modgrad_completion, "--synthetic").test_tasks
    for bad, said in (("--adapt fc9", "choose from all"), ("--algorithm cnp --adapt fc5", "leave --adapt out"), ("--algorithm cnp --steps 2", "no inner steps"), ("--steps 0", "--steps 0"),
                      ("--picture x.png", "belong together"), ("--algorithm lstm", "--algorithm"), ("--pixels 0", "--pixels 0")):
        fails(capsys, functools.partial(modgrad_completion.get_args, bad.split()), said)


def test_inner_steps_have_one_text():
    for name in ("maml_step", "modgrad_step", "cell", "modulation"):
        assert inspect.getsource(getattr(modgrad, name)) == inspect.getsource(getattr(modgrad_completion, name))
        assert inspect.getsource(getattr(modgrad, name)) == inspect.getsource(getattr(modgrad_multishot, name))
        assert inspect.getsource(getattr(modgrad, name)) == inspect.getsource(getattr(modgrad_rl, name))
    for name in ("Norm", "linear", "head_block", "group"):
        assert inspect.getsource(getattr(modgrad, name)) == inspect.getsource(getattr(modgrad_multishot, name))
    for name in ("load", "train", "main"):              # these take other samplers and measure other things, and no more
        one, two = (inspect.getsource(getattr(module, name)).split("\n") for module in (modgrad_completion, modgrad_multishot))
        changes = [c for c in difflib.SequenceMatcher(None, one, two, autojunk=False).get_opcodes() if c[0] != "equal"]
        assert sum(c[4] - c[3] for c in changes) <= {"load": 0, "train": 10, "main": 8}[name], name


@pytest.mark.parametrize("algorithm", modgrad_completion.METHODS)
def test_meta_gradients_of_completion(algorithm):
    args, params = make_completion(algorithm, *["--steps", 2] * (algorithm in ("maml", "cavia")))
    batch, rng = make_image_task(tasks=2), torch.Generator().manual_seed(3)
    losses = modgrad_completion.run_tasks(params, batch, args, train=True)
    single = [modgrad_completion.task_loss(params, Task(*(x[i] for x in batch)), args)[0] for i in range(2)]
    torch.testing.assert_close(losses, torch.stack(single).detach())
    for part in modgrad_completion.PARTS:
        direction = {k: torch.randn(w.shape, generator=rng).double() for k, w in params.items()
                     if k in modgrad_completion.group(params, "base") and part == "base" or k.startswith(f"{part}.")}
        assert bool(direction) == (part == "base" or (part == "encoder") == (algorithm == "cnp") and algorithm in ("cnp", "modgrad"))

        def loss(step, direction=direction):
            moved = {k: w.detach() + step * direction.get(k, 0) for k, w in params.items()}
            return modgrad_completion.run_tasks(moved, batch, args).mean().item()
        found = sum((params[k].grad * d).sum().item() for k, d in direction.items())
        assert math.isclose(found, (loss(1e-7) - loss(-1e-7)) / 2e-7, rel_tol=1e-4, abs_tol=1e-8), part


def test_modulation_of_one_is_maml_on_one_layer():
    ours, cells = make_completion("modgrad")
    args, params = make_completion("maml", "--steps", 1, "--adapt", "fc5")
    assert {k.split(".")[1] for k in cells if k.startswith("generator.")} == {"fc5"}
    for k, w in cells.items():
        if k.startswith("generator."):
            w.data.fill_(1.0 if k.endswith("2.bias") else 0.0)
    one, two = (modgrad_completion.task_loss(p, make_image_task(), a)[1] for a, p in ((ours, cells), (args, params)))
    torch.testing.assert_close(one, two)
    plain = modgrad_completion.forward(params, make_image_task().query_x)
    assert not torch.allclose(one, plain)


def first_step(module, args, params, loss):
    """What the first inner step of a script's algorithm adds to each weight that it adapts."""
    fast = {k: params[k] for k in module.adapted_keys(args, params)}
    after = module.STEPS[args.algorithm](params, fast, loss, args, lambda gradient: gradient)
    return {k: (after[k] - fast[k]).detach() for k in fast}


def test_completion_starts_at_one_as_maml_on_the_same_layer():
    task, steps = make_image_task(k=50, size=16), {}
    task = Task(*(x.float() if x.is_floating_point() else x for x in task))
    for name, words in (("maml", "--algorithm maml --adapt fc5 --steps 1"), ("one", "--start-at-one"), ("zero", "")):
        args = get_args(modgrad_completion, "--device", "cpu", *words.split())
        params = modgrad_completion.init_params(args)

        def loss(fast, params=params):
            return F.mse_loss(modgrad_completion.forward(params | fast, task.support_x), task.support_y)
        steps[name] = first_step(modgrad_completion, args, params, loss)
    assert relative_distance(steps["one"], steps["maml"]) < 0.05
    assert relative_distance(steps["zero"], steps["maml"]) > 0.95


def test_the_cnp_does_not_see_the_order_of_its_context():
    args, params = make_completion("cnp")
    task, order = make_image_task(), torch.randperm(7)
    other = task._replace(support_x=task.support_x[order], support_y=task.support_y[order])
    torch.testing.assert_close(modgrad_completion.task_loss(params, other, args)[1], modgrad_completion.task_loss(params, task, args)[1])
    fewer = task._replace(support_x=task.support_x[1:], support_y=task.support_y[1:])
    assert not torch.allclose(modgrad_completion.task_loss(params, fewer, args)[1], modgrad_completion.task_loss(params, task, args)[1])


def test_all_pixels_and_many_steps_reproduce_an_image(cache):
    words = ["--image-size", 6, "--pixels", 36, "--synthetic", "--cache-dir", cache, "--hidden", 64]
    args = get_args(modgrad_completion, "--algorithm", "maml", "--steps", 1200, "--first-order", "--alpha", 1, *words)
    task = Task(*(x[0] for x in Completions.of(args, "test").tasks(0, 1)))
    params = modgrad_completion.init_params(args)
    with torch.no_grad():
        loss, colours = modgrad_completion.task_loss(params, task, args)
    assert loss < 0.1 * task.query_y.var(0, correction=0).mean(), "a tenth of what the mean colour leaves"
    torch.testing.assert_close(loss, (colours - task.query_y).square().mean())


def test_a_completion_run_from_start_to_end(tmp_path, cache, monkeypatch, capsys):
    words = ["--synthetic", "--image-size", 8, "--hidden", 8, "--context", 6, "--meta-batch", 3, "--iterations", 6, "--test-tasks", 8,
             "--val-tasks", 5, "--val-every", 2, "--log-every", 2, "--cache-dir", cache]
    runs = []
    for algorithm in modgrad_completion.METHODS:
        call(modgrad_completion, monkeypatch, *words, "--algorithm", algorithm, "--out", tmp_path / algorithm)
        runs.append(tmp_path / algorithm)
        result = json.loads((runs[-1] / "result.json").read_text())
        assert result["error"] == modgrad_completion.summary(np.array(result["per_task"]))
        shown = capsys.readouterr().out
        assert f"{result['error']['mean']:.4f} +- {result['error']['ci95']:.4f}" in shown
        assert "SYNTHETIC" in shown and "Table 3" not in shown
    assert len({json.loads((run / "result.json").read_text())["tasks_sha256"] for run in runs}) == 1, "the same images for all"
    call(modgrad_completion, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 3)
    call(modgrad_completion, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"] for name in ("modgrad", "part"))
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    call(modgrad_completion, monkeypatch, *words, "--picture", tmp_path / "faces.png", "--runs", *runs)
    image = Image.open(tmp_path / "faces.png")
    assert image.size == (6 * 100, 8 * 100 + 46)
    for bad, said in ((tmp_path / "none", "has no checkpoint"), (tmp_path, "has no checkpoint")):
        fails(capsys, functools.partial(call, modgrad_completion, monkeypatch, "--picture", tmp_path / "x.png", "--runs", bad), said)
    assert not (tmp_path / "x.png").exists()
    done = here("tables.py", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("### Image completion"):]
    assert table.startswith("### Image completion, celeba\n\n**Synthetic images.** **8 px instead of 32.** **6 iterations of 3 images instead of")
    score = json.loads((tmp_path / "cnp" / "result.json").read_text())["error"]
    assert f"| {score['mean']:.4f} ± {score['ci95']:.4f} |" in next(line for line in table.splitlines() if line.startswith("| CNP"))
    pair = [np.array(json.loads((tmp_path / name / "result.json").read_text())["per_task"]) for name in ("modgrad", "cnp")]
    assert f"| {(pair[0] - pair[1]).mean():+.4f} ±" in next(line for line in table.splitlines() if line.startswith("| ModGrad - CNP"))


# -------------------------------------------------------------------------------------------- reinforcement learning

def make_rl(algorithm="modgrad", *words):
    args = get_args(modgrad_rl, "--algorithm", algorithm, "--hidden", 5, "--context", 4, "--rollouts", 3, "--horizon", 6, "--meta-batch", 2,
                    "--fisher-fraction", 1, "--device", "cpu", *words)
    world = modgrad_rl.make_world(args)
    return args, world, modgrad_rl.init_params(args, world)


def in_double(tensors):
    return type(tensors)(*(x.double() for x in tensors)) if isinstance(tensors, tuple) else {k: x.double() for k, x in tensors.items()}


def one_task(lived, t=0):
    return [in_double(modgrad_rl.Rollouts(*(x[t] for x in rollouts))) for rollouts in lived]


def test_navigation_by_hand():
    _, world, _ = make_rl()
    goal = world.tasks(torch.tensor([[0.65, 0.5], [0.6, 0.4]]))
    torch.testing.assert_close(goal, torch.tensor([[0.15, 0.0], [0.1, -0.1]]))
    assert torch.equal(world.reset(goal, 1, None), torch.zeros(2, 1, 2))
    place, reward, end = world.step(torch.tensor([[[7.0, 0.0]], [[0.095, -0.095]]]))       # clipped to 0.1; within 0.01
    torch.testing.assert_close(place, torch.tensor([[[0.1, 0.0]], [[0.095, -0.095]]]))
    torch.testing.assert_close(reward, torch.tensor([[-0.05], [-math.hypot(0.005, 0.005)]]))
    assert end.tolist() == [[False], [True]]
    _, _, end = world.step(torch.tensor([[[0.05, 0.02]], [[0.0, 0.0]]]))
    assert end.tolist() == [[False], [True]], "both coordinates have to be near"


def test_rollouts_end_at_the_goal():
    args, world, params = make_rl("maml")
    params = {k: torch.zeros_like(w) for k, w in params.items()} | {"log_std": torch.full((2,), -20.0), "mean.bias": torch.tensor([0.05, 0.0])}
    fast = {k: w.expand(1, *w.shape) for k, w in modgrad_rl.start(params, args).items()}
    rollouts = modgrad_rl.act(params, fast, world, torch.tensor([[0.1, 0.0]]), args, "test", 0, 0)
    assert torch.equal(rollouts.mask, torch.tensor([1.0, 1, 0, 0, 0, 0]).expand(1, 3, 6)), "the step that arrives still counts"
    torch.testing.assert_close(modgrad_rl.returns(rollouts), torch.tensor([-0.05]), atol=1e-4, rtol=0)
    assert (rollouts.advantage[..., 2:] == 0).all()


def test_advantages_agree_with_naive_loops():
    args, *_ = make_rl("maml", "--gae-lambda", 0.7, "--gamma", 0.9)
    rng = np.random.default_rng(0)
    observation, reward = rng.normal(size=(2, 3, 6, 2)), rng.normal(size=(2, 3, 6))
    mask = np.ones((2, 3, 6))
    mask[0, 1, 4:] = 0
    ours = modgrad_rl.advantages(*(torch.from_numpy(x) for x in (observation, reward, mask)), args).numpy()
    for t in range(2):
        rows, targets, where = [], [], []
        for r in range(3):
            length = int(mask[t, r].sum())
            for h in range(length):
                o = observation[t, r, h]
                rows.append([*o, *o ** 2, h / 100, (h / 100) ** 2, (h / 100) ** 3, 1])
                targets.append(sum(0.9 ** (k - h) * reward[t, r, k] for k in range(h, length)))
                where.append((r, h))
        rows, targets = np.array(rows), np.array(targets)
        w = np.linalg.solve(rows.T @ rows + 1e-5 * np.eye(rows.shape[1]), rows.T @ targets)
        value = dict(zip(where, rows @ w))
        naive = {}
        for r, h in where:
            naive[r, h] = sum((0.9 * 0.7) ** (k - h) * (reward[t, r, k] + 0.9 * value.get((r, k + 1), 0) - value[r, k])
                              for k in range(h, 6) if (r, k) in value)
        flat = np.array(list(naive.values()))
        for (r, h), x in naive.items():
            assert ours[t, r, h] == pytest.approx((x - flat.mean()) / flat.std(), rel=1e-4, abs=1e-5)
    assert (ours[0, 1, 4:] == 0).all()


def test_conjugate_gradients_solve_a_known_system():
    A = torch.tensor([[4.0, 1, 0], [1, 3, 1], [0, 1, 2]], dtype=torch.float64)
    x = torch.tensor([1.0, -2, 3], dtype=torch.float64)
    torch.testing.assert_close(modgrad_rl.conjugate_gradients(lambda v: A @ v, A @ x, 3), x)
    assert not torch.allclose(modgrad_rl.conjugate_gradients(lambda v: A @ v, A @ x, 1), x)


def test_the_policy_gradient_and_log_probabilities():
    args, world, params = make_rl("maml")
    (rollouts,) = one_task(modgrad_rl.live(params, world, args, "train", 0, 2, 0))
    params = {k: w.double().requires_grad_() for k, w in params.items()}
    mean = modgrad_rl.forward(params, rollouts.observation)
    log_prob = torch.distributions.Normal(mean, params["log_std"].exp()).log_prob(rollouts.action).sum(-1)
    torch.testing.assert_close(log_prob, rollouts.log_prob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_prob, modgrad_rl.log_probability(mean, params["log_std"], rollouts.action))
    naive = torch.autograd.grad(-(log_prob * rollouts.advantage * rollouts.mask).sum() / rollouts.mask.sum(), list(params.values()))
    stepped = modgrad_rl.adapt(params, modgrad_rl.start(params, args), rollouts._replace(log_prob=log_prob.detach()), args)
    for (k, w), g in zip(params.items(), naive):
        torch.testing.assert_close(stepped[k], w - args.alpha * g)


def test_rl_starts_at_one_as_maml_on_the_same_layers():
    steps = {}
    for name, words in (("maml", ("maml", "--adapt", "fc1", "fc2", "--alpha", 0.1)), ("one", ("modgrad", "--start-at-one", "--alpha", 0.1))):
        args, world, params = make_rl(*words, "--hidden", 100, "--context", 128, "--horizon", 20)
        (rollouts,) = one_task(modgrad_rl.live(params, world, args, "train", 0, 2, 0))
        params = in_double(params)
        fast = modgrad_rl.start(params, args)
        after = modgrad_rl.adapt(params, fast, rollouts, args)
        steps[name] = {k: (after[k] - fast[k]).detach() for k in fast}
    assert relative_distance(steps["one"], steps["maml"]) < 0.05


def test_later_updates_of_a_test_take_half_the_step(monkeypatch):
    """As CAVIA's code with --halve-test-lr: MAML's from the second on; never in training, nor for the other algorithms."""
    original, sizes = modgrad_rl.adapt, []

    def spy(params, fast, rollouts, args):
        sizes.append(args.alpha)
        return original(params, fast, rollouts, args)
    monkeypatch.setattr(modgrad_rl, "adapt", spy)
    for algorithm, words, split, wanted in (("maml", [], "test", [0.1, 0.05, 0.05]), ("maml", [], "train", [0.1] * 3),
                                            ("maml", ["--no-halve-test-lr"], "test", [0.1] * 3), ("cavia", [], "test", [1.0] * 3),
                                            ("modgrad", ["--halve-test-lr"], "test", [30.0, 15.0, 15.0])):
        args, world, params = make_rl(algorithm, *words)
        sizes.clear()
        modgrad_rl.live(params, world, args, split, 0, 2, 3)
        assert sizes == wanted, (algorithm, split)


def test_rl_modulation_of_one_is_maml_on_the_same_layers(monkeypatch):
    args, world, params = make_rl("modgrad")
    (plain, *_), (rollouts,) = make_rl("maml", "--adapt", "fc1", "fc2", "--alpha", args.alpha), one_task(modgrad_rl.live(params, world, args, "train", 0, 2, 0))
    params = in_double(params)
    monkeypatch.setattr(modgrad_rl, "modulation", lambda params, v, like: {k: torch.ones_like(w) for k, w in like.items()})
    one, two = (modgrad_rl.adapt(params, modgrad_rl.start(params, a), rollouts, a) for a in (args, plain))
    assert set(one) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("algorithm", modgrad_rl.METHODS)
def test_outer_gradient_and_curvature_of_trpo(algorithm, monkeypatch):
    """In float64: the gradient against central differences, the Fisher product against the second derivative of KL, which is
    computed from torch.distributions; then that the step keeps its bound and improves its objective."""
    args, world, params = make_rl(algorithm, "--cg-damping", 0, "--alpha", 0.5)
    rng = torch.Generator().manual_seed(1)
    for layer in ("fc1", "fc2"):        # the origin is not to lie on the kink of every unit, as it does where biases are 0
        params[f"{layer}.bias"] += 0.3 * torch.randn(5, generator=rng)
    lived = [in_double(rollouts) for rollouts in modgrad_rl.live(params, world, args, "train", 0, 2, 1)]
    params = in_double(params)
    for t in range(2):      # as float64 sees it, nothing has changed since the actions were drawn
        before, after = (modgrad_rl.Rollouts(*(x[t] for x in rollouts)) for rollouts in lived)
        fast = modgrad_rl.start(params, args)
        for rollouts, batch in ((before, lived[0]), (after, lived[1])):
            mean = modgrad_rl.forward(params | fast, rollouts.observation, fast.get("context"))
            batch.log_prob[t] = modgrad_rl.log_probability(mean, (params | fast)["log_std"], rollouts.action)
            fast = modgrad_rl.adapt(params, fast, batch._replace(**{k: getattr(batch, k)[t] for k in batch._fields}), args)
    names, seen = list(params), {}

    def policies(params):
        for t in range(2):
            before, after = (modgrad_rl.Rollouts(*(x[t] for x in rollouts)) for rollouts in lived)
            mean, log_std = modgrad_rl.adapted_policy(params, (before, after), args)
            yield torch.distributions.Normal(mean, log_std.exp()), after

    def surrogate(params):
        return sum(-((pi.log_prob(after.action).sum(-1) - after.log_prob).exp() * after.advantage * after.mask).sum() / after.mask.sum()
                   for pi, after in policies(params)) / 2
    old = [torch.distributions.Normal(pi.mean.detach(), pi.stddev.detach()) for pi, _ in policies(params)]

    def kl(params):
        return sum((torch.distributions.kl_divergence(one, pi).sum(-1) * after.mask).sum() / after.mask.sum()
                   for one, (pi, after) in zip(old, policies(params))) / 2

    def capture(product, b, steps):
        seen["product"], seen["gradient"] = product, b
        return solve(product, b, steps)
    solve = modgrad_rl.conjugate_gradients
    monkeypatch.setattr(modgrad_rl, "conjugate_gradients", capture)
    new, step, gradient = modgrad_rl.trpo_step(params, lived, args)
    v = {k: torch.randn(w.shape, generator=rng, dtype=torch.float64) for k, w in params.items()}

    def moved(h):
        return {k: w + h * v[k] for k, w in params.items()}
    central = (surrogate(moved(1e-6)) - surrogate(moved(-1e-6))) / 2e-6
    ours = sum((gradient[k] * v[k]).sum() for k in names)
    torch.testing.assert_close(ours, central, rtol=1e-4, atol=1e-9)
    leaves = {k: w.clone().requires_grad_() for k, w in params.items()}
    first = torch.autograd.grad(kl(leaves), leaves.values(), create_graph=True)
    along = sum((g * v[k]).sum() for k, g in zip(names, first))
    second = torch.cat([g.reshape(-1) for g in torch.autograd.grad(along, leaves.values(), materialize_grads=True)])
    torch.testing.assert_close(seen["product"](torch.cat([v[k].reshape(-1) for k in names])), second, rtol=1e-6, atol=1e-9)
    assert 0 < kl(new) <= args.max_kl
    torch.testing.assert_close(kl(new), step["kl"])
    torch.testing.assert_close(surrogate(params) - surrogate(new), step["gain"])
    assert step["gain"] > 0


def test_the_context_gradient_in_rl_is_that_after_the_trial_step(monkeypatch):
    args, world, params = make_rl("modgrad", "--alpha", 50)
    (rollouts,), seen = one_task(modgrad_rl.live(params, world, args, "train", 0, 2, 0)), []
    params = in_double(params)
    monkeypatch.setattr(modgrad_rl, "modulation", lambda params, v, like, real=modgrad_rl.modulation: seen.append(v) or real(params, v, like))
    fast = modgrad_rl.start(params, args)
    modgrad_rl.adapt(params, fast, rollouts, args)
    v = seen[-1].detach()
    gradient = torch.func.grad(lambda fast: modgrad_rl.policy_loss(params, fast, rollouts))(fast)

    def after(v):
        M = modgrad_rl.modulation(params, v, fast)
        return modgrad_rl.policy_loss(params, {k: fast[k] - args.alpha * M[k] * gradient[k] for k in fast}, rollouts)
    for i in range(args.context):
        e = 1e-6 * torch.eye(args.context, dtype=torch.float64)[i]
        assert v[i].item() == pytest.approx(-((after(e) - after(-e)) / 2e-6).item(), rel=1e-4, abs=1e-10)
    assert v.abs().max() > 0


@pytest.mark.parametrize("algorithm", modgrad_rl.METHODS)
def test_the_loop_over_tasks_and_vmap_agree(algorithm):
    args, world, params = make_rl(algorithm, "--alpha", 0.5)
    lived, params = [in_double(rollouts) for rollouts in modgrad_rl.live(params, world, args, "train", 0, 3, 1)], in_double(params)
    loop = modgrad_rl.over_tasks(lambda lived: modgrad_rl.adapted_policy(params, lived, args), lived)
    for one, two in zip(loop, torch.func.vmap(lambda lived: modgrad_rl.adapted_policy(params, lived, args))(lived)):
        torch.testing.assert_close(one, two)


def test_a_tasks_rollouts_do_not_depend_on_its_batch():
    args, world, params = make_rl("maml")
    many = modgrad_rl.live(params, world, args, "test", 0, 4, 2)
    for one, all_ in zip(modgrad_rl.live(params, world, args, "test", 2, 1, 2), many):
        for x, y in zip(one, all_):
            torch.testing.assert_close(x[0], y[2])
    other, *_ = make_rl("maml", "--seed", 5)
    assert torch.equal(modgrad_rl.goals(world, other, "test", 0, 4), modgrad_rl.goals(world, args, "test", 0, 4))
    assert not torch.equal(modgrad_rl.goals(world, other, "train", 0, 4), modgrad_rl.goals(world, args, "train", 0, 4))
    assert not torch.equal(modgrad_rl.goals(world, args, "val", 0, 4), modgrad_rl.goals(world, args, "test", 0, 4))


def test_an_rl_run_from_start_to_end(tmp_path, monkeypatch, capsys):
    words = ["--hidden", 6, "--rollouts", 4, "--horizon", 8, "--meta-batch", 3, "--iterations", 4, "--test-tasks", 5,
             "--val-every", 2, "--val-tasks", 3]
    runs = []
    for algorithm in modgrad_rl.METHODS:
        runs.append(tmp_path / algorithm)
        call(modgrad_rl, monkeypatch, *words, "--algorithm", algorithm, "--out", runs[-1])
        result = json.loads((runs[-1] / "result.json").read_text())
        assert result["returns"] == [modgrad_rl.summary(np.array(row)) for row in result["per_task"]]
        shown = capsys.readouterr().out
        for name, row in zip(("before", "after 1 update ", "after 2 updates", "after 3 updates"), result["returns"]):
            assert re.search(rf"{name} +{re.escape('{mean:.2f} +- {ci95:.2f}'.format(**row))}", shown)
        lines = [json.loads(line) for line in (runs[-1] / "log.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
        assert all(line["kl"] <= 0.01 for line in lines)
        assert ["validation" in line for line in lines] == [False, True, False, True]
    call(modgrad_rl, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 2)
    call(modgrad_rl, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"] for name in ("modgrad", "part"))
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    fails(capsys, functools.partial(call, modgrad_rl, monkeypatch, *words, "--out", tmp_path / "part", "--gamma", 0.5), "has gamma 0.95, not 0.5")
    call(modgrad_rl, monkeypatch, "--picture", tmp_path / "paths.png", "--runs", *runs)
    assert Image.open(tmp_path / "paths.png").size == (3 * 224, 4 * 224 + 18)
    fails(capsys, functools.partial(call, modgrad_rl, monkeypatch, "--picture", tmp_path / "x.png", "--runs", tmp_path), "has no checkpoint")
    for bad, said in (("--algorithm cavia --adapt fc1", "leave --adapt out"), ("--adapt fc9", "choose from"), ("--adapt all", "a cell is for"), ("--rollouts 0", "from 1 on"),
                      ("--picture x.png", "belong together"), ("--fisher-fraction 0", "from 1e-06 on")):
        fails(capsys, functools.partial(modgrad_rl.get_args, bad.split()), said)
    shutil.rmtree(tmp_path / "part")
    done = here("tables.py", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("### Reinforcement learning"):]
    assert table.startswith("### Reinforcement learning, navigation\n\n**4 iterations of 3 tasks instead of 500 of 40.** "
                            "**4 rollouts instead of 20.** **8 steps instead of 100.** **6 units instead of 100.** 5 test tasks;")
    pair = [np.array(json.loads((tmp_path / name / "result.json").read_text())["per_task"][1]) for name in ("modgrad", "maml")]
    assert f"| {(pair[0] - pair[1]).mean():+.2f} ±" in next(line for line in table.splitlines() if line.startswith("| ModGrad - MAML"))
    before, after = json.loads((tmp_path / "maml" / "result.json").read_text())["per_task"][:2]
    assert f"| {np.subtract(after, before).mean():+.2f} ±" in next(line for line in table.splitlines() if line.startswith("| MAML |"))
    (figure,) = (tmp_path / "out").glob("rl-navigation-*.png")
    assert Image.open(figure).size[0] > 500


def test_cheetahs_reward_is_that_of_their_simulation(capsys):
    gymnasium, mujoco = pytest.importorskip("gymnasium"), pytest.importorskip("mujoco")
    mujoco.set_mju_user_warning(lambda text: None)
    words = ["--rollouts", 2, "--horizon", 3, "--workers", 2, "--device", "cpu"]
    rng = np.random.default_rng(0)
    start, actions = torch.from_numpy(rng.normal(size=(2, 2, 18))), torch.from_numpy(rng.uniform(-1.5, 1.5, size=(3, 2, 2, 6))).float()
    for env_name, u in (("cheetah-dir", 0.1), ("cheetah-vel", 0.6)):
        args = get_args(modgrad_rl, "--env", env_name, *words)
        world = modgrad_rl.make_world(args)
        try:
            goal = world.tasks(torch.tensor([[u, 0.0], [0.9, 0.0]]))
            assert goal.flatten().tolist() == pytest.approx([-1, 1] if env_name == "cheetah-dir" else [1.2, 1.8])
            seen = [world.reset(goal, 2, start)] + [world.step(action) for action in actions]
        finally:
            world.close()
        env = gymnasium.make("HalfCheetah-v5").unwrapped
        env.reset(seed=3)
        for t, r in ((0, 0), (1, 1)):
            shift = np.array([math.erf(z / math.sqrt(2)) for z in start[t, r, :9]]) * 0.1
            mujoco.mj_resetData(env.model, env.data)
            env.set_state(env.init_qpos + shift, env.init_qvel + 0.1 * start[t, r, 9:].numpy())
            np.testing.assert_allclose(seen[0][t, r, :17], env._get_obs(), atol=1e-6)
            for action, (observation, reward, end) in zip(actions, seen[1:]):
                a = action[t, r].double().clamp(-1, 1).numpy()
                theirs, _, _, _, info = env.step(a)
                np.testing.assert_allclose(observation[t, r, :17], theirs, atol=1e-5)
                speed, goal_ = info["x_velocity"], goal[t].item()
                wanted = (goal_ * speed if env_name == "cheetah-dir" else -abs(speed - goal_)) - 0.05 * (a ** 2).sum()
                assert reward[t, r].item() == pytest.approx(wanted, abs=1e-5)
                assert not end.any()


def test_cheetahs_need_mujoco(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    fails(capsys, lambda: modgrad_rl.make_world(get_args(modgrad_rl, "--env", "cheetah-dir")), "pip install", "navigation")
# ----------------------------------------------------------------------------------------------- attentive feature reuse

AFR = {"MAML": ["--algorithm", "maml"], "ANIL": ["--modulation", "none"], "AM": [], "P-AM": ["--modulation", "pam"]}


def make_afr(method, *words, dtype=torch.float64, trained=True):
    """Parameters of a small network; `trained`: an attention module that does something, its last layer not zero."""
    args = get_args(afr, *AFR[method], "--filters", 4, "--ways", 3, "--image-size", 16, "--device", "cpu", "--steps", 2, *words)
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
        labels = torch.rand(*y.shape, *{"vanishing": (2,), "depth": (1, 16, 16), "normals": (3, 16, 16)}[kind], generator=rng).double()
        if kind != "vanishing":
            labels[..., 3:5, 6:9] = -1
        made.append(labels)
    return task._replace(support_y=made[0], query_y=made[1])


def epsilon_of(args, seed=2):
    return torch.randn(4, args.filters, generator=torch.Generator().manual_seed(seed)).double() if args.modulation == "pam" else None


@pytest.mark.parametrize("kind", data.KINDS)
def test_no_attention_is_the_unmodulated_network_exactly(kind):
    task = make_afr_task(kind)
    plain, params = make_afr("ANIL", "--tasks", kind)
    expected = afr.test_outputs(params, task, plain, kind)
    for method in ("AM", "P-AM"):
        args, params = make_afr(method, "--tasks", kind, trained=False)
        x = afr.embed(params, task.support_x, afr.Norm())
        assert (afr.attention(params, kind, x, task.support_y, args)[0] == 0).all(), "training starts at w = 0"
        assert all(torch.equal(one, two) for one, two in zip(afr.test_outputs(params, task, args, kind), expected))
        args, params = make_afr(method, "--tasks", kind)
        assert not any(torch.equal(one, two) for one, two in zip(afr.test_outputs(params, task, args, kind), expected))
        zero = torch.zeros(4, 4).double()
        assert all(torch.equal(one, two) for one, two in zip(afr.test_outputs(params, task, args, kind, w=zero), expected))


def test_only_the_weights_of_a_blocks_maps_beside_each_other_count():
    _, params = make_afr("AM")
    x, w = make_task().query_x, torch.tensor([[0.3], [0.6], [0.4], [0.7]]).double().expand(4, 4)
    for l in range(4):
        only = torch.where(torch.arange(4)[:, None] == l, w, 0)
        plain, weighed = (afr.embed(params, x, afr.Norm(), v) for v in (None, only))
        if l < 3:                                       # BatchNorm's 1e-5 is what is left
            torch.testing.assert_close(weighed, plain, rtol=1e-2, atol=1e-3)
        else:
            torch.testing.assert_close(weighed, plain * (1 - w[3, 0]))
        unequal = only * torch.tensor([1, 0.5, 0, -1]).double()
        assert not torch.allclose(afr.embed(params, x, afr.Norm(), unequal), plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", data.KINDS)
def test_attention_does_not_see_the_order_of_the_support_samples(kind):
    args, params = make_afr("P-AM", "--tasks", kind)
    task, order = make_afr_task(kind), torch.tensor([4, 0, 3, 5, 1, 2])
    x = afr.embed(params, task.support_x, afr.Norm())
    one = afr.attention(params, kind, x, task.support_y, args)
    torch.testing.assert_close(afr.attention(params, kind, x[order], task.support_y[order], args), one, rtol=1e-12, atol=1e-12)
    assert one.shape == (2, 4, 4)
    for other in ((x[order], task.support_y), (x[1:], task.support_y[1:])):     # which label is whose; which samples there are
        assert not torch.allclose(afr.attention(params, kind, *other, args), one, rtol=1e-6)


@pytest.mark.parametrize("method", ["AM", "P-AM"])
def test_a_constant_w_is_blind_to_the_subtask_and_still_trained(method):
    args, params = make_afr(method, "--embed", "constant")
    tasks = [make_afr_task("classification", seed=seed) for seed in (0, 1)]
    one, two = (afr.attention(params, "classification", afr.embed(params, task.support_x, afr.Norm()), task.support_y, args) for task in tasks)
    assert torch.equal(one, two) and one.shape == (1 + (method == "P-AM"), 4, 4)
    afr.task_loss(params, tasks[0], args, "classification", epsilon_of(args))[0].backward()
    assert params["attention.classification.out.bias"].grad.abs().min() > 0
    assert [k for k in params if k.startswith("attention.")] == ["attention.classification.out.bias"], "nothing that could not be trained"


def test_attention_by_hand():
    args, params = make_afr("AM", "--attention-blocks", 1, "--attention-width", 2)
    x, y = torch.rand(6, 4, 1, 1).double(), make_task().support_y
    q, k, v = (torch.stack([params[f"attention.classification.block1.{part}.weight"] @ torch.cat([x[i, :, 0, 0], torch.eye(3).double()[y[i]]])
                            + params[f"attention.classification.block1.{part}.bias"] for i in range(6)]) for part in ("query", "key", "value"))
    out = []
    for i in range(6):
        share = torch.stack([(q[i] * k[j]).sum() / math.sqrt(2) for j in range(6)]).exp()
        out.append(sum(share[j] * v[j] for j in range(6)) / share.sum())
    mean = torch.stack(out).clamp(min=0).mean(0)
    w = params["attention.classification.out.weight"] @ mean + params["attention.classification.out.bias"]
    torch.testing.assert_close(afr.attention(params, "classification", x, y, args), w.view(1, 4, 4))


def test_kl_of_gaussians():
    rng = torch.Generator().manual_seed(0)
    q, p = torch.randn(2, 2, 4, 5, generator=rng).double()
    assert afr.gaussian_kl(q, q) == 0
    as_torch = [torch.distributions.Normal(mean, deviation.exp()) for mean, deviation in (q, p)]
    torch.testing.assert_close(afr.gaussian_kl(q, p), torch.distributions.kl_divergence(*as_torch).sum())
    assert not torch.allclose(afr.gaussian_kl(q, p), afr.gaussian_kl(p, q))


@pytest.mark.parametrize("kind", data.KINDS)
def test_pam_never_reads_query_labels_in_a_test_and_does_in_training(kind):
    args, params = make_afr("P-AM", "--tasks", kind)
    task, eps = make_afr_task(kind), epsilon_of(args)
    other = task._replace(query_y=task.query_y.flip(0))
    assert all(torch.equal(one, two) for one, two in zip(*(afr.test_outputs(params, t, args, kind) for t in (task, other))))
    (_, one), (_, two) = (afr.task_loss(params, t, args, kind, eps) for t in (task, other))
    assert not torch.allclose(one, two, rtol=1e-6), "the posterior is of the query set with its labels"
    _, three = afr.task_loss(params, task, args, kind, epsilon_of(args, seed=3))
    assert not torch.allclose(one, three, rtol=1e-6)
    twice = argparse.Namespace(**vars(args) | {"kl_weight": 3.0})
    x, q = (afr.embed(params, images, afr.Norm()) for images in (task.support_x, task.query_x))
    kl = afr.gaussian_kl(afr.attention(params, kind, q, task.query_y, args), afr.attention(params, kind, x, task.support_y, args))
    difference = afr.task_loss(params, task, twice, kind, eps)[0] - afr.task_loss(params, task, args, kind, eps)[0]
    torch.testing.assert_close(difference, 2 * kl / 9)


@pytest.mark.parametrize("kind", data.KINDS)
def test_what_inner_steps_move(kind):
    """ANIL the head only; MAML all; a domain's head has no inner loop in training, and has one in a test."""
    task = make_afr_task(kind)
    for method, moves in (("MAML", {"conv", "norm", "head"}), ("ANIL", {"head"}), ("AM", {"head"})):
        args, params = make_afr(method, "--tasks", kind)
        adapted, _ = afr.adapt(params, task, args, kind)
        moved = {k for k in params if not torch.equal(adapted[k], params[k])}
        assert {k.split(".")[0].rstrip("1234") for k in moved} == moves
        assert {k for k in params if k.startswith("head.")} <= moved
    args, params = make_afr("ANIL", "--tasks", kind)
    fewer = argparse.Namespace(**vars(args) | {"steps": 1})
    _, one = afr.task_loss(params, task, args, kind)
    _, two = afr.task_loss(params, task, fewer, kind)
    assert torch.equal(one, two) == (kind != "classification")
    assert not torch.equal(afr.test_outputs(params, task, args, kind)[0], afr.test_outputs(params, task, fewer, kind)[0])


def test_nil_on_hand_made_numbers():
    args = get_args(afr, "--ways", 2)
    support = torch.tensor([[2.0, 0], [3, 4], [0, 5], [0, 1]]).view(4, 2, 1, 1)
    query = torch.tensor([[0, 9.0], [7, 0], [1, 1]]).view(3, 2, 1, 1)
    found = afr.nil(support, query, torch.tensor([0, 0, 1, 1]), args)
    r = math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[(0 + 0.8) / 2, 1], [(1 + 0.6) / 2, 0], [(r + 1.4 * r) / 2, r]]))


@pytest.mark.parametrize("method, kind, words", [*((method, kind, []) for method in AFR for kind in data.KINDS), ("AM", "classification", ["--head", "plain"])])
def test_gradients_of_attentive_feature_reuse(method, kind, words):
    """Backbone and head learn as without attention (Eq. 4), the attention module from the pass with it (Eq. 5); loop and vmap."""
    args, params = make_afr(method, "--tasks", kind, *words)
    batch, rng = make_afr_task(kind, tasks=2, seed=3), torch.Generator().manual_seed(3)
    eps = None if args.modulation != "pam" else torch.stack([epsilon_of(args, seed) for seed in (0, 1)])[:, None]
    afr.run_tasks(params, [batch], args, False, epsilon=eps)
    looped = {k: w.grad.clone() for k, w in params.items() if w.grad is not None}
    assert set(looped) == set(params)
    for w in params.values():
        w.grad = None
    afr.run_tasks(params, [batch], args, True, epsilon=eps)
    for k, w in params.items():
        torch.testing.assert_close(w.grad, looped[k], rtol=1e-7, atol=1e-9)

    plain = argparse.Namespace(**vars(args) | {"modulation": "none"})
    for part in ("backbone", "head", "attention"):
        mine = [k for k in params if part == (k.split(".")[0] if k.startswith(("head.", "attention.")) else "backbone")]
        direction = {k: torch.randn(params[k].shape, generator=rng).double() for k in mine}
        assert bool(mine) == (part != "attention" or args.modulation != "none")
        if not mine:
            continue

        def loss(step, part=part, direction=direction):
            moved = {k: w.detach() + step * direction.get(k, 0) for k, w in params.items()}
            which = args if part == "attention" else plain
            return np.mean([afr.task_loss(moved, Task(*(x[i] for x in batch)), which, kind, eps if eps is None else eps[i, 0])[0].item()
                            for i in range(2)])
        found = sum((looped[k] * d).sum().item() for k, d in direction.items())
        assert math.isclose(found, (loss(1e-7) - loss(-1e-7)) / 2e-7, rel_tol=1e-4, abs_tol=1e-7), part


def test_first_order_attentive_feature_reuse_by_hand():
    """With a head of two steps whose gradients are constants, the outer gradient of the head is that at the adapted head."""
    args, params = make_afr("ANIL", "--first-order")
    task = make_task()
    afr.run_tasks(params, [Task(*(x[None] for x in task))], args, False)
    head = {k: v.detach() for k, v in params.items() if k.startswith("head.")}
    plain = {k: v.detach() for k, v in params.items()}

    def loss(head, x, y):
        return torch.nn.functional.cross_entropy(afr.predict(plain | head, "classification", x, args), y)
    x, query = (afr.embed(plain, images, afr.Norm()) for images in (task.support_x, task.query_x))
    for _ in range(2):
        head = {k: head[k] - args.alpha[0] * g for k, g in torch.func.grad(loss)(head, x, task.support_y).items()}
    for k, g in torch.func.grad(loss)(head, query, task.query_y).items():
        torch.testing.assert_close(params[k].grad, g)


def test_students_t():
    """Its density, summed up to the quantile, leaves 2.5 %."""
    for df in (1, 2, 9, 30):
        x = np.linspace(-data.student(df + 1), data.student(df + 1), 200001)
        density = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(math.pi * df) * (1 + x ** 2 / df) ** (-(df + 1) / 2)
        assert math.isclose(density[1:].sum() * (x[1] - x[0]), 0.95, abs_tol=1e-4)
    assert data.student(32) == data.student(1000) == 1.96 and len(data.STUDENT) == 30


def test_flags_that_a_method_does_not_use_make_no_other_run(capsys):
    for words, unused in ((["--modulation", "none"], "--head plain --attention-width 8 --attention-blocks 1 --attention-lr 0.1 --kl-weight 2"),
                          ([], "--kl-weight 2"), (["--embed", "constant"], "--attention-width 8")):
        one, two = (get_args(afr, *words, *more.split()) for more in ("", unused))
        assert afr.identity(one) == afr.identity(two) and one.out == two.out
        said = capsys.readouterr().err
        assert said.count("does not use") == unused.count("--"), "and it is said"
    for module, words, unused in (
            (modgrad_multishot, "reptile", "--rank 2 --context 9 --first-order"), (modgrad_multishot, "maml", "--rank 2 --context 9"),
            (modgrad_rl, "cavia", "--rank 2"), (modgrad_rl, "maml", "--rank 2 --context 9"),
            (modgrad_completion, "cnp", "--rank 2 --first-order --inner-clip 1"), (modgrad_completion, "maml", "--rank 2 --context 9")):
        one, two = (get_args(module, "--algorithm", words, *more.split()) for more in ("", unused))
        assert module.identity(one) == module.identity(two) and one.out == two.out
        assert capsys.readouterr().err.count("does not use") == unused.count("--")
    assert afr.identity(get_args(afr, "--modulation", "pam", "--kl-weight", 2)) != afr.identity(get_args(afr, "--modulation", "pam"))


def test_the_backbone_and_linear_heads_start_as_in_mamls_code():
    """Uniform by Xavier's rule, as tf.contrib.layers.xavier_initializer_conv2d draws; biases at zero."""
    params = afr.init_params(get_args(afr, "--modulation", "none", "--seed", 1))
    torch.manual_seed(0)
    for l, c_in in ((1, 3), (2, 32), (3, 32), (4, 32)):
        wanted = torch.cat([torch.nn.init.xavier_uniform_(torch.empty(32, c_in, 3, 3)) for _ in range(20)])
        assert drawn_alike(params[f"conv{l}.weight"], wanted)
        assert not params[f"conv{l}.bias"].any()
        assert not drawn_alike(params[f"conv{l}.weight"], math.sqrt(2 / (9 * c_in)) * torch.randn(20 * 32 * c_in * 9)), "or this would not tell"
    assert drawn_alike(params["head.classification.weight"], torch.cat([torch.nn.init.xavier_uniform_(torch.empty(5, 800)) for _ in range(20)]))


@pytest.mark.parametrize("words", [["--modulation", "none"], ["--modulation", "am"]])
def test_high_level_tasks_pull_at_the_backbone_alike(words, few_scenes, cache):
    """At the start the norms of the four tasks' gradients at the backbone are within a factor of 10."""
    args = get_args(afr, "--tasks", *data.KINDS, "--modes", "scenes", "--image-size", 28, "--cache-dir", cache, "--ways", 4, "--meta-batch", 2,
                    "--queries", 5, *words)
    params = {k: w.requires_grad_() for k, w in afr.init_params(args).items()}
    batches = data.MetaTasks(args, "train").tasks(0, 2 * len(data.KINDS))
    norms = afr.backbone_gradients(params, batches, args, None)
    assert list(norms) == list(data.KINDS)
    assert max(norms.values()) < 10 * min(norms.values()), norms
    for part in ("depth.conv4", "normals.conv4", "vanishing"):      # and as other layers start, they are not
        params[f"head.{part}.weight"].data *= 20
    norms = afr.backbone_gradients(params, batches, args, None)
    assert max(norms.values()) > 10 * min(norms.values()), "or this would not tell"


def test_a_loss_weight_does_not_weigh_the_kl():
    for kind in ("classification", "depth"):
        losses = []
        for weight in (1, 3):
            args, params = make_afr("P-AM", "--tasks", kind, "--loss-weights", weight)
            for kl in (0.0, 1.0):
                args.kl_weight = kl
                losses.append(afr.task_loss(params, make_afr_task(kind), args, kind, epsilon_of(args))[0].item())
        assert math.isclose(losses[2], 3 * losses[0], rel_tol=1e-9)
        assert math.isclose(losses[1] - losses[0], losses[3] - losses[2], rel_tol=1e-6) and losses[1] > losses[0]


def test_intervals_over_domains():
    """Tasks of one domain are no independent samples of domains: the interval is that of the domains' means."""
    rng = np.random.default_rng(0)
    scores = np.tile(rng.normal(size=10), 60) + 0.01 * rng.normal(size=600)             # 10 domains that take turns
    found = afr.summary(scores, ["depth"], {"depth": 10})["depth"]
    means = scores.reshape(60, 10).mean(0)
    assert math.isclose(found["ci95"], 2.262 * means.std(ddof=1) / math.sqrt(10), abs_tol=1e-4)
    assert math.isclose(found["mean"], scores.mean(), abs_tol=1e-4)
    assert afr.summary(scores, ["depth"], {})["depth"]["ci95"] < found["ci95"] / 7
    assert afr.units(scores, 1) is scores and len(afr.units(scores[:4], 10)) == 4


def test_products_of_attention_and_nil_are_not_in_bf16():
    args, params = make_afr("AM", "--precision", "bf16", dtype=torch.float32)
    x, query, y = torch.rand(15, 4, 1, 1), torch.rand(9, 4, 1, 1), torch.arange(3).repeat(5)
    for function in (lambda: afr.nil(x, query, y, args), lambda: afr.attention(params, "classification", x, y, args)):
        expected = function()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(), expected)


@pytest.mark.parametrize("method", AFR)
def test_afr_inductive_predictions_do_not_know_the_other_queries(method):
    for kind in data.KINDS:
        args, params = make_afr(method, "--tasks", kind)
        task, keep = make_afr_task(kind), torch.tensor([0, 4])
        whole, part = (afr.test_outputs(params, t, args, kind) for t in (
            task, task._replace(query_x=task.query_x[keep], query_y=task.query_y[keep])))
        assert len(whole) == (4 if kind == "classification" else 2)
        for i, (one, two) in enumerate(zip(whole, part)):
            assert torch.allclose(one[keep], two, rtol=1e-9, atol=1e-11) == (i % 2 == 1)


def test_afr_parameter_counts():
    """The paper's 1.1 times the parameters of MAML."""
    count = lambda args: sum(w.numel() for w in afr.init_params(args).values())
    for filters, base, factor in ((32, 28896 + 4005, 1.14), (64, 113088 + 8005, 1.07)):
        plain, more = (get_args(afr, *AFR[method], "--filters", filters) for method in ("MAML", "AM"))
        assert count(plain) == base
        assert math.isclose(count(more) / base, factor, abs_tol=0.01)
    one, two = (afr.init_params(get_args(afr, *words)) for words in (["--modulation", "none"], ["--modulation", "pam"]))
    assert all(torch.equal(w, two[k]) for k, w in one.items())


@pytest.mark.parametrize("method", AFR)
def test_an_afr_run_from_start_to_end_and_its_continuation(method, tmp_path, cache, monkeypatch, capsys):
    words = ["--filters" if word == "--channels" else word for word in TINY]
    words = [*words, "--image-size", 16, *AFR[method], "--cache-dir", cache, "--modes", "miniimagenet", "--transfer", "fc100", "--val-every", 3, "--val-tasks", 6]
    call(afr, monkeypatch, *words, "--out", tmp_path / "whole")
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert (result["method"], result["synthetic"]) == (method, True)
    for found in (result, result["transfer"]["fc100"]):
        for key, tasks in zip(afr.KEYS, afr.PER_TASK):
            assert len(found[tasks]) == 8
            assert math.isclose(found[key]["overall"]["mean"], np.mean(found[tasks]), abs_tol=1e-3)
            mean = found[key]["overall"]
            assert f"{mean['mean']:.2f} +- {mean['ci95']:.2f}" in shown
    assert "SYNTHETIC" in shown and "Table" not in shown and "transfer to fc100" in shown
    assert (result["parameters"]["attention"] > 0) == (method in ("AM", "P-AM"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert set(next(line for line in lines if "validation" in line)["validation"]) == set(afr.KEYS)
    call(afr, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 3)
    call(afr, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"] for name in ("whole", "part"))
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    monkeypatch.setattr(afr, "run_tasks", lambda *_, **__: pytest.fail("a finished run is not run again"))
    call(afr, monkeypatch, *words, "--out", tmp_path / "whole")


@pytest.mark.parametrize("words, said", [
    ("--algorithm maml --modulation am", "leave one of them out"), ("--tasks flow", "invalid choice"), ("--alpha 0.1 0.2", "for each of --tasks classification"),
    ("--alpha -1", "--alpha -1"), ("--loss-weights nan", "--loss-weights nan"), ("--tasks classification classification", "twice"), ("--image-size 15", "--image-size 15"),
    ("--test-tasks 1", "--test-tasks 1"), ("--filters 0", "--filters 0"), ("--modulation none --embed constant", "give --modulation am or pam")])
def test_afr_bad_arguments(capsys, words, said):
    fails(capsys, lambda: afr.get_args(words.split()), said)


# ---------------------------------------------------------------------------------------------------- scenes with depth

def nothing(n=1, k=0):
    return np.zeros((n, k, 2, 3)), np.zeros((n, k, 4))


def test_cast_agrees_with_a_plane_and_a_ball_in_formulas():
    """To 1e-4 (metres, and of unit vectors): a floor under a camera that looks down a little, and a ball before a wall."""
    size, focal, pitch, height, length = 48, 0.9, 0.2, 1.5, 9.0
    room = np.array([[[-50.0, -50, -50], [50, 0, length]]])
    R = data.turn(np.array([-pitch]), 1, 2)
    rays = data.camera_rays(np.array([focal]), size)
    depth, normal, surface = data.cast(np.array([[0, -height, 0.0]]), rays @ R.transpose(0, 2, 1), room, *nothing())
    v = (np.arange(size) + 0.5) / size - 0.5
    down = np.cos(pitch) * v / focal + np.sin(pitch)                    # how far a ray of depth 1 falls
    floor = (surface == data.FLOOR)[0].reshape(size, size)
    assert 0.3 < floor.mean() < 0.9
    expected = np.repeat(height / down[:, None], size, 1)
    np.testing.assert_allclose(depth[0].reshape(size, size)[floor], expected[floor], atol=1e-4)
    seen = (normal @ R)[0].reshape(size, size, 3)
    np.testing.assert_allclose(seen[floor], np.broadcast_to([0, -np.cos(pitch), -np.sin(pitch)], seen[floor].shape), atol=1e-4)

    centre, radius = np.array([0.3, -0.2, 4.0]), 0.8
    ball = np.array([[[*centre, radius]]])
    depth, normal, surface = data.cast(np.zeros((1, 3)), rays, np.array([[[-50.0, -50, -50], [50, 50, length]]]), nothing()[0], ball)
    on = surface[0] == data.THINGS
    d = rays[0] / np.linalg.norm(rays[0], axis=-1, keepdims=True)
    along = d @ centre
    missed = (centre ** 2).sum() - along ** 2
    assert (on == (missed < radius ** 2)).all()
    at = along[on] - np.sqrt(radius ** 2 - missed[on])                  # the distance, and depth its z
    np.testing.assert_allclose(depth[0][on], at * d[on, 2], atol=1e-4)
    np.testing.assert_allclose(normal[0][on], (at[:, None] * d[on] - centre) / radius, atol=1e-4)
    np.testing.assert_allclose(depth[0][~on], length, atol=1e-4)


def test_cast_meets_a_box_at_its_faces():
    box = np.array([[[[-1.0, -1, 3], [1, 1, 5]]]])
    room = np.array([[[-9.0, -9, -9], [9, 9, 9]]])
    rays = np.array([[[0, 0, 1.0], [0.9, 0, 3], [1, 0, 1], [-1.2, 0, 3], [0, 0, -1]]])
    for origin, expected in (((0, 0, 0), [(3, "z"), (1, "z"), (9, "room"), (9 / 3, "room"), (9, "room")]), ((-4, 0, 4), [(5, "room"), (5 / 3, "room"), (5, "room"), (5 / 3, "room"), (13, "room")])):
        t, normal, surface = data.cast(np.array([origin], float), rays, room, box, nothing()[1])
        assert [s >= data.THINGS for s in surface[0]] == [where != "room" for _, where in expected]
        np.testing.assert_allclose(t[0], [t for t, _ in expected], atol=1e-12)
    t, normal, surface = data.cast(np.array([[-4.0, 0, 4]]), np.array([[[1.0, 0.1, 0], [1, 0.5, 0]]]), room, box, nothing()[1])
    assert (surface[0] == [data.THINGS, data.SIDE]).all() or (surface[0] == [data.THINGS, data.FLOOR]).all()
    np.testing.assert_allclose(t[0, 0], 3)
    np.testing.assert_allclose(normal[0, 0], [-1, 0, 0])
    flat = np.repeat(box[:, :, :1], 2, 2)                               # a box of no size is not there
    assert (data.cast(np.array([[-4.0, 0, 4]]), rays, room, flat, np.zeros((1, 1, 4)))[2] < data.THINGS).all()


def test_labels_of_scenes_agree_with_each_other():
    """Normals derived from depth are the caster's, away from edges; parallel lines meet at the vanishing point."""
    size = 64
    for split, domain in (("train", 3), ("test", 0)):
        _, depth, normals, vanishing, classes = data.draw_scenes(split, domain, 0, 6, size)
        assert classes.tolist() == list(range(6))
        assert (depth > 0.2).all() and (depth < data.DEPTH_LIMIT).all()
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-9)
        assert (0 < vanishing).all() and (vanishing < 1).all()
        for i in range(6):
            # The room's axes are the three directions of normals that most pixels have; z's is nearest the axis of view.
            flat = np.unique(normals[i].reshape(-1, 3).round(5), axis=0, return_counts=True)
            axes = flat[0][flat[1].argsort()[-8:]]
            z = axes[np.abs(axes[:, 2]).argmax()]
            focal = ((vanishing[i] - 0.5) * z[2] / z[:2]).mean()        # of its image, 0.5 + focal * z_xy / z_z
            np.testing.assert_allclose(vanishing[i], 0.5 + focal * z[:2] / z[2], atol=2e-3)
            made, known = data.normals_from_depth(depth[i], focal * size)
            assert known.mean() > 0.5
            smooth = np.zeros_like(known)               # away from edges, and where balls do not turn away fast
            middle = normals[i][1:-1, 1:-1]
            smooth[1:-1, 1:-1] = np.max([np.abs(np.roll(normals[i], shift, axis)[1:-1, 1:-1] - middle).max(-1)
                                         for shift in (1, -1) for axis in (0, 1)], 0) < 0.15
            assert (known & smooth).sum() > 0.9 * known.sum()
            angle = np.degrees(np.arccos(np.clip((made * normals[i]).sum(-1)[known & smooth], -1, 1)))
            assert np.median(angle) < 0.1 and np.mean(angle < 2) > 0.99


def test_the_vanishing_point_is_where_parallel_lines_meet(monkeypatch):
    """Edges between floor and walls of empty rooms run along z: fit a line to each, in the image, and intersect them."""
    size, found, kind = 160, 0, data.scene_class
    monkeypatch.setattr(data, "scene_class", lambda name: kind(name) | {k: 0 * kind(name)[k] for k in ("boxes", "balls")})
    for domain in range(4):
        _, _, normals, vanishing, _ = data.draw_scenes("val", domain, 0, 8, size)
        for i in range(8):
            n = normals[i].round(4)
            values, counts = np.unique(n.reshape(-1, 3), axis=0, return_counts=True)
            big = values[counts.argsort()[::-1][:6]]
            floor, walls = big[big[:, 1].argmin()], [w for w in big if abs(w[0]) > 0.8]
            lines = []
            for wall in walls:
                left, right = (n[:, :-1], n[:, 1:])
                border = ((left == wall).all(-1) & (right == floor).all(-1)) | ((left == floor).all(-1) & (right == wall).all(-1))
                y, x = np.nonzero(border)
                if len(y) > 12 and np.ptp(x) > 8:
                    lines.append(np.polyfit((y + 0.5) / size, (x + 1) / size, 1))            # x = a y + b
            if len(lines) == 2:
                (a, b), (c, d) = lines
                y = (d - b) / (a - c)
                np.testing.assert_allclose([a * y + b, y], vanishing[i], atol=0.01)
                found += 1
    assert found >= 3, "images in which both edges can be seen"


def test_scenes_are_a_pure_function_and_domains_differ():
    whole, part = data.draw_scenes("test", 2, 0, 6, 20), data.draw_scenes("test", 2, 4, 2, 20)
    assert all(np.array_equal(one[4:], two) for one, two in zip(whole, part))
    names = [f"scenes-{split}-domain-{d:02d}" for split in data.SPLITS for d in range(data.SCENE_DOMAINS[split])]
    assert len({data.scene_domain(name)["focal"] for name in names}) == len(names) == 35
    kinds = [f"scenes-{split}-class-{c:02d}" for split in data.SPLITS for c in range(data.SCENE_CLASSES[split])]
    assert len({data.scene_class(name)["room"][0] for name in kinds}) == len(kinds)
    other = data.draw_scenes("test", 3, 0, 6, 20)
    assert not np.array_equal(whole[0], other[0])


@pytest.fixture
def few_scenes(monkeypatch):
    """Some of the domains and images: enough to sample from, and quick to draw."""
    monkeypatch.setattr(data, "SCENE_IMAGES", 32)
    monkeypatch.setattr(data, "SCENE_DOMAINS", {"train": 3, "val": 2, "test": 2})
    monkeypatch.setattr(data, "SCENE_CLASSES", {"train": 4, "val": 4, "test": 4})


SCENE_WORDS = ["--modes", "scenes", "--ways", 3, "--queries", 3, "--image-size", 16, "--filters", 4, "--steps", 2]


def test_scene_subtasks(few_scenes, cache, capsys):
    folder = data.prepare("scenes", 16, "nowhere", cache, synthetic=True)
    assert [len(np.load(folder / f"{split}.npy")) for split in data.SPLITS] == [96, 64, 64]
    drawn = [data.draw_scenes("test", d, 0, 32, 16) for d in range(2)]
    images = np.concatenate([x[0] for x in drawn])
    for kind, shape in (("depth", (1, 16, 16)), ("normals", (3, 16, 16)), ("vanishing", (2,))):
        args = get_args(afr, *SCENE_WORDS, "--shots", 2, "--tasks", kind, "--cache-dir", cache)
        assert args.synthetic and "RAY-CAST, NOT MMT" in args.title
        test = data.Scenes.of(args, "test", kind)
        batch = test.tasks(254, 5)                                      # across the border of two blocks
        assert (batch.support_x.shape, batch.query_x.shape) == ((5, 6, 3, 16, 16), (5, 9, 3, 16, 16))
        assert (batch.support_y.shape, batch.query_y.shape) == ((5, 6, *shape), (5, 9, *shape))
        assert batch.mode.tolist() == [0, 1, 0, 1, 0]
        truth = {"depth": np.concatenate([x[1] for x in drawn])[:, None] / 10, "vanishing": np.concatenate([x[3] for x in drawn]),
                 "normals": (np.concatenate([x[2] for x in drawn]).transpose(0, 3, 1, 2) + 1) / 2}[kind]
        for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
            for t in range(5):
                for image, label in zip(x[t], y[t]):
                    at = (images == (image * 255).round().byte().permute(1, 2, 0).numpy()).all((1, 2, 3)).nonzero()[0]
                    assert len(at) == 1 and at[0] // 32 == batch.mode[t], "one image, of the task's domain"
                    np.testing.assert_allclose(label, truth[at[0]], atol=1e-5)
        assert all(len({x.numpy().tobytes() for x in torch.cat([batch.support_x[t], batch.query_x[t]])}) == 15 for t in range(5))
        assert torch.equal(test.tasks(256, 2).query_y, batch.query_y[2:4])
        one, two = (data.Scenes.of(get_args(afr, *SCENE_WORDS, "--tasks", kind, "--cache-dir", cache, "--seed", seed), "train", kind) for seed in (0, 1))
        assert not np.array_equal(one.indices(0, 9)[1], two.indices(0, 9)[1])
        assert set(one.indices(0, 60)[0]) == {0, 1, 2}
        x, y = test.everything(1)
        assert (len(x), len(y)) == (32, 32)
    classes = Episodes.of(get_args(afr, *SCENE_WORDS, "--cache-dir", cache), "test")
    assert classes.class_names == [[f"scenes-test-class-0{c}" for c in range(4)]]
    kinds = np.concatenate([x[4] for x in drawn])
    batch = classes.tasks(0, 1)
    for image, y in zip(batch.query_x[0], batch.query_y[0]):
        at = (images == (image * 255).round().byte().permute(1, 2, 0).numpy()).all((1, 2, 3)).nonzero()[0][0]
        assert kinds[at] == classes.indices(0, 0, 1)[0][0][y]
    fails(capsys, lambda: data.prepare("scenes", 16, "nowhere", cache), "ray-cast", "--synthetic")
    fails(capsys, lambda: data.Scenes("depth", "scenes", "test", 30, 3, 16, cache_dir=cache, synthetic=True), "a domain has 32 images", "--shots")


def write_depth_folder(root, focal=50.0, shape=(24, 32), distance=2000):
    """A wall, straight ahead, with a hole in its depth: <split>/<domain>/."""
    for split in data.SPLITS:
        for domain in ("attic", "barn"):
            folder = root / split / domain
            for i in range(6):
                picture(folder / f"{i}.jpg", size=shape[1])
                Image.open(folder / f"{i}.jpg").resize(shape[::-1]).save(folder / f"{i}.jpg")
                depth = np.full(shape, distance + 10 * i, np.uint16)
                depth[10:12, 14:16] = 0
                Image.fromarray(depth).save(folder / f"{i}.png")
            (folder / "focal.txt").write_text(f"{focal}\n")


def test_photographs_with_depth(tmp_path, capsys):
    write_depth_folder(tmp_path / "root" / "mine")
    places = {"root": tmp_path / "root", "cache_dir": tmp_path / "cache"}
    depth = data.Scenes("depth", "mine", "test", 2, 3, 24, **places)
    batch = depth.tasks(0, 2)
    assert batch.support_y.shape == (2, 2, 1, 24, 24)
    y = batch.query_y
    assert ((y == -1).sum((2, 3, 4)) == 4).all(), "a hole of 2 x 2 pixels"
    assert {round(x, 4) for x in y[y >= 0].unique().tolist()} <= {round(0.2 + 0.001 * i, 4) for i in range(6)}
    normals = data.Scenes("normals", "mine", "test", 2, 3, 24, **places).tasks(0, 1).query_y[0]
    known = normals[:, 0] >= 0
    assert 0.7 < known.float().mean() < 0.95
    torch.testing.assert_close(normals.permute(0, 2, 3, 1)[known], torch.tensor([0.5, 0.5, 0.0]).expand(int(known.sum()), 3), atol=1e-4, rtol=0)
    assert Episodes(["mine"], "test", 2, 1, 2, 24, **places).class_names == [["attic", "barn"]]
    fails(capsys, lambda: data.Scenes("vanishing", "mine", "test", 2, 3, 24, **places), "no labels for vanishing", "--modes scenes")
    done = run("data.py", "show", "mine", "--data-root", tmp_path / "root", "--cache-dir", tmp_path / "cache", "--image-size", 24, "--out", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "x.png").size == (3 * 154, 2 * 168 + 34)
    folder = tmp_path / "root" / "mine" / "test" / "barn"
    for damage, said in ((lambda: (folder / "focal.txt").write_text("wide"), "holds 'wide'"), (lambda: (folder / "focal.txt").unlink(), "no focal.txt"),
                         (lambda: (folder / "3.png").unlink(), "no depth image"), (lambda: (folder / "3.png").write_bytes(b"x"), "cannot be decoded"),
                         (lambda: Image.fromarray(np.zeros((3, 3), np.uint16)).save(folder / "3.png"), "the same view")):
        (folder / "focal.txt").write_text("50")
        Image.fromarray(np.full((24, 32), 2000, np.uint16)).save(folder / "3.png")
        damage()
        fails(capsys, lambda: data.Scenes("depth", "mine", "test", 2, 3, 24, **places), "barn", said)


def test_normals_of_a_tilted_plane_are_exact():
    size, focal, n = 30, 33.0, np.array([0.3, -0.8, -0.5])
    n /= np.linalg.norm(n)
    at = np.arange(size) + 0.5 - size / 2
    rays = np.stack(np.broadcast_arrays(at[None] / focal, at[:, None] / focal, 1.0), -1)
    depth = -2 / (rays @ n)                             # n . point = -2
    depth[(depth <= 0) | (depth > 30)] = 0
    made, known = data.normals_from_depth(depth, focal)
    assert known.sum() > 100
    assert not known[depth == 0].any()
    np.testing.assert_allclose(made[known], np.broadcast_to(n, made[known].shape), atol=1e-9)


def test_several_high_level_tasks_from_start_to_end(few_scenes, tmp_path, cache, monkeypatch, capsys):
    words = [*SCENE_WORDS, "--tasks", *data.KINDS, "--modulation", "pam", "--meta-batch", 2, "--iterations", 4, "--log-every", 2, "--test-tasks", 16,
             "--val-every", 2, "--val-tasks", 8, "--cache-dir", cache]
    call(afr, monkeypatch, *words, "--out", tmp_path / "whole")
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["strata"] == list(data.KINDS) == list(result["accuracy"]), "no overall of unlike tasks"
    assert (result["synthetic"], result["modes"], result["per_task_mode"]) == (True, ["scenes"], [0, 1, 2, 3] * 4)
    for i, kind in enumerate(data.KINDS):
        for key, tasks in zip(afr.KEYS, afr.PER_TASK):
            assert math.isclose(result[key][kind]["mean"], np.mean(result[tasks][i::4]), abs_tol=1e-3)
            assert f"{kind:28}{result['accuracy'][kind]['mean']:.2f} +- " in shown
    assert "RAY-CAST, NOT MMT" in shown and "Table" not in shown and "overall" not in shown
    call(afr, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 2)
    call(afr, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"] for name in ("whole", "part"))
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    single = get_args(afr, *SCENE_WORDS, "--tasks", "depth", "--cache-dir", cache)
    assert all(torch.equal(w, afr.init_params(get_args(afr, *words))[k]) for k, w in afr.init_params(get_args(
        afr, *SCENE_WORDS, "--modulation", "pam", "--tasks", "depth")).items()), "single and multi begin alike"
    of = data.MetaTasks(get_args(afr, *words), "train").of
    assert not (of[1].indices(0, 4)[1] == of[2].indices(0, 4)[1]).all(), "two high-level tasks are not trained on the same images"
    assert result["domains"] == dict.fromkeys(data.KINDS[1:], 2)
    assert data.MetaTasks(single, "test").sha256(4) == data.MetaTasks(get_args(afr, *words), "test").of[1].sha256(4), "and are tested alike"
    fails(capsys, lambda: afr.get_args([*map(str, words), "--test-tasks", "18"]), "a multiple of 4")
    fails(capsys, lambda: afr.get_args([*map(str, SCENE_WORDS), "--tasks", "depth", "--modes", "scenes", "cub"]), "give one")
    fails(capsys, lambda: afr.get_args([*map(str, SCENE_WORDS), "--transfer", "cub"]), "leave it out")


def test_attention_report(few_scenes, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(afr, "REPORTED", 6)
    monkeypatch.setattr(afr, "best_weights", functools.partial(afr.best_weights, steps=25))
    words = [*SCENE_WORDS, "--tasks", "classification", "depth", "--meta-batch", 2, "--iterations", 4, "--attention-lr", 0.1, "--test-tasks", 8, "--val-tasks", 8,
             "--cache-dir", cache, "--out", tmp_path / "run"]
    fails(capsys, lambda: call(afr, monkeypatch, *words, "--attention-report"), "--attention-report, but there is no")
    call(afr, monkeypatch, *words)
    result = (tmp_path / "run" / "result.json").read_text()
    call(afr, monkeypatch, *words, "--attention-report", "--report-tasks", 2)
    report = json.loads((tmp_path / "run" / "attention.json").read_text())
    assert (report["method"], report["synthetic"], set(report["found"])) == ("AM", True, {"classification", "depth"})
    params = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["params"]
    args = get_args(afr, *words)
    test = data.MetaTasks(args, "test")
    for kind, sampler in zip(args.tasks, test.of):
        of = report["found"][kind]
        w, best = np.array(of["w"]), np.array(of["best"])
        assert (w.shape, best.shape) == ((6, 4, 4), (2, 4, 4))
        task = Task(*(x[0] for x in sampler.tasks(1, 1)))
        with torch.no_grad():
            mine = afr.attention(params, kind, afr.embed(params, task.support_x, afr.Norm()), task.support_y, args)[0]
        np.testing.assert_allclose(w[1], mine, atol=1e-6)
        cosine = [(w[j, 3] * best[j, 3]).sum() / np.linalg.norm(w[j, 3]) / np.linalg.norm(best[j, 3]) for j in range(2)]
        assert math.isclose(of["cosine"]["block4"]["mean"], np.mean(cosine), abs_tol=1e-3)
        above = [x[:, 2] > x[:, 2].mean(1, keepdims=True) for x in (w, best)]       # what is weighed less than the mean map
        same = [np.mean(above[0][j + 1] == above[1][j]) for j in range(2)]
        assert math.isclose(of["same_sign_next"]["block3"]["mean"], np.mean(same), abs_tol=1e-3)
        # the trained weights are better on all data than none, with everything else as it was
        x, y = sampler.everything(0)
        task = Task(*(x[0] for x in sampler.tasks(0, 1)))
        with torch.no_grad():
            adapted, _ = afr.adapt(params, task, args, kind)
            none, trained = (afr.criterion(kind, afr.predict(adapted, kind, afr.embed(params, x, afr.Norm(), v), args), y)
                             for v in (None, torch.tensor(best[0]).float()))
        assert trained < none
    assert Image.open(tmp_path / "run" / "attention.png").width > 500
    assert (tmp_path / "run" / "result.json").read_text() == result
    fails(capsys, lambda: get_args(afr, "--modulation", "none", "--attention-report"), "give --modulation")


def test_everything_of_a_task(cache):
    made = episodes(cache, split="test")
    for number in (0, 3):                               # of Omniglot, turned, and of mini-ImageNet
        x, y = made.everything(number)
        assert (len(x), y.bincount().tolist()) == (200, [40] * 5)
        task = made.tasks(number, 1)
        for images, labels in ((task.support_x[0], task.support_y[0]), (task.query_x[0], task.query_y[0])):
            for image, label in zip(images, labels):
                at = (x == image).all((1, 2, 3)).nonzero().flatten().tolist()
                assert len(at) == 1 and y[at[0]] == label


def test_gradients_of_several_high_level_tasks_add_up():
    """Eq. 3: the sum over high-level tasks of their mean losses."""
    args, params = make_afr("AM", "--tasks", *data.KINDS)
    batches = [make_afr_task(kind, tasks=2) for kind in data.KINDS]
    losses, found = afr.run_tasks(params, batches, args, False)
    assert losses.shape == (8,) and found.shape == (8, 1)
    expected = {}
    for j, (kind, batch) in enumerate(zip(data.KINDS, batches)):
        alone = [afr.task_loss(params, Task(*(x[i] for x in batch)), args, kind)[0] for i in range(2)]
        torch.testing.assert_close(losses[j::4], torch.stack(alone).detach())
        gradients = torch.autograd.grad(sum(alone) / 2, list(params.values()), allow_unused=True)
        for k, g in zip(params, gradients):
            expected[k] = expected.get(k, 0) + (0 if g is None else g)
    for k, w in params.items():
        torch.testing.assert_close(w.grad, expected[k], rtol=1e-7, atol=1e-10)


def test_unknown_labels_count_for_nothing():
    y, known = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4) > 0.4
    outputs = torch.where(known, y + torch.where(torch.rand(3, 1, 4, 4) > 0.5, 5e-4, 0.1), 77.0)
    masked = torch.where(known, y, -1.0)
    torch.testing.assert_close(afr.criterion("depth", outputs, masked), (outputs - y)[known].square().mean())
    within, _, error, _ = afr.measures("depth", [outputs, outputs], masked)
    torch.testing.assert_close(within, 100 * ((outputs - y)[known].abs() < 1e-3).float().mean())
    torch.testing.assert_close(error, 1000 * (outputs - y)[known].square().mean())
    assert afr.criterion("depth", outputs, torch.full_like(y, -1)) == 0


def test_a_decoder_gives_the_size_of_its_image():
    for size in (16, 28, 42, 84):
        for kind, channels in (("depth", 1), ("normals", 3)):
            args = get_args(afr, "--tasks", kind, "--image-size", size, "--filters", 4)
            params = afr.init_params(args)
            x = afr.embed(params, torch.rand(2, 3, size, size), afr.Norm())
            assert x.shape == (2, 4, size // 16, size // 16)
            assert afr.predict(params, kind, x, args).shape == (2, channels, size, size)
# -------------------------------------------------------------------------------------------------------- multi-shot

def make_multishot(algorithm, *words, dtype=torch.float64):
    args = get_args(modgrad_multishot, "--algorithm", algorithm, "--channels", 4, "--ways", 3, "--image-size", 16, "--device", "cpu", "--context", 6,
                    "--steps", 2, "--batch", 5, "--test-steps", 3, *words)
    return args, {k: w.to(dtype).requires_grad_() for k, w in modgrad_multishot.init_params(args).items()}


def make_long_task(steps=2, tasks=None, seed=0):
    rng, lead = torch.Generator().manual_seed(seed), (tasks or 1,)
    batch = Task(torch.rand(*lead, steps, 5, 1, 16, 16, generator=rng).double(), torch.randint(3, (*lead, steps, 5), generator=rng),
                 torch.rand(*lead, 6, 1, 16, 16, generator=rng).double(), torch.arange(3).repeat_interleave(2).expand(*lead, -1), torch.zeros(lead, dtype=torch.int64))
    return batch if tasks else Task(*(x[0] for x in batch))


def multishot_words(cache, *words):
    return ["--synthetic", "--cache-dir", cache, "--image-size", 16, "--steps", 3, "--test-steps", 4, "--batch", 30, *words]


def test_alphabets(cache):
    args = get_args(modgrad_multishot, *multishot_words(cache, "--shots", 2, 9))
    test = Alphabets.of(args, "test")
    batch, (alphabets, held_out, rows, labels, u) = test.tasks(5, 4), test.indices(5, 4)
    assert [x.shape for x in batch] == [(4, 4, 30, 1, 16, 16), (4, 4, 30), (4, 100, 1, 16, 16), (4, 100), (4,)]
    assert (batch.mode.tolist(), u.shape) == ([2, 0, 1, 2], (4, 100 + 120, 4))
    assert torch.equal(test.tasks(6, 1).support_x[0], batch.support_x[1]), "a task does not depend on how many are asked for"
    for i in range(4):
        starts = test.characters[alphabets[i]][:, 0]
        assert all(set(r // data.SYNTHETIC_IMAGES) <= set(starts // data.SYNTHETIC_IMAGES) for r in (held_out[i].reshape(-1), rows[i].reshape(-1)))
        assert len(set(held_out[i].reshape(-1))) == 100
        assert not set(held_out[i].reshape(-1)) & set(rows[i].reshape(-1)), "held out"
        classes = held_out[i][:, 0] // data.SYNTHETIC_IMAGES
        assert len(set(classes)) == 20
        assert (rows[i] // data.SYNTHETIC_IMAGES == classes[labels[i]]).all(), "labels are those of the held-out drawings"
        assert max(len(set(rows[i][labels[i] == n])) for n in range(20)) <= 9
    long = Alphabets.of(get_args(modgrad_multishot, *multishot_words(cache, "--shots", 2, 9, "--test-steps", 60, "--seed", 3)), "test")
    assert np.array_equal(long.indices(5, 4)[2][:, :4], rows), "fewer steps are a prefix"
    assert long.sha256(4) != test.sha256(4)
    shown = [len(set(x)) for task, y in zip(long.indices(0, 30)[2], long.indices(0, 30)[3]) for x in (task[y == n] for n in range(20))]
    assert (min(shown), max(shown)) == (2, 9), "nearly all drawings are seen in 60 steps"
    equal = Alphabets.of(get_args(modgrad_multishot, *multishot_words(cache, "--shots", 4, 4, "--test-steps", 60)), "test").indices(0, 3)
    assert all(len(set(task[y == n])) == 4 for task, y in zip(equal[2], equal[3]) for n in range(20))
    one, two = (Alphabets.of(argparse.Namespace(**vars(args) | {"seed": seed}), "train") for seed in (0, 1))
    A = len(one.names)
    assert (A, len(Alphabets.of(args, "val").names), len(test.names)) == (17, 3, 3)
    assert all(sorted(one.alphabets(turn * A, A)) == list(range(A)) for turn in range(3)), "by turns"
    assert np.array_equal(one.alphabets(A - 3, 9), one.alphabets(0, 3 * A)[A - 3:A + 6])
    assert not np.array_equal(one.alphabets(0, A), two.alphabets(0, A))
    assert not np.array_equal(one.alphabets(0, A), one.alphabets(A, A))
    used = [{name for _, name in zip(range(10 ** 4), (row for x in Alphabets.of(args, split).characters for row in x[:, 0]))} for split in data.SPLITS]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2], "no character in two splits"


def test_alphabets_turn_move_and_scale_their_drawings(cache, monkeypatch):
    test = Alphabets.of(get_args(modgrad_multishot, *multishot_words(cache)), "test")
    _, held_out, rows, *_ = test.indices(0, 1)
    for u, change in (((0, 0.5, 0.5, 0.5), lambda x: x), ((0.25, 0.5, 0.5, 0.5), lambda x: torch.rot90(x, 1, (-2, -1))),
                      ((0.5, 0.5, 0.5, 0.5), lambda x: torch.rot90(x, 2, (-2, -1)))):
        original = Alphabets.draw
        with monkeypatch.context() as patch:
            patch.setattr(Alphabets, "draw", lambda self, *x, u=u, original=original: (*original(self, *x)[:3], np.tile(u, (100 + 120, 1))))
            task = test.tasks(0, 1)
        for found, of in ((task.query_x[0, :, 0], held_out[0].reshape(-1)), (task.support_x[0, :, :, 0], rows[0])):
            torch.testing.assert_close(found, change(test.images[of] / 255), atol=1e-4, rtol=0)
    with monkeypatch.context() as patch:                # moved by a fifth of 16 pixels to each side
        patch.setattr(Alphabets, "draw", lambda self, *x, original=original: (*original(self, *x)[:3], np.tile((0, 0.5, 1, 0.5), (100 + 120, 1))))
        far = test.tasks(0, 1).query_x[0].sum((0, 1, 2))
    columns, plain = torch.arange(16.0), (test.images[held_out[0].reshape(-1)] / 255).sum((0, 1))
    assert math.isclose(abs((columns * far).sum() / far.sum() - (columns * plain).sum() / plain.sum()), 3.2, abs_tol=0.6)


def test_alphabets_bad_input(cache, capsys, tmp_path):
    for words, said in ((["--shots", 5, 40], "lower --shots"), (["--ways", 25], "lower --ways")):
        fails(capsys, lambda words=words: Alphabets.of(get_args(modgrad_multishot, *multishot_words(cache, *words)), "test"), said)
    for name in ("a", "b"):
        (tmp_path / "mine/train/A" / name).mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / "mine/train/A" / name / "1.png")
    words = ["--modes", "mine", "--data-root", tmp_path, "--cache-dir", tmp_path / "cache", "--ways", 2]
    fails(capsys, lambda: Alphabets.of(get_args(modgrad_multishot, *words), "test"), "mine has 1 alphabets", "37 are needed")
    for bad, said in (("--adapt fc9", "choose from all"), ("--algorithm reptile --adapt head", "leave --adapt out"), ("--adapt all", "name the layers"),
                      ("--shots 3 2", "smaller one first"), ("--shots 0 2", "from 1 on"), ("--steps 0", "--steps 0"), ("--test-tasks 1", "--test-tasks 1"), ("--outer rmsprop", "--outer")):
        fails(capsys, functools.partial(modgrad_multishot.get_args, bad.split()), said)


@real("omniglot")
def test_alphabets_of_real_omniglot():
    words = ["--data-root", ROOT, "--cache-dir", HERE / ".cache"]
    made = {split: Alphabets.of(get_args(modgrad_multishot, *words), split) for split in data.SPLITS}
    assert {split: len(x.names) for split, x in made.items()} == {"train": 25, "val": 11, "test": 10}
    assert len({name for x in made.values() for name in x.names}) == 46
    rows = [{row for characters in x.characters for row in characters[:, 0]} for x in made.values()]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 1623 - 14 - 14 - 16 - 17, "all but four small alphabets"
    assert [name.rpartition("/")[2] for name in made["test"].names] == [
        "Tengwar", "Japanese_(hiragana)", "Alphabet_of_the_Magi", "Asomtavruli_(Georgian)", "Aurek-Besh", "Gujarati", "Old_Church_Slavonic_(Cyrillic)",
        "Tifinagh", "Syriac_(Serto)", "Malayalam"]
    _, held_out, shown, *_ = made["test"].indices(0, 2)
    for one, two in zip(held_out, shown):
        assert not set(one.reshape(-1)) & set(two.reshape(-1))


@pytest.mark.parametrize("vectorise", [False, True])
@pytest.mark.parametrize("algorithm", ["modgrad", "maml"])
def test_meta_gradients_of_multishot(algorithm, vectorise):
    args, params = make_multishot(algorithm)
    batch, rng = make_long_task(tasks=2), torch.Generator().manual_seed(3)
    modgrad_multishot.run_tasks(params, batch, args, vectorise)
    for part in ("base", "generator") if algorithm == "modgrad" else ("base",):
        direction = {k: torch.randn(w.shape, generator=rng).double() for k, w in params.items() if (part == "generator") == k.startswith("generator.")}

        def loss(step, direction=direction):
            moved = {k: w.detach() + step * direction.get(k, 0) for k, w in params.items()}
            return np.mean([modgrad_multishot.task_loss(moved, Task(*(x[i] for x in batch)), args)[0].item() for i in range(2)])
        found = sum((params[k].grad * d).sum().item() for k, d in direction.items())
        assert math.isclose(found, (loss(1e-8) - loss(-1e-8)) / 2e-8, rel_tol=1e-4, abs_tol=1e-8), part


def sgd_by_hand(params, task, alpha):
    """Where plain SGD on the task's batches ends, by torch.autograd alone -> parameters that are leaves."""
    theta = {k: w.detach().clone() for k, w in params.items()}
    for x, y in zip(task.support_x, task.support_y):
        theta = {k: w.detach().requires_grad_() for k, w in theta.items()}
        loss = F.cross_entropy(modgrad_multishot.run_blocks(theta, x, modgrad_multishot.Norm()), y)
        theta = {k: w - alpha * g for (k, w), g in zip(theta.items(), torch.autograd.grad(loss, list(theta.values())))}
    return {k: w.detach().requires_grad_() for k, w in theta.items()}


@pytest.mark.parametrize("vectorise", [False, True])
def test_the_fomaml_gradient_is_the_one_at_the_last_point(vectorise):
    args, params = make_multishot("fomaml", "--alpha", 0.3)
    batch, expected = make_long_task(tasks=2), {k: 0 for k in params}
    for i in range(2):
        task = Task(*(x[i] for x in batch))
        theta = sgd_by_hand(params, task, 0.3)
        F.cross_entropy(modgrad_multishot.run_blocks(theta, task.query_x, modgrad_multishot.Norm()), task.query_y).backward()
        expected = {k: expected[k] + w.grad / 2 for k, w in theta.items()}
    modgrad_multishot.run_tasks(params, batch, args, vectorise)
    for k, w in params.items():
        torch.testing.assert_close(w.grad, expected[k])
    plain, others = make_multishot("maml", "--alpha", 0.3, "--first-order")
    modgrad_multishot.run_tasks(others, batch, plain, vectorise)
    second, exact = make_multishot("maml", "--alpha", 0.3)
    modgrad_multishot.run_tasks(exact, batch, second, vectorise)
    for k, w in others.items():
        torch.testing.assert_close(w.grad, expected[k])
    assert not torch.allclose(exact["conv3.weight"].grad, expected["conv3.weight"])


@pytest.mark.parametrize("vectorise", [False, True])
def test_a_reptile_step_goes_towards_the_mean_of_the_ends(vectorise):
    args, params = make_multishot("reptile", "--lr", 0.25)
    batch, before = make_long_task(tasks=3), {k: w.detach().clone() for k, w in params.items()}
    ends = [sgd_by_hand(params, Task(*(x[i] for x in batch)), args.alpha) for i in range(3)]
    optimizer = torch.optim.SGD(params.values(), lr=args.lr)
    losses, _ = modgrad_multishot.run_tasks(params, batch, args, vectorise)
    optimizer.step()
    for k, w in params.items():
        torch.testing.assert_close(w.detach(), before[k] + 0.25 * (sum(end[k].detach() for end in ends) / 3 - before[k]))
    with torch.no_grad():
        found = [F.cross_entropy(modgrad_multishot.run_blocks(end, x, modgrad_multishot.Norm()), y) for end, x, y in zip(ends, batch.query_x, batch.query_y)]
    torch.testing.assert_close(losses, torch.stack(found))      # what is logged is the loss, not the distance


def test_multishot_starts_at_one_as_maml_on_the_same_layers():
    x, y = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(20)
    steps = {}
    for name, words in (("maml", "--algorithm maml --adapt conv3 conv4"), ("one", "--start-at-one")):
        args = get_args(modgrad_multishot, "--device", "cpu", *words.split())
        params = modgrad_multishot.init_params(args)

        def loss(fast, params=params):
            return F.cross_entropy(modgrad_multishot.run_blocks(params | fast, x, modgrad_multishot.Norm()), y)
        fast = {k: params[k] for k in modgrad_multishot.adapted_keys(args, params)}
        step = {"maml": modgrad_multishot.maml_step, "one": modgrad_multishot.modgrad_step}[name]
        after = step(params, fast, loss, args, lambda gradient: gradient)
        steps[name] = {k: (after[k] - fast[k]).detach() for k in fast if "weight" in k}
    assert relative_distance(steps["one"], steps["maml"]) < 0.05


def test_multishot_modulation_of_one_is_maml_on_these_layers():
    ours, cells = make_multishot("modgrad")
    args, params = make_multishot("maml", "--adapt", "conv3", "conv4")
    for k, w in cells.items():
        if k.startswith("generator."):
            w.data.fill_(1.0 if k.endswith("2.bias") else 0.0)
    (one, two), task = ((ours, cells), (args, params)), make_long_task()
    found = [modgrad_multishot.task_loss(p, task, a)[1] for a, p in (one, two)]
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], modgrad_multishot.run_blocks(params, task.query_x, modgrad_multishot.Norm()))


@pytest.mark.parametrize("algorithm", modgrad_multishot.METHODS)
def test_what_a_multishot_test_measures(algorithm):
    """Losses before each step, accuracies after: the same as from tasks cut short; and inductive predictions stand alone."""
    args, params = make_multishot(algorithm)
    task, args.first_order = make_long_task(steps=6), False
    assert modgrad_multishot.marks(6) == [1, 2, 5, 6] and modgrad_multishot.marks(2) == [1, 2] and modgrad_multishot.marks(100)[-2:] == [50, 100]
    losses, after, inductive = modgrad_multishot.task_loss(params, task, args, evaluate=True)
    for i, k in enumerate((1, 2, 5, 6)):
        cut = task._replace(support_x=task.support_x[:k], support_y=task.support_y[:k])
        torch.testing.assert_close(after[i], modgrad_multishot.task_loss(params, cut, args)[1])
    last = task._replace(support_x=task.support_x[:5], support_y=task.support_y[:5], query_x=task.support_x[5], query_y=task.support_y[5])
    torch.testing.assert_close(losses[5], F.cross_entropy(modgrad_multishot.task_loss(params, last, args)[1], task.support_y[5]))
    fewer = modgrad_multishot.task_loss(params, task._replace(query_x=task.query_x[:4], query_y=task.query_y[:4]), args, evaluate=True)
    torch.testing.assert_close(fewer[2], inductive[:4])
    assert not torch.allclose(fewer[1], after[:, :4])


def test_intervals_over_alphabets():
    x = np.array([1.0, 2, 3, 10, 20])
    found = modgrad_multishot.summary(x, np.array([0, 1, 0, 1, 1]))
    assert found == {"mean": round((2 + 32 / 3) / 2, 4), "ci95": round(12.706 * np.std([2, 32 / 3], ddof=1) / math.sqrt(2), 4)}
    assert modgrad_multishot.summary(np.stack([x, x + 1], 1), np.array([0, 1, 0, 1, 1]))["mean"] == [found["mean"], round(found["mean"] + 1, 4)]


def test_a_multishot_run_from_start_to_end(tmp_path, cache, monkeypatch, capsys):
    words = multishot_words(cache, "--channels", 2, "--context", 4, "--meta-batch", 2, "--iterations", 4, "--test-tasks", 6, "--val-tasks", 3, "--val-every", 2,
                            "--log-every", 2, "--batch", 5)
    found = {}
    for algorithm in modgrad_multishot.METHODS:
        call(modgrad_multishot, monkeypatch, *words, "--algorithm", algorithm, "--out", tmp_path / algorithm)
        result = found[algorithm] = json.loads((tmp_path / algorithm / "result.json").read_text())
        alphabets = np.array(result["per_task_alphabet"])
        assert result["accuracy"] == modgrad_multishot.summary(np.array(result["per_task"]), alphabets)
        loss = modgrad_multishot.summary(np.array(result["per_task_loss"]), alphabets)
        assert result["loss"] == pytest.approx(loss, abs=2e-4), "of rounded ones"
        assert math.isclose(result["loss"]["mean"], np.mean(result["curve"]["mean"]), abs_tol=2e-4)
        assert (len(result["curve"]["mean"]), result["after"]["steps"], result["after"]["mean"][-1]) == (4, [1, 2, 4], result["accuracy"]["mean"])
        shown = capsys.readouterr().out
        assert "paper protocol {mean:.2f} +- {ci95:.2f}".format(**result["accuracy"]) in shown
        assert "SYNTHETIC" in shown and "Figure 5" not in shown
        log = [json.loads(line) for line in (tmp_path / algorithm / "log.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in log] == [2, 4] and all("validation" in line for line in log)
    assert len({x["tasks_sha256"] for x in found.values()}) == 1, "the same tasks for all"
    for algorithm in ("modgrad", "reptile"):            # Adam, and SGD
        for more in (["--iterations", 2], []):
            call(modgrad_multishot, monkeypatch, *words, "--algorithm", algorithm, "--out", tmp_path / "part" / algorithm, *more)
        one, two = (torch.load(at / algorithm / "checkpoint.pt", weights_only=True)["params"] for at in (tmp_path, tmp_path / "part"))
        assert all(torch.equal(w, two[k]) for k, w in one.items())
        shutil.rmtree(tmp_path / "part")
    fails(capsys, functools.partial(call, modgrad_multishot, monkeypatch, *words, "--out", tmp_path / "maml"), "give another --out")
    done = here("tables.py", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    made = done.stdout[done.stdout.index("### Multi-shot"):]
    assert made.startswith("### Multi-shot, omniglot, 20-way, 1 to 15 shots\n\n**Synthetic images.** **5 images a step instead of 20.** **16 px instead of 28.**")
    rows = {line.split(" | ")[0].strip("| "): line for line in made.splitlines() if line.startswith("| ")}
    assert "{mean:.2f} ± {ci95:.2f}".format(**found["reptile"]["accuracy"]) in rows["Reptile, `--steps 3`"]
    assert "LEAP" not in made and "85.1" not in made
    pair = [np.array(found[name]["per_task"]) for name in ("modgrad", "fomaml")]
    expected = modgrad_multishot.summary(pair[0] - pair[1], alphabets)
    assert f"{expected['mean']:+.2f} ± {expected['ci95']:.2f}" in rows["ModGrad, `--context 4 --steps 3` - FOMAML, `--steps 3`"]
    (figure,) = re.findall(r"\((modgrad-multishot[^)]*)\)", made)
    assert Image.open(tmp_path / "out" / figure).size[0] > 900
    (tmp_path / "trials").mkdir()
    (tmp_path / "reptile").rename(tmp_path / "trials" / "reptile")
    validation = json.loads((tmp_path / "trials" / "reptile" / "log.jsonl").read_text().splitlines()[-1])["validation"]["accuracy"]
    made = here("tables.py", tmp_path, "--out", tmp_path / "out").stdout
    trial = made[made.index("### Trials of step sizes on validation classes, multi-shot, omniglot, 20-way, 1 to 15 shots"):].split("\n###")[0]
    assert "| Reptile, `--steps 3` | **0.1: {mean:.2f} ± {ci95:.2f}** |".format(**validation) in trial
    assert "**16 px instead of 28.**" in trial and "| Reptile" not in made.replace(trial, ""), "trials are no results"


def test_the_multishot_table_shows_the_papers_numbers(tmp_path, cache, monkeypatch):
    words = multishot_words(cache, "--channels", 2, "--context", 4, "--meta-batch", 2, "--iterations", 1, "--test-tasks", 6, "--batch", 5, "--test-steps", 2)
    for algorithm in ("modgrad", "fomaml"):
        call(modgrad_multishot, monkeypatch, *words, "--algorithm", algorithm, "--out", tmp_path / algorithm)
        result = json.loads((tmp_path / algorithm / "result.json").read_text())
        result["args"] |= {"test_steps": 100, "context": 300, "steps": modgrad_multishot.DEFAULTS[algorithm][0]}
        (tmp_path / algorithm / "result.json").write_text(json.dumps(result | {"synthetic": False}))
    made = here("tables.py", tmp_path, "--out", tmp_path / "out").stdout
    assert "has 83.3 in the paper" in made
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in made[made.index("### Multi-shot"):].splitlines() if line.startswith("| ")}
    assert (rows["ModGrad"][3], rows["FOMAML"][3]) == ("85.1", "-")


# ------------------------------------------------------------------------------------------------------ transference

def make_state(modulation="kml", dtype=torch.float64):
    args, params = make_params(mprotonet, modulation, "--device", "cpu", dtype=dtype)
    params = {k: w.detach() for k, w in params.items()}
    return transference.State("MProtoNet+KML", 5, 10, args, params, Path("run"))


def test_transference_of_no_step_is_one_and_leaves_the_parameters_alone():
    state = make_state()
    before = {k: w.clone() for k, w in state.params.items()}
    ratios, gains = transference.measure(state, make_task(tasks=3), make_task(seed=1, tasks=2), 0.0, "all")
    assert ratios.shape == gains.shape == (3, 2)
    assert (ratios == 1).all()
    assert (gains == 0).all()
    transference.measure(state, make_task(tasks=3), make_task(seed=1, tasks=2), 0.1, "all")
    assert all(torch.equal(w, before[k]) for k, w in state.params.items())


@pytest.mark.parametrize("update", ["all", "base"])
@pytest.mark.parametrize("device", ["cpu", "vmap"])
def test_loss_ratio_agrees_with_a_computation_step_by_step(update, device):
    """Algorithm 1 for each pair, by torch.autograd, in float64; the loop, and vmap as on a GPU."""
    state = make_state()
    sources, targets = make_task(tasks=3), make_task(seed=1, tasks=2)
    state.options.device = device
    ratios, gains = transference.measure(state, sources, targets, 1e-3, update)
    for i, source in enumerate(transference.single(sources)):
        params = {k: w.clone().requires_grad_(update == "all" or not k.startswith(("encoder", "generator")))
                  for k, w in state.params.items()}
        mprotonet.task_loss(params, source, state.options)[0].backward()
        stepped = {k: w.detach() - 1e-3 * (w.grad if w.grad is not None else 0) for k, w in params.items()}
        for j, target in enumerate(transference.single(targets)):
            (before, old, *_), (after, new, *_) = (mprotonet.task_loss(p, target, state.options) for p in (state.params, stepped))
            assert math.isclose(ratios[i, j], after / before, rel_tol=1e-9)
            change = 100 * ((new.argmax(1) == target.query_y).double().mean() - (old.argmax(1) == target.query_y).double().mean())
            assert math.isclose(gains[i, j], change, abs_tol=1e-9)


def test_self_transference_and_the_step_that_is_chosen():
    state, batch = make_state(), make_task(tasks=4)
    small = transference.self_transference(state, batch, [1e-6], "all")
    assert (small < 1).all(), "a small step lowers the loss it is made for"
    alpha = transference.choose_alpha(state, batch, "all", 0.95)
    assert math.isclose(np.median(transference.self_transference(state, batch, [alpha], "all")), 0.95, abs_tol=0.01)
    smaller = transference.self_transference(state, batch, [alpha / 2 ** (k / 8) for k in range(1, 60)], "all")
    assert np.median(smaller, 0).min() > 0.95, "it is the smallest"


def test_what_steps_are_by_hand():
    state, sources, targets = make_state(), make_task(tasks=3), make_task(seed=1, tasks=2)
    cosines, own, base = transference.what_steps_are(state, sources, targets, 1e-2, "all")
    flat = lambda task: transference.gradient(state.params, task, state.options, "all")
    for i, source in enumerate(transference.single(sources)):
        one = flat(source)
        squares = {k: g.square().sum().item() for k, g in one.items()}
        in_base = sum(v for k, v in squares.items() if not k.startswith(("encoder.", "generator.")))
        assert math.isclose(base[i], 100 * in_base / sum(squares.values()), rel_tol=1e-9)
        for j, target in enumerate(transference.single(targets)):
            two = flat(target)
            norms = [math.sqrt(sum(g.square().sum().item() for g in x.values())) for x in (one, two)]
            assert math.isclose(cosines[i, j], sum((one[k] * two[k]).sum().item() for k in one) / math.prod(norms), rel_tol=1e-9)
    batch = Task(*(torch.cat([x[:1], y[:1]]) for x, y in zip(sources, sources)))
    torch.testing.assert_close(torch.tensor(own[:1]), torch.tensor(transference.self_transference(state, batch, [1e-2], "all")[0]))
    tiny, _ = transference.measure(state, sources, targets, 1e-7, "all")
    assert ((tiny < 1) == (cosines > 0)).all(), "what LR < 1 comes down to"


def test_labels_of_the_target_do_not_reach_the_source_step():
    state, source, target = make_state(), make_task(tasks=1), make_task(seed=1, tasks=1)
    seen, original = [], transference.sgd_step
    swapped = target._replace(query_y=target.query_y.flip(1), support_y=target.support_y.flip(1))
    try:
        transference.sgd_step = lambda *args: seen.append(original(*args)) or seen[-1]
        for batch in (target, swapped):
            transference.measure(state, source, batch, 1e-2, "all")
    finally:
        transference.sgd_step = original
    assert all(torch.equal(w, seen[1][k]) for k, w in seen[0].items())


def test_shares_of_transfer_on_hand_made_numbers():
    ratios, gains = np.array([[0.9, 1.2], [1.001, 0.999], [1.1, 0.7], [0.95, 1.0]]), None
    gains = -20 * (ratios - 1)                          # a slope of -20 points: neutral is |LR - 1| < 0.0025
    band, slope = transference.neutral_band(ratios, gains)
    assert math.isclose(slope, -20)
    assert math.isclose(band, 0.0025)
    assert transference.shares(ratios, band).tolist() == [[50, 25], [25, 25], [25, 50]]
    assert transference.neutral_band(ratios, np.zeros_like(ratios))[0] == math.inf
    assert transference.neutral_band(ratios, gains + np.array([[5, -5]]))[1] == slope, "each target about its own mean"


def test_intervals_of_transfer():
    """Resampling sources and targets: as wide as the spread of repeated experiments; no shares where the slope is uncertain."""
    def experiment(seed, J=30):
        rng = np.random.default_rng(seed)
        ratios = 1 + rng.normal(0, 0.004, (1, J)) + rng.normal(0, 0.01, (40, J))        # targets differ, pairs differ
        return ratios, -30 * (ratios - 1) + rng.normal(0, 0.3, ratios.shape)
    numbers = transference.describe(*experiment(0))
    assert math.isclose(sum(numbers[k][0] for k in ("positive", "negative", "neutral")), 100)
    assert np.allclose(np.sum(numbers["per_target"], 0), 100, atol=0.02)
    assert numbers["slope"][1] < -30 < numbers["slope"][2]
    spread = np.std([transference.statistics(*experiment(seed))["positive"] for seed in range(100)])
    mean, low, high = numbers["positive"]
    assert low < mean < high
    assert 0.7 < (high - low) / (2 * 1.96 * spread) < 1.6
    ratios, gains = experiment(1)
    for other in (np.zeros_like(gains), np.random.default_rng(0).normal(0, 1, gains.shape)):
        numbers = transference.describe(ratios, other)
        assert numbers["positive"] is None
        assert numbers["below_one"][0] == 100 * (ratios < 1).mean()
    with pytest.raises(SystemExit):
        transference.describe(ratios * np.inf, gains)


def test_differences_of_transfer_are_paired():
    """What makes a source or a target good for both states cancels: the interval of the difference is far narrower."""
    rng = np.random.default_rng(0)
    both = 1 + 0.05 * rng.normal(size=(60, 1)) + 0.05 * rng.normal(size=(1, 20))
    rows = []
    for shift in (-0.01, 0):
        ratios = both + shift + 0.002 * rng.normal(size=(60, 20))
        gains = -100 * (ratios - 1) + 0.1 * rng.normal(size=(60, 20))
        rows.append((ratios, gains, transference.describe(ratios, gains, draws=200)))
    found = transference.compare(*rows, draws=200)
    number, low, high = found["mean"]
    assert math.isclose(number, rows[0][0].mean() - rows[1][0].mean())
    assert low < -0.01 < high < 0
    wide = rows[0][2]["mean"]
    assert high - low < 0.1 * (wide[2] - wide[1])
    assert found["below_one"][0] == rows[0][2]["below_one"][0] - rows[1][2]["below_one"][0]
    assert transference.compare(rows[0], rows[0], draws=10)["positive"] == [0, 0, 0]
    assert transference.compare(rows[0], (*rows[1][:2], rows[1][2] | {"positive": None}), draws=10)["positive"] is None


def test_transference_from_end_to_end(tmp_path, cache, monkeypatch, capsys):
    call(mprotonet, monkeypatch, *TINY, "--modes", "miniimagenet", "fc100", "--keep-every", 3, "--cache-dir", cache, "--out", tmp_path / "run")
    call(kml, monkeypatch, *TINY, "--cache-dir", cache, "--out", tmp_path / "kml")
    words = ["--source-tasks", 4, "--target-tasks", 3, "--cache-dir", cache, "--alpha", 1e-3]
    done = run("transference.py", "--checkpoint", tmp_path / "run", *words, "--sweep", "--matrix", "--along", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    found = json.loads((tmp_path / "out" / "transference.json").read_text())
    assert [row["moment"] for row in found["found"]] == ["half", "final"]
    row = found["found"][0]
    assert np.array(row["LR"]).shape == (4, 3)
    assert f"| {row['state']} | 0.001 | {transference.cell(row['all']['positive'])} |" in done.stdout
    assert f"| {transference.cell(row['all']['below_one'])} | {transference.cell(row['all']['mean'], 4)} |" in done.stdout
    others = transference.other_tables(found["found"], 4)
    assert len(others) == 4 and all(table in done.stdout for table in others), "the file holds what is printed: what the steps are, sweep, two matrices"
    assert set(row["matrix"]["cells"]) == set(row["matrix"]["cells"]["fc100"]) == {"miniimagenet", "fc100"}
    assert [x["iteration"] for x in found["along"]["MProtoNet+KML"]] == [3, 6]
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {f"transference-{x}.png" for x in ("histogram", "tasks", "training")}
    made = here("tables.py", tmp_path / "out", "--out", tmp_path / "tables").stdout
    assert f"### {found['about']}, half and final\n" in made and "SYNTHETIC" in found["about"]
    assert all(table in made for table in others) and transference.shares_row(row) in made
    assert "](transference-histogram.png)" in made
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "transference.json").write_text("{}")
    fails(capsys, functools.partial(call, tables, monkeypatch, tmp_path / "bad"), "is not a whole file of transference.py")
    done = here("transference.py", "--checkpoint", tmp_path / "run", "--export", tmp_path / "half")
    files = sorted((tmp_path / "half").iterdir())
    assert len(files) == 2
    done = here("transference.py", "--checkpoint", *files, *words, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "transference.json").read_text())
    assert [r["state"] for r in again["found"]] == [r["state"] for r in found["found"]]
    assert np.shape(again["found"][0]["LR"]) == (4, 3)
    one, two = (np.array(x["found"][0]["LR"]) - 1 for x in (found, again))           # half precision changes little of a small change
    assert np.abs(one - two).max() < 0.2 * np.abs(one).max()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for bad, said in ((["--checkpoint", tmp_path / "none"], "there is no"), (["--checkpoint", tmp_path / "run", tmp_path / "copy"], "both called"), (["--checkpoint", tmp_path / "kml"], "run of MMAML+KML"),
                      (["--checkpoint", tmp_path / "run", "--at", "5"], "--keep-every 1"), (["--checkpoint", tmp_path / "run", "--alpha", "x"], "--alpha"),
                      (["--checkpoint", tmp_path / "run", "--source-tasks", "1"], "--source-tasks"),
                      (["--checkpoint", tmp_path / "run", "--self-transference", "1"], "between 0 and 1"),
                      (["--checkpoint", tmp_path / "run", "--device", "cuda:99"], "choose from cpu"),
                      (["--checkpoint", tmp_path / "run", "--source-tasks", "2", "--target-tasks", "2", "--out", files[0]], "--out")):
        fails(capsys, functools.partial(call, transference, monkeypatch, *bad, "--cache-dir", cache), said)


# ---------------------------------------------------------------------------------------------------------- episodes

def episodes(cache, modes=("omniglot", "miniimagenet"), split="train", size=28, seed=0, **kwargs):
    options = {"ways": 5, "shots": 1, "queries": 15, "synthetic": True, "cache_dir": cache} | kwargs
    return Episodes(list(modes), split, image_size=size, seed=seed, **options)


def test_episodes_have_distinct_classes_and_images_and_balanced_modes(cache):
    e = episodes(cache, shots=5)
    for m, (classes, images) in enumerate((20, 40) for _ in e.modes):
        c, i, turns, _ = e.indices(m, 0, 3000)
        assert all(len(set(row)) == 5 for row in c)
        assert all(len(set(row)) == 20 for row in i.reshape(-1, 20))
        assert set(c.ravel()) == set(range(64)), "every class can be drawn"
        assert set(i.ravel()) == set(range(40)), "every image can be drawn"
        for place in (0, 5, 19):            # no place in an episode favours an image: chi-square, 39 degrees of freedom
            seen = np.bincount(i[..., place].ravel(), minlength=40)
            assert ((seen - 375) ** 2 / 375).sum() < 80
        assert abs(np.bincount(turns.ravel(), minlength=4) / turns.size - 0.25).max() < 0.02
    batch = e.tasks(0, 10)
    assert batch.support_x.shape == (10, 25, 3, 28, 28)
    assert batch.query_x.shape == (10, 75, 3, 28, 28)
    assert batch.support_x.dtype == torch.float32
    assert 0 <= batch.query_x.min() < 0.1
    assert 0.9 < batch.query_x.max() <= 1
    assert batch.mode.bincount().tolist() == [5, 5]
    assert batch.support_y[3].tolist() == [n for n in range(5) for _ in range(5)]
    assert episodes(cache, modes=["omniglot", "miniimagenet", "fc100"]).tasks(7, 9).mode.bincount().tolist() == [3, 3, 3]


@pytest.mark.parametrize("modes, differ", [(["miniimagenet"], 6.5), (["omniglot", "miniimagenet"], 8.2)])
def test_repeated_tasks_are_drawn_with_replacement(cache, modes, differ):
    """As in the released codes: of 10 tasks, 10 (1 - 0.9^10) = 6.5 differ with one mode, 2 * 10 (1 - 0.9^5) = 8.2 with two."""
    e, found = episodes(cache, modes=modes, size=8), []
    for iteration in range(60):
        batch = e.repeated(iteration, 10)
        assert batch.mode.tolist() == e.tasks(iteration * 10, 10).mode.tolist(), "modes take turns, as in any batch"
        found.append(len({x.numpy().tobytes() for x in batch.query_x}))
    assert abs(np.mean(found) - differ) < 0.5
    assert np.std(found) > 0
    again = e.repeated(59, 10)
    assert all(torch.equal(a, b) for a, b in zip(batch, again)), "a continued run draws the same"
    pool = {x.numpy().tobytes() for x in e.tasks(590 * len(modes), 10 * len(modes)).query_x}
    assert {x.numpy().tobytes() for x in batch.query_x} <= pool, "from the 10 tasks of each mode that this iteration loads"


def test_tasks_show_the_images_that_were_drawn(cache):
    e = episodes(cache, shots=2, queries=3)
    batch = e.tasks(4, 2)
    for position, m in ((0, 0), (1, 1)):
        classes, images, turns, rows = (x[0] for x in e.indices(m, 2, 1))
        turned = torch.cat([torch.rot90(e.images[m], quarter, (1, 2)) for quarter in range(4 if m == 0 else 1)])     # as on a GPU
        for n in range(5):
            for j in range(5):
                pixels = e.images[m][e.offsets[m][classes[n]] + images[n, j]].numpy()
                if m == 0:
                    pixels = np.rot90(pixels, turns[n])         # Omniglot: the whole class is turned alike
                found = batch.support_x[position, 2 * n + j] if j < 2 else batch.query_x[position, 3 * n + j - 2]
                want = np.broadcast_to(pixels.transpose(2, 0, 1), (3, 28, 28)) / 255
                np.testing.assert_allclose(found.numpy(), want, atol=1e-6)
                assert np.array_equal(turned[rows[n, j]], pixels)


def test_a_task_does_not_depend_on_modes_size_or_number(cache):
    alone, both = (episodes(cache, modes, "test", seed=None) for modes in (["miniimagenet"], ["omniglot", "miniimagenet"]))
    for one, two in zip(alone.tasks(37, 1)[:4], both.tasks(2 * 37 + 1, 1)[:4]):
        assert torch.equal(one, two)
    for one, two in zip(both.tasks(250, 12), both.tasks(240, 40)):          # across a block of draws, and a longer batch
        assert torch.equal(one, two[10:22])
    large = episodes(cache, ["miniimagenet"], "test", size=42, seed=None)
    assert all(np.array_equal(a, b) for a, b in zip(alone.indices(0, 0, 300), large.indices(0, 0, 300)))
    assert alone.sha256(50) == large.sha256(50) != alone.sha256(51)
    drawn = [episodes(cache, ["miniimagenet"], split, seed=seed, **k).indices(0, 0, 9)[1][:, :, :16].tolist() for split, seed, k in
             (("test", None, {}), ("val", None, {}), ("train", 0, {}), ("train", 1, {}), ("test", None, {"shots": 5}))]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_first_test_task_is_what_it_has_always_been(cache):
    """Indices are part of the protocol: any change to them would make old and new results incomparable."""
    c, i, turns, _ = episodes(cache, ["miniimagenet"], "test", seed=None).indices(0, 0, 1)
    assert (c[0].tolist(), i[0, 0, :5].tolist(), turns[0].tolist()) == ([17, 19, 0, 13, 8], [34, 1, 2, 17, 21], [3, 1, 3, 2, 3])


def test_distinct_draws_every_arrangement_equally():
    rng = np.random.default_rng(0)
    draws = data.distinct(rng.random((60000, 2)), np.full(60000, 3))
    seen = np.unique(draws, axis=0, return_counts=True)
    assert len(seen[0]) == 6
    assert abs(seen[1] / 60000 - 1 / 6).max() < 0.01
    assert data.distinct(np.full((2, 3), 1 - 1e-16), np.array([3, 9])).tolist() == [[2, 0, 1], [8, 0, 1]]


def test_links_and_leftovers(tmp_path, capsys):
    """Class folders may be links; what a killed process left half-built goes; an empty split is an error."""
    for split in data.SPLITS:
        picture(tmp_path / "elsewhere" / split / "1.png")
        (tmp_path / "root" / "mine" / split).mkdir(parents=True)
    left = tmp_path / "cache" / f".mine-8-abc.{2 ** 22 + 1}"            # above any process number
    left.mkdir(parents=True)
    fails(capsys, lambda: prepared("mine", tmp_path), "mine/train: no images")
    for split in data.SPLITS:
        (tmp_path / "root" / "mine" / split / "a").symlink_to(tmp_path / "elsewhere" / split)
    assert prepared("mine", tmp_path)[0]["train"] == [["a", 1]]
    assert not left.exists()


def test_ragged_classes(tmp_path):
    for split, sizes in (("train", (4, 9, 5)), ("test", (4, 4, 4))):
        for c, n in enumerate(sizes):
            for i in range(n):
                picture(tmp_path / "mine" / split / f"class{c}" / f"{i}.png", colour=(10 * c + 1, i, 0))
    e = Episodes(["Mine"], "train", 3, 1, 3, 8, 0, root=tmp_path, cache_dir=tmp_path / "cache")
    assert e.modes == ["mine"]
    batch = e.tasks(0, 200)
    colours = (torch.cat([batch.support_x.view(200, 3, 1, 3, 64), batch.query_x.view(200, 3, 3, 3, 64)], 2) * 255).round()
    assert (colours.amax(-1) == colours.amin(-1)).all()
    classes, numbers = colours[:, :, :, 0, 0], colours[:, :, :, 1, 0]
    assert (classes == classes[:, :, :1]).all()
    assert [sorted(numbers[classes == 10 * c + 1].unique().tolist()) for c in range(3)] == [list(range(n)) for n in (4, 9, 5)]


@pytest.mark.parametrize("mode", list(data.LAYOUTS))
def test_synthetic_modes(cache, mode):
    images, names = data.draw_synthetic(mode, "val", 28)
    again = data.draw_synthetic(mode, "val", 28, per_class=3)[0]
    count = data.SYNTHETIC_IMAGES
    assert images.shape == (16 * count, 28, 28, 1 if mode == "omniglot" else 3)
    assert len(set(names)) == 16
    assert np.array_equal(again[:3], images[:3])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    large = data.draw_synthetic(mode, "val", 84, per_class=1)[0].reshape(16, 28, 3, 28, 3, -1).mean((2, 4))
    assert abs(large - images[::count]).mean() < 6, "the same scene at any size"


# --------------------------------------------------------------------------------------------------------- importers

def picture(path, size=12, colour=None, mode="RGB", seed=0):
    """Write (or return, for path None) the bytes of a small picture; the format follows the path's ending."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    image = Image.fromarray(pixels) if colour is None else Image.new("RGB", (size, size), colour)
    file = io.BytesIO()
    image.convert(mode).save(file, {".jpg": "JPEG", ".webp": "WEBP"}.get(Path(path or "x.png").suffix, "PNG"), quality=90)
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
    folder = data.prepare(mode, size, tmp_path / "root", tmp_path / "cache")
    return json.loads((folder / "classes.json").read_text()), {s: np.load(folder / f"{s}.npy") for s in data.SPLITS}


def test_import_omniglot(tmp_path):
    """Two zips, alphabets and characters; ink becomes bright."""
    black = picture(None, colour=(0, 0, 0), mode="1")
    for part, characters in (("images_background", 964), ("images_evaluation", 659)):
        write_zip(tmp_path / "root" / f"{part}.zip", {
            f"{part}/Alphabet_{c // 33:02d}/character{c % 33 + 1:02d}/{c:04d}_{i:02d}.png": black
            for c in range(characters) for i in range(1, 3)} | {"__MACOSX/._x.png": b"junk"})
    classes, pixels = prepared("omniglot", tmp_path)
    assert [len(classes[s]) for s in data.SPLITS] == [1028, 172, 423]
    assert pixels["train"].shape == (2056, 8, 8, 1)
    assert (pixels["test"] == 255).all()
    names = [name for s in data.SPLITS for name, _ in classes[s]]
    assert len(set(names)) == 1623
    assert re.fullmatch(r"images_(background|evaluation)/Alphabet_\d\d/character\d\d", names[0])
    alphabets = [{name.rpartition("/")[0] for name, _ in classes[s]} for s in data.SPLITS]
    assert sum(len(a & b) for i, a in enumerate(alphabets) for b in alphabets[:i]) <= 2


@real("omniglot")
@pytest.mark.skipif(not FACTS.is_dir(), reason="needs the reference split lists")
def test_omniglot_split_is_the_reference():
    splits = data.import_omniglot(data.find_source("omniglot", ROOT)[1])
    want = json.loads((FACTS / "omniglot_split.json").read_text())["splits"]
    assert {s: list(splits[s]) for s in data.SPLITS} == want
    assert {len(images) for s in data.SPLITS for images in splits[s].values()} == {20}
    alphabets = {s: {name.split("/")[-2] for name in splits[s]} for s in data.SPLITS}
    assert alphabets["train"] & alphabets["val"] == {"Asomtavruli_(Georgian)"}, "two alphabets are cut: README says which"
    assert alphabets["val"] & alphabets["test"] == {"Gurmukhi"}
    assert not alphabets["train"] & alphabets["test"]


def miniimagenet_pickle(names, protocol):
    images = np.random.default_rng(0).integers(0, 256, (2 * len(names), 84, 84, 3), np.uint8)
    rows = {name: [2 * i, 2 * i + 1] for i, name in enumerate(names)}
    rows[names[0]] = np.array([0, 1])               # indices as an array, and as numpy integers
    rows[names[1]] = list(np.array([2, 3]))
    return images, pickle.dumps({"image_data": images, "class_dict": rows}, protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 5])
def test_import_miniimagenet_pickles(tmp_path, protocol):
    for part, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        images, content = miniimagenet_pickle(data.MINIIMAGENET[split][:3], protocol)
        (tmp_path / "root" / "miniimagenet").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / "miniimagenet" / f"mini-imagenet-cache-{part}.pkl").write_bytes(content)
    classes, pixels = prepared("miniimagenet", tmp_path, size=84)
    assert classes["val"] == [[name, 2] for name in data.MINIIMAGENET["val"][:3]]
    assert np.array_equal(pixels["test"], images)


def test_import_miniimagenet_images_and_tables(tmp_path):
    for split in data.SPLITS:
        rows = [(f"{name}0000000{i}.jpg", name) for name in data.MINIIMAGENET[split][:2] for i in range(3)]
        for name, _ in rows:
            picture(tmp_path / "root" / "miniimagenet" / "images" / name)
        with open(tmp_path / "root" / "miniimagenet" / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("filename", "label"), *rows])
    classes, pixels = prepared("miniimagenet", tmp_path)
    assert classes["train"] == [[name, 3] for name in data.MINIIMAGENET["train"][:2]]
    assert len(pixels["test"]) == 6


def test_import_fc100(tmp_path):
    """Pickles as Python 2 wrote them: byte strings, protocol 2. Both parts merged, split by superclass."""
    def python2(value):
        """Protocol 2, str as SHORT_BINSTRING, as Python 2 writes it."""
        return pickle.dumps(value, protocol=2).replace(b"X\x04\x00\x00\x00data", b"U\x04data")

    def part(n):
        fine = np.tile(np.arange(100), n)
        pixels = np.repeat(fine.astype(np.uint8), 3072).reshape(-1, 3072).copy()
        pixels[:, 1024:2048] = 200          # green plane
        return python2({"data": pixels, "fine_labels": fine.tolist(), "coarse_labels": (fine // 5).tolist()})

    write_tar(tmp_path / "root" / "cifar-100-python.tar.gz", {
        "cifar-100-python/meta": python2({"fine_label_names": [f"class {i}" for i in range(100)]}),
        "cifar-100-python/train": part(2), "cifar-100-python/test": part(1)})
    classes, pixels = prepared("fc100", tmp_path, size=32)
    assert [len(classes[s]) for s in data.SPLITS] == [60, 20, 20]
    assert [name for name, _ in classes["val"]] == [f"class {i}" for s in (8, 11, 13, 16) for i in range(5 * s, 5 * s + 5)]
    assert {n for _, n in classes["test"]} == {3}
    assert pixels["train"][0, 0, 0].tolist() == [5, 200, 5]         # class 5 is the first of superclass 1


@pytest.mark.skipif(not FACTS.is_dir(), reason="needs the reference split lists")
def test_class_splits_are_the_reference(tmp_path):
    want = json.loads((FACTS / "fc100.json").read_text())["splits"]
    for split, superclasses in data.FC100.items():
        assert sorted(c["coarse_id"] for c in want[split]) == sorted(superclasses)
    want = json.loads((FACTS / "miniimagenet_splits.json").read_text())["splits"]
    assert {s: sorted(names) for s, names in want.items()} == {s: sorted(n) for s, n in data.MINIIMAGENET.items()}
    want = json.loads((FACTS / "cub_sorted_rs123_split.json").read_text())["splits"]
    assert data.split_by_fraction(sorted(name for names in want.values() for name in names)) == want


def cub_names():
    return [f"{i:03d}.Bird_{i}" for i in range(1, 201)]


def test_import_cub(tmp_path):
    write_tar(tmp_path / "root" / "CUB_200_2011.tgz", {"CUB_200_2011/README": b"", "attributes.txt": b""} | {
        f"CUB_200_2011/images/{name}/Bird_{i}_{n:04d}.jpg": picture(None) for i, name in enumerate(cub_names()) for n in range(2)})
    classes, pixels = prepared("cub", tmp_path)
    assert [len(classes[s]) for s in data.SPLITS] == [140, 30, 30]
    assert sorted(name for s in data.SPLITS for name, _ in classes[s]) == cub_names()
    assert pixels["train"].shape == (280, 8, 8, 3)


def test_import_celeba(tmp_path, capsys):
    names = [f"{i:06d}.jpg" for i in range(1, 10)]
    write_zip(tmp_path / "root" / "celeba" / "img_align_celeba.zip",
              {f"img_align_celeba/{name}": picture(None, colour=(20 * i, 0, 0)) for i, name in enumerate(names)})
    table = tmp_path / "root" / "celeba" / "list_eval_partition.txt"
    table.write_text("".join(f"{name} {(0, 0, 1, 2)[i % 4]}\n" for i, name in enumerate(names)))
    classes, pixels = prepared("celeba", tmp_path)
    assert classes == {"train": [["all", 5]], "val": [["all", 2]], "test": [["all", 2]]}
    for split, rows in (("train", (0, 1, 4, 5, 8)), ("val", (2, 6)), ("test", (3, 7))):
        assert pixels[split][:, 0, 0, 0].tolist() == [20 * i for i in rows]
    table.write_text("000001.jpg 3\n")
    fails(capsys, lambda: data.import_celeba([table.with_name("img_align_celeba.zip"), table]), "not of the form")
    table.write_text("000099.jpg 0\n")
    fails(capsys, lambda: data.import_celeba([table.with_name("img_align_celeba.zip"), table]), "lacks 000099.jpg")
    table.write_text("000001.jpg 0\n")
    fails(capsys, lambda: data.import_celeba([table.with_name("img_align_celeba.zip"), table]), "lists 1 of the 9")
    fails(capsys, lambda: data.prepare("celeba", 8, tmp_path / "none", tmp_path / "cache2"), "by hand")


def test_import_aircraft(tmp_path):
    """All 100 variants, names with slash and space; the banner is gone; F/A-18 stays a test class."""
    facts = FACTS / "aircraft_mmaml_split.json"
    want = json.loads(facts.read_text())["splits"] if facts.exists() else None
    names = sorted(name for split in want.values() for name in split) if want else [f"Type {i}/B" for i in range(100)]
    photo = Image.new("RGB", (60, 60), (0, 0, 255))
    photo.paste((255, 0, 0), (0, 40, 60, 60))               # the banner: the lowest 20 pixels
    file = io.BytesIO()
    photo.save(file, "PNG")
    top, numbers = "fgvc-aircraft-2013b/data", [f"{i:07d}" for i in range(200)]
    lists = {part: "".join(f"{n} {names[i % 100]}\n" for i, n in enumerate(numbers) if i // 100 == k).encode()
             for k, part in enumerate(("trainval", "test"))}
    write_tar(tmp_path / "root" / "aircraft" / "fgvc-aircraft-2013b.tar.gz", {
        f"{top}/variants.txt": "\n".join(names).encode(), **{f"{top}/images/{n}.jpg": file.getvalue() for n in numbers},
        **{f"{top}/images_variant_{part}.txt": lines for part, lines in lists.items()}})
    classes, pixels = prepared("aircraft", tmp_path)
    assert [len(classes[s]) for s in data.SPLITS] == [70, 15, 15]
    assert {n for s in data.SPLITS for _, n in classes[s]} == {2}
    assert all((pixels[s] == [0, 0, 255]).all() for s in data.SPLITS)
    for split in data.SPLITS:               # class folders are taken as they are: somebody may have cut the banner already
        path = tmp_path / "folders" / "aircraft" / split / "a" / "1.png"
        path.parent.mkdir(parents=True)
        photo.save(path)
    folder = data.prepare("aircraft", 60, tmp_path / "folders", tmp_path / "cache")
    assert np.load(folder / "train.npy")[0, -1, 0].tolist() == [255, 0, 0]
    if want:
        assert data.split_by_fraction(names) == want
        assert "F/A-18" in [name for name, _ in classes["test"]]


@pytest.mark.parametrize("form", ["folders", "zips", "zips with a folder inside"])
def test_class_folders_of_your_own(tmp_path, form):
    for split, colour in zip(data.SPLITS, ((9, 0, 0), (0, 9, 0), (0, 0, 9))):
        inside = f"{split}/" if "inside" in form else ""
        files = {f"{inside}class {c}/{i}.webp": picture(None, colour=colour) for c in range(3) for i in (1, 2)}
        if form == "folders":
            for name, content in files.items():
                path = tmp_path / "root" / "Mine" / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        else:
            write_zip(tmp_path / "root" / "Mine" / f"{split}.zip", files | {"Thumbs.db": b"", ".hidden.png": b""})
    classes, pixels = prepared("mine", tmp_path)
    assert [name.rpartition("/")[2] for name, _ in classes["train"]] == ["class 0", "class 1", "class 2"]
    assert pixels["val"][0, 0, 0].tolist() == [0, 9, 0]


def test_decode_takes_any_depth():
    for mode, value, want in (("1", 1, 255), ("L", 200, 200), ("I;16", 200 * 256 + 7, 200), ("P", 0, 0), ("RGBA", (9, 9, 9, 255), 9)):
        file = io.BytesIO()
        Image.new(mode, (4, 4), value).save(file, "PNG")
        assert data.decode(file.getvalue(), 4, "mine")[0, 0].tolist() == [want] * 3, mode
        assert data.decode(file.getvalue(), 4, "omniglot")[0, 0].tolist() == [255 - want], mode


def test_cache_is_found_again_and_never_stale(tmp_path, monkeypatch, capsys):
    root, cache = tmp_path / "root", tmp_path / "cache"
    for split in data.SPLITS:
        picture(root / "mine" / split / "a" / "1.png", colour=(1, 1, 1))
    first = data.prepare("mine", 8, root, cache)
    with monkeypatch.context() as patch:
        patch.setattr(data, "build_cache", lambda *_: pytest.fail("built again"))
        assert data.prepare("mine", 8, root, cache) == first
    assert data.prepare("mine", 9, root, cache) != first
    picture(root / "mine" / "train" / "a" / "1.png", size=20, colour=(7, 7, 7))
    second = data.prepare("mine", 8, root, cache)
    assert second != first
    assert (np.load(second / "train.npy") == 7).all()
    (root / "mine").rename(tmp_path / "away")               # without the source, the newest cache serves
    os.utime(second / "classes.json")
    assert data.prepare("mine", 8, root, cache) == second
    assert f"taken from the cache {second}" in capsys.readouterr().err


def test_a_copied_zip_is_the_same_data(tmp_path):
    for name, content in (("one", b"1"), ("two", b"1"), ("three", b"2")):
        write_zip(tmp_path / name / "train.zip", {"a/1.png": content})
    os.utime(tmp_path / "two" / "train.zip", (1, 1))
    one, two, three = (data.fingerprint([tmp_path / name / "train.zip"]) for name in ("one", "two", "three"))
    assert one == two != three
    (tmp_path / "one" / "train.zip").write_bytes(b"PK damaged")
    damaged = data.fingerprint([tmp_path / "one" / "train.zip"])
    os.utime(tmp_path / "one" / "train.zip", (1, 1))
    assert one != damaged != data.fingerprint([tmp_path / "one" / "train.zip"])


@real("omniglot", "miniimagenet", "fc100")
@pytest.mark.parametrize("mode, classes, images", [("omniglot", (1028, 172, 423), 20), ("miniimagenet", (64, 16, 20), 600),
                                                   ("fc100", (60, 20, 20), 600)])
def test_real_images(mode, classes, images, tmp_path):
    """Counts, splits and a look at the pixels (the cache of 28 px is kept between test runs)."""
    folder = data.prepare(mode, 28, ROOT, HERE / ".cache")
    found = json.loads((folder / "classes.json").read_text())
    assert tuple(len(found[s]) for s in data.SPLITS) == classes
    assert {n for s in data.SPLITS for _, n in found[s]} == {images}
    if mode == "miniimagenet":
        assert {s: sorted(name for name, _ in found[s]) for s in data.SPLITS} == {
            s: sorted(names) for s, names in data.MINIIMAGENET.items()}
    pixels = Episodes([mode], "test", 5, 5, 15, 28, root=ROOT, cache_dir=HERE / ".cache").tasks(0, 8).query_x
    low, high = (0.02, 0.2) if mode == "omniglot" else (0.3, 0.7)
    assert low < pixels.mean() < high
    assert pixels.std() > 0.15


# -------------------------------------------------------------------------------------------------------- bad inputs

def run(*command, cwd=HERE, timeout=280, **kwargs):
    env = dict(os.environ, PYTHONPATH=str(HERE)) | kwargs.pop("env", {})
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          check=False, env=env, **kwargs)


def here(script, *words):
    """As `run`, in this process: without the seconds that a new one takes to import PyTorch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (mock.patch.object(sys, "argv", [script, *map(str, words)]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
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


def nothing_left(tmp_path):
    return not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() or p.name.startswith(".")]


@pytest.mark.parametrize("damage", ["truncated", "undecodable", "empty"])
def test_bad_image(tmp_path, capsys, damage):
    for split in data.SPLITS:
        picture(tmp_path / "root" / "mine" / split / "a" / "good.png")
    good = picture(None, size=64)
    content = {"truncated": good[:len(good) // 2], "undecodable": b"not an image", "empty": b""}[damage]
    (tmp_path / "root" / "mine" / "test" / "a" / "rotten.png").write_bytes(content)
    fails(capsys, lambda: prepared("mine", tmp_path), "rotten.png", "replace or remove")
    assert nothing_left(tmp_path)


def test_too_few_images_and_classes(cache, capsys):
    fails(capsys, lambda: episodes(cache, shots=30), "omniglot-train-00 has 40 images", "--shots")
    fails(capsys, lambda: episodes(cache, ways=17, split="val"), "16 classes, fewer than 17 ways", "--ways")
    fails(capsys, lambda: episodes(cache, modes=["omniglot", "Omniglot"]), "twice")
    fails(capsys, lambda: episodes(cache, modes=["faces"]), "faces", "choose from")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_that_climbs_out(tmp_path, capsys, kind):
    if kind == "zip":
        for split in data.SPLITS:
            write_zip(tmp_path / "root" / "mine" / f"{split}.zip", {"a/1.png": picture(None), "../../evil.png": picture(None)})
    else:
        write_tar(tmp_path / "root" / "CUB_200_2011.tgz", {"CUB_200_2011/images/../../../evil.jpg": picture(None)})
    fails(capsys, lambda: prepared("mine" if kind == "zip" else "cub", tmp_path), "climbs out", "evil", "fetch it again")
    assert nothing_left(tmp_path)
    assert not list(tmp_path.rglob("evil*"))


def test_broken_archives(tmp_path, capsys):
    write_tar(tmp_path / "root" / "CUB_200_2011.tgz", {f"CUB_200_2011/images/{n}/1.jpg": picture(None) for n in cub_names()})
    whole = (tmp_path / "root" / "CUB_200_2011.tgz").read_bytes()
    (tmp_path / "root" / "CUB_200_2011.tgz").write_bytes(whole[:len(whole) // 2])
    fails(capsys, lambda: prepared("cub", tmp_path), "CUB_200_2011.tgz", "fetch it again")
    write_tar(tmp_path / "root" / "CUB_200_2011.tgz", {f"CUB_200_2011/images/{n}/1.jpg": picture(None) for n in cub_names()[1:]})
    fails(capsys, lambda: prepared("cub", tmp_path), "199 of 200 classes", "another one")
    (tmp_path / "root" / "mine").mkdir()
    (tmp_path / "root" / "mine" / "train.zip").write_bytes(b"PK but no more")
    fails(capsys, lambda: prepared("mine", tmp_path), "train.zip", "fetch it again")
    assert nothing_left(tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


class Pointers:
    """An array of objects over bytes of the attacker's choice: following such a pointer would crash the process."""
    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), b"A" * 8)


def test_pickles_may_not_run_code(tmp_path, capfd):
    for part in ("train", "validation", "test"):
        path = tmp_path / "root" / f"mini-imagenet-cache-{part}.pkl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(miniimagenet_pickle(data.MINIIMAGENET[{"validation": "val"}.get(part, part)][:3], 4)[1])
    path.with_name("mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps({"image_data": Evil(), "class_dict": {}}))
    fails(capfd, lambda: prepared("miniimagenet", tmp_path), "plain containers", "system")
    path = path.with_name("mini-imagenet-cache-train.pkl")
    for content in (b"", b"\x80\x05garbage", pickle.dumps([1, 2]), pickle.dumps({"image_data": Pointers(), "class_dict": {}}),
                    pickle.dumps({"image_data": np.array([Path("x")]), "class_dict": {}}),
                    pickle.dumps({"image_data": np.zeros((2, 9, 9, 3)), "class_dict": {}}),
                    pickle.dumps({"image_data": np.zeros((2, 9, 9, 3), np.uint8), "class_dict": {"n1": [0, 7]}})):
        path.write_bytes(content)
        fails(capfd, lambda: prepared("miniimagenet", tmp_path), "mini-imagenet-cache-train.pkl")
    assert "evil" not in capfd.readouterr().out


def test_other_split_of_miniimagenet(tmp_path, capsys):
    for split, name in zip(data.SPLITS, data.MINIIMAGENET["test"]):
        picture(tmp_path / "root" / "miniimagenet" / split / name / "1.png")
    fails(capsys, lambda: prepared("miniimagenet", tmp_path), "another split")


def test_full_disk(tmp_path):
    """A limit on file sizes stands for the full disk: the same OSError on the same call."""
    for split in data.SPLITS:
        picture(tmp_path / "root" / "mine" / split / "a" / "1.png")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000, 1000))
    done = run("data.py", "prepare", "mine", "--image-size", 32, "--data-root", tmp_path / "root",
               "--cache-dir", tmp_path / "cache", preexec_fn=limit)
    assert done.returncode == 2
    assert "make room" in done.stderr.strip().replace("\r", "\n").split("\n")[-1]
    assert nothing_left(tmp_path)


def test_atomic_write_keeps_the_old_file(tmp_path, capsys):
    data.atomic_write(tmp_path / "a" / "b.txt", "old")
    fails(capsys, lambda: data.atomic_write(tmp_path / "a" / "b.txt" / "c", "new"), "cannot write")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]
    data.atomic_write(tmp_path / "a" / "t.pt", {"x": torch.ones(2)})
    assert torch.load(tmp_path / "a" / "t.pt", weights_only=True)["x"].tolist() == [1, 1]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, ranges and all; `cut` makes it hang up after so many bytes."""
    content, cut = b"", None

    def do_GET(self):
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"]).group(1))
        if first >= len(self.content):
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Length", str(len(self.content) - first))
        self.end_headers()
        self.wfile.write(self.content[first:self.cut])

    def log_message(self, *_):
        pass


def test_download_resumes_and_checks(tmp_path, capsys, monkeypatch):
    (tmp_path / "x").mkdir()
    for part in ("images_background", "images_evaluation"):
        write_zip(tmp_path / "x" / f"{part}.zip", {f"{part}/A{a}/character{c:02d}/{i}.png": picture(None)
                                                   for a in range(2) for c in range(400) for i in range(1)})
    contents = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, name = f"http://127.0.0.1:{server.server_port}/", "images_background.zip"
    Server.content, Server.cut = contents[name], 1000
    files = [(name, hashlib.md5(contents[name]).hexdigest(), [url])]
    monkeypatch.setitem(data.DOWNLOADS, "omniglot", (files, "terms"))
    root = tmp_path / "root"
    with pytest.raises(SystemExit):
        data.prepare("omniglot", 8, root, tmp_path / "cache")
    said = capsys.readouterr().err
    assert "the same command continues" in said
    assert "--synthetic" in said
    assert (root / "omniglot" / f"{name}.part").stat().st_size == 1000
    Server.cut = None
    assert data.download(*files[0], root / "omniglot") == []                     # the other 99 %
    assert (root / "omniglot" / name).read_bytes() == contents[name]
    (root / "omniglot" / name).rename(root / "omniglot" / f"{name}.part")        # cut after the last byte
    assert data.download(*files[0], root / "omniglot") == []
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        data.download("wrong.zip", "0" * 32, [url], root)
    assert stop.value.code == 2
    assert "wrong checksum" in capsys.readouterr().err.strip().split("\n")[-1]
    assert not list(root.glob("wrong*"))
    server.shutdown()
    server.server_close()
    assert len(data.download(*files[0], tmp_path / "nowhere")) == 1              # nobody listens any more


def test_missing_data_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "DOWNLOADS", {"cub": ([("CUB_200_2011.tgz", None, ["http://127.0.0.1:9/"])], "terms")})
    with pytest.raises(SystemExit):
        data.prepare("bird", 8, tmp_path / "root", tmp_path / "cache")
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert all(word in line for word in ("looked for", "CUB_200_2011.tgz", "127.0.0.1:9", "by hand", "--synthetic"))
    fails(capsys, lambda: data.prepare("nothing", 8, tmp_path / "root", tmp_path / "cache"), "'nothing'", "omniglot")


@pytest.mark.parametrize("words, said", [
    ("--ways 1", "--ways 1: give a number from 2 on"), ("--shots 0", "--shots"), ("--shots many", "--shots"),
    ("--lr nan", "--lr"), ("--inner-lr -1", "--inner-lr"), ("--test-tasks 3", "--test-tasks"), ("--device tpu", "--device"),
    ("--modulation filme", "invalid choice"), ("--no-such-flag", "--no-such-flag"), ("--log-every 0", "--log-every"),
    ("--seed 99999999999999999999999", "--seed"), ("--device cuda:99", "choose from cpu"),
    ("--adapt modulated --modulation none", "plain MAML has nothing modulated")])
def test_bad_arguments(capsys, words, said):
    fails(capsys, lambda: kml.get_args(words.split()), said)


# ------------------------------------------------------------------------------------------------------ command lines

TINY = shlex.split("--synthetic --image-size 8 --channels 2 --meta-batch 2 --queries 2 --iterations 6 "
                   "--test-tasks 8 --log-every 2 --save-every 4")


def call(module, monkeypatch, *words):
    """Run a script's main() in this process; the signal handlers that it leaves behind are put back."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("module, modulation", CASES)
def test_a_run_from_start_to_end(module, modulation, tmp_path, cache, monkeypatch, capsys):
    words = [*TINY, "--modulation", modulation, "--out", tmp_path, "--cache-dir", cache, "--val-every", 4, "--val-tasks", 4,
             "--keep-every", 3]
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
    assert {"iterations", "seconds_train", "seconds_per_iteration", "tasks_sha256", "protocol", "args"} <= set(result)
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
                os.kill(os.getpid(), signal.SIGTERM)        # arrives in the middle of iteration `at`
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
        logs = [[(line["iteration"], line["loss"], line["accuracy"]) for line in
                 map(json.loads, (folder / "log.jsonl").read_text().splitlines())] for folder in (tmp_path / "whole", out)]
        assert logs[0] == logs[1]


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
    assert len((tmp_path / "b" / "log.jsonl").read_text().splitlines()) == 5       # one more than the checkpoint
    monkeypatch.setattr(kml, "run_tasks", original)
    call(kml, monkeypatch, *words, "--out", tmp_path / "b", "--log-every", 1)
    lines = [json.loads(line)["iteration"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]
    one, two = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["params"] for n in ("whole", "b"))
    assert all(torch.equal(w, two[k]) for k, w in one.items())


def test_growing_runs_identity_and_overwrite(tmp_path, cache, monkeypatch, capsys):
    words = [*TINY, "--cache-dir", cache, "--out", tmp_path]
    call(kml, monkeypatch, *words)
    first = json.loads((tmp_path / "result.json").read_text())
    call(kml, monkeypatch, *words, "--test-tasks", 12)                  # more tasks: the same first ones
    more = json.loads((tmp_path / "result.json").read_text())
    assert more["per_task"][:8] == first["per_task"]
    call(kml, monkeypatch, *words, "--iterations", 8)                   # may grow
    assert json.loads((tmp_path / "result.json").read_text())["iterations"] == 8
    fails(capsys, lambda: call(kml, monkeypatch, *words, "--lr", 0.5), "has lr 0.001, not 0.5", "--out")
    fails(capsys, lambda: call(mmaml, monkeypatch, *words), "MMAML+KML, not MMAML")
    assert (tmp_path / "checkpoint.pt").exists()
    for name in ("params-6.pt", "mine.pt"):
        (tmp_path / name).write_bytes(b"")
    call(kml, monkeypatch, *words, "--lr", 0.5, "--iterations", 1, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl", "mine.pt", "result.json"]
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
    call(kml, monkeypatch, *words, "--lr", 0.25)                        # a result without its checkpoint is not this run's
    assert json.loads((tmp_path / "result.json").read_text())["args"]["lr"] == 0.25
    fails(capsys, lambda: call(kml, monkeypatch, *TINY, "--cache-dir", cache, "--out", tmp_path / "none", "--eval-only"),
          "--eval-only", "train first")


def test_quick_is_a_preset_that_flags_override(monkeypatch):
    args = kml.get_args(["--quick", "--iterations", "3", "--shots", "5"])
    assert (args.iterations, args.shots) == (3, 5)
    assert (args.image_size, args.meta_batch) == (kml.QUICK["image_size"], kml.QUICK["meta_batch"])
    assert kml.get_args([]).image_size == 84


VARIANTS = {     # flags that make another run than the paper's
    kml: ("--no-norm-affine", "--adapt modulated", "--repeat-tasks", "--inner-lr 0.5", "--image-size 28"),
    mmaml: ("--no-norm-affine", "--adapt modulated", "--repeat-tasks", "--inner-lr 0.5", "--image-size 28"),
    mprotonet: ("--no-residual", "--embed query", "--transductive", "--init-scale 0.01", "--distance-scale 0.25", "--image-size 28"),
    modgrad: ("--start-at-one", "--steps 2", "--alpha 0.3", "--adapt conv4", "--first-order", "--image-size 28"),
    afr: ("--embed constant", "--filters 64", "--alpha 0.05", "--first-order", "--image-size 28")}


@pytest.mark.parametrize("module, flags", [(module, flags) for module, of in VARIANTS.items() for flags in ("", "--seed 3", *of)])
def test_the_papers_number_stands_beside_the_papers_run_alone(module, flags, capsys):
    """A variant is named in the title instead."""
    args = get_args(module, *flags.split())
    score = {"overall": {"mean": 70.0, "ci95": 0.5}}
    result = {"method": args.method, "test_tasks": 1000, "iterations": 9, "seconds_per_iteration": 1.0, "accuracy": score,
              "accuracy_inductive": score, "nil_or_error": score, "nil_or_error_inductive": score, "transfer": {}}
    module.report(result, args)
    printed = capsys.readouterr().out
    assert (module.TABLE in printed) == (flags in ("", "--seed 3")), flags
    if flags not in ("", "--seed 3", "--image-size 28", "--adapt conv4"):
        assert flags in printed.split("\n")[1]
    assert "conv4" in printed or flags != "--adapt conv4"


def test_defaults_are_the_contract():
    """DESIGN 3 and the released code's settings (FACTS 3)."""
    args = vars(get_args(kml))
    want = {"ways": 5, "shots": 1, "queries": 15, "image_size": 84, "channels": 32, "meta_batch": 10, "iterations": 60000,
            "lr": 1e-3, "seed": 0, "test_tasks": 1000, "val_every": 0, "val_tasks": 100, "inner_steps": 5, "inner_lr": 0.05,
            "inner_clip": 20.0, "first_order": False, "adapt": "theta", "repeat_tasks": False, "precision": "fp32", "save_every": 1000, "keep_every": 0}
    assert want == {k: args[k] for k in want}
    assert get_args(kml, "--modes", "CIFAR", "Bird", "OmniGlot").modes == ["fc100", "cub", "omniglot"]


def test_signals_end_a_real_process_cleanly(tmp_path, cache):
    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / number.name
        process = subprocess.Popen([sys.executable, "kml.py", *TINY, "--iterations", "1000000", "--cache-dir", cache,
                                    "--out", str(out)], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text()):
            time.sleep(0.1)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "the same command continues" in said
        assert "Traceback" not in errors
        assert torch.load(out / "checkpoint.pt", weights_only=True)["iteration"] > 0


def test_stop_after(tmp_path, cache, monkeypatch, capsys):
    call(kml, monkeypatch, *TINY, "--iterations", 100000, "--stop-after", 1, "--cache-dir", cache, "--out", tmp_path)
    assert "stopped by --stop-after" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_diverging_run_says_so(tmp_path, cache, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(kml, monkeypatch, *TINY, "--lr", 1e18, "--cache-dir", cache, "--out", tmp_path)
    assert stop.value.code == 2
    assert "not finite" in capsys.readouterr().err


class Here:
    """Stands in for a pool of one fresh process, in which bench.py measures memory: starting one takes seconds."""
    Process = staticmethod(multiprocessing.get_context("spawn").Process)
    Pool = __enter__ = lambda self, *_: self
    __exit__ = lambda self, *_: None
    apply = staticmethod(lambda function, arguments: function(*arguments))


def test_bench_says_what_it_measured(tmp_path, cache):
    done = run("bench.py", "train", "--synthetic", "--scripts", "mprotonet", "--image-size", 16, "--shots", 2, "--rounds", 2,
               "--meta-batch", 2, "--cache-dir", cache, "--json", tmp_path / "bench.json")
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
    words = ["--synthetic", "--image-size", 16, "--shots", 2, "--rounds", 1, "--meta-batch", 2, "--cache-dir", cache]
    call(bench, monkeypatch, "train", "--scripts", "mprotonet", *words, "--busy")
    assert "mprotonet.py --modulation kml, 16 px, busy" in capsys.readouterr().out

    def absent(*args):
        raise ImportError("No module named 'higher'")
    monkeypatch.setattr(bench, "PEERS", {"mmaml": ("higher", absent)})
    fails(capsys, lambda: call(bench, monkeypatch, "peers", *words), "No module named 'higher': pip install higher")
    monkeypatch.setattr(bench, "PEERS", {"mmaml": ("higher", absent), "mprotonet": ("itself", lambda *given: lambda: time.sleep(0.01))})
    call(bench, monkeypatch, "peers", *words, "--json", tmp_path / "peers.json")
    out = capsys.readouterr().out
    assert "| mmaml.py --modulation none | 2 | - | higher | No module named 'higher' | - |" in out
    (_, row) = json.loads((tmp_path / "peers.json").read_text())["peers"]
    assert f"{np.median(row['samples']['itself']) / np.median(row['samples']['ours']):.2f} |" in out


def test_the_same_network_as_a_module_computes_the_same():
    """bench.py peers compares like with like: PlainNetwork is the scripts' base network."""
    for module in (mmaml, mprotonet):
        _, params = make_params(module, "none")
        network = bench.PlainNetwork(params).double()
        state = {}
        for l in module.LAYERS:
            names = {f"layers.{3 * (l - 1)}.weight": f"conv{l}.weight", f"layers.{3 * (l - 1)}.bias": f"conv{l}.bias",
                     f"layers.{3 * l - 2}.weight": f"norm{l}.scale", f"layers.{3 * l - 2}.bias": f"norm{l}.shift"}
            state |= {there: params[here].detach() for there, here in names.items()}
        if module is mmaml:
            state |= {f"head.{part}": params[f"head.{part}"].detach() for part in ("weight", "bias")}
        network.load_state_dict(state)
        x = make_task().query_x
        torch.testing.assert_close(network(x), module.forward(params, x)[0])


def test_bench_gpu_says_what_it_needs_and_runs_without_a_gpu_at_tiny_shapes(tmp_path, monkeypatch, capsys):
    if not torch.cuda.is_available():
        fails(capsys, lambda: call(bench, monkeypatch, "gpu"), "there is no GPU here")
    monkeypatch.setattr(bench, "gpu_plan", lambda args: [("mprotonet", 5, "tf32", "vmap"), ("mprotonet", 5, "tf32", "captured"),
                                                         ("mprotonet", 5, "bf16", "loop"), ("kml", 1, "tf32", "vmap")])
    monkeypatch.setattr(bench, "GPU_SCRIPTS", {"kml": [], "mprotonet": []})
    call(bench, monkeypatch, "gpu", "--smoke", "--device", "cpu", "--json", tmp_path / "gpu.json")
    out, record = capsys.readouterr().out, json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["same"] for row in record["equivalence"])
    assert [len(row.get("samples", [])) for row in record["rows"]] == [10, 0, 10, 10]
    assert record["rows"][1]["failed"] == "needs a GPU"
    assert f"| mprotonet.py | 5 | {np.median(record['rows'][0]['samples']):.1f} | needs a GPU |" in out
    call(bench, monkeypatch, "gpu", "--smoke", "--device", "cpu", "--budget", 0, "--json", tmp_path / "gpu.json")
    assert all(row["failed"].startswith("not tried") for row in json.loads((tmp_path / "gpu.json").read_text())["rows"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("module", [kml, mprotonet, modgrad])
def test_a_recorded_graph_computes_what_was_recorded(module):
    args = get_args(module, "--image-size", 32, "--channels", 4, "--device", "cuda")
    params = {k: w.to(args.device).requires_grad_() for k, w in module.init_params(args).items()}
    replay = data.recorded(lambda batch: module.run_tasks(params, batch, args, True), params)
    for seed in (0, 1):
        batch = Task(*(x.to(args.device) for x in make_task(seed, ways=5, size=32, tasks=2, dtype=torch.float32)))
        losses = replay(batch)[0].clone()
        found = {k: w.grad.clone() for k, w in params.items()}
        for w in params.values():
            w.grad = None
        torch.testing.assert_close(losses, module.run_tasks(params, batch, args, True)[0])
        for k, w in params.items():
            torch.testing.assert_close(found[k], w.grad, rtol=1e-2, atol=1e-4)


def test_bench_variants(tmp_path, cache, monkeypatch, capsys):
    words = ["variants", "--synthetic", "--scripts", "mprotonet", "--image-size", 16, "--shots", 1, "--rounds", 2,
             "--meta-batch", 2, "--cache-dir", cache]
    call(bench, monkeypatch, *words, "--json", tmp_path / "bench.json")
    out = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "bench.json").read_text())["variants"]
    assert list(found["samples"]) == ["loop", "vmap", "unfold"]
    assert all(len(x) == 2 and f"{np.median(x):.4g} ({min(x):.4g} to {max(x):.4g})" in out for x in found["samples"].values())
    fails(capsys, functools.partial(call, bench, monkeypatch, *words, "--variants", "captured", "--device", "cpu"), "CUDA graph")


def test_bench_steps(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Here())
    call(bench, monkeypatch, "steps", "--synthetic", "--modes", "miniimagenet", "--image-size", 16, "--shots", 1, "--rounds", 2,
         "--cache-dir", cache, "--json", tmp_path / "bench.json")
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())["steps"]
    assert [row["algorithm"] for row in found] == ["MAML", "MAML on conv3+conv4", "ModGrad", "Meta-SGD", "CAVIA", "T-Net"]
    middle = [np.median(row["samples"]) for row in found]
    assert min(middle) > 0
    (shown,) = (line for line in out.splitlines() if line.startswith("| ModGrad"))
    assert f"| {middle[2] / middle[0]:.2f} | {middle[2] / middle[1]:.2f} |" in shown


def test_bench_reuse(tmp_path, cache, monkeypatch, capsys):
    words = ["--synthetic", "--modes", "miniimagenet", "--image-size", 16, "--shots", 1, "--cache-dir", cache, "--queries", 2, "--meta-batch", 1]
    call(bench, monkeypatch, "reuse", *words, "--rounds", 2, "--json", tmp_path / "bench.json")
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())["reuse"]
    assert [row["method"] for row in found] == list(AFR)
    maml, _, am, _ = found
    for what in ("train", "test"):
        assert f"| {np.median(maml[what]) / np.median(am[what]):.2f} | " in next(line for line in out.splitlines() if line.startswith("| AM"))
    assert f"| {am['parameters']:,} | {am['parameters'] / maml['parameters']:.2f} |" in out
    args = argparse.Namespace(synthetic=True, modes=["miniimagenet"], image_size=16, cache_dir=cache, queries=2, meta_batch=1, ways=5, precision="fp32",
                              data_root="nowhere", device="cpu")
    for flags in bench.REUSE:                           # what is timed is what test does
        _, test, options, params = bench.prepare_reuse(flags, args, 1)
        task = Task(*(x[0] for x in data.MetaTasks(options, "train").tasks(0, 1)[0]))
        with torch.no_grad():
            torch.testing.assert_close(test(), afr.test_outputs(params, task, options, "classification")[0])


def test_data_tool(tmp_path, cache):
    done = run("data.py", "list", "--data-root", tmp_path)
    assert done.returncode == 0
    assert all(mode in done.stdout for mode in data.LAYOUTS)
    out = tmp_path / "episode.png"
    done = run("data.py", "show", "cub", "--synthetic", "--image-size", 28, "--cache-dir", cache, "--shots", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == ((2 + 6) * 86 + 12, 5 * 86 + 16)
    done = run("data.py", "prepare")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@real("omniglot", "miniimagenet")
def test_real_images_from_end_to_end(tmp_path, monkeypatch, capsys):
    call(kml, monkeypatch, *shlex.split("--modes omniglot miniimagenet --shots 5 --image-size 28 --channels 8 --meta-batch 2 --iterations 2 "
                                        "--test-tasks 4"), "--data-root", ROOT, "--cache-dir", HERE / ".cache", "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "77.02" not in printed, "28 px and 8 channels are not the paper's cell"
    assert json.loads((tmp_path / "result.json").read_text())["synthetic"] is False


# ------------------------------------------------------------------------------------------------------ the shop window

def code_lines(path):
    """The lines of a script without comments, docstrings and blank lines."""
    source = Path(path).read_text()
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            for i in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[i] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][:token.start[1]]
    return [line.rstrip() for line in lines if line.strip()]


def test_the_diff_shows_one_idea():
    changes = [c for c in difflib.SequenceMatcher(None, code_lines(HERE / "mmaml.py"), code_lines(HERE / "kml.py"),
                                                  autojunk=False).get_opcodes() if c[0] != "equal"]
    assert len(changes) <= 6
    assert sum(c[2] - c[1] for c in changes) <= 25
    assert sum(c[4] - c[3] for c in changes) <= 25
    for script in ("mmaml.py", "kml.py"):
        lines = (HERE / script).read_text().split("\n")
        assert len(lines) <= 520
        assert [i for i, line in enumerate(lines, 1) if len(line) > 110] == []
    tail = {(HERE / script).read_text().split("# Below this line")[1] for script in ("mmaml.py", "kml.py", "mprotonet.py")}
    assert len(tail) == 1
    # modgrad.py's has more in three places: augmented images, and parameters best on validation beside the last.
    one, two = tail.pop().split("\n"), (HERE / "modgrad.py").read_text().split("# Below this line")[1].split("\n")
    changes = [c for c in difflib.SequenceMatcher(None, one, two, autojunk=False).get_opcodes() if c[0] != "equal"]
    assert [(c[2] - c[1], c[4] - c[3]) for c in changes] == [(1, 1), (0, 4), (1, 2)]
    # afr.py's: several high-level tasks, a second measure of each, and intervals over domains.
    other = (HERE / "afr.py").read_text().split("# Below this line")[1].split("\n")
    changes = [c for c in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes() if c[0] != "equal"]
    assert sum(c[2] - c[1] for c in changes) <= 80, "lines of the shared text that are not in afr.py"
    lines = (HERE / "mprotonet.py").read_text().split("\n")
    assert len(lines) <= 580
    assert [i for i, line in enumerate(lines, 1) if len(line) > 110] == []


# ------------------------------------------------------------------------------------------------- tables and run_all.sh

def make_result(folder, method, modes, per_task, inductive=(), args=None, best=None, **flags):
    """A result file as the scripts write it, with accuracies of our choice."""
    family = {"MAML": kml.METHODS | mmaml.METHODS, "ProtoNet": mprotonet.METHODS}
    module = mmaml if method in family["MAML"].values() else mprotonet
    args = args or vars(get_args(module, "--modes", *modes)) | flags
    default = {"MAML": (60000, 10), "ProtoNet": (30000, 10)}["MAML" if module is mmaml else "ProtoNet"]
    result = {"method": method, "modes": modes, "ways": 5, "shots": args["shots"], "synthetic": args["synthetic"],
              "per_task": list(per_task), "per_task_inductive": list(inductive) or None, "test_tasks": len(per_task),
              "iterations": flags.get("iterations", default[0]), "seconds_per_iteration": 0.25,
              "parameters": {"base": 1000, "encoder": 100, "generator": 10}, "args": args,
              "data": [f"{mode}-84-abc" for mode in modes], "best_on_validation": best}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    lines = [{"iteration": i, "accuracy": {mode: 20 + i + m for m, mode in enumerate(modes)}} for i in range(1, 90)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_intervals_and_paired_differences_of_the_tables_agree_with_a_bootstrap():
    rng = np.random.default_rng(0)
    hard = {"a": rng.normal(95, 4, 300), "b": rng.normal(50, 9, 300)}           # what both methods find hard
    one, two = ({"scores": {"paper": {m: x + rng.normal(gain, 2, 300) for m, x in hard.items()}}, "data": {"a": 1, "b": 2}}
                for gain in (1, 0))
    resample = [{m: rng.integers(0, 300, 300) for m in "ab"} for _ in range(2000)]
    mean, width = tables.score(one, "paper", ["a", "b"])
    means = [np.mean([one["scores"]["paper"][m][at[m]].mean() for m in "ab"]) for at in resample]
    assert math.isclose(mean, np.mean(means), abs_tol=0.05)
    assert math.isclose(width, 1.96 * np.std(means), rel_tol=0.1)
    mean, paired = tables.difference(one, two, "paper", ["a", "b"])
    gains = {m: one["scores"]["paper"][m] - two["scores"]["paper"][m] for m in "ab"}
    means = [np.mean([gains[m][at[m]].mean() for m in "ab"]) for at in resample]
    assert math.isclose(mean, np.mean(means), abs_tol=0.05)
    assert math.isclose(paired, 1.96 * np.std(means), rel_tol=0.1)
    assert paired < width / 1.5, "pairing takes out what both find hard"
    shorter = {"scores": {"paper": {m: x[:200] for m, x in two["scores"]["paper"].items()}}, "data": two["data"]}
    assert tables.difference(one, shorter, "paper", ["a"])[0] == gains["a"][:200].mean()
    assert tables.difference(one, shorter, "inductive", ["a"]) is None
    assert tables.difference(one, shorter | {"data": {"a": 1, "b": 3}}, "paper", ["a", "b"]) is None, "other images"
    assert tables.difference(*(run | {"tasks": ("ab", 300, sha)} for run, sha in ((one, "x"), (two, "y"))), "paper", ["a"]) is None, "other tasks"
    assert tables.images_of({"synthetic": False, "data": ["omniglot-42-08c3dcbf50bd"]}) == ["omniglot-42"]
    assert tables.images_of({"synthetic": True, "data": ["omniglot-42-08c3dcbf50bd"]}) == ["omniglot-42-08c3dcbf50bd"]


def test_tables_are_exactly_as_expected(tmp_path):
    both = ["omniglot", "miniimagenet"]
    flags = {"shots": 5, "iterations": 4000, "meta_batch": 4, "image_size": 42}
    make_result(tmp_path / "p", "ProtoNet", both, [90, 40, 92, 44], [88, 40, 92, 40], **flags)
    make_result(tmp_path / "k", "MProtoNet+KML", both, [94, 42, 98, 44], [94, 40, 94, 44], **flags)
    make_result(tmp_path / "q", "MProtoNet+KML", both, [94, 44, 98, 46], **flags, embed="query", seed=1)
    make_result(tmp_path / "o", "ProtoNet", both[:1], [96, 98, 90], [96, 96, 90], **flags)
    make_result(tmp_path / "m", "ProtoNet", both[1:], [41, 42], [40, 42], **flags)
    done = run("tables.py", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tables.md").read_text() + "\n" == done.stdout
    expected = """\
# KML: tables from result files

*s an iteration* is each run's own clock, whatever else its machine was doing; bench.py measures speed.

### ProtoNet family, 2mode (omniglot + miniimagenet), 5-way 5-shot

**42 px instead of 84, 4,000 iterations of 4 tasks instead of 30,000 of 10.** 4 test tasks; accuracy in %, 95 % interval over tasks.

| method | overall, paper protocol | overall, inductive | KML's Table 1 | omniglot, paper / inductive | miniimagenet, paper / inductive | parameters | s an iteration |
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
    for name, method, last, more in (("a", "MAML", [50, 54], {"algorithm": "maml"}), ("b", "ModGrad", [60, 70], {}),
                                     ("c", "MAML on conv3+conv4", [56, 64], {"algorithm": "maml", "adapt": ["conv3", "conv4"], "steps": 1, "alpha": 0.1}),
                                     ("d", "ModGrad", [61, 71], {"steps": 3}), ("e", "ModGrad", [70, 72], {"shots": 10})):
        make_result(tmp_path / name, method, ["miniimagenet"], last, [x - 1 for x in last], args=vars(get_args(modgrad)) | {"synthetic": False} | flags | {
            "steps": 5 if more.get("algorithm") == "maml" else 1, "alpha": 0.01 if more.get("algorithm") == "maml" else 0.1} | more,
            best=best if name in "ab" else None, **{**flags, **{k: more[k] for k in more if k == "shots"}})
    done = here("tables.py", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    expected = """\
### ModGrad and its rivals, miniimagenet, 5-way 5-shot

**42 px instead of 84, 3,000 episodes instead of 50,000.** 2 test tasks; accuracy in %, 95 % interval over tasks. *Last* parameters, and those *best on validation* classes among those kept.

| method | last, paper protocol | last, inductive | best on validation, paper protocol | best on validation, inductive | ModGrad's paper | parameters | s an iteration |
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
        return dict(zip(afr.PER_TASK, found.values())) | {key: kml.summary(np.array(x), strata) for key, x in found.items()}
    result = {"method": args.method, "modes": args.modes, "ways": args.ways, "shots": args.shots, "synthetic": args.synthetic, "strata": args.strata,
              "domains": {}, "data": [f"{mode}-abc" for mode in args.modes], "iterations": args.iterations, "seconds_per_iteration": 0.5, "test_tasks": 2 * n,
              "parameters": {"backbone": 1000, "head": 100, "attention": 0}, "args": vars(args), **of(values, args.strata),
              "transfer": {mode: {"data": [f"{mode}-abc"], **of(transfer, [mode])} for mode in args.transfer}}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    line = {stratum: {"mean": 3.0, "ci95": 1.0} for stratum in args.strata}
    (folder / "log.jsonl").write_text("\n".join(json.dumps({"iteration": t, "validation": dict.fromkeys(afr.KEYS, line)}) for t in (1, 2)))


def measured_as(*values):
    return dict(zip(afr.KEYS, values))


def test_tables_of_attentive_feature_reuse_are_exactly_as_expected(tmp_path):
    words = ["--modes", "miniimagenet", "--image-size", 42, "--iterations", 500, "--transfer", "fc100"]
    make_afr_result(tmp_path / "a", [*words, "--algorithm", "maml"], measured_as([40, 50], [40, 48], [41, 51], [41, 49]),
                    measured_as([30, 40], [30, 38], [31, 41], [31, 39]))
    make_afr_result(tmp_path / "b", words, measured_as([44, 52], [44, 50], [43, 53], [43, 51]), measured_as([30, 42], [30, 40], [31, 43], [31, 41]))
    make_afr_result(tmp_path / "c", [*words, "--alpha", 0.5], measured_as([10, 20], [10, 20], [10, 20], [10, 20]), measured_as([1, 2], [1, 2], [1, 2], [1, 2]))
    make_afr_result(tmp_path / "d", [*words, "--embed", "constant"], measured_as([44, 51], [44, 51], [44, 51], [44, 51]), measured_as([5, 6], [5, 6], [5, 6], [5, 6]))
    done = here("tables.py", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert """\
# Attentive feature reuse: tables from result files

### miniimagenet, 5-way 1-shot

**42 px instead of 84, 500 iterations of 4 subtasks instead of our default's 60,000 of 4.** 2 test tasks; accuracy in %, 95 % interval over tasks; each cell paper protocol / inductive.

| method | cross-entropy | paper's Table 2, cross-entropy | NIL | paper's Table 2, NIL | transfer to fc100, cross-entropy | paper, mini-Places, cross-entropy | transfer to fc100, NIL | paper, mini-Places, NIL | parameters | s an iteration |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| MAML | 45.00 ± 9.80 / 44.00 ± 7.84 | 48.7 | 46.00 ± 9.80 / 45.00 ± 7.84 | 49.1 | 35.00 ± 9.80 / 34.00 ± 7.84 | 31.2 | 36.00 ± 9.80 / 35.00 ± 7.84 | 33.8 | 1,100 | 0.5 |
| AM | 48.00 ± 7.84 / 47.00 ± 5.88 | 51.1 | 48.00 ± 9.80 / 47.00 ± 7.84 | 52.3 | 36.00 ± 11.76 / 35.00 ± 9.80 | 33.5 | 37.00 ± 11.76 / 36.00 ± 9.80 | 34.3 | 1,100 | 0.5 |
| AM, `--alpha 0.5` | 15.00 ± 9.80 / 15.00 ± 9.80 | - | 15.00 ± 9.80 / 15.00 ± 9.80 | - | 1.50 ± 0.98 / 1.50 ± 0.98 | - | 1.50 ± 0.98 / 1.50 ± 0.98 | - | 1,100 | 0.5 |
| AM, `--embed constant` | 47.50 ± 6.86 / 47.50 ± 6.86 | - | 47.50 ± 6.86 / 47.50 ± 6.86 | - | 5.50 ± 0.98 / 5.50 ± 0.98 | - | 5.50 ± 0.98 / 5.50 ± 0.98 | - | 1,100 | 0.5 |

| difference, task by task | cross-entropy | NIL | transfer to fc100, cross-entropy | transfer to fc100, NIL |
| --- | --- | --- | --- | --- |
| AM - MAML | +3.00 ± 1.96 / +3.00 ± 1.96 | +2.00 ± 0.00 / +2.00 ± 0.00 | +1.00 ± 1.96 / +1.00 ± 1.96 | +1.00 ± 1.96 / +1.00 ± 1.96 |
| AM - AM, `--embed constant` | +0.50 ± 0.98 / -0.50 ± 0.98 | +0.50 ± 2.94 / -0.50 ± 0.98 | +30.50 ± 10.78 / +29.50 ± 8.82 | +31.50 ± 10.78 / +30.50 ± 8.82 |
""" in done.stdout


def test_tables_of_single_and_multi_meta_task(tmp_path):
    scenes = ["--modes", "scenes", "--shots", 5, "--iterations", 500, "--val-every", 100, "--test-tasks", 600]
    for name, more, first, second in (("am", [], 39, 0.4), ("none", ["--modulation", "none"], 36, 0.5)):
        make_afr_result(tmp_path / f"d-{name}", [*scenes, "--tasks", "depth", *more], measured_as([first, first + 4], [first] * 2, [second, second + 0.2], [second] * 2))
        make_afr_result(tmp_path / f"c-{name}", [*scenes, *more], measured_as([first + 1, first + 5], [first] * 2, [first] * 2, [first] * 2))
    multi = [*scenes, "--tasks", *data.KINDS, "--modulation", "none"]
    make_afr_result(tmp_path / "multi", multi, *[measured_as(*[[30, 40, 50, 60, 32, 44, 58, 60]] * 2, *[[31, 0.6, 70, 80, 33, 0.6, 70, 80]] * 2)])
    done = here("tables.py", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("### scenes: single and multi meta-task, 5-way 5-shot"):]
    assert "**Ray-cast scenes, not MMT; synthetic.** **500 iterations of 4 subtasks instead of our default's 60,000 of 4.**" in table
    cells = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")}
    head = cells["run"]
    single = dict(zip(head, cells["single meta-task, AM, 32 filters"]))
    assert single["depth, accuracy"] == "41.00 ± 3.92 / 39.00 ± 0.00"
    assert single["classification, accuracy"] == "42.00 ± 3.92 / 39.00 ± 0.00"
    assert single["depth, error"] == "0.50 ± 0.20 / 0.40 ± 0.00"
    assert (single["MMT, depth, accuracy"], single["MMT, depth, error"], single["MMT, normals, error"], single["vanishing, error"]) == ("87.8", "0.495", "84.1", "-")
    several = dict(zip(head, cells["multi meta-task, ANIL, 32 filters"]))
    assert (several["depth, accuracy"], several["normals, error"]) == ("42.00 ± 3.92 / 42.00 ± 3.92", "70.00 ± 0.00 / 70.00 ± 0.00")
    assert several["MMT, vanishing, error"] == "118.3"
    head = cells["difference, task by task"]
    gain = dict(zip(head, cells["single meta-task, AM, 32 filters - single meta-task, ANIL, 32 filters"]))
    assert (gain["depth, accuracy"], gain["classification, accuracy"]) == ("+3.00 ± 0.00 / +3.00 ± 0.00",) * 2
    assert gain["depth, error"] == "-0.10 ± 0.00 / -0.10 ± 0.00"
    more = dict(zip(head, cells["multi meta-task, ANIL, 32 filters - single meta-task, ANIL, 32 filters"]))
    assert more["depth, accuracy"].startswith("+4.00 ± 0.00") and more["classification, accuracy"].startswith("-8.00 ± 1.96")
    (figure,) = re.findall(r"\((afr-validation[^)]*)\)", table)
    assert Image.open(tmp_path / "out" / figure).width > 800


def test_tables_list_the_trials_of_step_sizes(tmp_path):
    for name, alpha, accuracy in (("a", 0.1, 40), ("b", 0.01, 42), ("c", 1, 30)):
        make_result(tmp_path / "trials" / name, "MAML", ["miniimagenet"], [0, 0], [0, 0], args=vars(get_args(modgrad, "--algorithm", "maml", "--alpha", alpha)))
        lines = [{"iteration": t, "accuracy": {"miniimagenet": 1}, "validation": {"paper": {"overall": {"mean": accuracy - 6 + t, "ci95": 1.5}}}} for t in (1, 6)]
        (tmp_path / "trials" / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = here("tables.py", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "| MAML | **0.01: 42.00 ± 1.50**, 0.1: 40.00 ± 1.50, 1: 30.00 ± 1.50 |" in done.stdout
    assert "ModGrad and its rivals" not in done.stdout, "trials are no results"
    (tmp_path / "trials" / "a" / "log.jsonl").write_text("")
    done = here("tables.py", tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n"), "--val-every" in done.stderr) == (2, 1, True)


def test_tables_of_modgrad_tell_seeds_and_backbones(tmp_path):
    base = vars(get_args(modgrad)) | {"steps": 1, "alpha": 0.1}
    for name, method, more in (("a", "ModGrad", {}), ("b", "ModGrad", {"seed": 1}),
                               ("c", "ModGrad, resnet34", {"backbone": "resnet34", "image_size": 224, "iterations": 33333, "augment": True})):
        make_result(tmp_path / name, method, ["miniimagenet"], [60, 70], [60, 62], args=base | more, iterations=more.get("iterations", 16667))
    done = here("tables.py", tmp_path, "--out", tmp_path / "out")
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
    make_result(tmp_path / "5", "MAML", ["omniglot"], x, x)                      # not with Multi-MAML's settings
    make_result(tmp_path / "6", "MMAML+KML", modes, x, x, lr=0.01)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "result.json").write_text('{"method": "ModGrad"}')
    make_result(tmp_path / "8", "T-Net", modes, x[::-1], x, args=vars(get_args(modgrad, "--algorithm", "maml")))      # modgrad.py's
    text = here("tables.py", tmp_path, "--out", tmp_path).stdout
    usual, synthetic = (re.search(rf"### MAML family, 2mode-dagger[^\n]*\n\n{words}4 test tasks.*?(?=\n#|\Z)", text, re.DOTALL).group()
                        for words in ("", r"\*\*Synthetic images.\*\* "))
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
    for seed, name, method, mode in ((3, "a", "MMAML", modes), (3, "b", "MAML", modes), (3, "c", "MAML", modes[:1]), (3, "d", "MAML", modes[1:])):
        own = {"inner_lr": 0.01, "meta_batch": 4, "iterations": 80000} if len(mode) == 1 else {}
        make_result(tmp_path / name, method, mode, x, x, first_order=True, seed=seed, **own)
    text = here("tables.py", tmp_path, "--out", tmp_path).stdout         # what all have in common makes no variant
    assert "All `--first-order --seed 3`. 4 test tasks" in text
    assert "| MMAML - MAML |" in text
    assert "| MAML - Multi-MAML |" in text
    (tmp_path / "a" / "log.jsonl").unlink()
    done = here("tables.py", tmp_path, "--out", tmp_path)
    assert (done.returncode, "no curve of it" in done.stderr) == (0, True)
    make_result(tmp_path / "1", "MMAML", modes, x, x)
    (tmp_path / "1" / "result.json").write_text('{"method": "MMAML", ')
    done = here("tables.py", tmp_path, "--out", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is not a whole result file" in done.stderr
    done = here("tables.py", tmp_path / "none", "--out", tmp_path)
    assert (done.returncode, "run_all.sh" in done.stderr) == (2, True)


def test_tables_of_several_seeds(tmp_path):
    both = ["omniglot", "miniimagenet"]
    for seed, gain in ((0, 1), (1, 3)):
        make_result(tmp_path / f"p{seed}", "ProtoNet", both, [90, 40, 92, 44], [88, 40, 92, 40], shots=5, seed=seed)
        make_result(tmp_path / f"k{seed}", "MProtoNet+KML", both, [90 + gain, 40, 92, 44 + gain], [88, 40, 92, 40], shots=5, seed=seed,
                    embed="constant")
    make_result(tmp_path / "s", "ProtoNet", both, [90, 40, 92, 46], [88, 40, 92, 40], shots=5, seed=1, lr=0.004)
    text = here("tables.py", tmp_path, "--out", tmp_path).stdout
    assert """\
| configuration | overall, paper protocol, seeds 0 and 1 | minus ProtoNet of the same seed | overall, inductive, seeds 0 and 1 | minus ProtoNet, inductive |
| --- | --- | --- | --- | --- |
| ProtoNet | 66.50 ± 2.19, 66.50 ± 2.19 | -, - | 65.00 ± 1.96, 65.00 ± 1.96 | -, - |
| ProtoNet, `--lr 0.004` | -, 67.00 ± 3.10 | -, +0.50 ± 0.98 | -, 65.00 ± 1.96 | -, +0.00 ± 0.00 |
| MProtoNet+KML, `--embed constant` | 67.00 ± 2.50, 68.00 ± 3.46 | +0.50 ± 0.69, +1.50 ± 2.08 | 65.00 ± 1.96, 65.00 ± 1.96 | +0.00 ± 0.00, +0.00 ± 0.00 |
""" in text


def test_tables_know_the_scripts():
    """The paper's numbers, and which options are the paper's, are the same in scripts and tables."""
    for module in (kml, mmaml, mprotonet):
        args = vars(get_args(module))
        for method, settings in module.PAPER.items():
            for initials, numbers in settings.items():
                setting = next(name for name, modes in tables.SETTINGS.items()
                               if sorted(mode[0].upper() for mode in modes) == sorted(initials))
                assert tuple(x for x, _ in tables.TABLE1[setting][method]) == numbers
        family = "ProtoNet" if module is mprotonet else "MAML"
        assert all(args.get(k, v) == v for k, v in (tables.OPTIONS | tables.BUDGET).items())
        assert args["lr_halve_every"] == tables.HALVING[family]
        assert (args["iterations"], args["meta_batch"]) == tables.ITERATIONS[family]
        technical = {"modes", "ways", "shots", "meta_batch", "seed", "synthetic"}
        assert set(module.identity(get_args(module))) <= {"method", *technical, *tables.OPTIONS, *tables.BUDGET,
                                                          "lr_halve_every", "modulation"}


def run_all(*words, **kwargs):
    return subprocess.run(["bash", str(HERE / "run_all.sh"), *map(str, words)], check=False, capture_output=True, text=True,
                          env=os.environ | {"PYTHON": sys.executable}, **kwargs)


def check_modgrad_cells(found):
    """What the cells' flags make of modgrad.py's defaults, by the part of the paper."""
    seen = {}
    for line, cell in found:
        words = shlex.split(line.split("  #")[0])
        assert words[1] == "modgrad.py"
        args = modgrad.get_args(words[2:])
        _, part, shots, _ = cell.split("/")
        assert (shots, args.modes) == (f"{args.shots}shot", ["miniimagenet"])
        seen.setdefault(part, []).append((args.shots, args.method, args.steps, args.rank, args.iterations * args.meta_batch // 1000))
    wide = {"ModGrad": 1, "MAML": 5, "Meta-SGD": 1, "CAVIA": 5, "T-Net": 5, "MAML on conv3+conv4": 1, "ModGrad, wrn28-10": 1}
    assert set(seen["table2"]) == {(shots, method, steps, 5, 50) for shots in (1, 5) for method, steps in wide.items()}
    assert set(seen["table4"]) == {(shots, "ModGrad", steps, 5, 50) for shots in (1, 5) for steps in (2, 3, 4, 5)}
    assert set(seen["table5"]) == {(shots, "ModGrad", 1, rank, 50) for shots in (1, 5) for rank in (1, 10)}
    assert set(seen["figure6"]) == {
        *((shots, "MAML", steps, 5, 50) for shots in (5, 10, 15, 20) for steps in (5, 10, 20, 30)),
        *((shots, "ModGrad", 1, 5, 50) for shots in (10, 15, 20)), *((shots, "ModGrad, resnet34", 1, 5, 99) for shots in (1, 5)),
        *((shots, "MAML, resnet34", steps, 5, 99) for shots in (1, 5) for steps in (5, 10, 20, 30))}
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
            assert (where, args.modes, args.transfer, args.filters) == (f"{args.shots}shot", ["miniimagenet"], ["fc100"], 32)
            assert name == args.method.lower() + "-constant" * (args.embed == "constant")
            seen.add((part, args.shots, name))
        else:
            assert (args.modes, args.shots, args.synthetic, where) == (["scenes"], 5, True, f"{args.filters}filters")
            assert name == f"{args.tasks[0] if len(args.tasks) == 1 else 'multi'}-{args.modulation}"
            seen.add((part, args.filters, args.method, len(args.tasks), args.tasks[0]))
    assert seen == {*(("table2", shots, method) for shots in (1, 5) for method in ("maml", "anil", "am", "am-constant", "p-am")),
                    *(("table1", filters, method, 1, task) for filters in (32, 64) for method in ("ANIL", "AM") for task in data.KINDS),
                    *(("table1", filters, method, 4, "classification") for filters in (32, 64) for method in ("ANIL", "AM"))}
    assert len(found) == len(seen) == 30


def test_run_all_lists_every_cell():
    lines = run_all("--dry-run").stdout.splitlines()
    cells = [line.split("--out runs/")[1].split("  ")[0] for line in lines]
    assert len(set(cells)) == len(cells) == 175 + 4 + 30
    check_afr_cells([(line, cell) for line, cell in zip(lines, cells) if cell.startswith("afr/")])
    check_modgrad_cells([(line, cell) for line, cell in zip(lines, cells)
                         if cell.startswith("modgrad/") and cell.split("/")[1] not in ("table3", "figure5", "figure8")])
    table3 = [(line, cell) for line, cell in zip(lines, cells) if "table3" in cell]
    for line, cell in table3:
        words = shlex.split(line.split("  #")[0])
        args = modgrad_completion.get_args(words[2:])
        control = "-same-layer" if args.adapt == ["fc5"] and args.algorithm == "maml" else ""
        assert (words[1], cell) == ("modgrad_completion.py", f"modgrad/table3/{args.order}-{args.pixels}/{args.algorithm}{control}")
        assert (args.method in modgrad_completion.PAPER, args.iterations) == (not control, 50000)
        assert (args.steps, args.alpha) == (1, 0.1) or not control, "ModGrad's step"
    assert len(table3) == 20
    figure8 = [(line, cell) for line, cell in zip(lines, cells) if "figure8" in cell]
    for line, cell in figure8:
        words = shlex.split(line.split("  #")[0])
        args = modgrad_rl.get_args(words[2:])
        assert (words[1], cell) == ("modgrad_rl.py", f"modgrad/figure8/{args.env}/{args.algorithm}{'-seed1' * args.seed}")
    assert len(figure8) == 12
    figure5 = [(shlex.split(line.split("  #")[0]), cell) for line, cell in zip(lines, cells) if "figure5" in cell]
    assert [cell for _, cell in figure5] == [f"modgrad/figure5/{algorithm}" for algorithm in modgrad_multishot.METHODS]
    for words, cell in figure5:
        args = modgrad_multishot.get_args(words[2:])
        assert (words[1], args.algorithm, args.iterations, args.meta_batch) == ("modgrad_multishot.py", cell.split("/")[-1], 1000, 20)
    lines, cells = ([x for x, cell in zip(xs, list(cells)) if cell.startswith("kml/")] for xs in (lines, cells))
    assert len(cells) == 88
    for line, cell in zip(lines, cells):
        words = shlex.split(line.split("  #")[0])
        module = {"kml.py": kml, "mmaml.py": mmaml, "mprotonet.py": mprotonet}[words[1]]
        args = module.get_args(words[2:])
        paper, setting, shots, method = cell.split("/")
        assert (paper, shots) == ("kml", f"{args.shots}shot")
        assert set(args.modes) == tables.SETTINGS.get(setting, {setting})
        assert mprotonet.METHODS[args.modulation].lower() == method.replace("multi-", "") if module is mprotonet else \
            module.METHODS[args.modulation].lower() == method.replace("multi-", "")
        if method == "multi-maml":
            own = tables.MULTI_MAML.get(setting, tables.MULTI_MAML[""])
            assert own == {k: getattr(args, k) for k, v in tables.OPTIONS.items() if getattr(args, k, v) != v}
            assert (args.iterations, args.meta_batch) == tables.MULTI_ITERATIONS.get(setting, tables.MULTI_ITERATIONS[""])
        else:
            assert tables.OPTIONS == {k: getattr(args, k, v) for k, v in tables.OPTIONS.items()}
    some = run_all("--dry-run", "--only", "kml/2mode/5shot/*", "--only", "kml/*/5shot/multi-maml").stdout.splitlines()
    assert len(some) == 6 + 5
    quick = run_all("--dry-run", "--quick", "--synthetic", "--only", "*/multi-maml").stdout.splitlines()
    assert all("--quick --synthetic" in line and "--iterations" not in line and "runs/quick/synthetic/" in line for line in quick)
    for words, said in ((["--only", "nothing"], "no cell"), (["--only", ""], "empty"), (["--jobs", "00"], "--jobs 0"), (["--jobs", "x"], "--jobs x"), (["--nonsense"], "--nonsense"), (["--out"], "value")):
        done = run_all(*words)
        assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (2, 1, True)


def test_run_all_runs_skips_continues_and_reports(tmp_path, cache):
    words = ["--synthetic", "--only", "kml/2mode/5shot/mproto*", "--only", "kml/[om]*/5shot/multi-protonet", "--out", tmp_path / "runs",
             "--", *TINY[1:], "--cache-dir", cache]
    bad = tmp_path / "runs" / "kml" / "2mode" / "5shot" / "mprotonet"
    bad.mkdir(parents=True)
    (bad / "checkpoint.pt").write_bytes(b"rubbish")
    done = run_all("--jobs", "2", *words)
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("kml/2mode/5shot/mprotonet (status 2)")
    assert done.stdout.count("(status") == done.stdout.count("5shot/mprotonet (") == 1
    assert "is no checkpoint" in (bad / "output.txt").read_text()
    table = (tmp_path / "runs" / "tables.md").read_text()
    assert "**Synthetic images.**" in table
    assert "| ProtoNet: missing |" in table
    assert "| MProtoNet: missing |" in table
    assert re.search(r"\| Multi-ProtoNet \| \d", table)
    assert re.search(r"\| MProtoNet\+KML - Multi-ProtoNet \| [+-]\d", table)
    (bad / "checkpoint.pt").unlink()
    done = run_all(*words)                                              # only what failed is run again
    assert done.returncode == 0, done.stderr
    assert next(line for line in done.stdout.splitlines() if line.startswith("[")).startswith("[1/4]")
    assert done.stdout.count("--out") == 1
    assert "| MProtoNet: missing |" not in (tmp_path / "runs" / "tables.md").read_text()
    assert run_all(*words).stdout.count("--out") == 0
    assert all(line.endswith("# finished") for line in run_all("--dry-run", *words).stdout.splitlines())
    more = run_all("--synthetic", "--only", "kml/2mode/5shot/mprotonet", "--out", tmp_path / "runs", "--", *TINY[1:], "--cache-dir", cache,
                   "--iterations", 10 ** 6, "--stop-after", 1)
    assert more.returncode == 1
    assert "kml/2mode/5shot/mprotonet (not at its end" in more.stdout


def test_run_all_stops_with_a_checkpoint(tmp_path, cache):
    words = ["--synthetic", "--only", "kml/2mode/5shot/*maml", "--out", tmp_path, "--", *TINY[1:], "--iterations", "1000000",
             "--cache-dir", cache]
    process = subprocess.Popen(["bash", str(HERE / "run_all.sh"), *map(str, words)], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHON": sys.executable}, start_new_session=True)
    out = tmp_path / "kml" / "2mode" / "5shot" / "maml"
    while process.poll() is None and not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)              # as a scheduler does: to the whole group
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped; the same command continues" in said
    assert torch.load(out / "checkpoint.pt", weights_only=True)["iteration"] > 0
    assert not (out.parent / "mmaml").exists(), "nothing is begun after the signal"


def test_inspect_modulation(tmp_path, cache, monkeypatch):
    for name, module, words in (("kml", kml, []), ("constant", mprotonet, ["--embed", "constant"]), ("none", mprotonet, ["--modulation", "none"])):
        call(module, monkeypatch, *TINY, "--test-tasks", 10, "--cache-dir", cache, "--out", tmp_path / name, *words)
    done = run("inspect_modulation.py", tmp_path / "kml", tmp_path / "constant", "--cache-dir", cache, "--tasks", 10, "--out", tmp_path / "m.json")
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    one, constant = json.loads((tmp_path / "m.json").read_text())
    assert all(0 <= x["mode"] <= x["task"] <= x["size"] for x in one["M"].values())
    assert all(x["task"] < 1e-6 < x["size"] for x in constant["M"].values()), "M of a constant v knows no task"
    params = torch.load(tmp_path / "constant" / "checkpoint.pt", weights_only=True)["params"]
    for name, row in (("kml", one), ("constant", constant)):
        reported = json.loads((tmp_path / name / "result.json").read_text())["accuracy"]
        assert math.isclose(row["accuracy"]["its own v"]["overall"]["mean"], reported["overall"]["mean"], abs_tol=0.01)
    assert len({x["overall"]["mean"] for x in constant["accuracy"].values()}) == 1, "whatever v it is given is the constant"
    M = mprotonet.modulation(params, params["encoder.constant"])["conv3.weight"]
    assert math.isclose(constant["M"]["conv3"]["size"], M.square().mean().sqrt(), rel_tol=1e-5)
    done = here("inspect_modulation.py", tmp_path / "none")
    assert (done.returncode, "run of ProtoNet" in done.stderr) == (2, True)
    (tmp_path / "none" / "checkpoint.pt").write_bytes(b"rubbish")
    done = here("inspect_modulation.py", tmp_path / "none")
    assert (done.returncode, done.stderr.count("\n"), "is no checkpoint" in done.stderr) == (2, 1, True)


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_readme_shows_the_real_diff():
    shown = readme_blocks("diff")
    assert shown
    real = "\n".join(line for one, two in (("mmaml.py", "kml.py"), ("kml.py", "mprotonet.py"))
                     for line in difflib.unified_diff(code_lines(HERE / one), code_lines(HERE / two), n=0, lineterm=""))
    for block in shown:
        assert {line[0] for line in block.splitlines()} <= set("+-")
        removed, added = ([line for line in block.splitlines() if line[0] == sign] for sign in "-+")
        for lines in (removed, added):
            assert "\n".join(lines) in real, block
    assert any("1 + M" in block for block in shown)
    assert any("prototypes" in block for block in shown)


def readme_commands():
    """Every line of README's sh blocks that starts a script of ours."""
    lines = [line.split(" #")[0].strip() for block in readme_blocks("sh") for line in block.replace("\\\n", " ").split("\n")]
    return [line for line in lines if re.search(r"\bpython3? +\w+\.py|^bash ", line)]


def test_readme_commands_run(tmp_path, cache, monkeypatch, capsys):
    """As they stand, with a tiny budget appended; those on real images without their download. In this process, which saves
    two seconds a command."""
    monkeypatch.chdir(tmp_path)
    for name, few in (("SCENE_IMAGES", 96), ("SCENE_DOMAINS", dict.fromkeys(data.SPLITS, 2)), ("SCENE_CLASSES", dict.fromkeys(data.SPLITS, 6))):
        monkeypatch.setattr(data, name, few)
    monkeypatch.setattr(afr, "REPORTED", 4)
    commands = readme_commands()
    assert any("kml.py" in c for c in commands)
    assert any("mmaml.py" in c for c in commands)
    understood = set()
    for number, command in enumerate(dict.fromkeys(commands)):
        if command.startswith("bash run_all.sh "):          # which cells there are; another test runs some
            done = run_all(*shlex.split(command.replace("run_all.sh", "run_all.sh --dry-run"))[2:])
            assert "--out runs" in done.stdout, command
            continue
        words = shlex.split(re.split(r"\bpython3? +(?=\w+\.py)", command)[1])
        alike = re.sub(r"\d[\d.e-]*", "#", command)         # differs from one that was run in numbers only: that it is understood is enough
        if alike in understood and "--out" not in words:
            importlib.import_module(words[0].removesuffix(".py")).get_args([*words[1:], "--synthetic"])
            continue
        understood.add(alike)
        if words[0] in ("kml.py", "mmaml.py", "mprotonet.py", "modgrad.py"):
            words += [*TINY, "--image-size", "16", "--test-tasks", "10", "--cache-dir", cache]
            words += ["--keep-every", "3"] if "runs/example" in words else [] if "--out" in words else ["--out", str(tmp_path / str(number))]
        elif words[0] == "afr.py":
            words += ["--image-size", "16", "--filters", "4", "--meta-batch", "1", "--iterations", "4", "--steps", "1", "--queries", "3", "--synthetic",
                      "--test-tasks", "12", "--val-tasks", "12", "--report-tasks", "2", "--cache-dir", cache]
            words += [] if "--out" in words else ["--out", str(tmp_path / str(number))]
        elif words[0] == "modgrad_completion.py":
            words += ["--synthetic"] * ("--picture" not in words)
            words += ["--iterations", "4", "--image-size", "11", "--hidden", "4", "--test-tasks", "10", "--cache-dir", cache]
        elif words[0] == "modgrad_rl.py":
            if "cheetah-dir" in words:
                pytest.importorskip("gymnasium")
            words += ["--iterations", "1", "--meta-batch", "2", "--rollouts", "2", "--horizon", "4", "--test-tasks", "2", "--workers", "1"]
            words += ["--out", str(tmp_path / str(number))] * ("--out" not in words and "--picture" not in words)
        elif words[0] == "modgrad_multishot.py":
            words += ["--synthetic", "--iterations", "2", "--image-size", "16", "--channels", "2", "--context", "4", "--steps", "2", "--test-steps", "3",
                      "--meta-batch", "2", "--test-tasks", "6", "--cache-dir", cache]
        elif words[0] == "transference.py":                # of the example run, made just before
            words += ["--source-tasks", "2", "--target-tasks", "2", "--alpha", "0.001", "--cache-dir", cache]
        elif words[0] == "data.py":
            words += ["--synthetic", "--image-size", "28", "--cache-dir", cache]
        elif words[0] == "inspect_modulation.py":
            first = next(i for i, c in enumerate(dict.fromkeys(commands)) if " kml.py" in c)
            words = [words[0], str(tmp_path / str(first)), "--tasks", "10", "--cache-dir", cache]
        elif words[0] == "inspect_gradients.py":
            words += ["--tasks", "10", "--step-tasks", "2", "--cache-dir", cache]          # of the runs made just before
        elif words[0] == "tables.py":
            words[1:] = [str(tmp_path), "--out", str(tmp_path)]
        elif words[0] == "bench.py":
            monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Here())
            words += ["--scripts", "mprotonet"] * ("train" in words) + ["--seconds", "0.1", "--image-size", "16", "--meta-batch", "1", "--rounds", "1", "--shots", "1", "--synthetic",
                      "--cache-dir", cache]
        try:
            call(importlib.import_module(words[0].removesuffix(".py")), monkeypatch, *words[1:])
        except SystemExit as stop:
            assert not stop.code, f"{command}: {capsys.readouterr().err}"


def test_readme_defaults_are_the_defaults():
    """The table of defaults: `--flag` | paper | ours | released code."""
    rows = re.findall(r"^\| `--([\w-]+)` \|[^|]*\| ([^|]*?) \| ([^|]*?) \|", (HERE / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 15
    for module, column in ((kml, 0), (mmaml, 0), (mprotonet, 1)):
        args = vars(get_args(module))
        for flag, *ours in rows:
            value = args.get(flag.replace("-", "_"), "")
            assert ours[column] == {True: "on", False: "off"}.get(value if isinstance(value, bool) else None, str(value)), flag


def test_ci_runs_the_test_command_of_the_readme():
    command = next(line for block in readme_blocks("sh") for line in block.split("\n") if "pytest" in line)
    assert command in (HERE / ".ci" / "run").read_text()


def test_no_absolute_paths():
    for path in [*HERE.glob("*.py"), *HERE.glob("*.md"), *HERE.glob("*.txt"), *HERE.glob("results/**/*.json")]:
        assert not re.search(r"(^|[^a-z.])/(work|tmp|root|home)/", path.read_text()), path


RESULTS = HERE / "results"


def test_committed_results_are_whole():
    """Each result file names its protocol, its tasks and its commit, and its means follow from its tasks."""
    paths, hashes = list(RESULTS.glob("**/result.json")), {}
    assert len(paths) >= 3
    for path in paths:
        result = json.loads(path.read_text())
        rl, reuse = "env" in result, "nil_or_error" in result
        assert result["synthetic"] is ("scenes" in result.get("modes", ())), "ray-cast scenes are said to be synthetic, and nothing else is here"
        if rl:
            assert result["returns"] == [modgrad_rl.summary(np.array(row)) for row in result["per_task"]]
        elif "pixels" in result:
            assert result["error"] == modgrad_completion.summary(np.array(result["per_task"]))
        scored = () if rl or "pixels" in result else (("accuracy", "per_task"), ("accuracy_inductive", "per_task_inductive"))
        for key, tasks in scored:
            if "curve" in result:                           # multi-shot: means of alphabets' means
                assert result[key] == modgrad_multishot.summary(np.array(result[tasks]), np.array(result["per_task_alphabet"]))
            elif result[tasks] is not None:
                values, strata = np.array(result[tasks]), result.get("strata", result["modes"])
                found = afr.summary(values, strata, result["domains"]) if reuse else kml.summary(values, strata)
                assert {k: found[k] for k in result[key]} == result[key]
        assert len(result["per_task"][0] if rl else result["per_task"]) == result["test_tasks"]
        assert result["versions"]["commit"]
        assert (path.parent / "log.jsonl").exists()
        setting = (result["env"], result["test_tasks"]) if rl else (
            *result["modes"], result["pixels"], result["order"], result["test_tasks"]) if "pixels" in result else (
            *result["modes"], result["ways"], *result["shots"], result["test_tasks"]) if "curve" in result else (
            *result["modes"], result["ways"], result["shots"], result["test_tasks"], *(result["args"]["tasks"] if reuse else ["classification"]))
        assert hashes.setdefault(setting, result["tasks_sha256"]) == result["tasks_sha256"], "not the same test tasks"


def test_readme_says_what_the_result_files_say(tmp_path):
    readme = (HERE / "README.md").read_text()
    runs = {"/".join(run["file"].relative_to(RESULTS).parts[:-1]): run for run in tables.read([RESULTS])}
    for method in ("maml", "mmaml", "mmaml+kml"):
        run_ = runs[f"28px/2mode/5shot/{method}"]
        shown = re.search(rf"^\| {re.escape(tables.label(run_))} \| \d.*$", readme, re.MULTILINE).group()
        for protocol in ("paper", "inductive"):
            for modes in (run_["modes"], *([mode] for mode in run_["modes"])):
                assert tables.show(tables.score(run_, protocol, modes)) in shown

    alone = {("Multi-ProtoNet", mode): runs[f"42px/{mode}/5shot/multi-protonet"] for mode in ("omniglot", "miniimagenet")}
    family = {name: runs[f"42px/2mode/5shot/{name.lower()}"] for name in ("ProtoNet", "MProtoNet", "MProtoNet+KML")}
    modes = family["ProtoNet"]["modes"]
    family["Multi-ProtoNet"] = tables.joined("Multi-ProtoNet", modes, alone)
    family = dict(zip(family, tables.on_the_same_tasks(list(family.values()), modes)))
    for name, run_ in family.items():
        shown = re.search(rf"^\| {re.escape(name)} \| .* \| \d\d\.\d\d ± 0\.4\d \| .*$", readme, re.MULTILINE).group()
        for protocol in ("paper", "inductive"):
            for of in (modes, *([mode] for mode in modes)):
                assert tables.show(tables.score(run_, protocol, of)) in shown, (name, protocol, of)
    said = " ".join(readme.split())
    for one, two in (("KML", "ProtoNet"), ("KML", "MProtoNet"), ("MProtoNet", "ProtoNet"), ("KML", "Multi-ProtoNet"), ("ProtoNet", "Multi-ProtoNet")):
        gain = tables.show(tables.difference(*(family[name.replace("KML", "MProtoNet+KML")] for name in (one, two)), "paper", modes), "+")
        assert f"{one} - {two} is {gain}" in said, (one, two, gain)
    halfway = {mode: runs[f"42px/5000/{mode}/5shot/multi-protonet"] for mode in modes}
    assert tables.show(tables.score(halfway["miniimagenet"], "paper", ["miniimagenet"])) in said
    for mode, words in (("miniimagenet", "ProtoNet of both modes minus it {}"), ("omniglot", "(after 5,000 iterations {})")):
        gain = tables.show(tables.difference(family["ProtoNet"], halfway[mode], "paper", [mode]), "+")
        assert words.format(gain) in said
    gain = tables.show(tables.difference(family["ProtoNet"], family["Multi-ProtoNet"], "paper", ["omniglot"]), "+")
    assert f"On Omniglot the two differ by {gain}" in said

    def difference(one, two):
        return tables.show(tables.difference(runs[one], runs[two], "paper", runs[one]["modes"]), "+")
    for one, two in (("mmaml+kml", "mmaml"), ("mmaml+kml", "maml"), ("mmaml", "maml")):
        assert f"{one.removeprefix('mmaml+').upper()} - {two.upper()} {difference(*(f'28px/2mode/5shot/{x}' for x in (one, two)))}" in readme
    pairs = [re.findall(r"`([^`]*)`", line) for line in re.findall(r"<!-- (.*?) -->", readme)]
    for one, two in pairs:                              # <!-- `run` `other run` -->: what is said next, for each seed
        said = " and ".join(difference(f"residual/seed{seed}/{one}", f"residual/seed{seed}/{two}") for seed in (0, 1))
        assert f"<!-- `{one}` `{two}` -->{said}" in readme.replace("\n", " "), f"{one} - {two}: {said}"
    assert len(pairs) >= 4


def test_readmes_tables_of_modgrad_are_those_of_the_result_files():
    """Tables and numbers of the section stand in the result files; without result files it has none of either."""
    readme = (HERE / "README.md").read_text()
    section = re.split(r"\n###? ", readme[readme.index("### ModGrad and its rivals"):])[0]
    known = (RESULTS / "tables.md").read_text().split("\n")
    for file in sorted(RESULTS.glob("modgrad*/gradients/*/gradients.json")):
        found = json.loads(file.read_text())["found"]
        known += inspect_gradients.noise_table(found).split("\n")
        known += inspect_gradients.spectrum_table([row for row in found if row["algorithm"] in ("modgrad", "maml")]).split("\n")
    lines = [line for line in section.split("\n") if line.startswith("|")]
    assert bool(lines) == any(RESULTS.glob("modgrad*/**/result.json"))
    assert not [line for line in lines if line not in known]
    said = re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", " ".join(line for line in section.split("\n") if not line.startswith("|")))
    assert not [number for number in said if number not in "\n".join(lines)], "what the text says stands in its tables"


@pytest.mark.parametrize("head, least, numbers", [("### Transference between tasks", 12, 8), ("### 2D navigation", 13, 4),
                                                  ("### Half-cheetah, forwards or backwards", 9, 2),
                                                  ("### Multi-shot learning on real alphabets", 20, 2), ("### Image completion on real faces", 11, 4)])
def test_readmes_tables_of_a_section_are_those_of_the_result_files(head, least, numbers):
    readme = (HERE / "README.md").read_text()
    section = re.split(r"\n###? ", readme[readme.index(head):])[0]
    known = (RESULTS / "tables.md").read_text().split("\n")
    lines = [line for line in section.split("\n") if line.startswith("|")]
    assert len(lines) >= least
    assert not [line for line in lines if line not in known]
    text = " ".join(line for line in section.split("\n") if not line.startswith("|"))
    said = re.findall(r"[+-]?\d+\.\d+ (?:± \d+\.\d+|\(\S+ to \S+\))", text)
    assert len(said) >= numbers
    assert not [number for number in said if number not in "\n".join(lines)], "what the text says stands in its tables"


def test_the_completion_table_shows_the_papers_numbers():
    table = (RESULTS / "tables.md").read_text()
    table = table[table.index("### Image completion, celeba"):]
    for method, numbers in modgrad_completion.PAPER.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
        assert re.findall(r"\((\S+)\)", row) == [f"{numbers[k]:.3f}" for k in ((10, "random"), (100, "random"), (10, "ordered"), (100, "ordered"))]


def test_readme_shows_the_measured_speeds():
    readme, shown = (HERE / "README.md").read_text().split("\n"), 0
    for path in RESULTS.glob("bench-*.json"):
        record = json.loads(path.read_text())
        args = argparse.Namespace(**record.get("args", {}))
        if path.name == "bench-gpu.json":
            assert set(bench.gpu_table(record).split("\n")) <= set(readme)
        for part, table in (("train", bench.train_table), ("peers", bench.peers_table), ("variants", bench.variants_table), ("steps", bench.steps_table), ("reuse", bench.reuse_table)):
            if part in record:
                assert args.synthetic is False
                rows = table(record[part], args).split("\n")
                assert set(rows) <= set(readme), path
                shown += len(rows) - 2
    assert shown == 3 + 2 + 2 * 2 + 2 + 12 + 8


def test_differences_in_the_tables_are_those_of_the_means():
    """Every number of a table is of the same test tasks: so a difference is the difference of two means, to the rounding."""
    means, checked = {}, 0
    for line in (RESULTS / "tables.md").read_text().split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(("### ", "| method |")):
            means = {}
        elif line.startswith("| ") and re.match(r"\d+\.\d+ ± ", cells[1]):
            means[cells[0]] = [float(cell.split(" ± ")[0]) if "±" in cell else None for cell in cells[1:3]]
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
    done = run("tables.py", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.split("\n") if line.startswith("| Multi-ProtoNet"))
    assert row.startswith("| Multi-ProtoNet | 69.25 ± 1.10 | - |")


def test_transference_results_name_their_commit_or_the_readme_says_that_they_do_not():
    readme, nameless = (HERE / "README.md").read_text(), set()
    for file in RESULTS.glob("transference/*/transference.json"):
        if not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", json.loads(file.read_text()).get("commit", "")):
            nameless.add(file.parent.name)
    assert nameless == {"half", "self095", "sweep"}
    assert "`half`, `self095` and `sweep` name no commit" in readme


def test_committed_tables_are_those_of_the_result_files(tmp_path):
    done = here("tables.py", RESULTS, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tables.md").read_text()
    assert text == (RESULTS / "tables.md").read_text()
    notes = {json.loads(path.read_text()).get("note", "") for path in RESULTS.glob("**/result.json")} - {""}
    assert notes and all(note in text for note in notes), "how a run departed from its command is said beside its numbers"
    by_seed = text[text.index("| configuration"):].split("\n\n")[0]
    assert by_seed in (HERE / "README.md").read_text()
    assert all((RESULTS / file).exists() for file in re.findall(r"\((curves[^)]*)\)", text))


def test_readme_says_what_was_found_inside_the_modulation():
    readme = (HERE / "README.md").read_text()
    found = [row for folder in ("residual", "42px") for row in json.loads((RESULTS / folder / "modulation.json").read_text())]
    assert len(found) == 5
    for row in found:
        assert row["synthetic"] is False
        change = [row["change"][k]["overall"] for k in ("its mode's mean", "the mean of all", "another mode's mean")]
        cells = [f"{row['accuracy']['its own v']['overall']['mean']:.2f}", *(f"{x['mean']:+.2f} ± {x['ci95']:.2f}" for x in change)]
        name = "W * M" if row["no_residual"] else "W * (1 + M)"
        long = ", 10,000 iterations" * (row["iteration"] == 10000)
        assert f"| {name}, seed {row['seed']}{long} | {' | '.join(cells)} |" in readme
