"""InfoNCE between the media and the captions of all ranks.

    S = scale * A T^T
    L = mean(logsumexp_row(S) - diag(S)) / 2 + mean(logsumexp_col(S) - diag(S)) / 2

No B x B matrix is stored; gradients are exact under engines that average over ranks.

Source: FLAP, arXiv 2311.01615, Eq. 1 (`a2t`); the symmetric form is LAION-CLAP's. Prefixes:
Matryoshka Representation Learning, arXiv 2205.13147, Eq. 1. Negatives: NegCLIP, arXiv 2210.01936,
section 4, which has hard negative clips, too.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from flap_fast.checks import require
from flap_fast.losses.base import Outputs
from flap_fast.losses.pairs import PairLoss
from flap_fast.section import Count, Weight

if TYPE_CHECKING:
    from torch import Tensor


class Contrastive(PairLoss):
    weight: Weight = 1.0
    """Weight in the total."""
    direction: Literal["symmetric", "a2t", "t2a"] = "symmetric"
    """Mean of both directions (LAION-CLAP, CLIP), or one (FLAP's Eq. 1 is a2t)."""
    prefixes: tuple[Count, ...] = ()
    """Widths of prefixes of the embeddings, ascending to joint.width, whose losses are added
    (Matryoshka): a prefix, normalised, can then stand for the whole. None: the whole alone."""
    prefix_weights: tuple[Weight, ...] = ()
    """Weights of the prefixes' losses; without any 1 each."""

    @model_validator(mode="after")
    def _prefixes_fit(self):
        rule = "be ascending widths"
        ascending = all(a < b for a, b in pairwise(self.prefixes))
        require(ascending, "loss.contrastive.prefixes", rule, list(self.prefixes))
        wanted, given = len(self.prefixes), list(self.prefix_weights)
        rule = f"be one for each of {wanted} prefixes, or none"
        fits = len(given) in (0, wanted)
        require(fits, "loss.contrastive.prefix_weights", rule, given)
        rule, some = "be above 0 for a prefix", not given or any(given)
        require(some, "loss.contrastive.prefix_weights", rule, given)
        return self

    @model_validator(mode="after")
    def _direction_fits(self):
        rule = "be symmetric or a2t with loss.contrastive.negatives, which are columns of a2t"
        fits = not self.negatives or self.direction != "t2a"
        require(fits, "loss.contrastive.direction", rule, self.direction)
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {"contrastive": self.weight}

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`contrastive`: the mean over the global batch, the same on every rank, ()."""
        from flap_kernels import distributed_infonce

        loss = distributed_infonce(
            **self.kernel_arguments(outputs),
            direction=self.direction,
            prefixes=self.prefixes,
            prefix_weights=self.prefix_weights or None,
        )
        return {"contrastive": loss}
