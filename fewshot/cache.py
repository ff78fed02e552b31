"""Find the images of a mode, decode them once, and keep them as memory-mapped arrays."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fewshot.archives import IMAGE_SUFFIXES, fingerprint
from fewshot.files import atomic_write, fail
from fewshot.published import (
    DOWNLOADS,
    LAYOUTS,
    MINIIMAGENET,
    MINIIMAGENET_IMAGES,
    SPLITS,
    download,
    import_aircraft,
    import_class_folders,
)
from fewshot.scenes import depth_folders, prepare_depth_folders, prepare_scenes
from fewshot.synthetic import prepare_synthetic

ALIASES = {"cifar": "fc100", "bird": "cub"}  # the names the released KML code uses
PARALLEL_FROM = 2000  # images; fewer are decoded before worker processes have started


def canonical_mode(name, root):
    """The mode that a name typed by a user means: any case, the released code's aliases, or a folder under the root."""
    lower = ALIASES.get(name.lower(), name.lower())
    if lower in LAYOUTS:
        return lower
    folders = [f.name for f in sorted(Path(root).iterdir()) if f.is_dir()] if Path(root).is_dir() else []
    return next((f for f in folders if f == name), next((f for f in folders if f.lower() == lower), name))


def find_source(mode, root):
    """Where the images of a mode lie -> (importer, [path]) in the order of search, or None."""
    places = [Path(root) / mode, Path(root)]
    both = [(places[0] / split, places[0] / f"{split}.zip") for split in SPLITS]
    folders = [
        folder if folder.is_dir() else packed
        for folder, packed in both
        if folder.is_dir() or packed.is_file()
    ]
    if folders:
        return import_class_folders, folders
    layouts = [LAYOUTS[mode]] if mode in LAYOUTS else []
    for layout in layouts + [MINIIMAGENET_IMAGES] * (mode == "miniimagenet"):
        for place in places:
            found = [
                next((place / name for name in names if (place / name).exists()), None)
                for names in layout.files
            ]
            if all(found):
                return layout.importer, found
    return None


def decode(content, size, mode, banner=0):
    """One image (file content or uint8 array) -> uint8 (size, size, C), C = 1 for Omniglot, else 3; or an error message.

    banner: rows of pixels to cut from the bottom.
    """
    try:
        image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else Image.fromarray(content)
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip them, not scale them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("L" if mode == "omniglot" else "RGB")
    except Exception as error:  # noqa: BLE001 (Pillow's decoders raise nearly anything on damaged files)
        return str(error) or type(error).__name__
    if banner:
        image = image.crop((0, 0, image.width, max(1, image.height - banner)))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(size, size, -1)
    return 255 - pixels if mode == "omniglot" else pixels  # ink becomes bright, paper becomes zero


def decode_one(job):
    return decode(*job)


