"""Lengths of clips from their headers, of every kind of shard."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from flap_fast.data.lengths import clip_seconds
from flap_fast.data.shards import Shards, open_shards, pack
from flap_fast.ranks import Ranks
from tests.data.preprocess.test_sound_file import mp3
from tests.ranks import on_ranks
from tests.sounds import encode, noise
from tests.tiny import tiny

RATES = (16_000, 48_000, 44_100, 8_000)


def shards_of(folder: Path, *clips: tuple[str, bytes]) -> Shards:
    """The clips, by their endings, as shards of four."""
    folder.mkdir(exist_ok=True)
    for number, first in enumerate(range(0, len(clips), 4)):
        rows = [(f"{n}.{ending}", data, {"text": "x"}) for n, (ending, data) in enumerate(clips)]
        (folder / f"{number}.tar").write_bytes(pack(rows[first : first + 4])[0])
    return open_shards([folder])


def sounds(kind: str, subtype: str | None = None) -> tuple[list[tuple[str, bytes]], list[float]]:
    lengths = [0.1 + 0.37 * n for n in range(8)]
    waves = [(noise(n, s, RATES[n % 4]), RATES[n % 4]) for n, s in enumerate(lengths)]
    clips = [(kind.lower(), encode(*wave, kind, subtype)) for wave in waves]
    return clips, [len(wave) / rate for wave, rate in waves]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["FLAC", "WAV", "OGG", "MP3"])
def test_lengths_are_those_of_the_samples(kind: str, tmp_path: Path):
    clips, seconds = sounds(kind)
    found = clip_seconds(shards_of(tmp_path, *clips), Ranks())
    assert (found.shape, found.dtype) == ((8,), np.float64)
    assert found == pytest.approx(seconds, abs=0 if kind != "MP3" else 0.1)


def test_a_cached_log_mel_is_as_long_as_the_sound_whose_frames_it_holds(tmp_path: Path):
    frames = np.array([1, 57, 998, 3000])
    clips = [("npy", npy(np.zeros((t, 128), np.float16))) for t in frames]
    found = clip_seconds(shards_of(tmp_path, *clips), Ranks())
    audio = tiny().audio
    samples = np.round(found * audio.sample_rate_hz).astype(int)
    assert audio.frames_of(samples).tolist() == frames.tolist()


def test_a_flac_that_does_not_know_its_length_is_decoded_and_counted(tmp_path: Path):
    flac = bytearray(encode(noise(0, 0.7, 16_000), 16_000))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    assert clip_seconds(shards_of(tmp_path, ("flac", bytes(flac))), Ranks()).tolist() == [0.7]


def test_an_mp3_that_does_not_count_its_frames_is_decoded_and_counted(tmp_path: Path):
    """libsndfile would take all frames for as large as the first, which is loud."""
    rate = 16_000
    wave = np.concatenate([noise(0, 1.0, rate, rms=0.3), np.zeros(9 * rate, np.float32)])
    counted = mp3(wave, rate, compression=0.2)
    at = max(counted.find(b"Info"), counted.find(b"Xing"))
    uncounted = counted[:at] + bytes(4) + counted[at + 4 :]
    found = clip_seconds(shards_of(tmp_path, ("mp3", uncounted), ("mp3", counted)), Ranks())
    assert found.tolist() == pytest.approx([10, 10], abs=0.3)


def test_a_clip_without_a_header_counts_nothing_and_hurts_no_other(tmp_path: Path):
    good, bad = encode(noise(0, 0.5, 16_000), 16_000), (b"", b"fLaC", b"no sound at all" * 9)
    shards = shards_of(tmp_path, *(("flac", data) for data in (*bad, good)))
    assert clip_seconds(shards, Ranks()).tolist() == [0, 0, 0, 0.5]
    mels = (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00" * 9, npy(np.zeros(5)), npy(np.zeros((0, 8))))
    shards = shards_of(tmp_path / "mels", *(("npy", data) for data in mels))
    assert clip_seconds(shards, Ranks()).tolist() == [0] * 5


def test_only_a_header_is_read_of_a_wav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wav = encode(noise(0, 30.0, 48_000), 48_000, "WAV")
    shards, read = shards_of(tmp_path, ("wav", wav)), []
    whole = Shards.encoded_range

    def counted(self: Shards, clip: int, start: int, size: int) -> bytes:
        read.append(size)
        return whole(self, clip, start, size)

    monkeypatch.setattr(Shards, "encoded_range", counted)
    assert clip_seconds(shards, Ranks()).tolist() == [30.0]
    assert 0 < sum(read) < len(wav) / 50


def of_ranks(folder: Path) -> list[float]:
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    return clip_seconds(open_shards([folder]), ranks).tolist()


def test_every_rank_gets_the_lengths_of_all_clips(tmp_path: Path):
    clips, seconds = sounds("FLAC")
    shards_of(tmp_path, *clips[:7])
    assert on_ranks(3, of_ranks, tmp_path) == [seconds[:7]] * 3
