"""Under the real launchers, what differs between ranks and an error of one of them is said once."""

from __future__ import annotations

import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from flap_fast.config.file import dump_config
from tests.tiny import tiny
from tests.training.test_launcher import finish, hosts, rows, start, torchrun

# From the start of the launchers to their end; half of it where nothing else runs.
SOON_S = 60
BOTH = "must be the same on all ranks, got"


@pytest.fixture
def nodes(prepared: Path, tmp_path: Path) -> list[Path]:
    """Two nodes' folders, each with a copy of the data and a config of relative paths."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        shutil.copytree(prepared / "train", folder / "data")
        (folder / "config.yaml").write_text(dump_config(settings()))
    return folders


def settings(*overrides: str) -> Any:
    return tiny(
        *("data.train=data", "log.every_steps=1", "log.tensorboard=false", "train.zero_stage=1"),
        *overrides,
    )


def ended(launcher: Callable[..., Any], nodes: list[Path], *arguments: str) -> str:
    """What both nodes print; the second one's command has the arguments."""
    pytest.importorskip("deepspeed")
    began, processes = time.monotonic(), list[Popen[str]]()
    for node, folder in enumerate(nodes):
        more = arguments if node else ("--resume",) * ("--resume" in arguments)
        command = launcher(folder, node)
        processes.append(start(command, "config.yaml", *more, folder=folder))
    printed = "".join(finish(process) for process in processes)
    assert all(process.returncode for process in processes), printed
    assert time.monotonic() - began < SOON_S, printed
    # torchrun has a traceback of its own, with its own files only.
    assert not [x for x in printed.splitlines() if "/flap_fast/" in x and 'File "' in x], printed
    return printed


def errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "error: " in line]


def lose_a_shard(nodes: list[Path]) -> None:
    (nodes[1] / "data/3.tar").unlink()
    (nodes[1] / "data/sizes.json").unlink()  # it would tell


def lose_the_run(nodes: list[Path]) -> None:
    run = nodes[0] / "runs/flap"
    (run / "checkpoints/step-000002").mkdir(parents=True)
    (run / "checkpoints/step-000002/state.json").write_text("{}")
    (run / "config.yaml").write_text(dump_config(settings()))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [hosts, torchrun])
@pytest.mark.parametrize(
    ("lose", "what", "arguments"),
    [
        (
            lambda _: None,
            f"run.seed, optim.lr, train.steps {BOTH} 7, 0.5, 5 on rank 1 (",
            ("optim.lr=0.5", "run.seed=7", "train.steps=5"),
        ),
        (lose_a_shard, "bytes in data.train of 3.tar, the index of data.train", ()),
        (lose_the_run, "the checkpoint to resume from", ("--resume",)),
    ],
    ids=["settings", "shard", "run"],
)
def test_what_differs_on_one_rank_is_named_once(
    lose: Callable[[list[Path]], None],
    what: str,
    arguments: tuple[str, ...],
    launcher: Callable[..., Any],
    nodes: list[Path],
):
    lose(nodes)
    (said,) = errors(ended(launcher, nodes, *arguments))
    assert what in said
    assert BOTH in said
    assert "on rank 1 (" in said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [hosts, torchrun])
def test_an_error_of_one_rank_in_mid_run_is_said_once_and_ends_all(
    launcher: Callable[..., Any], nodes: list[Path]
):
    for folder in nodes:
        damage(folder / "data/1.tar")
        stops = dump_config(settings("data.on_bad_clip=stop", "ckpt.every_steps=1"))
        (folder / "config.yaml").write_text(stops)
    (said,) = errors(ended(launcher, nodes))
    assert "1.tar at byte" in said
    assert "cannot be used" in said
    assert len(rows(nodes[0] / "config.yaml", "flap")) == 2


def damage(tar: Path) -> None:
    """Overwrite the sound of the first clip with zeros; it is drawn in the third step."""
    with tarfile.open(tar) as members:
        sound = next(iter(members))
    with tar.open("r+b") as data:
        data.seek(sound.offset_data)
        data.write(bytes(sound.size))
