"""Cyclic consistency (CyCLIP): symmetric cosines, over the clips of all ranks.

    cyclic_cross = sum_jk (a_j . t_k - a_k . t_j)^2 / B
    cyclic_in    = sum_jk (a_j . a_k - t_j . t_k)^2 / B

On unit embeddings, without the logit scale; no B x B matrix is stored.

Source: CyCLIP, arXiv 2205.14459, section 3, with its code's division by B; CyCLAP and CyCLIP of
"On the Language Encoder of Contrastive Cross-modal Models" weigh both by 0.25.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flap_fast.losses.base import Loss, Outputs
from flap_fast.section import Weight

if TYPE_CHECKING:
    from torch import Tensor


class Cyclic(Loss):
    cross_weight: Weight = 0.0
    """Weight of `cyclic_cross`: sound j with caption k as sound k with caption j (C-cyclic)."""
    in_weight: Weight = 0.0
    """Weight of `cyclic_in`: sounds j and k as alike as their captions (I-cyclic)."""
    form: Literal["auto", "tiled", "gram"] = "auto"
    """How it is computed; the numbers are the same. `auto` takes what does less for the batch."""

    @property
    def weights(self) -> dict[str, float]:
        return {"cyclic_cross": self.cross_weight, "cyclic_in": self.in_weight}

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`cyclic_cross` and `cyclic_in`; the same on every rank, () each."""
        from flap_kernels import cyclic

        cross, within = cyclic(
            outputs["media"],
            outputs["text"],
            form=self.form,
            equal_sizes=True,  # the loader's are; asking would wait for the device
        )
        return {"cyclic_cross": cross, "cyclic_in": within}
