"""What a sound file's header says of its length, compared with what follows.

libsndfile reads as much as a header says, or less if the file ends, without a word. Here such a
header is mended in what libsndfile is given, or the file is refused by name:

    size of the sound        unknown (0, -1, near 2**31 or 2**32, as pipes write): mended
    in WAV, RF64, W64,       more than there is: refused, as truncated
    AIFF, 8SVX, CAF, AU      less, and what follows is no chunk: refused; of AU, mended
    of NIST and VOC          more than there is: refused, as truncated
    FLAC's samples           the last frame's header says: more are read, fewer refused
    MP3's frames             counted: without a count or with too small a one, read to the end
    Ogg                      a page that ends early or is damaged, a second stream: refused

Only headers are read, of MP3 those of all frames; of Ogg all pages.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from flap_fast.data.preprocess.unusable import BadSound

Patches = dict[int, bytes]
"""Bytes to read at some offsets in place of those that are there."""

# Sizes this near to 2**31 or 2**32 are what writers to a pipe leave.
_NEAR = 2**16
# Zeros after the sound that are only padding.
_PADDING = 2**16
# A FLAC's smallest frame, in samples: if fewer are missing, its header is wrong.
_BLOCK = 16
# More than libFLAC reads ahead of what it decodes.
_AHEAD = 2**15
# Chunks looked through for the one with the samples.
_MOST_CHUNKS = 1000
# Types of VOC's blocks with samples.
_VOC_SOUNDS = (1, 9)
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICS")
_FILES = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff")


class _Chunks(NamedTuple):
    """A container of chunks."""

    first: int
    """Offset of the first one."""
    header: struct.Struct
    """Identifier and size."""
    sound: tuple[bytes, ...]
    """Identifiers of the chunk with the samples."""
    least: int = 0
    """The bytes of that chunk that are no samples."""
    counted: int = 0
    """The bytes of a chunk's header that its size counts."""
    aligned: int = 2


_RIFF = _Chunks(12, struct.Struct("<4sI"), (b"data",))
_CONTAINERS = {
    b"RIFF": _RIFF,
    b"RF64": _RIFF,
    b"RIFX": _RIFF._replace(header=struct.Struct(">4sI")),
    b"FORM": _Chunks(12, struct.Struct(">4sI"), (b"SSND", b"BODY"), least=8),
    b"caff": _Chunks(8, struct.Struct(">4sQ"), (b"data",), least=4, aligned=1),
    b"riff": _Chunks(40, struct.Struct("<16sQ"), (b"data",), counted=24, aligned=8),
}


def mended(file: BinaryIO) -> Patches:
    """What to change in a file for all of its sound to be read; {} where the header is right.

    Raises:
        BadSound: it ends before what its header says, or goes on after it.
    """
    magic = _at(file, 0, 4)
    size = file.seek(0, os.SEEK_END)
    check: Callable[[BinaryIO, int], Patches] | None = {
        b"fLaC": _flac,
        b"OggS": _ogg,
        b".snd": _au,
        b"NIST": _nist,
        b"Crea": _voc,
    }.get(magic, _chunks if magic in _CONTAINERS else None)
    try:
        return check(file, size) if check else {}
    except struct.error:  # too short to say anything
        return {}


def _chunks(file: BinaryIO, size: int) -> Patches:
    magic = _at(file, 0, 4)
    of = _CONTAINERS[magic]
    at, long_at = of.first, 0
    for _ in range(_MOST_CHUNKS):
        name, claim = of.header.unpack(_at(file, at, of.header.size))
        begin = at + of.header.size
        if name.startswith(of.sound):
            break
        if name == b"ds64":
            long_at = begin + 8
        at = begin + max(0, claim - of.counted)
        at += -(at - of.first) % of.aligned
    else:
        return {}  # zeros, or no sound file
    field, form = at + of.header.size - struct.calcsize("I"), of.header.format[0] + "I"
    unknown = 2**32 - 1
    if of.header.size > 8 or (magic == b"RF64" and long_at and claim == 2**32 - 1):
        form = of.header.format[0] + "Q"
        field, unknown = (at + of.header.size - 8, size - begin + of.counted)
        if magic == b"RF64":
            field = long_at
            (claim,) = struct.unpack(form, _at(file, field, 8))
    claim, there = max(0, claim - of.counted), size - begin
    if claim <= of.least:
        return {} if _is_end(file, begin + claim, of) else {field: struct.pack(form, unknown)}
    if claim > there:
        if form.endswith("I") and min(abs(claim - 2**31), 2**32 - claim) < _NEAR:
            return {}  # libsndfile reads to the end
        if claim >= 2**62:
            return {field: struct.pack(form, unknown)}
        raise _truncated(f"{claim} bytes of sound", f"{there} bytes")
    if not any(_is_end(file, begin + claim + pad, of) for pad in {0, -claim % of.aligned}):
        raise _longer(f"{claim} bytes of sound", "bytes that are no chunk")
    return {}


def _is_end(file: BinaryIO, at: int, of: _Chunks) -> bool:
    """Whether no sound is at `at`: the end, a chunk, a tag, padding."""
    rest = _at(file, at, _PADDING)
    if len(rest) < of.header.size or rest.startswith(_TAGS) or not any(rest):
        return len(rest) < _PADDING or any(rest)
    if rest.startswith(_FILES):
        return False
    name, claim = of.header.unpack(rest[: of.header.size])
    left = file.seek(0, os.SEEK_END) - at
    return all(32 <= byte < 127 for byte in name[:4]) and claim <= left


def _au(file: BinaryIO, size: int) -> Patches:
    begin, claim = struct.unpack(">II", _at(file, 4, 8))
    there = size - begin
    if there < claim < 2**32 - 1:
        raise _truncated(f"{claim} bytes of sound", f"{there} bytes")
    return {8: b"\xff" * 4} if claim < there else {}


