"""Find the images of a mode, decode them once, and keep them as memory-mapped arrays.

A mode is found, in this order: class folders `<root>/<mode>/{train,val,test}/<class>/<image>` or a zip of each split;
the published archives; a cache made earlier; a download.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fewshot import store
from fewshot.archives import IMAGE_SUFFIXES, fingerprint
from fewshot.decode import begin_worker, decode_all
from fewshot.downloads import download
from fewshot.files import fail
from fewshot.names import canonical_mode, mode_folders, shortened, split_places
from fewshot.parallel import cores
from fewshot.published import (
    DOWNLOADS,
    LAYOUTS,
    MINIIMAGENET,
    MINIIMAGENET_IMAGES,
    SPLITS,
    check_classes,
    import_aircraft,
    import_class_folders,
)
from fewshot.scenes import depth_folders, prepare_depth_folders, prepare_scenes
from fewshot.synthetic import prepare_synthetic

PARALLEL_FROM = 2000  # images; fewer are decoded before worker processes have started
CHUNK_FILES = 2048  # contents of so many files wait at a time,
CHUNK_BYTES = 1 << 28  # of so many bytes together
SHARED_IN_SPLIT = 0.01  # of a split's images may stand in another split too: published sets have such slips
SHARED_IN_CLASS = 0.1  # of a class's images
PLAIN_IN_SET = 0.1  # of all images may be of a single value


# -------------------------------------------------------------------------------------------------- finding


def find_source(mode, root):
    """Find where the images of a mode lie -> (importer, [path]) in the order of search, or None."""
    for name in mode_folders(mode, root):
        splits = split_places(Path(root) / name)
        if splits:
            return import_class_folders, list(splits.values())
    places = places_of_parts(mode, root)
    for layout in published_layouts(mode):
        for place in places:
            found = [first_that_exists(place, alternatives) for alternatives in layout.files]
            if all(found):
                return layout.importer, found
    return None


def published_layouts(mode):
    """The published forms of a mode, in the order of search; none of a data set of your own."""
    layouts = [LAYOUTS[mode]] if mode in LAYOUTS else []
    if mode == "miniimagenet":
        layouts.append(MINIIMAGENET_IMAGES)
    return layouts


def places_of_parts(mode, root):
    """Folders in which the parts of a published data set may lie, in the order of search."""
    own = [Path(root) / name for name in mode_folders(mode, root)]
    return [*own, Path(root)]


def first_that_exists(place, names):
    """The first of several names that a folder holds, as a path, or None."""
    return next((place / name for name in names if os.path.exists(place / name)), None)


def parts_missing(mode, root):
    """Where some parts of a published data set lie and others do not -> text of what is there and what is missing."""
    places = places_of_parts(mode, root)
    for layout in published_layouts(mode):
        for place in places:
            found = [first_that_exists(place, names) for names in layout.files]
            if any(found) and not all(found):
                there = ", ".join(str(path) for path in found if path)
                missing = [" or ".join(names) for names, path in zip(layout.files, found) if not path]
                return f"{there} is there, but {', '.join(missing)} is missing beside it"
    return ""


# ------------------------------------------------------------------------------------------------- decoding


def build_cache(mode, size, splits, folder, banner=0):
    """Decode every image once into `folder`: <split>.npy (n, size, size, C) and classes.json.

    splits: {split: {class: [(source, key)]}}. banner: rows of pixels to cut from the bottom of each image.
    """
    check_splits(mode, splits)
    jobs, counted = [], {}
    for split, classes in splits.items():
        images = [(name, source, key) for name in classes for source, key in classes[name]]
        jobs += [Job(split, row, *image) for row, image in enumerate(images)]
        counted[split] = [[name, len(images)] for name, images in classes.items()]
    jobs.sort(key=Job.place)
    seen = Seen(mode, splits)
    channels = 1 if mode == "omniglot" else 3
    about = f"{mode}: decoding to {size} px, once"
    with store.building(folder) as temporary, contextlib.ExitStack() as stack:
        arrays = {}
        for split, classes in counted.items():
            shape = sum(count for _, count in classes), size, size, channels
            arrays[split] = stack.enter_context(EmptyArray(temporary / f"{split}.npy", shape))
        bar = stack.enter_context(tqdm(total=len(jobs), desc=about, unit=" images", disable=None))
        for job, decoded in zip(jobs, decoded_jobs(jobs, size, mode, banner, temporary)):
            if decoded.error:
                bar.close()
                fail(f"{job}: the image cannot be decoded ({decoded.error}): replace or remove it")
            seen.note(job, decoded)
            arrays[job.split].write(job.row, decoded.pixels)
            bar.update()
        bar.close()
        seen.judge()
        store.write_json(temporary / "classes.json", counted)
        store.write_json(temporary / "shared.json", seen.shared)


class Job(NamedTuple):
    """An image to decode: its split, its row there, its class, and the archive and the key it is read with."""

    split: str
    row: int
    name: str
    source: object
    key: object

    def __str__(self):
        return f"{self.source.path}: {self.key}"

    def place(self):
        """Its archive and its rank there: sorted by them, images come in the order of the archives."""
        return str(self.source.path), self.source.rank.get(self.key, -1)


class EmptyArray:
    """A file .npy of uint8, written row by row in any order; it is on the disk itself when the block ends."""

    def __init__(self, path, shape):
        self.file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.start = self.file.tell()

    def write(self, row, values):
        """Write one row."""
        self.file.seek(self.start + row * values.size)
        self.file.write(values.tobytes())

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()


def check_splits(mode, splits):
    """Exit if a split is empty, or mini-ImageNet's is another one than Ravi and Larochelle's."""
    for split, classes in splits.items():
        if not classes or not any(classes.values()):
            fail(f"{mode}/{split}: no images ({', '.join(IMAGE_SUFFIXES)}) in class folders: put them there")
    if mode != "miniimagenet":
        return
    for split, classes in splits.items():
        for name in classes:
            home = next((s for s in SPLITS if name in MINIIMAGENET[s]), split)
            if home != split:
                fail(
                    f"mini-ImageNet: {name} stands in {split} but is a {home} class of Ravi & Larochelle: "
                    "this copy has another split; use the published files (python data.py list)"
                )


class Seen:
    """What the images of a set showed while they were decoded: copies in two splits, plain images, guessed ranges."""

    def __init__(self, mode, splits):
        self.mode, self.splits = mode, splits
        self.first = {}  # of each content: the first Job that has it
        self.copies = {}  # (split, class): [(Job, Job of the same content in another split)]
        self.plain = {}  # (split, class): [Job of an image of a single value]
        self.notes = collections.Counter()
        self.shared = check_classes(splits)

    def note(self, job, decoded):
        """Take note of one image."""
        first = self.first.setdefault(decoded.sha1, job)
        if first.split != job.split:
            for one in (first, job):
                self.copies.setdefault((one.split, one.name), []).append((first, job))
        if decoded.pixels.min() == decoded.pixels.max():
            self.plain.setdefault((job.split, job.name), []).append(job)
        if decoded.note:
            self.notes[decoded.note] += 1

    def judge(self):
        """Exit if images came out empty; say what was guessed; work out what the splits have in common."""
        for text, count in self.notes.items():
            tqdm.write(f"{self.mode}: {text}, which is a guess, in {count} images", file=sys.stderr)
        images = sum(len(x) for classes in self.splits.values() for x in classes.values())
        plain = sum(map(len, self.plain.values()))
        for (split, name), places in self.plain.items():
            all_of_class = len(places) == len(self.splits[split][name])
            if all_of_class or plain > PLAIN_IN_SET * images:
                fail(
                    f"{places[0]} and {plain - 1} more of {images} images are of one single value, as if they were empty: "
                    "look at them; replace or remove them"
                )
        if not self.shared and self.mode not in LAYOUTS:
            self.shared = self.copied()

    def copied(self):
        """Which files are in two splits, if so many that it is no slip -> text, or ""."""
        in_split = collections.Counter()
        worst = 0
        for (split, name), pairs in self.copies.items():
            in_split[split] += len(pairs)
            worst = max(worst, len(pairs) / len(self.splits[split][name]))
        for split, count in in_split.items():
            worst_split = count / sum(map(len, self.splits[split].values()))
            worst = max(worst, worst_split * SHARED_IN_CLASS / SHARED_IN_SPLIT)
        if not self.copies:
            return ""
        one, other = next(iter(self.copies.values()))[0]
        text = f"{one} and {other} are the same file in two splits"
        if worst > SHARED_IN_CLASS:
            return f"{text}, and not the only ones: remove the copies"
        tqdm.write(
            f"note: {self.mode}: {text}; there are few of them, so this is no more than a note",
            file=sys.stderr,
        )
        return ""


def decoded_jobs(jobs, size, mode, banner, temporary):
    """Decode images, in several processes if there are many -> their Decoded, in order."""
    workers = cores()
    portions = chunks(jobs, size, mode, banner, temporary)
    if len(jobs) < PARALLEL_FROM or workers == 1 or multiprocessing.current_process().daemon:
        for chunk in portions:
            for job in chunk:
                yield from decode_all([job])
        return
    with without_main():
        context = multiprocessing.get_context("spawn")  # no threads: Pillow decodes one WebP at a time
        others = set(multiprocessing.active_children())
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, begin_worker)
        try:
            for chunk in portions:
                yield from decoded_in(pool, chunk)
        except concurrent.futures.BrokenExecutor:
            # The pool ends its processes when one is killed, but not one that it is just starting, and then waits for it.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            fail(
                f"{mode}: a process that decodes images was killed, perhaps for want of memory: "
                "end other programs, and give the same command again"
            )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def decoded_in(pool, chunk):
    """Hand a chunk, in parts, to the pool, which starts its processes only now -> iterator of Decoded."""
    parts = [chunk[i : i + 32] for i in range(0, len(chunk), 32)]
    try:
        decoded = pool.map(decode_all, parts)
    except (OSError, ValueError) as error:
        # No process can be started, or a pipe was closed because another was killed.
        raise concurrent.futures.BrokenExecutor from error
    return itertools.chain.from_iterable(decoded)


def chunks(jobs, size, mode, banner, temporary):
    """Read files in portions that memory can hold -> lists of arguments of `decode`."""
    chunk, held = [], 0
    for job in jobs:
        content = job.source.read(job.key)
        chunk.append((content, size, mode, banner))
        held += len(content) if isinstance(content, bytes) else content.nbytes
        if len(chunk) == CHUNK_FILES or held > CHUNK_BYTES:
            store.beat(temporary)
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def without_main():
    """Let new processes not run the user's script a second time, which they would where it has no main guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# ------------------------------------------------------------------------------------------------ preparing


