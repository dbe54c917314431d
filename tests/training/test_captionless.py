"""Sounds without captions: reconstruction trains on them, and the tower begins another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flap_fast.config import Config
from flap_fast.data.shards import ShardError
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.sources import SOURCES
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


def test_a_loss_that_reads_captions_refuses_clips_without(both: Path):
    with pytest.raises(ShardError, match=r"cannot be used \(captionless: its JSON holds no text\)"):
        train(settings(both, "bare", "run.name=refused", *DECODER))
