"""Compiles tile candidates at once, each in a process, and compares each with float64.

python -m bench.tile_checks KERNEL TILE ARCH DEVICE      (TILE as JSON; prints JSON)
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from bench.machine import ROOT
from bench.measure import reason
from bench.tile_calls import calls, with_tile
from flap_kernels.infonce.torch_tiled import TorchTiled
from flap_kernels.infonce.triton_tiles import KernelName, TileShape

Tiles = Mapping[KernelName, Sequence[TileShape]]
Checked = dict[KernelName, dict[TileShape, dict[str, Any]]]

# No multiple of a tile, several tiles each way.
SIZE, MOST_AT_ONCE, LIMIT_S = 1100, 8, 75.0
# bfloat16 gradients are within 0.4 % of float64; a wrong tile is off by far more.
_MOST_ERROR = 0.02
_NOTHING = {"error": None, "registers": None, "predicted_ms": None}
# Of the program that `bench.programs` compiles at 65,536 x 512.
_PROGRAMS: dict[str, str] = {
    "sums": "large_infonce_lse_negatives",
    "dlogits": "large_infonce_dlogits",
}


def check_all(tiles: Tiles, arch: int, device: str) -> Checked:
    """Each candidate's error, registers and prediction, or the reason why it is left out."""
    asked: list[tuple[KernelName, TileShape]] = [
        (kernel, tile) for kernel, of_kernel in tiles.items() for tile in of_kernel
    ]
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        found = list(pool.map(lambda one: in_process(one[0], one[1], arch, device), asked))
    checked: Checked = {kernel: {} for kernel in tiles}
    for (kernel, tile), row in zip(asked, found, strict=True):
        checked[kernel][tile] = row
    return checked


def in_process(kernel: KernelName, tile: TileShape, arch: int, device: str) -> dict[str, Any]:
    """The row of one candidate, from a process that is ended if it takes too long."""
    arguments = [kernel, json.dumps(asdict(tile)), str(arch), device]
    command = [sys.executable, "-m", "bench.tile_checks", *arguments]
    # In this process's own group, so that it ends with it.
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        done = run(command, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {**_NOTHING, "reason": f"longer than {LIMIT_S:g} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {**_NOTHING, "reason": f"failed: {said[-1][:200] if said else 'it said nothing'}"}
    return json.loads(done.stdout.splitlines()[-1])


def check(kernel: KernelName, tile: TileShape, arch: int, device: str) -> dict[str, Any]:
    """The row of one candidate."""
    try:
        with with_tile(kernel, tile):
            found = _numbers(kernel, calls(SIZE, device)[kernel])
        error = worst(found, _exact(kernel, device))
    except Exception as failed:  # of any type: what does not compile is left out by name
        return {**_NOTHING, "reason": f"failed: {reason(failed)}"}
    row = {**_NOTHING, "error": error, "reason": ""}
    if not error < _MOST_ERROR:
        return {**row, "reason": f"wrong: {error:.1e} from float64"}
    return row | predicted(kernel, tile, arch)


def _numbers(kernel: KernelName, call: Any) -> list[Tensor]:
    """The results that a candidate is compared by."""
    found = call(x_wanted=True, y_wanted=True) if kernel == "dlogits" else call()
    if kernel == "sums":
        return [found.row_lse_negatives, found.column_lse_negatives]
    return [x for x in (found.x, found.y, found.scale) if x is not None]


def _exact(kernel: KernelName, device: str) -> list[Tensor]:
    """The same in float64, by the backend in plain PyTorch."""
    exact = calls(SIZE, device, backend=TorchTiled(), dtype=torch.float64)
    return _numbers(kernel, exact[kernel])


def worst(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error over the largest value, of the worst result; NaN counts as infinite."""
    errors = [
        ((x.double() - y).abs().max() / y.abs().max()).nan_to_num(torch.inf)
        for x, y in zip(found, exact, strict=True)
    ]
    return max(error.item() for error in errors)


def predicted(kernel: KernelName, tile: TileShape, arch: int) -> dict[str, Any]:
    """Registers, and the predicted time of all launches at 65,536 x 512; nothing if unknown."""
    if kernel not in _PROGRAMS:
        return {}
    try:
        from bench import programs, static

        with patch.object(programs.infonce, "tile_shape", lambda *_: tile):
            row = static.row(("infonce", _PROGRAMS[kernel], cast(Any, arch)))
            program = static.program_of("infonce", _PROGRAMS[kernel], cast(Any, arch))
    except Exception as failed:  # a prediction is no reason to lose a measurement
        print(f"no prediction: {reason(failed)}", file=sys.stderr)
        return {}
    found: dict[str, Any] = {"registers": row.code.registers if row.code else None}
    if row.prediction is not None:
        M, N = (cast(int, program.signature[name]) for name in ("M", "N"))
        launches = 65_536 / M * 65_536 / N
        found["predicted_ms"] = row.prediction.time_us / 1000 * launches
    return found


if __name__ == "__main__":
    _, name, shape, capability, where = sys.argv
    arch = int(capability)
    print(json.dumps(check(cast(KernelName, name), TileShape(**json.loads(shape)), arch, where)))
