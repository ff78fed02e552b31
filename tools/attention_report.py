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
        of = torch.randperm(len(x), generator=rng)[:batch].to(x.device)
        outputs = afr.predict(adapted, kind, afr.embed(adapted, x[of], afr.Norm(), w), args)
        optimizer.zero_grad()
        afr.criterion(kind, outputs, y[of]).backward()
        optimizer.step()
    return w.detach()


def relative(w):
    """w (B, C) of an equal network: in all blocks but the last, the factors 1 - w are divided by their mean.

    BatchNorm cancels a factor that all maps of a block have in common (see afr.embed).
    """
    kept = 1 - w[:-1]
    return torch.cat([1 - kept / kept.mean(1, keepdim=True), w[-1:]])


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
    classes, _, turns, _ = (x[0] for x in episodes.indices(m, number // M, 1))
    images, labels = [], []
    for label, (c, quarters) in enumerate(zip(classes, turns)):
        part = episodes.images[m][episodes.offsets[m][c] :][: episodes.counts[m][c]]
        if episodes.modes[m] == "omniglot":
            part = torch.rot90(part, int(quarters), (1, 2))
        images.append(part)
        labels.append(torch.full((len(part),), label, device=episodes.device))
    x = torch.cat(images).permute(0, 3, 1, 2).expand(-1, 3, S, S).float() / 255
    return x, torch.cat(labels)


def report_of(params, kind, sampler, args, bar):
    """One high-level task -> {"w", "best", and each of NAMES by block}."""
    w = []
    for j in range(max(SUBTASKS, args.report_tasks + 1)):
        batch = sampler.tasks(j, 1)
        task = type(batch)(*(x[0] for x in batch))
        with torch.no_grad():
            x = afr.embed(params, task.support_x, afr.Norm())
            w.append(afr.attention(params, kind, x, task.support_y, args)[0])
        bar.update()
    best, rows = [], []
    for j in range(args.report_tasks):
        batch = sampler.tasks(j, 1)
        task = type(batch)(*(x[0] for x in batch))
        best.append(best_weights(params, task, *everything(sampler, j), args, kind))
        own, next_one = agreement(w[j], best[j]), agreement(w[j + 1], best[j])
        rows.append(torch.cat([own, next_one], 1))
        bar.update()
    rows = torch.stack(rows).double().cpu().numpy()  # (tasks, B, 4)
    found = {"w": torch.stack(w).tolist(), "best": torch.stack(best).tolist()}
    for i, name in enumerate(NAMES):
        found[name] = {}
        for l in range(4):
            found[name][f"block{l + 1}"] = afr.summary(rows[:, l, i], [kind], {})["overall"]
    return found


def show(kind, found, args):
    """Print the report of one high-level task."""
    w = np.array(found["w"])  # (subtasks, B, C)
    print(
        f"\n{args.title}, {kind}: w of {len(w)} test subtasks; {args.report_tasks} beside weights trained on all data\n"
        f"{'block':8}{'w: mean, size, of which by subtask':38}{'cosine':18}{'next one':18}{'same sign':18}next one"
    )
    for l in range(4):
        of = w[:, l]
        by_subtask = np.sqrt((of.std(0) ** 2).mean())
        size = f"{of.mean():+.4f}, {np.sqrt((of**2).mean()):.4f}, {by_subtask:.4f}"
        cells = []
        for name in ("cosine", "cosine_next", "same_sign", "same_sign_next"):
            cells.append("{mean:.3f} +- {ci95:.3f}".format(**found[name][f"block{l + 1}"]).ljust(18))
        print(f"{l + 1:<8}{size:38}{''.join(cells)}")


def draw(found, args):
    """Figure 3 -> PNG content."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        2, len(found), figsize=(2 + 7 * len(found), 7), squeeze=False, layout="constrained"
    )
    C = args.filters
    for (kind, of), top, bottom in zip(found.items(), *panels):
        w = np.array(of["w"])
        for l in range(4):
            at = np.tile(l * C + np.arange(C), len(w))
            top.plot(at, w[:, l].ravel(), ".", markersize=2, alpha=0.2, color=f"C{l}", label=f"block {l + 1}")
        top.set(title=f"{kind}: w of {len(w)} test subtasks", xlabel="feature map", ylabel="w")
        legend = top.legend(loc="upper right", fontsize="small")
        for handle in legend.legend_handles:
            handle.set(alpha=1, markersize=8)
        best, mine = np.array(of["best"])[0, 3], w[0, 3]
        for values, side, label in ((mine, -0.2, "predicted"), (best, 0.2, "trained on all data")):
            most = np.abs(values).max().clip(1e-12)
            bottom.bar(np.arange(C) + side, values / most, 0.4, label=f"{label}, divided by {most:.2g}")
        bottom.axhline(0, color="black", linewidth=0.8)
        title = "the last block's, first test subtask, each scaled to 1"
        bottom.set(title=title, xlabel="feature map", ylabel="w, scaled")
        bottom.legend(fontsize="small")
    figure.suptitle(f"{args.title}, {args.ways}-way {args.shots}-shot")
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    plt.close(figure)
    return content.getvalue()


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
