"""Tiles by GPU: each fits in the shared memory that a block may have there."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton", reason="tiles are Triton's")

from flap_kernels import masked_mse, patch_embed
from flap_kernels.cards import SHARED_BYTES, buffers, shared_bytes
from flap_kernels.masked_mse_layer import Layer
from flap_kernels.masked_mse_tiles import tiles as masked_mse_tiles
from flap_kernels.patch_embed_tiles import tiles as patch_embed_tiles


def test_a_card_that_is_not_listed_has_the_least_shared_memory():
    assert shared_bytes(86) == 99 * 1024
    assert shared_bytes(999) == min(SHARED_BYTES.values()) == 64 * 1024


def test_tf32_patches_take_fewer_rows_where_shared_memory_is_small():
    rows = {
        arch: tile["BLOCK_ROWS"]
        for arch in (80, 86, 89, 90, 100, 120)
        if (tile := patch_embed_tiles(256, torch.float32, "tf32", arch))
    }
    assert rows == {80: 64, 86: 32, 89: 32, 90: 64, 100: 64, 120: 32}


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("pixels", [1, 64, 100, 256, 400, 1024])
def test_a_tile_of_patches_fits(arch, pixels):
    for dtype, precision in (
        (torch.bfloat16, "ieee"),
        (torch.float32, "tf32"),
        (torch.float32, "ieee"),
    ):
        if tile := patch_embed_tiles(pixels, dtype, precision, arch):
            rows, columns = tile["BLOCK_ROWS"], tile["BLOCK_D"]
            kept = rows + buffers(arch, tile["num_stages"]) * columns
            assert kept * tile["PIXELS"] * dtype.itemsize <= shared_bytes(arch)
            assert min(rows, columns) >= 16


def test_the_largest_patches_in_float32_do_not_fit_on_small_cards():
    assert patch_embed_tiles(1024, torch.float32, "tf32", 89) is None
    assert patch_embed_tiles(1024, torch.float32, "tf32", 90)
    assert masked_mse_tiles(1024, 512, torch.float32, "tf32", 942) is None


def test_an_odd_width_takes_narrower_slices():
    """Loaded number by number, the usual ones spill."""
    widths = (512, 100)
    tiles = [masked_mse_tiles(256, H, torch.bfloat16, "ieee", 90) for H in widths]
    assert [tile and tile["BLOCK_H"] for tile in tiles] == [64, 16]


def test_without_a_tile_patches_are_embedded_in_plain_pytorch(monkeypatch):
    mel, ids = torch.randn(2, 8, 8), torch.tensor([[0, 3], [1, 2]])
    weight, bias, position = torch.randn(5, 16), torch.randn(5), torch.randn(4, 5)
    arguments = mel, ids, weight, bias, position
    expected = patch_embed(*arguments)
    module = sys.modules["flap_kernels.patch_embed"]
    monkeypatch.setattr(module, "tiles", lambda *_: None)
    monkeypatch.setattr(module, "run_kernel", None)
    torch.testing.assert_close(patch_embed(*arguments), expected)


def test_without_a_tile_the_error_is_taken_in_plain_pytorch(monkeypatch):
    hidden, weight, bias = torch.randn(2, 2, 8), torch.randn(16, 8), torch.randn(16)
    mel, ids = torch.randn(2, 8, 8), torch.tensor([[0, 3], [1, 2]])
    hidden.requires_grad_()
    found = []
    for tile in (Layer.tile, property(lambda self: None)):
        monkeypatch.setattr(Layer, "tile", tile)
        loss = masked_mse(hidden, weight, bias, mel, ids, norm_pix=True)
        found.append((loss.detach(), *torch.autograd.grad(loss, [hidden])))
    torch.testing.assert_close(found[0], found[1])
