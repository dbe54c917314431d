"""Decoding: DALI and its reference give the same; a bad clip costs one batch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.config import Audio, Config, Frontend
from flap_fast.data.batch import EncodedBatch
from flap_fast.data.preprocess.audio import AudioPreprocessor
from flap_fast.data.preprocess.dali import DaliDecoder, audio_graph
from flap_fast.data.preprocess.decoders import ThreadedDecoder, decoding_backend
from flap_fast.data.preprocess.kaldi_mel import kaldi_log_mel
from flap_fast.data.preprocess.log_mel import normalise
from flap_fast.data.preprocess.waveform import BadSound, decode_clip
from flap_fast.encoders.audio_settings import AudioEncoder
from flap_fast.encoders.vit.settings import ViTSettings
from flap_fast.ranks import Ranks
from tests.sounds import chirp, encode, noise, tone

RATE = 16_000
ONE_SECOND = ViTSettings(duration_s=1.0, frames=112)
CPU = torch.device("cpu")
WHERE = np.array([0.0, 0.25, 0.999, 0.5], np.float32)


class Sounds:
    """The media of a decoder's batches, of clips of one length."""

    def __init__(self, decoder: DaliDecoder | ThreadedDecoder):
        self._decoder = decoder

    def __iter__(self) -> Sounds:
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._decoder).stacked


def dali(batches, audio: Audio = ONE_SECOND, *, mel: bool = False, prefetch: int = 2) -> Sounds:
    ahead = {"batch": 8, "threads": 2, "prefetch": prefetch}
    graph = audio_graph(audio, mel=mel)
    return Sounds(DaliDecoder(batches, graph, error=BadSound, device=CPU, **ahead))


def threaded(batches, audio: Audio = ONE_SECOND, *, prefetch: int = 2) -> Sounds:
    def decode(clip: bytes, position: float) -> np.ndarray:
        return decode_clip(clip, position, audio)

    return Sounds(ThreadedDecoder(batches, decode, threads=2, prefetch=prefetch))


def preprocessor(audio: AudioEncoder, backend: str) -> AudioPreprocessor:
    """Of log-mels that are normalised by nothing."""
    audio = audio.model_copy(update={"mean": 0.0, "std": 0.5})
    frontend = Frontend.model_validate({"backend": backend, "threads": 2})
    return AudioPreprocessor(Config(audio=audio, frontend=frontend), Ranks())


