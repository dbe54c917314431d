"""Masking, patch embedding and reconstruction: ours, AudioMAE's way, and that way compiled.

    pytest bench/bench_patches.py

Forward and backward, of weights and tokens, on the device there is: 288 clips in bfloat16 autocast
on a GPU, 16 in float32 on a CPU. The masks are the paper's: 306 of 512 patches stay.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels import draw_plan, keep_tokens, masked_mse, patch_embed, restore_tokens
from flap_kernels.draw_plan import draw_plan_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
B, T, BINS, P, N, D, H = (288 if CUDA else 16), 1024, 128, 16, 512, 768, 512
PLAN = (0, (3, 4), (64, 8), 51, 6, True)

Way = Callable[..., Tensor]


def whole_index(index: Tensor, width: int) -> Tensor:
    """AudioMAE's index for a gather: the number of each token, written once for each feature."""
    return index.unsqueeze(-1).repeat(1, 1, width)


def eager_embed(mel, keep, weight, bias, position):
    x = F.conv2d(mel[:, None], weight.view(-1, 1, P, P), bias, stride=P)
    x = x.flatten(2).transpose(1, 2) + position
    return x.gather(1, whole_index(keep, x.shape[2]))


def eager_keep(x, keep):
    return x.gather(1, whole_index(keep, x.shape[2]))


def eager_restore(y, restore, mask_token, position):
    masks = mask_token.repeat(y.shape[0], restore.shape[1] - y.shape[1], 1)
    x = torch.cat([y, masks.to(y.dtype)], 1)
    return x.gather(1, whole_index(restore, x.shape[2])) + position


def eager_loss(x, weight, bias, mel, plan):
    predicted = F.linear(x, weight, bias)
    cells = mel.reshape(-1, T // P, P, BINS // P, P).transpose(2, 3)
    target = cells.reshape(-1, N, P * P)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    error = (predicted - (target - mean) / (var + 1e-6) ** 0.5).square().mean(-1)
    mask = torch.ones_like(error)
    mask[:, : plan.keep.shape[1]] = 0
    mask = mask.gather(1, plan.restore)
    return (error * mask).sum() / mask.sum()


def our_loss(x, weight, bias, mel, plan):
    return masked_mse(keep_tokens(x, plan.drop), weight, bias, mel, plan.drop, norm_pix=True)


def leaf(*shape: int) -> Tensor:
    return (torch.randn(shape, device=DEVICE) / 16).requires_grad_()


def arguments(task: str) -> tuple:
    """What a task is called with; its leaves take gradients."""
    torch.manual_seed(0)
    plan = draw_plan(torch.arange(B, device=DEVICE), *PLAN)
    mel, K = torch.randn(B, T, BINS, device=DEVICE), plan.keep.shape[1]
    return {
        "embed": lambda: (mel, plan.keep, leaf(D, P * P), leaf(D), leaf(N, D).detach()),
        "keep": lambda: (leaf(B, N, D), plan.keep),
        "restore": lambda: (leaf(B, K, H), plan.restore, leaf(H), leaf(N, H).detach()),
        "loss": lambda: (leaf(B, N, H), leaf(P * P, H), leaf(P * P), mel, plan),
    }[task]()


WAYS: dict[str, tuple[Way, Way]] = {
    "embed": (patch_embed, eager_embed),
    "keep": (keep_tokens, eager_keep),
    "restore": (restore_tokens, eager_restore),
    "loss": (our_loss, eager_loss),
}


def step(way: Way, given: tuple, upstream: Tensor | None) -> Tensor:
    """Forward and backward once, without sums into `.grad`."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
        found = way(*given)
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.grad(found, leaves, upstream)
    if CUDA:
        torch.cuda.synchronize()
    return found.detach()


@pytest.mark.parametrize("way", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("task", WAYS)
def test_forward_and_backward(benchmark, task, way):
    ours, eager = WAYS[task]
    chosen = {"ours": ours, "eager": eager, "compiled": torch.compile(eager)}[way]
    given = arguments(task)
    with torch.no_grad():
        expected = eager(*given)
    upstream = None if task == "loss" else torch.randn_like(expected)
    found = step(chosen, given, upstream)
    torch.testing.assert_close(found, expected, rtol=2e-2 if CUDA else 1e-4, atol=2e-2)
    benchmark.group = task
    benchmark.extra_info.update(clips=B, device=DEVICE, torch=torch.__version__)
    benchmark(step, chosen, given, upstream)


@pytest.mark.parametrize("way", ["ours", "eager"])
def test_draw_plan(benchmark, way):
    visits = torch.arange(B, device=DEVICE)

    def draw():
        (draw_plan if way == "ours" else draw_plan_reference)(visits, *PLAN)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = "draw"
    benchmark(draw)
