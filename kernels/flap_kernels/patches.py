"""Offsets of patches in a log-mel, for the ops that read patches directly from it.

    patch n of clip b, pixel p = mel[b, P (n // A) + p // P, P (n % A) + p % P]

    B clips   T frames   F mel bins   P side of a patch   A = F / P patches per row
    N patches

Patches are in time-major order and so are the pixels of each.
Source: Masked Autoencoders that Listen, arXiv 2207.06405 (its patch embedding).
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from flap_kernels.checks import (
    check_floats,
    check_integers,
    check_shape,
    check_together,
    clamped,
)
from flap_kernels.launch import ceil_div, jit, run_kernel, runs_triton, tl, triton
from flap_kernels.precision import accumulator_dtype

# A tile of larger patches does not fit in shared memory: plain PyTorch is used.
MOST_PIXELS = 32 * 32


def patch_rows(mel: Tensor, b: Tensor, n: Tensor, patch: int) -> Tensor:
    """The pixels of patches `n` of clips `b`, index tensors that broadcast: (..., P * P)."""
    patches_per_row = mel.shape[2] // patch
    n, outside = clamped("the index of a patch", n, mel.shape[1] // patch * patches_per_row)
    cells = mel.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3)
    return nan_rows(cells[b, n // patches_per_row, n % patches_per_row].flatten(-2), outside)


def nan_rows(rows: Tensor, outside: Tensor | None) -> Tensor:
    """The rows, (..., D), with NaN in those of the mask."""
    return rows if outside is None else rows.masked_fill(outside[..., None], torch.nan)


def or_last(index: Tensor, N: int) -> Tensor:
    """Int64 indices into N rows and one more, which stands for every index outside [0, N)."""
    return index.long().clamp(-1, N).remainder(N + 1)


def strides(letter: str, axes: str, x: Tensor) -> dict[str, int]:
    """A tensor's strides under the names that kernels give them: `stride_xb`, `stride_xn`."""
    return {f"stride_{letter}{axis}": step for axis, step in zip(axes, x.stride(), strict=True)}


def clips(index: Tensor) -> Tensor:
    """(B, 1) int64: the clip of each row of an index."""
    return torch.arange(len(index), device=index.device)[:, None]


def check_positions(
    position: Tensor, position_index: Tensor | None, index: str, shape: tuple[int, int], D: int
) -> None:
    """Check rows to be added, (positions, D), and each token's row, of the shape of `index`."""
    if position_index is not None:
        check_shape("position_index", position_index, shape, f"the shape of {index}")
        check_integers(position_index=position_index)
        check_together(position=position, position_index=position_index)
    check_shape("position", position, (None, D), "(positions, D)")
    check_floats(position=position)


def add_rows(rows: Tensor, index: Tensor, N: int) -> Tensor:
    """Sums of the rows that name each n: (B, K, D), (B, K) -> (N, D), at least float32.

    Rows that name none are left out. The same bits on every run.
    """
    dtype = accumulator_dtype(rows.dtype)
    rows, index = rows.flatten(0, 1).to(dtype), or_last(index.flatten(), N)
    total = rows.new_zeros(N + 1, rows.shape[1])
    if rows.is_cuda:  # there index_add_ adds in any order, and index_put_ sorts first
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)
    return total[:N]


def check_patches(mel: Tensor, name: str, index: Tensor, pixels: int) -> int:
    """Check a log-mel and its patches; returns the side of a patch."""
    patch = isqrt(pixels)
    check_shape("mel", mel, (None, None, None), "(B, T, F)")
    check_floats(mel=mel)
    if patch * patch != pixels or pixels == 0:
        raise ValueError(f"weight must be for patches of P * P pixels, got {pixels}")
    if mel.shape[1] % patch or mel.shape[2] % patch:
        raise ValueError(
            f"mel must be (B, T, F) with T and F multiples of P = {patch}, got {tuple(mel.shape)}"
        )
    check_shape(name, index, (mel.shape[0], None), "(B, K)" if name == "ids_keep" else "(B, M)")
    check_integers(**{name: index})
    check_together(mel=mel, **{name: index})
    return patch


