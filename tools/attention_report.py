"""What the attention modules of a run of afr.py do: attentive feature reuse's Figure 3.

    python -m tools.attention_report runs/am-miniimagenet

For each of the run's --tasks: w, the channel weights that attention predicts, of many test subtasks; and, of the first
--report-tasks, how well w agrees with weights trained on all data of the subtask: cosine, and share of equal signs. As a control, the same is measured
of the w of the next subtask, which has not seen this one. Writes attention.json and, with matplotlib, attention.png
into the run's folder.
"""

import argparse
import importlib.util
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import afr
from data import atomic_write, fail, flags_of_run, read_tensors

SUBTASKS = 150  # test subtasks whose w is shown (the paper: 150)
NAMES = ("cosine", "same_sign", "cosine_next", "same_sign_next")
SHOWN = ("cosine", "cosine_next", "same_sign", "same_sign_next")  # the same in the order of the columns
HEADS = "cosine            next one          same sign         next one"


def best_weights(params, task, x, y, args, kind, steps=100, batch=100, rate=0.02):
    """Channel weights w trained alone, from 0 (where the factor 1 - w is 1), on all data (x, y) of a test subtask, network and head fixed -> w (B, C).

    The paper gives neither optimiser nor steps. Ours: Adam, over random batches, BatchNorm with each one's statistics.
    """
    with torch.no_grad():
        adapted, _ = afr.adapt(params, task, args, kind)
    adapted = {k: v.detach() for k, v in adapted.items()}
    rng = torch.Generator().manual_seed(0)
    w = torch.zeros(4, args.filters, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=rate)
    for _ in range(steps):
        order = torch.randperm(len(x), generator=rng)
        of = order[:batch].to(x.device)
        features = afr.embed(adapted, x[of], afr.Norm(), w)
        outputs = afr.predict(adapted, kind, features, args)
        optimizer.zero_grad()
        afr.criterion(kind, outputs, y[of]).backward()
        optimizer.step()
    return w.detach()


def relative(w):
    """w (B, C) of an equal network: in all blocks but the last, the factors 1 - w are divided by their mean.

    BatchNorm cancels a factor that all maps of a block have in common (see afr.embed).
    """
    kept = 1 - w[:-1]
    in_proportion = 1 - kept / kept.mean(1, keepdim=True)
    return torch.cat([in_proportion, w[-1:]])


def agreement(w, target):
    """Of w with trained weights, both (B, C) -> cosine and share of equal signs, (B, 2)."""
    one, two = relative(w), relative(target)
    same_sign = (one.sign() == two.sign()).float().mean(1)
    return torch.stack([F.cosine_similarity(one, two, 1), same_sign], 1)


