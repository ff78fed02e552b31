"""Speed, beside what it has to be compared with. Times that are compared are measured in one run, in alternation.

    python -m tools.bench loader --synthetic                      # nothing to download
    python -m tools.bench train --modes omniglot miniimagenet --shots 5 --meta-batch 4 --json bench.json
    python -m tools.bench peers --modes omniglot miniimagenet --shots 5 --meta-batch 4
    python -m tools.bench steps --modes miniimagenet --shots 1 5
    python -m tools.bench reuse --modes miniimagenet --shots 1 5
    python -m tools.bench gpu --json bench-gpu.json               # under seven minutes; nothing to download

loader    Tasks per second that come ready for training (float, on the device). Ours: `data.Episodes`, images decoded once,
          memory-mapped, gathered in batches of 10 tasks. Baseline: what the released repositories do, worker processes that
          draw a task, open, decode and resize each of its images with Pillow, and convert it.

          Start-up is free for both (cache built, workers started); the baseline's queues are drained before its periods. The
          baseline gets the images as encoded files: the archives of a data set, or PNG files in memory for synthetic ones.

train     Milliseconds of one training iteration of each script, everything included: sampling, losses, gradients, Adam.
            ours      as the script does it: on a CPU tasks in --workers threads; beside it with 1 worker and, where the
                      processor has it, in bf16
            floor     what tasks side by side cannot go below: the same convolutions alone, forward and backward (for MAML's
                      inner steps forward, backward and double backward), run the same way (tasks in threads; on a GPU one after
                      another, where it is no floor), in the same precision, in the faster of PyTorch's two memory layouts
            plain     the same algorithm as one would first write it: a loop over tasks, PyTorch's threads inside each
                      operation, PyTorch's own layout, all tasks' graphs kept until one backward at the end; our sampler
          Beside these: the sampler's share, peak memory (of a fresh process on a CPU), seconds to evaluate 1,000 tasks. With
          --busy another process spins beside all of them, as on a machine that is shared.

peers     Milliseconds of one training iteration without modulation (MAML, ProtoNet) beside libraries that do the same, where they
          are installed, each in its own way: higher for MAML's steps, easyfsl for ProtoNet. `pip install higher easyfsl torchvision`.

variants  Milliseconds of the gradients of one meta-batch, by the ways in which a script's `task_loss` can be called:
            loop      tasks in --workers threads, backward after each: the scripts on a CPU
            vmap      all tasks together, each convolution a grouped one: the scripts on a GPU with --eager
            unfold    vmap, each convolution written as unfold and a batched matrix product
            compiled  vmap under torch.compile (on a CPU only if it is named: compiling takes many minutes, and does not count)
            captured  vmap, recorded once as a CUDA graph and replayed: no launch of a kernel waits for Python: the scripts on a GPU

steps     Milliseconds and memory of adapting to one task by one inner step of each algorithm of modgrad.py, at test time, beside
          MAML's on all layers and MAML's on the same layers. (ModGrad's paper claims twice a MAML step.) The layers before the
          first adapted one are run once a task; this one time is counted.

gpu       One command for whoever has a GPU, without a data set: the card, how far the vmap path is from the loop and from float64, then
          milliseconds of one training iteration (gradients and Adam; noise images made on the card) of the four scripts at
          the papers' shapes by vmap and captured in TF32 (PyTorch's default for convolutions), bf16 and fp32, and by the
          other variants in TF32 with 5 shots. A row that fails says why. In the end: which variant should be each script's default.

reuse     Milliseconds of afr.py's methods beside MAML's, in training (the gradients of one meta-batch) and in testing (from a task's
          images to its query outputs, paper protocol, classification head), and parameters beside MAML's. (The paper claims: 1.7
          times faster in training and 2.3 in testing, 1.1 times the parameters; its abstract 1.5 times faster.) Tasks are drawn before.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

import data
from fewshot.flags import resolve_device
from tools.baselines import (
    PEERS,
    SCRIPTS,
    VARIANTS,
    DecodingLoader,
    baseline_sources,
    prepare_adaptation,
    prepare_floor,
    prepare_plain,
    prepare_reuse,
    prepare_step,
    prepare_variant,
)
from tools.bench_gpu import bench_gpu, gpu_table, gpu_verdict
from tools.timing import clock, has_bf16, in_rounds, neighbour, peak_memory, rate, spread, with_threads

BATCH = 10  # tasks assembled together by our sampler: the papers' meta-batch
ADAPTATIONS = [
    ["--algorithm", "maml"],
    ["--algorithm", "maml", "--adapt", "conv3", "conv4"],
    *(["--algorithm", algorithm] for algorithm in ("modgrad", "metasgd", "cavia", "tnet")),
]
REUSE = [["--algorithm", "maml"], *(["--modulation", modulation] for modulation in ("none", "am", "pam"))]


def bench_loader(args, shots):
    """-> {"sampler": [tasks/s of each round], "decoding loader": [...]}, rounds in alternation."""
    ours = prepare_sampler(args, shots)
    theirs = prepare_loader(args, shots)
    samples = {"sampler": [], "decoding loader": []}
    for _ in range(2 * args.workers):
        theirs()
    ours()
    for _ in range(args.rounds):
        time.sleep(min(1.0, args.seconds))  # the workers fill their queues and fall silent
        samples["sampler"].append(rate(ours, args.seconds))
        for _ in range(2 * args.workers):  # the queue that was filled for free does not count
            theirs()
        samples["decoding loader"].append(rate(theirs, args.seconds))
    return samples


def prepare_sampler(args, shots):
    """-> draw(): has our sampler make the next BATCH tasks, and returns how many they are."""
    device = torch.device(args.device)
    shape = (args.ways, shots, args.queries, args.image_size)
    seed = 0
    where = (args.data_root, args.cache_dir, args.synthetic)
    episodes = data.Episodes(args.modes, "train", *shape, seed, device, *where)
    first = 0

    def draw():
        nonlocal first
        episodes.tasks(first, BATCH)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first += BATCH
        return BATCH

    return draw


def prepare_loader(args, shots):
    """-> draw(): takes the next task from the baseline's workers to the device, and returns 1."""
    loader = torch.utils.data.DataLoader(
        DecodingLoader(baseline_sources(args), args, shots),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=2,
    )
    tasks = iter(loader)

    def draw():
        for x in next(tasks):
            x.to(args.device)
        return 1

    return draw


