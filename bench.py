"""Speed, beside what it has to be compared with. A figure here is a ratio measured in one run, in alternation.

    python bench.py loader --synthetic                      # nothing to download
    python bench.py train --modes omniglot miniimagenet --shots 5 --meta-batch 4 --json bench.json
    python bench.py peers --modes omniglot miniimagenet --shots 5 --meta-batch 4
    python bench.py steps --modes miniimagenet --shots 1 5
    python bench.py reuse --modes miniimagenet --shots 1 5
    python bench.py gpu --json bench-gpu.json               # under six minutes; nothing to download

loader    Tasks a second that come ready for training (float, on the device). Ours: `data.Episodes`, images decoded once,
          memory-mapped, gathered in batches of 10 tasks. Rival: what the released repositories do, worker processes that
          draw a task, open, decode and resize each of its images with Pillow, and convert it.

          Both are given their start-up for free (cache built, workers started, queues drained before each period). The
          rival gets the images as encoded files: the archives of a data set, or PNG files in memory for synthetic ones.

train     Milliseconds of one training iteration of each script, everything included: sampling, losses, gradients, Adam.
            ours      as the script does it: on a CPU tasks in --workers threads; beside it with 1 worker and, where the
                      processor has it, in bf16
            floor     what tasks side by side cannot go below: the same convolutions alone, forward and backward (for MAML's
                      inner steps forward, backward and double backward), run the same way (tasks in threads), in the same
                      precision, in the faster of PyTorch's two memory layouts
            plain     the same algorithm as one would first write it: a loop over tasks, PyTorch's threads inside each
                      operation, PyTorch's own layout, all tasks' graphs kept until one backward at the end; our sampler
          Beside these: the sampler's share, peak memory (of a fresh process on a CPU), seconds to evaluate 1,000 tasks. With
          --busy another process spins beside all of them, as on a machine that is shared.

peers     Milliseconds of one training iteration without modulation (MAML, ProtoNet) beside libraries that do the same, where they
          are installed, each in its own way: higher for MAML's steps, easyfsl for ProtoNet. `pip install higher easyfsl torchvision`.

variants  Milliseconds of the gradients of one meta-batch, by the ways in which a script's `task_loss` can be called:
            loop      one task after another, backward after each: what the scripts do on a CPU
            vmap      all tasks together, each convolution a grouped one: what the scripts do on a GPU
            unfold    vmap, each convolution written as unfold and a batched matrix product
            compiled  vmap under torch.compile (on a CPU by name only: compiling takes many minutes, and does not count)
            captured  vmap, recorded once as a CUDA graph and replayed: no launch of a kernel waits for Python (GPU)

steps     Milliseconds and memory of adapting to one task by one inner step of each algorithm of modgrad.py, at test time, beside
          MAML's on all layers and MAML's on the same layers. (ModGrad's paper claims twice a MAML step.) The layers before the
          first adapted one are run once a task; this one time is counted.

gpu       One command for whoever has a GPU, without a data set: the card, the vmap path beside the loop and beside float64, then
          milliseconds of one training iteration (gradients and Adam; noise images made on the card) of the four scripts at
          the papers' shapes by the variants above, in TF32 (PyTorch's default for convolutions), bf16 and fp32. A row that
          fails says why. In the end: which variant should be each script's default.

reuse     Milliseconds of afr.py's methods beside MAML's, in training (the gradients of one meta-batch) and in testing (from a task's
          images to its query outputs, paper protocol, cross-entropy's head), and parameters beside MAML's. (The paper claims: 1.7
          and 2.3 times faster, 1.1 times the parameters; its abstract 1.5 times faster.) Tasks are drawn before.
"""
import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import afr
import data
import modgrad

BATCH = 10          # tasks assembled together by our sampler: the papers' meta-batch
VARIANTS = ("loop", "vmap", "unfold", "compiled", "captured")
ADAPTATIONS = [["--algorithm", "maml"], ["--algorithm", "maml", "--adapt", "conv3", "conv4"],
               *(["--algorithm", algorithm] for algorithm in ("modgrad", "metasgd", "cavia", "tnet"))]
REUSE = [["--algorithm", "maml"], *(["--modulation", modulation] for modulation in ("none", "am", "pam"))]
SCRIPTS = {"mmaml": "film", "kml": "kml", "mprotonet": "kml"}           # and the modulation measured


class DecodingLoader(torch.utils.data.IterableDataset):
    """Endless tasks, every image decoded and resized again for every task. Runs inside worker processes."""

    def __init__(self, sources, args, shots):
        self.sources, self.args, self.shots = sources, args, shots      # per mode (name, list of classes of (archive, key))

    def __iter__(self):
        args, worker = self.args, torch.utils.data.get_worker_info()
        rng = np.random.default_rng(worker.id if worker else 0)
        # An open archive must not be shared between processes: each worker opens its own.
        modes = [(mode, classes() if callable(classes) else classes) for mode, classes in self.sources]
        while True:
            mode, classes = modes[rng.integers(len(modes))]
            images = []
            for c in rng.choice(len(classes), args.ways, replace=False):
                turn = rng.integers(4) if mode == "omniglot" else 0
                for i in rng.choice(len(classes[c]), self.shots + args.queries, replace=False):
                    source, key = classes[c][i]
                    pixels = np.rot90(data.decode(source.read(key), args.image_size, mode), turn)
                    images.append(np.broadcast_to(pixels, (args.image_size, args.image_size, 3)).transpose(2, 0, 1))
            x = torch.from_numpy(np.stack(images).astype(np.float32) / 255)
            x = x.view(args.ways, -1, 3, args.image_size, args.image_size)
            yield x[:, :self.shots].flatten(0, 1), x[:, self.shots:].flatten(0, 1)


