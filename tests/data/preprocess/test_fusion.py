"""Clips longer than the encoder's input: four channels of them, from either back end."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ClapFeatureExtractor

from flap_fast.config import Config, Frontend, Fusion
from flap_fast.data.batch import Batch, EncodedBatch, lay_end_to_end
from flap_fast.data.evaluation import evaluation_batches
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.preprocess.audio import AudioPreprocessor
from flap_fast.data.preprocess.decoders import ThreadedDecoder
from flap_fast.data.preprocess.front_end import MelFrontEnd, _groups_by_length
from flap_fast.data.preprocess.fusion import four_channels, piece_starts
from flap_fast.data.preprocess.log_mel import normalise
from flap_fast.data.preprocess.spec_augment import spec_augment
from flap_fast.data.preprocess.waveform import BadSound, decode_clip
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.encoders.vit.settings import ViTSettings
from flap_fast.ranks import Ranks
from tests.sounds import encode, noise
from tests.tiny import crops, tiny

RATE = 16_000
CPU = torch.device("cpu")
FUSED = Fusion(type="aff_2d", max_duration_s=3.0)
KALDI = ViTSettings(duration_s=1.0, frames=112)
# 101 frames a second, as transformers' extractor makes them of a second at 16 kHz.
CLAP = ViTSettings(
    mel="clap",
    sample_rate_hz=RATE,
    duration_s=1.0,
    frames=101,
    patch=1,
    high_hz=8000,
    mel_variant="htk_none",
    int16_roundtrip=False,
)
# Short; exact; as many frames as exact ones; a frame more; long; as long as is decoded; longer.
SECONDS = (0.3, 1.0, 1.005, 1.01, 1.7, 3.0, 4.2)
WHERE = np.random.default_rng(0).random((len(SECONDS), 4)).astype(np.float32)


def sounds() -> list[np.ndarray]:
    return [noise(n, seconds, RATE, slope=1) for n, seconds in enumerate(SECONDS)]


def encoded() -> list[bytes]:
    return [encode(wave, RATE, "WAV", "FLOAT") for wave in sounds()]


@pytest.mark.parametrize(
    ("starts", "parts"),
    [
        (1, ([0], [0], [0])),
        (2, ([0], [1], [0])),
        (3, ([0], [1], [2])),
        (5, ([0, 1], [2, 3], [4])),
        (7, ([0, 1, 2], [3, 4], [5, 6])),
    ],
)
def test_pieces_begin_in_thirds_of_where_they_can_earlier_ones_taking_the_rest(starts, parts):
    u = torch.arange(0, 1, 0.01, dtype=torch.float64)[:, None].expand(-1, 3)
    found = piece_starts(torch.full((100,), starts + 9), 10, u)
    assert [sorted(set(column.tolist())) for column in found.unbind(1)] == list(parts)


def test_every_start_of_a_part_is_as_likely():
    u = torch.rand(3000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = piece_starts(torch.full((3000,), 39), 10, u)
    for n, column in enumerate(found.unbind(1)):
        counts = torch.bincount(column - 10 * n, minlength=10)
        assert len(counts) == 10
        assert ((counts > 230) & (counts < 370)).all()


def test_the_whole_is_two_frames_mixed_however_far_it_shrinks():
    """By hand: 4 to 2 and 8 to 2 take the frames around 1/4 and 3/4, and skip the others."""
    ramp = torch.arange(8.0).square()[None, :, None]
    nowhere = torch.zeros(1, 3, dtype=torch.float64)
    for frames, wanted in ((4, [0.5, 6.5]), (8, [2.5, 30.5]), (2, [0.0, 1.0])):
        out = four_channels(ramp, torch.tensor([frames]), 2, nowhere)
        assert out[0, 0, :, 0].tolist() == wanted


def test_all_channels_are_the_same_where_nothing_is_longer():
    mel, u = torch.randn(2, 10, 3), torch.rand(2, 3, dtype=torch.float64)
    out = four_channels(mel, torch.tensor([10, 10]), 10, u)
    assert torch.equal(out, mel[:, None].expand(-1, 4, -1, -1))


def test_what_lies_behind_a_clip_is_never_looked_at():
    mel, u = torch.randn(3, 30, 2), torch.tensor([[0.0] * 3, [0.5] * 3, [0.9999] * 3]).double()
    frames = torch.tensor([10, 17, 30])
    wanted = four_channels(mel, frames, 10, u)
    mel[0, 10:] = mel[1, 17:] = torch.nan
    assert torch.equal(four_channels(mel, frames, 10, u), wanted)


def test_four_channels_are_those_of_transformers_extractor(monkeypatch):
    """Of whole waves, from one batch of seven lengths; it draws with NumPy, here with ours."""
    extractor = ClapFeatureExtractor(
        sampling_rate=RATE,
        hop_length=160,
        max_length_s=1,
        frequency_min=50,
        frequency_max=8000,
        truncation="fusion",
    )
    waves = [wave[: 3 * RATE] for wave in sounds()]
    draws = iter(
        [u for seconds, row in zip(SECONDS, WHERE, strict=True) if seconds > 1.009 for u in row[1:]]
    )
    monkeypatch.setattr("numpy.random.choice", lambda r: r[int(next(draws) * len(r))])
    theirs = extractor(waves, sampling_rate=RATE, return_tensors="pt")
    assert next(draws, None) is None
    ours = MelFrontEnd(CLAP, FUSED, CPU)(
        lay_end_to_end(
            [decode_clip(encode(w, RATE, "WAV", "FLOAT"), 0.0, CLAP, FUSED) for w in waves], WHERE
        )
    )
    assert ours.longer is not None
    assert ours.longer.tolist() == theirs["is_longer"][:, 0].tolist() == [False] * 3 + [True] * 4
    assert ours.stacked.shape == theirs["input_features"].shape == (7, 4, 101, 64)
    valid = theirs["input_features"] > -80
    assert (ours.stacked - theirs["input_features"])[valid].abs().max() < 5e-4
    assert (ours.stacked[~valid] < -79).all()


@pytest.mark.parametrize("audio", [KALDI, CLAP], ids=["kaldi", "clap"])
def test_a_clip_is_the_same_in_any_company(audio):
    """However far it is padded, and whichever clips it is computed with; short ones as without."""
    front, waves = MelFrontEnd(audio, FUSED, CPU), [wave[: 3 * RATE] for wave in sounds()]
    waves[0] = np.tile(waves[0], 4)[:RATE]
    whole = front(lay_end_to_end(waves, WHERE))
    mel, longer = whole.stacked, whole.longer
    assert longer is not None
    assert mel.shape == (7, 4, audio.frames, audio.mel_bins)
    alone = [
        front(lay_end_to_end([wave], row[None])) for wave, row in zip(waves, WHERE, strict=True)
    ]
    assert (mel - torch.cat([one.stacked for one in alone])).abs().max() < 2e-3
    plain = MelFrontEnd(audio, Fusion(), CPU)(lay_end_to_end(waves[:2], WHERE[:2]))
    assert plain.longer is None
    assert plain.stacked.shape == (2, 1, audio.frames, audio.mel_bins)
    assert (mel[:2] - plain.stacked).abs().max() < 2e-3
    assert (mel[longer, 0] - mel[longer, 1]).abs().amax((1, 2)).min() > 1


def test_one_long_clip_does_not_make_the_others_long():
    """Rows go together as far as they cost no more than the batch at one piece each."""
    frames = torch.tensor([10, 95, 10, 30, 10, 12, 10, 10])
    groups = [rows.tolist() for rows in _groups_by_length(frames, 10)]
    assert groups[0] == [1]
    assert groups[1] == [3, 5]
    assert sorted(itertools.chain(*groups)) == list(range(8))
    for rows in groups:
        assert len(rows) == 1 or len(rows) * frames[rows].max() <= 8 * 10


@pytest.mark.parametrize("filling", ["repeatpad", "repeat", "pad"])
def test_both_back_ends_decode_whole_clips_alike(filling):
    from flap_fast.data.preprocess.dali import DaliDecoder, audio_graph

    audio = KALDI.model_copy(update={"filling": filling})
    ahead = {"threads": 2, "prefetch": 1}
    batch = EncodedBatch(encoded(), WHERE)

    def decode(clip: bytes, position: float) -> np.ndarray:
        return decode_clip(clip, position, audio, FUSED)

    ours = next(ThreadedDecoder(iter([batch]), decode, **ahead))
    graph = audio_graph(audio, FUSED, mel=False)
    dali = DaliDecoder(iter([batch]), graph, error=BadSound, batch=7, device=CPU, **ahead)
    theirs = next(dali)
    assert ours.lengths.tolist() == [16_000, 16_000, 16_080, 16_160, 27_200, 48_000, 48_000]
    assert torch.equal(theirs.lengths, ours.lengths)
    assert torch.equal(theirs.media, ours.media)
    assert torch.equal(theirs.positions, ours.positions)
    # The last is cropped to what is decoded at most, where its position says.
    first = int(np.float64(WHERE[6, 0]) * (len(sounds()[6]) - 48_000 + 1))
    waves = ours.media.split(ours.lengths.tolist())
    assert np.array_equal(waves[6].numpy(), sounds()[6][first : first + 48_000])


@pytest.mark.parametrize(
    ("audio", "backend", "most"),
    [(KALDI, "dali_wave", 1e-5), (CLAP, "dali_wave", 1e-5), (CLAP, "dali_mel", 5e-4)],
)
def test_every_back_end_gives_the_same_channels(audio, backend, most):
    batches = [
        EncodedBatch(encoded()[rows], WHERE[rows]) for rows in (slice(7), slice(2), slice(3, 7))
    ]
    audio = audio.model_copy(update={"mean": 0.0, "std": 0.5})  # which normalise by nothing
    ours, theirs = (
        list(
            AudioPreprocessor(
                Config(audio=audio, fusion=FUSED, frontend=Frontend(backend=kind)), Ranks()
            ).stream(iter(batches), 7)
        )
        for kind in ("torch", backend)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.longer is not None
        assert b.longer is not None
        assert a.stacked.shape == (len(a.longer), 4, audio.frames, audio.mel_bins)
        valid = a.stacked > -80
        assert (a.stacked - b.stacked)[valid].abs().max() <= most
        assert torch.equal(a.longer, b.longer)


def loaded(config: Config, first: int, last: int) -> list[Batch]:
    shards = open_shards(config.data.train)
    return list(
        TrainingLoader(config, shards, tokenizer(config.text), Ranks()).batches(first, last)
    )


def settings(prepared: Path, *overrides: str) -> Config:
    return tiny(
        *(f"data.train={prepared / 'train'}", "frontend.backend=torch", "fusion.type=aff_2d"),
        *("fusion.max_duration_s=1.5", *overrides),
    )


def flags(batch: Batch) -> Tensor:
    assert batch.longer is not None
    return batch.longer


def test_a_batch_is_what_its_sample_indices_say(prepared):
    """By hand from the shards: decoded, cropped to what is seen at most, four channels."""
    config = settings(prepared)
    shards, seed = open_shards(config.data.train), config.run.seed
    seen = []
    for batch in loaded(config, 0, 3):
        positions = uniforms(seed, Stream.CROP, batch.sample_index, 4).numpy()
        waves = [
            decode_clip(shards.encoded(clip), float(row[0]), config.audio, config.fusion)
            for clip, row in zip(batch.clips.tolist(), positions, strict=True)
        ]
        front = MelFrontEnd(config.audio, config.fusion, CPU)
        found = front(lay_end_to_end(waves, positions))
        mel, longer = normalise(found.stacked, config.audio), found.longer
        assert torch.equal(batch.stacked, mel)
        assert longer is not None
        assert torch.equal(flags(batch), longer)
        seen += longer.tolist()
        # What SpecAug covers is covered in each channel.
        mel = spec_augment(mel, config.specaug, config.audio, seed, batch.sample_index)
        masked = (mel == normalise(torch.zeros(()), config.audio))[:, :, :98]
        assert 0.01 < masked.float().mean() < 0.9
        assert torch.equal(masked.all(1), masked[:, 0])
    assert 4 < sum(seen) < 20


def test_dali_and_its_reference_load_the_same(prepared):
    ours = loaded(settings(prepared), 0, 2)
    theirs = loaded(settings(prepared, "frontend.backend=dali_wave"), 0, 2)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.stacked, b.stacked)
        assert torch.equal(flags(a), flags(b))


def test_one_clip_is_taken_for_a_longer_one_where_none_is(prepared):
    """Another one each step; LAION's, so that every batch trains the fusion."""
    long = ("audio.duration_s=2.0", "audio.frames=208", "fusion.max_duration_s=2.0")
    forced = [flags(batch) for batch in loaded(settings(prepared, *long), 0, 6)]
    assert [int(longer.sum()) for longer in forced] == [1] * 6
    assert len({int(longer.int().argmax()) for longer in forced}) > 2
    batches = loaded(settings(prepared, *long, "fusion.force_one=false"), 0, 3)
    assert not any(flags(batch).any() for batch in batches)


def test_evaluation_takes_no_clip_for_longer_and_its_pieces_are_the_clips_own(prepared):
    shards, clips = open_shards([prepared / "train"]), np.arange(12)
    config = settings(prepared, "eval.batch=4")
    parts, other = (
        list(
            evaluation_batches(
                settings(prepared, f"eval.batch={size}", f"run.seed={size}"),
                shards,
                crops(settings(prepared, f"eval.batch={size}", f"run.seed={size}"), clips),
                Ranks(),
            )
        )
        for size in (4, 12)
    )
    mel = torch.cat([valid.stacked for valid in parts])
    assert (mel - other[0].stacked).abs().max() < 1e-3
    wanted = [
        len(decode_clip(shards.encoded(n), 0.0, config.audio, config.fusion)) >= RATE + 160
        for n in clips.tolist()
    ]
    longer = other[0].longer
    assert longer is not None
    assert longer.tolist() == wanted
    long = settings(
        prepared, "audio.duration_s=2.0", "audio.frames=208", "fusion.max_duration_s=2.0"
    )
    for valid in evaluation_batches(long, shards, crops(long, clips), Ranks()):
        assert valid.longer is not None
        assert not valid.longer.any()
