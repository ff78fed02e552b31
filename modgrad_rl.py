"""The ModGrad cell in reinforcement learning: a policy adapts to a new task from 20 trials. And baselines: MAML, CAVIA.

Paper: Simon, Koniusz, Nock, Harandi: On Modulating the Gradient for Meta-Learning, ECCV 2020, Section 5.3, Figure 8.
The protocol is that of MAML (Finn et al., ICML 2017) and CAVIA (Zintgraf et al., ICML 2019).

The idea. A *task* is a goal that the policy is not told: a place to go to, a direction or a speed to run in. The policy
acts (R *rollouts*), sees its rewards, makes an inner step of policy gradient, and acts again. Meta-learning finds
parameters from which that one step helps most. The rollouts before the step are what the support set is in modgrad.py,
and those after it are the query set. Both depend on the policy, so they are drawn anew in every iteration.

Inner step: policy gradient ("vanilla", REINFORCE), with generalised advantages over a linear baseline. Outer step: TRPO
(Schulman et al., ICML 2015), the longest step along the natural gradient that changes the adapted policies by no more
than a bound in KL divergence. The algorithms differ in what the inner step changes, and how:
    modgrad    both hidden layers, by a step whose gradient is modulated entry by entry (see modgrad.py)
    maml       all parameters, the policy's deviation included, by a plain gradient step
    cavia      a context vector beside the observation, from zero, by a plain gradient step

    paper          here                        shape or keys                     where
    theta          group(params, "base")       fc1 fc2 mean log_std              two layers of 100 ReLU units
    D_trn, D_val   before, after               Rollouts: (R, H, ...)             R rollouts of H steps
    v              v                           (128,)                            Eq. 9
    phi_1, phi_2   cell                        generator.{layer}.rows, .cols     Eq. 6, 7
    M              modulation                  like the adapted parameters       Eq. 8
    alpha, K       --alpha, --updates          30, 1                             Eq. 5

Read it beside modgrad.py: the same inner steps, and TRPO where Adam was.
Run:  python modgrad_rl.py --quick                           2D navigation, a minute or two on two CPU cores; prints returns
      python modgrad_rl.py --env cheetah-dir --algorithm maml            needs gymnasium[mujoco], see requirements-dev.txt
      python -m tools.pictures navigation paths.png RUN RUN ...          draws paths before and after adaptation

The paper keeps its RL variant in a supplement that is not public. We chose cells on both hidden layers, v of 128 entries and
u = 5 columns (as in the paper's regression), and a loss for Eq. 9, where v is minus the gradient of the loss after a trial
step with v = 0. This loss uses the rollouts before the step, corrected by the ratio of new to old probabilities, so that
ModGrad needs no more rollouts than the others. The step size is 30, which makes the first steps about as long as MAML's. The
entries of M that are not 0 start at 0.0004 to 0.005 in kernels and at 0.02 in biases, so with the 0.1 of the paper's other
experiments the policy would not move. ReLU applies to the M of kernels only. The M of a bias is no product, and ReLU on it
made line searches fail: at v = 0 it zeroes the same entries in all tasks, and when an outer step makes one of them
positive, v jumps in most tasks.
"""

import argparse
import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    Cheetah,
    Run,
    add_device_flags,
    add_run_flags,
    complete,
    cores,
    fail,
    fill,
    new_parser,
    parse,
    reset_unused,
    uniform,
)

METHODS = {"modgrad": "ModGrad", "maml": "MAML", "cavia": "CAVIA"}
LAYERS = ("fc1", "fc2", "mean")  # and log_std, which has no layer
PARTS = ("base", "encoder", "generator")  # of the parameters; no algorithm here has an encoder
PROTOCOL = (
    "sum of the rewards of a rollout, not discounted: mean over the rollouts of a task, then over tasks"
)
QUICK = {"iterations": 25, "meta_batch": 10, "test_tasks": 40}
# (size of the inner step, adapted layers). CAVIA's are those of its code, MAML's size that of its paper; ModGrad's: see
# above.
DEFAULTS = {"modgrad": (30.0, ["fc1", "fc2"]), "maml": (0.1, ["all"]), "cavia": (1.0, [])}
CHEETAH_ALPHA = {"cavia": 10.0}  # the half-cheetah's step sizes that differ: our choice
LEAST = {
    "fisher_fraction": 1e-6,
    **dict.fromkeys(("rollouts", "horizon", "updates", "test_updates", "cg_steps"), 1),
}
HORIZON = {"navigation": 100, "cheetah-dir": 200, "cheetah-vel": 200}
UNUSED = {  # flags that an algorithm does not use
    "modgrad": [],
    "cavia": ["rank", "start_at_one"],
    "maml": ["rank", "context", "start_at_one"],
}


