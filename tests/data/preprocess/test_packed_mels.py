"""Clips of their own lengths -> packed log-mels: from DALI, from its reference and from a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flap_fast.config import Config
from flap_fast.data.batch import EncodedBatch, PackedMels, lay_end_to_end
from flap_fast.data.evaluation import crops_of, evaluation_batches
from flap_fast.data.preprocess.audio import AudioPreprocessor
from flap_fast.data.preprocess.front_end import MelFrontEnd
from flap_fast.data.preprocess.kaldi_mel import kaldi_log_mel
from flap_fast.data.preprocess.log_mel import normalise
from flap_fast.data.preprocess.spec_augment import spec_augment, spec_augment_packed
from flap_fast.data.shards import open_shards
from flap_fast.encoders.vit.settings import ViTSettings
from flap_fast.preparation.prepare import prepare
from flap_fast.ranks import Ranks
from tests.sounds import encode, noise, write_manifest
from tests.tiny import YAMNET, tiny

RATE = 16_000
CPU = torch.device("cpu")
# One patch, the least; a sample more than 2 patches need; the most, and more than that.
SECONDS = (1.0, 0.175, 0.33507, 0.02, 2.0, 3.3)
FRAMES = (98, 16, 32, 16, 198, 198)


def config(*overrides: str) -> Config:
    variable = ("audio.length=variable", "audio.max_duration_s=2", "eval.batch=4")
    return tiny(*variable, *overrides)


def packed(media: object) -> PackedMels:
    assert isinstance(media, PackedMels)
    return media


def test_clips_lie_end_to_end_by_length_and_are_their_own_log_mels():
    audio = config().audio
    waves = [noise(n, min(s, 2.0), RATE) for n, s in enumerate(SECONDS)]
    waves[3] = np.tile(waves[3], 9)[: audio.least_samples]
    assert audio.least_samples == 15 * 160 + 400
    found = packed(MelFrontEnd(audio, tiny().fusion, CPU)(lay_end_to_end(waves, np.zeros(6))).media)
    assert found.order == (1, 3, 2, 0, 4, 5)
    assert found.frames == (16, 16, 32, 112, 208, 208)
    assert found.mel.shape == (sum(found.frames), 128)
    for row, mel in zip(found.order, found.mel.split(list(found.frames)), strict=True):
        alone = kaldi_log_mel(audio).whole(
            torch.from_numpy(waves[row])[None], torch.tensor([len(waves[row])])
        )[0]
        assert len(alone) == FRAMES[row]
        assert (mel[: len(alone)] - alone).abs().max() < 2e-4
        assert (mel[len(alone) :] == torch.tensor(2.0**-23).log()).all()


@pytest.mark.parametrize("encoder", [(), YAMNET], ids=["vit", "yamnet"])
@pytest.mark.parametrize("backend", ["dali_wave", "dali_mel"])
def test_dali_gives_what_the_reference_gives(backend, encoder):
    """At the front end's rate; DALI's own mel approximates Kaldi's and YAMNet's."""
    clips = [encode(noise(n, s, RATE), RATE) for n, s in enumerate(SECONDS)]
    batches = [EncodedBatch(clips, np.linspace(0, 0.9, 6)), EncodedBatch(clips[:1], np.zeros(1))]
    found = []
    for name in (backend, "torch"):
        settings = config(f"frontend.backend={name}", *encoder)
        inputs = AudioPreprocessor(settings, Ranks()).stream(iter(batches), 6)
        found.append([packed(media) for media, _ in inputs])
    for ours, theirs in zip(*found, strict=True):
        assert (ours.frames, ours.order) == (theirs.frames, theirs.order)
        limit = 1e-5 if backend == "dali_wave" else 0.3
        assert (ours.mel - theirs.mel)[:, 6:].abs().max() < limit


def test_cached_log_mels_are_those_of_the_sounds(tmp_path):
    rows, settings = [], config()
    for n, seconds in enumerate(SECONDS):
        (tmp_path / f"{n}.flac").write_bytes(encode(noise(n, seconds, RATE), RATE))
        rows.append({"audio": f"{n}.flac", "caption": f"noise {n}"})
    manifest, audio = write_manifest(tmp_path / "m.jsonl", rows), settings.audio
    prepare(manifest, tmp_path / "sounds", show=False)
    prepare(manifest, tmp_path / "mels", cache=audio, show=False)
    # Whole clips, of more than 2 s in windows of 2 s; less than 25 ms are rejected.
    both = []
    for kind in ("sounds", "mels"):
        shards = open_shards([tmp_path / kind / "train"])
        crops = crops_of(settings, shards, Ranks())
        assert np.bincount(crops.clips).tolist() == [1, 1, 1, 1, 2]
        both.append(
            [packed(found.media) for found in evaluation_batches(settings, shards, crops, Ranks())]
        )
    for sounds, mels in zip(*both, strict=True):
        assert (sounds.frames, sounds.order) == (mels.frames, mels.order)
        assert (sounds.mel - mels.mel).abs().max() < 0.02  # fp16, and crops at frames


@pytest.mark.parametrize("domain", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("stripes", [1, 2])
def test_specaug_masks_a_packed_clip_as_it_masks_it_alone(domain, stripes):
    """Of a clip of audio.frames or longer; a shorter one's stripes are as much narrower."""
    audio = ViTSettings(length="variable", frames=96, duration_s=0.9, mel_bins=32)
    overrides = (f"specaug.domain={domain}", f"specaug.stripes={stripes}")
    settings = tiny("specaug.time_frames=64", "specaug.freq_bins=20", *overrides).specaug
    frames, index = (48, 96, 160), torch.tensor([3, 2**33, 9])
    torch.manual_seed(0)
    media = PackedMels(torch.randn(sum(frames), 32), frames, (2, 0, 1))
    found = spec_augment_packed(media, settings, audio, 5, index)
    for n, (mel, own) in enumerate(
        zip(media.mel.split(list(frames)), found.mel.split(list(frames)), strict=True)
    ):
        narrower = settings.model_copy(update={"time_frames": 64 * min(frames[n], 96) // 96})
        alone = spec_augment(mel[None, None], narrower, audio, 5, index[n : n + 1])
        assert torch.equal(own, alone[0, 0])
        assert not torch.equal(own, mel)


def test_the_rows_behind_a_clip_are_those_of_silence():
    audio = config().audio
    clips = [encode(noise(0, 0.2, RATE), RATE)]
    found = packed(AudioPreprocessor(config(), Ranks()).decode(clips, np.zeros((1, 1))).media)
    silence = normalise(kaldi_log_mel(audio)(torch.zeros(1, 400))[0, :1], audio)
    assert found.frames == (32,)
    assert (found.mel[18:] == silence).all()
