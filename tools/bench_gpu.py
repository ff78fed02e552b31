"""`python -m tools.bench gpu`: what to run first on a GPU."""

import importlib
import itertools
import json
import multiprocessing
import platform
import statistics
import time
from pathlib import Path

import torch

import data
from tools.baselines import prepare_variant, trainable
from tools.timing import clock

GPU_SCRIPTS = {
    "kml": ["--modulation", "kml"],
    "mmaml": ["--modulation", "film"],
    "mprotonet": ["--modulation", "kml"],
    "modgrad": [],
}  # at the papers' meta-batches, which are the scripts' defaults
GPU_PRECISIONS = ("tf32", "bf16", "fp32")  # tf32: PyTorch's default for convolutions
GPU_VARIANTS = ("vmap", "captured", "loop", "unfold", "compiled")
ROW_LIMIT = 45  # seconds after which a row takes no further sample; compiling is stopped 15 later
TINY = ("--image-size", 32, "--channels", 4, "--queries", 2, "--meta-batch", 2)  # the shape of --smoke
PATHS = {  # that `equivalence` compares: the type of the parameters, and whether tasks are taken together
    "loop64": (torch.float64, False),
    "vmap64": (torch.float64, True),
    "loop": (torch.float32, False),
    "vmap": (torch.float32, True),
    "captured": (torch.float32, True),
}


def gpu_options(name, shots, precision, args, *words):
    """A script as a module, and its arguments at the papers' shape (or, with --smoke, at a tiny one)."""
    module = importlib.import_module(name)
    tiny = TINY if args.smoke else ()
    script_precision = "bf16" if precision == "bf16" else "fp32"
    given = [
        *GPU_SCRIPTS[name],
        *tiny,
        "--shots",
        shots,
        "--precision",
        script_precision,
        "--device",
        args.device,
        "--synthetic",
        "--out",
        "-",
        *words,
    ]
    return module, module.get_args([str(word) for word in given])


def random_batch(options, seed, dtype=torch.float32):
    """A meta-batch of noise images, made on the device -> Task."""
    device = options.device
    rng = torch.Generator(device).manual_seed(seed)
    T, S = options.meta_batch, options.image_size
    classes = torch.arange(options.ways, device=device)
    parts = []
    for each in (options.shots, options.queries):
        images = torch.rand(T, options.ways * each, 3, S, S, generator=rng, device=device)
        labels = classes.repeat_interleave(each).expand(T, -1)
        parts += [images.to(dtype), labels]
    mode = torch.zeros(T, dtype=torch.int64)
    return data.Task(*parts, mode)


def set_precision(precision):
    """TF32 for convolutions, or not. (Autocast, which `run_tasks` switches on for bf16, does not mind.)"""
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False


def gpu_step(variant, module, options):
    """-> step(): one training iteration of a script by one of GPU_VARIANTS, without the sampler."""
    params = trainable(module, options)
    optimizer = torch.optim.Adam(params.values(), lr=options.lr, fused=True)
    batches = [random_batch(options, seed) for seed in (0, 1)]
    count = 0
    gradients = prepare_variant(variant, module, options, params)

    def step():
        nonlocal count
        count += 1
        optimizer.zero_grad()
        gradients(batches[count % 2])
        optimizer.step()

    return step


