"""Tests: test_afr."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

import afr
import modgrad_completion
import modgrad_multishot
import modgrad_rl
from data import Task
from fewshot import intervals as fewshot_intervals
from fewshot.flags import identity
from tests.helpers import (
    AFR,
    TINY,
    call,
    drawn_alike,
    fails,
    get_args,
    make_afr,
    make_afr_task,
    make_task,
)


def epsilon_of(args, seed=2):
    return (
        torch.randn(4, args.filters, generator=torch.Generator().manual_seed(seed)).double()
        if args.modulation == "pam"
        else None
    )


@pytest.mark.parametrize("kind", afr.KINDS)
def test_no_attention_is_the_unmodulated_network_exactly(kind):
    task = make_afr_task(kind)
    plain, params = make_afr("ANIL", "--tasks", kind)
    expected = afr.outputs_of_test(params, task, plain, kind)
    for method in ("AM", "P-AM"):
        args, params = make_afr(method, "--tasks", kind, trained=False)
        x = afr.embed(params, task.support_x, afr.Norm())
        assert (afr.attention(params, kind, x, task.support_y, args)[0] == 0).all(), (
            "training starts at w = 0"
        )
        assert all(
            torch.equal(one, two) for one, two in zip(afr.outputs_of_test(params, task, args, kind), expected)
        )
        args, params = make_afr(method, "--tasks", kind)
        assert not any(
            torch.equal(one, two) for one, two in zip(afr.outputs_of_test(params, task, args, kind), expected)
        )
        zero = torch.zeros(4, 4).double()
        assert all(
            torch.equal(one, two)
            for one, two in zip(afr.outputs_of_test(params, task, args, kind, w=zero), expected)
        )


def test_only_the_weights_of_a_blocks_maps_beside_each_other_count():
    _, params = make_afr("AM")
    x, w = make_task().query_x, torch.tensor([[0.3], [0.6], [0.4], [0.7]]).double().expand(4, 4)
    for l in range(4):
        only = torch.where(torch.arange(4)[:, None] == l, w, 0)
        plain, weighed = (afr.embed(params, x, afr.Norm(), v) for v in (None, only))
        if l < 3:  # BatchNorm's 1e-5 is what is left
            torch.testing.assert_close(weighed, plain, rtol=1e-2, atol=1e-3)
        else:
            torch.testing.assert_close(weighed, plain * (1 - w[3, 0]))
        unequal = only * torch.tensor([1, 0.5, 0, -1]).double()
        assert not torch.allclose(afr.embed(params, x, afr.Norm(), unequal), plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", afr.KINDS)
def test_attention_does_not_see_the_order_of_the_support_samples(kind):
    args, params = make_afr("P-AM", "--tasks", kind)
    task, order = make_afr_task(kind), torch.tensor([4, 0, 3, 5, 1, 2])
    x = afr.embed(params, task.support_x, afr.Norm())
    one = afr.attention(params, kind, x, task.support_y, args)
    torch.testing.assert_close(
        afr.attention(params, kind, x[order], task.support_y[order], args), one, rtol=1e-12, atol=1e-12
    )
    assert one.shape == (2, 4, 4)
    for other in (
        (x[order], task.support_y),
        (x[1:], task.support_y[1:]),
    ):  # which label is whose; which samples there are
        assert not torch.allclose(afr.attention(params, kind, *other, args), one, rtol=1e-6)


@pytest.mark.parametrize("method", ["AM", "P-AM"])
def test_a_constant_w_is_blind_to_the_subtask_and_still_trained(method):
    args, params = make_afr(method, "--embed", "constant")
    tasks = [make_afr_task("classification", seed=seed) for seed in (0, 1)]
    one, two = (
        afr.attention(
            params, "classification", afr.embed(params, task.support_x, afr.Norm()), task.support_y, args
        )
        for task in tasks
    )
    assert torch.equal(one, two) and one.shape == (1 + (method == "P-AM"), 4, 4)
    afr.task_loss(params, tasks[0], args, "classification", epsilon_of(args))[0].backward()
    assert params["attention.classification.out.bias"].grad.abs().min() > 0
    assert [k for k in params if k.startswith("attention.")] == ["attention.classification.out.bias"], (
        "nothing that could not be trained"
    )


def test_attention_by_hand():
    args, params = make_afr("AM", "--attention-blocks", 1, "--attention-width", 2)
    x, y = torch.rand(6, 4, 1, 1).double(), make_task().support_y
    q, k, v = (
        torch.stack(
            [
                params[f"attention.classification.block1.{part}.weight"]
                @ torch.cat([x[i, :, 0, 0], torch.eye(3).double()[y[i]]])
                + params[f"attention.classification.block1.{part}.bias"]
                for i in range(6)
            ]
        )
        for part in ("query", "key", "value")
    )
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


@pytest.mark.parametrize("kind", afr.KINDS)
def test_pam_never_reads_query_labels_in_a_test_and_does_in_training(kind):
    args, params = make_afr("P-AM", "--tasks", kind)
    task, eps = make_afr_task(kind), epsilon_of(args)
    other = task._replace(query_y=task.query_y.flip(0))
    assert all(
        torch.equal(one, two)
        for one, two in zip(*(afr.outputs_of_test(params, t, args, kind) for t in (task, other)))
    )
    (_, one), (_, two) = (afr.task_loss(params, t, args, kind, eps) for t in (task, other))
    assert not torch.allclose(one, two, rtol=1e-6), "the posterior is of the query set with its labels"
    _, three = afr.task_loss(params, task, args, kind, epsilon_of(args, seed=3))
    assert not torch.allclose(one, three, rtol=1e-6)
    twice = argparse.Namespace(**vars(args) | {"kl_weight": 3.0})
    x, q = (afr.embed(params, images, afr.Norm()) for images in (task.support_x, task.query_x))
    kl = afr.gaussian_kl(
        afr.attention(params, kind, q, task.query_y, args),
        afr.attention(params, kind, x, task.support_y, args),
    )
    difference = (
        afr.task_loss(params, task, twice, kind, eps)[0] - afr.task_loss(params, task, args, kind, eps)[0]
    )
    torch.testing.assert_close(difference, 2 * kl / 9)


@pytest.mark.parametrize("kind", afr.KINDS)
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
    assert not torch.equal(
        afr.outputs_of_test(params, task, args, kind)[0], afr.outputs_of_test(params, task, fewer, kind)[0]
    )


def test_nil_on_hand_made_numbers():
    args = get_args(afr, "--ways", 2)
    support = torch.tensor([[2.0, 0], [3, 4], [0, 5], [0, 1]]).view(4, 2, 1, 1)
    query = torch.tensor([[0, 9.0], [7, 0], [1, 1]]).view(3, 2, 1, 1)
    found = afr.nil(support, query, torch.tensor([0, 0, 1, 1]), args)
    r = math.sqrt(0.5)
    torch.testing.assert_close(
        found, torch.tensor([[(0 + 0.8) / 2, 1], [(1 + 0.6) / 2, 0], [(r + 1.4 * r) / 2, r]])
    )


@pytest.mark.parametrize(
    "method, kind, words",
    [
        *((method, kind, []) for method in AFR for kind in afr.KINDS),
        ("AM", "classification", ["--head", "plain"]),
    ],
)
def test_gradients_of_attentive_feature_reuse(method, kind, words):
    """Backbone and head learn as without attention (Eq. 4), the attention module from the pass with it (Eq. 5); loop and vmap."""
    args, params = make_afr(method, "--tasks", kind, *words)
    batch, rng = make_afr_task(kind, tasks=2, seed=3), torch.Generator().manual_seed(3)
    eps = (
        None
        if args.modulation != "pam"
        else torch.stack([epsilon_of(args, seed) for seed in (0, 1)])[:, None]
    )
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
        mine = [
            k
            for k in params
            if part == (k.split(".")[0] if k.startswith(("head.", "attention.")) else "backbone")
        ]
        direction = {k: torch.randn(params[k].shape, generator=rng).double() for k in mine}
        assert bool(mine) == (part != "attention" or args.modulation != "none")
        if not mine:
            continue

        def loss(step, part=part, direction=direction):
            moved = {k: w.detach() + step * direction.get(k, 0) for k, w in params.items()}
            which = args if part == "attention" else plain
            return np.mean(
                [
                    afr.task_loss(
                        moved, Task(*(x[i] for x in batch)), which, kind, eps if eps is None else eps[i, 0]
                    )[0].item()
                    for i in range(2)
                ]
            )

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
        head = {
            k: head[k] - args.alpha[0] * g for k, g in torch.func.grad(loss)(head, x, task.support_y).items()
        }
    for k, g in torch.func.grad(loss)(head, query, task.query_y).items():
        torch.testing.assert_close(params[k].grad, g)


def test_students_t():
    """Its density, summed up to the quantile, leaves 2.5 %."""
    for df in (1, 2, 9, 30):
        x = np.linspace(-fewshot_intervals.student(df + 1), fewshot_intervals.student(df + 1), 200001)
        density = (
            math.gamma((df + 1) / 2)
            / math.gamma(df / 2)
            / math.sqrt(math.pi * df)
            * (1 + x**2 / df) ** (-(df + 1) / 2)
        )
        assert math.isclose(density[1:].sum() * (x[1] - x[0]), 0.95, abs_tol=1e-4)
    assert (
        fewshot_intervals.student(32) == fewshot_intervals.student(1000) == 1.96
        and len(fewshot_intervals.STUDENT) == 30
    )


def test_flags_that_a_method_does_not_use_make_no_other_run(capsys):
    for words, unused in (
        (
            ["--modulation", "none"],
            "--head plain --attention-width 8 --attention-blocks 1 --attention-lr 0.1 --kl-weight 2",
        ),
        ([], "--kl-weight 2"),
        (["--embed", "constant"], "--attention-width 8"),
    ):
        one, two = (get_args(afr, *words, *more.split()) for more in ("", unused))
        assert identity(one) == identity(two) and one.out == two.out
        said = capsys.readouterr().err
        assert said.count("does not use") == unused.count("--"), "and it is said"
    for module, words, unused in (
        (modgrad_multishot, "reptile", "--rank 2 --context 9 --first-order"),
        (modgrad_multishot, "maml", "--rank 2 --context 9"),
        (modgrad_rl, "cavia", "--rank 2"),
        (modgrad_rl, "maml", "--rank 2 --context 9"),
        (modgrad_completion, "cnp", "--rank 2 --first-order --inner-clip 1"),
        (modgrad_completion, "maml", "--rank 2 --context 9"),
    ):
        one, two = (get_args(module, "--algorithm", words, *more.split()) for more in ("", unused))
        assert identity(one) == identity(two) and one.out == two.out
        assert capsys.readouterr().err.count("does not use") == unused.count("--")
    assert identity(get_args(afr, "--modulation", "pam", "--kl-weight", 2)) != identity(
        get_args(afr, "--modulation", "pam")
    )


def test_the_backbone_and_linear_heads_start_as_in_mamls_code():
    """Uniform by Xavier's rule, as tf.contrib.layers.xavier_initializer_conv2d draws; biases at zero."""
    params = afr.init_params(get_args(afr, "--modulation", "none", "--seed", 1))
    torch.manual_seed(0)
    for l, c_in in ((1, 3), (2, 32), (3, 32), (4, 32)):
        wanted = torch.cat([torch.nn.init.xavier_uniform_(torch.empty(32, c_in, 3, 3)) for _ in range(20)])
        assert drawn_alike(params[f"conv{l}.weight"], wanted)
        assert not params[f"conv{l}.bias"].any()
        assert not drawn_alike(
            params[f"conv{l}.weight"], math.sqrt(2 / (9 * c_in)) * torch.randn(20 * 32 * c_in * 9)
        ), "or this would not tell"
    assert drawn_alike(
        params["head.classification.weight"],
        torch.cat([torch.nn.init.xavier_uniform_(torch.empty(5, 800)) for _ in range(20)]),
    )


