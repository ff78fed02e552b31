"""Tests: test_rl."""

import functools
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import modgrad_rl
from data import uniform
from fewshot import plots
from tests.helpers import call, fails, get_args, here, relative_distance
from tools import pictures, tables_rl


def make_rl(algorithm="modgrad", *words):
    args = get_args(
        modgrad_rl,
        "--algorithm",
        algorithm,
        "--hidden",
        5,
        "--context",
        4,
        "--rollouts",
        3,
        "--horizon",
        6,
        "--meta-batch",
        2,
        "--fisher-fraction",
        1,
        "--device",
        "cpu",
        *words,
    )
    world = modgrad_rl.make_world(args)
    return args, world, modgrad_rl.init_params(args, world)


def in_double(tensors):
    return (
        type(tensors)(*(x.double() for x in tensors))
        if isinstance(tensors, tuple)
        else {k: x.double() for k, x in tensors.items()}
    )


def one_task(lived, t=0):
    return [in_double(modgrad_rl.Rollouts(*(x[t] for x in rollouts))) for rollouts in lived]


def test_navigation_by_hand():
    _, world, _ = make_rl()
    goal = world.tasks(torch.tensor([[0.65, 0.5], [0.6, 0.4]]))
    torch.testing.assert_close(goal, torch.tensor([[0.15, 0.0], [0.1, -0.1]]))
    assert torch.equal(world.reset(goal, 1, None), torch.zeros(2, 1, 2))
    place, reward, end = world.step(
        torch.tensor([[[7.0, 0.0]], [[0.095, -0.095]]])
    )  # clipped to 0.1; within 0.01
    torch.testing.assert_close(place, torch.tensor([[[0.1, 0.0]], [[0.095, -0.095]]]))
    torch.testing.assert_close(reward, torch.tensor([[-0.05], [-math.hypot(0.005, 0.005)]]))
    assert end.tolist() == [[False], [True]]
    _, _, end = world.step(torch.tensor([[[0.05, 0.02]], [[0.0, 0.0]]]))
    assert end.tolist() == [[False], [True]], "both coordinates have to be near"


def test_rollouts_end_at_the_goal():
    args, world, params = make_rl("maml")
    params = {k: torch.zeros_like(w) for k, w in params.items()} | {
        "log_std": torch.full((2,), -20.0),
        "mean.bias": torch.tensor([0.05, 0.0]),
    }
    fast = {k: w.expand(1, *w.shape) for k, w in modgrad_rl.start(params, args).items()}
    rollouts = modgrad_rl.act(params, fast, world, torch.tensor([[0.1, 0.0]]), args, "test", 0, 0)
    assert torch.equal(rollouts.mask, torch.tensor([1.0, 1, 0, 0, 0, 0]).expand(1, 3, 6)), (
        "the step that arrives still counts"
    )
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
                rows.append([*o, *o**2, h / 100, (h / 100) ** 2, (h / 100) ** 3, 1])
                targets.append(sum(0.9 ** (k - h) * reward[t, r, k] for k in range(h, length)))
                where.append((r, h))
        rows, targets = np.array(rows), np.array(targets)
        w = np.linalg.solve(rows.T @ rows + 1e-5 * np.eye(rows.shape[1]), rows.T @ targets)
        value = dict(zip(where, rows @ w))
        naive = {}
        for r, h in where:
            naive[r, h] = sum(
                (0.9 * 0.7) ** (k - h) * (reward[t, r, k] + 0.9 * value.get((r, k + 1), 0) - value[r, k])
                for k in range(h, 6)
                if (r, k) in value
            )
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
    naive = torch.autograd.grad(
        -(log_prob * rollouts.advantage * rollouts.mask).sum() / rollouts.mask.sum(), list(params.values())
    )
    stepped = modgrad_rl.adapt(
        params, modgrad_rl.start(params, args), rollouts._replace(log_prob=log_prob.detach()), args
    )
    for (k, w), g in zip(params.items(), naive):
        torch.testing.assert_close(stepped[k], w - args.alpha * g)


def test_rl_starts_at_one_as_maml_on_the_same_layers():
    steps = {}
    for name, words in (
        ("maml", ("maml", "--adapt", "fc1", "fc2", "--alpha", 0.1)),
        ("one", ("modgrad", "--start-at-one", "--alpha", 0.1)),
    ):
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
    for algorithm, words, split, wanted in (
        ("maml", [], "test", [0.1, 0.05, 0.05]),
        ("maml", [], "train", [0.1] * 3),
        ("maml", ["--no-halve-test-lr"], "test", [0.1] * 3),
        ("cavia", [], "test", [1.0] * 3),
        ("modgrad", ["--halve-test-lr"], "test", [30.0, 15.0, 15.0]),
    ):
        args, world, params = make_rl(algorithm, *words)
        sizes.clear()
        modgrad_rl.live(params, world, args, split, 0, 2, 3)
        assert sizes == wanted, (algorithm, split)