def gpu_row(name, shots, precision, variant, args, rounds=10):
    """Measure one variant of one script -> {"samples": milliseconds of each round, "peak_MiB", ...}, or {"failed": why}."""
    row = {"script": name, "shots": shots, "precision": precision, "variant": variant}
    if variant == "captured" and args.device == "cpu":
        return row | {"failed": "needs a GPU"}
    set_precision(precision)
    begun = time.perf_counter()
    try:
        module, options = gpu_options(name, shots, precision, args)
        step = gpu_step(variant, module, options)
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            clock(step, args.device)  # warms up, and compiles
        row["warm_up_seconds"] = round(time.perf_counter() - begun, 2)
        samples = gpu_samples(step, args.device, rounds, begun + ROW_LIMIT)
        row |= {"meta_batch": options.meta_batch, "samples": samples}
        if args.device != "cpu":
            row["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
    except Exception as error:  # noqa: BLE001 (whatever fails is a row, not an end)
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        torch._dynamo.reset()
        if args.device != "cpu":
            torch.cuda.empty_cache()
    return row


def gpu_samples(step, device, rounds, end):
    """Milliseconds of each round, of which none but the first begins after the time `end`."""
    samples = []
    for _ in range(rounds):
        if samples and time.perf_counter() >= end:
            break
        samples.append(round(clock(step, device), 3))
    return samples


def row_in_a_process(name, shots, precision, variant, args):
    """gpu_row in a process of its own, which is killed when it takes too long: compiling may."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    given = (queue, name, shots, precision, variant, args)
    process = context.Process(target=put_row, args=given, daemon=True)
    process.start()
    row = {"script": name, "shots": shots, "precision": precision, "variant": variant}
    try:
        return queue.get(timeout=ROW_LIMIT + 15)
    except Exception:  # noqa: BLE001 (an empty queue)
        return row | {"failed": f"over {ROW_LIMIT + 15} s"}
    finally:
        process.kill()
        process.join()


def put_row(queue, *given):
    """Measure a row, and hand it to the process that waits for it."""
    queue.put(gpu_row(*given))


def equivalence(name, args):
    """The vmap path beside the loop over tasks, in float32 without TF32 and in float64 -> a row of relative differences.

    Each is the norm of a difference over the norm: of all losses, and of all gradients. All are differences from float64's
    loop. `vmap64` shows whether the two paths compute the same; in float32, on noise images, ReLUs that switch make gradients
    differ by a few percent.
    """
    set_precision("fp32")
    found = {}
    for path, (dtype, is_together) in PATHS.items():
        if path != "captured" or args.device != "cpu":
            found[path] = losses_and_gradients(name, args, path, dtype, is_together)
    wanted = found.pop("loop64")
    row = {"script": name}
    for path, pair in found.items():
        row[path] = [difference(x, y) for x, y in zip(pair, wanted)]
    close = [row[path][0] < 1e-3 and row[path][1] < 0.1 for path in found]
    row["same"] = max(row["vmap64"]) < 1e-9 and all(close)
    return row


def losses_and_gradients(name, args, path, dtype, is_together):
    """What one of PATHS computes for a batch of two tasks -> losses (2,), all gradients in a row; both in float64."""
    module, options = gpu_options(name, 1, "fp32", args, "--meta-batch", 2, "--workers", 1)
    params = trainable(module, options, dtype)

    def run(batch):
        return module.run_tasks(params, batch, options, is_together)

    if path == "captured":
        run = data.recorded(run, params)
    losses, _ = run(random_batch(options, 0, dtype))
    gradients = [w.grad.double().flatten() for w in params.values()]
    return losses.double(), torch.cat(gradients)


def difference(x, wanted):
    """The norm of a difference over the norm."""
    return ((x - wanted).norm() / wanted.norm()).item()


def gpu_plan(args):
    """The rows in order of importance: vmap and the captured graph, which the scripts use, first; what may fail last."""
    first = itertools.product((5, 1), GPU_PRECISIONS, GPU_SCRIPTS, ("vmap", "captured"))
    for shots, precision, name, variant in first:
        yield name, shots, precision, variant
    for variant, name in itertools.product(("loop", "unfold", "compiled"), GPU_SCRIPTS):
        yield name, 5, "tf32", variant


def bench_gpu(args):
    """Everything of `gpu`; the file is written again after each row -> the record."""
    begun = time.perf_counter()
    record = {"card": gpu_card(args), "equivalence": [], "rows": []}
    print(json.dumps(record["card"]), flush=True)
    for name in GPU_SCRIPTS:
        record["equivalence"].append(equivalence(name, args))
        print(json.dumps(record["equivalence"][-1]), flush=True)
    for name, shots, precision, variant in gpu_plan(args):
        row = {"script": name, "shots": shots, "precision": precision, "variant": variant}
        if time.perf_counter() - begun > args.budget:
            row["failed"] = f"not tried: the {args.budget:.0f} seconds of --budget are over"
        else:
            measure = row_in_a_process if variant == "compiled" else gpu_row
            row = measure(name, shots, precision, variant, args)
        record["rows"].append(row)
        ms = f"{statistics.median(row['samples']):9.2f} ms" if "samples" in row else row["failed"]
        print(f"{name:12}{shots}-shot  {precision:6}{variant:10}{ms}", flush=True)
        data.atomic_write(Path(args.json), json.dumps(record, indent=1))
    record["seconds"] = round(time.perf_counter() - begun, 1)
    data.atomic_write(Path(args.json), json.dumps(record, indent=1))
    return record


def gpu_card(args):
    """The card and the versions that a figure belongs to."""
    card = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": data.cores(),
        "smoke": args.smoke,
    }
    if args.device == "cpu":
        return card | {"card": platform.machine()}
    memory = torch.cuda.get_device_properties(args.device).total_memory
    return card | {
        "card": torch.cuda.get_device_name(args.device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "memory_GiB": round(memory / 2**30, 1),
    }


def gpu_table(record):
    """What bench_gpu found -> Markdown: median milliseconds of one training iteration, a row per script and shots."""
    cells = {}
    for row in record["rows"]:
        column = (row["variant"], row["precision"])
        cells[row["script"], row["shots"], *column] = cell_of_row(row)
    measured = {(variant, precision) for _, _, variant, precision in cells}
    columns = [c for c in itertools.product(GPU_VARIANTS, GPU_PRECISIONS) if c in measured]
    heads = ["script", "shots", *(" ".join(c) for c in columns)]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, shots in dict.fromkeys((script, shots) for script, shots, _, _ in cells):
        found = [cells.get((name, shots, *c), "-") for c in columns]
        lines.append(f"| {name}.py | {shots} | {' | '.join(found)} |")
    return "\n".join(lines)


def cell_of_row(row):
    """The median of a row's samples, or in a word why it failed."""
    if "samples" in row:
        return f"{statistics.median(row['samples']):.1f}"
    return row["failed"].split(":")[0]


def gpu_verdict(record):
    """Which variant each script should use by default: the fastest in PyTorch's default precision -> lines of text."""
    lines = []
    for name in GPU_SCRIPTS:
        found = medians_of_variants(record["rows"], name)
        if "vmap" not in found:
            lines.append(f"{name}.py: vmap was not measured")
            continue
        best = min(found, key=found.get)
        ratio = found["vmap"] / found[best]
        lines.append(
            f"{name}.py: {best} is the fastest, {ratio:.2f} times as fast as vmap (the scripts' default: captured)"
        )
    return "\n".join(lines)


def medians_of_variants(rows, name):
    """Median milliseconds of each variant of a script in TF32 with 5 shots -> dict."""
    found = {}
    for row in rows:
        setting = (row["script"], row["shots"], row["precision"])
        if setting == (name, 5, "tf32") and "samples" in row:
            found[row["variant"]] = statistics.median(row["samples"])
    return found
