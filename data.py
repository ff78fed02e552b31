"""Data sets and episodes: the one module that the algorithm scripts share.

A few-shot *task* (an episode) is a small classification problem of its own: N classes ("ways"), K labelled *support*
images of each ("shots") to learn from, Q *query* images of each to be judged on. A *mode* is a data set that tasks are
drawn from; multimodal meta-learning draws every task from one of several modes, and does not say which.

    from data import Episodes, Task, atomic_write, fail
    episodes = Episodes(["omniglot", "miniimagenet"], "train", ways=5, shots=5, queries=15, image_size=84, seed=0)
    batch = episodes.tasks(first=0, count=10)            # Task: support_x (10, 25, 3, 84, 84), support_y (10, 25), ...

    python data.py list                                  # which modes are here, from which source
    python data.py prepare omniglot miniimagenet         # find or download, check, decode once
    python data.py show miniimagenet                     # a picture of an episode
    python data.py show scenes                           # ray-cast rooms: image, depth, normals, vanishing point

A mode is looked for in this order: your class folders `<root>/<mode>/{train,val,test}/<class>/<image>` or
`<root>/<mode>/{train,val,test}.zip`; the archives as their authors published them, in `<root>` or `<root>/<mode>`, packed or
unpacked; an earlier cache; the network. Images are decoded once, resized with LANCZOS, and memory-mapped as uint8. A cache is
named after what it was made from, so one that exists is opened at once and one of a changed source is never used.

The sampler never holds random state: task j of a mode is a pure function of its arguments, through a counter-based
generator. So every method sees the same test tasks, on every machine, and a resumed run sees the tasks it would have seen.
"""
import hashlib
import json
from typing import NamedTuple

import numpy as np
import torch

from fewshot import tool
from fewshot.cache import canonical_mode, prepare
from fewshot.draws import distinct, uniform
from fewshot.files import atomic_write, fail
from fewshot.intervals import student
from fewshot.parallel import cores, in_threads, recorded
from fewshot.published import LAYOUTS, SPLITS
from fewshot.run import (
    Run,
    add_data_flags,
    add_device_flags,
    add_run_flags,
    complete,
    fill,
    new_parser,
    parse,
    reset_unused,
)
from fewshot.scenes import unpack

__all__ = [
    *("Episodes", "Task", "Run"),  # tasks, and the folder of a run
    *("new_parser", "add_data_flags", "add_device_flags", "add_run_flags", "parse", "fill", "reset_unused", "complete"),
    *("LAYOUTS", "SPLITS", "canonical_mode", "prepare", "unpack"),  # images
    *("distinct", "uniform", "student"),  # random numbers, intervals
    *("atomic_write", "cores", "fail", "in_threads", "recorded"),
]


class Task(NamedTuple):
    """One few-shot task, or a batch of T of them with a leading dimension T. N ways, K shots, Q queries, S pixels."""
    support_x: torch.Tensor         # (N*K, 3, S, S) float32 in [0, 1]
    support_y: torch.Tensor         # (N*K,) int64: 0 .. N-1, K times each
    query_x: torch.Tensor           # (N*Q, 3, S, S)
    query_y: torch.Tensor           # (N*Q,)
    mode: torch.Tensor              # () int64: index of the task's mode. For reports only; no algorithm may look at it


