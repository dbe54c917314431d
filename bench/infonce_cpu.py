"""InfoNCE on a CPU against open_clip's loss: interleaved timings, and extra peak memory.

    python -m bench.infonce_cpu [--write]      about 2 minutes; uses all cores; run nothing else

Forward and backward in float32, one process, both with a learnable scale. Ours is the backend in
plain PyTorch: tile by tile, one exponential a logit. The ratios are printed last. --write stores
the result in bench/results and rewrites bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from bench import report
from bench.machine import machine, save
from bench.measure import Call, Timing, interleaved, peak_bytes
from bench.peers import Function, open_clip_form, ours
from bench.tasks import D, gradients, pairs
from flap_kernels import infonce

B, B_LARGE = 8192, 32_768
OURS, PEER = ours("cpu"), "open_clip's form"
FUNCTIONS: dict[str, Function] = {OURS: infonce, PEER: open_clip_form}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.infonce_cpu")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each, interleaved")
    parser.add_argument("--write", action="store_true", help="store the result")
    asked = parser.parse_args(arguments)
    facts = machine("cpu")
    result = measure(B, B_LARGE, asked.rounds)
    if asked.write:
        print(save(Path("bench"), {"kind": "infonce_cpu", "machine": facts, **result}))
        report.write(Path("bench"))
    print(report.facts(facts))
    for row in result["rows"]:
        error = "" if row["error"] is None else f"  error {row['error']:.1e}"
        print(
            f"{row['B']} x {row['D']}  {row['provider']:18} {row['median_ms']:8.0f} ms "
            f"({row['low_ms']:.0f}-{row['high_ms']:.0f}, rounds: {row['rounds']})  "
            f"{row['peak_mib']:6.0f} MiB above the inputs{error}"
        )
    figures = result["figures"]
    print(f"{B_LARGE} x {D}: {figures['large_gb']:.3f} GB above the inputs (target <= 1)")
    print(
        f"ours over {PEER}: time {figures['time_ratio']:.3f} (target <= 0.75), "
        f"extra peak memory {figures['memory_ratio']:.3f} (target <= {1 / 6:.3f})"
    )
    return 0


def measure(B: int, B_large: int, rounds: int) -> dict[str, Any]:
    """Rows of both at B and of ours at B_large, and the figures that the targets read."""
    steps = {name: _step(function, B) for name, function in FUNCTIONS.items()}
    found = {name: step() for name, step in steps.items()}
    peaks = {name: _peak(step) for name, step in steps.items()}
    times = interleaved(steps, "cpu", budget_s=0, least_rounds=rounds)
    truth = _step(infonce, B, float64=True)()
    rows = [
        {
            "provider": name,
            "B": B,
            "D": D,
            **asdict(times[name]),
            "peak_mib": peaks[name] / 2**20,
            "error": max(map(_relative, found[name], truth)),
        }
        for name in steps
    ]
    took: list[float] = []
    large = _step(infonce, B_large)
    large_peak = _peak(lambda: took.extend(_cpu_ms(large)))
    rows.append({"provider": OURS, "B": B_large, "D": D, **asdict(Timing.of(took))})
    rows[-1] |= {"peak_mib": large_peak / 2**20, "error": None}
    figures = {
        "time_ratio": times[OURS].median_ms / times[PEER].median_ms,
        "memory_ratio": peaks[OURS] / peaks[PEER],
        "large_gb": large_peak / 1e9,
    }
    return {"rows": rows, "figures": figures}


def _step(function: Function, B: int, *, float64: bool = False) -> Callable[[], list[Tensor]]:
    """Loss and gradients in float32, or in float64 by the same tiles."""
    given = pairs(B, "cpu")
    if float64:
        given = {name: x.detach().double().requires_grad_() for name, x in given.items()}

    def step() -> list[Tensor]:
        loss = function(**given)
        return [loss.detach(), *gradients(loss, given, None)]

    return step


def _peak(call: Call) -> int:
    peak = peak_bytes(call, "cpu")
    if peak is None:
        raise SystemExit("bench.infonce_cpu needs Linux: peak memory comes from /proc/self")
    return peak


def _cpu_ms(call: Call) -> list[float]:
    start = time.perf_counter()
    call()
    return [1000 * (time.perf_counter() - start)]


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


if __name__ == "__main__":
    sys.exit(main())
