"""The sigmoid loss of a tile and its dlogits: the Triton kernel.

l[i, j] = scale * x[i] . y[j] + bias               positive of row i: column i + offset
loss = sum of softplus(l), at the positive softplus(-l)
dlogits[i, j] = sigmoid(l), at the positive -sigmoid(-l)

M rows x   N columns y   D width   logits and sums in float32
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
def sigmoid_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    x_ids_ptr,
    y_ids_ptr,
    dlogits_ptr,
    loss_partial_ptr,
    scale_partial_ptr,
    bias_partial_ptr,
    M,
    N,
    D,
    offset,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_gm,
    GRADIENTS: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLABS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The sum of a tile's losses; with GRADIENTS its dlogits, and their sums for scale and bias."""
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
    scale = tl.load(scale_ptr).to(tl.float32)
    bias = tl.load(bias_ptr).to(tl.float32)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    loss_sum = tl.full((), 0.0, dtype=tl.float32)
    scale_sum = loss_sum
    bias_sum = loss_sum
    slabs = column_slabs(product, SLABS)
    WIDTH: tl.constexpr = BLOCK_N // SLABS
    for slab in tl.static_range(SLABS):  # pyright: ignore[reportGeneralTypeIssues]
        first = start_n + slab * WIDTH
        product = slabs[slab]
        offs_n = first + tl.arange(0, WIDTH)
        mask_n = offs_n < N
        # l = scale * x . y + bias
        logits = product * scale + bias
        # e = e^-|l|, log(1 + e) without the rounding of 1 + e
        e = tl.exp2(-tl.abs(logits) * 1.4426950408889634)
        above_one = 1.0 + e
        rounded = above_one - 1.0
        quotient = e / tl.where(rounded == 0.0, 1.0, rounded)
        log1p = tl.where(rounded == 0.0, e, tl.log(above_one) * quotient)
        # softplus(l) and sigmoid(l)
        losses = tl.maximum(logits, 0.0) + log1p
        dlogits = tl.where(logits >= 0.0, 1.0, e) / above_one
        past_end = (start_m + BLOCK_M > M) | (first + WIDTH > N)
        ahead = first - start_m - offset
        if IDS or past_end or (ahead < BLOCK_M and ahead > -WIDTH):
            # At the positive softplus(-l) and -sigmoid(-l); nothing past the end.
            is_positive = offs_n[None, :] == (offs_m + offset)[:, None]
            out = ~(mask_m[:, None] & mask_n[None, :])
            if IDS:
                same = share_an_id(x_ids_ptr, y_ids_ptr, offs_m, offs_n, mask_m, mask_n, IDS)
                out = out | (same & (is_positive == 0))
            losses = tl.where(is_positive, tl.maximum(-logits, 0.0) + log1p, losses)
            losses = tl.where(out, 0.0, losses)
            dlogits = tl.where(is_positive, -tl.where(logits >= 0.0, e, 1.0) / above_one, dlogits)
            dlogits = tl.where(out, 0.0, dlogits)
        loss_sum += tl.sum(losses)
        if GRADIENTS:
            scale_sum += tl.sum(dlogits * product)
            bias_sum += tl.sum(dlogits)
            # Behind column N the workspace's rows hold zeros: a row is stored in whole lines.
            mask = mask_m[:, None] & (offs_n < stride_gm)[None, :]
            slab_ptr = dlogits_ptr + start_m.to(tl.int64) * stride_gm + first
            store_dlogits(slab_ptr, dlogits, mask, stride_gm, PRECISION)
    tl.store(loss_partial_ptr + pid, loss_sum)
    if GRADIENTS:
        tl.store(scale_partial_ptr + pid, scale_sum)
        tl.store(bias_partial_ptr + pid, bias_sum)
