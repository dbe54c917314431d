"""InfoNCE forward and backward, all ways to compute it side by side.

    pytest bench/bench_infonce.py

On a GPU in bfloat16 at the paper's batches and at 32,768; on a CPU in float32 at 2,048, where ours
is the plain path: `python -m bench.infonce_cpu` has the larger ones. `make gpu` measures in full.
"""

from __future__ import annotations

import pytest
import torch

from bench.measure import why_not_compiled
from bench.peers import infonce_providers
from bench.tasks import D, gradients, pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (2304, 4608, 32_768) if DEVICE == "cuda" else (2048,)


@pytest.mark.parametrize("name", infonce_providers(DEVICE))
@pytest.mark.parametrize("B", SIZES)
def test_forward_and_backward(benchmark, B, name):
    if "compiled" in name and why_not_compiled(DEVICE):
        pytest.skip(f"torch.compile does not work here: {why_not_compiled(DEVICE)}")
    try:
        provider = infonce_providers(DEVICE)[name]()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    if provider.logit_bytes and B > 16_384:
        pytest.skip(f"{B} x {B} logits")
    given = pairs(B, DEVICE)
    leaves = {k: x for k, x in given.items() if k != "scale" or provider.learns_scale}

    def step():
        gradients(provider.way(**given), leaves, None)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"infonce {B} x {D}"
    benchmark.extra_info.update(device=DEVICE, torch=torch.__version__, version=provider.version)
    benchmark.pedantic(step, rounds=10 if DEVICE == "cuda" else 5, warmup_rounds=2)
