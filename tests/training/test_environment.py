"""environment.json: how a run was started, from which code, how long it took and how it ended."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flap_fast.launcher import launcher_facts
from flap_fast.ranks.failure import Ended
from flap_fast.training import environment
from flap_fast.training.environment import command_line, session, sessions_of


def test_a_session_says_when_it_began_and_how_it_ended(tmp_path: Path):
    file = tmp_path / "environment.json"
    with session(file, {"started": "a", "host": "x"}, resumed=False):
        assert json.loads(file.read_text()) == {"started": "a", "host": "x"}
    with (
        pytest.raises(Ended),
        session(file, {"started": "b", "host": "y"}, resumed=True),
    ):
        raise Ended("stopped after step 4")
    with (
        pytest.raises(ArithmeticError),
        session(file, {"started": "c", "host": "z"}, resumed=True),
    ):
        raise ArithmeticError("NaN\nat 5")
    found = json.loads(file.read_text())
    assert [s["host"] for s in sessions_of(found)] == ["x", "y", "z"]
    outcomes = ["complete", "stopped after step 4", "ArithmeticError: NaN at 5"]
    assert [s["outcome"] for s in sessions_of(found)] == outcomes
    assert all(0 <= s["duration_s"] < 5 and s["ended"] > "2" for s in sessions_of(found))
    assert list(found)[:4] == ["started", "ended", "duration_s", "outcome"]


def test_a_session_that_was_killed_and_a_file_of_before_are_kept(tmp_path: Path):
    file = tmp_path / "environment.json"
    file.write_text('{"started": "a", "ranks": "1", "torch": "2.0"}')
    with session(file, {"started": "b"}, resumed=True):
        first, second = sessions_of(json.loads(file.read_text()))
    assert first == {"started": "a", "ranks": "1", "torch": "2.0"}
    assert second == {"started": "b"}
    with session(file, {"started": "c"}, resumed=False):
        assert sessions_of(json.loads(file.read_text())) == [{"started": "c"}]


@pytest.mark.parametrize("damaged", ["{", "[1]", "3"])
def test_a_damaged_file_stops_no_run_and_is_named(damaged: str, tmp_path: Path, capsys):
    file = tmp_path / "environment.json"
    file.write_text(damaged)
    with session(file, {"started": "b"}, resumed=True):
        pass
    assert json.loads(file.read_text())["outcome"] == "complete"
    assert f"warning: {file} loses its earlier sessions" in capsys.readouterr().err


def test_a_full_disk_at_the_end_hides_no_error_of_the_run(tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "environment.json"

    def fail_on_a_full_disk() -> None:
        with session(file, {"started": "a"}, resumed=False):
            monkeypatch.setattr(environment, "write_atomically", full)
            raise ArithmeticError("NaN")

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ArithmeticError, match="NaN"):
        fail_on_a_full_disk()
    assert "does not say how the run ended, got [Errno 28]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/venv/bin/flap", "train", "a b.yaml", "x=1"], "flap train 'a b.yaml' x=1"),
        (
            ["flap", "train", "x", "data.train=https://h/a?sig=b"],
            "flap train x 'data.train=https://h/a'",
        ),
        (["/code/flap_fast/__main__.py", "--local_rank=0", "train", "c.yaml"], "flap train c.yaml"),
    ],
)
def test_the_command_is_what_one_would_type(argv: list[str], command: str, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == command
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "mine.py", "--all of it"])
    assert command_line() == "python mine.py '--all of it'"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_a_checkout_that_tracks_the_code(tmp_path: Path):
    file = tmp_path / "flap_fast/training/environment.py"
    file.parent.mkdir(parents=True)
    shutil.copy(environment.__file__, file)
    (tmp_path / "flap_fast/__init__.py").touch()
    spec = importlib.util.spec_from_file_location("copied", file)
    assert spec
    assert spec.loader
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)

    def git(*words: str) -> str:
        names = ("-c", "user.name=n", "-c", "user.email=e@x")
        command = ["git", *names, *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    assert copied.code() == {}  # as installed in a checkout of something else
    git("add", ".")
    git("commit", "-qm", "all")
    head = git("rev-parse", "HEAD").strip()
    assert copied.code() == {"commit": head, "dirty": False}
    (tmp_path / "notes").touch()
    assert copied.code()["dirty"] is False
    (tmp_path / "flap_fast/new.py").touch()
    assert copied.code() == {"commit": head, "dirty": True}


@pytest.mark.parametrize(
    ("variables", "facts"),
    [
        ({}, {}),
        ({"TORCHELASTIC_RUN_ID": "none"}, {"launcher": "torchrun", "nodes": "2"}),
        ({"CROSS_SIZE": "2"}, {"launcher": "deepspeed", "nodes": "2"}),
        (
            {"SLURM_PROCID": "3", "SLURM_JOB_ID": "77"},
            {"launcher": "srun", "nodes": "2", "slurm_job": "77"},
        ),
    ],
)
def test_the_launcher_is_named(variables: dict[str, str], facts: dict[str, str], monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "SLURM_PROCID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (variables | (ranks if variables else {})).items():
        monkeypatch.setenv(name, value)
    assert launcher_facts() == facts
