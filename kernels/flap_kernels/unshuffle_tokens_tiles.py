"""The kernels of `unshuffle_tokens`, forward and backward: a tile of tokens of one clip.

N tokens of a clip   K of them kept   D width
"""

from __future__ import annotations

from flap_kernels.launch import jit, tl, triton


@jit
def clip_rows(count, BLOCK_ROWS: tl.constexpr):
    """The clip of this program and its rows in the clip, int64; one division per program."""
    tiles = tl.cdiv(count, BLOCK_ROWS)
    pid = tl.program_id(0)
    rows = pid % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return (pid // tiles).to(tl.int64), rows.to(tl.int64)


@jit
def unshuffle_tokens_kernel(
    y_ptr,
    ids_restore_ptr,
    token_ptr,
    position_ptr,
    position_index_ptr,
    out_ptr,
    N,
    K,
    D,
    positions,
    stride_yb,
    stride_yk,
    stride_yd,
    stride_rb,
    stride_rn,
    stride_td,
    stride_pn,
    stride_pd,
    stride_ib,
    stride_in,
    HAS_TOKEN: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, n = clip_rows(N, BLOCK_ROWS)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = n < N, offs_d < D
    mask = mask_n[:, None] & mask_d[None, :]

    slot = tl.load(ids_restore_ptr + b * stride_rb + n * stride_rn, mask=mask_n, other=K).to(
        tl.int64
    )
    kept = (slot >= 0) & (slot < K)
    # x = y[b, slot, :] if slot < K else mask_token
    at = (b * stride_yb + slot * stride_yk)[:, None] + (offs_d * stride_yd)[None, :]
    x = tl.load(y_ptr + at, mask=mask & kept[:, None], other=0.0).to(tl.float32)
    if HAS_TOKEN:
        token = tl.load(token_ptr + offs_d * stride_td, mask=mask_d, other=0.0).to(tl.float32)
        x = tl.where(kept[:, None], x, token[None, :])
    if HAS_POSITION:
        p = n
        if HAS_INDEX:
            at = position_index_ptr + b * stride_ib + n * stride_in
            p = tl.load(at, mask=mask_n, other=0).to(tl.int64)
        # y'[b, n, :] = x + position[p, :]
        at = (p * stride_pn)[:, None] + (offs_d * stride_pd)[None, :]
        inside = mask & ((p >= 0) & (p < positions))[:, None]
        x += tl.load(position_ptr + at, mask=inside, other=float("nan")).to(tl.float32)
    at = ((b * N + n) * D)[:, None] + offs_d[None, :]
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def unshuffle_tokens_backward_kernel(
    grad_ptr,
    ids_restore_ptr,
    y_grad_ptr,
    partial_ptr,
    N,
    K,
    D,
    stride_gb,
    stride_gn,
    stride_gd,
    stride_rb,
    stride_rn,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, n = clip_rows(N, BLOCK_ROWS)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = n < N, offs_d < D
    mask = mask_n[:, None] & mask_d[None, :]

    slot = tl.load(ids_restore_ptr + b * stride_rb + n * stride_rn, mask=mask_n, other=0).to(
        tl.int64
    )
    kept = (slot >= 0) & (slot < K)
    at = (b * stride_gb + n * stride_gn)[:, None] + (offs_d * stride_gd)[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    # dy[b, slot, :] = dy'[b, n, :] where slot < K
    at = ((b * K + slot) * D)[:, None] + offs_d[None, :]
    tl.store(y_grad_ptr + at, grad.to(y_grad_ptr.dtype.element_ty), mask=mask & kept[:, None])
    # dmask_token = sum of dy'[b, n, :] where slot >= K, here over this program's rows
    dropped = tl.sum(tl.where(kept[:, None], 0.0, grad.to(tl.float32)), axis=0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + offs_d, dropped, mask=mask_d)


def blocks(D: int) -> dict[str, int]:
    """The tile for rows of this width: 4,096 elements, in whole lines of memory."""
    block_d = min(512, triton.next_power_of_2(D))
    return {"BLOCK_ROWS": 4096 // block_d, "BLOCK_D": block_d}
