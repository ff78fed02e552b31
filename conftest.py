"""Fixtures that tests in all rooms share, and the number of threads that tests and the scripts they start may use."""

import os

import pytest

# Before PyTorch is imported: with two threads in each of two tests, threads wait for one another, on busy cores for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("tests.helpers")

from fewshot.run import Run  # noqa: E402
from tests.helpers import cache, few_scenes  # noqa: E402, F401


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Runs draw no curves.png, which would take a third of a second each, but in tests marked `curves`."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(Run, "draw_curves", lambda self: None)
