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
    columns = shots + queries
    width, height = columns * (size + 4) + 40, ways * (size + 4) + 36
    picture = Image.new("RGB", (len(args.runs) * width - 14, height), "white")
    pen = ImageDraw.Draw(picture)
    for m, name in enumerate(args.runs):
        mode = name.removeprefix("synthetic-")
        where = {"root": args.data_root, "cache_dir": args.cache_dir, "synthetic": mode != name}
        episodes = Episodes([mode], "test", ways, shots, queries, size, **where)
        task = episodes.tasks(number, 1)
        support = task.support_x[0].unflatten(0, (ways, shots))
        query = task.query_x[0].unflatten(0, (ways, queries))
        left = m * width + 4
        pen.text((left, 4), name.replace("-", " "), "black")
        pen.text((left, 19), f"support: {ways} classes, {shots} images each", "black")
        pen.text((left + shots * (size + 4) + 12, 19), f"query: {queries} images each", "black")
        for c in range(ways):
            for k, image in enumerate([*support[c], *query[c]]):
                gap = 12 if k >= shots else 0
                place = left + k * (size + 4) + gap, c * (size + 4) + 34
                pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
                picture.paste(Image.fromarray(pixels), place)
                x, y = place
                pen.rectangle([x - 1, y - 1, x + size, y + size], outline=(200, 200, 200))
    write_png(picture, args.file)


# ------------------------------------------------------------------------------------------------- completion


@torch.no_grad()
def draw_completions(args, count=8):
    """A row per test image: its context, what each run makes of it, and the truth."""
    columns, setting = [], None
    for folder in args.runs:
        run, checkpoint = open_run(
            folder, modgrad_completion, data_root=args.data_root, cache_dir=args.cache_dir, test_tasks=count
        )
        here = run.modes, run.pixels, run.order, run.image_size, run.synthetic
        if setting not in (None, here):
            fail(
                "runs differ in data set, pixels, order, image size or --synthetic; name runs of one setting"
            )
        setting = here
        episodes = modgrad_completion.Completions.of(run, "test")
        batch = episodes.tasks(0, count)
        made = [
            modgrad_completion.task_loss(checkpoint["params"], task, run)[1]
            for task in map(type(batch), *batch)
        ]
        steps = "1 step" if run.steps == 1 else f"{run.steps} steps"
        columns.append((f"{run.method}\n{steps if run.steps else ''}", torch.stack(made).clamp(0, 1)))
    columns.insert(0, (f"context:\n{run.pixels} {run.order}", context_shown(episodes, batch, count)))
    columns.append(("truth\n", batch.query_y))
    data = "+".join(run.modes)
    title = f"{'SYNTHETIC ' if run.synthetic else ''}{data}, first test images"
    write_png(images_in_columns(columns, episodes.size, title), args.file)


def context_shown(episodes, batch, count):
    """Images (count, S*S, 3) with the context's pixels; what is not given is blue."""
    seen = torch.ones_like(batch.query_y) * torch.tensor([0.2, 0.3, 0.6])
    _, context = episodes.indices(0, count)
    for i, places in enumerate(torch.from_numpy(context)):
        seen[i, places] = batch.query_y[i, places]
    return seen


def images_in_columns(columns, S, title):
    """[(head, images (count, S*S, 3))] -> a picture, one column each."""
    count = len(columns[0][1])
    picture = Image.new("RGB", (len(columns) * (CELL + 4), count * (CELL + 4) + 46), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((2, 2), title, "black")
    for c, (head, images) in enumerate(columns):
        left = c * (CELL + 4) + 2
        pen.text((left - 2, 17), head, "black")
        pixels = (images.reshape(count, S, S, 3) * 255).round().byte().numpy()
        for i, image in enumerate(pixels):
            tile = Image.fromarray(image).resize((CELL, CELL), Image.Resampling.NEAREST)
            picture.paste(tile, (left, i * (CELL + 4) + 46))
    return picture


# ------------------------------------------------------------------------------------------------- navigation


def draw_paths(args, count=4):
    """A row per test task, a column per run: paths before (grey) and after one update, and the goal, a circle."""
    picture = Image.new("RGB", (len(args.runs) * (PLANE + 4), count * (PLANE + 4) + 18), "white")
    pen = ImageDraw.Draw(picture)
    for c, folder in enumerate(args.runs):
        run, checkpoint = open_run(folder, modgrad_rl)
        if run.env != "navigation":
            fail(f"{folder}: its paths are not in a plane; name runs of --env navigation")
        world = modgrad_rl.Navigation(run)
        goals = modgrad_rl.goals(world, run, "test", 0, count)
        lived = modgrad_rl.live(checkpoint["params"], world, run, "test", 0, count, 1)
        pen.text((c * (PLANE + 4) + 4, 3), f"{run.method}, iteration {checkpoint['iteration']}", "black")
        for i in range(count):
            corner = c * (PLANE + 4) + 2, i * (PLANE + 4) + 16
            draw_task(pen, corner, goals[i].tolist(), lived, i, INK[c % len(INK)])
    write_png(picture, args.file)


def draw_task(pen, corner, goal, lived, i, colour):
    """Task i: its rollouts before and after the update, and its goal, in the square whose upper left corner is given."""
    left, top = corner
    pen.rectangle([left, top, left + PLANE, top + PLANE], outline=(200, 200, 200))
    for rollouts, ink in zip(lived, (GREY, colour)):
        for r in range(min(SHOWN, rollouts.mask.shape[1])):
            alive = rollouts.mask[i, r] > 0
            places = rollouts.observation[i, r][alive].tolist()
            pen.line([pixel(place, corner) for place in places], ink, 1)
    x, y = pixel(goal, corner)
    pen.ellipse([x - 4, y - 4, x + 4, y + 4], outline="black", width=2)
    values = [f"{modgrad_rl.returns(rollouts)[i]:.1f}" for rollouts in lived]
    pen.text((left + 4, top + 3), " -> ".join(values), "black")


def pixel(place, corner):
    """A place in [-1, 1]^2 -> where it is in the picture."""
    x, y = (max(-1.0, min(1.0, value)) for value in place)
    return corner[0] + PLANE * (0.5 + 0.5 * x), corner[1] + PLANE * (0.5 - 0.5 * y)


KINDS = {"episode": draw_episodes, "completion": draw_completions, "navigation": draw_paths}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument("kind", choices=tuple(KINDS))
    p.add_argument("file", metavar="FILE", help="the picture, a PNG")
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; of an episode, modes")
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="keeps images decoded once")
    args = p.parse_args()
    KINDS[args.kind](args)


if __name__ == "__main__":
    main()
