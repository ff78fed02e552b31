"""The ModGrad cell on multi-shot learning: many drawings per class, up to 100 steps. And baselines: MAML, FOMAML, Reptile.

Paper: Simon, Koniusz, Nock, Harandi: On Modulating the Gradient for Meta-Learning, ECCV 2020, Section 5.1, Figure 5.
The protocol is that of LEAP (Flennerhag et al., ICLR 2019) and, where it says nothing, of LEAP's released code.

The idea. A task with hundreds of images can simply be trained on, batch after batch. The question is then how fast the
network learns, from which start and with which steps. A task is an alphabet never seen before, with 20 of its characters
as classes; the network is trained for 100 steps of 20 images. Figure 5 shows its training loss against the step, and the
accuracy on held-out drawings at the end. To differentiate through such long training is expensive, and this is where the
algorithms differ:
    modgrad    the gradient is modulated entry by entry (see modgrad.py); differentiated through the steps
    maml       plain steps; differentiated through
    fomaml     plain steps, whose gradients count as constants: the last point's gradient is handed to the start
    reptile    plain steps; the start moves towards where they end, and no gradient of the outer loss is needed

    paper          here                        shape or keys                     where
    theta          group(params, "base")       conv{l} norm{l} head              Conv-4
    D_trn          task.support_x, .support_y  (K, B, 1, S, S), (K, B)           a batch of B images for each of K steps
    D_val          task.query_x, .query_y      (N*Q, 1, S, S), (N*Q,)            N ways, Q held-out drawings of each
    v              v                           (300,)                            Eq. 9
    phi_1, phi_2   cell                        generator.{layer}.rows, .cols     Eq. 6, 7
    M              modulation                  like the adapted parameters       Eq. 8
    alpha, K       --alpha, --steps            0.1, see below                    Eq. 5

What is drawn. The paper says that classes have 1 to 25 samples; Omniglot has 20 drawings per character, of which LEAP
holds out 5. Here a class has 1 to 15 training drawings (each number is equally likely), and 5 others are held out. (With --shots
15 15, as in LEAP, all have 15.) 46 of 50 alphabets have at least 20 characters: 25 train, 10 test, 11 validate.
The paper does not say how ModGrad is trained here. Ours trains through --steps 5, as LEAP's code does for its MAML
(which is not in the figure). Layers, step size and cells are those of modgrad.py. Every algorithm is *tested* for 100
steps. M starts at 0.0001 on average, with half of its entries 0, so until the cells have learned, steps do nothing.
This script keeps LEAP's network, its initialisation, and random turns of all images, held-out ones too. It departs
from LEAP's code in three things:
- The outer loss of modgrad, maml and fomaml is that of the held-out drawings (Algorithm 1; the code's FOMAML takes the
  last training batch), and the accuracy is that on held-out drawings. (In the code `if self.train` asks whether a
  method exists, which is always true: it tests on training drawings, with running averages in BatchNorm.)
- Each visit to an alphabet draws anew its characters, their numbering, and what is held out (in the code: once per
  run), and draws a step's images with replacement (in the code, all images come about equally often).
- Strokes are bright on dark; inner gradients' entries are held within +-20 (--inner-clip).
LEAP itself is left out: the 83.3 % that our tables give for it stands in the ModGrad paper.

Read it beside modgrad.py: the same steps, more of them, and two algorithms that do not differentiate through them.
Run:  python modgrad_multishot.py --synthetic --quick     a minute or two on two CPU cores, no download; prints accuracies
      python modgrad_multishot.py --algorithm reptile
A task of five steps takes a CPU core 0.3 (reptile) to 0.6 s (maml). So the protocol takes two to four hours for modgrad
and maml, which train through 5 steps, and over a day for fomaml and reptile, which take 100. With `--channels 16 --steps 5
--meta-batch 5` each takes 5 to 12 minutes, and a few more for the test. It was never run on a GPU.
"""

import hashlib
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    SPLITS,
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
    in_threads,
    new_parser,
    parse,
    prepare,
    reset_unused,
    student,
    uniform,
)

