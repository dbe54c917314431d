"""What the media encoders take and give: masks, tokens, and the check of their input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from flap_kernels import PatchMask


class PackedMask(NamedTuple):
    """The mask of packed clips."""

    patches: PatchMask
    """(1, .) of all clips, as of one long clip."""
    kept: tuple[int, ...]
    """How many patches each clip keeps, in the packed order; a tuple, since the host decides."""
    density: float
    """Patches kept per patch, before a clip's count is rounded to a whole one: the same for clips
    of every length."""


AnyMask = PatchMask | PackedMask
"""The patches that masking keeps and drops: of clips of one length, or of packed ones."""


class Encoded(NamedTuple):
    """The output of an encoder of sounds or images."""

    pooled: Tensor
    """(B, D) float32; (B, d) of an encoder whose vector lies in the joint space."""
    tokens: Tensor
    """(B, L, D), in the order of the patches given, behind the encoder's own tokens ([CLS]); (N, D)
    of packed clips."""


def check_media(media: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless the clips have the shape that an encoder was built for."""
    if tuple(media.shape[1:]) != tuple(shape):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"media must be (B, {wanted}), got {tuple(media.shape)}")
