"""The ModGrad cell on image completion: a whole face from a few of its pixels. And baselines: CAVIA, MAML, CNP.

Paper: Simon, Koniusz, Nock, Harandi: On Modulating the Gradient for Meta-Learning, ECCV 2020, Section 5.2, Table 3,
Figure 7. The protocol is that of CAVIA (Zintgraf et al., ICML 2019) and CNP (Garnelo et al., ICML 2018).

The idea. An image is a function from a place (row, column) to a colour, and a *task* is one image: learn the
function from k *context* pixels, and be evaluated on all pixels. A small fully connected network, the same for all
images, is adapted to the context by inner steps, and meta-trained so that the adapted network has a small error on
the whole image. So it learns what faces look like, and the context says which face this is. The four algorithms
differ in what is adapted:
    modgrad    one layer, by one step whose gradient is modulated entry by entry (see modgrad.py)
    maml       all layers, by 5 plain gradient steps
    cavia      a context vector beside the input, from zero, by 5 plain gradient steps
    cnp        nothing: an encoder makes that vector, as a mean over the context pixels, in one forward pass

    paper          here                        shape or keys                     where
    theta          group(params, "base")       fc1 .. fc5 head                   five layers of 128 ReLU units
    D_trn          task.support_x, .support_y  (k, 2), (k, 3)                    context: places and colours
    D_val          task.query_x, .query_y      (S*S, 2), (S*S, 3)                all pixels, context included
    v              v                           (128,)                            Eq. 9
    phi_1, phi_2   cell                        generator.{layer}.rows, .cols     Eq. 6, 7
    M              modulation                  like the adapted parameters       Eq. 8
    alpha, K       --alpha, --steps            0.1, 1                            Eq. 5

Read it beside modgrad.py: the same inner steps on another network and another loss.
Run:  python modgrad_completion.py --synthetic --quick     a minute or two on two CPU cores, no download; prints errors
      python modgrad_completion.py --pixels 100 --algorithm cavia
      python -m tools.pictures completion faces.png RUN RUN ...         draws what finished runs make of test images

The paper leaves three things open. Here the CNP's encoder has three layers; its decoder is the network of the others,
trained by the same squared error (the CNP's own paper predicts a variance, too); and the sister networks of a cell are
as in modgrad.py.
"""

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    Run,
    Task,
    add_data_flags,
    add_device_flags,
    add_run_flags,
    canonical_mode,
    complete,
    content_of,
    distinct,
    fail,
    fill,
    new_parser,
    open_split,
    parse,
    prepare,
    reset_unused,
    uniform,
)

METHODS = {"modgrad": "ModGrad", "maml": "MAML", "cavia": "CAVIA", "cnp": "CNP"}
LAYERS = ("fc1", "fc2", "fc3", "fc4", "fc5")
PARTS = ("base", "encoder", "generator")  # of the parameters; only the CNP has an encoder
PROTOCOL = "mean squared error over all pixels and colours, the context included; colours in [0, 1]"
QUICK = {"iterations": 400, "test_tasks": 200}
# (steps, their size, adapted layers). The numbers of steps, and ModGrad's step size, are those of ModGrad's paper; the
# step sizes of MAML and CAVIA are those of CAVIA's code.
DEFAULTS = {
    "modgrad": (1, 0.1, ["fc5"]),
    "maml": (5, 0.1, ["all"]),
    "cavia": (5, 1.0, []),
    "cnp": (0, 0.0, []),
}
UNUSED = {  # flags that an algorithm does not use
    "modgrad": [],
    "cavia": ["rank", "start_at_one"],
    "maml": ["rank", "context", "start_at_one"],
    "cnp": ["rank", "first_order", "inner_clip", "start_at_one"],
}


# ----------------------------------------------------------------------------------------------------- tasks


