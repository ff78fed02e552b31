"""Tests: test_episodes."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from data import Episodes
from fewshot import draws as fewshot_draws
from fewshot import published as fewshot_published
from fewshot import synthetic as fewshot_synthetic
from tests.helpers import HERE, ROOT, call, episodes, fails, picture, prepared, real
from tools import pictures


def test_episodes_have_distinct_classes_and_images_and_balanced_modes(cache):
    e = episodes(cache, shots=5)
    for m, (classes, images) in enumerate((20, 40) for _ in e.modes):
        c, i, turns, _ = e.indices(m, 0, 3000)
        assert all(len(set(row)) == 5 for row in c)
        assert all(len(set(row)) == 20 for row in i.reshape(-1, 20))
        assert set(c.ravel()) == set(range(64)), "every class can be drawn"
        assert set(i.ravel()) == set(range(40)), "every image can be drawn"
        for place in (0, 5, 19):  # no place in an episode favours an image: chi-square, 39 degrees of freedom
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
    assert episodes(cache, modes=["omniglot", "miniimagenet", "fc100"]).tasks(
        7, 9
    ).mode.bincount().tolist() == [3, 3, 3]


@pytest.mark.parametrize("modes, differ", [(["miniimagenet"], 6.5), (["omniglot", "miniimagenet"], 8.2)])
def test_repeated_tasks_are_drawn_with_replacement(cache, modes, differ):
    """As in the released codes: of 10 tasks, 10 (1 - 0.9^10) = 6.5 differ with one mode, 2 * 10 (1 - 0.9^5) = 8.2 with two."""
    e, found = episodes(cache, modes=modes, size=8), []
    for iteration in range(60):
        batch = e.repeated(iteration, 10)
        assert batch.mode.tolist() == e.tasks(iteration * 10, 10).mode.tolist(), (
            "modes take turns, as in any batch"
        )
        found.append(len({x.numpy().tobytes() for x in batch.query_x}))
    assert abs(np.mean(found) - differ) < 0.5
    assert np.std(found) > 0
    again = e.repeated(59, 10)
    assert all(torch.equal(a, b) for a, b in zip(batch, again)), "a continued run draws the same"
    pool = {x.numpy().tobytes() for x in e.tasks(590 * len(modes), 10 * len(modes)).query_x}
    assert {x.numpy().tobytes() for x in batch.query_x} <= pool, (
        "from the 10 tasks of each mode that this iteration loads"
    )


def test_tasks_show_the_images_that_were_drawn(cache):
    e = episodes(cache, shots=2, queries=3)
    batch = e.tasks(4, 2)
    for position, m in ((0, 0), (1, 1)):
        classes, images, turns, rows = (x[0] for x in e.indices(m, 2, 1))
        turned = torch.cat(
            [torch.rot90(e.images[m], quarter, (1, 2)) for quarter in range(4 if m == 0 else 1)]
        )  # as on a GPU
        for n in range(5):
            for j in range(5):
                pixels = e.images[m][e.offsets[m][classes[n]] + images[n, j]].numpy()
                if m == 0:
                    pixels = np.rot90(pixels, turns[n])  # Omniglot: the whole class is turned alike
                found = (
                    batch.support_x[position, 2 * n + j] if j < 2 else batch.query_x[position, 3 * n + j - 2]
                )
                want = np.broadcast_to(pixels.transpose(2, 0, 1), (3, 28, 28)) / 255
                np.testing.assert_allclose(found.numpy(), want, atol=1e-6)
                assert np.array_equal(turned[rows[n, j]], pixels)


def test_a_task_does_not_depend_on_modes_size_or_number(cache):
    alone, both = (
        episodes(cache, modes, "test", seed=None)
        for modes in (["miniimagenet"], ["omniglot", "miniimagenet"])
    )
    for one, two in zip(alone.tasks(37, 1)[:4], both.tasks(2 * 37 + 1, 1)[:4]):
        assert torch.equal(one, two)
    for one, two in zip(
        both.tasks(250, 12), both.tasks(240, 40)
    ):  # across a block of draws, and a longer batch
        assert torch.equal(one, two[10:22])
    large = episodes(cache, ["miniimagenet"], "test", size=42, seed=None)
    assert all(np.array_equal(a, b) for a, b in zip(alone.indices(0, 0, 300), large.indices(0, 0, 300)))
    assert alone.sha256(50) == large.sha256(50) != alone.sha256(51)
    drawn = [
        episodes(cache, ["miniimagenet"], split, seed=seed, **k).indices(0, 0, 9)[1][:, :, :16].tolist()
        for split, seed, k in (
            ("test", None, {}),
            ("val", None, {}),
            ("train", 0, {}),
            ("train", 1, {}),
            ("test", None, {"shots": 5}),
        )
    ]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_first_test_task_is_what_it_has_always_been(cache):
    """Indices are part of the protocol: any change to them would make old and new results incomparable."""
    c, i, turns, _ = episodes(cache, ["miniimagenet"], "test", seed=None).indices(0, 0, 1)
    assert (c[0].tolist(), i[0, 0, :5].tolist(), turns[0].tolist()) == (
        [17, 19, 0, 13, 8],
        [34, 1, 2, 17, 21],
        [3, 1, 3, 2, 3],
    )


def test_distinct_draws_every_arrangement_equally():
    rng = np.random.default_rng(0)
    draws = fewshot_draws.distinct(rng.random((60000, 2)), np.full(60000, 3))
    seen = np.unique(draws, axis=0, return_counts=True)
    assert len(seen[0]) == 6
    assert abs(seen[1] / 60000 - 1 / 6).max() < 0.01
    assert fewshot_draws.distinct(np.full((2, 3), 1 - 1e-16), np.array([3, 9])).tolist() == [
        [2, 0, 1],
        [8, 0, 1],
    ]


def test_links_and_leftovers(tmp_path, capsys):
    """Class folders may be links; what a killed process left half-built goes; an empty split is an error."""
    for number, split in enumerate(fewshot_published.SPLITS):
        picture(tmp_path / "elsewhere" / split / "1.png", seed=number)
        (tmp_path / "root" / "mine" / split).mkdir(parents=True)
    left = tmp_path / "cache" / ".mine-8-0123456789ab.abcdefgh.building"
    left.mkdir(parents=True)
    os.utime(left, (1, 1))
    others = [f".mine-8-abcd01234567.{2**22 + 1}", ".backup.20240101", ".venv-3.12"]  # fresh, and not ours
    for name in others:
        (tmp_path / "cache" / name).mkdir()
    os.utime(tmp_path / "cache" / ".backup.20240101", (1, 1))
    fails(capsys, lambda: prepared("mine", tmp_path), "mine/train: no images")
    for split in fewshot_published.SPLITS:
        (tmp_path / "root" / "mine" / split / "a").symlink_to(tmp_path / "elsewhere" / split)
    assert prepared("mine", tmp_path)[0]["train"] == [["a", 1]]
    assert not left.exists()
    assert all((tmp_path / "cache" / name).is_dir() for name in others)


def test_ragged_classes(tmp_path):
    for split, sizes in (("train", (4, 9, 5)), ("test", (4, 4, 4))):
        for c, n in enumerate(sizes):
            for i in range(n):
                picture(
                    tmp_path / "mine" / split / f"{split}{c}" / f"{i}.png", colour=(10 * c + 1, i, len(split))
                )
    e = Episodes(["Mine"], "train", 3, 1, 3, 8, 0, root=tmp_path, cache_dir=tmp_path / "cache")
    assert e.modes == ["mine"]
    batch = e.tasks(0, 200)
    colours = (
        torch.cat([batch.support_x.view(200, 3, 1, 3, 64), batch.query_x.view(200, 3, 3, 3, 64)], 2) * 255
    ).round()
    assert (colours.amax(-1) == colours.amin(-1)).all()
    classes, numbers = colours[:, :, :, 0, 0], colours[:, :, :, 1, 0]
    assert (classes == classes[:, :, :1]).all()
    assert [sorted(numbers[classes == 10 * c + 1].unique().tolist()) for c in range(3)] == [
        list(range(n)) for n in (4, 9, 5)
    ]


@pytest.mark.parametrize("mode", list(fewshot_published.LAYOUTS))
def test_synthetic_modes(cache, mode):
    images, names = fewshot_synthetic.draw_synthetic(mode, "val", 28)
    again = fewshot_synthetic.draw_synthetic(mode, "val", 28, per_class=3)[0]
    count = fewshot_synthetic.SYNTHETIC_IMAGES
    assert images.shape == (16 * count, 28, 28, 1 if mode == "omniglot" else 3)
    assert len(set(names)) == 16
    assert np.array_equal(again[:3], images[:3])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    large = (
        fewshot_synthetic.draw_synthetic(mode, "val", 84, per_class=1)[0]
        .reshape(16, 28, 3, 28, 3, -1)
        .mean((2, 4))
    )
    assert abs(large - images[::count]).mean() < 6, "the same scene at any size"


@real("omniglot")
def test_the_picture_of_an_episode_is_what_the_command_draws(tmp_path, monkeypatch):
    """The picture in the README: pixel by pixel, but for its letters, which PIL's font draws."""
    call(
        pictures,
        monkeypatch,
        "episode",
        tmp_path / "episode.png",
        "omniglot",
        "synthetic-miniimagenet",
        "--data-root",
        ROOT,
        "--cache-dir",
        tmp_path,
    )
    ours, shown = (
        np.array(Image.open(file)) for file in (tmp_path / "episode.png", HERE / "docs/episode.png")
    )
    assert ours.shape == shown.shape
    assert (ours[34:] == shown[34:]).all()


def test_an_episode_of_synthetic_modes_is_drawn(tmp_path, cache, monkeypatch):
    file = tmp_path / "episode.png"
    call(pictures, monkeypatch, "episode", file, "synthetic-fc100", "--cache-dir", cache)
    picture = np.array(Image.open(file))
    episodes = Episodes(["fc100"], "test", 5, 5, 3, 42, cache_dir=cache, synthetic=True)
    task = episodes.tasks(0, 1)
    for c, k in ((0, 0), (4, 4)):  # class, image
        wanted = (task.support_x[0, 5 * c + k].permute(1, 2, 0) * 255).round().byte().numpy()
        top, left = 34 + 46 * c, 4 + 46 * k
        assert (picture[top : top + 42, left : left + 42] == wanted).all()
