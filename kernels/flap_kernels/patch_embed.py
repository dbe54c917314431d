"""patch_embed: from a log-mel to the embeddings of the patches that masking left.

    y[b, k, :] = weight @ patch(mel[b], keep[b, k]) + bias + position[keep[b, k], :]

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

from flap_kernels.checks import check_floats, check_shape, check_together
from flap_kernels.keep_tokens import scatter_tokens
from flap_kernels.launch import ceil_div, interpreted, jit, runs_triton, tl, triton
from flap_kernels.patches import (
    MOST_PIXELS,
    add_product,
    check_patches,
    clips,
    float32_precision,
    load_index,
    load_patches,
    pack_patches,
    pack_patches_kernel,
    pack_tile,
    patch_rows,
    product_type,
    shaped,
    strides,
)
from flap_kernels.spec import VARIANTS, Arch, Inputs, Kernel, Program, Size, pointer


def patch_embed_reference(
    mel: Tensor, keep: Tensor, weight: Tensor, bias: Tensor, position: Tensor
) -> Tensor:
    """Say what `patch_embed` means: gather, product, two sums."""
    patch = round(weight.shape[1] ** 0.5)
    rows = patch_rows(mel, clips(keep), keep.long(), patch)
    return torch.nn.functional.linear(rows, weight, bias) + position[keep.long()]


@jit
def patch_embed_kernel(
    mel_ptr,
    keep_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    out_ptr,
    rows,
    K,
    D,
    N,
    across,
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
    P: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    offs_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = offs_row < rows
    b, n = load_index(keep_ptr, offs_row, live, K, stride_kb, stride_kk)
    there = live & (n >= 0) & (n < N)
    x = load_patches(mel_ptr, b, n, there, across, stride_mb, stride_mt, stride_mf, P, PIXELS)
    x = x.to(weight_ptr.dtype.element_ty)
    if UPCAST:
        x = x.to(tl.float32)
    offs_p = tl.arange(0, PIXELS)
    pixel = (offs_p < P * P)[:, None]
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        wide = offs_d < D
        at = (weight_ptr + offs_d * stride_wd)[None, :] + (offs_p * stride_wp)[:, None]
        w = tl.load(at, mask=pixel & wide[None, :], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
        y = tl.dot(x, w, input_precision=PRECISION)
        bias = tl.load(bias_ptr + offs_d * stride_bd, mask=wide, other=0.0).to(tl.float32)
        at = (position_ptr + n.to(tl.int64) * stride_pn)[:, None] + (offs_d * stride_pd)[None, :]
        mask = live[:, None] & wide[None, :]
        inside = there[:, None] & wide[None, :]
        y += bias[None, :] + tl.load(at, mask=inside, other=float("nan")).to(tl.float32)
        at = (out_ptr + offs_row.to(tl.int64) * D)[:, None] + offs_d[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)


def _tiles(pixels: int, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """A tile of patches stays in shared memory while the weight streams by.

    Small enough for three programs on a multiprocessor, so that one's gather hides behind the
    products of the others. float32: `ieee` products hold both factors in registers.
    """
    wide = triton.next_power_of_2(max(16, pixels))
    rows, across, warps, stages = 64, 32, 4, 2
    if dtype.itemsize == 4:
        rows, across, warps, stages = (64, 32, 8, 1) if precision == "tf32" else (32, 32, 4, 1)
    return {
        "PIXELS": wide,
        "BLOCK_ROWS": max(16, min(128, rows * 256 // wide)),
        "BLOCK_D": max(16, min(64, across * 256 // wide)),
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": stages,
    }


@torch.library.custom_op("flap_kernels::patch_embed", mutates_args=())
def _patch_embed(
    mel: Tensor,
    keep: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    patch: int,
    product: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    weight = weight.to(product)
    (B, K), (D, pixels) = keep.shape, weight.shape
    if not (runs_triton(mel, weight) and pixels <= MOST_PIXELS):
        return _plain(mel, keep, weight, bias, position, patch, dtype)
    out = mel.new_empty((B, K, D), dtype=dtype)
    if out.numel() == 0:
        return out
    tile = _tiles(pixels, product, float32_precision())
    patch_embed_kernel[(ceil_div(B * K, tile["BLOCK_ROWS"]),)](
        mel,
        keep,
        weight,
        bias,
        position,
        out,
        B * K,
        K,
        D,
        len(position),
        mel.shape[2] // patch,
        **strides("m", "btf", mel),
        **strides("k", "bk", keep),
        **strides("w", "dp", weight),
        **strides("b", "d", bias),
        **strides("p", "nd", position),
        P=patch,
        UPCAST=interpreted(),
        **tile,
    )
    return out


def _plain(mel, keep, weight, bias, position, patch, dtype):
    wide = torch.promote_types(weight.dtype, torch.float32)
    keep = keep.long()
    rows = patch_rows(mel, clips(keep), keep, patch).flatten(0, 1).to(weight.dtype)
    # Bias and positions are what the product is added to: no pass of their own over the output.
    out = (position.to(wide) + bias).index_select(0, keep.flatten())
    return add_product(out, rows, weight.T).to(dtype).unflatten(0, keep.shape)


@_patch_embed.register_fake
def _(mel, keep, weight, bias, position, patch, product, dtype):
    return mel.new_empty((*keep.shape, len(weight)), dtype=dtype)


@torch.library.custom_op("flap_kernels::patch_embed_backward", mutates_args=())
def _patch_embed_backward(
    grad: Tensor, mel: Tensor, keep: Tensor, patch: int, product: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias, not narrower than float32."""
    rows = pack_patches(mel, keep, patch, product)
    grad = grad.flatten(0, 1).to(product)
    wide = torch.promote_types(product, torch.float32)
    both = add_product(rows.new_zeros((grad.shape[1], rows.shape[1]), dtype=wide), grad.T, rows)
    pixels = patch * patch
    return both[:, :pixels].contiguous(), both[:, pixels].clone()


