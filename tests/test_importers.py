"""Tests: test_importers."""

import csv
import io
import json
import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from data import Episodes
from fewshot import archives as fewshot_archives
from fewshot import cache as fewshot_cache
from fewshot import published as fewshot_published
from fewshot.decode import decode
from tests.helpers import (
    FACTS,
    HERE,
    ROOT,
    cub_names,
    fails,
    miniimagenet_pickle,
    picture,
    prepared,
    real,
    write_tar,
    write_zip,
)


def test_import_omniglot(tmp_path):
    """Two zips, alphabets and characters; ink becomes bright."""
    drawing = picture(None, spot=True, colour=(0, 0, 0), mode="1")
    for part, characters in (("images_background", 964), ("images_evaluation", 659)):
        write_zip(
            tmp_path / "root" / f"{part}.zip",
            {
                f"{part}/Alphabet_{c // 33:02d}/character{c % 33 + 1:02d}/{c:04d}_{i:02d}.png": drawing
                for c in range(characters)
                for i in range(1, 3)
            }
            | {"__MACOSX/._x.png": b"junk"},
        )
    classes, pixels = prepared("omniglot", tmp_path)
    assert [len(classes[s]) for s in fewshot_published.SPLITS] == [1028, 172, 423]
    assert pixels["train"].shape == (2056, 8, 8, 1)
    assert (pixels["test"][:, :4, :4] == 255).all()
    names = [name for s in fewshot_published.SPLITS for name, _ in classes[s]]
    assert len(set(names)) == 1623
    assert re.fullmatch(r"images_(background|evaluation)/Alphabet_\d\d/character\d\d", names[0])
    alphabets = [{name.rpartition("/")[0] for name, _ in classes[s]} for s in fewshot_published.SPLITS]
    assert sum(len(a & b) for i, a in enumerate(alphabets) for b in alphabets[:i]) <= 2


@real("omniglot")
@pytest.mark.skipif(not FACTS.is_dir(), reason="needs the reference split lists")
def test_omniglot_split_is_the_reference():
    splits = fewshot_published.import_omniglot(fewshot_cache.find_source("omniglot", ROOT)[1])
    want = json.loads((FACTS / "omniglot_split.json").read_text())["splits"]
    assert {s: list(splits[s]) for s in fewshot_published.SPLITS} == want
    assert {len(images) for s in fewshot_published.SPLITS for images in splits[s].values()} == {20}
    alphabets = {s: {name.split("/")[-2] for name in splits[s]} for s in fewshot_published.SPLITS}
    assert alphabets["train"] & alphabets["val"] == {"Asomtavruli_(Georgian)"}, (
        "two alphabets are cut: README says which"
    )
    assert alphabets["val"] & alphabets["test"] == {"Gurmukhi"}
    assert not alphabets["train"] & alphabets["test"]


@pytest.mark.parametrize("protocol", [2, 5])
def test_import_miniimagenet_pickles(tmp_path, monkeypatch, protocol):
    few = {split: names[:3] for split, names in fewshot_published.MINIIMAGENET.items()}
    monkeypatch.setattr(fewshot_published, "MINIIMAGENET", few)
    for part, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        images, content = miniimagenet_pickle(fewshot_published.MINIIMAGENET[split][:3], protocol)
        (tmp_path / "root" / "miniimagenet").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / "miniimagenet" / f"mini-imagenet-cache-{part}.pkl").write_bytes(content)
    classes, pixels = prepared("miniimagenet", tmp_path, size=84)
    assert classes["val"] == [[name, 2] for name in fewshot_published.MINIIMAGENET["val"][:3]]
    assert np.array_equal(pixels["test"], images)


def test_import_miniimagenet_images_and_tables(tmp_path, monkeypatch):
    few = {split: names[:2] for split, names in fewshot_published.MINIIMAGENET.items()}
    monkeypatch.setattr(fewshot_published, "MINIIMAGENET", few)
    for split in fewshot_published.SPLITS:
        rows = [
            (f"{name}0000000{i}.jpg", name)
            for name in fewshot_published.MINIIMAGENET[split][:2]
            for i in range(3)
        ]
        for name, _ in rows:
            picture(tmp_path / "root" / "miniimagenet" / "images" / name)
        with open(tmp_path / "root" / "miniimagenet" / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("filename", "label"), *rows])
    classes, pixels = prepared("miniimagenet", tmp_path)
    assert classes["train"] == [[name, 3] for name in fewshot_published.MINIIMAGENET["train"][:2]]
    assert len(pixels["test"]) == 6


