"""All tests: `python -m pytest -q test_all.py`, or `pytest -q`. One room: `pytest -q tests/test_kml.py`.

They prove the mathematics (identities, gradients, invariances), the protocol, the importers on small archives of the
published layouts, the command lines as users type them, and the bad inputs. No network and no GPU is needed. Tests on real
images need FEWSHOT_DATA (or ./data) to hold them and are skipped otherwise.
"""

import importlib
from pathlib import Path

import pytest

ROOMS = sorted(path.stem for path in (Path(__file__).parent / "tests").glob("test_*.py"))

pytest.register_assert_rewrite(*(f"tests.{room}" for room in ROOMS))
FIXTURE = type(importlib.import_module("tests.helpers").cache)
for room in ROOMS:
    module = importlib.import_module(f"tests.{room}")
    for name, thing in vars(module).items():
        if name.startswith("test_") or isinstance(thing, FIXTURE):
            if name in globals() and globals()[name] is not thing:
                raise ImportError(
                    f"two tests or fixtures are named {name}: rename the one in tests/{room}.py"
                )
            globals()[name] = thing
