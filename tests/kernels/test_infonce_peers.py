"""Where other losses go wrong, written out as they compute it, and this one does not.

The peers: memeff (bfloat16 before the positive, a fixed shift, 1/W of the gradients), Inf-CL (no
shift over ranks, W times the scale's gradient, tiles past the batch), siglip-kernel (sums in
bfloat16), open_clip (logits in bfloat16).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flap_kernels import distributed_infonce, infonce
from flap_kernels.infonce import infonce_reference
from tests.kernels.test_every_kernel import strided
from tests.kernels.test_infonce import loss_and_gradients, pairs
from tests.ranks import on_ranks


def relative(found, exact):
    """The largest error, by the largest value."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def test_positive_of_p_0_999_keeps_its_gradient_in_bfloat16(device):
    # Two orthogonal pairs at scale ln 999: each positive has p = 0.999, its gradient p - 1.
    eye = torch.eye(2, device=device, dtype=torch.bfloat16)
    scale = torch.tensor(math.log(999.0), device=device)
    exact = loss_and_gradients(infonce_reference, eye.double(), eye.double(), scale.double())
    found = loss_and_gradients(infonce, eye, eye, scale)
    assert relative(found[1], exact[1]) < 2**-8
    assert relative(found[0], exact[0]) < 1e-5
    # memeff: p is rounded first, to 1, and nothing is left of p - 1.
    weights = torch.tensor([[0.999, 0.001], [0.001, 0.999]], dtype=torch.bfloat16) - torch.eye(2)
    peer = scale.cpu() * weights @ torch.eye(2) / 2
    assert relative(peer.cpu(), exact[1].cpu()) > 0.5


def cosines_of(kind: str, device: str):
    """Unit vectors whose cosines are all 1, all 0, all -1, or 1 in some rows and -1 in others."""
    first, second = torch.eye(2, device=device, dtype=torch.float64)
    rows = {
        "equal": ([first] * 40, [first] * 40),
        "orthogonal": ([first] * 40, [second] * 40),
        "opposed": ([first] * 40, [-first] * 40),
        "mixed": ([first] * 20 + [-first] * 20, [first] * 40),
    }[kind]
    return [torch.stack(side) for side in rows]


@pytest.mark.parametrize("kind", ["equal", "orthogonal", "opposed", "mixed"])
def test_scale_100_neither_overflows_nor_vanishes(kind, device):
    audio, text = cosines_of(kind, device)
    scale = torch.tensor(100.0, device=device, dtype=torch.float64)
    exact = loss_and_gradients(infonce_reference, audio, text, scale)
    found = loss_and_gradients(infonce, audio.float(), text.float(), scale.float())
    for value, true in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-5)
    # Shifts that are fixed: nil (Inf-CL over ranks), the scale (memeff), a tile's maximum.
    logits = (scale * audio @ text.T).float()
    rows = torch.logsumexp(logits.double(), 1)
    wrong = {
        "nil": logits.exp().sum(1).log(),
        "the scale": (logits - 100).exp().sum(1).log() + 100,
        "the tile's": (logits - logits.max()).exp().sum(1).log() + logits.max(),
    }
    failing = {name for name, sums in wrong.items() if not torch.allclose(sums.double(), rows)}
    assert (
        failing
        == {
            "equal": {"nil"},
            "orthogonal": {"the scale"},
            "opposed": {"nil", "the scale"},
            "mixed": {"nil", "the scale", "the tile's"},
        }[kind]
    )


def test_batch_of_65_reads_nothing_past_its_end(device):
    audio, text = (x.to(device) for x in pairs(65, 16))
    scale = torch.tensor(14.3, device=device, dtype=torch.float64)
    exact = loss_and_gradients(infonce_reference, audio, text, scale)
    poisoned = strided({"audio": audio.float(), "text": text.float()})
    leaves = [x.requires_grad_() for x in (*poisoned.values(), scale.float())]
    loss = infonce(*leaves)
    for value, true in zip([loss, *torch.autograd.grad(loss, leaves)], exact, strict=True):
        assert relative(value.detach(), true) < 1e-5
    # Tiles of 64 without a mask: 63 columns of whatever lies behind; zeros, at best.
    padded = torch.cat([text, text.new_zeros(63, 16)])
    peer = infonce_reference(audio, padded, scale, direction="a2t")
    assert relative(peer, infonce_reference(audio, text, scale, direction="a2t")) > 1e-3


