"""Tests: test_multishot."""

import argparse
import functools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import modgrad_multishot
from data import Task
from fewshot import published as fewshot_published
from fewshot import synthetic as fewshot_synthetic
from modgrad_multishot import Alphabets
from tests.helpers import HERE, ROOT, call, fails, get_args, here, real, relative_distance


def make_multishot(algorithm, *words, dtype=torch.float64):
    args = get_args(
        modgrad_multishot,
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
        "--steps",
        2,
        "--batch",
        5,
        "--test-steps",
        3,
        *words,
    )
    return args, {k: w.to(dtype).requires_grad_() for k, w in modgrad_multishot.init_params(args).items()}


def make_long_task(steps=2, tasks=None, seed=0):
    rng, lead = torch.Generator().manual_seed(seed), (tasks or 1,)
    batch = Task(
        torch.rand(*lead, steps, 5, 1, 16, 16, generator=rng).double(),
        torch.randint(3, (*lead, steps, 5), generator=rng),
        torch.rand(*lead, 6, 1, 16, 16, generator=rng).double(),
        torch.arange(3).repeat_interleave(2).expand(*lead, -1),
        torch.zeros(lead, dtype=torch.int64),
    )
    return batch if tasks else Task(*(x[0] for x in batch))


def multishot_words(cache, *words):
    return [
        "--synthetic",
        "--cache-dir",
        cache,
        "--image-size",
        16,
        "--steps",
        3,
        "--test-steps",
        4,
        "--batch",
        30,
        *words,
    ]


def test_alphabets(cache):
    args = get_args(modgrad_multishot, *multishot_words(cache, "--shots", 2, 9))
    test = Alphabets.of(args, "test")
    batch, (alphabets, held_out, rows, labels, u) = test.tasks(5, 4), test.indices(5, 4)
    assert [x.shape for x in batch] == [
        (4, 4, 30, 1, 16, 16),
        (4, 4, 30),
        (4, 100, 1, 16, 16),
        (4, 100),
        (4,),
    ]
    assert (batch.mode.tolist(), u.shape) == ([2, 0, 1, 2], (4, 100 + 120, 4))
    assert torch.equal(test.tasks(6, 1).support_x[0], batch.support_x[1]), (
        "a task does not depend on how many are asked for"
    )
    for i in range(4):
        starts = test.characters[alphabets[i]][:, 0]
        assert all(
            set(r // fewshot_synthetic.SYNTHETIC_IMAGES) <= set(starts // fewshot_synthetic.SYNTHETIC_IMAGES)
            for r in (held_out[i].reshape(-1), rows[i].reshape(-1))
        )
        assert len(set(held_out[i].reshape(-1))) == 100
        assert not set(held_out[i].reshape(-1)) & set(rows[i].reshape(-1)), "held out"
        classes = held_out[i][:, 0] // fewshot_synthetic.SYNTHETIC_IMAGES
        assert len(set(classes)) == 20
        assert (rows[i] // fewshot_synthetic.SYNTHETIC_IMAGES == classes[labels[i]]).all(), (
            "labels are those of the held-out drawings"
        )
        assert max(len(set(rows[i][labels[i] == n])) for n in range(20)) <= 9
    long = Alphabets.of(
        get_args(
            modgrad_multishot, *multishot_words(cache, "--shots", 2, 9, "--test-steps", 60, "--seed", 3)
        ),
        "test",
    )
    assert np.array_equal(long.indices(5, 4)[2][:, :4], rows), "fewer steps are a prefix"
    assert long.sha256(4) != test.sha256(4)
    shown = [
        len(set(x))
        for task, y in zip(long.indices(0, 30)[2], long.indices(0, 30)[3])
        for x in (task[y == n] for n in range(20))
    ]
    assert (min(shown), max(shown)) == (2, 9), "nearly all drawings are seen in 60 steps"
    equal = Alphabets.of(
        get_args(modgrad_multishot, *multishot_words(cache, "--shots", 4, 4, "--test-steps", 60)), "test"
    ).indices(0, 3)
    assert all(len(set(task[y == n])) == 4 for task, y in zip(equal[2], equal[3]) for n in range(20))
    one, two = (Alphabets.of(argparse.Namespace(**vars(args) | {"seed": seed}), "train") for seed in (0, 1))
    A = len(one.names)
    assert (A, len(Alphabets.of(args, "val").names), len(test.names)) == (17, 3, 3)
    assert all(sorted(one.alphabets(turn * A, A)) == list(range(A)) for turn in range(3)), "by turns"
    assert np.array_equal(one.alphabets(A - 3, 9), one.alphabets(0, 3 * A)[A - 3 : A + 6])
    assert not np.array_equal(one.alphabets(0, A), two.alphabets(0, A))
    assert not np.array_equal(one.alphabets(0, A), one.alphabets(A, A))
    used = [
        {
            name
            for _, name in zip(
                range(10**4), (row for x in Alphabets.of(args, split).characters for row in x[:, 0])
            )
        }
        for split in fewshot_published.SPLITS
    ]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2], (
        "no character in two splits"
    )


