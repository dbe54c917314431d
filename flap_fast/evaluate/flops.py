"""Floating-point operations of the audio encoder as fvcore counts them: SPEC 14's table.

    conv N*P^2*D + depth * (12 n D^2 + 2 n^2 D) + (2 depth + 1) * 5 n D        n = K [+ 1 for CLS]

One multiply-add is one FLOP; softmax, GELU and additions are free. The paper embeds all N patches
and masks after; we embed the K that stay (`fused=True`). HTSAT's attention is within windows of w
patches, and merges of 2 N D^2 follow all stages but one:

    conv N*P^2*D + sum over stages of depth * (12 N D^2 + 2 N w D) + 2 N D^2 + norms

Both are without the pieces that feature fusion adds. What a device has to do in a whole step is
counted in `profile.flop`.

    N patches   K kept   P patch side   D width

Source: FLAP section 6.3; SPEC 14, which equals fvcore to the last digit.
"""

from __future__ import annotations

from typing import Any

from flap_fast.config import Audio, Mask
from flap_fast.model.masking import kept_patches


def encoder_flops(audio: Audio, mask: Mask, *, clips: int = 1, fused: bool = False) -> int:
    """Multiply-adds of the audio encoder's forward pass over `clips` clips."""
    if audio.encoder == "htsat":
        conv, blocks, merges = htsat_products(audio)
        return clips * (conv + sum(blocks) + merges + _htsat_norms(audio))
    width, depth, _ = audio.shape
    kept = kept_patches(mask, audio.grid)
    embedded = kept if fused else audio.grid[0] * audio.grid[1]
    n = kept + audio.use_cls
    conv = embedded * audio.patch**2 * width
    blocks = block_products(n, width, 4 * width) * depth
    norms = (2 * depth + 1) * 5 * n * width
    return clips * (conv + blocks + norms)


def htsat_products(audio: Audio) -> tuple[int, list[int], int]:
    """Of one clip: the patches' embedding, each block, all merges."""
    N, last = audio.grid[0] ** 2, len(audio.stages) - 1
    conv, blocks, merges = N * audio.patch**2 * audio.stages[0][0], [], 0
    for n, (width, depth, _) in enumerate(audio.stages):
        window = min(N, audio.window_patches**2)
        blocks += [N // window * block_products(window, width, 4 * width)] * depth
        if n < last:
            merges += 2 * N * width**2
            N //= 4
    return conv, blocks, merges


def _htsat_norms(audio: Audio) -> int:
    """Two numbers of the first norm for each cell of the log-mel, five for each of a LayerNorm."""
    N = audio.grid[0] ** 2
    numbers = N * audio.stages[0][0]
    for width, depth, _ in audio.stages:
        # Two in each block, one behind them: in the merge, or the last.
        numbers += N * width * (2 * depth + 1)
        N //= 4
    return 2 * audio.frames * audio.mel_bins + 5 * numbers


def block_products(tokens: int, width: int, inner: int) -> int:
    """Multiply-adds of one transformer block over one sequence."""
    return tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width


# Kind, unit, and the ratios of SPEC 14's table; 2-D masking drops as much of both axes.
_SCHEMES = (("none", "token", (0,)), ("1d", "token", range(1, 8)))
_SCHEMES += (("1d", "frame", range(1, 8)), ("2d", "token", range(1, 6)))


def masking_flops(audio: Audio, mask: Mask, clips: int = 8) -> list[dict[str, Any]]:
    """GFLOPs of a forward pass over masking schemes and ratios, rounded as `mask` says.

    `gflops` embeds all patches, as the papers count; `gflops_fused` those that stay, as we do.
    """
    rows = []
    # HTSAT cannot be masked: its table is one row.
    for kind, unit, tenths in _SCHEMES if audio.encoder == "vit" else _SCHEMES[:1]:
        for ratio in (n / 10 for n in tenths):
            ratios = {"ratio": ratio, "time_ratio": ratio, "freq_ratio": ratio}
            scheme = mask.model_copy(update={"kind": kind, "unit": unit, **ratios})
            whole, fused = (
                encoder_flops(audio, scheme, clips=clips, fused=fused) / 1e9
                for fused in (False, True)
            )
            row = {"kind": kind, "unit": unit, "ratio": ratio, "clips": clips}
            kept = kept_patches(scheme, audio.grid)
            rows.append({**row, "kept": kept, "gflops": whole, "gflops_fused": fused})
    return rows
