"""masked_mse: mean squared error of a decoder's last layer against the masked patches.

    e[b, m, :] = weight @ hidden[b, m] + bias - target(b, ids_drop[b, m])
    loss       = sum over b, m of row_weight[b, m] * mean of e**2 over P * P
    target     = (x - mean(x)) / sqrt(var(x) + 1e-6),  x = patch(mel[b], n),  var unbiased

    B clips   M masked patches of a clip   H decoder's width   P side of a patch   N patches

Without `row_weight` each is 1 / (B M): the mean over all.

Neither targets nor predictions are stored: the forward keeps one number of each tile of rows. The
backward computes e again, a chunk of rows at a time, scaled to the prediction's gradient in the
product's type, and two library products make of each chunk the gradients of hidden and weight.

Least traffic: B*M*H of hidden and B*M*P*P of the log-mel read, forward and again backward, B*M*H
written. Least arithmetic: 2 B M H P P forward, three times that backward.
Source: FLAP, arXiv 2311.01615, section 4; Masked Autoencoders that Listen, arXiv 2207.06405 (the
loss, its eps and its unbiased variance).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flap_kernels.checks import check_floats, check_shape, check_together
from flap_kernels.masked_mse_layer import EPS, Layer
from flap_kernels.patches import check_patches, clips, patch_rows
from flap_kernels.precision import accumulator_dtype, add_product, product_dtype
from flap_kernels.spec import Inputs, Kernel, Size


def masked_mse_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mel: Tensor,
    ids_drop: Tensor,
    row_weight: Tensor | None = None,
    *,
    norm_pix: bool,
) -> Tensor:
    """The reference of `masked_mse`: the mean squared error of stored predictions."""
    total_dtype = accumulator_dtype(weight.dtype)
    patch = round(len(weight) ** 0.5)
    target = patch_rows(mel, clips(ids_drop), ids_drop.long(), patch).to(total_dtype)
    if norm_pix:
        var, mean = torch.var_mean(target, -1, keepdim=True)
        target = (target - mean) / (var + EPS).sqrt()
    error = F.linear(hidden, weight, bias).to(total_dtype) - target
    if row_weight is not None:
        return (row_weight.to(total_dtype) * error.square().mean(-1)).sum()
    return error.square().sum() / max(1, error.numel())


def _layer(hidden, weight, bias, mel, ids_drop, row_weight, patch, norm_pix) -> Layer:
    if row_weight is not None:
        row_weight = row_weight.flatten().to(accumulator_dtype(weight.dtype))
    return Layer(hidden.flatten(0, 1), weight, bias, mel, ids_drop, row_weight, patch, norm_pix)


@torch.library.custom_op("flap_kernels::masked_mse", mutates_args=())
def _masked_mse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mel: Tensor,
    ids_drop: Tensor,
    row_weight: Tensor | None,
    patch: int,
    norm_pix: bool,
    product: torch.dtype,
) -> Tensor:
    layer = _layer(hidden, weight.to(product), bias, mel, ids_drop, row_weight, patch, norm_pix)
    if len(layer.hidden) == 0:
        return hidden.new_zeros((), dtype=layer.total_dtype)
    return layer.sum_of_squares() / layer.divisor


@_masked_mse.register_fake
def _(hidden, weight, bias, mel, ids_drop, row_weight, patch, norm_pix, product):
    return hidden.new_empty((), dtype=accumulator_dtype(product))


@register_flop_formula(torch.ops.flap_kernels.masked_mse)
def _masked_mse_flop(hidden, weight, *_, **__) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0] * weight[1]


@torch.library.custom_op("flap_kernels::masked_mse_backward", mutates_args=())
def _masked_mse_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mel: Tensor,
    ids_drop: Tensor,
    row_weight: Tensor | None,
    patch: int,
    norm_pix: bool,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, in its dtype, and of weight and bias, at least float32."""
    layer = _layer(hidden, weight.to(product), bias, mel, ids_drop, row_weight, patch, norm_pix)
    hidden_grad = torch.empty_like(layer.hidden, memory_format=torch.contiguous_format)
    weight_grad = torch.zeros(weight.shape, dtype=layer.total_dtype, device=weight.device)
    bias_grad = weight_grad.new_zeros(layer.pixels)
    for chunk in layer.chunks():
        # e = dloss / dprediction; dbias = sum of e, dweight = e^T hidden, dhidden = e weight
        e, columns = layer.prediction_gradient(chunk, grad)
        bias_grad += columns
        add_product(weight_grad, e.T, layer.hidden[chunk].to(product))
        add_product(hidden_grad[chunk], e, layer.weight, beta=0)
    return hidden_grad.view(hidden.shape), weight_grad, bias_grad


