"""The command line of data.py: list, prepare and show data sets."""

import argparse
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fewshot.cache import canonical_mode, find_source, prepare
from fewshot.files import atomic_write, fail
from fewshot.published import DOWNLOADS, LAYOUTS, SPLITS
from fewshot.scenes import depth_folders


def show(episodes, number, path, cell=84):
    """Write a picture of task `number`: a row per class, its support images left of the gap, its queries right."""
    task = episodes.tasks(number, 1)
    N, K, Q, gap = episodes.ways, episodes.shots, episodes.queries, 12
    picture = Image.new("RGB", ((K + Q) * (cell + 2) + gap, N * (cell + 2) + 16), "white")
    pen = ImageDraw.Draw(picture)
    mode = "SYNTHETIC " * episodes.synthetic + episodes.modes[number % len(episodes.modes)]
    pen.text((2, 2), f"{mode} {episodes.split} task {number}: support left of the gap, query right", "black")
    for n in range(N):
        for x, first, total, left in ((task.support_x[0], n * K, K, 0), (task.query_x[0], n * Q, Q, K)):
            for i in range(total):
                tile = (x[first + i].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
                tile = Image.fromarray(tile).resize((cell, cell), Image.Resampling.NEAREST)
                picture.paste(tile, ((left + i) * (cell + 2) + (gap if left else 0), n * (cell + 2) + 16))
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue())


def show_scenes(mode, split, size, number, path, root, cache_dir, cell=150, rows=10):
    """Write a picture: a row for each domain; its image `number`, depth, normals, vanishing point."""
    folder = prepare(mode, size, root, cache_dir, mode == "scenes")
    images, depth, normals, domains = (
        np.load(folder / f"{split}{end}.npy") for end in ("", "-depth", "-normals", "-domains")
    )
    points = (
        np.load(folder / f"{split}-vanishing.npy") if (folder / f"{split}-vanishing.npy").exists() else None
    )
    kinds = [
        name for name, count in json.loads((folder / "classes.json").read_text())[split] for _ in range(count)
    ]
    heads = ["image", "depth, near is bright", "normals", *["vanishing point"] * (points is not None)]
    count = min(rows, domains.max() + 1)
    picture = Image.new("RGB", (len(heads) * (cell + 4), count * (cell + 18) + 34), "white")
    pen = ImageDraw.Draw(picture)
    mark = "RAY-CAST, NOT MMT: " * (mode == "scenes")
    pen.text(
        (2, 2),
        f"{mark}{mode} {split}, image {number} of each domain; black in depth and normals is not known",
        "black",
    )
    for column, head in enumerate(heads):
        pen.text((column * (cell + 4) + 2, 17), head, "black")
    for row in range(count):
        of = np.flatnonzero(domains == row)
        i, top = of[number % len(of)], row * (cell + 18) + 34
        far = depth[i].max()
        near = np.where(depth[i] > 0, 255 - 215.0 * depth[i] / far, 0)
        for column, tile in enumerate(
            [images[i], near, normals[i] / 257, *[images[i]] * (points is not None)]
        ):
            left = column * (cell + 4) + 2
            tile = (
                Image.fromarray(tile.astype(np.uint8))
                .convert("RGB")
                .resize((cell, cell), Image.Resampling.NEAREST)
            )
            picture.paste(tile, (left, top))
            if column == 3:
                x, y = left + points[i, 0] * cell, top + points[i, 1] * cell
                for reach_x, reach_y in ((8, 0), (0, 8)):
                    pen.line((x - reach_x, y - reach_y, x + reach_x, y + reach_y), "red", 2)
        pen.text((2, top + cell + 1), f"domain {row}, {kinds[i]}", "black")
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue())


def main(Episodes):
    """Run `python data.py ...`. Episodes: the sampler of data.py, which nothing in this package may import."""
    parser = argparse.ArgumentParser(description="Data sets: list, prepare, show.", allow_abbrev=False)
    parser.add_argument("command", choices=("list", "prepare", "show"))
    parser.add_argument(
        "modes", nargs="*", metavar="MODE", help=f"{', '.join(LAYOUTS)}, or a folder of yours (all)"
    )
    parser.add_argument(
        "--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="where data sets lie"
    )
    parser.add_argument("--cache-dir", default=".cache", help="where decoded images are kept")
    parser.add_argument("--image-size", type=int, default=84, help="pixels (papers: 84)")
    parser.add_argument("--synthetic", action="store_true", help="procedural stand-ins, no download")
    parser.add_argument("--split", default="test", choices=SPLITS, help="show: of which split")
    parser.add_argument("--task", type=int, default=0, help="show: number of the task")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--queries", type=int, default=6, help="show: query images a class")
    parser.add_argument("--out", help="show: the picture's path (episode-<mode>.png)")
    parser.error = fail
    args = parser.parse_args()
    places = args.data_root, args.cache_dir, args.synthetic
    modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    if min(args.image_size, args.ways, args.shots, args.queries) < 1 or args.task < 0:
        fail("--image-size, --ways, --shots and --queries start at 1, --task at 0")
    if args.out and (args.command != "show" or len(modes) > 1):
        fail("--out names the picture of one mode: show one mode, or leave --out away")
    if args.command == "list":
        own = [
            path.name
            for path in sorted(Path(args.data_root).glob("*"))
            if find_source(path.name, args.data_root)
        ]
        for mode in modes or [*LAYOUTS, *(name for name in own if name not in LAYOUTS)]:
            source, terms = find_source(mode, args.data_root), DOWNLOADS.get(mode, ("", "your own"))[1]
            cached = [p.parent.name for p in sorted(Path(args.cache_dir).glob(f"{mode}-*/classes.json"))]
            where = ", ".join(map(str, source[1])) if source else "not found; downloaded when needed"
            print(f"{mode:13} {where}  [{terms}]" + (f"  cached: {' '.join(cached)}" if cached else ""))
    elif not modes:
        fail(f"{args.command} which mode? For example: python data.py {args.command} omniglot")
    elif args.command == "prepare":
        for mode in modes:
            folder = prepare(mode, args.image_size, *places[:2], args.synthetic or mode == "scenes")
            for split, classes in json.loads((folder / "classes.json").read_text()).items():
                print(
                    f"{mode:13} {split:5} {len(classes):5} classes {sum(n for _, n in classes):6} images  {folder}"
                )
    else:
        for mode in modes:
            path = args.out or f"episode-{mode}.png"
            paths = (find_source(mode, args.data_root) or ("", ()))[1]
            if mode == "scenes" or (
                not args.synthetic and paths and mode not in LAYOUTS and depth_folders(paths)
            ):
                show_scenes(
                    mode, args.split, args.image_size, args.task, path, args.data_root, args.cache_dir
                )
                print(path)
                continue
            show(
                Episodes(
                    [mode],
                    args.split,
                    args.ways,
                    args.shots,
                    args.queries,
                    args.image_size,
                    None,
                    "cpu",
                    *places,
                ),
                args.task,
                path,
            )
            print(path)
