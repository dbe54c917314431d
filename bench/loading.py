"""Clips per second from FLAC shards to waveforms at 16 kHz: DALI against soundfile + torchaudio.

    python -m bench.loading [--write]      about a minute; uses all cores; run nothing else

A pass builds a loader of bench/loaders.py, lets its queues fill and times the batches that follow;
passes take turns. --write stores the result in bench/results and rewrites bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import report
from bench.loaders import (
    BATCH,
    CORES,
    DALI,
    LOADER_CASES,
    ONE_CORE,
    PEERS,
    RATE_HZ,
    STORED_HZ,
    TIMED,
    LoaderCase,
    drain,
    write_shards,
)
from bench.machine import machine, save
from bench.measure import Timing


def measure(clips: int, rounds: int) -> dict[str, Any]:
    """Clips per second of each loader, and the figures of the targets."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), clips)
        times: dict[LoaderCase, list[float]] = {case: [] for case in LOADER_CASES}
        for _ in range(rounds):
            for case, found in times.items():
                batches = case.filled(shards)
                start = time.perf_counter()
                drain(batches)
                found.append(1000 * (time.perf_counter() - start))
                del batches  # its workers and threads end here, not in the next one's time
    rows, rates = [], {}
    for case, found in times.items():
        timing, total = Timing.of(found), 1000 * BATCH * TIMED
        rates[case.name, case.stored_hz] = total / timing.median_ms
        row = {"shards": f"{case.stored_hz // 1000} kHz FLAC", "way": case.name}
        row |= {"clips_per_s": total / timing.median_ms, "low": total / timing.high_ms}
        rows.append({**row, "high": total / timing.low_ms, "rounds": rounds})
    mine = rates[DALI, RATE_HZ]
    figures = {
        "same_shards": mine / max(rates[name, RATE_HZ] for name in PEERS),
        "same_shards_one_core": mine / rates[ONE_CORE, RATE_HZ],
        "usual_path": mine / max(rates[name, STORED_HZ[-1]] for name in PEERS),
        "usual_path_one_core": mine / rates[ONE_CORE, STORED_HZ[-1]],
    }
    if CORES == 16:
        figures["clips_per_s_16_cores"] = mine
    return {"rows": rows, "figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.loading")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each, interleaved")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--write", action="store_true", help="store the result")
    asked = parser.parse_args(arguments)
    facts = machine("cpu")
    result = measure(asked.clips, asked.rounds)
    if asked.write:
        print(save(Path("bench"), {"kind": "loading", "machine": facts, **result}))
        report.write(Path("bench"))
    print(report.facts(facts))
    for row in result["rows"]:
        rate = f"{row['clips_per_s']:6.0f} clips/s ({row['low']:.0f}-{row['high']:.0f})"
        print(f"{row['shards']}  {row['way']:36} {rate}")
    figures = result["figures"]
    for peer, ending in (("the fastest peer", ""), ("one core", "_one_core")):
        print(
            f"DALI on 16 kHz shards over {peer}: {figures['same_shards' + ending]:.2f} on the same "
            f"shards (target >= 2), {figures['usual_path' + ending]:.2f} from 48 kHz (target >= 8)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
