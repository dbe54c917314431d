"""A frozen encoder of sounds or images runs once for each clip that is whole."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flap_fast.config import Config
from flap_fast.data.batch import Batch, PackedMels
from flap_fast.data.shards import open_shards
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.frozen import ClipNames, FrozenMedia
from flap_fast.training.loop import train
from tests.tiny import tiny, tiny_clip
from tests.training.kinds import sets_of_each_kind
from tests.training.test_frozen import CAPTIONS, MEDIA, counting, given, of_run, rows

IMAGES = ("image.freeze=true", "text.depth=1")
VIT = ("audio.length=variable", "mask.kind=none", "specaug.time_frames=0", "specaug.freq_bins=0")
KINDS = {
    "YAMNet": MEDIA,
    "YAMNet in bf16": (*MEDIA, "train.precision=bf16"),
    "YAMNet in micro-batches": (*MEDIA, "train.micro_batch=4"),
    "a ViT": (*VIT, "audio.freeze=true", "audio.max_duration_s=1.5", "audio.depth=1"),
    "images": IMAGES,
}


@pytest.mark.parametrize("name", KINDS)
def test_a_clip_is_embedded_once_and_nothing_else_changes(
    name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """But those that are cropped, at each step anew."""
    data = sets_of_each_kind(prepared, tmp_path)
    make, kind = (tiny_clip, "images") if name == "images" else (tiny, "sounds")

    def config(run: str) -> Config:
        return make(*KINDS[name], *of_run(tmp_path, run, prepared), f"data.train={data[kind]}")

    assert config("once").media_once
    embedded = [0]
    monkeypatch.setattr(TwoTowers, "pool_media", counting(TwoTowers.pool_media, embedded))
    train(config("once"))
    assert 0 < embedded[0] < 6 * 8 * (2 if "micro" in name else 1)
    monkeypatch.setattr(Config, "media_once", False)
    train(config("each"))
    for ours, theirs in zip(rows(tmp_path / "once"), rows(tmp_path / "each"), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=2e-2 if "bf16" in name else 1e-5)


@pytest.mark.parametrize(
    "drawn",
    ["mask.kind=1d", "specaug.freq_bins=4", "audio.freeze=false"],
)
def test_a_clip_that_is_drawn_anew_is_embedded_anew(drawn: str):
    assert tiny(*VIT, "audio.freeze=true").media_once
    assert not tiny(*VIT, "audio.freeze=true", drawn).media_once
    assert not tiny(*VIT, "audio.freeze=true", "audio.length=fixed").media_once


def test_a_shard_that_is_written_anew_has_other_clips(prepared: Path, tmp_path: Path):
    shutil.copytree(prepared / "train", tmp_path / "train")
    before = ClipNames(open_shards([tmp_path / "train"]))
    assert len({before(clip) for clip in range(24)}) == 24
    os.utime(tmp_path / "train/0.tar", ns=(0, 0))
    after = ClipNames(open_shards([tmp_path / "train"]))
    same = [before(clip) == after(clip) for clip in range(24)]
    assert same == [False] * 7 + [True] * 17


def test_of_packed_clips_the_long_ones_pass_by_and_the_others_are_kept(tmp_path: Path):
    config = tiny(*MEDIA)
    model = TwoTowers(config)
    torch.manual_seed(0)
    halves, rows = [2, 2, 3, 4], [3, 0, 2, 1]  # four are the most: a crop's
    mel = torch.randn(48 * sum(halves), config.audio.mel_bins)
    media = PackedMels(mel, tuple(48 * n for n in halves), tuple(rows))
    ids, mask = given(config, CAPTIONS[:4])
    batch = Batch(media, ids, mask, torch.arange(4), np.array([7, 9, 7000, 0]), 0, 1)
    assert config.audio.most_frames == 48 * 4
    expected = model.pool_media(media)
    frozen = FrozenMedia(config, model, Ranks(), tmp_path, ClipNames(None), keep=False)
    torch.testing.assert_close(frozen(batch), expected)
    assert len(frozen) == 3
    other = replace(batch, media=media._replace(mel=mel + 1))
    assert torch.equal(frozen(other)[[0, 2, 3]], frozen(batch)[[0, 2, 3]])
    torch.testing.assert_close(frozen(other)[1], model.pool_media(other.media)[1])
    assert not torch.allclose(frozen(other)[1], expected[1])
