"""Fixtures that tests in all rooms share."""

import pytest

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers import cache, few_scenes  # noqa: E402, F401
