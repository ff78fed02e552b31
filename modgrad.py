"""ModGrad: a second network decides, entry by entry, how far each parameter follows its gradient. And baselines.

Paper: Simon, Koniusz, Nock, Harandi: On Modulating the Gradient for Meta-Learning, ECCV 2020, Sections 3 and 5.1.

The idea. The gradient of a support set of a few images is noisy, and MAML follows all of it alike. ModGrad learns
which parts to follow: in a step, each entry of the gradient has a factor of its own, made for this task,
    theta <- theta - alpha * M(v) * gradient(theta)         M = ReLU(outer(h1 a1, h2 a2))          Eq. 5, 8
M comes from a *cell* per adapted layer. In it two sister networks look at a context v. (A third is for the bias.) Each
makes u columns (h), and, by a softmax, u weights for them (a); h a is their weighted sum. The outer product of the two
sums has as many entries as the layer's kernel. v describes the task. With v = 0 a trial step is made; v is then the
negative gradient, with respect to v, of the loss after that step (Eq. 9): it says how v has to change for the step to
be a better one. So a step of ModGrad takes two forward and two backward passes. M starts near 1e-4, so at first hardly
anything adapts; the released code's cells start in the same way. With --start-at-one M starts near 1: MAML on the same
layers.

    paper          here                        shape or keys                     where
    theta          group(params, "base")       conv{l} norm{l} head              the network
    D_trn, D_val   task.support_*, .query_*    (N*K, 3, S, S) ...                N ways, K shots, Q queries, S pixels
    v              v                           (300,)                            Eq. 9
    phi_1, phi_2   cell                        generator.{layer}.rows, .cols     Eq. 6, 7
    u              --rank                      5                                 Eq. 6
    M              modulation                  like the adapted parameters       Eq. 8
    alpha, K       --alpha, --steps            0.1, 1 (K of Eq. 5, not shots)    Eq. 5

--algorithm also takes the baselines of the paper's Figure 9: MAML, Meta-SGD, CAVIA, T-Net. Their inner steps stand
below, one after another. (LEO, in the paper's Table 1, is left out: it works on the features of a pre-trained network.)
`--algorithm maml --adapt conv3 conv4 --steps 1 --alpha 0.1` is a control that the paper lacks: ModGrad with M = 1.

Read it beside mmaml.py: MAML's inner loop, with other steps in it.
Run:  python modgrad.py --synthetic --quick     about two minutes on two CPU cores, no download; prints accuracies
      python modgrad.py --shots 5 --algorithm maml
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    Episodes,
    Run,
    add_data_flags,
    add_device_flags,
    add_run_flags,
    canonical_mode,
    complete,
    fail,
    fill,
    in_threads,
    new_parser,
    parse,
    read_log,
    read_tensors,
    recorded,
)

METHODS = {"modgrad": "ModGrad", "maml": "MAML", "metasgd": "Meta-SGD", "cavia": "CAVIA", "tnet": "T-Net"}
PARTS = ("base", "encoder", "generator")  # of the parameters; no algorithm here has an encoder
PROTOCOLS = {
    "paper": "BatchNorm statistics of the query images together, as in the papers' numbers",
    "inductive": "BatchNorm statistics of the adapted network on the support images",
}
QUICK = {
    "image_size": 28,
    "channels": 32,
    "iterations": 220,
    "lr_halve_every": 0,
    "test_tasks": 200,
    "val_every": 100,
    "keep_every": 100,
}
# (steps, their size, adapted layers). ModGrad's are its paper's; MAML's are those of its own paper; the others' are
# the usual ones of their papers' mini-ImageNet runs.
DEFAULTS = {
    "modgrad": (1, 0.1, "last two"),
    "maml": (5, 0.01, "all"),
    "metasgd": (1, 0.01, "all"),
    "cavia": (5, 1.0, "context"),
    "tnet": (5, 0.01, "all"),
}
CONTEXT_LAYER = 3  # whose channels CAVIA's context scales and shifts
MEANS = (0.485, 0.456, 0.406)  # ImageNet's, of red, green, blue
DEVIATIONS = (0.229, 0.224, 0.225)


# --------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors. A network is a list of blocks, each a function of (params, name,
# x, norm), whose name says which parameters are its own; the last is the linear head. `norm` is BatchNorm (see Norm).


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
    """A convolution that keeps the size (or halves it, with stride 2): x (n, C_in, S, S) -> (n, C_out, S, S)."""
    W, b = params[f"{name}.weight"], params.get(f"{name}.bias")
    x = F.conv2d(x, W, b, stride, W.shape[-1] // 2)
    transform = params.get(f"generator.{name}.transform")
    if transform is not None:  # T-Net: a 1x1 convolution after each layer's, which no inner step changes
        x = F.conv2d(x, transform)
    return x.to(W.dtype)  # bf16, if chosen, ends here


def linear(params, name, x):
    """A linear layer: x (..., n_in) -> (..., n_out), always in float32: bf16 is for convolutions."""
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(W.dtype), W, b)


def conv4_block(params, name, x, norm):
    """Convolution, BatchNorm, 2x2 max-pool, ReLU: x (n, C_in, S, S) -> (n, C, S/2, S/2)."""
    x = norm(params, name.replace("conv", "norm"), conv(params, name, x))
    if f"{name}.film" in params:  # CAVIA: FiLM made from the context, gamma * x + beta
        gamma, beta = params[f"{name}.film"].chunk(2)
        x = gamma[:, None, None] * x + beta[:, None, None]
    return F.relu(F.max_pool2d(x, 2))  # pooled first, so that ReLU sees a quarter of the numbers


def stem_block(params, name, x, norm):
    """ResNet-34's: 7x7 convolution of stride 2, BatchNorm, ReLU, 3x3 max-pool of stride 2."""
    x = norm(params, f"{name}.norm", conv(params, f"{name}.conv", x, 2))
    return F.max_pool2d(F.relu(x), 3, 2, 1)


