"""InfoNCE whose targets are how alike the captions are, or the same for all (label smoothing).

    q = softmax(scale_q * T T^T)      of the captions' own embeddings, without gradients
    L = mean(-sum_j q_ij log softmax_j(S)_ij), S = scale * A T^T; by row, by column, or the mean

With scale_q = 0 every q is 1/B: `loss.contrastive.weight: 0.9` beside a weight of 0.1 here is then
InfoNCE with labels smoothed by 0.1. No B x B matrix is stored.

Source: CWCL, arXiv 2309.14580, and SoftCLIP, arXiv 2303.17561, have targets from within a modality;
label smoothing is of arXiv 1512.00567, section 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from flap_fast.losses.base import Loss, Outputs
from flap_fast.losses.pairs import ProductPrecision, product_precision
from flap_fast.section import Weight

if TYPE_CHECKING:
    from torch import Tensor


class SoftTargets(Loss):
    weight: Weight = 0.0
    """Weight in the total, beside loss.contrastive's: 0.1 and 0.9, or 0.5 each."""
    scale: Annotated[float, Field(ge=0, le=1000)] = 10.0
    """What the captions' cosines are multiplied by; 0: all captions alike (label smoothing)."""
    direction: Literal["symmetric", "a2t", "t2a"] = "symmetric"
    """Probabilities of captions for each clip (a2t), of clips for each caption, or both."""
    scheme: Literal["auto", "replicated", "sharded"] = "auto"
    """How ranks divide the logits; the numbers are the same."""
    precision: ProductPrecision = "auto"
    """Precision of the embeddings in products, as in loss.contrastive."""

    @property
    def weights(self) -> dict[str, float]:
        return {"soft_targets": self.weight}

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`soft_targets`: the mean over the global batch, the same on every rank, ()."""
        from flap_kernels.soft_infonce import soft_infonce

        media, text = outputs["media"], outputs["text"]
        loss = soft_infonce(
            media,
            text,
            outputs["scale"],
            text.detach(),
            text.detach(),
            self.scale,
            direction=self.direction,
            scheme=self.scheme,
            equal_sizes=True,  # the loader's are; asking would wait for the device
            precision=product_precision(self.precision, media.device),
        )
        return {"soft_targets": loss}