def everything(episodes, number):
    """All images of the classes (or of the domain) of test task `number`, with their labels."""
    if isinstance(episodes, afr.Scenes):
        return episodes.everything(number)
    M = len(episodes.modes)
    m, S = number % M, episodes.size
    drawn = episodes.indices(m, number // M, 1)
    classes, _, turns, _ = (x[0] for x in drawn)
    images, labels = [], []
    for label, (c, quarters) in enumerate(zip(classes, turns)):
        part = images_of_class(episodes, m, c, int(quarters))
        images.append(part)
        labels.append(torch.full([len(part)], label, device=episodes.device))
    x = torch.cat(images).permute(0, 3, 1, 2)
    x = x.expand(-1, 3, S, S).float() / 255
    return x, torch.cat(labels)


def images_of_class(episodes, m, c, quarters):
    """All images of class c of mode m, as they are stored; Omniglot's turned by so many right angles."""
    first, count = episodes.offsets[m][c], episodes.counts[m][c]
    images = episodes.images[m][first:][:count]
    if episodes.modes[m] == "omniglot":
        return torch.rot90(images, quarters, (1, 2))
    return images


def subtask(sampler, j):
    """Test subtask j of a high-level task."""
    batch = sampler.tasks(j, 1)
    return type(batch)(*(x[0] for x in batch))


def report_of(params, kind, sampler, args, bar):
    """One high-level task -> {"w", "best", and each of NAMES by block}."""
    w = []
    for j in range(max(SUBTASKS, args.report_tasks + 1)):
        task = subtask(sampler, j)
        w.append(predicted_weights(params, kind, task, args))
        bar.update()
    best, rows = [], []
    for j in range(args.report_tasks):
        x, y = everything(sampler, j)
        task = subtask(sampler, j)
        best.append(best_weights(params, task, x, y, args, kind))
        own = agreement(w[j], best[j])
        next_one = agreement(w[j + 1], best[j])
        rows.append(torch.cat([own, next_one], 1))
        bar.update()
    rows = torch.stack(rows).double().cpu().numpy()  # (tasks, B, 4)
    found = {}
    found["w"] = torch.stack(w).tolist()
    found["best"] = torch.stack(best).tolist()
    for i, name in enumerate(NAMES):
        found[name] = {}
        for l in range(4):
            score = afr.summary(rows[:, l, i], [kind], {})
            found[name][f"block{l + 1}"] = score["overall"]
    return found


@torch.no_grad()
def predicted_weights(params, kind, task, args):
    """The channel weights w that attention predicts for a subtask -> (B, C)."""
    x = afr.embed(params, task.support_x, afr.Norm())
    return afr.attention(params, kind, x, task.support_y, args)[0]


def show(kind, found, args):
    """Print the report of one high-level task."""
    w = np.array(found["w"])  # (subtasks, B, C)
    beside = f"{args.report_tasks} beside weights trained on all data"
    print(f"\n{args.title}, {kind}: w of {len(w)} test subtasks; {beside}")
    print(f"{'block':8}{'w: mean, size, of which by subtask':38}{HEADS}")
    for l in range(4):
        cells = []
        for name in SHOWN:
            score = found[name][f"block{l + 1}"]
            cells.append("{mean:.3f} +- {ci95:.3f}".format(**score).ljust(18))
        print(f"{l + 1:<8}{size_of_weights(w[:, l]):38}{''.join(cells)}")


def size_of_weights(w):
    """w (subtasks, C) of a block -> text: mean, root mean square, and the part of that which differs between subtasks."""
    by_subtask = np.sqrt((w.std(0) ** 2).mean())
    size = np.sqrt((w**2).mean())
    return f"{w.mean():+.4f}, {size:.4f}, {by_subtask:.4f}"


def draw(found, args):
    """Figure 3 -> PNG content."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = len(found)
    size = (2 + 7 * kinds, 7)
    figure, panels = plt.subplots(2, kinds, figsize=size, squeeze=False, layout="constrained")
    for (kind, of), top, bottom in zip(found.items(), *panels):
        w = np.array(of["w"])
        draw_weights(top, w, kind)
        best = np.array(of["best"])
        draw_last_block(bottom, {"predicted": w[0, 3], "trained on all data": best[0, 3]})
    figure.suptitle(f"{args.title}, {args.ways}-way {args.shots}-shot")
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    plt.close(figure)
    return content.getvalue()


def draw_weights(axis, w, kind):
    """All w (subtasks, B, C) as dots, the blocks side by side."""
    C = w.shape[2]
    for l in range(4):
        places = np.tile(l * C + np.arange(C), len(w))
        dots = {"markersize": 2, "alpha": 0.2, "color": f"C{l}", "label": f"block {l + 1}"}
        axis.plot(places, w[:, l].ravel(), ".", **dots)
    axis.set(title=f"{kind}: w of {len(w)} test subtasks", xlabel="feature map", ylabel="w")
    legend = axis.legend(loc="upper right", fontsize="small")
    for handle in legend.legend_handles:
        handle.set(alpha=1, markersize=8)


def draw_last_block(axis, weights):
    """{label: weights (C,) of one subtask}, as bars beside each other."""
    for (label, values), side in zip(weights.items(), (-0.2, 0.2)):
        most = np.abs(values).max().clip(1e-12)
        places = np.arange(len(values)) + side
        axis.bar(places, values / most, 0.4, label=f"{label}, divided by {most:.2g}")
    axis.axhline(0, color="black", linewidth=0.8)
    title = "the last block's, first test subtask, each scaled to 1"
    axis.set(title=title, xlabel="feature map", ylabel="w, scaled")
    axis.legend(fontsize="small")


def open_run(given):
    """Read the checkpoint of a run -> its flags, its parameters."""
    path = Path(given.run) / "checkpoint.pt"
    try:
        checkpoint = read_tensors(path)
        recorded, params = checkpoint["identity"], checkpoint["params"]
        modulation = recorded["modulation"]
        if "filters" not in recorded:
            raise KeyError("filters")
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(
            f"{path} is no checkpoint of afr.py ({type(error).__name__}): train first, or name another folder"
        )
    if modulation == "none":
        fail(f"{given.run}: the run has no attention modules; name one of --modulation am or pam")
    args = flags_of_run(recorded, afr)
    args.device = "cpu"
    args.data_root, args.cache_dir = given.data_root, given.cache_dir
    args.report_tasks = given.report_tasks
    args.allow_shared_classes = True  # training on these images has decided that
    args.title = f"{args.method} {afr.data_name(args)}"
    return args, params


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument("run", metavar="RUN", help="folder of a run of afr.py with --modulation am or pam")
    p.add_argument(
        "--report-tasks", type=int, default=10, help="test subtasks on whose data weights are trained"
    )
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="keeps images decoded once")
    given = p.parse_args()
    if given.report_tasks < 2:
        fail(f"--report-tasks {given.report_tasks}: give 2 or more")
    args, params = open_run(given)
    test = afr.MetaTasks(args, "test")
    total = (SUBTASKS + args.report_tasks) * len(args.tasks)
    found = {}
    with tqdm(total=total, desc="attention", disable=None, leave=False) as bar:
        for kind, sampler in zip(args.tasks, test.samplers):
            found[kind] = report_of(params, kind, sampler, args, bar)
            show(kind, found[kind], args)
    out = Path(given.run)
    about = {
        "method": args.method,
        "synthetic": args.synthetic,
        "modes": args.modes,
        "report_tasks": args.report_tasks,
    }
    atomic_write(out / "attention.json", json.dumps(about | {"found": found}) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("note: matplotlib is not installed, so there is no figure")
        return
    atomic_write(out / "attention.png", draw(found, args))
    print(f"written: {out / 'attention.png'}")


if __name__ == "__main__":
    main()
