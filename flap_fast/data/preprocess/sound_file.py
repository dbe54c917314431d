"""A sound file or its bytes -> mono blocks at the file's own rate (CPU, NumPy).

Files: whatever libsndfile reads (WAV, FLAC, OGG, MP3). They are read forward, a block at a time:
memory does not grow with a sound, nor with what its header claims.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

Source = Path | bytes
"""A file, or the bytes of one."""

# Values (frames times channels) read at a time.
_BLOCK = 2**18

# Frames decoded before a wanted one: at most what MP3 keeps of earlier frames, 511 bytes.
_PREROLL = 32 * 1152

# A lower rate says that the header is wrong: it would be resampled to thousands of times its size.
LOWEST_HZ = 1000

# Encodings in which a sample stands at a place of its own, and FLAC, which finds samples by number.
_ADDRESSED = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}

# libsndfile's code for an error of the system.
_SYSTEM = 2


class Unusable(ValueError):
    """A clip that cannot be used, and the reason."""


class BadSound(Unusable):
    """A sound that cannot be used, and the reason."""


class Unread(BadSound):
    """A sound that the system failed to read; a retry may succeed."""


class SoundFile(soundfile.SoundFile):
    """An open file that is only read forward, in blocks.

    soundfile seeks to the end of each read, if it can: MP3 then loses what it kept of the frame
    before, and FLAC with a wrong length fails.
    """

    def seekable(self) -> bool:
        return False

    def mono_blocks(self, frames: int) -> Iterator[np.ndarray]:
        """Yield the next `frames`, or those up to the end: (n,) float32, channels averaged.

        Raises:
            BadSound: a sample is not finite.
        """
        return map(mono, self._raw_blocks(frames))

    def skip(self, frames: int, *, seek: bool) -> None:
        """Leave out the first `frames`, or all if there are fewer; `seek` if the file `seeks`."""
        if seek:
            frames = min(frames, self.frames)
            self.seek(max(0, frames - _PREROLL))
            frames = min(frames, _PREROLL)
        for _ in self._raw_blocks(frames):
            pass

    def _raw_blocks(self, frames: int) -> Iterator[np.ndarray]:
        while frames > 0:
            wanted = min(frames, max(1, _BLOCK // self.channels))
            block = self.read(wanted, dtype="float32", always_2d=True)
            yield block
            frames = frames - wanted if len(block) == wanted else 0


def mono(block: np.ndarray) -> np.ndarray:
    """Average the channels of (n, channels) float32: (n,).

    Raises:
        BadSound: a sample is not finite.
    """
    # Channel by channel: the mean along so short an axis takes NumPy fifteen times as long.
    wave = block[:, 0].copy()
    for channel in range(1, block.shape[1]):
        wave += block[:, channel]
    if block.shape[1] > 1:
        wave /= block.shape[1]
    if not np.isfinite(wave).all():
        raise BadSound("unreadable: samples are not finite")
    return wave


@contextmanager
def open_sound(source: Source) -> Iterator[SoundFile]:
    """Open a sound; errors of libsndfile in the `with` block become these.

    Raises:
        BadSound: unreadable, or a sample rate that cannot be true.
        Unread: missing, or refused by the system.
    """
    if isinstance(source, Path) and not os.path.isfile(source):  # a name may be too long to ask
        raise Unread("missing: no such file")
    try:
        with _open(source) as file:
            if file.samplerate < LOWEST_HZ:
                rule = f"its sample rate must be {LOWEST_HZ} Hz or more"
                raise BadSound(f"unreadable: {rule}, got {file.samplerate} Hz")
            yield file
    except soundfile.LibsndfileError as error:
        kind = Unread if error.code == _SYSTEM else BadSound
        raise kind(f"unreadable: {error.error_string}") from None
    except (OSError, soundfile.SoundFileError) as error:
        kind = Unread if isinstance(error, OSError) else BadSound
        raise kind(f"unreadable: {error}") from None


@contextmanager
def _open(source: Source) -> Iterator[SoundFile]:
    # As bytes, for names that are no UTF-8: soundfile cannot encode them.
    name = io.BytesIO(source) if isinstance(source, bytes) else os.fsencode(source)
    try:
        file = SoundFile(name)  # type: ignore[arg-type] - takes bytes, says str
    except TypeError as error:  # x.raw, which has no header
        raise BadSound(f"unreadable: {error}") from None
    with file:
        if file.format != "MP3":
            yield file
            return
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as opened:
        data = opened if counts_frames(opened) else _Longer(opened)
        with SoundFile(data) as file:  # type: ignore[arg-type] - reads, seeks and tells
            yield file


def seeks(source: Source) -> bool:
    """Whether a file can be sought in: its last sample is where its header says, or it is MP3."""
    try:
        with open_sound(source) as file:
            if file.format == "MP3":
                return True
            file.seek(file.frames - 1)
            return len(file.read(2)) == 1
    except BadSound:
        return False


def seeks_exactly(source: Source) -> bool:
    """Whether, moreover, its length is true and sought samples are those of reading forward."""
    with open_sound(source) as file:
        addressed = file.subtype in _ADDRESSED and file.format != "OGG"
    return addressed and seeks(source)


def counts_frames(file: io.BufferedIOBase | io.RawIOBase) -> bool:
    """Whether the first frame of an MP3 tells the number of frames."""
    file.seek(0)
    tag = file.read(10)
    # ID3v2: the length of what follows, in four bytes of seven bits.
    length = sum(byte << 7 * (3 - n) for n, byte in enumerate(tag[6:10]))
    file.seek(10 + length if tag.startswith(b"ID3") else 0)
    head = file.read(4096)
    file.seek(0)
    return any(name in head for name in (b"Xing", b"Info", b"VBRI"))


class _Longer(io.BufferedIOBase):
    """An MP3 that says it is longer than it is.

    Without a count of frames libsndfile estimates a length from the file's size and the first
    frame's, and reads no further; of a variable bit rate this may be a small part.
    """

    def __init__(self, file: io.BufferedIOBase):
        self._file, self._extra = file, 0
        self._claim = 256 * file.seek(0, os.SEEK_END)  # 320 kbit/s against 8, and more
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # Tags at the true end are still found there.
        self._extra = self._claim if whence == os.SEEK_END else 0
        return self._file.seek(offset, whence) + self._extra

    def tell(self) -> int:
        return self._file.tell() + self._extra

    def readinto(self, buffer, /) -> int:
        self._extra = 0
        return self._file.readinto(buffer)
