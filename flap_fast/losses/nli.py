"""Supervised SimCSE: a premise and its entailment, against other entailments and contradictions.

    S = z1 [z2; z3]^T / temperature          z1 premises   z2 entailments   z3 contradictions
    L = mean(logsumexp_row(S) - S[i, i])     B rows, 2B columns, of all ranks

Contradictions are columns that are no row's positive: hard negatives. S is not stored.

Source: SimCSE, arXiv 2104.08821, Eq. 5, on joint embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from flap_fast.losses.base import Loss, Outputs
from flap_fast.section import Positive, Weight

if TYPE_CHECKING:
    from torch import Tensor


class NLI(Loss):
    weight: Weight = 0.0
    """Weight in the total. Three sentences of data.nli for each clip."""
    temperature: Positive = 0.05
    """Divides the cosines; fixed."""

    @property
    def weights(self) -> dict[str, float]:
        return {"nli": self.weight}

    @property
    def sentences(self) -> tuple[str, ...]:
        return "premise", "entailment", "contradiction"

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`nli`: the mean over the global batch, the same on every rank, ()."""
        import torch

        from flap_kernels import distributed_infonce

        sentences = cast("dict[str, Tensor]", outputs)  # an active loss has what it asks for
        loss = distributed_infonce(
            sentences["premise"],
            torch.cat([sentences["entailment"], sentences["contradiction"]]),
            1 / self.temperature,
            direction="a2t",
            equal_sizes=True,
        )
        return {"nli": loss}
