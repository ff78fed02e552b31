"""Tests: test_scenes."""

import argparse
import functools
import json
import math

import numpy as np
import torch
from PIL import Image

import afr
from data import Episodes, Task
from fewshot import cache as fewshot_cache
from fewshot import published as fewshot_published
from fewshot import scenes as fewshot_scenes
from fewshot.cache import prepare
from tests.helpers import (
    call,
    episodes,
    fails,
    get_args,
    here,
    make_afr,
    make_afr_task,
    picture,
)
from tools import attention_report
from tools.attention_report import everything


def nothing(n=1, k=0):
    return np.zeros((n, k, 2, 3)), np.zeros((n, k, 4))


def test_cast_agrees_with_a_plane_and_a_ball_in_formulas():
    """To 1e-4 (metres, and of unit vectors): a floor under a camera that looks down a little, and a ball before a wall."""
    size, focal, pitch, height, length = 48, 0.9, 0.2, 1.5, 9.0
    room = np.array([[[-50.0, -50, -50], [50, 0, length]]])
    R = fewshot_scenes.turn(np.array([-pitch]), 1, 2)
    rays = fewshot_scenes.camera_rays(np.array([focal]), size)
    depth, normal, surface = fewshot_scenes.cast(
        np.array([[0, -height, 0.0]]), rays @ R.transpose(0, 2, 1), room, *nothing()
    )
    v = (np.arange(size) + 0.5) / size - 0.5
    down = np.cos(pitch) * v / focal + np.sin(pitch)  # how far a ray of depth 1 falls
    floor = (surface == fewshot_scenes.FLOOR)[0].reshape(size, size)
    assert 0.3 < floor.mean() < 0.9
    expected = np.repeat(height / down[:, None], size, 1)
    np.testing.assert_allclose(depth[0].reshape(size, size)[floor], expected[floor], atol=1e-4)
    seen = (normal @ R)[0].reshape(size, size, 3)
    np.testing.assert_allclose(
        seen[floor], np.broadcast_to([0, -np.cos(pitch), -np.sin(pitch)], seen[floor].shape), atol=1e-4
    )

    centre, radius = np.array([0.3, -0.2, 4.0]), 0.8
    ball = np.array([[[*centre, radius]]])
    depth, normal, surface = fewshot_scenes.cast(
        np.zeros((1, 3)), rays, np.array([[[-50.0, -50, -50], [50, 50, length]]]), nothing()[0], ball
    )
    on = surface[0] == fewshot_scenes.THINGS
    d = rays[0] / np.linalg.norm(rays[0], axis=-1, keepdims=True)
    along = d @ centre
    missed = (centre**2).sum() - along**2
    assert (on == (missed < radius**2)).all()
    at = along[on] - np.sqrt(radius**2 - missed[on])  # the distance, and depth its z
    np.testing.assert_allclose(depth[0][on], at * d[on, 2], atol=1e-4)
    np.testing.assert_allclose(normal[0][on], (at[:, None] * d[on] - centre) / radius, atol=1e-4)
    np.testing.assert_allclose(depth[0][~on], length, atol=1e-4)


def test_cast_meets_a_box_at_its_faces():
    box = np.array([[[[-1.0, -1, 3], [1, 1, 5]]]])
    room = np.array([[[-9.0, -9, -9], [9, 9, 9]]])
    rays = np.array([[[0, 0, 1.0], [0.9, 0, 3], [1, 0, 1], [-1.2, 0, 3], [0, 0, -1]]])
    for origin, expected in (
        ((0, 0, 0), [(3, "z"), (1, "z"), (9, "room"), (9 / 3, "room"), (9, "room")]),
        ((-4, 0, 4), [(5, "room"), (5 / 3, "room"), (5, "room"), (5 / 3, "room"), (13, "room")]),
    ):
        t, normal, surface = fewshot_scenes.cast(np.array([origin], float), rays, room, box, nothing()[1])
        assert [s >= fewshot_scenes.THINGS for s in surface[0]] == [where != "room" for _, where in expected]
        np.testing.assert_allclose(t[0], [t for t, _ in expected], atol=1e-12)
    t, normal, surface = fewshot_scenes.cast(
        np.array([[-4.0, 0, 4]]), np.array([[[1.0, 0.1, 0], [1, 0.5, 0]]]), room, box, nothing()[1]
    )
    assert (surface[0] == [fewshot_scenes.THINGS, fewshot_scenes.SIDE]).all() or (
        surface[0] == [fewshot_scenes.THINGS, fewshot_scenes.FLOOR]
    ).all()
    np.testing.assert_allclose(t[0, 0], 3)
    np.testing.assert_allclose(normal[0, 0], [-1, 0, 0])
    flat = np.repeat(box[:, :, :1], 2, 2)  # a box of no size is not there
    assert (
        fewshot_scenes.cast(np.array([[-4.0, 0, 4]]), rays, room, flat, np.zeros((1, 1, 4)))[2]
        < fewshot_scenes.THINGS
    ).all()


