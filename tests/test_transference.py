"""Tests: test_transference."""

import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import kml
import mprotonet
import transference
from data import Task, flags_of_run, read_tensors
from tests.helpers import RESULTS, TINY, call, episodes, fails, get_args, here, make_params, make_task
from tools import tables


def make_state(modulation="kml", dtype=torch.float64):
    args, params = make_params(mprotonet, modulation, "--device", "cpu", dtype=dtype)
    params = {k: w.detach() for k, w in params.items()}
    return transference.State("MProtoNet+KML", 5, 10, args, params, Path("run"))


def test_transference_of_no_step_is_one_and_leaves_the_parameters_alone():
    state = make_state()
    before = {k: w.clone() for k, w in state.params.items()}
    ratios, gains = transference.measure(state, make_task(tasks=3), make_task(seed=1, tasks=2), 0.0, "all")
    assert ratios.shape == gains.shape == (3, 2)
    assert np.allclose(ratios, 1, rtol=1e-12, atol=0)  # rounding differs with the number of threads
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
        params = {
            k: w.clone().requires_grad_(update == "all" or not k.startswith(("encoder", "generator")))
            for k, w in state.params.items()
        }
        mprotonet.task_loss(params, source, state.options)[0].backward()
        stepped = {k: w.detach() - 1e-3 * (w.grad if w.grad is not None else 0) for k, w in params.items()}
        for j, target in enumerate(transference.single(targets)):
            (before, old, *_), (after, new, *_) = (
                mprotonet.task_loss(p, target, state.options) for p in (state.params, stepped)
            )
            assert math.isclose(ratios[i, j], after / before, rel_tol=1e-9)
            change = 100 * (
                (new.argmax(1) == target.query_y).double().mean()
                - (old.argmax(1) == target.query_y).double().mean()
            )
            assert math.isclose(gains[i, j], change, abs_tol=1e-9)


def test_self_transference_and_the_step_that_is_chosen():
    state, batch = make_state(), make_task(tasks=4)
    small = transference.self_transference(state, batch, [1e-6], "all")
    assert (small < 1).all(), "a small step lowers the loss it is made for"
    alpha = transference.choose_alpha(state, batch, "all", 0.95)
    assert math.isclose(
        np.median(transference.self_transference(state, batch, [alpha], "all")), 0.95, abs_tol=0.01
    )
    smaller = transference.self_transference(
        state, batch, [alpha / 2 ** (k / 8) for k in range(1, 60)], "all"
    )
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
            assert math.isclose(
                cosines[i, j],
                sum((one[k] * two[k]).sum().item() for k in one) / math.prod(norms),
                rel_tol=1e-9,
            )
    batch = Task(*(torch.cat([x[:1], y[:1]]) for x, y in zip(sources, sources)))
    torch.testing.assert_close(
        torch.tensor(own[:1]), torch.tensor(transference.self_transference(state, batch, [1e-2], "all")[0])
    )
    tiny, _ = transference.measure(state, sources, targets, 1e-7, "all")
    assert ((tiny < 1) == (cosines > 0)).all(), "what LR < 1 comes down to"


def test_a_source_task_without_loss_has_no_direction():
    state, targets = make_state(), make_task(seed=1, tasks=2)
    state.options.distance_scale = 1e9  # each query image is its own prototype, and its loss is 0
    sources = make_task(shots=1, queries=1, tasks=2)
    sources = sources._replace(query_x=sources.support_x, query_y=sources.support_y)
    cosines, own, _ = transference.what_steps_are(state, sources, targets, 1e-9, "all")
    assert (cosines == 0).all()
    assert np.isnan(own).all()


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
    gains = -20 * (ratios - 1)  # a slope of -20 points: neutral is |LR - 1| < 0.0025
    band, slope = transference.neutral_band(ratios, gains)
    assert math.isclose(slope, -20)
    assert math.isclose(band, 0.0025)
    assert transference.shares(ratios, band).tolist() == [[50, 25], [25, 25], [25, 50]]
    assert transference.neutral_band(ratios, np.zeros_like(ratios))[0] == math.inf
    assert transference.neutral_band(ratios, gains + np.array([[5, -5]]))[1] == slope, (
        "each target about its own mean"
    )


def test_intervals_of_transfer():
    """Resampling sources and targets: as wide as the spread of repeated experiments; no shares where the slope is uncertain."""

    def experiment(seed, J=30):
        rng = np.random.default_rng(seed)
        ratios = (
            1 + rng.normal(0, 0.004, (1, J)) + rng.normal(0, 0.01, (40, J))
        )  # targets differ, pairs differ
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
    assert (
        transference.compare(rows[0], (*rows[1][:2], rows[1][2] | {"positive": None}), draws=10)["positive"]
        is None
    )


