"""Embeddings -> named terms and their weighted total."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flap_fast.config import Config
from flap_fast.loss.contrastive import contrastive
from flap_fast.loss.reconstruction import reconstruction
from flap_fast.model.flap import Outputs

# A new loss: its file in this folder, its line here, its section (with a weight) in `config.Loss`.
LOSSES: dict[str, Callable[[Outputs, Config], Tensor]] = {
    "contrastive": contrastive,
    "recon": reconstruction,
}


def total_loss(outputs: Outputs, config: Config) -> dict[str, Tensor]:
    """Each term whose weight is above 0, unweighted, and their weighted sum `total`, all ()."""
    weights = {name: getattr(config.loss, name).weight for name in LOSSES}
    terms = {name: LOSSES[name](outputs, config) for name, weight in weights.items() if weight > 0}
    terms["total"] = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return terms