def test_rl_modulation_of_one_is_maml_on_the_same_layers(monkeypatch):
    args, world, params = make_rl("modgrad")
    (plain, *_), (rollouts,) = (
        make_rl("maml", "--adapt", "fc1", "fc2", "--alpha", args.alpha),
        one_task(modgrad_rl.live(params, world, args, "train", 0, 2, 0)),
    )
    params = in_double(params)
    monkeypatch.setattr(
        modgrad_rl, "modulation", lambda params, v, like: {k: torch.ones_like(w) for k, w in like.items()}
    )
    one, two = (modgrad_rl.adapt(params, modgrad_rl.start(params, a), rollouts, a) for a in (args, plain))
    assert set(one) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("algorithm", modgrad_rl.METHODS)
def test_outer_gradient_and_curvature_of_trpo(algorithm, monkeypatch):
    """In float64: the gradient against central differences, the Fisher product against the second derivative of KL, which is
    computed from torch.distributions; then that the step keeps its bound and improves its objective."""
    args, world, params = make_rl(algorithm, "--cg-damping", 0, "--alpha", 0.5)
    rng = torch.Generator().manual_seed(1)
    for layer in (
        "fc1",
        "fc2",
    ):  # the origin is not to lie on the kink of every unit, as it does where biases are 0
        params[f"{layer}.bias"] += 0.3 * torch.randn(5, generator=rng)
    lived = [in_double(rollouts) for rollouts in modgrad_rl.live(params, world, args, "train", 0, 2, 1)]
    params = in_double(params)
    for t in range(2):  # as float64 sees it, nothing has changed since the actions were drawn
        before, after = (modgrad_rl.Rollouts(*(x[t] for x in rollouts)) for rollouts in lived)
        fast = modgrad_rl.start(params, args)
        for rollouts, batch in ((before, lived[0]), (after, lived[1])):
            mean = modgrad_rl.forward(params | fast, rollouts.observation, fast.get("context"))
            batch.log_prob[t] = modgrad_rl.log_probability(mean, (params | fast)["log_std"], rollouts.action)
            fast = modgrad_rl.adapt(
                params, fast, batch._replace(**{k: getattr(batch, k)[t] for k in batch._fields}), args
            )
    names, seen = list(params), {}

    def policies(params):
        for t in range(2):
            before, after = (modgrad_rl.Rollouts(*(x[t] for x in rollouts)) for rollouts in lived)
            mean, log_std = modgrad_rl.adapted_policy(params, (before, after), args)
            yield torch.distributions.Normal(mean, log_std.exp()), after

    def surrogate(params):
        return (
            sum(
                -(
                    (pi.log_prob(after.action).sum(-1) - after.log_prob).exp() * after.advantage * after.mask
                ).sum()
                / after.mask.sum()
                for pi, after in policies(params)
            )
            / 2
        )

    old = [torch.distributions.Normal(pi.mean.detach(), pi.stddev.detach()) for pi, _ in policies(params)]

    def kl(params):
        return (
            sum(
                (torch.distributions.kl_divergence(one, pi).sum(-1) * after.mask).sum() / after.mask.sum()
                for one, (pi, after) in zip(old, policies(params))
            )
            / 2
        )

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
    second = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(along, leaves.values(), materialize_grads=True)]
    )
    torch.testing.assert_close(
        seen["product"](torch.cat([v[k].reshape(-1) for k in names])), second, rtol=1e-6, atol=1e-9
    )
    assert 0 < kl(new) <= args.max_kl
    torch.testing.assert_close(kl(new), step["kl"])
    torch.testing.assert_close(surrogate(params) - surrogate(new), step["gain"])
    assert step["gain"] > 0


