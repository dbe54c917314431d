"""draw_patch_mask: each clip's kept patches, drawn on the device from its sample index.

    word[n]  = Philox4x32-10(key = (seed, stream), counter = (s_lo, s_hi, n // 4, 0))[n % 4]
    lowest_k = the k patches of least word >> 8; ties go to the smaller index
    stay     = lowest_k of the columns  and, within each column,  lowest_k of the rows
    ids_restore = the index of each patch in cat(ids_keep, ids_drop)

    s a clip's sample index, in two halves of 32 bits

    B clips   N = C * R patches of a clip, C columns (time) of R rows (frequency)   K kept

Patches ascend within `ids_keep` and within `ids_drop`. A column's rank is counted, not sorted: so
many others are lower. Nothing but sample indices is read, and no two programs write one index. The
kernel also draws the masks of a ragged batch, for `draw_ragged_patch_mask`.

Least traffic: B sample indices read, 2 * B * N indices written, of 8 bytes each.
Source: FLAP, arXiv 2311.01615, section 3; Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flap_kernels.checks import check_integers, check_shape
from flap_kernels.launch import jit, run_kernel, runs_triton, tl, triton
from flap_kernels.philox import LOW, philox_words
from flap_kernels.spec import Inputs, Kernel, Size


class PatchMask(NamedTuple):
    """For each clip the patches kept and dropped, ascending, and their inverse; all int64.

    A ragged batch counts as one clip, B = 1: `draw_ragged_patch_mask`.

    A tuple: ZeRO-3's hooks find tensors in one that a module is given, but not in a dataclass.
    """

    ids_keep: Tensor
    """(B, K)."""
    ids_drop: Tensor
    """(B, N - K)."""
    ids_restore: Tensor
    """(B, N): the index of each patch in `cat(ids_keep, ids_drop)`."""


def draw_patch_mask_reference(
    sample_index: Tensor,
    seed: int,
    streams: tuple[int, int],
    grid: tuple[int, int],
    columns: int,
    rows: int | None,
    shared: bool,
) -> PatchMask:
    """The reference of `draw_patch_mask`: the mask of each clip, by sorting."""
    C, R = grid
    stay = lowest(philox_words(seed, streams[0], sample_index, C), columns)
    stay = stay[:, :, None].expand(-1, -1, R)
    if rows is not None:
        words = philox_words(seed, streams[1], sample_index, R if shared else C * R)
        stay = stay & lowest(words.unflatten(1, (-1, R)), rows)
    order = (~stay).flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    K = columns * (R if rows is None else rows)
    return PatchMask(order[:, :K].clone(), order[:, K:].clone(), order.argsort(dim=1))


def lowest(words: Tensor, k: int | Tensor) -> Tensor:
    """True at the k lowest values of the last axis; ties go to the smaller index.

    A tensor gives each row its own k; it broadcasts to the shape of `words`.
    """
    order = words.argsort(dim=-1, stable=True)
    first = torch.arange(words.shape[-1], device=words.device) < k
    return torch.zeros_like(first).expand(words.shape).scatter(-1, order, first.expand(words.shape))


@jit
def _draw(key, sample, n):
    """The random word of each index in `n`, as int32 in [0, 2**24)."""
    # Four neighbours share a block and each computes all of it: 10 rounds cost less than a shuffle.
    block = n // 4
    low = (sample & 0xFFFFFFFF).to(tl.uint32) + tl.zeros_like(block).to(tl.uint32)
    high = (sample >> 32).to(tl.uint32) + tl.zeros_like(block).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, block, tl.zeros_like(block))
    # word[n] = Philox4x32-10(...)[n % 4] >> 8
    lane = n % 4
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return (word >> 8).to(tl.int32)


@jit(do_not_specialize=["outer_key", "inner_key"])
def draw_patch_mask_kernel(
    sample_index_ptr,
    clips_ptr,
    ids_keep_ptr,
    ids_drop_ptr,
    ids_restore_ptr,
    outer_key,
    inner_key,
    stride_s,
    C,
    R,
    columns,
    rows,
    N,
    K,
    RAGGED: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)
    sample = tl.load(sample_index_ptr + pid_b * stride_s).to(tl.int64)
    if RAGGED:
        # All clips share row 0 of the indices: this one begins behind those before it.
        at = clips_ptr + pid_b * 4
        C, columns = tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32)
        first_n, first_k = tl.load(at + 2), tl.load(at + 3)
        row = 0
    else:
        row, first_n, first_k = pid_b, 0, 0

    c = tl.arange(0, BLOCK_C)
    own = _draw(outer_key, sample, c)
    # rank[c] = how many columns j have a lower word, or the same one and a smaller index
    rank = tl.zeros([BLOCK_C], dtype=tl.int32)
    for start in range(0, C, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = _draw(outer_key, sample, j)
        lower = (other[None, :] < own[:, None]) | (
            (other[None, :] == own[:, None]) & (j[None, :] < c[:, None])
        )
        rank += tl.sum((lower & (j < C)[None, :]).to(tl.int32), axis=1)
    stays = (rank < columns) & (c < C)

    r = tl.arange(0, BLOCK_R)
    exists = (c < C)[:, None] & (r < R)[None, :]
    stay = stays[:, None] & exists
    if not ALL_ROWS:
        drawn = tl.zeros([BLOCK_C], dtype=tl.int32) if SHARED else c * R
        own = _draw(inner_key, sample, drawn[:, None] + r[None, :])
        # rank[c, r] = the same among the rows j of column c
        rank = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.int32)
        for j in range(R):
            other = tl.sum(tl.where((r == j)[None, :], own, 0), axis=1)[:, None]
            rank += ((other < own) | ((other == own) & (j < r)[None, :])).to(tl.int32)
        stay = stay & (rank < rows)

    # before[c, r] = how many stay in earlier columns, and in earlier rows of column c
    one = stay.to(tl.int32)
    column = tl.sum(one, axis=1)
    before = (tl.cumsum(column, 0) - column)[:, None] + tl.cumsum(one, 1) - one
    n = c[:, None] * R + r[None, :]
    # In the row: patch n, and how many patches before it stay and do not
    kept = first_k + before.to(tl.int64)
    dropped = first_n - first_k + (n - before).to(tl.int64)
    n = first_n + n.to(tl.int64)
    # ids_keep[kept] = n where n stays, else ids_drop[dropped] = n
    tl.store(ids_keep_ptr + row * K + kept, n, mask=stay & (kept < K))
    at = ids_drop_ptr + row * (N - K) + dropped
    tl.store(at, n, mask=exists & (stay == 0) & (dropped < N - K))
    # ids_restore[n] = kept where n stays, else K + dropped
    tl.store(ids_restore_ptr + row * N + n, tl.where(stay, kept, K + dropped), mask=exists)


@torch.library.custom_op("flap_kernels::draw_patch_mask", mutates_args=())
def _draw_patch_mask(
    sample_index: Tensor,
    seed: int,
    outer: int,
    inner: int,
    C: int,
    R: int,
    columns: int,
    rows: int | None,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_triton(sample_index):
        return draw_patch_mask_reference(
            sample_index, seed, (outer, inner), (C, R), columns, rows, shared
        )
    mask = _empty_mask(sample_index, seed, outer, inner, C, R, columns, rows, shared)
    if len(sample_index):
        launch(sample_index, None, mask, seed, (outer, inner), (C, R), columns, rows, shared)
    return mask


@_draw_patch_mask.register_fake
def _empty_mask(sample_index, seed, outer, inner, C, R, columns, rows, shared):
    return empty_mask(sample_index, len(sample_index), C * R, columns * (rows or R))


Indices = tuple[Tensor, Tensor, Tensor]


def empty_mask(sample_index: Tensor, B: int, N: int, K: int) -> Indices:
    """The three indices of a `PatchMask`, to be filled."""
    ids_keep, ids_drop, ids_restore = (
        sample_index.new_empty((B, n), dtype=torch.int64) for n in (K, N - K, N)
    )
    return ids_keep, ids_drop, ids_restore


def launch(
    sample_index: Tensor,
    clips: Tensor | None,
    mask: Indices,
    seed: int,
    streams: tuple[int, int],
    grid: tuple[int, int],
    columns: int,
    rows: int | None,
    shared: bool,
) -> None:
    """Fill `mask`, a program a clip.

    Args:
        clips: of a ragged batch the counts of each clip (B, 4); `grid` is then the longest's.
    """
    C, R = grid
    outer, inner = streams
    run_kernel(
        draw_patch_mask_kernel,
        (len(sample_index),),
        sample_index,
        # Absent pointers get a dummy tensor; the kernel never reads it.
        sample_index if clips is None else clips,
        *mask,
        outer << 32 | seed & LOW,
        inner << 32 | seed & LOW,
        sample_index.stride(0),
        C,
        R,
        columns,
        rows or R,
        mask[2].shape[1],
        mask[0].shape[1],
        RAGGED=clips is not None,
        ALL_ROWS=rows is None,
        SHARED=shared,
        **blocks(C, R),
    )


def blocks(C: int, R: int) -> dict[str, int]:
    """The tile, a whole clip, and its warps: the patches of a long clip want more registers."""
    c, r = triton.next_power_of_2(C), triton.next_power_of_2(R)
    # A comparison tile of 8,192 ranks 512 columns in 32 steps.
    return {
        "BLOCK_C": c,
        "BLOCK_R": r,
        "BLOCK_J": min(c, max(1, 8192 // c)),
        "num_warps": min(16, max(4, c * r // 512)),
    }


def draw_patch_mask(
    sample_index: Tensor,
    seed: int,
    streams: tuple[int, int],
    grid: tuple[int, int],
    columns: int,
    rows: int | None,
    shared: bool,
) -> PatchMask:
    """The patches that each clip keeps: a function of the seed and the clip's sample index.

    1-D masking of single patches is a grid of (N, 1) with `rows` None; of whole frames, the grid
    of patches with `rows` None; 2-D masking gives both counts.

    Args:
        sample_index: (B,) int64 or int32, at least 0, on the device that is to draw.
        seed: its low 32 bits key the draws.
        streams: below 2**31: what keys the draw of columns, and that of rows.
        grid: patches along time (columns) and along frequency (rows).
        columns: how many columns stay.
        rows: how many rows stay in each column; None keeps them all.
        shared: one draw of rows for all columns of a clip, or one for each.

    Raises ValueError and TypeError on counts and sample indices that do not fit.
    """
    C, R = grid
    check_shape("sample_index", sample_index, (None,), "(B,)")
    check_integers(sample_index=sample_index)
    if min(grid) < 1:
        raise ValueError(f"grid must be of at least one patch each way, got {grid}")
    if not 1 <= columns <= C:
        raise ValueError(f"columns must be in [1, {C}], got {columns}")
    if rows is not None and not 1 <= rows <= R:
        raise ValueError(f"rows must be None or in [1, {R}], got {rows}")
    if not all(0 <= stream < 1 << 31 for stream in streams):
        raise ValueError(f"streams must be in [0, 2**31), got {streams}")
    mask = _draw_patch_mask(sample_index, seed, *streams, C, R, columns, rows, shared)
    return PatchMask(*mask)


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    B, grid, columns, rows = {
        "edge": (1, (1, 1), 1, 1),
        "odd": (3, (13, 5), 10, 4),
        "paper": (288, (64, 8), 51, 6),
    }[size]
    draw = {"generator": generator, "device": generator.device}
    arguments = {
        "sample_index": torch.randint(0, 1 << 40, (B,), **draw),
        "seed": int(torch.randint(0, 1 << 32, (), **draw)),
        "streams": (3, 4),
        "grid": grid,
        "columns": columns,
        "rows": rows,
        "shared": bool(torch.rand((), **draw) < 0.5),
    }
    return Inputs(arguments, differentiable=())


KERNEL = Kernel(
    name="draw_patch_mask",
    op=draw_patch_mask,
    reference=draw_patch_mask_reference,
    inputs=_inputs,
)
