"""Embeddings -> named terms and their weighted total.

A loss is a file here and a line in `Losses`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from flap_fast.checks import require
from flap_fast.losses.base import Loss, Outputs
from flap_fast.losses.contrastive import Contrastive
from flap_fast.losses.cyclic import Cyclic
from flap_fast.losses.distill import Distill
from flap_fast.losses.nli import NLI
from flap_fast.losses.recon import Recon
from flap_fast.losses.sigmoid import Sigmoid
from flap_fast.losses.simcse import SimCSE
from flap_fast.losses.soft_targets import SoftTargets
from flap_fast.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from flap_fast.config import Config

__all__ = [
    "NLI",
    "Contrastive",
    "Cyclic",
    "Distill",
    "Loss",
    "Losses",
    "Outputs",
    "Recon",
    "Sigmoid",
    "SimCSE",
    "SoftTargets",
    "total_loss",
]


class Losses(Section):
    contrastive: Contrastive = Contrastive()
    sigmoid: Sigmoid = Sigmoid()
    cyclic: Cyclic = Cyclic()
    simcse: SimCSE = SimCSE()
    nli: NLI = NLI()
    recon: Recon = Recon()
    distill: Distill = Distill()
    soft_targets: SoftTargets = SoftTargets()
    # one line for each loss

    @property
    def active(self) -> dict[str, Loss]:
        """The losses that have a weight, by their sections' names."""
        return {name: loss for name, loss in self if loss.active}

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the text encoder embeds for each clip, in its rows' order: `text` is the caption."""
        asked = (name for loss in self.active.values() for name in loss.sentences)
        return tuple(dict.fromkeys(("text", *asked)))

    @property
    def negatives(self) -> int:
        """Captions of each clip that are wrong for it: as many as the loss that asks for most."""
        return sum(name.startswith("negative_") for name in self.sentences)

    @property
    def pair_ids(self) -> bool:
        """Whether an active loss asks which pairs are of one clip or of equal captions."""
        return any(loss.pair_ids for loss in self.active.values())

    @property
    def reads_text(self) -> bool:
        """Whether an active loss reads captions; clips need none otherwise."""
        return any(loss.reads_text for loss in self.active.values())

    @model_validator(mode="after")
    def _something(self):
        require(
            bool(self.active), "loss.contrastive.weight", "be above 0 where no other loss is", 0
        )
        return self


def total_loss(outputs: Outputs, config: Config) -> dict[str, Tensor]:
    """Each term whose weight is above 0, unweighted, and their weighted sum `total`, all ()."""
    import torch

    terms: dict[str, Tensor] = {}
    weighted: list[Tensor] = []
    for loss in config.loss.active.values():
        values = loss.terms(outputs)
        for name, weight in loss.weights.items():
            if weight:
                terms[name] = values[name]
                weighted.append(weight * values[name])
    terms["total"] = torch.stack(weighted).sum()
    return terms