@pytest.mark.parametrize("words", [["--modulation", "none"], ["--modulation", "am"]])
def test_high_level_tasks_pull_at_the_backbone_alike(words, few_scenes, cache):
    """At the start the norms of the four tasks' gradients at the backbone are within a factor of 10."""
    args = get_args(
        afr,
        "--tasks",
        *afr.KINDS,
        "--modes",
        "scenes",
        "--image-size",
        28,
        "--cache-dir",
        cache,
        "--ways",
        4,
        "--meta-batch",
        2,
        "--queries",
        5,
        *words,
    )
    params = {k: w.requires_grad_() for k, w in afr.init_params(args).items()}
    batches = afr.MetaTasks(args, "train").tasks(0, 2 * len(afr.KINDS))
    norms = afr.backbone_gradients(params, batches, args, None)
    assert list(norms) == list(afr.KINDS)
    assert max(norms.values()) < 10 * min(norms.values()), norms
    for part in ("depth.conv4", "normals.conv4", "vanishing"):  # and as other layers start, they are not
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
                losses.append(
                    afr.task_loss(params, make_afr_task(kind), args, kind, epsilon_of(args))[0].item()
                )
        assert math.isclose(losses[2], 3 * losses[0], rel_tol=1e-9)
        assert (
            math.isclose(losses[1] - losses[0], losses[3] - losses[2], rel_tol=1e-6) and losses[1] > losses[0]
        )


