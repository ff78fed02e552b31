"""Flags: those that all scripts share, how a command line is read, and what makes two runs the same run."""

import argparse
import os
import sys

import torch

from fewshot.files import fail, steady_output
from fewshot.names import shortened, user_path
from fewshot.parallel import cores

__all__ = [
    "add_data_flags",
    "add_device_flags",
    "add_run_flags",
    "complete",
    "fill",
    "flags_of_run",
    "new_parser",
    "parse",
    "reset_unused",
    "resolve_device",
]

SHARED_HELP = "accept data sets in which a class, or copies of a file, are in two splits"
STOP_HELP = "seconds since the run began, validation included; then write a checkpoint and end"
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
    *("device", "workers", "eager", "data_root", "cache_dir", "allow_shared_classes", "out"),
    *("eval_only", "overwrite", "quick", "official"),
    *("title", "variant", "changed", "strata", "transfer", "test_steps", "test_updates", "halve_test_lr"),
    # flags that checkpoints of earlier versions may name
    *("picture", "runs", "attention_report", "report_tasks"),
}
# What a method's runs did before there was a flag, where that is not its default.
BEFORE = {"MMAML+KML": {"adapt": "modulated"}}
AT_LEAST = {  # smallest value of a number; 0 for all others
    **dict.fromkeys(("ways", "test_tasks", "val_tasks", "batch"), 2),
    **dict.fromkeys(("shots", "queries", "channels", "filters", "hidden", "pixels", "meta_batch"), 1),
    **dict.fromkeys(("steps", "test_steps", "rank", "context", "log_every", "save_every", "workers"), 1),
}
AT_MOST = {"image_size": 1024}  # larger images would not fit a batch into any memory


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts that end with the default, unless there is none (an algorithm has its own, or the flag is a switch)."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def new_parser(docstring, legend):
    """An argument parser, described by the first line of `docstring` and by `legend`, that exits at errors with one line."""
    about = (docstring or "").strip().split("\n")[0]  # python -OO drops docstrings
    steady_output()
    parser = argparse.ArgumentParser(
        description=f"{about} {legend}", allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.error = fail
    return parser


def add_data_flags(p, synthetic="procedural stand-ins for the modes: no download"):
    """Add the flags that say where images come from."""
    root = os.environ.get("FEWSHOT_DATA") or "data"
    p.add_argument(
        "--data-root", type=user_path, default=root, help="folder of the data sets, or FEWSHOT_DATA"
    )
    p.add_argument("--cache-dir", type=user_path, default=".cache", help="keeps images decoded once")
    p.add_argument("--synthetic", action="store_true", help=synthetic)
    p.add_argument("--allow-shared-classes", action="store_true", help=SHARED_HELP)


def add_device_flags(p, threads=True, graph=False, precision="bf16: convolutions only"):
    """Add the flags that say where and how fast to compute. threads, graph: whether a script has
    them. precision: its help text, or None."""
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    if threads:
        p.add_argument("--workers", type=int, default=cores(), help="CPU: tasks at a time, one thread each")
    if graph:
        p.add_argument("--eager", action="store_true", help="GPU: kernel by kernel, not a recorded graph")
    if precision:
        p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help=precision)


def add_run_flags(p, quick, keep="iterations between kept parameters; 0 keeps none"):
    """Add the flags of the run's folder. quick: the presets of --quick."""
    presets = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in quick.items())
    p.add_argument("--quick", action="store_true", help=f"about two minutes on two CPU cores: {presets}")
    p.add_argument(
        "--out", type=user_path, help="folder of the run (runs/<name>); the same command continues it"
    )
    p.add_argument("--log-every", type=int, default=50, help="iterations")
    p.add_argument("--save-every", type=int, default=1000, help="iterations between checkpoints")
    p.add_argument("--keep-every", type=int, default=0, help=keep)
    p.add_argument("--stop-after", type=float, help=STOP_HELP)
    start = p.add_mutually_exclusive_group()
    start.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint as it is")
    start.add_argument("--overwrite", action="store_true", help="start afresh, dropping what --out holds")


