"""SimCSE: two dropout views of a sentence, against the other sentences of all ranks.

    S = z z+^T / temperature
    L = mean(logsumexp_row(S) - diag(S))

Both come from one pass of the text encoder over the sentences and their copies; the captions' first
view is the embedding that the contrastive loss has. No B x B matrix is stored.

Source: SimCSE, arXiv 2104.08821, Eq. 4, on joint embeddings, without its training-only head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flap_fast.losses.base import Loss, Outputs
from flap_fast.section import Positive, Weight

if TYPE_CHECKING:
    from torch import Tensor


class SimCSE(Loss):
    weight: Weight = 0.0
    """Weight in the total. The sentences go through the text encoder twice."""
    temperature: Positive = 0.05
    """Divides the cosines; fixed."""
    on: Literal["captions", "nli"] = "captions"
    """Which sentences: the clips' captions, or as many premises of data.nli (CLIPe)."""

    @property
    def weights(self) -> dict[str, float]:
        return {"simcse": self.weight}

    @property
    def sentences(self) -> tuple[str, ...]:
        """The two views of a sentence."""
        return {"captions": ("text", "text_again"), "nli": ("premise", "premise_again")}[self.on]

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`simcse`: the mean over the global batch, the same on every rank, ()."""
        from flap_kernels import distributed_infonce

        first, again = (outputs[name] for name in self.sentences)
        temperature = self.temperature
        loss = distributed_infonce(first, again, 1 / temperature, direction="a2t", equal_sizes=True)
        return {"simcse": loss}
