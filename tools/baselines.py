"""What bench.py measures ours against, and how one training step of each is prepared."""

import contextlib
import importlib
import io
from typing import NamedTuple
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
        # per mode (name, classes: lists of (archive, key), or a function that gives them)
        self.sources = sources
        self.args, self.shots = args, shots

    def __iter__(self):
        args = self.args
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng(worker.id if worker else 0)
        modes = opened(self.sources)
        while True:
            mode, classes = modes[rng.integers(len(modes))]
            images = []
            for c in rng.choice(len(classes), args.ways, replace=False):
                images += self.draw_images(rng, mode, classes[c])
            x = torch.from_numpy(np.stack(images).astype(np.float32) / 255)
            x = x.view(args.ways, -1, 3, args.image_size, args.image_size)
            support, query = x[:, : self.shots], x[:, self.shots :]
            yield support.flatten(0, 1), query.flatten(0, 1)

    def draw_images(self, rng, mode, one_class):
        """Draw the images that a task has of one class -> list of arrays (3, S, S)."""
        S = self.args.image_size
        number = self.shots + self.args.queries
        turn = rng.integers(4) if mode == "omniglot" else 0
        images = []
        for i in rng.choice(len(one_class), number, replace=False):
            source, key = one_class[i]
            pixels = decode(source.read(key), S, mode).pixels
            turned = np.rot90(pixels, turn)
            coloured = np.broadcast_to(turned, (S, S, 3))
            images.append(coloured.transpose(2, 0, 1))
        return images


def opened(sources):
    """Open the archives of all modes: one that is open must not be shared between processes, so each worker has its own."""
    modes = []
    for mode, classes in sources:
        modes.append((mode, classes() if callable(classes) else classes))
    return modes


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
    """What a DecodingLoader reads -> [(mode, classes, or a function that gives them), ...]."""
    return [(mode, source_of(mode, args)) for mode in args.modes]


def source_of(mode, args):
    """What a DecodingLoader reads for one mode; exit if its files are not there."""
    if args.synthetic:
        return encoded_classes(mode, args.image_size)
    if not find_source(mode, args.data_root):
        data.fail(
            f"{mode} is not under {args.data_root}: the baseline needs its image files; or add --synthetic"
        )
    return Archives(mode, args.data_root)


def encoded_classes(mode, size):
    """A synthetic mode, its images encoded -> classes: lists of (archive, key)."""
    images, names = draw_synthetic(mode, "train", size)
    if mode == "omniglot":
        images = 255 - images  # as scanned: `decode` inverts Omniglot
    archive = Encoded(images)
    per_class = len(images) // len(names)
    classes = []
    for first in range(0, per_class * len(names), per_class):
        classes.append([(archive, key) for key in range(first, first + per_class)])
    return classes


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


def trainable(module, options, dtype=torch.float32):
    """The parameters that a script begins with, on the device and with gradients -> dict of leaves."""
    params = {}
    for key, w in module.init_params(options).items():
        params[key] = w.to(options.device, dtype).requires_grad_()
    return params


def autocast(options):
    """What runs networks in a script's --precision -> context manager."""
    device = options.device.split(":")[0]
    return torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16")


def first_task(batch):
    """Task 0 of a batch."""
    return data.Task(*(x[0] for x in batch))


def prepare_step(name, args, shots):
    """-> step(): one iteration as the script does it; sample(): its tasks alone; and what they are made of."""
    module, options = script_args(name, args, shots)
    params = trainable(module, options)
    optimizer = torch.optim.Adam(params.values(), lr=options.lr, fused=True)
    episodes = data.Episodes.of(options, "train")
    first = 0

    def sample():
        nonlocal first
        first += options.meta_batch
        return episodes.tasks(first, options.meta_batch)

    def step():
        optimizer.zero_grad()
        module.run_tasks(params, sample(), options, options.device != "cpu")
        optimizer.step()

    return step, sample, module, options, params


def convolutions(module, options, params):
    """The convolutions of one task as the network meets them -> [(how often, images, inner step?), ...]."""
    support, query = options.ways * options.shots, options.ways * options.queries
    adaptation = (1, support, False)
    if hasattr(options, "inner_steps"):
        adaptation = (options.inner_steps, support, True)
    return [adaptation, (1, query, False), (1, support, False)]  # the last is the task encoder's


