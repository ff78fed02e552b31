"""Pictures of what a network gets to see: an episode, or a few scenes with their labels."""

import io
import json

import numpy as np
from PIL import Image, ImageDraw

from fewshot.cache import prepare
from fewshot.files import atomic_write

GAP = 12  # pixels between support and query images
LINE = 16  # pixels above an episode: a line of text
HEAD = 34  # pixels above scenes: two lines of text


def show(episodes, number, path, cell=84):
    """Write a picture of task `number`: a row per class, its support images left of the gap, its queries right.

    episodes: data.py's sampler. cell: pixels of an image's side in the picture.
    """
    task = episodes.tasks(number, 1)
    N = episodes.ways
    K = episodes.shots
    Q = episodes.queries
    mode = episodes.modes[number % len(episodes.modes)]
    if episodes.synthetic:
        mode = f"SYNTHETIC {mode}"
    step = cell + 2  # from tile to tile
    width = (K + Q) * step + GAP
    height = N * step + LINE
    picture, pen = page(width, height)
    title = f"{mode} {episodes.split} task {number}: support left of the gap, query right"
    pen.text((2, 2), title, "black")
    for n in range(N):
        top = n * step + LINE
        for k in range(K):
            image = task.support_x[0, n * K + k]
            left = k * step
            picture.paste(tile(image, cell), (left, top))
        for q in range(Q):
            image = task.query_x[0, n * Q + q]
            left = (K + q) * step + GAP
            picture.paste(tile(image, cell), (left, top))
    write(picture, path)


def show_scenes(mode, split, size, number, path, root, cache_dir, cell=150, rows=10):
    """Write a picture with a row for each of the first `rows` domains: its image `number`, depth, normals, vanishing point."""
    folder = prepare(mode, size, root, cache_dir, mode == "scenes")
    scenes = Labelled(folder, split)
    count = min(rows, scenes.domains.max() + 1)
    across = cell + 4  # from tile to tile
    down = cell + 18  # a tile with a line of text below it
    width = len(scenes.heads) * across
    height = count * down + HEAD
    picture, pen = page(width, height)
    title = f"{mode} {split}, image {number} of each domain; black in depth and normals is not known"
    if mode == "scenes":
        title = f"RAY-CAST, NOT MMT: {title}"
    pen.text((2, 2), title, "black")
    for column, head in enumerate(scenes.heads):
        left = column * across + 2
        pen.text((left, 17), head, "black")
    for row in range(count):
        i = scenes.of_domain(row, number)
        top = row * down + HEAD
        for column, pixels in enumerate(scenes.tiles(i)):
            left = column * across + 2
            picture.paste(enlarged(pixels, cell), (left, top))
        if scenes.points is not None:
            left = 3 * across + 2  # of the fourth tile
            x, y = scenes.points[i]  # as shares of the image's width and height
            cross(pen, left + x * cell, top + y * cell)
        caption = f"domain {row}, image of class {scenes.classes[i]}"
        pen.text((2, top + cell + 1), caption, "black")
    write(picture, path)


class Labelled:
    """The n images (n, S, S, 3) of a split, with their labels, as a cache folder holds them."""

    def __init__(self, folder, split):
        self.images = np.load(folder / f"{split}.npy")
        self.depth = np.load(folder / f"{split}-depth.npy")  # (n, S, S)
        self.normals = np.load(folder / f"{split}-normals.npy")  # (n, S, S, 3)
        self.domains = np.load(folder / f"{split}-domains.npy")  # (n,)
        self.classes = class_of_each_image(folder, split)
        self.heads = ["image", "depth, near is bright", "normals"]  # of the columns of a picture
        self.points = None  # vanishing points (n, 2), which photographs do not have
        points = folder / f"{split}-vanishing.npy"
        if points.exists():
            self.points = np.load(points)
            self.heads.append("vanishing point")

    def of_domain(self, domain, number):
        """The row of image `number` of a domain; after its last image its first comes again."""
        rows = np.flatnonzero(self.domains == domain)
        return rows[number % len(rows)]

    def tiles(self, i):
        """Image i and its labels as pixels from 0 to 255 -> a list, in the order of `heads`."""
        normals = self.normals[i] / 257  # 65535 becomes 255
        found = [self.images[i], brightness(self.depth[i]), normals]
        if self.points is not None:
            found.append(self.images[i])
        return found


def class_of_each_image(folder, split):
    """The class of each image of a split, as the cache in `folder` names it -> list."""
    classes = json.loads((folder / "classes.json").read_text())
    found = []
    for name, count in classes[split]:
        found += [name] * count
    return found


def brightness(depth):
    """Depth (S, S), 0 where it is not known -> brightness (S, S) from 40 (far) to 255 (near), and 0."""
    return np.where(depth > 0, 255 - 215.0 * depth / depth.max(), 0)


def tile(image, cell):
    """An image (3, S, S) in [0, 1] -> a Pillow image of `cell` pixels a side."""
    pixels = image.permute(1, 2, 0) * 255
    pixels = pixels.round().byte()
    return enlarged(pixels.cpu().numpy(), cell)


def enlarged(pixels, cell):
    """Pixels (S, S) or (S, S, 3) from 0 to 255 -> a Pillow image of `cell` pixels a side, not smoothed."""
    image = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    return image.resize((cell, cell), Image.Resampling.NEAREST)


def page(width, height):
    """A white picture of so many pixels, and a pen to draw on it."""
    picture = Image.new("RGB", (width, height), "white")
    return picture, ImageDraw.Draw(picture)


def cross(pen, x, y):
    """Draw a red cross of 16 pixels at (x, y)."""
    pen.line((x - 8, y, x + 8, y), "red", 2)
    pen.line((x, y - 8, x, y + 8), "red", 2)


def write(picture, path):
    """Write a picture as PNG, whole or not at all."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue())