def test_alphabets_turn_move_and_scale_their_drawings(cache, monkeypatch):
    test = Alphabets.of(get_args(modgrad_multishot, *multishot_words(cache)), "test")
    _, held_out, rows, *_ = test.indices(0, 1)
    for u, change in (
        ((0, 0.5, 0.5, 0.5), lambda x: x),
        ((0.25, 0.5, 0.5, 0.5), lambda x: torch.rot90(x, 1, (-2, -1))),
        ((0.5, 0.5, 0.5, 0.5), lambda x: torch.rot90(x, 2, (-2, -1))),
    ):
        original = Alphabets.draw
        with monkeypatch.context() as patch:
            patch.setattr(
                Alphabets,
                "draw",
                lambda self, *x, u=u, original=original: (
                    *original(self, *x)[:3],
                    np.tile(u, (100 + 120, 1)),
                ),
            )
            task = test.tasks(0, 1)
        for found, of in (
            (task.query_x[0, :, 0], held_out[0].reshape(-1)),
            (task.support_x[0, :, :, 0], rows[0]),
        ):
            torch.testing.assert_close(found, change(test.images[of] / 255), atol=1e-4, rtol=0)
    with monkeypatch.context() as patch:  # moved by a fifth of 16 pixels to each side
        patch.setattr(
            Alphabets,
            "draw",
            lambda self, *x, original=original: (
                *original(self, *x)[:3],
                np.tile((0, 0.5, 1, 0.5), (100 + 120, 1)),
            ),
        )
        far = test.tasks(0, 1).query_x[0].sum((0, 1, 2))
    columns, plain = torch.arange(16.0), (test.images[held_out[0].reshape(-1)] / 255).sum((0, 1))
    assert math.isclose(
        abs((columns * far).sum() / far.sum() - (columns * plain).sum() / plain.sum()), 3.2, abs_tol=0.6
    )


def test_alphabets_bad_input(cache, capsys, tmp_path):
    for words, said in ((["--shots", 5, 40], "lower --shots"), (["--ways", 25], "lower --ways")):
        fails(
            capsys,
            lambda words=words: Alphabets.of(
                get_args(modgrad_multishot, *multishot_words(cache, *words)), "test"
            ),
            said,
        )
    for name in ("a", "b"):
        (tmp_path / "mine/train/A" / name).mkdir(parents=True)
        Image.linear_gradient("L").save(tmp_path / "mine/train/A" / name / "1.png")
    words = ["--modes", "mine", "--data-root", tmp_path, "--cache-dir", tmp_path / "cache", "--ways", 2]
    fails(
        capsys,
        lambda: Alphabets.of(get_args(modgrad_multishot, *words), "test"),
        "mine has 1 alphabets",
        "37 are needed",
    )
    for bad, said in (
        ("--adapt fc9", "no such layer; give all"),
        ("--algorithm reptile --adapt head", "leave --adapt out"),
        ("--adapt all", "name the layers"),
        ("--shots 3 2", "smaller one first"),
        ("--shots 0 2", "1 or more"),
        ("--steps 0", "--steps 0"),
        ("--test-tasks 1", "--test-tasks 1"),
        ("--outer rmsprop", "--outer"),
    ):
        fails(capsys, functools.partial(modgrad_multishot.get_args, bad.split()), said)


