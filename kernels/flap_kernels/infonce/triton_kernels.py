"""InfoNCE's sums and dlogits, tile by tile: the Triton kernels.

    S[i, j] = scale * log2(e) * x[i] . y[j]            positive of row i: column i + offset
    lse[i]        = log2 sum_j 2^S[i, j], j not the positive       the same by column
    dlogits[i, j] = (1 - p)[i] 2^(S - lse[i]) + (1 - p)[j] 2^(S - lse[j])
                    and at the positive -(1 - p)[i] - (1 - p)[j]

    M rows x   N columns y   D width   logits and logarithms to base 2, sums in float32

S stays in registers. What follows the product needs several numbers for each logit: it takes a
large tile slab by slab, so that those fit in registers, too. Sums are written per tile and added up
in a second pass: no atomics, the same bits on every run.
"""

from __future__ import annotations

from flap_kernels.infonce.triton_product import (
    column_slabs,
    products,
    share_an_id,
    store_dlogits,
    tile_of,
)
from flap_kernels.launch import jit, tl


@jit
def lse_negatives_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    x_ids_ptr,
    y_ids_ptr,
    row_partial_ptr,
    column_partial_ptr,
    positive_logit_ptr,
    M,
    N,
    D,
    offset,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLABS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAINT: tl.constexpr = 2.0**-90,
):
    """Log-sum-exp of each row and each column within one tile, without the positives."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    start_m = pid_m * BLOCK_M
    start_n = pid_n * BLOCK_N
    product = products(
        x_ptr + start_m.to(tl.int64) * stride_xm,
        y_ptr + start_n.to(tl.int64) * stride_yn,
        M - start_m,
        N - start_n,
        D,
        stride_xm,
        stride_xd,
        stride_yn,
        stride_yd,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
        UPCAST,
    )
    factor = tl.load(scale_ptr).to(tl.float32) * 1.4426950408889634
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    tops = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
    slabs = column_slabs(product, SLABS)
    WIDTH: tl.constexpr = BLOCK_N // SLABS
    for slab in tl.static_range(SLABS):  # pyright: ignore[reportGeneralTypeIssues]
        first = start_n + slab * WIDTH
        # S = scale * log2(e) * x . y
        logits = slabs[slab] * factor
        offs_n = first + tl.arange(0, WIDTH)
        mask_n = offs_n < N
        # Most tiles lie inside and off the diagonal: they skip this.
        past_end = (start_m + BLOCK_M > M) | (first + WIDTH > N)
        ahead = first - start_m - offset
        if IDS or past_end or (ahead < BLOCK_M and ahead > -WIDTH):
            is_positive = offs_n[None, :] == (offs_m + offset)[:, None]
            # positive_logit[i] = S[i, i + offset]
            positive = tl.sum(tl.where(is_positive, logits, 0.0), 1)
            holds = (offs_m + offset >= first) & (offs_m + offset < min(first + WIDTH, N))
            tl.store(positive_logit_ptr + offs_m, positive, mask=mask_m & holds)
            # 2^S = 0 at the positive, past the end, and where the ids are the same
            out = is_positive | ~(mask_m[:, None] & mask_n[None, :])
            if IDS:
                out = out | share_an_id(x_ids_ptr, y_ids_ptr, offs_m, offs_n, mask_m, mask_n, IDS)
            logits = tl.where(out, float("-inf"), logits)
        # One exponential serves both sums, unless a row or a column lies so far below the slab's
        # maximum (2^-90: its terms down to 2^-36 of its own largest are then still normal numbers)
        # that it needs a reference point of its own. A fixed one would lose rows at scale 100.
        top = tl.max(logits)
        top = tl.where(top == float("-inf"), 0.0, top)
        # sums of 2^(S - top), by row and by column
        terms = tl.exp2(logits - top)
        row_sums = tl.sum(terms, 1)
        column_sums = tl.sum(terms, 0)
        row_tops = tl.zeros((BLOCK_M,), dtype=tl.float32) + top
        column_tops = tl.zeros((WIDTH,), dtype=tl.float32) + top
        faintest = tl.exp2(top - top)
        if ROWS:
            faintest = tl.minimum(faintest, tl.min(tl.where(mask_m, row_sums, 1.0)))
        if COLUMNS:
            faintest = tl.minimum(faintest, tl.min(tl.where(mask_n, column_sums, 1.0)))
        if faintest < FAINT:
            if ROWS:
                row_tops = tl.max(logits, 1)
                row_tops = tl.where(row_tops == float("-inf"), 0.0, row_tops)
                row_sums = tl.sum(tl.exp2(logits - row_tops[:, None]), 1)
            if COLUMNS:
                column_tops = tl.max(logits, 0)
                column_tops = tl.where(column_tops == float("-inf"), 0.0, column_tops)
                column_sums = tl.sum(tl.exp2(logits - column_tops[None, :]), 0)
        if ROWS:
            # A slab without a negative does not change the row's reference point.
            row_tops = tl.where(row_sums == 0.0, float("-inf"), row_tops)
            higher = tl.maximum(tops, row_tops)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            # sums 2^base = sums 2^tops + row_sums 2^row_tops
            sums = sums * tl.exp2(tops - base) + row_sums * tl.exp2(row_tops - base)
            tops = higher
        if COLUMNS:
            # lse[j] within the tile = top + log2 sum
            column_partial_ptrs = column_partial_ptr + pid_m.to(tl.int64) * N + offs_n
            tl.store(column_partial_ptrs, column_tops + tl.log2(column_sums), mask=mask_n)
    if ROWS:
        # lse[i] within the tile = top + log2 sum
        row_partial_ptrs = row_partial_ptr + pid_n.to(tl.int64) * M + offs_m
        tl.store(row_partial_ptrs, tops + tl.log2(sums), mask=mask_m)


@jit
def add_partial_lse_kernel(
    partial_ptr,
    total_ptr,
    partials,
    size,
    ONTO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-sum-exp of logarithms, (partials, size) -> (size,); with ONTO, of `total` too."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    if ONTO:
        top = tl.load(total_ptr + offs, mask=mask, other=float("-inf"))
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    for p in range(0, partials, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        partial = tl.load(
            partial_ptr + offs_p[:, None].to(tl.int64) * size + offs[None, :],
            mask=(offs_p[:, None] < partials) & mask[None, :],
            other=float("-inf"),
        )
        higher = tl.maximum(top, tl.max(partial, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        # total 2^base = total 2^top + sum 2^partial
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(partial - base[None, :]), 0)
        top = higher
    # lse = top + log2 total
    tl.store(total_ptr + offs, top + tl.log2(total), mask=mask)


@jit
def dlogits_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    x_ids_ptr,
    y_ids_ptr,
    row_lse_ptr,
    row_one_minus_p_ptr,
    column_lse_ptr,
    column_one_minus_p_ptr,
    dlogits_ptr,
    scale_partial_ptr,
    M,
    N,
    D,
    offset,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_gm,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLABS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dlogits of one tile, and the sum of dlogits * (x y^T)."""
    pid = tl.program_id(0)
    pid_m, pid_n = tile_of(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m = pid_m * BLOCK_M
    start_n = pid_n * BLOCK_N
    product = products(
        x_ptr + start_m.to(tl.int64) * stride_xm,
        y_ptr + start_n.to(tl.int64) * stride_yn,
        M - start_m,
        N - start_n,
        D,
        stride_xm,
        stride_xd,
        stride_yn,
        stride_yd,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
        UPCAST,
    )
    factor = tl.load(scale_ptr).to(tl.float32) * 1.4426950408889634
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    row_lse = tl.zeros((BLOCK_M,), dtype=tl.float32)
    row_one_minus_p = row_lse
    if ROWS:
        row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=0.0)
        row_one_minus_p = tl.load(row_one_minus_p_ptr + offs_m, mask=mask_m, other=0.0)
    scale_sum = tl.full((), 0.0, dtype=tl.float32)
    slabs = column_slabs(product, SLABS)
    WIDTH: tl.constexpr = BLOCK_N // SLABS
    for slab in tl.static_range(SLABS):  # pyright: ignore[reportGeneralTypeIssues]
        first = start_n + slab * WIDTH
        product = slabs[slab]
        offs_n = first + tl.arange(0, WIDTH)
        mask_n = offs_n < N
        dlogits = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
        at_positive = dlogits
        if ROWS:
            # dlogits = (1 - p)[i] 2^(S - lse[i])
            dlogits += tl.exp2(product * factor - row_lse[:, None]) * row_one_minus_p[:, None]
            at_positive -= row_one_minus_p[:, None]
        if COLUMNS:
            lse = tl.load(column_lse_ptr + offs_n, mask=mask_n, other=0.0)
            one_minus_p = tl.load(column_one_minus_p_ptr + offs_n, mask=mask_n, other=0.0)
            # dlogits += (1 - p)[j] 2^(S - lse[j])
            dlogits += tl.exp2(product * factor - lse[None, :]) * one_minus_p[None, :]
            at_positive -= one_minus_p[None, :]
        past_end = (start_m + BLOCK_M > M) | (first + WIDTH > N)
        ahead = first - start_m - offset
        if IDS or past_end or (ahead < BLOCK_M and ahead > -WIDTH):
            out = ~(mask_m[:, None] & mask_n[None, :])
            if IDS:
                out = out | share_an_id(x_ids_ptr, y_ids_ptr, offs_m, offs_n, mask_m, mask_n, IDS)
            dlogits = tl.where(out, 0.0, dlogits)
            # dlogits[i, i + offset] = -(1 - p)[i] - (1 - p)[j]
            is_positive = offs_n[None, :] == (offs_m + offset)[:, None]
            dlogits = tl.where(is_positive & mask_n[None, :], at_positive, dlogits)
        # dscale = sum(dlogits * (x y^T))
        scale_sum += tl.sum(dlogits * product)
        # Behind column N the workspace's rows hold zeros: a row is stored in whole lines.
        mask = mask_m[:, None] & (offs_n < stride_gm)[None, :]
        slab_ptr = dlogits_ptr + start_m.to(tl.int64) * stride_gm + first
        store_dlogits(slab_ptr, dlogits, mask, stride_gm, PRECISION)
    tl.store(scale_partial_ptr + pid, scale_sum)
