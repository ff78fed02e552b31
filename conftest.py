"""Fixtures that tests in all rooms share, and the number of threads that tests and the scripts they start may use."""

import os

import pytest

# Before PyTorch is imported: with two threads in each of two tests, threads wait for one another, on busy cores for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FEWSHOT_CORES", "1")  # tasks one after another: the other core has a test of its own
pytest.register_assert_rewrite("tests.helpers")

from fewshot.run import Run  # noqa: E402
from tests.helpers import cache, few_scenes  # noqa: E402, F401


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Runs draw no curves.png, which would take a third of a second each, but in tests marked `curves`."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(Run, "draw_curves", lambda self: None)


# These take longest. Each of two processes begins with one, so that none is left over at the end for one of them alone.
SLOWEST = (
    "test_the_tour_shows_what_it_computes",
    "test_a_small_campaign_goes_well",
    "test_readme_commands_run",
    "test_run_all_runs_a_failing_and_a_sound_cell",
    "test_transference_from_end_to_end",
)


def pytest_collection_modifyitems(items):
    """Put the slowest tests at the beginning and in the middle, where two processes begin."""
    slow = []
    for name in SLOWEST:
        slow += [item for item in items if getattr(item, "originalname", "") == name]
    rest = [item for item in items if item not in slow]
    half = len(rest) // 2
    first = slow[::2] + rest[:half]
    second = slow[1::2] + rest[half:]
    items[:] = first + second


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let a process that has nothing left take tests over from the other."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