def test_intervals_over_domains():
    """Tasks of one domain are no independent samples of domains: the interval is that of the domains' means."""
    rng = np.random.default_rng(0)
    scores = np.tile(rng.normal(size=10), 60) + 0.01 * rng.normal(size=600)  # 10 domains that take turns
    found = afr.summary(scores, ["depth"], {"depth": 10})["depth"]
    means = scores.reshape(60, 10).mean(0)
    assert math.isclose(found["ci95"], 2.262 * means.std(ddof=1) / math.sqrt(10), abs_tol=1e-4)
    assert math.isclose(found["mean"], scores.mean(), abs_tol=1e-4)
    assert afr.summary(scores, ["depth"], {})["depth"]["ci95"] < found["ci95"] / 7
    assert afr.units(scores, 1) is scores and len(afr.units(scores[:4], 10)) == 4


def test_products_of_attention_and_nil_are_not_in_bf16():
    args, params = make_afr("AM", "--precision", "bf16", dtype=torch.float32)
    x, query, y = torch.rand(15, 4, 1, 1), torch.rand(9, 4, 1, 1), torch.arange(3).repeat(5)
    for function in (
        lambda: afr.nil(x, query, y, args),
        lambda: afr.attention(params, "classification", x, y, args),
    ):
        expected = function()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(), expected)