def test_labels_of_scenes_agree_with_each_other():
    """Normals derived from depth are the caster's, away from edges; parallel lines meet at the vanishing point."""
    size = 64
    for split, domain in (("train", 3), ("test", 0)):
        _, depth, normals, vanishing, classes = fewshot_scenes.draw_scenes(split, domain, 0, 6, size)
        assert classes.tolist() == list(range(6))
        assert (depth > 0.2).all() and (depth < fewshot_scenes.DEPTH_LIMIT).all()
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-9)
        assert (vanishing > 0).all() and (vanishing < 1).all()
        for i in range(6):
            # The room's axes are the three directions of normals that most pixels have; z's is nearest the axis of view.
            flat = np.unique(normals[i].reshape(-1, 3).round(5), axis=0, return_counts=True)
            axes = flat[0][flat[1].argsort()[-8:]]
            z = axes[np.abs(axes[:, 2]).argmax()]
            focal = ((vanishing[i] - 0.5) * z[2] / z[:2]).mean()  # of its image, 0.5 + focal * z_xy / z_z
            np.testing.assert_allclose(vanishing[i], 0.5 + focal * z[:2] / z[2], atol=2e-3)
            made, known = fewshot_scenes.normals_from_depth(depth[i], focal * size)
            assert known.mean() > 0.5
            smooth = np.zeros_like(known)  # away from edges, and where balls do not turn away fast
            middle = normals[i][1:-1, 1:-1]
            smooth[1:-1, 1:-1] = (
                np.max(
                    [
                        np.abs(np.roll(normals[i], shift, axis)[1:-1, 1:-1] - middle).max(-1)
                        for shift in (1, -1)
                        for axis in (0, 1)
                    ],
                    0,
                )
                < 0.15
            )
            assert (known & smooth).sum() > 0.9 * known.sum()
            angle = np.degrees(np.arccos(np.clip((made * normals[i]).sum(-1)[known & smooth], -1, 1)))
            assert np.median(angle) < 0.1 and np.mean(angle < 2) > 0.99


def test_the_vanishing_point_is_where_parallel_lines_meet(monkeypatch):
    """Edges between floor and walls of empty rooms run along z: fit a line to each, in the image, and intersect them."""
    size, found, kind = 160, 0, fewshot_scenes.scene_class
    monkeypatch.setattr(
        fewshot_scenes,
        "scene_class",
        lambda name: kind(name) | {k: 0 * kind(name)[k] for k in ("boxes", "balls")},
    )
    for domain in range(4):
        _, _, normals, vanishing, _ = fewshot_scenes.draw_scenes("val", domain, 0, 8, size)
        for i in range(8):
            n = normals[i].round(4)
            values, counts = np.unique(n.reshape(-1, 3), axis=0, return_counts=True)
            big = values[counts.argsort()[::-1][:6]]
            floor, walls = big[big[:, 1].argmin()], [w for w in big if abs(w[0]) > 0.8]
            lines = []
            for wall in walls:
                left, right = (n[:, :-1], n[:, 1:])
                border = ((left == wall).all(-1) & (right == floor).all(-1)) | (
                    (left == floor).all(-1) & (right == wall).all(-1)
                )
                y, x = np.nonzero(border)
                if len(y) > 12 and np.ptp(x) > 8:
                    lines.append(np.polyfit((y + 0.5) / size, (x + 1) / size, 1))  # x = a y + b
            if len(lines) == 2:
                (a, b), (c, d) = lines
                y = (d - b) / (a - c)
                np.testing.assert_allclose([a * y + b, y], vanishing[i], atol=0.01)
                found += 1
    assert found >= 3, "images in which both edges can be seen"


