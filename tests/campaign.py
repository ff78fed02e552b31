"""Kill, damage and crowd the project, and see what becomes of it. Run: python -m tests.campaign (about 15 minutes).

Each line of the table that it prints is one kind of hard knock: how often it was tried, and what happened.

    the same bits   continued to exactly the parameters, log and accuracies of an undisturbed run
    harmless        what was damaged is not used, or the damage changes nothing that is
    noticed         a note on stderr, and the outcome of an undisturbed run: made again, or evaluated anew
    refused         one line that names the file, status 2
    WRONG           anything else: a traceback, a hang, or another outcome without a word

Cases are drawn from --seed, so that a case can be repeated. Status 1 if anything went wrong.
"""

import collections
import contextlib
import importlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewshot import cache, plots, store
from fewshot.files import fail
from fewshot.flags import new_parser

HERE = Path(__file__).parents[1]
SMALL = "--synthetic --image-size 8 --test-tasks 8 --log-every 2 --save-every 3 --device cpu --workers 1"
RUNS = {
    "kml": f"{SMALL} --channels 2 --meta-batch 2 --queries 2 --inner-steps 1 --iterations 40",
    "mprotonet": f"{SMALL} --channels 2 --meta-batch 2 --queries 2 --iterations 60",
    "modgrad": f"{SMALL} --image-size 16 --channels 2 --queries 2 --iterations 40",
    "afr": f"{SMALL} --image-size 16 --filters 2 --queries 2 --meta-batch 2 --iterations 40",
}
TIMEOUT = 60  # seconds, after which a case counts as hanging
GOOD = ("the same bits", "harmless", "noticed", "refused")


class Outcome(collections.namedtuple("Outcome", "status, out, err")):
    """How a process ended: its exit status (None: it hung), and what it printed."""

    @property
    def refused(self):
        """Whether it ended with status 2 and one line that begins with the program's name."""
        lines = [line for line in self.err.splitlines() if line and not line.startswith("note: ")]
        return self.status == 2 and len(lines) == 1 and ": error: " in lines[0]

    @property
    def broken(self):
        """Whether it hung, was killed, or printed a traceback."""
        return self.status is None or self.status < 0 or "Traceback" in self.err


def started(function, paths):
    """Start a function in a forked process that prints to these two files -> process number.

    Forked, because a new process takes seconds to import PyTorch.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    status = 1
    try:
        function()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:  # noqa: BLE001 (a traceback is what this looks for)
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def forked(function, folder):
    """Run a function in a forked process -> Outcome."""
    return forked_together([function], folder)[0]


def forked_together(functions, folder):
    """Run functions at the same time, each in a forked process -> their Outcomes."""
    paths = [[Path(folder) / f".{name}{i}" for name in ("out", "err")] for i in range(len(functions))]
    children = [started(function, of) for function, of in zip(functions, paths)]
    statuses = [wait_for(child) for child in children]
    return [Outcome(s, *(path.read_text(errors="replace") for path in of)) for s, of in zip(statuses, paths)]


def wait_for(child):
    """Wait for a child -> its exit status, negative for a signal, None if it hung and was killed."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def script(name, words):
    """A function that runs a script with these words on its command line."""

    def main():
        sys.argv = [f"{name}.py", *map(str, words)]
        torch.set_num_threads(1)
        importlib.import_module(name).main()

    return main


def trace(folder):
    """What a run came to -> (parameters, log without clocks, accuracies), to be compared."""
    folder = Path(folder)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    params = {key: w.numpy().tobytes() for key, w in checkpoint["params"].items()}
    log = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        line = json.loads(line)
        line.pop("seconds", None)
        log.append(line)
    result = json.loads((folder / "result.json").read_text())
    scores = {key: value for key, value in result.items() if key.startswith(("per_", "accuracy", "nil"))}
    return params, log, scores


