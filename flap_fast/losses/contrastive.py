"""InfoNCE between the media and the captions of all ranks.

    S = scale * A T^T
    L = mean(logsumexp_row(S) - diag(S)) / 2 + mean(logsumexp_col(S) - diag(S)) / 2

No B x B matrix is stored; gradients are exact under engines that average over ranks.

Source: FLAP, arXiv 2311.01615, Eq. 1 (`a2t`); the symmetric form is LAION-CLAP's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flap_fast.losses.base import Duplicates, Loss, Outputs, ids_of_pairs
from flap_fast.section import Weight

if TYPE_CHECKING:
    from torch import Tensor


class Contrastive(Loss):
    weight: Weight = 1.0
    """Weight in the total."""
    direction: Literal["symmetric", "a2t", "t2a"] = "symmetric"
    """Mean of both directions (LAION-CLAP, CLIP), or one (FLAP's Eq. 1 is a2t)."""
    duplicates: Duplicates = "ignore"
    """Pairs of one clip, or of captions that are equal but for case, punctuation and white space:
    negatives of each other as all pairs are (`ignore`), none (`mask`), or `positive`s."""
    scheme: Literal["auto", "replicated", "sharded"] = "auto"
    """How ranks divide the logits; the numbers are the same."""
    precision: Literal["ieee", "tf32", "bf16"] = "ieee"
    """Precision of the embeddings in products, summed in fp32: as they are, or rounded for a GPU's
    tensor cores (`tf32` is exact on a CPU). `python -m bench.infonce_precision` prints the cost."""

    @property
    def weights(self) -> dict[str, float]:
        return {"contrastive": self.weight}

    @property
    def pair_ids(self) -> bool:
        return self.duplicates != "ignore"

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`contrastive`: the mean over the global batch, the same on every rank, ()."""
        from flap_kernels import distributed_infonce

        loss = distributed_infonce(
            outputs["media"],
            outputs["text"],
            outputs["scale"],
            **ids_of_pairs(outputs, self.duplicates),
            direction=self.direction,
            scheme=self.scheme,
            equal_sizes=True,  # the loader's are; asking would wait for the device
            precision=self.precision,
        )
        return {"contrastive": loss}
