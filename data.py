"""Data sets and episodes: the one module that the algorithm scripts import.

A few-shot *task* (an episode) is a small classification problem of its own: N classes ("ways"), K labelled *support*
images of each ("shots") to learn from, Q *query* images of each to be evaluated on. A *mode* is a data set that tasks
are drawn from; multimodal meta-learning draws every task from one of several modes, and does not say which.

    episodes = Episodes(["omniglot", "miniimagenet"], "train", ways=5, shots=5, queries=15, image_size=84, seed=0)
    batch = episodes.tasks(first=0, count=10)        # Task: support_x (10, 25, 3, 84, 84), support_y (10, 25), ...

    python data.py list | prepare MODE | verify | show MODE

A counter-based generator makes task j of a mode a pure function of j and the flags. So every method sees the same test
tasks on every machine, and a continued run sees the tasks that it would have seen. Images: fewshot/cache.py.
"""

import hashlib

import numpy as np
import torch

from fewshot import plots, tool
from fewshot.cache import check_enough, prepare
from fewshot.cheetah import Cheetah
from fewshot.draws import distinct, uniform
from fewshot.files import atomic_write, fail
from fewshot.flags import *  # noqa: F403 (the flags that scripts share: its __all__)
from fewshot.intervals import student
from fewshot.names import canonical_mode, user_path
from fewshot.parallel import cores, fresh_memory, in_threads, recorded
from fewshot.published import LAYOUTS, SPLITS
from fewshot.records import read_log, read_result, read_tensors
from fewshot.run import Run
from fewshot.store import content_of, open_split
from fewshot.subtasks import Scenes
from fewshot.task import Task