class Convolution(NamedTuple):
    """A convolution of the floor, and the tensors that its passes need."""

    times: int
    is_inner: bool  # whether it is of an inner step, whose gradients are differentiated again
    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor
    gradient: torch.Tensor  # of its output

    def forward(self, options):
        """Its output, in a script's --precision."""
        with autocast(options):
            return F.conv2d(self.x, self.W, self.b, stride=2, padding=1)

    def run(self, options):
        """One pass forward and backward; for an inner step also backward through the first backward."""
        y = self.forward(options)
        leaves = [t for t in (self.x, self.W, self.b) if t.requires_grad]
        if not self.is_inner:
            torch.autograd.grad(y, leaves, self.gradient)
            return
        first = torch.autograd.grad(y, leaves, self.gradient, create_graph=True)
        outer = [self.gradient.detach(), *(t.detach() for t in first)]
        torch.autograd.grad([y, *first], [*leaves, self.gradient], outer)


def floor_weights(module, params, layout):
    """Kernel and bias of each convolution, as leaves of their own -> [(W, b), ...]."""
    weights = []
    for l in module.LAYERS:
        W = params[f"conv{l}.weight"].detach().to(memory_format=layout).requires_grad_()
        b = params[f"conv{l}.bias"].detach().requires_grad_()
        weights.append((W, b))
    return weights


def floor_convolutions(module, options, params, layout):
    """The convolutions of one task, on noise -> [Convolution]."""
    weights = floor_weights(module, params, layout)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    S = options.image_size
    found = []
    for times, images, is_inner in convolutions(module, options, params):
        x = torch.rand(images, 3, S, S, device=options.device)
        x = x.to(dtype, memory_format=layout)
        for l, (W, b) in enumerate(weights):
            x = x.detach().requires_grad_(l > 0)  # an image needs no gradient
            conv = Convolution(times, is_inner, x, W, b, gradient=None)
            y = conv.forward(options)
            gradient = torch.rand_like(y).requires_grad_(is_inner)
            found.append(conv._replace(gradient=gradient))
            x = y
    return found


def prepare_floor(module, options, params, layout):
    """-> run(): the convolutions of one iteration, forward and backward, and nothing else."""
    convs = floor_convolutions(module, options, params, layout)
    tasks = range(options.meta_batch)

    def task(_):
        for conv in convs:
            for _ in range(conv.times):
                conv.run(options)

    def run():
        if options.device != "cpu":
            for number in tasks:
                task(number)
            return
        for _ in data.in_threads(task, tasks, options.workers):
            pass

    return run


def plain_network(x, w, prefix=""):
    """The network, on PyTorch's own functions: images (n, 3, S, S) -> the last layer's maps."""
    for l in (1, 2, 3, 4):
        W, b = w[f"{prefix}conv{l}.weight"], w[f"{prefix}conv{l}.bias"]
        x = F.conv2d(x, W, b, stride=2, padding=1)
        scale, shift = w[f"{prefix}norm{l}.scale"], w[f"{prefix}norm{l}.shift"]
        x = F.batch_norm(x, None, None, scale, shift, training=True)
        film = f"{prefix}film{l}"
        if f"{film}.scale" in w:
            scale, shift = w[f"{film}.scale"], w[f"{film}.shift"]
            x = x * (1 + scale[:, None, None]) + shift[:, None, None]
        x = F.relu(x)
    return x


def plain_loss(module, options, params, support_x, support_y, query_x, query_y):
    """The scripts' task_loss as one would first write it, on PyTorch's own functions. For one task."""
    v = plain_network(support_x, params, "encoder.").mean((2, 3))
    v = F.linear(v, params["encoder.linear.weight"], params["encoder.linear.bias"])
    omega = module.modulation(params, F.relu(v).mean(0))
    theta = module.group(params, "base")
    if not hasattr(options, "inner_steps"):
        fast = module.modulate(theta, omega)
        support = plain_network(support_x, fast).flatten(1)
        query = plain_network(query_x, fast).flatten(1)
        of_classes = [support[support_y == n] for n in range(options.ways)]
        prototypes = torch.stack([features.mean(0) for features in of_classes])
        return F.cross_entropy(-torch.cdist(query, prototypes).square(), query_y)

    def classify(theta, x):
        fast = module.modulate(theta, omega)
        features = plain_network(x, fast).mean((2, 3))
        return F.linear(features, fast["head.weight"], fast["head.bias"])

    for _ in range(options.inner_steps):
        loss = F.cross_entropy(classify(theta, support_x), support_y)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        after = {}
        for (key, w), g in zip(theta.items(), gradients):
            after[key] = w - options.inner_lr * g.clamp(-options.inner_clip, options.inner_clip)
        theta = after
    return F.cross_entropy(classify(theta, query_x), query_y)


