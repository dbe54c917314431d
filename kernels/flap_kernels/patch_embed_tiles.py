"""The kernel of `patch_embed`: a tile of kept patches, embedded over the width.

y[r, :] = weight @ patch(r) + bias + position[p, :]          for r in a tile of the B * K rows

K patches kept of a clip   D width   P side of a patch   PIXELS >= P * P
"""

from __future__ import annotations

from typing import Any

import torch

from flap_kernels.cards import buffers, shared_bytes
from flap_kernels.launch import jit, tl, triton
from flap_kernels.patches import load_index, load_patches


@jit
def patch_embed_kernel(
    mel_ptr,
    ids_keep_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    position_index_ptr,
    out_ptr,
    rows,
    K,
    D,
    N,
    positions,
    patches_per_row,
    stride_mb,
    stride_mt,
    stride_mf,
    stride_kb,
    stride_kk,
    stride_wd,
    stride_wp,
    stride_bd,
    stride_pn,
    stride_pd,
    stride_ib,
    stride_ik,
    HAS_INDEX: tl.constexpr,
    P: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    offs_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < rows
    b, n = load_index(ids_keep_ptr, offs_row, mask_row, K, stride_kb, stride_kk)
    valid = mask_row & (n >= 0) & (n < N)
    x = load_patches(
        mel_ptr, b, n, valid, patches_per_row, stride_mb, stride_mt, stride_mf, P, PIXELS
    )
    # x = patch(mel[b], n), rounded to the product's type
    x = x.to(weight_ptr.dtype.element_ty)
    if UPCAST:
        x = x.to(tl.float32)
    # position[p, :] is added to patch n: in a ragged batch p is counted from its clip's start
    p, has_position = n, valid
    if HAS_INDEX:
        _, p = load_index(position_index_ptr, offs_row, mask_row, K, stride_ib, stride_ik)
        has_position = valid & (p >= 0) & (p < positions)
    offs_p = tl.arange(0, PIXELS)
    mask_p = (offs_p < P * P)[:, None]
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        at = (weight_ptr + offs_d * stride_wd)[None, :] + (offs_p * stride_wp)[:, None]
        w = tl.load(at, mask=mask_p & mask_d[None, :], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
        # y = x weight^T
        y = tl.dot(x, w, input_precision=PRECISION)
        bias = tl.load(bias_ptr + offs_d * stride_bd, mask=mask_d, other=0.0).to(tl.float32)
        at = (position_ptr + p.to(tl.int64) * stride_pn)[:, None] + (offs_d * stride_pd)[None, :]
        mask = mask_row[:, None] & mask_d[None, :]
        inside = has_position[:, None] & mask_d[None, :]
        # y += bias + position[p, :]
        y += bias[None, :] + tl.load(at, mask=inside, other=float("nan")).to(tl.float32)
        at = (out_ptr + offs_row.to(tl.int64) * D)[:, None] + offs_d[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)


def tiles(pixels: int, dtype: torch.dtype, precision: str, arch: int) -> dict[str, Any] | None:
    """The tile sizes on a GPU; None if its shared memory is too small for patches of this size.

    A tile of patches stays in shared memory while the weight is streamed. Small enough for three
    programs on a multiprocessor, where that has the room, so that one's gather hides behind the
    products of the others. float32: `ieee` products hold both factors in registers.
    """
    power_of_2 = triton.next_power_of_2(max(16, pixels))
    rows, columns, warps, stages = 64, 32, 4, 2
    if power_of_2 < 256:  # with 4 warps or a wider slice some do not fit in registers
        warps = 8
    if dtype.itemsize == 4:
        rows, columns, warps, stages = (
            (64, columns, 8, 1) if precision == "tf32" else (32, 32, 8, 1)
        )
    rows, columns = (max(16, min(x, x * 256 // power_of_2)) for x in (rows, columns))
    slices = buffers(arch, stages)
    while _bytes(rows, columns, power_of_2, dtype, slices) > shared_bytes(arch):
        if rows > 16:
            rows //= 2
        elif columns > 16:
            columns //= 2
        else:
            return None
    return {
        "PIXELS": power_of_2,
        "BLOCK_ROWS": rows,
        "BLOCK_D": columns,
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": stages,
    }


def _bytes(rows: int, columns: int, pixels: int, dtype: torch.dtype, slices: int) -> int:
    """Shared memory of a tile, about: patches, slices of the weight, and a result to transpose."""
    return (rows + slices * columns) * pixels * dtype.itemsize + 4 * rows * columns
