"""Distillation: by hand, against all logits, over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.losses import total_loss
from flap_kernels.soft_infonce import soft_infonce_reference
from tests.losses.test_losses import outputs_of, unit
from tests.ranks import on_ranks
from tests.tiny import tiny

ALONE = ("loss.contrastive.weight=0", "loss.distill.weight=0.5", "loss.distill.teacher=somewhere")
NAMES = ("media", "text", "teacher_media", "teacher_text")


def of_rows(rows: slice, direction: str) -> list[Tensor]:
    """Total and gradients of 12 pairs, or of a part of them."""
    given = {name: unit(n)[rows].clone().requires_grad_() for n, name in enumerate(NAMES)}
    scales = {"teacher_scale": torch.tensor(3.0)}
    total = total_loss(
        outputs_of(**given, **scales), tiny(*ALONE, f"loss.distill.direction={direction}")
    )["total"]
    gradients = torch.autograd.grad(total, list(given.values()), allow_unused=True)
    assert gradients[2] is None  # the teacher's
    assert gradients[3] is None
    return [total.detach(), *(g for g in gradients if g is not None)]


DIRECTIONS = ("symmetric", "a2t", "t2a")


def of_a_rank() -> list[list[Tensor]]:
    rows = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    return [of_rows(rows, direction) for direction in DIRECTIONS]


def test_the_teachers_probabilities_of_the_whole_batch_are_the_targets():
    found = on_ranks(2, of_a_rank)
    for n, direction in enumerate(DIRECTIONS):
        media, text, heard, read = (unit(m).double() for m in range(4))
        leaves = [media.requires_grad_(), text.requires_grad_()]
        own, theirs = torch.tensor(1.0), torch.tensor(3.0)
        given = media, text, own, heard, read, theirs
        whole = 0.5 * soft_infonce_reference(*given, direction=direction)
        wanted = [x.float() for x in torch.autograd.grad(whole, leaves)]
        halves = [torch.cat([rank[n][m] for rank in found]) / 2 for m in (1, 2)]
        for total, *gradients in (of_rows(slice(None), direction), [found[1][n][0], *halves]):
            assert total.item() == pytest.approx(whole.item(), rel=1e-5)
            torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def test_a_weight_needs_a_teacher_and_a_teacher_no_weight():
    with pytest.raises(ConfigError, match=r"distill\.weight must be 0 without loss\.distill\.teac"):
        tiny("loss.distill.weight=1")
    assert "distill" not in tiny("loss.distill.teacher=somewhere").loss.active
