"""Tests: test_mprotonet."""

import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import kml
import mprotonet
from data import Episodes, Task
from fewshot.flags import identity
from tests.helpers import TINY, call, fails, get_args, make_params, make_task
from tools import inspect_modulation


def test_a_prototype_is_the_mean_of_its_class():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 5, generator=rng), torch.tensor([2, 0, 1, 1, 2, 0, 0, 1, 2, 2, 1, 0])
    means = torch.stack([x[y == n].mean(0) for n in range(3)])
    torch.testing.assert_close(mprotonet.class_means(x, F.one_hot(y).float()), means)
    (args, params), task = make_params(mprotonet, "kml"), make_task(shots=4)
    order = torch.randperm(12, generator=rng)
    mixed = task._replace(support_x=task.support_x[order], support_y=task.support_y[order])
    torch.testing.assert_close(
        mprotonet.task_loss(params, mixed, args)[1], mprotonet.task_loss(params, task, args)[1]
    )


def test_distances_agree_with_a_loop():
    x, y = torch.randn(4, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    loop = [[sum((a - b) ** 2 for a, b in zip(p, q)) for q in y.tolist()] for p in x.tolist()]
    torch.testing.assert_close(mprotonet.squared_distances(x, y), torch.tensor(loop, dtype=torch.float64))


def test_prototype_networks_on_hand_made_numbers(monkeypatch):
    """Features on a line: support 0, 2 of class 0 and 5, 7 of class 1; queries 2 and 5. And one step of soft k-means."""
    monkeypatch.setattr(mprotonet, "forward", lambda params, x, stats=None: (x.flatten(1), None))
    points = lambda *values: torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)
    task = Task(
        points(0, 5, 2, 7), torch.tensor([0, 1, 0, 1]), points(2, 5), torch.tensor([0, 1]), torch.tensor(0)
    )
    args = get_args(mprotonet, "--modulation", "none", "--ways", 2)
    loss, logits, _ = mprotonet.task_loss({}, task, args, evaluate=True)
    assert logits.tolist() == [[-1, -16], [-16, -1]]  # prototypes 1 and 6
    assert math.isclose(loss, math.log(1 + math.exp(-15)))
    args = get_args(mprotonet, "--modulation", "none", "--ways", 2, "--transductive")
    p = 1 / (1 + math.exp(-15))  # of each query for its own class
    near, far = (0 + 2 + 2 * p + 5 * (1 - p)) / 3, (5 + 7 + 2 * (1 - p) + 5 * p) / 3
    _, logits = mprotonet.task_loss({}, task, args, evaluate=True)
    expected = [[-((q - c) ** 2) for c in (near, far)] for q in (2, 5)]
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
        v, base = (
            mprotonet.encode_task(params, make_task(size=16, dtype=torch.float32).support_x),
            mprotonet.group(params, "base"),
        )
        kernel = lambda params, base=base, v=v, args=args: mprotonet.modulate(
            mprotonet.group(params, "base"), mprotonet.modulation(params, v), 0 if args.no_residual else 1
        )["conv3.weight"]
        here, rng = kernel(params), torch.Generator().manual_seed(0)
        for part in (
            "generator.",
            "conv3",
        ):  # a first step of Adam: the learning rate, up or down, for each entry
            moved = {
                k: w + 1e-3 * (torch.rand(w.shape, generator=rng) - 0.5).sign() if k.startswith(part) else w
                for k, w in params.items()
            }
            change[part, bool(words)] = ((kernel(moved) - here).norm() / here.norm()).item()
    assert 40 < change["generator.", True] / change["generator.", False] < 400
    assert 0.7 < change["conv3", True] / change["conv3", False] < 1.4


@pytest.mark.parametrize("module", [kml, mprotonet])
def test_ranks_of_m(module):
    """As a C_out x 9 C_in matrix: rank 1 in layer 1 (one pattern of 27 entries for all filters), rank 3 in layers 2 to 4."""
    _, params = make_params(module, "kml")
    omega = module.modulation(params, torch.rand(128, generator=torch.Generator().manual_seed(0)).double())
    theta = module.group(params, "base")
    ranks = [
        torch.linalg.matrix_rank(omega[f"conv{l}.weight"].view_as(theta[f"conv{l}.weight"]).flatten(1)).item()
        for l in module.LAYERS
    ]
    assert ranks == [1, 3, 3, 3]
    first = omega["conv1.weight"].view_as(theta["conv1.weight"])
    torch.testing.assert_close(
        first / first[:, :1, :1, :1], (first / first[:, :1, :1, :1])[:1].expand_as(first)
    )


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
    (args, params), (scaled, _), task = (
        make_params(mprotonet, "none"),
        make_params(mprotonet, "none", "--distance-scale", 0.25),
        make_task(),
    )
    one, two = (
        mprotonet.task_loss(params, task, args, evaluate=True),
        mprotonet.task_loss(params, task, scaled, evaluate=True),
    )
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
    assert "official" not in identity(get_args(mprotonet, "--official"))
    for words in (["--embed", "query"], ["--transductive"]):
        args, params = make_params(mprotonet, "kml", *words)
        assert len(mprotonet.task_loss(params, make_task(), args, evaluate=True)) == 2, "no inductive logits"
    baseline = get_args(mprotonet, "--modulation", "none", "--official")
    assert (baseline.transductive, baseline.no_residual, baseline.embed) == (True, False, "support")
    for words in (
        "--modulation none --embed query",
        "--modulation film --no-residual",
        "--modulation film --official",
        "--modulation none --generator full",
    ):
        fails(
            capsys,
            functools.partial(mprotonet.get_args, words.split()),
            "means nothing with --modulation",
            "kml",
        )


