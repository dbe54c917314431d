"""What libsndfile reads in place of a file whose header is wrong, and of bytes."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

from flap_fast.data.preprocess.sound_header import Patches


class SoundBytes(io.BytesIO):
    """Bytes to read; sought before the first one, as by a size below 0 in a header, they begin."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        # An error here would be printed by cffi, with a traceback.
        return super().seek(max(0, offset) if whence == os.SEEK_SET else offset, whence)


class Patched(io.BufferedIOBase):
    """A file with other bytes at some offsets, and, if `longer`, an MP3 that says it is longer.

    Without a count of frames libsndfile estimates a length from the file's size and the first
    frame's, and reads no further; of a variable bit rate this may be a small part.
    """

    def __init__(self, file: BinaryIO, patches: Patches, *, longer: bool = False):
        self._file, self._patches, self._extra = file, patches, 0
        self.longer = longer
        # 320 kbit/s against 8, and more.
        self._claim = 256 * file.seek(0, os.SEEK_END) if longer else 0
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # Tags at the true end are still found there.
        self._extra = self._claim if whence == os.SEEK_END else 0
        at = max(0, offset) if whence == os.SEEK_SET else offset
        return self._file.seek(at, whence) + self._extra

    def tell(self) -> int:
        return self._file.tell() + self._extra

    def readinto(self, buffer, /) -> int:
        self._extra, begin, out = 0, self._file.tell(), memoryview(buffer).cast("B")
        data = bytearray(self._file.read(len(out)))
        for offset, patch in self._patches.items():
            for at, byte in enumerate(patch, offset - begin):
                if 0 <= at < len(data):
                    data[at] = byte
        out[: len(data)] = data
        return len(data)
