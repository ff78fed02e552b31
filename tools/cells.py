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
    table = "KML, Table 1"
    for setting, modes in SETTINGS.items():
        for i, shots in enumerate((1, 5)):
            to = f"--modes {modes} --shots {shots}"
            column = f"{setting}, {shots}-shot"
            for method, command in KML_METHODS.items():
                name = f"kml/{setting}/{shots}shot/{method.lower()}"
                paper = TABLE1[setting][method][i]
                yield Cell(name, command.format(to=to), table, method, column, paper)


def kml_one_mode():
    """Multi-MAML and Multi-ProtoNet: one run per mode, which every setting uses. Beside them, KML on one mode.

    Multi-MAML's settings are those of MMAML's released code.
    """
    table = "KML, Table 1"
    besides = "KML on one mode"
    for mode in SETTINGS["5mode"].split():
        inner = "--inner-lr 0.01 --inner-steps 5"
        budget = "--meta-batch 4 --iterations 80000"
        if mode == "omniglot":
            inner = "--inner-lr 0.4 --inner-steps 1"
            budget = "--meta-batch 10 --iterations 60000"
        for shots in (1, 5):
            to = f"--modes {mode} --shots {shots}"
            at = f"kml/{mode}/{shots}shot"
            column = f"{mode}, {shots}-shot"
            maml = f"mmaml.py {to} --modulation none {inner}"
            protonet = f"mprotonet.py {to} --modulation none"
            yield Cell(f"{at}/multi-maml", maml, table, "Multi-MAML", column, budget=budget)
            yield Cell(f"{at}/multi-protonet", protonet, table, "Multi-ProtoNet", column)
            yield Cell(f"{at}/mmaml+kml", f"kml.py {to}", besides, "MMAML+KML", column)
            yield Cell(f"{at}/mprotonet+kml", f"mprotonet.py {to}", besides, "MProtoNet+KML", column)


def modgrad_few_shot():
    """ModGrad, Table 2 (and Figure 9, of the same runs), 4 (steps) and 5 (u, --rank).

    MAML on ModGrad's two layers with its step is the control that the paper lacks.
    """
    table = "ModGrad, Table 2"
    names = {"modgrad": "ModGrad", "maml": "MAML", "metasgd": "Meta-SGD", "cavia": "CAVIA", "tnet": "T-Net"}
    for i, shots in enumerate((1, 5)):
        to = f"modgrad.py --modes miniimagenet --shots {shots}"
        at = f"modgrad/table2/{shots}shot"
        column = f"{shots}-shot"
        for algorithm, row in names.items():
            command = f"{to} --algorithm {algorithm}"
            yield Cell(f"{at}/{algorithm}", command, table, row, column, MODGRAD[row][i])
        control = f"{to} --algorithm maml --adapt conv3 conv4 --steps 1 --alpha 0.1"
        yield Cell(f"{at}/maml-same-layers", control, table, "MAML on ModGrad's layers", column)
        deep = f"{to} --backbone wrn28-10 --augment --keep-every 4000"
        paper = MODGRAD["ModGrad, wrn28-10, `--augment`"][i]
        yield Cell(f"{at}/modgrad-wrn28-10", deep, table, "ModGrad, wrn28-10", column, paper)
        for steps in (2, 3, 4, 5):
            name = f"modgrad/table4/{shots}shot/modgrad-{steps}steps"
            row = f"ModGrad, `--steps {steps}`"
            yield Cell(name, f"{to} --steps {steps}", "ModGrad, Table 4", row, column, MODGRAD[row][i])
        for rank in (1, 10):
            name = f"modgrad/table5/{shots}shot/modgrad-u{rank}"
            row = f"ModGrad, `--rank {rank}`"
            yield Cell(name, f"{to} --rank {rank}", "ModGrad, Table 5", row, column, MODGRAD[row][i])


