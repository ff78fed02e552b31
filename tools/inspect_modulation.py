"""How large is the modulation, how much of it is the task's, and does the task embedding v tell the modes apart?

    python -m tools.inspect_modulation RUN [RUN ...] [--tasks 200] [--out results/modulation.json]

for finished runs of kml.py and mprotonet.py with kernel modulation (folders with a checkpoint). For each convolution it
prints, over the runs' test tasks, in the terms of the KML paper (Eq. 6 to 8):

    size     root mean square of M's entries. With the residual W * (1 + M) they stand beside a 1.
    task     root mean square of what is left of M without its mean over all tasks: the part that depends on the task.
    mode     root mean square of the modes' mean M without the mean of these: the part that depends on the mode alone.

of each filter, over the first 20 test tasks, its norm after modulation relative to that before:

    norm     smallest, median and largest. BatchNorm divides a filter's norm out of its output. But a gradient step on a filter
             of half the norm turns it four times as far: the gradient is twice as long, the filter half as long.

of the outputs of each convolution, over channels and these tasks, in the support pass:

    variance    smallest, median and largest. BatchNorm adds 1e-5 to it, which a small kernel's does not outweigh.
    deviation   what BatchNorm leaves of it, sqrt(variance / (variance + 1e-5)): 1 where the output is truly normalised.

and of v: how many test tasks lie nearest to the mean v of their own mode, the means being of validation tasks. A mode's
share of all tasks is what guessing gives. Then what the network does with v: its accuracy (paper's protocol) when each test
task is given, in place of its own v, the mean v of its mode, of all modes, or of another mode; in brackets what that changes,
task by task. Last, what the norms of filters do: its accuracy when each modulated filter is scaled back to the norm that it
had before modulation. That leaves what a filter computes as it is (but for BatchNorm's epsilon) and changes the steps on it.
"""

import argparse
import importlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import Episodes, Task, atomic_write, fail, flags_of_run, read_tensors

SCRIPTS = {"MMAML+KML": "kml", "MProtoNet+KML": "mprotonet"}


def load(folder):
    """A run's folder -> its script as a module, its arguments, its parameters, iterations done."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        fail(f"there is no {path}: train first, or name the folder of a run")
    try:
        checkpoint = read_tensors(path)
        recorded = checkpoint["identity"]
        method = recorded["method"]
        params, iteration = checkpoint["params"], checkpoint["iteration"]
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        fail(f"{path} is no checkpoint ({type(error).__name__}): name the folder of a finished run")
    if method not in SCRIPTS:
        fail(f"{folder} is a run of {method}: only {' and '.join(SCRIPTS)} have an M")
    module = importlib.import_module(SCRIPTS[method])
    embed = recorded.get("embed")
    if embed in ("query", "other"):
        fail(f"{folder} was trained with --embed {embed}: its v is not the support images'; name another run")
    return module, flags_of_run(recorded, module), params, iteration


def embed_and_modulate(module, params, episodes, count):
    """Of the first `count` tasks: v (count, 128), {layer: M (count, entries)}, mode (count,)."""
    v, modes = [], []
    M = {f"conv{l}.weight": [] for l in module.LAYERS}
    for j in range(count):
        task = episodes.tasks(j, 1)
        v.append(module.encode_task(params, task.support_x[0]))
        omega = module.modulation(params, v[-1])
        for k, x in M.items():
            x.append(omega[k].flatten())
        modes.append(int(task.mode[0]))
    M = {k: torch.stack(x) for k, x in M.items()}
    return torch.stack(v), M, torch.tensor(modes)


def accuracies(module, args, params, episodes, vs):
    """Accuracy in % on test task j with vs[what][j] in place of its own v -> {what: a list, a number for each task}."""
    encode = module.encode_task
    count = len(next(iter(vs.values())))
    found = {what: [] for what in vs}
    try:
        for j in range(count):
            task = Task(*(x[0] for x in episodes.tasks(j, 1)))
            for what, v in vs.items():
                module.encode_task = lambda *_, v=v[j]: v
                logits = module.task_loss(params, task, args)[1]
                right = (logits.argmax(-1) == task.query_y).double()
                found[what].append(100 * right.mean().item())
    finally:
        module.encode_task = encode
    return found


def filter_norms(base, modulated, layer):
    """Norm of each filter of a layer after modulation, relative to its norm before -> (C_out,)."""
    before = base[f"{layer}.weight"].flatten(1).norm(dim=1)
    after = modulated[f"{layer}.weight"].flatten(1).norm(dim=1)
    return after / before


def scale_back(base, modulated):
    """Modulated parameters, each filter scaled to the norm that it had before modulation."""
    scaled = dict(modulated)
    for key in base:
        if key.startswith("conv") and key.endswith(".weight"):
            factor = filter_norms(base, modulated, key.removesuffix(".weight"))
            scaled[key] = modulated[key] / factor.view(-1, 1, 1, 1)
    return scaled


def accuracies_scaled_back(module, args, params, episodes, vs):
    """What `accuracies` gives where every modulated filter has the norm that it had before modulation."""
    modulate = module.modulate
    module.modulate = lambda base, omega, *one: scale_back(base, modulate(base, omega, *one))
    try:
        return accuracies(module, args, params, episodes, vs)
    finally:
        module.modulate = modulate


def output_variances(module, params, x):
    """Variances of the convolutions' outputs for images x (n, 3, S, S) -> {layer: (C_out,)}; `params` as modulated."""
    found = {}
    for l in module.LAYERS:
        W, b = params[f"conv{l}.weight"], params[f"conv{l}.bias"]
        y = F.conv2d(x, W, b, stride=2, padding=1)
        found[f"conv{l}"] = y.var((0, 2, 3), correction=0)
        x = F.relu(module.conv_norm(params, l, x)[0])
    return found


