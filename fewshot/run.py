"""The folder of a training run: flags common to all scripts, checkpoint, log, progress bar, signals, result file.

No mathematics of any paper is in here: what decides a parameter or an accuracy stands in the scripts.

    run = Run(args)                                 # opens --out; continues from its checkpoint, if it has one
    params = run.params(init_params(args))
    for iteration in run.iterations():              # ends at --iterations, at --stop-after, or at Ctrl-C
        ...                                         # one update of the parameters
        run.observe(torch.stack([losses, accuracies]))
        if run.log_now():
            run.log({"loss": run.observed()[:, 0].mean().item()}, shown={})
        run.save(params, optimizer)                 # where --save-every and --keep-every say so

Files in --out: checkpoint.pt, log.jsonl (a line every --log-every iterations), result.json at the end, and
params-<iteration>.pt (--keep-every). Each is written whole or not at all, so a killed run can be continued.
"""

import argparse
import contextlib
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

from fewshot.files import atomic_write, fail
from fewshot.parallel import cores

try:
    import fcntl
except ImportError:  # Windows: two processes in one --out are not noticed there
    fcntl = None

# What args holds that does not change what is learned: runs that differ in nothing else are the same run.
NOT_IDENTITY = {
    *(
        "iterations",
        "test_tasks",
        "val_tasks",
        "val_every",
        "log_every",
        "save_every",
        "keep_every",
        "stop_after",
    ),
    *(
        "device",
        "workers",
        "eager",
        "data_root",
        "cache_dir",
        "out",
        "eval_only",
        "overwrite",
        "quick",
        "official",
    ),
    *("title", "variant", "strata", "transfer", "test_steps", "test_updates", "halve_test_lr"),
    *(
        "picture",
        "runs",
        "attention_report",
        "report_tasks",
    ),  # flags that checkpoints of earlier versions may name
}
AT_LEAST = {  # smallest value of a number; 0 for all others
    **dict.fromkeys(("ways", "test_tasks", "val_tasks", "batch"), 2),
    **dict.fromkeys(
        ("shots", "queries", "channels", "filters", "hidden", "pixels", "meta_batch", "steps", "test_steps"),
        1,
    ),
    **dict.fromkeys(("rank", "context", "log_every", "save_every", "workers"), 1),
}
SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # the terminal is closed
    SIGNALS.append(signal.SIGHUP)
OUR_FILES = ("checkpoint.pt", "log.jsonl", "result.json")


# ------------------------------------------------------------------------------------------------------ flags


def new_parser(docstring, legend):
    """An argument parser that describes itself by the first line of `docstring`, and ends errors by one line."""
    about = docstring.strip().split("\n")[0]
    parser = argparse.ArgumentParser(description=f"{about} {legend}", allow_abbrev=False)
    parser.error = fail
    return parser


def add_data_flags(p, synthetic="procedural stand-ins for the modes: no download"):
    """Add the flags that say where images come from."""
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="keeps images decoded once")
    p.add_argument("--synthetic", action="store_true", help=synthetic)


def add_device_flags(p, threads=True, graph=False, precision="bf16: convolutions only"):
    """Add the flags that say where and how fast to compute. threads, graph, precision: which of them a script has."""
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    if threads:
        p.add_argument("--workers", type=int, default=cores(), help="CPU: tasks at a time, one thread each")
    if graph:
        p.add_argument("--eager", action="store_true", help="GPU: kernel by kernel, not a recorded graph")
    if precision:
        p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help=precision)


def add_run_flags(p, quick, keep="iterations between kept parameters"):
    """Add the flags of the run's folder. quick: the presets of --quick."""
    p.add_argument("--quick", action="store_true", help=f"about two minutes on two CPU cores: {quick}")
    p.add_argument("--out", help="folder of the run (runs/<name>); the same command continues it")
    p.add_argument("--log-every", type=int, default=50, help="iterations")
    p.add_argument("--save-every", type=int, default=1000, help="iterations between checkpoints")
    p.add_argument("--keep-every", type=int, default=0, help=keep)
    p.add_argument("--stop-after", type=float, help="seconds; then write a checkpoint and end")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint as it is")
    start.add_argument("--overwrite", action="store_true", help="start afresh, dropping what --out holds")


def parse(p, argv, quick, presets=None):
    """Read a command line -> args, and the defaults as a dict.

    quick: what --quick presets. presets: a function of the flags as typed, for what flags together preset -> dict.
    A flag that is typed wins over a preset.
    """
    defaults = vars(p.parse_args([]))
    typed = p.parse_known_args(argv)[0]
    if typed.quick:
        p.set_defaults(**quick)
    if presets:
        p.set_defaults(**presets(typed))
    return p.parse_args(argv), defaults


