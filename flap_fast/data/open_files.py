"""Reads ranges of shards, which stay open: the last used ones, for any number of threads."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from flap_fast.data.tar_members import ShardError

_OPEN_FILES = 256


def read_range(file: Path, offset: int, size: int) -> bytes:
    """Bytes `offset` to `offset + size` of a file, which stays open; raises `ShardError`."""
    descriptor = _descriptor(file)  # held: another thread may push it out of the cache
    data = os.pread(descriptor.fd, size, offset)
    if len(data) != size:
        raise ShardError(
            f"{file} ends before byte {offset + size}, inside a clip; was it replaced?"
        )
    return data


class _Descriptor:
    """An open file that closes with its last use."""

    def __init__(self, file: Path):
        self.fd = os.open(file, os.O_RDONLY)

    def __del__(self):
        os.close(self.fd)


@functools.lru_cache(_OPEN_FILES)
def _descriptor(file: Path) -> _Descriptor:
    return _Descriptor(file)