def prepare_plain(module, options, draw):
    """-> step(): one iteration of the plain implementation; draw() -> the next task's support and query images."""
    device = options.device
    params = {}
    for key, w in module.init_params(options).items():
        params[key] = w.to(device).contiguous().requires_grad_()
    optimizer = torch.optim.Adam(params.values(), lr=options.lr)
    classes = torch.arange(options.ways)
    support_y = classes.repeat_interleave(options.shots).to(device)
    query_y = classes.repeat_interleave(options.queries).to(device)

    def step():
        optimizer.zero_grad()
        total = 0
        for _ in range(options.meta_batch):
            support_x, query_x = (x.to(device) for x in draw())
            with autocast(options):
                loss = plain_loss(module, options, params, support_x, support_y, query_x, query_y)
                total = total + loss
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
            conv = torch.nn.Conv2d(c_in, c_out, 3, 2, 1)
            norm = torch.nn.BatchNorm2d(c_out, track_running_stats=False)
            layers += [conv, norm, torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*layers)
        self.head = None
        if "head.bias" in params:
            self.head = torch.nn.Linear(widths[-1][0], len(params["head.bias"]))

    def forward(self, x):
        x = self.layers(x)
        if self.head is None:
            return x.flatten(1)
        return self.head(x.mean((2, 3)))


def prepare_higher(module, options, params, sample):
    """-> step(): MAML by higher's innerloop_ctx, task after task."""
    import higher

    network = PlainNetwork(params).to(options.device)
    outer = torch.optim.Adam(network.parameters(), lr=options.lr)
    inner = torch.optim.SGD(network.parameters(), lr=options.inner_lr)

    def step():
        outer.zero_grad()
        batch = sample()
        for i in range(options.meta_batch):
            with higher.innerloop_ctx(network, inner, copy_initial_weights=False) as (adapted, steps):
                for _ in range(options.inner_steps):
                    loss = F.cross_entropy(adapted(batch.support_x[i]), batch.support_y[i])
                    steps.step(loss)
                loss = F.cross_entropy(adapted(batch.query_x[i]), batch.query_y[i])
                (loss / options.meta_batch).backward()
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
            loss = F.cross_entropy(network(batch.query_x[i]), batch.query_y[i])
            (loss / options.meta_batch).backward()
        optimizer.step()

    return step


PEERS = {"mmaml": ("higher", prepare_higher), "mprotonet": ("easyfsl", prepare_easyfsl)}


def unfold_conv2d(x, W, b, stride, padding):
    """F.conv2d with the patches of the images as columns: images (n, C_in, H, W) -> (n, C_out, H', W')."""
    size = W.shape[-1]
    height = (x.shape[-2] + 2 * padding - size) // stride + 1
    width = (x.shape[-1] + 2 * padding - size) // stride + 1
    columns = F.unfold(x, size, padding=padding, stride=stride)  # (n, C_in * 9, H' * W')
    y = W.flatten(1) @ columns + b[:, None]  # (n, C_out, H' * W')
    return y.unflatten(-1, (height, width))


def prepare_variant(variant, module, options, params, **compiler):
    """-> gradients(batch): adds those of the tasks' mean loss to .grad. `compiler`: for torch.compile."""

    def loop(batch):
        return module.run_tasks(params, batch, options, False)

    def vmap(batch):
        return module.run_tasks(params, batch, options, True)

    def unfold(batch):
        with mock.patch.object(F, "conv2d", unfold_conv2d):
            module.run_tasks(params, batch, options, True)

    def mean_loss(params, batch):
        def loss(task):
            return module.task_loss(params, task, options)[0]

        with autocast(options):
            return torch.func.vmap(loss)(batch).mean()

    if variant == "compiled":
        compiled = torch.compile(mean_loss, **compiler)
        return lambda batch: compiled(params, batch).backward()
    if variant == "captured":
        return data.recorded(vmap, params)
    return {"loop": loop, "unfold": unfold, "vmap": vmap}[variant]


def prepare_adaptation(words, args, shots):
    """-> step(): one inner step for one task, by the algorithm that `words` name; and its arguments."""
    options = modgrad.get_args([*words, "--steps", "1", *passed_on(args, shots)])
    start = modgrad.init_params(options)
    params = {k: w.to(options.device) for k, w in start.items()}
    task = first_task(data.Episodes.of(options, "test").tasks(0, 1))
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
    params = trainable(afr, options)
    batches = afr.MetaTasks(options, "train").tasks(0, args.meta_batch)
    task = first_task(batches[0])
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
        features = afr.embed(adapted, task.query_x, afr.Norm(), w)
        return afr.predict(adapted, kind, features, options)

    return train, test, options, params