def test_scenes_are_a_pure_function_and_domains_differ():
    whole, part = (
        fewshot_scenes.draw_scenes("test", 2, 0, 6, 20),
        fewshot_scenes.draw_scenes("test", 2, 4, 2, 20),
    )
    assert all(np.array_equal(one[4:], two) for one, two in zip(whole, part))
    names = [
        f"scenes-{split}-domain-{d:02d}"
        for split in fewshot_published.SPLITS
        for d in range(fewshot_scenes.SCENE_DOMAINS[split])
    ]
    assert len({fewshot_scenes.scene_domain(name)["focal"] for name in names}) == len(names) == 35
    kinds = [
        f"scenes-{split}-class-{c:02d}"
        for split in fewshot_published.SPLITS
        for c in range(fewshot_scenes.SCENE_CLASSES[split])
    ]
    assert len({fewshot_scenes.scene_class(name)["room"][0] for name in kinds}) == len(kinds)
    other = fewshot_scenes.draw_scenes("test", 3, 0, 6, 20)
    assert not np.array_equal(whole[0], other[0])


SCENE_WORDS = [
    "--modes",
    "scenes",
    "--ways",
    3,
    "--queries",
    3,
    "--image-size",
    16,
    "--filters",
    4,
    "--steps",
    2,
]


def test_scene_subtasks(few_scenes, cache, capsys):
    folder = fewshot_cache.prepare("scenes", 16, "nowhere", cache, synthetic=True)
    assert [len(np.load(folder / f"{split}.npy")) for split in fewshot_published.SPLITS] == [96, 64, 64]
    drawn = [fewshot_scenes.draw_scenes("test", d, 0, 32, 16) for d in range(2)]
    images = np.concatenate([x[0] for x in drawn])
    for kind, shape in (("depth", (1, 16, 16)), ("normals", (3, 16, 16)), ("vanishing", (2,))):
        args = get_args(afr, *SCENE_WORDS, "--shots", 2, "--tasks", kind, "--cache-dir", cache)
        assert args.synthetic and "RAY-CAST, NOT MMT" in args.title
        test = afr.Scenes(kind, args, "test")
        batch = test.tasks(254, 5)  # across the border of two blocks
        assert (batch.support_x.shape, batch.query_x.shape) == ((5, 6, 3, 16, 16), (5, 9, 3, 16, 16))
        assert (batch.support_y.shape, batch.query_y.shape) == ((5, 6, *shape), (5, 9, *shape))
        assert batch.mode.tolist() == [0, 1, 0, 1, 0]
        truth = {
            "depth": np.concatenate([x[1] for x in drawn])[:, None] / 10,
            "vanishing": np.concatenate([x[3] for x in drawn]),
            "normals": (np.concatenate([x[2] for x in drawn]).transpose(0, 3, 1, 2) + 1) / 2,
        }[kind]
        for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
            for t in range(5):
                for image, label in zip(x[t], y[t]):
                    at = (
                        (images == (image * 255).round().byte().permute(1, 2, 0).numpy())
                        .all((1, 2, 3))
                        .nonzero()[0]
                    )
                    assert len(at) == 1 and at[0] // 32 == batch.mode[t], "one image, of the task's domain"
                    np.testing.assert_allclose(label, truth[at[0]], atol=1e-5)
        assert all(
            len({x.numpy().tobytes() for x in torch.cat([batch.support_x[t], batch.query_x[t]])}) == 15
            for t in range(5)
        )
        assert torch.equal(test.tasks(256, 2).query_y, batch.query_y[2:4])
        one, two = (
            afr.Scenes(
                kind,
                get_args(afr, *SCENE_WORDS, "--tasks", kind, "--cache-dir", cache, "--seed", seed),
                "train",
            )
            for seed in (0, 1)
        )
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
    fails(capsys, lambda: fewshot_cache.prepare("scenes", 16, "nowhere", cache), "ray-cast", "--synthetic")
    fails(
        capsys,
        lambda: afr.Scenes(
            "depth",
            get_args(afr, *SCENE_WORDS, "--tasks", "depth", "--shots", 10, "--cache-dir", cache),
            "test",
        ),
        "a domain has 32 images",
        "--shots",
    )


