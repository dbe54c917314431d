"""Rotary time positions: turned queries and keys, wherever masking and packing put a patch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.checks import ConfigError
from flap_fast.encoders.rotary import rotated, rotation
from flap_fast.encoders.vit.model import ViT
from flap_fast.encoders.vit.patches import patchify
from flap_kernels import PatchMask
from tests.tiny import tiny, vit_of

ROTARY = "audio.time_positions=rotary"


def vit(*overrides: str) -> ViT:
    """In evaluation, with weights far enough from zero for attention to choose."""
    torch.manual_seed(0)
    model = ViT(vit_of(tiny(ROTARY, *overrides))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("qkv.weight"):
                p.mul_(4)
    return model


def test_a_pair_of_numbers_is_turned_by_its_positions_angle():
    x = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 2.0]]])  # (L, H, d)
    y = rotated(x, rotation(torch.tensor([0, 3, 1]), 2))
    wanted = [[1, 0], [math.cos(3), math.sin(3)], [-2 * math.sin(1), 2 * math.cos(1)]]
    torch.testing.assert_close(y[:, 0], torch.tensor(wanted))
    angles = rotation(torch.tensor([100]), 4)[1].flatten()  # its second pair turns 100 times less
    torch.testing.assert_close(angles, torch.tensor([100.0, 1.0]).sin())


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float32)

    def product(i: int, j: int) -> Tensor:
        turned = (rotated(x, rotation(torch.tensor([n]), 16)) for x, n in ((q, i), (k, j)))
        return (next(turned) * next(turned)).sum()

    torch.testing.assert_close(product(7, 2), product(105, 100), rtol=0, atol=1e-4)
    assert abs(product(7, 2) - product(2, 7)) > 1e-2


def test_halves_are_turned_in_float32():
    x, turn = torch.randn(5, 2, 8).bfloat16(), rotation(torch.arange(5) * 300, 8)
    y = rotated(x, turn)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotated(x.float(), turn).bfloat16())


def in_plain_words(model: ViT, mel: Tensor, ids_keep: Tensor) -> Tensor:
    """Tokens of (1, T, F), each of its kept patches turned as complex numbers by its column."""
    settings, rows = model.settings, model.settings.grid[1]
    (width, _, heads), linear = settings.shape, functional.linear
    patches = patchify(mel[None], settings.patch)[0, ids_keep]
    x = linear(patches, model.patch_embed.weight, model.patch_embed.bias)  # type: ignore[arg-type]
    row = torch.stack([model.pos_embed[n % rows] for n in ids_keep.tolist()])
    x, column = x + row, ids_keep // rows
    if model.cls_token is not None:
        x, column = torch.cat([model.cls_token[0], x]), functional.pad(column, (1, 0))
    pair = torch.arange(width // heads // 2)
    turn = torch.polar(torch.tensor(1.0), column[:, None] / 10_000.0 ** (2 * pair * heads / width))
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(-1, 3, heads, width // heads).unbind(1)  # type: ignore[operator]
        q, k = (torch.complex(*y.chunk(2, -1)) * turn[:, None] for y in (q, k))
        scores = torch.einsum("ihd,jhd->hij", q, k.conj()).real * (width // heads) ** -0.5
        y = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
        x = x + block.attn.proj(y.flatten(1))  # type: ignore[operator]
        x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
    return model.norm(x)


@pytest.mark.parametrize("use_cls", ["true", "false"])
def test_a_kept_patch_is_turned_by_its_own_column(use_cls: str):
    model, mel = vit(f"audio.use_cls={use_cls}"), torch.randn(2, 1, 112, 128)
    kept = torch.stack([torch.randperm(56)[:20].sort().values for _ in range(2)])
    unused = kept[:, :0]
    masked = model(mel, PatchMask(kept, unused, unused)).tokens
    for row in range(2):
        wanted = in_plain_words(model, mel[row], kept[row])
        torch.testing.assert_close(masked[row], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model(mel).tokens[1], in_plain_words(model, mel[1], torch.arange(56)), rtol=1e-4, atol=1e-5
    )


def test_the_same_weights_take_a_longer_clip_whose_times_are_new():
    short, longer = vit(), vit("audio.duration_s=3", "audio.frames=304")
    longer.load_state_dict(short.state_dict())
    mel = torch.randn(1, 1, 304, 128)
    moved = mel.roll(16, 2)
    a, b, c = (longer(x).pooled for x in (mel, moved, mel.flip(2)))
    assert a.isfinite().all()
    assert (a - b).abs().max() > 1e-4  # its first and its last column are no neighbours
    assert (a - c).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("audio.pos_grid=audiomae_legacy",), r"audio\.pos_grid must be 'correct' with audio\.ti"),
        (("audio.width=28", "audio.heads=4"), r"audio\.width must be an even multiple of audio\.h"),
        (("audio.encoder=htsat",), r"audio\.time_positions"),
    ],
)
def test_rotary_is_refused_by_name_where_it_means_nothing(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny(ROTARY, *overrides)
