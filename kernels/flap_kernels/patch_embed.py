"""patch_embed: the embeddings of a log-mel's kept patches.

    y[b, k, :] = weight @ patch(mel[b], ids_keep[b, k]) + bias + position[p, :]
    p          = position_index[b, k] if given, else ids_keep[b, k]

    B clips   T frames   F mel bins   P side of a patch   K patches kept   D width

Dropped patches are neither read nor embedded, and patches are not stored: each program reads its
patches once, rounds them to the product's type and runs over the width. The backward packs the
patches again, with a column of ones, so that one library product gives the weight's and the bias'
gradients.

Least traffic, forward: B*K*P*P numbers of the log-mel read, B*K*D written; backward: the same
number of both read.
Source: Fast Language-Audio Pre-training, arXiv 2311.01615, section 3 (mask before embedding);
Masked Autoencoders that Listen, arXiv 2207.06405 (patches, positions).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flap_kernels.checks import check_floats, check_shape, check_together, clamped
from flap_kernels.gather_tokens import scatter_tokens
from flap_kernels.launch import capability, ceil_div, interpreted, run_kernel, runs_triton
from flap_kernels.patch_embed_tiles import patch_embed_kernel, tiles
from flap_kernels.patches import (
    MOST_PIXELS,
    add_rows,
    check_patches,
    check_positions,
    clips,
    nan_rows,
    pack_patches,
    patch_rows,
    strides,
)
from flap_kernels.precision import (
    accumulator_dtype,
    add_product,
    float32_precision,
    product_dtype,
)
from flap_kernels.spec import Inputs, Kernel, Size


def patch_embed_reference(
    mel: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    position_index: Tensor | None = None,
) -> Tensor:
    """The reference of `patch_embed`: the embedded patches, by gather, product and two sums."""
    patch = round(weight.shape[1] ** 0.5)
    rows = patch_rows(mel, clips(ids_keep), ids_keep.long(), patch)
    index = ids_keep if position_index is None else position_index
    return torch.nn.functional.linear(rows, weight, bias) + position[index.long()]


@torch.library.custom_op("flap_kernels::patch_embed", mutates_args=())
def _patch_embed(
    mel: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    position_index: Tensor | None,
    patch: int,
    product: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    weight = weight.to(product)
    (B, K), (D, pixels) = ids_keep.shape, weight.shape
    tile = None
    if runs_triton(mel, weight) and pixels <= MOST_PIXELS:
        tile = tiles(pixels, product, float32_precision(), capability(mel))
    if tile is None:
        return _plain(mel, ids_keep, weight, bias, position, position_index, patch, dtype)
    out = mel.new_empty((B, K, D), dtype=dtype)
    if out.numel() == 0:
        return out
    # Absent pointers get a dummy tensor; the kernel never reads it.
    index = ids_keep if position_index is None else position_index
    run_kernel(
        patch_embed_kernel,
        (ceil_div(B * K, tile["BLOCK_ROWS"]),),
        mel,
        ids_keep,
        weight,
        bias,
        position,
        index,
        out,
        B * K,
        K,
        D,
        _patches(mel, patch),
        len(position),
        mel.shape[2] // patch,
        **strides("m", "btf", mel),
        **strides("k", "bk", ids_keep),
        **strides("w", "dp", weight),
        **strides("b", "d", bias),
        **strides("p", "nd", position),
        **strides("i", "bk", index),
        HAS_INDEX=position_index is not None,
        P=patch,
        UPCAST=interpreted(),
        **tile,
    )
    return out


def _patches(mel: Tensor, patch: int) -> int:
    return mel.shape[1] // patch * (mel.shape[2] // patch)


def _plain(mel, ids_keep, weight, bias, position, position_index, patch, dtype):
    total_dtype = accumulator_dtype(weight.dtype)
    rows = patch_rows(mel, clips(ids_keep), ids_keep, patch).flatten(0, 1).to(weight.dtype)
    index = ids_keep if position_index is None else position_index
    index, outside = clamped("position_index", index.flatten(), len(position))
    # The product is added to bias and positions, which saves a pass over the output.
    if len(position) <= len(index):
        out = (position.to(total_dtype) + bias).index_select(0, index)
    else:  # a table for longer clips than these
        out = position.index_select(0, index).to(total_dtype) + bias
    out = nan_rows(out, outside)
    return add_product(out, rows, weight.T).to(dtype).unflatten(0, ids_keep.shape)


@_patch_embed.register_fake
def _(mel, ids_keep, weight, bias, position, position_index, patch, product, dtype):
    return mel.new_empty((*ids_keep.shape, len(weight)), dtype=dtype)


@register_flop_formula(torch.ops.flap_kernels.patch_embed)
def _patch_embed_flop(mel, ids_keep, weight, *_, **__) -> int:
    return 2 * ids_keep[0] * ids_keep[1] * weight[0] * weight[1]


@torch.library.custom_op("flap_kernels::patch_embed_backward", mutates_args=())
def _patch_embed_backward(
    grad: Tensor, mel: Tensor, ids_keep: Tensor, patch: int, product: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias, at least float32."""
    rows = pack_patches(mel, ids_keep, patch, product)
    grad = grad.flatten(0, 1).to(product)
    total_dtype = accumulator_dtype(product)
    # dweight = dy^T x, and dbias = dy^T 1 in the column of ones
    both = rows.new_empty((grad.shape[1], rows.shape[1]), dtype=total_dtype)
    add_product(both, grad.T, rows, beta=0)
    pixels = patch * patch
    return both[:, :pixels].contiguous(), both[:, pixels].clone()


