"""Tests: test_modgrad."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import modgrad
from data import Episodes, Task
from tests.helpers import TINY, call, drawn_alike, fails, get_args, here, make_task, relative_distance
from tools import inspect_gradients


def make_modgrad(algorithm, *words, dtype=torch.float64):
    args = get_args(
        modgrad,
        "--algorithm",
        algorithm,
        "--channels",
        4,
        "--ways",
        3,
        "--image-size",
        16,
        "--device",
        "cpu",
        "--context",
        6,
        *words,
    )
    return args, {k: w.to(dtype).requires_grad_() for k, w in modgrad.init_params(args).items()}


def test_modgrad_parameter_counts():
    """FACTS 5, the paper's shapes; and those of the deep networks, known from their papers' implementations."""
    count = lambda parts: sum(w.numel() for w in parts.values())
    params = modgrad.init_params(get_args(modgrad))
    assert count(modgrad.group(params, "base")) == 121093
    assert count(modgrad.group(params, "generator")) == 1056926
    assert {k.rsplit(".", 3)[0] for k in modgrad.group(params, "generator")} == {"conv3", "conv4"}
    for backbone, size, without_head in (("resnet34", 64, 21284672), ("wrn28-10", 32, 36472784)):
        args = get_args(
            modgrad,
            "--backbone",
            backbone,
            "--image-size",
            size,
            "--algorithm",
            "maml",
            "--adapt",
            "last two",
        )
        params = modgrad.init_params(args)
        assert sum(w.numel() for k, w in params.items() if not k.startswith("head")) == without_head
        assert (
            args.adapt
            == {
                "resnet34": ["stage4.block3.conv1", "stage4.block3.conv2"],
                "wrn28-10": ["stage3.block4.conv1", "stage3.block4.conv2"],
            }[backbone]
        )
        with torch.no_grad():
            assert modgrad.run_blocks(params, torch.rand(2, 3, size, size), modgrad.Norm(), args).shape == (
                2,
                5,
            )


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
    gamma, _ = bias.chunk(2)  # the context starts at 0
    assert 0.09 < gamma.abs().max() <= 0.1
    x, norm = torch.randn(2, 64, 8, 8), modgrad.Norm()
    film = {"conv3.film": torch.cat([torch.full((64,), 0.5), torch.full((64,), -0.25)])}
    plain = {k: w for k, w in params.items() if k.startswith(("conv3", "norm3"))}
    normalised = norm(plain, "norm3", modgrad.conv(plain, "conv3", x))
    wanted = F.relu(F.max_pool2d(0.5 * normalised - 0.25, 2))
    torch.testing.assert_close(modgrad.conv4_block(plain | film, "conv3", x, modgrad.Norm()), wanted)


def test_start_at_one_starts_as_maml_on_the_same_layers(capsys):
    """The first inner step is MAML's to 5 %; without the flag it is next to nothing, as in the released code."""
    words = ["--image-size", 28, "--shots", 5, "--steps", 1, "--alpha", 0.1, "--device", "cpu"]
    task = make_task(ways=5, shots=5, size=28, dtype=torch.float32)
    steps = {}
    for name, more in (
        ("maml", ["--algorithm", "maml", "--adapt", "conv3", "conv4"]),
        ("one", ["--start-at-one"]),
        ("zero", []),
    ):
        args = get_args(modgrad, *words, *more)
        params = modgrad.init_params(args)
        fast = {k: params[k] for k in modgrad.adapted_keys(args, params)}

        def loss(fast, params=params, args=args):
            logits = modgrad.run_blocks(params | fast, task.support_x, modgrad.Norm(), args)
            return F.cross_entropy(logits, task.support_y)

        after = modgrad.STEPS[args.algorithm](params, fast, loss, args, lambda gradient: gradient)
        steps[name] = {
            k: (after[k] - fast[k]).detach() for k in fast if "weight" in k
        }  # a bias learns nothing before BatchNorm
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
        torch.testing.assert_close(M["conv3.bias"], bias)  # ReLU is for the outer product
        below.append(((bias < 0).any() and (expected == 0).any()).item())
    assert any(below), "or this would not tell"


