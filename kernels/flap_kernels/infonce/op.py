"""infonce: symmetric cross-entropy of clips over captions and of captions over clips.

    S[i, j] = scale * a[i] . t[j]
    a2t = mean_i (logsumexp_j S[i, j] - S[i, i])      t2a = mean_j (logsumexp_i S[i, j] - S[j, j])
    symmetric = (a2t + t2a) / 2

    B clips and their captions   N >= B captions, with the extra ones   D width   K ids of a row

No B x B matrix is stored: the forward keeps 4 B sums, the backward recomputes S.

Least arithmetic: 2 B B D forward, 8 B B D forward and backward (one recompute, two products).
Source: Fast Language-Audio Pre-training, arXiv 2311.01615, Eq. 1 (a2t); CLIP, arXiv 2103.00020,
figure 3 (symmetric).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flap_kernels.infonce.arguments import (
    Options,
    check_arguments,
    choose_prefix_backend,
    operands,
)
from flap_kernels.infonce.backend import (
    Direction,
    DirectionSums,
    Duplicates,
    Precision,
    losses_and_sums,
)
from flap_kernels.infonce.columns import Columns
from flap_kernels.infonce.prefixes import check_prefixes, positive_terms
from flap_kernels.infonce.reference import infonce_reference
from flap_kernels.precision import accumulator_dtype
from flap_kernels.spec import Inputs, Kernel, Size


@torch.library.custom_op("flap_kernels::infonce", mutates_args=())
def _forward(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    direction: str,
    precision: str,
    workspace_mib: float | None,
    prefixes: Sequence[int],
    weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss () and, by row and by column, lse_negatives and 1 - p (B,); (0,) if not used.

    With prefixes the vectors are (B, K).
    """
    options = Options(precision, workspace_mib, tuple(prefixes), tuple(weights))
    backend = choose_prefix_backend(audio, options)
    sums = _columns(text, len(audio), ids).sums(
        backend, audio, scale, rows=direction != "t2a", columns=direction != "a2t"
    )
    losses: list[Tensor] = []
    saved: list[Tensor] = []
    for lse_negatives in (sums.row_lse_negatives, sums.column_lse_negatives):
        if lse_negatives is None:
            saved += [sums.positive_logits.new_empty(0) for _ in range(2)]
            continue
        terms, of_direction = losses_and_sums(lse_negatives, sums.positive_logits, backend.weights)
        losses.append(terms)
        saved += [of_direction.lse_negatives, of_direction.one_minus_p]
    return torch.stack(losses).mean(), saved[0], saved[1], saved[2], saved[3]


def _columns(text: Tensor, B: int, ids: Tensor | None) -> Columns:
    if ids is None:
        return Columns.of(text[:B], text[B:])
    return Columns.of(text[:B], text[B:], 0, ids[:B], ids[:B], ids[B:])


@_forward.register_fake
def _(audio, text, scale, ids, direction, precision, workspace_mib, prefixes, weights):
    dtype = accumulator_dtype(audio.dtype)
    K = (len(prefixes),) if prefixes else ()
    rows, columns = ((len(audio), *K) if direction != other else (0,) for other in ("t2a", "a2t"))
    sizes = (), rows, rows, columns, columns
    return tuple(audio.new_empty(size, dtype=dtype) for size in sizes)


@register_flop_formula(torch.ops.flap_kernels.infonce)
def _forward_flop(audio, text, *rest, **__) -> int:
    return _product_flop(audio, text, rest[-2])


def _product_flop(audio, text, prefixes) -> int:
    # One pass over the longest prefix has the logits of all. A GPU takes one for each prefix.
    width = prefixes[-1] if prefixes else audio[1]
    return 2 * audio[0] * text[0] * width


