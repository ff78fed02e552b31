"""Every cell of the papers' tables and figures, in one list: the command that fills it, and where its numbers stand.

    python -m tools.cells                          # names and commands, one per line
    python -m tools.cells 'kml/2mode/5shot/*'      # of these cells
    python -m tools.cells --quick --synthetic      # with the scripts' two-minute budget, on procedural images

run_all.sh runs these commands. A cell's run lives in <folder>/<name>/. A script's defaults are its paper's settings, so
`command` says only what makes the cell that cell; `budget` is the part that --quick leaves out.
"""

import argparse
import fnmatch
import sys
from typing import NamedTuple

from tools.papers import AFR_TABLE2, COMPLETION, MODGRAD, MULTISHOT, RL, TABLE1


class Cell(NamedTuple):
    """A run, and its place in a paper's table."""

    name: str  # kml/2mode/5shot/mmaml+kml: the folder of its run, and what --only matches
    command: str  # kml.py --modes omniglot miniimagenet --shots 5
    table: str  # "KML, Table 1"
    row: str  # "MMAML+KML"
    column: str  # "2mode, 5-shot"
    paper: object = None  # what stands there in the paper: a number, (mean, interval), or a text
    budget: str = ""  # --meta-batch 4 --iterations 80000
    images: bool = True  # False where there are none, so that --synthetic does not concern it


SETTINGS = {
    "2mode-dagger": "miniimagenet fc100",
    "2mode": "omniglot miniimagenet",
    "3mode": "omniglot miniimagenet fc100",
    "5mode": "omniglot miniimagenet fc100 cub aircraft",
}
KML_METHODS = {  # row of Table 1: its command
    "MAML": "mmaml.py {to} --modulation none",
    "MMAML": "mmaml.py {to}",
    "MMAML+KML": "kml.py {to}",
    "ProtoNet": "mprotonet.py {to} --modulation none",
    "MProtoNet": "mprotonet.py {to} --modulation film",
    "MProtoNet+KML": "mprotonet.py {to}",
}
EVERY_TASK = "classification depth normals vanishing"


def kml():
    """KML, Table 1, whose runs Table 2 is made of, too."""
    for setting, modes in SETTINGS.items():
        for i, shots in enumerate((1, 5)):
            to = f"--modes {modes} --shots {shots}"
            for method, command in KML_METHODS.items():
                name = f"kml/{setting}/{shots}shot/{method.lower()}"
                paper = TABLE1[setting][method][i]
                yield Cell(
                    name, command.format(to=to), "KML, Table 1", method, f"{setting}, {shots}-shot", paper
                )


def kml_one_mode():
    """Multi-MAML and Multi-ProtoNet: one run per mode, which every setting uses. Beside them, KML on one mode.

    Multi-MAML's settings are those of MMAML's released code.
    """
    for mode in SETTINGS["5mode"].split():
        inner, budget = "--inner-lr 0.01 --inner-steps 5", "--meta-batch 4 --iterations 80000"
        if mode == "omniglot":
            inner, budget = "--inner-lr 0.4 --inner-steps 1", "--meta-batch 10 --iterations 60000"
        for shots in (1, 5):
            to, at, column = (
                f"--modes {mode} --shots {shots}",
                f"kml/{mode}/{shots}shot",
                f"{mode}, {shots}-shot",
            )
            maml = f"mmaml.py {to} --modulation none {inner}"
            protonet = f"mprotonet.py {to} --modulation none"
            yield Cell(f"{at}/multi-maml", maml, "KML, Table 1", "Multi-MAML", column, budget=budget)
            yield Cell(f"{at}/multi-protonet", protonet, "KML, Table 1", "Multi-ProtoNet", column)
            yield Cell(f"{at}/mmaml+kml", f"kml.py {to}", "KML on one mode", "MMAML+KML", column)
            yield Cell(
                f"{at}/mprotonet+kml", f"mprotonet.py {to}", "KML on one mode", "MProtoNet+KML", column
            )