# --------------------------------------------------------------------------------------------------- worlds
# A world has tasks, observations of D numbers and actions of A; it moves all rollouts of all tasks one step at a time.


class Rollouts(NamedTuple):
    """R rollouts of one task, or of T tasks with a leading dimension T. H steps each."""

    observation: torch.Tensor  # (R, H, D) before each step
    action: torch.Tensor  # (R, H, A) as drawn; the world clips it
    log_prob: torch.Tensor  # (R, H) of the action, when it was drawn
    reward: torch.Tensor  # (R, H)
    mask: torch.Tensor  # (R, H) 1, or 0 after the end of a rollout that has reached its goal
    advantage: torch.Tensor  # (R, H) see `advantages`


class Navigation:
    """2D navigation (Finn et al., 2017): go from the origin to a goal in [-0.5, 0.5]^2 that is not shown.

    Observation: the place. Action: the move, each coordinate clipped to [-0.1, 0.1]. Reward: minus the distance to the goal after
    the move. A rollout ends where both coordinates are within 0.01 of the goal's. All tasks and rollouts move in one tensor.
    """

    observations = 2  # D
    actions = 2  # A
    starts = 0  # random numbers that a rollout begins with

    def __init__(self, args):
        self.device = args.device
        self.goal = None
        self.place = None

    def tasks(self, u):
        """Random numbers u (T, 2) in [0, 1) -> goals (T, 2)."""
        return u - 0.5

    def reset(self, goals, rollouts, start):
        """Goals (T, 2) -> observations (T, R, 2)."""
        self.goal = goals[:, None].to(self.device)
        self.place = torch.zeros(len(goals), rollouts, 2, device=self.device)
        return self.place

    def step(self, action):
        """Actions (T, R, 2) -> observations (T, R, 2), rewards (T, R), whether the rollout ends (T, R)."""
        self.place = self.place + action.clamp(-0.1, 0.1)
        away = self.place - self.goal
        ends = (away.abs() < 0.01).all(-1)
        return self.place, -away.norm(dim=-1), ends

    def close(self):
        pass


def make_world(args):
    """The world that --env names: see Navigation, and fewshot/cheetah.py."""
    return Navigation(args) if args.env == "navigation" else Cheetah(args)


def goals(world, args, split, first, count):
    """Goals of tasks number first .. first + count - 1; in test and validation they are the same for every run."""
    name = f"rl {args.env} {split} {args.seed if split == 'train' else None}"
    rows = [uniform(name, number, 2) for number in range(first, first + count)]
    return world.tasks(torch.from_numpy(np.array(rows)).float())


# --------------------------------------------------------------------------------------------------- policy


def linear(params, name, x):
    """A linear layer: x (..., n_in) -> (..., n_out)."""
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def forward(params, x, context=None):
    """The policy: observations x (..., D), each joined with the task's context vector (C,) -> means of actions (..., A)."""
    if context is not None:
        beside = context.expand(*x.shape[:-1], -1)
        x = torch.cat([x, beside], -1)
    x = F.relu(linear(params, "fc1", x))
    x = F.relu(linear(params, "fc2", x))
    return linear(params, "mean", x)


def log_probability(mean, log_std, action):
    """Log density of actions (..., A) under normals of means (..., A) and log deviations that broadcast to them -> (...)."""
    log_std = log_std.clamp(min=math.log(1e-6))
    z = (action - mean) / log_std.exp()
    normaliser = 0.5 * math.log(2 * math.pi)
    return (-0.5 * z**2 - log_std - normaliser).sum(-1)


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