class Campaign:
    """Holds the temporary folder, the random generator and what happened."""

    def __init__(self, seed, scale, place):
        self.rng = random.Random(seed)
        self.scale = scale
        self.place = Path(place)
        self.table = []  # (what, Counter of outcomes)
        self.wrong = []  # (what, case, text)
        self.cache = self.place / "cache"

    def count(self, what, happened):
        """Add a line to the table."""
        self.table.append((what, happened))
        print(f"{what}: {dict(happened)}", file=sys.stderr, flush=True)

    def times(self, number):
        """How often to try, at this scale."""
        return max(1, round(number * self.scale))

    def note_wrong(self, what, case, outcome):
        """Keep what a failed case said."""
        text = outcome if isinstance(outcome, str) else f"status {outcome.status}: {outcome.err[-600:]}"
        self.wrong.append((what, case, text))

    # ----- killed

    def kills(self):
        """SIGKILL training at random moments, and continue."""
        happened = collections.Counter()
        for name in RUNS if self.scale >= 0.5 else self.rng.sample(sorted(RUNS), 1):
            words = [*RUNS[name].split(), "--cache-dir", self.cache]
            calm = self.place / f"{name}-calm"
            begun = time.monotonic()
            first = forked(script(name, [*words, "--out", calm]), self.place)
            if first.status != 0:
                raise RuntimeError(f"{name} does not run at all: {first.err}")
            length = time.monotonic() - begun
            for case in range(self.times(8 if name in ("kml", "modgrad") else 7)):
                out = self.place / f"{name}-killed"
                shutil.rmtree(out, ignore_errors=True)
                child = left_alone(script(name, [*words, "--out", out]))
                time.sleep(self.rng.uniform(0.1, 1.0) * length)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                again = forked(script(name, [*words, "--out", out]), self.place)
                same = again.status == 0 and trace(out) == trace(calm)
                happened["the same bits" if same else "WRONG"] += 1
                if not same:
                    self.note_wrong(f"SIGKILL of {name}", case, again)
        self.count("SIGKILL in kml, mprotonet, modgrad or afr, then the same command", happened)

    def killed_builders(self):
        """SIGKILL the building of a cache, and build it."""
        root = self.class_folders("big", 60, 20)
        want = self.built(root, "big", self.place / "c0")
        happened = collections.Counter()
        begun = time.monotonic()
        self.built(root, "big", self.place / "c1")
        length = time.monotonic() - begun
        place = self.place / "c2"
        for case in range(self.times(20)):
            shutil.rmtree(place, ignore_errors=True)
            child = left_alone(lambda: cache.prepare("big", 8, root, place))
            time.sleep(self.rng.uniform(0, 1.1) * length)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            same = self.built(root, "big", place) == want
            happened["the same bits" if same else "WRONG"] += 1
            if not same:
                self.note_wrong("SIGKILL while a cache is built", case, "other bytes")
        self.count("SIGKILL while a cache is built, then again", happened)

    def built(self, root, mode, place):
        """Build a cache -> the bytes of its files."""
        forked(lambda: cache.prepare(mode, 8, root, place), self.place)
        found = list(place.glob(f"{mode}-8-*"))
        return {file.name: file.read_bytes() for folder in found for file in folder.iterdir()}

    # ----- crowds

    def crowds(self):
        """Several builders of one cache, and several runs into one folder."""
        root = self.class_folders("crowd", 30, 20)  # fewer than are decoded in processes of their own
        happened = collections.Counter()
        for _ in range(self.times(5)):
            place = self.place / "c3"
            shutil.rmtree(place, ignore_errors=True)
            build = lambda place=place: cache.prepare("crowd", 8, root, place)
            children = [left_alone(build) for _ in range(4)]
            statuses = [wait_for(child) for child in children]
            left = [path.name for path in place.iterdir()]
            good = statuses == [0] * 4 and len(left) == 1 and not store.problem(place / left[0], full=True)
            happened["the same bits" if good else "WRONG"] += 1
        self.count("four builders of one cache at once", happened)
        happened = collections.Counter()
        for case in range(self.times(5)):
            out = self.place / "shared-out"
            shutil.rmtree(out, ignore_errors=True)
            words = [*RUNS["mprotonet"].split(), "--cache-dir", self.cache, "--out", out]
            runs = [script("mprotonet", [*words, "--seed", seed]) for seed in range(2)]
            ends = forked_together(runs, self.place)
            refused = [end for end in ends if end.refused and "is in use by process" in end.err]
            good = len(refused) == 1 and sorted(end.status for end in ends) == [0, 2]
            happened["refused" if good else "WRONG"] += 1
            if not good:
                self.note_wrong("two runs in one folder", case, str(ends))
        self.count("two runs into one folder: the second", happened)

    # ----- no room

    def full_disk(self):
        """Let no file grow beyond some bytes, as on a full disk."""
        happened = collections.Counter()
        for case in range(self.times(10)):
            out = self.place / "full"
            shutil.rmtree(out, ignore_errors=True)
            limit = self.rng.choice([0, 100, 1000, 4096, 10000])
            words = [*RUNS["kml"].split(), "--cache-dir", self.place / "full", "--out", out]
            end = forked(lambda words=words, limit=limit: limited(script("kml", words), limit), self.place)
            happened["refused" if end.refused else "WRONG"] += 1
            if not end.refused:
                self.note_wrong("no room", case, end)
        self.count("no room to write, at random sizes", happened)

    # ----- damaged files

    def damaged_records(self):
        """Damage checkpoint, kept parameters, log, result and cache of a run, and continue it."""
        calm = self.place / "calm"
        words = [*RUNS["mprotonet"].split(), "--cache-dir", self.place / "own", "--keep-every", 30]
        forked(script("mprotonet", [*words, "--out", calm]), self.place)
        half = self.place / "half"
        stopped = [*words, "--iterations", 30, "--out", half]
        forked(script("mprotonet", stopped), self.place)
        want = trace(calm)
        for name, number in (("checkpoint.pt", 60), ("log.jsonl", 40), ("result.json", 40), ("cache", 40)):
            happened = collections.Counter()
            for case in range(self.times(number)):
                out = self.place / "damaged"
                own = self.place / "own2"
                for source, target in ((half, out), (self.place / "own", own)):
                    shutil.rmtree(target, ignore_errors=True)
                    shutil.copytree(source, target)
                if name == "result.json":  # a finished run, whose result is shown again
                    shutil.rmtree(out)
                    shutil.copytree(calm, out)
                file = out / name if name != "cache" else self.rng.choice(sorted(own.rglob("*.*")))
                what = self.mutate(file)
                again = [*RUNS["mprotonet"].split(), "--cache-dir", own, "--keep-every", 30, "--out", out]
                end = forked(script("mprotonet", again), self.place)
                kind = self.judge(end, out, want)
                happened[kind] += 1
                if kind == "WRONG":
                    self.note_wrong(f"damaged {name}", f"{case}: {file.name} {what}", end)
            self.count(f"damaged {name}", happened)

    def judge(self, end, out, want):
        """What became of a run with a damaged file."""
        if end.broken:
            return "WRONG"
        if end.refused:
            return "refused"
        if end.status != 0:
            return "WRONG"
        params, log, scores = trace(out)
        if (params, scores) != (want[0], want[2]):
            return "WRONG"
        if "note: " in end.err:
            return "noticed"
        return "harmless" if log == want[1] else "WRONG"

    def mutate(self, file):
        """Damage a file -> what was done."""
        content = file.read_bytes()
        kinds = ["flip", "zeros", "cut", "longer", "empty", "swap", "noise"]
        if file.suffix == ".pt":
            kinds += ["field"] * 3
        if file.suffix in (".json", ".jsonl"):
            kinds += ["json"] * 3
        kind = self.rng.choice(kinds)
        at = self.rng.randrange(max(1, len(content)))
        if kind == "flip":
            content = content[:at] + bytes([content[at] ^ (1 << self.rng.randrange(8))]) + content[at + 1 :]
        elif kind == "zeros":
            content = (content[:at] + bytes(512) + content[at + 512 :])[: len(content)]
        elif kind == "cut":
            content = content[:at]
        elif kind == "longer":
            content += self.rng.randbytes(100)
        elif kind == "empty":
            content = b""
        elif kind == "swap":
            content = content[at:] + content[:at]
        elif kind == "noise":
            content = self.rng.randbytes(len(content))
        elif kind == "field":
            return self.mutate_checkpoint(file)
        elif kind == "json":
            return self.mutate_json(file)
        file.write_bytes(content)
        return f"{kind} at {at}"

    def mutate_checkpoint(self, file):
        """Give a field of a checkpoint a value that cannot be right -> what was done."""
        checkpoint = torch.load(file, weights_only=True)
        key = self.rng.choice(sorted(checkpoint["params"]))
        w = checkpoint["params"][key]
        state = checkpoint["optimizer"]["state"]
        changes = {
            "iteration": lambda: checkpoint.update(iteration=self.rng.choice([-5, 1.5, "x", None, 2**70])),
            "seconds": lambda: checkpoint.update(seconds=self.rng.choice([-1.0, float("nan"), "x"])),
            "window": lambda: checkpoint.update(window=self.rng.choice(["x", [1], None])),
            "shape": lambda: checkpoint["params"].update({key: w[..., :1].repeat(3, *[1] * (w.dim() - 1))}),
            "dtype": lambda: checkpoint["params"].update({key: w.double()}),
            "infinite": lambda: checkpoint["params"].update({key: w * float("inf")}),
            "lost": lambda: checkpoint["params"].pop(key),
            "moments": lambda: state[0].update(exp_avg=torch.zeros(1)),
            "step": lambda: state[0].update(step=torch.tensor(-3.0)),
            "no moments": lambda: state.clear(),
            "no optimizer": lambda: checkpoint.pop("optimizer"),
            "identity": lambda: checkpoint.update(identity=[1]),
            "method": lambda: checkpoint["identity"].update(method="other"),
        }
        name = self.rng.choice(sorted(changes))
        changes[name]()
        torch.save(checkpoint, file)
        return f"field {name} {key}"

    def mutate_json(self, file):
        """Change one value of a JSON file, or of one line of a log -> what was done."""
        lines = file.read_text().splitlines()
        number = self.rng.randrange(len(lines))
        record = json.loads(lines[number])
        key = self.rng.choice(sorted(record))
        value = self.rng.choice([None, -1, "x", [], {}, 1e308])
        if self.rng.random() < 0.3:
            record.pop(key)
        else:
            record[key] = value
        lines[number] = json.dumps(record)
        file.write_text("\n".join(lines) + "\n")
        return f"line {number}, {key} becomes {value!r}"

    def damaged_images(self):
        """Damage an image or an archive, and decode the set: each ends in a cache or in one line."""
        happened = collections.Counter()
        for kind in ("image", "zip"):
            for case in range(self.times(60)):
                root, place = self.place / "images", self.place / "c4"
                for folder in (root, place):
                    shutil.rmtree(folder, ignore_errors=True)
                self.class_folders(
                    "mine", 3, 4, root, self.rng.choice([".png", ".jpg", ".gif", ".tif", ".webp"])
                )
                file = self.rng.choice(sorted(root.rglob("*.*")))
                if kind == "zip":
                    split = root / "mine" / "train"
                    file = Path(shutil.make_archive(split, "zip", split))
                    shutil.rmtree(split)
                what = self.mutate(file)
                end = forked(lambda root=root, place=place: cache.prepare("mine", 8, root, place), self.place)
                found = list(place.glob("mine-8-*"))
                if end.refused and not found:
                    happened["refused"] += 1
                elif end.status == 0 and found and not store.problem(found[0], full=True):
                    happened["harmless"] += 1  # the decoder could still read a picture
                else:
                    happened["WRONG"] += 1
                    self.note_wrong(f"damaged {kind}", f"{case}: {what}", end)
        self.count("damaged images and zips", happened)

    # ----- malicious files

    def malicious(self):
        """Pickles that would run code, in every place where a pickle is read."""
        mark = self.place / "executed"
        happened = collections.Counter()
        payload = pickle.dumps(Run(f"touch {mark}"))
        for case, protocol in enumerate((0, 2, 4, 5)):
            payload = pickle.dumps(Run(f"touch {mark}"), protocol=protocol)
            for place in ("checkpoint", "raw checkpoint", "miniimagenet", "cifar"):
                end = self.feed(place, payload)
                good = end.refused and not mark.exists()
                happened["refused" if good else "WRONG"] += 1
                if not good:
                    self.note_wrong(f"malicious {place}", case, end)
        self.count("malicious pickles, none executed", happened)

    def feed(self, place, payload):
        """Put a malicious pickle where the project reads one -> Outcome."""
        root, out = self.place / "evil", self.place / "evil-out"
        for folder in (root, out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        if "checkpoint" in place:
            if place == "checkpoint":
                with zipfile.ZipFile(out / "checkpoint.pt", "w") as archive:
                    archive.writestr("archive/data.pkl", payload)
                    archive.writestr("archive/version", "3\n")
            else:
                (out / "checkpoint.pt").write_bytes(payload)
            words = [*RUNS["mprotonet"].split(), "--cache-dir", self.cache, "--out", out]
            return forked(script("mprotonet", words), self.place)
        if place == "miniimagenet":
            for split in ("train", "validation", "test"):
                (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(payload)
            return forked(lambda: cache.prepare("miniimagenet", 8, root, self.place / "c5"), self.place)
        with tarfile.open(root / "cifar-100-python.tar.gz", "w:gz") as archive:
            for name in ("meta", "train", "test"):
                member = tarfile.TarInfo(f"cifar-100-python/{name}")
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))
        return forked(lambda: cache.prepare("fc100", 8, root, self.place / "c5"), self.place)

    # ----- flags

    def flags(self):
        """Combinations of flags: each runs one iteration, or ends in one line and status 2."""
        try:
            import hypothesis
            from hypothesis import strategies as st
        except ImportError:
            print(
                "note: hypothesis is not installed, so flags are not tried: pip install -r requirements-dev.txt",
                file=sys.stderr,
            )
            return
        happened = collections.Counter()
        numbers = st.sampled_from(
            ["0", "1", "2", "5", "-1", "nan", "inf", "1e4", "x", "", "99999999999999999999"]
        )
        choices = {
            "--ways": numbers, "--shots": numbers, "--queries": numbers, "--channels": st.sampled_from("0123"),
            "--image-size": st.sampled_from(["7", "8", "13", "0", "2000"]), "--meta-batch": numbers, "--lr": numbers,
            "--test-tasks": st.sampled_from(["1", "4", "6", "0"]), "--val-every": numbers, "--val-tasks": st.just("4"),
            "--seed": numbers, "--save-every": numbers, "--log-every": numbers, "--keep-every": numbers,
            "--stop-after": numbers, "--precision": st.sampled_from(["fp32", "bf16", "fp16"]), "--workers": numbers,
            "--modes": st.sampled_from(["omniglot", "cub", "bird", "nothing", "OMNIGLOT", "a/b", ""]),
            "--device": st.sampled_from(["cpu", "cuda:7", "auto"]), "--modulation": st.sampled_from(["none", "kml", "film"]),
        }  # fmt: skip
        flags = st.sets(st.sampled_from(sorted(choices)), max_size=4)
        names = st.sampled_from(["kml", "mmaml", "mprotonet"])

        @hypothesis.settings(max_examples=self.times(120), deadline=None, database=None, derandomize=True)
        @hypothesis.given(names, flags, st.data())
        def try_one(name, keys, data):
            drawn = {key: data.draw(choices[key]) for key in sorted(keys)}
            out = self.place / "flags"
            shutil.rmtree(out, ignore_errors=True)
            words = [
                "--synthetic",
                "--image-size",
                8,
                "--channels",
                2,
                "--queries",
                2,
                "--iterations",
                1,
                "--test-tasks",
                4,
            ]
            words += ["--meta-batch", 2, "--cache-dir", self.cache, "--out", out, "--workers", 1]
            for key, value in drawn.items():
                words += [f"{key}={value}"]
            end = forked(script(name, words), self.place)
            good = end.refused or (end.status == 0 and not end.broken)
            happened["refused" if end.refused else "one iteration" if good else "WRONG"] += 1
            if not good:
                self.note_wrong("flags", f"{name} {drawn}", end)

        try_one()
        self.count("combinations of flags", happened)

    # ----- helpers

    def class_folders(self, mode, classes, images, root=None, suffix=".png"):
        """Write a data set of small noise images -> the folder above it."""
        root = Path(root or self.place / "data")
        noise = np.random.default_rng(len(mode) + classes)
        for split in ("train", "val", "test"):
            for c in range(classes):
                folder = root / mode / split / f"{split}{c:03}"
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(images):
                    Image.fromarray(noise.integers(0, 256, (12, 12, 3), np.uint8)).save(
                        folder / f"{i:03}{suffix}"
                    )
        return root


