"""Pictures of test tasks, and of what finished runs make of them.

python -m tools.pictures episode task.png omniglot synthetic-miniimagenet      # a test task of each mode
python -m tools.pictures completion faces.png RUN RUN ...     # ModGrad's Figure 7: images completed from some pixels
python -m tools.pictures navigation paths.png RUN RUN ...     # paths before and after one update
"""

import argparse
import io
import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import modgrad_completion
import modgrad_rl
from data import Episodes, atomic_write, fail, flags_of_run, read_tensors

CELL = 96  # pixels of an image
PLANE = 220  # pixels of the plane that navigation moves in
SHOWN = 5  # rollouts per task
GREY = (190, 190, 190)
FRAME = (200, 200, 200)
INK = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))


def open_run(folder, script, **more):
    """Read the checkpoint of a run of `script` -> its flags, with `more` added, and the checkpoint."""
    try:
        checkpoint = read_tensors(Path(folder) / "checkpoint.pt")
        recorded = checkpoint["identity"]
        own_flag = "pixels" if script is modgrad_completion else "env"
        if own_flag not in recorded:
            raise KeyError(own_flag)
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        kind = f"a run of {script.__name__}.py"
        fail(f"{folder}: has no checkpoint of {kind} ({type(error).__name__}): name another folder")
    run = flags_of_run(recorded | more, script)
    run.device = "cpu"
    return run, checkpoint


def write_png(picture, path):
    """Write a picture so that it is there whole or not at all."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue())
    print(f"written: {path}")


# ---------------------------------------------------------------------------------------------------- episode


def draw_episodes(args, ways=5, shots=5, queries=3, size=42, number=0):
    """A panel per mode: test task `number`, a row per class, its support images on the left, query images on the right.

    A mode whose name begins with "synthetic-" is that mode's procedural stand-in.
    """
    step = size + 4  # from one image to the next
    width = (shots + queries) * step + 40
    size_of_all = (len(args.runs) * width - 14, ways * step + 36)
    picture = Image.new("RGB", size_of_all, "white")
    for m, name in enumerate(args.runs):
        mode = name.removeprefix("synthetic-")
        where = {"root": args.data_root, "cache_dir": args.cache_dir, "synthetic": mode != name}
        episodes = Episodes([mode], "test", ways, shots, queries, size, **where)
        task = episodes.tasks(number, 1)
        support = task.support_x[0].unflatten(0, (ways, shots))
        query = task.query_x[0].unflatten(0, (ways, queries))
        left = m * width + 4
        draw_episode(picture, left, name.replace("-", " "), support, query)
    write_png(picture, args.file)


def draw_episode(picture, left, name, support, query):
    """Draw one panel, from column `left` on: support (N, K, 3, S, S) and query images (N, Q, 3, S, S)."""
    pen = ImageDraw.Draw(picture)
    ways, shots = support.shape[:2]
    size = support.shape[-1]
    step = size + 4
    query_left = left + shots * step + 12
    pen.text((left, 4), name, "black")
    pen.text((left, 19), f"support: {ways} classes, {shots} images each", "black")
    pen.text((query_left, 19), f"query: {query.shape[1]} images each", "black")
    for c in range(ways):
        top = c * step + 34
        for k, image in enumerate(support[c]):
            paste_framed(picture, image, left + k * step, top)
        for k, image in enumerate(query[c]):
            paste_framed(picture, image, query_left + k * step, top)


def paste_framed(picture, image, x, y):
    """Paste an image (3, S, S), a grey frame around it."""
    size = image.shape[-1]
    pixels = to_bytes(image.permute(1, 2, 0))
    picture.paste(Image.fromarray(pixels), (x, y))
    frame = [x - 1, y - 1, x + size, y + size]
    ImageDraw.Draw(picture).rectangle(frame, outline=FRAME)


def to_bytes(x):
    """Values from 0 to 1 -> uint8 array."""
    return (x * 255).round().byte().numpy()


# ------------------------------------------------------------------------------------------------- completion


@torch.no_grad()
def draw_completions(args, count=8):
    """A row per test image: its context, what each run makes of it, and the truth."""
    columns, setting = [], None
    flags = {"data_root": args.data_root, "cache_dir": args.cache_dir, "test_tasks": count}
    for folder in args.runs:
        run, checkpoint = open_run(folder, modgrad_completion, **flags)
        here = (run.modes, run.pixels, run.order, run.image_size, run.synthetic)
        if setting not in (None, here):
            fail(
                "runs differ in data set, pixels, order, image size or --synthetic; name runs of one setting"
            )
        setting = here
        episodes = modgrad_completion.Completions.of(run, "test")
        batch = episodes.tasks(0, count)
        images = completed(checkpoint["params"], batch, run)
        columns.append((f"{run.method}\n{steps_of(run)}", images))
    columns.insert(0, (f"context:\n{run.pixels} {run.order}", context_shown(episodes, batch, count)))
    columns.append(("truth\n", batch.query_y))
    data = "SYNTHETIC " if run.synthetic else ""
    data += "+".join(run.modes)
    picture = images_in_columns(columns, episodes.size, f"{data}, first test images")
    write_png(picture, args.file)


def completed(params, batch, run):
    """What a run makes of the images of a batch -> (count, S*S, 3)."""
    made = []
    for task in map(type(batch), *batch):
        made.append(modgrad_completion.task_loss(params, task, run)[1])
    return torch.stack(made).clamp(0, 1)


def steps_of(run):
    """How many inner steps a run takes, in words; of CNP, which takes none, nothing."""
    if not run.steps:
        return ""
    return "1 step" if run.steps == 1 else f"{run.steps} steps"


def context_shown(episodes, batch, count):
    """Images (count, S*S, 3) with the context's pixels; what is not given is blue."""
    blue = torch.tensor([0.2, 0.3, 0.6])
    seen = torch.ones_like(batch.query_y) * blue
    _, context = episodes.indices(0, count)
    for i, places in enumerate(torch.from_numpy(context)):
        seen[i, places] = batch.query_y[i, places]
    return seen


