"""The base of a loss: its settings, the sentences it asks for, and its terms.

A loss is one file here and one line in `Losses`. The file imports PyTorch inside its function, for
settings are read before PyTorch is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict, cast

from flap_fast.checks import require
from flap_fast.section import FREE_ON_RESUME, Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Duplicates = Literal["ignore", "mask", "positive"]
"""What pairs of one clip, or of equal captions, are to each other in a loss over pairs."""

ProductPrecision = Annotated[Literal["auto", "ieee", "tf32", "bf16"], FREE_ON_RESUME]
"""Precision of the embeddings in products, summed in fp32; another GPU may want another."""


class Outputs(TypedDict):
    """Float32 results of `TwoTowers.forward`. A plain dict: ZeRO-3's hooks rebuild it by type."""

    media: Tensor
    """(B, d), unit norm: of sounds, or of images."""
    text: Tensor
    """(B, d), unit norm."""
    scale: Tensor
    """(), what cosines are multiplied by."""
    recon: Tensor
    """(), the decoder's error on the dropped patches; 0 without a decoder or a target."""
    text_again: NotRequired[Tensor]
    """(B, d), the captions under another dropout; set, like all below, if a loss asks for it."""
    premise: NotRequired[Tensor]
    """(B, d), sentences that have nothing to do with the clips."""
    premise_again: NotRequired[Tensor]
    """(B, d), under another dropout."""
    entailment: NotRequired[Tensor]
    """(B, d), what follows from the premises."""
    contradiction: NotRequired[Tensor]
    """(B, d), what contradicts them."""
    # And negative_1, negative_2, ...: (B, d) each, captions that are wrong for the clips.
    bias: NotRequired[Tensor]
    """(), what is added to the scaled cosines."""
    teacher_media: NotRequired[Tensor]
    """(B, E), unit norm, and with the next two, of loss.distill's teacher: without gradients."""
    teacher_text: NotRequired[Tensor]
    """(B, E), unit norm."""
    teacher_scale: NotRequired[Tensor]
    """()"""
    pair_ids: NotRequired[Tensor]
    """(B, 2 + n) int64: each pair's clip, its caption and its n negatives, by number; equal
    numbers are the same clip, or the same words."""


class Loss(Section):
    """A section of `loss`, and the loss that it configures."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term, by the term's name in metrics.jsonl; 0 turns it off."""
        raise NotImplementedError(f"{type(self).__name__} must name its terms' weights")

    @property
    def active(self) -> bool:
        """Whether any of its terms has a weight."""
        return any(self.weights.values())

    @property
    def sentences(self) -> tuple[str, ...]:
        """Further sentences that the text encoder must embed for it besides `text`, by name.

        `_again` names the same sentence under another dropout, `negative_1`, `negative_2`, ...
        captions that are wrong for the clip; the others are data.nli's.
        """
        return ()

    @property
    def pair_ids(self) -> bool:
        """Whether it needs to know which pairs are of one clip or of equal captions."""
        return False

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The unweighted terms, () each, by the names of `weights`; called if it is active."""
        raise NotImplementedError(f"{type(self).__name__} must compute its terms")


def negative_names(negatives: int) -> tuple[str, ...]:
    """What `sentences` and `Outputs` call so many negatives of each clip."""
    return tuple(f"negative_{number}" for number in range(1, negatives + 1))


def with_negatives(outputs: Outputs, negatives: int) -> Tensor:
    """(B + n B, d): the captions, then each clip's first negative, each one's second, ..."""
    import torch

    found = cast("dict[str, Tensor]", outputs)  # an active loss has what it asks for
    if not negatives:
        return found["text"]
    return torch.cat([found[name] for name in ("text", *negative_names(negatives))])


def ids_of_pairs(outputs: Outputs, duplicates: Duplicates, negatives: int = 0) -> dict[str, Any]:
    """Arguments of a kernel over pairs that say which are duplicates; none to ignore them.

    The ids are of the rows of `with_negatives`. A negative shares its words with a caption, or
    nothing: it is of no clip, also not of the one that it was written for.
    """
    import torch

    if duplicates == "ignore":
        return {}
    ids = cast("dict[str, Tensor]", outputs)["pair_ids"]
    if negatives:
        captions = ids[:, 2 : 2 + negatives].T.reshape(-1)
        no_clip = torch.full_like(captions, -1)
        ids = torch.cat([ids[:, :2], torch.stack([no_clip, captions], dim=1)])
    return {"ids": ids, "duplicates": duplicates}


def check_negatives(name: str, negatives: int, duplicates: Duplicates) -> None:
    """Raise `ConfigError` where a loss is to have negatives beside several positives."""
    rule = f"be ignore or mask with {name}.negatives"
    require(not negatives or duplicates != "positive", f"{name}.duplicates", rule, duplicates)


def product_precision(
    precision: ProductPrecision, device: torch.device
) -> Literal["ieee", "tf32", "bf16"]:
    """The precision of the products on this device: what `auto` is there."""
    import torch

    if precision != "auto":
        return precision
    # Triton's kernels have tf32 on few of AMD's GPUs.
    has_tf32 = device.type == "cuda" and not torch.version.hip
    return "tf32" if has_tf32 and torch.cuda.is_tf32_supported() else "ieee"