def fill(args, defaults, usual):
    """Give the flags of `usual` that were not typed the values there, which are defaults of this algorithm."""
    for key, value in usual.items():
        defaults[key] = value
        if getattr(args, key) is None:
            setattr(args, key, value)


def reset_unused(args, defaults, keys):
    """Set flags that the method does not use to their defaults, so that they do not make it another run. Say so."""
    for key in keys:
        if getattr(args, key) != defaults[key]:
            flag = key.replace("_", "-")
            print(f"note: {args.method} does not use --{flag}, so it stays {defaults[key]}", file=sys.stderr)
        setattr(args, key, defaults[key])


def complete(args, defaults, data, shown, named, least=None):
    """Work out the rest of args: --device, --out, `variant` and `title`; exit if a number is out of range.

    data: the data sets, as a title names them. shown: keys that a report shows anyway, so that the title does not.
    named: keys that the folder's name begins with, so that it does not repeat them. least: as AT_LEAST, for a script.
    """
    changed = {}
    for key, value in identity(args).items():
        if value != defaults.get(key, value) and key not in named:
            changed[key] = value
    if args.out is None:
        words = [f"{key}={joined(value, '+')}" for key, value in changed.items()]
        sets = args.modes if "modes" in args else [args.env]
        name = "-".join([args.method, *sets, *words])
        args.out = os.path.join("runs", name.lower())
    args.variant = []
    for key, value in changed.items():
        if key not in shown:
            flag = f"--{key.replace('_', '-')}"
            args.variant.append(flag if value is True else f"{flag} {joined(value, ' ')}")
    args.title = " ".join([args.method, data, *args.variant])
    args.device = resolve_device(args.device)
    check_numbers(args, AT_LEAST | (least or {}))


def joined(value, by):
    """A value as text, the elements of a list joined."""
    return by.join(map(str, value)) if isinstance(value, list) else str(value)


