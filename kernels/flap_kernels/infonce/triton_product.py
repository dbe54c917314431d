"""What the kernels over tiles of logits share: their order, their product, their slabs and ids.

The order of the tiles is that of Triton's matrix product tutorial: down a group of rows first, so
that what the group reads stays in the L2 cache.
"""

from __future__ import annotations

from flap_kernels.launch import jit, tl


@jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The tile of a program; programs run along a group of rows first, then to the next columns."""
    group_size = GROUP_M * tiles_n
    first_m = (pid // group_size) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    in_group = pid % group_size
    return first_m + in_group % rows, in_group // rows


@jit
def products(
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
def column_slabs(tile, SLABS: tl.constexpr):
    """A tile's columns as 1 or 4 tiles, left to right."""
    tl.static_assert(SLABS == 1 or SLABS == 4)
    if SLABS == 1:
        slabs = (tile,)
    else:
        left, right = _halves(tile)
        slabs = _halves(left) + _halves(right)
    return slabs


@jit
def share_an_id(x_ids_ptr, y_ids_ptr, offs_m, offs_n, mask_m, mask_n, IDS: tl.constexpr):
    """Whether a row and a column are equal in one of their IDS ids."""
    same = (offs_m < 0)[:, None] & (offs_n < 0)[None, :]
    for k in tl.static_range(IDS):  # pyright: ignore[reportGeneralTypeIssues]
        x_ids = tl.load(x_ids_ptr + offs_m.to(tl.int64) * IDS + k, mask=mask_m, other=0)
        y_ids = tl.load(y_ids_ptr + offs_n.to(tl.int64) * IDS + k, mask=mask_n, other=0)
        same = same | (x_ids[:, None] == y_ids[None, :])
    return same


@jit
def store_dlogits(dlogits_ptr, dlogits, mask, stride_gm, PRECISION: tl.constexpr):
    """Store a slab of dlogits for a product of this precision; the pointer is the slab's."""
    if PRECISION == "tf32":  # to the nearest: the next product truncates these bits
        bits = (dlogits.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # A NaN stays: its bits would carry into the sign.
        dlogits = tl.where(dlogits == dlogits, bits.to(tl.float32, bitcast=True), dlogits)
    offs_m = tl.arange(0, dlogits.shape[0])
    offs_n = tl.arange(0, dlogits.shape[1])
    dlogits_ptrs = dlogits_ptr + offs_m[:, None] * stride_gm + offs_n[None, :]
    tl.store(dlogits_ptrs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)
