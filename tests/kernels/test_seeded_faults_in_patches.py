"""The tests of every kernel find mistakes in token and patch kernels: each makes them fail."""

from __future__ import annotations

import sys

import pytest
import torch

from flap_kernels import KERNELS
from tests.kernels.faults import Fault, put_in
from tests.kernels.test_every_kernel import check_as_exact, strided


def fault(says: str, op: str, where: str, right: str, wrong: str) -> Fault:
    """A fault in `module.kernel`; a module's name in the package may be that of its op."""
    module, kernel = where.split(".")
    return Fault(says, op, getattr(sys.modules[f"flap_kernels.{module}"], kernel), right, wrong)


FAULTS = [
    fault(
        "columns past the end are ranked",
        "draw_patch_mask",
        "patch_mask.draw_patch_mask_kernel",
        "(lower & (j < C)[None, :])",
        "lower",
    ),
    fault(
        "rows are drawn with the columns' key",
        "draw_patch_mask",
        "patch_mask.draw_patch_mask_kernel",
        "_draw(inner_key",
        "_draw(outer_key",
    ),
    fault(
        "two numbers of a block change places",
        "draw_patch_mask",
        "patch_mask._draw",
        "lane == 0, w0, tl.where(lane == 1, w1",
        "lane == 0, w1, tl.where(lane == 1, w0",
    ),
    fault(
        "dropped patches go back where kept ones do",
        "draw_patch_mask",
        "patch_mask.draw_patch_mask_kernel",
        "K + dropped)",
        "dropped)",
    ),
    fault(
        "the index is not used",
        "gather_tokens",
        "gather_tokens.gather_tokens_kernel",
        "n * stride_xn",
        "offs_k * stride_xn",
    ),
    fault(
        "every clip is the first",
        "gather_tokens",
        "gather_tokens.gather_tokens_kernel",
        "b * stride_xb + ",
        "",
    ),
    fault(
        "dropped tokens stay empty",
        "unshuffle_tokens",
        "unshuffle_tokens.unshuffle_tokens_kernel",
        "tl.where(kept[:, None], x, token[None, :])",
        "x",
    ),
    fault(
        "positions begin anew with each tile",
        "unshuffle_tokens",
        "unshuffle_tokens.unshuffle_tokens_kernel",
        "p * stride_pn",
        "p % BLOCK_ROWS * stride_pn",
    ),
    fault(
        "kept tokens count for the mask token",
        "unshuffle_tokens",
        "unshuffle_tokens.unshuffle_tokens_backward_kernel",
        "tl.where(kept[:, None], 0.0, grad.to(tl.float32))",
        "grad.to(tl.float32)",
    ),
    fault(
        "a clip's tiles store their sums over each other",
        "unshuffle_tokens",
        "unshuffle_tokens.unshuffle_tokens_backward_kernel",
        "tl.program_id(0).to(tl.int64) * D",
        "b * D",
    ),
    fault(
        "pixels are read by columns",
        "patch_embed",
        "patches.load_patches",
        "(offs_p // P) * stride_mt + (offs_p % P) * stride_mf",
        "(offs_p % P) * stride_mt + (offs_p // P) * stride_mf",
    ),
    fault(
        "every clip is the first",
        "patch_embed",
        "patches.load_patches",
        "b.to(tl.int64) * stride_mb + ",
        "",
    ),
    fault(
        "the ones stand in another column",
        "patch_embed",
        "patches.pack_patches_kernel",
        "(offs_tail == 0)",
        "(offs_tail == 1)",
    ),
    fault(
        "the bias is left out",
        "patch_embed",
        "patch_embed.patch_embed_kernel",
        "y += bias[None, :] + ",
        "y += ",
    ),
    fault(
        "a patch gets another one's position",
        "patch_embed",
        "patch_embed.patch_embed_kernel",
        "p.to(tl.int64) * stride_pn",
        "(offs_row % K) * stride_pn",
    ),
    fault(
        "the variance is the biased one",
        "masked_mse",
        "masked_mse_tiles.masked_mse_kernel",
        "(P * P - 1)",
        "(P * P)",
    ),
    fault(
        "rows past the end count",
        "masked_mse",
        "masked_mse_tiles.masked_mse_kernel",
        "tl.where(mask, e - x, 0.0)",
        "tl.where(mask_p[None, :], e - x, 0.0)",
    ),
    fault(
        "the rest of the width is left out",
        "masked_mse",
        "masked_mse_tiles.masked_mse_kernel",
        "range(0, H, BLOCK_H)",
        "range(0, H - BLOCK_H + 1, BLOCK_H)",
    ),
    fault(
        "the gradient does not follow what comes from above",
        "masked_mse",
        "masked_mse_tiles.masked_mse_kernel",
        "(tl.load(upstream_ptr) * scale)",
        "scale",
    ),
    fault(
        "a tile's columns are stored over the first one's",
        "masked_mse",
        "masked_mse_tiles.masked_mse_kernel",
        "pid.to(tl.int64) * (P * P) + offs_p",
        "offs_p",
    ),
    fault(
        "a clip's kept patches are counted from its own start",
        "draw_ragged_patch_mask",
        "patch_mask.draw_patch_mask_kernel",
        "first_k + before",
        "before",
    ),
    fault(
        "a clip's dropped patches are counted from its own start",
        "draw_ragged_patch_mask",
        "patch_mask.draw_patch_mask_kernel",
        "first_n - first_k + (n",
        "(n",
    ),
    fault(
        "a clip's patches are numbered from its own start",
        "draw_ragged_patch_mask",
        "patch_mask.draw_patch_mask_kernel",
        "n = first_n + ",
        "n = ",
    ),
    fault(
        "every clip keeps all its columns",
        "draw_ragged_patch_mask",
        "patch_mask.draw_patch_mask_kernel",
        "tl.load(at + 1).to(tl.int32)",
        "C",
    ),
    fault(
        "positions are counted through all clips",
        "ragged_patch_embed",
        "patch_embed_tiles.patch_embed_kernel",
        "p.to(tl.int64) * stride_pn",
        "n.to(tl.int64) * stride_pn",
    ),
    fault(
        "positions are counted through all clips",
        "ragged_unshuffle_tokens",
        "unshuffle_tokens_tiles.unshuffle_tokens_kernel",
        "(p * stride_pn)",
        "(n * stride_pn)",
    ),
    fault(
        "every row has the tile's sum",
        "ragged_masked_mse",
        "masked_mse_tiles.masked_mse_kernel",
        "tl.sum(e * e, axis=1), mask",
        "tl.sum(e * e) / rows, mask",
    ),
    fault(
        "every row has the first one's weight",
        "ragged_masked_mse",
        "masked_mse_tiles.masked_mse_kernel",
        "tl.load(upstream_ptr + offs_row, mask",
        "tl.load(upstream_ptr + 0 * offs_row, mask",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.op}: {fault.says}")
def test_every_kernels_tests_find(fault, kernel_device, monkeypatch, tmp_path):
    put_in(fault, monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match=fault.op):
        check_as_exact(
            KERNELS[fault.op], "odd", torch.float32, kernel_device, draws=1, prepare=strided
        )
