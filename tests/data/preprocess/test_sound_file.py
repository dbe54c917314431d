"""Reading in blocks and in pieces: the samples of reading all at once, in little memory."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from flap_fast.data.preprocess import sound_file, waveform
from flap_fast.data.preprocess.waveform import BadSound, read_crop, read_pieces, read_sound
from tests.sounds import encode, noise, tone

RATE = 16_000


def stereo(seconds: float, rate: int) -> np.ndarray:
    """(samples, 2) float32 noise, another one in each channel."""
    return np.stack([noise(0, seconds, rate), noise(1, seconds, rate)], 1)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 44_101, 48_000, 96_000])
def test_blocks_are_resampled_to_the_bits_of_the_whole(monkeypatch, rate):
    data = encode(stereo(1.5, rate), rate, "WAV", "FLOAT")
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    wanted = soxr.resample(whole.mean(1), rate, RATE, quality="HQ")
    for block in (2**18, 1998):
        monkeypatch.setattr(sound_file, "_BLOCK", block)
        assert np.array_equal(read_sound(data, RATE), wanted)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 44_101, 48_000, 192_000])
@pytest.mark.parametrize(
    ("format", "subtype", "seeks"),
    [("WAV", "PCM_16", True), ("FLAC", "PCM_24", True), ("WAV", "IMA_ADPCM", False)],
)
def test_a_piece_has_the_samples_of_the_whole(monkeypatch, rate, format, subtype, seeks):
    """Near, far, at both ends, one in another; of a file that can be sought in, and of others."""
    monkeypatch.setattr(waveform, "_FAR", 1000)
    monkeypatch.setattr(waveform, "_KEPT", 1000)
    monkeypatch.setattr(sound_file, "_BLOCK", 3000)
    data = encode(stereo(4.0, rate), rate, format, subtype)
    assert sound_file.seeks_exactly(data) == seeks
    whole = read_sound(data, RATE)
    starts = [0, 100, 9000, 9000, 9001, 40_000, len(whole) - 2000]
    pieces = list(read_pieces(data, RATE, 2000, lambda length: starts[: length // 9000]))
    assert len(pieces) == len(starts)
    for start, piece in zip(starts, pieces, strict=True):
        limit = 1e-6 if seeks and rate != RATE else 0
        assert len(piece) == 2000
        assert np.abs(piece - whole[start : start + 2000]).max() <= limit


def test_an_odd_ratio_of_rates_is_resampled_from_the_begin(monkeypatch):
    """soxr interpolates its filter for it: begun elsewhere, samples would differ by 1e-5."""
    monkeypatch.setattr(waveform, "_FAR", 1000)
    monkeypatch.setattr(sound_file, "_BLOCK", 3000)
    data = encode(noise(0, 8.0, 44_099), 44_099, "WAV", "FLOAT")
    whole = read_sound(data, 48_000)
    for position in (0.4, 0.8):
        piece = read_crop(data, 48_000, 5000, position)
        assert np.array_equal(piece, waveform.crop(whole, 5000, position))


@pytest.mark.parametrize("format", ["OGG", "MP3"])
@pytest.mark.parametrize("kept", [10, 2**22])
def test_formats_without_a_sure_length_are_read_forward(monkeypatch, format, kept):
    monkeypatch.setattr(waveform, "_KEPT", kept)
    monkeypatch.setattr(sound_file, "_BLOCK", 3000)
    data = encode(stereo(2.0, 44_100), 44_100, format)
    whole = read_sound(data, RATE)
    for position in (0.0, 0.5, 0.999):
        wave = read_crop(data, RATE, 3000, position)
        assert np.array_equal(wave, waveform.crop(whole, 3000, position))
    (wave,) = read_pieces(data, RATE, 10**6, lambda _: [0])  # longer than the sound
    assert np.array_equal(wave, whole)


def test_only_the_pieces_of_a_long_file_are_decoded(monkeypatch, tmp_path):
    read = 0
    raw = soundfile.SoundFile.read

    def counting(self, frames, **options):
        nonlocal read
        read += frames
        return raw(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    for format in ("WAV", "FLAC"):
        (tmp_path / "x").write_bytes(encode(noise(0, 120, RATE), RATE, format))
        read = 0
        assert len(read_crop(tmp_path / "x", RATE, RATE, 0.5)) == RATE
        assert read <= 2**18 + 2


def test_a_header_with_a_wrong_length_is_not_believed():
    """Nor is it sought in: libsndfile fails."""
    data = bytearray(encode(noise(2, 2.0, RATE), RATE))
    whole = read_sound(bytes(data), RATE)
    for frames in (0, len(whole) + 1, 2**36 - 1):
        data[21] = data[21] & 0xF0 | frames >> 32
        data[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
        wrong = bytes(data)
        assert np.array_equal(read_crop(wrong, RATE, 8000, 0.5), whole[12_000:20_000])
        assert np.array_equal(
            read_sound(wrong, RATE, start_s=1.5, duration_s=0.1), whole[24_000:25_600]
        )


def test_a_file_that_cannot_be_sought_in_is_read():
    data = encode(tone(300, 2.0, 8000), 8000, "WAV", "GSM610")
    whole = read_sound(data, 8000)
    assert np.abs(whole[800:16_000] - tone(300, 2.0, 8000)[800:]).max() < 0.05
    assert np.array_equal(read_sound(data, 8000, start_s=1.5), whole[12_000:])
    assert np.array_equal(read_crop(data, 8000, 800, 0.0), whole[:800])


def mp3(wave: np.ndarray, rate: int, *, mode: str = "VARIABLE", compression: float = 0.0) -> bytes:
    """An MP3, behind a tag of ID3, of a bit rate that is the highest unless compressed."""
    file = io.BytesIO()
    options = {"format": "MP3", "bitrate_mode": mode, "compression_level": compression}
    with soundfile.SoundFile(file, "w", rate, 1, **options) as f:
        f.write(wave)
    return b"ID3\x03\0\0\0\0\2\0" + bytes(256) + file.getvalue()


def test_an_mp3_without_a_count_of_frames_is_read_to_its_end():
    """From loud to silent: as many frames of the first one's size would be a fraction of it."""
    wave = np.concatenate([noise(0, 1.0, RATE, rms=0.3), np.zeros(9 * RATE, np.float32)])
    data = mp3(wave, RATE, compression=0.2)
    counted = read_sound(data, RATE)
    first = next(at for at in (data.find(b"Info"), data.find(b"Xing")) if at >= 0)
    uncounted = data[:first] + b"\0\0\0\0" + data[first + 4 :]
    with soundfile.SoundFile(io.BytesIO(uncounted)) as file:
        assert file.frames < 5 * RATE
    assert abs(len(read_sound(uncounted, RATE)) - len(counted)) < 4 * 1152
    assert len(counted) == 10 * RATE
    # With a tag of the old kind behind it, from a file, and in pieces.
    end = len(read_sound(uncounted + b"TAG" + bytes(125), RATE))
    assert end == len(read_sound(uncounted, RATE))
    assert len(read_sound(uncounted, RATE, start_s=8)) == end - 8 * RATE
    assert len(read_crop(uncounted, RATE, RATE, 0.999)) == RATE
    with pytest.raises(BadSound, match=r"^empty: no samples$"):
        read_sound(uncounted, RATE, start_s=30)