def sweep(cache_dir):
    """Remove what a killed process left half-built: folders named after processes that are no more."""
    for path in Path(cache_dir).glob(".*.*"):
        if path.is_dir() and path.suffix[1:].isdigit() and os.name == "posix":
            try:
                os.kill(int(path.suffix[1:]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except OSError:  # alive, and another user's
                continue


def build_cache(mode, size, splits, folder, banner=0):
    """Decode every image once into `folder`: <split>.npy (n, size, size, C) and classes.json, in one rename at the end."""
    jobs = [
        (split, row, source, key)
        for split, classes in splits.items()
        for row, (source, key) in enumerate(item for images in classes.values() for item in images)
    ]
    jobs.sort(key=lambda job: (str(job[2].path), job[2].rank.get(job[3], -1)))  # in the archive's order
    for split, classes in splits.items():
        if not classes:
            fail(f"{mode}/{split}: no images ({', '.join(IMAGE_SUFFIXES)}) in class folders: put them there")
    if mode == "miniimagenet":
        for split in splits:
            for name in splits[split]:
                home = next((s for s in SPLITS if name in MINIIMAGENET[s]), split)
                if home != split:
                    fail(
                        f"mini-ImageNet: {name} stands in {split} but is a {home} class of Ravi & Larochelle: "
                        "this copy has another split; use the published files (python data.py list)"
                    )
    sweep(folder.parent)
    channels = 1 if mode == "omniglot" else 3
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = None
    if len(jobs) >= PARALLEL_FROM and workers > 1:  # processes: Pillow decodes WebP on one thread at a time
        pool = multiprocessing.get_context("spawn").Pool(
            workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)
        )
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        files, starts = {}, {}
        for split, classes in splits.items():
            files[split] = open(temporary / f"{split}.npy", "wb")  # noqa: SIM115 (closed below)
            count = sum(len(images) for images in classes.values())
            np.lib.format.write_array_header_1_0(
                files[split], {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, channels)}
            )
            starts[split] = files[split].tell()
        bar = tqdm(total=len(jobs), desc=f"{mode}: decoding to {size} px, once", unit=" images", disable=None)
        with bar:
            for first in range(0, len(jobs), 4096):  # bounds the memory: file contents wait in chunks
                chunk = jobs[first : first + 4096]
                contents = [(source.read(key), size, mode, banner) for _, _, source, key in chunk]
                results = pool.imap(decode_one, contents, chunksize=64) if pool else map(decode_one, contents)
                for (split, row, source, key), pixels in zip(chunk, results):
                    if isinstance(pixels, str):
                        bar.close()
                        fail(f"{source.path}: image {key} cannot be decoded ({pixels}): replace or remove it")
                    files[split].seek(starts[split] + row * pixels.size)
                    files[split].write(pixels.tobytes())
                    bar.update()
        for file in files.values():
            file.close()
        sizes = {
            split: [[name, len(images)] for name, images in classes.items()]
            for split, classes in splits.items()
        }
        atomic_write(temporary / "classes.json", json.dumps(sizes))
        try:
            os.replace(temporary, folder)
        except OSError:  # another process has just built the same one
            if not (folder / "classes.json").exists():
                raise
    except OSError as error:
        fail(f"cannot write the cache {folder}: {error.strerror}: make room or choose another --cache-dir")
    except KeyboardInterrupt:
        fail(
            f"interrupted while building the cache {folder}: nothing is left of it; the same command begins again"
        )
    finally:
        if pool:
            pool.terminate()
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(mode, size, root="data", cache_dir=".cache", synthetic=False):
    """The folder of decoded images of a mode, found or made (see the module's head for the order of search)."""
    mode, cache_dir = canonical_mode(mode, root), Path(cache_dir)
    if mode == "scenes":
        return (
            prepare_scenes(size, cache_dir)
            if synthetic
            else fail("scenes are ray-cast, not photographs: add --synthetic")
        )
    if synthetic:
        return prepare_synthetic(mode, size, cache_dir)
    source = find_source(mode, root)
    if source is None:
        ready = sorted(cache_dir.glob(f"{mode}-{size}-*/classes.json"), key=lambda path: path.stat().st_mtime)
        if ready:
            print(f"{mode}: nothing under {root}, taken from the cache {ready[-1].parent}", file=sys.stderr)
            return ready[-1].parent
        source = fetch(mode, root)
    importer, paths = source
    if importer is import_class_folders and (found := depth_folders(paths)):
        return prepare_depth_folders(mode, size, paths, found, cache_dir)
    folder = cache_dir / f"{mode}-{size}-{fingerprint(paths)}"
    if not (folder / "classes.json").exists():
        # The lowest 20 pixels of each published Aircraft photograph are its copyright banner.
        build_cache(mode, size, importer(paths), folder, banner=20 if importer is import_aircraft else 0)
    return folder


def fetch(mode, root):
    """Download the published archives of a mode, or say what was looked for and how to go on."""
    own = f"{Path(root) / mode}/{{train,val,test}}/<class>/<image> (or .zip of each)"
    if mode not in DOWNLOADS:
        fail(f"no data set {mode!r}: looked for {own}; known modes: {', '.join(LAYOUTS)}")
    files, terms = DOWNLOADS[mode]
    for file_name, md5, urls in files:
        if not (Path(root) / mode / file_name).exists() and (
            problems := download(file_name, md5, urls, Path(root) / mode)
        ):
            fail(
                f"{mode} ({terms}) not found: looked for {own} and {file_name} in {root} and {Path(root) / mode}; download failed: "
                f"{'; '.join(problems)}. Put the file there by hand, or add --synthetic to go on without it"
            )
    return find_source(mode, root)
