"""What an exported folder's program reads of sounds whose headers do not say how long they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flap_fast.data.preprocess.sound_file import open_sound
from flap_fast.interchange.to_onnx.embed import _read_sound
from tests.data.preprocess.test_sound_file import mp3
from tests.data.preprocess.test_sound_formats import piped
from tests.sounds import encode, noise

RATE = 16_000
WAVE = noise(0, 0.7, RATE)


def uncounted_mp3(tag: bytes = b"") -> bytes:
    """An MP3 whose first frame is loud, so large, and that does not count its frames."""
    wave = np.concatenate([noise(0, 1.0, RATE, rms=0.3), np.zeros(9 * RATE, np.float32)])
    counted = mp3(wave, RATE, compression=0.2)
    at = max(counted.find(b"Info"), counted.find(b"Xing"))
    return tag + counted[:at] + bytes(4) + counted[at + 4 :]


SOUNDS = {
    "mp3": lambda: encode(WAVE, RATE, "MP3"),
    "uncounted.mp3": uncounted_mp3,
    "tagged.mp3": lambda: uncounted_mp3(b"ID3\3\0\0" + bytes([0, 0, 1, 2]) + bytes(130)),
    "piped.flac": lambda: piped(encode(WAVE, RATE)),
    "gsm.wav": lambda: encode(WAVE, RATE, "WAV", "GSM610"),
    "opus.ogg": lambda: encode(WAVE, RATE, "OGG", "OPUS"),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_the_program_reads_a_sound_whole_whatever_its_header_says(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(SOUNDS[name]())
    with open_sound(tmp_path / name) as sound:
        wanted = np.concatenate(list(sound.mono_blocks(2**40)))
    _, found = _read_sound(tmp_path / name, {"sample_rate_hz": RATE})
    assert np.array_equal(found[0], wanted)


def test_the_program_refuses_a_sound_that_ends_before_its_header_says(tmp_path: Path):
    ogg = encode(noise(0, 9, RATE), RATE, "OGG")
    half = len(ogg) // 2
    (tmp_path / "a.ogg").write_bytes(ogg[:half] + b"xx" + ogg[half + 2 :])
    with pytest.raises(ValueError, match=r"^unreadable: truncated, its header says 144000 samples"):
        _read_sound(tmp_path / "a.ogg", {"sample_rate_hz": RATE})
