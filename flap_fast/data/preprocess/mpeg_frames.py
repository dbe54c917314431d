"""The frames of an MP3 (MPEG audio, all layers): how many its first one says, how many there are.

Source: ISO/IEC 11172-3 and 13818-3, 2.4.1.3; the Xing, Info and VBRI tags as LAME and Fraunhofer
write them.
"""

from __future__ import annotations

import os
import re
from typing import BinaryIO

# kbit/s by the header's index, for layers 1 to 3 of MPEG 1, then of MPEG 2 and 2.5.
_KBITS = (
    (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_HZ = (44_100, 48_000, 32_000)
_BLOCK = 2**20
# Bytes that might begin a frame, and do not, after which no more are counted: noise, not sound.
_MOST_LOST = 2**16


def is_mpeg(file: BinaryIO) -> bool:
    """Whether a file begins with a frame, maybe behind tags."""
    file.seek(first_frame(file))
    head = file.read(4)
    return len(head) == 4 and frame_bytes(head) > 0


def counted_frames(file: BinaryIO) -> tuple[int, int] | None:
    """The offset of the first frame's tag and the count in it; None without a count."""
    start = first_frame(file)
    file.seek(start)
    head = file.read(4096)
    tag = re.search(b"Xing|Info|VBRI", head)
    if tag is None:
        return None
    flags, at = head[tag.end() : tag.end() + 4], tag.end() + (10 if tag[0] == b"VBRI" else 4)
    if tag[0] != b"VBRI" and not (len(flags) == 4 and flags[3] & 1):
        return None
    return start + tag.start(), int.from_bytes(head[at : at + 4], "big")


def first_frame(file: BinaryIO) -> int:
    """The offset after the ID3v2 tags at the begin."""
    at = 0
    while True:
        file.seek(at)
        tag = file.read(10)
        if len(tag) < 10 or not tag.startswith(b"ID3"):
            return at
        # The length of what follows, in four bytes of seven bits.
        at += 10 + sum((byte & 0x7F) << 7 * (3 - n) for n, byte in enumerate(tag[6:10]))


def count_frames(file: BinaryIO) -> int:
    """The number of whole frames, that of the tag included."""
    size = file.seek(0, os.SEEK_END)
    at, frames, alike = first_frame(file), 0, None
    base, data, lost = at, b"", 0
    while at + 4 <= size and lost < _MOST_LOST:
        if at + 4 > base + len(data):
            file.seek(at)
            base, data = at, file.read(_BLOCK)
        head = data[at - base : at - base + 4]
        length = frame_bytes(head)
        # A frame is of the first one's version, layer and rate.
        same = (head[1] & 0xFE, head[2] & 0x0C)
        if not length or (alike or same) != same:
            found = data.find(b"\xff", at - base + 1)
            at = base + (len(data) if found < 0 else found)
            lost += 1
            continue
        alike = same
        frames += at + length <= size
        at += length
    return frames


def frame_bytes(head: bytes) -> int:
    """A frame's length by its four bytes of header; 0 where this is none."""
    if head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    index, rate, pad = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or index in (0, 15) or rate == 3:
        return 0
    first = version == 3
    hz = _HZ[rate] >> (0 if first else 1 if version == 2 else 2)
    bits = 1000 * _KBITS[layer - 1 + (0 if first else 3)][index]
    if layer == 1:
        return (12 * bits // hz + pad) * 4
    return (144 if first or layer == 2 else 72) * bits // hz + pad


def frame_samples(file: BinaryIO) -> int:
    """The samples of the first frame."""
    file.seek(first_frame(file))
    version, layer = (code := file.read(2)[1]) >> 3 & 3, 4 - (code >> 1 & 3)
    return 384 if layer == 1 else 1152 if layer == 2 or version == 3 else 576
