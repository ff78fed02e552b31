"""The ModGrad cell in reinforcement learning: a policy that adapts to a new task from 20 trials of it. With MAML and CAVIA.

Paper: Simon, Koniusz, Nock, Harandi: On Modulating the Gradient for Meta-Learning, ECCV 2020, Section 5.3, Figure 8.
The protocol is that of MAML (Finn et al., ICML 2017) and CAVIA (Zintgraf et al., ICML 2019).

The idea. A *task* is a goal that the policy is not told: a place to go to, a direction or a speed to run in. It acts
(R *rollouts*), sees its rewards, makes an inner step of policy gradient, and acts again. Meta-learning finds parameters from
which that one step helps most. The support set of modgrad.py is here what the policy lived through before the step, the query
set what it lives through after it; and since the second depends on the step, too, both are drawn anew all the time.

Inner step: policy gradient ("vanilla", REINFORCE), by generalised advantages over a linear baseline. Outer step: TRPO (Schulman
et al., ICML 2015), the longest step along the natural gradient that changes the adapted policies by no more than a bound in
KL divergence. The algorithms differ in the inner step only:
    modgrad    two hidden layers, by one step whose gradient is modulated entry by entry (see modgrad.py)
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
      python modgrad_rl.py --picture paths.png --runs RUN RUN ...        paths before and after adaptation (navigation)
The paper keeps its RL variant in a supplement that is not public. Chosen here: cells on both hidden layers; v of 128 entries and
u = 5 as in its regression; Eq. 9's loss after the trial step is taken on the same rollouts, corrected by the ratio of new to old
probabilities (no rollouts more than the rivals have); a step size of 30, with which the first steps are about as long as MAML's:
M is 0.0004 to 0.005 in kernels, where it is not 0, and 0.02 in biases to begin with, and with the 0.1 of its other experiments the
policy does not move. (ReLU is for kernels' M. On that of biases, which is no product, it made line searches fail: before Eq. 9 all tasks
have v = 0 and so share what ReLU cuts off, and an outer step that takes one such entry past zero lets v jump in most tasks.)
"""
import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import atomic_write, fail, uniform

METHODS = {"modgrad": "ModGrad", "maml": "MAML", "cavia": "CAVIA"}
LAYERS = ("fc1", "fc2", "mean")                     # and log_std, which has no layer
PARTS = ("base", "encoder", "generator")            # of the parameters; no algorithm here has an encoder
PROTOCOL = "sum of the rewards of a rollout, not discounted: mean over the rollouts of a task, then over tasks"
QUICK = {"iterations": 25, "meta_batch": 10, "test_tasks": 40}
TABLE, PAPER = "ModGrad's Figure 8", defaultdict(dict, {                    # return after one update, as its text says
    "MAML": {"navigation": "-15", "cheetah-dir": "below 550", "cheetah-vel": "-100"},
    "CAVIA": {"navigation": "-15", "cheetah-dir": "below 550", "cheetah-vel": "-90"},
    "ModGrad": {"navigation": "-8", "cheetah-dir": "590", "cheetah-vel": "-80"}})
# (size of the inner step, adapted layers): CAVIA's are those of its code, MAML's size that of its paper; ModGrad's: see above.
DEFAULTS = {"modgrad": (30.0, ["fc1", "fc2"]), "maml": (0.1, ["all"]), "cavia": (1.0, [])}
CHEETAH_ALPHA = {"cavia": 10.0}                     # where the half-cheetah's step size is another: ours
HORIZON = {"navigation": 100, "cheetah-dir": 200, "cheetah-vel": 200}
LEAST = {"fisher_fraction": 1e-6, "hidden": 1, "meta_batch": 1, "log_every": 1, "save_every": 1, "test_tasks": 2, "val_tasks": 2, "rank": 1,
         "context": 1, "rollouts": 1, "horizon": 1, "updates": 1, "test_updates": 1, "cg_steps": 1,
         "workers": 1}      # of arguments that are numbers; else 0
SHOWN = ("adapt", "env", "seed")                    # what a report says anyway


def column(i):
    """A column of DEFAULTS for a help text."""
    return ", ".join(f"{algorithm} {' '.join(row[i]) if i == 1 else row[i]}" for algorithm, row in DEFAULTS.items())