def prepare(mode, size, root="data", cache_dir=".cache", synthetic=False, allow_shared=False):
    """Find or make the folder of decoded images of a mode -> its path.

    allow_shared: whether the same class, or the same file, may be in two splits. Exits with status 2 where images are
    missing, damaged or not as they should be.
    """
    mode, cache_dir = canonical_mode(mode, root), Path(cache_dir)
    if mode == "scenes":
        if not synthetic:
            fail("scenes are ray-cast, not photographs: add --synthetic")
        return prepare_scenes(size, cache_dir)
    if synthetic:
        return prepare_synthetic(mode, size, cache_dir)
    source = find_source(mode, root)
    if source is None:
        ready = newest_cache(mode, size, cache_dir)
        if ready:
            print(f"{mode}: nothing under {root}, taken from the cache {ready}", file=sys.stderr)
            return checked(ready, allow_shared)
        source = fetch(mode, root)
    importer, paths = source
    if importer is import_class_folders and (found := depth_folders(paths)):
        return checked(prepare_depth_folders(mode, size, paths, found, cache_dir), allow_shared)
    folder = cache_dir / f"{shortened(mode)}-{size}-{fingerprint(paths)}"
    if store.needs_building(folder):
        # The lowest 20 pixels of each published Aircraft photograph are its copyright banner.
        build_cache(mode, size, importer(paths), folder, banner=20 if importer is import_aircraft else 0)
    return checked(folder, allow_shared)


