"""Checkpoints of a run: which count, what they go on with, what a broken one says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.shards import open_shards
from flap_fast.model.model_folder import model_folder
from flap_fast.report.run import read_run
from flap_fast.tensors import save_tensors
from flap_fast.tools.embedder import load
from flap_fast.training.checkpoint import latest
from flap_fast.training.loop import train
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
        ("state.json", b'{"step": true, "best": null}'),
        ("state.json", b'{"step": "4", "best": null}'),
        ("state.json", b'{"step": 4.5, "best": null}'),
        ("state.json", b'{"step": -4, "best": null}'),
        ("state.json", b'{"step": 2, "best": null}'),
        ("state.json", b'{"step": 4, "best": NaN}'),
        ("state.json", b'{"step": 4, "best": true}'),
        ("state.json", b'{"step": 4, "best": null, "scored": 1}'),
        ("state.json", b'{"step": 4, "best": null, "clips": true}'),
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


FILES = ("config.yaml", "model.safetensors", "optimizer.safetensors", "text/config.json")


@pytest.mark.parametrize("name", [*FILES, "text/tokenizer_config.json"])
def test_a_file_that_changed_or_is_missing_stops_what_reads_it(
    name: str, prepared: Path, runs: Path
):
    last = runs / "flap/checkpoints/step-000004"
    file, message = last / name, f"{name} must be the file that SHA256SUMS lists, got "
    data = file.read_bytes()
    # The last byte: a weight's, or white space.
    for changed, got in ((data[:-1] + bytes([data[-1] ^ 1]), "another SHA-256"), (None, "no such")):
        file.unlink() if changed is None else file.write_bytes(changed)
        with pytest.raises(ConfigError) as caught:
            train(settings(prepared, runs), resume=True)
        if "cannot be read" not in str(caught.value):  # or its own reader saw it first
            assert message + got in str(caught.value)
            assert f"remove {last} to resume from step-000002" in str(caught.value)
        if not name.startswith("optimizer"):
            with pytest.raises(ConfigError):
                load(last)
    file.write_bytes(data)
    load(last)


def test_the_optimizer_is_not_read_to_embed_and_may_be_deleted(runs: Path):
    last = runs / "flap/checkpoints/step-000004"
    (last / "optimizer.safetensors").write_bytes(b"")
    load(last)
    (last / "optimizer.safetensors").unlink()
    load(runs / "flap")


@pytest.mark.parametrize("damage", ["bit", "swap"])
def test_weights_that_only_the_sums_tell_apart_are_refused(damage: str, prepared, runs: Path):
    file = runs / "flap/checkpoints/step-000004/model.safetensors"
    tensors = load_file(file)
    same = [n for n, v in tensors.items() if v.shape == tensors["audio.blocks.0.norm1.bias"].shape]
    a, b = same[:2]
    if damage == "bit":
        tensors[a].view(torch.int32)[0] ^= 1 << 20
    else:
        tensors[a], tensors[b] = tensors[b], tensors[a]
    save_tensors(file, tensors)
    with pytest.raises(ConfigError, match="another SHA-256"):
        load(runs / "flap")
    with pytest.raises(ConfigError, match="another SHA-256"):
        train(settings(prepared, runs), resume=True)
    with pytest.raises(ConfigError, match="another SHA-256"):
        train(settings(prepared, runs, "run.name=b", f"train.init_from={file.parent}"))
    load(runs / "flap", verify=False)
    train(settings(prepared, runs, "ckpt.verify=false"), resume=True)


@pytest.mark.parametrize("damage", ["nan", "inf", "int"])
def test_weights_no_model_has_are_refused_without_sums_too(damage: str, prepared, runs: Path):
    folder = runs / "flap/checkpoints/step-000004"
    file = folder / "model.safetensors"
    (folder / "SHA256SUMS").unlink()
    load(folder)
    (folder / "text/tokenizer_config.json").rename(runs / "kept")
    with pytest.raises(ConfigError, match=r"text must hold tokenizer_config\.json, got 'none'"):
        load(folder)
    (runs / "kept").rename(folder / "text/tokenizer_config.json")
    tensors = load_file(file)
    name = "audio.blocks.0.norm1.bias"
    if damage == "int":
        tensors[name] = tensors[name].view(torch.int32)
    else:
        tensors[name][-1] = float(damage)
    save_tensors(file, tensors)
    got = "as int32, which must be float32" if damage == "int" else "with values that are not fini"
    for read in (
        lambda: load(folder),
        lambda: train(settings(prepared, runs), resume=True),
        lambda: train(settings(prepared, runs, "run.name=b", f"train.init_from={folder}")),
    ):
        with pytest.raises(ConfigError, match=f"{file} must hold .*{name} {got}"):
            read()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg", float("inf"), "exp_avg with values that are not finite"),
        ("exp_avg_sq", float("nan"), "exp_avg_sq with values that are not finite"),
        ("exp_avg_sq", -1.0, "exp_avg_sq with a value below 0"),
        ("exp_avg", "int", "exp_avg as torch.int32"),
        ("exp_avg", "absent", "without exp_avg"),
        ("exp_avg", "nothing", "got nothing"),
        ("exp_avg", 1e300, "exp_avg with values that are not finite"),
        ("step", float("inf"), "step that is not finite"),
        ("step", -1.0, "step below 1"),
    ],
)
def test_a_state_that_adam_never_has_is_refused_without_sums_too(
    key: str, value: str | float, message: str, prepared: Path, runs: Path
):
    folder = runs / "flap/checkpoints/step-000004"
    file = folder / "optimizer.safetensors"
    (folder / "SHA256SUMS").unlink()
    tensors = load_file(file)
    name = f"audio.blocks.0.norm1.bias/{key}"
    if value == "int":
        tensors[name] = tensors[name].view(torch.int32)
    elif value == "absent":
        del tensors[name]
    elif value == "nothing":
        tensors.clear()
    else:
        wide = tensors[name].double()
        wide.view(-1)[-1] = float(value)
        tensors[name] = wide
    save_tensors(file, tensors)
    with pytest.raises(
        ConfigError, match=f"must hold the optimizer's state, .*{message}; copy it again"
    ):
        train(settings(prepared, runs), resume=True)


def test_what_others_put_into_an_old_checkpoint_stays(prepared: Path, runs: Path):
    checkpoints = runs / "flap/checkpoints"
    shutil.rmtree(checkpoints / "step-000004")
    (checkpoints / "step-000002/README.md").write_text("mine")
    (checkpoints / "step-000001").mkdir()  # whoever wrote it, no run of today did
    (checkpoints / "step-000001/state.json").write_text("{}")
    train(settings(prepared, runs, "ckpt.keep_last=1"), resume=True)
    assert [file.name for file in (checkpoints / "step-000002").iterdir()] == ["README.md"]
    assert (checkpoints / "step-000001/state.json").is_file()