def get_args(argv=None):
    about = __doc__.split("\n")[0] + " P: the paper's value; C: that of CAVIA's code, ours unless it says so."
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.error = fail
    p.add_argument("--algorithm", default="modgrad", choices=METHODS, help="the inner step")
    p.add_argument("--env", default="navigation", choices=HORIZON, help="what the tasks are (see Navigation, Cheetah)")
    p.add_argument("--rollouts", type=int, default=20, help="R, for an update, and after it (P, C: 20; C at test: 40)")
    p.add_argument("--horizon", type=int, help=f"H, steps of a rollout (P, C: 200 for the half-cheetah): {HORIZON}")
    p.add_argument("--hidden", type=int, default=100, help="units of each of the two layers (P: 100)")
    p.add_argument("--updates", type=int, default=1, help="K, inner updates in training, each with new rollouts (C: 1)")
    p.add_argument("--test-updates", type=int, default=3, help="inner updates at test (P: 3)")
    p.add_argument("--alpha", type=float, help=f"size of the inner step: {column(0)}; CAVIA on the half-cheetah 10 (ours; C: 1)")
    p.add_argument("--halve-test-lr", action=argparse.BooleanOptionalAction,
                   help="half the step size from the second update of a test on (C: with MAML; on for MAML, else off)")
    p.add_argument("--adapt", nargs="+", metavar="LAYER", help=f"what the step changes, as fc2 mean; or all: {column(1)}")
    p.add_argument("--rank", type=int, default=5, help="u, columns that are mixed in a ModGrad cell (P: 5)")
    p.add_argument("--context", type=int, help="length of v (128), of CAVIA's vector (5, C's; 50 for the half-cheetah, ours)")
    p.add_argument("--start-at-one", action="store_true", help="ModGrad's M starts near 1, as MAML, not near 0 (C: near 0)")
    p.add_argument("--first-order", action="store_true", help="hold the inner gradients constant (P, C: no)")
    p.add_argument("--gamma", type=float, default=0.95, help="discount (C: 0.95 to 0.99)")
    p.add_argument("--gae-lambda", type=float, default=1.0, help="of the advantages; 1: returns less the baseline (C: 1)")
    p.add_argument("--meta-batch", type=int, default=40, help="T, tasks an iteration (C: 20, MAML's paper too)")
    p.add_argument("--iterations", type=int, default=500, help="outer steps (C: 500)")
    p.add_argument("--max-kl", type=float, default=0.01, help="bound of an outer step (C: 0.01)")
    p.add_argument("--cg-steps", type=int, default=10, help="conjugate gradient's (C: 10)")
    p.add_argument("--cg-damping", type=float, default=1e-5, help="added to the Fisher matrix (C: 1e-5)")
    p.add_argument("--fisher-fraction", type=float, default=0.25, help="of the tasks, on which KL's curvature is computed (C: "
                   "all; TRPO's paper: 0.1 of the steps). Its bound is kept on all of them in any case")
    p.add_argument("--line-search", type=int, default=15, help="steps tried, each 0.8 of the one before (C: 15)")
    p.add_argument("--seed", type=int, default=0, help="of initial parameters, training tasks and training rollouts")
    p.add_argument("--test-tasks", type=int, default=100, help="goals, the same for all algorithms and seeds (C: 40)")
    p.add_argument("--val-every", type=int, default=0, help="iterations; 0 is never")
    p.add_argument("--val-tasks", type=int, default=40, help="goals")
    p.add_argument("--quick", action="store_true", help=f"about two minutes on two CPU cores: {QUICK}")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that simulate half-cheetahs")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--out", help="folder of the run (runs/<name>); the same command continues it")
    p.add_argument("--log-every", type=int, default=1, help="iterations")
    p.add_argument("--save-every", type=int, default=10, help="iterations between checkpoints")
    p.add_argument("--keep-every", type=int, default=0, help="iterations between kept parameters")
    p.add_argument("--stop-after", type=float, help="seconds; then write a checkpoint and end")
    p.add_argument("--picture", metavar="FILE", help="train nothing: draw the paths of --runs, a PNG")
    p.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="folders of runs")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint as it is")
    start.add_argument("--overwrite", action="store_true", help="start afresh, dropping what --out holds")
    defaults = vars(p.parse_args([]))
    if p.parse_known_args(argv)[0].quick:
        p.set_defaults(**QUICK)
    args = p.parse_args(argv)
    if bool(args.picture) != bool(args.runs):
        fail("--picture FILE and --runs RUN ... belong together")
    args.method = METHODS[args.algorithm]
    alpha, adapt = DEFAULTS[args.algorithm]
    alpha, context = (alpha, 5) if args.env == "navigation" else (CHEETAH_ALPHA.get(args.algorithm, alpha), 50)
    usual = {"alpha": alpha, "halve_test_lr": args.algorithm == "maml", "adapt": adapt, "context": context if args.algorithm == "cavia" else 128,
             "horizon": HORIZON[args.env]}
    for key, value in usual.items():
        defaults[key] = value
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    if args.algorithm == "cavia" and args.adapt:
        fail("--algorithm cavia adapts its context alone: leave --adapt out")
    for layer in args.adapt:
        if layer not in ("all", *LAYERS, "log_std"):
            fail(f"--adapt {layer}: not there; choose from all {' '.join(LAYERS)} log_std")
    if args.algorithm == "modgrad" and {"all", "log_std"} & set(args.adapt):
        fail(f"--algorithm modgrad --adapt {' '.join(args.adapt)}: a cell is for a layer's weight and bias; choose from {' '.join(LAYERS)}")
    for key in {"modgrad": [], "cavia": ["rank", "start_at_one"], "maml": ["rank", "context", "start_at_one"]}[args.algorithm]:
        if getattr(args, key) != defaults[key]:
            print(f"note: {args.method} does not use --{key.replace('_', '-')}, so it stays {defaults[key]}", file=sys.stderr)
        setattr(args, key, defaults[key])               # and does not make it another run
    if args.fisher_fraction > 1:
        fail(f"--fisher-fraction {args.fisher_fraction}: give a share of the tasks, at most 1")
    args.method += f" on {'+'.join(args.adapt)}" * (args.adapt != defaults["adapt"])
    changed = {k: '+'.join(v) if isinstance(v, list) else v for k, v in identity(args).items()
               if k not in ("env", "algorithm") and v != defaults.get(k, v)}
    if args.out is None:                                # named by its method and what is not default
        words = [f"{k}={v}" for k, v in changed.items()]
        args.out = os.path.join("runs", "-".join([args.method, args.env, *words]).lower())
    flags = {f"--{k.replace('_', '-')}": v for k, v in changed.items() if k not in SHOWN}
    args.variant = [flag if v is True else f"{flag} {str(v).replace('+', ' ')}" for flag, v in flags.items()]
    args.title = " ".join([args.method, args.env, *args.variant])
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    args.device = {"auto": (gpus + ["cpu"])[0], "cuda": (gpus + ["cuda"])[0]}.get(args.device, args.device)
    if args.device not in ("cpu", *gpus):
        fail(f"--device {args.device}: not there; choose from {' '.join(['cpu', *gpus])}")
    for key, value in vars(args).items():
        if isinstance(value, (int, float)) and not LEAST.get(key, 0) <= value < 2 ** 63:
            fail(f"--{key.replace('_', '-')} {value}: give a number from {LEAST.get(key, 0)} on")
    return args