@_masked_mse_backward.register_fake
def _(grad, hidden, weight, bias, mel, ids_drop, row_weight, patch, norm_pix, product):
    total_dtype = accumulator_dtype(product)
    return (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape, dtype=total_dtype),
        bias.new_empty(bias.shape, dtype=total_dtype),
    )


@register_flop_formula(torch.ops.flap_kernels.masked_mse_backward)
def _masked_mse_backward_flop(grad, hidden, weight, *_, **__) -> int:
    # The prediction once more, and the gradients of hidden and weight.
    return 3 * _masked_mse_flop(hidden, weight)


def _setup(ctx, inputs, output):
    *tensors, ctx.patch, ctx.norm_pix, ctx.product = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tensors = ctx.saved_tensors
    hidden_grad, weight_grad, bias_grad = _masked_mse_backward(
        grad, *tensors, ctx.patch, ctx.norm_pix, ctx.product
    )
    _, weight, bias, *_ = tensors
    grads = hidden_grad, weight_grad.to(weight.dtype), bias_grad.to(bias.dtype)
    return (*grads, None, None, None, None, None, None)


_masked_mse.register_autograd(_backward, setup_context=_setup)


def masked_mse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mel: Tensor,
    ids_drop: Tensor,
    row_weight: Tensor | None = None,
    *,
    norm_pix: bool,
) -> Tensor:
    """The mean squared error of the masked patches' pixels, (), float32; 0 if none is masked.

    Under autocast the product's factors are rounded to autocast's type, else to the weight's; it
    is summed, and errors are taken, in float32. Gradients go to hidden, weight and bias, the last
    two from float32 sums, without atomics.

    Args:
        hidden: (B, M, H), only the masked patches, in the order of `ids_drop`:
            `gather_tokens(x, ids_drop)` of a decoder's output. So its last LayerNorm, too, can
            leave out the others.
        weight: (P * P, H), the side P of a patch follows from it.
        bias: (P * P,).
        mel: (B, T, F), T and F multiples of P; a target, so it must not require a gradient.
        ids_drop: (B, M) int32 or int64 in [0, N). On a GPU that is not checked: outside, the
            loss is NaN.
        row_weight: (B, M) float32, the weight of each patch's mean squared error in their sum, or
            None: 1 / (B M) each, which is their mean. It takes no gradient. Clips of different
            lengths, end to end as B = 1, are averaged by 1 / (clips * M of the patch's clip).
        norm_pix: compare with patches brought to mean 0 and variance 1 each.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    check_shape("weight", weight, (None, None), "(P * P, H)")
    pixels, H = weight.shape
    patch = check_patches(mel, "ids_drop", ids_drop, pixels)
    check_shape("hidden", hidden, (*ids_drop.shape, H), "(B, M, H) with ids_drop (B, M)")
    check_shape("bias", bias, (pixels,), "(P * P,)")
    check_floats(hidden=hidden, weight=weight, bias=bias)
    check_together(hidden=hidden, weight=weight, bias=bias, mel=mel)
    if norm_pix and patch < 2:
        raise ValueError("norm_pix must be False for patches of one pixel: they have no variance")
    if mel.requires_grad:
        raise ValueError("mel must not require a gradient: it is the target; pass mel.detach()")
    if row_weight is not None:
        check_shape("row_weight", row_weight, tuple(ids_drop.shape), "(B, M)")
        check_floats(row_weight=row_weight)
        check_together(mel=mel, row_weight=row_weight)
        if row_weight.requires_grad:
            raise ValueError("row_weight must not require a gradient; pass row_weight.detach()")
    tensors = (hidden, weight, bias, mel, ids_drop, row_weight)
    return _masked_mse(*tensors, patch, norm_pix, product_dtype(weight))


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    B, T, F, P, M, H = {
        "edge": (1, 2, 2, 2, 1, 1),
        "odd": (5, 48, 80, 16, 14, 67),
        "paper": (288, 1024, 128, 16, 206, 512),
    }[size]
    draw = {"generator": generator, "device": generator.device}
    real, N = {**draw, "dtype": torch.float64}, T * F // P**2
    arguments = {
        "hidden": torch.randn(B, M, H, **real),
        "weight": torch.randn(P * P, H, **real) / H**0.5,
        "bias": torch.randn(P * P, **real),
        "mel": torch.randn(B, T, F, **real),
        "ids_drop": torch.rand(B, N, **draw).argsort(1)[:, :M].sort(1).values,
        "norm_pix": True,
    }
    return Inputs(arguments, differentiable=("hidden", "weight", "bias"))


KERNEL = Kernel(
    name="masked_mse",
    op=masked_mse,
    reference=masked_mse_reference,
    inputs=_inputs,
)
