"""What a user types: names of modes, and paths."""

import hashlib
import os
import unicodedata
from pathlib import Path

from fewshot.files import fail
from fewshot.published import LAYOUTS, SPLITS, split_of

ALIASES = {"cifar": "fc100", "bird": "cub"}  # the names the released KML code uses
RESERVED = ("overall", "loss")  # stand beside modes' names in reports
LONGEST = 120  # bytes of a mode's name, and of one part of a run's name: file systems allow 255 for all of it


def user_path(text):
    """A path as a user types it, with ~ for the home folder, which a shell leaves as it is in --out=~/runs."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        fail(f"{text}: there is no such home folder: give the whole path")
    if "\0" in path:
        fail("a path holds a zero byte: give another one")
    return path


def shortened(name, longest=200):
    """A name for a file: one that is too long for a file system ends in a hash of all of it instead."""
    if len(os.fsencode(name)) <= longest:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
    begin = os.fsencode(name)[: longest - 13]
    return f"{begin.decode(errors='ignore')}-{digest}"


def folders_in(root):
    """Names of the folders in a folder, sorted; none if it is not there or may not be read."""
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        return []


def folded(name):
    """A name without its case, and with accents written in one way: file systems differ in both."""
    return unicodedata.normalize("NFC", name).lower()


def mode_folders(mode, root):
    """Folders of the root that a mode's name means, the one of exactly that name first."""
    names = [name for name in folders_in(root) if folded(name) == folded(mode)]
    return sorted(names, key=lambda name: name != mode)


def split_places(folder):
    """The splits that lie in a folder -> {"train": path of a folder or zip, ...}; exit if a split is there twice."""
    found = {}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        fail(f"{folder}: cannot be read ({error.strerror}): allow reading it, or remove it")
    for entry in entries:
        stem, ending = os.path.splitext(entry.name)
        is_zip = ending.lower() == ".zip" and entry.is_file()
        split = split_of(stem if is_zip else entry.name)
        if split and (is_zip or entry.is_dir()):
            found.setdefault(split, []).append(Path(folder) / entry.name)
    return {split: one_place(found[split], split) for split in SPLITS if split in found}


def one_place(paths, split):
    """The one of several places of a split that counts: a folder before the zip it was unpacked from."""
    folders = [path for path in paths if path.is_dir()] or paths
    if len(folders) > 1:
        fail(f"{folders[0]} and {folders[1]} are both a {split} split: keep one of them")
    return folders[0]


def canonical_mode(name, root):
    """The mode that a name typed by a user means: a folder of theirs, a published data set in capitals or not, or an alias.

    A folder of class folders wins over an alias: who has a folder `bird` means that folder, not CUB.
    """
    name = plain_name(name, root)
    folders = mode_folders(name, root)
    own = [folder for folder in folders if split_places(Path(root) / folder)]
    lower = name.lower()
    if own:
        return lower if lower in LAYOUTS else own[0]
    if lower in ALIASES:
        return ALIASES[lower]
    if lower in LAYOUTS or not folders:
        return lower if lower in (*LAYOUTS, "scenes") else name
    return folders[0]


def plain_name(text, root):
    """The name of a mode, out of what was typed: without a slash at its end, and without the path if that is the root's."""
    name = text.strip().rstrip("/\\") or text.strip()
    path = os.path.expanduser(name)
    parent = os.path.realpath(os.path.dirname(path) or ".")
    if os.path.dirname(path) and parent == os.path.realpath(root):
        name = os.path.basename(path)
    if not name or name in (".", "..") or "\0" in name:
        fail(f"--modes {text!r}: give the name of a data set, or of a folder under --data-root")
    if "/" in name or "\\" in name:
        place, last = os.path.split(name)
        fail(
            f"--modes {text}: a mode is a folder's name, not a path: give --data-root {place} and the name {last}"
        )
    if name.lower() in RESERVED:
        fail(f"--modes {text}: reports use this name for something else: rename the folder")
    if len(os.fsencode(name)) > LONGEST:
        fail(f"--modes {text[:40]}...: the name is longer than {LONGEST} bytes: rename the folder")
    return name
