"""The folder of a training run: checkpoint, log, progress bar, signals, result file. Its flags: fewshot/flags.py.

No mathematics of any paper is in here: what decides a parameter or an accuracy stands in the scripts.

    run = Run(args)                                 # opens --out; continues from its checkpoint, if it has one
    params = run.params(init_params(args))
    for iteration in run.iterations():              # ends at --iterations, at --stop-after, or at Ctrl-C
        ...                                         # one update of the parameters
        run.observe(torch.stack([losses, accuracies]))
        if run.log_now():
            run.log({"loss": run.observed()[:, 0].mean().item()}, shown={})
        run.save(params, optimizer)                 # where --save-every and --keep-every say so

Files in --out: checkpoint.pt, log.jsonl (a line every --log-every iterations), result.json and curves.png at the
end, and params-<iteration>.pt (--keep-every). Each is written whole or not at all, so a killed run can be continued.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from fewshot import plots
from fewshot.files import atomic_write, fail
from fewshot.flags import differing_flags, identity, older_than_flag
from fewshot.records import (
    check_fields,
    checksum,
    differing,
    is_whole,
    iteration_of,
    read_log,
    read_result,
    read_tensors,
    text_checksum,
    wrong_state,
)

try:
    import fcntl
except ImportError:  # Windows: two processes in one --out are not noticed there
    fcntl = None

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # the terminal is closed
    SIGNALS.append(signal.SIGHUP)
OUR_FILES = ("checkpoint.pt", "log.jsonl", "result.json", "curves.png")


# -------------------------------------------------------------------------------------------------------- run


class Run:
    """A training run: how far it is, what was measured since the last log line, and whether it should stop.

    Args:
        args: the flags, completed.
        data: the sampler of test tasks, whose `contents` are hashes of its data sets, their training images included.
        estimate_after: iterations after which the time to the end is estimated.
    """

    def __init__(self, args, data=None, estimate_after=20):
        self.args = args
        self.folder = Path(args.out)
        self.data = data.contents if data else {}  # {mode: hash of its images and classes}
        self.estimate_after = estimate_after
        path = self.folder / "checkpoint.pt"
        if args.eval_only and not path.exists():
            fail(f"--eval-only, but there is no {path}: train first, or name the run by --out")
        self.lock = lock(self.folder)
        remove_unfinished(self.folder)
        if args.overwrite:
            remove_files(self.folder)
        self.checkpoint = load(path, args, self.data) if path.exists() else None
        self.opened = time.perf_counter()  # --stop-after counts from here
        self.done = 0  # iterations
        self.seconds = 0.0  # of training
        self.window = []  # what iterations observed since the last log line
        self.stopped_by = None
        self.over = False  # set by `save` alone: a signal that comes after it counts in the next iteration
        if self.checkpoint:
            self.done = self.checkpoint["iteration"]
            self.seconds = self.checkpoint["seconds"]
            self.window = self.checkpoint["window"]

    def params(self, initial):
        """The parameters to go on with: the checkpoint's, or else the initial ones; on the device, as leaves."""
        params = initial
        if self.checkpoint:
            params = self.checkpoint["params"]
            wrong = differing(params, initial)
            if wrong:
                self.refuse(wrong)
        device = self.args.device
        return {k: w.to(device).requires_grad_() for k, w in params.items()}

    def restore(self, optimizer):
        """Give the optimizer the state it had at the checkpoint."""
        if not self.checkpoint:
            return
        fresh = optimizer.state_dict()["param_groups"]
        sizes = [w.shape for group in optimizer.param_groups for w in group["params"]]
        state = self.checkpoint.get("optimizer")
        wrong = wrong_state(state, fresh, sizes, self.checkpoint.get("moments"))
        if wrong:
            self.refuse(wrong)
        optimizer.load_state_dict(state)

    def refuse(self, wrong):
        """Exit because of a damaged checkpoint."""
        path = self.folder / "checkpoint.pt"
        fail(f"{path} is damaged ({wrong}): start afresh with --overwrite, or give another --out")

    @property
    def unfinished(self):
        """Whether there are iterations to do."""
        return self.done < self.args.iterations and not self.args.eval_only

    # ----- the loop

    def iterations(self):
        """Yield the numbers of the iterations that are still to do, under a progress bar."""
        if not self.unfinished:
            return
        args = self.args
        self.lines = self.earlier_lines()
        if not self.checkpoint:  # a result that stands here is another run's
            (self.folder / "result.json").unlink(missing_ok=True)
        self.catch_signals()
        self.begun = time.perf_counter()
        try:
            self.bar = tqdm(total=args.iterations, initial=self.done, desc=args.title, disable=None)
            with self.bar:
                yield from self.until_over()
        finally:
            release_signals()
        self.seconds += time.perf_counter() - self.begun

    def until_over(self):
        """Yield the number of each iteration until `save` ends them; move the bar, and estimate the rest once."""
        first = self.done
        while not self.over:
            yield self.done
            self.bar.update()
            if self.done - first == self.estimate_after:
                self.estimate()

    @property
    def ending(self):
        """Whether the iteration just done is the last one, for now or for good."""
        return self.stopped_by is not None or self.done >= self.args.iterations

    def observe(self, values):
        """Count an iteration, and keep what it measured: a tensor, which stays on the device until it is logged."""
        self.window.append(values)
        self.done += 1
        limit = self.args.stop_after
        if limit is not None and time.perf_counter() - self.opened > limit:
            self.stopped_by = self.stopped_by or "--stop-after"

    def estimate(self):
        """Say how long the rest will take, from the first iterations."""
        seconds_each = (time.perf_counter() - self.begun) / self.estimate_after
        minutes = seconds_each * (self.args.iterations - self.done) / 60
        advice = "; try --quick?" if minutes > 120 else ""
        self.bar.write(f"about {minutes:.0f} min to the end{advice}", sys.stderr)

    def catch_signals(self):
        """Let the first Ctrl-C, SIGTERM or SIGHUP end the run with a checkpoint, and a second one of its kind at once."""

        def stop(number, _):
            self.stopped_by = self.stopped_by or f"signal {number}"
            signal.signal(number, signal.SIG_DFL)

        for number in heard():
            signal.signal(number, stop)

    # ----- the log

    def log_now(self):
        """Whether this iteration ends with a log line."""
        return self.done % self.args.log_every == 0 or self.done == self.args.iterations

    def validate_now(self):
        """Whether a multiple of --val-every lies among the iterations of this log line."""
        every = self.args.val_every
        last_logged = self.done - len(self.window)
        return bool(every) and self.done // every > last_logged // every

    def observed(self):
        """What the iterations since the last log line observed -> tensor (iterations, ...), on the CPU."""
        return torch.stack([x.cpu() for x in self.window])

    def turns(self, shape, count):
        """The mode (0 to `count` - 1) of each value in `observed`, where modes take turns -> tensor of `shape`."""
        tasks = shape[1]
        first = self.done - shape[0]
        return torch.arange(first * tasks, self.done * tasks).view(shape) % count

    def log(self, values, shown, validate=None, remedy="--lr"):
        """Write a log line.

        values: its content, {"loss", "gradient_norm", ...}. shown: what the progress bar shows, {name: text}.
        validate: a function without arguments that measures on validation tasks, called where --val-every says so.
        remedy: the flag to lower if a value is not finite.
        """
        seconds = time.perf_counter() - self.begun  # `observed` has waited for the device
        if not math.isfinite(total(values)):
            fail(f"not finite near iteration {self.done}: lower {remedy}, in another --out")
        line = {"iteration": self.done, **values, "seconds": self.seconds + seconds}
        if validate and self.validate_now():
            line["validation"] = validate()
            self.begun = time.perf_counter() - seconds  # seconds count training alone
        self.lines.append(json.dumps(line))
        atomic_write(self.folder / "log.jsonl", "\n".join(self.lines) + "\n")
        self.window = []
        self.bar.set_postfix(shown)
        if self.bar.disable:  # not a terminal: lines instead of a bar
            print(f"{self.args.title} {self.done}/{self.args.iterations}", self.bar.postfix, flush=True)

    def earlier_lines(self):
        """Log lines up to the checkpoint. Drop those after it, which will be written again, and all from the first damaged one on."""
        file = self.folder / "log.jsonl"
        if not (self.checkpoint and file.exists()):
            return []
        kept, last = [], 0
        for line in file.read_text(errors="replace").splitlines():
            iteration = iteration_of(line)
            if iteration is None or iteration <= last or iteration > self.done:
                break
            kept.append(line)
            last = iteration
        written = self.checkpoint.get("log_crc32")  # no such field: of an earlier version
        if written is not None and text_checksum(kept) != written:
            how_far = f"its lines up to iteration {last} are kept"
            print(f"note: {file} is not as it was written; {how_far}", file=sys.stderr)
        return kept

    # ----- checkpoints

    def save(self, params, optimizer=None):
        """Write a checkpoint where --save-every says so, and at the end; parameters where --keep-every says so."""
        args = self.args
        if args.keep_every and self.done % args.keep_every == 0:
            atomic_write(self.folder / f"params-{self.done}.pt", on_cpu(params))
        self.over = self.ending
        if self.done % args.save_every == 0 or self.over:
            checkpoint = {
                "identity": identity(args),
                "data": self.data,
                "iteration": self.done,
                "seconds": self.seconds + time.perf_counter() - self.begun,
                "window": self.window,
                "log_crc32": text_checksum(self.lines),
                "params": on_cpu(params),
            }
            if optimizer is not None:
                checkpoint["optimizer"] = optimizer.state_dict()
                checkpoint["moments"] = len(checkpoint["optimizer"]["state"])
            atomic_write(self.folder / "checkpoint.pt", checkpoint)
            (self.folder / "result.json").unlink(missing_ok=True)  # of an earlier checkpoint

    # ----- the result

    def finished(self):
        """False if this process was stopped before the end of training, after saying how to continue; else True."""
        if self.stopped_by and self.done < self.args.iterations:
            how_far = f"at iteration {self.done} of {self.args.iterations}"
            without = ", without --overwrite," if self.args.overwrite else ""
            print(f"stopped by {self.stopped_by} {how_far}; the same command{without} continues")
            return False
        return True

    def result(self, **must_be):
        """The stored result, if it is of this run and checkpoint, whole, and has these fields; else None."""
        file = self.folder / "result.json"
        if not (self.checkpoint and file.exists()):
            return None
        try:
            result = read_result(file)
            flags = argparse.Namespace(**result["args"])
            same_run = not differing_flags(self.args, identity(flags))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            print(f"note: {file} is damaged: evaluating anew", file=sys.stderr)
            return None
        must_be["iterations"] = self.done
        if not is_whole(result):  # `read_result` has said so
            return None
        same = all(result.get(key) == value for key, value in must_be.items())
        return result if same and same_run else None

    def write_result(self, values):
        """Write result.json: what was measured, and what every result says of its run -> all of it."""
        args = self.args
        device = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        hidden = ("data_root", "cache_dir", "out", "changed")
        result = {
            "method": args.method,
            **values,
            "test_tasks": args.test_tasks,
            "iterations": self.done,
            "seconds_train": round(self.seconds, 1),
            "seconds_per_iteration": round(self.seconds / max(self.done, 1), 4),
            "args": {k: v for k, v in vars(args).items() if k not in hidden},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "device": device,
                "threads": torch.get_num_threads(),
                "commit": commit(),
            },
        }
        result["crc32"] = checksum(result)
        atomic_write(self.folder / "result.json", json.dumps(result))
        self.draw_curves()
        return result

    def draw_curves(self):
        """Write curves.png, of the log, where matplotlib is installed; else say how to get it."""
        if not plots.installed():
            print("note: for a picture of the curves, pip install matplotlib", file=sys.stderr)
            return
        lines = read_log(self.folder / "log.jsonl")
        content = io.BytesIO()
        try:
            plots.run_curves(lines, self.args.title, content)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            print(f"note: {self.folder / 'log.jsonl'} is damaged or empty: no curves of it", file=sys.stderr)
            return
        file = self.folder / "curves.png"
        atomic_write(file, content.getvalue())
        print(f"curves: {file}", file=sys.stderr)


