"""unshuffle_tokens: a decoder's input from kept tokens, mask tokens and positions.

    y'[b, n, :] = (y[b, i, :] if i < K else mask_token) + position[p, :],  i = ids_restore[b, n]
    p           = position_index[b, n] if given, else n

    B clips   N patches of a clip   K of them kept   D width

`ids_restore` is a permutation, so the backward scatters without atomics: each token of `y` is
written by the one program that holds its gradient. The mask token's gradient is summed within
programs, then over them in a second pass.

Least traffic, forward: B*K*D read, B*N*D written; backward: B*N*D read, B*K*D written.
Source: Masked Autoencoders that Listen, arXiv 2207.06405, section 3; FLAP, arXiv 2311.01615.
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
    checks_values,
    clamped,
)
from flap_kernels.launch import ceil_div, run_kernel, runs_triton
from flap_kernels.patches import (
    add_rows,
    check_positions,
    clips,
    nan_rows,
    or_last,
    strides,
)
from flap_kernels.precision import accumulator_dtype
from flap_kernels.spec import Inputs, Kernel, Size
from flap_kernels.unshuffle_tokens_tiles import (
    blocks,
    unshuffle_tokens_backward_kernel,
    unshuffle_tokens_kernel,
)


def unshuffle_tokens_reference(
    y: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    position: Tensor,
    position_index: Tensor | None = None,
) -> Tensor:
    """The reference of `unshuffle_tokens`, by appending one mask token to each clip."""
    full = torch.cat([y, mask_token.expand(len(y), 1, -1)], 1)
    slot = ids_restore.long().clamp(max=y.shape[1])
    added = position if position_index is None else position[position_index.long()]
    return full.gather(1, slot[..., None].expand(-1, -1, y.shape[2])) + added


def spread(
    y: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor | None,
    position: Tensor | None,
    position_index: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Launch the forward; without a mask token, rows of dropped tokens become zeros."""
    (B, K, D), N = y.shape, ids_restore.shape[1]
    out = y.new_empty((B, N, D), dtype=dtype)
    if out.numel() == 0:
        return out
    # Absent pointers get a dummy tensor; the kernel never reads it.
    token = y.new_empty(1) if mask_token is None else mask_token
    added = y.new_empty(1, 1) if position is None else position
    index = ids_restore if position_index is None else position_index
    tile = blocks(D)
    grid = (B * ceil_div(N, tile["BLOCK_ROWS"]), ceil_div(D, tile["BLOCK_D"]))
    run_kernel(
        unshuffle_tokens_kernel,
        grid,
        y,
        ids_restore,
        token,
        added,
        index,
        out,
        N,
        K,
        D,
        len(added),
        **strides("y", "bkd", y),
        **strides("r", "bn", ids_restore),
        **strides("t", "d", token),
        **strides("p", "nd", added),
        **strides("i", "bn", index),
        HAS_TOKEN=mask_token is not None,
        HAS_POSITION=position is not None,
        HAS_INDEX=position_index is not None,
        **tile,
    )
    return out