class Completions:
    """Draws regression tasks: an image is a task, whose colours are to be learned from some of its pixels, the *context*.

    Task fields here: support_x (k, 2) the context's places (row / S, column / S), support_y (k, 3) its colours in [0, 1],
    query_x (S*S, 2) and query_y (S*S, 3) those of all pixels, in raster order. (Garnelo et al., ICML 2018; CAVIA's protocol.)

    Args:
        mode: a data set, whose classes do not matter here. split, image_size, seed, device and so on: as for `Episodes`.
        pixels: k. ordered: the context is the first k pixels in raster order, else drawn without replacement.

    A training task is an image drawn with replacement; test and validation tasks go through the split once, in a fixed order
    that mixes its classes.
    """

    BLOCK = 256  # tasks that are drawn together; changing it changes tasks

    def __init__(
        self,
        mode,
        split,
        pixels,
        ordered,
        image_size,
        seed=None,
        device="cpu",
        root="data",
        cache_dir=".cache",
        synthetic=False,
    ):
        self.mode = canonical_mode(mode, root)
        self.split = split
        self.pixels = pixels
        self.ordered = ordered
        self.seed = seed
        self.size = image_size
        self.device = torch.device(device)
        self.synthetic = synthetic
        if not 1 <= pixels <= image_size**2:
            fail(f"--pixels {pixels}: an image has {image_size**2}; give 1 to {image_size**2}")
        folder = prepare(mode, image_size, root, cache_dir, synthetic)
        self.folders = [folder.name]  # names what the images were made from
        self.contents = {mode: content_of(folder)}
        _, images = open_split(folder, split)  # (n, S, S, C) uint8
        if images is None:
            fail(f"{mode} has no {split} split: add a folder {split} of class folders beside the others")
        self.images = images.to(self.device).flatten(1, 2)  # (n, S*S, C)
        n = len(images)
        u = uniform(f"order of {self.mode} {split}", 0, n)
        self.order = distinct(u[None], np.array([n]))[0]
        shares = torch.arange(image_size, device=self.device) / image_size
        self.places = torch.cartesian_prod(shares, shares)  # (S*S, 2)

    @classmethod
    def of(cls, args, split):
        """Tasks as the flags of a script describe them; only training depends on the seed."""
        (mode,) = args.modes
        seed = args.seed if split == "train" else None
        ordered = args.order == "ordered"
        where = args.device, args.data_root, args.cache_dir, args.synthetic
        made = cls(mode, split, args.pixels, ordered, args.image_size, seed, *where)
        if split != "train":
            count = getattr(args, f"{split}_tasks")
            if count > len(made.images):
                has = f"{made.mode}/{split} has {len(made.images)} images"
                fail(f"--{split}-tasks {count}: {has}; give at most that")
        return made

    def indices(self, first, count):
        """Images (count,) and context pixels (count, k) of tasks first .. first + count - 1. See `draw`."""
        first_block = first // self.BLOCK
        last_block = (first + count - 1) // self.BLOCK
        images, contexts = [], []
        for block in range(first_block, last_block + 1):
            of_block, context = self.draw(block)
            images.append(of_block)
            contexts.append(context)
        start = first - first_block * self.BLOCK
        places = slice(start, start + count)
        return np.concatenate(images)[places], np.concatenate(contexts)[places]

    def draw(self, block):
        """The 256 tasks from number block * 256 on, drawn at once -> images (256,), context pixels (256, k)."""
        name = f"completion {self.mode} {self.split} {self.size} {self.pixels} {self.seed}"
        u = uniform(name, block, self.BLOCK * (1 + self.pixels))
        images = (u[: self.BLOCK] * len(self.images)).astype(np.int64)
        if self.seed is None:
            images = np.resize(self.order, (block + 1) * self.BLOCK)[block * self.BLOCK :]
        if self.ordered:
            return images, np.tile(np.arange(self.pixels), (self.BLOCK, 1))
        u_context = u[self.BLOCK :].reshape(self.BLOCK, -1)
        return images, distinct(u_context, np.full(self.BLOCK, self.size**2))

    def tasks(self, first, count):
        """Tasks number first .. first + count - 1, on the device -> Task with a leading dimension `count`."""
        arrays = [torch.from_numpy(x) for x in self.indices(first, count)]
        images, context = (x.to(self.device) for x in arrays)
        colours = self.images[images].expand(-1, -1, 3).float() / 255  # (count, S*S, 3)
        shown = context[..., None].expand(-1, -1, 3)
        return Task(
            support_x=self.places[context],
            support_y=colours.gather(1, shown),
            query_x=self.places.expand(count, -1, -1),
            query_y=colours,
            mode=torch.zeros(count, dtype=torch.int64),
        )

    def sha256(self, count):
        """A hash of the first `count` tasks: the mode, number and size of its images, and the indices drawn."""
        digest = hashlib.sha256(f"{self.mode} {len(self.images)} {self.size}".encode())
        for array in self.indices(0, count):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- network


