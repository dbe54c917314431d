"""infonce: each clip against all captions and each caption against all clips, cross-entropy.

    S[i, j] = scale * a[i] . t[j]
    a2t = mean_i (logsumexp_j S[i, j] - S[i, i])      t2a = mean_j (logsumexp_i S[i, j] - S[j, j])
    symmetric = (a2t + t2a) / 2

    B clips and their captions   D width of an embedding

No B x B matrix is stored: the forward keeps 3 B sums, the backward recomputes S.

Least arithmetic: 2 B B D forward, 8 B B D forward and backward (one recompute, two products).
Source: Fast Language-Audio Pre-training, arXiv 2311.01615, Eq. 1 (a2t); CLIP, arXiv 2103.00020,
figure 3 (symmetric).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels import infonce_chunks as chunks
from flap_kernels import infonce_launch as launches
from flap_kernels.checks import (
    check_above,
    check_choice,
    check_floats,
    check_integers,
    check_shape,
    check_together,
)
from flap_kernels.infonce_chunks import Side
from flap_kernels.infonce_programs import programs
from flap_kernels.launch import runs_triton
from flap_kernels.spec import Inputs, Kernel, Size

Direction = Literal["symmetric", "a2t", "t2a"]
Precision = Literal["ieee", "tf32", "bf16"]


def infonce_reference(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    direction: Direction = "symmetric",
    ids: Tensor | None = None,
) -> Tensor:
    """Say what `infonce` means, with the whole matrix."""
    logits = scale * (audio @ text.T).to(chunks.accumulator(audio.dtype))
    if ids is not None:
        same = (ids[:, None] == ids[None, :]).fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(audio), device=audio.device)
    sides = {"symmetric": (logits, logits.T), "a2t": (logits,), "t2a": (logits.T,)}[direction]
    return torch.stack([F.cross_entropy(side, target) for side in sides]).mean()


@torch.library.custom_op("flap_kernels::infonce", mutates_args=())
def _forward(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    direction: str,
    precision: str,
    workspace_mib: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss (), and both sides' negatives and misses (B,), of a side that is not used (0,)."""
    found = path(audio).negatives(
        audio,
        text,
        scale,
        offset=0,
        rows=direction != "t2a",
        columns=direction != "a2t",
        x_ids=ids,
        y_ids=ids,
        **launch_options(audio, precision, workspace_mib),
    )
    losses, saved = [], []
    for negatives in (found.rows, found.columns):
        if negatives is None:
            saved += [scale.new_empty(0, dtype=found.positives.dtype) for _ in range(2)]
            continue
        terms, side = chunks.losses_and_side(negatives, found.positives)
        losses.append(terms)
        saved += [side.negatives, side.misses]
    return torch.stack(losses).mean(), *saved


@_forward.register_fake
def _(audio, text, scale, ids, direction, precision, workspace_mib):
    wide = chunks.accumulator(audio.dtype)
    rows, columns = (len(audio) if direction != way else 0 for way in ("t2a", "a2t"))
    sizes = (), (rows,), (rows,), (columns,), (columns,)
    return tuple(audio.new_empty(size, dtype=wide) for size in sizes)