def test_a_piece_of_an_mp3_at_a_low_bit_rate_keeps_what_frames_share():
    data = mp3(noise(0, 8.0, RATE), RATE, mode="CONSTANT", compression=0.9)
    whole = read_sound(data, RATE)
    for start_s in (1.0, 3.3, 6.7):
        first = round(start_s * RATE)
        piece = read_sound(data, RATE, start_s=start_s, duration_s=0.5)
        assert np.abs(piece - whole[first : first + 8000]).max() < 1e-6


def test_a_rate_that_cannot_be_true_is_refused_before_it_costs_memory(tmp_path):
    (tmp_path / "x.wav").write_bytes(encode(tone(300, 60, 1000), 1, "WAV", "PCM_U8"))
    rule = r"its sample rate must be 1000 Hz or more, got 1 Hz"
    tracemalloc.start()
    try:
        for read in (
            lambda: read_sound(tmp_path / "x.wav", RATE),
            lambda: read_crop(tmp_path / "x.wav", RATE, RATE, 0.5),
        ):
            with pytest.raises(BadSound, match=f"^unreadable: {rule}$"):
                read()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_file_that_ends_early_between_two_looks_is_named(monkeypatch, tmp_path: Path):
    """A recorder may still write it, or a copy may be under way."""
    (tmp_path / "x.wav").write_bytes(encode(noise(0, 2.0, RATE), RATE, "WAV", "FLOAT"))

    def starts(length: int) -> list[int]:
        with (tmp_path / "x.wav").open("rb+") as file:
            file.truncate(4 * RATE)
        return [length - 100]

    with pytest.raises(BadSound, match=r"^unreadable: (damaged|truncated|it ends)"):
        list(read_pieces(tmp_path / "x.wav", RATE, 100, starts))


def test_what_lies_before_a_piece_is_not_held(monkeypatch):
    """A minute of a format that is read forward: 3.8 MB before its last second."""
    monkeypatch.setattr(waveform, "_KEPT", 1000)
    monkeypatch.setattr(sound_file, "_BLOCK", 2**14)
    data = encode(noise(0, 60.0, RATE), RATE, "WAV", "IMA_ADPCM")
    tracemalloc.start()
    try:
        assert len(read_crop(data, RATE, RATE, 0.999)) == RATE
        assert tracemalloc.get_traced_memory()[1] < 2**20 + len(data)
    finally:
        tracemalloc.stop()
