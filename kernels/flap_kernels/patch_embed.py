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

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flap_kernels.checks import check_floats, check_inside, check_shape, check_together
from flap_kernels.gather_tokens import scatter_tokens
from flap_kernels.launch import ceil_div, interpreted, jit, runs_triton, tl, triton
from flap_kernels.patches import (
    MOST_PIXELS,
    add_rows,
    check_patches,
    check_positions,
    clips,
    load_index,
    load_patches,
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


@jit
def patch_embed_kernel(
    mel_ptr,
    ids_keep_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    position_index_ptr,
    out_ptr,
    rows,
    K,
    D,
    N,
    positions,
    patches_per_row,
    stride_mb,
    stride_mt,
    stride_mf,
    stride_kb,
    stride_kk,
    stride_wd,
    stride_wp,
    stride_bd,
    stride_pn,
    stride_pd,
    stride_ib,
    stride_ik,
    HAS_INDEX: tl.constexpr,
    P: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    offs_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < rows
    b, n = load_index(ids_keep_ptr, offs_row, mask_row, K, stride_kb, stride_kk)
    valid = mask_row & (n >= 0) & (n < N)
    x = load_patches(
        mel_ptr, b, n, valid, patches_per_row, stride_mb, stride_mt, stride_mf, P, PIXELS
    )
    # x = patch(mel[b], n), rounded to the product's type
    x = x.to(weight_ptr.dtype.element_ty)
    if UPCAST:
        x = x.to(tl.float32)
    # position[p, :] is added to patch n: in a ragged batch p is counted from its clip's start
    p, has_position = n, valid
    if HAS_INDEX:
        _, p = load_index(position_index_ptr, offs_row, mask_row, K, stride_ib, stride_ik)
        has_position = valid & (p >= 0) & (p < positions)
    offs_p = tl.arange(0, PIXELS)
    mask_p = (offs_p < P * P)[:, None]
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        at = (weight_ptr + offs_d * stride_wd)[None, :] + (offs_p * stride_wp)[:, None]
        w = tl.load(at, mask=mask_p & mask_d[None, :], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
        # y = x weight^T
        y = tl.dot(x, w, input_precision=PRECISION)
        bias = tl.load(bias_ptr + offs_d * stride_bd, mask=mask_d, other=0.0).to(tl.float32)
        at = (position_ptr + p.to(tl.int64) * stride_pn)[:, None] + (offs_d * stride_pd)[None, :]
        mask = mask_row[:, None] & mask_d[None, :]
        inside = has_position[:, None] & mask_d[None, :]
        # y += bias + position[p, :]
        y += bias[None, :] + tl.load(at, mask=inside, other=float("nan")).to(tl.float32)
        at = (out_ptr + offs_row.to(tl.int64) * D)[:, None] + offs_d[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)


def tiles(pixels: int, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """The tile sizes; a tile of patches stays in shared memory while the weight is streamed.

    Small enough for three programs on a multiprocessor, so that one's gather hides behind the
    products of the others. float32: `ieee` products hold both factors in registers.
    """
    power_of_2 = triton.next_power_of_2(max(16, pixels))
    rows, columns, warps, stages = 64, 32, 4, 2
    if dtype.itemsize == 4:
        rows, columns, warps, stages = (64, 32, 8, 1) if precision == "tf32" else (32, 32, 4, 1)
    return {
        "PIXELS": power_of_2,
        "BLOCK_ROWS": max(16, min(128, rows * 256 // power_of_2)),
        "BLOCK_D": max(16, min(64, columns * 256 // power_of_2)),
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": stages,
    }


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
    if not (runs_triton(mel, weight) and pixels <= MOST_PIXELS):
        return _plain(mel, ids_keep, weight, bias, position, position_index, patch, dtype)
    out = mel.new_empty((B, K, D), dtype=dtype)
    if out.numel() == 0:
        return out
    tile = tiles(pixels, product, float32_precision())
    # Absent pointers get a dummy tensor; the kernel never reads it.
    index = ids_keep if position_index is None else position_index
    patch_embed_kernel[(ceil_div(B * K, tile["BLOCK_ROWS"]),)](
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
    ids_keep = ids_keep.long()
    rows = patch_rows(mel, clips(ids_keep), ids_keep, patch).flatten(0, 1).to(weight.dtype)
    index = ids_keep if position_index is None else position_index.long()
    check_inside("position_index", index, len(position))
    # The product is added to bias and positions, which saves a pass over the output.
    out = (position.to(total_dtype) + bias).index_select(0, index.flatten())
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
            GPU that is not checked: a patch outside is NaN.
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
        ids_keep = torch.arange(N, device=mel.device).expand(len(mel), -1)
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
