"""Tests: a small part of the campaign of hard knocks, which `python -m tests.campaign` runs in full."""

import re

import pytest

from tests import campaign
from tests.helpers import run


@pytest.mark.parametrize("part", campaign.PARTS)
def test_a_small_campaign_goes_well(part):
    if part == "flags":
        pytest.importorskip("hypothesis")
    done = run("tests.campaign", "--scale", "0.03", "--seed", "1", "--only", part, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^\| (.+) \| (\d+) \| (.+) \|$", done.stdout, re.M)
    assert rows
    assert all("WRONG" not in happened for _, _, happened in rows)