def init_params(args, world):
    """Draw all parameters from the seed -> flat dict.

    The policy starts as in CAVIA's code: Xavier's uniform, zero biases, deviation 1; cells start as PyTorch's layers.
    """
    rng = torch.Generator().manual_seed(args.seed)
    params = {}

    def uniform_layer(name, n_out, n_in, bound):
        weight, bias = torch.rand(n_out, n_in, generator=rng), torch.rand(n_out, generator=rng)
        params[f"{name}.weight"] = (2 * weight - 1) * bound
        params[f"{name}.bias"] = (2 * bias - 1) * bound

    def default(name, n_out, n_in):
        uniform_layer(name, n_out, n_in, 1 / math.sqrt(n_in))

    def xavier(name, n_out, n_in):
        uniform_layer(name, n_out, n_in, math.sqrt(6 / (n_in + n_out)))
        params[f"{name}.bias"] *= 0

    n_in = world.observations
    if args.algorithm == "cavia":
        n_in += args.context
    for name, n_out in zip(LAYERS, (args.hidden, args.hidden, world.actions)):
        xavier(name, n_out, n_in)
        n_in = n_out
    params["log_std"] = torch.zeros(world.actions)
    if args.algorithm == "modgrad":
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
# that adapt, `loss` is the loss on the step's rollouts as a function of it, and `clip` holds a gradient constant if
# wanted. Each returns the new `adapted`. The code is that of modgrad.py.


def maml_step(params, adapted, loss, args, clip):
    """theta <- theta - alpha * gradient(theta)                                     (Finn et al., ICML 2017)"""
    gradient = clip(torch.func.grad(loss)(adapted))
    return {k: adapted[k] - args.alpha * gradient[k] for k in adapted}


def cavia_step(params, adapted, loss, args, clip):
    """v <- v - alpha * gradient(v): only a context moves, an input beside the observation (Zintgraf, ICML 2019)"""
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


def start(params, args):
    """theta^0: what a task begins with, before any inner step."""
    if args.algorithm == "cavia":
        return {"context": params["fc1.weight"].new_zeros(args.context)}
    return {k: params[k] for k in adapted_keys(args, params)}  # 6


def policy_loss(params, adapted, rollouts):
    """Minus the mean over all steps of ratio * advantage: the ratio of an action's probability now to that when drawn.

    Where nothing has changed yet, its gradient is minus the policy gradient, E[advantage * grad log pi]; elsewhere, as in
    Eq. 9, the ratio corrects for the actions, though not for the states visited. (CAVIA's code has log pi in the inner
    step. That gives the same step, but its second derivative lacks a part of that of the return; see Rothfuss et al., ICLR
    2019.)
    """
    mean = forward(params | adapted, rollouts.observation, adapted.get("context"))
    log_std = (params | adapted)["log_std"]
    change = log_probability(mean, log_std, rollouts.action) - rollouts.log_prob
    gain = change.exp() * rollouts.advantage
    return -(gain * rollouts.mask).sum() / rollouts.mask.sum()


def adapt(params, adapted, rollouts, args):
    """ONE task, one inner step: its rollouts -> the new `adapted`. Numbers in comments are lines of Algorithm 1."""

    def loss(adapted):
        return policy_loss(params, adapted, rollouts)

    def clip(gradient):
        if args.first_order:
            gradient = {k: g.detach() for k, g in gradient.items()}
        return gradient

    return STEPS[args.algorithm](params, adapted, loss, args, clip)  # 9-13


def adapted_policy(params, lived, args):
    """ONE task: the rollouts of each inner step and, last, those after all steps -> the adapted policy.

    Returns, at the observations of the last ones, means (R, H, A) and log deviations (A,). As a function of params,
    this is what the outer step differentiates (line 16).
    """
    *before, after = lived
    adapted = start(params, args)
    for rollouts in before:  # 8
        adapted = adapt(params, adapted, rollouts, args)
    mean = forward(params | adapted, after.observation, adapted.get("context"))
    return mean, (params | adapted)["log_std"]


def discounted_sum(values, factor):
    """values (T, R, H) -> at each step h, the sum over k >= 0 of factor^k * values[..., h + k]."""
    total = torch.zeros_like(values[..., 0])
    sums = torch.zeros_like(values)
    for h in reversed(range(values.shape[-1])):
        total = values[..., h] + factor * total
        sums[..., h] = total
    return sums


