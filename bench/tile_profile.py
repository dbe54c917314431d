"""The launches of InfoNCE's forward and of its backward's library products, by the profiler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench.measure import Call
from flap_kernels.infonce.triton_tiles import KernelName

_RUNS = 2
# Parts of the names that cuBLAS and CUTLASS give to the kernels of products.
_PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "mm")


def launches(calls: Mapping[KernelName, Any], B: int, D: int, device: str) -> list[dict[str, Any]]:
    """Rows by call and kernel: launches and milliseconds of one call.

    The two library products are told apart by calls that want only one of them. A product's kernel
    also has its TFLOP/s, of 2 B B D.
    """
    asked: dict[str, Call] = {
        "forward": calls["sums"],
        "backward, dA": lambda: calls["dlogits"](x_wanted=True),
        "backward, dT": lambda: calls["dlogits"](y_wanted=True),
    }
    found = []
    for name, call in asked.items():
        call()
        rows = _kernels(call, device)
        products = [row for row in rows if _is_product(row["kernel"])]
        total_ms = sum(row["ms"] for row in products)
        for row in rows:
            tflops = None
            if row is max(products, key=lambda row: row["ms"], default=None) and total_ms:
                tflops = 2 * B**2 * D / total_ms / 1e9
            found.append({"call": name, **row, "tflops": tflops})
    return found


def _is_product(kernel: str) -> bool:
    # Ours are named for what they compute, and end in `_kernel`.
    return not kernel.endswith("_kernel") and any(part in kernel.lower() for part in _PRODUCTS)


def _kernels(call: Call, device: str) -> list[dict[str, Any]]:
    """Kernels of a call, the longest first; on a CPU, PyTorch's operators."""
    on_gpu = device == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as traced:
        for _ in range(_RUNS):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    time_us = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [
        {
            "kernel": event.key[:100],
            "launches": event.count // _RUNS,
            "ms": getattr(event, time_us) / _RUNS / 1000,
        }
        for event in traced.key_averages()
    ]
    rows = [row for row in rows if row["ms"] > 0]
    return sorted(rows, key=lambda row: row["ms"], reverse=True)
