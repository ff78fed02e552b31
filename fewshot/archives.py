"""Read zips, tars, folders and pickles without unpacking them and without running code from them."""

import hashlib
import io
import lzma
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fewshot.files import fail

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"),
    *(".apng", ".avif", ".jfif", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".tga"),
)
UNREADABLE_SUFFIXES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".eps", ".cr2", ".nef", ".arw", ".dng")
JUNK_FOLDERS = ("@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found")  # of storage systems
CACHE_FORMAT = 1  # raise when the decoded pixels would change
LARGEST = 1 << 30  # bytes of one file in an archive: what says to be larger is there to fill the memory
READ_ERRORS = (
    *(OSError, EOFError, KeyError, RuntimeError, NotImplementedError, ValueError),
    *(zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile),
)


class Archive:
    """File names and contents of a zip, a tar or a folder, read in place: nothing is ever unpacked to disk.

    Names of a folder begin with the folder's own name, as they would in an archive of it.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.zip = None
        self.tar = None
        self.remedy = "complete the folder" if self.path.is_dir() else "fetch it again"
        try:
            if self.path.is_dir():
                self.names = [
                    file.relative_to(self.path.parent).as_posix() for file in files_below(self.path)
                ]
            elif zipfile.is_zipfile(self.path):
                self.zip = zipfile.ZipFile(self.path)
                self.members = zip_members(self.zip)
                self.names = list(self.members)
            else:
                self.tar = tarfile.open(self.path)  # noqa: SIM115 (read from later on)
                self.members = {
                    member.name: member for member in self.tar if member.isfile() or member.islnk()
                }
                self.names = list(self.members)
        except READ_ERRORS as error:
            fail(f"{self.path}: not a complete zip or tar archive ({error}): {self.remedy}")
        for name in self.names:
            parts = name.replace("\\", "/").split("/")
            if name.startswith(("/", "\\")) or ".." in parts:
                fail(
                    f"{self.path}: holds a path that climbs out of the archive ({name}): do not trust it, {self.remedy}"
                )
        # A compressed tar is fast only where it is read in its order.
        self.rank = {name: i for i, name in enumerate(self.names)}

    def read(self, name):
        """The bytes of one file."""
        if name not in self.rank:
            fail(f"{self.path}: lacks {name}: {self.remedy}")
        try:
            if self.unpacked_size(name) > LARGEST:
                fail(
                    f"{self.path}: {name} is larger than {LARGEST >> 30} GiB unpacked: no image is; {self.remedy}"
                )
            if self.zip:
                return self.zip.read(self.members[name])
            if self.tar:
                return self.tar.extractfile(self.members[name]).read()
            return (self.path.parent / name).read_bytes()
        except MemoryError:
            fail(f"{self.path}: {name} does not fit into memory: {self.remedy}")
        except READ_ERRORS as error:
            fail(f"{self.path}: cannot read {name} ({error}): {self.remedy}")

    def unpacked_size(self, name):
        """Bytes of one file, as the archive says."""
        if self.zip:
            return self.zip.getinfo(self.members[name]).file_size
        if self.tar:
            return self.members[name].size
        return os.path.getsize(self.path.parent / name)

    def find(self, ending):
        """The name of the file whose path ends in `ending`; of several, the shortest. Exits if there is none."""
        found = [name for name in self.names if f"/{name}".endswith(f"/{ending}") and not is_junk(name)]
        return min(found, key=len) if found else fail(f"{self.path}: lacks {ending}: {self.remedy}")

    def check(self, what, found, wanted):
        """Exit if the archive holds another number of `what` than published.

        A split is a rule over all classes, so that of an incomplete archive would silently be another one.
        """
        if found != wanted:
            fail(
                f"{self.path}: holds {found} of {wanted} {what}, so the split would be another one: {self.remedy}"
            )

    def image_names(self):
        """Names of the images, without the resource forks and thumbnails that operating systems leave in archives."""
        return [name for name in self.names if name.lower().endswith(IMAGE_SUFFIXES) and not is_junk(name)]

    def refuse_unreadable_images(self):
        """Fail at a picture in a format that is not read here: left out in silence, it would change the tasks."""
        for name in self.names:
            if name.lower().endswith(UNREADABLE_SUFFIXES) and not is_junk(name):
                fail(
                    f"{self.path}: {name} is in a format that is not read here: convert it to PNG or remove it"
                )


def is_junk(name):
    """Whether a path leads through what systems leave behind: hidden files and folders, resource forks, thumbnails."""
    for part in name.split("/"):
        if part.lower() in JUNK_FOLDERS or part.startswith("__MACOSX"):
            return True
        if part.startswith(".") and part != ".":
            return True
    return False


def zip_members(archive):
    """Files of an open zip -> {name with slashes: name in the zip}. Some tools of Windows write backslashes throughout."""
    names = archive.namelist()
    if any("/" in name for name in names):
        return {name: name for name in names if not name.endswith("/")}
    slashed = {name.replace("\\", "/"): name for name in names}
    return {name: inside for name, inside in slashed.items() if not name.endswith("/")}


def unreadable(error):
    """Fail at a folder that may not be read: passed over, its images would be missing without a word."""
    if not is_junk(os.path.basename(error.filename)):
        fail(f"{error.filename}: cannot be read ({error.strerror}): allow reading it, or remove it")


def files_below(folder):
    """All files below a folder, sorted, through links too; without links that lead nowhere, or to a folder that they lie in."""
    root = os.path.realpath(folder)
    trails = {str(folder): [root]}  # of each folder: the real folders passed on the way to it
    found = []
    for top, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        trail = trails.pop(top)
        ahead = []
        for name in folders:
            path = os.path.join(top, name)
            if os.path.islink(path):
                real = os.path.realpath(path)
            else:
                real = os.path.join(trail[-1], name)
            if real not in trail and os.path.commonpath([real, root]) != real:
                trails[path] = [*trail, real]
                ahead.append(name)
        folders[:] = ahead
        paths = [os.path.join(top, name) for name in names]
        found += [Path(path) for path in paths if os.path.isfile(path)]  # not pipes, nor links to nothing
    return sorted(found)


class Pixels:
    """Images that come as one uint8 array (n, H, W, 3), as pickled data sets do."""

    def __init__(self, path, array):
        holds_bytes = getattr(array, "dtype", None) == np.uint8
        if not holds_bytes or array.ndim != 4 or array.shape[3] != 3:
            fail(f"{path}: holds no uint8 array of images (n, H, W, 3): fetch it again")
        self.path = path
        self.array = array
        self.rank = {i: i for i in range(len(array))}

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
        byte_order = {"<": "<", ">": ">"}.get(state[1], "|")
        self.code = byte_order + self.code.lstrip("<>|=")


class PlainArray:
    """Stands in for numpy.ndarray while unpickling: filled from bytes by our own hands, not by numpy's __setstate__."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        if isinstance(content, str):
            content = content.encode("latin1")
        self.array = array_of_bytes(content, dtype, shape, "F" if fortran else "C")


