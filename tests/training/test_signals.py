"""Signals: answered at once, a run stops with a checkpoint; a second Ctrl-C says what is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flap_fast.ranks import Ranks
from flap_fast.training import stop as stop_file
from flap_fast.training.signals import SIGNALS
from flap_fast.training.stop import Stop

ROOT = Path(__file__).parents[2]
# A start that waits in C, as for the other ranks, in a call that fails when it is interrupted.
START = """
import ctypes, signal, sys
from pathlib import Path
from flap_fast.training.signals import ends_at_once
{before}
with ends_at_once("stopped", says={says}{imports}):
    try:
        print("started", flush=True)
        {wait}
        print("interrupted", flush=True)
    finally:
        print("cleaned up", flush=True)
"""
IN_C = "left = ctypes.CDLL(None).sleep(60)"
IN_PYTHON = "import time; [time.sleep(0.01) for _ in range(6000)]"


@pytest.fixture(autouse=True)
def hanging_up_is_not_ignored() -> Iterator[None]:
    """As it is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def started(
    wait: str, *, says: bool = True, before: str = "", imports: str = ""
) -> subprocess.Popen[str]:
    program = START.format(wait=wait, says=says, before=before, imports=imports)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.parametrize(
    ("number", "says", "line"),
    [(s, True, "" if s == signal.SIGTERM else "stopped\n") for s in SIGNALS]
    + [(signal.SIGINT, False, "")],
)
def test_a_start_ends_with_one_line_and_cleans_up(number: signal.Signals, says: bool, line: str):
    process = started(IN_PYTHON, says=says)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("cleaned up\n", line)
    assert process.returncode == 128 + number


def test_a_start_that_waits_in_c_is_answered_and_ends():
    process = started(IN_C)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "stopped\n")  # the call was not interrupted
    assert process.returncode == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_imports_are_interrupted_by_no_exception(number: signal.Signals):
    process = started(IN_PYTHON, imports=", imports=True")
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", "" if number == signal.SIGTERM else "stopped\n")
    assert process.returncode == 128 + number


def test_a_terminal_that_closes_does_not_end_what_nohup_started():
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = started("import time; time.sleep(0.5)", before=ignored)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20) == ("interrupted\ncleaned up\n", "")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    (tmp_path / "step-000040").mkdir()
    (tmp_path / "step-000040/state.json").touch()
    return tmp_path


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_stops_a_run_after_its_step(
    number: signal.Signals, checkpoints: Path, capfd: pytest.CaptureFixture[str]
):
    before = signal.getsignal(number)
    with Stop(Ranks(), checkpoints) as stop:
        assert not stop.agreed()
        send(number)
        assert stop.agreed()
        send(number)  # a launcher's, of the same Ctrl-C
    printed = capfd.readouterr().err
    assert printed.count("\n") == (number == signal.SIGINT)
    assert printed.startswith("stopping after this step" if printed else "")
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("saved", [True, False])
def test_a_second_ctrl_c_ends_at_once_and_says_what_is_lost(
    saved: bool,
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(stop_file, "_SAME_S", 0.05)
    folder = checkpoints if saved else checkpoints / "none"
    with pytest.raises(KeyboardInterrupt), Stop(Ranks(), folder):
        _ = [send(signal.SIGINT) for _ in range(2)], time.sleep(1)
    what = "the steps after 40, the last checkpoint," if saved else "all steps"
    said = capfd.readouterr().err.splitlines()
    assert said[1:] == [f"stopped at once: {what} of this run are lost"]
