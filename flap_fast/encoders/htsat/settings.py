"""Settings of HTSAT, LAION-CLAP's audio encoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import model_validator

from flap_fast.checks import require
from flap_fast.encoders.audio_settings import AudioEncoder, Mel
from flap_fast.section import MEANS_WEIGHTS, Count, Depth, Ratio

if TYPE_CHECKING:
    from torch import nn

    from flap_fast.config import Config

# First width and heads, doubled at each stage, and the blocks of each. Source: LAION-CLAP.
SIZES = {
    "tiny": (96, (2, 2, 6, 2), 4),
    "base": (128, (2, 2, 12, 2), 4),
    "large": (256, (2, 2, 12, 2), 4),
}


class HTSATSettings(AudioEncoder):
    can = frozenset({"fusion", "recompute"})
    why_not = {  # noqa: RUF012 - a ClassVar of the base
        "mask": "whose windows need every patch",
        "reconstruct": "which drops no patches to reconstruct",
        "compile": "whose blocks are run as they are",
        "variable": "which folds log-mels of one length into a square",
    }
    specaug = "inside"
    moved = {  # noqa: RUF012 - a ClassVar of the base
        "use_cls": (True,),
        "pool": ("mean_patch",),
        "norm_position": ("tokens",),
        "pos_grid": ("correct",),
        "attention": ("sdpa",),
    }
    defaults = {  # noqa: RUF012 - a ClassVar of the base
        "mask": {"kind": "none"},
        # LAION-CLAP's SpecAugmentation.
        "specaug": {"time_frames": 64, "freq_bins": 8, "stripes": 2},
    }

    encoder: Annotated[Literal["htsat"], MEANS_WEIGHTS] = "htsat"
    """LAION-CLAP's HTSAT: a Swin transformer, which cannot be masked."""
    mel: Annotated[Mel, MEANS_WEIGHTS] = "clap"
    """The front end: LAION-CLAP's (1024 samples at 48 kHz, decibels), Kaldi's (25 ms windows,
    16 kHz, natural logarithm) or YAMNet's. Rate, bins and statistics follow it."""
    size: Literal["tiny", "base", "large"] = "tiny"
    """Width of the first stage (96, 128 or 256, doubled at each), blocks and heads."""
    width: Count | None = None
    """Overrides the size's first width."""
    depths: tuple[Depth, ...] | None = None
    """Overrides the size's blocks of each stage."""
    heads: Count | None = None
    """Overrides the size's first number of heads, doubled at each stage."""
    patch: Count = 4
    """Side of a square patch, in pixels of the folded log-mel."""
    window_patches: Annotated[Count, MEANS_WEIGHTS] = 8
    """Side of the windows of attention, in patches."""
    drop_path: Ratio = 0.1
    """Stochastic depth at the last block, growing linearly from 0."""

    @property
    def stages(self) -> tuple[tuple[int, int, int], ...]:
        """Width, depth and heads of each stage."""
        width, depths, heads = SIZES[self.size]
        width, depths, heads = self.width or width, self.depths or depths, self.heads or heads
        return tuple((width << n, depth, heads << n) for n, depth in enumerate(depths))

    @property
    def image_side(self) -> int:
        """Side of the square into which a log-mel is folded, in pixels: 256 of 1001 x 64.

        The smallest that holds all frames and that the stages can halve; 0 if there is none.
        """
        least = math.isqrt((self.frames - 1) // self.mel_bins) + 1
        sides = (folds * self.mel_bins for folds in range(least, 2 * least + 1))
        return next((side for side in sides if self._divides(side)), 0)

    def _divides(self, side: int) -> bool:
        grids = [side // self.patch >> n for n in range(len(self.stages))]
        whole = side % (self.patch << (len(grids) - 1)) == 0
        return whole and all(grid % min(self.window_patches, grid) == 0 for grid in grids)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along both sides of the folded log-mel."""
        return self.image_side // self.patch, self.image_side // self.patch

    def meaning(self) -> dict[str, Any]:
        return super().meaning() | {"heads": self.stages[0][2]}

    def build(self, config: Config, *, recompute: bool = False) -> nn.Module:
        from flap_fast.encoders.htsat.model import HTSAT

        return HTSAT(self, config.fusion, recompute=recompute)

    def _check_frames(self, held: int, multiple: int = 1) -> None:
        require(
            self.frames == held,
            "audio.frames",
            f"be the {held} frames of audio.duration_s = {self.duration_s:g} for HTSAT",
            self.frames,
            f"set audio.frames={held}",
        )

    @model_validator(mode="after")
    def _folds(self):
        width, _, heads = self.stages[0]
        require(width % heads == 0, "audio.width", f"be a multiple of audio.heads = {heads}", width)
        require(
            self.image_side > 0,
            "audio.window_patches",
            f"divide each of {len(self.stages)} stages of a log-mel of {self.frames} frames and "
            f"{self.mel_bins} bins, folded into a square",
            self.window_patches,
            "change it, or shorten audio.depths",
        )
        return self
