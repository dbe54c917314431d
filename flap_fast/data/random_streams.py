"""Counter-based random numbers: a function of the seed, the stream and the sample index alone.

    words = Philox4x32-10(key = (seed, stream), counter = (index_lo, index_hi, block, 0))
    u     = (word >> 8) * 2**-24                     in [0, 1), exact in float32

A sample index is `step * global_batch + row`. So crops, captions, masks and augmentation are the
same for any number of ranks, workers and restarts, on a CPU and on a GPU.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """The use of a random number; two streams never share one."""

    ORDER = 0
    CROP = 1
    CAPTION = 2
    MASK = 3
    MASK_INNER = 4
    SPECAUG = 5
    EVAL_CROP = 6
    NLI = 7
    WRITE = 16


def uniforms(seed: int, stream: Stream, sample_index: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each sample.

    Args:
        sample_index: (B,) int64, at least 0, on the device that computes them.

    Returns:
        (B, count) float32, the same bits on every device.
    """
    blocks = torch.arange(-(-count // 4), device=sample_index.device)
    counter = [
        (sample_index & _LOW)[:, None].expand(-1, len(blocks)),
        (sample_index >> 32)[:, None].expand(-1, len(blocks)),
        blocks[None, :].expand(len(sample_index), -1),
        torch.zeros_like(blocks)[None, :].expand(len(sample_index), -1),
    ]
    words = torch.stack(_philox(counter, seed & _LOW, int(stream)), -1)
    return ((words >> 8).float() * 2.0**-24).flatten(1)[:, :count]


def permutation(
    seed: int, epoch: int, count: int, salt: int = 0, stream: Stream = Stream.ORDER
) -> np.ndarray:
    """A random permutation, (count,) int64, a function of its arguments alone."""
    key = np.random.SeedSequence([seed, int(stream), epoch, salt])
    return np.random.Generator(np.random.Philox(key)).permutation(count)


def _philox(counter: list[Tensor], key0: int, key1: int) -> list[Tensor]:
    """Ten rounds on four int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # The product wraps at 2**64, which leaves all 64 bits right; only the shift must be masked.
        p0, p1 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _LOW) ^ c1 ^ key0,
            p1 & _LOW,
            (p0 >> 32 & _LOW) ^ c3 ^ key1,
            p0 & _LOW,
        )
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]
