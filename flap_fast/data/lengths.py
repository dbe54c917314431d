"""The lengths of all clips, read from their headers before anything is decoded.

    FLAC             STREAMINFO, in the first 26 bytes
    cached log-mel   the rows of the .npy
    others           what libsndfile says, which reads as much of the clip as it must
    length unknown   of a FLAC from a pipe, of an MP3 that does not count its frames: decoded, its
                     samples counted

Ranks read a slice each. Nothing is stored beside shards on disk: a FLAC's header is read faster
than a clip's JSON (bench/LOG.md). Shards by URL must be fetched for it: the lengths of their clips
are kept in the cache.
"""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch

from flap_fast.data.preprocess.sound_file import BadSound, sound_seconds
from flap_fast.data.shards import Shards
from flap_fast.ranks import Ranks

# Bytes of a header: of FLAC 26 are read, of a .npy up to 128.
_HEAD = 128
# More than cores: threads mostly wait for the disk or the network.
_THREADS = 16
# Clips that a thread takes at a time: handing over one costs more than reading it.
_CHUNK = 1024
# Kaldi's window and shift, in seconds: only its log-mels are cached.
_WINDOW_S, _HOP_S = 0.025, 0.01
# Samples; of a FLAC that does not say, libsndfile says 2**63 - 1.
_LONGEST = 2**40


def clip_seconds(shards: Shards, ranks: Ranks) -> np.ndarray:
    """(N,) float64, the seconds of each clip; 0 where no header says.

    Such a clip is reported when it is decoded. Collective: call on every rank.
    """
    kept = _kept_in(shards)
    if kept is not None and not ranks.any(not kept.is_file()):
        return np.load(kept, allow_pickle=False)
    seconds = _read_seconds(shards, ranks)
    if kept is not None and shards.remote is not None:
        file = io.BytesIO()
        np.save(file, seconds)
        shards.remote.cache.keep(kept, file.getvalue())
    return seconds


def _kept_in(shards: Shards) -> Path | None:
    """The file for the lengths of shards by URL, of which a clip's header may be far away.

    None where there are shards on disk too: only of a URL's it is known that they did not change.
    """
    files = [shards.remote_file(number) for number in range(len(shards.files))]
    names = [file.cached_name for file in files if file is not None]
    if shards.remote is None or len(names) < len(files):
        return None
    of = hashlib.sha256("\n".join(names).encode() + shards.locations.tobytes()).hexdigest()
    return shards.remote.cache.small_files / f"{of[:24]}.seconds.npy"


def _read_seconds(shards: Shards, ranks: Ranks) -> np.ndarray:
    each = -(-len(shards) // ranks.world)
    first = min(ranks.rank * each, len(shards))
    clips = range(first, min(first + each, len(shards)))
    chunks = [clips[start : start + _CHUNK] for start in range(0, len(clips), _CHUNK)]
    seconds = torch.zeros(each, dtype=torch.float64)
    with ThreadPoolExecutor(min(_THREADS, max(1, len(chunks)))) as pool:
        found = pool.map(lambda chunk: [_seconds(shards, clip) for clip in chunk], chunks)
        read = [s for chunk in found for s in chunk]
    seconds[: len(clips)] = torch.tensor(read, dtype=torch.float64)
    return ranks.gather(seconds.to(ranks.device)).cpu().numpy()[: len(shards)]


def _seconds(shards: Shards, clip: int) -> float:
    head = shards.encoded_range(clip, 0, min(int(shards.locations[clip, 2]), _HEAD))
    if head.startswith(b"\x93NUMPY"):
        return _mel_seconds(head)
    return (head.startswith(b"fLaC") and _flac_seconds(head)) or _libsndfile_seconds(shards, clip)


def _flac_seconds(head: bytes) -> float:
    """The seconds that STREAMINFO gives; 0 where the writer did not know.

    Source: RFC 9639, section 8.2.
    """
    if len(head) < 26 or head[4] & 0x7F != 0:  # STREAMINFO, block type 0, comes first
        return 0.0
    fields = int.from_bytes(head[18:26], "big")  # rate 20 bits, channels 3, depth 5, samples 36
    rate_hz, samples = fields >> 44, fields & (1 << 36) - 1
    return samples / rate_hz if rate_hz else 0.0


def _mel_seconds(head: bytes) -> float:
    """The seconds of sound whose whole frames a cached log-mel holds."""
    file = io.BytesIO(head)
    try:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    except Exception:  # the header is Python, and its faults are of any kind
        return 0.0
    return _WINDOW_S + (shape[0] - 1) * _HOP_S if len(shape) == 2 and shape[0] else 0.0


def _libsndfile_seconds(shards: Shards, clip: int) -> float:
    try:
        found = soundfile.info(_Clip(shards, clip))  # type: ignore[arg-type] - takes files
        if found.frames <= _LONGEST and found.format != "MP3":
            return found.frames / found.samplerate
    except soundfile.LibsndfileError:
        pass  # a format of ffmpeg's, or none
    try:
        return sound_seconds(shards.encoded(clip))
    except BadSound:
        return 0.0


class _Clip(io.RawIOBase):
    """A clip's bytes as a file, of which only what is asked for is read."""

    def __init__(self, shards: Shards, clip: int):
        self._shards, self._clip, self._at = shards, clip, 0
        self._size = int(shards.locations[clip, 2])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = self._shards.encoded_range(self._clip, self._at, count)
        self._at += count
        return count
