"""The figures beside the tables."""

import json

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
