"""Sounds without captions: reconstruction trains on them, and the tower begins another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.shards import ShardError
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.shard_tasks import Prepared
from flap_fast.preparation.sources import SOURCES
from flap_fast.report.page import report
from flap_fast.tools.doctor.examine import examine, findings
from flap_fast.tools.embedder import load
from flap_fast.training.loop import train
from tests.sounds import encode, noise, write_manifest
from tests.tiny import tiny

RATE = 16_000
NAMES = [f"{n:02}.wav" for n in range(12)]
DECODER = ("loss.recon.weight=1", "decoder.width=16", "decoder.depth=1", "decoder.heads=2")
ALONE = ("loss.contrastive.weight=0", *DECODER)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 12 sounds twice: `bare` without captions, `told` with them."""
    folder = tmp_path_factory.mktemp("captionless")
    sounds = folder / "sounds"
    sounds.mkdir()
    for n, name in enumerate(NAMES):
        (sounds / name).write_bytes(encode(noise(n, 1.2, RATE), RATE, "WAV"))
    rows = [{"audio": name, "id": name, "caption": f"noise number {name}"} for name in NAMES]
    prepare(SOURCES["sounds"].read(sounds), folder / "bare", show=False)
    prepare(write_manifest(sounds / "told.jsonl", rows), folder / "told", show=False)
    return folder


def settings(data: Path, name: str, *overrides: str) -> Config:
    return tiny(
        *(f"run.folder={data / 'runs'}", f"run.name={name}", f"data.train={data / name}/train"),
        *("log.every_steps=1", "log.tensorboard=false", "train.steps=3", "text.dropout=0.1"),
        *overrides,
    )


def losses(config: Config) -> list[float]:
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["recon"] for line in lines]


def test_captions_change_nothing_where_no_loss_reads_them(both: Path):
    bare, told = (settings(both, name, *ALONE) for name in ("bare", "told"))
    assert not bare.loss.reads_text
    for config in (bare, told):
        train(config)
    assert losses(bare) == losses(told)
    ours, theirs = (load(config.run_folder).model.state_dict() for config in (bare, told))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    own = ("run.name=after", f"train.init_audio_from={bare.run_folder}", "train.steps=0")
    after = settings(both, "told", *DECODER, *own)
    assert after.loss.reads_text
    train(after)
    begun = load(after.run_folder).model.state_dict()
    tower = [name for name in begun if name.startswith("audio.")]
    assert tower
    assert all(torch.equal(begun[name], ours[name]) for name in tower)


def test_a_run_without_captions_is_healthy(both: Path, tmp_path: Path):
    config = settings(both, "bare", "run.name=healthy", *ALONE)
    train(config)
    found = examine([config.run_folder])
    assert not [f for f in findings(found) if f.found.severity != "note"]
    assert found.lacking["captions"] == "no loss of the config reads captions"
    assert "R@1 within a batch" not in report(config.run_folder, tmp_path / "x.html").read_text()


def test_shards_without_captions_are_prepared_again(both: Path, tmp_path: Path):
    shards = SOURCES["shards"].read(both / "bare")
    assert prepare(shards, tmp_path, sample_rate_hz=8000, show=False) == Prepared(12, 1, 12, 0)
    (again,) = SOURCES["shards"].read(tmp_path)[:1]
    assert (again.captionless, again.captions, again.more) == (True, [], {})


def test_what_no_loss_reads_is_not_trained(both: Path):
    config = settings(both, "bare", *ALONE)
    weights = TwoTowers(config).named_parameters()
    trained = {name.split(".")[0] for name, weight in weights if weight.requires_grad}
    assert trained == {"audio", "decoder"}


def test_reconstruction_alone_has_no_epochs_without_a_mask():
    rule = "mask.unmasked_tail_epochs must be 0 where reconstruction is the only loss"
    with pytest.raises(ConfigError, match=rule):
        tiny(*ALONE, "mask.unmasked_tail_epochs=1")
    tiny(*DECODER, "mask.unmasked_tail_epochs=1")


def test_a_loss_that_reads_captions_refuses_clips_without(both: Path):
    with pytest.raises(ShardError, match=r"cannot be used \(captionless: its JSON holds no text\)"):
        train(settings(both, "bare", "run.name=refused", *DECODER))