def test_the_baselines_are_maml_where_they_should_be():
    """M = 1 is MAML on the same layers; so are Meta-SGD with equal rates, on all, and T-Net with identity transforms."""
    task = make_task()
    for steps in (1, 2):
        words = ["--steps", steps, "--alpha", 0.1]
        args, params = make_modgrad("maml", *words, "--adapt", "conv3", "conv4")
        ours, cells = make_modgrad("modgrad", *words)
        for k, w in cells.items():
            if k.startswith("generator."):
                w.data.fill_(1.0 if k.endswith("2.bias") else 0.0)
        expected, found = (
            modgrad.task_loss(p, task, a, evaluate=True) for a, p in ((args, params), (ours, cells))
        )
        for one, two in zip(expected, found):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
        args, params = make_modgrad("maml", *words)
        expected = modgrad.task_loss(params, task, args)
        for baseline in ("metasgd", "tnet"):
            args, params = make_modgrad(baseline, *words)
            torch.testing.assert_close(
                modgrad.task_loss(params, task, args), expected, rtol=1e-6, atol=1e-8
            )  # rates are float32


def test_context_is_the_gradient_of_the_loss_after_a_trial_step(monkeypatch):
    """Eq. 9, against central differences in float64."""
    args, params = make_modgrad("modgrad")
    task, seen, original = make_task(), [], modgrad.modulation
    monkeypatch.setattr(
        modgrad, "modulation", lambda params, v, like: seen.append(v) or original(params, v, like)
    )
    modgrad.task_loss(params, task, args)
    v = seen[-1].detach()  # the context of the step that is taken
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
def test_meta_gradients_of_modgrad_and_its_baselines(algorithm, vectorise):
    args, params = make_modgrad(algorithm, "--steps", 2, "--alpha", 0.1)
    batch, rng = make_task(seed=3, tasks=2), torch.Generator().manual_seed(3)
    modgrad.run_tasks(params, batch, args, vectorise)
    for part in ("base", "generator"):
        direction = {
            k: torch.randn(w.shape, generator=rng).double()
            for k, w in params.items()
            if k.startswith("generator.") == (part == "generator")
        }
        if not direction:
            continue

        def loss(step, direction=direction):
            moved = {k: w.detach() + step * direction.get(k, 0) for k, w in params.items()}
            return np.mean(
                [modgrad.task_loss(moved, Task(*(x[i] for x in batch)), args)[0].item() for i in range(2)]
            )

        expected = (loss(1e-7) - loss(-1e-7)) / 2e-7
        found = sum(
            (params[k].grad * d).sum().item() for k, d in direction.items() if params[k].grad is not None
        )
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-7), part


def test_only_what_is_named_moves(monkeypatch):
    task, seen, original = make_task(), [], modgrad.run_blocks
    monkeypatch.setattr(
        modgrad, "run_blocks", lambda params, *rest: seen.append(params) or original(params, *rest)
    )
    for words, moves in (
        (["modgrad"], {"conv3", "conv4"}),
        (["modgrad", "--adapt", "conv2", "head"], {"conv2", "head"}),
        (["maml", "--adapt", "head"], {"head"}),
        (["cavia"], set()),
        (["maml"], {f"{x}{l}" for x in ("conv", "norm") for l in (1, 2, 3, 4)} | {"head"}),
    ):
        args, params = make_modgrad(*words)
        modgrad.task_loss(params, task, args)
        moved = {k for k in modgrad.group(params, "base") if not torch.equal(seen[-1][k], params[k])}
        assert moved <= {
            f"{layer}.{part}" for layer in moves for part in ("weight", "bias", "scale", "shift")
        }
        assert {k.split(".")[0] for k in moved} == moves
        assert all(torch.equal(seen[-1][k], w) for k, w in params.items() if k.startswith("generator."))


@pytest.mark.parametrize("algorithm", modgrad.METHODS)
def test_noise_of_level_zero_changes_nothing_and_other_noise_does(algorithm):
    args, params = make_modgrad(algorithm)
    task = make_task()
    like = (
        {"context": torch.zeros(6).double()}
        if algorithm == "cavia"
        else {k: params[k] for k in modgrad.adapted_keys(args, params)}
    )
    none = modgrad.task_loss(params, task, args)[1]
    assert torch.equal(
        none,
        modgrad.task_loss(params, task, args, noise={k: torch.zeros_like(w) for k, w in like.items()})[1],
    )
    assert not torch.allclose(
        none, modgrad.task_loss(params, task, args, noise={k: torch.ones_like(w) for k, w in like.items()})[1]
    )


