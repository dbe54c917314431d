"""Damaged files of a run, file systems without links, full disks: a sentence, with its remedy."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import dump_config
from flap_fast.files import is_full
from flap_fast.ranks import Ranks
from flap_fast.training import checkpoint
from flap_fast.training.checkpoint import Checkpoints
from flap_fast.training.run_folder import begin, cut_after
from tests.tiny import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run whose folder holds its config and a checkpoint's name."""
    config = tiny(f"run.folder={tmp_path}/runs")
    step = config.run_folder / "checkpoints/step-000004"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    for folder in (config.run_folder, step):
        (folder / "config.yaml").write_text(dump_config(config))
    return config


def checkpoints(config: Config, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    monkeypatch.setattr(checkpoint, "_hash", lambda data: "hash")
    monkeypatch.setattr(checkpoint, "_versions", lambda data: None)
    return Checkpoints(config, Ranks(), ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", [b"", b" \n", b"a: [1", b"\xff\xfe", b"optim: {lr: -1}", b"[1]", b"x: 1"]
)
def test_a_damaged_config_is_named_with_the_one_to_put_back(text: bytes, config: Config):
    file = config.run_folder / "config.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as raised:
        begin(config, resume=True)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"{file} must be the config that the run started with, got: ")
    assert sentence.endswith(f"copy {file.parent}/checkpoints/step-000004/config.yaml over it")


@pytest.mark.parametrize(
    "row", ["[1]", "{}", '{"step": "x"}', '{"step": true}', "null", "\xff", "{"]
)
def test_a_damaged_row_is_named_unless_it_is_the_last_half_written_one(row: str, tmp_path: Path):
    file, good = tmp_path / "metrics.jsonl", '{"step": 1}'
    file.write_bytes(f"{good}\n{row}\n{good}\n".encode("latin-1"))
    before = file.read_bytes()
    with pytest.raises(
        ConfigError, match=r"metrics\.jsonl:2 must be a JSON object .*take out the l"
    ):
        cut_after(file, 4)
    assert file.read_bytes() == before
    file.write_bytes(f"{good}\n{row}".encode("latin-1"))
    cut_after(file, 4)
    assert file.read_text() == f"{good}\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "\xff",
        "{}",
        *(f'{{"step": {step}, "best": null}}' for step in ('"4"', "3", "true")),
        '{"step": 4, "best": "high"}',
        '{"step": 4, "best": null, "scored": "no"}',
    ],
)
def test_a_damaged_state_is_named(text: str, config: Config, monkeypatch: pytest.MonkeyPatch):
    folder = config.run_folder / "checkpoints/step-000004"
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as raised:
        checkpoints(config, monkeypatch).state(folder)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"{folder}/state.json cannot be read: ")
    assert sentence.endswith(f"remove {folder} to start over")


def test_who_trains_on_is_told_how(config: Config):
    longer = tiny(f"run.folder={config.run.folder}", "train.steps=9")
    with pytest.raises(
        ConfigError, match=rf"4 -> 9\n.* with train\.init_from={config.run_folder},"
    ):
        begin(longer, resume=True)
    other = tiny(f"run.folder={config.run.folder}", "train.steps=9", "optim.lr=1")
    with pytest.raises(ConfigError, match=r"run\.name=ANOTHER$"):
        begin(other, resume=True)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.ENOTSUP])
def test_without_symlinks_the_best_checkpoint_is_a_copy_that_a_link_replaces(
    number: int, config: Config, monkeypatch: pytest.MonkeyPatch
):
    ours = checkpoints(config, monkeypatch)
    step = ours.folder / "step-000004"
    (step / "model.safetensors").write_text("best")
    (step / "optimizer.safetensors").write_text("large")

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for symlink in (refused, refused, os.symlink, refused):
        with monkeypatch.context() as patch:
            patch.setattr(os, "symlink", symlink)
            ours._point_to(step)
        best = ours.folder / "best"
        assert (best / "model.safetensors").read_text() == "best"
        assert best.is_symlink() == (symlink is not refused)
    assert {file.name for file in best.iterdir()} == {
        *("config.yaml", "model.safetensors", "SHA256SUMS")
    }
    shutil.rmtree(step)
    assert (best / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError("x cannot be written: I/O error: No space left on device (os error 28)"), True),
        (OSError("x cannot be written: I/O error: Permission denied (os error 13)"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (OSError(errno.EIO, "Input/output error"), False),
    ],
)
def test_room_is_asked_for_only_where_it_lacks(
    error: OSError, full: bool, config: Config, monkeypatch: pytest.MonkeyPatch
):
    assert is_full(error) == full
    ours = checkpoints(config, monkeypatch)

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(Checkpoints, "_write", fails)
    with pytest.raises(OSError, match="run the same command with --resume") as raised:
        ours.save(None, 5, None)  # type: ignore[arg-type]
    assert ("make room" in str(raised.value)) == full
    assert json.loads((ours.folder / "step-000004/state.json").read_text()) == {}
