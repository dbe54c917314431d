"""The output of the media encoders, and the check of their input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Encoded(NamedTuple):
    """The output of an encoder of sounds or images."""

    pooled: Tensor
    """(B, D) float32; (B, d) of an encoder whose vector lies in the joint space."""
    tokens: Tensor
    """(B, L, D), in the order of the patches given, behind the encoder's own tokens ([CLS])."""


def check_media(media: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless the clips have the shape that an encoder was built for."""
    if tuple(media.shape[1:]) != tuple(shape):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"media must be (B, {wanted}), got {tuple(media.shape)}")
