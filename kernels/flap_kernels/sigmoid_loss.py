"""sigmoid_loss: every clip with every caption is a question of its own, pair or no pair.

    l[i, j] = scale * a[i] . t[j] + bias
    loss = (1 / B) sum_ij softplus(-l) where i and j are a pair, softplus(l) elsewhere

    W ranks   B clips of them all   b of this rank   n >= b of its captions   D width   K ids

No softmax, so that the loss of a tile is known once its logits are: one pass gives the loss and the
gradients, and no B x B matrix is stored. 6 B B D forward and backward.

Source: Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343, Eq. 1 and algorithm 1.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flap_kernels.checks import check_choice, check_together, differentiable_once
from flap_kernels.infonce.arguments import (
    check_arguments,
    checked_scalar,
    choose_backend,
    operands,
)
from flap_kernels.infonce.backend import Duplicates, Precision, Targets
from flap_kernels.infonce.positives import share_an_id, sigmoid_positive_term
from flap_kernels.infonce.rank_sizes import RankSizes, Scheme, scheme_in_force
from flap_kernels.precision import accumulator_dtype
from flap_kernels.spec import Inputs, Kernel, Size


def sigmoid_loss_reference(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    ids: Tensor | None = None,
    duplicates: Duplicates = "mask",
) -> Tensor:
    """The mean sigmoid loss of a batch, from all logits."""
    logits = scale * (audio @ text.T).to(accumulator_dtype(audio.dtype)) + bias
    positives = torch.eye(*logits.shape, dtype=torch.bool, device=audio.device)
    if ids is not None:
        ids = ids.view(len(text), -1)
        same = share_an_id(ids[: len(audio)], ids) | positives
        if duplicates == "mask":
            logits = logits.masked_fill(same & ~positives, -torch.inf)
        else:
            positives = same
    return F.softplus(torch.where(positives, -logits, logits), threshold=40).sum() / len(audio)


@torch.library.custom_op("flap_kernels::sigmoid_block", mutates_args=())
def _sigmoid_block(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    factor: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    offset: int,
    x_wanted: bool,
    y_wanted: bool,
    precision: str,
    workspace_mib: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses of a block, and the gradients, in empty tensors if not requested."""
    found = choose_backend(x, precision, workspace_mib).sigmoid(
        x,
        y,
        scale,
        bias,
        factor,
        Targets(offset, x_ids, y_ids),
        x_wanted=x_wanted,
        y_wanted=y_wanted,
    )
    x_grad = found.loss.new_empty(0) if found.x is None else found.x
    y_grad = found.loss.new_empty(0) if found.y is None else found.y
    return found.loss, x_grad, y_grad, found.scale, found.bias


@_sigmoid_block.register_fake
def _(x, y, scale, bias, factor, x_ids, y_ids, offset, x_wanted, y_wanted, *_):
    dtype = accumulator_dtype(x.dtype)
    of_x = x.new_empty(x.shape if x_wanted else (0,), dtype=dtype)
    of_y = y.new_empty(y.shape if y_wanted else (0,), dtype=dtype)
    return (x.new_empty((), dtype=dtype), of_x, of_y, *(of_y.new_empty(()) for _ in range(2)))


@register_flop_formula(torch.ops.flap_kernels.sigmoid_block)
def _block_flop(x, y, *rest, **__) -> int:
    x_wanted, y_wanted = rest[6:8]
    return (1 + x_wanted + y_wanted) * 2 * x[0] * y[0] * x[1]