def resolve_device(name):
    """The device that --device means: "auto" is the first GPU, or the CPU where there is none."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = gpus[0] if gpus else "cpu"
    elif name == "cuda" and gpus:
        name = gpus[0]
    if name not in ("cpu", *gpus):
        fail(f"--device {name}: not there; choose from {' '.join(['cpu', *gpus])}")
    return name


def check_numbers(args, least):
    """Exit if a number is too small. Numbers of tasks are over all modes together, so each mode has to have its least."""
    for key, value in vars(args).items():
        if not isinstance(value, (int, float)):
            continue
        smallest = least.get(key, 0)
        if key in ("test_tasks", "val_tasks"):
            strata = args.strata if "strata" in args else vars(args).get("modes", [""])
            smallest *= len(strata)
        if not smallest <= value < 2**63:
            fail(f"--{key.replace('_', '-')} {value}: give a number from {smallest} on")


def identity(args):
    """What makes two runs the same run -> {"method" and the arguments that change what is learned}."""
    flags = {k: v for k, v in vars(args).items() if k not in NOT_IDENTITY}
    return {"method": args.method} | flags


# -------------------------------------------------------------------------------------------------------- run


class Run:
    """A training run: how far it is, what was measured since the last log line, and whether it should stop.

    Args:
        args: the flags, completed. estimate_after: iterations after which the time to the end is estimated.
    """

    def __init__(self, args, estimate_after=20):
        self.args = args
        self.folder = Path(args.out)
        self.estimate_after = estimate_after
        path = self.folder / "checkpoint.pt"
        if args.eval_only and not path.exists():
            fail(f"--eval-only, but there is no {path}: train first, or name the run by --out")
        self.lock = lock(self.folder)
        if args.overwrite:
            remove_files(self.folder)
        self.checkpoint = load(path, args) if path.exists() else None
        self.done = 0  # iterations
        self.seconds = 0.0  # of training
        self.window = []  # what iterations observed since the last log line
        self.stopped_by = None
        if self.checkpoint:
            self.done = self.checkpoint["iteration"]
            self.seconds = self.checkpoint["seconds"]
            self.window = self.checkpoint["window"]

    def params(self, initial):
        """The parameters to go on with: the checkpoint's, or else the initial ones; on the device, as leaves."""
        params = self.checkpoint["params"] if self.checkpoint else initial
        device = self.args.device
        return {k: w.to(device).requires_grad_() for k, w in params.items()}

    def restore(self, optimizer):
        """Give the optimizer the state it had at the checkpoint."""
        if self.checkpoint:
            optimizer.load_state_dict(self.checkpoint["optimizer"])

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
        first = self.done
        self.lines = self.earlier_lines()
        if not self.checkpoint:  # a result that stands here is another run's
            (self.folder / "result.json").unlink(missing_ok=True)
        self.catch_signals()
        self.begun = time.perf_counter()
        try:
            with tqdm(total=args.iterations, initial=first, desc=args.title, disable=None) as self.bar:
                while not self.ending:
                    yield self.done
                    self.bar.update()
                    if self.done - first == self.estimate_after:
                        self.estimate()
        finally:
            release_signals()
        self.seconds += time.perf_counter() - self.begun

    @property
    def ending(self):
        """Whether the iteration just done is the last one, for now or for good."""
        return self.stopped_by is not None or self.done >= self.args.iterations

    def observe(self, values):
        """Count an iteration, and keep what it measured: a tensor, which stays on the device until it is logged."""
        self.window.append(values)
        self.done += 1
        limit = self.args.stop_after
        if limit is not None and time.perf_counter() - self.begun > limit:
            self.stopped_by = self.stopped_by or "--stop-after"

    def estimate(self):
        """Say how long the rest will take, judging by the first iterations."""
        seconds_each = (time.perf_counter() - self.begun) / self.estimate_after
        minutes = seconds_each * (self.args.iterations - self.done) / 60
        advice = "; try --quick?" if minutes > 120 else ""
        self.bar.write(f"about {minutes:.0f} min to the end{advice}", sys.stderr)

    def catch_signals(self):
        """Let the first Ctrl-C, SIGTERM or SIGHUP end the run with a checkpoint, and a second one at once."""

        def stop(number, _):
            self.stopped_by = self.stopped_by or f"signal {number}"
            signal.signal(number, signal.SIG_DFL)

        for number in SIGNALS:
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
        """Which of `count` names each value of `observed` is of, where tasks take turns -> tensor of `shape`."""
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
        self.bar.set_postfix(**shown)
        if self.bar.disable:  # not a terminal: lines instead of a bar
            print(f"{self.args.title} {self.done}/{self.args.iterations}", self.bar.postfix, flush=True)

    def earlier_lines(self):
        """Log lines up to the checkpoint. Drop those after it: they will be written again."""
        file = self.folder / "log.jsonl"
        lines = file.read_text().splitlines() if self.checkpoint and file.exists() else []
        return [line for line in lines if json.loads(line)["iteration"] <= self.done]

    # ----- checkpoints

    def save(self, params, optimizer=None):
        """Write a checkpoint where --save-every says so, and at the end; parameters where --keep-every says so."""
        args = self.args
        if args.keep_every and self.done % args.keep_every == 0:
            atomic_write(self.folder / f"params-{self.done}.pt", on_cpu(params))
        if self.done % args.save_every == 0 or self.ending:
            checkpoint = {
                "identity": identity(args),
                "iteration": self.done,
                "seconds": self.seconds + time.perf_counter() - self.begun,
                "window": self.window,
                "params": on_cpu(params),
            }
            if optimizer is not None:
                checkpoint["optimizer"] = optimizer.state_dict()
            atomic_write(self.folder / "checkpoint.pt", checkpoint)

    # ----- the result

    def finished(self):
        """Whether training is over. If it was stopped before its end, say how to continue."""
        if self.stopped_by and self.done < self.args.iterations:
            how_far = f"at iteration {self.done} of {self.args.iterations}"
            print(f"stopped by {self.stopped_by} {how_far}; the same command continues")
            return False
        return True

    def result(self, **must_be):
        """The stored result, if it is of this checkpoint and has these fields; else None."""
        file = self.folder / "result.json"
        if not (self.checkpoint and file.exists()):
            return None
        result = json.loads(file.read_text())
        must_be["iterations"] = self.done
        same = all(result.get(key) == value for key, value in must_be.items())
        return result if same else None

    def write_result(self, values):
        """Write result.json: what was measured, and what every result says of its run -> all of it."""
        args = self.args
        device = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        hidden = ("data_root", "cache_dir", "out")
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
        atomic_write(self.folder / "result.json", json.dumps(result))
        return result


def release_signals():
    """Let signals end the process at once again: what training has made is saved, and evaluation may be cut anywhere."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


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


def load(path, args):
    """Load the checkpoint at `path`; exit if it belongs to another run, and name the flag that differs."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        here = identity(args)
        there = checkpoint["identity"]
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(f"{path} is no checkpoint ({type(error).__name__}): choose another --out, or --overwrite")
    for key in here | there:
        if here.get(key) != there.get(key):
            fail(f"{path.parent} has {key} {there.get(key)}, not {here.get(key)}: give another --out")
    return checkpoint


def remove_files(folder):
    """Remove what an earlier run wrote in its folder, and nothing else."""
    for file in folder.glob("*"):
        if file.name in OUR_FILES or file.match("params-*.pt"):
            file.unlink()


def on_cpu(params):
    """Copies of the parameters, as a checkpoint holds them."""
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