@pytest.mark.parametrize("filling", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize(("format", "limit"), [("WAV", 0), ("FLAC", 0), ("OGG", 1e-6)])
def test_dali_decodes_crops_and_fills_as_the_reference_does(format, limit, filling):
    """At the front end's rate, where nothing is resampled: the same bits from WAV and FLAC."""
    audio = ONE_SECOND.model_copy(update={"filling": filling})
    for length in (1.7, 1.0001, 1.0, 0.9999, 0.6, 0.5, 0.33, 0.01, 1 / RATE):
        sounds = [encode(noise(n, length, RATE), RATE, format) for n in range(4)]
        batches = [(sounds, WHERE)]
        (theirs,), (ours,) = dali(iter(batches), audio), threaded(iter(batches), audio)
        assert theirs.shape == ours.shape == (4, RATE)
        assert theirs.dtype == ours.dtype == torch.float32
        assert (theirs - ours).abs().max() <= limit, length


def test_dali_averages_channels():
    wave = np.stack([tone(300, 1.0, RATE), noise(0, 1.0, RATE)], 1)
    batches = [([encode(wave, RATE, "WAV", "FLOAT")], WHERE[:1])]
    (theirs,), (ours,) = dali(iter(batches)), threaded(iter(batches))
    assert (theirs - ours).abs().max() < 1e-7


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_resamplers_agree_on_what_the_new_rate_can_hold(rate):
    """Two band-limited resamplers differ in their transition band and at a clip's ends only."""
    batches = [([encode(chirp(200, 3000, 1.2, rate), rate, "WAV", "FLOAT")], WHERE[:1])]
    (theirs,), (ours,) = dali(iter(batches)), threaded(iter(batches))
    assert (theirs - ours)[:, 200:-200].abs().max() < 2e-3


def test_dalis_own_mel_is_near_kaldis():
    """White noise of 0.05 rms, bins from 6 on, normalised units."""
    audio = ViTSettings()
    sounds = [encode(noise(n, 10, RATE), RATE, "WAV", "FLOAT") for n in range(3)]
    batches = [(sounds, WHERE[:3])]
    (theirs,) = dali(iter(batches), audio, mel=True)
    (wave,) = threaded(iter(batches), audio)
    ours = kaldi_log_mel(audio)(wave)
    assert theirs.shape == (3, 998, 128)
    error = (normalise(theirs, audio) - normalise(ours[:, :998], audio))[..., 6:].abs()
    assert error.max() <= 0.03
    assert error.mean() <= 0.003


@pytest.mark.parametrize("kind", ["dali_wave", "dali_mel", "torch"])
def test_each_back_end_gives_log_mels_in_order(kind):
    """Batches of different sizes, the last of them smaller, more of them than are prefetched."""
    audio = ViTSettings(duration_s=0.5, frames=48)
    sounds = [encode(noise(n, 0.5, RATE), RATE) for n in range(9)]
    batches = [
        EncodedBatch(sounds[a:b], np.zeros(b - a, np.float32))
        for a, b in ((0, 3), (3, 6), (6, 8), (8, 9))
    ]
    mel = kaldi_log_mel(audio)
    given = preprocessor(audio, kind).stream(iter(batches), 3)
    waves = [np.stack([decode_clip(sound, 0.0, audio) for sound in some]) for some, *_ in batches]
    for out, wave in itertools.zip_longest(given, waves):
        wanted = mel(torch.from_numpy(wave))[:, None]
        assert out.longer is None
        assert out.stacked.shape == wanted.shape
        assert (out.stacked - wanted)[..., 6:].abs().max() < (0.3 if kind == "dali_mel" else 1e-6)


def test_where_a_crop_lies_is_the_clips_own():
    ramp = np.linspace(-1, 1, 2 * RATE).astype("f4")
    batches = [([encode(ramp, RATE, "WAV", "FLOAT")] * 4, WHERE)]
    for (out,) in (dali(iter(batches)), threaded(iter(batches))):
        first = np.floor(WHERE.astype(np.float64) * (RATE + 1)).astype(int)
        assert out[:, 0].tolist() == ramp[first].tolist()
        assert out[:, -1].tolist() == ramp[first + RATE - 1].tolist()


GOOD = encode(noise(0, 1.2, RATE), RATE)
BAD = {
    "cut": GOOD[: len(GOOD) // 2],
    "garbage": b"<html>404 Not Found</html>",
    "nothing": b"",
    "no samples": encode(noise(0, 1, RATE)[:0], RATE, "WAV"),
    "cut vorbis": encode(noise(0, 1, RATE), RATE, "OGG")[:6000],
    "nan": encode(np.full(800, np.nan), RATE, "WAV", "FLOAT"),
    "inf behind the crop": encode(
        np.append(noise(0, 2, RATE), np.float32(np.inf)), RATE, "WAV", "FLOAT"
    ),
}


@pytest.mark.parametrize("decoder", [dali, threaded])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("filling", ["repeatpad", "pad"])
def test_a_bad_clip_costs_its_batch_and_no_other(decoder, bad, filling):
    """Batches are drawn ahead; the error comes at the batch's turn."""
    audio = ONE_SECOND.model_copy(update={"filling": filling})
    clips = [[GOOD, GOOD], [GOOD, BAD[bad]], [GOOD, GOOD], [BAD[bad], GOOD], [GOOD]]
    decoded = decoder(iter([(some, WHERE[: len(some)]) for some in clips]), audio)
    found = []
    for _ in clips:
        try:
            found.append(len(next(decoded)))
        except BadSound:
            found.append(0)
    assert found == [2, 0, 2, 0, 1]
    with pytest.raises(StopIteration):
        next(decoded)


def test_dalis_reason_is_one_sentence_not_a_traceback():
    with pytest.raises(BadSound) as error:
        next(dali(iter([([BAD["garbage"]], WHERE[:1])])))
    assert str(error.value).startswith("DALI: Failed to open encoded data")
    assert "\n" not in str(error.value)


class Lost(ValueError):
    """Of a kind that DALI's own errors have too."""


@pytest.mark.parametrize("decoder", [dali, threaded])
def test_an_error_of_the_source_is_not_a_bad_clip(decoder):
    """A shard that is gone must stop the run, not cost a batch."""

    def batches() -> Iterator:
        yield [GOOD], WHERE[:1]
        raise Lost("the disk is gone")

    decoded = decoder(batches())
    with pytest.raises(Lost, match="the disk is gone"):
        list(decoded)


@pytest.mark.parametrize("decoder", [dali, threaded])
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_only_as_many_batches_as_asked_for_are_drawn_ahead(decoder, prefetch):
    drawn: list[int] = []

    def batches() -> Iterator:
        for n in range(20):
            drawn.append(n)
            yield [GOOD], WHERE[:1]

    decoded = decoder(batches(), prefetch=prefetch)
    for taken in range(1, 6):
        next(decoded)
        assert len(drawn) == taken - 1 + prefetch


@pytest.mark.parametrize("decoder", [dali, threaded])
def test_a_batch_is_not_overwritten_by_later_ones(decoder):
    sounds = [encode(noise(n, 1, RATE), RATE) for n in range(6)]
    decoded = decoder(iter([([sound], WHERE[:1]) for sound in sounds]), prefetch=1)
    first = next(decoded)
    copy = first.clone()
    assert len(list(decoded)) == 5
    assert torch.equal(first, copy)


def test_the_reference_decodes_one_clip_as_a_batch():
    (batch,) = threaded(iter([([GOOD] * 4, WHERE)]))
    for row, where in zip(batch, WHERE, strict=True):
        assert (decode_clip(GOOD, float(where), ONE_SECOND) == row.numpy()).all()


def test_auto_is_dali_where_it_is_installed_and_the_reference_elsewhere(monkeypatch):
    assert decoding_backend(Frontend()) == "dali_wave"
    assert decoding_backend(Frontend(backend="torch")) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert decoding_backend(Frontend()) == "torch"
    assert decoding_backend(Frontend(backend="torch")) == "torch"
    with pytest.raises(ConfigError, match=r"frontend.backend must be 'torch' where DALI is not"):
        decoding_backend(Frontend(backend="dali_mel"))


def test_the_reference_works_where_dali_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "flap_fast.data.preprocess.dali", None)
    batches = [EncodedBatch([GOOD], WHERE[:1])]
    (out,) = preprocessor(ONE_SECOND, "torch").stream(iter(batches), 1)
    assert out.stacked.shape == (1, 1, 112, 128)
    with pytest.raises(ImportError):
        preprocessor(ONE_SECOND, "dali_wave").stream(iter(batches), 1)
