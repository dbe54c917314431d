"""Sigmoid loss (SigLIP): whether a clip and a caption are a pair, asked of each two of all ranks.

    l_ij = scale * a_i . t_j + bias
    L = (1 / B) sum_ij softplus(-l_ij) where i and j are a pair, softplus(l_ij) elsewhere

The scale is the model's own, `logit_scale`; the bias is learned, too. Of B^2 questions only B are
about pairs, so that it begins low. No B x B matrix is stored.

Source: Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343, Eq. 1 and algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from pydantic import model_validator

from flap_fast.losses.base import (
    Duplicates,
    Loss,
    Outputs,
    ProductPrecision,
    check_negatives,
    ids_of_pairs,
    negative_names,
    product_precision,
    with_negatives,
)
from flap_fast.section import CountOrZero, Weight

if TYPE_CHECKING:
    from torch import Tensor


class Sigmoid(Loss):
    weight: Weight = 0.0
    """Weight in the total; 0 builds no bias. SigLIP has it alone, with joint.temperature 0.1."""
    bias: float = -10.0
    """Start of the learned bias."""
    duplicates: Duplicates = "ignore"
    """Pairs of one clip, or of captions that are equal but for case, punctuation and white space:
    no pairs with each other (`ignore`), not asked about (`mask`), or pairs (`positive`)."""
    negatives: CountOrZero = 0
    """Captions of each clip that are wrong, as in loss.contrastive: pairs with no clip. Where both
    losses have some, they are the same."""
    scheme: Literal["auto", "replicated", "sharded"] = "auto"
    """How ranks divide the logits; the numbers are the same."""
    precision: ProductPrecision = "auto"
    """Precision of the embeddings in products, as in loss.contrastive."""

    @model_validator(mode="after")
    def _negatives_fit(self):
        check_negatives("loss.sigmoid", self.negatives, self.duplicates)
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {"sigmoid": self.weight}

    @property
    def sentences(self) -> tuple[str, ...]:
        return negative_names(self.negatives)

    @property
    def pair_ids(self) -> bool:
        return self.duplicates != "ignore"

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`sigmoid`: the mean over the global batch's clips, the same on every rank, ()."""
        from flap_kernels import sigmoid_loss

        found = cast("dict[str, Tensor]", outputs)  # an active loss has what it asks for
        loss = sigmoid_loss(
            found["media"],
            with_negatives(outputs, self.negatives),
            found["scale"],
            found["bias"],
            **ids_of_pairs(outputs, self.duplicates, self.negatives),
            scheme=self.scheme,
            equal_sizes=True,  # the loader's are; asking would wait for the device
            precision=product_precision(self.precision, found["media"].device),
        )
        return {"sigmoid": loss}
