"""The other losses of a tile on a CPU against plain InfoNCE: interleaved, with extra peak memory.

    python -m bench.losses_cpu [--write]       about 3 minutes; uses all cores; run nothing else

Forward and backward in float32, one process, each with a learnable scale. Of the pairs, 11.6 % have
a caption that is another's, too, as in AudioCaps' training set. `prefixes one by one` is what four
widths cost without sharing their products. --write stores the result and rewrites RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import report
from bench.machine import machine, save
from bench.measure import interleaved, peak_bytes
from bench.tasks import D, gradients, pairs
from flap_kernels import infonce, sigmoid_loss, soft_infonce

B = 8192
PREFIXES = (64, 128, 256, 512)
PLAIN = "infonce"
# Of 100 pairs, about as many share their caption as of AudioCaps' 91,256 in training.
_SHARE = 0.116


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.losses_cpu")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each, interleaved")
    parser.add_argument("--write", action="store_true", help="store the result")
    asked = parser.parse_args(arguments)
    facts = machine("cpu")
    result = measure(B, asked.rounds)
    if asked.write:
        print(save(Path("bench"), {"kind": "losses_cpu", "machine": facts, **result}))
        report.write(Path("bench"))
    print(report.facts(facts))
    for row in result["rows"]:
        print(
            f"{row['loss']:24} {row['median_ms']:7.0f} ms ({row['low_ms']:.0f}-"
            f"{row['high_ms']:.0f}, rounds: {row['rounds']})  {row['time_ratio']:.2f} of {PLAIN}  "
            f"{row['extra_mb']:5.0f} MB above the inputs and gradients"
        )
    return 0


def measure(B: int, rounds: int) -> dict[str, Any]:
    """A row for each loss, with its time over plain InfoNCE's, and the figures of the targets."""
    steps = {name: _step(function, B) for name, function in functions(B).items()}
    for step in steps.values():
        step()
    # The gradients are results: B x D of both sides.
    peaks = {name: _peak(step) - 2 * 4 * B * D for name, step in steps.items()}
    times = interleaved(steps, "cpu", budget_s=0, least_rounds=rounds)
    plain = times[PLAIN].median_ms
    rows = [
        {
            "loss": name,
            "B": B,
            "D": D,
            **asdict(times[name]),
            "time_ratio": times[name].median_ms / plain,
            "extra_mb": peaks[name] / 1e6,
        }
        for name in steps
    ]
    of = {row["loss"]: row for row in rows}
    chosen = {"positive": "positive", "sigmoid": "sigmoid", "prefixes": "4 prefixes"}
    figures = {f"{key}_ratio": of[name]["time_ratio"] for key, name in chosen.items()}
    figures["most_extra_mb"] = max(of[name]["extra_mb"] for name in chosen.values())
    return {"rows": rows, "figures": figures}


def functions(B: int) -> dict[str, Callable[..., Tensor]]:
    """Each loss as (audio, text, scale) -> ()."""
    draw = torch.Generator().manual_seed(0)
    caption = torch.arange(B)
    some = torch.randperm(B, generator=draw)[: int(_SHARE * B)]
    caption[some] = caption[some.roll(1)] // 2 * 2  # captions of two, three or more
    ids = torch.stack([torch.arange(B), caption], dim=1)
    teacher = {f"teacher_{k}": v.detach() for k, v in pairs(B, "cpu").items()}

    def one_by_one(audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        shorter = (
            infonce(F.normalize(audio[:, :d], dim=1), F.normalize(text[:, :d], dim=1), scale)
            for d in PREFIXES[:-1]
        )
        return torch.stack([*shorter, infonce(audio, text, scale)]).sum()

    return {
        PLAIN: infonce,
        "masked": lambda **x: infonce(**x, ids=ids),
        "positive": lambda **x: infonce(**x, ids=ids, duplicates="positive"),
        "sigmoid": lambda **x: sigmoid_loss(**x, bias=-10.0),
        "4 prefixes": lambda **x: infonce(**x, prefixes=PREFIXES),
        "4 prefixes one by one": one_by_one,
        "teacher's probabilities": lambda **x: soft_infonce(**x, **teacher),
    }


def _step(function: Callable[..., Tensor], B: int) -> Callable[[], list[Tensor]]:
    given = pairs(B, "cpu")

    def step() -> list[Tensor]:
        loss = function(**given)
        return [loss.detach(), *gradients(loss, given, None)]

    return step


def _peak(step: Callable[[], object]) -> int:
    peak = peak_bytes(step, "cpu")
    if peak is None:
        raise SystemExit("bench.losses_cpu needs Linux: peak memory comes from /proc/self")
    return peak


if __name__ == "__main__":
    sys.exit(main())
