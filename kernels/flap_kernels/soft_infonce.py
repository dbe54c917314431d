"""soft_infonce: InfoNCE whose targets are a teacher's probabilities, not the pairs alone.

    S[i, j] = scale * a[i] . t[j]      T[i, j] = teacher_scale * ta[i] . tt[j], of the teacher
    a2t = mean_i sum_j -q[i, j] log p[i, j]      p = softmax of S by row, q of T
    t2a is the same by column, symmetric the mean of both

With the pair's own logit taken from both, that is InfoNCE and a term linear in the logits:

    -sum_j q[i, j] log p[i, j] = (logsumexp_j S[i, j] - S[i, i])
                               + (S[i, i] - sum_j q[i, j] S[i, j])

The term and its gradients need the sums of captions weighted by q, and of clips: one pass over the
teacher's tiles for q's denominators, one for the sums. No B x B matrix is stored.

    W ranks   B clips of them all   b of this rank   D width   E the teacher's

Least arithmetic beside InfoNCE's: 4 B B E and 4 B B D, all in the forward.
Source: the affinity distillation of TinyCLIP, arXiv 2309.12314, section 3.1; open_clip's
DistillClipLoss computes the same.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flap_kernels.checks import check_choice, check_shape, check_together, differentiable_once
from flap_kernels.infonce.arguments import (
    check_arguments,
    checked_scalar,
    choose_backend,
    operands,
)
from flap_kernels.infonce.backend import (
    Direction,
    DirectionSums,
    Precision,
    Targets,
    losses_and_sums,
)
from flap_kernels.infonce.distributed import distributed_infonce
from flap_kernels.infonce.rank_sizes import RankSizes, Scheme, scheme_in_force
from flap_kernels.precision import accumulator_dtype


def soft_infonce_reference(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_audio: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
    *,
    direction: Direction = "symmetric",
) -> Tensor:
    """The mean cross-entropy of a batch to the teacher's softmax, from all logits."""
    dtype = accumulator_dtype(audio.dtype)
    logits = scale * (audio @ text.T).to(dtype)
    targets = teacher_scale * (teacher_audio @ teacher_text.T).to(dtype)
    rows, columns = (logits, targets), (logits.T, targets.T)
    summed = {"symmetric": (rows, columns), "a2t": (rows,), "t2a": (columns,)}[direction]
    losses = [-(q.softmax(1) * p.log_softmax(1)).sum(1).mean() for p, q in summed]
    return torch.stack(losses).mean()


