"""Tests: test_kml."""

import contextlib
import json
import math
import os
import re
import signal
import time
import traceback
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import afr
import data
import kml
import mmaml
import modgrad
import mprotonet
from data import Task
from fewshot import parallel as fewshot_parallel
from fewshot import run as run_file
from tests.helpers import (
    CASES,
    MODULATED,
    MODULATED_MAML,
    TINY,
    call,
    get_args,
    make_params,
    make_task,
)
from tools import baselines, inspect_modulation


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
    for one, two in zip(
        module.task_loss(params, task, args, evaluate=True),
        module.task_loss(module.group(params, "base"), task, plain, evaluate=True),
    ):
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
    for words in (
        [],
        ["--no-residual"],
        ["--embed", "constant"],
    ):  # nor does the control draw another generator
        other = mprotonet.init_params(get_args(mprotonet, *words))
        params = mprotonet.init_params(get_args(mprotonet))
        assert all(torch.equal(w, other[k]) for k, w in params.items() if not k.startswith("encoder."))


@pytest.mark.parametrize("module", [mmaml, mprotonet])
def test_film_without_batchnorm_is_a_scaled_kernel(module, monkeypatch):
    """KML paper, Eq. 3 to 5, of FiLM as `forward` applies it: a factor for each kernel, and an offset of its bias."""

    def convolution(params, l, x, moments=None):
        return F.conv2d(x, params[f"conv{l}.weight"], params[f"conv{l}.bias"], stride=2, padding=1), None

    monkeypatch.setattr(module, "conv_norm", convolution)
    _, params = make_params(module, "film")
    v = torch.rand(128, generator=torch.Generator().manual_seed(0)).double()
    theta, omega = module.group(params, "base"), module.modulation(params, v)
    scaled = dict(theta)
    for l in module.LAYERS:
        eta, gamma = 1 + omega[f"film{l}.scale"], omega[f"film{l}.shift"]
        scaled[f"conv{l}.weight"] = eta[:, None, None, None] * theta[f"conv{l}.weight"]
        scaled[f"conv{l}.bias"] = eta * theta[f"conv{l}.bias"] + gamma
    x = make_task().query_x
    with_film = module.forward(module.modulate(theta, omega), x)[0]
    torch.testing.assert_close(with_film, module.forward(scaled, x)[0])
    assert not torch.allclose(with_film, module.forward(theta, x)[0], rtol=1e-3)


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
        dead = ".bias." in k or re.fullmatch(r"(encoder\.)?conv\d\.bias", k)  # a bias before a BatchNorm
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
        assert torch.isclose(
            fast["conv2.weight"][o, i, y, x], W[o, i, y, x] * (1 + rows[flat // C] * cols[flat % C])
        )
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
        direction = {
            k: torch.randn(w.shape, generator=rng).double()
            for k, w in params.items()
            if (k in module.group(params, "base") and part == "base") or k.startswith(f"{part}.")
        }
        if not direction:
            continue

        def loss(step, direction=direction):
            moved = {k: w.detach() + step * direction.get(k, 0) for k, w in params.items()}
            return np.mean(
                [module.task_loss(moved, Task(*(x[i] for x in batch)), args)[0].item() for i in range(2)]
            )

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


@pytest.mark.parametrize("variant", baselines.VARIANTS)
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
    compiler = {"backend": "eager"} if variant == "compiled" else {}  # as traced, without generating code
    gradients = baselines.prepare_variant(variant, module, args, params, **compiler)
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


META_CASES = [
    (kml, []),
    (mmaml, []),
    (kml, ["--modulation", "none"]),
    (mprotonet, []),
    (mprotonet, ["--official"]),
    (modgrad, []),
    *((modgrad, ["--algorithm", algorithm]) for algorithm in ("maml", "metasgd", "cavia", "tnet")),
]


@contextlib.contextmanager
def only_on_the_device():
    """Autocast, which does not know the meta device, does nothing: all else is as on a GPU."""
    with mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()):  # noqa: PT008
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
    args = get_args(
        afr, "--shots", 2, "--image-size", 32, "--filters", 4, "--meta-batch", 2, "--modulation", modulation
    )
    params = {k: w.to("meta").requires_grad_() for k, w in afr.init_params(args).items()}
    batch = Task(
        *(x.to("meta") for x in make_task(ways=5, shots=2, queries=3, size=32, tasks=2, dtype=torch.float32))
    )
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
            ignored = (
                os.path.join("optim", "adam.py"),
                os.path.join("optim", "optimizer.py"),
                data.__file__,
                run_file.__file__,  # at log steps and the end; `observe` only stores
            )  # the last: on a CPU alone
            if not any(frame.filename.endswith(ignored) for frame in traceback.extract_stack(limit=12)):
                waits.append((len(done), name))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        count(name)
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda *args, **kwargs: (step(*args, **kwargs), done.append(1))[0]
    )
    words = [
        "--synthetic",
        "--image-size",
        "16",
        "--channels",
        2,
        "--meta-batch",
        2,
        "--queries",
        2,
        "--iterations",
        12,
        "--log-every",
        5,
        "--save-every",
        100,
        "--val-every",
        0,
        "--keep-every",
        0,
        "--out",
        tmp_path,
        "--cache-dir",
        cache,
    ]
    args = get_args(module, *words)
    params = {k: w.requires_grad_() for k, w in module.init_params(args).items()}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.train(params, args, data.Run(args))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len(done) == 12
    assert {iteration for iteration, _ in waits} == {5, 10, 12}, (
        "after iterations 5, 10 and the last, and nowhere else"
    )


