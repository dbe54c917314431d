"""The ops of `flap_kernels` against their peers, forward and backward, with pytest-benchmark.

    pytest bench/bench_kernels.py -k infonce

The providers, arguments and calls are those of `python -m bench.gpu`, which measures memory and
more sizes as well: 288 clips on a GPU, 8 on a CPU, and for losses 4,608 and 2,048.
"""

from __future__ import annotations

import pytest
import torch

from bench.measure import why_not_compiled
from bench.peers import ours
from bench.plan import tasks
from bench.sweep import FORWARD
from bench.tasks import ALL_PATCHES, Task, forward, gradients, problem, providers
from flap_kernels import KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = tuple(dict.fromkeys(task.op for task in tasks(DEVICE, quick=True)))
assert set(KERNELS) <= set(OPS)
CLIPS = {"cuda": (4608, 288), "cpu": (2048, 8)}[DEVICE]
CASES = [(op, name) for op in OPS for name in providers(op, DEVICE)]


def task_of(op: str) -> Task:
    (task, *_) = [task for task in tasks(DEVICE, quick=True) if task.op == op]
    return task if task.B is None else Task(op, CLIPS[op in ALL_PATCHES])


@pytest.mark.parametrize(("op", "name"), CASES, ids=[f"{op}, {name}" for op, name in CASES])
def test_forward_and_backward(benchmark, op, name):
    if "compiled" in name and why_not_compiled(DEVICE):
        pytest.skip(f"torch.compile does not work here: {why_not_compiled(DEVICE)}")
    try:
        provider, own = (providers(op, DEVICE)[x]() for x in (name, ours(DEVICE)))
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    asked = problem(task_of(op), DEVICE)
    leaves = {k: x for k, x in asked.leaves.items() if k != "scale" or provider.learns_scale}
    with torch.no_grad():
        expected = forward(own.function, op, asked.given)[0]
    upstream = torch.randn_like(expected) if expected.ndim and leaves else None

    def step() -> torch.Tensor:
        found = forward(provider.function, op, asked.given)[0]
        gradients(found, leaves, upstream)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return found.detach()

    if provider.same:
        tol = 2e-2 if DEVICE == "cuda" else 1e-4
        torch.testing.assert_close(step(), expected, rtol=tol, atol=tol, check_dtype=False)
    benchmark.group = f"{op}{'' if leaves else f', {FORWARD}'}"
    benchmark.extra_info.update(device=DEVICE, torch=torch.__version__, version=provider.version)
    benchmark.pedantic(step, rounds=10 if DEVICE == "cuda" else 5, warmup_rounds=2)