@real("omniglot")
def test_alphabets_of_real_omniglot():
    words = ["--data-root", ROOT, "--cache-dir", HERE / ".cache"]
    made = {
        split: Alphabets.of(get_args(modgrad_multishot, *words), split) for split in fewshot_published.SPLITS
    }
    assert {split: len(x.names) for split, x in made.items()} == {"train": 25, "val": 11, "test": 10}
    assert len({name for x in made.values() for name in x.names}) == 46
    rows = [{row for characters in x.characters for row in characters[:, 0]} for x in made.values()]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 1623 - 14 - 14 - 16 - 17, (
        "all but four small alphabets"
    )
    assert [name.rpartition("/")[2] for name in made["test"].names] == [
        "Tengwar",
        "Japanese_(hiragana)",
        "Alphabet_of_the_Magi",
        "Asomtavruli_(Georgian)",
        "Aurek-Besh",
        "Gujarati",
        "Old_Church_Slavonic_(Cyrillic)",
        "Tifinagh",
        "Syriac_(Serto)",
        "Malayalam",
    ]
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
        direction = {
            k: torch.randn(w.shape, generator=rng).double()
            for k, w in params.items()
            if (part == "generator") == k.startswith("generator.")
        }

        def loss(step, direction=direction):
            moved = {k: w.detach() + step * direction.get(k, 0) for k, w in params.items()}
            return np.mean(
                [
                    modgrad_multishot.task_loss(moved, Task(*(x[i] for x in batch)), args)[0].item()
                    for i in range(2)
                ]
            )

        found = sum((params[k].grad * d).sum().item() for k, d in direction.items())
        assert math.isclose(found, (loss(1e-8) - loss(-1e-8)) / 2e-8, rel_tol=1e-4, abs_tol=1e-8), part


def sgd_by_hand(params, task, alpha):
    """Where plain SGD on the task's batches ends, by torch.autograd alone -> parameters that are leaves."""
    theta = {k: w.detach().clone() for k, w in params.items()}
    for x, y in zip(task.support_x, task.support_y):
        theta = {k: w.detach().requires_grad_() for k, w in theta.items()}
        loss = F.cross_entropy(modgrad_multishot.run_blocks(theta, x, modgrad_multishot.Norm()), y)
        theta = {
            k: w - alpha * g
            for (k, w), g in zip(theta.items(), torch.autograd.grad(loss, list(theta.values())))
        }
    return {k: w.detach().requires_grad_() for k, w in theta.items()}


@pytest.mark.parametrize("vectorise", [False, True])
def test_the_fomaml_gradient_is_the_one_at_the_last_point(vectorise):
    args, params = make_multishot("fomaml", "--alpha", 0.3)
    batch, expected = make_long_task(tasks=2), dict.fromkeys(params, 0)
    for i in range(2):
        task = Task(*(x[i] for x in batch))
        theta = sgd_by_hand(params, task, 0.3)
        F.cross_entropy(
            modgrad_multishot.run_blocks(theta, task.query_x, modgrad_multishot.Norm()), task.query_y
        ).backward()
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
        torch.testing.assert_close(
            w.detach(), before[k] + 0.25 * (sum(end[k].detach() for end in ends) / 3 - before[k])
        )
    with torch.no_grad():
        found = [
            F.cross_entropy(modgrad_multishot.run_blocks(end, x, modgrad_multishot.Norm()), y)
            for end, x, y in zip(ends, batch.query_x, batch.query_y)
        ]
    torch.testing.assert_close(losses, torch.stack(found))  # what is logged is the loss, not the distance


def test_multishot_starts_at_one_as_maml_on_the_same_layers():
    x, y = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(20)
    steps = {}
    for name, words in (("maml", "--algorithm maml --adapt conv3 conv4"), ("one", "--start-at-one")):
        args = get_args(modgrad_multishot, "--device", "cpu", *words.split())
        params = modgrad_multishot.init_params(args)

        def loss(fast, params=params):
            return F.cross_entropy(
                modgrad_multishot.run_blocks(params | fast, x, modgrad_multishot.Norm()), y
            )

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
    assert not torch.allclose(
        found[0], modgrad_multishot.run_blocks(params, task.query_x, modgrad_multishot.Norm())
    )


