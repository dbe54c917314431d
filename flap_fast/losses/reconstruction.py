"""How far the decoder's patches are from those that masking dropped.

    L = mean over clips, dropped patches and their pixels of (predicted - patch)^2

The model's forward takes the error, beside the decoder's last layer: so neither predictions nor
targets are stored, and ZeRO-3 has that layer's weights at hand.

Source: FLAP Eq. 2; per-patch normalisation is AudioMAE's (SPEC 6.6).
"""

from __future__ import annotations

from flap_fast.config import Config
from flap_fast.losses.terms import Terms
from flap_fast.model.two_towers import Outputs


def reconstruction(outputs: Outputs, config: Config) -> Terms:
    """`recon`: this rank's mean, (); the mean over ranks is that of the global batch."""
    weight = config.loss.recon.weight
    return {"recon": (weight, outputs["recon"])} if weight else {}
