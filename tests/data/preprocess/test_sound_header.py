"""Headers that say another length than the file has: all of it is read, or the file is named."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import time

import numpy as np
import pytest
import soundfile

from flap_fast.data.preprocess.mpeg_frames import count_frames, counted_frames
from flap_fast.data.preprocess.sound_file import _mended, sound_seconds
from flap_fast.data.preprocess.waveform import BadSound, read_crop, read_sound
from tests.sounds import encode, noise

RATE = 16_000
WAVE = noise(0, 2.0, RATE)
CHUNKED = {"WAV": "<I", "WAVEX": "<I", "AIFF": ">I", "CAF": ">Q", "SVX": ">I"}


def sizes(format: str, subtype: str | None = "PCM_16") -> tuple[bytes, int, str]:
    """A file, the offset of its sound's size, and the size's form."""
    data = encode(WAVE, RATE, format, subtype)
    if format == "AU":
        return data, 8, ">I"
    if format == "RF64":
        return data, data.index(b"ds64") + 16, "<Q"
    if format == "W64":
        return data, data.index(b"data", 40) + 16, "<Q"
    name = {"AIFF": b"SSND", "SVX": b"BODY"}.get(format, b"data")
    return data, data.index(name) + 4, CHUNKED[format]


def with_size(format: str, size: int, subtype: str | None = "PCM_16") -> bytes:
    """The file, saying that its sound takes `size` bytes."""
    data, at, form = sizes(format, subtype)
    limit = 2 ** (8 * struct.calcsize(form))
    return data[:at] + struct.pack(form, size % limit) + data[at + struct.calcsize(form) :]


FORMATS = [*CHUNKED, "AU", "RF64", "W64"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0, -1])
def test_a_sound_of_unknown_size_is_read_to_its_end(tmp_path, format, size):
    if format == "CAF" and size == 0:
        size = 4  # the count of edits is no sound
    if format == "SVX" and size == 0:
        pytest.skip("says 0 samples, and another chunk says how many")
    data = with_size(format, size)
    (tmp_path / "x").write_bytes(data)
    right = read_sound(encode(WAVE, RATE, "WAV"), RATE)
    for source in (data, tmp_path / "x"):
        assert np.array_equal(read_sound(source, RATE), right)
        assert len(read_sound(source, RATE, start_s=1.5)) == RATE // 2
        assert len(read_crop(source, RATE, 1000, 0.99)) == 1000
        assert sound_seconds(source) == 2.0


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**32 - 37, 0x7FFFF000])
def test_sizes_that_pipes_write_are_unknown(size):
    assert len(read_sound(with_size("WAV", size), RATE)) == len(WAVE)
    assert len(read_sound(with_size("WAV", size, "IMA_ADPCM"), RATE)) >= len(WAVE)


@pytest.mark.parametrize("format", [*FORMATS, "OGG", "MP3", "NIST", "VOC"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_named(tmp_path, format, kept):
    data = encode(WAVE, RATE, format)
    (tmp_path / "x").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(BadSound, match=r"truncated, its header says .*, got .*; fetch it again"):
        read_sound(tmp_path / "x", RATE)
    with pytest.raises(BadSound, match="unreadable: truncated"):
        read_crop(data[: int(kept * len(data))], RATE, 1000, 0.0)


@pytest.mark.parametrize("format", ["NIST", "VOC"])
@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "ULAW", "ALAW"])
@pytest.mark.parametrize("channels", [1, 2])
def test_whole_files_of_formats_without_chunks_are_read(format, subtype, channels):
    if not soundfile.check_format(format, subtype):
        pytest.skip("no such encoding")
    wave = np.repeat(WAVE[:, None], channels, 1)
    read = read_sound(encode(wave, 8000, format, subtype), 8000)  # a rate that VOC can say
    assert len(read) - len(WAVE) in (0, 1)  # libsndfile takes VOC's end mark for a sample


@pytest.mark.parametrize("format", sorted({*FORMATS} - {"AU"}))
def test_a_file_that_goes_on_after_its_sound_is_named(format):
    reason = "its header says .* bytes of sound, after which it has bytes that are no chunk"
    with pytest.raises(BadSound, match=reason):
        read_sound(with_size(format, 1024), RATE)


def test_au_has_no_chunks_and_is_read_to_its_end():
    assert len(read_sound(with_size("AU", 1000), RATE)) == len(WAVE)


@pytest.mark.parametrize(
    "after",
    [
        b"LIST\x04\0\0\0abcd",
        b"TAG" + bytes(125),
        b"ID3\x04" + bytes(20),
        bytes(500),
        b"\x01\x02\x03",
    ],
)
def test_chunks_tags_and_padding_after_a_sound_are_no_sound(after):
    data = encode(WAVE, RATE, "WAV")
    assert len(read_sound(data + after, RATE)) == len(WAVE)
    odd = encode(WAVE[:1001], RATE, "WAV", "PCM_U8")
    assert len(read_sound(odd + after, RATE)) == 1001


@pytest.mark.parametrize("format", ["WAV", "AIFF", "W64", "OGG"])
def test_two_files_in_one_are_named(format):
    with pytest.raises(BadSound, match="after which it has"):
        read_sound(encode(WAVE, RATE, format) + encode(-WAVE, RATE, format), RATE)


@pytest.mark.parametrize("samples", [500, len(WAVE)])
def test_two_flacs_in_one_are_named(tmp_path, samples):
    data = encode(WAVE, RATE) + encode(WAVE[:samples], RATE)
    (tmp_path / "x.flac").write_bytes(data)
    for source in (data, tmp_path / "x.flac"):
        with pytest.raises(BadSound, match="must be one FLAC, another one follows it; split"):
            read_sound(source, RATE)


@pytest.mark.parametrize("samples", [0, 1, 1000, 31_999, 32_001, 2**36 - 1])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_flac_with_a_wrong_number_of_samples_is_read_whole(samples, level):
    data = bytearray(encode(level * WAVE, RATE))
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    assert np.array_equal(
        read_sound(bytes(data), RATE), read_sound(encode(level * WAVE, RATE), RATE)
    )
    assert len(read_crop(bytes(data), RATE, 1000, 0.999)) == 1000


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 44_101, 48_000, 96_000])
@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_a_flac_cut_between_two_frames_is_named(rate, subtype):
    data = encode(np.stack([noise(0, 1.0, rate), noise(1, 1.0, rate)], 1), rate, "FLAC", subtype)
    assert len(read_sound(data, rate)) == rate
    frames = [found.start() for found in re.finditer(rb"\xff\xf8", data)]
    with pytest.raises(BadSound, match=f"truncated, its header says {rate} samples|lost sync"):
        read_sound(data[: frames[-1]], rate)


def mp3(**options) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, format="MP3", **options) as f:
        f.write(WAVE)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("frames", [0, 1, 10])
def test_an_mp3_with_too_small_a_count_is_read_to_its_end(mode, frames):
    data = mp3(bitrate_mode=mode)
    counted = counted_frames(io.BytesIO(data))
    assert counted is not None
    at, right = counted
    assert count_frames(io.BytesIO(data)) == right + 1  # and the tag's own
    wrong = data[: at + 8] + frames.to_bytes(4, "big") + data[at + 12 :]
    assert len(read_sound(wrong, RATE)) >= len(WAVE)
    assert abs(sound_seconds(wrong) - 2.0) < 0.2
    assert len(read_sound(data, RATE)) == len(WAVE)


@pytest.mark.parametrize("at", [6, 5000])
def test_an_mp3_of_which_libsndfile_finds_less_than_its_frames_hold_is_named(at):
    """By a byte of the first frame, it estimates the length; after a gap, it may end."""
    data = bytearray(mp3(bitrate_mode="VARIABLE"))
    data[at : at + (1 if at < 100 else 2000)] = bytes([255])
    with pytest.raises(BadSound, match=r"unreadable: (damaged|truncated), its header says"):
        read_sound(bytes(data), RATE)


def test_two_mp3s_in_one_are_read_to_the_end():
    assert len(read_sound(2 * mp3(), RATE)) >= 2 * len(WAVE)


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("compression", [0.0, 0.5, 0.9])
def test_frames_of_each_rate_are_counted(rate, compression):
    file = io.BytesIO()
    options = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": compression}
    with soundfile.SoundFile(file, "w", rate, 1, **options) as f:
        f.write(noise(0, 1.0, rate))
    counted = counted_frames(file)
    assert counted is not None
    assert count_frames(file) == counted[1] + 1


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("damage", ["zeros", "a flipped byte", "a gap"])
@pytest.mark.parametrize("seconds", [3, 8])
def test_an_ogg_with_a_lost_page_is_named(subtype, damage, seconds):
    """libsndfile goes on after it without a word."""
    data = bytearray(encode(noise(0, seconds, RATE), RATE, "OGG", subtype))
    assert len(read_sound(bytes(data), RATE)) == seconds * RATE
    middle = len(data) // 2
    if damage == "zeros":
        data[middle : middle + 500] = bytes(500)
    elif damage == "a gap":
        del data[middle : middle + 3000]
    else:
        data[middle] ^= 255
    for read in (read_sound, lambda data, rate: read_crop(data, rate, 1000, 0.1)):
        with pytest.raises(BadSound, match=r"unreadable: damaged, no whole page at byte [0-9]+; "):
            read(bytes(data), RATE)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_with_a_tag_after_it_is_read_and_a_lost_header_of_a_page_is_named(subtype):
    data = encode(noise(0, 3.0, RATE), RATE, "OGG", subtype)
    assert len(read_sound(data + b"TAG" + bytes(125), RATE)) == 3 * RATE
    page = data.index(b"OggS", 1000)
    with pytest.raises(BadSound, match=f"unreadable: damaged, no whole page at byte {page}; "):
        read_sound(data[:page] + bytes(4) + data[page + 4 :], RATE)


def test_spoilt_headers_are_read_or_named_and_raise_nothing_else():
    """Bytes changed, cut off and put in; none takes long, whatever sizes it claims."""
    random = np.random.default_rng(0)
    whole = [encode(WAVE[:4000], RATE, format) for format in (*FORMATS, "FLAC", "OGG", "MP3")]
    for n in range(3000):
        data = bytearray(whole[n % len(whole)])
        for at in random.integers(0, 200, 3):
            data[at] = (0, 255, int(random.integers(256)))[random.integers(3)]
        cut = len(data) if n % 3 else int(random.integers(8, len(data)))
        with contextlib.suppress(BadSound):
            _mended(io.BytesIO(bytes(data[:cut])))


def test_a_size_below_0_in_a_header_is_named_without_a_traceback():
    """cffi prints an error of a file's `seek`; pytest fails on it."""
    data = bytearray(encode(WAVE, RATE, "AIFF", "PCM_16"))
    for at in range(4, 80, 2):
        for size in (2**32 - 1, 2**31, 2**31 - 1):
            with contextlib.suppress(BadSound):
                read_sound(bytes(data[:at] + struct.pack(">I", size) + data[at + 4 :]), RATE)


@pytest.mark.parametrize(
    "data",
    [
        b"RIFF\0\0\0\0WAVE" + bytes(10**7),
        b"caff\0\1\0\0" + bytes(10**7),
        mp3() + b"\xff" * 10**7,
    ],
)
def test_a_file_of_zeros_or_noise_is_not_searched_for_long(data):
    start = time.monotonic()
    _mended(io.BytesIO(data))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["AVR", "MAT4", "MAT5", "MPC2K", "WVE"])
def test_a_sound_of_a_rare_format_that_is_cut_is_named(kind: str, channels: int):
    rate = 8000 if kind == "WVE" else RATE
    try:
        data = encode(np.tile(WAVE[:rate, None], channels), rate, kind)
    except soundfile.LibsndfileError:
        pytest.skip(f"{kind} has no {channels} channels")
    assert sound_seconds(data) == 1
    with pytest.raises(BadSound, match=f"truncated, its header says {rate} samples, got"):
        sound_seconds(data[: len(data) * 6 // 10])