# --------------------------------------------------------------------------------------------------- worlds
# A world has tasks, observations of D numbers and actions of A; it moves all rollouts of all tasks one step at a time.

class Rollouts(NamedTuple):
    """R rollouts of one task, or of T tasks with a leading dimension T. H steps each."""
    observation: torch.Tensor       # (R, H, D) before each step
    action: torch.Tensor            # (R, H, A) as drawn; the world clips it
    log_prob: torch.Tensor          # (R, H) of the action, when it was drawn
    reward: torch.Tensor            # (R, H)
    mask: torch.Tensor              # (R, H) 1, or 0 after the end of a rollout that has reached its goal
    advantage: torch.Tensor         # (R, H) see `advantages`


class Navigation:
    """2D navigation (Finn et al., 2017): go from the origin to a goal in [-0.5, 0.5]^2 that is not shown.

    Observation: the place. Action: the move, each coordinate clipped to [-0.1, 0.1]. Reward: minus the distance to the goal after
    the move. A rollout ends where both coordinates are within 0.01 of the goal's. All tasks and rollouts move in one tensor.
    """
    observations, actions, starts = 2, 2, 0             # D, A, random numbers that a rollout begins with

    def __init__(self, args):
        self.device, self.goal, self.place = args.device, None, None

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
        return self.place, -away.norm(dim=-1), (away.abs() < 0.01).all(-1)

    def close(self):
        pass


class Cheetah:
    """A half-cheetah of MuJoCo's that runs forwards or backwards (`cheetah-dir`), or at a speed from U[0, 2] (`cheetah-vel`).

    Observation (20,): gymnasium's HalfCheetah-v5 (17,) and the torso's place, as in CAVIA's code. Action (6,): torques, clipped to
    [-1, 1]. Reward of a step: direction * speed, or -|speed - goal|, less 0.05 |action|^2. No rollout ends early. Processes
    simulate a part of the animals each, in one environment whose state they exchange.
    """
    observations, actions, starts = 20, 6, 18

    def __init__(self, args):
        try:
            import gymnasium  # noqa: F401 (workers import it again)
            import mujoco  # noqa: F401
        except ImportError as error:
            fail(f"--env {args.env} needs MuJoCo ({error}): pip install 'gymnasium[mujoco]', or choose --env navigation")
        self.device, self.direction, self.shape, self.workers = args.device, args.env == "cheetah-dir", None, []
        context = multiprocessing.get_context("spawn")
        for _ in range(args.workers):
            here, there = context.Pipe()
            process = context.Process(target=simulate, args=(there, self.direction), daemon=True)
            process.start()
            there.close()
            self.workers.append((here, process))

    def tasks(self, u):
        """Random numbers u (T, 2) in [0, 1) -> directions -1 or 1, or speeds in [0, 2] (T, 1)."""
        return torch.where(u[:, :1] < 0.5, -1.0, 1.0) if self.direction else 2 * u[:, :1]

    def ask(self, *columns):
        """Have the animals' rows of each column, shared out evenly, worked at by all processes -> a list of their answers."""
        pieces = zip(*(np.array_split(column, len(self.workers)) for column in columns))
        try:
            for (pipe, _), piece in zip(self.workers, pieces):
                pipe.send(piece)
            return [pipe.recv() for pipe, _ in self.workers]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            fail("a process that simulates half-cheetahs has died: lower --workers, or look whether memory is short")

    def reset(self, goals, rollouts, start):
        """Goals (T, 1), random normal numbers start (T, R, 18) -> observations (T, R, 20)."""
        self.shape = len(goals), rollouts
        each = goals.repeat_interleave(rollouts, 0).numpy()
        return self.tensor(np.concatenate(self.ask(start.view(len(each), -1).numpy(), each)))

    def tensor(self, rows):
        return torch.from_numpy(rows).float().view(*self.shape, -1).to(self.device)

    def step(self, action):
        """Actions (T, R, 6) -> observations (T, R, 20), rewards (T, R), whether the rollout ends (T, R): never."""
        rows = np.concatenate(self.ask(action.flatten(0, 1).double().cpu().numpy()))
        reward = self.tensor(rows[:, -1]).squeeze(-1)
        return self.tensor(rows[:, :-1]), reward, torch.zeros_like(reward, dtype=torch.bool)

    def close(self):
        for pipe, process in self.workers:
            pipe.close()                                # ends its loop
            process.join(5)
            process.terminate()