METHODS = {"modgrad": "ModGrad", "maml": "MAML", "fomaml": "FOMAML", "reptile": "Reptile"}
LAYERS = ("conv1", "conv2", "conv3", "conv4")
PARTS = ("base", "encoder", "generator")  # of the parameters; no algorithm here has an encoder
PROTOCOLS = {
    "paper": "BatchNorm statistics of the held-out images together",
    "inductive": "BatchNorm statistics of the adapted network on its last ten training batches, nearly LEAP's",
}
QUICK = {
    "channels": 16,
    "steps": 5,
    "meta_batch": 2,
    "iterations": 150,
    "test_steps": 50,
    "test_tasks": 20,
}
MARKS = (1, 2, 5, 10, 20, 50, 100)  # steps after which the accuracy is measured, besides the last
# (steps, their size, adapted layers, outer optimiser, its rate). ModGrad's optimiser is its paper's; the others' values
# are those of LEAP's code.
DEFAULTS = {
    "modgrad": (5, 0.1, ["conv3", "conv4"], "adam", 1e-3),
    "maml": (5, 0.1, ["all"], "sgd", 0.5),
    "fomaml": (100, 0.1, ["all"], "sgd", 0.5),
    "reptile": (100, 0.1, ["all"], "sgd", 0.1),
}
UNUSED = {  # flags that an algorithm does not use
    "modgrad": [],
    "maml": ["rank", "context", "start_at_one"],
    "fomaml": ["rank", "context", "first_order", "start_at_one"],
    "reptile": ["rank", "context", "first_order", "start_at_one"],
}
OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


# ----------------------------------------------------------------------------------------------------- tasks