def advantages(observation, reward, mask, args):
    """Generalised advantages (Schulman et al., ICLR 2016) over a linear baseline (Duan et al., ICML 2016).

    The baseline is fitted to these very rollouts of each task by least squares. The advantages have mean 0 and deviation
    1 over a task's steps. observation (T, R, H, D), reward (T, R, H), mask (T, R, H) -> (T, R, H).
    """
    observation, mask = observation.double(), mask.double()
    reward = reward.double() * mask
    returns = discounted_sum(reward, args.gamma)
    values = baseline(observation, returns, mask)
    nothing = torch.zeros_like(values[..., :1])
    following = torch.cat([values[..., 1:], nothing], -1)
    errors = reward + args.gamma * following - values
    result = discounted_sum(errors, args.gamma * args.gae_lambda)
    n = mask.sum((1, 2), keepdim=True)
    mean = (result * mask).sum((1, 2), keepdim=True) / n
    variance = ((result - mean) ** 2 * mask).sum((1, 2), keepdim=True) / n
    return ((result - mean) / (variance.sqrt() + 1e-8) * mask).float()


def baseline(observation, returns, mask):
    """Fit returns (T, R, H) by a linear function of features of state and time, per task -> its values (T, R, H)."""
    H = returns.shape[-1]
    steps = torch.arange(H, device=returns.device, dtype=torch.float64) / 100
    t = steps.expand(returns.shape)[..., None]
    powers = [t, t**2, t**3, torch.ones_like(t)]
    features = torch.cat([observation, observation**2, *powers], -1)
    X = (features * mask[..., None]).flatten(1, 2)
    y = (returns * mask).flatten(1, 2)[..., None]
    ridge = 1e-5 * torch.eye(X.shape[-1], dtype=torch.float64, device=X.device)
    weights = torch.linalg.solve(X.mT @ X + ridge, X.mT @ y)
    return (X @ weights).view(returns.shape)  # 0 where the mask is 0


def noise(world, args, split, first, count, update):
    """Normal random numbers of the rollouts of tasks first .. -> for the start (T, R, ...), for actions (T, R, H, A).

    In a run and split they depend on the numbers of task and update alone, so a task has the same ones in any batch.
    """
    R, H = args.rollouts, args.horizon
    A = world.actions
    seed = args.seed if split == "train" else None
    name = f"rl {args.env} {split} {seed} rollouts {update}"
    of_task = R * (world.starts + H * A)
    rows = [uniform(name, first + t, of_task) for t in range(count)]
    u = torch.from_numpy(np.array(rows)).clamp(min=2.0**-54)
    normal = torch.special.ndtri(u).float().view(count, R, -1)
    at_start, of_actions = normal[..., : world.starts], normal[..., world.starts :]
    return at_start, of_actions.reshape(count, R, H, A).to(args.device)


@torch.no_grad()
def act(params, adapted, world, targets, args, split, first, update):
    """Let the policies of T tasks (adapted with a leading dimension T) act in the world -> Rollouts (T, R, H, ...)."""
    T, R = len(targets), args.rollouts
    at_start, of_actions = noise(world, args, split, first, T, update)

    def policy_of_one(adapted, x):
        return forward(params | adapted, x, adapted.get("context"))

    policy = torch.func.vmap(policy_of_one)
    log_std = adapted.get("log_std", params["log_std"].expand(T, -1))
    deviation = log_std.clamp(min=math.log(1e-6)).exp()[:, None]
    x = world.reset(targets, R, at_start)
    alive = torch.ones(T, R, device=args.device)
    steps = []
    for h in range(args.horizon):
        mean = policy(adapted, x)
        action = mean + deviation * of_actions[:, :, h]
        after, reward, end = world.step(action)
        steps.append((x, action, log_probability(mean, log_std[:, None], action), reward, alive))
        x = after
        alive = alive * ~end
    observation, action, log_prob, reward, mask = (torch.stack(column, 2) for column in zip(*steps))
    advantage = advantages(observation, reward, mask, args)
    return Rollouts(observation, action, log_prob, reward, mask, advantage)


def returns(rollouts):
    """Sum of rewards, not discounted, mean over a task's rollouts -> (T,)."""
    return (rollouts.reward * rollouts.mask).sum(-1).mean(-1)