@jit
def load_index(index_ptr, row, mask_row, K, stride_b, stride_k):
    """The clip of each row of a flat (B * K), and its patch index, 0 if masked; both int32.

    An index that int32 does not hold is -1.
    """
    b = row // K
    at = index_ptr + b.to(tl.int64) * stride_b + (row % K).to(tl.int64) * stride_k
    n = tl.load(at, mask=mask_row, other=0)
    return b, tl.where(n.to(tl.int32) == n, n.to(tl.int32), -1)


@jit
def load_patches(
    mel_ptr,
    b,
    n,
    mask_row,
    patches_per_row,
    stride_mb,
    stride_mt,
    stride_mf,
    P: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """A tile of patches, a row each, zeros behind the P * P pixels and in rows outside mask_row.

    `b` and `n` are int32: they are divided in 32 bits and widened before they meet a stride.
    PIXELS is a power of two.
    """
    offs_p = tl.arange(0, PIXELS)
    time, freq = (n // patches_per_row * P).to(tl.int64), (n % patches_per_row * P).to(tl.int64)
    corner = b.to(tl.int64) * stride_mb + time * stride_mt + freq * stride_mf
    pixel = (offs_p // P) * stride_mt + (offs_p % P) * stride_mf
    mask = mask_row[:, None] & (offs_p < P * P)[None, :]
    # patch(mel[b], n)[p] = mel[b, P (n // A) + p // P, P (n % A) + p % P]
    return tl.load((mel_ptr + corner)[:, None] + pixel[None, :], mask=mask, other=0.0)


@jit
def pack_patches_kernel(
    mel_ptr,
    index_ptr,
    out_ptr,
    rows,
    K,
    N,
    patches_per_row,
    width,
    stride_mb,
    stride_mt,
    stride_mf,
    stride_ib,
    stride_ik,
    P: tl.constexpr,
    PIXELS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    offs_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < rows
    b, n = load_index(index_ptr, offs_row, mask_row, K, stride_ib, stride_ik)
    valid = mask_row & (n >= 0) & (n < N)
    x = load_patches(
        mel_ptr, b, n, valid, patches_per_row, stride_mb, stride_mt, stride_mf, P, PIXELS
    )
    # out[row, :P * P] = patch(mel[b], n)
    x = tl.where(valid[:, None], x.to(tl.float32), float("nan"))
    offs_p = tl.arange(0, PIXELS)
    at = (out_ptr + offs_row.to(tl.int64) * width)[:, None]
    mask = mask_row[:, None] & (offs_p < P * P)[None, :]
    tl.store(at + offs_p[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)
    # out[row, P * P:] = 1, then zeros up to `width`
    offs_tail = tl.arange(0, TAIL)
    one = tl.zeros([BLOCK_ROWS, TAIL], dtype=tl.float32) + (offs_tail == 0).to(tl.float32)[None, :]
    mask = mask_row[:, None] & (offs_tail < width - P * P)[None, :]
    tl.store(at + P * P + offs_tail[None, :], one.to(out_ptr.dtype.element_ty), mask=mask)


def pack_tile(pixels: int) -> dict[str, int]:
    """The tile of `pack_patches`: 4,096 pixels or one patch, and a tail of at least 16 bytes."""
    power_of_2 = triton.next_power_of_2(pixels)
    return {"PIXELS": power_of_2, "TAIL": 8, "BLOCK_ROWS": max(1, 4096 // power_of_2)}


def pack_patches(mel: Tensor, index: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """The patches of an index, one per row: pixels, then a 1, then zeros, (B * K, P * P + 8).

    With the 1, one product gives a layer's weight gradient and, in its last column, the bias'.
    """
    rows, pixels = index.numel(), patch * patch
    if not runs_triton(mel):
        out = mel.new_zeros((rows, pixels + 8), dtype=dtype)
        out[:, :pixels] = patch_rows(mel, clips(index), index, patch).flatten(0, 1)
        out[:, pixels] = 1
        return out
    out = mel.new_empty((rows, pixels + 8), dtype=dtype)
    if rows:
        tile = pack_tile(pixels)
        run_kernel(
            pack_patches_kernel,
            (ceil_div(rows, tile["BLOCK_ROWS"]),),
            mel,
            index,
            out,
            rows,
            index.shape[1],
            mel.shape[1] // patch * (mel.shape[2] // patch),
            mel.shape[2] // patch,
            pixels + 8,
            **strides("m", "btf", mel),
            **strides("i", "bk", index),
            P=patch,
            **tile,
        )
    return out
