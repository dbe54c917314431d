"""A premise and what follows from it, against what follows from other premises or contradicts any.

    S = z1 [z2; z3]^T / temperature          z1 premises   z2 entailments   z3 contradictions
    L = mean(logsumexp_row(S) - S[i, i])     B rows, 2B columns, of all ranks

Contradictions are columns that are no row's positive: hard negatives. S is not stored.

Source: SimCSE, arXiv 2104.08821, Eq. 5, on joint embeddings (SPEC 6.5).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from flap_fast.config import Config
from flap_fast.losses.terms import Terms
from flap_fast.model.two_towers import Outputs
from flap_kernels import distributed_infonce


def nli(outputs: Outputs, config: Config) -> Terms:
    """`nli`: the mean over the global batch, the same on every rank, ()."""
    settings = config.loss.nli
    if not settings.weight:
        return {}
    sentences = cast(dict[str, Tensor], outputs)  # those that a weight above 0 asks the model for
    loss = distributed_infonce(
        sentences["premise"],
        torch.cat([sentences["entailment"], sentences["contradiction"]]),
        1 / settings.temperature,
        direction="a2t",
        equal_sizes=True,
    )
    return {"nli": (settings.weight, loss)}
