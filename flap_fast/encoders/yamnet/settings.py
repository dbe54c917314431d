"""Settings of YAMNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.encoders.audio_settings import AudioEncoder, Mel
from flap_fast.section import MEANS_WEIGHTS

if TYPE_CHECKING:
    from torch import nn

    from flap_fast.config import Config

PATCH_FRAMES = 96


class YamnetSettings(AudioEncoder):
    can = frozenset({"variable"})
    why_not = {  # noqa: RUF012 - a ClassVar of the base
        "mask": "whose convolutions need every cell",
        "reconstruct": "which drops no patches to reconstruct",
        "fusion": "which takes clips of any length whole",
        "compile": "whose blocks are run as they are",
        "recompute": "whose blocks are run as they are",
    }
    defaults = {  # noqa: RUF012 - a ClassVar of the base
        "mask": {"kind": "none"},
        "specaug": {"time_frames": 0, "freq_bins": 0},
    }

    encoder: Annotated[Literal["yamnet"], MEANS_WEIGHTS] = "yamnet"
    """YAMNet: MobileNet over pieces of 0.96 s, of 3.2 million weights. `flap import` reads those
    that AudioSet's two million clips have trained."""
    mel: Annotated[Mel, MEANS_WEIGHTS] = "yamnet"
    """The front end: YAMNet's (25 ms windows, 16 kHz, magnitudes of 125 to 7,500 Hz), Kaldi's or
    LAION-CLAP's. Rate, bins and statistics follow it."""
    length: Literal["fixed", "variable"] = "variable"
    """Each clip keeps its own length, up to audio.max_duration_s; its last piece is completed with
    silence, as YAMNet's was."""
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 1024
    """Width of the last block; the others are in proportion to it."""

    @property
    def patch_frames(self) -> int:
        """The 96 frames of a piece."""
        return PATCH_FRAMES

    @property
    def grid(self) -> tuple[int, int]:
        """Pieces along time, each of all frequencies."""
        return self.most_frames // PATCH_FRAMES, 1

    def build(self, config: Config, *, recompute: bool = False) -> nn.Module:
        from flap_fast.encoders.yamnet.model import Yamnet

        return Yamnet(self)

    @model_validator(mode="after")
    def _divides(self):
        rule = "be variable with audio.encoder = yamnet, which takes clips piece by piece"
        require(self.variable, "audio.length", rule, self.length, "leave it out")
        rule = "be a multiple of 32, which five strides of 2 divide"
        require(self.mel_bins % 32 == 0, "audio.mel_bins", rule, self.mel_bins)
        return self
