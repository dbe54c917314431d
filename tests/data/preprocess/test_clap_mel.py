"""CLAP's log-mel against torchaudio, transformers and librosa's formulas; SpecAug by counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from transformers import ClapFeatureExtractor

from flap_fast.config import Audio, SpecAug
from flap_fast.data.batch import EncodedBatch
from flap_fast.data.preprocess.clap_mel import ClapLogMel, mel_matrix
from flap_fast.data.preprocess.dali import DaliDecoder, audio_graph
from flap_fast.data.preprocess.front_end import log_mel
from flap_fast.data.preprocess.kaldi_mel import KaldiLogMel
from flap_fast.data.preprocess.log_mel import to_16_bits
from flap_fast.data.preprocess.spec_augment import stripes
from flap_fast.data.preprocess.waveform import BadSound, decode_clip, fill, read_sound
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.encoders.htsat.settings import HTSATSettings
from tests.sounds import chirp, encode, noise, tone

RATE, SAMPLES = 48_000, 480_000
DEMO = Path(__file__).parents[3] / "demo/audio"
VARIANTS = ("slaney_norm", "htk_none")
ANY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)

NOISES = {
    "white": noise(0, 10, RATE),
    "pink": noise(1, 10, RATE, slope=1),
    "near silence": noise(3, 10, RATE, rms=3e-5),
}
SIGNALS = {
    **NOISES,
    "brown": noise(2, 10, RATE, slope=2),
    "chirp": chirp(50, 20_000, 10, RATE),
    "tone": tone(440, 10, RATE),
    "silence": np.zeros(SAMPLES, np.float32),
    **{
        file.stem: fill(read_sound(file, RATE)[:SAMPLES], SAMPLES, "repeatpad")
        for file in sorted(DEMO.iterdir())[::200]
    },
}


def settings(variant: str = "slaney_norm", **others: object) -> Audio:
    """The real ones, but for the rounding to 16 bits, which the references do not do."""
    return HTSATSettings(mel_variant=variant, **{"int16_roundtrip": False, **others})  # type: ignore[arg-type]


def matrix(variant: str) -> np.ndarray:
    """(513, 64) float64: the one of transformers' extractor."""
    extractor = ClapFeatureExtractor(frequency_min=50)
    return extractor.mel_filters_slaney if variant == "slaney_norm" else extractor.mel_filters