@torch.library.custom_op("flap_kernels::unshuffle_tokens", mutates_args=())
def _unshuffle_tokens(
    y: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    position: Tensor | None,
    position_index: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if runs_triton(y, mask_token):
        return spread(y, ids_restore, mask_token, position, position_index, dtype)
    total_dtype = _promoted(y, mask_token, position)
    out = _unshuffled(y.to(total_dtype), ids_restore, mask_token.to(total_dtype))
    if position is not None and position_index is not None:
        p, outside = clamped("position_index", position_index, len(position))
        out += nan_rows(position[p], outside)
    elif position is not None:
        out += position
    return out.to(dtype)


@_unshuffle_tokens.register_fake
def _(y, ids_restore, mask_token, position, position_index, dtype):
    return y.new_empty((*ids_restore.shape, y.shape[2]), dtype=dtype)


@torch.library.custom_op("flap_kernels::unshuffle_tokens_backward", mutates_args=())
def _unshuffle_tokens_backward(
    grad: Tensor, ids_restore: Tensor, K: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of `y`, in its dtype, and of the mask token, at least float32."""
    y_grad, token_grad = _empty_gradients(grad, ids_restore, K, dtype)
    if not runs_triton(grad):
        b = clips(ids_restore)
        if checks_values(ids_restore):
            order = _inverse(ids_restore)
            y_grad.copy_(grad[b, order[:, :K]])
            return y_grad, grad[b, order[:, K:]].sum((0, 1), dtype=token_grad.dtype)
        slot = or_last(ids_restore, K)
        full = grad.new_zeros((len(grad), K + 1, grad.shape[2]), dtype=dtype)
        full[b, slot] = grad.to(dtype)
        dropped = grad.masked_fill((slot < K)[..., None], 0)
        return y_grad.copy_(full[:, :K]), dropped.sum((0, 1), dtype=token_grad.dtype)
    if grad.numel() == 0:
        return y_grad, token_grad.zero_()
    B, N, D = grad.shape
    tile = blocks(D)
    programs = B * ceil_div(N, tile["BLOCK_ROWS"])
    partial = grad.new_empty((programs, D), dtype=torch.float32)
    run_kernel(
        unshuffle_tokens_backward_kernel,
        (programs, ceil_div(D, tile["BLOCK_D"])),
        grad,
        ids_restore,
        y_grad,
        partial,
        N,
        K,
        D,
        **strides("g", "bnd", grad),
        **strides("r", "bn", ids_restore),
        **tile,
    )
    return y_grad, partial.sum(0)


@_unshuffle_tokens_backward.register_fake
def _empty_gradients(grad, ids_restore, K, dtype):
    B, _, D = grad.shape
    total_dtype = accumulator_dtype(grad.dtype)
    return grad.new_empty((B, K, D), dtype=dtype), grad.new_empty(D, dtype=total_dtype)


def _unshuffled(y: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    """(B, N, D): the kept tokens at their patches, mask tokens at the others."""
    B, K, D = y.shape
    if checks_values(ids_restore):  # faster than what also takes indices out of range
        out = y.new_empty((*ids_restore.shape, D)).copy_(mask_token)
        out[clips(ids_restore), _inverse(ids_restore)[:, :K]] = y
        return out
    full = torch.cat([y, mask_token.expand(B, 1, D)], 1)
    return full[clips(ids_restore), or_last(ids_restore, K)]


def _inverse(ids_restore: Tensor) -> Tensor:
    """(B, N) int64, the inverse permutation: the kept patches, then the dropped ones."""
    check_inside("ids_restore", ids_restore, ids_restore.shape[1])
    n = torch.arange(ids_restore.shape[1], device=ids_restore.device).expand(ids_restore.shape)
    return torch.empty_like(n).scatter_(1, ids_restore.long(), n)


def _setup(ctx, inputs, output):
    y, ids_restore, mask_token, position, position_index, _ = inputs
    ctx.save_for_backward(ids_restore, position_index)
    ctx.K, ctx.y, ctx.token = y.shape[1], y.dtype, mask_token.dtype
    if position is not None:
        ctx.position, ctx.positions = position.dtype, len(position)


def _backward(ctx, grad):
    ids_restore, position_index = ctx.saved_tensors
    y_grad, token_grad = _unshuffle_tokens_backward(grad, ids_restore, ctx.K, ctx.y)
    position_grad = None
    if ctx.needs_input_grad[3]:
        if position_index is None:
            position_grad = grad.sum(0, dtype=accumulator_dtype(grad.dtype))
        else:
            position_grad = add_rows(grad, position_index, ctx.positions)
        position_grad = position_grad.to(ctx.position)
    return y_grad, None, token_grad.to(ctx.token), position_grad, None, None


_unshuffle_tokens.register_autograd(_backward, setup_context=_setup)


def unshuffle_tokens(
    y: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    position: Tensor | None = None,
    position_index: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A decoder's input, (B, N, D): kept tokens, mask tokens elsewhere, positions added.

    To carry a [CLS] token along, count it as a patch: `y` with it in front, `ids_restore` one
    longer and one higher behind a leading 0, a first row of zeros in `position`.

    Args:
        y: (B, K, D).
        ids_restore: (B, N) int32 or int64, a permutation of [0, N) in each row, the index of each
            patch in `cat(kept, dropped)`. Its range is checked on a CPU; on a GPU a patch whose
            index is outside is a mask token, and the gradient of a row of `y` that none names is
            undefined.
        mask_token: (D,).
        position: (N, D), or None to add nothing; with `position_index`, any number of rows.
        position_index: (B, N) int32 or int64, the row of `position` of each token, for clips of
            different lengths end to end, B = 1; None takes n. On a GPU that is not checked: a
            token whose row is outside is NaN, and its gradient is left out of position's.
        dtype: of the result; None promotes the inputs' types as PyTorch does. Sums are float32.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    check_shape("y", y, (None, None, None), "(B, K, D)")
    check_shape("ids_restore", ids_restore, (len(y), None), "(B, N)")
    check_shape("mask_token", mask_token, (y.shape[2],), "(D,)")
    check_integers(ids_restore=ids_restore)
    check_floats(y=y, mask_token=mask_token)
    check_together(y=y, ids_restore=ids_restore, mask_token=mask_token)
    if ids_restore.shape[1] < y.shape[1]:
        raise ValueError(
            f"ids_restore must be (B, N) with N of at least K = {y.shape[1]}, "
            f"got {ids_restore.shape[1]}"
        )
    if position is None and position_index is not None:
        raise ValueError("position_index must be None without position; pass position, too")
    if position is not None:
        N, D = ids_restore.shape[1], y.shape[2]
        check_positions(position, position_index, "ids_restore", tuple(ids_restore.shape), D)
        if position_index is None:
            check_shape("position", position, (N, D), "(N, D)")
        check_together(y=y, position=position)
    dtype = dtype or _promoted(y, mask_token, position)
    return _unshuffle_tokens(y, ids_restore, mask_token, position, position_index, dtype)


def _promoted(y: Tensor, mask_token: Tensor, position: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(y.dtype, mask_token.dtype)
    return dtype if position is None else torch.promote_types(dtype, position.dtype)


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    B, N, K, D = {"edge": (1, 1, 1, 1), "odd": (3, 71, 37, 67), "paper": (288, 512, 306, 512)}[size]
    draw = {"generator": generator, "device": generator.device}
    real = {**draw, "dtype": torch.float64}
    arguments = {
        "y": torch.randn(B, K, D, **real),
        "ids_restore": torch.rand(B, N, **draw).argsort(1),
        "mask_token": torch.randn(D, **real),
        "position": torch.randn(N, D, **real),
    }
    return Inputs(arguments, differentiable=("y", "mask_token", "position"))


KERNEL = Kernel(
    name="unshuffle_tokens",
    op=unshuffle_tokens,
    reference=unshuffle_tokens_reference,
    inputs=_inputs,
)