def checked(folder, allow_shared):
    """The folder, if its splits have nothing in common; else exit and say what."""
    shared = store.shared(folder)
    if shared and not allow_shared:
        mode = folder.name.rsplit("-", 2)[0]
        fail(f"{mode}: {shared}; or allow it by --allow-shared-classes")
    return folder


def newest_cache(mode, size, cache_dir):
    """The newest sound cache of a mode whose images are not there any more, or None."""
    if not cache_dir.is_dir():
        return None
    begin = f"{shortened(mode)}-{size}-"
    found = []
    for folder in cache_dir.iterdir():
        digest = folder.name.removeprefix(begin)
        of_mode = folder.name == begin + digest and len(digest) == 12
        if of_mode and (folder / "classes.json").exists():
            found.append(folder)
    found.sort(key=lambda folder: (folder / "classes.json").stat().st_mtime, reverse=True)
    for folder in found:
        wrong = store.problem(folder)
        if not wrong:
            return folder
        print(f"note: the cache {folder} is not used ({wrong})", file=sys.stderr)
    return None


def fetch(mode, root):
    """Download the published archives of a mode, or say what was looked for and how to go on."""
    own = f"{Path(root) / mode}/{{train,val,test}}/<class>/<image> (or .zip of each)"
    if mode not in DOWNLOADS:
        there = mode_folders(mode, root)
        if there:
            fail(
                f"{Path(root) / there[0]} has no folder train, val or test (or .zip of each): looked for {own}"
            )
        fail(f"no data set {mode!r}: looked for {own}; known modes: {', '.join(LAYOUTS)}")
    files, terms = DOWNLOADS[mode]
    missing = parts_missing(mode, root)
    remedy = "Put the file there by hand, or add --synthetic to go on without it"
    home = home_of_parts(mode, root)
    for file_name, md5, urls in files:
        alternatives = next((names for names in LAYOUTS[mode].files if file_name in names), [file_name])
        if first_that_exists(home, alternatives):
            continue
        problems = download(file_name, md5, urls, home)
        if problems and missing:
            fail(f"{mode} ({terms}): {missing}; download failed: {'; '.join(problems)}. {remedy}")
        if problems:
            looked = f"looked for {own} and {file_name} in {root} and {Path(root) / mode}"
            fail(f"{mode} ({terms}) not found: {looked}; download failed: {'; '.join(problems)}. {remedy}")
    return find_source(mode, root) or fail(
        f"{mode}: {parts_missing(mode, root)}: put all parts into one folder"
    )


def home_of_parts(mode, root):
    """The folder to download into: where a part lies already, since all parts must lie in one; else the mode's own."""
    names = [name for alternatives in LAYOUTS[mode].files for name in alternatives]
    for place in places_of_parts(mode, root):
        if first_that_exists(place, names):
            return place
    return Path(root) / mode


def check_enough(where, classes, ways, shots, queries):
    """Exit if a split, named `where`, has fewer classes than N, or a class fewer images than K + Q."""
    if not classes:
        mode, _, split = where.partition("/")
        fail(f"{mode} has no {split} split: add a folder {split} of class folders beside the others")
    if len(classes) < ways:
        fail(f"{where} has {len(classes)} classes, fewer than {ways} ways: lower --ways or add classes")
    name, least = min(classes, key=lambda item: item[1])
    if least < shots + queries:
        need = f"{shots} shots + {queries} queries need {shots + queries}"
        few = f"{where}: class {name} has {least} images, {need}"
        fail(f"{few}: lower --shots or --queries, or add images")