def decibels_by_hand(wave: np.ndarray, variant: str) -> np.ndarray:
    """(1001, 64) in float64."""
    ends = np.pad(wave.astype(np.float64), 512, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(ends, 1024)[::480]
    window = np.sin(np.pi * np.arange(1024) / 1024) ** 2
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    return 10 * np.log10(np.maximum(power @ matrix(variant), 1e-10))


def decibels_in_float32(wave: np.ndarray, variant: str) -> np.ndarray:
    """(1001, 64) from torchaudio's spectrogram."""
    power = torchaudio.transforms.Spectrogram(1024, hop_length=480)(torch.from_numpy(wave)).T
    mel = power @ torch.from_numpy(matrix(variant)).float()
    return torchaudio.transforms.AmplitudeToDB(top_db=None)(mel).numpy()


@ANY_VARIANT
@pytest.mark.parametrize("name", SIGNALS)
def test_the_log_mel_is_claps(name, variant):
    """At most 5e-4 dB anywhere.

    Where a bin is far below its frame's loudest, a transform in float32 rounds more than that;
    there the measure is the truth: we are as near to it as torchaudio is.
    """
    wave = SIGNALS[name]
    found = log_mel(settings(variant))(torch.from_numpy(wave)[None])[0].numpy()
    theirs, exact = decibels_in_float32(wave, variant), decibels_by_hand(wave, variant)
    assert found.shape == theirs.shape == exact.shape == (1001, 64)
    if name in NOISES:
        assert np.abs(found - exact).max() <= 5e-4
    rounding, error = (np.sqrt(np.mean((x - exact) ** 2)) for x in (theirs, found))
    assert error <= 1.5 * rounding + 2e-5


def test_the_htk_variant_is_torchaudios():
    wave = torch.from_numpy(NOISES["pink"])
    mel = torchaudio.transforms.MelSpectrogram(
        RATE, n_fft=1024, hop_length=480, n_mels=64, f_min=50, f_max=14_000
    )
    theirs = torchaudio.transforms.AmplitudeToDB(top_db=None)(mel(wave)).T
    assert (log_mel(settings("htk_none"))(wave[None])[0] - theirs).abs().max() <= 5e-4


@ANY_VARIANT
def test_each_variant_is_the_one_transformers_takes_for_its_truncation(variant):
    truncation = "fusion" if variant == "htk_none" else "rand_trunc"
    extractor = ClapFeatureExtractor(frequency_min=50, truncation=truncation)
    wave = NOISES["white"]
    theirs = extractor(wave, sampling_rate=RATE)["input_features"][0][0]
    ours = log_mel(settings(variant))(torch.from_numpy(wave)[None])[0].numpy()
    assert np.abs(ours - theirs).max() <= 5e-4


def test_the_two_matrices_are_not_each_others():
    """By hand: Slaney's triangles have area 1 and are equally wide below 1 kHz; HTK's height 1."""
    slaney, htk = (mel_matrix(settings(variant)) for variant in VARIANTS)
    step = RATE / 1024
    assert slaney.shape == htk.shape == (64, 513)
    assert np.allclose(slaney[20:].sum(1) * step, 1, atol=0.06)
    assert 0.8 < htk[20:].max(1).min() <= htk.max() <= 1
    for matrix in (slaney, htk):
        held = np.flatnonzero(matrix.any(0)) * step
        assert held.min() > 50
        assert held.max() < 14_000


def test_another_band_is_the_settings_own():
    extractor = ClapFeatureExtractor(frequency_min=0, frequency_max=12_000)
    matrix = mel_matrix(settings(low_hz=0, high_hz=12_000))
    assert np.allclose(matrix.T, extractor.mel_filters_slaney, atol=1e-12)


def test_the_front_end_follows_audio_mel():
    assert isinstance(log_mel(Audio()), KaldiLogMel)
    assert isinstance(log_mel(Audio(mel="clap", frames=1008)), ClapLogMel)
    padded = log_mel(Audio(mel="clap", frames=1008))(torch.zeros(1, SAMPLES))
    assert padded.shape == (1, 1008, 64)
    assert padded[0, :1001].unique().tolist() == [-100]
    assert (padded[0, 1001:] == 0).all()


def test_samples_are_cut_to_16_bits_towards_zero():
    step = 1 / 32767
    wave = torch.tensor([0.0, 0.9 * step, -0.9 * step, 1.1 * step, -1.9 * step, 1.5, -1.5])
    counts = (to_16_bits(wave) * 32767).round()
    assert counts.tolist() == [0, 0, 0, 1, -1, 32767, -32767]
    wave = torch.from_numpy(NOISES["near silence"])[None]
    whole, cut = log_mel(settings()), log_mel(settings(int16_roundtrip=True))
    assert torch.equal(cut(wave), whole(to_16_bits(wave)))
    assert (cut(wave) - whole(wave)).abs().max() > 1


@ANY_VARIANT
@pytest.mark.parametrize("roundtrip", [False, True])
def test_dalis_own_mel_is_ours(variant, roundtrip):
    """Within 5e-4 dB, of a short clip that is filled and of a long one that is cropped too."""
    audio = settings(variant, int16_roundtrip=roundtrip)
    waves = (NOISES["white"], noise(5, 3, RATE), noise(6, 12, RATE, slope=1))
    sounds, where = [encode(wave, RATE, "WAV", "FLOAT") for wave in waves], np.array([0, 0.3, 0.7])
    cpu = torch.device("cpu")
    ahead = {"batch": 3, "threads": 2, "prefetch": 1, "device": cpu}
    batches = iter([EncodedBatch(sounds, where)])
    decoder = DaliDecoder(batches, audio_graph(audio, mel=True), error=BadSound, **ahead)
    theirs = next(decoder).stacked
    filled = [decode_clip(sound, float(w), audio) for sound, w in zip(sounds, where, strict=True)]
    ours = log_mel(audio)(torch.from_numpy(np.stack(filled)))
    assert theirs.shape == ours.shape == (3, 1001, 64)
    valid = ours > -80  # zeros behind the repeats of a short clip: nothing but rounding
    assert (theirs - ours)[valid].abs().max() <= 5e-4
    assert (theirs[~valid] < -79).all()


def test_htsats_specaug_is_torchlibrosas_two_stripes_of_each_kind():
    """Whole widths U{0..63} and U{0..7}, starts U{0..size - width - 1}, as torchlibrosa."""
    sample_index = torch.arange(3000)
    drawn = SpecAug(time_frames=64, freq_bins=0, stripes=1)
    rows = stripes(drawn, 3407, sample_index, (1001, 1), whole=True).all(2)
    for row, (width, start, *_) in zip(
        rows[:100], uniforms(3407, Stream.SPECAUG, sample_index, 4), strict=False
    ):
        wide = int(width.item() * 64)
        first = int(start.item() * (1001 - wide))
        assert row.nonzero()[:, 0].tolist() == list(range(first, first + wide))
    widths = rows.sum(1)
    counts = torch.bincount(widths, minlength=64)
    assert len(counts) == 64
    assert ((counts > 20) & (counts < 80)).all()
    starts, ends = rows.int().argmax(1)[widths > 0], 1001 - rows.flip(1).int().argmax(1)[widths > 0]
    assert ((ends - starts) == widths[widths > 0]).all()
    # The last frame is never reached: torchlibrosa's range is exclusive of it.
    assert ends.max() <= 1000
    assert starts.min() < 3
    assert ends.max() > 990
    drawn = SpecAug(time_frames=64, freq_bins=8, stripes=2)
    both = stripes(drawn, 3407, sample_index[:200], (1001, 64), whole=True)
    times, freqs = both.all(2).sum(1), both.all(1).sum(1)
    assert 64 < times.max() <= 126
    assert 8 <= freqs.max() <= 14
    assert torch.equal(both, both.all(2)[:, :, None] | both.all(1)[:, None, :])
