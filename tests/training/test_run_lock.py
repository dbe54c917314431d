"""One process at a time trains into a run's folder."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.ranks import Ranks
from flap_fast.training.loop import train
from flap_fast.training.run_lock import run_lock
from tests.tiny import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny(f"run.folder={tmp_path}/runs")


@pytest.fixture
def ended() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def left(config: Config, **changed: Any) -> Path:
    """The lock as this process would have left it, but for what changed."""
    with run_lock(config, Ranks()):
        held = json.loads((config.run_folder / "lock").read_text()) | changed
    config.run_folder.mkdir(parents=True)
    file = config.run_folder / "lock"
    file.write_text(json.dumps(held))
    return file


def test_a_second_process_is_refused_and_the_first_one_keeps_its_lock(config: Config):
    with run_lock(config, Ranks()):
        before = (config.run_folder / "lock").read_bytes()
        message = rf"by one process at a time, got process {os.getpid()} on .* run\.name=ANOTHER"
        with pytest.raises(ConfigError, match=message), run_lock(config, Ranks()):
            pass
        assert (config.run_folder / "lock").read_bytes() == before
    assert not config.run_folder.parent.exists()  # nothing was written


def test_other_ranks_hold_no_lock(config: Config):
    with run_lock(config, Ranks(rank=1, world=2)):
        assert not config.run_folder.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_trains_is_not_trained(
    resume: bool, prepared: Path, config: Config
):
    ours = tiny(f"run.folder={config.run.folder}", f"data.train={prepared}/train")
    file = left(config)
    with pytest.raises(ConfigError, match="by one process at a time"):
        train(ours, resume=resume)
    assert [found.name for found in config.run_folder.iterdir()] == [file.name]


def test_the_lock_of_a_process_that_ended_here_is_taken_over(config: Config, ended: int):
    # Ended; or another process has its id by now; or ended in the job that was queued again.
    for changed in ({"pid": ended}, {"began": "1"}, {"host": "other", "job": "7", "restarts": 0}):
        file = left(config, **changed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_JOB_ID", "7")
            patch.setenv("SLURM_RESTART_COUNT", "1")
            with run_lock(config, Ranks()):
                assert json.loads(file.read_text())["pid"] == os.getpid()
        assert not file.exists()
        config.run_folder.rmdir()
        config.run_folder.parent.rmdir()


@pytest.mark.parametrize("changed", [{"host": "other"}, {"pids": "pid:[1]"}])
def test_a_lock_that_may_be_held_elsewhere_is_refused_with_how_to_remove_it(
    changed: dict[str, str], config: Config, ended: int
):
    file = left(config, pid=ended, **changed)
    remedy = rf"process {ended} on .* since .*remove {file} if no process does"
    with pytest.raises(ConfigError, match=remedy), run_lock(config, Ranks()):
        pass
    assert file.exists()


@pytest.mark.parametrize(
    "damaged", ["{", "[]", "3", "{}", {"pid": "7"}, {"pid": 2**70}, {"restarts": None}]
)
def test_a_lock_that_cannot_be_read_is_refused(damaged: str | dict[str, Any], config: Config):
    if isinstance(damaged, str):
        left(config).write_text(damaged)
    else:
        left(config, **damaged)
    with pytest.raises(ConfigError, match="its file cannot be read"), run_lock(config, Ranks()):
        pass
