"""Tests: test_inputs."""

import functools
import hashlib
import http.server
import os
import pickle
import re
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import kml
from fewshot import cache as fewshot_cache
from fewshot import files as fewshot_files
from fewshot import published as fewshot_published
from fewshot.downloads import download
from tests.helpers import (
    cub_names,
    episodes,
    fails,
    miniimagenet_pickle,
    picture,
    prepared,
    run,
    write_tar,
    write_zip,
)


def nothing_left(tmp_path):
    return not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() or p.name.startswith(".")]


@pytest.mark.parametrize("damage", ["truncated", "undecodable", "empty"])
def test_bad_image(tmp_path, capsys, damage):
    for split in fewshot_published.SPLITS:
        picture(tmp_path / "root" / "mine" / split / "a" / "good.png")
    good = picture(None, size=64)
    content = {"truncated": good[: len(good) // 2], "undecodable": b"not an image", "empty": b""}[damage]
    (tmp_path / "root" / "mine" / "test" / "a" / "rotten.png").write_bytes(content)
    fails(capsys, lambda: prepared("mine", tmp_path), "rotten.png", "replace or remove")
    assert nothing_left(tmp_path)


def test_too_few_images_and_classes(cache, capsys):
    fails(capsys, lambda: episodes(cache, shots=30), "omniglot-train-00 has 40 images", "--shots")
    fails(capsys, lambda: episodes(cache, ways=17, split="val"), "16 classes, fewer than 17 ways", "--ways")
    fails(capsys, lambda: episodes(cache, modes=["omniglot", "Omniglot"]), "twice")
    fails(capsys, lambda: episodes(cache, modes=["faces"]), "faces", "choose from")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_that_climbs_out(tmp_path, capsys, kind):
    if kind == "zip":
        for split in fewshot_published.SPLITS:
            write_zip(
                tmp_path / "root" / "mine" / f"{split}.zip",
                {"a/1.png": picture(None), "../../evil.png": picture(None)},
            )
    else:
        write_tar(
            tmp_path / "root" / "CUB_200_2011.tgz", {"CUB_200_2011/images/../../../evil.jpg": picture(None)}
        )
    fails(
        capsys,
        lambda: prepared("mine" if kind == "zip" else "cub", tmp_path),
        "climbs out",
        "evil",
        "fetch it again",
    )
    assert nothing_left(tmp_path)
    assert not list(tmp_path.rglob("evil*"))


def test_broken_archives(tmp_path, capsys):
    write_tar(
        tmp_path / "root" / "CUB_200_2011.tgz",
        {f"CUB_200_2011/images/{n}/1.jpg": picture(None) for n in cub_names()},
    )
    whole = (tmp_path / "root" / "CUB_200_2011.tgz").read_bytes()
    (tmp_path / "root" / "CUB_200_2011.tgz").write_bytes(whole[: len(whole) // 2])
    fails(capsys, lambda: prepared("cub", tmp_path), "CUB_200_2011.tgz", "fetch it again")
    write_tar(
        tmp_path / "root" / "CUB_200_2011.tgz",
        {f"CUB_200_2011/images/{n}/1.jpg": picture(None) for n in cub_names()[1:]},
    )
    fails(capsys, lambda: prepared("cub", tmp_path), "199 of 200 classes", "another one")
    (tmp_path / "root" / "mine").mkdir()
    (tmp_path / "root" / "mine" / "train.zip").write_bytes(b"PK but no more")
    fails(capsys, lambda: prepared("mine", tmp_path), "train.zip", "fetch it again")
    assert nothing_left(tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


class Pointers:
    """An array of objects over bytes of the attacker's choice: following such a pointer would crash the process."""

    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), b"A" * 8)


def test_pickles_may_not_run_code(tmp_path, capfd):
    for part in ("train", "validation", "test"):
        path = tmp_path / "root" / f"mini-imagenet-cache-{part}.pkl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(
            miniimagenet_pickle(fewshot_published.MINIIMAGENET[{"validation": "val"}.get(part, part)][:3], 4)[
                1
            ]
        )
    path.with_name("mini-imagenet-cache-train.pkl").write_bytes(
        pickle.dumps({"image_data": Evil(), "class_dict": {}})
    )
    fails(capfd, lambda: prepared("miniimagenet", tmp_path), "plain containers", "system")
    path = path.with_name("mini-imagenet-cache-train.pkl")
    for content in (
        b"",
        b"\x80\x05garbage",
        pickle.dumps([1, 2]),
        pickle.dumps({"image_data": Pointers(), "class_dict": {}}),
        pickle.dumps({"image_data": np.array([Path("x")]), "class_dict": {}}),
        pickle.dumps({"image_data": np.zeros((2, 9, 9, 3)), "class_dict": {}}),
        pickle.dumps({"image_data": np.zeros((2, 9, 9, 3), np.uint8), "class_dict": {"n1": [0, 7]}}),
    ):
        path.write_bytes(content)
        fails(capfd, lambda: prepared("miniimagenet", tmp_path), "mini-imagenet-cache-train.pkl")
    assert "evil" not in capfd.readouterr().out


def test_other_split_of_miniimagenet(tmp_path, capsys):
    for split, name in zip(fewshot_published.SPLITS, fewshot_published.MINIIMAGENET["test"]):
        picture(tmp_path / "root" / "miniimagenet" / split / name / "1.png")
    fails(capsys, lambda: prepared("miniimagenet", tmp_path), "another split")


def test_an_incomplete_miniimagenet_is_refused(tmp_path, capsys, monkeypatch):
    """A copy without some of its classes or images would have another split under the same name."""
    few = {split: names[:3] for split, names in fewshot_published.MINIIMAGENET.items()}
    folder = tmp_path / "root" / "miniimagenet"
    for split, names in few.items():
        rows = [(f"{name}{i}.jpg", name) for name in names for i in range(2)]
        for name, _ in rows:
            picture(folder / "images" / name)
        table = "\n".join(",".join(row) for row in [("filename", "label"), *rows])
        (folder / f"{split}.csv").write_text(table)
    fails(capsys, lambda: prepared("miniimagenet", tmp_path), "train.csv", "3 of 64 classes")
    monkeypatch.setattr(fewshot_published, "MINIIMAGENET", few)
    whole = (folder / "test.csv").read_text()
    (folder / "test.csv").write_text(whole.rpartition("\n")[0])
    fails(capsys, lambda: prepared("miniimagenet", tmp_path), "test.csv", "5 of 6 images")
    (folder / "test.csv").write_text(whole.rpartition(",")[0])
    fails(capsys, lambda: prepared("miniimagenet", tmp_path), "test.csv", "no label")
    (folder / "test.csv").write_text(whole)
    classes, _ = prepared("miniimagenet", tmp_path)
    assert classes["test"] == [[name, 2] for name in few["test"]]


def test_full_disk(tmp_path):
    """A limit on file sizes stands for the full disk: the same OSError on the same call."""
    for split in fewshot_published.SPLITS:
        picture(tmp_path / "root" / "mine" / split / "a" / "1.png")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000, 1000))
    done = run(
        "data.py",
        "prepare",
        "mine",
        "--image-size",
        32,
        "--data-root",
        tmp_path / "root",
        "--cache-dir",
        tmp_path / "cache",
        preexec_fn=limit,
    )
    assert done.returncode == 2
    assert "make room" in done.stderr.strip().replace("\r", "\n").split("\n")[-1]
    assert nothing_left(tmp_path)