def plain_block(params, name, x, norm):
    """Wide ResNet's first: a convolution alone."""
    return conv(params, name, x)


def block_stride(params, name):
    """2 where a stage begins (its first block has a shortcut with a convolution), but not in the first stage."""
    begins = f"{name}.short.weight" in params
    return 2 if begins and name != "stage1.block1" else 1


def basic_block(params, name, x, norm):
    """ResNet's (He et al., CVPR 2016): two 3x3 convolutions, and a shortcut around them."""
    stride = block_stride(params, name)
    y = F.relu(norm(params, f"{name}.norm1", conv(params, f"{name}.conv1", x, stride)))
    y = norm(params, f"{name}.norm2", conv(params, f"{name}.conv2", y))
    if f"{name}.short.weight" in params:
        x = norm(params, f"{name}.normshort", conv(params, f"{name}.short", x, stride))
    return F.relu(x + y)


def wide_block(params, name, x, norm):
    """Wide ResNet's (Zagoruyko and Komodakis, BMVC 2016): BatchNorm and ReLU come before each convolution."""
    stride = block_stride(params, name)
    y = F.relu(norm(params, f"{name}.norm1", x))
    if f"{name}.short.weight" in params:
        x = conv(params, f"{name}.short", y, stride)
    y = F.relu(norm(params, f"{name}.norm2", conv(params, f"{name}.conv1", y, stride)))
    return x + conv(params, f"{name}.conv2", y)


def pool_block(params, name, x, norm):
    """The mean over places, after Wide ResNet's last BatchNorm and ReLU: x (n, C, S, S) -> (n, C)."""
    if f"{name}.scale" in params:
        x = F.relu(norm(params, name, x))
    return x.mean((2, 3))


def head_block(params, name, x, norm):
    """The classifier: features (n, ...) -> logits (n, N)."""
    return linear(params, name, x.flatten(1))


