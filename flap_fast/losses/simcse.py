"""A sentence and itself under another dropout, against the other sentences of all ranks.

    S = z z+^T / temperature
    L = mean(logsumexp_row(S) - diag(S))

Both come from one pass of the text tower over the sentences and their copies; the captions' first
view is the embedding that the contrastive loss has. No B x B matrix is stored.

Source: SimCSE, arXiv 2104.08821, Eq. 4, on joint embeddings, without its training-only head (SPEC
6.4, D30, D31).
"""

from __future__ import annotations

from flap_fast.config import Config
from flap_fast.losses.terms import Terms
from flap_fast.model.two_towers import Outputs
from flap_kernels import distributed_infonce


def simcse(outputs: Outputs, config: Config) -> Terms:
    """`simcse`: the mean over the global batch, the same on every rank, ()."""
    settings = config.loss.simcse
    if not settings.weight:
        return {}
    first, again = (outputs[name] for name in settings.views)
    loss = distributed_infonce(
        first,
        again,
        1 / settings.temperature,
        direction="a2t",
        equal_sizes=True,
    )
    return {"simcse": (settings.weight, loss)}