def sigmoid_loss(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    scheme: Scheme = "auto",
    ids: Tensor | None = None,
    duplicates: Duplicates = "mask",
    equal_sizes: bool = False,
    precision: Precision = "ieee",
    workspace_mib: float | None = None,
) -> Tensor:
    """The sigmoid loss over the clips of all ranks, the same on every rank, () float32.

    As `infonce` and, over ranks, as `distributed_infonce` takes them; the loss is a sum over a
    clip's captions and a mean over clips, has no direction, and captions without a clip are pairs
    of none. `bias` is (), added to the logits. SigLIP begins with a scale of 10 and a bias of -10.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    scale, ids = check_arguments(
        audio, text, scale, "symmetric", ids, duplicates, precision, workspace_mib
    )
    bias = checked_scalar("bias", bias, audio)
    check_together(audio=audio, bias=bias)
    sizes = RankSizes.of(audio, text, group, equal_sizes)
    if sizes is not None:
        scheme = scheme_in_force(scheme, max(sizes.pairs))
    if (len(audio) if sizes is None else sizes.total) == 0:
        raise ValueError("audio must hold at least one row, got 0")
    audio, text, products = operands(audio, text, precision)
    masked = ids if duplicates == "mask" else None
    options = scheme, products, workspace_mib
    loss: Tensor = _SigmoidLoss.apply(audio, text, scale, bias, masked, sizes, options)
    if ids is not None and duplicates == "positive":
        loss = loss + sigmoid_positive_term(audio, text, scale, bias, ids, sizes)
    return loss


class _SigmoidLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, and multiplies them in the backward."""

    @staticmethod
    def forward(ctx, audio, text, scale, bias, ids, sizes: RankSizes | None, options):
        scheme, *products = options
        audio_wanted, text_wanted, *others = ctx.needs_input_grad[:4]
        world, B = (1, len(audio)) if sizes is None else (sizes.world, sizes.total)
        factor = scale.new_full((), world / B, dtype=accumulator_dtype(audio.dtype))
        own_text, extra = text[: len(audio)], text[len(audio) :]
        own_ids, extra_ids = (None, None) if ids is None else ids.tensor_split([len(audio)])

        def block(x, y, x_ids, y_ids, offset, x_wanted, y_wanted):
            wanted = x_wanted, y_wanted
            return _sigmoid_block(
                x, y, scale, bias, factor, x_ids, y_ids, offset, *wanted, *products
            )

        captions, ids_of_captions, offset = text, ids, 0
        both = all_ids = None
        if sizes is not None:
            offset = sizes.own.start
            all_text = own_text
            if scheme == "replicated":
                both = sizes.gather(torch.cat([audio, own_text], dim=1))
                all_text = both.chunk(2, dim=1)[1]
            else:
                all_text = sizes.gather(own_text)
            captions = torch.cat([all_text, sizes.gather_extra(extra)])
            if own_ids is not None and extra_ids is not None:
                all_ids = sizes.gather(own_ids)
                ids_of_captions = torch.cat([all_ids, sizes.gather_extra(extra_ids)])
        loss, a_grad, t_grad, scale_grad, bias_grad = block(
            audio,
            captions,
            own_ids,
            ids_of_captions,
            offset,
            audio_wanted or any(others),
            text_wanted and both is None,
        )
        if sizes is not None:
            sizes.reduce(loss, dist.ReduceOp.SUM)
            if text_wanted and both is not None:
                # This rank's captions as rows, with the clips of all ranks.
                clips, B = both.chunk(2, dim=1)[0], sizes.total
                of_pairs = block(own_text, clips, own_ids, all_ids, offset, True, False)[1]
                of_extra = block(extra, clips, extra_ids, all_ids, B, True, False)[1]
                t_grad = torch.cat([of_pairs, of_extra])
            elif text_wanted:
                t_grad = sizes.scatter_sum(t_grad)
        found = a_grad if audio_wanted else None, t_grad if text_wanted else None
        ctx.save_for_backward(*found, scale_grad, bias_grad)
        ctx.dtypes = audio.dtype, text.dtype, scale.dtype, bias.dtype
        return loss / B

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        # Rounded here and no earlier: float16 needs what a gradient scaler multiplies by.
        wanted = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:4], strict=True)
        found = (
            (grad * x).to(dtype) if x is not None and want else None for x, dtype, want in wanted
        )
        return *found, None, None, None


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    # Several tiles in each direction: of a GPU's, or of the interpreter's small ones. A width that
    # is no multiple of 16 is copied, with zeros, as in `edge`; these are read where they lie.
    odd = (389, 144) if generator.device.type == "cuda" else (77, 48)
    B, D = {"edge": (2, 2), "odd": odd, "paper": (4608, 512)}[size]
    draw = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    audio = F.normalize(torch.randn(B, D, **draw), dim=1)
    text = F.normalize(audio + torch.randn(B, D, **draw) / D**0.5, dim=1)
    scale, bias = (torch.full((), x, device=generator.device) for x in (10.0, -8.0))
    arguments = {"audio": audio, "text": text, "scale": scale.double(), "bias": bias.double()}
    return Inputs(arguments, ("audio", "text", "scale", "bias"), float32=("scale", "bias"))


KERNEL = Kernel(
    name="sigmoid_loss",
    op=sigmoid_loss,
    reference=sigmoid_loss_reference,
    inputs=_inputs,
    slack=3.0,  # a logit, its sigmoid and two products: each is rounded where the reference's is
)
