"""YAMNet's log-mel against the formula in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flap_fast.data.preprocess.front_end import log_mel
from flap_fast.data.preprocess.kaldi_mel import mel_matrix
from flap_fast.encoders.yamnet.settings import YamnetSettings
from flap_fast.tools.enrich.yamnet import log_mel_patches
from tests.sounds import noise

AUDIO = YamnetSettings()
RATE = 16_000


def wanted(wave: np.ndarray) -> np.ndarray:
    """(P, 96, 64): every second piece of those that the tagger's own code has."""
    return log_mel_patches(wave, mel_matrix(64, 400, RATE, 125.0, 7500.0).T)[::2]


@pytest.mark.parametrize("seconds", [0.03, 0.2, 0.97, 0.975, 1.5])
@pytest.mark.parametrize("gain", [1.0, 1e-3, 0.0])
def test_it_is_the_taggers_to_the_last_sample(seconds: float, gain: float):
    """Of sounds of any length: silence completes the last piece."""
    wave = (gain * noise(0, seconds, RATE)).astype(np.float32)
    found = log_mel(AUDIO).packed([torch.from_numpy(wave)])
    assert len(found) == AUDIO.frames_of(len(wave)) == -(-len(wave) // 160)
    silence = torch.full((-(-len(found) // 96) * 96, 64), log_mel(AUDIO).silence)
    silence[: len(found)] = found
    pieces = wanted(wave)
    for piece, other in zip(silence.unflatten(0, (-1, 96)), pieces, strict=False):
        assert np.abs(piece.numpy() - other).max() < 2e-5


def test_rows_and_packed_clips_have_the_same_frames():
    waves = [torch.from_numpy(noise(n, s, RATE).astype(np.float32)) for n, s in enumerate((1, 0.3))]
    front_end = log_mel(AUDIO)
    packed = front_end.packed(waves).split([AUDIO.frames_of(len(wave)) for wave in waves])
    rows = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    whole = front_end.whole(rows, torch.tensor([len(wave) for wave in waves]))
    for one, row in zip(packed, whole, strict=True):
        assert torch.allclose(row[: len(one)], one, atol=1e-5)
    fixed = front_end(waves[0][None])
    assert fixed.shape == (1, AUDIO.frames, 64)
    assert torch.allclose(fixed[0, : len(packed[0])], packed[0], atol=1e-5)
    assert not fixed[0, len(packed[0]) :].any()


def test_silence_is_its_floor():
    front_end = log_mel(AUDIO)
    silent = front_end.packed([torch.zeros(RATE)])
    assert front_end.silence == pytest.approx(math.log(0.001))
    assert torch.allclose(silent, torch.tensor(front_end.silence))
