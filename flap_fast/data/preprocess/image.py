"""One picture's bytes -> the square that the model sees (CPU, Pillow).

    bytes -> RGB (h, w, 3) -> shorter side R, bicubic -> the middle (R, R, 3) -> floats (3, R, R)

This is the twin that says what DALI's decoding means. It is CLIP's own preprocessing, for training
and evaluation alike: Pillow's bicubic filter, as wide as the image shrinks; sides cut off as
torchvision's CenterCrop does; tags that ask for a rotation are not looked at.

Source: CLIP's published code; SPEC 5.3.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image as pillow
from PIL import UnidentifiedImageError
from torch import Tensor

from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.encoders.settings import ImageEncoder

# A side 50 times as long as the other: a strip, whose middle says nothing, and gigabytes enlarged.
_LONGEST = 50


Picture = str | Path | pillow.Image | np.ndarray
"""A file, one of Pillow's images, or an (h, w, 3) uint8 array."""


class BadImage(Unusable):
    """A picture that cannot be used, and why."""


def read_image(source: Path | bytes, resolution: int) -> np.ndarray:
    """The middle square of a file, (R, R, 3) uint8.

    Raises:
        BadImage: missing, unreadable, cut off, or a strip.
    """
    return square(rgb(decoded(source)), resolution)


def any_square(picture: Picture, number: int, resolution: int) -> np.ndarray:
    """The middle square of a picture in any form, (R, R, 3) uint8; `BadImage` says which it is."""
    named = isinstance(picture, (str, Path))
    try:
        if isinstance(picture, (str, Path)):
            return read_image(Path(picture), resolution)
        if isinstance(picture, np.ndarray):
            shape, dtype = picture.shape, picture.dtype
            if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or not picture.size:
                raise BadImage(f"an array must be (h, w, 3) uint8, got {shape} {dtype}")
            picture = pillow.fromarray(picture)
        return square(rgb(picture), resolution)
    except BadImage as why:
        name = picture if named else f"image number {number}"
        raise BadImage(f"{name}: {why}") from None


def square(picture: pillow.Image, resolution: int) -> np.ndarray:
    """The middle square of a picture in RGB, (R, R, 3) uint8; raises `BadImage` for a strip."""
    width, height = picture.size
    if max(width, height) > _LONGEST * min(width, height):
        raise BadImage(f"a strip: {width} x {height} pixels")
    shorter = min(width, height)
    sides = (resolution * width // shorter, resolution * height // shorter)
    left, top = (_margin(side - resolution) for side in sides)
    picture = picture.resize(sides, pillow.Resampling.BICUBIC)
    return np.asarray(picture.crop((left, top, left + resolution, top + resolution)))


def decoded(source: Path | bytes) -> pillow.Image:
    """The whole picture in the colours that its file has; raises `BadImage`."""
    if isinstance(source, Path) and not os.path.isfile(source):  # a name may be too long to ask
        raise BadImage("missing: no such file")
    try:
        picture = pillow.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        picture.load()
    except pillow.DecompressionBombError as error:  # above 180 million pixels
        raise BadImage(f"too large: {error}") from None
    except UnidentifiedImageError:
        raise BadImage("unreadable: no kind of picture that is known") from None
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:  # Pillow's many readers
        raise BadImage(f"unreadable: {error}") from None
    return picture


def rgb(picture: pillow.Image) -> pillow.Image:
    """Red, green and blue of 8 bits; transparency is dropped. Raises `BadImage`."""
    if picture.mode.startswith("I;16"):  # Pillow's own conversion takes the low byte
        picture = pillow.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise BadImage(f"unreadable: pixels of 32 bits (mode {picture.mode})")
    return picture.convert("RGB")


def _margin(spare: int) -> int:
    """Half of what is too much, halves rounded to even as Python rounds: 1 -> 0, 3 -> 2."""
    return spare // 2 + (spare % 4 == 3)


class PillowDecoder:
    """The twin of `DaliImageDecoder`: Pillow on threads; the same interface."""

    def __init__(
        self, batches: Iterator[list[bytes]], image: ImageEncoder, *, threads: int, prefetch: int
    ):
        self._pool, self._resolution = ThreadPoolExecutor(threads), image.resolution
        self._batches, self._prefetch = batches, prefetch
        self._waiting: deque[list[Future[np.ndarray]]] = deque()

    def __iter__(self) -> PillowDecoder:
        return self

    def __next__(self) -> Tensor:
        """(B, R, R, 3) uint8; raises `BadImage` for a batch with one that cannot be read."""
        while len(self._waiting) < self._prefetch:
            images = next(self._batches, None)
            if images is None:
                break
            self._waiting.append(
                [self._pool.submit(read_image, image, self._resolution) for image in images]
            )
        if not self._waiting:
            raise StopIteration
        return torch.from_numpy(np.stack([image.result() for image in self._waiting.popleft()]))


def normalise_image(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, R, R, 3) uint8 -> (B, 3, R, R) float32; channels stay last in memory, as GPUs want."""
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