class Encoded:
    """Images as PNG files in memory, with the interface of an archive."""

    def __init__(self, images):
        self.files = []
        for pixels in images:
            file = io.BytesIO()
            Image.fromarray(pixels.squeeze()).save(file, "PNG")
            self.files.append(file.getvalue())

    def read(self, key):
        return self.files[key]


class Archives:
    """Opens the archives of a mode when called: in the worker process that will read them."""

    def __init__(self, mode, root):
        self.mode, self.root = mode, root

    def __call__(self):
        importer, paths = data.find_source(self.mode, self.root)
        return list(importer(paths)["train"].values())


def rival_sources(args):
    sources = []
    for mode in args.modes:
        if args.synthetic:
            images, names = data.draw_synthetic(mode, "train", args.image_size)
            images = 255 - images if mode == "omniglot" else images         # as scanned: `decode` inverts Omniglot
            encoded, per_class = Encoded(images), len(images) // len(names)
            classes = [[(encoded, c * per_class + i) for i in range(per_class)] for c in range(len(names))]
            sources.append((mode, classes))
        elif data.find_source(mode, args.data_root):
            sources.append((mode, Archives(mode, args.data_root)))
        else:
            data.fail(f"{mode} is not under {args.data_root}: the rival needs its image files; or add --synthetic")
    return sources


def rate(draw, seconds):
    """Tasks a second of draw() -> number of tasks, called over and over for so many seconds."""
    tasks, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        tasks += draw()
    return tasks / elapsed


def bench_loader(args, shots):
    """-> {"sampler": [tasks/s of each round], "decoding loader": [...]}, rounds in alternation."""
    device = torch.device(args.device)
    episodes = data.Episodes(args.modes, "train", args.ways, shots, args.queries, args.image_size, 0, device,
                             args.data_root, args.cache_dir, args.synthetic)
    loader = torch.utils.data.DataLoader(DecodingLoader(rival_sources(args), args, shots), batch_size=None,
                                         num_workers=args.workers, prefetch_factor=2)
    tasks, first = iter(loader), 0

    def ours():
        nonlocal first
        episodes.tasks(first, BATCH)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first += BATCH
        return BATCH

    def theirs():
        for x in next(tasks):
            x.to(device)
        return 1

    samples = {"sampler": [], "decoding loader": []}
    for _ in range(2 * args.workers):
        theirs()
    ours()
    for _ in range(args.rounds):
        time.sleep(min(1.0, args.seconds))              # the workers fill their queues and fall silent
        samples["sampler"].append(rate(ours, args.seconds))
        for _ in range(2 * args.workers):               # the queue that was filled for free does not count
            theirs()
        samples["decoding loader"].append(rate(theirs, args.seconds))
    return samples


# ------------------------------------------------------------------------------------------------------------ train
def script_args(name, args, shots):
    """A script as a module, and its arguments for the shapes that are measured."""
    module = importlib.import_module(name)
    words = ["--modulation", SCRIPTS[name], "--modes", *args.modes, "--ways", args.ways, "--shots", shots, "--queries",
             args.queries, "--image-size", args.image_size, "--meta-batch", args.meta_batch, "--data-root", args.data_root,
             "--cache-dir", args.cache_dir, "--device", args.device, "--precision", args.precision, "--workers", args.workers, "--out", "-"]
    return module, module.get_args([str(word) for word in words] + ["--synthetic"] * args.synthetic)


def prepare_step(name, args, shots):
    """-> step(): one iteration as the script does it; sample(): its tasks alone; and what they are made of."""
    module, options = script_args(name, args, shots)
    params = {k: w.to(options.device).requires_grad_() for k, w in module.init_params(options).items()}
    optimizer = torch.optim.Adam(params.values(), lr=options.lr, fused=True)
    episodes, first = data.Episodes.of(options, "train"), [0]

    def sample():
        first[0] += options.meta_batch
        return episodes.tasks(first[0], options.meta_batch)

    def step():
        optimizer.zero_grad()
        module.run_tasks(params, sample(), options, options.device != "cpu")
        optimizer.step()
    return step, sample, module, options, params


def convolutions(module, options, params):
    """The convolutions of one task as the network meets them -> [(how often, images, inner step?), ...]."""
    support, query = options.ways * options.shots, options.ways * options.queries
    inner = [(options.inner_steps, support, True)] if hasattr(options, "inner_steps") else [(1, support, False)]
    return [*inner, (1, query, False), (1, support, False)]           # the last is the task encoder's