def simulate(pipe, direction):
    """A process of `Cheetah`: keeps some animals; answers (start, goal) with observations, (action,) with observations and,
    in a last column, rewards."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the parent, which then closes the pipe
    import gymnasium
    import mujoco
    mujoco.set_mju_user_warning(lambda text: None)      # or it writes notes on gymnasium's model file to MUJOCO_LOG.TXT
    env, animals, goals = gymnasium.make("HalfCheetah-v5", disable_env_checker=True).unwrapped, [], None
    env.reset(seed=0)

    def observe():
        return np.concatenate([env._get_obs(), env.data.body("torso").xpos])
    try:
        while True:
            message = pipe.recv()
            if len(message) == 2:
                start, goals = message
                while len(animals) < len(start):
                    animals.append(mujoco.MjData(env.model))
                rows = []
                for env.data, noise in zip(animals, start):
                    mujoco.mj_resetData(env.model, env.data)
                    # gymnasium's: positions differ by U(-0.1, 0.1), which is made of a normal number here, velocities by 0.1 N(0, 1)
                    shift = 0.1 * np.array([math.erf(z / math.sqrt(2)) for z in noise[:9]])
                    env.set_state(env.init_qpos + shift, env.init_qvel + 0.1 * noise[9:])
                    rows.append(observe())
            else:
                rows = []
                for env.data, action, (goal,) in zip(animals, message[0].clip(-1, 1), goals):
                    x = env.data.qpos[0]
                    env.do_simulation(action, env.frame_skip)
                    speed = (env.data.qpos[0] - x) / env.dt
                    reward = (goal * speed if direction else -abs(speed - goal)) - 0.05 * np.square(action).sum()
                    rows.append(np.append(observe(), reward))
            pipe.send(np.array(rows).reshape(len(rows), -1))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass


def make_world(args):
    return (Navigation if args.env == "navigation" else Cheetah)(args)


def goals(world, args, split, first, count):
    """Goals of tasks number first .. first + count - 1: of test and validation, the same for every run."""
    name = f"rl {args.env} {split} {args.seed if split == 'train' else None}"
    rows = [uniform(name, number, 2) for number in range(first, first + count)]
    return world.tasks(torch.from_numpy(np.array(rows)).float())


# --------------------------------------------------------------------------------------------------- policy

def linear(params, name, x):
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def forward(params, x, context=None):
    """The policy: observations x (..., D), and what is known of the task, context (C,), beside each -> means of actions (..., A)."""
    if context is not None:
        x = torch.cat([x, context.expand(*x.shape[:-1], -1)], -1)
    return linear(params, "mean", F.relu(linear(params, "fc2", F.relu(linear(params, "fc1", x)))))


def log_probability(mean, log_std, action):
    """Of actions (..., A), under normal distributions with these means (..., A) and, for all alike, log deviations (A,) -> (...)."""
    log_std = log_std.clamp(min=math.log(1e-6))
    return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def group(params, name):
    """One part of all parameters: "base" (theta), "encoder" or "generator"."""
    if name == "base":
        return {k: w for k, w in params.items() if not k.startswith(("encoder.", "generator."))}
    return {k.removeprefix(f"{name}."): w for k, w in params.items() if k.startswith(f"{name}.")}


def adapted_keys(args, params):
    """Keys of the parameters that inner steps change."""
    return [k for k in group(params, "base") if "all" in args.adapt or k.split(".")[0] in args.adapt]


def init_params(args, world):
    """All parameters, drawn from the seed -> flat dict. The policy's as in CAVIA's code: Xavier's uniform, zero biases, deviation 1;
    the cells' PyTorch's default."""
    rng, params = torch.Generator().manual_seed(args.seed), {}

    def default(name, n_out, n_in, bound=None):
        bound, flat = (bound, 0) if bound else (1 / math.sqrt(n_in), 1)
        params[f"{name}.weight"] = (2 * torch.rand(n_out, n_in, generator=rng) - 1) * bound
        params[f"{name}.bias"] = (2 * torch.rand(n_out, generator=rng) - 1) * bound * flat

    n_in = world.observations + (args.context if args.algorithm == "cavia" else 0)
    for name, n_out in zip(LAYERS, (args.hidden, args.hidden, world.actions)):
        default(name, n_out, n_in, math.sqrt(6 / (n_in + n_out)))
        n_in = n_out
    params["log_std"] = torch.zeros(world.actions)
    if args.algorithm == "modgrad":
        for k in adapted_keys(args, params):
            layer, part = k.split(".")
            for factor, n in zip(("rows", "cols"), params[k].shape) if part == "weight" else (("bias", len(params[k])),):
                default(f"generator.{layer}.{factor}.1", n, args.context)      # phi: Linear, ReLU, Linear
                default(f"generator.{layer}.{factor}.2", args.rank + args.rank * n, n)
                if args.start_at_one:
                    params[f"generator.{layer}.{factor}.2.bias"][args.rank:] = 1.0
    return params


# ----------------------------------------------------------------------------------------------- inner steps
# Each takes (params, fast, loss, args, noisy): what is adapted so far, the loss on the rollouts so far as a function of it, and
# `noisy`, which holds a gradient constant if wanted. Each returns what is adapted then. The text is that of modgrad.py.

def maml_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * gradient(theta)                                            (Finn et al., ICML 2017)"""
    gradient = noisy(torch.func.grad(loss)(fast))
    return {k: fast[k] - args.alpha * gradient[k] for k in fast}


def cavia_step(params, fast, loss, args, noisy):
    """v <- v - alpha * gradient(v): only a context moves, an input beside the observation (Zintgraf et al., ICML 2019)"""
    gradient = noisy(torch.func.grad(loss)(fast))
    return {"context": fast["context"] - args.alpha * gradient["context"]}


def modgrad_step(params, fast, loss, args, noisy):
    """theta <- theta - alpha * M(v) * gradient(theta)                                     (Eq. 5; Algorithm 1, 9-13)"""
    gradient = noisy(torch.func.grad(loss)(fast))                                       # 10

    def step(v):
        M = modulation(params, v, fast)
        return {k: fast[k] - args.alpha * M[k] * gradient[k] for k in fast}
    v = next(iter(fast.values())).new_zeros(args.context)                               # 9
    v = -torch.func.grad(lambda v: loss(step(v)))(v)                                    # 11: Eq. 9
    return step(v.detach() if args.first_order else v)                                  # 12, 13


STEPS = {"modgrad": modgrad_step, "maml": maml_step, "cavia": cavia_step}


