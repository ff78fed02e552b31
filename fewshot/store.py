"""Cache folders: built beside their place and renamed when whole, checked whenever they are opened.

A cache folder holds arrays, `<split>.npy` and others, classes.json ({split: [[class, number of images]]}), and
checksums.json, which is written last: for each file its length and a CRC-32 of each MiB.

Several processes, containers or machines may build one cache on one file system. Each builds in a folder of its own,
and the first rename counts. A folder that nobody has written to for a day is the rest of a killed builder.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from fewshot.files import fail

BLOCK = 1 << 20  # bytes under one checksum
SAMPLED = 8  # blocks of each file that a check reads, unless all are asked for
STALE_AFTER = 24 * 3600  # seconds without a sign of life
# What killed builders leave: ".<cache folder>.<8 characters>[.old].building"; in earlier versions ".<cache folder>.<process>".
UNFINISHED = re.compile(r"\..+-\d+-(?:[0-9a-f]{12}\.\d+|\w+\.\w{8}(?:\.old)?\.building)")
CHECKSUMS = "checksums.json"


# -------------------------------------------------------------------------------------------------- building


@contextlib.contextmanager
def building(folder):
    """Give a new folder to write the files of a cache to; when the block ends, seal it and rename it to `folder`.

    Exits with one line if something cannot be written, or at Ctrl-C; then nothing is left.
    """
    folder = Path(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".building", dir=folder.parent))
        temporary.chmod(0o777 & ~current_umask())  # mkdtemp's folders are private
        sweep(folder.parent, temporary)
        yield temporary
        seal(temporary)
        publish(temporary, folder)
    except OSError as error:
        gone = temporary is not None and not temporary.exists() and not folder.exists()
        why = error.strerror or str(error)
        if gone:
            why = "it was removed while it was built"
        fail(f"cannot write the cache {folder} ({why}): make room or choose another --cache-dir")
    except MemoryError:
        fail(
            f"not enough memory to build the cache {folder}: choose a smaller --image-size, or end other programs"
        )
    except KeyboardInterrupt:
        fail(
            f"interrupted while building the cache {folder}: nothing is left of it; the same command begins again"
        )
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def current_umask():
    """The permissions that this process takes away from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def beat(temporary):
    """Give a sign of life, so that no other builder takes the folder for a dead one's."""
    os.utime(temporary)


def write_array(path, array):
    """Write an array as .npy, to the disk itself."""
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def write_json(path, content):
    """Write plain values as JSON, to the disk itself."""
    with open(path, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def seal(temporary):
    """Write checksums.json, of all files that are there."""
    files = {path.name: checksums(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / CHECKSUMS, {"files": files})


def checksums(path):
    """The length of a file, and a CRC-32 of each MiB of it."""
    blocks = []
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            blocks.append(zlib.crc32(block))
    return {"bytes": path.stat().st_size, "crc32": blocks}


def publish(temporary, folder):
    """Rename a finished folder to its place; a sound one that stands there already, of another builder, stays."""
    for _ in range(10):
        try:
            os.rename(temporary, folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if not problem(folder):
            return
        old = temporary.with_name(f"{temporary.name.removesuffix('.building')}.old.building")
        with contextlib.suppress(OSError):  # another builder was faster
            os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    raise OSError(f"{folder} is damaged and cannot be replaced")


def sweep(cache_dir, mine):
    """Remove what killed builders left: folders with a name of ours in which nothing was written for a day.

    mine: a folder made just now; its time is the file system's, whatever the clocks of the machines say.
    """
    now = mine.stat().st_mtime
    for path in cache_dir.iterdir():
        if not UNFINISHED.fullmatch(path.name) or path == mine:
            continue
        with contextlib.suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in [path, *path.iterdir()])
            if path.is_dir() and now - newest > STALE_AFTER:
                shutil.rmtree(path, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- opening


def needs_building(folder):
    """Whether a cache is not there, or damaged; of a damaged one, say so."""
    if not folder.exists():
        return True
    wrong = problem(folder)
    if wrong:
        print(
            f"note: the cache {folder} is not as it was written ({wrong}): it is made again", file=sys.stderr
        )
    return bool(wrong)


def problem(folder, full=False):
    """Find what is wrong with a cache folder -> one phrase, or "" if it is sound.

    Checks that each file is there and has its length; that <split>.npy holds images, as many as classes.json counts; and
    checksums, of some blocks of each file, drawn at random, or of all if `full`.
    """
    folder = Path(folder)
    try:
        sealed = json.loads((folder / CHECKSUMS).read_text())["files"]
        for name, of in sealed.items():
            wrong = problem_of_file(folder / name, of, full)
            if wrong:
                return f"{name} {wrong}"
        classes = json.loads((folder / "classes.json").read_text())
        return problem_of_arrays(folder, sealed, classes)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} or classes.json is damaged"


def problem_of_file(path, of, full):
    """What is wrong with one file, as its checksums say."""
    length = path.stat().st_size
    if length != of["bytes"]:
        return f"has {length} bytes, not {of['bytes']}"
    numbers = range(len(of["crc32"]))
    if not full and len(numbers) > SAMPLED:
        numbers = random.SystemRandom().sample(numbers, SAMPLED)
    with open(path, "rb") as file:
        for number in numbers:
            file.seek(number * BLOCK)
            if zlib.crc32(file.read(BLOCK)) != of["crc32"][number]:
                return f"has other content than when it was written (MiB {number})"
    return ""


def problem_of_arrays(folder, sealed, classes):
    """What is wrong with the arrays of images, as classes.json says."""
    for split, counted in classes.items():
        images = sum(count for _, count in counted)
        if f"{split}.npy" not in sealed:
            return f"{split}.npy is missing"
        array = np.load(folder / f"{split}.npy", mmap_mode="r")
        if array.dtype != np.uint8 or array.ndim != 4 or len(array) != images:
            return f"{split}.npy is {array.dtype} {array.shape}, which is not {images} images"
    return ""


def shared(folder):
    """What images or classes the splits of a cache share, as found when it was built, in words; "" if none."""
    try:
        return json.loads((Path(folder) / "shared.json").read_text())
    except OSError:  # the cache of an earlier version, or of synthetic images
        return ""


def content_of(folder):
    """A hash of what a cache holds: the same images and classes have the same, whatever files they were made from.

    Drawn images are known by their name: another processor may round a pixel differently.
    """
    folder = Path(folder)
    if folder.name.startswith(("synthetic-", "scenes-")):
        return folder.name
    try:
        files = json.loads((folder / CHECKSUMS).read_text())["files"]
        text = json.dumps(files, sort_keys=True)
    except OSError:  # of an earlier version, which is known by its name
        text = folder.name
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_split(folder, split):
    """Open one split of a cache -> [[class, number of images]], and the images (n, S, S, C), mapped into memory.

    The list is empty, and the images are None, if the cache has no such split.
    """
    classes = json.loads((folder / "classes.json").read_text()).get(split, [])
    if not classes:
        return classes, None
    return classes, torch.from_numpy(np.load(folder / f"{split}.npy", mmap_mode="c"))
