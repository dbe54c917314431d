"""Floating-point operations of the audio encoder, as fvcore counts them.

    conv N*P^2*D + depth * (12 n D^2 + 2 n^2 D) + (2 depth + 1) * 5 n D        n = K [+ 1 for CLS]

One multiply-add is one FLOP; softmax, GELU and additions are free. The paper embeds all N patches
and masks after; we embed the K that stay (`fused=True`).

HTSAT's attention is within windows of L patches, and three merges of 2 N D^2 follow its stages:

    conv N*P^2*D + sum over stages of depth * (12 N D^2 + 2 N L D) + 2 N D^2 + norms

    N patches   K kept   P patch side   D width

Source: FLAP section 6.3; SPEC 14, which equals fvcore to the last digit.
"""

from __future__ import annotations

from flap_fast.config import Audio, Mask
from flap_fast.model.masking import kept_patches


def encoder_flops(audio: Audio, mask: Mask, *, clips: int = 1, fused: bool = False) -> int:
    """Multiply-adds of the audio encoder's forward pass over `clips` clips."""
    if audio.encoder == "htsat":
        return clips * _htsat_flops(audio)
    width, depth, _ = audio.shape
    kept = kept_patches(mask, audio.grid)
    embedded = kept if fused else audio.grid[0] * audio.grid[1]
    n = kept + audio.use_cls
    conv = embedded * audio.patch**2 * width
    blocks = depth * (12 * n * width**2 + 2 * n**2 * width)
    norms = (2 * depth + 1) * 5 * n * width
    return clips * (conv + blocks + norms)


def _htsat_flops(audio: Audio) -> int:
    N, last = audio.grid[0] ** 2, len(audio.stages) - 1
    flops = N * audio.patch**2 * audio.stages[0][0]
    # Two numbers of the first norm for each cell of the log-mel, five for each of a LayerNorm.
    flops += 2 * audio.frames * audio.mel_bins + 5 * N * audio.stages[0][0]
    for n, (width, depth, _) in enumerate(audio.stages):
        window = min(N, audio.window_patches**2)
        flops += depth * (12 * N * width**2 + 2 * N * window * width + 2 * 5 * N * width)
        flops += 5 * N * width
        if n < last:
            flops += 2 * N * width**2
            N //= 4
    return flops
