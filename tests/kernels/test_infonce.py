"""InfoNCE in one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flap_kernels import infonce
from flap_kernels.infonce import infonce_reference

DIRECTIONS = ["symmetric", "a2t", "t2a"]


def pairs(B: int, D: int, seed: int = 0, dtype=torch.float64):
    """Matched unit rows that are alike but not the same."""
    draw = torch.Generator().manual_seed(seed)
    audio = F.normalize(torch.randn(B, D, generator=draw, dtype=dtype), dim=1)
    text = F.normalize(audio + 0.1 * torch.randn(B, D, generator=draw, dtype=dtype), dim=1)
    return audio, text


def loss_and_gradients(loss, audio, text, scale, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (audio, text, scale)]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_pairs_by_hand(direction):
    # Logits [[1, 0], [0, 1]]: each positive has p = e / (e + 1), in either direction.
    loss = infonce(torch.eye(2), torch.eye(2), 1.0, direction=direction)
    torch.testing.assert_close(loss.item(), 0.31326168751822286)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("B", [1, 2, 33, 700])
def test_float64_agrees_with_autograd(direction, B):
    audio, text = pairs(B, 12)
    scale = torch.tensor(20.0, dtype=torch.float64)
    found = loss_and_gradients(infonce, audio, text, scale, direction=direction)
    exact = loss_and_gradients(infonce_reference, audio, text, scale, direction=direction)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_clips_that_share_an_id_are_not_negatives():
    audio, text = pairs(6, 4)
    ids = torch.tensor([3, 1, 3, 0, 1, 3])
    scale = torch.tensor(20.0, dtype=torch.float64)
    found = loss_and_gradients(infonce, audio, text, scale, ids=ids)
    exact = loss_and_gradients(infonce_reference, audio, text, scale, ids=ids)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    alone = infonce(audio, text, scale, ids=torch.zeros(6, dtype=torch.long))
    assert alone.item() == 0.0


def test_backward_twice_gives_the_same_gradients():
    audio, text = (x.requires_grad_() for x in pairs(9, 5))
    loss = infonce(audio, text, 20.0)
    first = torch.autograd.grad(loss, [audio, text], retain_graph=True)
    second = torch.autograd.grad(loss, [audio, text])
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_extra_captions_are_negatives_only():
    audio, text = pairs(5, 4)
    text = torch.cat([text, pairs(7, 4, seed=1)[1]])
    scale = torch.tensor(20.0, dtype=torch.float64)
    found = loss_and_gradients(infonce, audio, text, scale, direction="a2t")
    exact = loss_and_gradients(infonce_reference, audio, text, scale, direction="a2t")
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