@_patch_embed_backward.register_fake
def _(grad, mel, keep, patch, product):
    D, wide = grad.shape[2], torch.promote_types(product, torch.float32)
    return grad.new_empty((D, patch * patch), dtype=wide), grad.new_empty(D, dtype=wide)


def _setup(ctx, inputs, output):
    mel, keep, weight, bias, position, ctx.patch, ctx.product, _ = inputs
    ctx.save_for_backward(mel, keep, weight if ctx.needs_input_grad[0] else None)
    ctx.bias, ctx.weight, ctx.position = bias.dtype, weight.dtype, position.dtype
    ctx.N = len(position)


def _backward(ctx, grad):
    mel, keep, weight = ctx.saved_tensors
    mel_grad = weight_grad = bias_grad = position_grad = None
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        weight_grad, bias_grad = _patch_embed_backward(grad, mel, keep, ctx.patch, ctx.product)
        weight_grad, bias_grad = weight_grad.to(ctx.weight), bias_grad.to(ctx.bias)
    if ctx.needs_input_grad[4]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        everywhere = scatter_tokens(grad, keep, ctx.N)
        position_grad = everywhere.sum(0, dtype=wide).to(ctx.position)
    if weight is not None:
        rows = grad.to(ctx.product) @ weight.to(ctx.product)
        mel_grad = _unpatched(scatter_tokens(rows, keep, ctx.N), mel, ctx.patch)
    return mel_grad, None, weight_grad, bias_grad, position_grad, None, None, None


