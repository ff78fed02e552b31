"""Read the records of runs: checkpoints, kept parameters, result files and logs, and notice where they are damaged.

A file of tensors is a zip, whose CRC-32 sums are compared; a result file holds a CRC-32 of its own fields, and a
checkpoint one of the log that belongs to it.
"""

import json
import math
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import torch


def read_tensors(path):
    """Read a file of tensors and plain values. Raises ValueError if its content is not what was written."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # PyTorch reads over a wrong checksum
    if damaged:
        raise ValueError(f"damaged: {damaged} has a wrong checksum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch finds strange, it refuses as well
        content = torch.load(path, map_location="cpu", weights_only=True)
    params = content.get("params", content)
    if not isinstance(params, dict):
        return content
    for key, w in params.items():
        if isinstance(w, torch.Tensor) and not torch.isfinite(w).all():
            raise ValueError(f"damaged: {key} is not finite")
    return content


def check_fields(checkpoint):
    """Raise ValueError if a field of a checkpoint cannot be right."""
    iteration, seconds = checkpoint["iteration"], checkpoint["seconds"]
    if type(iteration) is not int or not 0 <= iteration < 2**63:
        raise ValueError(f"iteration {iteration}")
    if not (isinstance(seconds, (int, float)) and 0 <= seconds < math.inf):
        raise ValueError(f"seconds {seconds}")
    if not isinstance(checkpoint["window"], list) or len(checkpoint["window"]) > iteration:
        raise ValueError("its window is not of its iterations")
    for w in checkpoint["window"]:
        if not isinstance(w, torch.Tensor):
            raise ValueError("its window holds no tensors")


def differing(params, initial):
    """Say how a checkpoint's parameters differ from the network's in name, shape or dtype -> one phrase, or ""."""
    if params.keys() != initial.keys():
        return f"{', '.join(sorted(params.keys() ^ initial.keys())[:3])} is in the checkpoint alone, or missing in it"
    for key, w in params.items():
        if w.shape != initial[key].shape or w.dtype != initial[key].dtype:
            return (
                f"{key} is {w.dtype} {tuple(w.shape)}, not {initial[key].dtype} {tuple(initial[key].shape)}"
            )
    return ""


def wrong_state(state, fresh, shapes, moments):
    """Say how an optimizer's state does not fit its parameters -> one phrase, or "".

    PyTorch itself compares the sizes of groups only.
    """
    try:
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != [len(group["params"]) for group in fresh]:
            return "the optimizer has another number of parameters"
        if moments not in (None, len(state["state"])):
            return "the optimizer has lost its moments"
        for number, of in state["state"].items():
            wrong = wrong_moments(number, of, shapes)
            if wrong:
                return wrong
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, RuntimeError) as error:
        return f"the optimizer's state is no such thing ({type(error).__name__})"
    return ""


def wrong_moments(number, of, shapes):
    """Say how the optimizer's state of one parameter does not fit it -> one phrase, or ""."""
    for key, value in of.items():
        if key == "step":
            if not 0 <= float(value) < 2**53:
                return f"the optimizer's step is {float(value)}"
        elif value.shape != shapes[number] or not torch.isfinite(value).all():
            return f"the optimizer's {key} of parameter {number} does not fit"
    return ""


def text_checksum(lines):
    """A CRC-32 of lines of text."""
    return zlib.crc32("\n".join(lines).encode())


def checksum(result):
    """A CRC-32 of a result's fields, but for the one that holds it."""
    fields = {key: value for key, value in result.items() if key != "crc32"}
    return text_checksum([json.dumps(fields, sort_keys=True)])


def read_result(path):
    """Read a result file -> dict; say so if its content is not what its run wrote. Raises ValueError if it is no result."""
    result = json.loads(Path(path).read_text())
    if not isinstance(result, dict):
        raise ValueError("not a result")
    if not is_whole(result):
        print(
            f"note: {path} is not as its run wrote it: somebody has changed it, or it is damaged",
            file=sys.stderr,
        )
    return result


def is_whole(result):
    """Whether a result is as its run wrote it; those of earlier versions do not say."""
    return result.get("crc32", checksum(result)) == checksum(result)


def read_log(path):
    """Read the lines of a log, as far as it is whole -> [dict]; [] if there is none."""
    path = Path(path)
    lines = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            if iteration_of(text) is None:
                print(
                    f"note: {path} is damaged after line {len(lines)}, and read up to there", file=sys.stderr
                )
                break
            lines.append(json.loads(text))
    return lines


def iteration_of(line):
    """The iteration of a log line, or None if the line is damaged."""
    try:
        iteration = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return None
    return iteration if type(iteration) is int else None