class Run:
    """Unpickles to a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def left_alone(function):
    """Start a function in a forked process that prints nowhere, and do not wait for it -> process number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        function()
        status = 0
    finally:
        os._exit(status)  # not through the parent's blocks, which would remove its folder


def limited(function, limit):
    """Call a function while no file may grow beyond `limit` bytes."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(os.dup(2), "wb", 0), write_through=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(limit, 4096), max(limit, 4096)))
    function()


def get_args(argv=None):
    """Read the command line -> args."""
    parser = new_parser(__doc__, "")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and damages")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many cases")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    return parser.parse_args(argv)


PARTS = (
    *("kills", "killed_builders", "crowds", "full_disk", "damaged_records", "damaged_images"),
    *("malicious", "flags"),
)


def run(seed=0, scale=1.0, parts=PARTS):
    """Run some parts of the campaign -> Campaign."""
    if not hasattr(os, "fork"):
        fail("the campaign forks its processes, which this system cannot do: run it on Linux or macOS")
    # Forked runs would each import these anew, which takes longer than all that they train.
    importlib.import_module("torch._dynamo")  # by Adam
    if plots.installed():
        plots.pyplot()
    with tempfile.TemporaryDirectory() as place:
        campaign = Campaign(seed, scale, place)
        for part in parts:
            getattr(campaign, part)()
    return campaign


def markdown(table):
    """The table that README shows."""
    lines = ["| what was tried | how often | what happened |", "|---|---|---|"]
    for what, happened in table:
        ends = ", ".join(
            f"{count} {name}" for name, count in sorted(happened.items(), key=lambda item: -item[1])
        )
        lines.append(f"| {what} | {sum(happened.values())} | {ends} |")
    return "\n".join(lines)


def main():
    args = get_args()
    campaign = run(args.seed, args.scale, [args.only] if args.only else PARTS)
    print(markdown(campaign.table))
    for what, case, text in campaign.wrong:
        print(f"\n{what}, case {case}:\n{text}", file=sys.stderr)
    raise SystemExit(1 if campaign.wrong else 0)


if __name__ == "__main__":
    main()
