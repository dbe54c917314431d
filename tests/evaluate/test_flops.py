"""The table of SPEC 14, and PyTorch's own count."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flap_fast.config import Audio, Mask
from flap_fast.encoders.vit.model import ViT
from flap_fast.evaluate.flops import encoder_flops
from flap_fast.model.masking import patch_mask

BASE = Audio(size="base")

TABLE = {
    ("none", "token", "floor", 0.0): 388.58,
    **{
        ("1d", "token", "floor", r / 10): g
        for r, g in enumerate((345.7, 304.5, 264.0, 224.3, 185.4, 146.5, 109.1), 1)
    },
    **{
        ("1d", "frame", "floor", r / 10): g
        for r, g in enumerate((342.5, 303.7, 259.3, 222.0, 185.4, 143.5, 108.3), 1)
    },
    **{
        ("2d", "token", "floor", r / 10): g
        for r, g in enumerate((296.5, 223.5, 158.3, 108.3, 91.0), 1)
    },
    **{
        ("2d", "token", "ceil", r / 10): g
        for r, g in enumerate((349.0, 268.7, 196.0, 139.8, 91.0), 1)
    },
}


@pytest.mark.parametrize(("mask", "gflops"), TABLE.items())
def test_gflops_of_eight_clips_match_the_table(mask: tuple, gflops: float):
    kind, unit, rounding, ratio = mask
    settings = Mask(
        kind=kind, unit=unit, rounding=rounding, ratio=ratio, time_ratio=ratio, freq_ratio=ratio
    )
    assert encoder_flops(BASE, settings, clips=8) / 1e9 == pytest.approx(gflops, abs=0.051)


def embedding_flops(mel, keep, weight, *_, out_shape, **__) -> int:
    """Of an op of ours, which PyTorch's counter cannot look into."""
    return 2 * keep[0] * keep[1] * weight[0] * weight[1]


@pytest.mark.parametrize("kind", ["none", "1d", "2d"])
def test_products_are_as_many_as_pytorch_counts_in_the_model(kind: str):
    audio = Audio(size="tiny", width=64, depth=3, heads=2)
    mask = Mask(kind=kind)  # type: ignore[arg-type]
    plan = patch_mask(mask, audio.grid, 0, torch.arange(2))
    model, mel = ViT(audio), torch.randn(2, 1, audio.frames, audio.mel_bins)
    # Attention as plain products: the counter does not know the CPU's fused one.
    ours = {torch.ops.flap_kernels.patch_embed: embedding_flops}
    counter = FlopCounterMode(display=False, custom_mapping=ours)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(mel, None if plan is None else plan.ids_keep)
    kept = audio.grid[0] * audio.grid[1] if plan is None else plan.ids_keep.shape[1]
    norms = 2 * (2 * 3 + 1) * 5 * (kept + 1) * 64  # PyTorch counts products alone
    products = encoder_flops(audio, mask, clips=2, fused=True) - norms
    assert counter.get_total_flops() == 2 * products  # it counts a multiply-add as two
