"""Sigmoid loss (SigLIP): whether a clip and a caption are a pair, asked of each two of all ranks.

    l_ij = scale * a_i . t_j + bias
    L = (1 / B) sum_ij softplus(-l_ij) where i and j are a pair, softplus(l_ij) elsewhere

The scale is the model's own, `logit_scale`; the bias is learned, too. Of B^2 questions only B are
about pairs, so that it begins low. No B x B matrix is stored.

Source: Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343, Eq. 1 and algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from flap_fast.losses.base import Outputs
from flap_fast.losses.pairs import PairLoss
from flap_fast.section import Weight

if TYPE_CHECKING:
    from torch import Tensor


class Sigmoid(PairLoss):
    weight: Weight = 0.0
    """Weight in the total; 0 builds no bias. SigLIP has it alone, with joint.temperature 0.1."""
    bias: float = -10.0
    """Start of the learned bias."""

    @property
    def weights(self) -> dict[str, float]:
        return {"sigmoid": self.weight}

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`sigmoid`: the mean over the global batch's clips, the same on every rank, ()."""
        from flap_kernels import sigmoid_loss

        bias = cast("dict[str, Tensor]", outputs)["bias"]  # there where this loss is active
        return {"sigmoid": sigmoid_loss(**self.kernel_arguments(outputs), bias=bias)}
