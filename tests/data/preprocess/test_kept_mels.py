"""Log-mels kept in memory: a clip is decoded once, and batches are those of decoding each time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from flap_fast.data.batch import DecodedBatch, EncodedBatch, PackedMels, lay_end_to_end
from flap_fast.data.preprocess.audio import AudioPreprocessor
from flap_fast.data.preprocess.kept_mels import KeptMels
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.ranks import Ranks
from tests.sounds import encode, noise
from tests.tiny import tiny

RATE = 16_000
SECONDS = (0.3, 1.0, 0.05, 1.7, 3.0)
LONG = 4
"""Longer than the bound: cropped elsewhere each time."""
BATCHES = ((0, 1, 2), (3, 4, 1), (2, 0, 3), (4, 0, 0), (1, 2, 3))


def batches(sounds: list[bytes]) -> Iterator[EncodedBatch]:
    for n, clips in enumerate(BATCHES):
        positions = np.linspace(0, 0.9, len(clips)) * n / len(BATCHES)
        yield EncodedBatch([sounds[clip] for clip in clips], positions[:, None], clips)


def sounds() -> list[bytes]:
    return [encode(noise(n, seconds, RATE), RATE) for n, seconds in enumerate(SECONDS)]


def preprocessor(*overrides: str) -> AudioPreprocessor:
    variable = ("audio.length=variable", "audio.max_duration_s=2", "frontend.threads=1")
    return AudioPreprocessor(tiny(*variable, *overrides), Ranks())


def mels(*overrides: str) -> list[PackedMels]:
    found = [media for media, _ in preprocessor(*overrides).stream(batches(sounds()), 3)]
    assert all(isinstance(media, PackedMels) for media in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("backend", ["torch", "dali_wave", "dali_mel"])
def test_batches_are_those_of_decoding_each_time(backend: str):
    one = mels(f"frontend.backend={backend}", "frontend.cache_mib=0")
    other = mels(f"frontend.backend={backend}", "frontend.prefetch=1")
    assert len(one) == len(other) == len(BATCHES)
    for a, b in zip(one, other, strict=True):
        assert (a.frames, a.order) == (b.frames, b.order)
        assert torch.equal(a.mel, b.mel)


def decoded(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[int]:
    """How often each clip is decoded."""
    made, counts = sounds(), [0] * len(SECONDS)
    decode = AudioPreprocessor._decode

    def counted(self: AudioPreprocessor, clip: bytes, position: float) -> np.ndarray:
        counts[made.index(clip)] += 1
        return decode(self, clip, position)

    monkeypatch.setattr(AudioPreprocessor, "_decode", counted)
    mels("frontend.backend=torch", "frontend.prefetch=1", *overrides)
    return counts


def test_a_clip_is_decoded_once_unless_it_is_cropped(monkeypatch):
    """Of a batch that is kept as a whole the shortest is decoded all the same: none is empty."""
    assert decoded(monkeypatch) == [1, 1, 3, 1, 2]


def test_without_memory_each_is_decoded_each_time(monkeypatch):
    assert decoded(monkeypatch, "frontend.cache_mib=0") == [4, 3, 3, 3, 2]


def test_what_is_kept_is_bounded():
    """12 bytes of 4 a frame: clip 0's two frames and clip 2's one; clip 1 no longer fits."""
    asked: list[int] = []

    def decoder(batches: Iterator[EncodedBatch]) -> Iterator[DecodedBatch]:
        for clips, positions, *_ in batches:
            asked.extend(map(len, clips))
            yield lay_end_to_end([np.zeros(len(clip), "f4") for clip in clips], positions)

    def mels(decoded: DecodedBatch) -> list[Tensor]:
        return [torch.zeros(n, 1) for n in decoded.lengths.tolist()]

    def are_whole(decoded: DecodedBatch) -> list[bool]:
        return [True] * len(decoded.lengths)

    clips = [bytes(2), bytes(3), bytes(1)]
    given = [EncodedBatch(clips, np.zeros(3), (0, 1, 2)) for _ in range(3)]
    for found in KeptMels(iter(given), decoder, mels, are_whole, 12):
        assert [len(mel) for mel in found] == [2, 3, 1]
    assert asked == [2, 3, 1, 3, 3]


@pytest.mark.parametrize("backend", ["torch", "dali_wave"])
def test_a_clip_that_cannot_be_decoded_costs_its_batch_alone(backend: str):
    """Also among clips that are kept."""
    made = sounds()
    made[LONG] = made[LONG][:100]
    stream = preprocessor(f"frontend.backend={backend}").stream(batches(made), 3)
    found = []
    for _ in BATCHES:
        try:
            found.append(next(stream).media)
        except Unusable:
            found.append(None)
    assert [media is None for media in found] == [LONG in clips for clips in BATCHES]
    wanted = mels(f"frontend.backend={backend}", "frontend.cache_mib=0")
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours is None or torch.equal(ours.mel, theirs.mel)