class Alphabets:
    """Draws multi-shot tasks: an alphabet is a task, N of its characters the classes, each with a number of training drawings
    of its own, from shots[0] to shots[1]; Q other drawings of each are held out. Training goes by `steps` batches of B images,
    picked at random, with replacement, from the task's training drawings. (This follows LEAP's protocol: Flennerhag et al.,
    ICLR 2019. The docstring at the top says where LEAP's code differs.)

    Task fields here: support_x (steps, B, 1, S, S) and support_y (steps, B), a batch a step; query_x (N*Q, 1, S, S) and query_y
    (N*Q,), the held-out drawings; mode: number of the alphabet within the split. Each time an image is shown, it is moved by
    up to 20 % along its own axes, then turned by any angle and scaled by 0.8 to 1.2. (LEAP's code has the same ranges, but
    moves the image last. It changes held-out drawings, too.)

    Args:
        mode: a data set whose classes lie in folders `<alphabet>/<character>`, as the published Omniglot. Alphabets of fewer
            than N characters are left out; of the others, sorted and shuffled with a fixed seed, 25 are for training, the next 10
            for testing, the rest for validation (Omniglot, N = 20: 46 = 25 + 10 + 11). The split of characters that
            data.py's `Episodes` uses does not matter here. synthetic: an alphabet is N consecutive invented characters, and
            the next one starts two characters later. Characters 0 to 51 are for training, the next 24 for validation, then testing.
        shots: (fewest, most). split, image_size, seed, device and so on: as for `Episodes`.

    Alphabets take turns: in training in a new random order each time, else in a fixed one. Fewer `steps` cut a task short.
    """

    def __init__(
        self,
        mode,
        split,
        ways,
        shots,
        queries,
        steps,
        batch,
        image_size,
        seed=None,
        device="cpu",
        root="data",
        cache_dir=".cache",
        synthetic=False,
    ):
        self.mode = canonical_mode(mode, root)
        self.split = split
        self.ways = ways
        self.shots = tuple(shots)
        self.queries = queries
        self.steps = steps
        self.batch = batch
        self.seed = seed
        self.size = image_size
        self.device = torch.device(device)
        self.synthetic = synthetic
        folder = prepare(mode, image_size, root, cache_dir, synthetic)
        self.folders = [folder.name]  # names what the images were made from
        self.contents = {mode: content_of(folder)}
        drawn = self.read(folder)
        chosen = self.invented(drawn) if synthetic else self.real(drawn)
        self.check(chosen)
        self.names = list(chosen)
        self.characters = []  # of each alphabet: first row and number of drawings of each character
        for characters in chosen.values():
            self.characters.append(np.array([item[1:] for item in characters]))

    @classmethod
    def of(cls, args, split):
        """Tasks as the flags describe them. Only training depends on the seed; it has --steps, not --test-steps."""
        (mode,) = args.modes
        seed = args.seed if split == "train" else None
        steps = args.steps if split == "train" else args.test_steps
        where = args.device, args.data_root, args.cache_dir, args.synthetic
        task = args.ways, args.shots, args.queries, steps, args.batch
        return cls(mode, split, *task, args.image_size, seed, *where)

    def read(self, folder):
        """Load the images of all characters: alphabets are split here, not characters -> [(name, first row, drawings)]."""
        sizes = json.loads((folder / "classes.json").read_text())
        classes, images = [], []
        for part in SPLITS:
            if part in sizes:
                classes += sizes[part]
                images.append(torch.from_numpy(np.load(folder / f"{part}.npy", mmap_mode="c"))[..., :1])
        self.images = torch.cat(images).squeeze(-1).to(self.device)  # (n, S, S) uint8
        drawn, first = [], 0
        for name, count in classes:
            drawn.append((name, first, count))
            first += count
        return drawn

    def invented(self, drawn):
        """Alphabets of the synthetic characters: overlapping runs of --ways of them -> {name: characters}."""
        pools = {"train": drawn[:52], "val": drawn[52:76], "test": drawn[76:]}
        pool = pools[self.split]
        starts = range(0, len(pool) - self.ways + 1, 2)
        return {f"{self.split}-{first}": pool[first : first + self.ways] for first in starts}

    def real(self, drawn):
        """The alphabets of this split -> {name: characters}; names are folders of class folders."""
        alphabets = {}
        for item in drawn:
            name = item[0].rpartition("/")[0]
            alphabets.setdefault(name, []).append(item)
        names = sorted(
            name for name, characters in alphabets.items() if name and len(characters) >= self.ways
        )
        if len(names) < 37:
            fail(
                f"{self.mode} has {len(names)} alphabets (folders of class folders) of at least {self.ways} characters, "
                "37 are needed: lower --ways, or put the published archives into the data root"
            )
        np.random.RandomState(123).shuffle(names)
        parts = {"train": names[:25], "val": names[35:], "test": names[25:35]}
        return {name: alphabets[name] for name in parts[self.split]}

    def check(self, chosen):
        """Exit if there are too few alphabets, or too few drawings of a character."""
        where = f"{self.mode}/{self.split}"
        if len(chosen) < 2:
            fail(f"{where} has {len(chosen)} alphabets of {self.ways} characters, 2 are needed: lower --ways")
        most, queries = self.shots[1], self.queries
        for characters in chosen.values():
            for name, _, drawings in characters:
                if drawings < most + queries:
                    needed = f"{most} shots + {queries} queries need {most + queries}"
                    fail(
                        f"{self.mode}: character {name} has {drawings} drawings, {needed}: lower --shots or --queries"
                    )

    def alphabets(self, first, count):
        """Numbers (count,) of the alphabets of tasks first .. first + count - 1."""
        numbers = np.arange(first, first + count)
        A = len(self.names)
        if self.seed is None:
            return numbers % A
        name = f"order of alphabets {self.mode} {self.seed}"
        orders = []
        for turn in range(first // A, numbers[-1] // A + 1):
            u = uniform(name, turn, A)
            orders.append(distinct(u[None], np.array([A]))[0])
        return np.concatenate(orders)[numbers - first // A * A]

    def draw(self, number, alphabet):
        """Draw task `number` -> rows of the held-out drawings (N, Q), rows (steps, B) and labels (steps, B) of the
        batches, and uniform numbers (N*Q + steps*B, 4) for turning, scaling and moving them, the held-out ones first.
        """
        N, Q = self.ways, self.queries
        fewest, most = self.shots
        shown = self.steps * self.batch
        name = f"alphabets {self.mode} {self.split} {N} {self.shots} {Q} {self.batch} {self.seed}"
        u = uniform(name, number, N * (2 + Q + most + 4 * Q) + 5 * shown)
        ends = np.cumsum([N, N, N * (Q + most), 4 * N * Q])
        u_class, u_shots, u_drawing, u_query, u_batch = np.split(u, ends)
        characters = self.characters[alphabet]
        chosen = distinct(u_class[None], np.array([len(characters)]))[0]
        starts, counts = characters[chosen].T
        rows = starts[:, None] + distinct(u_drawing.reshape(N, Q + most), counts)  # (N, Q + most)
        shots = fewest + (u_shots * (most - fewest + 1)).astype(np.int64)
        labels = np.repeat(np.arange(N), shots)  # of the task's training drawings
        places = np.arange(len(labels)) - np.repeat(np.cumsum(shots) - shots, shots)
        u_batch = u_batch.reshape(shown, 5)
        pick = (u_batch[:, 0] * len(labels)).astype(np.int64)
        pick = pick.reshape(self.steps, self.batch)
        turns = np.concatenate([u_query.reshape(-1, 4), u_batch[:, 1:]])
        support = rows[labels[pick], Q + places[pick]]
        return rows[:, :Q], support, labels[pick], turns

    def indices(self, first, count):
        """Of tasks first .. first + count - 1: alphabets (count,), and the arrays of `draw` for all of them."""
        alphabets = self.alphabets(first, count)
        drawn = [self.draw(first + i, alphabet) for i, alphabet in enumerate(alphabets)]
        return [alphabets, *(np.stack(arrays) for arrays in zip(*drawn))]

    def tasks(self, first, count):
        """Tasks number first .. first + count - 1, on the device -> Task with a leading dimension `count`."""
        N, Q = self.ways, self.queries
        S = self.size
        shown = self.steps * self.batch
        arrays = [torch.from_numpy(x).to(self.device) for x in self.indices(first, count)]
        alphabets, held_out, rows, labels, u = arrays
        rows = torch.cat([held_out.flatten(1), rows.flatten(1)], 1).flatten()  # (count * (N*Q + steps*B),)
        grid = self.grid(u.flatten(0, 1).float())
        images = self.images[rows][:, None] / 255
        x = F.grid_sample(images, grid, align_corners=False)
        x = x.view(count, -1, 1, S, S)
        query, support = x.split([N * Q, shown], 1)
        classes = torch.arange(N, device=self.device)
        return Task(
            support_x=support.reshape(count, self.steps, self.batch, 1, S, S),
            support_y=labels,
            query_x=query,
            query_y=classes.repeat_interleave(Q).expand(count, -1),
            mode=alphabets,
        )

    def grid(self, u):
        """Uniform numbers (n, 4) -> where each pixel comes from, (n, S, S, 2): turned, scaled and moved at random."""
        angle, scale, right, down = u.unbind(1)
        angle = 2 * np.pi * angle
        scale = 0.8 + 0.4 * scale
        right = 0.8 * right - 0.4  # the image's side is 2 long
        down = 0.8 * down - 0.4
        cos, sin = angle.cos() / scale, angle.sin() / scale
        places = torch.stack([cos, -sin, right, sin, cos, down], 1)
        places = places.view(-1, 2, 3)
        return F.affine_grid(places, (len(u), 1, self.size, self.size), align_corners=False)

    def sha256(self, count):
        """A hash of the first `count` tasks: mode, alphabets, image size, and the indices drawn (not the turns)."""
        digest = hashlib.sha256(f"{self.mode} {self.names} {self.size}".encode())
        for array in self.indices(0, count)[:4]:
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors: Conv-4 on images of one channel. `norm` is BatchNorm: a call names the layer.


class Norm:
    """BatchNorm for one forward pass: a call names the layer.

    It normalises with the statistics of the batch x itself, in training and in testing, and keeps them in `used`;
    or, given `stats` from another pass, with those. Scale and shift are not passed to torch.native_batch_norm: with
    them inside, torch 2.13's vmap gets second derivatives wrong.
    """

    def __init__(self, stats=None):
        self.stats = stats
        self.used = {}  # name: (mean, 1/std)

    def __call__(self, params, name, x):
        scale, shift = params[f"{name}.scale"], params[f"{name}.shift"]
        if self.stats is None:
            x, *moments = torch.native_batch_norm(x, None, None, None, None, True, 0.0, 1e-5)
            self.used[name] = moments
        else:
            mean, invstd = self.stats[name]
            x = (x - mean[:, None, None]) * invstd[:, None, None]
        return x * scale[:, None, None] + shift[:, None, None]


def conv(params, name, x, stride=1):
    """A convolution that keeps the size: x (n, C_in, S, S) -> (n, C_out, S, S)."""
    W, b = params[f"{name}.weight"], params.get(f"{name}.bias")
    x = F.conv2d(x, W, b, stride, W.shape[-1] // 2)
    return x.to(W.dtype)  # bf16, if chosen, ends here


def linear(params, name, x):
    """A linear layer: x (..., n_in) -> (..., n_out), always in float32: bf16 is for convolutions."""
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(W.dtype), W, b)


def conv4_block(params, name, x, norm):
    """Convolution, 2x2 max-pool, BatchNorm, ReLU, as in LEAP's code: x (n, C_in, S, S) -> (n, C, S/2, S/2)."""
    x = F.max_pool2d(conv(params, name, x), 2)
    return F.relu(norm(params, name.replace("conv", "norm"), x))


def head_block(params, name, x, norm):
    """The classifier: features (n, ...) -> logits (n, N)."""
    return linear(params, name, x.flatten(1))


def run_blocks(params, x, norm, first=0):
    """The network from its block `first` on; from 0 on, images (n, 1, S, S) -> logits (n, N)."""
    for name in LAYERS[first:]:
        x = conv4_block(params, name, x, norm)
    return head_block(params, "head", x, norm)


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
    """Draw all parameters from the seed -> flat dict. The base network's are the same for every algorithm."""
    rng = torch.Generator().manual_seed(args.seed)
    params = {}

    def default(name, *shape):
        root = math.sqrt(math.prod(shape[1:]))  # PyTorch's: uniform within 1 / root of the number of inputs
        weight, bias = torch.rand(shape, generator=rng), torch.rand(shape[0], generator=rng)
        params[f"{name}.weight"] = (2 * weight - 1) / root
        params[f"{name}.bias"] = (2 * bias - 1) / root

    c_in, c = 1, args.channels
    for layer in LAYERS:
        default(layer, c, c_in, 3, 3)
        norm = layer.replace("conv", "norm")
        params[f"{norm}.scale"] = torch.ones(c)
        params[f"{norm}.shift"] = torch.zeros(c)
        c_in = c
    default("head", args.ways, c * (args.image_size // 16) ** 2)
    if args.algorithm == "modgrad":
        for key in adapted_keys(args, params):
            layer, part = key.split(".")
            for factor, n in factors(part, params[key].shape).items():
                init_cell(params, args, default, f"generator.{layer}.{factor}", n)
    for key, w in params.items():
        if w.dim() == 4:  # convolutions are fastest with channels last
            params[key] = w.to(memory_format=torch.channels_last)
    return params


def factors(part, shape):
    """Lengths of the columns that make M for a parameter -> {"rows", "cols"} of a weight, {"bias"} of a bias."""
    n_out, *n_in = shape
    if part == "bias":
        return {"bias": n_out}
    if len(n_in) == 3 and n_in[0] > 3:  # a 3x3 kernel (C_out, C_in, 3, 3), seen as near-square
        return {"rows": 3 * n_out, "cols": 3 * n_in[0]}
    return {"rows": n_out, "cols": math.prod(n_in)}


def init_cell(params, args, default, name, n):
    """Add a sister network phi that makes a column (n,): Linear, ReLU, Linear, of the released code's sizes."""
    default(f"{name}.1", n, args.context)
    default(f"{name}.2", args.rank + args.rank * n, n)
    if args.start_at_one:
        params[f"{name}.2.bias"][args.rank :] = 1.0


# ------------------------------------------------------------------------------------------------- inner steps
# Each takes (params, adapted, loss, args, clip): `adapted` holds what the steps so far have made of the parameters
# that adapt, `loss` is the loss on the step's batch as a function of it, and `clip` bounds a gradient (with
# --first-order it detaches it too). Each returns the new `adapted`. The first two are those of modgrad.py.


def maml_step(params, adapted, loss, args, clip):
    """theta <- theta - alpha * gradient(theta)                                     (Finn et al., ICML 2017)"""
    gradient = clip(torch.func.grad(loss)(adapted))
    return {k: adapted[k] - args.alpha * gradient[k] for k in adapted}


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


def fomaml_step(params, adapted, loss, args, clip):
    """theta <- theta - alpha * g, where g is the gradient as a constant, not as a function of theta.

    So d theta_K / d theta_0 = 1, and no step's graph has to be kept            (Finn et al., ICML 2017, Section 5.2)
    """
    with torch.no_grad():
        gradient = clip(torch.func.grad(loss)(adapted))
    return {k: adapted[k] - args.alpha * gradient[k] for k in adapted}


def reptile_step(params, adapted, loss, args, clip):
    """theta <- theta - alpha * g: plain SGD                                                (Nichol et al., 2018)"""
    return fomaml_step(params, adapted, loss, args, clip)


STEPS = {"modgrad": modgrad_step, "maml": maml_step, "fomaml": fomaml_step, "reptile": reptile_step}


# ------------------------------------------------------------------------------------------------ outer losses
# Each takes (params, adapted, logits, task): the start, what is adapted after the last step, logits of the held-out
# images. Its gradient with respect to params, averaged over tasks, is what the outer optimiser gets.


def query_outer(params, adapted, logits, task):
    """L(D_val; theta_K). Its gradient goes back through the steps as far as they let it.

    For ModGrad and MAML that is all the way (unless --first-order); for FOMAML, where d theta_K / d theta_0 = 1, it is
    the gradient at theta_K.
    """
    return F.cross_entropy(logits, task.query_y)


def reptile_outer(params, adapted, logits, task):
    """|theta - theta_K|^2 / 2 for a constant theta_K, whose gradient is theta - theta_K.

    So a step of SGD of size epsilon (--lr) is theta <- theta + epsilon * mean(theta_K - theta)
    (Nichol et al., 2018, Algorithm 2).
    """
    distances = [params[k] - w.detach() for k, w in adapted.items()]
    return sum(distance.square().sum() for distance in distances) / 2


OUTER = {
    "modgrad": query_outer,
    "maml": query_outer,
    "fomaml": query_outer,
    "reptile": reptile_outer,
}


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


def marks(steps):
    """Numbers of steps after which a test measures the accuracy."""
    return [k for k in MARKS if k < steps] + [steps]


def task_loss(params, task, args, evaluate=False):
    """ONE task: take one step per batch on the layers in --adapt, then evaluate on held-out drawings.

    Returns the outer loss (), the only training signal of all parameters, and the logits (N*Q, N) of the held-out
    drawings. If `evaluate`: the losses (K,) of the batches, each before its step; logits (marks, N*Q, N) after several
    numbers of steps, the last included; and the inductive logits (N*Q, N). Numbers in comments are lines of Algorithm 1.
    """
    keys = adapted_keys(args, params)
    adapted = {k: params[k] for k in keys}  # 6: theta^0
    first = first_moving_block(keys)
    losses, held_out = [], []

    def clip(gradient):
        most = args.inner_clip
        gradient = {k: g.clamp(-most, most) for k, g in gradient.items()}
        if args.first_order:
            gradient = {k: g.detach() for k, g in gradient.items()}
        return gradient

    for k, (x, y) in enumerate(zip(task.support_x, task.support_y), 1):  # 8; x (B, 1, S, S)
        for name in LAYERS[:first]:  # blocks before the first adapted one run once per step
            x = conv4_block(params, name, x, Norm())

        def batch_loss(adapted, x=x, y=y):
            return F.cross_entropy(run_blocks(params | adapted, x, Norm(), first), y)

        if evaluate:
            losses.append(batch_loss(adapted))
        adapted = STEPS[args.algorithm](params, adapted, batch_loss, args, clip)  # 9-13
        if evaluate and k in marks(len(task.support_x)):
            held_out.append(run_blocks(params | adapted, task.query_x, Norm()))
    if not evaluate:
        logits = run_blocks(params | adapted, task.query_x, Norm())
        return OUTER[args.algorithm](params, adapted, logits, task), logits  # 16, 17
    norm = Norm()
    run_blocks(params | adapted, task.support_x[-10:].flatten(0, 1), norm)
    inductive = run_blocks(params | adapted, task.query_x, Norm(norm.used))
    return torch.stack(losses), torch.stack(held_out), inductive


def first_moving_block(keys):
    """Number of the first block that an inner step changes."""
    moved = {k.split(".")[0].replace("norm", "conv") for k in keys}
    moves = [name in moved for name in (*LAYERS, "head")]
    return moves.index(True)


# ---------------------------------------------------------------------------------------- training, evaluation


def run_tasks(params, batch, args, vectorise, evaluate=False):
    """Run task_loss on T tasks -> losses (T,) and accuracies (T,) in % on held-out drawings.

    If `evaluate`: losses (T, K), accuracies (T, marks) of the paper's protocol, (T,) inductive. In training it adds
    the gradient of the mean outer loss to .grad. `vectorise`: all tasks at once, by vmap, which fills a GPU. Else, for
    the CPU, each task runs in a thread of its own, and gradients are added in the order of the tasks.
    """
    T = len(batch.mode)
    weights = list(params.values())
    device = args.device.split(":")[0]

    def one(task):
        with torch.autocast(device, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
            loss, *logits = task_loss(params, task, args, evaluate)
        shown = loss
        if not evaluate:  # Reptile's outer loss is a distance
            shown = F.cross_entropy(logits[0], task.query_y)
        correct = [(x.argmax(-1) == task.query_y).float() for x in logits]
        return loss, shown, *(100 * x.mean(-1) for x in correct)

    def one_in_a_thread(task):
        with torch.set_grad_enabled(not evaluate):  # each thread has a switch of its own
            loss, *found = one(task)
        gradients = () if evaluate else torch.autograd.grad(loss / T, weights)
        return [x.detach() for x in found], gradients

    if vectorise:
        loss, *columns = torch.func.vmap(one)(batch)
        if not evaluate:
            loss.mean().backward()
        return [x.detach() for x in columns]
    rows = []
    tasks = [type(batch)(*fields) for fields in zip(*batch)]  # task j has entry j of every field
    for found, gradients in in_threads(one_in_a_thread, tasks, args.workers):
        rows.append(found)
        for w, g in zip(weights, gradients):
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
            w.grad += g
    return [torch.stack(column) for column in zip(*rows)]


def evaluate(params, episodes, count, args):
    """Evaluate the first `count` tasks -> losses (count, K), accuracies in % (count, marks), inductive (count,)."""
    rows = []
    starts = range(0, count, 10)
    for first in tqdm(starts, desc=f"{episodes.split} tasks, 10 at a time", disable=None, leave=False):
        batch = episodes.tasks(first, min(10, count - first))
        with torch.no_grad():
            rows.append(run_tasks(params, batch, args, args.device != "cpu", evaluate=True))
    columns = [torch.cat(column).double() for column in zip(*rows)]
    return [column.cpu().numpy().round(4) for column in columns]


def summary(per_task, alphabets):
    """Values of tasks (n, ...) and their alphabets (n,) -> {"mean", "ci95"}.

    Tasks of one alphabet are alike, so the mean is that of the alphabets' means m, and the half width of its 95 %
    interval is t s(m) / sqrt(number of alphabets), with Student's t.
    """
    of_each = [per_task[alphabets == a] for a in np.unique(alphabets)]
    means = np.stack([of_one.mean(0) for of_one in of_each])
    n = len(means)
    half_width = student(n) * means.std(0, ddof=1) / math.sqrt(n)
    mean = means.mean(0)
    return {"mean": mean.round(4).tolist(), "ci95": half_width.round(4).tolist()}


def measured(rows, alphabets):
    """What `evaluate` returned -> measures, each with an interval.

    "accuracy", "accuracy_inductive": after the last step. "curve": training losses before each step. "after":
    accuracies after several numbers of steps. "loss": the mean of the curve.
    """
    losses, accuracies, inductive = rows
    return {
        "accuracy": summary(accuracies[:, -1], alphabets),
        "accuracy_inductive": summary(inductive, alphabets),
        "loss": summary(losses.mean(1), alphabets),
        "curve": summary(losses, alphabets),
        "after": {"steps": marks(losses.shape[1])} | summary(accuracies, alphabets),
    }


def gradient_norm(params, part):
    """Euclidean norm of the gradient of one part of the parameters."""
    norms = [w.grad.norm() for w in group(params, part).values()]
    return math.hypot(*norms)


def size(params, part):
    """Number of parameters in one part of them."""
    return sum(w.numel() for w in group(params, part).values())


def train(params, args, run):
    """Take --iterations steps on the mean outer loss of --meta-batch tasks, from where the run left off."""
    T = args.meta_batch
    optimizer = OPTIMISERS[args.outer](params.values(), lr=args.lr, fused=True)
    run.restore(optimizer)
    episodes = Alphabets.of(args, "train")
    held_out = Alphabets.of(args, "val") if args.val_every else None

    def validate():
        rows = evaluate(params, held_out, args.val_tasks, args)
        return measured(rows, held_out.alphabets(0, args.val_tasks))

    for iteration in run.iterations():
        if args.lr_halve_every:
            optimizer.param_groups[0]["lr"] = args.lr * 0.5 ** (iteration // args.lr_halve_every)
        batch = episodes.tasks(first=iteration * T, count=T)

        optimizer.zero_grad()
        losses, accuracies = run_tasks(params, batch, args, args.device != "cpu")
        optimizer.step()

        run.observe(torch.stack([losses, accuracies]).mean(1))
        if run.log_now():
            loss, accuracy = run.observed().mean(0).tolist()
            norms = {part: gradient_norm(params, part) for part in PARTS}
            values = {"loss": loss, "accuracy": accuracy, "gradient_norm": norms}
            shown = {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.1f}%"}
            run.log(values | {"synthetic": args.synthetic}, shown, validate)
        run.save(params, optimizer)


def measure(params, test, args, run):
    """Evaluate on the test tasks and write result.json -> its content."""
    rows = evaluate(params, test, args.test_tasks, args)
    losses, accuracies, inductive = rows
    alphabets = test.alphabets(0, args.test_tasks)
    return run.write_result(
        {
            "modes": args.modes,
            "ways": args.ways,
            "shots": args.shots,
            "synthetic": args.synthetic,
            "protocol": PROTOCOLS,
            "tasks_sha256": test.sha256(args.test_tasks),
            "data": test.folders,
            **measured(rows, alphabets),
            "parameters": {part: size(params, part) for part in PARTS},
            "per_task": accuracies[:, -1].tolist(),
            "per_task_inductive": inductive.tolist(),
            "per_task_loss": losses.mean(1).round(4).tolist(),
            "per_task_alphabet": alphabets.tolist(),
            "alphabets": test.names,
        }
    )


def report(result, args):
    """Print what was measured, under which protocol, with its interval."""
    least, most = args.shots
    setting = f"{args.ways}-way, {least} to {most} shots, {args.image_size} px"
    tasks = f"{args.test_tasks} test tasks of {len(result['alphabets'])} alphabets"
    training = f"{result['iterations']} iterations of {result['seconds_per_iteration']} s"
    print(f"\n{args.title}: {setting}, {tasks}, after {training}")
    inductive = "{mean:.2f} +- {ci95:.2f}".format(**result["accuracy_inductive"])
    paper = "{mean:.2f} +- {ci95:.2f}".format(**result["accuracy"])
    print(f"accuracy in % after {args.test_steps} steps on held-out drawings:", end=" ")
    print(f"inductive {inductive}, paper protocol {paper}")
    after = result["after"]
    losses = [result["curve"]["mean"][k - 1] for k in after["steps"]]
    shown = [f"{x:8.3f}" if x < 1000 else f"{x:8.1e}" for x in losses]
    print("steps             " + "".join(f"{k:8}" for k in after["steps"]))
    print("accuracy after    " + "".join(f"{x:8.2f}" for x in after["mean"]))
    print("loss of last batch" + "".join(shown) + "    (before its step)")


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


SHOTS_NAMES = ("LEAST", "MOST")
SHOTS_HELP = "training drawings per class, any number from LEAST to MOST (P: 1 to 25; L: 15 15)"
STEPS_HELP = f"K, inner steps in training (L: 100, MAML 5): {column(0)}"
ALPHA_HELP = f"their size (L: 0.1): {column(1)}"
ADAPT_HELP = f"layers that the steps change, such as conv4 head, or all. Defaults: {column(2)}"
ONE_HELP = "ModGrad's M starts near 1 (M = 1 is MAML), not near 0 as in its code"
OUTER_HELP = f"outer optimiser (P: adam; L: sgd): {column(3)}"
LR_HELP = f"its learning rate (P: 1e-3; L: 0.1, FOMAML and MAML 0.5): {column(4)}"


def get_args(argv=None):
    """Read the command line -> args. `title`, `variant` and `method` are worked out from it."""
    p = new_parser(__doc__, "P: the paper's value; L: that of LEAP's code.")
    add_algorithm_flags(p)
    p.add_argument("--seed", type=int, default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-steps", type=int, default=100, help="steps in testing (L: 100)")
    p.add_argument("--test-tasks", type=int, default=100, help="over all alphabets (L: 1 from each of 10)")
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=22, help="over all alphabets together")
    add_data_flags(p, synthetic="procedural characters in invented alphabets: no download")
    add_device_flags(p, precision="bf16: the network's convolutions only")
    add_run_flags(p, QUICK)
    args, defaults = parse(p, argv, QUICK)
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    args.method = METHODS[args.algorithm]
    usual = zip(("steps", "alpha", "adapt", "outer", "lr"), DEFAULTS[args.algorithm])
    fill(args, defaults, dict(usual))
    check(args)
    reset_unused(args, defaults, UNUSED[args.algorithm])
    if args.adapt != defaults["adapt"]:
        args.method += f" on {'+'.join(args.adapt)}"
    data = f"SYNTHETIC {args.modes[0]}" if args.synthetic else args.modes[0]
    shown = ("adapt", "ways", "shots", "image_size", "seed", "synthetic")
    complete(args, defaults, data, shown, named=("modes", "algorithm"), least={"image_size": 16})
    return args


def add_algorithm_flags(p):
    """Add the flags that decide what is learned."""
    p.add_argument("--algorithm", default="modgrad", choices=METHODS, help="inner step and outer loss")
    p.add_argument(
        "--modes", nargs=1, default=["omniglot"], metavar="MODE", help="has alphabets (P, L: omniglot)"
    )
    p.add_argument("--ways", type=int, default=20, help="N, characters of an alphabet in a task (P, L: 20)")
    p.add_argument("--shots", type=int, nargs=2, metavar=SHOTS_NAMES, help=SHOTS_HELP)
    p.set_defaults(shots=[1, 15])
    p.add_argument("--queries", type=int, default=5, help="Q, held-out drawings per class (L: 5)")
    p.add_argument("--batch", type=int, default=20, help="B, images per step (L: 20)")
    p.add_argument("--image-size", type=int, default=28, help="S, pixels (L: 28)")
    p.add_argument("--channels", type=int, default=64, help="of each layer (L: 64)")
    p.add_argument("--steps", type=int, help=STEPS_HELP)
    p.add_argument("--alpha", type=float, help=ALPHA_HELP)
    p.add_argument("--adapt", nargs="+", metavar="LAYER", help=ADAPT_HELP)
    p.add_argument("--rank", type=int, default=5, help="u, columns that are mixed in a cell (P: 5 elsewhere)")
    p.add_argument("--context", type=int, default=300, help="length of v (P: 300 elsewhere)")
    p.add_argument("--start-at-one", action="store_true", help=ONE_HELP)
    p.add_argument(
        "--inner-clip", type=float, default=20.0, help="bound on the entries of inner gradients (L: none)"
    )
    p.add_argument("--first-order", action="store_true", help="hold inner gradients constant (as fomaml)")
    p.add_argument("--meta-batch", type=int, default=20, help="T, tasks per iteration (L: 20)")
    p.add_argument("--iterations", type=int, default=1000, help="updates (L: 1,000)")
    p.add_argument("--outer", choices=("adam", "sgd"), help=OUTER_HELP)
    p.add_argument("--lr", type=float, help=LR_HELP)
    p.add_argument("--lr-halve-every", type=int, default=0, help="iterations; 0 is never")


def check(args):
    """Exit if flags contradict each other."""
    if args.algorithm == "reptile" and args.adapt != ["all"]:
        fail(
            "--algorithm reptile --adapt: what its steps do not change would never be trained: leave --adapt out"
        )
    if args.algorithm == "modgrad" and "all" in args.adapt:
        fail(
            "--algorithm modgrad --adapt all: a cell is for kernels and biases; name the layers, as conv3 conv4 head"
        )
    for layer in args.adapt:
        if layer not in ("all", *LAYERS, "head"):
            fail(f"--adapt {layer}: no such layer; give all, or some of {' '.join(LAYERS)} head")
    least, most = args.shots
    if not 1 <= least <= most:
        fail(f"--shots {least} {most}: give two numbers of 1 or more, the smaller one first")


def main():
    args = get_args()
    test = Alphabets.of(args, "test")
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