def images_in_columns(columns, S, title):
    """[(head, images (count, S*S, 3))] -> a picture, one column each."""
    count = len(columns[0][1])
    step = CELL + 4
    size = (len(columns) * step, count * step + 46)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((2, 2), title, "black")
    for c, (head, images) in enumerate(columns):
        left = c * step
        pen.text((left, 17), head, "black")
        squares = images.reshape(count, S, S, 3)
        for i, pixels in enumerate(to_bytes(squares)):
            tile = Image.fromarray(pixels)
            tile = tile.resize((CELL, CELL), Image.Resampling.NEAREST)
            picture.paste(tile, (left + 2, i * step + 46))
    return picture


# ------------------------------------------------------------------------------------------------- navigation


def draw_paths(args, count=4):
    """A row per test task, a column per run: paths before (grey) and after one update, and the goal, a circle."""
    step = PLANE + 4
    size = (len(args.runs) * step, count * step + 18)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for c, folder in enumerate(args.runs):
        run, checkpoint = open_run(folder, modgrad_rl)
        if run.env != "navigation":
            fail(f"{folder}: its paths are not in a plane; name runs of --env navigation")
        world = modgrad_rl.Navigation(run)
        goals = modgrad_rl.goals(world, run, "test", 0, count)
        params = checkpoint["params"]
        lived = modgrad_rl.live(params, world, run, "test", 0, count, 1)
        left = c * step
        colour = INK[c % len(INK)]
        head = f"{run.method}, iteration {checkpoint['iteration']}"
        pen.text((left + 4, 3), head, "black")
        for i in range(count):
            corner = (left + 2, i * step + 16)
            draw_task(pen, corner, goals[i].tolist(), lived, i, colour)
    write_png(picture, args.file)


def draw_task(pen, corner, goal, lived, i, colour):
    """Task i: its rollouts before and after the update, and its goal, in the square whose upper left corner is given."""
    left, top = corner
    square = [left, top, left + PLANE, top + PLANE]
    pen.rectangle(square, outline=FRAME)
    for rollouts, ink in zip(lived, (GREY, colour)):
        number = min(SHOWN, rollouts.mask.shape[1])
        for r in range(number):
            alive = rollouts.mask[i, r] > 0
            places = rollouts.observation[i, r][alive].tolist()
            pen.line([pixel(place, corner) for place in places], ink, 1)
    x, y = pixel(goal, corner)
    circle = [x - 4, y - 4, x + 4, y + 4]
    pen.ellipse(circle, outline="black", width=2)
    values = [f"{modgrad_rl.returns(rollouts)[i]:.1f}" for rollouts in lived]
    pen.text((left + 4, top + 3), " -> ".join(values), "black")


def pixel(place, corner):
    """A place in [-1, 1]^2 -> where it is in the picture."""
    left, top = corner
    x, y = (max(-1.0, min(1.0, value)) for value in place)
    across, down = 0.5 + 0.5 * x, 0.5 - 0.5 * y
    return left + PLANE * across, top + PLANE * down


KINDS = {"episode": draw_episodes, "completion": draw_completions, "navigation": draw_paths}


def main():
    root = os.environ.get("FEWSHOT_DATA", "data")
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument("kind", choices=tuple(KINDS))
    p.add_argument("file", metavar="FILE", help="the picture, a PNG")
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; of an episode, modes")
    p.add_argument("--data-root", default=root, help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="keeps images decoded once")
    args = p.parse_args()
    KINDS[args.kind](args)


if __name__ == "__main__":
    main()
