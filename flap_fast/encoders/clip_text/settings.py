"""Settings of CLIP's text transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import model_validator

from flap_fast.checks import require
from flap_fast.encoders.settings import TextEncoder
from flap_fast.section import MEANS_WEIGHTS, Count, Depth

if TYPE_CHECKING:
    from torch import nn


class ClipTextSettings(TextEncoder):
    head = "linear"
    moved = {  # noqa: RUF012 - a ClassVar of the base
        "pool": ("pooler",),
        "packing": ("auto", "padded"),
        "attention": ("sdpa",),
    }

    encoder: Annotated[Literal["clip"], MEANS_WEIGHTS] = "clip"
    """CLIP's causal transformer, of random weights of the sizes here."""
    width: Count = 512
    """Width."""
    depth: Depth = 12
    """Layers."""
    heads: Annotated[Count, MEANS_WEIGHTS] = 8
    """Heads."""

    def build(self, *, recompute: bool = False, weights: bool = True) -> nn.Module:
        from flap_fast.encoders.clip_text.model import ClipText

        return ClipText(self, recompute=recompute)

    @model_validator(mode="after")
    def _fits(self):
        rule = f"be a multiple of text.heads = {self.heads}"
        require(self.width % self.heads == 0, "text.width", rule, self.width)
        return self