def architecture(args):
    """The blocks -> [(name, function, channels in, channels out), ...]. A convolution's name begins with its block's."""
    if args.backbone == "conv4":
        blocks = [("conv1", conv4_block, 3, args.channels)]
        for l in (2, 3, 4):
            blocks.append((f"conv{l}", conv4_block, args.channels, args.channels))
        features = args.channels * (args.image_size // 16) ** 2
        return [*blocks, ("head", head_block, features, args.ways)]
    if args.backbone == "wrn28-10":
        c = 16
        blocks = [("conv1", plain_block, 3, c)]
        stages = ((160, 4), (320, 4), (640, 4))  # (channels, blocks)
        block = wide_block
    else:
        c = 64
        blocks = [("stem", stem_block, 3, c)]
        stages = ((64, 3), (128, 4), (256, 6), (512, 3))
        block = basic_block
    for s, (width, depth) in enumerate(stages, 1):
        for b in range(1, depth + 1):
            blocks.append((f"stage{s}.block{b}", block, c, width))
            c = width
    return [*blocks, ("norm", pool_block, c, c), ("head", head_block, c, args.ways)]


def layer_shapes(args):
    """Layers that can be adapted, in the order of the forward pass -> {name: shape of its weight}."""
    shapes = {}
    for name, block, c_in, c_out in architecture(args):
        if block in (basic_block, wide_block):
            shapes[f"{name}.conv1"] = (c_out, c_in, 3, 3)
            shapes[f"{name}.conv2"] = (c_out, c_out, 3, 3)
            if c_in != c_out:
                shapes[f"{name}.short"] = (c_out, c_in, 1, 1)
        elif block is head_block:
            shapes[name] = (c_out, c_in)
        elif block is stem_block:
            shapes[f"{name}.conv"] = (c_out, c_in, 7, 7)
        elif block is not pool_block:
            shapes[name] = (c_out, c_in, 3, 3)
    return shapes


def run_blocks(params, x, norm, args, first=0, last=None):
    """Run blocks first .. last - 1 of the network; by default all: images (n, 3, S, S) -> logits (n, N)."""
    for name, block, *_ in architecture(args)[first:last]:
        x = block(params, name, x, norm)
    return x


def normalise(x):
    """Images in [0, 1] -> minus ImageNet's mean, over its standard deviation, per colour."""
    colours = []  # Python floats, because copying a tensor of constants to the GPU would make the host wait
    for colour, mean, deviation in zip(x.unbind(-3), MEANS, DEVIATIONS):
        colours.append((colour - mean) / deviation)
    return torch.stack(colours, -3)


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
    return [k for k in base if k.rsplit(".", 1)[0] in args.adapt]


def factors(args, layer):
    """Sizes (n1, n2) of the two factors whose outer product is M for a layer's weight, of n1 * n2 entries."""
    c_out, c_in, *size = layer_shapes(args)[layer]
    if size == [3, 3] and c_in > 3:
        return 3 * c_out, 3 * c_in  # a 3x3 kernel (C_out, C_in, 3, 3) seen as near-square
    return c_out, c_in * math.prod(size)


def init_params(args):
    """Draw all parameters from the seed -> flat dict. The base network's are the same for every algorithm.

    conv4, the head and the cells start as PyTorch's own layers do, as in ModGrad's released code. The norm of the
    initial kernels matters. BatchNorm makes the network's output independent of it, but not a gradient step: the
    change of a kernel W, relative to its norm, is proportional to 1 / |W|^2. The convolutions of the deep networks
    start as in their authors' code: normal with variance 2 / (C_out * places), and without biases.
    """
    rng = torch.Generator().manual_seed(args.seed)
    params = {}

    def default(name, *shape):
        root = math.sqrt(math.prod(shape[1:]))  # PyTorch's: uniform within 1 / root of the number of inputs
        weight, bias = torch.rand(shape, generator=rng), torch.rand(shape[0], generator=rng)
        params[f"{name}.weight"] = (2 * weight - 1) / root
        params[f"{name}.bias"] = (2 * bias - 1) / root

    def he_normal(name, c_out, c_in, *places):
        std = math.sqrt(2 / (c_out * math.prod(places)))
        params[f"{name}.weight"] = std * torch.randn(c_out, c_in, *places, generator=rng)

    shapes = layer_shapes(args)
    for name, block, c_in, c_out in architecture(args):
        draw = default if block in (conv4_block, head_block) else he_normal
        for layer in shapes:
            if layer == name or layer.startswith(f"{name}."):
                draw(layer, *shapes[layer])
        for norm, c in norms(args, name, block, c_in, c_out):
            params[f"{norm}.scale"] = torch.ones(c)
            params[f"{norm}.shift"] = torch.zeros(c)
    init_generator(params, args, default)
    for key, w in params.items():
        if w.dim() == 4:  # convolutions are fastest with channels last
            params[key] = w.to(memory_format=torch.channels_last)
    return params


def norms(args, name, block, c_in, c_out):
    """BatchNorms of a block -> [(name, channels)]."""
    if block is conv4_block:
        return [(name.replace("conv", "norm"), c_out)]
    if block is stem_block:
        return [(f"{name}.norm", c_out)]
    if block is wide_block:
        return [(f"{name}.norm1", c_in), (f"{name}.norm2", c_out)]
    if block is basic_block:
        found = [(f"{name}.norm1", c_out), (f"{name}.norm2", c_out)]
        if c_in != c_out:
            found.append((f"{name}.normshort", c_out))
        return found
    if block is pool_block and args.backbone == "wrn28-10":
        return [(name, c_out)]
    return []


def init_generator(params, args, default):
    """Add what an algorithm learns besides the network. default(name, *shape) draws a layer as PyTorch does."""
    if args.algorithm == "modgrad":
        for key in adapted_keys(args, params):
            layer, part = key.rsplit(".", 1)
            if part == "weight":  # an outer product of two columns
                rows, cols = factors(args, layer)
                sizes = {"rows": rows, "cols": cols}
            else:  # a bias: one column
                sizes = {part: params[key].numel()}
            for factor, n in sizes.items():
                init_cell(params, args, default, f"generator.{layer}.{factor}", n)
    elif args.algorithm == "metasgd":
        for key in adapted_keys(args, params):
            params[f"generator.{key}"] = torch.full(params[key].shape, args.alpha)
    elif args.algorithm == "cavia":
        default("generator.film", 2 * args.channels, args.context)
        params["generator.film.weight"] *= math.sqrt(3)  # as in CAVIA's code: Kaiming uniform with gain 1
    elif args.algorithm == "tnet":
        for layer, shape in layer_shapes(args).items():
            if len(shape) == 4:
                params[f"generator.{layer}.transform"] = torch.eye(shape[0])[:, :, None, None]


def init_cell(params, args, default, name, n):
    """Add a sister network phi that makes a column (n,): Linear, ReLU, Linear, of the released code's sizes."""
    default(f"{name}.1", n, args.context)
    default(f"{name}.2", args.rank + args.rank * n, n)
    if args.start_at_one:
        params[f"{name}.2.bias"][args.rank :] = 1.0


# ----------------------------------------------------------------------------------------------- inner steps
# Each takes (params, adapted, loss, args, clip): `adapted` holds what the steps so far have made of the parameters
# that adapt, `loss` is the support loss as a function of it, and `clip` bounds a gradient, detaches it with
# --first-order, and adds task_loss's noise, if there is any. Each returns the new `adapted`.


def maml_step(params, adapted, loss, args, clip):
    """theta <- theta - alpha * gradient(theta)                                     (Finn et al., ICML 2017)"""
    gradient = clip(torch.func.grad(loss)(adapted))
    return {k: adapted[k] - args.alpha * gradient[k] for k in adapted}


def metasgd_step(params, adapted, loss, args, clip):
    """theta <- theta - rate * gradient(theta), a learned rate per entry, the same for all tasks (Li et al., 2017)"""
    gradient = clip(torch.func.grad(loss)(adapted))
    return {k: adapted[k] - params[f"generator.{k}"] * gradient[k] for k in adapted}


def cavia_step(params, adapted, loss, args, clip):
    """v <- v - alpha * gradient(v): only a context moves, which scales and shifts channels (Zintgraf, ICML 2019)"""
    gradient = clip(torch.func.grad(loss)(adapted))
    return {"context": adapted["context"] - args.alpha * gradient["context"]}


def tnet_step(params, adapted, loss, args, clip):
    """W <- W - alpha * gradient(W) in layers T W x; T, which is meta-learned, shapes gradients  (Lee and Choi, ICML 2018)"""
    return maml_step(params, adapted, loss, args, clip)


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


STEPS = {
    "modgrad": modgrad_step,
    "maml": maml_step,
    "metasgd": metasgd_step,
    "cavia": cavia_step,
    "tnet": tnet_step,
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


def start(params, args):
    """What inner steps start from: theta^0, the layers in --adapt; for CAVIA, a context of zeros."""
    if args.algorithm == "cavia":
        return {"context": params["generator.film.weight"].new_zeros(args.context)}
    return {k: params[k] for k in adapted_keys(args, params)}


def merged(params, adapted, args):
    """The network's parameters after inner steps; for CAVIA, the scales and shifts that its context makes."""
    if args.algorithm == "cavia":
        film = linear(params, "generator.film", adapted["context"])
        return params | {f"conv{CONTEXT_LAYER}.film": film}
    return params | adapted


def task_loss(params, task, args, evaluate=False, noise=None):
    """ONE task: adapt the layers in --adapt to the support set by --steps inner steps, evaluate on the query set.

    Returns the query loss (), the only training signal of all parameters; the query logits (N*Q, N); and, if
    `evaluate`, the inductive logits. Numbers in comments are lines of Algorithm 1. noise (tools/inspect_gradients.py
    gives it): dict like what is adapted, added to each step's gradient of it.
    """
    support_x, query_x = normalise(task.support_x), normalise(task.query_x)
    adapted = start(params, args)  # 6: theta^0

    # Blocks before the first one that adapts see the same support images in every step, so they run once.
    first = first_moving_block(args, adapted)
    trunk = run_blocks(params, support_x, Norm(), args, 0, first)

    def support_loss(adapted):
        logits = run_blocks(merged(params, adapted, args), trunk, Norm(), args, first)  # (N*K, N)
        return F.cross_entropy(logits, task.support_y)

    def clip(gradient):
        most = args.inner_clip
        gradient = {k: g.clamp(-most, most) for k, g in gradient.items()}
        if args.first_order:
            gradient = {k: g.detach() for k, g in gradient.items()}
        if noise:
            gradient = {k: g + noise[k] for k, g in gradient.items()}
        return gradient

    for _ in range(args.steps):  # 8
        adapted = STEPS[args.algorithm](params, adapted, support_loss, args, clip)  # 9-13

    network = merged(params, adapted, args)
    logits = run_blocks(network, query_x, Norm(), args)  # (N*Q, N)
    loss = F.cross_entropy(logits, task.query_y)  # 16, 17
    if not evaluate:
        return loss, logits
    norm = Norm()
    run_blocks(network, support_x, norm, args)
    inductive = run_blocks(network, query_x, Norm(norm.used), args)
    return loss, logits, inductive


def first_moving_block(args, keys):
    """Number of the first block that an inner step changes."""
    for number, (name, *_) in enumerate(architecture(args)):
        if args.algorithm == "cavia":
            moves = name == f"conv{CONTEXT_LAYER}"
        else:
            moves = any(key.startswith(name) for key in keys)
        if moves:
            return number
    return None  # get_args has made sure that something moves


def augment(batch, number, args):
    """--augment: change the images of training batch `number` at random -> a batch.

    Each image is cropped (to 60 to 100 % of its side), mirrored half the time, and changed in brightness, contrast and
    saturation by up to 40 %: the usual for deep networks since Qiao et al., CVPR 2018 (the paper gives no amounts).
    Drawn from seed and `number`, so that a continued run is the same run.
    """
    seed = 1_000_003 * args.seed + number  # a stride, so that no two seeds draw the same
    rng = torch.Generator().manual_seed(seed)

    def change(x):  # (T, n, 3, S, S)
        images = x.flatten(0, 1)
        amounts = torch.rand(7, len(images), generator=rng)
        crop, right, down, mirror, *jitter = amounts.to(x.device)
        crop = 1 - 0.4 * crop
        zero = torch.zeros_like(crop)
        flip = torch.where(mirror < 0.5, -crop, crop)
        to_right = (2 * right - 1) * (1 - crop)
        to_bottom = (2 * down - 1) * (1 - crop)
        places = torch.stack([flip, zero, to_right, zero, crop, to_bottom], 1)
        grid = F.affine_grid(places.view(-1, 2, 3), images.shape, align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        brightness, contrast, saturation = ((0.6 + 0.8 * amount)[:, None, None, None] for amount in jitter)
        images = images * brightness
        about = ((contrast, (1, 2, 3)), (saturation, 1))  # the image's mean, each pixel's grey
        for strength, axes in about:
            mean = images.mean(axes, keepdim=True)
            images = mean + strength * (images - mean)
        return images.clamp(0, 1).view_as(x)

    return batch._replace(support_x=change(batch.support_x), query_x=change(batch.query_x))


def best_on_validation(test, args):
    """Evaluate on the test tasks those kept parameters whose validation accuracy (paper protocol) is highest.

    Returns what result.json says of them, or None if none were validated. It is reported in addition to the final
    checkpoint, never instead of it.
    """
    out = Path(args.out)
    log = out / "log.jsonl"
    best = None
    for line in read_log(log):
        file = out / f"params-{line['iteration']}.pt"
        if "validation" in line and file.exists():
            accuracy = line["validation"]["paper"]["overall"]["mean"]
            if best is None or accuracy > best[0]:  # the earliest of equals
                best = accuracy, line["iteration"], file
    if best is None:
        return None
    accuracy, iteration, file = best
    try:
        params = {k: w.to(args.device) for k, w in read_tensors(file).items()}
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        remedy = "delete it, and the same command evaluates the best of the others"
        fail(f"{file} is damaged ({type(error).__name__}): {remedy}")
    paper, inductive = evaluate(params, test, args.test_tasks, args)
    return {
        "iteration": iteration,
        "validation": accuracy,
        "accuracy": summary(paper, args.modes),
        "accuracy_inductive": summary(inductive, args.modes),
        "per_task": paper.tolist(),
        "per_task_inductive": inductive.tolist(),
    }


# ---------------------------------------------------------------------------------------- training, evaluation


def run_tasks(params, batch, args, vectorise, evaluate=False):
    """Run task_loss on T tasks -> losses (T,), accuracies in % (T, 1); if `evaluate` (T, 2): paper's, inductive.

    In training it adds the gradient of the mean loss to .grad.
    `vectorise`: all tasks at once, by vmap, which fills a GPU. Else, for the CPU, each task runs in a thread of
    its own, and gradients are added in the order of the tasks.
    """
    T = len(batch.mode)
    weights = list(params.values())
    device = args.device.split(":")[0]

    def one(task):
        with torch.autocast(device, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
            loss, *logits = task_loss(params, task, args, evaluate)
        correct = [(x.argmax(-1) == task.query_y).float() for x in logits]
        return loss, torch.stack([100 * x.mean() for x in correct])

    def one_in_a_thread(task):
        with torch.set_grad_enabled(not evaluate):  # each thread has a switch of its own
            loss, accuracies = one(task)
        gradients = () if evaluate else torch.autograd.grad(loss / T, weights)
        return loss.detach(), accuracies.detach(), gradients

    if vectorise:
        losses, accuracies = torch.func.vmap(one)(batch)
        if not evaluate:
            losses.mean().backward()
        return losses.detach(), accuracies
    losses, accuracies = [], []
    tasks = [type(batch)(*fields) for fields in zip(*batch)]  # task j has entry j of every field
    for loss, accuracy, gradients in in_threads(one_in_a_thread, tasks, args.workers):
        losses.append(loss)
        accuracies.append(accuracy)
        for w, g in zip(weights, gradients):
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
            w.grad += g
    return torch.stack(losses), torch.stack(accuracies)


def evaluate(params, episodes, count, args):
    """Accuracies in % of the first `count` tasks -> array (2, count).

    Row 0 is by the paper's protocol, where a prediction depends on the other queries; row 1 is inductive.
    """
    accuracies = []
    starts = range(0, count, 20)  # 20 tasks at a time: enough to fill a GPU
    for first in tqdm(starts, desc=f"{episodes.split} tasks, 20 at a time", disable=None, leave=False):
        batch = episodes.tasks(first, min(20, count - first))
        with torch.no_grad():
            _, found = run_tasks(params, batch, args, args.device != "cpu", evaluate=True)
        accuracies.append(found)
    return torch.cat(accuracies).T.double().cpu().numpy().round(4)


def summary(per_task, modes):
    """Accuracies of tasks, where modes (data sets) take turns -> {"overall" and each mode: {"mean", "ci95"}}, in %.

    Overall is the mean of the modes' means, with +- 1.96 sqrt(sum_m s_m^2 / n_m) / len(modes): modes are strata.
    """
    found = {"overall": None}
    means, variances = [], []
    for m, mode in enumerate(modes):
        x = per_task[m :: len(modes)]
        means.append(x.mean())
        variances.append(x.var(ddof=1) / len(x))
        found[mode] = interval(means[-1], variances[-1])
    found["overall"] = interval(np.mean(means), sum(variances) / len(modes) ** 2)
    return found


def interval(mean, variance):
    """A mean and the half width of its 95 % interval."""
    half_width = 1.96 * math.sqrt(variance)
    return {"mean": round(float(mean), 4), "ci95": round(half_width, 4)}


def gradient_norm(params, part):
    """Euclidean norm of the gradient of one part of the parameters."""
    norms = [w.grad.norm() for w in group(params, part).values()]
    return math.hypot(*norms)


def size(params, part):
    """Number of parameters in one part of them."""
    return sum(w.numel() for w in group(params, part).values())


def train(params, args, run):
    """Take --iterations Adam steps on the mean query loss of --meta-batch tasks, from where the run left off."""
    T = args.meta_batch
    optimizer = torch.optim.Adam(params.values(), lr=args.lr, fused=True)
    run.restore(optimizer)
    episodes = Episodes.of(args, "train")
    held_out = Episodes.of(args, "val") if args.val_every else None

    def step(batch):
        return run_tasks(params, batch, args, args.device != "cpu")

    def validate():
        rows = evaluate(params, held_out, args.val_tasks, args)
        return {protocol: summary(row, args.modes) for protocol, row in zip(PROTOCOLS, rows)}

    if args.device != "cpu" and not args.eager:
        step = recorded(step, params)
    for iteration in run.iterations():
        if args.lr_halve_every:
            optimizer.param_groups[0]["lr"] = args.lr * 0.5 ** (iteration // args.lr_halve_every)
        batch = episodes.tasks(first=iteration * T, count=T)
        if args.augment:
            batch = augment(batch, iteration, args)

        optimizer.zero_grad()
        losses, accuracies = step(batch)
        optimizer.step()

        run.observe(torch.stack([losses, accuracies[:, 0]]))
        if run.log_now():
            log(params, args, run, validate)
        run.save(params, optimizer)


def log(params, args, run, validate):
    """Write a log line: the mean loss since the last one, the accuracy of each mode, gradient norms."""
    losses, accuracies = run.observed().unbind(1)  # both (iterations, T)
    mode = run.turns(losses.shape, len(args.modes))
    accuracy = {}
    for m in mode.unique():  # a short stretch may lack a mode
        accuracy[args.modes[m]] = accuracies[mode == m].mean().item()
    loss = losses.mean().item()
    norms = {part: gradient_norm(params, part) for part in PARTS}
    values = {"loss": loss, "accuracy": accuracy, "gradient_norm": norms, "synthetic": args.synthetic}
    shown = {"loss": f"{loss:.3f}"} | {name: f"{x:.1f}%" for name, x in accuracy.items()}
    run.log(values, shown, validate)


def measure(params, test, args, run):
    """Evaluate on the test tasks and write result.json -> its content."""
    rows = evaluate(params, test, args.test_tasks, args)
    accuracies = [summary(row, args.modes) for row in rows]
    per_task = rows.tolist()
    return run.write_result(
        {
            "modes": args.modes,
            "ways": args.ways,
            "shots": args.shots,
            "synthetic": args.synthetic,
            "protocol": PROTOCOLS,
            "tasks_sha256": test.sha256(args.test_tasks),
            "data": test.folders,
            "accuracy": accuracies[0],
            "accuracy_inductive": accuracies[1],
            "parameters": {part: size(params, part) for part in PARTS},
            "per_task": per_task[0],
            "per_task_inductive": per_task[1],
            "per_task_mode": [j % len(args.modes) for j in range(args.test_tasks)],
            "best_on_validation": best_on_validation(test, args),
        }
    )


def report(result, args):
    """Print what was measured, under which protocol, with its interval."""
    setting = f"{args.ways}-way {args.shots}-shot, {args.image_size} px, {args.test_tasks} test tasks"
    training = f"{result['iterations']} iterations of {result['seconds_per_iteration']} s"
    print(f"\n{args.title}: {setting}, after {training}")
    print(f"{'accuracy in %':16}{'paper protocol':18}inductive")
    for name, row in result["accuracy"].items():
        both = [row, result["accuracy_inductive"][name]]
        cells = ["{mean:.2f} +- {ci95:.2f}".format(**x) for x in both]
        print(f"{name:16}{cells[0]:18}{cells[1]}")
    if best := result["best_on_validation"]:
        both = [best["accuracy"]["overall"], best["accuracy_inductive"]["overall"]]
        cells = ["{mean:.2f} +- {ci95:.2f}".format(**x) for x in both]
        note = f"overall, after {best['iteration']} iterations: of the kept ones, highest in validation"
        print(f"{'best on val.':16}{cells[0]:18}{cells[1]:18}{note}")


# ------------------------------------------------------------------------------------------------------ flags


def column(i):
    """A column of DEFAULTS for a help text."""
    return ", ".join(f"{algorithm} {row[i]}" for algorithm, row in DEFAULTS.items())


BACKBONES = ("conv4", "resnet34", "wrn28-10")
KEEP_HELP = "iterations between kept copies; the copy best in validation is tested too; 0: none"
MODES_HELP = "omniglot miniimagenet fc100 cub aircraft, or folders of yours under the data root"
STEPS_HELP = f"inner steps (P: 1 for ModGrad): {column(0)}"
ALPHA_HELP = f"their size; of Meta-SGD at the start (P: 0.1 for ModGrad): {column(1)}"
ADAPT_HELP = f"layers that the steps change, such as conv3 conv4 head; all; or 'last two' convolutions. Defaults: {column(2)}"
ONE_HELP = "ModGrad's M starts near 1 (M = 1 is MAML), not near 0 (C: near 0)"
CLIP_HELP = "bound on each entry of the inner gradient (as in MMAML; C: none)"
AUGMENT_HELP = "crop, mirror, recolour training images (P: the deep networks)"


def get_args(argv=None):
    """Read the command line -> args. `title`, `variant` and `method` are worked out from it."""
    p = new_parser(__doc__, "P: the paper's value; C: that of its code.")
    add_algorithm_flags(p)
    p.add_argument("--seed", type=int, default=0, help="of initial parameters and training tasks")
    p.add_argument("--test-tasks", type=int, default=600, help="over all modes together (P: 600)")
    p.add_argument("--val-every", type=int, default=1000, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=200, help="over all modes together")
    add_data_flags(p)
    add_device_flags(p, graph=True)
    add_run_flags(p, QUICK, keep=KEEP_HELP)
    p.set_defaults(keep_every=1000)
    args, defaults = parse(p, argv, QUICK)
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    steps, alpha, adapt = DEFAULTS[args.algorithm]
    context = 100 if args.algorithm == "cavia" else 300
    fill(args, defaults, {"steps": steps, "alpha": alpha, "context": context})
    resolve_layers(args, defaults, adapt)
    args.method = METHODS[args.algorithm]
    if args.adapt != defaults["adapt"]:
        args.method += f" on {'+'.join(args.adapt)}"
    if args.backbone != "conv4":
        args.method += f", {args.backbone}"
    check(args)
    data = "+".join(args.modes)
    if args.synthetic:
        data = f"SYNTHETIC {data}"
    shown = ("algorithm", "backbone", "adapt", "ways", "shots", "image_size", "seed", "synthetic")
    complete(args, defaults, data, shown, named=("modes", "algorithm"), least={"image_size": 16})
    return args


def add_algorithm_flags(p):
    """Add the flags that decide what is learned."""
    p.add_argument("--algorithm", default="modgrad", choices=METHODS, help="the inner step")
    p.add_argument("--modes", nargs="+", default=["miniimagenet"], metavar="MODE", help=MODES_HELP)
    p.add_argument("--ways", type=int, default=5, help="N, classes per task (C: 5)")
    p.add_argument("--shots", type=int, default=1, help="K, support images per class (P, C: 1 and 5)")
    p.add_argument("--queries", type=int, default=15, help="Q, query images per class (C: 15)")
    p.add_argument("--image-size", type=int, default=84, help="S, pixels (C: 84)")
    p.add_argument("--backbone", default="conv4", choices=BACKBONES, help="the network")
    p.add_argument("--channels", type=int, default=64, help="of each layer of conv4 (P: 64)")
    p.add_argument("--steps", type=int, help=STEPS_HELP)
    p.add_argument("--alpha", type=float, help=ALPHA_HELP)
    p.add_argument("--adapt", nargs="+", metavar="LAYER", help=ADAPT_HELP)
    p.add_argument("--rank", type=int, default=5, help="u, columns that are mixed in a ModGrad cell (P: 5)")
    p.add_argument("--start-at-one", action="store_true", help=ONE_HELP)
    p.add_argument("--context", type=int, help="length of v (P: 300), or of CAVIA's context (100)")
    p.add_argument("--inner-clip", type=float, default=20.0, help=CLIP_HELP)
    p.add_argument("--first-order", action="store_true", help="leave out second derivatives (P: no)")
    p.add_argument("--meta-batch", type=int, default=3, help="T, tasks (episodes) per iteration (C: 3)")
    p.add_argument("--iterations", type=int, default=16667, help="updates (C: 16,667, of 3 episodes each)")
    p.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (C: 1e-3)")
    p.add_argument(
        "--lr-halve-every", type=int, default=3333, help="iterations; 0: never (P: 10,000 episodes)"
    )
    p.add_argument("--augment", action="store_true", help=AUGMENT_HELP)


def resolve_layers(args, defaults, usual):
    """Turn --adapt into names of layers. usual: the algorithm's default, a key of `named`."""
    layers = layer_shapes(args)
    kernels = [name for name, shape in layers.items() if len(shape) == 4]
    convolutions = [name for name in kernels if not name.endswith("short")]
    if args.algorithm == "cavia" and args.adapt:
        fail("--algorithm cavia adapts its context alone: leave --adapt out")
    named = {"all": ["all"], "last two": convolutions[-2:], "context": []}
    defaults["adapt"] = named[usual]
    if args.adapt is None:
        args.adapt = named[usual]
    else:
        args.adapt = named.get(" ".join(args.adapt), args.adapt)
    for layer in args.adapt:
        if layer not in ("all", *layers):
            fail(f"--adapt {layer}: no such layer; give all, 'last two', or some of {' '.join(layers)}")


def check(args):
    """Exit if flags contradict each other."""
    if args.algorithm == "cavia" and args.backbone != "conv4":
        remedy = "its context modulates a layer of conv4; choose conv4"
        fail(f"--algorithm cavia --backbone {args.backbone}: {remedy}")
    if not args.adapt and args.algorithm != "cavia":
        fail("--adapt context: only --algorithm cavia adapts a context; name layers, such as conv3 conv4")
    if args.start_at_one and args.algorithm != "modgrad":
        fail(f"--start-at-one --algorithm {args.algorithm}: M is ModGrad's; leave one of them out")
    if args.algorithm == "modgrad" and "all" in args.adapt:
        remedy = "name layers instead, such as conv3 conv4 head"
        fail(f"--algorithm modgrad --adapt all: BatchNorm's scale and shift have no cells; {remedy}")
    if args.keep_every and args.val_every and args.log_every:
        kept_unvalidated = args.keep_every % args.val_every
        if args.val_every % args.log_every or kept_unvalidated:
            typed = (
                f"--keep-every {args.keep_every} --val-every {args.val_every} --log-every {args.log_every}"
            )
            remedy = "make each a multiple of the next, or give --keep-every 0"
            fail(f"{typed}: parameters that are kept must be validated: {remedy}")


def main():
    args = get_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # run_tasks runs tasks side by side instead
    test = Episodes.of(args, "test")
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
