"""gather_tokens: the kept tokens of each clip, packed.

    y[b, k, :] = x[b, ids_keep[b, k], :]

    B clips   N patches of a clip   K of them kept   D width

The backward scatters without atomics: a row of `ids_keep` never names a token twice, so each row
of the gradient is one row of y's, or zeros, and is written once.

Least traffic, forward: B*K*D read, B*K*D written; backward: B*K*D read, B*N*D written.
Source: Fast Language-Audio Pre-training, arXiv 2311.01615, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flap_kernels.checks import (
    check_floats,
    check_integers,
    check_shape,
    check_together,
    clamped,
)
from flap_kernels.launch import ceil_div, jit, run_kernel, runs_triton, tl
from flap_kernels.patches import clips, nan_rows, or_last, strides
from flap_kernels.spec import Inputs, Kernel, Size
from flap_kernels.unshuffle_tokens import spread
from flap_kernels.unshuffle_tokens_tiles import blocks, clip_rows


def gather_tokens_reference(x: Tensor, ids_keep: Tensor) -> Tensor:
    """The reference of `gather_tokens`: the kept tokens, by PyTorch's gather."""
    return x.gather(1, ids_keep.long()[..., None].expand(-1, -1, x.shape[-1]))


@jit
def gather_tokens_kernel(
    x_ptr,
    ids_keep_ptr,
    out_ptr,
    N,
    K,
    D,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_kb,
    stride_kk,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, offs_k = clip_rows(K, BLOCK_ROWS)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_k = offs_k < K
    n = tl.load(ids_keep_ptr + b * stride_kb + offs_k * stride_kk, mask=mask_k, other=0).to(
        tl.int64
    )
    mask = mask_k[:, None] & (offs_d < D)[None, :]
    inside = mask & ((n >= 0) & (n < N))[:, None]
    at = (b * stride_xb + n * stride_xn)[:, None] + (offs_d * stride_xd)[None, :]
    # y[b, k, :] = x[b, n, :], n = ids_keep[b, k]
    x = tl.load(x_ptr + at, mask=inside, other=float("nan"))
    tl.store(out_ptr + ((b * K + offs_k) * D)[:, None] + offs_d[None, :], x, mask=mask)


@torch.library.custom_op("flap_kernels::gather_tokens", mutates_args=())
def _gather_tokens(x: Tensor, ids_keep: Tensor) -> Tensor:
    if not runs_triton(x):
        n, outside = clamped("ids_keep", ids_keep, x.shape[1])
        return nan_rows(x[clips(ids_keep), n], outside)
    out = _empty_kept(x, ids_keep)
    if out.numel() == 0:
        return out
    (B, K, D), tile = out.shape, blocks(x.shape[2])
    run_kernel(
        gather_tokens_kernel,
        (B * ceil_div(K, tile["BLOCK_ROWS"]), ceil_div(D, tile["BLOCK_D"])),
        x,
        ids_keep,
        out,
        x.shape[1],
        K,
        D,
        **strides("x", "bnd", x),
        **strides("k", "bk", ids_keep),
        **tile,
    )
    return out


@_gather_tokens.register_fake
def _empty_kept(x, ids_keep):
    return x.new_empty((*ids_keep.shape, x.shape[2]))


@torch.library.custom_op("flap_kernels::scatter_tokens", mutates_args=())
def scatter_tokens(grad: Tensor, ids_keep: Tensor, N: int) -> Tensor:
    """The backward of `gather_tokens`: (B, K, D) -> (B, N, D), zeros where no token was kept.

    Gradients of tokens outside [0, N) are left out.
    """
    B, K, D = grad.shape
    if not runs_triton(grad):
        n, outside = clamped("ids_keep", ids_keep, N)
        if outside is not None:  # zeros are added where they were moved to
            grad = grad.masked_fill(outside[..., None], 0)
        at, out = (clips(n), n), grad.new_zeros(B, N, D)
        return out.index_put_(at, grad, accumulate=outside is not None)
    # The slot of each token among the kept ones, K where it was dropped; at the end of all clips
    # one that takes what is outside, so that rows stay N apart.
    slots = torch.full((B * N + 1,), K, device=ids_keep.device)
    n = or_last(ids_keep, N)
    slots[torch.where(n < N, n + N * clips(n), B * N)] = torch.arange(K, device=n.device)
    return spread(grad, slots[:-1].view(B, N), None, None, None, grad.dtype)


@scatter_tokens.register_fake
def _(grad, ids_keep, N):
    return grad.new_empty(len(grad), N, grad.shape[2])


def _setup(ctx, inputs, output):
    x, ids_keep = inputs
    ctx.save_for_backward(ids_keep)
    ctx.N = x.shape[1]


def _backward(ctx, grad):
    return scatter_tokens(grad, *ctx.saved_tensors, ctx.N), None


_gather_tokens.register_autograd(_backward, setup_context=_setup)


def gather_tokens(x: Tensor, ids_keep: Tensor) -> Tensor:
    """The kept tokens of each clip, (B, K, D), in the order of `ids_keep`.

    Args:
        x: (B, N, D), any strides.
        ids_keep: (B, K) int32 or int64 in [0, N), no index twice in a row. On a GPU that is not
            checked: a token outside is NaN, and its gradient is left out.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    check_shape("x", x, (None, None, None), "(B, N, D)")
    check_shape("ids_keep", ids_keep, (len(x), None), "(B, K)")
    check_floats(x=x)
    check_integers(ids_keep=ids_keep)
    check_together(x=x, ids_keep=ids_keep)
    return _gather_tokens(x, ids_keep)


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    B, N, K, D = {"edge": (1, 1, 1, 1), "odd": (3, 71, 37, 67), "paper": (288, 512, 306, 768)}[size]
    draw = {"generator": generator, "device": generator.device}
    arguments = {
        "x": torch.randn(B, N, D, **draw, dtype=torch.float64),
        "ids_keep": torch.rand(B, N, **draw).argsort(1)[:, :K].sort(1).values,
    }
    return Inputs(arguments, differentiable=("x",))


KERNEL = Kernel(
    name="gather_tokens",
    op=gather_tokens,
    reference=gather_tokens_reference,
    inputs=_inputs,
)
