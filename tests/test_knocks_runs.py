"""Tests: hard knocks for runs. Readers of the output that go away, data that change, flags that cannot be meant."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import afr
import kml
import mmaml
import modgrad
import modgrad_completion
import modgrad_multishot
import modgrad_rl
import mprotonet
import transference
from tests.helpers import HERE, TINY, call, fails, get_args, picture

SPLITS = ("train", "val", "test")


def shell(command, **env):
    """Run a line of bash in the project's folder -> CompletedProcess."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=HERE,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    "ending",
    ["| head -1", "> /dev/full", ">&-", "2>&-", ">&- 2>&-"],
    ids=["head", "full disk", "no stdout", "no stderr", "neither"],
)
def test_a_run_outlives_the_reader_of_its_output(tmp_path, cache, ending):
    """The run goes on to its result; what nobody can read is dropped."""
    words = " ".join(map(str, [*TINY, "--iterations", 30, "--cache-dir", cache, "--out", tmp_path / "run"]))
    done = shell(f"{sys.executable} mprotonet.py {words} {ending}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["iterations"] == 30


def own_images(root, first, name="v\u00f6gel"):
    """A small data set of noise under a name that ASCII has no letters for."""
    seed = first
    for split in SPLITS:
        for c in range(5):
            for i in range(4):
                picture(root / name / split / f"{split}{c}" / f"{i}.png", seed=seed)
                seed += 1
    return ["--modes", name, "--data-root", root]


def test_a_terminal_that_cannot_show_a_name(tmp_path):
    words = own_images(tmp_path / "root", 0)
    words = [*TINY, *words, "--cache-dir", tmp_path / "c", "--out", tmp_path / "run"]
    words = " ".join(str(word) for word in words if word != "--synthetic")
    done = shell(f"{sys.executable} mprotonet.py {words}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "v\\xf6gel" in done.stdout


def test_data_that_changed_between_stop_and_continuation(tmp_path, monkeypatch, capsys):
    words = [word for word in TINY if word != "--synthetic"]
    words += [
        *own_images(tmp_path / "root", 0, "mine"),
        "--cache-dir",
        tmp_path / "c",
        "--out",
        tmp_path / "run",
    ]
    call(mprotonet, monkeypatch, *words)
    os.utime(
        tmp_path / "root" / "mine" / "train" / "train0" / "0.png", (1, 1)
    )  # the same images, written anew
    call(mprotonet, monkeypatch, *words, "--iterations", 7)
    own_images(tmp_path / "root", 1000, "mine")
    fails(
        capsys,
        lambda: call(mprotonet, monkeypatch, *words, "--iterations", 8),
        "the images of mine are not those that",
        "--out",
    )
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["iteration"] == 7


def test_overwrite_says_how_to_continue(tmp_path, cache, monkeypatch, capsys):
    words = [*TINY, "--iterations", 4000, "--cache-dir", cache, "--out", tmp_path]
    call(kml, monkeypatch, *words, "--overwrite", "--stop-after", 0.2)
    assert "the same command, without --overwrite, continues" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--out", ""], "--out is empty"),
        (["--image-size", "100000"], "up to 1024"),
        (["--modes", "a/b"], "a folder's name, not a path"),
        (["--modes", "omniglot", "omniglot/"], "twice"),
        (["--modes", "x" * 200], "longer than"),
        (["--cache-dir", "~nobody_of_this_name/c"], "no such home folder"),
    ],
)
def test_flags_that_cannot_be_meant(capsys, cache, words, said):
    def begin():
        mprotonet.episodes_of(
            get_args(mprotonet, "--synthetic", "--cache-dir", cache, "--image-size", 8, *words), "test"
        )

    fails(capsys, begin, said)


def test_a_flag_given_twice_is_noted(capsys):
    assert get_args(kml, "--modes", "omniglot", "--modes", "cub").modes == ["cub"]
    assert "--modes is given 2 times; the last one counts" in capsys.readouterr().err


def test_long_names_of_runs_fit_a_file_system():
    words = ["--modes", *(f"{letter * 60}" for letter in "abcde")]
    name = os.path.basename(get_args(kml, *words).out)
    other = os.path.basename(get_args(kml, *words, "--lr", "0.5").out)
    assert len(os.fsencode(name)) <= 200
    assert name != other


