"""Floating-point operations of the audio encoder, as fvcore counts them.

    conv N*P^2*D + depth * (12 n D^2 + 2 n^2 D) + (2 depth + 1) * 5 n D        n = K [+ 1 for CLS]

One multiply-add is one FLOP; softmax, GELU and additions are free. The paper embeds all N patches
and masks after; we embed the K that stay (`fused=True`).

    N patches   K kept   P patch side   D width

Source: FLAP section 6.3; SPEC 14, which equals fvcore to the last digit.
"""

from __future__ import annotations

from flap_fast.config import Audio, Mask
from flap_fast.model.masking import kept_patches


def encoder_flops(audio: Audio, mask: Mask, *, clips: int = 1, fused: bool = False) -> int:
    """Multiply-adds of the audio encoder's forward pass over `clips` clips."""
    width, depth, _ = audio.shape
    kept = kept_patches(mask, audio.grid)
    embedded = kept if fused else audio.grid[0] * audio.grid[1]
    n = kept + audio.use_cls
    conv = embedded * audio.patch**2 * width
    blocks = depth * (12 * n * width**2 + 2 * n**2 * width)
    norms = (2 * depth + 1) * 5 * n * width
    return clips * (conv + blocks + norms)
