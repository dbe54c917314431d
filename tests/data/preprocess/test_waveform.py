"""One file -> one waveform: formats, rates, pieces, and what cannot be used."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from flap_fast.data.preprocess.waveform import BadSound, Unread, crop, fill, read_sound
from tests.sounds import chirp, encode, noise, tone

RATE = 16_000


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_file_gives_its_samples_from_disk_and_from_memory(tmp_path, format):
    wave = chirp(200, 2000, 0.8, RATE)
    data = encode(wave, RATE, format)
    (tmp_path / "x").write_bytes(data)
    read = read_sound(data, RATE)
    assert read.dtype == np.float32
    assert read.flags.c_contiguous
    # 16 bits for WAV and FLAC; Vorbis and MP3 are lossy.
    limit = 2**-15 if format in ("WAV", "FLAC") else 0.05
    assert np.abs(read[: len(wave)] - wave).max() <= limit
    assert (read_sound(tmp_path / "x", RATE) == read).all()


def test_channels_are_averaged():
    left, right = tone(300, 0.5, RATE), noise(0, 0.5, RATE)
    data = encode(np.stack([left, right], 1), RATE, "WAV", "FLOAT")
    assert np.abs(read_sound(data, RATE) - (left + right) / 2).max() < 1e-7


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_another_rate_is_resampled_and_a_tone_stays_that_tone(rate):
    read = read_sound(encode(tone(500, 1.0, rate), rate, "WAV", "FLOAT"), RATE)
    assert abs(len(read) - RATE) <= 1
    inside = slice(1000, 15_000)
    assert np.abs(read[inside] - tone(500, 1.0, RATE)[inside]).max() < 1e-3


def test_what_the_new_rate_cannot_hold_is_removed():
    read = read_sound(encode(tone(12_000, 1.0, 48_000), 48_000, "WAV", "FLOAT"), RATE)
    assert np.abs(read[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize(
    ("start_s", "duration_s", "first", "last"),
    [
        (0.25, 0.5, 4000, 12_000),
        (0.5, None, 8000, 16_000),
        (0.0, 0.07, 0, 1120),
        (0.0001, 0.0001, 2, 4),  # 1.6 samples, to the nearest
        (0.5, 99.0, 8000, 16_000),
    ],
)
def test_a_piece_is_cut_out_to_the_sample(format, start_s, duration_s, first, last):
    data = encode(noise(1, 1.0, RATE), RATE, format)
    whole = read_sound(data, RATE)
    piece = read_sound(data, RATE, start_s=start_s, duration_s=duration_s)
    assert len(piece) == last - first
    assert (piece == whole[first:last]).all()


FLAC = encode(noise(2, 1.0, RATE), RATE)


TONE = tone(500, 0.1, RATE)
INTEGERS = np.float32(32_767) * TONE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: the file has no bytes; fetch it again"),
        (bytes(1000), "unreadable: Format not recognised."),
        (b"<html>404 Not Found</html>", "unreadable: Format not recognised."),
        (FLAC[: len(FLAC) // 2], "unreadable: truncated, .*"),
        (FLAC[:9000] + bytes(len(FLAC) - 9000), "unreadable: .*"),
        (encode(noise(2, 1.0, RATE), RATE, "OGG")[:6000], "unreadable: truncated, .*"),
        (encode(noise(2, 1.0, RATE)[:0], RATE, "WAV"), "empty: no samples"),
        (encode(noise(2, 1.0, RATE)[:1], 48_000, "WAV"), "empty: no samples"),
        (encode(np.full(100, np.nan), RATE, "WAV", "FLOAT"), "unreadable: samples are not finite"),
        (encode(INTEGERS, RATE, "WAV", "FLOAT"), r"unreadable: .*, got 9830.1; divide 16-bit .*"),
        (
            encode(INTEGERS[:, None] * [1, 1], 8000, "AU", "DOUBLE"),
            "unreadable: .*, got 9830.1; .*",
        ),
        (encode(INTEGERS.astype(np.int32), RATE, "WAV", "PCM_32"), "unreadable: .* 16-bit ones"),
        (encode(TONE[:, None] * [1, -1], RATE, "WAV"), "unreadable: .* cancel out, .* one of them"),
        (encode(TONE[:, None] * [1, -1], 48_000, "FLAC"), "unreadable: .* cancel out, .*"),
        (encode(np.full(100, np.inf), 8000, "WAV", "FLOAT"), "unreadable: samples are not finite"),
    ],
)
def test_a_sound_that_cannot_be_used_says_why(data, reason):
    with pytest.raises(BadSound, match=f"^{reason}$"):
        read_sound(data, RATE)


def promising(frames: int) -> bytes:
    """`FLAC` with another number of frames in its header; 0 is for one that is not known."""
    data = bytearray(FLAC)
    data[21] = data[21] & 0xF0 | frames >> 32
    data[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("frames", [0, 2**36 - 1])
def test_a_header_with_a_wrong_length_costs_no_memory_and_no_sample(tmp_path, frames):
    (tmp_path / "x.flac").write_bytes(promising(frames))
    for source in (promising(frames), tmp_path / "x.flac"):
        assert (read_sound(source, RATE) == read_sound(FLAC, RATE)).all()
        assert len(read_sound(source, RATE, duration_s=0.5)) == RATE // 2


@pytest.mark.parametrize("format", ["WAV", "MP3"])
def test_a_long_sound_is_read_block_by_block_to_the_sample(monkeypatch, format):
    data = encode(noise(3, 1.0, RATE), RATE, format)
    whole = read_sound(data, RATE)
    monkeypatch.setattr("flap_fast.data.preprocess.sound_file._BLOCK", 1000)
    assert (read_sound(data, RATE) == whole).all()
    piece = read_sound(data, RATE, start_s=0.25, duration_s=0.5)
    # MP3's filters round in another order from another frame on.
    limit = 1e-7 if format == "MP3" else 0
    assert np.abs(piece - whole[RATE // 4 : 3 * RATE // 4]).max() <= limit


def test_a_piece_after_the_end_is_empty():
    with pytest.raises(BadSound, match=r"^empty: no samples$"):
        read_sound(FLAC, RATE, start_s=1.5)


def test_a_missing_file_and_a_folder_are_not_sounds(tmp_path):
    """Nor is a name that no file system takes."""
    for path in (tmp_path / "no.wav", tmp_path, tmp_path / f"{'n' * 300}.wav"):
        with pytest.raises(BadSound, match=r"^missing: no such file$"):
            read_sound(path, RATE)


def test_samples_without_a_header_are_no_sound(tmp_path):
    (tmp_path / "x.raw").write_bytes(bytes(1000))
    with pytest.raises(BadSound, match=r"^unreadable: "):
        read_sound(tmp_path / "x.raw", RATE)


def test_a_crop_begins_where_it_is_told_and_never_ends_outside():
    wave = np.arange(10)
    assert crop(wave, 4, 0.0).tolist() == [0, 1, 2, 3]
    assert crop(wave, 4, 0.5).tolist() == [3, 4, 5, 6]  # floor(0.5 * 7)
    assert crop(wave, 4, 1 - 2**-24).tolist() == [6, 7, 8, 9]
    assert crop(wave, 10, 0.9).tolist() == crop(wave, 20, 0.9).tolist() == wave.tolist()


def test_every_start_of_a_crop_is_as_likely_as_any_other():
    starts = [crop(np.arange(11), 4, where)[0] for where in (np.arange(8000) + 0.5) / 8000]
    assert np.bincount(starts).tolist() == [1000] * 8


@pytest.mark.parametrize(
    ("length", "filling", "filled"),
    [
        (3, "repeatpad", [1, 2, 3, 1, 2, 3, 0, 0]),
        (3, "repeat", [1, 2, 3, 1, 2, 3, 1, 2]),
        (3, "pad", [1, 2, 3, 0, 0, 0, 0, 0]),
        (4, "repeatpad", [1, 2, 3, 4, 1, 2, 3, 4]),
        (4, "repeat", [1, 2, 3, 4, 1, 2, 3, 4]),
        (5, "repeatpad", [1, 2, 3, 4, 5, 0, 0, 0]),
        (5, "repeat", [1, 2, 3, 4, 5, 1, 2, 3]),
        (7, "pad", [1, 2, 3, 4, 5, 6, 7, 0]),
        (8, "repeatpad", [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, "repeatpad", [1] * 8),
    ],
)
def test_a_short_clip_is_filled_as_the_toolkit_fills_it(length, filling, filled):
    assert fill(np.arange(1, length + 1), 8, filling).tolist() == filled


def test_demo_sounds_are_read(tmp_path):
    demo = Path(__file__).parents[3] / "demo/audio"
    for file in sorted(demo.iterdir())[::60]:
        wave = read_sound(file, RATE)
        assert len(wave) > 400
        assert 1e-3 < np.abs(wave).max() < 1.5


def test_what_the_system_does_not_let_us_read_is_told_apart(tmp_path: Path):
    """Another time it may: no content was judged."""
    file, none = tmp_path / "a.wav", tmp_path / "none.wav"
    file.write_bytes(encode(tone(300, 0.1, 16_000), 16_000, "WAV"))
    none.write_bytes(b"no sound")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # "too many open files"
    try:
        with pytest.raises(Unread, match=r"unreadable: .*open files"):
            read_sound(file, 16_000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(read_sound(file, 16_000)) == 1600
    with pytest.raises(Unread, match="missing: no such file"):
        read_sound(tmp_path / "nowhere.wav", 16_000)
    with pytest.raises(BadSound) as error:
        read_sound(none, 16_000)
    assert not isinstance(error.value, Unread)


def test_samples_beyond_full_scale_are_read_up_to_twelve_decibels():
    data = encode(np.float32(3.9 / 0.3) * TONE, RATE, "WAV", "FLOAT")
    assert 3.8 < np.abs(read_sound(data, RATE)).max() <= 3.9


def test_silence_and_quiet_channels_are_read():
    """A channel may be empty, a sound may begin with silence, and so may one of 32 bits."""
    silent = np.zeros(RATE, np.float32)
    for wave in (silent, np.concatenate([silent, TONE])):
        for subtype in ("PCM_16", "PCM_32", "FLOAT"):
            stereo = wave[:, None] * [1, 0]
            assert len(read_sound(encode(stereo, RATE, "WAV", subtype), RATE)) == len(wave)