def parse(p, argv, quick, presets=None):
    """Read a command line -> args, and the defaults as a dict.

    quick: what --quick presets. presets: a function of the flags as typed -> the defaults that they imply.
    A flag that is typed wins over a preset.
    """
    defaults = vars(p.parse_args([]))
    note_repeats(p, sys.argv[1:] if argv is None else argv)
    typed = p.parse_known_args(argv)[0]
    if typed.quick:
        p.set_defaults(**quick)
    if presets:
        p.set_defaults(**presets(typed))
    return p.parse_args(argv), defaults


def note_repeats(p, words):
    """Say which values count where a flag that takes several was given twice: argparse keeps the last ones."""
    for action in p._actions:
        times = sum(words.count(flag) for flag in action.option_strings)
        if action.nargs in ("+", "*") and times > 1:
            flag = action.option_strings[0]
            print(
                f"note: {flag} is given {times} times; the last one counts, with all its values",
                file=sys.stderr,
            )


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
    named: keys that title and folder name begin with, so that neither repeats them. least: as AT_LEAST, for a script.
    """
    changed = {}
    for key, value in identity(args).items():
        if value != defaults.get(key, value) and key not in named:
            changed[key] = value
    if args.out is None:
        words = [f"{key}={joined(value, '+')}" for key, value in changed.items()]
        sets = args.modes if "modes" in args else [args.env]
        name = "-".join([args.method, *sets, *words])
        args.out = os.path.join("runs", shortened(name.lower()))
    elif not args.out:
        fail("--out is empty: name a folder, or leave --out out")
    args.changed = list(changed)
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
    """Exit if a number is out of range. Numbers of tasks are over all modes together, so each mode has to have its least."""
    numbers = []
    for key, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        numbers += [(key, x) for x in values if isinstance(x, (int, float))]
    for key, value in numbers:
        smallest = least.get(key, 0)
        if key in ("test_tasks", "val_tasks"):
            strata = args.strata if "strata" in args else vars(args).get("modes", [""])
            smallest *= len(strata)
        flag = f"--{key.replace('_', '-')}"
        if not value >= smallest:  # nan is not
            fail(f"{flag} {value}: give {smallest} or more")
        largest = AT_MOST.get(key, 2**63 - 1)
        if value > largest:
            fail(f"{flag} {value}: give a number up to {largest}")


def identity(args):
    """What makes two runs the same run -> {"method" and the arguments that change what is learned}."""
    flags = {k: v for k, v in vars(args).items() if k not in NOT_IDENTITY}
    return {"method": args.method} | flags


def flags_of_run(recorded, script):
    """The flags that a run of `script`, a module, was trained with -> Namespace. recorded: the identity in its checkpoint.

    A flag that did not exist when the run was trained has the default of its algorithm, or what BEFORE says.
    """
    words = []
    for key in ("algorithm", "modulation", "env"):  # which other defaults depend on
        if key in recorded:
            words += [f"--{key}", recorded[key]]
    assumed = identity(script.get_args(words)) | BEFORE.get(recorded.get("method"), {})
    return argparse.Namespace(**assumed | recorded)


def differing_flags(args, recorded):
    """The names of the flags in which `args` differ from the identity that a run recorded -> list.

    A flag that did not exist when the run was trained counts as having been at its default, or what BEFORE says.
    """
    here = identity(args)
    before = BEFORE.get(recorded.get("method"), {})
    others = [key for key, value in recorded.items() if here.get(key) != value]
    for key in here:
        if key in recorded:
            continue
        same = here[key] == before[key] if key in before else key not in args.changed
        if not same:
            others.append(key)
    return others


def older_than_flag(recorded, key):
    """What to say of a run that a flag is newer than."""
    flag = f"--{key.replace('_', '-')}"
    before = BEFORE.get(recorded.get("method"), {})
    if key in before:
        return f"is older than {flag}, and did what is now {flag} {before[key]}: give that, or another --out"
    return f"is older than {flag}: leave it out, or give another --out"