def test_a_run_of_any_number_of_workers_is_the_same_run(tmp_path, cache, monkeypatch):
    found = []
    for workers in (1, 3):
        call(
            kml,
            monkeypatch,
            *TINY,
            "--cache-dir",
            cache,
            "--out",
            tmp_path / str(workers),
            "--workers",
            workers,
        )
        checkpoint = torch.load(tmp_path / str(workers) / "checkpoint.pt", weights_only=True)
        log = [json.loads(line) for line in (tmp_path / str(workers) / "log.jsonl").read_text().splitlines()]
        result = json.loads((tmp_path / str(workers) / "result.json").read_text())
        found.append((checkpoint, [line | {"seconds": 0} for line in log], result["per_task"]))
    (one, *rest), (two, *others) = found
    assert all(torch.equal(w, two["params"][k]) for k, w in one["params"].items())
    assert one["identity"] == two["identity"]
    assert rest == others


def test_cores_that_may_be_used(tmp_path, monkeypatch):
    """The affinity of the process, and what a container's quota and FEWSHOT_CORES leave of it."""
    monkeypatch.delenv("FEWSHOT_CORES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpu.cfs_period_us").write_text("100000")
    file = tmp_path / "quota"
    for text, found in (
        ("max 100000", 8),
        ("350000 100000", 3),
        ("50000 100000", 1),
        ("-1", 8),
        ("200000", 2),
        ("nonsense", 8),
    ):
        file.write_text(text + "\n")
        assert fewshot_parallel.cores([file]) == found, text
    assert fewshot_parallel.cores([tmp_path / "nothing"]) == 8
    for text, found in (("3", 3), ("12", 8), ("0", 1), ("many", 8), ("", 8)):
        monkeypatch.setenv("FEWSHOT_CORES", text)
        assert fewshot_parallel.cores([tmp_path / "nothing"]) == found, text
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert fewshot_parallel.cores([]) == 5  # macOS and Windows


def test_threads_keep_the_order_and_pass_on_errors():
    def late(i):
        time.sleep(0.02 * (3 - i))
        return i, torch.get_num_threads()

    assert list(fewshot_parallel.in_threads(late, range(4), 4)) == [(i, 1) for i in range(4)]
    with pytest.raises(ZeroDivisionError):
        list(fewshot_parallel.in_threads(lambda x: 1 / x, [1, 0], 2))


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


def adapted_by_hand(module, theta, omega, task, clip, conv_lr=(0.1,) * 4):
    """Two inner steps of size 0.1 on `theta` under a fixed omega, by torch.autograd.grad -> the parameters for the queries."""
    sizes = dict.fromkeys(theta, 0.1) | {f"conv{l}.weight": size for l, size in zip((1, 2, 3, 4), conv_lr)}
    for _ in range(2):
        logits, _ = module.forward(module.modulate(theta, omega), task.support_x)
        grads = torch.autograd.grad(
            F.cross_entropy(logits, task.support_y), list(theta.values()), create_graph=True
        )
        theta = {k: theta[k] - sizes[k] * g.clamp(-clip, clip) for k, g in zip(theta, grads)}
    return module.modulate(theta, omega)


@pytest.mark.parametrize("module, modulation", MODULATED_MAML)
@pytest.mark.parametrize("adapt", ["theta", "modulated"])
def test_what_the_inner_loop_adapts(module, modulation, adapt):
    """The whole of task_loss, written again with torch.autograd.grad; and the clamp of the inner gradients."""
    for clip in (20, 1e-3):
        args, params = make_params(
            module, modulation, "--inner-lr", 0.1, "--inner-clip", clip, "--adapt", adapt
        )
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