def prepare_floor(module, options, params, layout):
    """-> run(): the convolutions of one iteration, forward and backward, and nothing else."""
    kernels = [params[f"conv{l}.weight"].detach().to(memory_format=layout).requires_grad_() for l in module.LAYERS]
    biases = [params[f"conv{l}.bias"].detach().requires_grad_() for l in module.LAYERS]
    bf16, layers = options.precision == "bf16", []
    for times, images, inner in convolutions(module, options, params):
        x = torch.rand(images, 3, options.image_size, options.image_size, device=options.device)
        x = x.to(torch.bfloat16 if bf16 else x.dtype, memory_format=layout)
        for l, (W, b) in enumerate(zip(kernels, biases)):
            x = x.detach().requires_grad_(l > 0)
            with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=bf16):
                y = F.conv2d(x, W, b, stride=2, padding=1)
            layers.append((times, inner, x, W, b, torch.rand_like(y).requires_grad_(inner)))
            x = y

    def task(_):
        for times, inner, x, W, b, gradient in layers:
            for _ in range(times):
                with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=bf16):
                    y = F.conv2d(x, W, b, stride=2, padding=1)
                leaves = [t for t in (x, W, b) if t.requires_grad]
                if not inner:
                    torch.autograd.grad(y, leaves, gradient)
                    continue
                first = torch.autograd.grad(y, leaves, gradient, create_graph=True)
                torch.autograd.grad((y, *first), (*leaves, gradient), (gradient.detach(), *(t.detach() for t in first)))

    def run():
        tasks = range(options.meta_batch)
        for _ in data.in_threads(task, tasks, options.workers) if options.device == "cpu" else map(task, tasks):
            pass
    return run


def plain_network(x, w, prefix=""):
    for l in (1, 2, 3, 4):
        x = F.conv2d(x, w[f"{prefix}conv{l}.weight"], w[f"{prefix}conv{l}.bias"], stride=2, padding=1)
        x = F.batch_norm(x, None, None, w[f"{prefix}norm{l}.scale"], w[f"{prefix}norm{l}.shift"], training=True)
        if f"{prefix}film{l}.scale" in w:
            x = x * (1 + w[f"film{l}.scale"][:, None, None]) + w[f"film{l}.shift"][:, None, None]
        x = F.relu(x)
    return x


def plain_loss(module, options, params, support_x, support_y, query_x, query_y):
    """The scripts' task_loss as one would first write it, on PyTorch's own functions. For one task."""
    v = plain_network(support_x, params, "encoder.").mean((2, 3))
    v = F.relu(F.linear(v, params["encoder.linear.weight"], params["encoder.linear.bias"])).mean(0)
    theta, omega = module.group(params, "base"), module.modulation(params, v)
    if not hasattr(options, "inner_steps"):
        fast = module.modulate(theta, omega)
        support, query = (plain_network(x, fast).flatten(1) for x in (support_x, query_x))
        prototypes = torch.stack([support[support_y == n].mean(0) for n in range(options.ways)])
        return F.cross_entropy(-torch.cdist(query, prototypes).square(), query_y)

    def classify(theta, x):
        fast = module.modulate(theta, omega)
        return F.linear(plain_network(x, fast).mean((2, 3)), fast["head.weight"], fast["head.bias"])
    for _ in range(options.inner_steps):
        loss = F.cross_entropy(classify(theta, support_x), support_y)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        steps = [options.inner_lr * g.clamp(-options.inner_clip, options.inner_clip) for g in gradients]
        theta = {k: w - step for (k, w), step in zip(theta.items(), steps)}
    return F.cross_entropy(classify(theta, query_x), query_y)


def prepare_plain(module, options, draw):
    """-> step(): one iteration of the plain implementation; draw() -> the next task's support and query images."""
    params = {k: w.to(options.device).contiguous().requires_grad_() for k, w in module.init_params(options).items()}
    optimizer = torch.optim.Adam(params.values(), lr=options.lr)
    support_y, query_y = (torch.arange(options.ways).repeat_interleave(n).to(options.device)
                          for n in (options.shots, options.queries))

    def step():
        optimizer.zero_grad()
        total = 0
        for _ in range(options.meta_batch):
            support_x, query_x = (x.to(options.device) for x in draw())
            with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"):
                total = total + plain_loss(module, options, params, support_x, support_y, query_x, query_y)
        (total / options.meta_batch).backward()
        optimizer.step()
    return step


def peak_memory(prepare, name, args, shots):
    """Most memory that the step of prepare(name, args, shots) needs, in MiB: what is allocated on a GPU; on a CPU, where this
    must be called in a process of its own, how much its resident memory has grown beyond that before the step."""
    step = prepare(name, args, shots)[0]
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2 ** 20
    before = resident_peak()
    step()
    return resident_peak() - before


