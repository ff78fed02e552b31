"""Tests: the tour runs as it stands, and its outputs are those that it shows."""

import os
import re
from unittest import mock

import pytest

from tests.helpers import HERE

nbformat = pytest.importorskip("nbformat", reason="needs nbformat and nbclient: requirements-dev.txt")
nbclient = pytest.importorskip("nbclient", reason="needs nbformat and nbclient: requirements-dev.txt")
pytest.importorskip("ipykernel", reason="needs ipykernel: requirements-dev.txt")
pytest.importorskip("matplotlib", reason="needs matplotlib: requirements-dev.txt")


def printed(cell):
    """The text that a cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


def pictures(cell):
    """How many pictures a cell shows."""
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


NUMBER = re.compile(r" *[-+]?\d+(?:\.\d+)?")  # with the spaces that fill its column


def numbers(text):
    """All numbers in a text."""
    return [float(x) for x in NUMBER.findall(text)]


def words(text):
    """A text with # in the place of every number, its sign and its padding: a difference near zero may have either sign."""
    return NUMBER.sub("#", text)


def test_the_tour_shows_what_it_computes(tmp_path):
    shown = nbformat.read(HERE / "tour.ipynb", as_version=4)
    made = nbformat.read(HERE / "tour.ipynb", as_version=4)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}):
        client = nbclient.NotebookClient(made, timeout=180, resources={"metadata": {"path": str(HERE)}})
        client.execute()
    for old, new in zip(shown.cells, made.cells):
        if old.cell_type != "code":
            continue
        assert pictures(old) == pictures(new), old.source
        assert words(printed(old)) == words(printed(new)), old.source
        # Another processor may round differently, and so count another image right here and there.
        for x, y in zip(numbers(printed(old)), numbers(printed(new))):
            assert abs(x - y) <= 0.02 * abs(x) + 1.5, old.source


def test_the_tour_is_complete_and_small():
    text = (HERE / "tour.ipynb").read_text()
    assert len(text) < 1_000_000
    assert "TODO" not in text
    assert not re.search(r"RESULT \d", text)
    cells = nbformat.read(HERE / "tour.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert sum(map(pictures, code)) >= 4
    for file in (HERE / "results" / "checkpoints" / "tour").iterdir():
        assert file.stat().st_size < 3_000_000


def test_numbers_and_words_of_a_line():
    assert numbers("+0.27 +- 0.72   -1.96") == [0.27, 0.72, -1.96]
    assert words("+0.27 +- 0.72   -1.96") == words("-0.27 +- 0.72   +1.96") == "# +-##"
