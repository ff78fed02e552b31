"""Data sets and episodes: the one module that the algorithm scripts share.

A few-shot *task* (an episode) is a small classification problem of its own: N classes ("ways"), K labelled *support*
images of each ("shots") to learn from, Q *query* images of each to be judged on. A *mode* is a data set that tasks are
drawn from; multimodal meta-learning draws every task from one of several modes, and does not say which.

    from data import Episodes, Task, atomic_write, fail
    episodes = Episodes(["omniglot", "miniimagenet"], "train", ways=5, shots=5, queries=15, image_size=84, seed=0)
    batch = episodes.tasks(first=0, count=10)            # Task: support_x (10, 25, 3, 84, 84), support_y (10, 25), ...

    python data.py list                                  # which modes are here, from which source
    python data.py prepare omniglot miniimagenet         # find or download, check, decode once
    python data.py show miniimagenet                     # a picture of an episode
    python data.py show scenes                           # ray-cast rooms: image, depth, normals, vanishing point

A mode is looked for in this order: your class folders `<root>/<mode>/{train,val,test}/<class>/<image>` or
`<root>/<mode>/{train,val,test}.zip`; the archives as their authors published them, in `<root>` or `<root>/<mode>`, packed or
unpacked; an earlier cache; the network. Images are decoded once, resized with LANCZOS, and memory-mapped as uint8. A cache is
named after what it was made from, so one that exists is opened at once and one of a changed source is never used.

The sampler never holds random state: task j of a mode is a pure function of its arguments, through a counter-based
generator. So every method sees the same test tasks, on every machine, and a resumed run sees the tasks it would have seen.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import hashlib
import http.client
import inspect
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

SPLITS = ("train", "val", "test")
KINDS = ("classification", "depth", "normals", "vanishing")            # high-level tasks
ALIASES = {"cifar": "fc100", "bird": "cub"}         # the names the released KML code uses
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
CACHE_FORMAT = 1                                    # raise when the decoded pixels would change
PARALLEL_FROM = 2000                                # images; fewer are decoded before worker processes have started


def fail(message):
    """Print one line naming the cause and the remedy to stderr and exit with status 2."""
    message = " ".join(f"{Path(sys.argv[0]).name}: error: {message}".split())
    tqdm.write(message, file=sys.stderr)                # clears progress bars from the line first
    raise SystemExit(2)


def atomic_write(path, content):
    """Write to `path` so that a reader, or a crash, meets the old file or the new one, never half of one.

    content: bytes, text, or tensors and plain values in a dict, which torch.load(path, weights_only=True) reads.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(content, dict):
                torch.save(content, file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # torch.save says RuntimeError when the disk is full
        with contextlib.suppress(OSError):
            temporary.unlink()
        fail(f"cannot write {path} ({error}): make room or choose another place; nothing was changed")


# ------------------------------------------------------------------------------------------------------------- cores

def cores(quotas=("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")):
    """Count the CPU cores that this process may use, by its affinity and by its container's quota -> at least 1.

    quotas: the files in which Linux says what a container may use, of control groups version 2 and 1.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for file in map(Path, quotas):
        try:
            words = file.read_text().split()                        # "200000 100000": microseconds, of so many
            if len(words) == 1:
                words += file.with_name("cpu.cfs_period_us").read_text().split()
            quota, period = (int(word) for word in words)
        except (OSError, ValueError):                               # no such file, or "max": no quota
            continue
        if quota > 0:
            allowed = min(allowed, quota // period)
    return max(1, allowed)


def in_threads(function, items, workers):
    """Yield function(item) of each item, in order. `workers` of them run at a time, each with one PyTorch thread.

    PyTorch's own way is to split each operation over the cores and to wait, after each, for the slowest core. Whole tasks
    in threads wait for each other once per batch: so they do not suffer from another program on one of the cores, and as
    each operation runs in one thread, results have the same bits for any number of workers.
    """
    with concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, items)


def recorded(function, params):
    """Make function(batch) wait for Python no more: record its kernels as a CUDA graph, and replay them.

    function: sets the gradients of `params`, a dict of tensors, and returns a tuple of tensors. Recording happens at the
    first batch; each call copies its batch to where the graph reads. All batches must have the shapes of the first. What
    a call returns is overwritten by the next one.
    """
    held, results, gradients, graph = None, None, None, torch.cuda.CUDAGraph()

    def run():
        for w in params.values():
            w.grad = None                           # so that the backward pass sets it, and does not add to it
        return function(held)

    def record(batch):
        nonlocal held, results, gradients
        held = type(batch)(*(x.clone() for x in batch))
        side = torch.cuda.Stream()                  # PyTorch asks for a few runs on another stream before recording
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            results = run()
        gradients = {k: w.grad for k, w in params.items()}

    def replay(batch):
        if held is None:
            record(batch)
        for to, x in zip(held, batch):
            to.copy_(x)
        graph.replay()
        for k, w in params.items():
            w.grad = gradients[k]
        return results
    return replay


# ------------------------------------------------------------------------------------------------------------ splits
# Whole classes are held out: val and test classes are never seen in training. Every split is a fixed list or a fixed
# rule on sorted names, hence the same on every machine (the released code shuffles directory listings instead).

# mini-ImageNet: the split of Ravi & Larochelle 2017, WordNet ids without their leading "n".
MINIIMAGENET = {"train": """
01532829 01558993 01704323 01749939 01770081 01843383 01910747 02074367 02089867 02091831 02101006 02105505 02108089
02108551 02108915 02111277 02113712 02120079 02165456 02457408 02606052 02687172 02747177 02795169 02823428 02966193
03017168 03047690 03062245 03207743 03220513 03337140 03347037 03400231 03476684 03527444 03676483 03838899 03854065
03888605 03908618 03924679 03998194 04067472 04243546 04251144 04258138 04275548 04296562 04389033 04435653 04443257
04509417 04515003 04596742 04604644 04612504 06794110 07584110 07697537 07747607 09246464 13054560 13133613
""", "val": """
01855672 02091244 02114548 02138441 02174001 02950826 02971356 02981792 03075370 03417042 03535780 03584254 03770439
03773504 03980874 09256479
""", "test": """
01930112 01981276 02099601 02110063 02110341 02116738 02129165 02219486 02443484 02871525 03127925 03146219 03272010
03544143 03775546 04146614 04149813 04418357 04522168 07613480
"""}
MINIIMAGENET = {split: [f"n{number}" for number in numbers.split()] for split, numbers in MINIIMAGENET.items()}

# FC100 (Oreshkin et al. 2018): CIFAR-100 by superclass id, so that a test class has no sibling in training; the rest trains.
FC100 = {"val": (8, 11, 13, 16), "test": (0, 7, 12, 14)}


def split_by_fraction(names):
    """MMAML's rule for CUB and Aircraft: shuffle with a fixed seed, 70 / 15 / 15 % of the classes -> {split: [name]}."""
    names = list(names)
    np.random.RandomState(123).shuffle(names)
    train, val = int(0.7 * len(names)), int(0.85 * len(names))
    return {"train": names[:train], "val": names[train:val], "test": names[val:]}


# --------------------------------------------------------------------------------------------------- reading archives

def files_under(folder):
    """All files below a folder, sorted, through links too: class folders are often links to another disk."""
    return sorted(Path(top) / name for top, _, names in os.walk(folder, followlinks=True) for name in names)


class Archive:
    """File names and contents of a zip, a tar or a folder, read in place: nothing is ever unpacked to disk.

    Names of a folder begin with the folder's own name, as they would in an archive of it.
    """

    def __init__(self, path):
        self.path, self.zip, self.tar = Path(path), None, None
        self.remedy = "complete the folder" if self.path.is_dir() else "fetch it again"
        try:
            if self.path.is_dir():
                self.names = [file.relative_to(self.path.parent).as_posix() for file in files_under(self.path)]
            elif zipfile.is_zipfile(self.path):
                self.zip = zipfile.ZipFile(self.path)
                self.names = [name for name in self.zip.namelist() if not name.endswith("/")]
            else:
                self.tar = tarfile.open(self.path)                # noqa: SIM115 (read from later on)
                self.members = {member.name: member for member in self.tar if member.isfile()}
                self.names = list(self.members)
        except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
            fail(f"{self.path}: not a complete zip or tar archive ({error}): {self.remedy}")
        for name in self.names:
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
                fail(f"{self.path}: holds a path that climbs out of the archive ({name}): do not trust it, {self.remedy}")
        self.rank = {name: i for i, name in enumerate(self.names)}      # a compressed tar is fast only read in its order

    def read(self, name):
        """The bytes of one file."""
        if name not in self.rank:
            fail(f"{self.path}: lacks {name}: {self.remedy}")
        try:
            if self.zip:
                return self.zip.read(name)
            if self.tar:
                return self.tar.extractfile(self.members[name]).read()
            return (self.path.parent / name).read_bytes()
        except (OSError, EOFError, RuntimeError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
            fail(f"{self.path}: cannot read {name} ({error}): {self.remedy}")

    def find(self, ending):
        """The one file whose path ends so, whatever folders it lies in."""
        found = [name for name in self.names if f"/{name}".endswith(f"/{ending}") and "/._" not in f"/{name}"]
        return min(found, key=len) if found else fail(f"{self.path}: lacks {ending}: {self.remedy}")

    def check(self, what, found, wanted):
        """A split is a rule over all classes: of an incomplete archive it would silently be another split."""
        if found != wanted:
            fail(f"{self.path}: holds {found} of {wanted} {what}, so the split would be another one: {self.remedy}")

    def image_names(self):
        """Names of the images, without the resource forks and thumbnails that operating systems leave in archives."""
        return [name for name in self.names if name.lower().endswith(IMAGE_SUFFIXES)
                and not any(part.startswith((".", "__MACOSX")) and part != "." for part in name.split("/"))]


class Pixels:
    """Images that come as one uint8 array (n, H, W, 3), as pickled data sets do."""

    def __init__(self, path, array):
        if getattr(array, "dtype", None) != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            fail(f"{path}: holds no uint8 array of images (n, H, W, 3): fetch it again")
        self.path, self.array, self.rank = path, array, {i: i for i in range(len(array))}

    def read(self, index):
        if index not in self.rank:
            fail(f"{self.path}: names image {index} of {len(self.array)}: fetch it again")
        return self.array[index]


class PlainDtype:
    """Stands in for numpy.dtype while unpickling: numbers only, no objects."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[|<>=]?[biuf][1248]", str(code)):
            raise pickle.UnpicklingError(f"it holds an array of {code}")
        self.code = code

    def __setstate__(self, state):
        self.code = {"<": "<", ">": ">"}.get(state[1], "|") + self.code.lstrip("<>|=")


class PlainArray:
    """Stands in for numpy.ndarray while unpickling: filled from bytes by our own hands, not by numpy's __setstate__."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        self.array = np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, dtype.code)
        self.array = self.array.reshape(shape, order="F" if fortran else "C")


class PlainUnpickler(pickle.Unpickler):
    """Reads numeric arrays and plain containers only: unpickling a file from the web could otherwise run any code."""

    def find_class(self, module, name):
        module = module.replace("numpy._core", "numpy.core")            # numpy 2 and numpy 1
        stand_ins = {
            ("numpy", "ndarray"): None, ("numpy", "dtype"): PlainDtype,
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: PlainArray(),
            ("numpy.core.multiarray", "scalar"): lambda dtype, content: np.frombuffer(content, dtype.code)[0],
            ("numpy.core.numeric", "_frombuffer"): lambda content, dtype, shape, order:
                np.frombuffer(content, dtype.code).reshape(shape, order=order),
            ("_codecs", "encode"): lambda text, _: text.encode("latin1")}       # bytes in protocol 2
        if (module, name) not in stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return stand_ins[module, name]


def read_pickle(path, content):
    """Unpickle `content` (bytes or an open file) that came from `path`: a dict of arrays and plain containers."""
    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        found = PlainUnpickler(file, encoding="latin1").load()
        return {key: getattr(value, "array", value) for key, value in found.items()}
    except Exception as error:  # noqa: BLE001 (a damaged pickle can raise nearly anything)
        fail(f"{path}: not a pickle of arrays and plain containers ({error}): do not trust it, fetch it again")


# ---------------------------------------------------------------------------------------------------------- importers
# Each takes the paths that were found and gives {split: {class name: [(archive, name of the image), ...]}}, classes and
# images in a fixed order.

def by_folder(archive, names):
    """Group image names by the folder they lie in, sorted -> {folder: [(archive, name)]}."""
    classes = {}
    for name in sorted(names):
        classes.setdefault(name.rpartition("/")[0], []).append((archive, name))
    return classes


def import_class_folders(paths):
    """`<split>/<class>/<image>`, as folders or as `<split>.zip`. Works for any data set of your own."""
    splits = {}
    for path in paths:
        archive = Archive(path)
        classes = by_folder(archive, archive.image_names())
        splits[path.stem] = {name.removeprefix(f"{path.stem}/"): images for name, images in classes.items()}
    return splits


def import_omniglot(paths):
    """images_background + images_evaluation: `<set>/<alphabet>/characterNN/*.png`; 1028 / 172 / 423 characters.

    Alphabets are shuffled whole (MMAML Table 5 gives the sizes, not the lists), so that at most two of them are cut.
    """
    alphabets = {}
    for path in paths:
        archive = Archive(path)
        for character, images in by_folder(archive, archive.image_names()).items():
            alphabets.setdefault(character.rpartition("/")[0], {})[character] = images
        archive.check("characters", sum(name.startswith(path.stem) for a in alphabets for name in alphabets[a]),
                      {"images_background": 964, "images_evaluation": 659}[path.stem])
    order = list(alphabets)             # background first, each set sorted by name
    np.random.RandomState(123).shuffle(order)
    characters = [(name, images) for alphabet in order for name, images in alphabets[alphabet].items()]
    return {"train": dict(characters[:1028]), "val": dict(characters[1028:1200]), "test": dict(characters[1200:])}


def import_miniimagenet_pickles(paths):
    """mini-imagenet-cache-{train,val,test}.pkl: {"image_data": uint8 (n, 84, 84, 3), "class_dict": {class: [index]}}."""
    splits = {}
    for split, path in zip(SPLITS, paths):
        with open(path, "rb") as file:
            content = read_pickle(path, file)
        try:
            pixels = Pixels(path, content["image_data"])
            splits[split] = {name: [(pixels, int(i)) for i in getattr(rows, "array", rows)]
                             for name, rows in sorted(content["class_dict"].items())}
        except (KeyError, TypeError, ValueError, AttributeError):
            fail(f"{path}: has no image_data and class_dict: not the published mini-ImageNet pickle; fetch it again")
    return splits


def import_miniimagenet_images(paths):
    """images/ with Ravi & Larochelle's train.csv, val.csv, test.csv (filename, label)."""
    archive, tables = Archive(paths[0]), paths[1:]
    by_name = {name.rpartition("/")[2]: name for name in archive.image_names()}
    splits = {}
    for split, table in zip(SPLITS, tables):
        with open(table, newline="") as file:
            rows = csv.DictReader(file)
            if rows.fieldnames != ["filename", "label"]:
                fail(f"{table}: does not begin with the line filename,label: fetch Ravi and Larochelle's table again")
            for row in sorted(rows, key=lambda row: (row["label"], row["filename"])):
                if row["filename"] not in by_name:
                    fail(f"{archive.path}: lacks {row['filename']}, which {table} lists: {archive.remedy}")
                splits.setdefault(split, {}).setdefault(row["label"], []).append((archive, by_name[row["filename"]]))
    return splits


def import_fc100(paths):
    """cifar-100-python: pickles `train` and `test` (merged: 600 images a class) and `meta`; split by superclass."""
    archive = Archive(paths[0])
    fine_names = read_pickle(archive.path, archive.read(archive.find("meta")))["fine_label_names"]
    splits = {split: {} for split in SPLITS}
    for part in ("train", "test"):
        content = read_pickle(archive.path, archive.read(archive.find(part)))
        pixels = Pixels(archive.path, content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        for row, (fine, coarse) in enumerate(zip(content["fine_labels"], content["coarse_labels"])):
            split = next((s for s in FC100 if coarse in FC100[s]), "train")
            splits[split].setdefault(fine, []).append((pixels, row))
    archive.check("classes", sum(map(len, splits.values())), 100)
    return {split: {fine_names[fine]: classes[fine] for fine in sorted(classes)} for split, classes in splits.items()}


def import_cub(paths):
    """CUB_200_2011/images/NNN.Name/*.jpg: 140 / 30 / 30 of the sorted folder names."""
    archive = Archive(paths[0])
    names = [name for name in archive.image_names() if name.split("/")[-3:-2] == ["images"]]
    classes = {folder.rpartition("/")[2]: images for folder, images in by_folder(archive, names).items()}
    archive.check("classes", len(classes), 200)
    return {split: {name: classes[name] for name in members} for split, members in split_by_fraction(classes).items()}


def import_aircraft(paths):
    """fgvc-aircraft-2013b/data: variants.txt, images_variant_{trainval,test}.txt, images/*.jpg; 70 / 15 / 15 variants.

    Variant names are compared as they stand in the lists, slash and all, so that F/A-18 stays a test class.
    """
    archive = Archive(paths[0])
    data = archive.find("data/variants.txt").rpartition("/")[0]
    classes = {name: [] for name in archive.read(f"{data}/variants.txt").decode().splitlines() if name}
    archive.check("variants", len(classes), 100)
    for part in ("trainval", "test"):
        for line in archive.read(f"{data}/images_variant_{part}.txt").decode().splitlines():
            number, _, variant = line.partition(" ")
            if variant not in classes:
                fail(f"{archive.path}: its variants.txt lacks {variant}: {archive.remedy}")
            classes[variant].append((archive, f"{data}/images/{number}.jpg"))
    return {split: {name: classes[name] for name in members} for split, members in split_by_fraction(classes).items()}


def import_celeba(paths):
    """img_align_celeba/*.jpg with list_eval_partition.txt (a line an image: name, 0 train 1 val 2 test). Of one class: faces."""
    archive, table = Archive(paths[0]), paths[1]
    by_name = {name.rpartition("/")[2]: name for name in archive.image_names()}
    splits = {split: {"all": []} for split in SPLITS}
    for line in table.read_text(errors="replace").splitlines():
        name, _, part = line.partition(" ")
        if part.strip() not in ("0", "1", "2"):
            fail(f"{table}: a line is not of the form 000001.jpg 0 ({line[:40]}): fetch it again")
        if name not in by_name:
            fail(f"{archive.path}: lacks {name}, which {table} lists: {archive.remedy}")
        splits[SPLITS[int(part)]]["all"].append((archive, by_name[name]))
    listed = sum(len(images["all"]) for images in splits.values())
    if listed != len(by_name):
        fail(f"{table}: lists {listed} of the {len(by_name)} images of {archive.path}, so the split would be another one: fetch it again")
    return splits


class Layout(NamedTuple):
    """One published form of a data set: the names to find (alternatives in a tuple) and who reads them."""
    files: tuple
    importer: callable


LAYOUTS = {
    "omniglot": Layout((("images_background.zip", "images_background"), ("images_evaluation.zip", "images_evaluation")),
                       import_omniglot),
    "miniimagenet": Layout((("mini-imagenet-cache-train.pkl",),
                            ("mini-imagenet-cache-validation.pkl", "mini-imagenet-cache-val.pkl"),
                            ("mini-imagenet-cache-test.pkl",)), import_miniimagenet_pickles),
    "fc100": Layout((("cifar-100-python.tar.gz", "cifar-100-python"),), import_fc100),
    "cub": Layout((("CUB_200_2011.tgz", "CUB_200_2011"),), import_cub),
    "aircraft": Layout((("fgvc-aircraft-2013b.tar.gz", "fgvc-aircraft-2013b"),), import_aircraft),
    "celeba": Layout((("img_align_celeba.zip", "img_align_celeba"), ("list_eval_partition.txt",)), import_celeba),
}
MINIIMAGENET_IMAGES = Layout((("images", "images.zip"), ("train.csv",), ("val.csv",), ("test.csv",)), import_miniimagenet_images)

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
MINIIMAGENET_URL = "https://zenodo.org/record/7978538/files/mini-imagenet-cache-"
DOWNLOADS = {           # mode: [(file name, md5 or None where none is published, addresses to try in turn)], terms of use
    "omniglot": ([("images_background.zip", "68d2efa1b9178cc56df9314c21c6e718", [OMNIGLOT_URL + "images_background.zip"]),
                  ("images_evaluation.zip", "6b91aef0f799c5bb55b94e3f2daec811", [OMNIGLOT_URL + "images_evaluation.zip"])],
                 "MIT licence"),
    "miniimagenet": ([(f"mini-imagenet-cache-{part}.pkl", None, [f"{MINIIMAGENET_URL}{part}.pkl"])
                      for part in ("train", "validation", "test")], "ImageNet terms: non-commercial research"),
    "fc100": ([("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
                ["https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"])], "cite Krizhevsky 2009"),
    "cub": ([("CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78",
              ["https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
               "https://zenodo.org/record/8000562/files/CUB_200_2011.tgz"])], "non-commercial research"),
    "aircraft": ([("fgvc-aircraft-2013b.tar.gz", "d4acdd33327262359767eeaa97a4f732",
                   ["https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"])],
                 "non-commercial research"),
    "celeba": ([("img_align_celeba.zip", "00d2c5bc6d35e252742224ab0c1e8fcb", []), ("list_eval_partition.txt", None, [])],
               "non-commercial research, by hand from its site"),
}


def download(file_name, md5, urls, folder):
    """Fetch one published archive into `folder` with a progress bar; a cut download is resumed, the md5 checked."""
    target, part, problems = folder / file_name, folder / f"{file_name}.part", [] if urls else ["its authors give it by hand only"]
    for url in urls:
        try:
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0", "Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=30) as reply:
                have = have if reply.status == 206 else 0                 # 200: the server sends it all again
                total = have + int(reply.headers.get("Content-Length", 0))
                folder.mkdir(parents=True, exist_ok=True)
                with open(part, "ab" if have else "wb") as file, tqdm(
                        total=total or None, initial=have, unit="B", unit_scale=True, desc=file_name) as bar:
                    while block := reply.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
            if total and part.stat().st_size < total:
                raise OSError(f"cut after {part.stat().st_size} of {total} bytes; the same command continues")
            break
        except (OSError, http.client.HTTPException) as error:           # urllib's own errors are OSErrors
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                break                       # nothing left to send: the part is whole
            problems.append(f"{url}: {error}")
    else:
        return problems
    if md5:
        digest = hashlib.md5()
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != md5:
            part.unlink()
            fail(f"{url}: wrong checksum (md5 {digest.hexdigest()}, published {md5}): deleted; try again or fetch by hand")
    os.replace(part, target)
    return []


# -------------------------------------------------------------------------------------------------- finding and caching

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
    folders = [folder if folder.is_dir() else packed for folder, packed in both if folder.is_dir() or packed.is_file()]
    if folders:
        return import_class_folders, folders
    layouts = [LAYOUTS[mode]] if mode in LAYOUTS else []
    for layout in layouts + [MINIIMAGENET_IMAGES] * (mode == "miniimagenet"):
        for place in places:
            found = [next((place / name for name in names if (place / name).exists()), None) for names in layout.files]
            if all(found):
                return layout.importer, found
    return None


def fingerprint(paths):
    """A hash of what a cache is made from: of a zip its table of contents, which has a checksum of each file, of other files their
    names, sizes and times; not where they lie. So a copy of a zip is the same data, and a result file says so."""
    digest = hashlib.sha256(str(CACHE_FORMAT).encode())
    for path in paths:
        files = files_under(path) if path.is_dir() else [path]
        for file in files:
            stat = file.stat()
            contents = (file.suffix == ".zip" and table_of_contents(file)) or str(stat.st_mtime_ns).encode()
            digest.update(f"{file.relative_to(path.parent)} {stat.st_size} ".encode() + contents + b"\n")
    return digest.hexdigest()[:12]


def table_of_contents(path):
    """The central directory of a zip, as bytes: parsing it takes a second where reading it takes none. Empty if there is none, or
    one of the 64-bit kind, of which nothing is claimed."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2 ** 16 - 22))
        tail = file.read()
        at = tail.rfind(b"PK\5\6")                          # the record at the end: 12 bytes, size and place of the directory
        size, place = (int.from_bytes(tail[at + i:at + i + 4], "little") for i in (12, 16))
        if at < 0 or 2 ** 32 - 1 in (size, place):
            return b""
        file.seek(place)
        return file.read(size)


def decode(content, size, mode, banner=0):
    """One image (file content or uint8 array) -> uint8 (size, size, C), C = 1 for Omniglot, else 3; or an error message.

    banner: rows of pixels to cut from the bottom.
    """
    try:
        image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else Image.fromarray(content)
        if image.mode.startswith("I"):              # 16 bits: Pillow's own conversion would clip them, not scale them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("L" if mode == "omniglot" else "RGB")
    except Exception as error:  # noqa: BLE001 (Pillow's decoders raise nearly anything on damaged files)
        return str(error) or type(error).__name__
    if banner:
        image = image.crop((0, 0, image.width, max(1, image.height - banner)))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(size, size, -1)
    return 255 - pixels if mode == "omniglot" else pixels       # ink becomes bright, paper becomes zero


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
            except OSError:         # alive, and another user's
                continue


def build_cache(mode, size, splits, folder, banner=0):
    """Decode every image once into `folder`: <split>.npy (n, size, size, C) and classes.json, in one rename at the end."""
    jobs = [(split, row, source, key) for split, classes in splits.items()
            for row, (source, key) in enumerate(item for images in classes.values() for item in images)]
    jobs.sort(key=lambda job: (str(job[2].path), job[2].rank.get(job[3], -1)))   # in the archive's order
    for split, classes in splits.items():
        if not classes:
            fail(f"{mode}/{split}: no images ({', '.join(IMAGE_SUFFIXES)}) in class folders: put them there")
    if mode == "miniimagenet":
        for split in splits:
            for name in splits[split]:
                home = next((s for s in SPLITS if name in MINIIMAGENET[s]), split)
                if home != split:
                    fail(f"mini-ImageNet: {name} stands in {split} but is a {home} class of Ravi & Larochelle: "
                         "this copy has another split; use the published files (python data.py list)")
    sweep(folder.parent)
    channels = 1 if mode == "omniglot" else 3
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = None
    if len(jobs) >= PARALLEL_FROM and workers > 1:          # processes: Pillow decodes WebP on one thread at a time
        pool = multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        files, starts = {}, {}
        for split, classes in splits.items():
            files[split] = open(temporary / f"{split}.npy", "wb")     # noqa: SIM115 (closed below)
            count = sum(len(images) for images in classes.values())
            np.lib.format.write_array_header_1_0(files[split], {
                "descr": "|u1", "fortran_order": False, "shape": (count, size, size, channels)})
            starts[split] = files[split].tell()
        bar = tqdm(total=len(jobs), desc=f"{mode}: decoding to {size} px, once", unit=" images", disable=None)
        with bar:
            for first in range(0, len(jobs), 4096):         # bounds the memory: file contents wait in chunks
                chunk = jobs[first:first + 4096]
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
        sizes = {split: [[name, len(images)] for name, images in classes.items()] for split, classes in splits.items()}
        atomic_write(temporary / "classes.json", json.dumps(sizes))
        try:
            os.replace(temporary, folder)
        except OSError:                     # another process has just built the same one
            if not (folder / "classes.json").exists():
                raise
    except OSError as error:
        fail(f"cannot write the cache {folder}: {error.strerror}: make room or choose another --cache-dir")
    except KeyboardInterrupt:
        fail(f"interrupted while building the cache {folder}: nothing is left of it; the same command begins again")
    finally:
        if pool:
            pool.terminate()
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(mode, size, root="data", cache_dir=".cache", synthetic=False):
    """The folder of decoded images of a mode, found or made (see the module's head for the order of search)."""
    mode, cache_dir = canonical_mode(mode, root), Path(cache_dir)
    if mode == "scenes":
        return prepare_scenes(size, cache_dir) if synthetic else fail("scenes are ray-cast, not photographs: add --synthetic")
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
        if not (Path(root) / mode / file_name).exists() and (problems := download(file_name, md5, urls, Path(root) / mode)):
            fail(f"{mode} ({terms}) not found: looked for {own} and {file_name} in {root} and {Path(root) / mode}; download failed: "
                 f"{'; '.join(problems)}. Put the file there by hand, or add --synthetic to go on without it")
    return find_source(mode, root)


# --------------------------------------------------------------------------------------------------- synthetic stand-ins
# Every class is a point in a space of shapes and colours; its images show that point in different poses,
# light and surroundings. Validation and test classes are other points of the same space. A scene fills the
# square from (-1, -1) to (1, 1), x to the right and y downwards; lengths are in these units, angles in
# radians, colours in [0, 1]. Nothing depends on the number of pixels before the shapes are painted.
SYNTHETIC_CLASSES = {"train": 64, "val": 16, "test": 20}
SYNTHETIC_IMAGES = 40  # images per class


class Draws:
    """Uniform random numbers for one class (rows = 1) or for its images (a row each), fixed by a name.

    Image i always uses row i, so that it stays the same however many images are drawn.
    """

    def __init__(self, name, rows=1):
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
        bits = np.random.Philox(key=key).random_raw(rows * 160).reshape(rows, 160)
        self.table = (bits >> np.uint64(11)) * 2.0 ** -53  # in [0, 1)
        self.columns = iter(range(160))  # every draw uses up one column

    def __call__(self, low, high):
        """Uniform in [low, high), (rows, 1, 1): broadcasts against the grid (images, size, size)."""
        return low + (high - low) * self.table[:, next(self.columns), None, None]

    def choice(self, options):
        """One of the options, for a whole class."""
        return options[int(self.table[0, next(self.columns)] * len(options))]

    def colour(self, saturation, value, hue=(0, 1)):
        """Colours (3, rows, 1, 1) from these ranges of a colour wheel (0 red, 1/3 green, 2/3 blue)."""
        hue, saturation, value = self(*hue), self(*saturation), self(*value)
        wheel = np.stack([0.5 + 0.5 * np.cos(2 * np.pi * (hue - primary / 3)) for primary in range(3)])
        return value * (1 - saturation * (1 - wheel))


class Scene:
    """Pictures (channels, images, size, size) and the coordinates x, y of their pixels (images, size, size).

    limbs and blob return the (roughly) signed distance to a shape, negative inside; paint fills it.
    """

    def __init__(self, images, size, channels):
        centres = (np.arange(size) + 0.5) / size * 2 - 1
        self.x, self.y = centres[None, None, :], centres[None, :, None]
        self.edge = 2 / size  # width of the transition at an outline: one pixel, for antialiasing
        self.picture = np.zeros((channels, images, size, size))

    def turned(self, x, y, angle):
        """Coordinates relative to the point (x, y), on axes turned by the angle."""
        x, y, cos, sin = self.x - x, self.y - y, np.cos(angle), np.sin(angle)
        return cos * x + sin * y, cos * y - sin * x

    def pose(self, u, scale, turn, shift, squeeze, flip=True):
        """From here on x, y are coordinates of an object placed at random: u draws, the rest gives ranges."""
        x, y = self.turned(u(-shift, shift), u(-shift, shift), u(-turn, turn))
        scale = u(*scale)
        self.x, self.y = x / scale * (np.sign(u(-1, 1)) if flip else 1), y / scale / u(*squeeze)
        self.edge = self.edge / scale

    def limbs(self, *limbs):
        """Union of straight limbs (ax, ay, bx, by, radius_a, radius_b) from a to b with round ends."""
        distance = np.inf
        for ax, ay, bx, by, radius_a, radius_b in limbs:
            dx, dy, x, y = bx - ax, by - ay, self.x - ax, self.y - ay
            along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)  # of the nearest point
            radius = radius_a + along * (radius_b - radius_a)
            distance = np.minimum(distance, np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2) - radius)
        return distance

    def blob(self, x, y, radius_x, radius_y, angle=0, lobes=0, depth=0):
        """An ellipse; with lobes a flower or a star."""
        x, y = self.turned(x, y, angle)
        x, y = x / radius_x, y / radius_y
        outline = 1 + depth * np.cos(lobes * np.arctan2(y, x)) if lobes else 1
        return (np.sqrt(x * x + y * y) - outline) * np.minimum(radius_x, radius_y)

    def stripes(self, frequency, angle, phase):
        """A soft pattern in [0, 1], `frequency` stripes to a unit of length."""
        return 0.5 + 0.5 * np.sin(2 * np.pi * (frequency * self.turned(0, 0, angle)[0] + phase))

    def clouds(self, u, frequency):
        """A soft pattern in [0, 1] with up to this frequency, different in every image."""
        return (self.stripes(u(0.2, frequency), u(0, np.pi), u(0, 1))
                * self.stripes(u(0.2, frequency), u(0, np.pi), u(0, 1)))

    def paint(self, distance, colour):
        """Fill a shape with a colour; at its outline the colour covers half of what was there."""
        self.picture += np.clip(0.5 - distance / self.edge, 0, 1) * (colour - self.picture)


# In the drawing functions c draws what is fixed for a class and u what varies from image to image.
def draw_character(scene, c, u):
    """omniglot: c the control points of pen strokes (Bezier curves); u their jitter, pose and pen."""
    strokes = [[(c(-r, r), c(-r, r)) for r in (0.65, 0.9, 0.65)] for _ in range(c.choice([2, 3, 3, 4]))]
    scene.pose(u, scale=(0.8, 1), turn=0.25, shift=0.12, squeeze=(0.8, 1.2), flip=False)
    pen, limbs = u(0.04, 0.08), []
    for stroke in strokes:
        start, turn, end = [np.stack([x + u(-0.1, 0.1), y + u(-0.1, 0.1)]) for x, y in stroke]
        curve = [(1 - t) ** 2 * start + 2 * t * (1 - t) * turn + t ** 2 * end for t in np.linspace(0, 1, 7)]
        limbs += [(*a, *b, pen, pen) for a, b in pairwise(curve)]
    scene.paint(scene.limbs(*limbs), 1)


def draw_object(scene, c, u):
    """miniimagenet: c outline, texture, palette and an extra part; u pose, tint, light and background."""
    back, front = u.colour((0, 0.8), (0.1, 1)), u.colour((0, 0.8), (0.1, 1))
    scene.picture += back + (front - back) * scene.clouds(u, 2.5)
    light = u(0.5, 1.2) * (1 + u(-0.4, 0.4) * scene.x + u(-0.4, 0.4) * scene.y)
    scene.pose(u, scale=(0.55, 1), turn=0.7, shift=0.3, squeeze=(0.8, 1.25), flip=False)
    many, angle, phase = c(1, 3.5), c(0, np.pi), u(0, 1)
    along, across = scene.stripes(many, angle, phase), scene.stripes(many, angle + np.pi / 2, phase)
    rings = 0.5 + 0.5 * np.cos(2 * np.pi * many * np.sqrt(scene.x ** 2 + scene.y ** 2))
    texture = c.choice([along, along * across, np.abs(along - across), rings, 0 * rings])
    one, two, three = (c.colour((0.2, 1), (0.3, 1)) + u.colour((0, 1), (-0.25, 0.25)) for _ in range(3))
    lobes, depth = c.choice([0, 2, 3, 4, 5, 6, 8]), c(0.15, 0.4)
    body = scene.blob(0, 0, c(0.4, 0.8), c(0.4, 0.8), c(0, np.pi), lobes, depth)
    scene.paint(body, one + (two - one) * np.clip(3 * texture - 1, 0, 1))
    scene.paint(scene.blob(c(-0.5, 0.5), c(-0.5, 0.5), c(0.12, 0.3), c(0.12, 0.3), c(0, np.pi)), three)
    scene.picture *= light


def draw_toy(scene, c, u):
    """fc100: c how discs, kites and rods are put together; u pose, tint and landscape. All out of focus."""
    scene.edge = np.maximum(scene.edge, 0.15)  # as if enlarged from some 14 x 14 pixels
    scene.picture += u.colour((0, 0.5), (0.5, 1))
    scene.paint(u(-0.2, 0.8) - scene.y, u.colour((0, 0.6), (0.3, 0.9)))
    scene.pose(u, scale=(0.7, 1.1), turn=0.45, shift=0.25, squeeze=(0.8, 1.25))
    for _ in range(c.choice([3, 4, 5])):
        x, y = c(-0.5, 0.5) + u(-0.08, 0.08), c(-0.5, 0.5) + u(-0.08, 0.08)
        long, short, angle = c(0.25, 0.5), c(0.1, 0.2), c(0, np.pi)
        dx, dy = long * np.cos(angle), long * np.sin(angle)
        shapes = [scene.blob(x, y, long, long), scene.blob(x, y, long, long, angle, 4, short),
                  scene.limbs((x - dx, y - dy, x + dx, y + dy, short, short))]
        scene.paint(c.choice(shapes), c.colour((0, 1), (0.1, 1)) + u.colour((0, 1), (-0.2, 0.2)))
    scene.picture *= u(0.6, 1.1)


def draw_bird(scene, c, u):
    """cub: always a bird on a branch; c proportions and plumage, u pose, tint, light and foliage."""
    leaf, shade = (u.colour((0.2, 0.7), (0.3, 0.9), (0.15, 0.6)) for _ in range(2))
    scene.picture += leaf + (shade - leaf) * scene.clouds(u, 1.2)
    scene.pose(u, scale=(0.75, 1), turn=0.25, shift=0.12, squeeze=(0.85, 1.15))
    coat, breast, wing, cap = (c.colour((0.1, 0.8), (0.2, 0.9), (-0.1, 0.7)) + u.colour((0, 1), (-0.2, 0.2))
                               for _ in range(4))
    bark, horn = u.colour((0.3, 0.5), (0.1, 0.4), (0, 0.1)), c.colour((0.5, 1), (0.2, 1), (0, 0.17))
    long, high, head, bill = c(0.36, 0.5), c(0.22, 0.34), c(0.15, 0.23), c(0.15, 0.4)
    x, y = 0.85 * long, -0.8 * high - head * c(0.2, 0.6) + u(-0.05, 0.05)  # the head
    ground, tail_x, tail_y = high + 0.18, -long - c(0.3, 0.6), c(-0.25, 0.2) + u(-0.1, 0.1)
    scene.paint(scene.limbs((-3, ground + u(-0.2, 0.2), 3, ground + u(-0.2, 0.2), 0.06, 0.05)), bark)
    scene.paint(scene.limbs(*((leg, 0, leg + 0.03, ground, 0.025, 0.02) for leg in (-0.08, 0.1))), 0.5 * bark)
    scene.paint(scene.limbs((-0.7 * long, 0.05, tail_x, tail_y, 0.13, c(0.03, 0.12))), wing)
    scene.paint(scene.limbs((x, y, x + 0.8 * head + bill, y + 0.06, c(0.05, 0.13), 0.005)), horn)
    body, skull = scene.blob(0, 0, long, high, -0.25), scene.blob(0.92 * x, y, head, head)
    neck = scene.limbs((0.45 * long, -0.3 * high, 0.9 * x, y, 0.6 * high, 0.8 * head))
    scene.paint(np.minimum(np.minimum(body, skull), neck), coat)  # minimum: union; maximum: intersection
    scene.paint(np.maximum(body, scene.blob(0.15, 0.8 * high, 0.9 * long, high * c(0.5, 1.1))), breast)
    scene.paint(np.maximum(skull, scene.y - y + head * c(-0.1, 0.6)), cap)
    bars = c.choice([0, 0, 1]) * scene.stripes(c(2, 5), c(0.8, 2.4), 0)
    feathers = scene.blob(-0.12, -0.03, long * c(0.55, 0.85), high * c(0.35, 0.6), u(-0.5, 0.1))
    scene.paint(feathers, wing + bars * (breast - wing))
    scene.paint(scene.blob(x + 0.15 * head, y - 0.1 * head, 0.045, 0.045), 0.02)
    scene.picture *= u(0.5, 1.2)


def draw_plane(scene, c, u):
    """aircraft: a dark outline from below; c wings, tail and engines, u sky, pose, heading and contrast."""
    blue = u(0, 0.06) * np.array([-1, 0, 1]).reshape(3, 1, 1, 1)
    scene.picture += u(0.6, 0.9) + u(-0.2, 0.2) * scene.y + u(0, 0.35) * (scene.clouds(u, 1) - 0.3) + blue
    scene.pose(u, scale=(0.85, 1.05), turn=0.25, shift=0.1, squeeze=(0.85, 1), flip=False)
    scene.y = np.abs(scene.y)  # the two sides mirror each other: draw one, get both
    nose, girth, thin, root, tip = c(0.6, 0.9), c(0.06, 0.13), c(0.2, 0.7), c(0.09, 0.2), c(0.02, 0.08)
    front, sweep, span = c(-0.1, 0.3), c(-0.05, 0.5), c(0.5, 0.95)
    stern, stern_sweep, stern_span, chord = -0.9 * nose, c(0, 0.25), c(0.15, 0.42), c(0.04, 0.1)
    limbs = [(nose, 0, -nose, 0, girth, girth * thin), (front, 0, front - sweep, span, root, tip),
             (stern, 0, stern - stern_sweep, stern_span, chord, 0.5 * chord)]
    for at in c.choice([(), (), (0.35,), (0.5,), (0.3, 0.6)]):  # engines along the wing
        limbs.append((front - at * sweep + root + 0.1, at * span, front - at * sweep, at * span, 0.05, 0.04))
    for at in c.choice([(), (), (0.5,)]):  # engines at the rear of the fuselage
        limbs.append((-at * nose, girth + 0.06, -at * nose - 0.2, girth + 0.06, 0.055, 0.04))
    scene.paint(scene.limbs(*limbs), u(0.05, 0.35))


def draw_face(scene, c, u):
    """celeba: a person; c skin, hair and proportions, u pose, light, expression and background."""
    back, front = u.colour((0, 0.7), (0.2, 0.9)), u.colour((0, 0.7), (0.2, 0.9))
    scene.picture += back + (front - back) * scene.clouds(u, 1.2)
    light = u(0.7, 1.15) * (1 + u(-0.25, 0.25) * scene.x)
    scene.pose(u, scale=(0.9, 1.05), turn=0.12, shift=0.06, squeeze=(0.95, 1.05))
    skin, hair = c.colour((0.3, 0.6), (0.35, 0.95), (0.02, 0.09)), c.colour((0.2, 0.7), (0.05, 0.8), (0, 0.12))
    iris, lips, cloth = c.colour((0.2, 0.8), (0.1, 0.5)), c.colour((0.4, 0.8), (0.4, 0.8), (-0.03, 0.04)), u.colour((0, 0.9), (0.1, 0.9))
    wide, long, locks = c(0.42, 0.54), c(0.6, 0.72), c.choice([0.7, 0.75, 1.3, 1.7])
    scene.paint(scene.blob(0, -0.15, wide + c(0.08, 0.2), c(0.75, 0.9) * locks ** 0.5), hair)
    scene.paint(scene.limbs((0, 0.2, 0, 1.1, 0.2, 0.24)), 0.85 * skin)
    scene.paint(scene.blob(0, 1.25, 0.95, 0.45), cloth)
    scene.paint(scene.blob(0, 0.05, wide, long), skin)
    scene.paint(np.maximum(scene.blob(0, 0.05, wide, long), scene.y + c(0.25, 0.45)), hair)           # a fringe
    apart, high, eye, look = c(0.17, 0.23), c(-0.1, 0.0), c(0.07, 0.1), u(-0.025, 0.025)
    for side in (-1, 1):
        scene.paint(scene.blob(side * apart, high, eye, 0.55 * eye), 0.95)
        scene.paint(scene.blob(side * apart + look, high, 0.45 * eye, 0.5 * eye), iris)
        scene.paint(scene.limbs((side * (apart - 0.09), high - 0.12, side * (apart + 0.09), high - 0.13, 0.02, 0.012)), 0.6 * hair)
    scene.paint(scene.limbs((0, high + 0.05, c(-0.02, 0.02), 0.2, 0.015, 0.04)), 0.85 * skin)
    smile, broad = u(-0.02, 0.09), c(0.13, 0.2) + u(0, 0.05)
    scene.paint(scene.limbs((-broad, 0.4 - smile, 0, 0.4, 0.025, 0.035), (0, 0.4, broad, 0.4 - smile, 0.035, 0.025)), lips)
    scene.picture *= light


SYNTHETIC_MODES = {"omniglot": (draw_character, 1), "miniimagenet": (draw_object, 3), "fc100": (draw_toy, 3),
                   "cub": (draw_bird, 3), "aircraft": (draw_plane, 3), "celeba": (draw_face, 3)}  # drawing function, channels


def draw_synthetic(mode, split, size, per_class=SYNTHETIC_IMAGES):
    """Draw one split ("train", "val" or "test") of the stand-in for a data set (a key of SYNTHETIC_MODES).

    size is the side of the square images in pixels. Returns the images, uint8 (n_classes * per_class, size,
    size, channels), with those of class 0 first, then class 1, ...; and the list of the class names.
    channels is 1 for omniglot (bright strokes on black) and 3 (red, green, blue) for the others.
    """
    draw, channels = SYNTHETIC_MODES[mode]
    names = [f"{mode}-{split}-{index:02d}" for index in range(SYNTHETIC_CLASSES[split])]
    images = np.empty((len(names), per_class, size, size, channels), np.uint8)
    for of_class, name in zip(images, names):
        scene = Scene(per_class, size, channels)
        draw(scene, Draws(name), Draws(name + "-images", per_class))
        of_class[:] = np.rint(255 * np.clip(scene.picture, 0, 1)).transpose(1, 2, 3, 0)
    return images.reshape(-1, size, size, channels), names


def prepare_synthetic(mode, size, cache_dir):
    """The folder of the drawn stand-in of a mode, as `prepare` gives it for real images. Any change to this file redraws."""
    if mode not in SYNTHETIC_MODES:
        fail(f"--synthetic has no stand-in for {mode}: choose from {', '.join(SYNTHETIC_MODES)}")
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = Path(cache_dir) / f"synthetic-{mode}-{size}-{version}"
    if not (folder / "classes.json").exists():
        classes = {}
        for split in tqdm(SPLITS, desc=f"{mode}: drawing SYNTHETIC images of {size} px", disable=None, leave=False):
            images, names = draw_synthetic(mode, split, size)
            content = io.BytesIO()
            np.save(content, images)
            atomic_write(folder / f"{split}.npy", content.getvalue())
            classes[split] = [[name, SYNTHETIC_IMAGES] for name in names]
        atomic_write(folder / "classes.json", json.dumps(classes))         # last: its presence says that all is there
    return folder


# ------------------------------------------------------------------------------------------------------ scenes with depth
# Attentive feature reuse's data, MMT, were never released. In their place: rooms, ray-cast, of which all is known. They are
# synthetic, NOT MMT, and every result made with them says so. Or folders of yours of photographs with depth.
#
# Lengths are metres. The camera looks along z, x goes right and y down; depth is z, not the distance. A room has the same axes,
# z its long one, the floor at y = 0; the vanishing point is where lines along its z meet in the image. A *class* is a kind of
# room: its proportions, furniture, windows. A *domain* is a place with textures, colours, light, a camera and noise of its own.
# Labels are scaled to [0, 1]: depth / 10 m, (normal + 1) / 2, the vanishing point as a share of the image's width and height.
SCENE_CLASSES = {"train": 32, "val": 16, "test": 16}
SCENE_DOMAINS = {"train": 20, "val": 5, "test": 10}
SCENE_IMAGES = 128                                  # a domain, its split's classes in turn
DEPTH_LIMIT = 10.0                                  # what lies beyond is not known
BOXES, BALLS = 4, 2                                 # most of them in a room
FLOOR, CEILING, SIDE, BACK, THINGS = 0, 1, 2, 3, 4  # surfaces; things from 4 on, the panels after them


def scene_class(name):
    """A kind of room -> numbers by name: room (3,) width, height, length; boxes (BOXES, 7) and balls (BALLS, 5) in it; ..."""
    c = Draws(name)

    def one(low, high):
        return c(low, high).item()
    room = np.array([one(2.4, 6), one(2.4, 3.8), one(4.5, 8)])
    boxes = np.array([[one(0, 1) < 0.8, one(-1, 1), one(0.35, 0.95), one(0.4, 1.5), one(0.3, 2.0), one(0.4, 1.0), one(0, 1) < 0.2]
                      for _ in range(BOXES)])       # there at all, x, z, width, height, depth, hangs from the ceiling
    balls = np.array([[one(0, 1) < 0.6, one(-1, 1), one(0.35, 0.8), one(0.2, 0.5), one(0, 1.2) * (one(0, 1) < 0.4)]
                      for _ in range(BALLS)])       # there at all, x, z, radius, height above the floor
    windows = np.array([int(one(0, 4)) * (one(0, 1) < 0.7), one(0.3, 0.7), int(one(0, 4)) * (one(0, 1) < 0.7), one(0.3, 0.7)])
    door = np.array([one(0, 1) < 0.7, one(-0.7, 0.7), one(0.4, 0.9), one(1.2, 2.1)])        # there, x, width, height
    return {"room": room, "boxes": boxes, "balls": balls, "windows": windows, "door": door}


def scene_domain(name):
    """A place -> numbers by name: colours (surfaces, 3), patterns, light, camera, noise."""
    g = Draws(name)

    def one(low, high):
        return g(low, high).item()

    def colour(saturation, value):
        return g.colour(saturation, value)[:, 0, 0, 0]
    colours = [colour((0.1, 0.7), (0.25, 0.8)), colour((0, 0.3), (0.6, 1)), *(colour((0, 0.6), (0.4, 1)) for _ in range(2))]
    colours += [colour((0.3, 1), (0.2, 1)) for _ in range(BOXES + BALLS)] + [colour((0, 0.8), (0.1, 1))]
    textures = ["plain", "stripes", "checks", "tiles", "clouds"]
    return {"colours": np.array(colours), "patterns": [g.choice(textures) for _ in range(5)],
            "frequency": [one(0.7, 3) for _ in range(5)], "strength": [one(0.2, 0.6) for _ in range(5)],
            "ambient": one(0.25, 0.6), "lamp": np.array([one(-0.3, 0.3), one(0.6, 0.95), one(0.1, 0.7)]), "reach": one(3, 12),
            "tint": 1 - 0.25 * np.array([one(0, 1), one(0, 0.5), one(0, 1)]), "exposure": one(0.8, 1.3), "haze": one(0, 0.08),
            "grey": one(0.4, 0.9), "dark_corners": one(0, 0.6), "noise": one(0, 0.05), "focal": one(0.7, 1.1),
            "height": one(1.1, 1.8), "pitch": one(-0.03, 0.14)}


def cast(origin, rays, room, boxes, balls):
    """Follow rays to what they meet first.

    Args: origin (n, 3); rays (n, P, 3), directions of any length; room (n, 2, 3), its lowest and highest corner, around the
    origin; boxes (n, k, 2, 3) likewise; balls (n, m, 4), centre and radius. A box or a ball of no size is not there.
    Returns how many lengths of the ray away it is (n, P), its unit normal, which faces the origin's side (n, P, 3), and which
    surface it is (n, P): FLOOR, CEILING, SIDE, BACK, or THINGS + i, boxes before balls.
    """
    o, corner = origin[:, None], np.where(rays > 0, room[:, None, 1], room[:, None, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / rays
        t = np.where(rays == 0, np.inf, (corner - o) * inverse)
    axis = t.argmin(-1)
    nearest = t.min(-1)
    normal = np.where(np.arange(3) == axis[..., None], -np.sign(rays), 0)
    down = np.take_along_axis(rays, axis[..., None], -1)[..., 0] > 0
    surface = np.select([axis == 0, axis == 2], [SIDE, BACK], np.where(down, FLOOR, CEILING))
    for k in range(boxes.shape[1]):
        with np.errstate(invalid="ignore"):
            low, high = ((boxes[:, None, k, end] - o) * inverse for end in (0, 1))
        enter, leave = np.fmin(low, high), np.fmax(low, high)
        t = enter.max(-1)
        hit = (t < leave.min(-1)) & (t > 0) & (t < nearest)
        face = np.where(np.arange(3) == enter.argmax(-1)[..., None], -np.sign(rays), 0)
        nearest, surface = np.where(hit, t, nearest), np.where(hit, THINGS + k, surface)
        normal = np.where(hit[..., None], face, normal)
    for m in range(balls.shape[1]):
        away, radius = o - balls[:, None, m, :3], balls[:, None, m, 3]
        a, b, c = (rays * rays).sum(-1), (rays * away).sum(-1), (away * away).sum(-1) - radius * radius
        inside = b * b - a * c
        t = (-b - np.sqrt(np.maximum(inside, 0))) / a
        hit = (inside > 0) & (radius > 0) & (t > 0) & (t < nearest)
        outwards = (away + t[..., None] * rays) / np.maximum(radius, 1e-9)[..., None]
        nearest, surface = np.where(hit, t, nearest), np.where(hit, THINGS + boxes.shape[1] + m, surface)
        normal = np.where(hit[..., None], outwards, normal)
    return nearest, normal, surface


def pattern(kind, u, v):
    """A texture in [0, 1] over coordinates of a surface."""
    if kind == "plain":
        return 0 * u
    if kind == "stripes":
        return 0.5 + 0.5 * np.sin(2 * np.pi * u)
    if kind == "checks":
        return ((np.floor(u) + np.floor(v)) % 2).astype(u.dtype)
    if kind == "tiles":
        return ((np.minimum(u % 1, v % 1)) < 0.12).astype(u.dtype)
    return (0.5 + 0.5 * np.sin(1.9 * u + 2 * np.sin(0.8 * v))) * (0.5 + 0.5 * np.sin(2.3 * v + 2 * np.sin(0.7 * u)))


def turn(angle, i, j):
    """Rotations (n, 3, 3) by `angle` (n,) in the plane of axes i and j."""
    R = np.tile(np.eye(3), (len(angle), 1, 1))
    R[:, i, i] = R[:, j, j] = np.cos(angle)
    R[:, j, i] = np.sin(angle)
    R[:, i, j] = -R[:, j, i]
    return R


def camera_rays(focal, size):
    """Directions (n, size * size, 3) through the pixels' centres, of z = 1: a hit's distance in them is its depth. focal (n,), in
    units of the image's width."""
    at = (np.arange(size) + 0.5) / size - 0.5
    y, x = np.meshgrid(at, at, indexing="ij")
    flat = np.stack([x, y], -1).reshape(1, -1, 2) / focal[:, None, None]
    return np.concatenate([flat, np.ones_like(flat[..., :1])], -1)


def draw_scenes(split, domain, first, count, size):
    """Images number first .. first + count - 1 of a domain, a pure function of the arguments; the classes take turns.

    Returns images (n, S, S, 3) uint8, depth (n, S, S) in metres, normals (n, S, S, 3), vanishing points (n, 2) as shares of the
    image's width and height, and classes (n,). Colours are averages of four rays, depth and normals of the pixels' centres.
    """
    name, rows = f"scenes-{split}-domain-{domain:02d}", slice(first, first + count)
    g, u = scene_domain(name), Draws(f"{name}-images", first + count)
    classes = np.arange(first, first + count) % SCENE_CLASSES[split]
    kinds = [scene_class(f"scenes-{split}-class-{c:02d}") for c in range(SCENE_CLASSES[split])]
    of = {key: np.array([kinds[c][key] for c in classes]) for key in kinds[0]}

    def each(low, high, *shape):
        made = np.stack([u(low, high)[rows, 0, 0] for _ in range(int(np.prod(shape)))], -1)
        return made.reshape(count, *shape) if shape else made[:, 0]
    # the room with its furniture
    width, height, length = (of["room"] * each(0.93, 1.07, 3)).T
    room = np.stack([np.stack([-width / 2, -height, 0 * length], -1), np.stack([width / 2, 0 * height, length], -1)], 1)
    there, x, z, w, h, d, hangs = np.moveaxis(of["boxes"], -1, 0)
    w, h, d = np.stack([w, h, d]) * np.moveaxis(each(0.85, 1.15, BOXES, 3), -1, 0)
    h = np.minimum(h, 0.9 * height[:, None])
    x = np.clip(x + each(-0.12, 0.12, BOXES), -1, 1) * (width[:, None] - w) / 2
    z = np.clip(z + each(-0.05, 0.05, BOXES), 0.35, 1) * length[:, None]
    top, bottom = np.where(hangs > 0, -height[:, None], -h), np.where(hangs > 0, 0.4 * h - height[:, None], 0)
    low, high = np.stack([x - w / 2, top, z - d / 2], -1), np.stack([x + w / 2, bottom, z + d / 2], -1)
    boxes = np.stack([low, np.where(there[..., None] > 0, high, low)], 2)
    there, x, z, radius, lift = np.moveaxis(of["balls"], -1, 0)
    radius = there * radius * each(0.85, 1.15, BALLS)
    x = np.clip(x + each(-0.12, 0.12, BALLS), -1, 1) * (width[:, None] / 2 - radius)
    balls = np.stack([x, -radius - lift, np.clip(z + each(-0.05, 0.05, BALLS), 0.35, 1) * length[:, None], radius], -1)
    # the camera
    focal = g["focal"] * each(0.97, 1.03)
    R = turn(each(-0.26, 0.26), 2, 0) @ turn(-g["pitch"] + each(-0.06, 0.06), 1, 2) @ turn(each(-0.05, 0.05), 0, 1)
    origin = np.stack([each(-0.2, 0.2) * width, -(g["height"] + each(-0.1, 0.1)), each(0.25, 0.7)], -1)
    forward = R[:, 2]                                       # the room's z axis, as the camera sees it
    vanishing = 0.5 + focal[:, None] * forward[:, :2] / forward[:, 2:]
    rays = camera_rays(focal, size) @ R.transpose(0, 2, 1)
    depth, normal, _ = cast(origin, rays, room, boxes, balls)
    normals = (normal @ R).reshape(count, size, size, 3)    # R's transpose turns the room's axes into the camera's
    # what it looks like
    rays = (camera_rays(focal, 2 * size) @ R.transpose(0, 2, 1)).astype(np.float32)
    t, normal, surface = cast(origin.astype(np.float32), rays, *(x.astype(np.float32) for x in (room, boxes, balls)))
    p = origin[:, None].astype(np.float32) + t[..., None] * rays
    facing = np.abs(normal).argmax(-1)
    v, h = np.where(facing == 1, p[..., 2], p[..., 1]), np.where(facing == 0, p[..., 2], p[..., 0])
    L, H, half = (x[:, None] for x in (length, height, width / 2))
    number, pane = (np.where(p[..., 0] < 0, of["windows"][:, None, i], of["windows"][:, None, i + 2]) for i in (0, 1))
    window = (surface == SIDE) & (np.abs((p[..., 2] / L * number) % 1 - 0.5) < pane / 2) & (np.abs(p[..., 1] / H + 0.55) < 0.2)
    exists, at, broad, tall = (of["door"][:, None, i] for i in range(4))
    door = (surface == BACK) & (exists > 0) & (np.abs(p[..., 0] - at * (half - broad / 2)) < broad / 2) & (p[..., 1] > -tall)
    shade = np.zeros_like(t)
    for i, (kind, frequency, strength) in enumerate(zip(g["patterns"], g["frequency"], g["strength"])):
        mine = np.minimum(surface, THINGS) == i
        shade = np.where(mine, strength * pattern(kind, frequency * h, frequency * v), shade)
    panel = window | door
    colour = g["colours"][np.where(panel, len(g["colours"]) - 1, surface)] * (1 - np.where(panel, 0, shade))[..., None]
    lamp = (g["lamp"] + np.stack([each(-0.1, 0.1), 0 * width, each(-0.1, 0.1)], -1)) * np.stack([width, -height, length], -1)
    towards = lamp[:, None] - p
    distance = np.sqrt((towards * towards).sum(-1))
    lambert = np.maximum((towards * normal).sum(-1) / distance, 0) / (1 + (distance / g["reach"]) ** 2)
    colour = colour * (g["ambient"] + (1 - g["ambient"]) * lambert)[..., None] * g["tint"]
    clear = np.exp(-g["haze"] * t)[..., None]
    colour = colour * clear + g["grey"] * (1 - clear)
    centre = camera_rays(np.ones(1), 2 * size)[0, :, :2]
    colour *= (g["exposure"] * each(0.85, 1.15)[:, None] * (1 - g["dark_corners"] * (centre * centre).sum(-1)))[..., None]
    colour = colour.reshape(count, size, 2, size, 2, 3).mean((2, 4))
    noise = np.stack([uniform(f"{name}-noise-{size}", first + i, size * size * 3) for i in range(count)])
    colour += g["noise"] * 3 ** 0.5 * (2 * noise - 1).reshape(colour.shape)
    images = np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8)
    return images, depth.reshape(count, size, size), normals, vanishing, classes


def normals_from_depth(depth, focal):
    """Normals of the surface that a depth image shows, by cross products of differences between neighbours.

    Args: depth (S, S) in metres, 0 where not known; focal, the focal length in pixels, the axis through the image's centre.
    Returns normals (S, S, 3), unit length, facing the camera, and where they are known (S, S): not at the border, beside a
    hole, or at an edge, where the inverse depth, which is linear over a plane, bends.
    """
    S = len(depth)
    at = np.arange(S) + 0.5 - S / 2
    points = np.stack([at[None] * depth / focal, at[:, None] * depth / focal, depth], -1)
    normals, known = np.zeros((S, S, 3)), np.zeros((S, S), bool)
    right, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    cross = np.cross(down, right)
    with np.errstate(divide="ignore", invalid="ignore"):
        near = 1 / depth
        normals[1:-1, 1:-1] = cross / np.linalg.norm(cross, axis=-1, keepdims=True)
        middle = near[1:-1, 1:-1]
        bend = [near[1:-1, 2:] + near[1:-1, :-2] - 2 * middle, near[2:, 1:-1] + near[:-2, 1:-1] - 2 * middle]
        known[1:-1, 1:-1] = np.abs(bend).max(0) < 0.02 * middle            # false where something is infinite or not a number
    known &= np.isfinite(normals).all(-1)
    return np.where(known[..., None], normals, 0), known


def pack(values, known=True):
    """Numbers in [0, 1] -> uint16, in steps of 1.5e-5; 0 is: not known."""
    return np.where(known, 1 + np.rint(65534 * np.clip(np.nan_to_num(values), 0, 1)), 0).astype(np.uint16)


def unpack(packed):
    """The reverse, on torch tensors -> float32; -1 is: not known."""
    values = packed.to(torch.int32)
    return torch.where(values == 0, -1.0, (values - 1) / 65534)


def store_scenes(folder, split, images, depth, normals, known, domains, vanishing=None):
    """Write a split to the cache: <split>.npy for Episodes, and the labels of the other tasks beside it."""
    arrays = {"": images, "-depth": pack(depth / DEPTH_LIMIT, (depth > 0) & (depth <= DEPTH_LIMIT)),
              "-normals": pack((normals + 1) / 2, known[..., None]), "-domains": domains}
    for ending, array in (arrays | ({} if vanishing is None else {"-vanishing": vanishing.astype(np.float32)})).items():
        content = io.BytesIO()
        np.save(content, array)
        atomic_write(folder / f"{split}{ending}.npy", content.getvalue())


def prepare_scenes(size, cache_dir):
    """The folder of the ray-cast scenes, drawn once. Any change to the functions that draw them draws them again."""
    drawing = (uniform, Draws, scene_class, scene_domain, cast, pattern, turn, camera_rays, draw_scenes, pack, store_scenes)
    settings = f"{SCENE_CLASSES} {SCENE_DOMAINS} {SCENE_IMAGES} {DEPTH_LIMIT} {BOXES} {BALLS}"
    version = hashlib.sha256("".join([settings, *map(inspect.getsource, drawing)]).encode()).hexdigest()[:12]
    folder, step = Path(cache_dir) / f"scenes-{size}-{version}", 16
    if (folder / "classes.json").exists():
        return folder
    classes = {}
    with tqdm(total=SCENE_IMAGES * sum(SCENE_DOMAINS.values()), desc=f"scenes: ray-casting SYNTHETIC images of {size} px, once",
              unit=" images", disable=None, leave=False) as bar:
        for split in SPLITS:
            parts = []
            for domain in range(SCENE_DOMAINS[split]):
                for first in range(0, SCENE_IMAGES, step):
                    images, depth, normals, vanishing, kinds = draw_scenes(split, domain, first, step, size)
                    depth, normals = depth.astype(np.float32), normals.astype(np.float32)
                    parts.append((images, depth, normals, vanishing, kinds, np.full(step, domain)))
                    bar.update(step)
            images, depth, normals, vanishing, kinds, domains = (np.concatenate(part) for part in zip(*parts))
            order = np.argsort(kinds, kind="stable")            # by class, as Episodes wants it
            images, depth, normals, vanishing, domains = (x[order] for x in (images, depth, normals, vanishing, domains))
            store_scenes(folder, split, images, depth, normals, np.ones_like(depth, bool), domains, vanishing)
            classes[split] = [[f"scenes-{split}-class-{c:02d}", int(n)] for c, n in enumerate(np.bincount(kinds))]
    atomic_write(folder / "classes.json", json.dumps(classes))          # last: its presence says that all is there
    return folder


def depth_folders(paths):
    """Folders `<split>/<domain>/` that hold a focal.txt -> {split: (archive, {domain: [(photograph, depth image), ...]})}, or None."""
    found = {}
    for path in paths:
        archive = Archive(path)
        domains = [name.rpartition("/")[0] for name in archive.names if name.endswith("/focal.txt")]
        by_name = set(archive.names)
        for domain, files in by_folder(archive, archive.image_names()).items():
            photographs = [name for _, name in files if not name.lower().endswith(".png")]
            if domain in domains:
                pairs = [(name, f"{name.rpartition('.')[0]}.png") for name in photographs]
                for name, depth in pairs:
                    if depth not in by_name:
                        fail(f"{archive.path}: {name} has no depth image {depth} (16 bits, millimetres): put it there, or remove "
                             "the photograph")
                found.setdefault(path.stem, (archive, {}))[1][domain] = pairs
            elif domains:
                fail(f"{archive.path}: {domain} has no focal.txt (the focal length in pixels), as other folders have: put it there")
    return found or None


def prepare_depth_folders(mode, size, paths, found, cache_dir):
    """The folder of decoded photographs with depth. The largest square in an image's middle is used; a domain is a class, too."""
    folder, classes = Path(cache_dir) / f"{mode}-depth-{size}-{fingerprint(paths)}", {}
    if (folder / "classes.json").exists():
        return folder
    for split, (archive, domains) in found.items():
        parts = []
        for number, (domain, pairs) in enumerate(domains.items()):
            text = archive.read(f"{domain}/focal.txt").decode(errors="replace").strip()
            try:
                focal = float(text)
            except ValueError:
                focal = 0
            if not focal > 0:
                fail(f"{archive.path}: {domain}/focal.txt holds {text[:40]!r}: write the focal length in pixels")
            for name, beside in tqdm(pairs, desc=f"{mode}: {domain}, once", disable=None, leave=False):
                try:
                    image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                    depth = Image.fromarray(np.asarray(Image.open(io.BytesIO(archive.read(beside)))).astype(np.int32))
                except Exception as error:  # noqa: BLE001 (Pillow's decoders raise nearly anything on damaged files)
                    fail(f"{archive.path}: {name} or {beside} cannot be decoded ({error}): replace or remove it")
                if image.size != depth.size:
                    fail(f"{archive.path}: {name} has {image.size} pixels, {beside} {depth.size}: they must be the same view")
                side = min(image.size)
                left, upper = (image.width - side) // 2, (image.height - side) // 2
                box = left, upper, left + side, upper + side
                pixels = np.asarray(image.crop(box).resize((size, size), Image.Resampling.LANCZOS))
                metres = np.asarray(depth.crop(box).resize((size, size), Image.Resampling.NEAREST)) / 1000
                normals, known = normals_from_depth(metres, focal * size / side)
                parts.append((pixels, metres.astype(np.float32), normals.astype(np.float32), known, number))
        images, depth, normals, known, domain_of = (np.stack(part) for part in zip(*parts))
        store_scenes(folder, split, images, depth, normals, known, domain_of)
        classes[split] = [[domain.removeprefix(f"{split}/"), len(pairs)] for domain, pairs in domains.items()]
    atomic_write(folder / "classes.json", json.dumps(classes))
    return folder


# ------------------------------------------------------------------------------------------------------------ episodes

class Task(NamedTuple):
    """One few-shot task, or a batch of T of them with a leading dimension T. N ways, K shots, Q queries, S pixels."""
    support_x: torch.Tensor         # (N*K, 3, S, S) float32 in [0, 1]
    support_y: torch.Tensor         # (N*K,) int64: 0 .. N-1, K times each
    query_x: torch.Tensor           # (N*Q, 3, S, S)
    query_y: torch.Tensor           # (N*Q,)
    mode: torch.Tensor              # () int64: index of the task's mode. For reports only; no algorithm may look at it


def uniform(name, block, count):
    """Random numbers (count,) in [0, 1), number `block` of those that `name` stands for.

    A counter-based generator is a function from (key, counter) to random bits: nothing to store, nothing to replay.
    The raw bits of Philox are fixed for all versions of numpy; only arithmetic on integers and doubles follows.
    """
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    bits = np.random.Philox(key=key, counter=[0, block, 0, 0]).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0 ** -53


class Episodes:
    """Draws tasks from one or several modes.

    Task number g comes from mode g mod M and is that mode's task number g // M: modes take turns, which balances them
    exactly (the released code starts each batch at a random mode, which balances them on average).

    Args:
        modes: names of the M modes. split: "train", "val" or "test". ways, shots, queries: N, K, Q.
        image_size: S, pixels. seed: of training episodes; None for val and test, whose tasks are the same for every run.
        device: where images live and tasks are assembled. root, cache_dir, synthetic: see `prepare`.

    Exits with status 2 if a class has fewer than K + Q images or a split fewer than N classes.
    """
    BLOCK = 256                     # tasks of one mode that are drawn together; part of what defines a task

    def __init__(self, modes, split, ways, shots, queries, image_size, seed=None, device="cpu",
                 root="data", cache_dir=".cache", synthetic=False):
        self.modes = [canonical_mode(mode, root) for mode in modes]
        self.split, self.ways, self.shots, self.queries = split, ways, shots, queries
        self.seed, self.size, self.device, self.synthetic = seed, image_size, torch.device(device), synthetic
        self.images, self.counts, self.offsets, self.class_names, self.folders, self.drawn = [], [], [], [], [], {}
        if len(set(self.modes)) < len(self.modes):
            fail(f"--modes names a data set twice: {' '.join(self.modes)}")
        for mode in self.modes:
            folder = prepare(mode, image_size, root, cache_dir, synthetic)
            classes = json.loads((folder / "classes.json").read_text()).get(split, [])
            if len(classes) < ways:
                fail(f"{mode}/{split} has {len(classes)} classes, fewer than {ways} ways: lower --ways or add classes")
            name, least = min(classes, key=lambda item: item[1])
            if least < shots + queries:
                fail(f"{mode}/{split}: class {name} has {least} images, {shots} shots + {queries} queries need "
                     f"{shots + queries}: lower --shots or --queries, or add images")
            pixels = torch.from_numpy(np.load(folder / f"{split}.npy", mmap_mode="c"))      # (n, S, S, C) uint8
            pixels = pixels.to(self.device)                 # on the CPU: stays on disk, paged in as needed
            if mode == "omniglot" and self.device.type != "cpu":        # room for the images turned in all four ways
                pixels = torch.cat([torch.rot90(pixels, quarter, (1, 2)) for quarter in range(4)])
            self.images.append(pixels)
            self.counts.append(np.array([count for _, count in classes]))
            self.offsets.append(np.cumsum(self.counts[-1]) - self.counts[-1])
            self.class_names.append([name for name, _ in classes])
            self.folders.append(folder.name)                # names what the images were made from

    @classmethod
    def of(cls, args, split):
        """Episodes as the flags of a script describe them; only training depends on the seed."""
        return cls(args.modes, split, args.ways, args.shots, args.queries, args.image_size,
                   args.seed if split == "train" else None, args.device, args.data_root, args.cache_dir, args.synthetic)

    def draw(self, m, block):
        """Tasks block * 256 .. + 255 of mode m, drawn at once -> classes (256, N), images (256, N, K+Q), turns (256, N)."""
        name = f"{self.modes[m]} {self.split} {self.ways} {self.shots} {self.queries} {self.seed}"
        T, N, k, counts = self.BLOCK, self.ways, self.shots + self.queries, self.counts[m]
        u = uniform(name, block, T * N * (k + 2))
        u_class, u_image, u_turn = np.split(u, [T * N, T * N * (1 + k)])
        classes = distinct(u_class.reshape(T, N), np.full(T, len(counts)))
        images = distinct(u_image.reshape(T * N, k), counts[classes.reshape(-1)]).reshape(T, N, k)
        return classes, images, (4 * u_turn).astype(np.int64).reshape(T, N)

    def indices(self, m, first, count):
        """Tasks first .. first + count - 1 of mode m -> the arrays of `draw`, and the rows (count, N, K+Q) of their images,
        on the device. Omniglot has 4 n rows for its n images: row r + turn * n is image r, turned."""
        blocks = range(first // self.BLOCK, (first + count - 1) // self.BLOCK + 1)
        self.drawn = {key: value for key, value in self.drawn.items() if key[0] != m or key[1] in blocks}
        for block in blocks:
            if (m, block) not in self.drawn:
                classes, images, turns = self.draw(m, block)
                rows = torch.from_numpy(self.offsets[m][classes][..., None] + images)
                if self.modes[m] == "omniglot":
                    rows += torch.from_numpy(turns)[..., None] * self.counts[m].sum()
                # A copy from the host makes it wait for the device: so one a block, not one a batch.
                self.drawn[m, block] = classes, images, turns, rows.to(self.device)
        start = first - blocks[0] * self.BLOCK
        *drawn, rows = zip(*(self.drawn[m, block] for block in blocks))
        return [*(np.concatenate(parts)[start:start + count] for parts in drawn), torch.cat(rows)[start:start + count]]

    def tasks(self, first, count):
        """Tasks number first .. first + count - 1 over all modes, on the device -> Task with a leading dimension `count`."""
        N, K, Q, S, M = self.ways, self.shots, self.queries, self.size, len(self.modes)
        # On the CPU the first touch of fresh memory costs more than all else here; numpy asks for huge pages, torch not.
        support, query = (torch.empty(count, N, k, 3, S, S, device=self.device) if self.device.type != "cpu" else
                          torch.from_numpy(np.empty((count, N, k, 3, S, S), np.float32)) for k in (K, Q))
        for m in range(M):
            turn = (m - first) % M                          # this mode's first place in the batch
            if turn >= count:
                continue
            places = slice(turn, count, M)
            *_, rows = self.indices(m, (first + turn) // M, len(range(count)[places]))
            flat, n = rows.reshape(-1), len(self.images[m])
            pixels = self.images[m][flat % n]               # (tasks * N * (K+Q), S, S, C)
            if self.modes[m] == "omniglot" and self.device.type == "cpu":       # a quarter of the memory, and slower
                for quarter in (1, 2, 3):
                    turned = (flat // n == quarter).nonzero().squeeze(1)
                    pixels[turned] = torch.rot90(pixels[turned], quarter, (1, 2))
            pixels = pixels.view(*rows.shape, S, S, -1).permute(0, 1, 2, 5, 3, 4)       # (tasks, N, K+Q, C, S, S)
            support[places], query[places] = pixels[:, :, :K], pixels[:, :, K:]         # to float, C to 3 channels
        labels = torch.arange(N, device=self.device)
        return Task(support.div_(255).view(count, N * K, 3, S, S), labels.repeat_interleave(K).expand(count, -1),
                    query.div_(255).view(count, N * Q, 3, S, S), labels.repeat_interleave(Q).expand(count, -1),
                    (first + torch.arange(count)) % M)

    def repeated(self, iteration, count):
        """Draw the tasks of a training iteration as the released codes of MMAML and KML do -> like `tasks`.

        There, each of the M modes loads `count` tasks (T), and the T tasks of the iteration are drawn from these *with
        replacement*, T / M from each mode. So of 10 tasks 8.2 differ on average with two modes, and 6.5 with one.
        """
        M, first = len(self.modes), iteration * count
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + iteration)
        drawn = torch.randint(count, (count,), generator=rng).tolist()
        numbers = [(first + at) * M + (first + place) % M for place, at in enumerate(drawn)]
        tasks = [self.tasks(number, 1) for number in numbers]
        return Task(*(torch.cat(parts) for parts in zip(*tasks)))

    def everything(self, number):
        """All images of the classes of task `number`, with their labels in it -> (n, 3, S, S), (n,)."""
        m, S = number % len(self.modes), self.size
        classes, _, turns, _ = (x[0] for x in self.indices(m, number // len(self.modes), 1))
        parts = [self.images[m][self.offsets[m][c]:][:self.counts[m][c]] for c in classes]
        if self.modes[m] == "omniglot":
            parts = [torch.rot90(part, int(quarters), (1, 2)) for part, quarters in zip(parts, turns)]
        labels = torch.cat([torch.full((len(part),), n, device=self.device) for n, part in enumerate(parts)])
        return torch.cat(parts).permute(0, 3, 1, 2).expand(-1, 3, S, S).float() / 255, labels

    def sha256(self, count):
        """A hash of the first `count` tasks: modes, names and sizes of their classes, and the indices drawn."""
        digest = hashlib.sha256()
        for m, mode in enumerate(self.modes):
            digest.update(f"{mode} {self.class_names[m]} {self.counts[m].tolist()}".encode())
            if tasks := len(range(m, count, len(self.modes))):
                for array in self.indices(m, 0, tasks)[:3]:
                    digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


class Completions:
    """Draws regression tasks: an image is a task, whose colours are to be learned from some of its pixels, the *context*.

    Task fields here: support_x (k, 2) the context's places (row / S, column / S), support_y (k, 3) its colours in [0, 1],
    query_x (S*S, 2) and query_y (S*S, 3) those of all pixels, in raster order. (Garnelo et al., ICML 2018; CAVIA's protocol.)

    Args:
        mode: a data set, whose classes do not matter here. split, image_size, seed, device and so on: as for `Episodes`.
        pixels: k. ordered: the context is the first k pixels in raster order, else drawn without replacement.

    A training task is an image drawn with replacement; test and validation tasks go through the split once, in a fixed order
    that mixes its classes.
    """
    BLOCK = 256                     # tasks that are drawn together; part of what defines a task

    def __init__(self, mode, split, pixels, ordered, image_size, seed=None, device="cpu", root="data", cache_dir=".cache",
                 synthetic=False):
        self.mode, self.split, self.pixels, self.ordered = canonical_mode(mode, root), split, pixels, ordered
        self.seed, self.size, self.device, self.synthetic = seed, image_size, torch.device(device), synthetic
        if not 1 <= pixels <= image_size ** 2:
            fail(f"--pixels {pixels}: an image has {image_size ** 2}; give a number from 1 to that")
        folder = prepare(mode, image_size, root, cache_dir, synthetic)
        self.folders = [folder.name]                        # names what the images were made from
        images = torch.from_numpy(np.load(folder / f"{split}.npy", mmap_mode="c")).to(self.device)     # (n, S, S, C) uint8
        self.images = images.flatten(1, 2)                  # (n, S*S, C)
        n = len(images)
        self.order = distinct(uniform(f"order of {self.mode} {split}", 0, n)[None], np.array([n]))[0]
        self.places = torch.cartesian_prod(*[torch.arange(image_size, device=self.device) / image_size] * 2)     # (S*S, 2)

    @classmethod
    def of(cls, args, split):
        """Tasks as the flags of a script describe them; only training depends on the seed."""
        (mode,) = args.modes
        made = cls(mode, split, args.pixels, args.order == "ordered", args.image_size, args.seed if split == "train" else None,
                   args.device, args.data_root, args.cache_dir, args.synthetic)
        if split != "train" and getattr(args, f"{split}_tasks") > len(made.images):
            fail(f"--{split}-tasks {getattr(args, f'{split}_tasks')}: {made.mode}/{split} has {len(made.images)} images; give at most that")
        return made

    def indices(self, first, count):
        """Images (count,) and context pixels (count, k) of tasks first .. first + count - 1. See `Episodes.draw`."""
        blocks, found = range(first // self.BLOCK, (first + count - 1) // self.BLOCK + 1), []
        name = f"completion {self.mode} {self.split} {self.size} {self.pixels} {self.seed}"
        for block in blocks:
            u = uniform(name, block, self.BLOCK * (1 + self.pixels))
            images = (u[:self.BLOCK] * len(self.images)).astype(np.int64)
            if self.seed is None:
                images = np.resize(self.order, (block + 1) * self.BLOCK)[block * self.BLOCK:]
            context = np.tile(np.arange(self.pixels), (self.BLOCK, 1))
            if not self.ordered:
                context = distinct(u[self.BLOCK:].reshape(self.BLOCK, -1), np.full(self.BLOCK, self.size ** 2))
            found.append((images, context))
        start = first - blocks[0] * self.BLOCK
        return tuple(np.concatenate(parts)[start:start + count] for parts in zip(*found))

    def tasks(self, first, count):
        """Tasks number first .. first + count - 1, on the device -> Task with a leading dimension `count`."""
        images, context = (torch.from_numpy(x).to(self.device) for x in self.indices(first, count))
        colours = self.images[images].expand(-1, -1, 3).float() / 255                                   # (count, S*S, 3)
        return Task(self.places[context], colours.gather(1, context[..., None].expand(-1, -1, 3)),
                    self.places.expand(count, -1, -1), colours, torch.zeros(count, dtype=torch.int64))

    def sha256(self, count):
        """A hash of the first `count` tasks: the mode, its number of images, and the indices drawn."""
        digest = hashlib.sha256(f"{self.mode} {len(self.images)} {self.size}".encode())
        for array in self.indices(0, count):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


# Student's t: 97.5 % quantiles, of 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
           2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def student(n):
    """Half a 95 % interval of the mean of n independent values, in standard errors: Student's t; 1.96, of many, from n = 32 on."""
    return STUDENT[n - 2] if 2 <= n < 32 else 1.96


class Scenes:
    """Draws subtasks that differ in domain: one image-to-label problem, `kind`, on images of one domain.

    Task fields here: support_x (n, 3, S, S) and query_x (m, 3, S, S); support_y and query_y by kind, in [0, 1], -1 where not
    known: "depth" (n, 1, S, S), z / 10 m; "normals" (n, 3, S, S), (normal + 1) / 2; "vanishing" (n, 2), shares of width and
    height; mode: the domain's index.

    Args:
        kind: one of KINDS. mode: "scenes", or a folder of photographs with depth: `<root>/<mode>/{train,val,test}/<domain>/`
        with <name>.jpg beside <name>.png (16 bits, millimetres, 0 where not known) and focal.txt (pixels).
        support, queries: n, m. The rest is as for `Episodes`.

    Domains take turns in test and validation, and are drawn in training. Exits with status 2 if a domain has too few images.
    """
    BLOCK = 256                     # tasks that are drawn together; part of what defines a task

    def __init__(self, kind, mode, split, support, queries, image_size, seed=None, device="cpu", root="data", cache_dir=".cache",
                 synthetic=False):
        self.kind, self.mode, self.split, self.support, self.queries = kind, canonical_mode(mode, root), split, support, queries
        self.seed, self.size, self.device, self.synthetic = seed, image_size, torch.device(device), synthetic
        folder = prepare(self.mode, image_size, root, cache_dir, synthetic)
        self.folders = [folder.name]                        # names what the images were made from
        if not (folder / f"{split}-{kind}.npy").exists():
            fail(f"{self.mode}/{split} has no labels for {kind}: use --modes scenes (ray-cast), or leave {kind} out of --tasks")
        self.images, self.labels = (torch.from_numpy(np.load(folder / f"{split}{end}.npy", mmap_mode="c")).to(self.device)
                                    for end in ("", f"-{kind}"))
        domains = np.load(folder / f"{split}-domains.npy")
        self.counts = np.bincount(domains)
        self.rows, self.offsets = np.argsort(domains, kind="stable"), np.cumsum(self.counts) - self.counts
        if self.counts.min() < support + queries:
            fail(f"{self.mode}/{split}: a domain has {self.counts.min()} images, {support} support images + {queries} queries need "
                 f"{support + queries}: lower --ways, --shots or --queries, or add images")

    @classmethod
    def of(cls, args, split, kind):
        """Subtasks as the flags of a script describe them: N*K support images and N*Q queries, as many as in classification."""
        (mode,) = args.modes
        return cls(kind, mode, split, args.ways * args.shots, args.ways * args.queries, args.image_size,
                   args.seed if split == "train" else None, args.device, args.data_root, args.cache_dir, args.synthetic)

    def indices(self, first, count):
        """Domains (count,) and rows of images (count, n + m) of tasks first .. first + count - 1. See `Episodes.draw`."""
        blocks, found = range(first // self.BLOCK, (first + count - 1) // self.BLOCK + 1), []
        k = self.support + self.queries
        for block in blocks:
            name = f"domains {self.mode} {self.split} {self.support} {self.queries} {self.seed}"
            if self.seed is not None:                       # high-level tasks are trained on different images, and tested on the same
                name += f" {self.kind}"
            u = uniform(name, block, self.BLOCK * (1 + k))
            domains = (u[:self.BLOCK] * len(self.counts)).astype(np.int64)
            if self.seed is None:
                domains = (block * self.BLOCK + np.arange(self.BLOCK)) % len(self.counts)
            images = distinct(u[self.BLOCK:].reshape(self.BLOCK, k), self.counts[domains])
            found.append((domains, self.rows[self.offsets[domains][:, None] + images]))
        start = first - blocks[0] * self.BLOCK
        return tuple(np.concatenate(parts)[start:start + count] for parts in zip(*found))

    def look_up(self, rows):
        """Images and labels (..., 3, S, S), ... of rows (...) of the data."""
        rows = torch.from_numpy(rows).to(self.device)
        x, y = self.images[rows].transpose(-1, -2).transpose(-2, -3).float() / 255, self.labels[rows]
        if self.kind == "vanishing":
            return x, y
        y = unpack(y)
        return x, y[..., None, :, :] if self.kind == "depth" else y.transpose(-1, -2).transpose(-2, -3)

    def tasks(self, first, count):
        """Tasks number first .. first + count - 1, on the device -> Task with a leading dimension `count`."""
        domains, rows = self.indices(first, count)
        support, query = self.look_up(rows[:, :self.support]), self.look_up(rows[:, self.support:])
        return Task(*support, *query, torch.from_numpy(domains))

    def everything(self, number):
        """All images of the domain of task `number`, with their labels."""
        domain = self.indices(number, 1)[0][0]
        return self.look_up(self.rows[self.offsets[domain]:][:self.counts[domain]])

    def sha256(self, count):
        """A hash of the first `count` tasks: the kind, the mode, its domains' sizes, and the indices drawn."""
        digest = hashlib.sha256(f"{self.kind} {self.mode} {self.counts.tolist()} {self.size}".encode())
        for array in self.indices(0, count):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


class MetaTasks:
    """Subtasks of several high-level tasks, which take turns: task number g is of the (g mod J)th of them, its number g // J.

    Args: args, the flags of a script, among them tasks, J of KINDS. split. `domains`: {kind: number of domains that take turns}.
    """

    def __init__(self, args, split):
        self.split = split
        self.of = [Episodes.of(args, split) if kind == "classification" else Scenes.of(args, split, kind) for kind in args.tasks]
        self.folders = list(dict.fromkeys(folder for sampler in self.of for folder in sampler.folders))
        self.domains = {kind: len(sampler.counts) for kind, sampler in zip(args.tasks, self.of) if kind != "classification"}

    def tasks(self, first, count):
        """Tasks number first .. first + count - 1, both multiples of J -> a Task of count / J subtasks for each high-level task."""
        J = len(self.of)
        return [sampler.tasks(first // J, count // J) for sampler in self.of]

    def sha256(self, count):
        """A hash of the first `count` tasks; of one high-level task, that of its sampler."""
        hashes = [sampler.sha256(count // len(self.of)) for sampler in self.of]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


class Alphabets:
    """Draws multi-shot tasks: an alphabet is a task, N of its characters the classes, each with a number of training drawings
    of its own, from shots[0] to shots[1]; Q other drawings of each are held out. Training goes by `steps` batches of B images,
    picked at random, with replacement, from the task's training drawings. (After LEAP's protocol: Flennerhag et al., ICLR
    2019; modgrad_multishot.py says where its code differs.)

    Task fields here: support_x (steps, B, 1, S, S) and support_y (steps, B), a batch a step; query_x (N*Q, 1, S, S) and query_y
    (N*Q,), the held-out drawings; mode: number of the alphabet within the split. Every image is turned by any angle, moved by
    up to 20 % and scaled by 0.8 to 1.2, anew each time it is shown (the ranges of LEAP's code, which does so with those held
    out, too).

    Args:
        mode: a data set whose classes lie in folders `<alphabet>/<character>`, as the published Omniglot. Alphabets of fewer
            than N characters are left out; the others, sorted and shuffled with a fixed seed, are 25 for training, then 10 for
            testing, and those left for validation (Omniglot, N = 20: 46 = 25 + 10 + 11). The split into characters that
            `Episodes` uses does not matter here. synthetic: alphabets are invented, N characters in a row of those drawn,
            from every second one on: of the first 52 for training, of 24 others each for validation and testing.
        shots: (fewest, most). split, image_size, seed, device and so on: as for `Episodes`.

    Alphabets take turns: in training in a new random order each time, else in a fixed one. Fewer steps are a prefix of more.
    """

    def __init__(self, mode, split, ways, shots, queries, steps, batch, image_size, seed=None, device="cpu", root="data",
                 cache_dir=".cache", synthetic=False):
        self.mode, self.split, self.ways, self.shots, self.queries = canonical_mode(mode, root), split, ways, tuple(shots), queries
        self.steps, self.batch, self.seed, self.size = steps, batch, seed, image_size
        self.device, self.synthetic = torch.device(device), synthetic
        folder, classes, alphabets = prepare(mode, image_size, root, cache_dir, synthetic), [], {}
        self.folders = [folder.name]                        # names what the images were made from
        sizes, images = json.loads((folder / "classes.json").read_text()), []
        for part in SPLITS:                                 # all characters: alphabets are split here, not characters
            if part in sizes:
                classes += sizes[part]
                images.append(torch.from_numpy(np.load(folder / f"{part}.npy", mmap_mode="c"))[..., :1])
        self.images = torch.cat(images).squeeze(-1).to(self.device)                                     # (n, S, S) uint8
        ends = np.cumsum([count for _, count in classes])
        drawn = [(name, end - count, count) for (name, count), end in zip(classes, ends)]       # name, first row, drawings
        if synthetic:
            pool = dict(zip(("train", "val", "test"), (drawn[:52], drawn[52:76], drawn[76:])))[split]
            chosen = {f"{split}-{first}": pool[first:first + ways] for first in range(0, len(pool) - ways + 1, 2)}
        else:
            for item in drawn:
                alphabets.setdefault(item[0].rpartition("/")[0], []).append(item)
            names = sorted(name for name, characters in alphabets.items() if name and len(characters) >= ways)
            np.random.RandomState(123).shuffle(names)
            chosen = {name: alphabets[name] for name in {"train": names[:25], "val": names[35:], "test": names[25:35]}[split]}
            if len(names) < 37:
                fail(f"{self.mode} has {len(names)} alphabets (folders of class folders) of at least {ways} characters, 37 are "
                     "needed: lower --ways, or put the published archives there")
        if len(chosen) < 2:
            fail(f"{self.mode}/{split} has {len(chosen)} alphabets of {ways} characters, 2 are needed: lower --ways")
        name, _, least = min((item for characters in chosen.values() for item in characters), key=lambda item: item[2])
        if least < shots[1] + queries:
            fail(f"{self.mode}: character {name} has {least} drawings, {shots[1]} shots + {queries} queries need "
                 f"{shots[1] + queries}: lower --shots or --queries")
        self.names, self.characters = list(chosen), [np.array([item[1:] for item in x]) for x in chosen.values()]

    @classmethod
    def of(cls, args, split):
        """Tasks as the flags of a script describe them; only training depends on the seed, and has --steps, not --test-steps."""
        (mode,), train = args.modes, split == "train"
        return cls(mode, split, args.ways, args.shots, args.queries, args.steps if train else args.test_steps, args.batch,
                   args.image_size, args.seed if train else None, args.device, args.data_root, args.cache_dir, args.synthetic)

    def alphabets(self, first, count):
        """Numbers (count,) of the alphabets of tasks first .. first + count - 1."""
        numbers, A = np.arange(first, first + count), len(self.names)
        if self.seed is None:
            return numbers % A
        name = f"order of alphabets {self.mode} {self.seed}"
        order = [distinct(uniform(name, turn, A)[None], np.array([A]))[0] for turn in range(first // A, numbers[-1] // A + 1)]
        return np.concatenate(order)[numbers - first // A * A]

    def draw(self, number, alphabet):
        """Task `number` -> rows of the held-out drawings (N, Q), rows (steps, B) and labels (steps, B) of the batches, and uniform
        numbers (N*Q + steps*B, 4) for turning, scaling and moving them, the held-out ones first."""
        N, Q, (fewest, most), shown = self.ways, self.queries, self.shots, self.steps * self.batch
        characters = self.characters[alphabet]
        name = f"alphabets {self.mode} {self.split} {N} {self.shots} {Q} {self.batch} {self.seed}"
        u = uniform(name, number, N * (2 + Q + most + 4 * Q) + 5 * shown)
        u_class, u_shots, u_drawing, u_query, u_batch = np.split(u, np.cumsum([N, N, N * (Q + most), 4 * N * Q]))
        starts, counts = characters[distinct(u_class[None], np.array([len(characters)]))[0]].T
        rows = starts[:, None] + distinct(u_drawing.reshape(N, Q + most), counts)
        shots = fewest + (u_shots * (most - fewest + 1)).astype(np.int64)
        labels = np.repeat(np.arange(N), shots)                             # of the task's training drawings
        places = np.arange(len(labels)) - np.repeat(np.cumsum(shots) - shots, shots)
        u_batch = u_batch.reshape(shown, 5)
        pick = (u_batch[:, 0] * len(labels)).astype(np.int64).reshape(self.steps, self.batch)
        return rows[:, :Q], rows[labels[pick], Q + places[pick]], labels[pick], np.concatenate([u_query.reshape(-1, 4), u_batch[:, 1:]])

    def indices(self, first, count):
        """Of tasks first .. first + count - 1: alphabets (count,), and the arrays of `draw` with a leading dimension `count`."""
        alphabets = self.alphabets(first, count)
        drawn = [self.draw(first + i, alphabet) for i, alphabet in enumerate(alphabets)]
        return [alphabets, *(np.stack(arrays) for arrays in zip(*drawn))]

    def tasks(self, first, count):
        """Tasks number first .. first + count - 1, on the device -> Task with a leading dimension `count`."""
        N, Q, S = self.ways, self.queries, self.size
        alphabets, held_out, rows, labels, u = (torch.from_numpy(x).to(self.device) for x in self.indices(first, count))
        rows = torch.cat([held_out.flatten(1), rows.flatten(1)], 1).flatten()               # (count * (N*Q + steps*B),)
        angle, scale, right, down = u.flatten(0, 1).float().unbind(1)
        angle, scale = 2 * np.pi * angle, 0.8 + 0.4 * scale
        right, down = 0.8 * right - 0.4, 0.8 * down - 0.4                                   # the image's side is 2 long
        cos, sin = angle.cos() / scale, angle.sin() / scale
        places = torch.stack([cos, -sin, right, sin, cos, down], 1).view(-1, 2, 3)
        grid = torch.nn.functional.affine_grid(places, (len(rows), 1, S, S), align_corners=False)
        x = torch.nn.functional.grid_sample(self.images[rows][:, None] / 255, grid, align_corners=False)
        query, support = x.view(count, -1, 1, S, S).split([N * Q, self.steps * self.batch], 1)
        return Task(support.reshape(count, self.steps, self.batch, 1, S, S), labels,
                    query, torch.arange(N, device=self.device).repeat_interleave(Q).expand(count, -1), alphabets)

    def sha256(self, count):
        """A hash of the first `count` tasks: the mode, the alphabets, and the indices drawn (not the turns)."""
        digest = hashlib.sha256(f"{self.mode} {self.names} {self.size}".encode())
        for array in self.indices(0, count)[:4]:
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


def distinct(u, counts):
    """Draw without replacement: row r gives k different numbers below counts[r], in random order.

    Args: u (R, k) uniform in [0, 1); counts (R,) int, all >= k. Returns int64 (R, k). Fisher-Yates, all rows at once.
    """
    R, k = u.shape
    deck, rows = np.tile(np.arange(counts.max(), dtype=np.int32), (R, 1)), np.arange(R)
    for i in range(k):
        j = i + (u[:, i] * (counts - i)).astype(np.int64)
        deck[rows, j], deck[:, i] = deck[:, i].copy(), deck[rows, j]
    return deck[:, :k].astype(np.int64)


# --------------------------------------------------------------------------------------------------------------- tool

def show(episodes, number, path, cell=84):
    """Write a picture of task `number`: a row per class, its support images left of the gap, its queries right."""
    task = episodes.tasks(number, 1)
    N, K, Q, gap = episodes.ways, episodes.shots, episodes.queries, 12
    picture = Image.new("RGB", ((K + Q) * (cell + 2) + gap, N * (cell + 2) + 16), "white")
    pen = ImageDraw.Draw(picture)
    mode = "SYNTHETIC " * episodes.synthetic + episodes.modes[number % len(episodes.modes)]
    pen.text((2, 2), f"{mode} {episodes.split} task {number}: support left of the gap, query right", "black")
    for n in range(N):
        for x, first, total, left in ((task.support_x[0], n * K, K, 0), (task.query_x[0], n * Q, Q, K)):
            for i in range(total):
                tile = (x[first + i].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
                tile = Image.fromarray(tile).resize((cell, cell), Image.Resampling.NEAREST)
                picture.paste(tile, ((left + i) * (cell + 2) + (gap if left else 0), n * (cell + 2) + 16))
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue())


def show_scenes(mode, split, size, number, path, root, cache_dir, cell=150, rows=10):
    """Write a picture: a row for each domain; its image `number`, depth, normals, vanishing point."""
    folder = prepare(mode, size, root, cache_dir, mode == "scenes")
    images, depth, normals, domains = (np.load(folder / f"{split}{end}.npy") for end in ("", "-depth", "-normals", "-domains"))
    points = np.load(folder / f"{split}-vanishing.npy") if (folder / f"{split}-vanishing.npy").exists() else None
    kinds = [name for name, count in json.loads((folder / "classes.json").read_text())[split] for _ in range(count)]
    heads = ["image", "depth, near is bright", "normals", *["vanishing point"] * (points is not None)]
    count = min(rows, domains.max() + 1)
    picture = Image.new("RGB", (len(heads) * (cell + 4), count * (cell + 18) + 34), "white")
    pen = ImageDraw.Draw(picture)
    mark = "RAY-CAST, NOT MMT: " * (mode == "scenes")
    pen.text((2, 2), f"{mark}{mode} {split}, image {number} of each domain; black in depth and normals is not known", "black")
    for column, head in enumerate(heads):
        pen.text((column * (cell + 4) + 2, 17), head, "black")
    for row in range(count):
        of = np.flatnonzero(domains == row)
        i, top = of[number % len(of)], row * (cell + 18) + 34
        far = depth[i].max()
        near = np.where(depth[i] > 0, 255 - 215.0 * depth[i] / far, 0)
        for column, tile in enumerate([images[i], near, normals[i] / 257, *[images[i]] * (points is not None)]):
            left = column * (cell + 4) + 2
            tile = Image.fromarray(tile.astype(np.uint8)).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(tile, (left, top))
            if column == 3:
                x, y = left + points[i, 0] * cell, top + points[i, 1] * cell
                for reach_x, reach_y in ((8, 0), (0, 8)):
                    pen.line((x - reach_x, y - reach_y, x + reach_x, y + reach_y), "red", 2)
        pen.text((2, top + cell + 1), f"domain {row}, {kinds[i]}", "black")
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("command", choices=("list", "prepare", "show"))
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"{', '.join(LAYOUTS)}, or a folder of yours (all)")
    parser.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="where data sets lie")
    parser.add_argument("--cache-dir", default=".cache", help="where decoded images are kept")
    parser.add_argument("--image-size", type=int, default=84, help="pixels (papers: 84)")
    parser.add_argument("--synthetic", action="store_true", help="procedural stand-ins, no download")
    parser.add_argument("--split", default="test", choices=SPLITS, help="show: of which split")
    parser.add_argument("--task", type=int, default=0, help="show: number of the task")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--queries", type=int, default=6, help="show: query images a class")
    parser.add_argument("--out", help="show: the picture's path (episode-<mode>.png)")
    parser.error = fail
    args = parser.parse_args()
    places = args.data_root, args.cache_dir, args.synthetic
    modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    if min(args.image_size, args.ways, args.shots, args.queries) < 1 or args.task < 0:
        fail("--image-size, --ways, --shots and --queries start at 1, --task at 0")
    if args.out and (args.command != "show" or len(modes) > 1):
        fail("--out names the picture of one mode: show one mode, or leave --out away")
    if args.command == "list":
        own = [path.name for path in sorted(Path(args.data_root).glob("*")) if find_source(path.name, args.data_root)]
        for mode in modes or [*LAYOUTS, *(name for name in own if name not in LAYOUTS)]:
            source, terms = find_source(mode, args.data_root), DOWNLOADS.get(mode, ("", "your own"))[1]
            cached = [p.parent.name for p in sorted(Path(args.cache_dir).glob(f"{mode}-*/classes.json"))]
            where = ", ".join(map(str, source[1])) if source else "not found; downloaded when needed"
            print(f"{mode:13} {where}  [{terms}]" + (f"  cached: {' '.join(cached)}" if cached else ""))
    elif not modes:
        fail(f"{args.command} which mode? For example: python data.py {args.command} omniglot")
    elif args.command == "prepare":
        for mode in modes:
            folder = prepare(mode, args.image_size, *places[:2], args.synthetic or mode == "scenes")
            for split, classes in json.loads((folder / "classes.json").read_text()).items():
                print(f"{mode:13} {split:5} {len(classes):5} classes {sum(n for _, n in classes):6} images  {folder}")
    else:
        for mode in modes:
            path = args.out or f"episode-{mode}.png"
            paths = (find_source(mode, args.data_root) or ("", ()))[1]
            if mode == "scenes" or not args.synthetic and paths and mode not in LAYOUTS and depth_folders(paths):
                show_scenes(mode, args.split, args.image_size, args.task, path, args.data_root, args.cache_dir)
                print(path)
                continue
            show(Episodes([mode], args.split, args.ways, args.shots, args.queries, args.image_size, None, "cpu", *places),
                 args.task, path)
            print(path)


if __name__ == "__main__":
    main()
