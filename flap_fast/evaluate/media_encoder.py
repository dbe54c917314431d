"""TODO-MERGE: what `config.encoder` will be; then `media_encoder(x)` is `x.encoder`.

So does `meta_autocast`, when `flap_kernels.patches.product_type` takes the device `meta`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from flap_fast.config import Config, Fusion


def media_encoder(config: Config) -> Any:
    """The settings of the encoder in force, of sounds or images."""
    return getattr(config, "encoder", None) or _StandIn(config)


class _StandIn:
    def __init__(self, config: Config):
        section = config.audio if config.image is None else config.image
        self._section = section
        self.encoder = section.encoder
        self.modality = "audio" if config.image is None else "image"
        self.can = {"mask"} if section.encoder == "vit" else set()
        if config.image is None:
            self.grid, self.patch = config.audio.grid, config.audio.patch

    def input_shape(self, fusion: Fusion) -> tuple[int, ...]:
        if self.modality == "image":
            return (3, self._section.resolution, self._section.resolution)  # type: ignore[union-attr]
        return (4 if fusion.on else 1, self._section.frames, self._section.mel_bins)  # type: ignore[union-attr]

    def build(self, config: Config) -> nn.Module:
        from flap_fast.model import AUDIO_ENCODERS, IMAGE_ENCODERS

        if config.image is None:
            return AUDIO_ENCODERS[config.audio.encoder](config.audio, config.fusion)
        return IMAGE_ENCODERS[config.image.encoder](config.image, config.joint.width)


@contextmanager
def meta_autocast() -> Iterator[None]:
    """Inside: autocast is off on the device `meta`, of which PyTorch refuses to say so."""
    asked = torch.is_autocast_enabled

    def enabled(device: str = "cuda") -> bool:
        return device != "meta" and asked(device)

    with mock.patch.object(torch, "is_autocast_enabled", enabled):
        yield