def live(params, world, args, split, first, count, updates):
    """Tasks number first .. first + count - 1: act, adapt, act again, ... -> list of Rollouts, updates + 1 of them."""
    targets = goals(world, args, split, first, count)
    begin = start(params, args)
    adapted = {k: w.expand(count, *w.shape) for k, w in begin.items()}
    lived = [act(params, adapted, world, targets, args, split, first, 0)]
    halved = argparse.Namespace(**vars(args) | {"alpha": args.alpha / 2})
    for update in range(1, updates + 1):
        later_in_test = split != "train" and update > 1
        options = halved if later_in_test and args.halve_test_lr else args

        def one(adapted, rollouts, options=options):
            return adapt(params, adapted, rollouts, options)

        with torch.no_grad():
            adapted = torch.func.vmap(one)(adapted, lived[-1])
        lived.append(act(params, adapted, world, targets, args, split, first, update))
    return lived


def pick(rollouts, tasks):
    """The rollouts of one task, or of a slice of the tasks."""
    return Rollouts(*(x[tasks] for x in rollouts))


def over_tasks(function, lived):
    """Apply a function of what one task has lived through to each of T tasks -> its tuple of tensors, stacked.

    By vmap, which fills a GPU; on a CPU by a loop, whose pieces stay in its cache.
    """
    rewards = lived[-1].reward
    if rewards.device.type != "cpu":
        return torch.func.vmap(function)(lived)
    rows = []
    for t in range(len(rewards)):
        rows.append(function([pick(rollouts, t) for rollouts in lived]))
    return tuple(torch.stack(column) for column in zip(*rows))


def conjugate_gradients(product, b, steps):
    """Solve A x = b for a vector b, A symmetric and positive, given the function x -> A x; at most `steps` steps."""
    x = torch.zeros_like(b)
    r = b.clone()  # b - A x
    p = r.clone()  # direction
    rr = r @ r
    for _ in range(steps):
        if rr < 1e-10:
            break
        Ap = product(p)
        a = rr / (p @ Ap)
        x = x + a * p
        r = r - a * Ap
        last, rr = rr, r @ r
        p = r + rr / last * p
    return x


class Flat:
    """Parameters as one vector, and back."""

    def __init__(self, params):
        self.shapes = {k: w.shape for k, w in params.items()}

    def __call__(self, tensors):
        return torch.cat([tensors[k].reshape(-1) for k in self.shapes])

    def back(self, vector):
        sizes = [shape.numel() for shape in self.shapes.values()]
        pieces = dict(zip(self.shapes, vector.split(sizes)))
        return {k: x.view(self.shapes[k]) for k, x in pieces.items()}


def step_weights(after):
    """Weight of each step in a mean over tasks: rollouts (T, R, H) -> (T, R, H), of sum 1."""
    return after.mask / after.mask.sum((1, 2), keepdim=True) / len(after.mask)


@torch.no_grad()
def trpo_step(params, lived, args):
    """The outer step: from the rollouts of T tasks -> new params, its diagnostics, the gradient.

    It maximises the mean surrogate return of the adapted policies under mean KL(old || new) <= --max-kl, both over the
    rollouts after adaptation: the natural gradient by conjugate gradients, its length by the quadratic model of KL, then
    a line search.
    """
    flat = Flat(params)
    after = lived[-1]
    weight = step_weights(after)

    def policies(params):
        return over_tasks(lambda of_one: adapted_policy(params, of_one, args), lived)

    def surrogate(mean, log_std):
        change = log_probability(mean, log_std[:, None, None], after.action) - after.log_prob
        return -(weight * change.exp() * after.advantage).sum()

    (mean, log_std), pull = torch.func.vjp(policies, params)  # pull: the Jacobian, transposed
    loss = surrogate(mean, log_std)
    outer = torch.func.grad(surrogate, (0, 1))(mean, log_std)
    gradient = flat(pull(outer)[0])
    fisher = fisher_product(params, lived, args, flat)
    direction = conjugate_gradients(fisher, gradient, args.cg_steps)
    curvature = (direction @ fisher(direction)).clamp(min=1e-20)
    length = (2 * args.max_kl / curvature).sqrt()
    old = flat(params)
    fraction = 1.0
    for _ in range(args.line_search):
        candidate = flat.back(old - fraction * length * direction)
        at = policies(candidate)
        new_loss = surrogate(*at)
        kl = mean_kl(weight, (mean, log_std), at)
        if new_loss < loss and kl <= args.max_kl:
            found = {"loss": loss, "gain": loss - new_loss, "kl": kl, "fraction": fraction}
            return candidate, found, flat.back(gradient)
        fraction *= 0.8
    zero = torch.zeros(())
    nothing = {"loss": loss, "gain": zero, "kl": zero, "fraction": 0.0}  # no step helped
    return params, nothing, flat.back(gradient)


