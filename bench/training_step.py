"""Whole training steps of the papers' towers, by `flap profile --synthetic`.

    python -m bench.training_step RESULTS

Each config is profiled in a process of its own, so that one that does not fit costs itself alone,
and the first are worth most. Weights are random, as nothing is downloaded; captions have 8 to 24
tokens. FLOP are those of real tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.records import append

# At the batch of a GPU in the papers, and what the paper's whole batch needs on one.
_FLAP, _ALL, _CLIPS = "configs/flap.yaml", 4608, 288


@dataclass(frozen=True)
class Case:
    """A config to profile."""

    name: str
    config: str
    settings: tuple[str, ...]
    steps: int = 10


CASES = (
    Case("FLAP, 288 clips", _FLAP, (f"train.global_batch={_CLIPS}",)),
    Case(
        "FLAP, 4,608 clips in micro-batches of 288",
        _FLAP,
        (f"train.global_batch={_ALL}", f"train.micro_batch={_CLIPS}"),
        1,
    ),
    Case(
        "FLAP with reconstruction, 288 clips",
        "configs/flap_recon.yaml",
        (f"train.global_batch={_CLIPS}",),
    ),
    Case("LS-CLAP, 288 clips", "configs/lsclap.yaml", (f"train.global_batch={_CLIPS}",)),
    Case(
        "FLAP, variable lengths, 288 clips",
        "configs/flap_variable.yaml",
        (f"train.global_batch={_CLIPS}",),
    ),
)


def profiled(case: Case) -> dict[str, Any]:
    """The row of a case: its numbers, or the reason why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "flap_fast", "profile", case.config, *case.settings]
        command += ["--synthetic", "--no-search", "--steps", str(case.steps), "--out", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        file = Path(folder) / "profile.json"
        if not file.is_file():
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            return {"name": case.name, "reason": f"failed: {said[-1][:200] if said else ''}"}
        found = json.loads(file.read_text())
    return {
        "name": case.name,
        "global_batch": found["global_batch"],
        "step_ms": found["step_ms"],
        "clips_per_s": found["clips_per_s"],
        "tflops": found["flop_per_s"] / 1e12,
        "utilisation": found["utilisation"],
        "peak_mib": found["memory_mib"]["peak"],
        "parts_ms": found["parts_ms"],
        "micro_batches": found["micro_batches"],
    }


def figures(row: dict[str, Any]) -> dict[str, float]:
    """The figures of `bench.targets` that a case gives."""
    if row.get("reason"):
        return {}
    if row["name"] == CASES[0].name:
        return {"tflops": row["tflops"], "clips_per_s": row["clips_per_s"]}
    return {"global_batch": row["global_batch"]} if row["name"] == CASES[1].name else {}


def main(arguments: list[str] | None = None) -> None:
    """Append a row for each case to the file, when it is known."""
    parser = argparse.ArgumentParser(prog="python -m bench.training_step")
    parser.add_argument("results")
    results = parser.parse_args(arguments).results
    for case in CASES:
        row = profiled(case)
        append(results, training_steps=[row], figures=figures(row))


if __name__ == "__main__":
    main()