def test_transference_from_end_to_end(tmp_path, cache, monkeypatch, capsys):
    call(
        mprotonet,
        monkeypatch,
        *TINY,
        "--modes",
        "miniimagenet",
        "fc100",
        "--keep-every",
        3,
        "--cache-dir",
        cache,
        "--out",
        tmp_path / "run",
    )
    call(kml, monkeypatch, *TINY, "--cache-dir", cache, "--out", tmp_path / "kml")
    words = ["--source-tasks", 4, "--target-tasks", 3, "--cache-dir", cache, "--alpha", 1e-3]
    done = here(
        "transference.py",
        "--checkpoint",
        tmp_path / "run",
        *words,
        "--sweep",
        "--matrix",
        "--along",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    found = json.loads((tmp_path / "out" / "transference.json").read_text())
    assert [row["moment"] for row in found["found"]] == ["half", "final"]
    row = found["found"][0]
    assert np.array(row["LR"]).shape == (4, 3)
    assert f"| {row['state']} | 0.001 | {transference.cell(row['all']['positive'])} |" in done.stdout
    assert (
        f"| {transference.cell(row['all']['below_one'])} | {transference.cell(row['all']['mean'], 4)} |"
        in done.stdout
    )
    others = transference.other_tables(found["found"], 4)
    assert len(others) == 4 and all(table in done.stdout for table in others), (
        "the file holds what is printed: what the steps are, sweep, two matrices"
    )
    assert set(row["matrix"]["cells"]) == set(row["matrix"]["cells"]["fc100"]) == {"miniimagenet", "fc100"}
    assert [x["iteration"] for x in found["along"]["MProtoNet+KML"]] == [3, 6]
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        f"transference-{x}.png" for x in ("histogram", "tasks", "training")
    }
    made = here("tools.tables", tmp_path / "out", "--out", tmp_path / "tables").stdout
    assert f"### {found['about']}, half and final\n" in made and "SYNTHETIC" in found["about"]
    assert all(table in made for table in others) and transference.shares_row(row) in made
    assert "](transference-histogram.png)" in made
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "transference.json").write_text("{}")
    fails(
        capsys,
        functools.partial(call, tables, monkeypatch, tmp_path / "bad"),
        "is not a whole file of transference.py",
    )
    done = here("transference.py", "--checkpoint", tmp_path / "run", "--export", tmp_path / "half")
    files = sorted((tmp_path / "half").iterdir())
    assert len(files) == 2
    done = here("transference.py", "--checkpoint", *files, *words, "--along", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "transference.json").read_text())
    assert [r["state"] for r in again["found"]] == [r["state"] for r in found["found"]]
    assert np.shape(again["found"][0]["LR"]) == (4, 3)
    one, two = (
        np.array(x["found"][0]["LR"]) - 1 for x in (found, again)
    )  # half precision changes little of a small change
    assert np.abs(one - two).max() < 0.2 * np.abs(one).max()
    for rows in (found["along"]["MProtoNet+KML"], again["along"]["MProtoNet+KML"]):
        assert [x["iteration"] for x in rows] == [3, 6]
        best, worst = np.argmin(rows[0]["LR"]), np.argmax(rows[0]["LR"])  # 3 of 6: the middle of training
        assert [(x["best"], x["worst"]) for x in rows] == [(best, worst)] * 2
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    checkpoint = torch.load(tmp_path / "other" / "checkpoint.pt", weights_only=True)
    checkpoint["identity"]["embed"] = "other"
    torch.save(checkpoint, tmp_path / "other" / "checkpoint.pt")
    for bad, said in (
        (["--checkpoint", tmp_path / "none"], "there is no"),
        (["--checkpoint", tmp_path / "run", tmp_path / "copy"], "both called"),
        (["--checkpoint", tmp_path / "kml"], "run of MMAML+KML"),
        (["--checkpoint", tmp_path / "other"], "--embed other"),
        (["--checkpoint", tmp_path / "run", "--at", "5"], "--keep-every 1"),
        (["--checkpoint", tmp_path / "run", "--at", "7"], "has only 6 iterations"),
        (["--checkpoint", tmp_path / "run", "--alpha", "x"], "--alpha"),
        (["--checkpoint", tmp_path / "run", "--source-tasks", "1"], "--source-tasks"),
        (["--checkpoint", tmp_path / "run", "--self-transference", "1"], "between 0 and 1"),
        (["--checkpoint", tmp_path / "run", "--device", "cuda:99"], "choose from cpu"),
        (
            [
                "--checkpoint",
                tmp_path / "run",
                "--source-tasks",
                "2",
                "--target-tasks",
                "2",
                "--out",
                files[0],
            ],
            "--out",
        ),
    ):
        fails(capsys, functools.partial(call, transference, monkeypatch, *bad, "--cache-dir", cache), said)


def test_sources_are_of_training_and_targets_of_test_classes(cache):
    words = ["--checkpoint", "x", "--source-tasks", 3, "--target-tasks", 2, "--cache-dir", cache]
    args = get_args(transference, *words)
    args.source, args.target, args.device = "miniimagenet", "fc100", "cpu"
    options = get_args(mprotonet, "--synthetic", "--image-size", 8, "--queries", 2)
    made = transference.Experiment(args, options)
    for batch, mode, split, seed in (
        (made.sources, "miniimagenet", "train", args.seed),
        (made.targets, "fc100", "test", None),
        (made.validation, "fc100", "val", None),
    ):
        drawn = episodes(cache, [mode], split, size=8, queries=2, seed=seed).tasks(0, len(batch.mode))
        assert all(torch.equal(x, y) for x, y in zip(batch, drawn)), split


@pytest.mark.parametrize("file", sorted((RESULTS / "checkpoints").rglob("*.pt")), ids=lambda file: file.name)
def test_committed_networks_can_be_read(file):
    saved = read_tensors(file)
    script = kml if saved["identity"]["method"] == "MMAML+KML" else mprotonet
    wanted = script.init_params(flags_of_run(saved["identity"], script))
    assert {k: w.shape for k, w in saved["params"].items()} == {k: w.shape for k, w in wanted.items()}
    if script is mprotonet:
        (state,) = transference.states(file, ["final"], "cpu")
        assert file.stem.endswith(f"-{state.iteration}")
