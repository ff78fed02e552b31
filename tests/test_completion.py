"""Tests: test_completion."""

import argparse
import functools
import inspect
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import modgrad
import modgrad_completion
import modgrad_multishot
import modgrad_rl
from data import Task
from fewshot import synthetic as fewshot_synthetic
from modgrad_completion import Completions
from tests.helpers import call, fails, get_args, here, relative_distance
from tools import pictures


def make_completion(algorithm, *words, dtype=torch.float64):
    args = get_args(
        modgrad_completion,
        "--algorithm",
        algorithm,
        "--hidden",
        6,
        "--context",
        5,
        "--image-size",
        5,
        "--device",
        "cpu",
        *words,
    )
    return args, {k: w.to(dtype).requires_grad_() for k, w in modgrad_completion.init_params(args).items()}


def make_image_task(k=7, size=5, tasks=None, seed=0):
    rng, T = torch.Generator().manual_seed(seed), tasks or 1
    places = torch.cartesian_prod(*[torch.arange(size) / size] * 2).double()
    colours, seen = (
        torch.rand(T, size * size, 3, generator=rng).double(),
        torch.randperm(size * size, generator=rng)[:k],
    )
    batch = Task(
        places[seen].expand(T, -1, -1), colours[:, seen], places.expand(T, -1, -1), colours, torch.zeros(T)
    )
    return batch if tasks else Task(*(x[0] for x in batch))


