"""Soft targets from captions, and label smoothing: by hand, against PyTorch, over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from flap_fast.losses import total_loss
from tests.losses.test_losses import outputs_of, unit
from tests.ranks import on_ranks
from tests.tiny import tiny

SCALE = 3.0
DIRECTIONS = ("symmetric", "a2t", "t2a")


def by_hand(media: Tensor, text: Tensor, targets: float, direction: str) -> Tensor:
    """Cross-entropy of all logits to the softmax of the captions' cosines."""
    logits = SCALE * media @ text.T
    q = (targets * text @ text.T).detach().softmax(1)
    row, column = F.cross_entropy(logits, q), F.cross_entropy(logits.T, q)
    return {"symmetric": (row + column) / 2, "a2t": row, "t2a": column}[direction]


def of_rows(rows: slice, *settings: str) -> list[Tensor]:
    """Total and gradients of media, text and scale, of 12 pairs or a part of them."""
    media, text = (unit(n)[rows].clone().requires_grad_() for n in range(2))
    scale = torch.tensor(SCALE, requires_grad=True)
    total = total_loss(outputs_of(media=media, text=text, scale=scale), tiny(*settings))["total"]
    return [total.detach(), *torch.autograd.grad(total, [media, text, scale])]


def of_a_rank() -> list[list[Tensor]]:
    rows = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    return [of_rows(rows, *alone(direction, "sharded")) for direction in DIRECTIONS]


def alone(direction: str, scheme: str = "auto") -> list[str]:
    own = ("weight=0.5", "scale=4", f"direction={direction}", f"scheme={scheme}")
    return ["loss.contrastive.weight=0", *(f"loss.soft_targets.{setting}" for setting in own)]


def test_the_captions_likeness_is_the_target_over_all_ranks():
    found = on_ranks(2, of_a_rank)
    for n, direction in enumerate(DIRECTIONS):
        media, text = (unit(m).double().requires_grad_() for m in range(2))
        whole = 0.5 * by_hand(media, text, 4.0, direction)
        wanted = [x.float() for x in torch.autograd.grad(whole, [media, text])]
        halves = [torch.cat([rank[n][m] for rank in found]) / 2 for m in (1, 2)]
        one_rank = of_rows(slice(None), *alone(direction))
        for total, *gradients in (one_rank[:3], [found[1][n][0], *halves]):
            assert total.item() == pytest.approx(whole.item(), rel=1e-5)
            torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def test_scale_0_beside_infonce_is_pytorchs_label_smoothing():
    smoothed = ("loss.contrastive.weight=0.8", "loss.soft_targets.weight=0.2")
    total, *gradients = of_rows(slice(None), *smoothed, "loss.soft_targets.scale=0")
    media, text = (unit(n).double().requires_grad_() for n in range(2))
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    logits, own = scale * media @ text.T, torch.arange(len(media))
    both = [F.cross_entropy(x, own, label_smoothing=0.2) for x in (logits, logits.T)]
    wanted = torch.stack(both).mean()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    expected = [x.float() for x in torch.autograd.grad(wanted, [media, text, scale])]
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
