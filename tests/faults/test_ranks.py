"""A rank that is killed ends the run on all ranks, soon and in a sentence; the run resumes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flap_fast.config.file import dump_config
from flap_fast.training.loop import train
from tests.faults.cases import assert_sentence
from tests.faults.works import Inputs, ended, run_config, start
from tests.training.test_launcher import MODULE, PORT, finish, program
from tests.training.test_launcher import start as launch

STEPS = 30
OVERRIDES = (f"train.steps={STEPS}", "ckpt.every_steps=5", "data.val=[]")
# From the kill to the end of the last process.
SOON_S = 60


def losses(out: Path) -> dict[int, float]:
    file = out / "flap/metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = (json.loads(line) for line in lines if line.endswith("}"))
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def wait_for_steps(out: Path, steps: int, running: Callable[[], bool]) -> None:
    until = time.monotonic() + SOON_S
    while len(losses(out)) < steps:
        assert running(), "ended before it was killed"
        assert time.monotonic() < until, "no step in time"
        time.sleep(0.02)


def assert_resumes(inputs: Inputs, out: Path) -> None:
    """Go on in one process; the losses are those of a run that nothing disturbed."""
    train(run_config(inputs, out, *OVERRIDES), resume=True)
    alone = out.parent / "alone"
    train(run_config(inputs, alone, *OVERRIDES))
    assert losses(out) == pytest.approx(losses(alone), abs=1e-4)


def on_rank(rank: int, port: str, inputs: Inputs, out: Path) -> None:
    """Train as one of two ranks, as under a launcher."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DS_ACCELERATOR="cpu")
    train(run_config(inputs, out, *OVERRIDES))


def test_a_killed_rank_ends_the_other_in_a_sentence_and_the_run_resumes(
    inputs: Inputs, tmp_path: Path
):
    out = tmp_path / "out"
    ranks: list[Any] = [start(on_rank, out, rank, PORT, inputs, out) for rank in range(2)]
    wait_for_steps(out, 7, lambda: all(rank.exitcode is None for rank in ranks))
    os.kill(ranks[1].pid, signal.SIGKILL)
    other = ended(ranks[0], SOON_S)
    assert other.code == 3
    assert other.error in ("RanksError", "SaidElsewhere"), other
    assert_sentence(Exception(other.message), "a rank ended without an error of its own")
    assert_resumes(inputs, out)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("killed", [0, 1])
def test_under_a_launcher_a_killed_rank_ends_the_run_and_it_resumes(
    launcher: str, killed: int, inputs: Inputs, tmp_path: Path
):
    pytest.importorskip("deepspeed")
    out, config = tmp_path / "out", tmp_path / "config.yaml"
    config.write_text(dump_config(run_config(inputs, out, *OVERRIDES)))
    options = {
        "deepspeed": ("--num_accelerators", "2", "--master_port", PORT, *MODULE),
        "torchrun": ("--nproc_per_node", "2", "--master_port", PORT, "-m", "flap_fast"),
    }
    process = launch((program(launcher), *options[launcher]), config)
    try:
        wait_for_steps(out, 7, lambda: process.poll() is None)
        rank = next(
            p for p in psutil.Process(process.pid).children(recursive=True) if is_rank(p, killed)
        )
        rank.kill()
        began = time.monotonic()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    printed = finish(process)
    assert time.monotonic() - began < SOON_S, printed
    assert process.returncode != 0
    # torchrun has a traceback of its own, with its own files only.
    frames = [line for line in printed.splitlines() if "/flap_fast/" in line and 'File "' in line]
    assert not frames, printed
    assert_resumes(inputs, out)


def is_rank(process: psutil.Process, rank: int) -> bool:
    """Whether a process is a rank, and no helper that it has started."""
    environment = process.environ()
    mine = environment.get("RANK") == str(rank) and "LOCAL_RANK" in environment
    return mine and any("flap_fast" in word for word in process.cmdline())