@_patch_embed_backward.register_fake
def _(grad, mel, ids_keep, patch, product):
    D, total_dtype = grad.shape[2], accumulator_dtype(product)
    return grad.new_empty((D, patch * patch), dtype=total_dtype), grad.new_empty(
        D, dtype=total_dtype
    )


@register_flop_formula(torch.ops.flap_kernels.patch_embed_backward)
def _patch_embed_backward_flop(grad, mel, ids_keep, patch, *_, **__) -> int:
    # The weight's gradient; the log-mel's, where it is wanted, is a product of PyTorch's own.
    return 2 * grad[0] * grad[1] * grad[2] * patch * patch


def _setup(ctx, inputs, output):
    mel, ids_keep, weight, bias, position, position_index, ctx.patch, ctx.product, _ = inputs
    weight_kept = weight if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(mel, ids_keep, weight_kept, position_index)
    ctx.bias, ctx.weight, ctx.position = bias.dtype, weight.dtype, position.dtype
    ctx.positions = len(position)


def _backward(ctx, grad):
    mel, ids_keep, weight, position_index = ctx.saved_tensors
    mel_grad = weight_grad = bias_grad = position_grad = None
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        weight_grad, bias_grad = _patch_embed_backward(grad, mel, ids_keep, ctx.patch, ctx.product)
        weight_grad, bias_grad = weight_grad.to(ctx.weight), bias_grad.to(ctx.bias)
    if ctx.needs_input_grad[4]:
        if position_index is None:
            everywhere = scatter_tokens(grad, ids_keep, ctx.positions)
            position_grad = everywhere.sum(0, dtype=accumulator_dtype(grad.dtype))
        else:
            position_grad = add_rows(grad, position_index, ctx.positions)
        position_grad = position_grad.to(ctx.position)
    if weight is not None:
        rows = grad.to(ctx.product) @ weight.to(ctx.product)
        rows = scatter_tokens(rows, ids_keep, _patches(mel, ctx.patch))
        mel_grad = _unpatched(rows, mel, ctx.patch)
    return mel_grad, None, weight_grad, bias_grad, position_grad, None, None, None, None


def _unpatched(rows: Tensor, mel: Tensor, patch: int) -> Tensor:
    """(B, N, P * P) -> a log-mel in the dtype of `mel`."""
    cells = rows.unflatten(2, (patch, patch)).unflatten(1, (-1, mel.shape[2] // patch))
    return cells.transpose(2, 3).reshape(mel.shape).to(mel.dtype)


_patch_embed.register_autograd(_backward, setup_context=_setup)


def patch_embed(
    mel: Tensor,
    ids_keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    position_index: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The embeddings of the kept patches with their positions added, (B, K, D).

    Under autocast the product's factors are rounded to autocast's type, else to the weight's; it
    is summed, and bias and position are added, in float32. Gradients of weight and bias come from
    float32 sums, without atomics.

    Args:
        mel: (B, T, F), T and F multiples of the patch's side, any strides and floating type.
        ids_keep: (B, K) int32 or int64 in [0, N), no index twice in a row; None keeps all N. On a
            GPU that is not checked: a patch outside is NaN, and so is the weight's gradient.
        weight: (D, P * P), the side P of a patch follows from it.
        bias: (D,).
        position: (N, D), what is added to each patch; with `position_index`, any number of rows.
        position_index: (B, K) int32 or int64, the row of `position` of each kept patch, checked as
            `ids_keep` is; None takes the patch's number. A ragged batch gives it: clips of
            different lengths, end to end, are one long clip, (1, T, F), whose patches are counted
            through all clips and their positions from each clip's start.
        dtype: of the result; None promotes the product's type and position's, as PyTorch does.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    check_shape("weight", weight, (None, None), "(D, P * P)")
    D, pixels = weight.shape
    N = mel.shape[1] * mel.shape[2] // pixels if mel.ndim == 3 and pixels else 0
    if ids_keep is None:
        ids_keep = torch.arange(N, device=mel.device).expand(mel.shape[0], -1)
    patch = check_patches(mel, "ids_keep", ids_keep, pixels)
    check_shape("bias", bias, (D,), "(D,)")
    check_positions(position, position_index, "ids_keep", tuple(ids_keep.shape), D)
    if position_index is None:
        check_shape("position", position, (N, D), "(N, D)")
    check_floats(weight=weight, bias=bias)
    check_together(mel=mel, weight=weight, bias=bias, position=position)
    product = product_dtype(weight)
    dtype = dtype or torch.promote_types(product, position.dtype)
    tensors = (mel, ids_keep, weight, bias, position, position_index)
    return _patch_embed(*tensors, patch, product, dtype)


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    B, T, F, P, K, D = {
        "edge": (1, 1, 1, 1, 1, 1),
        "odd": (5, 48, 80, 16, 14, 67),
        "paper": (288, 1024, 128, 16, 306, 768),
    }[size]
    draw = {"generator": generator, "device": generator.device}
    real, N = {**draw, "dtype": torch.float64}, T * F // P**2
    arguments = {
        "mel": torch.randn(B, T, F, **real),
        "ids_keep": torch.rand(B, N, **draw).argsort(1)[:, :K].sort(1).values,
        "weight": torch.randn(D, P * P, **real) / P,
        "bias": torch.randn(D, **real),
        "position": torch.randn(N, D, **real),
    }
    return Inputs(arguments, differentiable=("mel", "weight", "bias", "position"))


KERNEL = Kernel(
    name="patch_embed",
    op=patch_embed,
    reference=patch_embed_reference,
    inputs=_inputs,
)
