"""Images -> the image encoder's input.

    bytes -> RGB (h, w, 3) -> shorter side R, bicubic -> the middle (R, R, 3) -> floats (3, R, R)

The reference implementation of what DALI decodes (CPU, Pillow). It is CLIP's own preprocessing, for
training and evaluation alike: Pillow's bicubic filter, as wide as the image shrinks; sides cut off
as torchvision's CenterCrop does; tags that ask for a rotation are ignored.

Source: CLIP's published code, `_transform`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as pillow
from PIL import UnidentifiedImageError
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.batch import DecodedBatch, EncodedBatch, MediaInput, lay_end_to_end, to_device
from flap_fast.data.preprocess.decoders import make_decoder
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.encoders.settings import ImageEncoder
from flap_fast.ranks import Ranks

# A side 50 times as long as the other is a strip: gigabytes once its shorter side is enlarged.
_LONGEST = 50

ImageSource = str | Path | bytes | pillow.Image | np.ndarray | Any
"""A file or its bytes, one of Pillow's images, or an (h, w, 3) uint8 array."""


class BadImage(Unusable):
    """An image that cannot be used, and the reason."""


def read_image(source: Path | bytes, resolution: int) -> np.ndarray:
    """The middle square of a file, (R, R, 3) uint8.

    Raises:
        BadImage: missing, unreadable, cut off, or a strip.
    """
    return square(rgb(decoded(source)), resolution)


def any_square(image: ImageSource, number: int, resolution: int) -> np.ndarray:
    """The middle square of any image, (R, R, 3) uint8; raises `BadImage` with its name."""
    named = isinstance(image, (str, Path))
    try:
        if isinstance(image, (str, Path)):
            return read_image(Path(image), resolution)
        if isinstance(image, bytes):
            return read_image(image, resolution)
        if isinstance(image, np.ndarray):
            shape, dtype = image.shape, image.dtype
            if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or not image.size:
                raise BadImage(f"an array must be (h, w, 3) uint8, got {shape} {dtype}")
            image = pillow.fromarray(image)
        if not isinstance(image, pillow.Image):
            rule = "be a file, its bytes, an image of Pillow or an (h, w, 3) uint8 array"
            raise BadImage(f"an image must {rule}, got {type(image).__name__}")
        return square(rgb(image), resolution)
    except BadImage as why:
        name = image if named else f"image number {number}"
        raise BadImage(f"{name}: {why}") from None


def square(image: pillow.Image, resolution: int) -> np.ndarray:
    """The middle square of an RGB image, (R, R, 3) uint8; raises `BadImage` for a strip."""
    width, height = image.size
    if max(width, height) > _LONGEST * min(width, height):
        raise BadImage(f"a strip: {width} x {height} pixels")
    shorter = min(width, height)
    sides = (resolution * width // shorter, resolution * height // shorter)
    left, top = (_margin(side - resolution) for side in sides)
    image = image.resize(sides, pillow.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def decoded(source: Path | bytes) -> pillow.Image:
    """The whole image in the colours of its file; raises `BadImage`."""
    if isinstance(source, Path) and not os.path.isfile(source):  # a name may be too long to ask
        raise BadImage("missing: no such file")
    try:
        image = pillow.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
    except pillow.DecompressionBombError as error:  # above 180 million pixels
        raise BadImage(f"too large: {error}") from None
    except UnidentifiedImageError:
        raise BadImage("unreadable: unknown image format") from None
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:  # Pillow's many readers
        raise BadImage(f"unreadable: {error}") from None
    return image


def rgb(image: pillow.Image) -> pillow.Image:
    """Red, green and blue of 8 bits; transparency is dropped. Raises `BadImage`."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion takes the low byte
        image = pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImage(f"unreadable: pixels of 32 bits (mode {image.mode})")
    return image.convert("RGB")


def _margin(spare: int) -> int:
    """Half of the excess, rounded half to even as in Python: 1 -> 0, 3 -> 2."""
    return spare // 2 + (spare % 4 == 3)


class ImagePreprocessor:
    """A `Preprocessor` of images: (B, 3, R, R)."""

    def __init__(self, config: Config, ranks: Ranks, shards: object = None):
        image = config.encoder
        assert isinstance(image, ImageEncoder)  # chosen by its modality
        self._image, self._frontend, self._ranks = image, config.frontend, ranks
        # Made once: a copy to a GPU in each step would have the host wait.
        self._mean, self._std = (
            torch.tensor(of, device=ranks.device) for of in (image.mean, image.std)
        )

    def stream(self, batches: Iterator[EncodedBatch], batch: int) -> Iterator[MediaInput]:
        """Preprocess batches in order; raises `BadImage` when it reaches a bad image."""
        decoder = make_decoder(
            batches,
            batch,
            self._frontend,
            self._ranks,
            decode=self._decode,
            graph=self._dali_graph,
            error=BadImage,
        )
        # Unlike a generator, `map` goes on after it has raised.
        return map(self.finish, decoder)

    def check(self, clip: bytes) -> None:
        """Raise `BadImage` if an image cannot be decoded."""
        self._decode(clip)

    def decode(self, clips: Sequence[bytes], positions: np.ndarray) -> MediaInput:
        """Preprocess one batch at once, on this thread; raises `BadImage`."""
        return self.finish(lay_end_to_end([self._decode(clip) for clip in clips], positions))

    def finish(self, decoded: DecodedBatch) -> MediaInput:
        """The normalised pixels of squares."""
        pixels = to_device(decoded.stacked, self._ranks.device)
        return MediaInput(normalise_image(pixels, self._mean, self._std), None)

    def _decode(self, clip: bytes, position: float = 0.0) -> np.ndarray:
        """The middle square, wherever other clips are cropped."""
        return read_image(clip, self._image.resolution)

    def _dali_graph(self, backend: str) -> Any:
        from flap_fast.data.preprocess.dali import image_graph

        return image_graph(self._image.resolution)


def normalise_image(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, R, R, 3) uint8 -> (B, 3, R, R) float32; channels stay last in memory, as GPUs want."""
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