def bench_train(name, args, shots):
    """One script at one shape -> a row: "samples" {what: [milliseconds of each round]}, in alternation but for evaluation, and memory."""
    step, sample, module, options, params = prepare_step(name, args, shots)
    draw = one_after_another(sample)
    runs = {
        "ours": with_threads(1, step),
        "sampler": with_threads(1, sample),
        "floor": prepare_floor(module, options, params, torch.channels_last),
        "floor, PyTorch's own layout": prepare_floor(module, options, params, torch.contiguous_format),
        "plain": with_threads(data.cores(), prepare_plain(module, options, draw)),
    }
    if args.device == "cpu":
        runs["ours, 1 worker"] = changed_step(name, args, shots, workers=1)
    if has_bf16(args.device) and args.precision == "fp32":
        runs["ours, bf16"] = changed_step(name, args, shots, precision="bf16")
    samples = in_rounds(runs, args)
    samples["evaluation of 1,000 tasks"] = evaluation_times(module, options, params, args)
    memory = peak_of(prepare_step, name, args, shots)
    return {
        "script": name,
        "modulation": SCRIPTS[name],
        "shots": shots,
        "samples": samples,
        "peak_MiB": round(memory, 1),
    }


def one_after_another(sample):
    """-> draw(): the support and query images of one task; sample() is called whenever all tasks of a batch are used."""
    queue = []

    def draw():
        if not queue:
            batch = sample()
            queue.extend(zip(batch.support_x, batch.query_x))
        return queue.pop()

    return draw


def changed_step(name, args, shots, **flags):
    """One iteration of a script in one thread per operation, with other flags than `args` has -> function."""
    other = argparse.Namespace(**vars(args) | flags)
    return with_threads(1, prepare_step(name, other, shots)[0])


def evaluation_times(module, options, params, args):
    """Milliseconds that the evaluation of 1,000 test tasks takes, in each round: measured on fewer tasks, and scaled."""
    count = min(options.test_tasks, 20 * args.repeat)
    test = data.Episodes.of(options, "test")
    evaluation = with_threads(1, lambda: module.evaluate(params, test, count, options))
    with neighbour(args.busy):
        return [clock(evaluation, args.device) * 1000 / count for _ in range(args.rounds)]