def modgrad_more_shots():
    """ModGrad, Figure 6: first-order MAML of 5 to 30 steps, more shots.

    ResNet-34 sees 224 pixels and twice as many episodes; the archives of mini-ImageNet that data.py takes hold 84 pixels,
    which are enlarged.
    """
    table = "ModGrad, Figure 6"
    deep = "--backbone resnet34 --augment --keep-every 8000"
    budget = "--image-size 224 --iterations 33333"
    for steps in (5, 10, 20, 30):
        maml = f"--algorithm maml --first-order --steps {steps}"
        for shots in (5, 10, 15, 20):
            to = f"modgrad.py --modes miniimagenet --shots {shots}"
            at = f"modgrad/figure6/{shots}shot"
            column = f"{shots}-shot"
            yield Cell(f"{at}/maml-{steps}steps", f"{to} {maml}", table, f"MAML, {steps} steps", column)
            if steps == 5 and shots != 5:
                yield Cell(f"{at}/modgrad", to, table, "ModGrad", column)
        for shots in (1, 5):
            to = f"modgrad.py --modes miniimagenet --shots {shots}"
            at = f"modgrad/figure6/{shots}shot"
            column = f"{shots}-shot"
            name = f"{at}/maml-resnet34-{steps}steps"
            row = f"MAML, resnet34, {steps} steps"
            yield Cell(name, f"{to} {maml} {deep}", table, row, column, budget=budget)
            if steps == 5:
                name = f"{at}/modgrad-resnet34"
                yield Cell(name, f"{to} {deep}", table, "ModGrad, resnet34", column, budget=budget)


def modgrad_table3():
    """ModGrad, Table 3: faces completed from some of their pixels.

    MAML with ModGrad's step on the layer that ModGrad adapts is the control that the paper lacks.
    """
    table = "ModGrad, Table 3"
    names = {"cnp": "CNP", "maml": "MAML", "cavia": "CAVIA", "modgrad": "ModGrad"}
    for order in ("random", "ordered"):
        for pixels in (10, 100):
            to = f"--pixels {pixels} --order {order}"
            at = f"modgrad/table3/{order}-{pixels}"
            column = f"{pixels} {order} pixels"
            for algorithm, row in names.items():
                command = f"modgrad_completion.py --algorithm {algorithm} {to}"
                yield Cell(f"{at}/{algorithm}", command, table, row, column, COMPLETION[row][pixels, order])
            control = f"modgrad_completion.py --algorithm maml --adapt fc5 --steps 1 {to}"
            yield Cell(f"{at}/maml-same-layer", control, table, "MAML on ModGrad's layer", column)


def modgrad_figure5():
    """ModGrad, Figure 5: alphabets."""
    names = {"modgrad": "ModGrad", "maml": "MAML", "fomaml": "FOMAML", "reptile": "Reptile"}
    for algorithm, row in names.items():
        command = f"modgrad_multishot.py --algorithm {algorithm}"
        yield Cell(f"modgrad/figure5/{algorithm}", command, "ModGrad, Figure 5", row, "", MULTISHOT.get(row))


def modgrad_figure8():
    """ModGrad, Figure 8: reinforcement learning. The half-cheetahs need gymnasium[mujoco]."""
    table = "ModGrad, Figure 8"
    names = {"maml": "MAML", "cavia": "CAVIA", "modgrad": "ModGrad"}
    for env in ("navigation", "cheetah-dir", "cheetah-vel"):
        for algorithm, row in names.items():
            name = f"modgrad/figure8/{env}/{algorithm}"
            command = f"modgrad_rl.py --env {env} --algorithm {algorithm}"
            yield Cell(name, command, table, row, env, RL[row][env], images=False)
            if env == "navigation":
                again = f"{command} --seed 1"
                yield Cell(f"{name}-seed1", again, table, f"{row}, seed 1", env, images=False)


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
    tasks_of = {task: task for task in EVERY_TASK.split()} | {"multi": EVERY_TASK}
    for filters in (32, 64):
        to = f"--modes scenes --shots 5 --filters {filters} --val-every 1000"
        for modulation in ("none", "am"):
            for name, tasks in tasks_of.items():
                at = f"afr/table1/{filters}filters/{name}-{modulation}"
                command = f"afr.py --tasks {tasks} {to} --modulation {modulation}"
                yield Cell(at, command, "AFR, Table 1", f"{name}, {modulation}", f"{filters} filters")


CELLS = [
    *kml(),
    *kml_one_mode(),
    *modgrad_few_shot(),
    *modgrad_more_shots(),
    *modgrad_table3(),
    *modgrad_figure5(),
    *modgrad_figure8(),
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


def chosen(globs):
    """The cells whose name matches one of the globs; all, if there is none."""
    if not globs:
        return CELLS
    found = []
    for cell in CELLS:
        if any(fnmatch.fnmatchcase(cell.name, glob) for glob in globs):
            found.append(cell)
    return found


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
    cells = chosen(args.globs)
    if not cells:
        fail(f"no cell is named like {' '.join(args.globs)}; without a GLOB all are listed")
    for cell in cells:
        print(f"{cell.name}\t{command_of(cell, args.quick, args.synthetic)}")


if __name__ == "__main__":
    main()