@pytest.mark.parametrize("module, modulation", [case for case in CASES if case[0] is not mprotonet])
@pytest.mark.parametrize("sizes", [(0.0, 0.02, 0.3, 1.0), (0.1, 0.1, 0.1, 0.1)])
def test_kernels_have_step_sizes_of_their_own(module, modulation, sizes):
    """--conv-lr changes the steps of the four kernels and of nothing else; as large as --inner-lr, it changes no bit."""
    args, params = make_params(module, modulation, "--inner-lr", 0.1, "--conv-lr", *sizes)
    task, theta, omega = make_task(), module.group(params, "base"), {}
    if modulation != "none":
        omega = module.modulation(params, module.encode_task(params, task.support_x))
    adapted = adapted_by_hand(module, theta, omega, task, 20, sizes)
    _, logits = module.task_loss(params, task, args)
    torch.testing.assert_close(logits, module.forward(adapted, task.query_x)[0])
    usual, _ = make_params(module, modulation, "--inner-lr", 0.1)
    all_usual = set(sizes) == {0.1}
    assert torch.equal(logits, module.task_loss(params, task, usual)[1]) == all_usual


@pytest.mark.parametrize("module, modulation", MODULATED_MAML)
def test_a_constant_embedding_knows_nothing_of_the_task(module, modulation):
    """--embed constant: one learned v for all tasks; base network and generator start as they do without it."""
    args, params = make_params(module, modulation, "--embed", "constant")
    task, other = make_task(), make_task(seed=1)
    assert torch.equal(
        module.encode_task(params, task.support_x), module.encode_task(params, other.support_x)
    )
    loss, _ = module.task_loss(params, task, args)
    gradient = torch.autograd.grad(loss, params["encoder.constant"])[0]
    assert gradient.abs().max() > 0
    _, informed = make_params(module, modulation)
    for key, w in params.items():
        assert key == "encoder.constant" or torch.equal(w, informed[key])
    assert not any(key.startswith("encoder.conv") for key in params)
    first = module.encode_task(informed, task.support_x).norm()
    assert 0.5 < params["encoder.constant"].norm() / first < 2


def test_a_step_of_theta_under_m_is_a_step_of_the_kernels_by_the_square_of_1_plus_m():
    """kml.py's docstring; and with M of 0.3 the two readings of --adapt do not predict the same."""
    args, params = make_params(kml, "kml", "--inner-steps", 1, "--inner-lr", 0.1)
    other, _ = make_params(kml, "kml", "--inner-steps", 1, "--inner-lr", 0.1, "--adapt", "modulated")
    for k, w in params.items():
        if k.endswith(("rows.bias", "cols.bias")):
            w.data.fill_(0.3**0.5)
    task, theta = make_task(), kml.group(params, "base")
    omega = kml.modulation(params, kml.encode_task(params, task.support_x))
    start = {k: w.detach().requires_grad_() for k, w in kml.modulate(theta, omega).items()}
    loss = F.cross_entropy(kml.forward(start, task.support_x)[0], task.support_y)
    grads = dict(zip(start, torch.autograd.grad(loss, list(start.values()))))
    rate = {
        k: (1 + omega[k].view(w.shape)) ** 2 if k in omega and "weight" in k else 1.0
        for k, w in start.items()
    }
    ends = {k: w - 0.1 * rate[k] * grads[k] for k, w in start.items()}
    torch.testing.assert_close(kml.task_loss(params, task, args)[1], kml.forward(ends, task.query_x)[0])
    plain = {k: w - 0.1 * grads[k] for k, w in start.items()}
    torch.testing.assert_close(kml.task_loss(params, task, other)[1], kml.forward(plain, task.query_x)[0])
    assert not torch.allclose(
        kml.task_loss(params, task, args)[1], kml.task_loss(params, task, other)[1], rtol=1e-3
    )