def peak_of(*given):
    """What peak_memory gives, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, given)


def bench_peers(args, shots):
    """-> a row for each of PEERS: {"script", "peer", "shots", "samples"}, or, where the library does not run, "failed": why."""
    rows = []
    for name, (peer, prepare) in PEERS.items():
        with mock.patch.dict(SCRIPTS, {name: "none"}):
            step, sample, module, options, params = prepare_step(name, args, shots)
        row = {"script": name, "peer": peer, "shots": shots}
        try:
            theirs = prepare(module, options, params, sample)
        except (ImportError, RuntimeError) as error:  # not there, or not for this PyTorch
            rows.append(row | {"failed": " ".join(str(error).split())})
            continue
        runs = {"ours": with_threads(1, step), peer: with_threads(data.cores(), theirs)}
        rows.append(row | {"samples": in_rounds(runs, args)})
    if all("failed" in row for row in rows):
        data.fail(f"peers: {rows[0]['failed']}: pip install higher easyfsl torchvision, then once more")
    return rows


def peers_table(rows, args):
    """What bench_peers found -> Markdown."""
    lines = ["| script | shots | ours, ms | peer | ms | peer / ours |", "|" + " --- |" * 6]
    for row in rows:
        script, peer = f"{row['script']}.py --modulation none", row["peer"]
        if "failed" in row:
            lines.append(table_row([script, row["shots"], "-", peer, row["failed"], "-"]))
            continue
        if args.busy:
            script += ", busy"
        ours, theirs = row["samples"]["ours"], row["samples"][peer]
        ratio = statistics.median(theirs) / statistics.median(ours)
        cells = [script, row["shots"], spread(ours), peer, spread(theirs), f"{ratio:.2f}"]
        lines.append(table_row(cells))
    return "\n".join(lines)


def table_row(cells):
    """Cells -> a line of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def bench_variants(name, args, shots):
    """One script at one shape -> a row: "samples" {variant: [milliseconds of each round]}, in alternation."""
    _, sample, module, options, params = prepare_step(name, args, shots)
    samples = {variant: [] for variant in args.variants}
    calls = {variant: prepare_variant(variant, module, options, params) for variant in args.variants}
    for number in range(args.rounds + 1):
        for variant, gradients in calls.items():
            batch = sample()
            took = clock(lambda gradients=gradients, batch=batch: gradients(batch), args.device)
            if number:  # round 0 warms up, and compiles
                samples[variant].append(took)
            for w in params.values():
                w.grad = None
    return {"script": name, "modulation": SCRIPTS[name], "shots": shots, "samples": samples}


def profile(name, args, shots):
    """Print where one training iteration of a script spends its time."""
    step = prepare_step(name, args, shots)[0]
    for _ in range(3):
        step()
    with torch.profiler.profile() as record:
        step()
    by = "self_cpu_time_total" if args.device == "cpu" else "self_device_time_total"
    print(f"\n{name} --modulation {SCRIPTS[name]}, {shots}-shot")
    print(record.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40))


def bench_steps(args, shots):
    """-> a row for each of ADAPTATIONS: {"algorithm", "adapts", "samples": milliseconds of each round, "peak_MiB"}."""
    steps, rows = [], []
    for words in ADAPTATIONS:
        step, options = prepare_adaptation(words, args, shots)
        adapts = " ".join(options.adapt) or "its context"
        steps.append(step)
        rows.append({"algorithm": options.method, "adapts": adapts, "shots": shots, "samples": []})
    for number in range(args.rounds + 1):
        for step, row in zip(steps, rows):
            took = clock(step, args.device, args.repeat)
            if number:  # round 0 warms up
                row["samples"].append(took)
    for words, row in zip(ADAPTATIONS, rows):
        row["peak_MiB"] = round(peak_of(prepare_adaptation, words, args, shots), 1)
    return rows


def steps_table(rows, args):
    """What bench_steps found -> Markdown."""
    lines = [
        "| inner step | adapts | shots | ms | beside MAML | beside MAML on the same layers | peak MiB |",
        "|" + " --- |" * 7,
    ]
    middle = {}
    for row in rows:
        middle[row["shots"], row["algorithm"]] = statistics.median(row["samples"])
    for row in rows:
        shots = row["shots"]
        ms = middle[shots, row["algorithm"]]
        beside = f"{ms / middle[shots, 'MAML']:.2f}"
        layers = row["adapts"].replace(" ", "+")
        same = middle.get((shots, f"MAML on {layers}"))
        beside_same = f"{ms / same:.2f}" if same else "-"
        named = [row["algorithm"], row["adapts"], shots]
        cells = [*named, spread(row["samples"]), beside, beside_same, f"{row['peak_MiB']:.0f}"]
        lines.append(table_row(cells))
    return "\n".join(lines)