def scales(module, args, params, episodes, count):
    """Over the first `count` tasks -> {layer: {"norm", "variance", "deviation": [smallest, median, largest]}}."""
    one = [0] if getattr(args, "no_residual", False) else []
    base = module.group(params, "base")
    norms = {f"conv{l}": [] for l in module.LAYERS}
    seen = {f"conv{l}": [] for l in module.LAYERS}
    for j in range(count):
        support_x = episodes.tasks(j, 1).support_x[0]
        omega = module.modulation(params, module.encode_task(params, support_x))
        modulated = module.modulate(base, omega, *one)
        for layer, variance in output_variances(module, modulated, support_x).items():
            seen[layer].append(variance)
            norms[layer].append(filter_norms(base, modulated, layer))
    found = {}
    for layer, variances in seen.items():
        variance = torch.cat(variances)
        deviation = (variance / (variance + 1e-5)).sqrt()
        found[layer] = {
            "norm": spread(torch.cat(norms[layer])),
            "variance": spread(variance),
            "deviation": spread(deviation),
        }
    return found


def spread(x):
    """Smallest, median and largest of a tensor, to three digits."""
    values = (x.min(), x.median(), x.max())
    return [float(f"{value.item():.3g}") for value in values]


def median_and_ends(found):
    """What `spread` found, as text: the median, and in brackets the smallest and the largest."""
    smallest, median, largest = found
    return f"{median:.3g} ({smallest:.3g} to {largest:.3g})"


def rms(x):
    """The root mean square of a tensor."""
    return x.square().mean().sqrt().item()


def sizes(M, mode, modes):
    """{layer: M of the tasks (count, entries)}, mode (count,) -> {layer: {"size", "task", "mode"}}: see above."""
    found = {}
    for key, x in M.items():
        of_modes = torch.stack([x[mode == m].mean(0) for m in modes])
        found[key.split(".")[0]] = {
            "size": rms(x),
            "task": rms(x - x.mean(0)),
            "mode": rms(of_modes - of_modes.mean(0)),
        }
    return found