@pytest.mark.parametrize("module, modulation", MODULATED)
def test_omega_depends_on_the_support_images_alone(module, modulation):
    _, params = make_params(module, modulation, dtype=torch.float32)
    task, other = make_task(dtype=torch.float32, shots=5), make_task(seed=1, dtype=torch.float32)
    omega = lambda t: module.modulation(params, module.encode_task(params, t.support_x))
    here = omega(task)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    for same in (
        task._replace(query_x=other.query_x, query_y=other.query_y.flip(0), support_y=task.support_y.flip(0)),
        task._replace(support_x=task.support_x[order], support_y=task.support_y[order]),
    ):
        assert all(torch.equal(w, here[k]) for k, w in omega(same).items())  # bit by bit
    assert not any(torch.equal(w, here[k]) for k, w in omega(other).items())
    args, _ = make_params(module, modulation)
    module.task_loss(params, task, args)[0].backward()
    for part in (
        "encoder.conv1.weight",
        "encoder.linear.weight",
        *(k for k in params if "rows" in k or "film" in k),
    ):
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
    for x, y, at, rows in [
        (task.query_x[order], task.query_y[order], slice(None), order),
        (task.query_x[keep], task.query_y[keep], slice(None), keep),
        (mixed, task.query_y, [4], [4]),
    ]:
        _, p, i = module.task_loss(params, task._replace(query_x=x, query_y=y), args, evaluate=True)
        torch.testing.assert_close(i[at], inductive[rows], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(p[4], paper[4], rtol=1e-3)  # the papers' protocol does know them


def test_stats_of_a_batch_reproduce_its_own_normalisation():
    _, params = make_params(kml, "none")
    x = make_task().query_x
    logits, stats = kml.forward(params, x)
    torch.testing.assert_close(kml.forward(params, x, stats)[0], logits)
    y = F.conv2d(x, params["conv1.weight"], params["conv1.bias"], stride=2, padding=1)
    torch.testing.assert_close(stats[0][0], y.mean((0, 2, 3)))
    torch.testing.assert_close(stats[0][1], (y.var((0, 2, 3), correction=0) + 1e-5) ** -0.5)


@pytest.mark.parametrize("module, modulation", [(kml, "kml"), (mmaml, "film"), (mprotonet, "kml")])
def test_no_norm_affine_leaves_scale_and_shift_out(module, modulation):
    """The network of a scale of 1 and a shift of 0, which are no parameters and do not adapt."""
    args, params = make_params(module, modulation, "--no-norm-affine")
    _, usual = make_params(module, modulation)
    parts = {f"norm{l}.{part}" for l in module.LAYERS for part in ("scale", "shift")}
    assert usual.keys() - params.keys() == parts
    x = make_task().query_x
    torch.testing.assert_close(module.forward(params, x)[0], module.forward(usual | params, x)[0])
    loss, *_ = module.task_loss(params, make_task(), args, evaluate=True)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(params.values())))


@pytest.mark.parametrize("module", [kml, mmaml, mprotonet, modgrad, afr])
def test_intervals(module):
    """Strata by mode (DESIGN 4), against a hand computation and a bootstrap within strata."""
    rng = np.random.default_rng(0)
    per_task = np.stack([rng.normal(95, 4, 400), rng.normal(50, 9, 400)], 1).reshape(-1)
    rows = module.summary(per_task, ["a", "b"], *([{}] if module is afr else []))
    a, b = per_task[::2], per_task[1::2]
    assert rows["a"] == {"mean": round(a.mean(), 4), "ci95": round(1.96 * a.std(ddof=1) / 20, 4)}
    assert rows["overall"]["mean"] == round((a.mean() + b.mean()) / 2, 4)
    halves = rows["a"]["ci95"], rows["b"]["ci95"]
    assert math.isclose(rows["overall"]["ci95"], math.hypot(*halves) / 2, abs_tol=1e-3)
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
        omega = module.modulation(
            params, module.encode_task(params, make_task(dtype=torch.float32).support_x)
        )
    assert all(w.dtype == torch.float32 for w in omega.values()), "1 + M has too few digits in bf16"


@pytest.mark.parametrize("module, modulation", MODULATED)
def test_the_benchmarks_plain_baseline_computes_the_same(module, modulation):
    args, params = make_params(module, modulation)
    task = make_task()
    loss = baselines.plain_loss(
        module, args, params, task.support_x, task.support_y, task.query_x, task.query_y
    )
    expected, _ = module.task_loss(params, task, args)
    torch.testing.assert_close(loss, expected)
    for one, two in zip(
        torch.autograd.grad(loss, list(params.values())), torch.autograd.grad(expected, list(params.values()))
    ):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_norms_of_filters_change_steps_and_nothing_else():
    """BatchNorm divides a filter's norm out of its output, but a filter of half the norm has twice the gradient."""
    _, params = make_params(kml, "none", "--image-size", 28)
    task = make_task(ways=3, shots=5, size=28)
    base = kml.group(params, "base")
    factors = torch.tensor([0.5, 2.0, 1.0, 3.0]).double()
    modulated = base | {"conv1.weight": base["conv1.weight"] * factors[:, None, None, None]}

    assert torch.allclose(inspect_modulation.filter_norms(base, modulated, "conv1"), factors)
    back = inspect_modulation.scale_back(base, modulated)
    assert all(torch.allclose(back[key], base[key]) for key in base)

    def loss(theta):
        logits, _ = kml.forward(theta, task.support_x)
        return F.cross_entropy(logits, task.support_y)

    one, other = (torch.func.grad_and_value(loss)(theta) for theta in (base, modulated))
    assert one[1].item() == pytest.approx(other[1].item(), rel=1e-3)
    lengths = [gradient["conv1.weight"].flatten(1).norm(dim=1) for gradient, _ in (one, other)]
    assert torch.allclose(lengths[1] * factors, lengths[0], rtol=0.02)
