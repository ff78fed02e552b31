"""Tests: hard knocks for the data layer. Each case is a kind of public bug report about image folders and caches."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data import Episodes
from fewshot import cache as fewshot_cache
from fewshot import downloads, store
from fewshot.cache import prepare
from fewshot.decode import decode
from fewshot.names import canonical_mode, user_path
from tests.helpers import HERE, fails, here, picture, write_zip

SPLITS = ("train", "val", "test")


def class_folders(root, mode="mine", classes=3, images=4, size=12):
    """Write a small data set of class folders of noise -> its folder."""
    seed = 0
    for split in SPLITS:
        for c in range(classes):
            for i in range(images):
                picture(root / mode / split / f"{split}{c}" / f"{i:02}.png", size=size, seed=seed)
                seed += 1
    return root / mode


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------- pixels


def drawing(mode, ink, ground=(0, 0, 0, 0)):
    """A line of `ink` on transparent ground."""
    image = Image.new("RGBA", (16, 16), ground)
    ImageDraw.Draw(image).line((2, 3, 13, 12), ink, 2)
    if mode == "P":
        return image.convert("RGB").quantize(4), {"transparency": 0}
    return image.convert(mode), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("set_name", ["mine", "omniglot"])
def test_transparent_ground_is_white(mode, set_name):
    """Black strokes on transparent ground: what is hidden under alpha 0 does not show."""
    image, options = drawing(mode, (0, 0, 0, 255), ground=(77, 200, 3, 0))
    pixels = decode(encoded(image, **options), 16, set_name).pixels
    paper, ink = pixels[0, 15].tolist(), pixels.reshape(-1, pixels.shape[-1])
    if set_name == "omniglot":
        assert paper == [0]
        assert ink.max() == 255
    else:
        assert paper == [255] * 3
        assert ink.min() == 0


def test_palettes_and_gifs_with_transparency():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([9, 9, 9, 200, 30, 30] + [0] * 762)
    image.paste(1, (0, 0, 4, 8))
    for kind in ("PNG", "GIF"):
        for transparency in (0, bytes([0, 255])) if kind == "PNG" else (0,):
            pixels = decode(encoded(image, kind, transparency=transparency), 8, "mine").pixels
            assert pixels[0, 7].tolist() == [255] * 3
            assert pixels[0, 0].tolist() == [200, 30, 30]


def test_a_white_drawing_on_transparent_ground_is_seen():
    image, _ = drawing("RGBA", (255, 255, 255, 255))
    pixels = decode(encoded(image), 16, "mine").pixels
    assert pixels.min() == 0
    assert pixels.max() == 255


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation, bright", [(3, "below"), (6, "right"), (8, "left"), (2, "above")])
def test_photographs_stand_upright(kind, orientation, bright):
    values = np.zeros((16, 16, 3), np.uint8)
    values[:8] = 255
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels = decode(encoded(Image.fromarray(values), kind, exif=exif), 16, "mine").pixels.astype(float)
    sides = {"above": pixels[:4], "below": pixels[12:], "left": pixels[:, :4], "right": pixels[:, 12:]}
    assert max(sides, key=lambda side: sides[side].mean()) == bright


@pytest.mark.parametrize(
    "values, want, said",
    [
        (np.array([[0, 255], [100, 7]], np.int32), [[0, 255], [100, 7]], "0 to 255"),
        (np.array([[0, 65535], [25700, 257]], np.int32), [[0, 255], [100, 1]], "0 to 65535"),
        (np.array([[-50, 1000000], [0, 5]], np.int32), [[0, 255], [0, 0]], "smallest"),
        (np.array([[0, 1], [0.5, 0.25]], np.float32), [[0, 255], [128, 64]], "0 to 1"),
        (np.array([[0, 200], [50, 100]], np.float32), [[0, 200], [50, 100]], "0 to 255"),
    ],
)
def test_numbers_of_any_type_are_scaled_to_the_screen(values, want, said):
    decoded = decode(encoded(Image.fromarray(values), "TIFF"), 2, "mine")
    assert np.abs(decoded.pixels[..., 0].astype(int) - want).max() <= 1
    assert said in decoded.note


def test_numbers_that_are_none():
    values = np.array([[0, np.nan], [1, 1]], np.float32)
    assert "not a number" in decode(encoded(Image.fromarray(values), "TIFF"), 2, "mine").error


def test_sixteen_bits():
    values = np.array([[0, 65535], [32768, 256]], np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = decode(encoded(Image.fromarray(values), kind), 2, "mine")
        assert decoded.pixels[..., 0].tolist() == [[0, 255], [128, 1]]
        assert not decoded.note


def test_first_frame_of_animations():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for kind in ("GIF", "WEBP", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(content, 8, "mine").pixels[0, 0].tolist() == [200, 0, 0]


def test_only_pictures_of_pixels_are_tried(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    decoded = decode(postscript, 8, "mine")
    assert decoded.pixels is None
    assert "no image in a format that is read here" in decoded.error


def test_empty_images_are_refused(tmp_path, capsys):
    folder = class_folders(tmp_path / "root")
    for file in (folder / "val" / "val1").iterdir():
        picture(file, colour=(0, 0, 0))
    fails(
        capsys,
        lambda: prepare("mine", 8, tmp_path / "root", tmp_path / "c"),
        "val/val1/00.png",
        "single value",
    )
    class_folders(tmp_path / "root")
    for c in range(3):  # one in four, though no class is all of it
        picture(folder / "train" / f"train{c}" / "00.png", colour=(255, 255, 255))
        picture(folder / "test" / f"test{c}" / "00.png", colour=(0, 0, 0))
    fails(
        capsys, lambda: prepare("mine", 8, tmp_path / "root", tmp_path / "c"), "5 more of 36", "single value"
    )
    assert not list((tmp_path / "c").iterdir())


# -------------------------------------------------------------------------------------------------- splits


def test_classes_and_files_in_two_splits(tmp_path, capsys):
    folder = class_folders(tmp_path / "root")
    shutil.copytree(folder / "train" / "train1", folder / "test" / "train1")
    call = lambda **more: prepare("mine", 8, tmp_path / "root", tmp_path / "c", **more)
    fails(capsys, call, "class train1 stands in train and in test", "--allow-shared-classes")
    fails(capsys, call, "class train1 stands in train and in test")  # and again, from the cache
    assert call(allow_shared=True).is_dir()
    (folder / "test" / "train1").rename(folder / "test" / "other")
    fails(capsys, call, "train1/00.png", "other/00.png", "same file in two splits")
    assert call(allow_shared=True).is_dir()


def test_one_copied_file_is_no_more_than_a_note(tmp_path, capsys):
    folder = class_folders(tmp_path / "root", images=40)
    shutil.copy(folder / "train" / "train1" / "00.png", folder / "test" / "test0" / "00.png")
    assert prepare("mine", 8, tmp_path / "root", tmp_path / "c").is_dir()
    assert "same file in two splits; there are few of them" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("Train", "validation", "TEST"), ("training", "valid", "testing")])
def test_split_folders_by_other_names(tmp_path, names):
    folder = class_folders(tmp_path / "root")
    want = (prepare("mine", 8, tmp_path / "root", tmp_path / "c") / "classes.json").read_text()
    for split, name in zip(SPLITS, names):
        (folder / split).rename(folder / "x")
        (folder / "x").rename(folder / name)
    assert (prepare("mine", 8, tmp_path / "root", tmp_path / "c") / "classes.json").read_text() == want


def test_one_split_by_two_names(tmp_path, capsys):
    folder = class_folders(tmp_path / "root")
    shutil.copytree(folder / "val", folder / "Validation")
    fails(capsys, lambda: prepare("mine", 8, tmp_path / "root", tmp_path / "c"), "both a val split")


def test_two_depths_thumbnails_and_strays(tmp_path, capsys):
    folder = class_folders(tmp_path / "root", images=12)
    classes = lambda: json.loads(
        (prepare("mine", 8, tmp_path / "root", tmp_path / "c") / "classes.json").read_text()
    )
    want = classes()
    for junk in ("@eaDir", ".thumbnails", "__MACOSX", ".ipynb_checkpoints"):
        picture(folder / "train" / "train0" / junk / "00.png")
        picture(folder / "train" / junk / "00.png")
    picture(folder / "train" / "preview.png")
    assert classes() == want
    assert "preview.png lies beside the class folders: left out" in capsys.readouterr().err
    (folder / "train" / "preview.png").unlink()
    (folder / "train" / "train0" / "more").mkdir()
    for i in range(6):
        (folder / "train" / "train0" / f"{i:02}.png").rename(
            folder / "train" / "train0" / "more" / f"{i:02}.png"
        )
    fails(capsys, classes, "two depths", "train/train0/more")


def test_images_without_class_folders(tmp_path, capsys):
    for i, split in enumerate(SPLITS):
        for j in range(3):
            picture(tmp_path / "root" / "mine" / split / f"{j}.png", seed=10 * i + j)
    fails(capsys, lambda: prepare("mine", 8, tmp_path / "root", tmp_path / "c"), "lie in no class folder")


def test_zips_with_backslashes(tmp_path):
    for i, split in enumerate(SPLITS):
        files = {
            f"{split}\\{split}{c}\\{j}.png": picture(None, seed=100 * i + 10 * c + j)
            for c in range(2)
            for j in range(2)
        }
        write_zip(tmp_path / "root" / "mine" / f"{split}.zip", files)
    folder = prepare("mine", 8, tmp_path / "root", tmp_path / "c")
    assert json.loads((folder / "classes.json").read_text())["val"] == [["val0", 2], ["val1", 2]]


def test_every_suffix_that_is_read(tmp_path):
    folder = class_folders(tmp_path / "root")
    image = Image.open(folder / "test" / "test0" / "00.png")
    image.save(folder / "test" / "test0" / "00.jfif", "JPEG")
    image.convert("L").save(folder / "test" / "test0" / "01.pgm")
    (folder / "test" / "test0" / "00.png").unlink()
    (folder / "test" / "test0" / "01.png").unlink()
    classes = json.loads((prepare("mine", 8, tmp_path / "root", tmp_path / "c") / "classes.json").read_text())
    assert classes["test"][0] == ["test0", 4]


def test_links_that_lead_nowhere_or_back(tmp_path):
    folder = class_folders(tmp_path / "root")
    want = (prepare("mine", 8, tmp_path / "root", tmp_path / "c") / "classes.json").read_text()
    (folder / "train" / "train0" / ".#notes").symlink_to("user@host.123:456")
    (folder / "train" / "train0" / "gone.png").symlink_to("nowhere.png")
    (folder / "train" / "train0" / "up").symlink_to("..")
    assert (prepare("mine", 8, tmp_path / "root", tmp_path / "c") / "classes.json").read_text() == want


def test_a_pipe_among_the_images(tmp_path, capsys):
    folder = class_folders(tmp_path / "root")
    os.mkfifo(folder / "train" / "train0" / "pipe.png")
    classes = json.loads((prepare("mine", 8, tmp_path / "root", tmp_path / "c") / "classes.json").read_text())
    assert classes["train"][0] == ["train0", 4]


def test_a_file_browsers_leavings_are_not_other_data(tmp_path):
    folder = class_folders(tmp_path / "root")
    first = prepare("mine", 8, tmp_path / "root", tmp_path / "c")
    (folder / "train" / ".DS_Store").write_bytes(b"x")
    assert prepare("mine", 8, tmp_path / "root", tmp_path / "c") == first


# --------------------------------------------------------------------------------------------------- names


def test_names_that_mean_the_same_folder(tmp_path, capsys):
    root = tmp_path / "root"
    class_folders(root)
    for name in ("mine", "mine/", "MINE", "mine//", str(root / "mine"), f"{root}/mine/"):
        assert canonical_mode(name, root) == "mine"
    for name in ("", ".", "..", "a/b", "../root2/x", "\0", "x" * 240):
        fails(capsys, lambda name=name: canonical_mode(name, root), "--modes")


def test_own_folders_win_over_aliases(tmp_path):
    root = tmp_path / "root"
    assert canonical_mode("bird", root) == "cub"
    for name in ("bird", "cifar"):
        class_folders(root, name)
        assert canonical_mode(name, root) == name
        assert json.loads((prepare(name, 8, root, tmp_path / "c") / "classes.json").read_text())["val"]
    class_folders(root, "CUB")
    assert len(json.loads((prepare("CUB", 8, root, tmp_path / "c") / "classes.json").read_text())["val"]) == 3


@pytest.mark.parametrize("name", ["**", "*", "m[i]ne", "mi?e"])
def test_globs_are_no_names(tmp_path, capsys, name):
    class_folders(tmp_path / "root")
    prepare("mine", 8, tmp_path / "root", tmp_path / "c")
    fails(capsys, lambda: prepare(name, 8, tmp_path / "empty", tmp_path / "c"), "no data set")


def test_home(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_path("~/runs") == "/somewhere/runs"
    fails(capsys, lambda: user_path("~nobody_of_this_name/runs"), "no such home folder")


# --------------------------------------------------------------------------------------------------- cache


def damage(folder, how):
    """Damage a cache folder."""
    file = folder / ("classes.json" if "classes" in how else "test.npy")
    content = file.read_bytes()
    if how.startswith("remove"):
        file.unlink()
    elif how.startswith("cut"):
        file.write_bytes(content[: len(content) // 2])
    elif how.startswith("flip"):
        at = len(content) // 2
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "other dtype":
        np.save(file, np.load(file).astype(np.float32))
    elif how == "half":
        np.save(file, np.load(file)[: len(np.load(file)) // 2])
    elif how == "other sums":
        (folder / store.CHECKSUMS).write_text('{"files": 3}')


DAMAGES = [
    *("remove classes", "remove test", "cut classes", "cut test", "flip classes", "flip test"),
    *("other dtype", "half", "other sums"),
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_cache_is_made_again_or_named(tmp_path, capsys, how):
    class_folders(tmp_path / "root")
    folder = prepare("mine", 8, tmp_path / "root", tmp_path / "c")
    want = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder, how)
    assert prepare("mine", 8, tmp_path / "root", tmp_path / "c") == folder
    assert "is not as it was written" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == want
    damage(folder, how)
    done = here("data.py", "verify", "mine", "--cache-dir", tmp_path / "c")
    assert done.returncode == 1
    assert "as it was written" not in done.stdout
    with pytest.raises(SystemExit):  # no images to make it from
        prepare("mine", 8, tmp_path / "empty", tmp_path / "c")
    assert "is not used" in capsys.readouterr().err or "classes" in how


def build(root, cache, results):
    results.put(str(prepare("mine", 8, root, cache)))


def test_several_builders_of_one_cache(tmp_path):
    class_folders(tmp_path / "root", images=30)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    builders = [
        context.Process(target=build, args=(tmp_path / "root", tmp_path / "c", results)) for _ in range(4)
    ]
    for builder in builders:
        builder.start()
    found = {results.get(timeout=60) for _ in builders}
    for builder in builders:
        builder.join()
    (folder,) = found
    assert not store.problem(folder, full=True)
    assert [path.name for path in (tmp_path / "c").iterdir()] == [os.path.basename(folder)]


def test_a_folder_that_goes_while_it_is_built(tmp_path, capsys, monkeypatch):
    class_folders(tmp_path / "root")

    def note(self, job, decoded):
        for path in (tmp_path / "c").glob(".*.building"):
            shutil.rmtree(path)

    monkeypatch.setattr(fewshot_cache.Seen, "note", note)
    fails(capsys, lambda: prepare("mine", 8, tmp_path / "root", tmp_path / "c"), "removed while it was built")
    assert not list((tmp_path / "c").iterdir())


def test_a_killed_decoding_process_ends_with_one_line(tmp_path):
    """Without a main guard, too: the processes that decode do not run the user's script a second time."""
    folder = class_folders(tmp_path / "root", images=2, size=100)
    for split in SPLITS:
        for i in range(700):
            os.link(folder / split / f"{split}0" / "00.png", folder / split / f"{split}0" / f"more{i:03}.png")
    script = tmp_path / "mine.py"
    script.write_text(
        "from fewshot.cache import prepare\n"
        f"print(prepare('mine', 8, {str(tmp_path / 'root')!r}, {str(tmp_path / 'c')!r}))\n"
    )
    env = dict(os.environ, PYTHONPATH=str(HERE), FEWSHOT_CORES="2")
    options = {"env": env, "cwd": HERE, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, script], **options) as parent:
        children = f"/proc/{parent.pid}/task/{parent.pid}/children"
        victim = None
        while parent.poll() is None and victim is None:
            time.sleep(0.05)
            for child in Path(children).read_text().split():
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                    victim = int(child)
        if victim is None:
            pytest.skip("one core: images are decoded in the process itself")
        os.kill(victim, signal.SIGKILL)
        try:
            _, err = parent.communicate(timeout=120)
        finally:
            parent.kill()  # where it hangs, the test fails and does not hang too
    assert parent.returncode == 2, err
    assert "was killed" in err
    assert "Traceback" not in err
    done = subprocess.run([sys.executable, script], check=False, timeout=250, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mine-8-") == 1


def test_loading_does_not_need_other_processes_where_they_are_forbidden(tmp_path, monkeypatch):
    class_folders(tmp_path / "root")
    monkeypatch.setenv("FEWSHOT_CORES", "2")
    monkeypatch.setattr(fewshot_cache, "PARALLEL_FROM", 1)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=build, args=(tmp_path / "root", tmp_path / "c", results), daemon=True)
    worker.start()
    assert results.get(timeout=60).startswith(str(tmp_path / "c"))
    worker.join()


