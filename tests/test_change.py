"""Tests: a reader's own change is small, and what was there goes on working.

The change is README's exercise: `--modulation sigmoid` for mmaml.py, a gate per channel after BatchNorm.
"""

import json
import shutil
import subprocess
import sys

from tests.helpers import HERE, TINY

ADDED = {  # after this line of mmaml.py: these lines
    'METHODS = {"none": "MAML", "film": "MMAML"}': 'METHODS["sigmoid"] = "MMAML, sigmoid gate"\n',
    "        used.append(moments)\n": (
        '        if f"gate{l}" in params:\n'
        '            x = x * params[f"gate{l}"][:, None, None]\n'
    ),
    '    """Outputs of the linear layer that makes omega': (
        '    if args.modulation == "sigmoid":\n'
        '        return {f"gate{l}": c_out}\n'
    ),
    "    omega = {}\n    for l in LAYERS:\n": (
        '        if f"generator.gate{l}.weight" in params:\n'
        '            omega[f"gate{l}"] = torch.sigmoid(linear(params, f"generator.gate{l}", v))\n'
        "            continue\n"
    ),
}  # fmt: skip


def changed(text):
    """The text of mmaml.py with the change -> text, number of lines added."""
    count = 0
    for after, lines in ADDED.items():
        assert text.count(after) == 1, after
        at = text.index(after) + len(after)
        if not after.endswith("\n"):  # to the end of that line
            at = text.index("\n", at) + 1
        text = text[:at] + lines + text[at:]
        count += lines.count("\n")
    return text, count


def test_a_new_modulation_takes_few_lines(tmp_path):
    text, count = changed((HERE / "mmaml.py").read_text())
    assert count <= 10
    for name in ("fewshot", "tools", "tests"):
        shutil.copytree(HERE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*HERE.glob("*.py"), HERE / "pyproject.toml", HERE / "README.md"]:
        shutil.copy(path, tmp_path)
    (tmp_path / "mmaml.py").write_text(text)

    def python(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    words = ["mmaml.py", *TINY, "--cache-dir", tmp_path / "cache"]
    said = python(*words, "--modulation", "sigmoid", "--out", tmp_path / "gate")
    assert "MMAML, sigmoid gate" in said
    assert json.loads((tmp_path / "gate" / "result.json").read_text())["parameters"]["generator"] > 0
    assert python(*words, "--out", tmp_path / "film").startswith("MMAML ")  # the default is the default still
    python(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_kml.py",
        "-k",
        "(mmaml or film) and not variants",
    )