def release_signals():
    """Let signals end the process at once again: what training has made is saved, and evaluation may be cut anywhere."""
    for number in heard():
        signal.signal(number, signal.SIG_DFL)


def heard():
    """The signals that end a run. Under nohup SIGHUP is ignored, and stays so: the run outlives its terminal."""
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up and signal.getsignal(hang_up) is signal.SIG_IGN:
        return [number for number in SIGNALS if number != hang_up]
    return SIGNALS


def lock(folder):
    """Hold the folder for this process, or exit and name the one that holds it -> the open lock file.

    The system lets go of the lock when the process ends, however it ends.
    """
    if fcntl is None:
        return None
    me = f"process {os.getpid()} on {platform.node()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115 (it stays open as long as the run lives)
    except OSError as error:
        fail(f"cannot write in --out {folder} ({error.strerror}): choose another folder")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        if owner == me:  # an earlier run of this process, which is over
            return file
        fail(f"--out {folder} is in use by {owner}: wait for it, or give another --out")
    except OSError:  # a file system without locks
        return file
    with contextlib.suppress(OSError):  # no room for a name: the lock holds all the same
        file.truncate(0)
        file.write(me)
        file.flush()
    return file


def load(path, args, data):
    """Load the checkpoint at `path`; exit if it is damaged or belongs to another run, and name the flag that differs."""
    here = identity(args)
    try:
        checkpoint = read_tensors(path)
        there = checkpoint["identity"]
        others = differing_flags(args, there)
        check_fields(checkpoint)
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        why = str(error) if type(error) is ValueError else type(error).__name__
        fail(f"{path} is no checkpoint ({why}): start afresh with --overwrite, or give another --out")
    for key in others:
        if key not in there:
            fail(f"{path.parent} {older_than_flag(there, key)}")
        fail(f"{path.parent} has {key} {there[key]}, not {here.get(key)}: give another --out")
    for mode, content in checkpoint.get("data", {}).items():
        if data.get(mode, content) != content:
            other = f"the images of {mode} are not those that {path.parent} was trained on"
            fail(f"{other}: bring them back, or give another --out")
    return checkpoint