def cell(params, name, v):
    """A sister network phi and its mixture: context v -> h a, a column (n,)                (Eq. 6, 7)."""
    out = linear(params, f"{name}.2", F.relu(linear(params, f"{name}.1", v)))
    n = params[f"{name}.1.weight"].shape[0]
    u = len(out) // (n + 1)
    return out[u:].view(n, u) @ out[:u].softmax(0)


def modulation(params, v, like):
    """The generator: context v -> M, a factor for each entry of the parameters `like`  (Eq. 8, then ReLU).

    Kernels' are >= 0. Factors of biases may have any sign: Eq. 8 speaks of the outer product alone. (The released code
    cuts these off at 0 too.)
    """
    M = {}
    for k, w in like.items():
        layer, part = k.rsplit(".", 1)
        if part == "weight":
            rows, cols = (cell(params, f"generator.{layer}.{factor}", v) for factor in ("rows", "cols"))
            M[k] = F.relu(torch.outer(rows, cols)).view(w.shape)
        else:
            M[k] = cell(params, f"generator.{layer}.{part}", v)
    return M


# ------------------------------------------------------------------------------------------------- algorithm

def start(params, args):
    """theta^0: what a task begins with, before any inner step."""
    if args.algorithm == "cavia":
        return {"context": params["fc1.weight"].new_zeros(args.context)}
    return {k: params[k] for k in adapted_keys(args, params)}                           # 6


def policy_loss(params, fast, rollouts):
    """Minus the mean over all steps of ratio * advantage, the ratio that of an action's probability now to when it was drawn.

    Where nothing has changed yet its gradient is the policy gradient, E[advantage * grad log pi]; elsewhere it is still a fair
    estimate, which Eq. 9 and TRPO need. (CAVIA's code has log pi in the inner step: the same step, but a second derivative that
    misses a part of the return's; see Rothfuss et al., ICLR 2019.)
    """
    mean = forward(params | fast, rollouts.observation, fast.get("context"))
    log_std = (params | fast)["log_std"]
    ratio = (log_probability(mean, log_std, rollouts.action) - rollouts.log_prob).exp()
    return -(ratio * rollouts.advantage * rollouts.mask).sum() / rollouts.mask.sum()


def adapt(params, fast, rollouts, args):
    """ONE task, one inner step: from what the policy lived through -> what is adapted then. Numbers: lines of Algorithm 1."""
    def noisy(gradient):
        return {k: g.detach() for k, g in gradient.items()} if args.first_order else gradient
    return STEPS[args.algorithm](params, fast, lambda fast: policy_loss(params, fast, rollouts), args, noisy)      # 9-13


def adapted_policy(params, lived, args):
    """ONE task: the rollouts of each inner step and, last, those after all of them -> the adapted policy where it was then:
    means (R, H, A), log deviations (A,). As a function of params this is what the outer step differentiates (line 16)."""
    (*before, after), fast = lived, start(params, args)
    for rollouts in before:                                                             # 8
        fast = adapt(params, fast, rollouts, args)
    return forward(params | fast, after.observation, fast.get("context")), (params | fast)["log_std"]


def advantages(observation, reward, mask, args):
    """Generalised advantages (Schulman et al., ICLR 2016) over a linear baseline (Duan et al., ICML 2016), fitted to these very
    rollouts of each task by least squares; of mean 0 and deviation 1 over a task's steps.

    observation (T, R, H, D), reward (T, R, H), mask (T, R, H) -> (T, R, H).
    """
    observation, reward, mask = observation.double(), reward.double() * mask, mask.double()
    H = reward.shape[-1]
    total, returns = torch.zeros_like(reward[..., 0]), torch.zeros_like(reward)
    for h in reversed(range(H)):
        total = returns[..., h] = reward[..., h] + args.gamma * total
    time_step = (torch.arange(H, device=reward.device, dtype=torch.float64) / 100).expand(reward.shape)[..., None]
    features = torch.cat([observation, observation ** 2, time_step, time_step ** 2, time_step ** 3, torch.ones_like(time_step)], -1)
    X, y = (features * mask[..., None]).flatten(1, 2), (returns * mask).flatten(1, 2)[..., None]
    ridge = 1e-5 * torch.eye(X.shape[-1], dtype=torch.float64, device=X.device)
    values = (X @ torch.linalg.solve(X.mT @ X + ridge, X.mT @ y)).view(reward.shape)   # 0 where the mask is
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    errors, total, result = reward + args.gamma * following - values, torch.zeros_like(total), torch.zeros_like(reward)
    for h in reversed(range(H)):
        total = result[..., h] = errors[..., h] + args.gamma * args.gae_lambda * total
    n = mask.sum((1, 2), keepdim=True)
    mean = (result * mask).sum((1, 2), keepdim=True) / n
    std = (((result - mean) ** 2 * mask).sum((1, 2), keepdim=True) / n).sqrt()
    return ((result - mean) / (std + 1e-8) * mask).float()


