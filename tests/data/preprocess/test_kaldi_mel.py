"""The log-mel against an independent Kaldi, and SpecAug by counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchaudio.compliance import kaldi

from flap_fast.config import Audio, SpecAug
from flap_fast.data.preprocess.kaldi_mel import FLOOR, kaldi_log_mel, mel_matrix
from flap_fast.data.preprocess.log_mel import normalise
from flap_fast.data.preprocess.spec_augment import spec_augment
from flap_fast.data.preprocess.waveform import fill, read_sound
from flap_fast.data.random_streams import Stream, uniforms
from tests.sounds import chirp, noise, tone

RATE, SAMPLES = 16_000, 160_000
DEMO = Path(__file__).parents[3] / "demo/audio"


def fbank(wave: torch.Tensor) -> torch.Tensor:
    """(t, 128): AudioMAE's settings of torchaudio's Kaldi."""
    return kaldi.fbank(
        (wave - wave.mean())[None],
        htk_compat=True,
        sample_frequency=RATE,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


NOISES = {
    "white": noise(0, 10, RATE),
    "pink": noise(1, 10, RATE, slope=1),
    "brown": noise(2, 10, RATE, slope=2),
    "near silence": noise(3, 10, RATE, rms=3e-5),
}
SIGNALS = {
    **NOISES,
    "chirp": chirp(50, 7900, 10, RATE),
    "tone and an offset": tone(440, 10, RATE) + np.float32(0.2),
    "silence": np.zeros(SAMPLES, np.float32),
    **{
        file.stem: fill(read_sound(file, RATE)[:SAMPLES], SAMPLES, "repeatpad")
        for file in sorted(DEMO.iterdir())[::100]
    },
}


@pytest.mark.parametrize("name", SIGNALS)
def test_the_log_mel_is_kaldis(name):
    """Of noise at most 5e-3 off anywhere, 2e-5 on average.

    Beside a tone, 100 dB below it, both round more than that: there the measure is Kaldi itself in
    float64, and we are as near to it as Kaldi in float32 is.
    """
    wave = torch.from_numpy(SIGNALS[name])
    ours = kaldi_log_mel(Audio())(wave[None])[0]
    theirs, exact = fbank(wave), fbank(wave.double())
    assert theirs.shape == (998, 128)
    assert (ours[998:] == 0).all()
    ours = ours[:998]
    assert (ours - exact).abs().max() <= max(5e-3, 1.5 * (theirs - exact).abs().max())
    rounding = (theirs - exact).square().mean().sqrt()
    # torchaudio's triangles are in float32 even then: 2e-5 for those.
    assert (ours - exact).square().mean().sqrt() <= 1.5 * rounding + 2e-5
    if name in NOISES:
        assert (ours - theirs).abs().max() <= 5e-3
        assert (ours - theirs).abs().mean() <= 2e-5


@pytest.mark.parametrize(
    ("seconds", "valid", "frames"),
    [(10.0, 998, 1024), (10.0, 998, 1008), (5.0, 498, 512), (1.0, 98, 112), (0.025, 1, 16)],
)
def test_frames_are_those_that_fit_whole_and_zeros_follow(seconds, valid, frames):
    audio = Audio(duration_s=seconds, frames=frames)
    out = kaldi_log_mel(audio)(torch.from_numpy(noise(0, seconds, RATE))[None].repeat(3, 1))
    assert out.shape == (3, frames, 128)
    assert (out[:, valid:] == 0).all()
    assert (out[:, :valid] != 0).all()


def test_another_rate_has_a_mel_of_its_own():
    """32 kHz: windows of 800 samples, transforms of 1024, bands up to 16 kHz."""
    audio = Audio(sample_rate_hz=32_000, duration_s=1.0, frames=112)
    wave = torch.from_numpy(noise(5, 1.0, 32_000))
    theirs = kaldi.fbank(
        (wave - wave.mean())[None],
        htk_compat=True,
        sample_frequency=32_000,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
    )
    error = (kaldi_log_mel(audio)(wave[None])[0, :98] - theirs).abs()
    assert error.max() <= 5e-3


def test_a_clip_is_the_same_in_any_company():
    waves = torch.from_numpy(np.stack([noise(n, 1.0, RATE) for n in range(3)]))
    mel = kaldi_log_mel(Audio(duration_s=1.0, frames=112))
    together = mel(waves)
    alone = torch.cat([mel(wave[None]) for wave in waves])
    assert (together - alone).abs().max() < 1e-4
    waves[0] = 0
    assert (mel(waves)[1:] - together[1:]).abs().max() < 1e-4


def test_silence_is_the_floor():
    out = kaldi_log_mel(Audio())(torch.zeros(1, SAMPLES))
    assert out[0, :998].unique().tolist() == [np.float32(np.log(FLOOR))]


def test_bf16_autocast_does_not_reach_the_front_end():
    mel, wave = kaldi_log_mel(Audio()), torch.from_numpy(SIGNALS["pink"])[None]
    with torch.autocast("cpu", torch.bfloat16):
        inside = mel(wave)
    assert torch.equal(inside, mel(wave))


def test_the_mel_matrix_has_triangles_that_add_up_and_nothing_at_nyquist():
    matrix = mel_matrix(128, 400, RATE, 20.0, RATE / 2)
    assert matrix.shape == (128, 257)
    assert (matrix >= 0).all()
    assert (matrix[:, 256] == 0).all()
    # Between the first and the last peak, neighbours share each frequency: their sum is 1.
    assert np.allclose(matrix.sum(0)[10:240], 1)


def test_normalisation_is_audiosets_and_a_padded_row_becomes_0467():
    values = normalise(torch.tensor([0.0, -4.2677393, 4.8702555]), Audio())
    assert values.tolist() == pytest.approx([0.467, 0.0, 1.0], abs=1e-3)
    other = Audio(mean=-6.6268077, std=5.358466)
    assert normalise(torch.zeros(1), other).item() == pytest.approx(6.6268077 / 2 / 5.358466)


SAMPLE_INDEX = torch.arange(400)
OFF = {"time_frames": 0, "freq_bins": 0}


def masked(settings: SpecAug, sample_index: torch.Tensor = SAMPLE_INDEX) -> torch.Tensor:
    """(B, 64, 32) bool: what SpecAug covers."""
    mel = torch.ones(len(sample_index), 1, 64, 32)
    return spec_augment(mel, settings, Audio(), 3407, sample_index)[:, 0] != 1


def test_specaug_can_be_off():
    assert not masked(SpecAug.model_validate(OFF)).any()


@pytest.mark.parametrize("name", ["time_frames", "freq_bins"])
def test_a_mask_is_one_whole_stripe_narrower_than_the_widest(name):
    widest = 12
    cover = masked(SpecAug.model_validate({**OFF, name: widest}))
    across = 2 if name == "time_frames" else 1
    assert (cover.all(across) == cover.any(across)).all()
    stripe = cover.any(across)
    edges = stripe.diff(dim=1, prepend=torch.zeros(len(stripe), 1, dtype=torch.bool))
    assert (edges.sum(1) <= 2).all()
    widths = stripe.sum(1)
    # U[0, 12), floored: each of 0 to 11 about as often; never 12.
    counts = torch.bincount(widths, minlength=widest)
    assert len(counts) == widest
    assert (counts > 400 / widest / 2).all()


def test_both_masks_cross():
    cover = masked(SpecAug(time_frames=12, freq_bins=12))
    time, freq = (
        masked(SpecAug.model_validate({**OFF, name: 12})) for name in ("time_frames", "freq_bins")
    )
    assert torch.equal(cover, time | freq)
    independent = np.corrcoef(time.any(2).sum(1), freq.any(1).sum(1))[0, 1]
    assert abs(independent) < 0.15


def test_a_mask_wider_than_the_input_covers_at_most_all_of_it():
    cover = masked(SpecAug(time_frames=1000, freq_bins=0))
    widths = cover.any(2).sum(1)
    assert widths.max() <= 63
    assert widths.max() > 50


def test_specaug_zeros_come_before_or_after_the_statistics():
    """Before, as AudioMAE's: a masked cell becomes 0.467, as a padded row is; after: 0."""
    logmel = torch.randn(len(SAMPLE_INDEX), 2, 64, 32, generator=torch.Generator().manual_seed(0))
    before, after = (
        spec_augment(
            normalise(logmel, Audio()),
            SpecAug(time_frames=30, freq_bins=12, domain=domain),
            Audio(),
            *(3407, SAMPLE_INDEX),
        )
        for domain in ("pre_norm", "post_norm")
    )
    cover = masked(SpecAug(time_frames=30, freq_bins=12))[:, None].expand_as(logmel)
    assert cover.float().mean() > 0.1
    assert torch.equal(before, normalise(logmel.masked_fill(cover, 0), Audio()))
    assert torch.equal(after, normalise(logmel, Audio()).masked_fill(cover, 0))


def test_specaug_is_the_samples_own():
    settings = SpecAug(time_frames=30, freq_bins=12)
    together = masked(settings)
    assert torch.equal(together[17:18], masked(settings, torch.tensor([17])))
    assert len(together.flatten(1).unique(dim=0)) > 390


def test_a_mask_follows_torchaudios_formula():
    """value = u P, start = floor(u' (size - value)), end = start + floor(value)."""
    u = uniforms(3407, Stream.SPECAUG, SAMPLE_INDEX, 4).double()
    cover = masked(SpecAug(time_frames=20, freq_bins=0)).any(2)
    for row, (width, start, *_) in zip(cover, u.tolist(), strict=True):
        first = int(start * (64 - width * 20))
        wanted = torch.zeros(64, dtype=torch.bool)
        wanted[first : first + int(width * 20)] = True
        assert torch.equal(row, wanted)
