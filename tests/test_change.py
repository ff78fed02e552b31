"""Tests: a reader's own change is small, and what was there goes on working.

The change is README's exercise: `--modulation sigmoid` for mmaml.py, a gate per channel after BatchNorm.
"""

import importlib.util
import json

import pytest

from tests import test_kml as mathematics
from tests.helpers import HERE, TINY, call

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


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """mmaml.py with the change, as a module, and how many lines were added."""
    text, count = changed((HERE / "mmaml.py").read_text())
    path = tmp_path_factory.mktemp("changed") / "mmaml.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("changed_mmaml", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, count


def test_a_new_modulation_takes_few_lines(script, tmp_path, cache, monkeypatch, capsys):
    module, count = script
    assert count <= 10
    words = [*TINY, "--inner-steps", 1, "--cache-dir", cache]
    call(module, monkeypatch, *words, "--modulation", "sigmoid", "--out", tmp_path / "gate")
    assert "MMAML, sigmoid gate" in capsys.readouterr().out
    assert json.loads((tmp_path / "gate" / "result.json").read_text())["parameters"]["generator"] > 0
    call(module, monkeypatch, *words, "--out", tmp_path / "film")
    assert capsys.readouterr().out.startswith("MMAML ")  # the default is the default still


HOLD = {  # what has to hold for the modulations that were there, and for the new one
    "none": (
        "test_loop_and_vmap_agree",
        "test_the_number_of_workers_changes_no_bit",
        "test_inductive_predictions_do_not_know_the_other_queries",
    ),
    "sigmoid": ("test_loop_and_vmap_agree", "test_inductive_predictions_do_not_know_the_other_queries"),
    "film": (
        "test_zero_modulation_is_the_plain_network",
        "test_loop_and_vmap_agree",
        "test_the_number_of_workers_changes_no_bit",
        "test_a_constant_embedding_knows_nothing_of_the_task",
        "test_omega_depends_on_the_support_images_alone",
        "test_inductive_predictions_do_not_know_the_other_queries",
        "test_the_benchmarks_plain_baseline_computes_the_same",
    ),
}


@pytest.mark.parametrize("modulation, name", [(m, name) for m, names in HOLD.items() for name in names])
def test_with_a_new_modulation_holds(script, modulation, name):
    getattr(mathematics, name)(script[0], modulation)


@pytest.mark.parametrize("vectorise", [False, True], ids=["loop", "vmap"])
@pytest.mark.parametrize("modulation", ["none", "film", "sigmoid"])
def test_with_a_new_modulation_the_meta_gradient_is_right(script, modulation, vectorise):
    mathematics.test_meta_gradient_agrees_with_central_differences(script[0], modulation, vectorise)


@pytest.mark.parametrize("adapt", ["theta", "modulated"])
def test_with_a_new_modulation_the_inner_loop_is_the_same(script, adapt):
    mathematics.test_what_the_inner_loop_adapts(script[0], "film", adapt)
