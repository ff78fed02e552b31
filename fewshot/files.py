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


class Steady:
    """A stream of text that outlives its reader: when it can no longer be written to, what comes is dropped.

    So a run whose output was piped to `head`, or whose terminal or disk is gone, goes on to its result file.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.give_up()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.give_up()

    def give_up(self):
        """Send what is still to come nowhere, what waits in buffers included."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def steady_output():
    """Let no text, and no reader that goes away, end a run: see `Steady`. Ctrl-C ends with one line."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python started
            stream = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
        if isinstance(stream, Steady):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
        setattr(sys, name, Steady(stream))
    sys.excepthook = one_line


def one_line(kind, error, trace):
    """Show an exception that nobody caught: Ctrl-C and files that cannot be used in one line, the rest in full."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted; the same command goes on from what is already on the disk", file=sys.stderr)
    elif issubclass(kind, OSError) and error.filename:
        name = Path(sys.argv[0]).name
        print(
            f"{name}: error: {error.filename}: {error.strerror}: make it usable, or name another",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(2)
    else:
        sys.__excepthook__(kind, error, trace)
