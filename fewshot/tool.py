"""The command line of data.py: list, prepare, verify and show data sets."""

import json
import os
import re
import sys
from pathlib import Path

from fewshot import store
from fewshot.cache import find_source, prepare
from fewshot.files import fail
from fewshot.flags import AT_MOST, new_parser
from fewshot.names import canonical_mode, folders_in, shortened, user_path
from fewshot.published import DOWNLOADS, LAYOUTS, SPLITS
from fewshot.scenes import depth_folders
from fewshot.show import show, show_scenes

COMMANDS = ("list", "prepare", "verify", "show")
LEAST = {"image_size": 1, "ways": 1, "shots": 1, "queries": 1, "task": 0}  # of each number


def get_args(argv=None):
    """Read the command line -> args."""
    parser = new_parser("Data sets: list, prepare, verify, show.", "")
    parser.add_argument("command", choices=COMMANDS)
    known = f"{', '.join(LAYOUTS)}, or a folder of yours (list, verify: default all)"
    parser.add_argument("modes", nargs="*", metavar="MODE", help=known)
    root = os.environ.get("FEWSHOT_DATA") or "data"
    parser.add_argument("--data-root", type=user_path, default=root, help="where data sets lie")
    parser.add_argument("--cache-dir", type=user_path, default=".cache", help="where decoded images are kept")
    parser.add_argument("--image-size", type=int, default=84, help="pixels (papers: 84)")
    parser.add_argument("--synthetic", action="store_true", help="procedural stand-ins, no download")
    parser.add_argument("--split", default="test", choices=SPLITS, help="show: of which split")
    parser.add_argument(
        "--task", type=int, default=0, help="show: number of the task (with depth: of the image)"
    )
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--queries", type=int, default=6, help="show: query images per class")
    parser.add_argument("--out", type=user_path, help="show: the picture's path (episode-<mode>.png)")
    args = parser.parse_args(argv)
    if args.command == "list":  # the last part of a path is the mode: a path is not refused
        args.modes = [os.path.basename(name.rstrip("/")) or name for name in args.modes]
    args.modes = [canonical_mode(mode, args.data_root) for mode in args.modes]
    check(args)
    return args


def check(args):
    """Exit if numbers are out of range, or flags contradict each other."""
    for key, least in LEAST.items():
        value = getattr(args, key)
        if not least <= value < 2**31:
            fail(f"--{key.replace('_', '-')} {value}: give {least} or more, and less than 2^31")
    if args.image_size > AT_MOST["image_size"]:
        fail(f"--image-size {args.image_size}: give a number up to {AT_MOST['image_size']}")
    if args.out is not None and (args.command != "show" or len(args.modes) > 1):
        fail("--out names the picture of one mode: show one mode, or leave --out out")
    if args.command in ("prepare", "show") and not args.modes:
        fail(f"{args.command} which mode? For example: python data.py {args.command} omniglot")


def list_modes(args):
    """Print for each mode where its images lie, its terms of use, and its caches."""
    own = [name for name in folders_in(args.data_root) if name not in LAYOUTS]
    for mode in args.modes or [*LAYOUTS, *own]:
        try:
            source = find_source(mode, args.data_root)
        except SystemExit:  # the line that says why has been printed
            continue
        if source is None and mode in own and not args.modes:
            continue
        files, terms = DOWNLOADS.get(mode, ([], "your own"))
        where = "not found"
        if source:
            where = ", ".join(map(str, source[1]))
        elif files and all(addresses for _, _, addresses in files):
            where = "not found; downloaded when needed"
        line = f"{mode:13} {where}  [{terms}]"
        cached = [folder.name for folder in caches(mode, args.cache_dir)]
        if cached:
            line += f"  cached: {' '.join(cached)}"
        print(line)


def prepare_mode(mode, args):
    """Find or make the cache of a mode, and print what is in it."""
    synthetic = args.synthetic or mode == "scenes"
    folder = prepare(mode, args.image_size, args.data_root, args.cache_dir, synthetic, allow_shared=True)
    for split, classes in json.loads((folder / "classes.json").read_text()).items():
        images = sum(count for _, count in classes)
        print(f"{mode:13} {split:5} {len(classes):5} classes {images:6} images  {folder}")
    if store.shared(folder):
        print(
            f"note: {mode}: {store.shared(folder)}; training refuses it without --allow-shared-classes",
            file=sys.stderr,
        )


def verify(args):
    """Check every byte of the caches of some modes, or of all -> whether all are sound."""
    folders = []
    for mode in args.modes or [""]:
        found = caches(mode, args.cache_dir)
        folders += found
        if not found:
            fail(
                f"{args.cache_dir} has no cache of {mode or 'any mode'}: make it with python data.py prepare"
            )
    sound = True
    for folder in folders:
        wrong = store.problem(folder, full=True)
        sound = sound and not wrong
        print(f"{folder.name:40} {wrong or 'as it was written'}")
    return sound


def caches(mode, cache_dir):
    """Cache folders of a mode, of any size, real or synthetic; of all modes if the name is empty -> sorted paths."""
    own = re.escape(shortened(mode)) if mode else ".+"
    pattern = re.compile(rf"(?:synthetic-)?{own}(?:-depth)?-\d+-\w+")
    names = [name for name in folders_in(cache_dir) if pattern.fullmatch(name)]
    return [Path(cache_dir) / name for name in names]


def show_mode(mode, args, Episodes):
    """Write a picture of an episode, or of scenes, and print its path."""
    path = args.out or f"episode-{mode}.png"
    _, paths = find_source(mode, args.data_root) or ("", ())
    with_depth = not args.synthetic and paths and mode not in LAYOUTS and depth_folders(paths)
    if mode == "scenes" or with_depth:
        show_scenes(mode, args.split, args.image_size, args.task, path, args.data_root, args.cache_dir)
    else:
        sizes = args.ways, args.shots, args.queries, args.image_size
        where = args.data_root, args.cache_dir, args.synthetic
        episodes = Episodes([mode], args.split, *sizes, None, "cpu", *where, allow_shared=True)
        show(episodes, args.task, path)
    print(path)


def main(Episodes):
    """Run `python data.py ...`. Episodes: the sampler of data.py, which nothing in this package may import."""
    args = get_args()
    if args.command == "list":
        list_modes(args)
    elif args.command == "verify":
        raise SystemExit(0 if verify(args) else 1)
    for mode in args.modes:
        if args.command == "prepare":
            prepare_mode(mode, args)
        elif args.command == "show":
            show_mode(mode, args, Episodes)
