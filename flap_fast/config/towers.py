"""The sections `image` and `text`, and of what joins and rebuilds: `joint`, `decoder`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.config.section import Count, Positive, Ratio, Section


class Image(Section):
    """Setting this section puts an image tower in the place of the audio tower."""

    encoder: Literal["resnet50"] = "resnet50"
    """CLIP's ResNet: a stem of three convolutions, blurred strides, pooling by attention."""
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Channels behind the stem; the pooled vector is 32 times as wide, in heads of 64."""
    layers: tuple[Count, Count, Count, Count] = (3, 4, 6, 3)
    """Bottlenecks of each stage: ResNet-50's."""
    resolution: Annotated[int, Field(ge=32, multiple_of=32)] = 224
    """Side of the square that the model sees: the shorter side is brought to it, the middle cut."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """CLIP's mean of red, green and blue in [0, 1], subtracted."""
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    """CLIP's standard deviations, which divide."""

    @property
    def heads(self) -> int:
        """Of the pooling, 64 numbers wide each, as in all of CLIP's ResNets."""
        return self.width * 32 // 64


class Text(Section):
    encoder: Literal["roberta", "clip"] = "roberta"
    """RoBERTa or what `folder` holds, or CLIP's causal transformer, of random weights of the sizes
    below (512 wide, 12 layers, 8 heads when not given)."""
    folder: str | None = None
    """A transformers encoder and its tokenizer: a folder, or `package:NAME/sub/folder` inside an
    installed Python package. Without one: a RoBERTa of random weights, of the sizes below."""
    tokenizer: str = "bytes"
    """For random weights: a tokenizer's folder (CLIP's: `package:open_clip`), or `bytes` (UTF-8
    bytes, needs no file)."""
    width: Count = 768
    """Random weights: width."""
    depth: Count = 12
    """Random weights: layers."""
    heads: Count = 12
    """Random weights: heads."""
    max_tokens: Count = 77
    """Longer captions are cut; batches are padded to their own longest, to a multiple of 8."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """`packed` lays a batch's captions end to end, without padding (BERT, RoBERTa, XLM-RoBERTa,
    CamemBERT); the numbers are the same within rounding. `auto` packs where that is faster: on a
    CPU, and on a GPU whose variable-length attention serves (bf16, or xformers)."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """For packed captions on a GPU: PyTorch's variable-length attention, or xformers'."""
    pool: Literal["pooler", "mean", "cls"] = "pooler"
    """RoBERTa's pooler (tanh of a linear layer on <s>), the mean over tokens, or plain <s>. CLIP's
    `pooler` is its last norm at the end-of-text token."""
    dropout: Ratio = 0.1
    """Dropout everywhere in the tower."""
    freeze: bool = False
    """Keep the tower as it is and train the projection alone."""

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, tree):
        """Defaults that follow the encoder."""
        if isinstance(tree, dict) and tree.get("encoder") == "clip":
            tree = {"width": 512, "heads": 8, **tree}
        return tree

    @model_validator(mode="after")
    def _fits(self):
        if self.encoder == "clip":
            remedy = "set text.encoder=roberta, which takes any encoder's folder"
            rule = "be left out with text.encoder = clip"
            require(self.folder is None, "text.folder", rule, self.folder, remedy)
            rule = "be {} with text.encoder = clip"
            require(self.pool == "pooler", "text.pool", rule.format("pooler"), self.pool)
            require(self.packing != "packed", "text.packing", rule.format("padded"), self.packing)
            require(self.attention == "sdpa", "text.attention", rule.format("sdpa"), self.attention)
        require(
            self.folder is not None or self.width % self.heads == 0,
            "text.width",
            f"be a multiple of text.heads = {self.heads}",
            self.width,
        )
        rule = "be 'sdpa' with text.packing = padded"
        fits = self.attention == "sdpa" or self.packing != "padded"
        require(fits, "text.attention", rule, self.attention, "set text.packing=auto")
        return self


class Decoder(Section):
    """Rebuilds the patches that masking dropped, where loss.recon.weight is above 0."""

    width: Count = 512
    """Width of its blocks."""
    depth: Count = 4
    """Blocks."""
    heads: Count = 4
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
