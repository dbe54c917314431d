"""InfoNCE and the sigmoid loss at 65,536 pairs: tile candidates side by side, and what is launched.

    python -m bench.tiles RESULTS

Each candidate is compiled and compared with float64 in a process of its own, all at once: one that
crashes or takes too long costs itself alone. Those that are right are then timed in turns, each
through the op's backend: `sums` is the forward, `dlogits` the backward without its library
products, `sigmoid` the whole loss. Then forward + backward by workspace, and the launches of the
forward and of each library product, as PyTorch's profiler sees them.

`predicted_ms` is of `bench.cost`, from the machine code: a prediction, not a measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import Tensor

from bench.measure import Call, interleaved, peak_bytes
from bench.records import append
from bench.tasks import D, pairs
from bench.tile_calls import calls, candidates, named, with_tile
from bench.tile_checks import check_all
from bench.tile_profile import launches
from flap_kernels import infonce
from flap_kernels.infonce.triton_tiles import KernelName, TileShape

B, SIGMOID_D = 65_536, 768
WORKSPACES_MIB: tuple[float | None, ...] = (None, 512, 1024)
"""None is the default."""


def tile_rows(
    kernel: KernelName, call: Call, checked: Mapping[TileShape, dict[str, Any]], device: str
) -> list[dict[str, Any]]:
    """Rows of a kernel's candidates: those that are right are timed in turns."""
    right = [tile for tile, row in checked.items() if not row["reason"]]

    def with_its_tile(tile: TileShape) -> Call:
        def run() -> object:
            with with_tile(kernel, tile):
                return call()

        return run

    runs = {named(tile): with_its_tile(tile) for tile in right}
    for run in runs.values():
        run()
    times = interleaved(runs, device, budget_s=2.0 * len(runs)) if runs else {}
    found = []
    for i, (tile, row) in enumerate(checked.items()):
        timing = asdict(times[named(tile)]) if tile in right else {"median_ms": None}
        found.append({"kernel": kernel, "tile": named(tile), "in_use": i == 0, **row, **timing})
    return found


def workspace_rows(size: int, device: str) -> list[dict[str, Any]]:
    """Forward + backward of the op, with each workspace, and its peak memory."""
    given = pairs(size, device)
    leaves = list(given.values())

    def step(workspace_mib: float | None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(infonce(**given, workspace_mib=workspace_mib), leaves)

    runs = {_mib(mib): lambda mib=mib: step(mib) for mib in WORKSPACES_MIB}
    peaks = {}
    for name, run in runs.items():
        run()
        peaks[name] = (peak_bytes(run, device) or 0) / 2**20
    times = interleaved(runs, device, budget_s=2.0 * len(runs))
    return [
        {"workspace": name, "peak_mib": peaks[name], **asdict(timing)}
        for name, timing in times.items()
    ]


def _mib(workspace: float | None) -> str:
    return "default" if workspace is None else f"{workspace:g} MiB"


def main(arguments: list[str] | None = None) -> None:
    """Append tiles, workspaces and launches to the file, each when it is known."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiles")
    parser.add_argument("results")
    results = parser.parse_args(arguments).results
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    tiles = {kernel: candidates(arch, kernel) for kernel in get_args(KernelName)}
    checked = check_all(tiles, arch, "cuda")
    of_infonce = calls(B, "cuda")
    for kernel in ("sums", "dlogits"):
        append(results, tiles=tile_rows(kernel, of_infonce[kernel], checked[kernel], "cuda"))
    append(results, workspaces=workspace_rows(B, "cuda"))
    append(results, launches=launches(of_infonce, B, D, "cuda"))
    of_sigmoid = calls(B, "cuda", width=SIGMOID_D)["sigmoid"]
    append(results, tiles=tile_rows("sigmoid", of_sigmoid, checked["sigmoid"], "cuda"))


if __name__ == "__main__":
    main()