def test_atomic_write_keeps_the_old_file(tmp_path, capsys):
    fewshot_files.atomic_write(tmp_path / "a" / "b.txt", "old")
    fails(capsys, lambda: fewshot_files.atomic_write(tmp_path / "a" / "b.txt" / "c", "new"), "cannot write")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]
    fewshot_files.atomic_write(tmp_path / "a" / "t.pt", {"x": torch.ones(2)})
    assert torch.load(tmp_path / "a" / "t.pt", weights_only=True)["x"].tolist() == [1, 1]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, ranges and all; `cut` makes it hang up after so many bytes."""

    content, cut = b"", None

    def do_GET(self):
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"]).group(1))
        if first >= len(self.content):
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Length", str(len(self.content) - first))
        self.end_headers()
        self.wfile.write(self.content[first : self.cut])

    def log_message(self, *_):
        pass


def test_download_resumes_and_checks(tmp_path, capsys, monkeypatch):
    (tmp_path / "x").mkdir()
    for part in ("images_background", "images_evaluation"):
        write_zip(
            tmp_path / "x" / f"{part}.zip",
            {
                f"{part}/A{a}/character{c:02d}/{i}.png": picture(None)
                for a in range(2)
                for c in range(400)
                for i in range(1)
            },
        )
    contents = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, name = f"http://127.0.0.1:{server.server_port}/", "images_background.zip"
    Server.content, Server.cut = contents[name], 1000
    files = [(name, hashlib.md5(contents[name]).hexdigest(), [url])]
    monkeypatch.setitem(fewshot_published.DOWNLOADS, "omniglot", (files, "terms"))
    root = tmp_path / "root"
    with pytest.raises(SystemExit):
        fewshot_cache.prepare("omniglot", 8, root, tmp_path / "cache")
    said = capsys.readouterr().err
    assert "give the same command again, which continues" in said
    assert "--synthetic" in said
    assert (root / "omniglot" / f"{name}.part").stat().st_size == 1000
    Server.cut = None
    assert download(*files[0], root / "omniglot") == []  # the other 99 %
    assert (root / "omniglot" / name).read_bytes() == contents[name]
    (root / "omniglot" / name).rename(root / "omniglot" / f"{name}.part")  # cut after the last byte
    assert download(*files[0], root / "omniglot") == []
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        download("wrong.zip", "0" * 32, [url], root)
    assert stop.value.code == 2
    assert "wrong checksum" in capsys.readouterr().err.strip().split("\n")[-1]
    assert not list(root.glob("wrong*"))
    server.shutdown()
    server.server_close()
    assert len(download(*files[0], tmp_path / "nowhere")) == 1  # nobody listens any more


def test_missing_data_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        fewshot_cache,
        "DOWNLOADS",
        {"cub": ([("CUB_200_2011.tgz", None, ["http://127.0.0.1:9/"])], "terms")},
    )
    with pytest.raises(SystemExit):
        fewshot_cache.prepare("bird", 8, tmp_path / "root", tmp_path / "cache")
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert all(
        word in line for word in ("looked for", "CUB_200_2011.tgz", "127.0.0.1:9", "by hand", "--synthetic")
    )
    fails(
        capsys,
        lambda: fewshot_cache.prepare("nothing", 8, tmp_path / "root", tmp_path / "cache"),
        "'nothing'",
        "omniglot",
    )


@pytest.mark.parametrize(
    "words, said",
    [
        ("--ways 1", "--ways 1: give 2 or more"),
        ("--shots 0", "--shots"),
        ("--shots many", "--shots"),
        ("--lr nan", "--lr"),
        ("--inner-lr -1", "--inner-lr"),
        ("--conv-lr 0 0 0.05 -1", "--conv-lr -1.0: give 0 or more"),
        ("--conv-lr 0 0 nan 1", "--conv-lr nan"),
        ("--conv-lr 0.1 0.1", "--conv-lr"),
        ("--test-tasks 3", "--test-tasks"),
        ("--device tpu", "--device"),
        ("--modulation filme", "invalid choice"),
        ("--no-such-flag", "--no-such-flag"),
        ("--log-every 0", "--log-every"),
        ("--seed 99999999999999999999999", "--seed"),
        ("--device cuda:99", "choose from cpu"),
        ("--adapt modulated --modulation none", "plain MAML modulates nothing"),
        ("--embed constant --modulation none", "plain MAML has no v"),
    ],
)
def test_bad_arguments(capsys, words, said):
    fails(capsys, lambda: kml.get_args(words.split()), said)
