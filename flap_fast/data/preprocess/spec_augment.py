"""SpecAug: stripes of time and of frequency that training masks in a log-mel.

Source: Park et al., "SpecAugment", Interspeech 2019; its draws are torchaudio's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flap_fast.config import Audio, SpecAug
from flap_fast.data.batch import PackedMels, to_device
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
    return mel.masked_fill(covered[:, None], _zero(mel, settings, audio))


def spec_augment_packed(
    media: PackedMels, settings: SpecAug, audio: Audio, seed: int, sample_index: Tensor
) -> PackedMels:
    """`spec_augment` of packed clips, stripes of time in each as wide as its length allows.

    Args:
        sample_index: (B,) int64 of the clips in their packed order.

    Source: Park et al., "SpecAugment on large scale datasets", arXiv 1912.05533 (adaptive size).
    """
    T, F = media.mel.shape
    frames = to_device(torch.tensor(media.frames), media.device)
    clip = torch.arange(len(frames), device=media.device).repeat_interleave(frames, output_size=T)
    at = torch.arange(T, device=media.device) - (frames.cumsum(0) - frames)[clip]
    widest = min(settings.time_frames, audio.frames) * (frames / audio.frames).clamp(max=1)
    u = uniforms(seed, Stream.SPECAUG, sample_index, 4 * settings.stripes)
    covered = torch.zeros(T, F, dtype=torch.bool, device=media.device)
    for n in range(0, 4 * settings.stripes, 4):
        first, last = _bounds(u[:, n], u[:, n + 1], widest, frames, whole=False)
        covered |= ((at >= first[clip]) & (at < last[clip]))[:, None]
        covered |= _stripe(u[:, n + 2], u[:, n + 3], settings.freq_bins, F, whole=False)[clip]
    zero = _zero(media.mel, settings, audio)
    return media._replace(mel=media.mel.masked_fill(covered, zero))


def _zero(mel: Tensor, settings: SpecAug, audio: Audio) -> Tensor:
    """What masked cells become, ()."""
    zero = mel.new_zeros(())
    return zero if settings.domain == "post_norm" else normalise(zero, audio)


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
    first, last = _bounds(width, start, min(widest, size), size, whole)
    cells = torch.arange(size, device=width.device)
    return (cells >= first[:, None]) & (cells < last[:, None])


def _bounds(
    width: Tensor, start: Tensor, widest: int | Tensor, size: int | Tensor, whole: bool
) -> tuple[Tensor, Tensor]:
    """(B,) twice: the first cell of each clip's mask, and the first behind it."""
    width = width * widest
    width = width.floor() if whole else width
    first = (start * (size - width)).floor()
    return first, first + width.floor()
