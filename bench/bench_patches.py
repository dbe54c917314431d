"""Masking, patch embedding and reconstruction: ours, AudioMAE's way, and that way compiled.

    pytest bench/bench_patches.py

Forward and backward, of weights and tokens, on the device there is: 288 clips in bfloat16 autocast
on a GPU, 8 in float32 on a CPU, where ours is the plain path. The masks are the paper's.
"""

from __future__ import annotations

import pytest
import torch

from bench.measure import compiled, why_not_compiled
from bench.patches import AUDIOMAE, PLAN, arguments, reconstruction
from bench.peers import ours
from bench.tasks import forward, gradients
from flap_kernels import KERNELS, draw_patch_mask
from flap_kernels.patch_mask import draw_patch_mask_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B = 288 if DEVICE == "cuda" else 8


@pytest.mark.parametrize("way", [ours(DEVICE), "eager", "compiled"])
@pytest.mark.parametrize("op", AUDIOMAE)
def test_forward_and_backward(benchmark, op, way):
    mine = KERNELS[op].op if op in KERNELS else reconstruction
    if way == "compiled" and why_not_compiled(DEVICE):
        pytest.skip(f"torch.compile does not work here: {why_not_compiled(DEVICE)}")
    eager = AUDIOMAE[op]
    chosen = {"eager": eager, "compiled": compiled(eager)}.get(way, mine)
    given = arguments(op, B, DEVICE)
    leaves = {n: x for n, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    with torch.no_grad():
        expected = forward(eager, op, given)[0]
    upstream = torch.randn_like(expected) if expected.ndim else None

    def step():
        found = forward(chosen, op, given)[0]
        gradients(found, leaves, upstream)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return found.detach()

    tol = 2e-2 if DEVICE == "cuda" else 1e-4
    torch.testing.assert_close(step(), expected, rtol=tol, atol=tol, check_dtype=False)
    benchmark.group = op
    benchmark.extra_info.update(clips=B, device=DEVICE, torch=torch.__version__)
    benchmark(step)


@pytest.mark.parametrize("way", [ours(DEVICE), "eager"])
def test_draw_patch_mask(benchmark, way):
    sample_index = torch.arange(B, device=DEVICE)
    draw = draw_patch_mask_reference if way == "eager" else draw_patch_mask

    def step():
        draw(sample_index, **PLAN)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = "draw_patch_mask"
    benchmark(step)