def soft_infonce(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    teacher_audio: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    direction: Direction = "symmetric",
    scheme: Scheme = "auto",
    equal_sizes: bool = False,
    precision: Precision = "ieee",
    workspace_mib: float | None = None,
) -> Tensor:
    """The mean cross-entropy to a teacher's probabilities, over the clips of all ranks, () float32.

    `audio`, `text` and `scale` are the student's, as `distributed_infonce` takes them, and get
    gradients as there. `teacher_audio` and `teacher_text` (b, E), in the student's dtype, and the
    `teacher_scale` () get none. Its least value is the entropy of the teacher's probabilities.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    check_shape("text", text, audio.shape, "(B, D) like audio")
    options = direction, None, "mask", precision, workspace_mib
    scale, _ = check_arguments(audio, text, scale, *options)
    check_shape("teacher_audio", teacher_audio, (len(audio), None), "(B, E)")
    check_shape("teacher_text", teacher_text, teacher_audio.shape, "(B, E) like teacher_audio")
    given = {"teacher_audio": teacher_audio, "teacher_text": teacher_text}
    for name, x in given.items():
        if x.dtype != audio.dtype:
            raise TypeError(f"{name} must be of audio's type {audio.dtype}, got {x.dtype}")
    teacher_scale = checked_scalar("teacher_scale", teacher_scale, audio)
    check_together(audio=audio, **given, teacher_scale=teacher_scale)
    sizes = RankSizes.of(audio, text, group, equal_sizes)
    if sizes is not None:
        scheme = scheme_in_force(scheme, max(sizes.pairs))
        equal_sizes = sizes.equal  # known now: the ranks are not asked again
    loss = distributed_infonce(
        audio,
        text,
        scale,
        group=group,
        direction=direction,
        scheme=scheme,
        equal_sizes=equal_sizes,
        precision=precision,
        workspace_mib=workspace_mib,
    )
    audio, text, products = operands(audio, text, precision)
    teacher = *operands(teacher_audio.detach(), teacher_text.detach(), precision)[:2], teacher_scale
    settings = direction, scheme, (products, workspace_mib)
    term: Tensor = _SoftTerm.apply(audio, text, scale, *teacher, sizes, settings)
    return loss + term


class _SoftTerm(torch.autograd.Function):
    """(scale / B) sum_i a_i . c_i, c_i = sum_j (1 if i = j, less q[i, j]) t_j; and by column.

    Bilinear in the student's rows: c is the gradient, and what the kernels call -dlogits y, with
    their exact 1 - q at the pair.
    """

    @staticmethod
    def forward(ctx, audio, text, scale, clips, captions, teacher_scale, sizes, settings):
        direction, scheme, options = settings
        by_row, by_column = direction != "t2a", direction != "a2t"
        audio_wanted, text_wanted = ctx.needs_input_grad[:2]
        offset = 0 if sizes is None else sizes.own.start
        of_text = None

        def teacher(x, y, *, rows, columns):
            return _teacher_sums(x, y, teacher_scale, offset, rows, columns, *options)

        def weighted(x, y, row, column, values, *, y_wanted=False):
            sums = *_tensors(row, x), *_tensors(column, x)
            return _weighted_sums(x, y, teacher_scale, *sums, *values, offset, y_wanted, *options)

        if sizes is None:
            *lse, logits = teacher(clips, captions, rows=by_row, columns=by_column)
            row, column = (_sums(each, logits) for each in lse)
            of_audio, of_text = weighted(
                clips, captions, row, column, (audio, text), y_wanted=text_wanted
            )
        elif scheme == "replicated":
            every_audio, every_text = _gathered(sizes, audio, text)
            every_clip, every_caption = _gathered(sizes, clips, captions)
            # Each direction as sums over rows: captions are the rows of t2a.
            blocks = [
                teacher(x, y, rows=True, columns=False)
                for wanted, x, y in (
                    (by_row, clips, every_caption),
                    (by_column, captions, every_clip),
                )
                if wanted
            ]
            packed = torch.stack([*(block[0] for block in blocks), blocks[0][2]], 1)
            *lse, logits = sizes.gather(packed).unbind(1)
            row = _sums(lse[0], logits) if by_row else None
            column = _sums(lse[-1], logits) if by_column else None
            own_row, own_column = (sums and sums[sizes.own] for sums in (row, column))
            of_audio, _ = weighted(clips, every_caption, own_row, column, (audio, every_text))
            if text_wanted:
                of_text, _ = weighted(captions, every_clip, own_column, row, (text, every_audio))
        else:
            every_text, every_caption = sizes.gather(text), sizes.gather(captions)
            *lse, logits = teacher(clips, every_caption, rows=by_row, columns=by_column)
            row = _sums(lse[0], logits)
            column = None
            if by_column:
                column = _sums(sizes.logsumexp2(lse[1]), sizes.gather(logits))
            of_audio, of_text = weighted(
                clips, every_caption, row, column, (audio, every_text), y_wanted=text_wanted
            )
            if text_wanted:
                of_text = sizes.scatter_sum(of_text)
        value = -(audio.to(of_audio.dtype) * of_audio).sum()
        kept = of_audio if audio_wanted else None, of_text if text_wanted else None
        ctx.save_for_backward(scale, *kept, value)
        ctx.factor = 1.0 / ((by_row + by_column) * (len(audio) if sizes is None else sizes.total))
        ctx.world, ctx.dtype = 1 if sizes is None else sizes.world, audio.dtype
        total = value.clone() if sizes is None else sizes.reduce(value.clone(), dist.ReduceOp.SUM)
        return (total * scale * ctx.factor).to(value.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        scale, of_audio, of_text, value = ctx.saved_tensors
        # Engines average over ranks: the average of W times each rank's gradient is their sum.
        factor = grad * (ctx.factor * ctx.world)
        found = (
            None if x is None else (x * (-factor * scale)).to(ctx.dtype)
            for x in (of_audio, of_text)
        )
        scale_grad = (factor * value).to(scale.dtype) if ctx.needs_input_grad[2] else None
        return *found, scale_grad, *(None,) * 5


def _gathered(sizes: RankSizes, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' rows of both, in one exchange."""
    of_x, of_y = sizes.gather(torch.cat([x, y], dim=1)).chunk(2, dim=1)
    return of_x, of_y