def test_the_context_gradient_in_rl_is_that_after_the_trial_step(monkeypatch):
    args, world, params = make_rl("modgrad", "--alpha", 50)
    (rollouts,), seen = one_task(modgrad_rl.live(params, world, args, "train", 0, 2, 0)), []
    params = in_double(params)
    monkeypatch.setattr(
        modgrad_rl,
        "modulation",
        lambda params, v, like, real=modgrad_rl.modulation: seen.append(v) or real(params, v, like),
    )
    fast = modgrad_rl.start(params, args)
    modgrad_rl.adapt(params, fast, rollouts, args)
    v = seen[-1].detach()
    gradient = torch.func.grad(lambda fast: modgrad_rl.policy_loss(params, fast, rollouts))(fast)

    def after(v):
        M = modgrad_rl.modulation(params, v, fast)
        return modgrad_rl.policy_loss(
            params, {k: fast[k] - args.alpha * M[k] * gradient[k] for k in fast}, rollouts
        )

    for i in range(args.context):
        e = 1e-6 * torch.eye(args.context, dtype=torch.float64)[i]
        assert v[i].item() == pytest.approx(-((after(e) - after(-e)) / 2e-6).item(), rel=1e-4, abs=1e-10)
    assert v.abs().max() > 0


@pytest.mark.parametrize("algorithm", modgrad_rl.METHODS)
def test_the_loop_over_tasks_and_vmap_agree(algorithm):
    args, world, params = make_rl(algorithm, "--alpha", 0.5)
    lived, params = (
        [in_double(rollouts) for rollouts in modgrad_rl.live(params, world, args, "train", 0, 3, 1)],
        in_double(params),
    )
    loop = modgrad_rl.over_tasks(lambda lived: modgrad_rl.adapted_policy(params, lived, args), lived)
    for one, two in zip(
        loop, torch.func.vmap(lambda lived: modgrad_rl.adapted_policy(params, lived, args))(lived)
    ):
        torch.testing.assert_close(one, two)


def test_a_tasks_rollouts_do_not_depend_on_its_batch():
    args, world, params = make_rl("maml")
    many = modgrad_rl.live(params, world, args, "test", 0, 4, 2)
    for one, all_ in zip(modgrad_rl.live(params, world, args, "test", 2, 1, 2), many):
        for x, y in zip(one, all_):
            torch.testing.assert_close(x[0], y[2])
    other, *_ = make_rl("maml", "--seed", 5)
    assert torch.equal(
        modgrad_rl.goals(world, other, "test", 0, 4), modgrad_rl.goals(world, args, "test", 0, 4)
    )
    assert not torch.equal(
        modgrad_rl.goals(world, other, "train", 0, 4), modgrad_rl.goals(world, args, "train", 0, 4)
    )
    assert not torch.equal(
        modgrad_rl.goals(world, args, "val", 0, 4), modgrad_rl.goals(world, args, "test", 0, 4)
    )


