"""Attentive feature reuse: a network that weights its own feature maps, task by task. AM and P-AM; and MAML and ANIL.

Paper: Lekkala and Itti: Attentive Feature Reuse for Multi Task Meta learning, 2020, arXiv:2006.07438.

The idea. Several *high-level tasks* (classify, estimate depth, normals, a vanishing point) share one backbone, and each
has a head of its own. A *subtask* is a few-shot problem within one of them: classes never seen, or a domain never seen.
ANIL adapts the head alone to a subtask (Eq. 2). The attention module h looks at the support set as the backbone sees
it, and at its labels, and says which feature maps this subtask does not need:
    w = h(x, y)          activations of every block <- (1 - w) * activations, in a second forward pass
The backbone learns from the pass without w (Eq. 4), h from the pass with it (Eq. 5), in which the backbone is held fixed.
P-AM makes w a Gaussian. In training w is drawn from q, the Gaussian that h makes of the query set and its labels; and a
KL divergence pulls q and p, the Gaussian that h makes of the support set, together. At test w is the mean of p.

    paper          here                        shape or keys                     where
    Phi            group(params, "backbone")   conv{l} norm{l}                   B = 4 blocks of C filters
    theta_j, g_j   head.{task}.*, predict      linear, or a decoder              a head for each of --tasks
    Psi_j, h_j     attention.{task}.*          B*C outputs, P-AM twice as many   an attention module for each of --tasks
    x, x-bar       embed(...)                  (n, C, S/16, S/16)                f(I) and f(I, 1 - w)
    w, z_w         w                           (B, C)                            Section 4.2
    alpha          --alpha                     a number for each of --tasks      Eq. 2
    beta, gamma    --lr, --attention-lr        Adam's                            Eq. 4, 5
    D_train/test   task.support_*, .query_*    (n, 3, S, S) ...                  the paper's "train" and "test" of a subtask

Read it beside modgrad.py: there the gradient is weighted, here the feature maps.
Run:  python afr.py --synthetic --quick     about two minutes on two CPU cores, no download; prints accuracies
      python afr.py --tasks classification depth normals vanishing --modes scenes        ray-cast scenes, no download
      python -m tools.attention_report RUN        the paper's Figure 3, of a finished run

What the paper leaves open, and the reason for each value of ours: docs/protocol.md, "Attentive feature reuse".
Left out: BMAML, EMAML and the other rows that Table 2 takes from other papers; the MMT (multi meta-task) data, never released.
"""

import argparse
import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    Episodes,
    Run,
    Scenes,
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
    reset_unused,
    student,
)

KINDS = ("classification", "depth", "normals", "vanishing")  # high-level tasks
METHODS = {
    ("maml", "none"): "MAML",
    ("anil", "none"): "ANIL",
    ("anil", "am"): "AM",
    ("anil", "pam"): "P-AM",
}
PARTS = ("backbone", "head", "attention")  # of the parameters
PROTOCOLS = {
    "paper": "BatchNorm statistics of the query images together, as in the papers' numbers",
    "inductive": "BatchNorm statistics of the support images, in the adapted network (NIL: before it adapts)",
}
KEYS = ("accuracy", "accuracy_inductive", "nil_or_error", "nil_or_error_inductive")  # see `measures`
PER_TASK = ("per_task", "per_task_inductive", "per_task_nil_or_error", "per_task_nil_or_error_inductive")
QUICK = {"image_size": 28, "iterations": 250, "test_tasks": 240}
ALPHA = {"classification": 0.1, "depth": 0.01, "normals": 0.003, "vanishing": 0.001}  # of the head alone
LOSS_WEIGHTS = {"classification": 1.0, "depth": 10.0, "normals": 10.0, "vanishing": 10.0}
DECODER = {"depth": (4, 1), "normals": (8, 3)}  # filters of a decoder's blocks, channels of its output
LEAST = {"image_size": 16, "attention_blocks": 1, "attention_width": 1}  # smallest values of these flags
LABEL_FILTERS = 4  # of the CNN that makes a vector of a label image


# ----------------------------------------------------------------------------------------------------- tasks