def bench_reuse(args, shots):
    """-> a row for each of REUSE: {"method", "parameters", "train" and "test": milliseconds of each round}, in alternation."""
    rows, calls = [], []  # calls: [(function, the list of its times), ...]
    for words in REUSE:
        train, test, options, params = prepare_reuse(words, args, shots)
        count = sum(w.numel() for w in params.values())
        row = {"method": options.method, "shots": shots, "parameters": count, "train": [], "test": []}
        rows.append(row)
        calls += [(train, row["train"]), (test, row["test"])]
    for number in range(args.rounds + 1):
        for function, samples in calls:
            took = clock(function, args.device, args.repeat)
            if number:  # round 0 warms up
                samples.append(took)
    return rows


def reuse_table(rows, args):
    """What bench_reuse found -> Markdown. *Times as fast*: MAML's milliseconds divided by the method's."""
    lines = [
        "| method | shots | ms per training meta-batch | times as fast as MAML | ms per test task | times as fast as MAML | parameters | beside MAML |",
        "|" + " --- |" * 8,
    ]
    of_maml = {row["shots"]: row for row in rows if row["method"] == "MAML"}
    for row in rows:
        maml = of_maml[row["shots"]]
        cells = [row["method"], row["shots"]]
        for what in ("train", "test"):
            ratio = statistics.median(maml[what]) / statistics.median(row[what])
            cells += [spread(row[what]), f"{ratio:.2f}"]
        ratio = row["parameters"] / maml["parameters"]
        cells += [f"{row['parameters']:,}", f"{ratio:.2f}"]
        lines.append(table_row(cells))
    return "\n".join(lines)


def variants_table(rows, args):
    """What bench_variants found -> Markdown: medians, and in brackets the smallest and largest."""
    heads = ["script", "shots", *(f"{variant}, ms" for variant in args.variants)]
    lines = [table_row(heads), "|" + " --- |" * len(heads)]
    for row in rows:
        script = f"{row['script']}.py --modulation {row['modulation']}"
        times = [spread(samples) for samples in row["samples"].values()]
        lines.append(table_row([script, row["shots"], *times]))
    return "\n".join(lines)


def train_table(rows, args):
    """What bench_train found -> Markdown."""
    head = (
        "script",
        "shots",
        "ours, ms per iteration",
        "1 worker / ours",
        "ours / bf16",
        "floor / ours",
        "plain / ours",
        "sampler",
        "peak MiB",
        "s for 1,000 test tasks",
    )
    lines = [table_row(head), "|" + " --- |" * len(head)]
    lines += [table_row(train_cells(row, args)) for row in rows]
    return "\n".join(lines)


def train_cells(row, args):
    """What bench_train found of one script at one shape -> the cells of train_table."""
    middle = {what: statistics.median(values) for what, values in row["samples"].items()}
    ours = middle["ours"]
    single, half = middle.get("ours, 1 worker"), middle.get("ours, bf16")
    floor = min(middle["floor"], middle["floor, PyTorch's own layout"])
    busy = ", busy" if args.busy else ""
    return [
        f"{row['script']}.py --modulation {row['modulation']}, {args.image_size} px{busy}",
        row["shots"],
        spread(row["samples"]["ours"]),
        f"{single / ours:.2f}" if single else "-",
        f"{ours / half:.2f}" if half else "-",
        f"{floor / ours:.2f}",
        f"{middle['plain'] / ours:.2f}",
        f"{100 * middle['sampler'] / ours:.1f} %",
        f"{row['peak_MiB']:.0f}",
        f"{middle['evaluation of 1,000 tasks'] / 1000:.3g}",
    ]


TABLES = {  # of each part but loader and gpu, in the order of the help
    "train": train_table,
    "peers": peers_table,
    "variants": variants_table,
    "steps": steps_table,
    "reuse": reuse_table,
}


