"""Counter-based random numbers, a function of seed, stream and counter: Philox4x32-10.

    word[n] = Philox4x32-10(key = (seed, stream), counter = (c_lo, c_hi, n // 4, 0))[n % 4]

The same bits on every device. Plain PyTorch; `patch_mask` draws the same words in Triton.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
"""The low 32 bits."""
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_words(seed: int, stream: int, counters: Tensor, count: int) -> Tensor:
    """The first `count` words of each counter, without their low 8 bits: (B, count) int64.

    In [0, 2**24), so that `words.float() * 2.0**-24` is uniform in [0, 1) and exact in float32.

    Args:
        seed: its low 32 bits are the first half of the key.
        stream: its low 32 bits are the other half: two streams share no number.
        counters: (B,) int64 or int32, at least 0, on the device that is to draw.
        count: how many words; four of them come from one block.
    """
    counters = counters.long()
    blocks = torch.arange(-(-count // 4), device=counters.device)
    counter = (
        (counters & LOW)[:, None],
        (counters >> 32)[:, None],
        blocks,
        torch.zeros_like(blocks),
    )
    words = philox(torch.broadcast_tensors(*counter), seed & LOW, stream & LOW)
    return (torch.stack(words, -1) >> 8).flatten(1)[:, :count]


def philox(counter: Sequence[Tensor], key0: int, key1: int) -> list[Tensor]:
    """Philox4x32-10: the four words of each counter.

    Args:
        counter: four int64 tensors of one shape that hold 32-bit words, the lowest first.
        key0, key1: the key's 32-bit words.
    """
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # The product wraps at 2**64, which leaves all 64 bits right; only the shift is masked.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32 & LOW) ^ c1 ^ key0, p1 & LOW
        c2, c3 = (p0 >> 32 & LOW) ^ c3 ^ key1, p0 & LOW
        key0, key1 = (key0 + _WEYL[0]) & LOW, (key1 + _WEYL[1]) & LOW
    return [c0, c1, c2, c3]
