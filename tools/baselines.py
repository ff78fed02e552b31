"""What bench.py measures ours against, and how one training step of each is prepared."""

import contextlib
import importlib
import io
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import afr
import data
import modgrad
from fewshot.cache import find_source
from fewshot.decode import decode
from fewshot.synthetic import draw_synthetic

SCRIPTS = {"mmaml": "film", "kml": "kml", "mprotonet": "kml"}  # and the modulation measured
VARIANTS = ("loop", "vmap", "unfold", "compiled", "captured")


class DecodingLoader(torch.utils.data.IterableDataset):
    """Endless tasks, every image decoded and resized again for every task. Runs inside worker processes."""

    def __init__(self, sources, args, shots):
        self.sources = (
            sources  # per mode (name, classes: lists of (archive, key), or a function that gives them)
        )
        self.args, self.shots = args, shots

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
                    pixels = np.rot90(decode(source.read(key), args.image_size, mode).pixels, turn)
                    images.append(
                        np.broadcast_to(pixels, (args.image_size, args.image_size, 3)).transpose(2, 0, 1)
                    )
            x = torch.from_numpy(np.stack(images).astype(np.float32) / 255)
            x = x.view(args.ways, -1, 3, args.image_size, args.image_size)
            yield x[:, : self.shots].flatten(0, 1), x[:, self.shots :].flatten(0, 1)


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
        importer, paths = find_source(self.mode, self.root)
        return list(importer(paths)["train"].values())


def baseline_sources(args):
    sources = []
    for mode in args.modes:
        if args.synthetic:
            images, names = draw_synthetic(mode, "train", args.image_size)
            images = 255 - images if mode == "omniglot" else images  # as scanned: `decode` inverts Omniglot
            encoded, per_class = Encoded(images), len(images) // len(names)
            classes = [[(encoded, c * per_class + i) for i in range(per_class)] for c in range(len(names))]
            sources.append((mode, classes))
        elif find_source(mode, args.data_root):
            sources.append((mode, Archives(mode, args.data_root)))
        else:
            data.fail(
                f"{mode} is not under {args.data_root}: the baseline needs its image files; or add --synthetic"
            )
    return sources


def passed_on(args, shots, *more):
    """Flags of the benchmark that a script gets too, `more` among them -> words of its command line. It writes no run."""
    words = ["--out", "-", "--shots", shots]
    for key in ("modes", "ways", "queries", "image_size", "data_root", "cache_dir", "device", *more):
        value = getattr(args, key)
        words.append(f"--{key.replace('_', '-')}")
        words += value if key == "modes" else [value]
    if args.synthetic:
        words.append("--synthetic")
    return [str(word) for word in words]


def script_args(name, args, shots):
    """A script as a module, and its arguments for the shapes that are measured."""
    module = importlib.import_module(name)
    words = passed_on(args, shots, "meta_batch", "precision", "workers")
    return module, module.get_args(["--modulation", SCRIPTS[name], *words])


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
    inner = (
        [(options.inner_steps, support, True)] if hasattr(options, "inner_steps") else [(1, support, False)]
    )
    return [*inner, (1, query, False), (1, support, False)]  # the last is the task encoder's


def prepare_floor(module, options, params, layout):
    """-> run(): the convolutions of one iteration, forward and backward, and nothing else."""
    kernels = [
        params[f"conv{l}.weight"].detach().to(memory_format=layout).requires_grad_() for l in module.LAYERS
    ]
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
                torch.autograd.grad(
                    (y, *first), (*leaves, gradient), (gradient.detach(), *(t.detach() for t in first))
                )

    def run():
        tasks = range(options.meta_batch)
        for _ in (
            data.in_threads(task, tasks, options.workers) if options.device == "cpu" else map(task, tasks)
        ):
            pass

    return run


def plain_network(x, w, prefix=""):
    for l in (1, 2, 3, 4):
        x = F.conv2d(x, w[f"{prefix}conv{l}.weight"], w[f"{prefix}conv{l}.bias"], stride=2, padding=1)
        x = F.batch_norm(
            x, None, None, w[f"{prefix}norm{l}.scale"], w[f"{prefix}norm{l}.shift"], training=True
        )
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
    params = {
        k: w.to(options.device).contiguous().requires_grad_() for k, w in module.init_params(options).items()
    }
    optimizer = torch.optim.Adam(params.values(), lr=options.lr)
    support_y, query_y = (
        torch.arange(options.ways).repeat_interleave(n).to(options.device)
        for n in (options.shots, options.queries)
    )

    def step():
        optimizer.zero_grad()
        total = 0
        for _ in range(options.meta_batch):
            support_x, query_x = (x.to(options.device) for x in draw())
            with torch.autocast(
                options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"
            ):
                total = total + plain_loss(module, options, params, support_x, support_y, query_x, query_y)
        (total / options.meta_batch).backward()
        optimizer.step()

    return step


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
        self.head = (
            torch.nn.Linear(widths[-1][0], len(params["head.bias"])) if "head.bias" in params else None
        )

    def forward(self, x):
        x = self.layers(x)
        return x.flatten(1) if self.head is None else self.head(x.mean((2, 3)))