def _unpatched(rows: Tensor, mel: Tensor, patch: int) -> Tensor:
    """(B, N, P * P) -> a log-mel in the type of `mel`."""
    cells = rows.unflatten(2, (patch, patch)).unflatten(1, (-1, mel.shape[2] // patch))
    return cells.transpose(2, 3).reshape(mel.shape).to(mel.dtype)


_patch_embed.register_autograd(_backward, setup_context=_setup)


def patch_embed(
    mel: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The embedded and placed patches that stay, (B, K, D).

    Under autocast the product's factors are rounded to autocast's type, else to the weight's; it
    is summed, and bias and position are added, in float32. Gradients of weight and bias come from
    float32 sums, without atomics.

    Args:
        mel: (B, T, F), T and F multiples of the patch's side, any strides and floating type.
        keep: (B, K) int32 or int64 in [0, N), no index twice in a row; None keeps all N. On a GPU
            that is not checked: a patch outside is NaN.
        weight: (D, P * P), the side P of a patch follows from it.
        bias: (D,).
        position: (N, D), what is added to each patch.
        dtype: of the result; None promotes the product's type and position's, as PyTorch does.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    check_shape("weight", weight, (None, None), "(D, P * P)")
    D, pixels = weight.shape
    N = mel.shape[1] * mel.shape[2] // pixels if mel.ndim == 3 and pixels else 0
    if keep is None:
        keep = torch.arange(N, device=mel.device).expand(len(mel), -1)
    patch = check_patches(mel, "keep", keep, pixels)
    check_shape("bias", bias, (D,), "(D,)")
    check_shape("position", position, (N, D), "(N, D)")
    check_floats(weight=weight, bias=bias, position=position)
    check_together(mel=mel, weight=weight, bias=bias, position=position)
    product = product_type(weight)
    dtype = dtype or torch.promote_types(product, position.dtype)
    return _patch_embed(mel, keep, weight, bias, position, patch, product, dtype)


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
        "keep": torch.rand(B, N, **draw).argsort(1)[:, :K].sort(1).values,
        "weight": torch.randn(D, P * P, **real) / P,
        "bias": torch.randn(D, **real),
        "position": torch.randn(N, D, **real),
    }
    return Inputs(arguments, differentiable=("mel", "weight", "bias", "position"))


def _programs(arch: Arch) -> tuple[Program, ...]:
    B, K, P = 288, 306, 16
    pixels = P * P
    pack = Program(
        name="pack_patches",
        kernel=pack_patches_kernel,
        signature={
            "mel_ptr": "*fp32",
            "index_ptr": "*i64",
            "out_ptr": "*bf16",
            "rows": B * K,
            "K": K,
            "N": 512,
            "across": 8,
            "width": pixels + 8,
            **strides("m", "btf", shaped(B, 1024, 128)),
            **strides("i", "bk", shaped(B, K)),
        },
        constants={"P": P, **pack_tile(pixels)},
        bytes_moved=B * K * (4 * pixels + 2 * (pixels + 8)),
    )
    return (*(_program(arch, variant) for variant in VARIANTS), pack)


def _program(arch: Arch, variant: str) -> Program:
    B, K, D, N, P = 288, 306, 768, 512, 16
    argument, product, precision = VARIANTS[variant]
    tile = _tiles(P * P, product, precision)
    return Program(
        name=f"patch_embed{variant}",
        kernel=patch_embed_kernel,
        signature={
            **dict.fromkeys(("mel_ptr", "bias_ptr", "position_ptr", "out_ptr"), pointer(argument)),
            "weight_ptr": pointer(product),
            "keep_ptr": "*i64",
            "rows": B * K,
            "K": K,
            "D": D,
            "N": N,
            "across": 8,
            **strides("m", "btf", shaped(B, 1024, 128)),
            **strides("k", "bk", shaped(B, K)),
            **strides("w", "dp", shaped(D, P * P)),
            **strides("b", "d", shaped(D)),
            **strides("p", "nd", shaped(N, D)),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={"P": P, "UPCAST": False, **tile},
        matrix_product=product == torch.bfloat16 or precision == "tf32",
        bytes_moved=argument.itemsize * B * K * (P * P + D),
        flops=2 * B * K * P * P * D,
    )


KERNEL = Kernel(
    name="patch_embed",
    op=patch_embed,
    reference=patch_embed_reference,
    inputs=_inputs,
    programs=_programs,
    bytes_moved=2 * 288 * 306 * 2 * (256 + 768),
    flops=4 * 288 * 306 * 256 * 768,
)