def modgrad_few_shot():
    """ModGrad, Table 2 (and Figure 9, of the same runs), 4 (steps) and 5 (u, --rank).

    MAML on ModGrad's two layers with its step is the control that the paper lacks.
    """
    names = {"modgrad": "ModGrad", "maml": "MAML", "metasgd": "Meta-SGD", "cavia": "CAVIA", "tnet": "T-Net"}
    for i, shots in enumerate((1, 5)):
        to, column = f"modgrad.py --modes miniimagenet --shots {shots}", f"{shots}-shot"
        at = f"modgrad/table2/{shots}shot"
        for algorithm, row in names.items():
            yield Cell(
                f"{at}/{algorithm}",
                f"{to} --algorithm {algorithm}",
                "ModGrad, Table 2",
                row,
                column,
                MODGRAD[row][i],
            )
        control = f"{to} --algorithm maml --adapt conv3 conv4 --steps 1 --alpha 0.1"
        yield Cell(f"{at}/maml-same-layers", control, "ModGrad, Table 2", "MAML on ModGrad's layers", column)
        deep = f"{to} --backbone wrn28-10 --augment --keep-every 4000"
        paper = MODGRAD["ModGrad, wrn28-10, `--augment`"][i]
        yield Cell(f"{at}/modgrad-wrn28-10", deep, "ModGrad, Table 2", "ModGrad, wrn28-10", column, paper)
        for steps in (2, 3, 4, 5):
            name, row = f"modgrad/table4/{shots}shot/modgrad-{steps}steps", f"ModGrad, `--steps {steps}`"
            yield Cell(name, f"{to} --steps {steps}", "ModGrad, Table 4", row, column, MODGRAD[row][i])
        for rank in (1, 10):
            name, row = f"modgrad/table5/{shots}shot/modgrad-u{rank}", f"ModGrad, `--rank {rank}`"
            yield Cell(name, f"{to} --rank {rank}", "ModGrad, Table 5", row, column, MODGRAD[row][i])


def modgrad_more_shots():
    """ModGrad, Figure 6: first-order MAML of 5 to 30 steps, more shots.

    ResNet-34 sees 224 pixels and twice as many episodes; the archives of mini-ImageNet that data.py takes hold 84 pixels,
    which are enlarged.
    """
    table = "ModGrad, Figure 6"
    deep, budget = "--backbone resnet34 --augment --keep-every 8000", "--image-size 224 --iterations 33333"
    for steps in (5, 10, 20, 30):
        maml = f"--algorithm maml --first-order --steps {steps}"
        for shots in (5, 10, 15, 20):
            to, at = f"modgrad.py --modes miniimagenet --shots {shots}", f"modgrad/figure6/{shots}shot"
            yield Cell(
                f"{at}/maml-{steps}steps", f"{to} {maml}", table, f"MAML, {steps} steps", f"{shots}-shot"
            )
            if steps == 5 and shots != 5:
                yield Cell(f"{at}/modgrad", to, table, "ModGrad", f"{shots}-shot")
        for shots in (1, 5):
            to, at = f"modgrad.py --modes miniimagenet --shots {shots}", f"modgrad/figure6/{shots}shot"
            name, row = f"{at}/maml-resnet34-{steps}steps", f"MAML, resnet34, {steps} steps"
            yield Cell(name, f"{to} {maml} {deep}", table, row, f"{shots}-shot", budget=budget)
            if steps == 5:
                name, row = f"{at}/modgrad-resnet34", "ModGrad, resnet34"
                yield Cell(name, f"{to} {deep}", table, row, f"{shots}-shot", budget=budget)


