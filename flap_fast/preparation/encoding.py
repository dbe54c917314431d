"""Clip encoders: a clip's file -> its bytes in a shard. FLAC, or the image's own file.

JPEG and PNG images in RGB or grey, 8 bits deep, keep their bytes; others become PNG in RGB, so that
every reader of the shards sees the same pixels. The encoder of cached log-mels is in cached_mel.py.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import soundfile

from flap_fast.data.preprocess.sound_file import SILENT
from flap_fast.data.preprocess.waveform import BadSound, Unusable, read_blocks
from flap_fast.preparation.manifest import Entry

_SHORTEST_S = 0.025


class ClipEncoder(Protocol):
    """Encodes clips for a shard."""

    @property
    def identity(self) -> Any:
        """What the bytes depend on, for JSON; part of every shard's fingerprint."""
        ...

    @property
    def metadata_files(self) -> dict[str, bytes]:
        """Files that the folder of each split gets, by name."""
        ...

    def encoding(self) -> AbstractContextManager:
        """The context in which `encode` is called, on any threads."""
        ...

    def encode(self, entry: Entry) -> tuple[str, bytes]:
        """A clip's ending and bytes; raises `Unusable` with the reason for rejecting it."""
        ...


@dataclass(frozen=True)
class FlacEncoder:
    """16-bit mono FLAC at a rate."""

    sample_rate_hz: int

    @property
    def identity(self) -> int:
        return self.sample_rate_hz

    @property
    def metadata_files(self) -> dict[str, bytes]:
        return {}

    def encoding(self) -> AbstractContextManager:
        return nullcontext()

    def encode(self, entry: Entry) -> tuple[str, bytes]:
        """A sound as FLAC; an image as its own file, or PNG."""
        source = read_source(entry)
        if isinstance(source, EncodedImage):
            return source
        buffer = io.BytesIO()
        rate = self.sample_rate_hz
        with soundfile.SoundFile(buffer, "w", rate, 1, "PCM_16", format="FLAC") as flac:
            for block in checked_blocks(entry, source, rate):
                flac.write(block)
        return "flac", buffer.getvalue()


class EncodedImage(NamedTuple):
    """An image's ending and its file."""

    ending: str
    data: bytes


def read_source(entry: Entry) -> Path | bytes | EncodedImage:
    """A clip's sound, as a file or as the bytes in a tar, or its image.

    Raises:
        Unusable: the row has a fault, or neither captions nor labels, or the image is unreadable.
    """
    if entry.fault:
        raise Unusable(entry.fault)
    # A clip with only labels can be classified.
    if not (entry.captions or entry.labels or entry.captionless):
        raise Unusable("captionless")
    if entry.inside is None:
        return _encoded_image(entry.audio) if entry.image else entry.audio
    if not entry.audio.is_file():
        raise Unusable("missing: no such file")
    with entry.audio.open("rb") as file:
        file.seek(entry.inside[0])
        data = file.read(entry.inside[1])
    return _encoded_image(data) if data.startswith(_IMAGE_MAGIC) and data[8:12] != b"WAVE" else data


# How JPEG, PNG and WebP begin; WAVE begins as the last.
_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
_AS_IT_IS = {
    (kind, mode): ending
    for kind, ending in (("JPEG", "jpg"), ("PNG", "png"))
    for mode in ("RGB", "L")
}


def _encoded_image(source: Path | bytes) -> EncodedImage:
    """The image's file, or a PNG of it; raises `BadImage` with the reason for rejecting it."""
    # Pillow and PyTorch take time to import, which sounds do not need.
    from flap_fast.data.preprocess.image import decoded, rgb, square

    image = decoded(source)
    colours = rgb(image)
    square(colours, 1)  # a strip is rejected here, not in training
    # RGBA, palettes, CMYK, 16 bits: each decoder has its own way with them.
    ending = _AS_IT_IS.get((str(image.format), image.mode))
    if ending is not None and "transparency" not in image.info:
        return EncodedImage(ending, source if isinstance(source, bytes) else source.read_bytes())
    buffer = io.BytesIO()
    colours.save(buffer, "PNG")
    return EncodedImage("png", buffer.getvalue())


def checked_blocks(entry: Entry, source: Path | bytes, sample_rate_hz: int) -> Iterator[np.ndarray]:
    """Yield (n,) float32 blocks of a clip; raises `BadSound`, maybe after them, if it is unusable.

    A block at a time: a clip may be a recording of hours.
    """
    samples, peak = 0, 0.0
    for block in read_blocks(
        source, sample_rate_hz, start_s=entry.start_s, duration_s=entry.duration_s
    ):
        samples += len(block)
        peak = max(peak, float(np.abs(block).max()))
        yield block
    if samples < _SHORTEST_S * sample_rate_hz:
        raise BadSound(f"empty: {samples / sample_rate_hz * 1000:.1f} ms, shorter than a window")
    if peak < SILENT:
        raise BadSound("silent: below -80 dB of full scale throughout")