def mean_kl(weight, old, new):
    """Mean KL(old || new) of policies, each (means (T, R, H, A), log deviations (T, A)), over steps weighted by `weight`."""
    mean, log_std = old
    new_mean, new_log_std = new
    s, t = log_std[:, None, None], new_log_std[:, None, None]
    spread = (2 * s).exp() + (mean - new_mean) ** 2
    kl = t - s + spread / (2 * (2 * t).exp()) - 0.5
    return (weight * kl.sum(-1)).sum()


def fisher_product(params, lived, args, flat):
    """The function v -> (J^T F J + damping) v, of a part of the tasks (--fisher-fraction).

    This is the second derivative of KL, because KL's first derivative is 0 where nothing has changed.
    """
    every = max(1, round(1 / args.fisher_fraction))
    few = [pick(rollouts, slice(None, None, every)) for rollouts in lived]
    weight = step_weights(few[-1])[..., None]

    def policies(params):
        return over_tasks(lambda of_one: adapted_policy(params, of_one, args), few)

    (_, log_std), pull = torch.func.vjp(policies, params)

    def product(vector):
        tangent = (flat.back(vector),)
        _, (push_mean, push_log_std) = torch.func.jvp(policies, (params,), tangent)  # J v
        precision = (-2 * log_std)[:, None, None].exp()
        weighted = weight * precision * push_mean, 2 * push_log_std / len(log_std)
        return flat(pull(weighted)[0]) + args.cg_damping * vector

    return product


# ---------------------------------------------------------------------------------------- training, evaluation


def evaluate(params, world, split, count, args):
    """The returns of the first `count` tasks, before and after each update -> array (test updates + 1, count)."""
    found = []
    starts = range(0, count, 20)
    for first in tqdm(starts, desc=f"{split} tasks, 20 at a time", disable=None, leave=False):
        with torch.no_grad():
            lived = live(params, world, args, split, first, min(20, count - first), args.test_updates)
        found.append(torch.stack([returns(rollouts) for rollouts in lived]))
    return torch.cat(found, 1).double().cpu().numpy().round(4)


def summary(per_task):
    """Returns of tasks -> {"mean", "ci95"}: half the width of a 95 % interval, 1.96 s / sqrt(n)."""
    half_width = 1.96 * float(per_task.std(ddof=1)) / math.sqrt(len(per_task))
    return {"mean": round(float(per_task.mean()), 4), "ci95": round(half_width, 4)}


def norm(gradient, part):
    """Euclidean norm of one part of a gradient."""
    norms = [g.norm() for g in group(gradient, part).values()]
    return math.hypot(*norms)


def size(params, part):
    """Number of parameters in one part of them."""
    return sum(w.numel() for w in group(params, part).values())


def train(params, world, args, run):
    """Make --iterations outer steps on --meta-batch tasks each, from where the run left off -> params."""
    T = args.meta_batch

    def validate():
        return [summary(row) for row in evaluate(params, world, "val", args.val_tasks, args)]

    for iteration in run.iterations():
        lived = live(params, world, args, "train", iteration * T, T, args.updates)
        params, step, gradient = trpo_step(params, lived, args)

        gained = [returns(rollouts).mean() for rollouts in lived]
        measured = [float(x) for x in (*gained, *step.values())]
        run.observe(torch.tensor(measured, dtype=torch.float64))
        if run.log_now():
            means = run.observed().numpy().mean(0).tolist()
            updates = args.updates + 1
            shown = " -> ".join(f"{x:.1f}" for x in means[:updates])
            values = {
                "returns": means[:updates],
                **dict(zip(step, means[updates:])),
                "gradient_norm": {part: norm(gradient, part) for part in PARTS},
            }
            run.log(values, {"return": shown}, validate, remedy="--alpha or --max-kl")
        run.save(params)
    return params