def test_an_rl_run_from_start_to_end(tmp_path, monkeypatch, capsys):
    words = [
        "--hidden",
        6,
        "--rollouts",
        4,
        "--horizon",
        8,
        "--meta-batch",
        3,
        "--iterations",
        4,
        "--test-tasks",
        5,
        "--val-every",
        2,
        "--val-tasks",
        3,
    ]
    runs = []
    for algorithm in modgrad_rl.METHODS:
        runs.append(tmp_path / algorithm)
        call(modgrad_rl, monkeypatch, *words, "--algorithm", algorithm, "--out", runs[-1])
        result = json.loads((runs[-1] / "result.json").read_text())
        assert result["returns"] == [modgrad_rl.summary(np.array(row)) for row in result["per_task"]]
        shown = capsys.readouterr().out
        for name, row in zip(
            ("before", "after 1 update ", "after 2 updates", "after 3 updates"), result["returns"]
        ):
            assert re.search(rf"{name} +{re.escape('{mean:.2f} +- {ci95:.2f}'.format(**row))}", shown)
        lines = [json.loads(line) for line in (runs[-1] / "log.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
        assert all(line["kl"] <= 0.01 for line in lines)
        assert ["validation" in line for line in lines] == [False, True, False, True]
        drawn = plots.validation_of(lines)
        assert drawn["before adapting"] == (
            [2, 4],
            [lines[1]["validation"][0]["mean"], lines[3]["validation"][0]["mean"]],
        )
        assert drawn["after adapting"][1][0] == lines[1]["validation"][-1]["mean"]
    call(modgrad_rl, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 2)
    call(modgrad_rl, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"]
        for name in ("modgrad", "part")
    )
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    between = *words, "--out", tmp_path / "between", "--log-every", 3  # stops before the first log line
    call(modgrad_rl, monkeypatch, *between, "--stop-after", 0)
    call(modgrad_rl, monkeypatch, *between)
    three = torch.load(tmp_path / "between" / "checkpoint.pt", weights_only=True)["params"]
    assert all(torch.equal(w, three[k]) for k, w in one.items())
    fails(
        capsys,
        functools.partial(call, modgrad_rl, monkeypatch, *words, "--out", tmp_path / "part", "--gamma", 0.5),
        "has gamma 0.95, not 0.5",
    )
    call(pictures, monkeypatch, "navigation", tmp_path / "paths.png", *runs)
    assert Image.open(tmp_path / "paths.png").size == (3 * 224, 4 * 224 + 18)
    fails(
        capsys,
        functools.partial(call, pictures, monkeypatch, "navigation", tmp_path / "x.png", tmp_path),
        "has no checkpoint",
    )
    for bad, said in (
        ("--algorithm cavia --adapt fc1", "leave --adapt out"),
        ("--adapt fc9", "no such layer; give all"),
        ("--adapt all", "a cell is for"),
        ("--rollouts 0", "1 or more"),
        ("--fisher-fraction 0", "1e-06 or more"),
    ):
        fails(capsys, functools.partial(modgrad_rl.get_args, bad.split()), said)
    shutil.rmtree(tmp_path / "part")
    shutil.rmtree(tmp_path / "between")
    done = here("tools.tables", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("### Reinforcement learning") :]
    assert table.startswith(
        "### Reinforcement learning, navigation\n\n**4 iterations of 3 tasks instead of 500 of 40.** "
        "**4 rollouts instead of 20.** **8 steps instead of 100.** **6 units instead of 100.** 5 test tasks;"
    )
    pair = [
        np.array(json.loads((tmp_path / name / "result.json").read_text())["per_task"][1])
        for name in ("modgrad", "maml")
    ]
    assert f"| {(pair[0] - pair[1]).mean():+.2f} ±" in next(
        line for line in table.splitlines() if line.startswith("| ModGrad - MAML")
    )
    before, after = json.loads((tmp_path / "maml" / "result.json").read_text())["per_task"][:2]
    assert f"| {np.subtract(after, before).mean():+.2f} ±" in next(
        line for line in table.splitlines() if line.startswith("| MAML |")
    )
    (figure,) = (tmp_path / "out").glob("rl-navigation-*.png")
    assert Image.open(figure).size[0] > 500


def test_cheetahs_reward_is_that_of_their_simulation(capsys):
    gymnasium, mujoco = pytest.importorskip("gymnasium"), pytest.importorskip("mujoco")
    mujoco.set_mju_user_warning(lambda text: None)
    words = ["--rollouts", 2, "--horizon", 3, "--device", "cpu"]
    rng = np.random.default_rng(0)
    start, actions = (
        torch.from_numpy(rng.normal(size=(2, 2, 18))),
        torch.from_numpy(rng.uniform(-1.5, 1.5, size=(3, 2, 2, 6))).float(),
    )
    for env_name, u, workers in (("cheetah-dir", 0.1, 2), ("cheetah-vel", 0.6, 5)):  # for 4 animals
        args = get_args(modgrad_rl, "--env", env_name, "--workers", workers, *words)
        world = modgrad_rl.make_world(args)
        try:
            goal = world.tasks(torch.tensor([[u, 0.0], [0.9, 0.0]]))
            assert goal.flatten().tolist() == pytest.approx(
                [-1, 1] if env_name == "cheetah-dir" else [1.2, 1.8]
            )
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
                wanted = (goal_ * speed if env_name == "cheetah-dir" else -abs(speed - goal_)) - 0.05 * (
                    a**2
                ).sum()
                assert reward[t, r].item() == pytest.approx(wanted, abs=1e-5)
                assert not end.any()


def test_returns_of_half_cheetahs_by_direction():
    """Of each test task the return is the direction that is wanted, so the table must show 1 and -1."""
    args = get_args(modgrad_rl, "--env", "cheetah-dir", "--test-tasks", 12)
    draws = [uniform("rl cheetah-dir test None", number, 2)[0] for number in range(12)]
    wanted = np.where(np.array(draws) < 0.5, -1.0, 1.0)
    run = {"method": "MAML", "args": vars(args), "test_tasks": 12, "scores": wanted[None], "options": {}}
    run |= {"seed": 0, "first_seed": 0}
    table = tables_rl.by_direction([run], ["before"])
    assert f"| MAML, forwards ({(wanted > 0).sum()} tasks) | 1.00 ± 0.00 |" in table
    assert f"| MAML, backwards ({(wanted < 0).sum()} tasks) | -1.00 ± 0.00 |" in table
    few = run | {"test_tasks": 1, "scores": wanted[None, :1]}
    assert "tasks)" not in tables_rl.by_direction([few], ["before"]), "one task has no interval"


def test_cheetahs_need_mujoco(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    fails(
        capsys,
        lambda: modgrad_rl.make_world(get_args(modgrad_rl, "--env", "cheetah-dir")),
        "pip install",
        "navigation",
    )