# ----------------------------------------------------------------------------------------------- downloads


def test_two_downloads_of_one_file(tmp_path, monkeypatch):
    """The second one waits for the first, and then finds the file."""
    begun, go_on = threading.Event(), threading.Event()
    fetched = []

    def fetch_part(url, part, file_name):
        fetched.append(url)
        begun.set()
        go_on.wait(10)
        part.write_bytes(b"content")

    monkeypatch.setattr(downloads, "fetch_part", fetch_part)
    problems = []
    get = lambda: problems.append(downloads.download("x.bin", None, ["url"], tmp_path))
    threads = [threading.Thread(target=get) for _ in range(2)]
    threads[0].start()
    begun.wait(10)
    threads[1].start()
    time.sleep(0.2)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert problems == [[], []]
    assert fetched == ["url"]


def test_a_page_in_place_of_a_file_is_not_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        downloads, "fetch_part", lambda url, part, name: part.write_bytes(b"\n<!DOCTYPE html>")
    )
    fails(capsys, lambda: downloads.download("x.pkl", None, ["url"], tmp_path), "page of text", "deleted")
    assert not list(tmp_path.glob("x.pkl*"))


# ------------------------------------------------------------------------------------------------ archives


def test_what_is_missing_of_a_published_set_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fewshot_cache, "download", lambda *_: ["no network"])
    write_zip(tmp_path / "root" / "images_background.zip", {"a.png": b""})
    call = lambda: prepare("omniglot", 8, tmp_path / "root", tmp_path / "c")
    fails(
        capsys,
        call,
        "images_evaluation.zip or images_evaluation is missing",
        "images_background.zip is there",
    )


