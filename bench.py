"""Speed, beside what it has to be compared with. A figure here is a ratio measured in one run, in alternation.

    python bench.py --synthetic                      # nothing to download
    python bench.py --modes omniglot miniimagenet --shots 5 --json bench.json

loader    Tasks a second that come ready for training (float, on the device). Ours: `data.Episodes`, images decoded once,
          memory-mapped, gathered in batches of 10 tasks. Rival: what the released repositories do, worker processes that
          draw a task, open, decode and resize each of its images with Pillow, and convert it.

Both are given their start-up for free (cache built, workers started, queues drained before each period). The rival gets
the images as encoded files: the archives of a data set, or PNG files in memory for synthetic ones.
"""
import argparse
import io
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data

BATCH = 10          # tasks assembled together by our sampler: the papers' meta-batch


class DecodingLoader(torch.utils.data.IterableDataset):
    """Endless tasks, every image decoded and resized again for every task. Runs inside worker processes."""

    def __init__(self, sources, args):
        self.sources, self.args = sources, args         # sources: per mode (name, list of classes of (archive, key))

    def __iter__(self):
        args, worker = self.args, torch.utils.data.get_worker_info()
        rng = np.random.default_rng(worker.id if worker else 0)
        # An open archive must not be shared between processes: each worker opens its own.
        modes = [(mode, classes() if callable(classes) else classes) for mode, classes in self.sources]
        while True:
            mode, classes = modes[rng.integers(len(modes))]
            images = []
            for c in rng.choice(len(classes), args.ways, replace=False):
                turn = rng.integers(4) if mode == "omniglot" else 0
                for i in rng.choice(len(classes[c]), args.shots + args.queries, replace=False):
                    source, key = classes[c][i]
                    pixels = np.rot90(data.decode(source.read(key), args.image_size, mode), turn)
                    images.append(np.broadcast_to(pixels, (args.image_size, args.image_size, 3)).transpose(2, 0, 1))
            x = torch.from_numpy(np.stack(images).astype(np.float32) / 255)
            x = x.view(args.ways, -1, 3, args.image_size, args.image_size)
            yield x[:, :args.shots].flatten(0, 1), x[:, args.shots:].flatten(0, 1)


class Encoded:
    """Images as PNG files in memory, with the interface of an archive."""

    def __init__(self, images):
        self.files = []
        for pixels in images:
            file = io.BytesIO()
            Image.fromarray(pixels.squeeze()).save(file, "PNG")
            self.files.append(file.getvalue())

    def read(self, key):
        return self.files[key]


class Archives:
    """Opens the archives of a mode when called: in the worker process that will read them."""

    def __init__(self, mode, root):
        self.mode, self.root = mode, root

    def __call__(self):
        importer, paths = data.find_source(self.mode, self.root)
        return list(importer(paths)["train"].values())


def rival_sources(args):
    sources = []
    for mode in args.modes:
        if args.synthetic:
            images, names = data.draw_synthetic(mode, "train", args.image_size)
            images = 255 - images if mode == "omniglot" else images         # as scanned: `decode` inverts Omniglot
            encoded, per_class = Encoded(images), len(images) // len(names)
            classes = [[(encoded, c * per_class + i) for i in range(per_class)] for c in range(len(names))]
            sources.append((mode, classes))
        elif data.find_source(mode, args.data_root):
            sources.append((mode, Archives(mode, args.data_root)))
        else:
            data.fail(f"{mode} is not under {args.data_root}: the rival needs its image files; or add --synthetic")
    return sources


def rate(draw, seconds):
    """Tasks a second of draw() -> number of tasks, called over and over for so many seconds."""
    tasks, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        tasks += draw()
    return tasks / elapsed


def bench_loader(args):
    """-> {"sampler": [tasks/s of each round], "decoding loader": [...]}, rounds in alternation."""
    device = torch.device(args.device)
    episodes = data.Episodes(args.modes, "train", args.ways, args.shots, args.queries, args.image_size, 0, device,
                             args.data_root, args.cache_dir, args.synthetic)
    loader = torch.utils.data.DataLoader(DecodingLoader(rival_sources(args), args), batch_size=None,
                                         num_workers=args.workers, prefetch_factor=2)
    tasks, first = iter(loader), 0

    def ours():
        nonlocal first
        episodes.tasks(first, BATCH)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first += BATCH
        return BATCH

    def theirs():
        for x in next(tasks):
            x.to(device)
        return 1

    samples = {"sampler": [], "decoding loader": []}
    for _ in range(2 * args.workers):
        theirs()
    ours()
    for _ in range(args.rounds):
        time.sleep(min(1.0, args.seconds))              # the workers fill their queues and fall silent
        samples["sampler"].append(rate(ours, args.seconds))
        for _ in range(2 * args.workers):               # the queue that was filled for free does not count
            theirs()
        samples["decoding loader"].append(rate(theirs, args.seconds))
    return samples


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("part", nargs="?", default="loader", choices=["loader"])
    parser.add_argument("--modes", nargs="+", default=["omniglot", "miniimagenet"], metavar="MODE")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--queries", type=int, default=15)
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the rival")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="length of one period")
    parser.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"))
    parser.add_argument("--cache-dir", default=".cache")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write every sample and the versions to this file")
    parser.error = data.fail
    args = parser.parse_args()
    args.modes = [data.canonical_mode(mode, args.data_root) for mode in args.modes]
    samples = bench_loader(args)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    print(f"loader: {'SYNTHETIC ' * args.synthetic}{'+'.join(args.modes)}, {args.ways}-way {args.shots}-shot, "
          f"{args.queries} queries, {args.image_size} px, on {args.device}, {args.workers} workers for the rival")
    for name, values in samples.items():
        print(f"  {name:18}{medians[name]:10.1f} tasks/s   (rounds {min(values):.1f} to {max(values):.1f})")
    print(f"  {'ratio':18}{medians['sampler'] / medians['decoding loader']:10.1f}")
    if args.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "pillow": Image.__version__,
                    "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        kept = {k: v for k, v in vars(args).items() if k not in ("data_root", "cache_dir", "json")}
        data.atomic_write(Path(args.json), json.dumps({"loader": samples, "args": kept, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
