"""Counter-based random numbers: a function of only the seed, the stream and the sample index.

    words = Philox4x32-10(key = (seed, stream), counter = (index_lo, index_hi, block, 0))
    u     = (word >> 8) * 2**-24                     in [0, 1), exact in float32

A sample index is `step * global_batch + row`. So crops, captions, masks and augmentation are the
same for any number of ranks, workers and restarts, on a CPU and on a GPU.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from torch import Tensor

from flap_kernels.philox import philox_words


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
    NEGATIVES = 8
    MIXTURE = 9
    WRITE = 16


def uniforms(seed: int, stream: Stream, sample_index: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each sample.

    Args:
        sample_index: (B,) int64, at least 0, on the device that computes them.

    Returns:
        (B, count) float32, the same bits on every device.
    """
    return philox_words(seed, stream, sample_index, count).float() * 2.0**-24


def permutation(
    seed: int, epoch: int, count: int, salt: int = 0, stream: Stream = Stream.ORDER
) -> np.ndarray:
    """A random permutation, (count,) int64, a function of only its arguments."""
    key = np.random.SeedSequence([seed, int(stream), epoch, salt])
    return np.random.Generator(np.random.Philox(key)).permutation(count)
