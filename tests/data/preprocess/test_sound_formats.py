"""Formats: ffmpeg's where it is installed, and what goes past DALI to the reference reader."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from flap_fast.config import Config, Frontend
from flap_fast.data.batch import EncodedBatch
from flap_fast.data.preprocess.audio import AudioPreprocessor
from flap_fast.data.preprocess.dali_input import dali_input
from flap_fast.data.preprocess.waveform import BadSound, read_sound
from flap_fast.encoders.vit.settings import ViTSettings
from flap_fast.preparation.sources.layout import Clips
from flap_fast.ranks import Ranks
from flap_fast.tools.search import find_sounds
from tests.sounds import encode, noise, tone

RATE = 16_000
WAVE = noise(0, 1.0, RATE)
M4A = b"\0\0\0\x20ftypM4A " + bytes(100)
HEADS = {
    "m4a": M4A,
    "webm": b"\x1a\x45\xdf\xa3" + bytes(100),
    "wma": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(100),
    "aac": b"\xff\xf1\x50\x80" + bytes(100),
    "amr": b"#!AMR\n" + bytes(100),
    "oga": b"OggS\0\2" + bytes(20) + b"\1\x33\x7fFLAC\1\0" + bytes(100),
    "tagged.aac": b"ID3\4\0\0\0\0\1\0" + bytes(128) + b"\xff\xf1\x50\x80" + bytes(100),
}


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch) -> Path:
    """A command that writes a known WAV, or fails as ffmpeg does where the input says so."""
    wav = tmp_path / "known.wav"
    wav.write_bytes(encode(WAVE, RATE, "WAV"))
    command = tmp_path / "bin" / "ffmpeg"
    command.parent.mkdir()
    command.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "given = sys.argv[sys.argv.index('-i') + 1].removeprefix('file:')\n"
        "if b'broken' in open(given, 'rb').read(): sys.exit('moov atom not found')\n"
        "says = b'damaged' in open(given, 'rb').read()\n"
        "says and print('[aac @ 0x5a] [dec:aac @ 0x5b] partial file\\nmore', file=sys.stderr)\n"
        f"shutil.copy({str(wav)!r}, sys.argv[-1].removeprefix('file:'))\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent))
    return wav


@pytest.mark.parametrize("ending", HEADS)
def test_without_ffmpeg_its_formats_are_named_with_the_remedy(tmp_path, monkeypatch, ending):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / f"x.{ending}").write_bytes(HEADS[ending])
    reason = "needs the command ffmpeg, which is not installed; install it, or convert .* to FLAC"
    for source in (tmp_path / f"x.{ending}", HEADS[ending]):
        with pytest.raises(BadSound, match=reason):
            read_sound(source, RATE)


def test_with_ffmpeg_they_are_read(tmp_path, ffmpeg):
    (tmp_path / "x.m4a").write_bytes(M4A)
    for source in (tmp_path / "x.m4a", M4A):
        assert np.array_equal(read_sound(source, RATE), read_sound(ffmpeg, RATE))
        assert len(read_sound(source, RATE, start_s=0.5)) == RATE // 2
    with pytest.raises(BadSound, match="of which ffmpeg says: moov atom not found"):
        read_sound(M4A + b"broken", RATE)


def test_what_ffmpeg_reads_in_part_is_named(ffmpeg):
    """It decodes what there is of a truncated file, and ends with the status of success."""
    with pytest.raises(BadSound, match="of which ffmpeg says: partial file; fetch it again"):
        read_sound(M4A + b"damaged", RATE)


def test_ffmpeg_is_not_run_on_what_is_none_of_its_formats(ffmpeg):
    with pytest.raises(BadSound, match="Format not recognised"):
        read_sound(b"#EXTM3U\nhttp://example.org/x.ts", RATE)


def test_files_of_every_format_are_found(tmp_path, capsys):
    for name in ("a.m4a", "b.webm", "c.mp2", "d.wav", "e.aac", "notes.txt", "f.pdf", "g.pdf"):
        (tmp_path / name).write_bytes(b"x")
    assert [file.name[0] for file in find_sounds([tmp_path])] == ["a", "b", "c", "d", "e"]
    assert "3 files are no sounds by their endings: 2 .pdf, 1 .txt" in capsys.readouterr().err
    (tmp_path / "train.csv").touch()
    assert Clips(tmp_path).row("a", 0, 10, ())["audio"] == "a.m4a"
    assert "2 files are no sounds by their endings: 2 .pdf\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.sph", "x.voc", "x.bwf", "x.eac3"])
def test_what_is_read_is_found_by_its_ending(tmp_path, name):
    """NIST SPHERE as LDC publishes it, broadcast WAV, ..."""
    (tmp_path / name).write_bytes(b"x")
    assert find_sounds([tmp_path]) == [tmp_path / name]


def piped(flac: bytes) -> bytes:
    """A FLAC that does not say its number of samples."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


UNDECODED = {
    "mp3": encode(WAVE, RATE, "MP3"),
    "piped flac": piped(encode(WAVE, RATE)),
    "gsm": encode(WAVE, RATE, "WAV", "GSM610"),
    "adpcm": encode(WAVE, RATE, "WAV", "IMA_ADPCM"),
    "opus": encode(WAVE, RATE, "OGG", "OPUS"),
    "aiff": encode(WAVE, RATE, "AIFF"),
    "caf": encode(WAVE, RATE, "CAF"),
    "float": encode(WAVE, RATE, "WAV", "FLOAT"),
    "32 bits": encode(WAVE, RATE, "WAV", "PCM_32"),
    "unknown size": encode(WAVE, RATE, "WAV")[:40] + bytes(4) + encode(WAVE, RATE, "WAV")[44:],
}


@pytest.mark.parametrize("kind", UNDECODED)
def test_what_dali_cannot_decode_is_decoded_by_the_reference_in_the_same_run(kind):
    audio = ViTSettings(duration_s=1.0, frames=112)
    good = encode(WAVE, RATE)
    batches = [
        EncodedBatch([good, UNDECODED[kind]], np.zeros(2)),
        EncodedBatch([good], np.zeros(1)),
    ]

    def mels(backend: str) -> list[np.ndarray]:
        frontend = Frontend.model_validate({"backend": backend, "threads": 2})
        stream = AudioPreprocessor(Config(audio=audio, frontend=frontend), Ranks())
        return [media.stacked.numpy() for media in stream.stream(iter(batches), 2)]

    for theirs, ours in zip(mels("dali_wave"), mels("torch"), strict=True):
        assert np.abs(theirs - ours).max() < 1e-5


@pytest.mark.parametrize("format", ["FLAC", "WAV", "OGG"])
def test_what_dali_decodes_keeps_its_bytes(format):
    clip = encode(WAVE, RATE, format)
    assert dali_input(clip) is clip


def test_a_clip_that_cannot_be_used_has_no_bytes_for_dali():
    assert dali_input(encode(WAVE, RATE, "WAV")[:9000]) == b""
    assert dali_input(encode(tone(300, 1.0, RATE, 9000.0), RATE, "WAV", "FLOAT")) == b""
    assert dali_input(b"<html>") == b""
