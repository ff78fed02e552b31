"""Subtasks that differ in domain: depth, normals or a vanishing point, on images of one place."""

import hashlib

import numpy as np
import torch

from fewshot.cache import prepare
from fewshot.draws import distinct, uniform
from fewshot.files import fail
from fewshot.scenes import unpack
from fewshot.store import content_of
from fewshot.task import Task


class Scenes:
    """Draws subtasks that differ in domain: one image-to-label problem, `kind`, on images of one domain.

    Task fields here: support_x (n, 3, S, S) and query_x (m, 3, S, S); support_y and query_y by kind, in [0, 1], -1 where
    not known: "depth" (n, 1, S, S), z / 10 m; "normals" (n, 3, S, S), (normal + 1) / 2; "vanishing" (n, 2), shares of
    width and height; mode: the domain's index.

    Args:
        kind: "depth", "normals" or "vanishing". split: as for `Episodes`.
        args: the flags; n = ways * shots, m = ways * queries. args.modes holds one mode: "scenes", or a folder of
        photographs with depth: `<root>/<mode>/<split>/<domain>/` with <name>.jpg beside <name>.png (16 bits,
        millimetres, 0 where not known) and focal.txt (pixels).

    Domains take turns in test and validation, and are drawn in training. Exits with status 2 if a domain has too few
    images.
    """

    BLOCK = 256  # tasks that are drawn together; part of what defines a task

    def __init__(self, kind, args, split):
        (mode,) = args.modes
        self.kind = kind
        self.mode = mode
        self.split = split
        self.support = args.ways * args.shots  # as many images as in classification
        self.queries = args.ways * args.queries
        self.seed = args.seed if split == "train" else None
        self.size = args.image_size
        self.device = torch.device(args.device)
        allow_shared = vars(args).get("allow_shared_classes", False)
        where = args.data_root, args.cache_dir, args.synthetic
        folder = prepare(mode, args.image_size, *where, allow_shared)
        self.folders = [folder.name]  # names what the images were made from
        self.contents = {mode: content_of(folder)}
        if not (folder / f"{split}-{kind}.npy").exists():
            remedy = f"use --modes scenes (ray-cast), or leave {kind} out of --tasks"
            fail(f"{mode}/{split} has no labels for {kind}: {remedy}")
        self.images = self.read(folder / f"{split}.npy")
        self.labels = self.read(folder / f"{split}-{kind}.npy")
        domains = np.load(folder / f"{split}-domains.npy")
        self.counts = np.bincount(domains)
        self.rows = np.argsort(domains, kind="stable")
        self.offsets = np.cumsum(self.counts) - self.counts
        needed = self.support + self.queries
        if self.counts.min() < needed:
            fail(
                f"{mode}/{split}: a domain has {self.counts.min()} images, {self.support} support images + "
                f"{self.queries} queries need {needed}: lower --ways, --shots or --queries, or add images"
            )

    def read(self, file):
        """An array of the cache, on the device."""
        return torch.from_numpy(np.load(file, mmap_mode="c")).to(self.device)

    def draw(self, block):
        """Tasks block * 256 .. + 255, drawn at once -> domains (256,), rows of images (256, n + m)."""
        k = self.support + self.queries
        name = f"domains {self.mode} {self.split} {self.support} {self.queries} {self.seed}"
        if self.seed is not None:  # the kinds are trained on different images, and tested on the same
            name += f" {self.kind}"
        u = uniform(name, block, self.BLOCK * (1 + k))
        u_domain, u_image = u[: self.BLOCK], u[self.BLOCK :].reshape(self.BLOCK, k)
        domains = (u_domain * len(self.counts)).astype(np.int64)
        if self.seed is None:
            domains = (block * self.BLOCK + np.arange(self.BLOCK)) % len(self.counts)
        images = distinct(u_image, self.counts[domains])
        return domains, self.rows[self.offsets[domains][:, None] + images]

    def indices(self, first, count):
        """Domains (count,) and rows of images (count, n + m) of tasks first .. first + count - 1."""
        first_block = first // self.BLOCK
        last_block = (first + count - 1) // self.BLOCK
        drawn = [self.draw(block) for block in range(first_block, last_block + 1)]
        start = first - first_block * self.BLOCK
        domains, rows = (np.concatenate(parts)[start : start + count] for parts in zip(*drawn))
        return domains, rows

    def look_up(self, rows):
        """Images (..., 3, S, S) and their labels, of rows (...) of the data."""
        rows = torch.from_numpy(rows).to(self.device)
        x = channels_first(self.images[rows]).float() / 255
        y = self.labels[rows]
        if self.kind == "vanishing":
            return x, y
        y = unpack(y)
        return x, y[..., None, :, :] if self.kind == "depth" else channels_first(y)

    def tasks(self, first, count):
        """Tasks number first .. first + count - 1, on the device (`mode` on the CPU) -> Task with a leading dimension `count`."""
        domains, rows = self.indices(first, count)
        support = self.look_up(rows[:, : self.support])
        query = self.look_up(rows[:, self.support :])
        return Task(*support, *query, torch.from_numpy(domains))

    def everything(self, number):
        """All images of the domain of task `number`, with their labels."""
        domains, _ = self.indices(number, 1)
        start, count = self.offsets[domains[0]], self.counts[domains[0]]
        return self.look_up(self.rows[start:][:count])

    def sha256(self, count):
        """A hash of the first `count` tasks: the kind, mode, images per domain, their size, and the indices drawn."""
        digest = hashlib.sha256(f"{self.kind} {self.mode} {self.counts.tolist()} {self.size}".encode())
        for array in self.indices(0, count):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


def channels_first(x):
    """(..., S, S, C) -> (..., C, S, S)."""
    return x.transpose(-1, -2).transpose(-2, -3)
