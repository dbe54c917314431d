"""Stand-in for `config.encoder`, which replaces each `encoder_of(config)`; then this file goes."""

from __future__ import annotations

from typing import Any

from torch import nn

from flap_fast.config import Config
from flap_fast.model import AUDIO_ENCODERS


class _Encoder:
    """The section of the encoder in force, with what `config.encoder` will have besides."""

    def __init__(self, config: Config):
        self.modality = "audio" if config.image is None else "image"
        self._section = config.image or config.audio

    def build(self, config: Config) -> nn.Module:
        return AUDIO_ENCODERS[config.audio.encoder](config.audio, config.fusion)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._section, name)


def encoder_of(config: Config) -> Any:
    """The encoder in force: of audio or of images."""
    return _Encoder(config)