def parse_args():
    """The command line -> its flags, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = data.fail
    add_flags(parser)
    args = parser.parse_args()
    args.device = resolve_device(args.device)
    args.variants = args.variants or (VARIANTS[:3] if args.device == "cpu" else VARIANTS)
    args.modes = [data.canonical_mode(mode, args.data_root) for mode in args.modes]
    check(args)
    return args


def add_flags(parser):
    """Add all flags to the parser."""
    parser.add_argument("part", choices=["loader", "train", "peers", "variants", "steps", "reuse", "gpu"])
    parser.add_argument(
        "--scripts", nargs="+", default=list(SCRIPTS), choices=SCRIPTS, help="of train and variants"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, help="of variants: which (on a CPU all but the last two)"
    )
    parser.add_argument("--modes", nargs="+", default=["omniglot", "miniimagenet"], metavar="MODE")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[5])
    parser.add_argument("--queries", type=int, default=15)
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--meta-batch", type=int, default=BATCH)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument(
        "--workers",
        type=int,
        default=data.cores(),
        help="tasks at a time; of loader: processes of the baseline",
    )
    parser.add_argument(
        "--busy", action="store_true", help="train, peers: beside a process that keeps one core busy"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="train, peers, steps, reuse: calls in a round")
    parser.add_argument("--seconds", type=float, default=3, help="loader: length of one period")
    parser.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"))
    parser.add_argument("--cache-dir", default=".cache")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda:N")
    parser.add_argument("--profile", action="store_true", help="train: a table of PyTorch's profiler instead")
    parser.add_argument(
        "--budget", type=float, default=330, help="gpu: seconds after which no further row is begun"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="gpu: tiny shapes, to try the command itself, on a CPU too"
    )
    parser.add_argument("--json", help="write every sample and the versions to this file")


def check(args):
    """Exit if flags are out of range, or contradict each other."""
    for key in ("rounds", "repeat", "workers", "meta_batch", "ways", "queries", "image_size"):
        if getattr(args, key) < 1:
            data.fail(f"--{key.replace('_', '-')} {getattr(args, key)}: give 1 or more")
    if min(args.shots) < 1:
        data.fail(f"--shots {min(args.shots)}: give 1 or more")
    if not args.seconds > 0:
        data.fail(f"--seconds {args.seconds}: give more than 0")
    if "captured" in args.variants and args.device == "cpu":
        data.fail("--variants captured: a CUDA graph needs --device cuda:0; leave it out")
    if args.part == "steps" and args.precision != "fp32":
        data.fail("steps is measured in fp32: leave --precision out")
    if args.part == "gpu" and args.device == "cpu" and not args.smoke:
        data.fail("gpu: there is no GPU here; --smoke tries the command itself on a CPU")


def measure(args):
    """Measure one part, but for loader and gpu -> list of rows, one per script or method, and number of shots."""
    if args.part in ("train", "variants"):
        bench = bench_train if args.part == "train" else bench_variants
        return [bench(name, args, shots) for name in args.scripts for shots in args.shots]
    bench = {"peers": bench_peers, "steps": bench_steps, "reuse": bench_reuse}[args.part]
    return [row for shots in args.shots for row in bench(args, shots)]


def show_loader(samples, about):
    """Print tasks per second of the sampler and of the decoding loader."""
    medians = {name: statistics.median(values) for name, values in samples.items()}
    print(about)
    for name, values in samples.items():
        rounds = f"(rounds {min(values):.1f} to {max(values):.1f})"
        print(f"  {name:18}{medians[name]:10.1f} tasks/s   {rounds}")
    print(f"  {'ratio':18}{medians['sampler'] / medians['decoding loader']:10.1f}")


def write(record, args):
    """Write every sample, the flags and the versions to --json."""
    is_cpu = args.device == "cpu"
    device = platform.machine() if is_cpu else torch.cuda.get_device_name(args.device)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": Image.__version__,
        "machine": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    left_out = ("data_root", "cache_dir", "json")
    kept = {flag: value for flag, value in vars(args).items() if flag not in left_out}
    text = json.dumps(record | {"args": kept, "versions": versions}, indent=1)
    data.atomic_write(Path(args.json), text)


def main():
    args = parse_args()
    if args.part == "gpu":
        args.json = args.json or "bench-gpu.json"
        record = bench_gpu(args)
        print(f"\n{gpu_table(record)}\n\n{gpu_verdict(record)}\n\nwritten: {args.json}")
        return
    if args.part == "train" and args.profile:
        for name in args.scripts:
            for shots in args.shots:
                profile(name, args, shots)
        return
    setting = "SYNTHETIC " if args.synthetic else ""
    setting += f"{'+'.join(args.modes)}, {args.ways}-way, {args.queries} queries, {args.image_size} px"
    record = {}
    if args.part == "loader":
        for shots in args.shots:
            samples = record[f"loader, {shots}-shot"] = bench_loader(args, shots)
            how = f"on {args.device}, {args.workers} workers for the baseline"
            show_loader(samples, f"loader: {setting}, {shots}-shot, {how}")
    else:
        rows = record[args.part] = measure(args)
        batch = "" if args.part == "steps" else f"{args.meta_batch} tasks per iteration, "
        side_by_side = args.part in ("train", "peers", "variants")
        threads = f"{args.workers} workers" if side_by_side else f"{torch.get_num_threads()} threads"
        threads += f", {args.rounds} alternating rounds: medians"
        print(f"{args.part}: {setting}, {batch}{args.precision}, on {args.device} with {threads}\n")
        print(TABLES[args.part](rows, args))
    if args.json:
        write(record, args)


if __name__ == "__main__":
    main()
