"""SpecAug: stripes of time and of frequency that training masks in a log-mel.

Source: Park et al., "SpecAugment", Interspeech 2019; its draws are torchaudio's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flap_fast.config import Audio, SpecAug
from flap_fast.data.preprocess.log_mel import normalise
from flap_fast.data.random_streams import Stream, uniforms


def spec_augment(
    mel: Tensor, settings: SpecAug, audio: Audio, seed: int, sample_index: Tensor
) -> Tensor:
    """Mask stripes of time and of frequency in each clip, the same in all of its channels.

    Masked cells become what `normalise` makes of 0 (AudioMAE masks first), or 0.

    Args:
        mel: (B, C, T, F), normalised.
        sample_index: (B,) int64, key of the random numbers.

    Source: torchaudio's masking semantics: width U[0, P), start U[0, size - width), both floored.
    """
    covered = stripes(settings, seed, sample_index, (mel.shape[-2], mel.shape[-1]))
    zero = mel.new_zeros(())
    zero = zero if settings.domain == "post_norm" else normalise(zero, audio)
    return mel.masked_fill(covered[:, None], zero)


def stripes(
    settings: SpecAug,
    seed: int,
    sample_index: Tensor,
    shape: tuple[int, int],
    *,
    whole: bool = False,
) -> Tensor:
    """(B, T, F) bool: the cells of each clip that SpecAug masks.

    Args:
        whole: draw a whole width, then a whole start (torchlibrosa), not their floors (torchaudio).
    """
    u = uniforms(seed, Stream.SPECAUG, sample_index, 4 * settings.stripes)
    T, F = shape
    time = freq = torch.zeros(1, 1, dtype=torch.bool, device=sample_index.device)
    for n in range(0, 4 * settings.stripes, 4):
        time = time | _stripe(u[:, n], u[:, n + 1], settings.time_frames, T, whole)
        freq = freq | _stripe(u[:, n + 2], u[:, n + 3], settings.freq_bins, F, whole)
    return time[:, :, None] | freq[:, None, :]


def _stripe(width: Tensor, start: Tensor, widest: int, size: int, whole: bool) -> Tensor:
    """(B, size) bool: the cells that a mask of each clip covers."""
    width = width * min(widest, size)
    width = width.floor() if whole else width
    first = (start * (size - width)).floor()
    cells = torch.arange(size, device=width.device)
    return (cells >= first[:, None]) & (cells < (first + width.floor())[:, None])
