"""Checkpoints of a run: which count, what they go on with, what a broken one says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.shards import open_shards
from flap_fast.model.model_folder import model_folder
from flap_fast.report.run import read_run
from flap_fast.train.checkpoint import latest
from flap_fast.train.loop import train
from tests.tiny import tiny


def settings(data: Path, runs: Path, *overrides: str) -> Config:
    return tiny(
        *(f"run.folder={runs}", f"data.train={data}/train", "log.tensorboard=false"),
        *("audio.depth=1", "text.depth=1", "ckpt.every_steps=2", "sched.warmup_steps=2"),
        *overrides,
    )


@pytest.fixture(scope="module")
def source(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four steps: checkpoints 2 and 4."""
    runs = tmp_path_factory.mktemp("runs")
    train(settings(prepared, runs))
    return runs


@pytest.fixture
def runs(source: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(source, tmp_path / "runs", symlinks=True)


def test_other_data_under_the_same_name_is_refused(prepared: Path, tmp_path: Path):
    data, runs = shutil.copytree(prepared, tmp_path / "data"), tmp_path / "runs"
    train(settings(data, runs))
    (data / "train/sizes.json").unlink()  # which would name them
    (data / ".prepare").rename(tmp_path / "prepare")
    first = data / "train/0.tar"
    first.rename(data / "train/9.tar")
    first.with_suffix(".idx").rename(data / "train/9.idx")
    message = r"data\.train must hold the 24 clips that the run started with, got '24 others';"
    with pytest.raises(ConfigError, match=message):
        train(settings(data, runs), resume=True)
    (data / "train/9.tar").unlink()
    left = len(open_shards([data / "train"]))
    with pytest.raises(ConfigError, match=rf"got {left}; put them back, or set run\.name=ANOTHER"):
        train(settings(data, runs), resume=True)


def test_a_state_that_does_not_know_its_data_is_gone_on_from(prepared: Path, runs: Path):
    for state in runs.glob("flap/checkpoints/*/state.json"):
        state.write_text('{"step": 4, "best": null, "scored": true}')
    train(settings(prepared, runs), resume=True)


def test_checkpoints_without_the_config_that_began_them_are_left_alone(prepared: Path, runs: Path):
    (runs / "flap/config.yaml").unlink()
    message = r"must hold the config\.yaml of its checkpoints, got 'none'; copy the one in .*000004"
    for resume in (False, True):
        with pytest.raises(ConfigError, match=message):
            train(settings(prepared, runs, "run.seed=1"), resume=resume)


def test_an_incomplete_checkpoint_is_written_anew(prepared: Path, runs: Path, source: Path):
    last = runs / "flap/checkpoints/step-000004"
    (last / "state.json").unlink()
    (last / "model.safetensors").write_bytes(b"half")
    train(settings(prepared, runs), resume=True)
    for file in ("model.safetensors", "state.json"):
        assert (last / file).read_bytes() == (source / last.relative_to(runs) / file).read_bytes()


def test_a_checkpoint_lies_on_the_disk_before_an_older_one_is_deleted(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, synced, kept = os.fsync, [], []

    def fsync(descriptor: int) -> None:
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(file.relative_to(checkpoints) if checkpoints in file.parents else file)
        kept.append({folder.name for folder in checkpoints.glob("step-*")})
        real(descriptor)

    checkpoints = tmp_path / "flap/checkpoints"
    monkeypatch.setattr(os, "fsync", fsync)
    train(settings(prepared, tmp_path, "ckpt.keep_last=1"))
    written = sorted((checkpoints / "step-000004").rglob("*"))
    part = Path("step-000004.part")
    wanted = [part, *(part / file.relative_to(checkpoints / "step-000004") for file in written)]
    assert set(wanted) <= set(synced)
    last = len(synced) - 1 - synced[::-1].index(checkpoints)
    assert last > max(map(synced.index, wanted))
    assert kept[last] == {"step-000002", "step-000004"}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("state.json", b""),
        ("state.json", b'{"step": 4'),
        ("state.json", b'{"steps": 4}'),
        ("optimizer.safetensors", b"cut"),
        ("model.safetensors", b""),
    ],
)
def test_a_broken_checkpoint_says_what_to_go_on_from(
    name: str, kept: bytes, prepared: Path, runs: Path
):
    checkpoints = runs / "flap/checkpoints"
    (checkpoints / "step-000004" / name).write_bytes(kept)
    message = rf"{name} cannot be read: .*; remove \S*step-000004 to resume from step-000002$"
    with pytest.raises(ConfigError, match=message):
        train(settings(prepared, runs), resume=True)
    shutil.rmtree(checkpoints / "step-000002")
    with pytest.raises(ConfigError, match=r"remove \S*step-000004 to start over$"):
        train(settings(prepared, runs), resume=True)


def test_weights_may_be_read_by_whom_the_umask_lets(prepared: Path, tmp_path: Path):
    before = os.umask(0o027)
    try:
        train(settings(prepared, tmp_path, "train.steps=1"))
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*.*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_a_copied_or_renamed_checkpoint_is_none_of_the_run(prepared: Path, runs: Path):
    checkpoints = runs / "flap/checkpoints"
    last = checkpoints / "step-000004"
    for name in ("step-000004.bak", "step-000006.part", "step-copy"):
        shutil.copytree(last, checkpoints / name)
    assert model_folder(runs / "flap") == latest(checkpoints) == last
    train(settings(prepared, runs), resume=True)
    assert list(read_run(runs / "flap").checkpoints) == [2, 4]
    assert len(list(checkpoints.iterdir())) == 5  # nor is a copy deleted


def test_what_lies_in_the_place_of_a_checkpoint_is_not_removed(prepared: Path, runs: Path):
    checkpoints, elsewhere = runs / "flap/checkpoints", runs / "elsewhere"
    elsewhere.mkdir()
    for name in ("state.json", "thesis.txt"):
        (elsewhere / name).write_text("{}")
    shutil.rmtree(checkpoints / "step-000004")
    for name in ("step-000001", "step-000004.part"):
        (checkpoints / name).symlink_to(elsewhere)
    for name in ("step-000004", "best"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "thesis.txt").write_text("{}")
    val = f"data.val={prepared}/val"
    train(settings(prepared, runs, val, "ckpt.keep_last=1"), resume=True)
    assert sorted(file.name for file in elsewhere.iterdir()) == ["state.json", "thesis.txt"]
    assert (checkpoints / "step-000001").is_symlink()
    for name in ("step-000004.old", "best.old"):
        assert (checkpoints / name / "thesis.txt").is_file()
    assert (checkpoints / "best").resolve() == latest(checkpoints) == checkpoints / "step-000004"
    assert not (checkpoints / "step-000002").exists()