@torch.no_grad()
def act(params, fast, world, targets, args, split, first, update):
    """Let the policies of T tasks (fast with a leading dimension T) act in the world, R rollouts each -> Rollouts (T, R, H, ...).

    Their random numbers depend on the task's number and the update's alone, so a task's rollouts are the same in any batch.
    """
    T, R, H, A = len(targets), args.rollouts, args.horizon, world.actions
    name = f"rl {args.env} {split} {args.seed if split == 'train' else None} rollouts {update}"
    u = torch.from_numpy(np.array([uniform(name, first + t, R * (world.starts + H * A)) for t in range(T)]))
    noise = torch.special.ndtri(u.clamp(min=2.0 ** -54)).float().view(T, R, -1)
    noise_start, noise = noise[..., :world.starts], noise[..., world.starts:].reshape(T, R, H, A).to(args.device)
    policy = torch.func.vmap(lambda fast, x: forward(params | fast, x, fast.get("context")))
    log_std = fast.get("log_std", params["log_std"].expand(T, -1))
    deviation, columns = log_std.clamp(min=math.log(1e-6)).exp()[:, None], []
    x, alive = world.reset(targets, R, noise_start), torch.ones(T, R, device=args.device)
    for h in range(H):
        mean = policy(fast, x)
        action = mean + deviation * noise[:, :, h]
        after, reward, end = world.step(action)
        columns.append((x, action, log_probability(mean, log_std[:, None], action), reward, alive))
        x, alive = after, alive * ~end
    observation, action, log_prob, reward, mask = (torch.stack(column, 2) for column in zip(*columns))
    return Rollouts(observation, action, log_prob, reward, mask, advantages(observation, reward, mask, args))


def returns(rollouts):
    """Sum of rewards, not discounted, mean over a task's rollouts -> (T,)."""
    return (rollouts.reward * rollouts.mask).sum(-1).mean(-1)


def live(params, world, args, split, first, count, updates):
    """Tasks number first .. first + count - 1: act, adapt, act again, ... -> list of Rollouts, updates + 1 of them."""
    targets = goals(world, args, split, first, count)
    fast = {k: w.expand(count, *w.shape) for k, w in start(params, args).items()}
    lived = [act(params, fast, world, targets, args, split, first, 0)]
    halved = argparse.Namespace(**vars(args) | {"alpha": args.alpha / 2})
    for update in range(1, updates + 1):
        options = halved if split != "train" and update > 1 and args.halve_test_lr else args
        with torch.no_grad():
            fast = torch.func.vmap(lambda fast, rollouts, options=options: adapt(params, fast, rollouts, options))(fast, lived[-1])
        lived.append(act(params, fast, world, targets, args, split, first, update))
    return lived


def over_tasks(function, lived):
    """A function of what one task has lived through, which gives a tuple of tensors, for each of T tasks: by vmap, which fills a GPU;
    on a CPU by a loop, whose pieces stay in its cache."""
    if lived[-1].reward.device.type != "cpu":
        return torch.func.vmap(function)(lived)
    rows = [function([Rollouts(*(x[t] for x in rollouts)) for rollouts in lived]) for t in range(len(lived[-1].reward))]
    return tuple(torch.stack(column) for column in zip(*rows))