class MetaTasks:
    """Subtasks of J high-level tasks, which take turns: task g is subtask g // J of high-level task g mod J.

    args: the flags; args.tasks: J of KINDS; split: as for `Episodes`. `domains`: {kind: number of domains that take turns}.
    """

    def __init__(self, args, split):
        self.split = split
        self.samplers = []
        self.domains = {}
        self.contents = {}  # of each mode: a hash of its images
        folders = []
        for kind in args.tasks:
            if kind == "classification":
                sampler = Episodes.of(args, split)
            else:
                sampler = Scenes(kind, args, split)
                self.domains[kind] = len(sampler.counts)
            self.samplers.append(sampler)
            folders += sampler.folders
            self.contents |= sampler.contents
        self.folders = list(dict.fromkeys(folders))

    def tasks(self, first, count):
        """Tasks first to first + count - 1 -> a batch (a Task) for each high-level task; both numbers are multiples of J."""
        J = len(self.samplers)
        return [sampler.tasks(first // J, count // J) for sampler in self.samplers]

    def sha256(self, count):
        """A hash of the first `count` tasks; for a single high-level task, its sampler's hash."""
        share = count // len(self.samplers)
        hashes = [sampler.sha256(share) for sampler in self.samplers]
        if len(hashes) == 1:
            return hashes[0]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- network
# Pure functions of a flat dict of tensors. `norm` is BatchNorm: a call names the layer (see Norm).


class Norm:
    """BatchNorm for one forward pass: with the statistics of the batch x itself, which `used` keeps, or with `stats`.

    Scale and shift come after torch.native_batch_norm: inside it, torch 2.13's vmap gets second derivatives wrong.
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


def conv(params, name, x):
    """A 3x3 convolution that keeps the size: x (n, C_in, S, S) -> (n, C_out, S, S)."""
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    return F.conv2d(x, W, b, padding=1).to(W.dtype)  # bf16, if chosen, ends here


def linear(params, name, x):
    """A linear layer: x (..., n_in) -> (..., n_out), always in float32: bf16 is for convolutions."""
    W, b = params[f"{name}.weight"], params[f"{name}.bias"]
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(W.dtype), W, b)


def embed(params, x, norm, w=None):
    """f_Phi(I, 1 - w): images (n, 3, S, S), w (B, C) or None for 0 -> activations of the last block (n, C, S/16, S/16).

    1 - w scales the input of the next block's convolution. The BatchNorm after that cancels a positive factor that all maps of
    a block have in common, so only ratios of 1 - w count. (No block follows the last one.)
    """
    for l in (1, 2, 3, 4):
        x = conv(params, f"conv{l}", x)
        x = norm(params, f"norm{l}", x)
        x = F.relu(F.max_pool2d(x, 2))  # pooled first, so that ReLU sees a quarter of the numbers
        if w is not None:
            x = x * (1 - w[l - 1])[:, None, None]
    return x


def predict(params, kind, x, args):
    """g_theta: activations (n, C, s, s) -> logits (n, N), vanishing points (n, 2), depth (n, 1, S, S) or normals (n, 3, S, S)."""
    if kind not in DECODER:
        return linear(params, f"head.{kind}", x.flatten(1))
    for i, halvings in enumerate((3, 2, 1, 0), 1):  # back up the sizes that the backbone went down
        W, b = params[f"head.{kind}.up{i}.weight"], params[f"head.{kind}.up{i}.bias"]
        odd = (args.image_size >> halvings) - 2 * x.shape[-1]  # 1 if pooling dropped a row, else 0
        x = F.conv_transpose2d(x, W, b, stride=2, output_padding=odd)
        x = F.leaky_relu(x.to(W.dtype), 0.1)
        x = conv(params, f"head.{kind}.conv{i}", x)
        if halvings:
            x = F.leaky_relu(x, 0.1)
    return x


def label_vectors(params, kind, y, args):
    """Labels as vectors for h: one-hot (n, N), the vanishing point (n, 2), or a CNN's vector (n, F) of a label image."""
    if kind == "classification":
        classes = torch.arange(args.ways, device=y.device)
        return (y[:, None] == classes).to(params["conv1.weight"].dtype)
    if kind == "vanishing":
        return y
    y = y.clamp(min=0)  # -1 means not known
    for i in (1, 2, 3):
        y = conv(params, f"attention.{kind}.label{i}", y)
        y = F.max_pool2d(F.leaky_relu(y, 0.1), 2)
    return y.mean((2, 3))


def attention(params, kind, x, y, args):
    """h_Psi: embeddings (n, C, s, s) and labels of n samples -> w (1, B, C); P-AM: mean and log deviation (2, B, C).

    Blocks of dot-product attention (Vaswani et al., 2017) among the samples; each block feeds the next.
    The order of the samples does not matter.
    """
    name = f"attention.{kind}"
    if args.embed == "constant":  # blind to the subtask
        return params[f"{name}.out.bias"].view(-1, 4, args.filters)
    labels = label_vectors(params, kind, y, args)
    tokens = torch.cat([x.mean((2, 3)), labels], 1)  # (n, C + label width)
    for i in range(1, args.attention_blocks + 1):
        q = linear(params, f"{name}.block{i}.query", tokens)
        k = linear(params, f"{name}.block{i}.key", tokens)
        v = linear(params, f"{name}.block{i}.value", tokens)
        with torch.autocast(x.device.type, enabled=False):
            scores = q @ k.T / math.sqrt(args.attention_width)  # (n, n)
            tokens = F.relu(scores.softmax(1) @ v)  # (n, width)
    w = linear(params, f"{name}.out", tokens.mean(0))
    return w.view(-1, 4, args.filters)


def group(params, name):
    """One part of all parameters: "backbone" (Phi), "head" (theta) or "attention" (Psi)."""
    found = {}
    for key, w in params.items():
        first, _, rest = key.partition(".")
        if first == name:
            found[rest] = w
        elif name == "backbone" and first not in ("head", "attention"):
            found[key] = w
    return found


class Draw:
    """Draws layers into a dict of parameters, from one generator."""

    def __init__(self, params, seed):
        self.params = params
        self.rng = torch.Generator().manual_seed(seed)

    def default(self, name, *shape):
        """Like PyTorch's own layers: uniform within +-1 / sqrt(number of inputs)."""
        root = math.sqrt(math.prod(shape[1:]))
        weight = torch.rand(shape, generator=self.rng)
        bias = torch.rand(shape[0], generator=self.rng)
        self.params[f"{name}.weight"] = (2 * weight - 1) / root
        self.params[f"{name}.bias"] = (2 * bias - 1) / root

    def xavier(self, name, *shape):
        """Uniform by Xavier's rule, zero bias."""
        weight = torch.empty(shape)
        self.params[f"{name}.weight"] = torch.nn.init.xavier_uniform_(weight, generator=self.rng)
        self.params[f"{name}.bias"] = torch.zeros(shape[0])

    def he(self, name, *shape, inputs=None, outputs=None):
        """Normal with variance 2 / inputs, zero bias."""
        inputs = inputs or math.prod(shape[1:])
        weight = torch.randn(shape, generator=self.rng)
        self.params[f"{name}.weight"] = math.sqrt(2 / inputs) * weight
        self.params[f"{name}.bias"] = torch.zeros(outputs or shape[0])

    def start_small(self, name, scale):
        """Scale a layer's kernels down, and set its bias to 0.5."""
        self.params[f"{name}.weight"] *= scale
        self.params[f"{name}.bias"] = torch.full_like(self.params[f"{name}.bias"], 0.5)


def init_params(args):
    """Draw all parameters from the seed -> flat dict. A backbone or a head is the same whatever else there is."""
    params = {}
    draw = Draw(params, args.seed)
    widths = [3] + [args.filters] * 4
    for l in (1, 2, 3, 4):
        draw.xavier(f"conv{l}", widths[l], widths[l - 1], 3, 3)
        params[f"norm{l}.scale"] = torch.ones(widths[l])
        params[f"norm{l}.shift"] = torch.zeros(widths[l])
    for kind in args.tasks:  # each has a generator of its own, which differs from seed to seed
        draw = Draw(params, 1_000_003 * args.seed + 1 + KINDS.index(kind))
        init_head(draw, kind, args)
        if args.modulation != "none":
            init_attention(draw, kind, args)
    for key, w in params.items():
        if w.dim() == 4:  # convolutions are fastest with channels last
            params[key] = w.to(memory_format=torch.channels_last)
    return params


def init_head(draw, kind, args):
    """Add the head of a high-level task. Regressions start in the middle of their labels' range: see docs/protocol.md."""
    name = f"head.{kind}"
    if kind in DECODER:
        filters, channels = DECODER[kind]
        inputs = args.filters
        for i in (1, 2, 3, 4):  # kernels 2x2, stride 2: an output pixel sees one input pixel
            draw.he(f"{name}.up{i}", inputs, filters, 2, 2, inputs=inputs, outputs=filters)
            draw.he(f"{name}.conv{i}", filters if i < 4 else channels, filters, 3, 3)
            inputs = filters
        draw.start_small(f"{name}.conv4", 0.2)
        return
    outputs = args.ways if kind == "classification" else 2
    draw.xavier(name, outputs, args.filters * (args.image_size // 16) ** 2)
    if kind == "vanishing":
        draw.start_small(name, 0.05)


def init_attention(draw, kind, args):
    """Add the attention module of a high-level task. The weights of its last layer start at zero, and so does w's mean."""
    name = f"attention.{kind}"
    maps = 4 * args.filters
    bias = torch.zeros(maps)
    if args.modulation == "pam":  # a deviation of 0.1
        log_deviation = torch.full((maps,), math.log(0.1))
        bias = torch.cat([bias, log_deviation])
    draw.params[f"{name}.out.bias"] = bias
    if args.embed == "constant":
        return
    if kind in DECODER:
        _, channels = DECODER[kind]
        for i in (1, 2, 3):
            draw.he(f"{name}.label{i}", LABEL_FILTERS, channels, 3, 3)
            channels = LABEL_FILTERS
    label_width = {"classification": args.ways, "vanishing": 2}
    width = args.filters + label_width.get(kind, LABEL_FILTERS)
    for i in range(1, args.attention_blocks + 1):
        for part in ("query", "key", "value"):
            draw.default(f"{name}.block{i}.{part}", args.attention_width, width)
        width = args.attention_width
    draw.params[f"{name}.out.weight"] = torch.zeros(len(bias), width)


# ------------------------------------------------------------------------------------------------- algorithm


def criterion(kind, outputs, y):
    """Cross-entropy for classification, else the mean squared error over what is known of the labels (-1 is not)."""
    if kind == "classification":
        return F.cross_entropy(outputs, y)
    known = (y >= 0).to(outputs.dtype)
    error = (outputs - y).square()
    return (error * known).sum() / known.sum().clamp(min=1)


def gaussian_kl(q, p):
    """KL[q || p] of Gaussians with independent entries, each given as mean and log deviation (2, ...)."""
    mean_q, log_q = q
    mean_p, log_p = p
    spread = (2 * log_q).exp() + (mean_q - mean_p).square()
    variance_p = (2 * log_p).exp()
    return (log_p - log_q + spread / (2 * variance_p) - 0.5).sum()


def adapt(params, task, args, kind, w=None):
    """theta' <- theta - alpha * gradient(theta) on the support set (Eq. 2); with --algorithm maml, Phi as well (Eq. 1).

    Returns all parameters, adapted; and, where the backbone does not move, the support embeddings f(I, 1 - w), else None.
    """
    deep = args.algorithm == "maml"
    alpha = args.alpha[args.tasks.index(kind)]
    x = None if deep else embed(params, task.support_x, Norm(), w)
    adapted = {k: v for k, v in params.items() if moves(k, kind, deep)}

    def support_loss(adapted):
        network = params | adapted
        embedding = embed(network, task.support_x, Norm(), w) if deep else x
        return criterion(kind, predict(network, kind, embedding, args), task.support_y)

    for _ in range(args.steps):
        gradient = torch.func.grad(support_loss)(adapted)
        stepped = {}
        for key, g in gradient.items():
            if args.first_order:
                g = g.detach()
            g = g.clamp(-args.inner_clip, args.inner_clip)
            stepped[key] = adapted[key] - alpha * g
        adapted = stepped
    return params | adapted, x


def moves(key, kind, deep):
    """Whether the inner loop changes a parameter: one of this task's head, or, if `deep`, one of no head."""
    return key.startswith(f"head.{kind}.") if key.startswith("head.") else deep


def task_loss(params, task, args, kind, epsilon=None):
    """ONE subtask of the high-level task `kind`, in training. epsilon (B, C): what P-AM draws from N(0, 1).

    Returns the loss () and the query outputs, which in P-AM depend on the query labels through w. The loss adds two
    passes: Phi and theta learn from the one without w, Psi from the one with w (and from P-AM's KL). Only
    classification has an inner loop in training (Fig. 4b).
    """

    def inner(params, w=None):
        if kind == "classification":
            return adapt(params, task, args, kind, w)
        return params, None

    weight = args.loss_weights[args.tasks.index(kind)]
    adapted, x = inner(params)  # theta'; x = f(I), (N*K, C, s, s)
    query = embed(adapted, task.query_x, Norm())  # (N*Q, C, s, s)
    outputs = predict(adapted, kind, query, args)
    loss = criterion(kind, outputs, task.query_y)  # Eq. 3, 4: of Phi and theta
    if args.modulation == "none":
        return weight * loss, outputs

    kl = 0.0
    psi = {k: value for k, value in params.items() if k.startswith("attention.")}
    only_psi = {k: value.detach() for k, value in params.items()} | psi  # the rest is held constant
    if x is None:
        x = embed(only_psi, task.support_x, Norm())
    prior = attention(params, kind, x.detach(), task.support_y, args)  # w = h(x, y), or p(z)
    w = prior[0]  # (B, C)
    if args.modulation == "pam":
        posterior = attention(params, kind, query.detach(), task.query_y, args)  # q(z)
        w = posterior[0] + posterior[1].exp() * epsilon
        kl = args.kl_weight * gaussian_kl(posterior, prior) / len(query)
    adapted, _ = inner(only_psi, w if args.head == "modulated" else None)
    query = embed(adapted, task.query_x, Norm(), w)  # x-bar = f(I, 1 - w)
    outputs = predict(adapted, kind, query, args)
    loss = loss + criterion(kind, outputs, task.query_y)  # Eq. 5: of Psi
    return weight * loss + kl, outputs


def outputs_of_test(params, task, args, kind, w=None):
    """ONE subtask in testing (Fig. 4c, 4e): w, unless given, is made from the support set. Then the inner loop adapts.

    Returns query outputs by both protocols; for classification also those of NIL, by the parameters before the inner loop.
    """
    if args.modulation != "none" and w is None:
        x = embed(params, task.support_x, Norm())
        w = attention(params, kind, x, task.support_y, args)[0]  # of P-AM: the mean of p(z)
    adapted, _ = adapt(params, task, args, kind, w if args.head == "modulated" else None)
    _, *queries = embeddings(adapted, task, w)
    outputs = [predict(adapted, kind, query, args) for query in queries]
    if kind == "classification":
        x, *queries = embeddings(params, task, w)
        outputs += [nil(x, query, task.support_y, args) for query in queries]
    return outputs


def embeddings(params, task, w=None):
    """Embeddings of the support images; of the query images by their own BatchNorm statistics; and by the support's."""
    norm = Norm()
    x = embed(params, task.support_x, norm, w)
    paper = embed(params, task.query_x, Norm(), w)
    inductive = embed(params, task.query_x, Norm(norm.used), w)
    return x, paper, inductive


def nil(x, query, y, args):
    """No inner loop, no head (Raghu et al., ICLR 2020): a class's score is a query's mean cosine with its support images."""
    x = F.normalize(x.flatten(1), dim=1)
    query = F.normalize(query.flatten(1), dim=1)
    classes = torch.arange(args.ways, device=y.device)
    members = (y[:, None] == classes).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return query @ x.T @ members / members.sum(0)  # (N*Q, N)


def measures(kind, outputs, y):
    """Measure query outputs: in training one tensor of them; in testing one for each protocol, then NIL's.

    Classification: the accuracy of each, in %. Regression: the share within 1e-3 of the label, in %; in testing also 1000
    times the squared error of each.
    """
    if kind == "classification":
        correct = [(x.argmax(-1) == y).float() for x in outputs]
        return [100 * x.mean() for x in correct]
    known = y >= 0
    found = []
    for x in outputs:
        within = ((x - y).abs() <= 1e-3) & known
        count = known.sum().clamp(min=1)
        found.append(100 * within.sum() / count)
    if len(outputs) > 1:
        found += [1000 * criterion(kind, x, y) for x in outputs]
    return found


def draws(number, args):
    """P-AM's epsilon (T, J, B, C) for iteration `number`: from seed and number, so a continued run is the same run."""
    if args.modulation != "pam":
        return None
    seed = 1_000_003 * args.seed + 100 + number  # offsets 1 to 4 are taken: see init_params
    rng = torch.Generator().manual_seed(seed)
    shape = args.meta_batch, len(args.tasks), 4, args.filters
    return torch.randn(shape, generator=rng).to(args.device)


# ---------------------------------------------------------------------------------------- training, evaluation


def run_tasks(params, batches, args, vectorise, evaluate=False, epsilon=None):
    """Run task_loss on the subtasks of each high-level task -> losses (T*J,), measures (T*J, 1), the J tasks taking turns.

    If `evaluate`, outputs_of_test of them: no losses (zeros), measures (T*J, 4), a column for each of KEYS. In training it
    adds to .grad the gradient of the sum over high-level tasks of their mean losses (Eq. 3).
    """
    losses, found = [], []
    for j, (kind, batch) in enumerate(zip(args.tasks, batches)):
        noise = None if epsilon is None else epsilon[:, j]
        run = run_vectorised if vectorise else run_in_threads
        loss, row = run(params, kind, batch, noise, args, evaluate)
        losses.append(loss)
        found.append(row)
    losses = torch.stack(losses, 1)  # (T, J)
    found = torch.stack(found, 1)  # (T, J, 1); if `evaluate` (T, J, 4)
    return losses.flatten(0, 1), found.flatten(0, 1)


def one_task(params, kind, task, noise, args, evaluate):
    """ONE subtask -> its loss (), its measures."""
    device = args.device.split(":")[0]
    with torch.autocast(device, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
        if evaluate:
            loss = torch.zeros((), device=task.query_x.device)
            outputs = outputs_of_test(params, task, args, kind)
        else:
            loss, output = task_loss(params, task, args, kind, noise)
            outputs = [output]
    return loss, torch.stack(measures(kind, outputs, task.query_y))


def run_vectorised(params, kind, batch, noise, args, evaluate):
    """All subtasks of a high-level task at once, by vmap, which fills a GPU -> losses (T,), measures (T, ...)."""

    def one(task, noise):
        return one_task(params, kind, task, noise, args, evaluate)

    in_dims = (0, None if noise is None else 0)
    losses, found = torch.func.vmap(one, in_dims)(batch, noise)
    if not evaluate:
        losses.mean().backward()
    return losses.detach(), found.detach()


def run_in_threads(params, kind, batch, noise, args, evaluate):
    """For the CPU: each subtask in a thread of its own, gradients added in their order -> losses (T,), measures (T, ...)."""
    T = len(batch.mode)
    weights = list(params.values())

    def one(given):
        task, noise = given
        with torch.set_grad_enabled(not evaluate):  # each thread has a switch of its own
            loss, found = one_task(params, kind, task, noise, args, evaluate)
        gradients = () if evaluate else torch.autograd.grad(loss / T, weights, allow_unused=True)
        return loss.detach(), found.detach(), gradients

    losses, found = [], []
    tasks = [type(batch)(*fields) for fields in zip(*batch)]  # task j has entry j of every field
    noises = [None] * T if noise is None else noise
    for loss, measure, gradients in in_threads(one, zip(tasks, noises), args.workers):
        losses.append(loss)
        found.append(measure)
        for w, g in zip(weights, gradients):
            if g is not None:  # other tasks' heads and attention have none
                w.grad = torch.zeros_like(w) if w.grad is None else w.grad
                w.grad += g
    return torch.stack(losses), torch.stack(found)


def evaluate(params, episodes, count, args):
    """Measures of the first `count` tasks -> array (4, count): see KEYS, `measures` and PROTOCOLS."""
    found = []
    step = 20 * len(episodes.samplers)
    starts = range(0, count, step)
    for first in tqdm(starts, desc=f"{episodes.split} tasks, {step} at a time", disable=None, leave=False):
        batches = episodes.tasks(first, min(step, count - first))
        with torch.no_grad():
            _, rows = run_tasks(params, batches, args, args.device != "cpu", evaluate=True)
        found.append(rows)
    columns = torch.cat(found).double().cpu().numpy()
    return columns.T.round(4)


def units(scores, domains):
    """Independent scores for an interval: the tasks'; or the domains' means, because tasks of one domain share images."""
    if domains <= 1:
        return scores
    drawn = range(min(domains, len(scores)))
    means = [scores[d::domains].mean() for d in drawn]
    return np.array(means)


def summary(per_task, modes, domains):
    """Measures of tasks, where data sets, or high-level tasks, take turns -> {"overall" and each mode: {"mean", "ci95"}}.

    Overall is the mean of the modes' means, with +- 1.96 sqrt(sum_m s_m^2 / n_m) / len(modes): modes are strata.
    domains: {mode: how many}, see `units`; a mode with several of them has Student's t in place of 1.96.
    """
    found = {"overall": None}
    means, variances = [], []
    for m, mode in enumerate(modes):
        count = domains.get(mode, 0)
        x = units(per_task[m :: len(modes)], count)
        wider = 1.0
        if count > 1:
            wider = student(len(x)) / 1.96
        means.append(x.mean())
        variances.append(wider**2 * x.var(ddof=1) / len(x))
        found[mode] = interval(means[-1], variances[-1])
    variance = sum(variances) / len(modes) ** 2
    found["overall"] = interval(np.mean(means), variance)
    return found


def interval(mean, variance):
    """A mean and the half width of its 95 % interval."""
    half_width = 1.96 * math.sqrt(variance)
    return {"mean": round(float(mean), 4), "ci95": round(half_width, 4)}


def measured(rows, args, episodes):
    """Measures of tasks, a row for each of KEYS -> {key: summary}, without "overall" if there are several high-level tasks."""
    found = {}
    for key, row in zip(KEYS, rows):
        found[key] = summary(row, args.strata, episodes.domains)
        if len(args.tasks) > 1:
            del found[key]["overall"]
    return found


def gradient_norm(params, part):
    """Euclidean norm of the gradient of one part of the parameters."""
    norms = [w.grad.norm() for w in group(params, part).values()]
    return math.hypot(*norms)


def size(params, part):
    """Number of parameters in one part of them."""
    return sum(w.numel() for w in group(params, part).values())


def backbone_gradients(params, batches, args, epsilon):
    """How hard each high-level task pulls at the shared backbone -> {task: gradient norm there}. Overwrites .grad."""
    found = {}
    for j, kind in enumerate(args.tasks):
        only = {
            "tasks": [kind],
            "alpha": [args.alpha[j]],
            "loss_weights": [args.loss_weights[j]],
        }
        alone = argparse.Namespace(**vars(args) | only)
        noise = epsilon if epsilon is None else epsilon[:, j : j + 1]
        for w in params.values():
            w.grad = None
        batch = batches[j : j + 1]
        run_tasks(params, batch, alone, args.device != "cpu", epsilon=noise)
        found[kind] = gradient_norm(params, "backbone")
    return found


def train(params, args, run):
    """Minimise the loss of --meta-batch subtasks of each high-level task, from where the run left off."""
    count = args.meta_batch * len(args.tasks)  # T*J
    network = [w for k, w in params.items() if not k.startswith("attention.")]
    modules = [w for k, w in params.items() if k.startswith("attention.")]
    groups = [{"params": network}]  # beta
    if modules:
        groups.append({"params": modules})  # gamma
    optimizer = torch.optim.Adam(groups, lr=args.lr, fused=True)
    run.restore(optimizer)
    episodes = MetaTasks(args, "train")
    held_out = MetaTasks(args, "val") if args.val_every else None

    def validate():
        rows = evaluate(params, held_out, args.val_tasks, args)
        return measured(rows, args, held_out)

    for iteration in run.iterations():
        halvings = iteration // args.lr_halve_every if args.lr_halve_every else 0
        for settings, lr in zip(optimizer.param_groups, (args.lr, args.attention_lr)):
            settings["lr"] = lr * 0.5**halvings
        batches = episodes.tasks(first=iteration * count, count=count)
        epsilon = draws(iteration, args)

        optimizer.zero_grad()
        losses, found = run_tasks(params, batches, args, args.device != "cpu", epsilon=epsilon)
        optimizer.step()

        run.observe(torch.stack([losses, found[:, 0]]))
        if run.log_now():
            log(params, batches, epsilon, args, run, validate)
        run.save(params, optimizer)


def log(params, batches, epsilon, args, run, validate):
    """Write a log line: mean loss and measure of each mode or task since the last line, gradient norms."""
    losses, found = run.observed().unbind(1)  # both (iterations, tasks)
    turn = run.turns(losses.shape, len(args.strata))
    each, shown = {}, {}
    for m in turn.unique():  # a short stretch may lack a mode
        name = args.strata[m]
        each[name] = losses[turn == m].mean().item()
        shown[name] = found[turn == m].mean().item()
    norms = {part: gradient_norm(params, part) for part in PARTS}
    balance = {}
    if len(args.tasks) > 1:
        balance = backbone_gradients(params, batches, args, epsilon)
    loss = losses.mean().item()
    values = {
        "loss": loss,
        "losses": each,
        "accuracy": shown,
        "backbone_gradient": balance,
        "gradient_norm": norms,
        "synthetic": args.synthetic,
    }
    bar = {"loss": f"{loss:.3f}"}
    bar |= {name: f"{x:.1f}%" for name, x in shown.items()}
    if balance:
        bar["backbone gradients"] = " ".join(f"{x:.2g}" for x in balance.values())
    run.log(values, bar, validate)


def transfer(params, args):
    """--transfer: evaluate on the test classes of other data sets -> {mode: {"accuracy" and so on, as in result.json}}."""
    found = {}
    for mode in args.transfer:
        i = args.tasks.index("classification")
        only = {
            "modes": [mode],
            "strata": [mode],
            "tasks": ["classification"],
            "alpha": [args.alpha[i]],
        }
        other = argparse.Namespace(**vars(args) | only)
        test = MetaTasks(other, "test")
        rows = evaluate(params, test, args.test_tasks, other)
        found[mode] = {
            **made_of(test, other),
            **measured(rows, other, test),
            **dict(zip(PER_TASK, rows.tolist())),
        }
    return found


def made_of(test, args):
    """What test tasks are made of: a hash of them, and the names of the image folders."""
    return {"tasks_sha256": test.sha256(args.test_tasks), "data": test.folders}


def measure(params, test, args, run):
    """Evaluate on the test tasks and write result.json -> its content."""
    rows = evaluate(params, test, args.test_tasks, args)
    return run.write_result(
        {
            "modes": args.modes,
            "ways": args.ways,
            "shots": args.shots,
            "synthetic": args.synthetic,
            "protocol": PROTOCOLS,
            **made_of(test, args),
            **measured(rows, args, test),
            "strata": args.strata,
            "domains": test.domains,
            "parameters": {part: size(params, part) for part in PARTS},
            **dict(zip(PER_TASK, rows.tolist())),
            "transfer": transfer(params, args),
            "per_task_mode": [j % len(args.strata) for j in range(args.test_tasks)],
        }
    )


def stored(run, test, args):
    """The stored result, if it is of these tasks and transfers; else None."""
    result = run.result(**made_of(test, args))
    return result if result and list(result["transfer"]) == args.transfer else None


def report(result, args):
    """Print what was measured, under which protocols, with intervals."""
    setting = f"{args.ways}-way {args.shots}-shot, {args.image_size} px, {args.test_tasks} test tasks"
    training = f"{result['iterations']} iterations of {result['seconds_per_iteration']} s"
    print(f"\n{args.title}: {setting}, after {training}")
    kinds = dict(zip(args.strata, args.tasks))
    if len(args.tasks) == 1:
        kinds = dict.fromkeys(["overall", *args.strata], args.tasks[0])
    rows = [(name, kinds[name] == "classification", name, result) for name in result["accuracy"]]
    rows += [(f"transfer to {mode}", True, "overall", found) for mode, found in result["transfer"].items()]
    for head, keys, of_classes in (
        ("accuracy in %", KEYS[:2], True),
        ("NIL, accuracy in %", KEYS[2:], True),
        ("% within 1e-3", KEYS[:2], False),
        ("squared error, thousandths", KEYS[2:], False),
    ):
        chosen = [row for row in rows if row[1] == of_classes]
        if chosen:
            print(f"{head:28}{'paper protocol':20}inductive")
        for title, _, name, found in chosen:
            cells = ["{mean:.2f} +- {ci95:.2f}".format(**found[key][name]) for key in keys]
            print(f"{title:28}{cells[0]:20}{cells[1]}")


# ------------------------------------------------------------------------------------------------------ flags

TASKS_HELP = "high-level tasks; several: the paper's multi meta-task"
MODES_HELP = "if --tasks is classification: data sets (default: miniimagenet) or scenes; else scenes (default) or a folder with depth images"
ALPHA_HELP = f"size of the inner steps, for each of --tasks ({ALPHA}; maml: 0.01 for each)"
ALGORITHM_HELP = "what inner steps change: all, or the head"
HEAD_HELP = "in Eq. 5 and at test, the head adapts to maps with w (modulated) or without (plain)"
WEIGHTS_HELP = f"weight of the loss of each of --tasks ({LOSS_WEIGHTS})"
TRANSFER_HELP = "classify the test classes of these data sets too (P: mini-Places)"
EMBED_HELP = "support: w depends on the subtask (P). constant, a control of ours: one learned vector"


def get_args(argv=None):
    """Read the command line -> args. `title`, `variant`, `strata` and `method` are worked out from it."""
    p = new_parser(__doc__, "P: the paper's value. docs/protocol.md has the reasons for ours.")
    add_algorithm_flags(p)
    p.add_argument("--seed", type=int, default=0, help="of parameters, training subtasks, P-AM's draws")
    p.add_argument("--test-tasks", type=int, default=600, help="over all modes or --tasks together")
    p.add_argument("--transfer", nargs="+", default=[], metavar="MODE", help=TRANSFER_HELP)
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=240, help="over all modes or --tasks together")
    add_data_flags(p)
    add_device_flags(p)
    add_run_flags(p, QUICK)
    args, defaults = parse(p, argv, QUICK, presets)
    check_typed(args)
    alone = args.tasks == ["classification"]
    fill(args, defaults, usual(args))
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    args.transfer = [canonical_mode(mode, args.data_root) for mode in args.transfer]
    check(args)
    cast = "scenes" in args.modes
    args.synthetic |= cast  # ray-cast: not real either
    args.method = METHODS[args.algorithm, args.modulation]
    reset_unused(args, defaults, unused(args))
    args.strata = args.modes if alone and not cast else args.tasks  # what results are told apart by
    shown = ("algorithm", "modulation", "modes", "tasks", "ways", "shots", "image_size", "seed", "synthetic")
    named = ("modes", "algorithm", "modulation")
    complete(args, defaults, data_name(args), shown, named, least=LEAST)
    if not alone:
        args.title += f": {'+'.join(args.tasks)}"
    return args


def presets(typed):
    """--quick's iterations, divided by the number of high-level tasks."""
    if not typed.quick:
        return {}
    return {"iterations": QUICK["iterations"] // len(typed.tasks)}


def add_algorithm_flags(p):
    """Add the flags that decide what is learned."""
    p.add_argument("--algorithm", default="anil", choices=("maml", "anil"), help=ALGORITHM_HELP)
    p.add_argument("--modulation", choices=("none", "am", "pam"), help="attention module (am; maml: none)")
    p.add_argument("--tasks", nargs="+", default=["classification"], choices=KINDS, help=TASKS_HELP)
    p.add_argument("--modes", nargs="+", metavar="MODE", help=MODES_HELP)
    p.add_argument("--ways", type=int, default=5, help="N, classes per subtask (P: 5)")
    p.add_argument(
        "--shots", type=int, default=1, help="K, support images per class (regression: N*K in all)"
    )
    p.add_argument("--queries", type=int, default=15, help="Q, queries per class (regression: N*Q in all)")
    p.add_argument("--image-size", type=int, default=84, help="S, pixels")
    p.add_argument("--filters", type=int, default=32, help="C, of each of the four blocks (P: 32 and 64)")
    p.add_argument("--steps", type=int, default=5, help="inner steps; in training for classification only")
    p.add_argument("--alpha", type=float, nargs="+", metavar="A", help=ALPHA_HELP)
    p.add_argument("--inner-clip", type=float, default=20.0, help="bound on each entry of the inner gradient")
    p.add_argument("--first-order", action="store_true", help="leave out second derivatives (P: no)")
    p.add_argument("--head", default="modulated", choices=("modulated", "plain"), help=HEAD_HELP)
    p.add_argument("--embed", default="support", choices=("support", "constant"), help=EMBED_HELP)
    p.add_argument("--attention-blocks", type=int, default=2, help="blocks of query, key and value")
    p.add_argument("--attention-width", type=int, default=16, help="of each block")
    p.add_argument("--kl-weight", type=float, default=1.0, help="of P-AM's KL (P: 1)")
    p.add_argument("--loss-weights", type=float, nargs="+", metavar="L", help=WEIGHTS_HELP)
    p.add_argument("--meta-batch", type=int, default=4, help="T, subtasks of each of --tasks per iteration")
    p.add_argument("--iterations", type=int, default=60000, help="updates")
    p.add_argument("--lr", type=float, default=1e-3, help="beta, Adam's learning rate of backbone and heads")
    p.add_argument("--attention-lr", type=float, default=1e-3, help="gamma, of the attention modules")
    p.add_argument("--lr-halve-every", type=int, default=0, help="iterations; 0 is never")


def usual(args):
    """Defaults, by algorithm and --tasks, of the flags that were not typed."""
    return {
        "modulation": "none" if args.algorithm == "maml" else "am",
        "modes": ["miniimagenet"] if args.tasks == ["classification"] else ["scenes"],
        "alpha": [0.01 if args.algorithm == "maml" else ALPHA[kind] for kind in args.tasks],
        "loss_weights": [LOSS_WEIGHTS[kind] for kind in args.tasks],
    }


def unused(args):
    """Flags that the method does not use."""
    if args.modulation == "none":
        return ["head", "attention_blocks", "attention_width", "attention_lr", "kl_weight"]
    if args.embed == "constant":  # q and p are the same w, so their KL is 0
        return ["attention_blocks", "attention_width", "kl_weight"]
    return ["kl_weight"] if args.modulation == "am" else []


def check_typed(args):
    """Exit if flags as typed contradict each other."""
    if len(set(args.tasks)) < len(args.tasks):
        fail(f"--tasks names one twice: {' '.join(args.tasks)}")
    if args.algorithm == "maml" and args.modulation not in (None, "none"):
        remedy = "the attention modules build on ANIL; leave one of the two flags out"
        fail(f"--algorithm maml --modulation {args.modulation}: {remedy}")


def check(args):
    """Exit if flags contradict each other."""
    tasks = " ".join(args.tasks)
    for key in ("alpha", "loss_weights"):
        values = getattr(args, key)
        if len(values) != len(args.tasks):
            typed = f"--{key.replace('_', '-')} {' '.join(map(str, values))}"
            fail(f"{typed}: give one number for each of --tasks {tasks}")
    for key in ("test_tasks", "val_tasks"):
        count = getattr(args, key)
        if count % len(args.tasks):
            flag = key.replace("_", "-")
            fail(f"--{flag} {count}: give a multiple of {len(args.tasks)}, the number of --tasks")
    cast = "scenes" in args.modes
    if len(args.modes) > 1 and (cast or args.tasks != ["classification"]):
        fail(f"--modes {' '.join(args.modes)}: only classification of photographs has several; give one")
    if args.transfer and "classification" not in args.tasks:
        fail("--transfer is about classification: add it to --tasks")
    if args.transfer and cast:
        fail("--transfer: from ray-cast scenes to another data set is not offered; leave it out")
    if args.embed == "constant" and args.modulation == "none":
        fail("--embed constant is about attention modules: give --modulation am or pam")


def data_name(args):
    """The data sets, and what they are if not real."""
    name = "+".join(args.modes)
    if "scenes" in args.modes:
        return f"RAY-CAST, NOT MMT, {name}"
    return f"SYNTHETIC {name}" if args.synthetic else name


def main():
    args = get_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # run_tasks runs subtasks side by side instead
    test = MetaTasks(args, "test")
    run = Run(args, test)
    params = run.params(init_params(args))
    if run.unfinished:
        train(params, args, run)
    if run.finished():
        report(stored(run, test, args) or measure(params, test, args, run), args)


if __name__ == "__main__":
    main()
