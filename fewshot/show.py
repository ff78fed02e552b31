"""Pictures of what a network gets to see: an episode, or a few scenes with their labels."""

import io
import json

import numpy as np
from PIL import Image, ImageDraw

from fewshot.cache import prepare
from fewshot.files import atomic_write

GAP = 12  # pixels between support and query images


def show(episodes, number, path, cell=84):
    """Write a picture of task `number`: a row per class, its support images left of the gap, its queries right."""
    task = episodes.tasks(number, 1)
    N, K, Q = episodes.ways, episodes.shots, episodes.queries
    step = cell + 2  # from tile to tile
    picture = Image.new("RGB", ((K + Q) * step + GAP, N * step + 16), "white")
    pen = ImageDraw.Draw(picture)
    mode = episodes.modes[number % len(episodes.modes)]
    if episodes.synthetic:
        mode = f"SYNTHETIC {mode}"
    pen.text((2, 2), f"{mode} {episodes.split} task {number}: support left of the gap, query right", "black")
    for n in range(N):
        top = n * step + 16
        for k in range(K):
            picture.paste(tile(task.support_x[0, n * K + k], cell), (k * step, top))
        for q in range(Q):
            picture.paste(tile(task.query_x[0, n * Q + q], cell), ((K + q) * step + GAP, top))
    write(picture, path)


def show_scenes(mode, split, size, number, path, root, cache_dir, cell=150, rows=10):
    """Write a picture with a row for each of the first `rows` domains: its image `number`, depth, normals, vanishing point."""
    folder = prepare(mode, size, root, cache_dir, mode == "scenes")
    images, depth, normals, domains = (
        np.load(folder / f"{split}{end}.npy") for end in ("", "-depth", "-normals", "-domains")
    )
    heads = ["image", "depth, near is bright", "normals"]
    points = None
    if (folder / f"{split}-vanishing.npy").exists():
        points = np.load(folder / f"{split}-vanishing.npy")
        heads.append("vanishing point")
    classes = class_of_each_image(folder, split)
    count = min(rows, domains.max() + 1)
    picture = Image.new("RGB", (len(heads) * (cell + 4), count * (cell + 18) + 34), "white")
    pen = ImageDraw.Draw(picture)
    title = f"{mode} {split}, image {number} of each domain; black in depth and normals is not known"
    if mode == "scenes":
        title = f"RAY-CAST, NOT MMT: {title}"
    pen.text((2, 2), title, "black")
    for column, head in enumerate(heads):
        pen.text((column * (cell + 4) + 2, 17), head, "black")
    for row in range(count):
        of = np.flatnonzero(domains == row)
        i = of[number % len(of)]
        top = row * (cell + 18) + 34
        tiles = [images[i], brightness(depth[i]), normals[i] / 257]
        if points is not None:
            tiles.append(images[i])
        for column, pixels in enumerate(tiles):
            picture.paste(enlarged(pixels, cell), (column * (cell + 4) + 2, top))
        if points is not None:
            left = 3 * (cell + 4) + 2
            cross(pen, left + points[i, 0] * cell, top + points[i, 1] * cell)
        pen.text((2, top + cell + 1), f"domain {row}, image of class {classes[i]}", "black")
    write(picture, path)


def class_of_each_image(folder, split):
    """The class of each image of a split, as the cache in `folder` names it -> list."""
    found = []
    for name, count in json.loads((folder / "classes.json").read_text())[split]:
        found += [name] * count
    return found


def brightness(depth):
    """Depth (S, S), 0 where it is not known -> brightness (S, S) from 40 (far) to 255 (near), and 0."""
    return np.where(depth > 0, 255 - 215.0 * depth / depth.max(), 0)


def tile(image, cell):
    """An image (3, S, S) in [0, 1] -> a Pillow image of `cell` pixels a side."""
    pixels = (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    return enlarged(pixels, cell)


def enlarged(pixels, cell):
    """Pixels (S, S) or (S, S, 3) from 0 to 255 -> a Pillow image of `cell` pixels a side, not smoothed."""
    image = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    return image.resize((cell, cell), Image.Resampling.NEAREST)


def cross(pen, x, y):
    """Draw a red cross of 16 pixels at (x, y)."""
    pen.line((x - 8, y, x + 8, y), "red", 2)
    pen.line((x, y - 8, x, y + 8), "red", 2)


def write(picture, path):
    """Write a picture as PNG, whole or not at all."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue())