@pytest.mark.parametrize("algorithm", modgrad_multishot.METHODS)
def test_what_a_multishot_test_measures(algorithm):
    """Losses before each step, accuracies after: the same as from tasks cut short; and inductive predictions stand alone."""
    args, params = make_multishot(algorithm)
    task, args.first_order = make_long_task(steps=6), False
    assert (
        modgrad_multishot.marks(6) == [1, 2, 5, 6]
        and modgrad_multishot.marks(2) == [1, 2]
        and modgrad_multishot.marks(100)[-2:] == [50, 100]
    )
    losses, after, inductive = modgrad_multishot.task_loss(params, task, args, evaluate=True)
    for i, k in enumerate((1, 2, 5, 6)):
        cut = task._replace(support_x=task.support_x[:k], support_y=task.support_y[:k])
        torch.testing.assert_close(after[i], modgrad_multishot.task_loss(params, cut, args)[1])
    last = task._replace(
        support_x=task.support_x[:5],
        support_y=task.support_y[:5],
        query_x=task.support_x[5],
        query_y=task.support_y[5],
    )
    torch.testing.assert_close(
        losses[5], F.cross_entropy(modgrad_multishot.task_loss(params, last, args)[1], task.support_y[5])
    )
    fewer = modgrad_multishot.task_loss(
        params, task._replace(query_x=task.query_x[:4], query_y=task.query_y[:4]), args, evaluate=True
    )
    torch.testing.assert_close(fewer[2], inductive[:4])
    assert not torch.allclose(fewer[1], after[:, :4])


def test_intervals_over_alphabets():
    x = np.array([1.0, 2, 3, 10, 20])
    found = modgrad_multishot.summary(x, np.array([0, 1, 0, 1, 1]))
    assert found == {
        "mean": round((2 + 32 / 3) / 2, 4),
        "ci95": round(12.706 * np.std([2, 32 / 3], ddof=1) / math.sqrt(2), 4),
    }
    assert modgrad_multishot.summary(np.stack([x, x + 1], 1), np.array([0, 1, 0, 1, 1]))["mean"] == [
        found["mean"],
        round(found["mean"] + 1, 4),
    ]


