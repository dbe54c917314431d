"""What is shown of a long wait: nothing at first, a bar on a terminal, lines in a file."""

from __future__ import annotations

import gc
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flap_fast import progress as module
from flap_fast.interchange import convert
from flap_fast.progress import Pace, clock, progress, starting
from tests.test_cli import flap


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AFTER_S", 0.05)
    monkeypatch.setattr(module, "EVERY_S", 0.1)
    monkeypatch.delenv("RANK", raising=False)


def lines_of(log: io.StringIO, count: int) -> list[str]:
    """The lines of a log, once it has so many."""
    until = time.monotonic() + 10
    while log.getvalue().count("\n") < count and time.monotonic() < until:
        time.sleep(0.005)
    return log.getvalue().splitlines()


def test_a_file_gets_a_line_now_and_then_with_what_is_left(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    began = time.monotonic()
    with progress("embed\x1b[2J", 1000) as advance:
        assert lines_of(log, 1) == [r"embed\x1b[2J: 0 of 1,000, 0:00:00"]
        advance(251)
        lines = lines_of(log, 3)
    assert time.monotonic() - began >= 0.05 + 2 * 0.1
    left = r"embed\\x1b\[2J: 251 of 1,000, 0:00:0\d, 0:00:\d\d left"
    assert all(re.fullmatch(left, line) for line in lines[1:3])
    assert capsys.readouterr().out == ""


def test_without_a_total_the_time_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with progress("start"):
        assert lines_of(log, 1)[0] == "start: 0:00:00"


@pytest.mark.parametrize("silent", ["short", "unwanted", "rank 1"])
def test_nothing_is_shown_of_what_is(silent: str, capsys, monkeypatch):
    if silent == "rank 1":
        monkeypatch.setenv("RANK", "1")
    with progress("embed", 4, shown=silent != "unwanted") as advance:
        advance(2)
        time.sleep(0 if silent == "short" else 0.1)
    assert capsys.readouterr() == ("", "")


def test_an_error_and_a_stderr_that_is_gone_end_the_thread_alone(monkeypatch):
    class Gone(io.StringIO):
        def write(self, *_):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    done = []
    with progress("embed", 4):
        time.sleep(0.1)
        done.append(1)
    with pytest.raises(KeyError), progress("embed", 4):
        raise KeyError
    assert done == [1]


def test_the_pace_leaves_out_what_an_earlier_call_did():
    pace = Pace(total=100, done=60, since=10.0)
    assert pace.left(60, 15.0) is None
    assert pace.left(80, 15.0) == 5.0
    assert Pace(None, 0, 0.0).left(5, 1.0) is None
    assert [clock(s) for s in (-1, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


PROGRAM = """
import sys, time
from flap_fast import progress as module
module.AFTER_S = 0.05
for inner in ("embed", "score"):  # whichever of both begins first
    with module.progress("outer"), module.progress(inner, 4) as advance:
        time.sleep(0.3)
        advance(3)
        print("result", flush=True)
        time.sleep(0.3)
print("end", file=sys.stderr)
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_a_terminal_has_bars_of_both_and_stdout_only_results():
    here, there = os.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=there, env=env,
        cwd=Path(__file__).parents[1],
    ) as process:  # fmt: skip
        os.close(there)
        shown = b""
        try:
            while part := os.read(here, 4096):
                shown += part
        except OSError:  # how Linux says that the other end is closed
            pass
        assert process.stdout
        assert process.stdout.read() == 2 * b"result\n"
    os.close(here)
    assert process.returncode == 0
    text = re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b"", shown).decode()
    assert "3 of 4" in text
    assert "outer" in text
    assert "score" in text
    assert text.endswith("end\r\n")
    assert re.search(r"0:00:0\d left", text)
    # The cursor is never left hidden, so that a process may be killed.
    assert all(b"\x1b[?25h" in part for part in shown.split(b"\x1b[?25l")[1:])


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_conversion_shows_that_it_goes_on(command: str, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    monkeypatch.setattr(convert, f"{command}_checkpoint", lambda *_, **__: str(lines_of(log, 1)))
    assert flap(command, "model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    assert log.getvalue().startswith(f"{command}: 0:00:0")


def test_a_start_collects_no_garbage_and_what_follows_does():
    collections = []
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    try:
        with starting("open the model"):
            _ = [[] for _ in range(10 * gc.get_threshold()[0])]
            assert collections == []
        _ = [[] for _ in range(10 * gc.get_threshold()[0])]
        assert collections != []
    finally:
        gc.callbacks.pop()


def test_a_start_that_fails_collects_garbage_again():
    with pytest.raises(KeyError), starting("open the model"):
        raise KeyError
    assert gc.isenabled()


def test_a_start_inside_of_another_does_not_end_it():
    with starting("check the run"):
        with starting("open the model"):
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