@pytest.mark.parametrize("method", AFR)
def test_afr_inductive_predictions_do_not_know_the_other_queries(method):
    for kind in afr.KINDS:
        args, params = make_afr(method, "--tasks", kind)
        task, keep = make_afr_task(kind), torch.tensor([0, 4])
        whole, part = (
            afr.outputs_of_test(params, t, args, kind)
            for t in (task, task._replace(query_x=task.query_x[keep], query_y=task.query_y[keep]))
        )
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
    one, two = (
        afr.init_params(get_args(afr, *words))
        for words in (["--modulation", "none"], ["--modulation", "pam"])
    )
    assert all(torch.equal(w, two[k]) for k, w in one.items())


@pytest.mark.parametrize("method", AFR)
def test_an_afr_run_from_start_to_end_and_its_continuation(method, tmp_path, cache, monkeypatch, capsys):
    words = ["--filters" if word == "--channels" else word for word in TINY]
    words = [
        *words,
        "--image-size",
        16,
        *AFR[method],
        "--cache-dir",
        cache,
        "--modes",
        "miniimagenet",
        "--transfer",
        "fc100",
        "--val-every",
        3,
        "--val-tasks",
        6,
    ]
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
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"]
        for name in ("whole", "part")
    )
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    monkeypatch.setattr(afr, "run_tasks", lambda *_, **__: pytest.fail("a finished run is not run again"))
    call(afr, monkeypatch, *words, "--out", tmp_path / "whole")


@pytest.mark.parametrize(
    "words, said",
    [
        ("--algorithm maml --modulation am", "leave one of the two flags out"),
        ("--tasks flow", "invalid choice"),
        ("--alpha 0.1 0.2", "for each of --tasks classification"),
        ("--alpha -1", "--alpha -1"),
        ("--loss-weights nan", "--loss-weights nan: give 0 or more"),
        ("--alpha inf", "--alpha inf: give a number up to"),
        ("--tasks classification classification", "twice"),
        ("--image-size 15", "--image-size 15"),
        ("--test-tasks 1", "--test-tasks 1"),
        ("--filters 0", "--filters 0"),
        ("--modulation none --embed constant", "give --modulation am or pam"),
    ],
)
def test_afr_bad_arguments(capsys, words, said):
    fails(capsys, lambda: afr.get_args(words.split()), said)