def linear(params, name, x):
    """A layer of a cell or an encoder, in float32: bf16 is for the network's own layers."""
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(W.dtype), W, b)


def forward(params, x, context=None):
    """Places x (n, 2), each joined with the image's context vector (C,) -> colours (n, 3)."""
    if context is not None:
        beside = context.expand(len(x), -1)
        x = torch.cat([x, beside], 1)
    for name in LAYERS:
        x = F.relu(F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"]))
    W, b = params["head.weight"], params["head.bias"]
    return F.linear(x, W, b).to(W.dtype)  # bf16, if chosen, ends here


def encode(params, x, y):
    """The CNP's encoder: context places (k, 2) and colours (k, 3), in any order -> what they say of the image (C,)."""
    h = torch.cat([x, y], 1)
    for i in (1, 2):
        h = F.relu(linear(params, f"encoder.fc{i}", h))
    return linear(params, "encoder.fc3", h).mean(0)


def group(params, name):
    """One part of all parameters: "base" (theta), "encoder" or "generator"."""
    if name == "base":
        return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def adapted_keys(args, params):
    """Keys of the parameters that inner steps change."""
    base = list(group(params, "base"))
    if "all" in args.adapt:
        return base
    return [k for k in base if k.split(".")[0] in args.adapt]


def init_params(args):
    """Draw all parameters from the seed -> flat dict.

    Layers start as PyTorch's own: uniform within 1 / root of the number of inputs. (The MAML in CAVIA's code
    draws its base within 1 / root of the number of *outputs*: the weights of its first layer are 1/8 of ours, those of
    its last 6.5 times ours. Here MAML starts like the others, so that only the algorithms differ.)
    """
    rng = torch.Generator().manual_seed(args.seed)
    params = {}

    def default(name, *shape):
        root = math.sqrt(math.prod(shape[1:]))  # PyTorch's: uniform within 1 / root of the number of inputs
        weight, bias = torch.rand(shape, generator=rng), torch.rand(shape[0], generator=rng)
        params[f"{name}.weight"] = (2 * weight - 1) / root
        params[f"{name}.bias"] = (2 * bias - 1) / root

    n_in = 2
    if args.algorithm in ("cavia", "cnp"):
        n_in += args.context
    for name in LAYERS:
        default(name, args.hidden, n_in)
        n_in = args.hidden
    default("head", 3, n_in)
    if args.algorithm == "cnp":
        default("encoder.fc1", args.hidden, 5)
        default("encoder.fc2", args.hidden, args.hidden)
        default("encoder.fc3", args.context, args.hidden)
    elif args.algorithm == "modgrad":
        for key in adapted_keys(args, params):
            layer, part = key.split(".")
            if part == "weight":  # an outer product of two columns
                rows, cols = params[key].shape
                init_cell(params, args, default, f"generator.{layer}.rows", rows)
                init_cell(params, args, default, f"generator.{layer}.cols", cols)
            else:  # one column
                init_cell(params, args, default, f"generator.{layer}.bias", len(params[key]))
    return params


def init_cell(params, args, default, name, n):
    """Add a sister network phi that makes a column (n,): Linear, ReLU, Linear, of the released code's sizes."""
    default(f"{name}.1", n, args.context)
    default(f"{name}.2", args.rank + args.rank * n, n)
    if args.start_at_one:
        params[f"{name}.2.bias"][args.rank :] = 1.0


# ----------------------------------------------------------------------------------------------- inner steps
# Each takes (params, adapted, loss, args, clip): `adapted` holds what the steps so far have made of the parameters
# that adapt, `loss` is the support loss as a function of it, and `clip` bounds a gradient (with --first-order it
# detaches it too). Each returns the new `adapted`. The code is that of modgrad.py.


def maml_step(params, adapted, loss, args, clip):
    """theta <- theta - alpha * gradient(theta)                                     (Finn et al., ICML 2017)"""
    gradient = clip(torch.func.grad(loss)(adapted))
    return {k: adapted[k] - args.alpha * gradient[k] for k in adapted}


def cavia_step(params, adapted, loss, args, clip):
    """v <- v - alpha * gradient(v): only a context moves, an input beside the place (Zintgraf et al., ICML 2019)"""
    gradient = clip(torch.func.grad(loss)(adapted))
    return {"context": adapted["context"] - args.alpha * gradient["context"]}


def modgrad_step(params, adapted, loss, args, clip):
    """theta <- theta - alpha * M(v) * gradient(theta)                              (Eq. 5; Algorithm 1, 9-13)"""
    gradient = clip(torch.func.grad(loss)(adapted))  # 10

    def step(v):
        M = modulation(params, v, adapted)
        return {k: adapted[k] - args.alpha * M[k] * gradient[k] for k in adapted}

    def loss_after_step(v):
        return loss(step(v))

    v = next(iter(adapted.values())).new_zeros(args.context)  # 9: v = 0
    v = -torch.func.grad(loss_after_step)(v)  # 11: Eq. 9
    if args.first_order:
        v = v.detach()
    return step(v)  # 12, 13


STEPS = {"modgrad": modgrad_step, "maml": maml_step, "cavia": cavia_step}


def cell(params, name, v):
    """A sister network phi and its mixture: context v -> h a, a column (n,)         (Eq. 6, 7)."""
    hidden = F.relu(linear(params, f"{name}.1", v))
    out = linear(params, f"{name}.2", hidden)  # (u + u*n,)
    n = params[f"{name}.1.weight"].shape[0]
    u = len(out) // (n + 1)
    a = out[:u].softmax(0)
    h = out[u:].view(n, u)
    return h @ a


def modulation(params, v, like):
    """The generator: context v -> M, a factor for each entry of the parameters `like` (Eq. 8, then ReLU).

    Factors of kernels are >= 0. Factors of biases may be negative: the ReLU belongs to the outer product, which
    a bias does not have. (The released code applies ReLU to them too.)
    """
    M = {}
    for key, w in like.items():
        layer, part = key.rsplit(".", 1)
        if part == "weight":
            rows = cell(params, f"generator.{layer}.rows", v)
            cols = cell(params, f"generator.{layer}.cols", v)
            M[key] = F.relu(torch.outer(rows, cols)).view(w.shape)
        else:
            M[key] = cell(params, f"generator.{layer}.{part}", v)
    return M


# ------------------------------------------------------------------------------------------------- algorithm


def task_loss(params, task, args):
    """ONE task: adapt to the context pixels, evaluate on all pixels of the image.

    Returns the mean squared error (), the only training signal of all parameters, and the colours (S*S, 3).
    Numbers in comments are lines of Algorithm 1.
    """
    if args.algorithm == "cnp":
        context = encode(params, task.support_x, task.support_y)  # (C,)
        colours = forward(params, task.query_x, context)  # (S*S, 3)
        return F.mse_loss(colours, task.query_y), colours
    if args.algorithm == "cavia":
        adapted = {"context": params["fc1.weight"].new_zeros(args.context)}
    else:
        adapted = {k: params[k] for k in adapted_keys(args, params)}  # 6: theta^0

    def support_loss(adapted):
        colours = forward(params | adapted, task.support_x, adapted.get("context"))  # (k, 3)
        return F.mse_loss(colours, task.support_y)

    def clip(gradient):
        most = args.inner_clip
        gradient = {k: g.clamp(-most, most) for k, g in gradient.items()}
        if args.first_order:
            gradient = {k: g.detach() for k, g in gradient.items()}
        return gradient

    for _ in range(args.steps):  # 8
        adapted = STEPS[args.algorithm](params, adapted, support_loss, args, clip)  # 9-13
    colours = forward(params | adapted, task.query_x, adapted.get("context"))  # (S*S, 3)
    return F.mse_loss(colours, task.query_y), colours  # 16, 17


# ---------------------------------------------------------------------------------------- training, evaluation


def run_tasks(params, batch, args, train=False):
    """Run task_loss on T tasks -> losses (T,), the errors; all tasks at once, because their matrices are small.

    In training it adds the gradient of the mean loss to .grad.
    """
    device = args.device.split(":")[0]

    def one(task):
        with torch.autocast(device, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
            loss, _ = task_loss(params, task, args)
        return loss

    losses = torch.func.vmap(one)(batch)
    if train:
        losses.mean().backward()
    return losses.detach()


def evaluate(params, episodes, count, args):
    """Errors of the first `count` tasks -> array (count,)."""
    errors = []
    starts = range(0, count, 20)
    for first in tqdm(starts, desc=f"{episodes.split} images, 20 at a time", disable=None, leave=False):
        batch = episodes.tasks(first, min(20, count - first))
        with torch.no_grad():
            errors.append(run_tasks(params, batch, args))
    return torch.cat(errors).double().cpu().numpy().round(7)


def summary(per_task):
    """Errors of tasks -> {"mean", "ci95"}: half the width of a 95 % interval, 1.96 s / sqrt(n)."""
    half_width = 1.96 * float(per_task.std(ddof=1)) / math.sqrt(len(per_task))
    return {"mean": round(float(per_task.mean()), 6), "ci95": round(half_width, 6)}


def gradient_norm(params, part):
    """Euclidean norm of the gradient of one part of the parameters."""
    norms = [w.grad.norm() for w in group(params, part).values()]
    return math.hypot(*norms)


def size(params, part):
    """Number of parameters in one part of them."""
    return sum(w.numel() for w in group(params, part).values())


def train(params, args, run):
    """Take --iterations steps on the mean error of --meta-batch images, from where the run left off."""
    T = args.meta_batch
    optimizer = torch.optim.Adam(params.values(), lr=args.lr, fused=True)
    run.restore(optimizer)
    episodes = Completions.of(args, "train")
    held_out = Completions.of(args, "val") if args.val_every else None

    def validate():
        return summary(evaluate(params, held_out, args.val_tasks, args))

    for iteration in run.iterations():
        if args.lr_halve_every:
            optimizer.param_groups[0]["lr"] = args.lr * 0.5 ** (iteration // args.lr_halve_every)
        batch = episodes.tasks(first=iteration * T, count=T)

        optimizer.zero_grad()
        losses = run_tasks(params, batch, args, train=True)
        optimizer.step()

        run.observe(losses.mean())
        if run.log_now():
            loss = run.observed().mean().item()
            norms = {part: gradient_norm(params, part) for part in PARTS}
            values = {"loss": loss, "gradient_norm": norms, "synthetic": args.synthetic}
            run.log(values, {"error": f"{loss:.4f}"}, validate)
        run.save(params, optimizer)


def measure(params, test, args, run):
    """Evaluate on the test images and write result.json -> its content."""
    errors = evaluate(params, test, args.test_tasks, args)
    return run.write_result(
        {
            "modes": args.modes,
            "pixels": args.pixels,
            "order": args.order,
            "synthetic": args.synthetic,
            "protocol": PROTOCOL,
            "tasks_sha256": test.sha256(args.test_tasks),
            "data": test.folders,
            "error": summary(errors),
            "parameters": {part: size(params, part) for part in PARTS},
            "per_task": errors.tolist(),
        }
    )


def report(result, args):
    """Print what was measured, under which protocol, with its interval."""
    setting = f"{args.pixels} {args.order} context pixels of {args.image_size} x {args.image_size}"
    training = f"{result['iterations']} iterations of {result['seconds_per_iteration']} s"
    print(f"\n{args.title}: {setting}, {args.test_tasks} test images, after {training}")
    print(result["protocol"])
    print(f"{'error':16}" + "{mean:.4f} +- {ci95:.4f}".format(**result["error"]))


# ------------------------------------------------------------------------------------------------------ flags


def column(i):
    """A column of DEFAULTS for a help text."""
    cells = []
    for algorithm, row in DEFAULTS.items():
        value = row[i]
        if isinstance(value, list):
            value = " ".join(value) or "none"
        cells.append(f"{algorithm} {value}")
    return ", ".join(cells)


STEPS_HELP = f"K, inner steps (P: 1 for ModGrad, 5 for MAML and CAVIA): {column(0)}"
ALPHA_HELP = f"their size (P: 0.1 for ModGrad): {column(1)}"
ADAPT_HELP = f"layers that the steps change, such as fc5 head, or all. Defaults: {column(2)}"
ONE_HELP = "ModGrad's M starts near 1 (M = 1 is MAML), not near 0 as in its code"
CLIP_HELP = (
    "bound on each entry of the inner gradient (C: none, but each task's outer gradient is bounded by 10)"
)


def get_args(argv=None):
    """Read the command line -> args. `title`, `variant` and `method` are worked out from it."""
    p = new_parser(__doc__, "P: the paper's value; C: that of CAVIA's code.")
    add_algorithm_flags(p)
    p.add_argument("--seed", type=int, default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-tasks", type=int, default=1000, help="held-out images")
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=200, help="images")
    add_data_flags(p, synthetic="procedural faces: no download")
    add_device_flags(p, threads=False, precision="bf16: the network's layers only")
    add_run_flags(p, QUICK)
    args, defaults = parse(p, argv, QUICK, presets)
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    args.method = METHODS[args.algorithm]
    check_typed(args)
    steps, alpha, adapt = DEFAULTS[args.algorithm]
    fill(args, defaults, {"steps": steps, "alpha": alpha, "adapt": adapt})
    check(args)
    reset_unused(args, defaults, UNUSED[args.algorithm])
    if args.adapt != defaults["adapt"]:
        args.method += f" on {'+'.join(args.adapt)}"
    data = f"SYNTHETIC {args.modes[0]}" if args.synthetic else args.modes[0]
    shown = ("adapt", "pixels", "order", "image_size", "seed", "synthetic")
    least = {"image_size": 4, "steps": 0}
    complete(args, defaults, data, shown, ("modes", "algorithm"), least)
    return args


def presets(typed):
    """There are only 800 synthetic test faces."""
    return {"test_tasks": 800} if typed.synthetic and not typed.quick else {}


def add_algorithm_flags(p):
    """Add the flags that decide what is learned."""
    p.add_argument("--algorithm", default="modgrad", choices=METHODS, help="the inner step")
    p.add_argument(
        "--modes", nargs=1, default=["celeba"], metavar="MODE", help="a data set: celeba (P), or any other"
    )
    p.add_argument("--pixels", type=int, default=10, help="k, context pixels (P: 10 and 100)")
    p.add_argument(
        "--order", default="random", choices=("random", "ordered"), help="ordered: the first k, row by row"
    )
    p.add_argument("--image-size", type=int, default=32, help="S, pixels (C: 32)")
    p.add_argument("--hidden", type=int, default=128, help="units of each of the five layers (P: 128)")
    p.add_argument("--steps", type=int, help=STEPS_HELP)
    p.add_argument("--alpha", type=float, help=ALPHA_HELP)
    p.add_argument("--adapt", nargs="+", metavar="LAYER", help=ADAPT_HELP)
    p.add_argument("--rank", type=int, default=5, help="u, columns that are mixed in a ModGrad cell (P: 5)")
    p.add_argument(
        "--context", type=int, default=128, help="length of v, or of CAVIA's or CNP's vector (P, C: 128)"
    )
    p.add_argument("--start-at-one", action="store_true", help=ONE_HELP)
    p.add_argument("--inner-clip", type=float, default=10.0, help=CLIP_HELP)
    p.add_argument("--first-order", action="store_true", help="leave out second derivatives (P, C: no)")
    p.add_argument("--meta-batch", type=int, default=25, help="T, images per iteration (C: 25)")
    p.add_argument("--iterations", type=int, default=50000, help="updates (C: 50,000)")
    p.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (C: 1e-3)")
    p.add_argument("--lr-halve-every", type=int, default=0, help="iterations; 0 is never")


def check_typed(args):
    """Exit if --steps or --alpha was typed for the CNP, which makes no steps."""
    if args.algorithm == "cnp" and (args.steps is not None or args.alpha is not None):
        fail("--algorithm cnp makes no inner steps: leave --steps and --alpha out")


def check(args):
    """Exit if flags contradict each other."""
    if args.algorithm in ("cavia", "cnp") and args.adapt:
        fail(f"--algorithm {args.algorithm} adapts no layer: leave --adapt out")
    if args.algorithm != "cnp" and args.steps < 1:
        fail(f"--steps {args.steps}: give 1 or more")
    for layer in args.adapt:
        if layer not in ("all", *LAYERS, "head"):
            fail(f"--adapt {layer}: no such layer; give all, or some of {' '.join(LAYERS)} head")


def main():
    args = get_args()
    test = Completions.of(args, "test")
    run = Run(args, test)
    params = run.params(init_params(args))
    if run.unfinished:
        train(params, args, run)
    if run.finished():
        same = {"tasks_sha256": test.sha256(args.test_tasks), "data": test.folders}
        result = run.result(**same)  # of an earlier call on the same test tasks, or None
        if result is None:
            result = measure(params, test, args, run)
        report(result, args)


if __name__ == "__main__":
    main()