def test_the_outer_product_saves_parameters_152_times():
    args, widths = get_args(mprotonet), (3, 32, 64, 128, 256)
    count = {}
    for args.generator in ("outer", "full"):
        sizes = [mprotonet.generator_sizes(args, l, widths[l - 1], widths[l]) for l in mprotonet.LAYERS]
        count[args.generator] = sum(
            129 * n for size in sizes for n in size.values()
        )  # 128 weights and a bias each
    assert count["outer"] == 329595
    assert round(count["full"] / count["outer"]) == 152
    made = mprotonet.init_params(get_args(mprotonet, "--generator", "full", "--channels", 4))
    sizes = [
        mprotonet.generator_sizes(args, l, c, 4 * 2 ** (l - 1)) for l, c in zip((1, 2, 3, 4), (3, 4, 8, 16))
    ]
    assert sum(w.numel() for w in mprotonet.group(made, "generator").values()) == sum(
        129 * n for s in sizes for n in s.values()
    )


def test_initial_scale_changes_no_prediction_and_its_share_of_a_step():
    """BatchNorm cancels the scale of a kernel, up to its 1e-5; what it leaves is a larger gradient: the idea of --init-scale."""
    (args, params), (_, small) = (
        make_params(mprotonet, "none"),
        make_params(mprotonet, "none", "--init-scale", 0.5),
    )
    one, two = (mprotonet.task_loss(p, make_task(), args) for p in (params, small))
    torch.testing.assert_close(one[1], two[1], rtol=5e-3, atol=5e-2)
    one[0].backward()
    two[0].backward()
    torch.testing.assert_close(small["conv2.weight"], 0.5 * params["conv2.weight"])
    torch.testing.assert_close(
        small["conv2.weight"].grad, 2 * params["conv2.weight"].grad, rtol=0.1, atol=1e-2
    )


def test_another_tasks_v(cache, monkeypatch):
    """--embed other: the tasks are those of all other runs, each with the support images of some task of its block, of any mode."""
    words = ["--modes", "omniglot", "miniimagenet", "--synthetic", "--image-size", 8, "--queries", 2]
    words += ["--cache-dir", cache]
    test = mprotonet.episodes_of(get_args(mprotonet, *words, "--embed", "other"), "test")
    plain = mprotonet.episodes_of(get_args(mprotonet, *words), "test")
    assert (type(plain), type(test)) == (Episodes, mprotonet.BlindEpisodes)
    batch = test.tasks(3, 40)
    assert all(torch.equal(x, y) for x, y in zip(batch, plain.tasks(3, 40)))
    assert torch.equal(test.tasks(20, 2).other_x, batch.other_x[17:19]), "whatever is asked for beside it"
    block = {x.numpy().tobytes(): j for j, x in enumerate(plain.tasks(0, 512).support_x)}
    others = [block[x.numpy().tobytes()] for x in batch.other_x]
    assert sum(j == 3 + i for i, j in enumerate(others)) <= 1
    assert len(set(others)) > 30
    assert 8 < sum(j % 2 == (3 + i) % 2 for i, j in enumerate(others)) < 32, "of either mode"

    args, params = make_params(mprotonet, "kml", "--embed", "other")
    usual, _ = make_params(mprotonet, "kml")
    a, b, c = (make_task(seed=seed) for seed in (0, 1, 2))

    def blind(task, other):
        task = mprotonet.BlindTask(*task, other.support_x)
        return mprotonet.task_loss(params, task, args, evaluate=True)

    for one, two in zip(blind(a, a), mprotonet.task_loss(params, a, usual, evaluate=True)):
        assert torch.equal(one, two), "with its own support images it is the usual network"
    assert not torch.equal(blind(a, b)[1], blind(a, a)[1])
    seen, original = [], mprotonet.modulation
    monkeypatch.setattr(mprotonet, "modulation", lambda params, v: seen.append(v) or original(params, v))
    blind(a, b)
    blind(c, b)
    assert torch.equal(seen[0], seen[1]), "v says nothing of the task"


@pytest.mark.parametrize(
    "words",
    [
        *("--official", "--modulation none --official", "--embed query", "--embed other"),
        *("--generator full", "--repeat-tasks", "--no-norm-affine"),
    ],
)
def test_variants_of_protonet_run(words, tmp_path, cache, monkeypatch, capsys):
    """From start to end, and printed again; where predictions depend on the queries there is no inductive column."""
    repeated, original = [], Episodes.repeated
    monkeypatch.setattr(Episodes, "repeated", lambda self, *n: repeated.append(n) or original(self, *n))
    given = [*TINY, *words.split(), "--iterations", 2, "--val-every", 2, "--val-tasks", 4]
    given += ["--cache-dir", cache, "--out", tmp_path]
    call(mprotonet, monkeypatch, *given)
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    alone = "--official" not in words and "query" not in words
    assert (result["per_task_inductive"] is not None) == alone
    assert (result["accuracy_inductive"] is not None) == alone
    assert shown.count(" -\n") == (0 if alone else 3)
    assert repeated == ([(0, 2), (1, 2)] if "repeat" in words else [])
    call(mprotonet, monkeypatch, *given)
    assert capsys.readouterr().out.strip() == shown[shown.index("\n\n") :].strip()
