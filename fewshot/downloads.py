"""Fetch published archives: resumed where a download was cut, checked by md5, by one process at a time."""

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request

from tqdm import tqdm

from fewshot.files import fail

try:
    import fcntl
except ImportError:  # Windows: two processes that fetch one file are not noticed there
    fcntl = None

MIB = 1 << 20


def download(file_name, md5, urls, folder):
    """Fetch one archive into `folder` from the first address that gives it -> [] or what went wrong, by address.

    Exits if the checksum is wrong; the file is deleted then.
    """
    if not urls:
        return ["its site gives it by hand only"]
    target = folder / file_name
    part = folder / f"{file_name}.part"
    problems = []
    with turn(folder, file_name):
        if target.exists():  # another process has fetched it meanwhile
            return []
        for url in urls:
            try:
                fetch_part(url, part, file_name)
            except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
                problems.append(f"{url}: {error}")
                continue
            check_content(url, part, md5)
            os.replace(part, target)
            return []
    return problems


@contextlib.contextmanager
def turn(folder, file_name):
    """Wait until no other process on this file system fetches the same file."""
    if fcntl is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f".{file_name}.lock", "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        fail(
            f"cannot write in {folder} ({error.strerror}): choose another --data-root, or put {file_name} there by hand"
        )
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{file_name}: another process is fetching it; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def fetch_part(url, part, file_name):
    """Fetch what is missing of a file. Raises OSError if it was cut."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "Mozilla/5.0", "Range": f"bytes={have}-"}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return  # nothing left to send: the part is whole
        raise
    with reply:
        have = have if reply.status == 206 else 0  # 200: the server sends it all again
        total = have + int(reply.headers.get("Content-Length", 0))
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=file_name)
        with open(part, "ab" if have else "wb") as file, bar:
            while block := reply.read(MIB):
                file.write(block)
                bar.update(len(block))
    size = part.stat().st_size
    if total and size < total:
        raise OSError(f"cut after {size} of {total} bytes: give the same command again, which continues")


def check_content(url, part, md5):
    """Exit if a fetched file is not the published one, and delete it."""
    digest = hashlib.md5()
    with open(part, "rb") as file:
        begin = file.read(MIB)
        block = begin
        while block:
            digest.update(block)
            block = file.read(MIB)
    if md5 and digest.hexdigest() != md5:
        part.unlink()
        wrong = f"wrong checksum (md5 {digest.hexdigest()}, published {md5})"
        fail(f"{url}: {wrong}: deleted; try again or fetch by hand")
    if not md5 and begin.lstrip().startswith(b"<"):
        part.unlink()
        fail(f"{url}: sent a page of text, not the file: deleted; try again or fetch by hand")