@pytest.mark.parametrize("algorithm", modgrad.METHODS)
def test_modgrad_inductive_predictions_do_not_know_the_other_queries(algorithm):
    args, params = make_modgrad(algorithm)
    task, keep = make_task(), torch.tensor([0, 4])
    _, paper, inductive = modgrad.task_loss(params, task, args, evaluate=True)
    _, p, i = modgrad.task_loss(
        params, task._replace(query_x=task.query_x[keep], query_y=task.query_y[keep]), args, evaluate=True
    )
    torch.testing.assert_close(i, inductive[keep], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(p, paper[keep], rtol=1e-3)


@pytest.mark.parametrize("algorithm", ["modgrad", "cavia"])
def test_a_modgrad_run_from_start_to_end_and_its_continuation(
    algorithm, tmp_path, cache, monkeypatch, capsys
):
    words = [
        *TINY,
        "--image-size",
        16,
        "--algorithm",
        algorithm,
        "--context",
        5,
        "--cache-dir",
        cache,
        "--modes",
        "miniimagenet",
    ]
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "whole")
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["method"] == modgrad.METHODS[algorithm]
    assert result["parameters"]["generator"] > 0
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 3)
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"]
        for name in ("whole", "part")
    )
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    for bad, said in (
        ("--val-every 75", "a multiple"),
        ("--log-every 0", "--log-every 0"),
        ("--adapt conv9", "no such layer; give all"),
        ("--adapt all", "have no cells"),
        ("--image-size 8", "--image-size 8"),
    ):
        fails(capsys, functools.partial(modgrad.get_args, bad.split()), said)
    fails(
        capsys, lambda: modgrad.get_args(["--algorithm", "cavia", "--backbone", "resnet34"]), "choose conv4"
    )


