"""The sections `joint` and `decoder`: projection heads, and masked reconstruction."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.section import MEANS_WEIGHTS, Count, Depth, Positive, Ratio, Section


class Decoder(Section):
    """Reconstructs the patches that masking dropped, where loss.recon.weight is above 0."""

    width: Count = 512
    """Width of its blocks; there is a decoder where loss.recon.weight is above 0."""
    depth: Depth = 4
    """Blocks."""
    heads: Annotated[Count, MEANS_WEIGHTS] = 4
    """Attention heads of a block."""

    @model_validator(mode="after")
    def _fits(self):
        require(
            self.width % self.heads == 0,
            "decoder.width",
            f"be a multiple of decoder.heads = {self.heads}",
            self.width,
        )
        require(self.width % 4 == 0, "decoder.width", "be a multiple of 4 (2-D sines)", self.width)
        return self


class Joint(Section):
    width: Count = 512
    """Dimension d of the joint space."""
    temperature: Positive = 0.07
    """First temperature; the logit scale starts at its inverse."""
    max_scale: float = Field(default=100.0, ge=1)
    """The logit scale is clamped to [1, max_scale]."""
    text_head: Literal["encoder", "mlp", "linear", "none"] = "encoder"
    """The captions' projection: that of the text encoder's authors (`encoder`), LAION-CLAP's two
    layers, CLIP's matrix without bias, or none: sounds are projected into the text encoder's own
    space, whose width is joint.width. With few captions a projection learns those by heart."""
    hidden: Count | None = None
    """Width of the hidden layer of heads of two layers; null: joint.width, as LAION-CLAP's."""
    class_names: float = Field(default=0.0, ge=0)
    """Add what the audio encoder's own classifier says to a sound's vector, with this weight (0.5
    is usual) beside the head's: the mean of the embeddings of its classes' names, each weighted by
    its score. They begin in the text encoder's space and are trained; train.init_audio_from brings
    classifier and names. 0: off."""
    dropout: Ratio = 0.0
    """Dropout before each layer of the heads, in training. With few clips 0.3 helped the head of a
    frozen encoder."""