@torch.no_grad()
def inspect(folder, count, data_root, cache_dir):
    """One run -> dict: size of M by layer, and how well v tells the modes apart (see above)."""
    module, args, params, iteration = load(folder)
    args.data_root, args.cache_dir = data_root, cache_dir
    args.device = "cpu"
    args.allow_shared_classes = True  # training on these images has decided that
    modes = range(len(args.modes))
    v_val, _, mode_val = embed_and_modulate(module, params, Episodes.of(args, "val"), count)
    test = Episodes.of(args, "test")
    v, M, mode = embed_and_modulate(module, params, test, count)
    centres = torch.stack([v_val[mode_val == m].mean(0) for m in modes])
    found = accuracies(module, args, params, test, vs_in_its_place(v, mode, centres))
    found |= accuracies_scaled_back(module, args, params, test, {"filters scaled back": v})
    per_task = {what: np.array(x) for what, x in found.items()}
    accuracy, change = scores(module, args, per_task)
    flags = [flag for flag in ("embed", "no_residual", "generator") if hasattr(args, flag)]
    return {
        "method": args.method,
        "modes": args.modes,
        "shots": args.shots,
        "seed": args.seed,
        **{flag: getattr(args, flag) for flag in flags},
        "iteration": iteration,
        "tasks": count,
        "synthetic": args.synthetic,
        "M": sizes(M, mode, modes),
        "accuracy": accuracy,
        "outputs": scales(module, args, params, test, min(count, 20)),
        "change": change,
        "per_task": {what: x.round(4).tolist() for what, x in per_task.items()},
        "v": embedding(v, mode, centres),
    }


def vs_in_its_place(v, mode, centres):
    """What each task is given as its v, its own (count, 128) among them -> {what: (count, 128)}."""
    vs = {
        "its own v": v,
        "its mode's mean": centres[mode],
        "the mean of all": centres.mean(0).expand(len(v), -1),
    }
    if len(centres) > 1:
        vs["another mode's mean"] = centres[(mode + 1) % len(centres)]
    return vs


def scores(module, args, per_task):
    """{what: accuracy on each task} -> their summaries, and those of the changes from what the own v gives, both by what."""
    accuracy, change = {}, {}
    for what, x in per_task.items():
        accuracy[what] = module.summary(x, args.modes)
        change[what] = module.summary(x - per_task["its own v"], args.modes)
    return accuracy, change


def embedding(v, mode, centres):
    """v of the tasks (count, 128), their mode (count,), the modes' means -> how well v tells the modes apart."""
    nearest = torch.cdist(v, centres).argmin(1)
    right = (nearest == mode).float()
    between = torch.pdist(centres).mean().item() if len(centres) > 1 else None
    within = (v - centres[mode]).norm(dim=1)
    return {
        "right_mode_percent": 100 * right.mean().item(),
        "norm": v.norm(dim=1).mean().item(),
        "distance_of_modes": between,
        "spread_within_modes": within.mean().item(),
    }


def report(row):
    """Print what was found of one run."""
    flags = f"--embed {row.get('embed', 'support')}"
    if row.get("no_residual"):
        flags += " --no-residual"
    data = "SYNTHETIC " if row["synthetic"] else ""
    data += "+".join(row["modes"])
    done = f"after {row['iteration']} iterations"
    print(f"{row['method']} {data} {row['shots']}-shot {flags} seed {row['seed']}, {done}")
    for layer, x in row["M"].items():
        print(f"    {layer}: size {x['size']:.4f}  task {x['task']:.4f}  mode {x['mode']:.4f}")
    for layer, x in row["outputs"].items():
        norm, variance, deviation = (median_and_ends(x[what]) for what in ("norm", "variance", "deviation"))
        print(f"    {layer}: modulation multiplies the norms of filters by {norm}")
        print(f"    {layer}: outputs have variance {variance}, after BatchNorm deviation {deviation}")
    print(f"    v: {row['v']['right_mode_percent']:.1f} % of the tasks lie nearest to their own mode")
    for what, score in row["accuracy"].items():
        cells = []
        for name, x in score.items():
            change = row["change"][what][name]
            cells.append(f"{name} {x['mean']:.2f} ({change['mean']:+.2f} +- {change['ci95']:.2f})  ")
        print(f"    accuracy with {what:20}", *cells)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    p.add_argument(
        "--tasks", type=int, default=200, help="of validation and of test, over all modes together"
    )
    p.add_argument("--data-root", default=os.environ.get("FEWSHOT_DATA", "data"), help="or FEWSHOT_DATA")
    p.add_argument("--cache-dir", default=".cache", help="decoded images")
    p.add_argument("--out", help="a JSON file for what was found")
    args = p.parse_args()
    if args.tasks < 10:
        fail(f"--tasks {args.tasks}: give 10 or more")
    found = []
    for folder in args.runs:
        row = inspect(folder, args.tasks, args.data_root, args.cache_dir)
        found.append(row)
        report(row)
    if args.out:
        atomic_write(Path(args.out), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