def modgrad_elsewhere():
    """ModGrad, Table 3 (faces completed from some of their pixels), Figure 5 (alphabets), Figure 8 (reinforcement learning).

    In Table 3, MAML with ModGrad's step on the layer that ModGrad adapts is the control that the paper lacks. The
    half-cheetahs need gymnasium[mujoco].
    """
    names = {"cnp": "CNP", "maml": "MAML", "cavia": "CAVIA", "modgrad": "ModGrad"}
    for order in ("random", "ordered"):
        for pixels in (10, 100):
            at, column, table = (
                f"modgrad/table3/{order}-{pixels}",
                f"{pixels} {order} pixels",
                "ModGrad, Table 3",
            )
            to = f"--pixels {pixels} --order {order}"
            for algorithm, row in names.items():
                command = f"modgrad_completion.py --algorithm {algorithm} {to}"
                yield Cell(f"{at}/{algorithm}", command, table, row, column, COMPLETION[row][pixels, order])
            control = f"modgrad_completion.py --algorithm maml --adapt fc5 --steps 1 {to}"
            yield Cell(f"{at}/maml-same-layer", control, table, "MAML on ModGrad's layer", column)
    names = {"modgrad": "ModGrad", "maml": "MAML", "fomaml": "FOMAML", "reptile": "Reptile"}
    for algorithm, row in names.items():
        command = f"modgrad_multishot.py --algorithm {algorithm}"
        yield Cell(f"modgrad/figure5/{algorithm}", command, "ModGrad, Figure 5", row, "", MULTISHOT.get(row))
    names = {"maml": "MAML", "cavia": "CAVIA", "modgrad": "ModGrad"}
    for env in ("navigation", "cheetah-dir", "cheetah-vel"):
        for algorithm, row in names.items():
            command, name = (
                f"modgrad_rl.py --env {env} --algorithm {algorithm}",
                f"modgrad/figure8/{env}/{algorithm}",
            )
            yield Cell(name, command, "ModGrad, Figure 8", row, env, RL[row][env], images=False)
            if env == "navigation":
                again = f"{row}, seed 1"
                yield Cell(
                    f"{name}-seed1", f"{command} --seed 1", "ModGrad, Figure 8", again, env, images=False
                )


def afr():
    """Attentive feature reuse, Table 2 (with a transfer to classes of another data set) and Table 1 (and Figure 5).

    Table 1 is on ray-cast scenes, NOT the paper's MMT data, which were never released; 5 shots are our choice.
    """
    methods = {
        "maml": ("MAML", "--algorithm maml"),
        "anil": ("ANIL", "--modulation none"),
        "am": ("AM", "--modulation am"),
        "am-constant": ("AM, constant w", "--modulation am --embed constant"),
        "p-am": ("P-AM", "--modulation pam"),
    }
    for i, shots in enumerate((1, 5)):
        to = f"afr.py --modes miniimagenet --shots {shots} --transfer fc100"
        for name, (row, flags) in methods.items():
            paper = AFR_TABLE2[row]["M"][i] if row in AFR_TABLE2 else None
            at = f"afr/table2/{shots}shot/{name}"
            yield Cell(at, f"{to} {flags}", "AFR, Table 2", row, f"{shots}-shot", paper)
    single = [(task, task) for task in EVERY_TASK.split()]
    for filters in (32, 64):
        to = f"--modes scenes --shots 5 --filters {filters} --val-every 1000"
        for modulation in ("none", "am"):
            for name, tasks in [*single, ("multi", EVERY_TASK)]:
                command = f"afr.py --tasks {tasks} {to} --modulation {modulation}"
                at, row = f"afr/table1/{filters}filters/{name}-{modulation}", f"{name}, {modulation}"
                yield Cell(at, command, "AFR, Table 1", row, f"{filters} filters")


CELLS = [
    *kml(),
    *kml_one_mode(),
    *modgrad_few_shot(),
    *modgrad_more_shots(),
    *modgrad_elsewhere(),
    *afr(),
]


def command_of(cell, quick=False, synthetic=False):
    """The whole command of a cell, but for the interpreter and --out."""
    words = [cell.command]
    if quick:
        words.append("--quick")
    elif cell.budget:
        words.append(cell.budget)
    if synthetic and cell.images:
        words.append("--synthetic")
    return " ".join(words)


def fail(message):
    """Exit with status 2 after one line. (`data.fail` would take the seconds that importing PyTorch takes.)"""
    print(f"cells.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("globs", nargs="*", metavar="GLOB", help="names of cells, as 'kml/2mode/5shot/*' (all)")
    p.add_argument("--quick", action="store_true", help="the scripts' two-minute budget")
    p.add_argument("--synthetic", action="store_true", help="procedural images: no download")
    p.error = fail
    args = p.parse_args()
    chosen = CELLS
    if args.globs:
        chosen = [cell for cell in CELLS if any(fnmatch.fnmatchcase(cell.name, glob) for glob in args.globs)]
    if not chosen:
        fail(f"no cell is named like {' '.join(args.globs)}; without a GLOB all are listed")
    for cell in chosen:
        print(f"{cell.name}\t{command_of(cell, args.quick, args.synthetic)}")


if __name__ == "__main__":
    main()
