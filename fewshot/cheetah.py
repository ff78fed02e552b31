"""The half-cheetah of MuJoCo, simulated by several processes."""

import math
import multiprocessing
import signal

import numpy as np
import torch

from fewshot.files import fail


class Cheetah:
    """A half-cheetah that runs forwards or backwards (`cheetah-dir`), or at a speed from U[0, 2] (`cheetah-vel`).

    Observation (20,): gymnasium's HalfCheetah-v5 (17,) and the torso's place, as in CAVIA's code. Action (6,): torques,
    clipped to [-1, 1]. Reward of a step: direction * speed, or -|speed - goal|, less 0.05 |action|^2. No rollout ends
    early. Each process simulates a part of the animals, in one environment into which it puts each in turn.
    """

    observations = 20  # D
    actions = 6  # A
    starts = 18  # random numbers that a rollout begins with

    def __init__(self, args):
        try:
            import gymnasium  # noqa: F401 (workers import it again)
            import mujoco  # noqa: F401
        except ImportError as error:
            remedy = "pip install 'gymnasium[mujoco]', or choose --env navigation"
            fail(f"--env {args.env} needs MuJoCo ({error}): {remedy}")
        self.device = args.device
        self.direction = args.env == "cheetah-dir"
        self.shape = None  # T tasks, R rollouts: of the last reset
        self.workers = []
        context = multiprocessing.get_context("spawn")
        for _ in range(args.workers):
            here, there = context.Pipe()
            process = context.Process(target=simulate, args=(there, self.direction), daemon=True)
            process.start()
            there.close()
            self.workers.append((here, process))

    def tasks(self, u):
        """Random numbers u (T, 2) in [0, 1) -> directions -1 or 1, or speeds in [0, 2] (T, 1)."""
        return directions(u) if self.direction else 2 * u[:, :1]

    def ask(self, *columns):
        """Share out arrays, a row for each animal, evenly among the processes -> their answers, a row for each."""
        pipes = [pipe for pipe, _ in self.workers][: len(columns[0])]  # no process without an animal
        pieces = zip(*(np.array_split(column, len(pipes)) for column in columns))
        try:
            for pipe, piece in zip(pipes, pieces):
                pipe.send(piece)
            return np.concatenate([pipe.recv() for pipe in pipes])
        except (EOFError, BrokenPipeError, ConnectionResetError):
            remedy = "lower --workers, or look whether memory is short"
            fail(f"a process that simulates half-cheetahs has died: {remedy}")

    def reset(self, goals, rollouts, start):
        """Goals (T, 1), random normal numbers start (T, R, 18) -> observations (T, R, 20)."""
        self.shape = len(goals), rollouts
        each = goals.repeat_interleave(rollouts, 0).numpy()
        noise = start.view(len(each), -1).numpy()
        return self.tensor(self.ask(noise, each))

    def tensor(self, rows):
        """An array with a row for each animal -> float32 tensor (T, R, ...), on the device."""
        x = torch.from_numpy(rows).float()
        return x.view(*self.shape, -1).to(self.device)

    def step(self, action):
        """Actions (T, R, 6) -> observations (T, R, 20), rewards (T, R), whether the rollout ends (T, R): never."""
        rows = self.ask(action.flatten(0, 1).double().cpu().numpy())
        observation = self.tensor(rows[:, :-1])
        reward = self.tensor(rows[:, -1]).squeeze(-1)
        return observation, reward, torch.zeros_like(reward, dtype=torch.bool)

    def close(self):
        """End the processes."""
        for pipe, process in self.workers:
            pipe.close()  # ends its loop
            process.join(5)
            process.terminate()


def directions(u):
    """Random numbers u (T, 2) in [0, 1) -> directions -1 or 1 (T, 1)."""
    return torch.where(u[:, :1] < 0.5, -1.0, 1.0)


def simulate(pipe, direction):
    """Keep some animals, in a process of its own, until the pipe is closed.

    Answers (noise, goals) with observations, and (actions,) with observations and, in a last column, rewards.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    import gymnasium
    import mujoco

    # Without this, MuJoCo writes notes on gymnasium's model to MUJOCO_LOG.TXT.
    mujoco.set_mju_user_warning(lambda text: None)
    env = gymnasium.make("HalfCheetah-v5", disable_env_checker=True).unwrapped
    env.reset(seed=0)
    animals = []
    goals = None
    try:
        while True:
            message = pipe.recv()
            if len(message) == 2:
                noise, goals = message
                add_animals(env, animals, len(noise))
                rows = [begin(env, animal, z) for animal, z in zip(animals, noise)]
            else:
                actions = message[0].clip(-1, 1)
                rows = [move(env, *row, direction) for row in zip(animals, actions, goals)]
            pipe.send(np.array(rows).reshape(len(rows), -1))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass


def add_animals(env, animals, wanted):
    """Add animals to a list until it holds as many as are wanted."""
    import mujoco

    while len(animals) < wanted:
        animals.append(mujoco.MjData(env.model))


def begin(env, animal, z):
    """Put an animal at its start, moved by normal random numbers z (18,) -> its observation (20,).

    As in gymnasium: positions differ by U(-0.1, 0.1), which is made of a normal number here, velocities by 0.1 N(0, 1).
    """
    import mujoco

    env.data = animal
    mujoco.mj_resetData(env.model, animal)
    uniform = [math.erf(x / math.sqrt(2)) for x in z[:9]]  # in [-1, 1]
    shift = 0.1 * np.array(uniform)
    env.set_state(env.init_qpos + shift, env.init_qvel + 0.1 * z[9:])
    return observe(env)


def move(env, animal, action, goal, direction):
    """Simulate one step of an animal -> its observation and its reward (21,)."""
    env.data = animal
    x = animal.qpos[0]
    env.do_simulation(action, env.frame_skip)
    speed = (animal.qpos[0] - x) / env.dt
    gain = goal[0] * speed if direction else -abs(speed - goal[0])
    return np.append(observe(env), gain - 0.05 * np.square(action).sum())


def observe(env):
    """Positions, velocities and the torso's place (20,) of the animal that the environment holds."""
    return np.concatenate([env._get_obs(), env.data.body("torso").xpos])