def write_depth_folder(root, focal=50.0, shape=(24, 32), distance=2000):
    """A wall, straight ahead, with a hole in its depth: <split>/<domain>/."""
    for split in fewshot_published.SPLITS:
        for domain in (f"{split}-attic", f"{split}-barn"):
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
    args = argparse.Namespace(
        modes=["mine"],
        ways=1,
        shots=2,
        queries=3,
        image_size=24,
        seed=0,
        device="cpu",
        synthetic=False,
        data_root=tmp_path / "root",
        cache_dir=tmp_path / "cache",
    )
    depth = afr.Scenes("depth", args, "test")
    batch = depth.tasks(0, 2)
    assert batch.support_y.shape == (2, 2, 1, 24, 24)
    y = batch.query_y
    assert ((y == -1).sum((2, 3, 4)) == 4).all(), "a hole of 2 x 2 pixels"
    assert {round(x, 4) for x in y[y >= 0].unique().tolist()} <= {round(0.2 + 0.001 * i, 4) for i in range(6)}
    normals = afr.Scenes("normals", args, "test").tasks(0, 1).query_y[0]
    known = normals[:, 0] >= 0
    assert 0.7 < known.float().mean() < 0.95
    torch.testing.assert_close(
        normals.permute(0, 2, 3, 1)[known],
        torch.tensor([0.5, 0.5, 0.0]).expand(int(known.sum()), 3),
        atol=1e-4,
        rtol=0,
    )
    assert Episodes(["mine"], "test", 2, 1, 2, 24, **places).class_names == [["test-attic", "test-barn"]]
    fails(
        capsys,
        lambda: afr.Scenes("vanishing", args, "test"),
        "no labels for vanishing",
        "--modes scenes",
    )
    done = here(
        "data.py",
        "show",
        "mine",
        "--data-root",
        tmp_path / "root",
        "--cache-dir",
        tmp_path / "cache",
        "--image-size",
        24,
        "--out",
        tmp_path / "x.png",
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "x.png").size == (3 * 154, 2 * 168 + 34)
    folder = tmp_path / "root" / "mine" / "test" / "test-barn"
    for damage, said in (
        (lambda: (folder / "focal.txt").write_text("wide"), "holds 'wide'"),
        (lambda: (folder / "focal.txt").unlink(), "no focal.txt"),
        (lambda: (folder / "3.png").unlink(), "no depth image"),
        (lambda: (folder / "3.png").write_bytes(b"x"), "cannot be decoded"),
        (lambda: Image.fromarray(np.zeros((3, 3), np.uint16)).save(folder / "3.png"), "the same view"),
        (lambda: Image.fromarray(np.zeros((24, 32), np.uint8)).save(folder / "3.png"), "not of 16 bits"),
    ):
        (folder / "focal.txt").write_text("50")
        Image.fromarray(np.full((24, 32), 2000, np.uint16)).save(folder / "3.png")
        damage()
        fails(capsys, lambda: afr.Scenes("depth", args, "test"), "barn", said)


def test_domains_of_photographs_are_checked(tmp_path, capsys):
    root = tmp_path / "root"
    write_depth_folder(root / "mine")
    (root / "mine" / "train" / "train-barn").rename(root / "mine" / "train" / "test-barn")
    fails(
        capsys, lambda: prepare("mine", 24, root, tmp_path / "cache"), "test-barn stands in train and in test"
    )
    assert prepare("mine", 24, root, tmp_path / "cache", allow_shared=True).is_dir()
    for i in range(6):
        (root / "mine" / "val" / "val-attic" / f"{i}.jpg").unlink()
    fails(capsys, lambda: prepare("mine", 24, root, tmp_path / "cache"), "val-attic has a focal.txt", "JPEG")