@pytest.mark.parametrize(
    "module",
    [kml, mmaml, mprotonet, modgrad, modgrad_completion, modgrad_multishot, modgrad_rl, afr, transference],
    ids=lambda module: module.__name__,
)
def test_without_docstrings(module, monkeypatch, capsys):
    """As under python -OO."""
    monkeypatch.setattr(module, "__doc__", None)
    with pytest.raises(SystemExit) as stop:
        module.get_args(["--help"])
    assert stop.value.code == 0
    assert "--device" in capsys.readouterr().out


def test_results_are_evaluated_anew_where_they_are_not_what_was_written(tmp_path, cache, monkeypatch, capsys):
    words = [*TINY, "--cache-dir", cache, "--out", tmp_path]
    call(kml, monkeypatch, *words)
    file = tmp_path / "result.json"
    want = json.loads(file.read_text())
    for change in ({"accuracy": None}, {"per_task": want["per_task"][::-1]}, {"args": {}}):
        file.write_text(json.dumps(want | change))
        capsys.readouterr()
        call(kml, monkeypatch, *words)
        assert "note: " in capsys.readouterr().err
        assert json.loads(file.read_text())["per_task"] == want["per_task"]
        assert json.loads(file.read_text())["accuracy"] == want["accuracy"]


def test_ctrl_c_at_a_terminal_reaches_the_cells(tmp_path, cache):
    """A signal that a test sends to run_all.sh misses this: a terminal sends it to whoever is in the foreground."""
    log = tmp_path / "kml/2mode/5shot/protonet/log.jsonl"
    flags = " ".join([*TINY[1:], "--iterations", "1000000", "--cache-dir", cache])
    command = f"bash run_all.sh --synthetic --only kml/2mode/5shot/protonet --out {tmp_path} -- {flags}"
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(HERE)
        os.environ["PYTHON"] = sys.executable
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # whoever started the tests may ignore it, and that is inherited
        os.execvp("bash", ["bash", "-c", command])

    def drain():
        try:
            while os.read(terminal, 65536):
                pass
        except OSError:
            pass

    threading.Thread(target=drain, daemon=True).start()
    end = time.monotonic() + 60
    while time.monotonic() < end and not log.exists():
        time.sleep(0.1)
    time.sleep(0.5)
    os.write(terminal, b"\x03")
    while time.monotonic() < end and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # nothing is left of it, unless Ctrl-C was not heard
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert (log.parent / "checkpoint.pt").exists()
    lines = len(log.read_text().splitlines())
    time.sleep(0.5)
    assert len(log.read_text().splitlines()) == lines


def test_temporary_files_of_killed_processes_go(tmp_path, cache, monkeypatch):
    for name in (".log.jsonl.4194305", ".params-3.pt.77", ".notes.5"):
        (tmp_path / name).write_bytes(b"")
    call(kml, monkeypatch, *TINY, "--cache-dir", cache, "--out", tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] in ([".notes.5", ".lock"], [".lock", ".notes.5"])


def test_kept_parameters_are_checked(tmp_path, cache, monkeypatch, capsys):
    import modgrad

    words = [
        *TINY,
        "--image-size",
        16,
        "--val-every",
        2,
        "--val-tasks",
        4,
        "--keep-every",
        2,
        "--cache-dir",
        cache,
    ]
    call(modgrad, monkeypatch, *words, "--iterations", 2, "--out", tmp_path)
    file = tmp_path / "params-2.pt"
    content = bytearray(file.read_bytes())
    w = torch.load(file, weights_only=True)["conv1.weight"].numpy().tobytes()
    content[content.find(w) + 3] ^= 0x40
    file.write_bytes(content)
    (tmp_path / "result.json").unlink()
    fails(
        capsys,
        lambda: call(modgrad, monkeypatch, *words, "--iterations", 2, "--out", tmp_path),
        "params-2.pt",
        "damaged",
    )


def test_numbers_of_a_checkpoint_that_are_not_finite(tmp_path, cache, monkeypatch, capsys):
    words = [*TINY, "--cache-dir", cache, "--out", tmp_path]
    call(kml, monkeypatch, *words)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    checkpoint["params"]["conv1.bias"][0] = float(np.nan)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    fails(capsys, lambda: call(kml, monkeypatch, *words), "conv1.bias is not finite")
