"""The cyclic losses: both forms, alone and over ranks, are the sums that define them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from flap_kernels.cyclic import cyclic, cyclic_reference, form_in_force
from tests.kernels.test_infonce import pairs
from tests.ranks import on_ranks

FORMS = ["tiled", "gram", "auto"]


def losses_and_gradients(loss, audio, text, weights=(0.25, 0.5), **options):
    leaves = [x.detach().clone().requires_grad_() for x in (audio, text)]
    values = loss(*leaves, **options)
    total = weights[0] * values[0] + weights[1] * values[1]
    return [*(value.detach() for value in values), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("form", FORMS)
def test_two_pairs_by_hand(form):
    # a_1 . t_2 = 1 and a_2 . t_1 = 0, twice in the sum; a_1 . a_2 = 0 and t_1 . t_2 = 0.6.
    audio = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[0.6, 0.0], [1.0, 0.0]])
    cross_modal, in_modal = cyclic(audio, text, form=form)
    assert cross_modal.item() == pytest.approx((1 + 1) / 2)
    # In-modal: (1 - 0.36)^2 + 2 * 0.6^2 + (1 - 1)^2, over two clips.
    assert in_modal.item() == pytest.approx((0.64**2 + 2 * 0.36) / 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("B", "D"), [(1, 3), (7, 5), (40, 6), (1100, 4)])
def test_float64_agrees_with_autograd(form, B, D):
    audio, text = pairs(B, D)
    found = losses_and_gradients(cyclic, audio, text, form=form)
    exact = losses_and_gradients(cyclic_reference, audio, text)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_one_loss_alone_has_its_own_gradient(form, weights):
    audio, text = pairs(30, 5)
    leaves = [x.clone().requires_grad_() for x in (audio, text)]
    one = cyclic(*leaves, form=form)[int(weights[1])]
    exact = losses_and_gradients(cyclic_reference, audio, text, weights)[2:]
    for mine, theirs in zip(torch.autograd.grad(one, leaves), exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("apart", [1.0, 0.1, 0.01, 0.001])
def test_gram_form_keeps_its_digits_as_text_nears_audio(apart):
    draw = torch.Generator().manual_seed(0)
    audio = F.normalize(torch.randn(1000, 64, generator=draw), dim=1)
    text = F.normalize(audio + apart * torch.randn(1000, 64, generator=draw) / 8, dim=1)
    exact = cyclic(audio.double(), text.double(), form="tiled")
    for mine, theirs in zip(cyclic(audio, text, form="gram"), exact, strict=True):
        assert mine.item() == pytest.approx(theirs.item(), rel=3e-5)
    # The textbook's expansion, in float32 too, cancels.
    aa, tt, at = audio.T @ audio, text.T @ text, audio.T @ text
    textbook = 2 * ((aa * tt).sum() - (at * at.T).sum()) / 1000
    if apart == 0.001:
        assert textbook.item() != pytest.approx(exact[0].item(), rel=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_outside_changes_nothing(form):
    audio, text = pairs(40, 6, dtype=torch.float32)
    exact = losses_and_gradients(cyclic, audio, text, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses_and_gradients(cyclic, audio, text, form=form)
    assert all(torch.equal(one, two) for one, two in zip(found, exact, strict=True))


def test_the_form_that_multiplies_less_is_taken():
    assert [form_in_force("auto", B, 512) for B in (298, 299)] == ["tiled", "gram"]
    assert form_in_force("tiled", 10**6, 2) == "tiled"


def ranks_match_whole(audio, text, cuts):
    """On one rank: both losses, after a comparison of gradients with the whole's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(cuts[rank], cuts[rank + 1])
    exact = losses_and_gradients(cyclic_reference, audio, text)
    losses = []
    for form in FORMS:
        found = losses_and_gradients(cyclic, audio[mine], text[mine], form=form)
        parts = [*found[:2], found[2] / world, found[3] / world]
        wholes = [*exact[:2], exact[2][mine], exact[3][mine]]
        for part, whole in zip(parts, wholes, strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-12)
        losses += found[:2]
    return losses


@pytest.mark.parametrize("cuts", [(0, 5, 13), (0, 4, 4, 13)])
def test_ranks_match_the_whole(cuts):
    by_rank = on_ranks(len(cuts) - 1, ranks_match_whole, *pairs(13, 6), cuts)
    assert all(torch.equal(torch.stack(one), torch.stack(by_rank[0])) for one in by_rank)