def test_completions(cache):
    made = {}
    for order in ("random", "ordered"):
        words = ["--pixels", 9, "--order", order, "--image-size", 12, "--synthetic", "--cache-dir", cache]
        args = get_args(modgrad_completion, *words)
        made[order] = test = Completions.of(args, "test")
        batch = test.tasks(250, 12)  # across the border of two blocks
        assert [x.shape for x in batch[:4]] == [(12, 9, 2), (12, 9, 3), (12, 144, 2), (12, 144, 3)]
        at = (batch.support_x * 12).round().long()
        assert (batch.support_x >= 0).all() and (batch.support_x < 1).all()
        rows = at[..., 0] * 12 + at[..., 1]
        assert all(len(set(row.tolist())) == 9 for row in rows)
        for i in range(12):
            torch.testing.assert_close(batch.support_y[i], batch.query_y[i, rows[i]])
            assert (batch.query_y[i] * 255).round().byte().equal(test.images[test.order[250 + i]])
        assert torch.equal(test.tasks(255, 3).support_x, batch.support_x[5:8]), (
            "a task does not depend on how many are asked for"
        )
        if order == "ordered":
            assert all(row.tolist() == list(range(9)) for row in rows)
        else:
            assert len({tuple(row.tolist()) for row in rows}) == 12
        assert sorted(test.indices(0, len(test.images))[0]) == list(range(len(test.images))), (
            "each image once"
        )
        assert len(set(test.order[:20] // fewshot_synthetic.SYNTHETIC_IMAGES)) > 8, "of all classes"
        assert test.sha256(40) == Completions.of(
            get_args(modgrad_completion, *words, "--algorithm", "cnp", "--seed", 5), "test"
        ).sha256(40)
    assert made["random"].sha256(40) != made["ordered"].sha256(40)
    args = get_args(modgrad_completion, *words, "--order", "random")
    one, two = (Completions.of(argparse.Namespace(**vars(args) | {"seed": seed}), "train") for seed in (0, 1))
    assert not np.array_equal(one.indices(0, 50)[0], two.indices(0, 50)[0])
    drawn = one.indices(0, 20000)[0]
    assert 0 <= drawn.min() < 5 and len(one.images) - 5 <= drawn.max() < len(one.images)
    assert np.bincount(one.indices(0, 200)[1].reshape(-1), minlength=144).min() > 0, (
        "every pixel is context at times"
    )


def test_completions_bad_input(cache, capsys):
    words = ["--image-size", 4, "--synthetic", "--cache-dir", cache]
    fails(
        capsys,
        lambda: Completions.of(get_args(modgrad_completion, *words, "--pixels", 17), "test"),
        "has 16; give",
    )
    for split in ("test", "val"):
        fails(
            capsys,
            lambda split=split: Completions.of(
                get_args(modgrad_completion, *words, f"--{split}-tasks", 10**4), split
            ),
            f"--{split}-tasks",
            "at most",
        )
    assert (
        Completions.of(get_args(modgrad_completion, *words), "test").images.shape[0]
        == get_args(modgrad_completion, "--synthetic").test_tasks
    )
    for bad, said in (
        ("--adapt fc9", "no such layer; give all"),
        ("--algorithm cnp --adapt fc5", "leave --adapt out"),
        ("--algorithm cnp --steps 2", "no inner steps"),
        ("--steps 0", "--steps 0"),
        ("--algorithm lstm", "--algorithm"),
        ("--pixels 0", "--pixels 0"),
    ):
        fails(capsys, functools.partial(modgrad_completion.get_args, bad.split()), said)


def test_inner_steps_have_one_text():
    for name in ("maml_step", "modgrad_step", "cell", "modulation", "init_cell"):
        assert inspect.getsource(getattr(modgrad, name)) == inspect.getsource(
            getattr(modgrad_completion, name)
        )
        assert inspect.getsource(getattr(modgrad, name)) == inspect.getsource(
            getattr(modgrad_multishot, name)
        )
        assert inspect.getsource(getattr(modgrad, name)) == inspect.getsource(getattr(modgrad_rl, name))
    for name in ("Norm", "linear", "head_block", "group"):
        assert inspect.getsource(getattr(modgrad, name)) == inspect.getsource(
            getattr(modgrad_multishot, name)
        )


@pytest.mark.parametrize("algorithm", modgrad_completion.METHODS)
def test_meta_gradients_of_completion(algorithm):
    args, params = make_completion(algorithm, *["--steps", 2] * (algorithm in ("maml", "cavia")))
    batch, rng = make_image_task(tasks=2), torch.Generator().manual_seed(3)
    losses = modgrad_completion.run_tasks(params, batch, args, train=True)
    single = [modgrad_completion.task_loss(params, Task(*(x[i] for x in batch)), args)[0] for i in range(2)]
    torch.testing.assert_close(losses, torch.stack(single).detach())
    for part in modgrad_completion.PARTS:
        direction = {
            k: torch.randn(w.shape, generator=rng).double()
            for k, w in params.items()
            if (k in modgrad_completion.group(params, "base") and part == "base") or k.startswith(f"{part}.")
        }
        assert bool(direction) == (
            part == "base"
            or ((part == "encoder") == (algorithm == "cnp") and algorithm in ("cnp", "modgrad"))
        )

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
    one, two = (
        modgrad_completion.task_loss(p, make_image_task(), a)[1] for a, p in ((ours, cells), (args, params))
    )
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
    for name, words in (
        ("maml", "--algorithm maml --adapt fc5 --steps 1"),
        ("one", "--start-at-one"),
        ("zero", ""),
    ):
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
    torch.testing.assert_close(
        modgrad_completion.task_loss(params, other, args)[1],
        modgrad_completion.task_loss(params, task, args)[1],
    )
    fewer = task._replace(support_x=task.support_x[1:], support_y=task.support_y[1:])
    assert not torch.allclose(
        modgrad_completion.task_loss(params, fewer, args)[1],
        modgrad_completion.task_loss(params, task, args)[1],
    )


def test_all_pixels_and_many_steps_reproduce_an_image(cache):
    words = ["--image-size", 6, "--pixels", 36, "--synthetic", "--cache-dir", cache, "--hidden", 64]
    args = get_args(
        modgrad_completion, "--algorithm", "maml", "--steps", 1200, "--first-order", "--alpha", 1, *words
    )
    task = Task(*(x[0] for x in Completions.of(args, "test").tasks(0, 1)))
    params = modgrad_completion.init_params(args)
    with torch.no_grad():
        loss, colours = modgrad_completion.task_loss(params, task, args)
    assert loss < 0.1 * task.query_y.var(0, correction=0).mean(), "a tenth of what the mean colour leaves"
    torch.testing.assert_close(loss, (colours - task.query_y).square().mean())


def test_a_completion_run_from_start_to_end(tmp_path, cache, monkeypatch, capsys):
    words = [
        "--synthetic",
        "--image-size",
        8,
        "--hidden",
        8,
        "--context",
        6,
        "--meta-batch",
        3,
        "--iterations",
        6,
        "--test-tasks",
        8,
        "--val-tasks",
        5,
        "--val-every",
        2,
        "--log-every",
        2,
        "--cache-dir",
        cache,
    ]
    runs = []
    for algorithm in modgrad_completion.METHODS:
        call(modgrad_completion, monkeypatch, *words, "--algorithm", algorithm, "--out", tmp_path / algorithm)
        runs.append(tmp_path / algorithm)
        result = json.loads((runs[-1] / "result.json").read_text())
        assert result["error"] == modgrad_completion.summary(np.array(result["per_task"]))
        shown = capsys.readouterr().out
        assert f"{result['error']['mean']:.4f} +- {result['error']['ci95']:.4f}" in shown
        assert "SYNTHETIC" in shown and "Table 3" not in shown
    assert len({json.loads((run / "result.json").read_text())["tasks_sha256"] for run in runs}) == 1, (
        "the same images for all"
    )
    call(modgrad_completion, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 3)
    call(modgrad_completion, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"]
        for name in ("modgrad", "part")
    )
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    call(pictures, monkeypatch, "completion", tmp_path / "faces.png", *runs, "--cache-dir", cache)
    image = Image.open(tmp_path / "faces.png")
    assert image.size == (6 * 100, 8 * 100 + 46)
    for bad, said in ((tmp_path / "none", "has no checkpoint"), (tmp_path, "has no checkpoint")):
        fails(
            capsys,
            functools.partial(call, pictures, monkeypatch, "completion", tmp_path / "x.png", bad),
            said,
        )
    assert not (tmp_path / "x.png").exists()
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("### Image completion") :]
    assert table.startswith(
        "### Image completion, celeba\n\n**Synthetic images.** **8 px instead of 32.** **6 iterations of 3 images instead of"
    )
    score = json.loads((tmp_path / "cnp" / "result.json").read_text())["error"]
    assert f"| {score['mean']:.4f} ± {score['ci95']:.4f} |" in next(
        line for line in table.splitlines() if line.startswith("| CNP")
    )
    pair = [
        np.array(json.loads((tmp_path / name / "result.json").read_text())["per_task"])
        for name in ("modgrad", "cnp")
    ]
    assert f"| {(pair[0] - pair[1]).mean():+.4f} ±" in next(
        line for line in table.splitlines() if re.match(r"\| ModGrad, `[^`]*` - CNP", line)
    )