def prepare_higher(module, options, params, sample):
    """-> step(): MAML by higher's innerloop_ctx, task after task."""
    import higher

    network = PlainNetwork(params).to(options.device)
    outer, inner = (
        torch.optim.Adam(network.parameters(), lr=options.lr),
        torch.optim.SGD(network.parameters(), lr=options.inner_lr),
    )

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

    network = PrototypicalNetworks(PlainNetwork(params)).to(options.device)
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


def unfold_conv2d(x, W, b, stride, padding):
    """F.conv2d with the patches of the images as columns: images (n, C_in, H, W) -> (n, C_out, H', W')."""
    height, width = ((s + 2 * padding - W.shape[-1]) // stride + 1 for s in x.shape[-2:])
    columns = F.unfold(x, W.shape[-1], padding=padding, stride=stride)  # (n, C_in * 9, H' * W')
    return (W.flatten(1) @ columns + b[:, None]).unflatten(-1, (height, width))


def prepare_variant(variant, module, options, params, **compiler):
    """-> gradients(batch): adds those of the tasks' mean loss to .grad. `compiler`: for torch.compile."""

    def unfolded(batch):
        with mock.patch.object(F, "conv2d", unfold_conv2d):
            module.run_tasks(params, batch, options, True)

    def together(params, batch):
        with torch.autocast(
            options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"
        ):
            return torch.func.vmap(lambda task: module.task_loss(params, task, options)[0])(batch).mean()

    if variant == "compiled":
        compiled = torch.compile(together, **compiler)
        return lambda batch: compiled(params, batch).backward()
    if variant == "captured":
        return data.recorded(lambda batch: module.run_tasks(params, batch, options, True), params)
    return {
        "loop": lambda batch: module.run_tasks(params, batch, options, False),
        "unfold": unfolded,
        "vmap": lambda batch: module.run_tasks(params, batch, options, True),
    }[variant]


def prepare_adaptation(words, args, shots):
    """-> step(): one inner step for one task, by the algorithm that `words` name; and its arguments."""
    options = modgrad.get_args([*words, "--steps", "1", *passed_on(args, shots)])
    params = {k: w.to(options.device) for k, w in modgrad.init_params(options).items()}
    task = data.Task(*(x[0] for x in data.Episodes.of(options, "test").tasks(0, 1)))
    before, given = inputs_of_a_step(params, task, options)
    inner_step = modgrad.STEPS[options.algorithm]

    @torch.no_grad()
    def step():
        modgrad.run_blocks(*before)
        inner_step(*given)

    return step, options


def inputs_of_a_step(params, task, options):
    """What modgrad.task_loss gives to run_blocks, for the layers before the first adapted one, and to its inner step."""
    run_blocks = modgrad.run_blocks
    seen = []

    def note(*given):
        seen.append(given)
        return run_blocks(*given)

    def stop(*given):  # task_loss goes no further, for the memory's sake
        seen.append(given)
        raise StopIteration

    with (
        mock.patch.dict(modgrad.STEPS, {options.algorithm: stop}),
        mock.patch.object(modgrad, "run_blocks", note),
        contextlib.suppress(StopIteration),
        torch.no_grad(),
    ):
        modgrad.task_loss(params, task, options)
    return seen


def prepare_reuse(words, args, shots):
    """-> train(), the gradients of one meta-batch; test(), a task's query outputs; the arguments and the parameters."""
    options = afr.get_args([*words, *passed_on(args, shots, "meta_batch", "precision")])
    params = {k: w.to(options.device).requires_grad_() for k, w in afr.init_params(options).items()}
    batches = afr.MetaTasks(options, "train").tasks(0, args.meta_batch)
    task = data.Task(*(x[0] for x in batches[0]))
    kind = "classification"
    epsilon = afr.draws(0, options)

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