def remove_unfinished(folder):
    """Remove the temporary files of killed processes: while the folder is locked, nobody else writes in it."""
    for file in folder.glob(".*"):
        name, _, number = file.name[1:].rpartition(".")
        ours = name in OUR_FILES or (name.startswith("params-") and name.endswith(".pt"))
        if ours and number.isdigit():
            file.unlink(missing_ok=True)


def remove_files(folder):
    """Remove what an earlier run wrote in its folder, and nothing else: the checkpoint last, which makes it a run."""
    try:
        for file in sorted(folder.glob("*"), key=lambda file: file.name == "checkpoint.pt"):
            if file.name in OUR_FILES or file.match("params-*.pt"):
                file.unlink()
    except OSError as error:
        fail(
            f"--overwrite cannot remove {error.filename} ({error.strerror}): allow it, or give another --out"
        )


def on_cpu(params):
    """The parameters on the CPU, as a checkpoint holds them."""
    return {k: w.detach().cpu() for k, w in params.items()}


def total(values):
    """Sum of all numbers in a nested dict or list, which is finite if each of them is."""
    if isinstance(values, dict):
        return sum(total(x) for x in values.values())
    if isinstance(values, list):
        return sum(total(x) for x in values)
    return values if isinstance(values, (int, float)) else 0


def commit():
    """The commit that this checkout is at, with "-dirty" if files differ from it; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""