def test_normals_of_a_tilted_plane_are_exact():
    size, focal, n = 30, 33.0, np.array([0.3, -0.8, -0.5])
    n /= np.linalg.norm(n)
    at = np.arange(size) + 0.5 - size / 2
    rays = np.stack(np.broadcast_arrays(at[None] / focal, at[:, None] / focal, 1.0), -1)
    depth = -2 / (rays @ n)  # n . point = -2
    depth[(depth <= 0) | (depth > 30)] = 0
    made, known = fewshot_scenes.normals_from_depth(depth, focal)
    assert known.sum() > 100
    assert not known[depth == 0].any()
    np.testing.assert_allclose(made[known], np.broadcast_to(n, made[known].shape), atol=1e-9)


def test_several_high_level_tasks_from_start_to_end(few_scenes, tmp_path, cache, monkeypatch, capsys):
    words = [
        *SCENE_WORDS,
        "--tasks",
        *afr.KINDS,
        "--modulation",
        "pam",
        "--meta-batch",
        2,
        "--iterations",
        4,
        "--log-every",
        2,
        "--test-tasks",
        16,
        "--val-every",
        2,
        "--val-tasks",
        8,
        "--cache-dir",
        cache,
    ]
    call(afr, monkeypatch, *words, "--out", tmp_path / "whole")
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["strata"] == list(afr.KINDS) == list(result["accuracy"]), "no overall of unlike tasks"
    assert (result["synthetic"], result["modes"], result["per_task_mode"]) == (
        True,
        ["scenes"],
        [0, 1, 2, 3] * 4,
    )
    for i, kind in enumerate(afr.KINDS):
        for key, tasks in zip(afr.KEYS, afr.PER_TASK):
            assert math.isclose(result[key][kind]["mean"], np.mean(result[tasks][i::4]), abs_tol=1e-3)
            assert f"{kind:28}{result['accuracy'][kind]['mean']:.2f} +- " in shown
    assert "RAY-CAST, NOT MMT" in shown and "Table" not in shown and "overall" not in shown
    call(afr, monkeypatch, *words, "--out", tmp_path / "part", "--iterations", 2)
    call(afr, monkeypatch, *words, "--out", tmp_path / "part")
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["params"]
        for name in ("whole", "part")
    )
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    single = get_args(afr, *SCENE_WORDS, "--tasks", "depth", "--cache-dir", cache)
    assert all(
        torch.equal(w, afr.init_params(get_args(afr, *words))[k])
        for k, w in afr.init_params(
            get_args(afr, *SCENE_WORDS, "--modulation", "pam", "--tasks", "depth")
        ).items()
    ), "single and multi begin alike"
    of = afr.MetaTasks(get_args(afr, *words), "train").samplers
    assert not (of[1].indices(0, 4)[1] == of[2].indices(0, 4)[1]).all(), (
        "two high-level tasks are not trained on the same images"
    )
    assert result["domains"] == dict.fromkeys(afr.KINDS[1:], 2)
    assert afr.MetaTasks(single, "test").sha256(4) == afr.MetaTasks(get_args(afr, *words), "test").samplers[
        1
    ].sha256(4), "and are tested alike"
    fails(capsys, lambda: afr.get_args([*map(str, words), "--test-tasks", "18"]), "a multiple of 4")
    fails(
        capsys,
        lambda: afr.get_args(["--synthetic", "--tasks", "depth", "--modes", "scenes", "cub"]),
        "give one",
    )
    fails(capsys, lambda: afr.get_args([*map(str, SCENE_WORDS), "--transfer", "cub"]), "leave it out")