def _nist(file: BinaryIO, size: int) -> Patches:
    head = _at(file, 0, 2**12).decode("latin-1").partition("end_head")[0]
    begin = re.match(r"NIST_1A\s+(\d{1,9})\s", head)
    said = dict(re.findall(r"^(\w+) -i (\d{1,18})\s", head, re.MULTILINE))
    if begin is None or ",embedded" in head:  # compressed: libsndfile refuses it
        return {}
    factors = [int(said.get(f, 0)) for f in ("sample_count", "channel_count", "sample_n_bytes")]
    claim, there = math.prod(factors), size - int(begin[1])
    if claim > there:
        raise _truncated(f"{claim} bytes of sound", f"{there} bytes")
    return {}


def _voc(file: BinaryIO, size: int) -> Patches:
    (at,) = struct.unpack("<H", _at(file, 20, 2))
    for _ in range(_MOST_CHUNKS):
        (block,) = struct.unpack("<I", _at(file, at, 4))
        at += 4 + (block >> 8)
        if block & 0xFF in _VOC_SOUNDS:
            if at > size:
                raise _truncated(f"a block up to byte {at}", f"{size} bytes")
            break
    return {}


def _flac(file: BinaryIO, size: int) -> Patches:
    """Source: RFC 9639, sections 8.2 and 9.1."""
    head = _at(file, 0, 42)
    if len(head) < 42 or head[4] & 0x7F:  # STREAMINFO, block type 0, comes first
        return {}
    block = int.from_bytes(head[10:12], "big")
    largest_frame = int.from_bytes(head[15:18], "big") or 2**16
    samples = int.from_bytes(head[21:26], "big") & 2**36 - 1
    if samples == 0:
        return {}
    window = min(size, largest_frame + 2**12)
    tail = _at(file, size - window, window)
    channels, ends = head[20] >> 1 & 7, []
    for found in re.finditer(rb"\xff[\xf8\xf9]", tail):
        end = _flac_frame_end(tail[found.start() :][:16], block, channels)
        if end == samples:
            return {}
        if end is not None:
            ends.append(end)
    if not ends:
        return {}
    if max(ends) + _BLOCK <= samples < 2**36 - 1:
        raise _truncated(f"{samples} samples", f"{max(ends)}")
    return {21: bytes([head[21] & 0xF0, 0, 0, 0, 0])}


def check_flac_end(file: BinaryIO) -> None:
    """Raise `BadSound` where another FLAC follows the one that was read up to the file's offset."""
    at = file.tell()
    around = _at(file, max(4, at - _AHEAD), 2 * _AHEAD)
    file.seek(at)
    if b"fLaC\0\0\0\x22" in around or b"fLaC\x80\0\0\x22" in around:
        raise BadSound("unreadable: it must be one FLAC, another one follows it; split the file")


def _flac_frame_end(head: bytes, block: int, channels: int) -> int | None:
    """The sample after a frame; None where no frame's header is."""
    if len(head) < 6 or head[3] & 1:
        return None
    code, rate, assigned = head[2] >> 4, head[2] & 15, head[3] >> 4
    if code == 0 or rate == 15:
        return None
    if channels != (1 if assigned > 7 else assigned) or assigned > 10:
        return None
    ones = 8 - (head[4] ^ 0xFF).bit_length()  # as in UTF-8, the bytes of the number
    number, at = head[4] & 0x7F >> ones, 4 + max(1, ones)
    for byte in head[5:at]:
        number = number << 6 | byte & 0x3F
    count = 2 if code == 7 else 1 if code == 6 else 0
    if count:
        length = int.from_bytes(head[at : at + count], "big") + 1
    else:
        length = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
    at += count + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    return number + length if head[1] & 1 else number * block + length


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    return crc


def _ogg(file: BinaryIO, size: int) -> Patches:
    """Source: RFC 3533, section 6."""
    at, begun = 0, False
    while at < size:
        head = _at(file, at, 27 + 255)
        if not head.startswith(b"OggS") or len(head) < 27:
            if b"OggS" in _at(file, at, _PADDING + 4):  # libogg goes on with the next page
                raise _damaged_page(at)
            return {}
        begins = bool(head[5] & 2)
        if begins and begun:
            raise _longer("one stream", "another Ogg stream")
        begun = begun or not begins
        begin, at = at, at + 27 + head[26] + sum(head[27 : 27 + head[26]])
        if at > size:
            raise _truncated(f"a page up to byte {at}", f"{size} bytes")
        page = _at(file, begin, at - begin)
        if _ogg_crc(page[:22] + bytes(4) + page[26:]) != page[22:26]:  # libogg leaves it out
            raise _damaged_page(begin)
    return {}


# zlib's CRC-32 takes the bits of a byte from the other end.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> bytes:
    """The checksum of a page as its header has it: CRC-32 that begins with 0."""
    crc = zlib.crc32(page.translate(_REVERSED), 2**32 - 1) ^ 2**32 - 1
    return crc.to_bytes(4, "big").translate(_REVERSED)


def _damaged_page(at: int) -> BadSound:
    return BadSound(f"unreadable: damaged, no whole page at byte {at}; fetch it again")


def _truncated(claim: str, there: str) -> BadSound:
    return BadSound(f"unreadable: truncated, its header says {claim}, got {there}; fetch it again")


def _longer(claim: str, more: str) -> BadSound:
    remedy = "write it anew with a header that is right"
    return BadSound(f"unreadable: its header says {claim}, after which it has {more}; {remedy}")


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    if offset >= 2**63:  # a size that cannot be
        return b""
    file.seek(offset)
    return file.read(size)
