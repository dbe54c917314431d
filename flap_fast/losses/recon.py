"""Masked reconstruction: the error of the decoder's patches against those that masking dropped.

    L = mean over clips, dropped patches and their pixels of (predicted - patch)^2

The model's forward computes the error with the decoder's last layer: so neither predictions nor
targets are stored, and ZeRO-3 has that layer's weights gathered.

Source: FLAP, arXiv 2311.01615, Eq. 2; per-patch normalisation is AudioMAE's, arXiv 2207.06405.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flap_fast.losses.base import Loss, Outputs
from flap_fast.section import Weight

if TYPE_CHECKING:
    from torch import Tensor


class Recon(Loss):
    weight: Weight = 0.0
    """Weight in the total; 0 builds no decoder. FLAP gives none; AudioMAE's is 1."""
    norm_pix: bool = True
    """Compare with patches brought to mean 0 and variance 1 each (as AudioMAE trains)."""
    target: Literal["clean", "augmented"] = "clean"
    """What is reconstructed: the log-mel before SpecAug, or after it."""

    @property
    def weights(self) -> dict[str, float]:
        return {"recon": self.weight}

    @property
    def reads_text(self) -> bool:
        return False

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`recon`: this rank's mean, (); the mean over ranks is that of the global batch."""
        return {"recon": outputs["recon"]}
