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

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels import infonce_chunks as chunks
from flap_kernels.checks import (
    check_choice,
    check_floats,
    check_integers,
    check_shape,
    check_together,
)
from flap_kernels.spec import Inputs, Kernel, Size

Direction = Literal["symmetric", "a2t", "t2a"]


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
    a2t, t2a = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)
    return {"a2t": a2t, "t2a": t2a, "symmetric": (a2t + t2a) / 2}[direction]


def infonce(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    direction: Direction = "symmetric",
    ids: Tensor | None = None,
) -> Tensor:
    """The mean InfoNCE loss of a batch, ().

    `audio` and `text` are (B, D), row i of one the positive of row i of the other; they are used
    as they are, so normalise them first. `scale` is () and multiplies the cosines: pass
    exp(logit_scale), clamped. Rows that share an entry of `ids` (B,) are not each other's
    negatives. Sums are kept in float32 whatever the inputs; gradients come in the inputs' types.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    scale = check_arguments(audio, text, scale, direction, ids)
    return _InfoNCE.apply(audio, text, scale, direction, ids)


def check_arguments(
    audio: Tensor, text: Tensor, scale: Tensor | float, direction: str, ids: Tensor | None
) -> Tensor:
    """The scale as a tensor, after every check of the public ops."""
    check_choice("direction", direction, get_args(Direction))
    check_shape("audio", audio, (None, None), "(B, D)")
    check_shape("text", text, audio.shape, "(B, D) like audio")
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


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, scale, direction, ids):
        if len(audio) == 0:
            raise ValueError("audio must hold at least one row, got 0")
        found = chunks.negatives(
            audio,
            text,
            scale,
            offset=0,
            rows=direction != "t2a",
            columns=direction != "a2t",
            x_ids=ids,
            y_ids=ids,
        )
        ctx.save_for_backward(audio, text, scale, found.rows, found.columns, found.positives, ids)
        ctx.weight = (0.5 if direction == "symmetric" else 1.0) / len(audio)
        sides = [side for side in (found.rows, found.columns) if side is not None]
        losses = torch.stack([F.softplus(side - found.positives) for side in sides])
        return losses.sum() * ctx.weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        audio, text, scale, rows, columns, positives, ids = ctx.saved_tensors
        sides = [side for side in (rows, columns) if side is not None]
        misses = torch.stack([torch.sigmoid(side - positives) for side in sides]).sum(0)
        a_grad, t_grad, scale_grad = chunks.gradients(
            audio,
            text,
            scale,
            None if rows is None else torch.logaddexp(rows, positives),
            None if columns is None else torch.logaddexp(columns, positives),
            misses,
            offset=0,
            rows=ctx.needs_input_grad[0],
            columns=ctx.needs_input_grad[1],
            x_ids=ids,
            y_ids=ids,
        )
        factor = grad * ctx.weight
        return (
            None if a_grad is None else (a_grad * factor).to(audio.dtype),
            None if t_grad is None else (t_grad * factor).to(text.dtype),
            (scale_grad * factor).to(scale.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    B, D = {"edge": (2, 2), "odd": (131, 67), "paper": (4608, 512)}[size]
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
)