@torch.library.custom_op("flap_kernels::infonce_backward", mutates_args=())
def _backward(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    row_negatives: Tensor,
    row_misses: Tensor,
    column_negatives: Tensor,
    column_misses: Tensor,
    factor: Tensor,
    audio_wanted: bool,
    text_wanted: bool,
    precision: str,
    workspace_mib: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of audio, text (empty where not wanted) and scale."""
    a_grad, t_grad, scale_grad = path(audio).gradients(
        audio,
        text,
        scale,
        Side(row_negatives, row_misses) if len(row_misses) else None,
        Side(column_negatives, column_misses) if len(column_misses) else None,
        factor,
        offset=0,
        rows=audio_wanted,
        columns=text_wanted,
        x_ids=ids,
        y_ids=ids,
        **launch_options(audio, precision, workspace_mib),
    )
    return (
        audio.new_empty(0) if a_grad is None else a_grad,
        text.new_empty(0) if t_grad is None else t_grad.to(text.dtype),
        scale_grad.to(scale.dtype),
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


def _save(ctx, inputs, output):
    audio, text, scale, ids, direction, precision, workspace_mib = inputs
    ctx.save_for_backward(audio, text, scale, ids, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.weight = (0.5 if direction == "symmetric" else 1.0) / len(audio)
    ctx.options = precision, workspace_mib


def _gradients(ctx, grad, *_):
    audio_wanted, text_wanted, scale_wanted = ctx.needs_input_grad[:3]
    a_grad, t_grad, scale_grad = _backward(
        *ctx.saved_tensors, grad * ctx.weight, audio_wanted, text_wanted, *ctx.options
    )
    return (
        a_grad if audio_wanted else None,
        t_grad if text_wanted else None,
        scale_grad if scale_wanted else None,
        *(None,) * 4,
    )


_forward.register_autograd(_gradients, setup_context=_save)


def path(x: Tensor) -> Any:
    """The module that serves this tensor: both have `negatives` and `gradients`."""
    return launches if len(x) and runs_triton(x) else chunks


def launch_options(x: Tensor, precision: str, workspace_mib: float | None) -> dict[str, Any]:
    """What the kernels can be told, and the plain path has no use for."""
    if path(x) is chunks:
        return {}
    return {"precision": precision, "workspace_mib": workspace_mib}


def infonce(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    direction: Direction = "symmetric",
    ids: Tensor | None = None,
    precision: Precision = "ieee",
    workspace_mib: float | None = None,
) -> Tensor:
    """The mean InfoNCE loss of a batch, () float32.

    `audio` and `text` are (B, D), row i of one the positive of row i of the other; they are used
    as they are, so normalise them first. `scale` is () and multiplies the cosines: pass
    exp(logit_scale), clamped. Rows that share an entry of `ids` (B,) are not each other's
    negatives. With direction a2t, text may have more rows than audio: those are negatives only
    (hard ones). Gradients come in the inputs' types, through sums in float32; those of float64
    inputs, whose sums are float64, serve for checking.

    `precision` is that of float32 operands in products, whose sums stay in float32: `ieee` leaves
    them as they are, the others are for tensor cores and round them to the nearest. `tf32` keeps 10
    bits of the fraction, on a GPU alone; `bf16` 7, of the embeddings' gradients too.
    `workspace_mib` bounds the memory for partial results, 256 forward and 64 backward (or 2048 rows
    of B) if not given; a row of tiles is always allowed.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    scale = check_arguments(audio, text, scale, direction, ids, precision, workspace_mib)
    if len(audio) == 0:
        raise ValueError("audio must hold at least one row, got 0")
    audio, text, products = operands(audio, text, precision)
    return _forward(audio, text, scale, ids, direction, products, workspace_mib)[0]


def operands(audio: Tensor, text: Tensor, precision: Precision) -> tuple[Tensor, Tensor, str]:
    """What enters the products, and how kernels are to multiply it where it is float32."""
    if precision != "bf16":
        return audio, text, precision
    if audio.dtype == torch.float32:
        audio, text = audio.bfloat16(), text.bfloat16()
    return audio, text, "ieee"


def check_arguments(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    direction: str,
    ids: Tensor | None,
    precision: str,
    workspace_mib: float | None,
) -> Tensor:
    """The scale as a tensor, after every check of the public ops."""
    check_choice("direction", direction, get_args(Direction))
    check_choice("precision", precision, get_args(Precision))
    check_above("workspace_mib", workspace_mib, 0)
    check_shape("audio", audio, (None, None), "(B, D)")
    more = direction == "a2t" and text.ndim == 2 and len(text) > len(audio) and ids is None
    check_shape("text", text, (len(text) if more else len(audio), audio.shape[1]), "(B, D)")
    check_floats(audio=audio, text=text)
    if audio.dtype != text.dtype:
        raise TypeError(f"audio and text must be of one type, got {audio.dtype} and {text.dtype}")
    if not isinstance(scale, Tensor):
        scale = audio.new_full((), scale, dtype=chunks.accumulator(audio.dtype))
    check_shape("scale", scale, (), "()")
    check_together(audio=audio, text=text, scale=scale)
    if ids is not None:
        check_shape("ids", ids, (len(audio),), "(B,)")
        check_integers(ids=ids)
        check_together(audio=audio, ids=ids)
    return scale


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    # Several tiles in each direction: of a GPU's, or of the interpreter's small ones.
    odd = (389, 131) if generator.device.type == "cuda" else (77, 37)
    B, D = {"edge": (2, 2), "odd": odd, "paper": (4608, 512)}[size]
    draw = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    audio = F.normalize(torch.randn(B, D, **draw), dim=1)
    text = F.normalize(audio + torch.randn(B, D, **draw) / D**0.5, dim=1)
    scale = torch.full((), 14.3, device=generator.device, dtype=torch.float64)
    arguments = {"audio": audio, "text": text, "scale": scale}
    return Inputs(arguments, differentiable=("audio", "text", "scale"), wide=("scale",))


KERNEL = Kernel(
    name="infonce",
    op=infonce,
    reference=infonce_reference,
    inputs=_inputs,
    programs=programs,
    slack=3.0,  # two logits, a power and two products: each is rounded where the reference's is
)
