"""Embeddings -> named terms and their weighted total."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flap_fast.config import Config
from flap_fast.losses.contrastive import contrastive
from flap_fast.losses.cyclic import cyclic
from flap_fast.losses.nli import nli
from flap_fast.losses.reconstruction import reconstruction
from flap_fast.losses.simcse import simcse
from flap_fast.losses.terms import Terms
from flap_fast.model.two_towers import Outputs

# A new loss: its file in this folder, its line here, its section (with a weight) in `config.Loss`.
LOSSES: dict[str, Callable[[Outputs, Config], Terms]] = {
    "contrastive": contrastive,
    "cyclic": cyclic,
    "simcse": simcse,
    "nli": nli,
    "recon": reconstruction,
}


def total_loss(outputs: Outputs, config: Config) -> dict[str, Tensor]:
    """Each term whose weight is above 0, unweighted, and their weighted sum `total`, all ()."""
    found: Terms = {}
    for loss in LOSSES.values():
        found |= loss(outputs, config)
    terms = {name: value for name, (_, value) in found.items()}
    terms["total"] = torch.stack([weight * value for weight, value in found.values()]).sum()
    return terms