def resident_peak():
    """Of this process, in MiB. (getrusage's figure survives exec on Linux: a child would report its parent's.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20         # macOS: bytes


def clock(function, device, times=1):
    """Milliseconds of one call."""
    def now():
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()
    start = now()
    for _ in range(times):
        function()
    return 1000 * (now() - start) / times


def with_threads(number, function):
    """function, run with so many PyTorch threads inside each operation."""
    def run():
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            function()
        finally:
            torch.set_num_threads(before)
    return run


def spin():
    """Keep one core busy for ever."""
    while True:
        pass


@contextlib.contextmanager
def neighbour(busy):
    """Another process that spins meanwhile, if `busy`."""
    if not busy:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()


def has_bf16(device):
    """Whether bf16 is faster than float32 there by design: a GPU, or a processor with instructions for it."""
    if device != "cpu":
        return True
    file = Path("/proc/cpuinfo")
    return file.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", file.read_text()))


def in_rounds(runs, args):
    """{what: function}, called in alternation -> {what: [milliseconds of each round]}; a first round warms up."""
    samples = {what: [] for what in runs}
    with neighbour(args.busy):
        for number in range(args.rounds + 1):
            for what, function in runs.items():
                took = clock(function, args.device, args.repeat)
                if number:
                    samples[what].append(took)
    return samples


def bench_train(name, args, shots):
    """One script at one shape -> {what: [milliseconds of each round]} in alternation, and memory and evaluation beside."""
    step, sample, module, options, params = prepare_step(name, args, shots)
    single = prepare_step(name, argparse.Namespace(**vars(args) | {"workers": 1}), shots)[0]
    queue = []

    def ready():                                        # tasks of our sampler, one after another
        if not queue:
            batch = sample()
            queue.extend(zip(batch.support_x, batch.query_x))
        return queue.pop()
    runs = {"ours": with_threads(1, step), "sampler": with_threads(1, sample),
            "floor": prepare_floor(module, options, params, torch.channels_last),
            "floor, PyTorch's own layout": prepare_floor(module, options, params, torch.contiguous_format),
            "plain": with_threads(data.cores(), prepare_plain(module, options, ready))}
    if args.device == "cpu":
        runs["ours, 1 worker"] = with_threads(1, single)
    if has_bf16(args.device) and args.precision == "fp32":
        half = prepare_step(name, argparse.Namespace(**vars(args) | {"precision": "bf16"}), shots)[0]
        runs["ours, bf16"] = with_threads(1, half)
    samples = in_rounds(runs, args)
    count = min(options.test_tasks, 20 * args.repeat)
    test = data.Episodes.of(options, "test")
    evaluation = with_threads(1, lambda: module.evaluate(params, test, count, options))
    with neighbour(args.busy):
        samples["evaluation of 1,000 tasks"] = [clock(evaluation, args.device) * 1000 / count for _ in range(args.rounds)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory = pool.apply(peak_memory, (prepare_step, name, args, shots))
    return {"script": name, "modulation": SCRIPTS[name], "shots": shots, "samples": samples, "peak_MiB": round(memory, 1)}


# ------------------------------------------------------------------------------------------------------------ peers
class PlainNetwork(torch.nn.Module):
    """The scripts' base network as a module: what a user of a library would hand to it. (n, 3, S, S) -> logits, or features."""

    def __init__(self, params):
        super().__init__()
        widths = [params[f"conv{l}.weight"].shape[:2] for l in (1, 2, 3, 4)]
        layers = []
        for c_out, c_in in widths:
            norm = torch.nn.BatchNorm2d(c_out, track_running_stats=False)
            layers += [torch.nn.Conv2d(c_in, c_out, 3, 2, 1), norm, torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(widths[-1][0], len(params["head.bias"])) if "head.bias" in params else None

    def forward(self, x):
        x = self.layers(x)
        return x.flatten(1) if self.head is None else self.head(x.mean((2, 3)))


def prepare_higher(module, options, params, sample):
    """-> step(): MAML by higher's innerloop_ctx, task after task."""
    import higher
    network = PlainNetwork(params)
    outer, inner = torch.optim.Adam(network.parameters(), lr=options.lr), torch.optim.SGD(network.parameters(), lr=options.inner_lr)

    def step():
        outer.zero_grad()
        batch = sample()
        for i in range(options.meta_batch):
            with higher.innerloop_ctx(network, inner, copy_initial_weights=False) as (adapted, steps):
                for _ in range(options.inner_steps):
                    steps.step(F.cross_entropy(adapted(batch.support_x[i]), batch.support_y[i]))
                (F.cross_entropy(adapted(batch.query_x[i]), batch.query_y[i]) / options.meta_batch).backward()
        outer.step()
    return step


def prepare_easyfsl(module, options, params, sample):
    """-> step(): ProtoNet by easyfsl's PrototypicalNetworks, task after task."""
    from easyfsl.methods import PrototypicalNetworks
    network = PrototypicalNetworks(PlainNetwork(params))
    optimizer = torch.optim.Adam(network.parameters(), lr=options.lr)

    def step():
        optimizer.zero_grad()
        batch = sample()
        for i in range(options.meta_batch):
            network.process_support_set(batch.support_x[i], batch.support_y[i])
            (F.cross_entropy(network(batch.query_x[i]), batch.query_y[i]) / options.meta_batch).backward()
        optimizer.step()
    return step


PEERS = {"mmaml": ("higher", prepare_higher), "mprotonet": ("easyfsl", prepare_easyfsl)}


def bench_peers(args, shots):
    """-> a row for each of PEERS: {"script", "peer", "shots", "samples"}, or, where the library does not run, "failed": why."""
    rows = []
    for name, (peer, prepare) in PEERS.items():
        with mock.patch.dict(SCRIPTS, {name: "none"}):
            step, sample, module, options, params = prepare_step(name, args, shots)
        row = {"script": name, "peer": peer, "shots": shots}
        try:
            theirs = prepare(module, options, params, sample)
        except (ImportError, RuntimeError) as error:    # not there, or not for this PyTorch
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
        if "failed" in row:
            lines.append(f"| {row['script']}.py --modulation none | {row['shots']} | - | {row['peer']} | {row['failed']} | - |")
            continue
        ours, theirs = row["samples"]["ours"], row["samples"][row["peer"]]
        ratio = statistics.median(theirs) / statistics.median(ours)
        lines.append(f"| {row['script']}.py --modulation none{', busy' if args.busy else ''} | {row['shots']} | {spread(ours)} | {row['peer']} | "
                     f"{spread(theirs)} | {ratio:.2f} |")
    return "\n".join(lines)


def spread(samples):
    """The median, and in brackets the smallest and the largest."""
    return f"{statistics.median(samples):.4g} ({min(samples):.4g} to {max(samples):.4g})"


# --------------------------------------------------------------------------------------------------------- variants
def unfold_conv2d(x, W, b, stride, padding):
    """F.conv2d with the patches of the images as columns: images (n, C_in, H, W) -> (n, C_out, H', W')."""
    height, width = ((s + 2 * padding - W.shape[-1]) // stride + 1 for s in x.shape[-2:])
    columns = F.unfold(x, W.shape[-1], padding=padding, stride=stride)              # (n, C_in * 9, H' * W')
    return (W.flatten(1) @ columns + b[:, None]).unflatten(-1, (height, width))


def prepare_variant(variant, module, options, params, batch, **compiler):
    """-> gradients(batch): adds those of the tasks' mean loss to .grad. `batch` is an example; `compiler`: for torch.compile."""
    def unfolded(batch):
        with mock.patch.object(F, "conv2d", unfold_conv2d):
            module.run_tasks(params, batch, options, True)

    def together(params, batch):
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"):
            return torch.func.vmap(lambda task: module.task_loss(params, task, options)[0])(batch).mean()
    if variant == "compiled":
        compiled = torch.compile(together, **compiler)
        return lambda batch: compiled(params, batch).backward()
    if variant == "captured":
        return data.recorded(lambda batch: module.run_tasks(params, batch, options, True), params)
    return {"loop": lambda batch: module.run_tasks(params, batch, options, False), "unfold": unfolded,
            "vmap": lambda batch: module.run_tasks(params, batch, options, True)}[variant]


def bench_variants(name, args, shots):
    """One script at one shape -> {variant: [milliseconds of each round]}, in alternation."""
    _, sample, module, options, params = prepare_step(name, args, shots)
    samples, example = {variant: [] for variant in args.variants}, sample()
    calls = {variant: prepare_variant(variant, module, options, params, example) for variant in args.variants}
    for number in range(args.rounds + 1):
        for variant, gradients in calls.items():
            batch = sample()
            took = clock(lambda gradients=gradients, batch=batch: gradients(batch), args.device)
            if number:                                  # round 0 warms up, and compiles
                samples[variant].append(took)
            for w in params.values():
                w.grad = None
    return {"script": name, "modulation": SCRIPTS[name], "shots": shots, "samples": samples}


def profile(name, args, shots):
    step = prepare_step(name, args, shots)[0]
    for _ in range(3):
        step()
    with torch.profiler.profile() as record:
        step()
    by = "self_cpu_time_total" if args.device == "cpu" else "self_device_time_total"
    print(f"\n{name} --modulation {SCRIPTS[name]}, {shots}-shot\n"
          + record.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40))


# -------------------------------------------------------------------------------------------------------------- gpu
GPU_SCRIPTS = {"kml": ["--modulation", "kml"], "mmaml": ["--modulation", "film"], "mprotonet": ["--modulation", "kml"],
               "modgrad": []}                           # at the papers' meta-batches, which are the scripts' defaults
GPU_PRECISIONS = ("tf32", "bf16", "fp32")               # tf32: PyTorch's default for convolutions
GPU_VARIANTS = ("vmap", "captured", "loop", "unfold", "compiled")
ROW_LIMIT = 45                                          # seconds for one row; compiling gets no more either


def gpu_options(name, shots, precision, args, *words):
    """A script as a module, and its arguments at the papers' shape (or, with --smoke, at a tiny one)."""
    module = importlib.import_module(name)
    tiny = ["--image-size", 32, "--channels", 4, "--queries", 2, "--meta-batch", 2] if args.smoke else []
    script_precision = "bf16" if precision == "bf16" else "fp32"
    given = [*GPU_SCRIPTS[name], *tiny, "--shots", shots, "--precision", script_precision, "--device", args.device, "--synthetic",
             "--out", "-", *words]
    return module, module.get_args([str(word) for word in given])


def random_batch(options, seed, dtype=torch.float32):
    """A meta-batch of noise images, made on the device -> Task."""
    rng = torch.Generator(options.device).manual_seed(seed)
    T, N, S = options.meta_batch, options.ways, options.image_size
    images, labels = {}, {}
    for part, each in (("support", options.shots), ("query", options.queries)):
        images[part] = torch.rand(T, N * each, 3, S, S, generator=rng, device=options.device).to(dtype)
        labels[part] = torch.arange(N, device=options.device).repeat_interleave(each).expand(T, -1)
    return data.Task(images["support"], labels["support"], images["query"], labels["query"], torch.zeros(T, dtype=torch.int64))


def set_precision(precision):
    """TF32 for convolutions, or not. (Autocast, which `run_tasks` switches on for bf16, does not mind.)"""
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False


def gpu_step(variant, module, options):
    """-> step(): one training iteration of a script by one of GPU_VARIANTS, without the sampler."""
    params = {k: w.to(options.device).requires_grad_() for k, w in module.init_params(options).items()}
    optimizer = torch.optim.Adam(params.values(), lr=options.lr, fused=True)
    batches, count = [random_batch(options, seed) for seed in (0, 1)], 0
    gradients = prepare_variant(variant, module, options, params, batches[0])

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
            clock(step, args.device)                    # warms up, and compiles
        row["warm_up_seconds"] = round(time.perf_counter() - begun, 2)
        samples = []
        while len(samples) < rounds and (not samples or time.perf_counter() - begun < ROW_LIMIT):
            samples.append(round(clock(step, args.device), 3))
        row |= {"meta_batch": options.meta_batch, "samples": samples}
        if args.device != "cpu":
            row["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2 ** 20)
    except Exception as error:  # noqa: BLE001 (whatever fails is a row, not an end)
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        torch._dynamo.reset()
        if args.device != "cpu":
            torch.cuda.empty_cache()
    return row


def row_in_a_process(name, shots, precision, variant, args):
    """gpu_row in a process of its own, which is killed when it takes too long: compiling may."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=put_row, args=(queue, name, shots, precision, variant, args), daemon=True)
    process.start()
    try:
        return queue.get(timeout=ROW_LIMIT + 15)
    except Exception:  # noqa: BLE001 (an empty queue)
        return {"script": name, "shots": shots, "precision": precision, "variant": variant, "failed": f"over {ROW_LIMIT + 15} s"}
    finally:
        process.kill()
        process.join()


def put_row(queue, *given):
    queue.put(gpu_row(*given))


def equivalence(name, args):
    """The vmap path beside the loop over tasks, in float32 without TF32 and in float64 -> a row of relative differences.

    Each is the norm of a difference over the norm: of all losses, and of all gradients. All are differences from float64's
    loop. `vmap64` shows whether the two paths compute the same; in float32, on noise images, ReLUs that switch make gradients
    differ by a few percent.
    """
    set_precision("fp32")
    found = {}
    for what, dtype, together in (("loop64", torch.float64, False), ("vmap64", torch.float64, True), ("loop", torch.float32, False),
                                  ("vmap", torch.float32, True), ("captured", torch.float32, True)):
        if what == "captured" and args.device == "cpu":
            continue
        module, options = gpu_options(name, 1, "fp32", args, "--meta-batch", 2, "--workers", 1)
        params = {k: w.to(options.device, dtype).requires_grad_() for k, w in module.init_params(options).items()}

        def run(batch, module=module, params=params, options=options, together=together):
            return module.run_tasks(params, batch, options, together)
        if what == "captured":
            run = data.recorded(run, params)
        losses, _ = run(random_batch(options, 0, dtype))
        found[what] = losses.double(), torch.cat([w.grad.double().flatten() for w in params.values()])
    wanted = found.pop("loop64")
    row = {"script": name}
    for what, pair in found.items():
        row[what] = [((x - y).norm() / y.norm()).item() for x, y in zip(pair, wanted)]
    row["same"] = max(row["vmap64"]) < 1e-9 and all(row[what][0] < 1e-3 and row[what][1] < 0.1 for what in found)
    return row


def gpu_plan(args):
    """The rows in order of importance: what the scripts do today and the captured graph first, what may fail last."""
    for shots in (5, 1):
        for precision in GPU_PRECISIONS:
            for name in GPU_SCRIPTS:
                for variant in ("vmap", "captured"):
                    yield name, shots, precision, variant
    for variant in ("loop", "unfold", "compiled"):
        for name in GPU_SCRIPTS:
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
    card = {"torch": torch.__version__, "python": platform.python_version(), "cores": data.cores(), "smoke": args.smoke}
    if args.device == "cpu":
        return card | {"card": platform.machine()}
    card |= {"card": torch.cuda.get_device_name(args.device), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return card | {"memory_GiB": round(torch.cuda.get_device_properties(args.device).total_memory / 2 ** 30, 1)}


def gpu_table(record):
    """What bench_gpu found -> Markdown: median milliseconds of one training iteration, a row per script and shots."""
    columns = sorted({(row["variant"], row["precision"]) for row in record["rows"]},
                     key=lambda c: (GPU_VARIANTS.index(c[0]), GPU_PRECISIONS.index(c[1])))
    cells = {}
    for row in record["rows"]:
        shown = f"{statistics.median(row['samples']):.1f}" if "samples" in row else row["failed"].split(":")[0]
        cells[row["script"], row["shots"], row["variant"], row["precision"]] = shown
    lines = [f"| script | shots | {' | '.join(' '.join(c) for c in columns)} |", "|" + " --- |" * (2 + len(columns))]
    for name, shots in dict.fromkeys((row["script"], row["shots"]) for row in record["rows"]):
        found = [cells.get((name, shots, *c), "-") for c in columns]
        lines.append(f"| {name}.py | {shots} | {' | '.join(found)} |")
    return "\n".join(lines)


def gpu_verdict(record):
    """Which variant each script should use by default: the fastest in PyTorch's default precision -> lines of text."""
    lines = []
    for name in GPU_SCRIPTS:
        found = {}
        for row in record["rows"]:
            if row["script"] == name and row["shots"] == 5 and row["precision"] == "tf32" and "samples" in row:
                found[row["variant"]] = statistics.median(row["samples"])
        if "vmap" not in found:
            lines.append(f"{name}.py: vmap was not measured")
            continue
        best = min(found, key=found.get)
        ratio = found["vmap"] / found[best]
        lines.append(f"{name}.py: {best} is the fastest, {ratio:.2f} times as fast as vmap (the scripts' default: captured)")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ steps
def prepare_adaptation(words, args, shots):
    """-> step(): one inner step for one task, by the algorithm that `words` name; and its arguments."""
    options = modgrad.get_args([str(word) for word in (
        *words, "--steps", 1, "--modes", *args.modes, "--ways", args.ways, "--shots", shots, "--queries", args.queries, "--image-size",
        args.image_size, "--data-root", args.data_root, "--cache-dir", args.cache_dir, "--device", args.device, "--out", "-",
        *["--synthetic"] * args.synthetic)])
    params = {k: w.to(options.device) for k, w in modgrad.init_params(options).items()}
    task = data.Task(*(x[0] for x in data.Episodes.of(options, "test").tasks(0, 1)))
    inner_step, run_blocks, seen = modgrad.STEPS[options.algorithm], modgrad.run_blocks, []

    def note(*given):                                   # the first call is for the layers before the first adapted one
        seen.append(given)
        return run_blocks(*given)

    def stop(*given):                                   # what task_loss gives to a step; then no further, for the memory's sake
        seen.append(given)
        raise StopIteration
    with (mock.patch.dict(modgrad.STEPS, {options.algorithm: stop}), mock.patch.object(modgrad, "run_blocks", note),
          contextlib.suppress(StopIteration), torch.no_grad()):
        modgrad.task_loss(params, task, options)
    before, given = seen

    @torch.no_grad()
    def step():
        run_blocks(*before)
        inner_step(*given)
    return step, options


def bench_steps(args, shots):
    """-> a row for each of ADAPTATIONS: {"algorithm", "adapts", "samples": milliseconds of each round, "peak_MiB"}."""
    found = []
    for words in ADAPTATIONS:
        step, options = prepare_adaptation(words, args, shots)
        found.append((step, {"algorithm": options.method, "adapts": " ".join(options.adapt) or "its context", "shots": shots, "samples": []}))
    for number in range(args.rounds + 1):
        for step, row in found:
            took = clock(step, args.device, args.repeat)
            if number:
                row["samples"].append(took)
    for words, (_, row) in zip(ADAPTATIONS, found):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row["peak_MiB"] = round(pool.apply(peak_memory, (prepare_adaptation, words, args, shots)), 1)
    return [row for _, row in found]


def steps_table(rows, args):
    """What bench_steps found -> Markdown."""
    lines = ["| inner step | adapts | shots | ms | beside MAML | beside MAML on the same layers | peak MiB |", "|" + " --- |" * 7]
    middle = {(row["shots"], row["algorithm"]): statistics.median(row["samples"]) for row in rows}
    for row in rows:
        same = middle.get((row["shots"], f"MAML on {row['adapts'].replace(' ', '+')}"))
        ms, low, high = middle[row["shots"], row["algorithm"]], min(row["samples"]), max(row["samples"])
        lines.append(f"| {row['algorithm']} | {row['adapts']} | {row['shots']} | {ms:.4g} ({low:.4g} to {high:.4g}) | "
                     f"{ms / middle[row['shots'], 'MAML']:.2f} | {f'{ms / same:.2f}' if same else '-'} | {row['peak_MiB']:.0f} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ reuse
def prepare_reuse(words, args, shots):
    """-> train(), the gradients of one meta-batch; test(), a task's query outputs; the arguments and the parameters."""
    options = afr.get_args([str(word) for word in (
        *words, "--modes", *args.modes, "--ways", args.ways, "--shots", shots, "--queries", args.queries, "--image-size", args.image_size,
        "--meta-batch", args.meta_batch, "--precision", args.precision, "--data-root", args.data_root, "--cache-dir", args.cache_dir,
        "--device", args.device, "--out", "-", *["--synthetic"] * args.synthetic)])
    params = {k: w.to(options.device).requires_grad_() for k, w in afr.init_params(options).items()}
    batches = data.MetaTasks(options, "train").tasks(0, args.meta_batch)
    task, kind, epsilon = data.Task(*(x[0] for x in batches[0])), "classification", afr.draws(0, options)

    def train():
        afr.run_tasks(params, batches, options, options.device != "cpu", epsilon=epsilon)

    @torch.no_grad()
    def test():
        w = None
        if options.modulation != "none":
            x = afr.embed(params, task.support_x, afr.Norm())
            w = afr.attention(params, kind, x, task.support_y, options)[0]
        adapted, _ = afr.adapt(params, task, options, kind, w)
        return afr.predict(adapted, kind, afr.embed(adapted, task.query_x, afr.Norm(), w), options)
    return train, test, options, params


def bench_reuse(args, shots):
    """-> a row for each of REUSE: {"method", "parameters", "train" and "test": milliseconds of each round}, in alternation."""
    found = []
    for words in REUSE:
        train, test, options, params = prepare_reuse(words, args, shots)
        count = sum(w.numel() for w in params.values())
        found.append((train, test, {"method": options.method, "shots": shots, "parameters": count, "train": [], "test": []}))
    for number in range(args.rounds + 1):
        for train, test, row in found:
            for what, function in (("train", train), ("test", test)):
                took = clock(function, args.device, args.repeat)
                if number:                              # round 0 warms up
                    row[what].append(took)
    return [row for *_, row in found]


def reuse_table(rows, args):
    """What bench_reuse found -> Markdown. `faster`: MAML's milliseconds by the method's."""
    lines = ["| method | shots | ms a training meta-batch | faster than MAML | ms a test task | faster than MAML | parameters | beside MAML |",
             "|" + " --- |" * 8]
    maml = {row["shots"]: row for row in rows if row["method"] == "MAML"}
    for row in rows:
        cells = [row["method"], row["shots"]]
        for what in ("train", "test"):
            ms = statistics.median(row[what])
            cells += [f"{ms:.4g} ({min(row[what]):.4g} to {max(row[what]):.4g})", f"{statistics.median(maml[row['shots']][what]) / ms:.2f}"]
        cells += [f"{row['parameters']:,}", f"{row['parameters'] / maml[row['shots']]['parameters']:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def variants_table(rows, args):
    """What bench_variants found -> Markdown: medians, and in brackets the smallest and largest."""
    lines = [f"| script | shots | {' | '.join(f'{variant}, ms' for variant in args.variants)} |", "|" + " --- |" * (2 + len(args.variants))]
    for row in rows:
        cells = [f"{statistics.median(x):.4g} ({min(x):.4g} to {max(x):.4g})" for x in row["samples"].values()]
        lines.append(f"| {row['script']}.py --modulation {row['modulation']} | {row['shots']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def train_table(rows, args):
    """What bench_train found -> Markdown."""
    head = ("script", "shots", "ours, ms an iteration", "1 worker / ours", "ours / bf16", "floor / ours", "plain / ours", "sampler",
            "peak MiB", "s for 1,000 test tasks")
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        middle = {what: statistics.median(values) for what, values in row["samples"].items()}
        floor = min(middle["floor"], middle["floor, PyTorch's own layout"])
        single = f"{middle['ours, 1 worker'] / middle['ours']:.2f}" if "ours, 1 worker" in middle else "-"
        half = f"{middle['ours'] / middle['ours, bf16']:.2f}" if "ours, bf16" in middle else "-"
        lines.append(f"| {row['script']}.py --modulation {row['modulation']}, {args.image_size} px{', busy' if args.busy else ''} | {row['shots']} | "
                     f"{spread(row['samples']['ours'])} | {single} | {half} | {floor / middle['ours']:.2f} | {middle['plain'] / middle['ours']:.2f} | "
                     f"{100 * middle['sampler'] / middle['ours']:.1f} % | {row['peak_MiB']:.0f} | {middle['evaluation of 1,000 tasks'] / 1000:.3g} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("part", choices=["loader", "train", "peers", "variants", "steps", "reuse", "gpu"])
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=SCRIPTS, help="of train and variants")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="of variants: which (on a CPU all but the last two)")
    parser.add_argument("--modes", nargs="+", default=["omniglot", "miniimagenet"], metavar="MODE")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[5])
    parser.add_argument("--queries", type=int, default=15)
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--meta-batch", type=int, default=BATCH)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--workers", type=int, default=data.cores(), help="tasks at a time; of loader: processes of the rival")
    parser.add_argument("--busy", action="store_true", help="train, peers: beside a process that keeps one core busy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="train: iterations in a round")
    parser.add_argument("--seconds", type=float, default=3, help="loader: length of one period")
    parser.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"))
    parser.add_argument("--cache-dir", default=".cache")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="train: a table of PyTorch's profiler instead")
    parser.add_argument("--budget", type=float, default=330, help="gpu: seconds after which no further row is begun")
    parser.add_argument("--smoke", action="store_true", help="gpu: tiny shapes, to try the command itself, on a CPU too")
    parser.add_argument("--json", help="write every sample and the versions to this file")
    parser.error = data.fail
    args = parser.parse_args()
    args.variants = args.variants or (VARIANTS[:3] if args.device == "cpu" else VARIANTS)
    if "captured" in args.variants and args.device == "cpu":
        data.fail("--variants captured: a CUDA graph needs --device cuda:0; leave it out")
    if args.part == "steps" and args.precision != "fp32":
        data.fail("steps is measured in fp32: leave --precision out")
    args.modes = [data.canonical_mode(mode, args.data_root) for mode in args.modes]
    if args.part == "gpu":
        if args.device == "cpu" and not args.smoke:
            data.fail("gpu: there is no GPU here; --smoke tries the command itself on a CPU")
        args.json = args.json or "bench-gpu.json"
        record = bench_gpu(args)
        print(f"\n{gpu_table(record)}\n\n{gpu_verdict(record)}\n\nwritten: {args.json}")
        return
    setting = f"{'SYNTHETIC ' * args.synthetic}{'+'.join(args.modes)}, {args.ways}-way, {args.queries} queries, {args.image_size} px"
    record = {}
    if args.part == "train" and args.profile:
        for name in args.scripts:
            for shots in args.shots:
                profile(name, args, shots)
        return
    if args.part == "train":
        record["train"] = [bench_train(name, args, shots) for name in args.scripts for shots in args.shots]
    if args.part == "peers":
        record["peers"] = [row for shots in args.shots for row in bench_peers(args, shots)]
    if args.part == "variants":
        record["variants"] = [bench_variants(name, args, shots) for name in args.scripts for shots in args.shots]
    if args.part == "steps":
        record["steps"] = [row for shots in args.shots for row in bench_steps(args, shots)]
    if args.part == "reuse":
        record["reuse"] = [row for shots in args.shots for row in bench_reuse(args, shots)]
    for part, table in (("train", train_table), ("peers", peers_table), ("variants", variants_table), ("steps", steps_table), ("reuse", reuse_table)):
        if part in record:
            batch = f"{args.meta_batch} tasks an iteration, " * (part != "steps")
            print(f"{part}: {setting}, {batch}{args.precision}, on {args.device} with "
                  f"{torch.get_num_threads()} threads, {args.rounds} alternating rounds: medians\n\n{table(record[part], args)}")
    for shots in args.shots if args.part == "loader" else ():
        samples = record[f"loader, {shots}-shot"] = bench_loader(args, shots)
        medians = {name: statistics.median(values) for name, values in samples.items()}
        print(f"loader: {setting}, {shots}-shot, on {args.device}, {args.workers} workers for the rival")
        for name, values in samples.items():
            print(f"  {name:18}{medians[name]:10.1f} tasks/s   (rounds {min(values):.1f} to {max(values):.1f})")
        print(f"  {'ratio':18}{medians['sampler'] / medians['decoding loader']:10.1f}")
    if args.json:
        device = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "pillow": Image.__version__,
                    "machine": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        kept = {k: v for k, v in vars(args).items() if k not in ("data_root", "cache_dir", "json")}
        data.atomic_write(Path(args.json), json.dumps(record | {"args": kept, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