def test_parameters_best_on_validation_stand_beside_the_last(tmp_path, cache, monkeypatch, capsys):
    words = [
        *TINY,
        "--image-size",
        16,
        "--algorithm",
        "maml",
        "--cache-dir",
        cache,
        "--iterations",
        12,
        "--val-tasks",
        10,
        "--test-tasks",
        20,
        "--lr",
        0.05,
        "--out",
        tmp_path / "run",
    ]
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
    assert modgrad.evaluate(params, Episodes.of(args, "test"), 20, args).tolist() == [
        best["per_task"],
        best["per_task_inductive"],
    ]
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
    one, two = modgrad.augment(batch, 7, args), modgrad.augment(batch, 7, args)
    assert torch.equal(one.support_x, two.support_x), (
        "a function of seed and number: a run continued is the same run"
    )
    assert not torch.equal(one.support_x, modgrad.augment(batch, 8, args).support_x)
    assert not torch.equal(
        one.support_x, modgrad.augment(batch, 7, get_args(modgrad, "--augment", "--seed", 1)).support_x
    )
    x = one.support_x.flatten(0, 1)
    assert x.min() >= 0 and x.max() <= 1
    slope = (x[..., 2:-2, 3:-2] - x[..., 2:-2, 2:-3]).flatten(1)
    rising = (slope > 0).all(1)
    assert (rising | (slope < 0).all(1)).all() and 0 < rising.sum() < len(x), (
        "mirrored or not, a ramp stays a ramp"
    )
    steep = slope.abs().mean(1) / (0.2 / 31)
    assert (
        steep.min() > 0.6 * 0.6 * 0.6 * 0.99 and steep.max() < 1.4 * 1.4 * 1.01
    )  # crop, contrast, brightness
    y, x = torch.meshgrid(torch.linspace(0.4, 0.6, 32), torch.linspace(0.4, 0.6, 32), indexing="ij")
    colours = torch.stack([y, x, 0.5 * torch.ones_like(x)]).expand(
        1, 40, 3, 32, 32
    )  # red falls, green goes right
    made = modgrad.augment(Task(colours, None, colours[:, :1], None, None), 3, args).support_x[0][
        ..., 4:-4, 4:-4
    ]
    red, green, blue = made.unbind(1)
    own = red - blue, green - blue  # what the mean of a pixel's colours does not move
    down = [(c[:, 1:] - c[:, :-1]).mean((1, 2)) for c in own]
    right = [(c[:, :, 1:] - c[:, :, :-1]).mean((1, 2)) for c in own]
    assert (down[0] > 0).all() and down[1].abs().max() < 1e-5, "never upside down"
    assert right[0].abs().max() < 1e-5 and 0 < (right[1] > 0).sum() < 40
    torch.testing.assert_close(down[0], right[1].abs(), rtol=1e-3, atol=1e-5)  # the same crop both ways
    heights, sides = own[0].mean((1, 2)), own[1].mean((1, 2))
    assert heights.std() > 0.005 and sides.std() > 0.005 and abs(np.corrcoef(heights, sides)[0, 1]) < 0.6, (
        "places of the crop, each way"
    )
    bright, slope = made.mean((1, 2, 3)), down[0] / (0.2 / 31)
    assert (slope / bright).std() > 0.1 * (slope / bright).mean(), (
        "contrast and saturation, not brightness alone"
    )
    grey = modgrad.augment(
        Task(torch.full((1, 9, 3, 8, 8), 0.5), None, torch.full((1, 1, 3, 8, 8), 0.5), None, None), 0, args
    ).support_x[0]
    assert (grey - grey[:, :1, :1, :1]).abs().max() < 1e-5, "no edges, no colour appear"
    assert 0.29 < grey.min() < 0.45, "darker"
    assert 0.55 < grey.max() < 0.71, "brighter"
    words = [
        *TINY,
        "--image-size",
        16,
        "--algorithm",
        "maml",
        "--steps",
        1,
        "--augment",
        "--cache-dir",
        cache,
    ]
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "whole")
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 3)
    call(modgrad, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"]
        for name in ("whole", "part")
    )
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
    steps, of_maml = (
        inspect_gradients.first_steps(p, a, Some(), 3) for a, p in ((args, params), (plain, same))
    )
    assert args.algorithm in modgrad.STEPS and modgrad.STEPS["modgrad"] is modgrad.modgrad_step
    found = inspect_gradients.spectrum(steps)
    assert set(found) == {"conv3.weight", "conv4.weight"}
    for k, x in found.items():
        np.testing.assert_allclose(x["raw"], x["modulated"], rtol=1e-9)
        values = [
            np.linalg.svd(gradient[k].detach().numpy().reshape(4, 36), compute_uv=False)
            for gradient, _ in steps
        ]
        np.testing.assert_allclose(x["raw"], np.mean([v / v[0] for v in values], 0), rtol=1e-9)
        ranks = [
            1 + next(i for i in range(4) if (v[: i + 1] ** 2).sum() >= 0.9 * (v**2).sum()) for v in values
        ]
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
    small, large = (
        torch.cat(
            [w.flatten() for w in inspect_gradients.draw_noise({"w": torch.zeros(10**5)}, sigma, 3).values()]
        )
        for sigma in (0.1, 0.2)
    )
    torch.testing.assert_close(large, 2 * small)  # levels differ in size alone
    assert math.isclose(small.std(), 0.1, rel_tol=0.02), "SIGMA is a standard deviation"
    assert not torch.equal(small, inspect_gradients.draw_noise({"w": torch.zeros(10**5)}, 0.1, 4)["w"]), (
        "each task has its own"
    )


