"""The commands that users type: one process, and ranks under the real deepspeed launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from flap_fast.__main__ import main
from flap_fast.config.file import dump_config, load_config
from flap_fast.training.loop import train
from tests.ranks import on_ranks
from tests.tiny import tiny

STEPS = 40
ROOT = Path(__file__).parents[2]
ALONE = (sys.executable, "-m", "flap_fast")
# A port of its own for each test process: the default one may be taken.
PORT = str(20_000 + os.getpid() % 20_000)
MODULE = ("--module", "flap_fast")


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def hosts(folder: Path, node: int) -> tuple[str, ...]:
    """DeepSpeed's launcher on one of two nodes of a hostfile, reached without ssh."""
    file = folder / "hosts"
    file.write_text("node1 slots=1\nnode2 slots=1\n")
    node_and_host = ("--no_ssh", "--node_rank", str(node), "--master_addr", "127.0.0.1")
    file_and_port = ("--hostfile", str(file), "--master_port", PORT)
    return (program("deepspeed"), *file_and_port, *node_and_host, *MODULE)


def torchrun(*_: object) -> tuple[str, ...]:
    """torchrun on any of two nodes, as under Slurm."""
    nodes = ("--nnodes", "2", "--nproc_per_node", "1")
    meeting = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{PORT}")
    return (program("torchrun"), *nodes, *meeting, "-m", "flap_fast")


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Path:
    settings = tiny(
        f"run.folder={tmp_path}/runs",
        f"data.train={prepared}/train",
        f"data.val={prepared}/val",
        *(f"train.steps={STEPS}", "log.every_steps=1", "ckpt.every_steps=0"),
        *("log.tensorboard=false", "sched.warmup_steps=4"),
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(settings))
    return file


def start(
    command: tuple[str, ...], *arguments: str | Path, folder: Path | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, "train", *map(str, arguments)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """A process's output; all of its processes have ended after."""
    try:
        printed, _ = process.communicate(timeout=200)
        return printed
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def rows(config: Path, run: str) -> list[dict[str, Any]]:
    file = config.parent / "runs" / run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def interrupt(process: subprocess.Popen[str], config: Path, run: str) -> str:
    """Press Ctrl-C after three more steps: all processes of a terminal's job get it."""
    done = len(rows(config, run))
    while process.poll() is None and len(rows(config, run)) < done + 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    return finish(process)


def losses(config: Path, run: str) -> list[float]:
    found = rows(config, run)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    return [row["loss"] for row in found]


def test_ctrl_c_saves_says_how_to_go_on_and_the_run_goes_on(config: Path):
    process = start(ALONE, config)
    printed = interrupt(process, config, "flap")
    assert process.returncode == 130, printed
    done = len(rows(config, "flap"))
    assert 3 <= done < STEPS
    assert f"stopped after step {done}, saved in" in printed
    assert "Continue with the same command and --resume" in printed
    assert "Traceback" not in printed
    train(load_config(config), resume=True)
    assert len(losses(config, "flap")) == STEPS


@pytest.mark.parametrize(
    "on_two_nodes",
    [
        pytest.param((), id="deepspeed"),
        pytest.param(((torchrun, 2),), id="torchrun", marks=pytest.mark.slow),
        pytest.param(((hosts, 1), (torchrun, 2)), id="hostfile-torchrun", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_under_other_launchers_with_the_losses_of_one_process(
    on_two_nodes: tuple[tuple[Any, int], ...], config: Path, tmp_path: Path
):
    """`deepspeed` on one machine; then on two "nodes" each (launcher, ZeRO stage); one process."""
    pytest.importorskip("deepspeed")
    train(load_config(config, ["run.name=alone"]))

    one = (program("deepspeed"), "--num_accelerators", "2", "--master_port", PORT, *MODULE)
    process = start(one, config, "train.zero_stage=3")
    printed = interrupt(process, config, "flap")
    assert process.returncode != 0, printed
    assert "Continue with the same command and --resume" in printed
    assert 3 <= len(rows(config, "flap")) < STEPS

    for launcher, stage in on_two_nodes:
        nodes = [
            start(launcher(tmp_path, node), config, f"train.zero_stage={stage}", "--resume")
            for node in (0, 1)
        ]
        # On one node: the other must stop too.
        printed = interrupt(nodes[1], config, "flap") + finish(nodes[0])
        assert "stopped after step" in printed, printed
        assert len(rows(config, "flap")) < STEPS

    scores = train(load_config(config), resume=True)
    assert losses(config, "flap") == pytest.approx(losses(config, "alone"), abs=1e-4)
    assert scores is not None
    assert scores["retrieval"]["val"]["clips"] == 6


def refused(*arguments: str) -> tuple[object, str]:
    """The exit status and what is printed where a rank calls `flap`."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as printed:
        patch.setattr(sys, "argv", ["flap", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code, printed.getvalue()


def test_a_batch_that_ranks_cannot_share_is_refused_once_and_without_a_traceback(config: Path):
    command = ("--local_rank=1", "train", str(config), "train.global_batch=7")
    message = "error: train.global_batch must be a multiple of the 2 ranks, got 7; for example 6"
    assert on_ranks(2, refused, *command) == [(2, f"[rank 0] {message}\n"), (2, "")]


def test_a_config_that_one_rank_lacks_is_named_once(config: Path):
    command = ("train", str(config.with_name("absent.yaml")))
    (code, printed), other = on_ranks(2, refused, *command)
    assert (code, other) == (2, (2, ""))
    assert printed.count("\n") == 1
    assert "error: the config must be an existing YAML file, got" in printed