def measure(params, world, tasks, args, run):
    """Evaluate on the test tasks, whose hash is `tasks`, and write result.json -> its content."""
    rows = evaluate(params, world, "test", args.test_tasks, args)
    return run.write_result(
        {
            "env": args.env,
            "synthetic": False,
            "protocol": PROTOCOL,
            "tasks_sha256": tasks,
            "returns": [summary(row) for row in rows],
            "parameters": {part: size(params, part) for part in PARTS},
            "per_task": rows.tolist(),
        }
    )


def stored(run, tasks, args):
    """The stored result, if it has these tasks, updates and step sizes; else None."""
    result = run.result(tasks_sha256=tasks)
    if result is None or len(result["returns"]) != args.test_updates + 1:
        return None
    halved = result["args"].get("halve_test_lr", False)
    return result if halved == args.halve_test_lr else None


def report(result, args):
    """Print what was measured, under which protocol, with its interval."""
    training = f"{result['iterations']} iterations of {result['seconds_per_iteration']} s"
    print(f"\n{args.title}: {args.test_tasks} test tasks of {args.rollouts} rollouts, after {training}")
    print(result["protocol"])
    for update, row in enumerate(result["returns"]):
        name = f"after {update} updates"
        if update < 2:
            name = ("before", "after 1 update")[update]
        print(f"{name:18}" + "{mean:.2f} +- {ci95:.2f}".format(**row))


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


HORIZON_HELP = "H, steps of a rollout (P, C: 200 for the half-cheetah; navigation has 100)"
ALPHA_HELP = f"size of the inner step: {column(0)}; CAVIA on the half-cheetah 10 (ours; C: 1)"
HALVE_HELP = "in testing, halve the step size from the second update on (C and ours: for MAML only)"
ADAPT_HELP = f"layers that the step changes, such as fc2 mean, or all. Defaults: {column(1)}"
CONTEXT_HELP = "length of v (128) or of CAVIA's vector (C: 5; for the half-cheetah 50, ours)"
ONE_HELP = "ModGrad's M starts near 1 (M = 1 is MAML), not near 0 as in its code"
FISHER_HELP = (
    "KL's curvature is computed on every k-th task, k = 1 / this, rounded (C: all tasks; TRPO's paper: 0.1 of the steps). "
    "The bound on KL holds on all tasks in any case"
)


def get_args(argv=None):
    """Read the command line -> args. `title`, `variant` and `method` are worked out from it."""
    p = new_parser(__doc__, "P: the paper's value; C: that of CAVIA's code.")
    add_algorithm_flags(p)
    p.add_argument(
        "--seed", type=int, default=0, help="of initial parameters, training tasks and training rollouts"
    )
    p.add_argument(
        "--test-tasks", type=int, default=100, help="goals, the same for all algorithms and seeds (C: 40)"
    )
    p.add_argument("--test-updates", type=int, default=3, help="inner updates at test (P: 3)")
    p.add_argument("--halve-test-lr", action=argparse.BooleanOptionalAction, help=HALVE_HELP)
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=40, help="goals")
    p.add_argument("--workers", type=int, default=cores(), help="processes that simulate half-cheetahs")
    add_device_flags(p, threads=False, precision=None)
    add_run_flags(p, QUICK)
    p.set_defaults(log_every=1, save_every=10)
    args, defaults = parse(p, argv, QUICK)
    args.method = METHODS[args.algorithm]
    fill(args, defaults, usual(args))
    check(args)
    reset_unused(args, defaults, UNUSED[args.algorithm])
    if args.adapt != defaults["adapt"]:
        args.method += f" on {'+'.join(args.adapt)}"
    shown = ("adapt", "env", "seed")
    complete(args, defaults, args.env, shown, named=("env", "algorithm"), least=LEAST)
    return args