def test_attention_report(few_scenes, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(attention_report, "SUBTASKS", 6)
    monkeypatch.setattr(
        attention_report, "best_weights", functools.partial(attention_report.best_weights, steps=25)
    )
    tool = [tmp_path / "run", "--cache-dir", cache]
    words = [
        *SCENE_WORDS,
        "--tasks",
        "classification",
        "depth",
        "--meta-batch",
        2,
        "--iterations",
        4,
        "--attention-lr",
        0.1,
        "--test-tasks",
        8,
        "--val-tasks",
        8,
        "--cache-dir",
        cache,
        "--out",
        tmp_path / "run",
    ]
    fails(
        capsys,
        lambda: call(attention_report, monkeypatch, *tool),
        "is no checkpoint of afr.py",
    )
    call(afr, monkeypatch, *words)
    result = (tmp_path / "run" / "result.json").read_text()
    call(attention_report, monkeypatch, *tool, "--report-tasks", 2)
    report = json.loads((tmp_path / "run" / "attention.json").read_text())
    assert (report["method"], report["synthetic"], set(report["found"])) == (
        "AM",
        True,
        {"classification", "depth"},
    )
    params = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["params"]
    args = get_args(afr, *words)
    test = afr.MetaTasks(args, "test")
    for kind, sampler in zip(args.tasks, test.samplers):
        of = report["found"][kind]
        w, best = np.array(of["w"]), np.array(of["best"])
        assert (w.shape, best.shape) == ((6, 4, 4), (2, 4, 4))
        task = Task(*(x[0] for x in sampler.tasks(1, 1)))
        with torch.no_grad():
            mine = afr.attention(
                params, kind, afr.embed(params, task.support_x, afr.Norm()), task.support_y, args
            )[0]
        np.testing.assert_allclose(w[1], mine, atol=1e-6)
        cosine = [
            (w[j, 3] * best[j, 3]).sum() / np.linalg.norm(w[j, 3]) / np.linalg.norm(best[j, 3])
            for j in range(2)
        ]
        assert math.isclose(of["cosine"]["block4"]["mean"], np.mean(cosine), abs_tol=1e-3)
        above = [
            x[:, 2] > x[:, 2].mean(1, keepdims=True) for x in (w, best)
        ]  # what is weighed less than the mean map
        same = [np.mean(above[0][j + 1] == above[1][j]) for j in range(2)]
        assert math.isclose(of["same_sign_next"]["block3"]["mean"], np.mean(same), abs_tol=1e-3)
        # the trained weights are better on all data than none, with everything else as it was
        x, y = everything(sampler, 0)
        task = Task(*(x[0] for x in sampler.tasks(0, 1)))
        with torch.no_grad():
            adapted, _ = afr.adapt(params, task, args, kind)
            none, trained = (
                afr.criterion(kind, afr.predict(adapted, kind, afr.embed(params, x, afr.Norm(), v), args), y)
                for v in (None, torch.tensor(best[0]).float())
            )
        assert trained < none
    assert Image.open(tmp_path / "run" / "attention.png").width > 500
    assert (tmp_path / "run" / "result.json").read_text() == result
    plain = [*words, "--modulation", "none", "--iterations", 1]
    call(afr, monkeypatch, *plain, "--out", tmp_path / "plain", "--cache-dir", cache)
    fails(capsys, lambda: call(attention_report, monkeypatch, tmp_path / "plain"), "has no attention modules")


def test_everything_of_a_task(cache):
    made = episodes(cache, split="test")
    for number in (0, 3):  # of Omniglot, turned, and of mini-ImageNet
        x, y = everything(made, number)
        assert (len(x), y.bincount().tolist()) == (200, [40] * 5)
        task = made.tasks(number, 1)
        for images, labels in ((task.support_x[0], task.support_y[0]), (task.query_x[0], task.query_y[0])):
            for image, label in zip(images, labels):
                at = (x == image).all((1, 2, 3)).nonzero().flatten().tolist()
                assert len(at) == 1 and y[at[0]] == label


def test_gradients_of_several_high_level_tasks_add_up():
    """Eq. 3: the sum over high-level tasks of their mean losses."""
    args, params = make_afr("AM", "--tasks", *afr.KINDS)
    batches = [make_afr_task(kind, tasks=2) for kind in afr.KINDS]
    losses, found = afr.run_tasks(params, batches, args, False)
    assert losses.shape == (8,) and found.shape == (8, 1)
    expected = {}
    for j, (kind, batch) in enumerate(zip(afr.KINDS, batches)):
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
