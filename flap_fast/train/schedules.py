"""The learning rate of each step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, base: float, warmup: int, steps: int) -> float:
    """Linear over `warmup` steps, then half a cosine to zero at `steps`; both count from 0.

    Source: LAION-CLAP's and CyCLIP's schedulers (SPEC 9).
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