def usual(args):
    """Defaults, by algorithm and world, of the flags that were not typed."""
    alpha, adapt = DEFAULTS[args.algorithm]
    context = 5
    if args.env != "navigation":
        alpha = CHEETAH_ALPHA.get(args.algorithm, alpha)
        context = 50
    return {
        "alpha": alpha,
        "halve_test_lr": args.algorithm == "maml",
        "adapt": adapt,
        "context": context if args.algorithm == "cavia" else 128,
        "horizon": HORIZON[args.env],
    }


def add_algorithm_flags(p):
    """Add the flags that decide what is learned."""
    p.add_argument("--algorithm", default="modgrad", choices=METHODS, help="the inner step")
    p.add_argument(
        "--env", default="navigation", choices=HORIZON, help="what the tasks are (see Navigation, Cheetah)"
    )
    p.add_argument(
        "--rollouts", type=int, default=20, help="R, before an update, and after it (P, C: 20; C at test: 40)"
    )
    p.add_argument("--horizon", type=int, help=HORIZON_HELP)
    p.add_argument("--hidden", type=int, default=100, help="units of each of the two layers (P: 100)")
    p.add_argument(
        "--updates", type=int, default=1, help="K, inner updates in training, each with new rollouts (C: 1)"
    )
    p.add_argument("--alpha", type=float, help=ALPHA_HELP)
    p.add_argument("--adapt", nargs="+", metavar="LAYER", help=ADAPT_HELP)
    p.add_argument("--rank", type=int, default=5, help="u, columns that are mixed in a ModGrad cell (P: 5)")
    p.add_argument("--context", type=int, help=CONTEXT_HELP)
    p.add_argument("--start-at-one", action="store_true", help=ONE_HELP)
    p.add_argument("--first-order", action="store_true", help="leave out second derivatives (P, C: no)")
    p.add_argument("--gamma", type=float, default=0.95, help="discount (C: 0.95 to 0.99)")
    p.add_argument(
        "--gae-lambda",
        type=float,
        default=1.0,
        help="of the advantages; at 1 they are returns minus the baseline (C: 1)",
    )
    p.add_argument(
        "--meta-batch", type=int, default=40, help="T, tasks per iteration (C: 20, MAML's paper too)"
    )
    p.add_argument("--iterations", type=int, default=500, help="outer steps (C: 500)")
    p.add_argument("--max-kl", type=float, default=0.01, help="bound on the KL of an outer step (C: 0.01)")
    p.add_argument("--cg-steps", type=int, default=10, help="of conjugate gradients (C: 10)")
    p.add_argument("--cg-damping", type=float, default=1e-5, help="added to the Fisher matrix (C: 1e-5)")
    p.add_argument("--fisher-fraction", type=float, default=0.25, help=FISHER_HELP)
    p.add_argument(
        "--line-search", type=int, default=15, help="steps tried, each 0.8 of the one before (C: 15)"
    )


def check(args):
    """Exit if flags contradict each other."""
    if args.algorithm == "cavia" and args.adapt:
        fail("--algorithm cavia adapts its context alone: leave --adapt out")
    for layer in args.adapt:
        if layer not in ("all", *LAYERS, "log_std"):
            fail(f"--adapt {layer}: no such layer; give all, or some of {' '.join(LAYERS)} log_std")
    if args.algorithm == "modgrad" and {"all", "log_std"} & set(args.adapt):
        typed = " ".join(args.adapt)
        remedy = f"a cell is for a layer's weight and bias; choose from {' '.join(LAYERS)}"
        fail(f"--algorithm modgrad --adapt {typed}: {remedy}")
    if args.fisher_fraction > 1:
        fail(f"--fisher-fraction {args.fisher_fraction}: give a share of the tasks, at most 1")


def main():
    args = get_args()
    run = Run(args, estimate_after=5)
    world = make_world(args)
    params = run.params(init_params(args, world))
    params = {k: w.detach() for k, w in params.items()}  # TRPO takes its derivatives by torch.func
    if run.unfinished:
        params = train(params, world, args, run)
    if run.finished():
        targets = goals(world, args, "test", 0, args.test_tasks)
        tasks = hashlib.sha256(targets.numpy().tobytes()).hexdigest()
        report(stored(run, tasks, args) or measure(params, world, tasks, args, run), args)
    world.close()


if __name__ == "__main__":
    main()
