"""The base of a loss: its settings, the sentences it asks for, and its terms.

A loss is one file here and one line in `Losses`. The file imports PyTorch inside its function, for
settings are read before PyTorch is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired, TypedDict

from flap_fast.section import Section

if TYPE_CHECKING:
    from torch import Tensor


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

    @property
    def reads_text(self) -> bool:
        """Whether it compares what the text encoder embeds."""
        return True

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The unweighted terms, () each, by the names of `weights`; called if it is active."""
        raise NotImplementedError(f"{type(self).__name__} must compute its terms")
