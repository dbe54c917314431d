"""Settings of YAMNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.encoders.audio_settings import AudioEncoder, Mel
from flap_fast.section import MEANS_WEIGHTS, Count

if TYPE_CHECKING:
    from torch import nn

    from flap_fast.config import Config

# A piece of 0.96 s begins every 0.48 s, and is two halves.
HALF_FRAMES = 48


class YamnetSettings(AudioEncoder):
    can = frozenset({"variable", "classes"})
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
    """YAMNet: MobileNet over pieces of 0.96 s, one every 0.48 s, of 3.2 million weights. `flap
    import` reads those that AudioSet's two million clips have trained."""
    mel: Annotated[Mel, MEANS_WEIGHTS] = "yamnet"
    """The front end: YAMNet's (25 ms windows, 16 kHz, magnitudes of 125 to 7,500 Hz), Kaldi's or
    LAION-CLAP's. Rate, bins and statistics follow it."""
    mel_bins: Annotated[Count, Field(le=4096), MEANS_WEIGHTS] = 64
    """Mel bins F, a multiple of 32; 128 with audio.mel = kaldi. Convolutions fit any number, but
    trained weights mean the one that they were trained with."""
    filling: Literal["repeatpad", "pad", "repeat"] = "pad"
    """How a clip shorter than one window (25 ms) is completed: with zeros, which YAMNet has behind
    the end of every sound; or by repeating it."""
    length: Literal["fixed", "variable"] = "variable"
    """Each clip keeps its own length, up to audio.max_duration_s; its last piece is completed with
    silence, as YAMNet's was."""
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 1024
    """Width of the last block; the others are in proportion to it."""

    classes: Count = 521
    """Classes of its classifier, which it has with joint.class_names."""

    @property
    def patch_frames(self) -> int:
        """The 48 frames of half a piece."""
        return HALF_FRAMES

    def padded_frames(self, frames):
        """The next multiple of half a piece; a whole one at least."""
        halves = (frames + HALF_FRAMES - 1) // HALF_FRAMES
        return (halves + 2 // (halves + 1)) * HALF_FRAMES  # one half becomes two

    def patches_of(self, frames: Sequence[int]) -> list[int]:
        """Pieces of clips of so many frames each, multiples of half a piece."""
        return [count // HALF_FRAMES - 1 for count in frames]

    @property
    def grid(self) -> tuple[int, int]:
        """Pieces along time, each of all frequencies."""
        return self.most_frames // HALF_FRAMES - 1, 1

    def build(self, config: Config, *, recompute: bool = False) -> nn.Module:
        from flap_fast.encoders.yamnet.model import Yamnet

        return Yamnet(self, scores=config.joint.class_names > 0)

    @model_validator(mode="after")
    def _divides(self):
        rule = "be variable with audio.encoder = yamnet, which takes clips piece by piece"
        require(self.variable, "audio.length", rule, self.length, "leave it out")
        rule = "be a multiple of 32, which five strides of 2 divide"
        require(self.mel_bins % 32 == 0, "audio.mel_bins", rule, self.mel_bins)
        return self
