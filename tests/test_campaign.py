"""Tests: a small part of the campaign of hard knocks, which `python -m tests.campaign` runs in full."""

import re

import pytest

from tests.helpers import run

PARTS_SEEN = (
    *(
        "SIGKILL in kml",
        "SIGKILL while a cache",
        "four builders",
        "two runs",
        "no room",
        "damaged checkpoint",
    ),
    *("damaged log", "damaged result", "damaged cache", "damaged images", "malicious pickles"),
)


def test_a_small_campaign_goes_well():
    pytest.importorskip("hypothesis")
    done = run("tests.campaign", "--scale", "0.03", "--seed", "1", timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^\| (.+) \| (\d+) \| (.+) \|$", done.stdout, re.M)
    for part in PARTS_SEEN:
        assert any(what.startswith(part) for what, _, _ in rows), part
    assert all("WRONG" not in happened for _, _, happened in rows)
