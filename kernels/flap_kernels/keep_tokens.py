"""keep_tokens: the tokens that masking left, packed.

    y[b, k, :] = x[b, keep[b, k], :]

    B clips   N patches of a clip   K of them kept   D width

The backward scatters without atomics: a row of `keep` never names a token twice, so each row of
the gradient is one row of y's, or zeros, and is written once.

Least traffic, forward: B*K*D read, B*K*D written; backward: B*K*D read, B*N*D written.
Source: Fast Language-Audio Pre-training, arXiv 2311.01615, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flap_kernels.checks import (
    check_floats,
    check_inside,
    check_integers,
    check_shape,
    check_together,
)
from flap_kernels.launch import ceil_div, jit, runs_triton, tl
from flap_kernels.patches import clips, shaped, strides
from flap_kernels.restore_tokens import blocks, clip_rows, restore_tokens_kernel, spread
from flap_kernels.spec import Arch, Inputs, Kernel, Program, Size


def keep_tokens_reference(x: Tensor, keep: Tensor) -> Tensor:
    """Say what `keep_tokens` means, in one line of PyTorch."""
    return x.gather(1, keep.long()[..., None].expand(-1, -1, x.shape[-1]))


@jit
def keep_tokens_kernel(
    x_ptr,
    keep_ptr,
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
    live = offs_k < K
    n = tl.load(keep_ptr + b * stride_kb + offs_k * stride_kk, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & (offs_d < D)[None, :]
    inside = mask & ((n >= 0) & (n < N))[:, None]
    at = (b * stride_xb + n * stride_xn)[:, None] + (offs_d * stride_xd)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=float("nan"))
    tl.store(out_ptr + ((b * K + offs_k) * D)[:, None] + offs_d[None, :], x, mask=mask)


@torch.library.custom_op("flap_kernels::keep_tokens", mutates_args=())
def _keep_tokens(x: Tensor, keep: Tensor) -> Tensor:
    if not runs_triton(x):
        check_inside("keep", keep, x.shape[1])
        return x[clips(keep), keep.long()]
    out = _empty_kept(x, keep)
    if out.numel() == 0:
        return out
    (B, K, D), tile = out.shape, blocks(x.shape[2])
    keep_tokens_kernel[(B * ceil_div(K, tile["BLOCK_ROWS"]), ceil_div(D, tile["BLOCK_D"]))](
        x,
        keep,
        out,
        x.shape[1],
        K,
        D,
        **strides("x", "bnd", x),
        **strides("k", "bk", keep),
        **tile,
    )
    return out


@_keep_tokens.register_fake
def _empty_kept(x, keep):
    return x.new_empty((*keep.shape, x.shape[2]))


@torch.library.custom_op("flap_kernels::scatter_tokens", mutates_args=())
def scatter_tokens(grad: Tensor, keep: Tensor, N: int) -> Tensor:
    """`keep_tokens` backwards: (B, K, D) -> (B, N, D), zeros where no token was kept."""
    B, K, D = grad.shape
    if not runs_triton(grad):
        out = grad.new_zeros(B, N, D)
        out[clips(keep), keep.long()] = grad
        return out
    k = torch.arange(K, device=keep.device).expand(B, K)
    slots = torch.full((B, N), K, device=keep.device).scatter_(1, keep.long(), k)
    return spread(grad, slots, None, None, grad.dtype)


@scatter_tokens.register_fake
def _(grad, keep, N):
    return grad.new_empty(len(grad), N, grad.shape[2])


def _setup(ctx, inputs, output):
    x, keep = inputs
    ctx.save_for_backward(keep)
    ctx.N = x.shape[1]


def _backward(ctx, grad):
    return scatter_tokens(grad, *ctx.saved_tensors, ctx.N), None


_keep_tokens.register_autograd(_backward, setup_context=_setup)


def keep_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """The kept tokens of each clip, (B, K, D), in the order of `keep`.

    Args:
        x: (B, N, D), any strides.
        keep: (B, K) int32 or int64 in [0, N), no index twice in a row. On a GPU that is not
            checked: a token outside is NaN.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    check_shape("x", x, (None, None, None), "(B, N, D)")
    check_shape("keep", keep, (len(x), None), "(B, K)")
    check_floats(x=x)
    check_integers(keep=keep)
    check_together(x=x, keep=keep)
    return _keep_tokens(x, keep)


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    B, N, K, D = {"edge": (1, 1, 1, 1), "odd": (3, 71, 37, 67), "paper": (288, 512, 306, 768)}[size]
    draw = {"generator": generator, "device": generator.device}
    arguments = {
        "x": torch.randn(B, N, D, **draw, dtype=torch.float64),
        "keep": torch.rand(B, N, **draw).argsort(1)[:, :K].sort(1).values,
    }
    return Inputs(arguments, differentiable=("x",))


def _programs(arch: Arch) -> tuple[Program, ...]:
    B, N, K, D = 288, 512, 306, 768
    return (
        Program(
            name="keep_tokens",
            kernel=keep_tokens_kernel,
            signature={
                "x_ptr": "*bf16",
                "keep_ptr": "*i64",
                "out_ptr": "*bf16",
                "N": N,
                "K": K,
                "D": D,
                **strides("x", "bnd", shaped(B, N, D)),
                **strides("k", "bk", shaped(B, K)),
            },
            constants=blocks(D),
            bytes_moved=2 * B * K * D * 2 + 8 * B * K,
        ),
        Program(
            name="scatter_tokens",
            kernel=restore_tokens_kernel,
            signature={
                # What is absent is passed as something, and not read.
                **dict.fromkeys(("y_ptr", "token_ptr", "position_ptr", "out_ptr"), "*bf16"),
                "restore_ptr": "*i64",
                "N": N,
                "K": K,
                "D": D,
                **strides("y", "bkd", shaped(B, K, D)),
                **strides("r", "bn", shaped(B, N)),
                **strides("t", "d", shaped(1)),
                **strides("p", "nd", shaped(1, 1)),
            },
            constants={"HAS_TOKEN": False, "HAS_POSITION": False, **blocks(D)},
            bytes_moved=2 * B * D * (K + N) + 8 * B * N,
        ),
    )


KERNEL = Kernel(
    name="keep_tokens",
    op=keep_tokens,
    reference=keep_tokens_reference,
    inputs=_inputs,
    programs=_programs,
    bytes_moved=2 * 288 * 768 * (3 * 306 + 512),
)
