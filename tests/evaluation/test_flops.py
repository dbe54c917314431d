"""The published GFLOPs, and formulas by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flap_fast.config import Config, Fusion, Mask
from flap_fast.config.file import load_config
from flap_fast.evaluation.flops import encoder_flops, masking_flops
from flap_fast.model.masking import kept_patches
from tests.tiny import HTSAT, tiny, tiny_clip

BASE = load_config(None, ["audio.size=base"])

# FLAP, arXiv 2311.01615, section 6.3.
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


def masked(config: Config, **mask: Any) -> Config:
    return config.model_copy(update={"mask": Mask(**mask)})


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_gflops_of_eight_clips_match_the_published_table(rounding: str):
    rows = masking_flops(masked(BASE, rounding=rounding))
    found = {(row["kind"], row["unit"], rounding, row["ratio"]): row["gflops"] for row in rows}
    wanted = {key: gflops for key, gflops in TABLE.items() if key[2] == rounding}
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=0.051)


@pytest.mark.parametrize("mask", [{"kind": "none"}, {"kind": "1d"}, {"kind": "2d"}])
@pytest.mark.parametrize("fused", [False, True])
def test_a_vit_has_as_many_as_by_hand(mask: dict, fused: bool):
    """conv N*P^2*D + depth * (12 n D^2 + 2 n^2 D) + (2 depth + 1) * 5 n D, n = K and [CLS]."""
    config = masked(tiny("audio.depth=3", "audio.heads=2", "audio.width=64"), **mask)
    N, P, D, depth = 7 * 8, 16, 64, 3
    kept = kept_patches(config.mask, (7, 8))
    n = kept + 1
    embedding = (kept if fused else N) * P**2 * D
    blocks, norms = depth * (12 * n * D**2 + 2 * n**2 * D), (2 * depth + 1) * 5 * n * D
    assert encoder_flops(config, clips=3, fused=fused) == 3 * (embedding + blocks + norms)


def test_htsat_has_as_many_as_by_hand():
    """Windows of w patches: depth * (12 N D^2 + 2 N w D) a stage, and merges of 2 N D^2."""
    config = tiny(*HTSAT, "text.pool=mean")
    N, D, w = 16 * 16, 16, 8 * 8
    first, second = (2 * (12 * n * d**2 + 2 * n * w * d) for n, d in ((N, D), (N // 4, 2 * D)))
    products = N * 4**2 * D + first + second + 2 * N * D**2
    # One behind the patches, two in each block, one in the merge, one at the end.
    norms = 5 * (N * D + 2 * 2 * N * D + N // 4 * 4 * D + 2 * 2 * N // 4 * 2 * D + N // 4 * 2 * D)
    batch_norm = 2 * 101 * 16
    assert encoder_flops(config) == products + norms + batch_norm
    assert [row["kept"] for row in masking_flops(config)] == [N]


def test_fusion_adds_nothing_to_the_count():
    fused = tiny("fusion.type=aff_2d", "fusion.max_duration_s=2")
    assert encoder_flops(fused) == encoder_flops(tiny())


def test_a_resnet_of_clip_is_counted_by_its_convolutions():
    """The first convolution by hand; the whole grows with the square of the resolution."""
    small, large = tiny_clip(), tiny_clip("image.resolution=64")
    assert encoder_flops(small) > 16**2 * 3 * 9 * 4
    assert 3.5 < encoder_flops(large) / encoder_flops(small) < 4.5


class Linear(nn.Module):
    """An encoder that nobody knows: one product and one norm."""

    def __init__(self):
        super().__init__()
        self.product, self.norm = nn.Linear(6, 5), nn.LayerNorm(5)

    def forward(self, media: torch.Tensor) -> torch.Tensor:
        return self.norm(self.product(media.flatten(1)))


class New:
    """Settings of that encoder, as `config.encoder` has them."""

    encoder, modality, can, grid = "new", "audio", frozenset(), (0, 0)

    def input_shape(self, fusion: Fusion) -> tuple[int, ...]:
        return 1, 3, 2

    def build(self, config: Any) -> nn.Module:
        return Linear()


def test_an_encoder_that_nobody_knows_is_counted(monkeypatch: pytest.MonkeyPatch):
    config = tiny()
    monkeypatch.setattr(Config, "encoder", property(lambda _: New()))
    assert encoder_flops(config, clips=8) == 8 * (6 * 5 + 5 * 5)
    (row,) = masking_flops(config, clips=1)
    assert (row["gflops"], row["kept"]) == (55e-9, None)
