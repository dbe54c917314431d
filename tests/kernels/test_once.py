"""Losses are differentiated once: a second derivative is an error, never a wrong number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flap_kernels import cyclic, infonce, sigmoid_loss, soft_infonce

LOSSES = {
    "infonce": lambda a, t: infonce(a, t, 10.0),
    "positives": lambda a, t: infonce(
        a, t, 10.0, ids=torch.arange(len(a)) // 2, duplicates="positive"
    ),
    "sigmoid": lambda a, t: sigmoid_loss(a, t, 10.0, -5.0),
    "cyclic": lambda a, t: cyclic(a, t)[0],
    "soft": lambda a, t: soft_infonce(a, t, 10.0, a.detach().flip(0), t.detach(), 10.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_raises_and_first_ones_beside_it_do_not(name):
    torch.manual_seed(0)
    audio, text = (F.normalize(torch.randn(6, 4), dim=1).requires_grad_() for _ in range(2))
    loss = LOSSES[name](audio, text)
    (gradient,) = torch.autograd.grad(loss, audio, retain_graph=True)
    (again,) = torch.autograd.grad(loss, audio, create_graph=True)
    torch.testing.assert_close(again.detach(), gradient)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(again.square().sum(), audio)