def test_a_multishot_run_from_start_to_end(tmp_path, cache, monkeypatch, capsys):
    words = multishot_words(
        cache,
        "--channels",
        2,
        "--context",
        4,
        "--meta-batch",
        2,
        "--iterations",
        4,
        "--test-tasks",
        6,
        "--val-tasks",
        3,
        "--val-every",
        2,
        "--log-every",
        2,
        "--batch",
        5,
    )
    found = {}
    for algorithm in modgrad_multishot.METHODS:
        call(modgrad_multishot, monkeypatch, *words, "--algorithm", algorithm, "--out", tmp_path / algorithm)
        result = found[algorithm] = json.loads((tmp_path / algorithm / "result.json").read_text())
        alphabets = np.array(result["per_task_alphabet"])
        assert result["accuracy"] == modgrad_multishot.summary(np.array(result["per_task"]), alphabets)
        loss = modgrad_multishot.summary(np.array(result["per_task_loss"]), alphabets)
        assert result["loss"] == pytest.approx(loss, abs=2e-4), "of rounded ones"
        assert math.isclose(result["loss"]["mean"], np.mean(result["curve"]["mean"]), abs_tol=2e-4)
        assert (len(result["curve"]["mean"]), result["after"]["steps"], result["after"]["mean"][-1]) == (
            4,
            [1, 2, 4],
            result["accuracy"]["mean"],
        )
        shown = capsys.readouterr().out
        assert "paper protocol {mean:.2f} +- {ci95:.2f}".format(**result["accuracy"]) in shown
        assert "SYNTHETIC" in shown and "Figure 5" not in shown
        log = [json.loads(line) for line in (tmp_path / algorithm / "log.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in log] == [2, 4] and all("validation" in line for line in log)
    assert len({x["tasks_sha256"] for x in found.values()}) == 1, "the same tasks for all"
    for algorithm in ("modgrad", "reptile"):  # Adam, and SGD
        for more in (["--iterations", 2], []):
            call(
                modgrad_multishot,
                monkeypatch,
                *words,
                "--algorithm",
                algorithm,
                "--out",
                tmp_path / "part" / algorithm,
                *more,
            )
        one, two = (
            torch.load(at / algorithm / "checkpoint.pt", weights_only=True)["params"]
            for at in (tmp_path, tmp_path / "part")
        )
        assert all(torch.equal(w, two[k]) for k, w in one.items())
        shutil.rmtree(tmp_path / "part")
    fails(
        capsys,
        functools.partial(call, modgrad_multishot, monkeypatch, *words, "--out", tmp_path / "maml"),
        "give another --out",
    )
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    made = done.stdout[done.stdout.index("### Multi-shot") :]
    assert made.startswith(
        "### Multi-shot, omniglot, 20-way, 1 to 15 shots\n\n**Synthetic images.** **5 images per step instead of 20.** **16 px instead of 28.**"
    )
    rows = {line.split(" | ")[0].strip("| "): line for line in made.splitlines() if line.startswith("| ")}
    assert "{mean:.2f} ± {ci95:.2f}".format(**found["reptile"]["accuracy"]) in rows["Reptile, `--steps 3`"]
    assert "LEAP" not in made and "85.1" not in made
    pair = [np.array(found[name]["per_task"]) for name in ("modgrad", "fomaml")]
    expected = modgrad_multishot.summary(pair[0] - pair[1], alphabets)
    assert (
        f"{expected['mean']:+.2f} ± {expected['ci95']:.2f}"
        in rows["ModGrad, `--context 4 --steps 3` - FOMAML, `--steps 3`"]
    )
    (figure,) = re.findall(r"\((modgrad-multishot[^)]*)\)", made)
    assert Image.open(tmp_path / "out" / figure).size[0] > 900
    (tmp_path / "trials").mkdir()
    (tmp_path / "reptile").rename(tmp_path / "trials" / "reptile")
    validation = json.loads((tmp_path / "trials" / "reptile" / "log.jsonl").read_text().splitlines()[-1])[
        "validation"
    ]["accuracy"]
    made = here("tools.tables", tmp_path, "--out", tmp_path / "out").stdout
    trial = made[
        made.index(
            "### Trials of step sizes on validation classes, multi-shot, omniglot, 20-way, 1 to 15 shots"
        ) :
    ].split("\n###")[0]
    assert "| Reptile, `--steps 3` | **0.1: {mean:.2f} ± {ci95:.2f}** |".format(**validation) in trial
    assert "**16 px instead of 28.**" in trial and "| Reptile" not in made.replace(trial, ""), (
        "trials are no results"
    )


def test_the_multishot_table_shows_the_papers_numbers(tmp_path, cache, monkeypatch):
    words = multishot_words(
        cache,
        "--channels",
        2,
        "--context",
        4,
        "--meta-batch",
        2,
        "--iterations",
        1,
        "--test-tasks",
        6,
        "--batch",
        5,
        "--test-steps",
        2,
    )
    for algorithm in ("modgrad", "fomaml"):
        call(modgrad_multishot, monkeypatch, *words, "--algorithm", algorithm, "--out", tmp_path / algorithm)
        result = json.loads((tmp_path / algorithm / "result.json").read_text())
        result["args"] |= {
            "test_steps": 100,
            "context": 300,
            "steps": modgrad_multishot.DEFAULTS[algorithm][0],
        }
        (tmp_path / algorithm / "result.json").write_text(json.dumps(result | {"synthetic": False}))
    made = here("tools.tables", tmp_path, "--out", tmp_path / "out").stdout
    assert "has 83.3 in the paper" in made
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")
        for line in made[made.index("### Multi-shot") :].splitlines()
        if line.startswith("| ")
    }
    assert (rows["ModGrad"][3], rows["FOMAML"][3]) == ("85.1", "-")
