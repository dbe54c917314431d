"""InfoNCE's sums and dlogits, tile by tile: the Triton kernels.

    S[i, j] = scale * log2(e) * x[i] . y[j]            positive of row i: column i + offset
    lse[i]        = log2 sum_j 2^S[i, j], j not the positive       the same by column
    dlogits[i, j] = (1 - p)[i] 2^(S - lse[i]) + (1 - p)[j] 2^(S - lse[j])
                    and at the positive -(1 - p)[i] - (1 - p)[j]

    M rows x   N columns y   D width   logits and logarithms to base 2, sums in float32

S stays in registers. What follows the product needs several numbers for each logit: it takes a
large tile slab by slab, so that those fit in registers, too. Sums are written per tile and added up
in a second pass: no atomics, the same bits on every run. The order of the tiles is that of Triton's
matrix product tutorial: down a group of rows first, so that what the group reads stays in the L2
cache.
"""

from __future__ import annotations

from flap_kernels.launch import jit, tl


@jit
def _tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The tile of a program; programs run along a group of rows first, then to the next columns."""
    group_size = GROUP_M * tiles_n
    first_m = (pid // group_size) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    in_group = pid % group_size
    return first_m + in_group % rows, in_group // rows


@jit
def _products(
    x_ptr,
    y_ptr,
    rows_left,
    columns_left,
    D,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """x y^T of one tile in float32; the pointers are the tile's.

    Rows and columns from `rows_left` and `columns_left` on are zero.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_d[None, :] * stride_xd
    y_ptrs = y_ptr + offs_n[None, :] * stride_yn + offs_d[:, None] * stride_yd
    mask_m = offs_m[:, None] < rows_left
    mask_n = offs_n[None, :] < columns_left
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        x = tl.load(x_ptrs, mask=mask_m & (offs_d[None, :] < D - d), other=0.0)
        y = tl.load(y_ptrs, mask=mask_n & (offs_d[:, None] < D - d), other=0.0)
        if UPCAST:  # the interpreter's product of bfloat16 is wrong
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        # x y^T += x[:, d:d+BLOCK_D] y[:, d:d+BLOCK_D]^T
        product = tl.dot(x, y, product, input_precision=PRECISION)
        x_ptrs += BLOCK_D * stride_xd
        y_ptrs += BLOCK_D * stride_yd
    return product


@jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@jit
def _column_slabs(tile, SLABS: tl.constexpr):
    """A tile's columns as 1 or 4 tiles, left to right."""
    tl.static_assert(SLABS == 1 or SLABS == 4)
    if SLABS == 1:
        slabs = (tile,)
    else:
        left, right = _halves(tile)
        slabs = _halves(left) + _halves(right)
    return slabs


@jit
def _share_an_id(x_ids_ptr, y_ids_ptr, offs_m, offs_n, mask_m, mask_n, IDS: tl.constexpr):
    """Whether a row and a column are equal in one of their IDS ids."""
    same = (offs_m < 0)[:, None] & (offs_n < 0)[None, :]
    for k in tl.static_range(IDS):  # pyright: ignore[reportGeneralTypeIssues]
        x_ids = tl.load(x_ids_ptr + offs_m.to(tl.int64) * IDS + k, mask=mask_m, other=0)
        y_ids = tl.load(y_ids_ptr + offs_n.to(tl.int64) * IDS + k, mask=mask_n, other=0)
        same = same | (x_ids[:, None] == y_ids[None, :])
    return same


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
    pid_m, pid_n = _tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    start_m = pid_m * BLOCK_M
    start_n = pid_n * BLOCK_N
    product = _products(
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
    slabs = _column_slabs(product, SLABS)
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
                out = out | _share_an_id(x_ids_ptr, y_ids_ptr, offs_m, offs_n, mask_m, mask_n, IDS)
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
def _store_dlogits(dlogits_ptr, dlogits, mask, stride_gm, PRECISION: tl.constexpr):
    """Store a slab of dlogits for a product of this precision; the pointer is the slab's."""
    if PRECISION == "tf32":  # to the nearest: the next product truncates these bits
        bits = (dlogits.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # A NaN stays: its bits would carry into the sign.
        dlogits = tl.where(dlogits == dlogits, bits.to(tl.float32, bitcast=True), dlogits)
    offs_m = tl.arange(0, dlogits.shape[0])
    offs_n = tl.arange(0, dlogits.shape[1])
    dlogits_ptrs = dlogits_ptr + offs_m[:, None] * stride_gm + offs_n[None, :]
    tl.store(dlogits_ptrs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


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
    pid_m, pid_n = _tile_of(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m = pid_m * BLOCK_M
    start_n = pid_n * BLOCK_N
    product = _products(
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
    slabs = _column_slabs(product, SLABS)
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
                out = out | _share_an_id(x_ids_ptr, y_ids_ptr, offs_m, offs_n, mask_m, mask_n, IDS)
            dlogits = tl.where(out, 0.0, dlogits)
            # dlogits[i, i + offset] = -(1 - p)[i] - (1 - p)[j]
            is_positive = offs_n[None, :] == (offs_m + offset)[:, None]
            dlogits = tl.where(is_positive & mask_n[None, :], at_positive, dlogits)
        # dscale = sum(dlogits * (x y^T))
        scale_sum += tl.sum(dlogits * product)
        # Behind column N the workspace's rows hold zeros: a row is stored in whole lines.
        mask = mask_m[:, None] & (offs_n < stride_gm)[None, :]
        slab_ptr = dlogits_ptr + start_m.to(tl.int64) * stride_gm + first
        _store_dlogits(slab_ptr, dlogits, mask, stride_gm, PRECISION)
    tl.store(scale_partial_ptr + pid, scale_sum)