def conjugate_gradients(product, b, steps):
    """Solve A x = b for a vector b, A symmetric and positive, given the function x -> A x; at most `steps` steps."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    for _ in range(steps):
        if rr < 1e-10:
            break
        Ap = product(p)
        a = rr / (p @ Ap)
        x, r = x + a * p, r - a * Ap
        rr, last = r @ r, rr
        p = r + rr / last * p
    return x


@torch.no_grad()
def trpo_step(params, lived, args):
    """The outer step: from the rollouts of T tasks -> new params, and what is to be known about it.

    Maximises the mean surrogate return of the adapted policies under mean KL(old || new) <= --max-kl, both over the rollouts after
    adaptation: the natural gradient by conjugate gradients, its length by the quadratic model of KL, then a line search.
    """
    names, shapes, every = list(params), [w.shape for w in params.values()], max(1, round(1 / args.fisher_fraction))

    def unflatten(vector):
        return {k: x.view(shape) for k, shape, x in zip(names, shapes, vector.split([s.numel() for s in shapes]))}

    def flatten(tensors):
        return torch.cat([tensors[k].reshape(-1) for k in names])

    def policies_of(lived):
        return lambda params: over_tasks(lambda lived: adapted_policy(params, lived, args), lived)

    def weight_of(after):       # of each step, in a mean over tasks
        return after.mask / after.mask.sum((1, 2), keepdim=True) / len(after.mask)

    policies, after, weight = policies_of(lived), lived[-1], weight_of(lived[-1])
    (mean, log_std), pull = torch.func.vjp(policies, params)                            # pull: the Jacobian, transposed

    def surrogate(mean, log_std):
        ratio = (log_probability(mean, log_std[:, None, None], after.action) - after.log_prob).exp()
        return -(weight * ratio * after.advantage).sum()
    loss = surrogate(mean, log_std)
    gradient = flatten(pull(torch.func.grad(surrogate, (0, 1))(mean, log_std))[0])

    # The second derivative of KL is J^T F J, since its first vanishes where nothing has changed; here of a part of the tasks.
    few = [Rollouts(*(x[::every] for x in rollouts)) for rollouts in lived]
    few_policies, few_weight = policies_of(few), weight_of(few[-1])[..., None]
    (_, few_log_std), few_pull = torch.func.vjp(few_policies, params)

    def fisher(vector):
        push_mean, push_log_std = torch.func.jvp(few_policies, (params,), (unflatten(vector),))[1]                  # J v
        precision = (-2 * few_log_std)[:, None, None].exp()
        pulled = few_pull((few_weight * precision * push_mean, 2 * push_log_std / len(few_log_std)))[0]
        return flatten(pulled) + args.cg_damping * vector

    def kl_from_old(new_mean, new_log_std):
        new, old = new_log_std[:, None, None], log_std[:, None, None]
        kl = new - old + ((2 * old).exp() + (mean - new_mean) ** 2) / (2 * (2 * new).exp()) - 0.5
        return (weight * kl.sum(-1)).sum()
    direction = conjugate_gradients(fisher, gradient, args.cg_steps)
    length = (2 * args.max_kl / (direction @ fisher(direction)).clamp(min=1e-20)).sqrt()
    old, fraction, kl = flatten(params), 1.0, torch.zeros(())
    for _ in range(args.line_search):
        candidate = unflatten(old - fraction * length * direction)
        at = policies(candidate)
        new_loss, kl = surrogate(*at), kl_from_old(*at)
        if new_loss < loss and kl <= args.max_kl:
            return candidate, {"loss": loss, "gain": loss - new_loss, "kl": kl, "fraction": fraction}, unflatten(gradient)
        fraction *= 0.8
    zero = torch.zeros(())
    return params, {"loss": loss, "gain": zero, "kl": zero, "fraction": 0.0}, unflatten(gradient)       # nothing helped


def draw_picture(args):
    """Paths of navigation: a row for each of the first test tasks, a column for each run, before (grey) and after one update
    (coloured), 5 rollouts each, from the middle to the goal, a circle -> PNG."""
    size, count, shown, ink = 220, 4, 5, ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))
    pen = picture = None
    for c, folder in enumerate(args.runs):
        try:
            checkpoint = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
            run = argparse.Namespace(**checkpoint["identity"], device="cpu")
            env, head = run.env, f"{run.method}, iteration {checkpoint['iteration']}"
        except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
            fail(f"--runs {folder}: has no checkpoint of a run of this script ({type(error).__name__}): name another folder")
        if env != "navigation":
            fail(f"--runs {folder}: its paths are not in a plane; name runs of --env navigation")
        if picture is None:
            picture = Image.new("RGB", (len(args.runs) * (size + 4), count * (size + 4) + 18), "white")
            pen = ImageDraw.Draw(picture)
        world = Navigation(run)
        targets, lived = goals(world, run, "test", 0, count), live(checkpoint["params"], world, run, "test", 0, count, 1)
        pen.text((c * (size + 4) + 4, 3), head, "black")
        for i in range(count):
            x0, y0 = c * (size + 4) + 2, i * (size + 4) + 16

            def pixel(places, x0=x0, y0=y0):                    # of the square [-1, 1]^2
                return [(x0 + size * (0.5 + 0.5 * max(-1.0, min(1.0, x))), y0 + size * (0.5 - 0.5 * max(-1.0, min(1.0, y))))
                        for x, y in places]
            pen.rectangle([x0, y0, x0 + size, y0 + size], outline=(200, 200, 200))
            for rollouts, colour in zip(lived, ((190, 190, 190), ink[c % len(ink)])):
                for r in range(min(shown, run.rollouts)):
                    alive = rollouts.mask[i, r] > 0
                    pen.line(pixel(rollouts.observation[i, r][alive].tolist()), colour, 1)
            (x, y), = pixel([targets[i].tolist()])
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], outline="black", width=2)
            values = [f"{returns(rollouts)[i]:.1f}" for rollouts in lived]
            pen.text((x0 + 4, y0 + 3), " -> ".join(values), "black")
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(args.picture, content.getvalue())
    print(f"written: {args.picture}")


# ============================================================================================================
# From here on the text is that of the other scripts, with returns in place of their accuracies and TRPO in place of Adam.

def evaluate(params, world, split, count, args):
    """Returns before and after each update of the first `count` tasks -> array (test updates + 1, count)."""
    rows = []
    with torch.no_grad(), tqdm(total=count, desc=f"{split} tasks", disable=None, leave=False) as bar:
        for first in range(0, count, 20):
            lived = live(params, world, args, split, first, min(20, count - first), args.test_updates)
            rows.append(torch.stack([returns(rollouts) for rollouts in lived]))
            bar.update(rows[-1].shape[1])
    return torch.cat(rows, 1).double().cpu().numpy().round(4)


def summary(per_task):
    """Returns of tasks -> {"mean", "ci95"}: half the width of a 95 % interval, 1.96 s / sqrt(n)."""
    return {"mean": round(float(per_task.mean()), 4), "ci95": round(1.96 * float(per_task.std(ddof=1)) / math.sqrt(len(per_task)), 4)}


def identity(args):
    """What makes two runs the same run: the method, and the arguments that change what is learned."""
    other = ("iterations", "test_tasks", "val_tasks", "val_every", "device", "workers", "out", "test_updates",
             "log_every", "save_every", "keep_every", "stop_after", "eval_only", "overwrite", "quick",
             "picture", "runs", "title", "variant", "halve_test_lr")
    return {"method": args.method} | {k: v for k, v in vars(args).items() if k not in other}


def load(path, args):
    """The checkpoint at `path`. That of another run is an error, which names the difference."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        here, there = identity(args), checkpoint["identity"]
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(f"{path} is no checkpoint ({type(error).__name__}): choose another --out, or --overwrite")
    for key in here | there:
        if here.get(key) != there.get(key):
            fail(f"{path.parent} has {key} {there.get(key)}, not {here.get(key)}: give another --out")
    return checkpoint


