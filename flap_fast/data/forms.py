"""What a clip becomes in a shard: FLAC at the front end's rate, or a cached log-mel; images stay.

A form's `identity` enters the fingerprint of every shard, and its `beside` are files that each
split's folder gets. Its clips are encoded, on any threads, inside of `at_work()`.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import soundfile

from flap_fast.data.manifest import Entry
from flap_fast.data.shards import IMAGES
from flap_fast.data.sound import BadSound, read_sound

# Quieter than -80 dB of full scale at its loudest: nothing to hear, and a constant log-mel.
_SILENT = 1e-4
_SHORTEST_S = 0.025


class Form(Protocol):
    """How the clips of a shard are kept."""

    @property
    def identity(self) -> Any: ...
    @property
    def beside(self) -> dict[str, bytes]: ...
    def at_work(self) -> AbstractContextManager: ...
    def encode(self, entry: Entry) -> tuple[str, bytes]:
        """A clip's ending and bytes; raises `BadSound` with the reason for rejecting it."""
        ...


@dataclass(frozen=True)
class Flac:
    """16-bit mono FLAC at a rate."""

    sample_rate_hz: int

    @property
    def identity(self) -> int:
        return self.sample_rate_hz

    @property
    def beside(self) -> dict[str, bytes]:
        return {}

    def at_work(self) -> AbstractContextManager:
        return nullcontext()

    def encode(self, entry: Entry) -> tuple[str, bytes]:
        """A sound as FLAC; an image as its own file."""
        source = read_source(entry)
        if isinstance(source, Image):
            return source
        wave = checked_wave(entry, source, self.sample_rate_hz)
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, self.sample_rate_hz, format="FLAC", subtype="PCM_16")
        return "flac", buffer.getvalue()


class Image(NamedTuple):
    """An image's ending and its file as it is."""

    ending: str
    data: bytes


def read_source(entry: Entry) -> Path | bytes | Image:
    """The sound's file, its bytes where it lies in a tar, or an image.

    Raises:
        BadSound: the row has neither captions nor labels, or the image is none.
    """
    if not entry.captions and not entry.labels:  # a clip with labels alone can be classified
        raise BadSound("captionless")
    called = entry.audio.suffix.lower().lstrip(".") in IMAGES
    if entry.inside is None and not called:
        return entry.audio
    data = _bytes(entry)
    ending = _image_ending(data)
    if called and ending is None:
        raise BadSound("unreadable: neither JPEG, PNG nor WebP")
    return data if ending is None else Image(ending, data)


def _bytes(entry: Entry) -> bytes:
    if not entry.audio.is_file():
        raise BadSound("missing: no such file")
    offset, size = entry.inside or (0, -1)
    with entry.audio.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _image_ending(data: bytes) -> str | None:
    """What an image's first bytes say that it is."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else None


def checked_wave(entry: Entry, source: Path | bytes, sample_rate_hz: int) -> np.ndarray:
    """(samples,) float32 of a clip that can be used; raises `BadSound` for any other."""
    wave = read_sound(source, sample_rate_hz, start_s=entry.start_s, duration_s=entry.duration_s)
    if len(wave) < _SHORTEST_S * sample_rate_hz:
        raise BadSound(f"empty: {len(wave) / sample_rate_hz * 1000:.1f} ms, shorter than a window")
    if np.abs(wave).max() < _SILENT:
        raise BadSound("silent: below -80 dB of full scale throughout")
    return wave
