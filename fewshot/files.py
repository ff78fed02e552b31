"""Ending with one clear line, and writing files whole or not at all."""

import contextlib
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm


def fail(message):
    """Print one line naming the cause and the remedy to stderr and exit with status 2."""
    message = " ".join(f"{Path(sys.argv[0]).name}: error: {message}".split())
    tqdm.write(message, file=sys.stderr)  # clears progress bars from the line first
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
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
        with contextlib.suppress(OSError):
            temporary.unlink()
        fail(f"cannot write {path} ({error}): make room or choose another place; nothing was changed")


def files_under(folder):
    """All files below a folder, sorted, through links too: class folders are often links to another disk."""
    return sorted(Path(top) / name for top, _, names in os.walk(folder, followlinks=True) for name in names)
