"""The kernel of `masked_mse`: a tile of masked patches, their predictions and errors.

    e[r, :] = weight @ hidden[r] + bias - target(r)          for r in a span of the B * M rows

    M masked patches of a clip   H decoder's width   P side of a patch   PIXELS >= P * P

Whole patches lie in a tile, so that their mean and variance are sums along its rows.
"""

from __future__ import annotations

from typing import Any

import torch

from flap_kernels.cards import buffers, shared_bytes
from flap_kernels.launch import jit, tl, triton
from flap_kernels.patches import load_index, load_patches


@jit
def masked_mse_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    mel_ptr,
    ids_drop_ptr,
    upstream_ptr,
    sums_ptr,
    error_ptr,
    first,
    rows,
    M,
    H,
    N,
    patches_per_row,
    scale,
    stride_hr,
    stride_hh,
    stride_wp,
    stride_wh,
    stride_bp,
    stride_mb,
    stride_mt,
    stride_mf,
    stride_db,
    stride_dm,
    P: tl.constexpr,
    PIXELS: tl.constexpr,
    NORM_PIX: tl.constexpr,
    EPS: tl.constexpr,
    BY_ROW: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the sum of squares, or e scaled, of rows `first` to `first + rows` of all B * M.

    BY_ROW: a sum for each row; or, backward, `upstream` has a scaled gradient for each.
    """
    pid = tl.program_id(0)
    offs_row = pid * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_p = tl.arange(0, PIXELS)
    mask_row, mask_p = offs_row < rows, offs_p < P * P
    row = first + offs_row
    mask = mask_row[:, None] & mask_p[None, :]

    e = tl.zeros([BLOCK_ROWS, PIXELS], dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        at = (hidden_ptr + row.to(tl.int64) * stride_hr)[:, None] + (offs_h * stride_hh)[None, :]
        h = tl.load(at, mask=mask_row[:, None] & mask_h[None, :], other=0.0)
        h = h.to(weight_ptr.dtype.element_ty)
        at = (weight_ptr + offs_p * stride_wp)[None, :] + (offs_h * stride_wh)[:, None]
        w = tl.load(at, mask=mask_h[:, None] & mask_p[None, :], other=0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        # e = hidden weight^T, a slice of the width at a time
        e = tl.dot(h, w, e, input_precision=PRECISION)
    # e += bias
    e += tl.load(bias_ptr + offs_p * stride_bp, mask=mask_p, other=0.0).to(tl.float32)[None, :]

    # x = patch(mel[b], n)
    b, n = load_index(ids_drop_ptr, row, mask_row, M, stride_db, stride_dm)
    valid = mask_row & (n >= 0) & (n < N)
    x = load_patches(
        mel_ptr, b, n, valid, patches_per_row, stride_mb, stride_mt, stride_mf, P, PIXELS
    )
    x = tl.where(valid[:, None], x.to(tl.float32), float("nan"))
    if NORM_PIX:
        # x = (x - mean(x)) / sqrt(var(x) + eps)
        x = tl.where(mask_p[None, :], x - (tl.sum(x, axis=1) / (P * P))[:, None], 0.0)
        x *= (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / (P * P - 1) + EPS))[:, None]
    # e = prediction - target
    e = tl.where(mask, e - x, 0.0)

    if BACKWARD:
        # dprediction = upstream * scale * e; its column sums are dbias
        if BY_ROW:
            e *= tl.load(upstream_ptr + offs_row, mask=mask_row, other=0.0)[:, None]
        else:
            e = e * (tl.load(upstream_ptr) * scale)
        tl.store(sums_ptr + pid.to(tl.int64) * (P * P) + offs_p, tl.sum(e, axis=0), mask=mask_p)
        at = (error_ptr + offs_row.to(tl.int64) * (P * P))[:, None] + offs_p[None, :]
        tl.store(at, e.to(error_ptr.dtype.element_ty), mask=mask)
    elif BY_ROW:
        # sum of e**2 over each row
        tl.store(sums_ptr + offs_row, tl.sum(e * e, axis=1), mask=mask_row)
    else:
        # sum of e**2 over this tile
        tl.store(sums_ptr + pid, tl.sum(e * e))


def tiles(
    pixels: int, H: int, dtype: torch.dtype, precision: str, arch: int
) -> dict[str, Any] | None:
    """The tile sizes on a GPU; None where patches of this size need more than it has.

    A tile holds whole patches, for their mean and variance. Rows of hidden and weight that are not
    whole in 16 bytes are loaded number by number, which takes registers: their slices are narrower.
    """
    power_of_2 = triton.next_power_of_2(max(16, pixels))
    rows, columns, warps, stages = 64, 64, 8, 2
    if dtype.itemsize == 4:
        rows, columns, warps, stages = (64, 32, 8, 2) if precision == "tf32" else (32, 16, 8, 2)
    rows = max(16, min(rows, rows * 256 // power_of_2))
    widest = 32 if dtype.itemsize == 4 and precision == "tf32" else 64
    columns = max(16, min(widest, columns * 256 // power_of_2))
    if H % 16:
        columns = min(columns, 16 if power_of_2 >= 256 else 32)
        rows = 16 if dtype.itemsize == 4 and precision == "ieee" else rows
    slices = buffers(arch, stages) * (4 * rows + dtype.itemsize * power_of_2) * columns
    if max(slices, 4 * rows * power_of_2) > shared_bytes(arch) or (H % 16 and power_of_2 > 512):
        return None
    return {
        "PIXELS": power_of_2,
        "BLOCK_ROWS": rows,
        "BLOCK_H": columns,
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": stages,
    }