def test_import_fc100(tmp_path):
    """Pickles as Python 2 wrote them: byte strings, protocol 2. Both parts merged, split by superclass."""

    def python2(value):
        """Protocol 2, str as SHORT_BINSTRING, as Python 2 writes it."""
        return pickle.dumps(value, protocol=2).replace(b"X\x04\x00\x00\x00data", b"U\x04data")

    def part(n):
        fine = np.tile(np.arange(100), n)
        pixels = np.repeat(fine.astype(np.uint8), 3072).reshape(-1, 3072).copy()
        pixels[:, 1024:2048] = 200  # green plane
        return python2({"data": pixels, "fine_labels": fine.tolist(), "coarse_labels": (fine // 5).tolist()})

    write_tar(
        tmp_path / "root" / "cifar-100-python.tar.gz",
        {
            "cifar-100-python/meta": python2({"fine_label_names": [f"class {i}" for i in range(100)]}),
            "cifar-100-python/train": part(2),
            "cifar-100-python/test": part(1),
        },
    )
    classes, pixels = prepared("fc100", tmp_path, size=32)
    assert [len(classes[s]) for s in fewshot_published.SPLITS] == [60, 20, 20]
    assert [name for name, _ in classes["val"]] == [
        f"class {i}" for s in (8, 11, 13, 16) for i in range(5 * s, 5 * s + 5)
    ]
    assert {n for _, n in classes["test"]} == {3}
    assert pixels["train"][0, 0, 0].tolist() == [5, 200, 5]  # class 5 is the first of superclass 1


@pytest.mark.skipif(not FACTS.is_dir(), reason="needs the reference split lists")
def test_class_splits_are_the_reference(tmp_path):
    want = json.loads((FACTS / "fc100.json").read_text())["splits"]
    for split, superclasses in fewshot_published.FC100.items():
        assert sorted(c["coarse_id"] for c in want[split]) == sorted(superclasses)
    want = json.loads((FACTS / "miniimagenet_splits.json").read_text())["splits"]
    assert {s: sorted(names) for s, names in want.items()} == {
        s: sorted(n) for s, n in fewshot_published.MINIIMAGENET.items()
    }
    want = json.loads((FACTS / "cub_sorted_rs123_split.json").read_text())["splits"]
    assert (
        fewshot_published.split_by_fraction(sorted(name for names in want.values() for name in names)) == want
    )


def test_import_cub(tmp_path):
    write_tar(
        tmp_path / "root" / "CUB_200_2011.tgz",
        {"CUB_200_2011/README": b"", "attributes.txt": b""}
        | {
            f"CUB_200_2011/images/{name}/Bird_{i}_{n:04d}.jpg": picture(None)
            for i, name in enumerate(cub_names())
            for n in range(2)
        },
    )
    classes, pixels = prepared("cub", tmp_path)
    assert [len(classes[s]) for s in fewshot_published.SPLITS] == [140, 30, 30]
    assert sorted(name for s in fewshot_published.SPLITS for name, _ in classes[s]) == cub_names()
    assert pixels["train"].shape == (280, 8, 8, 3)


def test_import_celeba(tmp_path, capsys):
    names = [f"{i:06d}.jpg" for i in range(1, 10)]
    write_zip(
        tmp_path / "root" / "celeba" / "img_align_celeba.zip",
        {f"img_align_celeba/{name}": picture(None, colour=(20 * i, 0, 1)) for i, name in enumerate(names)},
    )
    table = tmp_path / "root" / "celeba" / "list_eval_partition.txt"
    table.write_text("".join(f"{name} {(0, 0, 1, 2)[i % 4]}\n" for i, name in enumerate(names)))
    classes, pixels = prepared("celeba", tmp_path)
    assert classes == {"train": [["all", 5]], "val": [["all", 2]], "test": [["all", 2]]}
    for split, rows in (("train", (0, 1, 4, 5, 8)), ("val", (2, 6)), ("test", (3, 7))):
        assert pixels[split][:, 0, 0, 0].tolist() == [20 * i for i in rows]
    table.write_text("000001.jpg 3\n")
    fails(
        capsys,
        lambda: fewshot_published.import_celeba([table.with_name("img_align_celeba.zip"), table]),
        "not of the form",
    )
    table.write_text("000099.jpg 0\n")
    fails(
        capsys,
        lambda: fewshot_published.import_celeba([table.with_name("img_align_celeba.zip"), table]),
        "lacks 000099.jpg",
    )
    table.write_text("000001.jpg 0\n")
    fails(
        capsys,
        lambda: fewshot_published.import_celeba([table.with_name("img_align_celeba.zip"), table]),
        "lists 1 of the 9",
    )
    fails(
        capsys, lambda: fewshot_cache.prepare("celeba", 8, tmp_path / "none", tmp_path / "cache2"), "by hand"
    )


def test_import_aircraft(tmp_path):
    """All 100 variants, names with slash and space; the banner is gone; F/A-18 stays a test class."""
    facts = FACTS / "aircraft_mmaml_split.json"
    want = json.loads(facts.read_text())["splits"] if facts.exists() else None
    names = (
        sorted(name for split in want.values() for name in split)
        if want
        else [f"Type {i}/B" for i in range(100)]
    )
    photo = Image.new("RGB", (60, 60), (0, 0, 255))
    photo.paste((255, 0, 0), (0, 40, 60, 60))  # the banner: the lowest 20 pixels
    file = io.BytesIO()
    photo.save(file, "PNG")
    top, numbers = "fgvc-aircraft-2013b/data", [f"{i:07d}" for i in range(200)]
    lists = {
        part: "".join(f"{n} {names[i % 100]}\n" for i, n in enumerate(numbers) if i // 100 == k).encode()
        for k, part in enumerate(("trainval", "test"))
    }
    write_tar(
        tmp_path / "root" / "aircraft" / "fgvc-aircraft-2013b.tar.gz",
        {
            f"{top}/variants.txt": "\n".join(names).encode(),
            **{f"{top}/images/{n}.jpg": file.getvalue() for n in numbers},
            **{f"{top}/images_variant_{part}.txt": lines for part, lines in lists.items()},
        },
    )
    classes, pixels = prepared("aircraft", tmp_path)
    assert [len(classes[s]) for s in fewshot_published.SPLITS] == [70, 15, 15]
    assert {n for s in fewshot_published.SPLITS for _, n in classes[s]} == {2}
    assert all((pixels[s] == [0, 0, 255]).all() for s in fewshot_published.SPLITS)
    for split in (
        fewshot_published.SPLITS
    ):  # class folders are taken as they are: somebody may have cut the banner already
        path = tmp_path / "folders" / "aircraft" / split / "a" / "1.png"
        path.parent.mkdir(parents=True)
        photo.save(path)
    folder = fewshot_cache.prepare("aircraft", 60, tmp_path / "folders", tmp_path / "cache")
    assert np.load(folder / "train.npy")[0, -1, 0].tolist() == [255, 0, 0]
    if want:
        assert fewshot_published.split_by_fraction(names) == want
        assert "F/A-18" in [name for name, _ in classes["test"]]


@pytest.mark.parametrize("form", ["folders", "zips", "zips with a folder inside"])
def test_class_folders_of_your_own(tmp_path, form):
    for split, colour in zip(fewshot_published.SPLITS, ((9, 0, 0), (0, 9, 0), (0, 0, 9))):
        inside = f"{split}/" if "inside" in form else ""
        files = {
            f"{inside}{split} {c}/{i}.webp": picture(None, colour=colour) for c in range(3) for i in (1, 2)
        }
        if form == "folders":
            for name, content in files.items():
                path = tmp_path / "root" / "Mine" / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        else:
            write_zip(
                tmp_path / "root" / "Mine" / f"{split}.zip", files | {"Thumbs.db": b"", ".hidden.png": b""}
            )
    classes, pixels = prepared("mine", tmp_path)
    assert [name.rpartition("/")[2] for name, _ in classes["train"]] == ["train 0", "train 1", "train 2"]
    assert pixels["val"][0, 0, 0].tolist() == [0, 9, 0]


def test_decode_takes_any_depth():
    for mode, value, want in (
        ("1", 1, 255),
        ("L", 200, 200),
        ("I;16", 200 * 256 + 7, 200),
        ("P", 0, 0),
        ("RGBA", (9, 9, 9, 255), 9),
    ):
        file = io.BytesIO()
        Image.new(mode, (4, 4), value).save(file, "PNG")
        assert decode(file.getvalue(), 4, "mine").pixels[0, 0].tolist() == [want] * 3, mode
        assert decode(file.getvalue(), 4, "omniglot").pixels[0, 0].tolist() == [255 - want], mode


def test_cache_is_found_again_and_never_stale(tmp_path, monkeypatch, capsys):
    root, cache = tmp_path / "root", tmp_path / "cache"
    for number, split in enumerate(fewshot_published.SPLITS):
        picture(root / "mine" / split / "a" / "1.png", colour=(1, 2, number))
    first = fewshot_cache.prepare("mine", 8, root, cache)
    with monkeypatch.context() as patch:
        patch.setattr(fewshot_cache, "build_cache", lambda *_: pytest.fail("built again"))
        assert fewshot_cache.prepare("mine", 8, root, cache) == first
    assert fewshot_cache.prepare("mine", 9, root, cache) != first
    picture(root / "mine" / "train" / "a" / "1.png", size=20, colour=(7, 7, 8))
    second = fewshot_cache.prepare("mine", 8, root, cache)
    assert second != first
    assert (np.load(second / "train.npy") == (7, 7, 8)).all()
    (root / "mine").rename(tmp_path / "away")  # without the source, the newest cache serves
    os.utime(second / "classes.json")
    assert fewshot_cache.prepare("mine", 8, root, cache) == second
    assert f"taken from the cache {second}" in capsys.readouterr().err


def test_a_copied_zip_is_the_same_data(tmp_path):
    for name, content in (("one", b"1"), ("two", b"1"), ("three", b"2")):
        write_zip(tmp_path / name / "train.zip", {"a/1.png": content})
    os.utime(tmp_path / "two" / "train.zip", (1, 1))
    one, two, three = (
        fewshot_archives.fingerprint([tmp_path / name / "train.zip"]) for name in ("one", "two", "three")
    )
    assert one == two != three
    (tmp_path / "one" / "train.zip").write_bytes(b"PK damaged")
    damaged = fewshot_archives.fingerprint([tmp_path / "one" / "train.zip"])
    os.utime(tmp_path / "one" / "train.zip", (1, 1))
    assert one != damaged != fewshot_archives.fingerprint([tmp_path / "one" / "train.zip"])


@real("omniglot", "miniimagenet", "fc100")
@pytest.mark.parametrize(
    "mode, classes, images",
    [("omniglot", (1028, 172, 423), 20), ("miniimagenet", (64, 16, 20), 600), ("fc100", (60, 20, 20), 600)],
)
def test_real_images(mode, classes, images, tmp_path):
    """Counts, splits and a look at the pixels (the cache of 28 px is kept between test runs)."""
    folder = fewshot_cache.prepare(mode, 28, ROOT, HERE / ".cache")
    found = json.loads((folder / "classes.json").read_text())
    assert tuple(len(found[s]) for s in fewshot_published.SPLITS) == classes
    assert {n for s in fewshot_published.SPLITS for _, n in found[s]} == {images}
    if mode == "miniimagenet":
        assert {s: sorted(name for name, _ in found[s]) for s in fewshot_published.SPLITS} == {
            s: sorted(names) for s, names in fewshot_published.MINIIMAGENET.items()
        }
    pixels = Episodes([mode], "test", 5, 5, 15, 28, root=ROOT, cache_dir=HERE / ".cache").tasks(0, 8).query_x
    low, high = (0.02, 0.2) if mode == "omniglot" else (0.3, 0.7)
    assert low < pixels.mean() < high
    assert pixels.std() > 0.15