def test_loss_of_bfloat16_embeddings_is_right_to_1e_5(device):
    audio, text = (x.to(device).bfloat16() for x in pairs(96, 64))
    scale = torch.tensor(50.0, device=device)
    exact = infonce_reference(audio.double(), text.double(), scale.double())
    assert relative(infonce(audio, text, scale), exact) < 1e-5
    # open_clip under autocast: the logits are rounded to bfloat16.
    assert relative(infonce_reference(audio, text, scale), exact) > 1e-3


def test_gradients_of_many_chunks_are_summed_in_float32(device):
    audio, text = (x.to(device).bfloat16() for x in pairs(320, 8))
    scale = torch.tensor(14.3, device=device)
    wide = [x.double() for x in (audio, text, scale)]
    exact = loss_and_gradients(infonce_reference, *wide)[2]
    # 32 rows at a time where kernels run, and all of them: the weights are the same.
    found = loss_and_gradients(infonce, audio, text, scale, workspace_mib=0.02)[2]
    whole = loss_and_gradients(infonce, audio, text, scale)[2]
    assert relative(found, whole.double()) <= 2**-9
    # siglip-kernel: the text's gradient is added up in bfloat16.
    parts = []
    for rows in range(0, 320, 32):
        a, t, s = (x.detach().clone().requires_grad_() for x in wide)
        logits = s * a @ t.T
        target = torch.arange(320, device=device)
        losses = F.cross_entropy(logits, target, reduction="none")[rows : rows + 32]
        losses = losses + F.cross_entropy(logits.T, target, reduction="none")[rows : rows + 32]
        parts.append(torch.autograd.grad(losses.sum() / 640, t)[0].bfloat16())
    peer = torch.zeros_like(parts[0])
    for part in parts:
        peer += part
    assert relative(peer, exact) > 2**-8


def test_the_scale_learns():
    # memeff's temperature is a number: it gets no gradient.
    audio, text = pairs(8, 4)
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    infonce(audio, text, scale).backward()
    assert scale.grad is not None
    assert scale.grad.item() != 0.0


def gathered_without_gradient(audio, text, scale):
    """CyCLIP's, SimCSE's and memeff's way over ranks: of a gather, the own rows have gradients."""
    sides = []
    for own in (audio, text):
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own.detach())
        rows[dist.get_rank()] = own
        sides.append(torch.cat(rows))
    return infonce_reference(sides[0], sides[1], scale)


def averages(audio, text, scale):
    """On one rank: gradients of ours and of a peer, as an engine that averages leaves them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * len(audio) // world, (rank + 1) * len(audio) // world)
    weight = torch.eye(audio.shape[1], dtype=audio.dtype)
    found = []
    losses: list[Callable[..., Tensor]] = [distributed_infonce, gathered_without_gradient]
    for loss in losses:
        layer, factor = weight.clone().requires_grad_(), scale.clone().requires_grad_()
        value = loss(audio[mine] @ layer, text[mine], factor)
        gradients = torch.autograd.grad(value, [layer, factor])
        for gradient in gradients:
            dist.all_reduce(gradient)
        found.append([gradient / world for gradient in gradients])
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_averaged_over_ranks_the_gradients_are_those_of_the_whole(world):
    audio, text = pairs(12, 8)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    layer = torch.eye(8, dtype=torch.float64, requires_grad=True)
    loss = infonce_reference(audio @ layer, text, scale)
    exact = torch.autograd.grad(loss, [layer, scale])
    for ours, peer in on_ranks(world, averages, audio, text, scale.detach()):
        torch.testing.assert_close(ours[0], exact[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours[1], exact[1], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(peer[0], exact[0] / world, rtol=1e-12, atol=1e-14)


def scale_gradients(audio, text, scale):
    """On one rank: the scale's gradient after averaging; ours, and where the parts are added up."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * len(audio) // world, (rank + 1) * len(audio) // world)
    gradient = loss_and_gradients(distributed_infonce, audio[mine], text[mine], scale)[3]
    dist.all_reduce(gradient)
    # Inf-CL: the parts, already times W, are added up over ranks before the engine averages.
    added = gradient.clone()
    dist.all_reduce(added)
    return gradient / world, added / world


@pytest.mark.parametrize("world", [2, 4])
def test_the_scale_gets_its_gradient_once(world):
    audio, text = pairs(12, 8)
    scale = torch.tensor(20.0, dtype=torch.float64)
    exact = loss_and_gradients(infonce_reference, audio, text, scale)[3]
    for ours, peer in on_ranks(world, scale_gradients, audio, text, scale):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(peer, exact * world, rtol=1e-12, atol=1e-14)