class Episodes:
    """Draws tasks from one or several modes.

    Task number g comes from mode g mod M and is that mode's task number g // M: modes take turns, which balances them
    exactly (the released code starts each batch at a random mode, which balances them on average).

    Args:
        modes: names of the M modes. split: "train", "val" or "test". ways, shots, queries: N, K, Q.
        image_size: S, pixels. seed: of training episodes; None for val and test, whose tasks are the same for every run.
        device: where images live and tasks are assembled. root, cache_dir, synthetic: see `prepare`.

    Exits with status 2 if a class has fewer than K + Q images or a split fewer than N classes.
    """
    BLOCK = 256                     # tasks of one mode that are drawn together; part of what defines a task

    def __init__(self, modes, split, ways, shots, queries, image_size, seed=None, device="cpu",
                 root="data", cache_dir=".cache", synthetic=False):
        self.modes = [canonical_mode(mode, root) for mode in modes]
        self.split, self.ways, self.shots, self.queries = split, ways, shots, queries
        self.seed, self.size, self.device, self.synthetic = seed, image_size, torch.device(device), synthetic
        self.images, self.counts, self.offsets, self.class_names, self.folders, self.drawn = [], [], [], [], [], {}
        if len(set(self.modes)) < len(self.modes):
            fail(f"--modes names a data set twice: {' '.join(self.modes)}")
        for mode in self.modes:
            folder = prepare(mode, image_size, root, cache_dir, synthetic)
            classes = json.loads((folder / "classes.json").read_text()).get(split, [])
            if len(classes) < ways:
                fail(f"{mode}/{split} has {len(classes)} classes, fewer than {ways} ways: lower --ways or add classes")
            name, least = min(classes, key=lambda item: item[1])
            if least < shots + queries:
                fail(f"{mode}/{split}: class {name} has {least} images, {shots} shots + {queries} queries need "
                     f"{shots + queries}: lower --shots or --queries, or add images")
            pixels = torch.from_numpy(np.load(folder / f"{split}.npy", mmap_mode="c"))      # (n, S, S, C) uint8
            pixels = pixels.to(self.device)                 # on the CPU: stays on disk, paged in as needed
            if mode == "omniglot" and self.device.type != "cpu":        # room for the images turned in all four ways
                pixels = torch.cat([torch.rot90(pixels, quarter, (1, 2)) for quarter in range(4)])
            self.images.append(pixels)
            self.counts.append(np.array([count for _, count in classes]))
            self.offsets.append(np.cumsum(self.counts[-1]) - self.counts[-1])
            self.class_names.append([name for name, _ in classes])
            self.folders.append(folder.name)                # names what the images were made from

    @classmethod
    def of(cls, args, split):
        """Episodes as the flags of a script describe them; only training depends on the seed."""
        return cls(args.modes, split, args.ways, args.shots, args.queries, args.image_size,
                   args.seed if split == "train" else None, args.device, args.data_root, args.cache_dir, args.synthetic)

    def draw(self, m, block):
        """Tasks block * 256 .. + 255 of mode m, drawn at once -> classes (256, N), images (256, N, K+Q), turns (256, N)."""
        name = f"{self.modes[m]} {self.split} {self.ways} {self.shots} {self.queries} {self.seed}"
        T, N, k, counts = self.BLOCK, self.ways, self.shots + self.queries, self.counts[m]
        u = uniform(name, block, T * N * (k + 2))
        u_class, u_image, u_turn = np.split(u, [T * N, T * N * (1 + k)])
        classes = distinct(u_class.reshape(T, N), np.full(T, len(counts)))
        images = distinct(u_image.reshape(T * N, k), counts[classes.reshape(-1)]).reshape(T, N, k)
        return classes, images, (4 * u_turn).astype(np.int64).reshape(T, N)

    def indices(self, m, first, count):
        """Tasks first .. first + count - 1 of mode m -> the arrays of `draw`, and the rows (count, N, K+Q) of their images,
        on the device. Omniglot has 4 n rows for its n images: row r + turn * n is image r, turned."""
        blocks = range(first // self.BLOCK, (first + count - 1) // self.BLOCK + 1)
        self.drawn = {key: value for key, value in self.drawn.items() if key[0] != m or key[1] in blocks}
        for block in blocks:
            if (m, block) not in self.drawn:
                classes, images, turns = self.draw(m, block)
                rows = torch.from_numpy(self.offsets[m][classes][..., None] + images)
                if self.modes[m] == "omniglot":
                    rows += torch.from_numpy(turns)[..., None] * self.counts[m].sum()
                # A copy from the host makes it wait for the device: so one a block, not one a batch.
                self.drawn[m, block] = classes, images, turns, rows.to(self.device)
        start = first - blocks[0] * self.BLOCK
        *drawn, rows = zip(*(self.drawn[m, block] for block in blocks))
        return [*(np.concatenate(parts)[start:start + count] for parts in drawn), torch.cat(rows)[start:start + count]]

    def tasks(self, first, count):
        """Tasks number first .. first + count - 1 over all modes, on the device -> Task with a leading dimension `count`."""
        N, K, Q, S, M = self.ways, self.shots, self.queries, self.size, len(self.modes)
        # On the CPU the first touch of fresh memory costs more than all else here; numpy asks for huge pages, torch not.
        support, query = (torch.empty(count, N, k, 3, S, S, device=self.device) if self.device.type != "cpu" else
                          torch.from_numpy(np.empty((count, N, k, 3, S, S), np.float32)) for k in (K, Q))
        for m in range(M):
            turn = (m - first) % M                          # this mode's first place in the batch
            if turn >= count:
                continue
            places = slice(turn, count, M)
            *_, rows = self.indices(m, (first + turn) // M, len(range(count)[places]))
            flat, n = rows.reshape(-1), len(self.images[m])
            pixels = self.images[m][flat % n]               # (tasks * N * (K+Q), S, S, C)
            if self.modes[m] == "omniglot" and self.device.type == "cpu":       # a quarter of the memory, and slower
                for quarter in (1, 2, 3):
                    turned = (flat // n == quarter).nonzero().squeeze(1)
                    pixels[turned] = torch.rot90(pixels[turned], quarter, (1, 2))
            pixels = pixels.view(*rows.shape, S, S, -1).permute(0, 1, 2, 5, 3, 4)       # (tasks, N, K+Q, C, S, S)
            support[places], query[places] = pixels[:, :, :K], pixels[:, :, K:]         # to float, C to 3 channels
        labels = torch.arange(N, device=self.device)
        return Task(support.div_(255).view(count, N * K, 3, S, S), labels.repeat_interleave(K).expand(count, -1),
                    query.div_(255).view(count, N * Q, 3, S, S), labels.repeat_interleave(Q).expand(count, -1),
                    (first + torch.arange(count)) % M)

    def repeated(self, iteration, count):
        """Draw the tasks of a training iteration as the released codes of MMAML and KML do -> like `tasks`.

        There, each of the M modes loads `count` tasks (T), and the T tasks of the iteration are drawn from these *with
        replacement*, T / M from each mode. So of 10 tasks 8.2 differ on average with two modes, and 6.5 with one.
        """
        M, first = len(self.modes), iteration * count
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + iteration)
        drawn = torch.randint(count, (count,), generator=rng).tolist()
        numbers = [(first + at) * M + (first + place) % M for place, at in enumerate(drawn)]
        tasks = [self.tasks(number, 1) for number in numbers]
        return type(tasks[0])(*(torch.cat(parts) for parts in zip(*tasks)))

    def everything(self, number):
        """All images of the classes of task `number`, with their labels in it -> (n, 3, S, S), (n,)."""
        m, S = number % len(self.modes), self.size
        classes, _, turns, _ = (x[0] for x in self.indices(m, number // len(self.modes), 1))
        parts = [self.images[m][self.offsets[m][c]:][:self.counts[m][c]] for c in classes]
        if self.modes[m] == "omniglot":
            parts = [torch.rot90(part, int(quarters), (1, 2)) for part, quarters in zip(parts, turns)]
        labels = torch.cat([torch.full((len(part),), n, device=self.device) for n, part in enumerate(parts)])
        return torch.cat(parts).permute(0, 3, 1, 2).expand(-1, 3, S, S).float() / 255, labels

    def sha256(self, count):
        """A hash of the first `count` tasks: modes, names and sizes of their classes, and the indices drawn."""
        digest = hashlib.sha256()
        for m, mode in enumerate(self.modes):
            digest.update(f"{mode} {self.class_names[m]} {self.counts[m].tolist()}".encode())
            if tasks := len(range(m, count, len(self.modes))):
                for array in self.indices(m, 0, tasks)[:3]:
                    digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


if __name__ == "__main__":
    tool.main(Episodes)