def array_of_bytes(content, dtype, shape, order):
    """The array of that shape which bytes stand for; order: "C" or "F", as numpy says it."""
    return np.frombuffer(content, dtype.code).reshape(shape, order=order)


class PlainUnpickler(pickle.Unpickler):
    """Reads numeric arrays and plain containers only: unpickling a file from the web could otherwise run any code."""

    def find_class(self, module, name):
        module = module.replace("numpy._core", "numpy.core")  # numpy 2 and numpy 1
        stand_ins = {
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): PlainDtype,
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: PlainArray(),
            ("numpy.core.multiarray", "scalar"): lambda dtype, content: np.frombuffer(content, dtype.code)[0],
            # A function made anew, because a pickle may set attributes of what it gets.
            ("numpy.core.numeric", "_frombuffer"): lambda *given: array_of_bytes(*given),
            ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
        }
        if (module, name) not in stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return stand_ins[module, name]


def read_pickle(path, content):
    """Unpickle `content` (bytes or an open file) that came from `path`: a dict of arrays and plain containers."""
    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        found = PlainUnpickler(file, encoding="latin1").load()
        names = {key: as_text(key) for key in found}
        return {names[key]: getattr(value, "array", value) for key, value in found.items()}
    except Exception as error:  # noqa: BLE001 (a damaged pickle can raise nearly anything)
        fail(
            f"{path}: not a pickle of arrays and plain containers ({error}): do not trust it, delete it and fetch it again"
        )


def as_text(name):
    """A name from a pickle as text: Python 2 wrote bytes."""
    return name.decode("latin1") if isinstance(name, bytes) else name


def by_folder(archive, names):
    """Group image names by the folder they lie in, sorted -> {folder: [(archive, name)]}."""
    classes = {}
    for name in sorted(names):
        classes.setdefault(name.rpartition("/")[0], []).append((archive, name))
    return classes


def fingerprint(paths):
    """A hash of what a cache is made from: the name and size of each file; of a zip its table of contents, which has a checksum
    of each file in it, of other files their times; not where they lie. So a copy of a zip, of the same name, has the same hash."""
    digest = hashlib.sha256(str(CACHE_FORMAT).encode())
    for path in paths:
        files = files_below(path) if path.is_dir() else [path]
        for file in files:
            if path.is_dir() and is_junk(file.relative_to(path).as_posix()):
                continue  # a file browser leaves and changes such files
            stat = file.stat()
            contents = table_of_contents(file) if file.suffix == ".zip" else b""
            if not contents:
                contents = str(stat.st_mtime_ns).encode()
            line = f"{file.relative_to(path.parent)} {stat.st_size} "
            digest.update(line.encode(errors="surrogateescape") + contents + b"\n")
    return digest.hexdigest()[:12]


def table_of_contents(path):
    """The central directory of a zip, as bytes: parsing it takes a second where reading it takes none. Empty if there is none, or
    one of the 64-bit kind, which is not read here."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 22))
        tail = file.read()
        at = tail.rfind(b"PK\5\6")  # the record at the end: 12 bytes, size and place of the directory
        size = int.from_bytes(tail[at + 12 : at + 16], "little")
        place = int.from_bytes(tail[at + 16 : at + 20], "little")
        if at < 0 or 2**32 - 1 in (size, place):
            return b""
        file.seek(place)
        return file.read(size)
