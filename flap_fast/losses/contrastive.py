"""InfoNCE between the sounds and the captions of all ranks.

    S = scale * A T^T
    L = mean(logsumexp_row(S) - diag(S)) / 2 + mean(logsumexp_col(S) - diag(S)) / 2

No B x B matrix is stored; gradients are exact under engines that average over ranks.

Source: FLAP Eq. 1 (`a2t`); the symmetric form is LAION-CLAP's (SPEC 6.2).
"""

from __future__ import annotations

from flap_fast.config import Config
from flap_fast.losses.terms import Terms
from flap_fast.model.two_towers import Outputs
from flap_kernels import distributed_infonce


def contrastive(outputs: Outputs, config: Config) -> Terms:
    """`contrastive`: the mean over the global batch, the same on every rank, ()."""
    settings = config.loss.contrastive
    if not settings.weight:
        return {}
    loss = distributed_infonce(
        outputs["media"],
        outputs["text"],
        outputs["scale"],
        direction=settings.direction,
        scheme=settings.scheme,
        equal_sizes=True,  # the loader's are; asking would wait for the device
        precision=settings.precision,
    )
    return {"contrastive": (settings.weight, loss)}