@torch.library.custom_op("flap_kernels::infonce_backward", mutates_args=())
def _backward(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    row_lse_negatives: Tensor,
    row_one_minus_p: Tensor,
    column_lse_negatives: Tensor,
    column_one_minus_p: Tensor,
    factor: Tensor,
    audio_wanted: bool,
    text_wanted: bool,
    precision: str,
    workspace_mib: float | None,
    prefixes: Sequence[int],
    weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of audio, text (empty if not requested) and scale."""
    rows, columns = len(row_one_minus_p) > 0, len(column_one_minus_p) > 0
    options = Options(precision, workspace_mib, tuple(prefixes), tuple(weights))
    found = _columns(text, len(audio), ids).gradients(
        choose_prefix_backend(audio, options),
        audio,
        scale,
        DirectionSums(row_lse_negatives, row_one_minus_p) if rows else None,
        DirectionSums(column_lse_negatives, column_one_minus_p) if columns else None,
        factor,
        x_wanted=audio_wanted,
        y_wanted=text_wanted,
    )
    return (
        audio.new_empty(0) if found.x is None else found.x,
        text.new_empty(0) if found.y is None else found.y.to(text.dtype),
        found.scale.to(scale.dtype),
    )


@_backward.register_fake
def _(audio, text, scale, *rest):
    audio_wanted, text_wanted = rest[6:8]
    return (
        torch.empty_like(audio, memory_format=torch.contiguous_format)
        if audio_wanted
        else audio.new_empty(0),
        torch.empty_like(text, memory_format=torch.contiguous_format)
        if text_wanted
        else text.new_empty(0),
        torch.empty_like(scale),
    )


@register_flop_formula(torch.ops.flap_kernels.infonce_backward)
def _backward_flop(audio, text, *rest, **__) -> int:
    # S is recomputed, then one product for each gradient.
    audio_wanted, text_wanted = rest[7:9]
    return (1 + audio_wanted + text_wanted) * _product_flop(audio, text, rest[-2])


def _save(ctx, inputs, output):
    audio, text, scale, ids, direction, *options = inputs
    ctx.save_for_backward(audio, text, scale, ids, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.factor = (0.5 if direction == "symmetric" else 1.0) / len(audio)
    ctx.options = options


def _gradients(ctx, grad, *_):
    audio_wanted, text_wanted, scale_wanted = ctx.needs_input_grad[:3]
    a_grad, t_grad, scale_grad = _backward(
        *ctx.saved_tensors, grad * ctx.factor, audio_wanted, text_wanted, *ctx.options
    )
    return (
        a_grad if audio_wanted else None,
        t_grad if text_wanted else None,
        scale_grad if scale_wanted else None,
        *(None,) * 6,
    )


_forward.register_autograd(_gradients, setup_context=_save)


def infonce(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    direction: Direction = "symmetric",
    ids: Tensor | None = None,
    duplicates: Duplicates = "mask",
    prefixes: Sequence[int] = (),
    prefix_weights: Sequence[float] | None = None,
    precision: Precision = "ieee",
    workspace_mib: float | None = None,
) -> Tensor:
    """The mean InfoNCE loss of a batch, () float32.

    `audio` is (B, D) and `text` (N, D), row i of one the positive of row i of the other; they are
    used as they are, so normalise them first. Captions from row B on are negatives of every clip
    (hard ones) and have no loss of their own; t2a has none. `scale` is () and multiplies the
    cosines: pass exp(logit_scale), clamped. Gradients come in the inputs' types, through sums in
    float32; those of float64 inputs, whose sums are float64, serve for checking.

    `ids` are of the captions, (N,) or (N, K), integers: what two pairs have in common, such as
    their sound (a clip's number) and their words (a caption's hash), may each be an id. What pairs
    with an id in common are to each other, `duplicates` says: with `mask` no negatives; with
    `positive` positives, and a row's loss is the mean of -log p over its positives, its own pair
    among them. That is for text without extra captions.

    With `prefixes`, ascending widths of at most D, the loss is the sum over them of the weights
    (1 if not given) times the loss of the embeddings' first columns, brought to length 1; those of
    the whole width are used as they are. The least arithmetic is that of the longest alone, on a
    CPU; on a GPU one follows the other.

    `precision` is that of float32 operands in products, whose sums stay in float32: `ieee` leaves
    them as they are, the others are for tensor cores and round them to the nearest. `tf32` keeps 10
    bits of the fraction, only on a GPU; `bf16` 7, of the embeddings' gradients too.
    `workspace_mib` bounds the memory for partial results, 256 forward and backward each if not
    given; forward a row of tiles is always allowed, backward a tile.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    scale, ids = check_arguments(
        audio, text, scale, direction, ids, duplicates, precision, workspace_mib
    )
    if len(audio) == 0:
        raise ValueError("audio must hold at least one row, got 0")
    prefixes, weights = check_prefixes(prefixes, prefix_weights, audio.shape[1])
    audio, text, products = operands(audio, text, precision)
    masked = ids if duplicates == "mask" else None
    options = products, workspace_mib, prefixes, weights
    loss: Tensor = _forward(audio, text, scale, masked, direction, *options)[0]
    if ids is not None and duplicates == "positive":
        loss = loss + positive_terms(audio, text, scale, ids, direction, prefixes, weights)
    return loss


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    # Several tiles in each direction: of a GPU's, or of the interpreter's small ones. A width that
    # is no multiple of 16 is copied, with zeros, as in `edge`; these are read where they lie.
    odd = (389, 144) if generator.device.type == "cuda" else (77, 48)
    B, D = {"edge": (2, 2), "odd": odd, "paper": (4608, 512)}[size]
    draw = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    audio = F.normalize(torch.randn(B, D, **draw), dim=1)
    text = F.normalize(audio + torch.randn(B, D, **draw) / D**0.5, dim=1)
    scale = torch.full((), 14.3, device=generator.device, dtype=torch.float64)
    arguments = {"audio": audio, "text": text, "scale": scale}
    return Inputs(arguments, differentiable=("audio", "text", "scale"), float32=("scale",))


KERNEL = Kernel(
    name="infonce",
    op=infonce,
    reference=infonce_reference,
    inputs=_inputs,
    slack=3.0,  # two logits, a power and two products: each is rounded where the reference's is
)
