"""Ranks compare what each read for itself before they compute anything together."""

from __future__ import annotations

import os
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flap_fast.config import Config
from flap_fast.config.file import dump_config
from flap_fast.ranks import Ranks
from flap_fast.ranks.agreement import RanksError, agree
from flap_fast.training import setup
from flap_fast.training.loop import train
from tests.ranks import on_ranks
from tests.tiny import tiny


def here() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), launched=True)


def settings(data: Path, runs: Path, *overrides: str) -> Config:
    return tiny(
        *(f"data.train={data}/train", f"run.folder={runs}", "train.zero_stage=0"),
        *("audio.depth=1", "text.depth=1", "log.tensorboard=false", *overrides),
    )


def verdicts(*checks: tuple[Any, ...]) -> list[str]:
    """What ranks say of several checks, each given as (facts or an error) per rank."""
    found = []
    for check in checks:

        def own(check: tuple[Any, ...] = check) -> tuple[str, dict[str, Any]]:
            mine = check[dist.get_rank()]
            if isinstance(mine, Exception):
                raise mine
            return "agreed", mine

        try:
            found.append(agree(here(), own))
        except RanksError as error:
            found.append(f"{error.code} {error}".replace(socket.gethostname(), "HOST"))
    return found


SAME = {"": {"optim": {"lr": 0.1}}, "bytes of": {"0.tar": 5}}
WRONG = ValueError("a must be 1, got 2")
BOTH = "must be the same on all ranks, got"
REMEDY = "; give all ranks the same command, code and files"
CASES = (
    (SAME, SAME, "agreed"),
    (
        SAME,
        SAME | {"": {"optim": {"lr": 0.2}}},
        f"2 optim.lr {BOTH} 0.2 on rank 1 (HOST) and 0.1 on rank 0 (HOST){REMEDY}",
    ),
    (
        SAME,
        SAME | {"bytes of": {"0.tar": 5, "1.tar": 6}},
        f"2 bytes of 1.tar {BOTH} 6 on rank 1 (HOST) and none on rank 0 (HOST){REMEDY}",
    ),
    (
        {"": {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}},
        {"": dict.fromkeys("abcde", 0)},
        f"2 a, b, c and 2 more {BOTH} 0, 0, 0 on rank 1 (HOST) and 1, 2, 3 on rank 0 (HOST)"
        + REMEDY,
    ),
    (SAME, WRONG, "2 a must be 1, got 2 (on rank 1, HOST)"),
    (WRONG, SAME, "2 a must be 1, got 2 (on rank 0, HOST)"),
    (WRONG, WRONG, "2 a must be 1, got 2"),
    (OSError("the disk is full"), SAME, "1 the disk is full (on rank 0, HOST)"),
)


def test_ranks_that_agree_go_on_and_what_differs_is_named_alike_on_all_of_them():
    for said in on_ranks(2, verdicts, *(case[:2] for case in CASES)):
        assert said == [case[2] for case in CASES]


def test_of_several_ranks_that_differ_the_first_is_named():
    (said,), *others = on_ranks(3, verdicts, ({"x": 1}, {"x": 2}, {"x": 3}))
    assert "got 2 on rank 1 (HOST) and 1 on rank 0 (HOST); 1 more ranks differ from it" in said
    assert others == [[said], [said]]


def starting(data: Path, out: Path) -> list[str]:
    """What a run says on each rank as ranks differ in one thing after the other."""
    rank = dist.get_rank()
    found = []

    def said(*overrides: str, folder: Path = data, resume: bool = False) -> None:
        with pytest.raises(RanksError) as raised:
            train(settings(folder, out / "runs", *overrides), resume=resume)
        found.append(str(raised.value).replace(socket.gethostname(), "HOST"))

    for name, values in SETTINGS.items():
        said(f"{name}={values[rank]}")
    os.chdir(shutil.copytree(data, out / f"node-{rank}"))
    shutil.rmtree(".prepare")
    if rank:  # its last shard is missing, and sizes.json does not tell
        Path("train/3.tar").unlink()
        Path("train/sizes.json").unlink()
    said(folder=Path())
    os.chdir(shutil.copytree(data, out / f"other-{rank}"))
    if rank:  # another shard under the same name
        shutil.copy("train/1.tar", "train/0.tar")
        shutil.copy("train/1.idx", "train/0.idx")
        Path("train/SHA256SUMS").unlink()  # which would name it first
    said(folder=Path())
    with pytest.MonkeyPatch.context() as patch:
        real = setup.put_first_weights
        patch.setattr(setup, "put_first_weights", partial(other_weights, real))
        said()
    if not rank:  # the other rank does not see the run's folder
        checkpoint = out / "node-0/here/flap/checkpoints/step-000005"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
        dumped = dump_config(settings(Path(), Path("here")))
        (out / "node-0/here/flap/config.yaml").write_text(dumped)
    os.chdir(out / f"node-{rank}")
    said("run.folder=here", folder=Path(), resume=True)
    assert not (out / "runs").exists()
    return found


def other_weights(real, model, config: Config) -> None:
    real(model, config)
    if dist.get_rank():
        with torch.no_grad():
            model.audio_head[0].bias[3] += 1


SETTINGS = {
    "optim.lr": (0.001, 0.01),
    "run.seed": (3407, 1),
    "train.steps": (4, 5),
    "frontend.threads": (1, 2),
}


def test_a_run_begins_only_where_all_ranks_read_the_same(prepared: Path, tmp_path: Path):
    said, again = on_ranks(2, starting, prepared, tmp_path)
    assert said == again
    for (name, (first, second)), sentence in zip(SETTINGS.items(), said, strict=False):
        assert sentence.startswith(f"{name} {BOTH} {second} on rank 1 (HOST) and {first} on rank 0")
    shard, other, weights, start = said[len(SETTINGS) :]
    assert shard.startswith(f"bytes in data.train of 3.tar, the index of data.train {BOTH} none, ")
    assert other.startswith(f"bytes in data.train of 0.tar, the index of data.train {BOTH} ")
    assert weights.startswith(f"the first weights audio_head.0.bias {BOTH} ")
    assert start.startswith(f"the checkpoint to resume from, bytes in it of state.json {BOTH} None")