def train(params, world, args, checkpoint, stop):
    """Run the iterations that are missing, from the checkpoint on -> params, iterations done, seconds of training."""
    done, before, window = 0, 0.0, []
    if checkpoint:
        done, before, window = (checkpoint[k] for k in ("iteration", "seconds", "window"))
    if done >= args.iterations or args.eval_only:
        return params, done, before
    out, T, first, begun = Path(args.out), args.meta_batch, done, time.perf_counter()
    deadline, ending = begun + (math.inf if args.stop_after is None else args.stop_after), False
    log = out / "log.jsonl"     # lines from after the checkpoint, if the run was killed, will come again
    lines = log.read_text().splitlines() if checkpoint and log.exists() else []
    lines = [line for line in lines if json.loads(line)["iteration"] <= done]
    for number in (signal.SIGINT, signal.SIGTERM):      # the first ends the run cleanly, a second one at once
        signal.signal(number, lambda n, _: (stop.append(f"signal {n}"), signal.signal(n, signal.SIG_DFL)))
    with tqdm(total=args.iterations, initial=done, desc=args.title, disable=None) as bar:
        while not ending:
            lived = live(params, world, args, "train", done * T, T, args.updates)
            params, step, gradient = trpo_step(params, lived, args)
            norms = {p: math.hypot(*(g.norm() for g in group(gradient, p).values())) for p in PARTS}
            window.append([float(returns(rollouts).mean()) for rollouts in lived] + [float(x) for x in step.values()])
            done += 1
            bar.update()
            if done - first == 5:
                left = (time.perf_counter() - begun) / 5 * (args.iterations - done) / 60
                bar.write(f"about {left:.0f} min to the end" + "; try --quick?" * (left > 120), sys.stderr)
            if time.perf_counter() > deadline:
                stop.append("--stop-after")
            ending = bool(stop) or done == args.iterations
            if done % args.log_every == 0 or done == args.iterations:
                seconds, means = time.perf_counter() - begun, np.mean(window, 0).tolist()
                if not math.isfinite(sum(means) + sum(norms.values())):
                    fail(f"not finite near iteration {done}: lower --alpha or --max-kl, in another --out")
                line = {"iteration": done, "returns": means[:args.updates + 1], **dict(zip(step, means[args.updates + 1:])),
                        "gradient_norm": norms, "seconds": before + seconds}
                if args.val_every and done // args.val_every > (done - len(window)) // args.val_every:
                    line["validation"] = [summary(row) for row in evaluate(params, world, "val", args.val_tasks, args)]
                    begun = time.perf_counter() - seconds       # seconds count training alone
                lines.append(json.dumps(line))
                atomic_write(log, "\n".join(lines) + "\n")
                window = []
                bar.set_postfix_str("return " + " -> ".join(f"{x:.1f}" for x in line["returns"]))
                if bar.disable:                                 # not a terminal: lines instead of a bar
                    print(f"{args.title} {done}/{args.iterations}", bar.postfix, flush=True)
            if args.keep_every and done % args.keep_every == 0:
                atomic_write(out / f"params-{done}.pt", {k: w.cpu() for k, w in params.items()})
            if done % args.save_every == 0 or ending:
                atomic_write(out / "checkpoint.pt", {
                    "identity": identity(args), "iteration": done, "seconds": before + time.perf_counter() - begun,
                    "window": window, "params": {k: w.cpu().clone() for k, w in params.items()}})
    return params, done, before + time.perf_counter() - begun


def report(result, args):
    """Print what was measured, under which protocol, with its interval, beside the paper's number."""
    paper = "" if args.variant else PAPER[result["method"]].get(args.env, "")
    print(f"\n{args.title}: {result['test_tasks']} test tasks of {args.rollouts} rollouts, after {result['iterations']} iterations of "
          f"{result['seconds_per_iteration']} s\n{result['protocol']}")
    for update, row in enumerate(result["returns"]):
        name = f"after {update} update{'s' * (update > 1)}" if update else "before"
        print(f"{name:18}{'{mean:.2f} +- {ci95:.2f}'.format(**row):20}" + f"{TABLE}: {paper}" * (update == 1 and bool(paper)))


def main():
    args = get_args()
    if args.picture:
        draw_picture(args)
        return
    out, stop = Path(args.out), []
    for file in out.glob("*") if args.overwrite else ():
        if file.name in ("checkpoint.pt", "log.jsonl", "result.json") or file.match("params-*.pt"):
            file.unlink()
    checkpoint = load(out / "checkpoint.pt", args) if (out / "checkpoint.pt").exists() else None
    if args.eval_only and not checkpoint:
        fail(f"--eval-only, but there is no {out / 'checkpoint.pt'}: train first, or name the run by --out")
    world = make_world(args)
    params = checkpoint["params"] if checkpoint else init_params(args, world)
    params = {k: w.to(args.device) for k, w in params.items()}
    params, done, seconds = train(params, world, args, checkpoint, stop)
    if stop and done < args.iterations:
        world.close()
        print(f"stopped by {stop[0]} at iteration {done} of {args.iterations}; the same command continues")
        return
    for number in (signal.SIGINT, signal.SIGTERM):      # training is saved; evaluation may be cut anywhere
        signal.signal(number, signal.SIG_DFL)
    file, tasks = out / "result.json", hashlib.sha256(goals(world, args, "test", 0, args.test_tasks).numpy().tobytes()).hexdigest()
    result = json.loads(file.read_text()) if checkpoint and file.exists() else {}
    halved = result.get("args", {}).get("halve_test_lr", False)
    measured = [result.get("iterations"), result.get("tasks_sha256"), len(result.get("returns", ())), halved]
    if measured != [done, tasks, args.test_updates + 1, args.halve_test_lr]:
        rows = evaluate(params, world, "test", args.test_tasks, args)
        device = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        git = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40 2>{os.devnull}'
        result = {
            "method": args.method, "env": args.env, "synthetic": False, "protocol": PROTOCOL, "test_tasks": args.test_tasks,
            "tasks_sha256": tasks, "returns": [summary(row) for row in rows], "iterations": done,
            "seconds_train": round(seconds, 1), "seconds_per_iteration": round(seconds / max(done, 1), 4),
            "parameters": {part: sum(w.numel() for w in group(params, part).values()) for part in PARTS},
            "args": {k: v for k, v in vars(args).items() if k != "out"},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "device": device,
                         "threads": torch.get_num_threads(), "commit": os.popen(git).read().strip()},
            "per_task": rows.tolist()}
        atomic_write(file, json.dumps(result))
    world.close()
    report(result, args)


if __name__ == "__main__":
    main()