def test_inspect_gradients_from_end_to_end(tmp_path, cache, monkeypatch, capsys):
    for name, words in (("modgrad", []), ("maml", ["--steps", 2]), ("cavia", [])):
        call(
            modgrad,
            monkeypatch,
            *TINY,
            "--channels",
            8,
            "--image-size",
            16,
            "--test-tasks",
            10,
            "--algorithm",
            name,
            "--context",
            5,
            *words,
            "--cache-dir",
            cache,
            "--out",
            tmp_path / name,
        )
    call(
        modgrad,
        monkeypatch,
        *TINY,
        "--image-size",
        16,
        "--test-tasks",
        2,
        "--shots",
        2,
        "--cache-dir",
        cache,
        "--out",
        tmp_path / "other",
    )
    runs = [str(tmp_path / name) for name in ("modgrad", "maml", "cavia")]
    words = [
        "--gradient-noise",
        "0.5",
        "50",
        "--tasks",
        "10",
        "--step-tasks",
        "2",
        "--cache-dir",
        cache,
        "--out",
        str(tmp_path / "out"),
    ]
    done = here("tools.inspect_gradients", *runs, *words, "--spectrum")
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    found = json.loads((tmp_path / "out" / "gradients.json").read_text())["found"]
    assert [row["run"] for row in found] == ["ModGrad", "MAML", "MAML, step scaled", "CAVIA"]
    for name, row in zip(("modgrad", "maml", None, "cavia"), found):
        assert list(row["noise"]) == ["0.0", "0.5", "50.0"]
        assert row["noise"]["0.0"]["change"]["overall"] == {"mean": 0, "ci95": 0}
        if name:  # without noise: what modgrad.py itself has found
            result = json.loads((tmp_path / name / "result.json").read_text())
            assert row["noise"]["0.0"]["per_task"] == result["per_task"]
            assert row["tasks_sha256"] == result["tasks_sha256"]
        score, change = row["noise"]["50.0"]["accuracy"]["overall"], row["noise"]["50.0"]["change"]["overall"]
        assert (
            f"| {score['mean']:.2f} ± {score['ci95']:.2f} | {change['mean']:+.2f} ± {change['ci95']:.2f} |"
            in done.stdout
        )
    assert any(row["noise"]["50.0"]["per_task"] != row["noise"]["0.0"]["per_task"] for row in found)
    ours, maml, scaled, cavia = found
    assert math.isclose(
        scaled["alpha"] / maml["alpha"], ours["step_length"] / maml["step_length"], rel_tol=1e-9
    )
    assert (cavia["adapted"], "spectrum" in cavia) == (5, False)
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {
        "gradient-noise.png",
        "gradient-spectrum.png",
    }
    for bad, said in (
        ([runs[0]], "nothing to do"),
        ([tmp_path / "none", "--spectrum"], "there is no"),
        ([*runs, tmp_path / "other", "--spectrum"], "the runs differ"),
        ([runs[0], "--gradient-noise", "-1"], "0 or more"),
        ([runs[0], "--gradient-noise", "0"], "above it"),
        ([runs[0], "--spectrum", "--step-tasks", "1"], "--step-tasks"),
    ):
        fails(capsys, functools.partial(call, inspect_gradients, monkeypatch, *bad), said)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("clip", [20, 1e-3])
@pytest.mark.parametrize("algorithm", ["maml", "modgrad"])
def test_inner_steps_of_modgrad_by_hand(algorithm, clip, first_order):
    """--first-order and --inner-clip: task_loss written again with torch.autograd.grad; its value and its gradients."""
    words = ["--steps", 2, "--alpha", 0.1, "--inner-clip", clip, *["--first-order"] * first_order]
    args, params = make_modgrad(algorithm, *words)
    task, graph = make_task(), {"create_graph": not first_order}
    x, query = modgrad.normalise(task.support_x), modgrad.normalise(task.query_x)

    def loss_of(theta, x, y):
        return F.cross_entropy(modgrad.run_blocks(params | theta, x, modgrad.Norm(), args), y)

    theta = {k: params[k] for k in modgrad.adapted_keys(args, params)}
    for _ in range(2):
        grads = torch.autograd.grad(loss_of(theta, x, task.support_y), list(theta.values()), **graph)
        g = {k: each.clamp(-clip, clip) for k, each in zip(theta, grads)}
        M = dict.fromkeys(theta, 1.0)
        if algorithm == "modgrad":
            v = torch.zeros(6, dtype=torch.float64, requires_grad=True)
            M = modgrad.modulation(params, v, theta)
            trial = {k: theta[k] - 0.1 * M[k] * g[k] for k in theta}
            (v,) = torch.autograd.grad(-loss_of(trial, x, task.support_y), v, **graph)
            M = modgrad.modulation(params, v, theta)
        theta = {k: theta[k] - 0.1 * M[k] * g[k] for k in theta}
    wanted = loss_of(theta, query, task.query_y)
    loss, _ = modgrad.task_loss(params, task, args)
    torch.testing.assert_close(loss, wanted)
    for one, two in zip(*(torch.autograd.grad(x, list(params.values())) for x in (loss, wanted))):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("algorithm", ["metasgd", "tnet"])
def test_the_other_baselines_of_modgrad_run(algorithm, tmp_path, cache, monkeypatch):
    words = [*TINY, "--image-size", 16, "--algorithm", algorithm, "--iterations", 2]
    call(modgrad, monkeypatch, *words, "--cache-dir", cache, "--out", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == modgrad.METHODS[algorithm]
    assert result["parameters"]["generator"] > 0