def test_a_missing_part_is_downloaded_beside_the_others(tmp_path, capsys, monkeypatch):
    asked = []

    def download(name, md5, urls, folder):
        asked.append((name, folder))
        return ["no network"]

    monkeypatch.setattr(fewshot_cache, "download", download)
    root = tmp_path / "root"
    (root / "images_background").mkdir(parents=True)  # the archive, unpacked: it counts as there
    fails(capsys, lambda: prepare("omniglot", 8, root, tmp_path / "c"), "images_evaluation.zip")
    assert asked == [("images_evaluation.zip", root)]


def test_a_folder_name_of_bytes_that_are_no_text(tmp_path):
    name = os.fsdecode(b"fl\xff")
    class_folders(tmp_path / "root", name)
    task = Episodes([name], "test", 3, 1, 2, 8, root=tmp_path / "root", cache_dir=tmp_path / "c").tasks(0, 1)
    assert task.support_x.shape == (1, 3, 3, 8, 8)


@pytest.mark.parametrize("name", ["overall", "Loss"])
def test_names_that_reports_use(tmp_path, capsys, name):
    class_folders(tmp_path / "root", name)
    fails(capsys, lambda: prepare(name, 8, tmp_path / "root", tmp_path / "c"), name, "rename the folder")


def test_files_that_fill_the_memory(tmp_path, capsys):
    path = tmp_path / "root" / "mine" / "train.zip"
    class_folders(tmp_path / "root")
    shutil.rmtree(path.with_suffix(""))
    write_zip(path, {"a/1.png": bytes(12345)})
    size, claimed = (struct.pack("<L", n) for n in (12345, (1 << 30) + 1))
    path.write_bytes(path.read_bytes().replace(size, claimed))  # the zip says that it unpacks to more
    fails(capsys, lambda: prepare("mine", 8, tmp_path / "root", tmp_path / "c"), "larger than 1 GiB")
