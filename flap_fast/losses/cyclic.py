"""How far cosines are from being the same both ways round, over the clips of all ranks.

    cyclic_cross = sum_jk (a_j . t_k - a_k . t_j)^2 / B
    cyclic_in    = sum_jk (a_j . a_k - t_j . t_k)^2 / B

On unit embeddings, without the logit scale; no B x B matrix is stored.

Source: CyCLIP, arXiv 2205.14459, section 3, with its code's division by B; CyCLAP and CyCLIP of
"On the Language Encoder of Contrastive Cross-modal Models" weigh both by 0.25 (SPEC 6.1, 6.3).
"""

from __future__ import annotations

from flap_fast.config import Config
from flap_fast.losses.terms import Terms
from flap_fast.model.two_towers import Outputs
from flap_kernels import cyclic as both_ways


def cyclic(outputs: Outputs, config: Config) -> Terms:
    """`cyclic_cross` and `cyclic_in`, those with a weight; the same on every rank, () each."""
    settings = config.loss.cyclic
    weights = {"cyclic_cross": settings.cross_weight, "cyclic_in": settings.in_weight}
    if not any(weights.values()):
        return {}
    values = both_ways(
        outputs["media"],
        outputs["text"],
        form=settings.form,
        equal_sizes=True,  # the loader's are; asking would wait for the device
    )
    pairs = zip(weights.items(), values, strict=True)
    return {name: (weight, value) for (name, weight), value in pairs if weight}
