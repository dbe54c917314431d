"""What DALI is given of a sound: its bytes, or those of a WAV where DALI cannot decode them.

DALI decodes FLAC, WAV of whole numbers and Vorbis. Others (MP3, AAC, ADPCM, ...), and those with a
header that says another length or none (a FLAC from a pipe), are decoded by the reference; so are
floats and 32-bit integers, whose scale it checks.
"""

from __future__ import annotations

import io
import struct

import soundfile

from flap_fast.data.preprocess.sound_file import open_sound
from flap_fast.data.preprocess.sound_header import mended
from flap_fast.data.preprocess.unusable import Unusable
from flap_fast.data.preprocess.waveform import read_sound

_DEPTHS = (8, 16, 24)


def dali_input(clip: bytes) -> bytes:
    """A clip's bytes as DALI can decode them; none of a clip that cannot be used."""
    try:
        if _is_decoded(clip):
            return clip
        with open_sound(clip) as file:
            rate = file.samplerate
        out = io.BytesIO()
        soundfile.write(out, read_sound(clip, rate), rate, format="WAV", subtype="FLOAT")
    except Unusable:
        return b""  # DALI refuses it at its batch's turn
    return out.getvalue()


def _is_decoded(clip: bytes) -> bool:
    """Whether DALI decodes a clip to its end; raises `BadSound` for a truncated one."""
    magic = clip[:4]
    if magic == b"fLaC":
        known = int.from_bytes(clip[21:26], "big") & 2**36 - 1 > 0
    elif magic == b"RIFF":
        at = clip.find(b"fmt ", 12, 4096)
        if at < 0 or len(clip) < at + 34:
            return False
        tag, depth = struct.unpack_from("<H12xH", clip, at + 8)
        tag = struct.unpack_from("<H", clip, at + 32)[0] if tag == 0xFFFE else tag
        known = tag == 1 and depth in _DEPTHS
    else:
        known = magic == b"OggS" and b"\x01vorbis" in clip[:64]
    return known and not mended(io.BytesIO(clip))