def _sums(lse_negatives: Tensor, positive_logits: Tensor) -> DirectionSums | None:
    """What a direction's weights need; None where its lse is empty, for it was not requested."""
    if len(lse_negatives) < len(positive_logits):
        return None
    return losses_and_sums(lse_negatives, positive_logits)[1]


def _tensors(sums: DirectionSums | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if sums is None:
        empty = like.new_empty(0, dtype=accumulator_dtype(like.dtype))
        return empty, empty
    return sums.lse_negatives, sums.one_minus_p


@torch.library.custom_op("flap_kernels::teacher_sums", mutates_args=())
def _teacher_sums(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: int,
    rows: bool,
    columns: bool,
    precision: str,
    workspace_mib: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse_negatives by row (M,) and by column (N,), (0,) if not requested; positive logits (M,)."""
    backend = choose_backend(x, precision, workspace_mib)
    sums = backend.sums(x, y, scale, Targets(offset), rows=rows, columns=columns)
    logits = sums.positive_logits
    found = (sums.row_lse_negatives, sums.column_lse_negatives)
    row, column = (logits.new_empty(0) if v is None else v for v in found)
    return row, column, logits


@_teacher_sums.register_fake
def _(x, y, scale, offset, rows, columns, *_):
    sizes = len(x) if rows else 0, len(y) if columns else 0, len(x)
    row, column, logits = (x.new_empty(n, dtype=accumulator_dtype(x.dtype)) for n in sizes)
    return row, column, logits


@register_flop_formula(torch.ops.flap_kernels.teacher_sums)
def _sums_flop(x, y, *_, **__) -> int:
    return 2 * x[0] * y[0] * x[1]


@torch.library.custom_op("flap_kernels::weighted_sums", mutates_args=())
def _weighted_sums(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    row_one_minus_p: Tensor,
    column_lse: Tensor,
    column_one_minus_p: Tensor,
    x_values: Tensor,
    y_values: Tensor,
    offset: int,
    y_wanted: bool,
    precision: str,
    workspace_mib: float | None,
) -> tuple[Tensor, Tensor]:
    """dlogits y_values (M, D) and dlogits^T x_values (N, D), or (0,) if not requested.

    The dlogits are those of `Backend.gradients`; a direction whose sums are empty is left out.
    """
    row, column = (
        DirectionSums(lse, one_minus_p) if len(lse) else None
        for lse, one_minus_p in ((row_lse, row_one_minus_p), (column_lse, column_one_minus_p))
    )
    found = choose_backend(x, precision, workspace_mib).gradients(
        x,
        y,
        scale,
        row,
        column,
        torch.ones_like(scale, dtype=accumulator_dtype(x.dtype)),
        Targets(offset),
        values=(x_values, y_values),
        y_wanted=y_wanted,
    )
    assert found.x is not None
    return found.x, found.x.new_empty(0) if found.y is None else found.y


@_weighted_sums.register_fake
def _(x, y, *rest):
    x_values, y_wanted = rest[5], rest[8]
    dtype, D = accumulator_dtype(x.dtype), x_values.shape[1]
    of_y = (len(y), D) if y_wanted else (0,)
    return x.new_empty(len(x), D, dtype=dtype), x.new_empty(of_y, dtype=dtype)


@register_flop_formula(torch.ops.flap_kernels.weighted_sums)
def _weighted_flop(x, y, *rest, **__) -> int:
    x_values, y_wanted = rest[5], rest[8]
    return 2 * x[0] * y[0] * (x[1] + (1 + y_wanted) * x_values[1])
