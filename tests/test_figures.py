"""The figures beside the tables."""

import json

import numpy as np
import pytest

from tests.helpers import make_result
from tools import figures, tables


def drawn_figures(monkeypatch, folder):
    """Make the tables and figures of a folder, and keep the figures -> {file's name: {panel's title and axis: {line: its points}}}."""
    pytest.importorskip("matplotlib")
    kept = {}

    def keep(figure, title, file):
        panels = {}
        for axis in figure.axes:
            lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
            panels[axis.get_title(), axis.get_ylabel()] = lines
        kept[file.name] = panels

    monkeypatch.setattr(figures, "save", keep)
    _, drawings = tables.make([folder], folder)
    for function, *arguments in drawings:
        function(*arguments)
    return kept


def test_curves_show_training_above_and_validation_below(tmp_path, monkeypatch):
    both = ["omniglot", "miniimagenet"]
    make_result(tmp_path / "a", "MAML", both, [90, 40, 92, 44], shots=5)
    make_result(tmp_path / "b", "MAML", both, [91, 41, 93, 45], shots=5, seed=1, inner_lr=0.1)
    log = tmp_path / "a" / "log.jsonl"
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    for line in lines[29::30]:
        measured = {mode: {"mean": line["iteration"] + m, "ci95": 1} for m, mode in enumerate(both)}
        line["validation"] = {"paper": measured, "inductive": {}}
    log.write_text("\n".join(map(json.dumps, lines)) + "\n")
    (panels,) = drawn_figures(monkeypatch, tmp_path).values()
    names = {(mode, f"accuracy on {kind} tasks, %") for mode in both for kind in ("training", "validation")}
    assert set(panels) == names
    training = panels["miniimagenet", "accuracy on training tasks, %"]
    assert set(training) == {"MAML", "MAML, --inner-lr 0.1"}
    assert training["MAML"][0] == [
        2.5,
        23.5,
    ]  # iterations 2 and 3: 89 points make 44 pairs, and the first is left out
    validation = panels["miniimagenet", "accuracy on validation tasks, %"]
    assert validation == {"MAML": [[30, 31], [60, 61]]}


def test_curves_of_several_seeds_are_their_mean():
    first_seed = np.array([[10, 20, 30], [1, 3, 5]])
    second_seed = np.array([[15, 25, 35], [2, 4, 6]])
    iterations, values = figures.on_common_iterations([first_seed, second_seed])
    assert iterations.tolist() == [15, 20, 25, 30]
    assert values.tolist() == [[2, 3, 4, 5], [2, 3, 4, 5]]
    assert figures.seeds_text([{"seed": 0}]) == ""
    assert "Seeds 0, 2," in figures.seeds_text([{"seed": 2}, {"seed": 0}])


def test_several_seeds_have_one_line_and_a_band():
    pytest.importorskip("matplotlib")
    figure, (axis, other) = figures.side_by_side(2, 8, 4)
    points = [(10, 1.0), (20, 3.0)]
    higher = [(10, 2.0), (20, 4.0)]
    figures.draw_seeds(axis, [points, [], higher], "MAML", "black")
    figures.draw_seeds(other, [points], "MAML", "black")
    assert axis.get_lines()[0].get_xydata().tolist() == [[10, 1.5], [20, 3.5]]
    assert [len(axis.collections), len(other.collections)] == [1, 0]
    figures.pyplot().close(figure)