class Episodes:
    """Draws tasks from one or several modes.

    Task number g is task number g // M of mode g mod M: modes take turns. (In MMAML's released code, they do so only on average.)

    Args:
        modes: names of the M modes. split: "train", "val" or "test". ways, shots, queries: N, K, Q. image_size: S, pixels.
        seed: of training tasks; None for val and test, whose tasks are the same for every run. device: where images live
        and tasks are assembled. root, cache_dir, synthetic, allow_shared: see fewshot.cache.prepare.
    """

    BLOCK = 256  # tasks of one mode that are drawn together; changing it changes tasks

    def __init__(
        self, modes, split, ways, shots, queries, image_size, seed=None, device="cpu",
        root="data", cache_dir=".cache", synthetic=False, allow_shared=False,
    ):  # fmt: skip
        self.modes = [canonical_mode(mode, root) for mode in modes]
        self.split = split
        self.seed = seed
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.size = image_size
        self.device = torch.device(device)
        self.synthetic = synthetic
        self.images = []  # of each mode: (n, S, S, C) uint8
        self.folders = []  # of each mode: the name of what its images were made from
        self.contents = {}  # of each mode: a hash of its images and classes
        self.class_names = []  # of each mode
        self.counts = []  # of each mode: images of each class
        self.offsets = []  # of each mode: row of each class's first image
        self.drawn = {}  # (mode, block): what `draw` returned
        if len(set(self.modes)) < len(self.modes):
            fail(f"--modes names a data set twice: {' '.join(self.modes)}")
        for mode in self.modes:
            self.open(mode, prepare(mode, image_size, root, cache_dir, synthetic, allow_shared))

    @classmethod
    def of(cls, args, split):
        """Episodes as the flags of a script describe them; only training depends on the seed."""
        return cls(
            modes=args.modes,
            split=split,
            ways=args.ways,
            shots=args.shots,
            queries=args.queries,
            image_size=args.image_size,
            seed=args.seed if split == "train" else None,
            device=args.device,
            root=args.data_root,
            cache_dir=args.cache_dir,
            synthetic=args.synthetic,
            allow_shared=vars(args).get("allow_shared_classes", False),
        )

    def open(self, mode, folder):
        """Map the images of a mode into memory, and check that there are enough."""
        classes, pixels = open_split(folder, self.split)
        check_enough(f"{mode}/{self.split}", classes, self.ways, self.shots, self.queries)
        pixels = pixels.to(self.device)  # on the CPU they stay on disk, paged in as needed
        if mode == "omniglot" and self.device.type != "cpu":  # keep all four turns
            turned = [torch.rot90(pixels, quarter, (1, 2)) for quarter in range(4)]
            pixels = torch.cat(turned)
        counts = np.array([count for _, count in classes])
        self.images.append(pixels)
        self.folders.append(folder.name)
        self.contents[mode] = content_of(folder)
        self.class_names.append([name for name, _ in classes])
        self.counts.append(counts)
        self.offsets.append(np.cumsum(counts) - counts)

    def draw(self, m, number):
        """Draw block `number` of mode m: 256 tasks -> classes (256, N), images (256, N, K+Q), turns (256, N).

        An image is a number below the size of its class; a turn is a number of quarters, which only Omniglot uses.
        """
        T, N = self.BLOCK, self.ways
        k = self.shots + self.queries
        slots = T * N  # each holds a class
        name = f"{self.modes[m]} {self.split} {self.ways} {self.shots} {self.queries} {self.seed}"
        u = uniform(name, number, slots * (1 + k + 1))  # a slot's class, images and turn
        u_class, u_image, u_turn = np.split(u, [slots, slots + slots * k])

        counts = self.counts[m]  # images of each class
        class_counts = np.full(T, len(counts))
        classes = distinct(u_class.reshape(T, N), class_counts)
        image_counts = counts[classes.reshape(slots)]
        images = distinct(u_image.reshape(slots, k), image_counts)
        turns = (4 * u_turn).astype(np.int64)
        return classes, images.reshape(T, N, k), turns.reshape(T, N)

    def block(self, m, number):
        """What `draw` returns, and the rows (256, N, K+Q) of the images, on the device; drawn once, then kept.

        Omniglot has 4 n rows for its n images: row r + turn * n is image r, turned.
        """
        if (m, number) in self.drawn:
            return self.drawn[m, number]
        classes, images, turns = self.draw(m, number)
        offsets = self.offsets[m][classes]
        rows = offsets[..., None] + images
        if self.modes[m] == "omniglot":
            n = self.counts[m].sum()
            rows += turns[..., None] * n
        rows = torch.from_numpy(rows).to(self.device)  # makes the host wait: so once per block, not per batch
        self.drawn[m, number] = classes, images, turns, rows
        return self.drawn[m, number]

    def indices(self, m, first, count):
        """Tasks first .. first + count - 1 of mode m -> classes (count, N), images (count, N, K+Q), turns, rows: see `block`."""
        last = first + count - 1
        numbers = range(first // self.BLOCK, last // self.BLOCK + 1)
        for key in list(self.drawn):  # keep only the blocks needed now
            if key[0] == m and key[1] not in numbers:
                del self.drawn[key]
        blocks = [self.block(m, number) for number in numbers]
        classes, images, turns, rows = zip(*blocks)
        start = first % self.BLOCK
        places = slice(start, start + count)
        arrays = [np.concatenate(parts)[places] for parts in (classes, images, turns)]
        return [*arrays, torch.cat(rows)[places]]

    def tasks(self, first, count):
        """Draw tasks number first .. first + count - 1 over all modes -> Task with a leading dimension `count`."""
        N = self.ways
        K = self.shots
        Q = self.queries
        S = self.size
        M = len(self.modes)
        support = fresh_memory((count, N, K, 3, S, S), self.device)
        query = fresh_memory((count, N, Q, 3, S, S), self.device)
        for m in range(M):
            turn = (m - first) % M  # this mode's first place in the batch
            if turn >= count:
                continue
            number = (first + turn) // M  # of this mode's first task here
            share = len(range(turn, count, M))
            *_, rows = self.indices(m, number, share)
            pixels = self.pixels(m, rows.reshape(-1))
            pixels = pixels.view(share, N, K + Q, S, S, -1)
            pixels = pixels.permute(0, 1, 2, 5, 3, 4)  # (share, N, K+Q, C, S, S)
            support[turn::M] = pixels[:, :, :K]  # uint8 to float; the same grey three times if C is 1
            query[turn::M] = pixels[:, :, K:]
        support.div_(255)
        query.div_(255)
        labels = torch.arange(N, device=self.device)
        numbers = first + torch.arange(count)
        return Task(
            support_x=support.view(count, N * K, 3, S, S),
            support_y=labels.repeat_interleave(K).expand(count, -1),
            query_x=query.view(count, N * Q, 3, S, S),
            query_y=labels.repeat_interleave(Q).expand(count, -1),
            mode=numbers % M,
        )

    def pixels(self, m, rows):
        """Images (len(rows), S, S, C) of rows of mode m."""
        n = len(self.images[m])
        pixels = self.images[m][rows % n]
        if self.modes[m] == "omniglot" and self.device.type == "cpu":  # turn now: less memory, but slower
            for quarter in (1, 2, 3):
                turned = (rows // n == quarter).nonzero().squeeze(1)
                pixels[turned] = torch.rot90(pixels[turned], quarter, (1, 2))
        return pixels

    def repeated(self, iteration, count):
        """Draw the tasks of a training iteration as MMAML's and KML's released code does -> what `tasks` returns.

        There, each of the M modes loads T = `count` tasks, of which T / M are drawn *with replacement*.
        """
        M = len(self.modes)
        first = iteration * count
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + iteration)
        drawn = torch.randint(count, (count,), generator=rng).tolist()
        tasks = []
        for place, loaded in enumerate(drawn):
            m = (first + place) % M
            number = (first + loaded) * M + m  # over all modes: task first + loaded of mode m
            tasks.append(self.tasks(number, 1))
        fields = zip(*tasks)
        return Task(*map(torch.cat, fields))

    def sha256(self, count):
        """A hash of the first `count` tasks: modes, names and sizes of their classes, and the indices drawn."""
        digest = hashlib.sha256()
        for m, mode in enumerate(self.modes):
            names = f"{mode} {self.class_names[m]} {self.counts[m].tolist()}"
            digest.update(names.encode(errors="surrogateescape"))
            if tasks := len(range(m, count, len(self.modes))):
                for array in self.indices(m, 0, tasks)[:3]:
                    digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


def main():
    tool.main(Episodes)


if __name__ == "__main__":
    main()
