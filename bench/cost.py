"""Predictions: the time of a program on a chip, from the instructions that a warp executes.

These are predictions, not measurements. What the model assumes:

- A warp executes the path of `bench.sass`: no tile on an edge or a diagonal, no retry. A loop over
  the product runs until the path has the tile's multiply-adds; others as often as the program says.
- A multiprocessor issues 4 instructions a cycle, one for each quarter of its warps. Each kind of
  unit has the chip's published rate (`CHIPS`): tensor cores, 16 exponentials or other special
  functions a cycle, 128 bytes of shared memory and loads from global memory, which share the L1
  cache, fp32 lanes. Copies past the registers and stores go to the L2 cache: of an A100, and taken
  to be the H100's, 5120 bytes a cycle for all multiprocessors, of a B200 twice that, else 64 for
  each. Conflicts of banks, latencies, dependences and misses of the instruction cache cost nothing.
- Within a phase (the product's loop, or the rest) the slowest unit sets the pace. Blocks that are
  resident together overlap one's product with another's rest, at best perfectly; a lone block does
  one after the other.
- Blocks are spread evenly and run at the boost clock; DRAM moves the launch's least traffic at its
  published rate, at the same time. Launching costs nothing.

So a prediction is a lower bound that says what binds a kernel and which of two variants does less,
not how long one takes. Sources of rates: NVIDIA's architecture whitepapers (A100, GA102, Ada, H100,
Blackwell) and the CUDA C++ Programming Guide, "Arithmetic Instructions".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bench.programs.program import Program
from bench.sass import Counts, Path


@dataclass(frozen=True)
class Chip:
    """Published rates of one product of a compute capability."""

    name: str
    multiprocessors: int
    ghz: float
    gb_per_s: float
    tensor_flops: int
    """Of a multiprocessor in a cycle: dense bf16, summed in fp32; of tf32 half as many."""
    fp32_lanes: int
    l2_bytes: int
    """Of a multiprocessor in a cycle."""


CHIPS: Mapping[int, Chip] = {
    80: Chip("A100 SXM", 108, 1.41, 2039, 2048, 64, 47),
    86: Chip("RTX 3090", 82, 1.695, 936, 512, 128, 64),
    89: Chip("RTX 4090", 128, 2.52, 1008, 512, 128, 64),
    90: Chip("H100 SXM", 132, 1.83, 3350, 4096, 128, 38),
    100: Chip("B200", 148, 1.85, 8000, 8192, 128, 69),
    120: Chip("RTX 5090", 170, 2.407, 1792, 512, 128, 64),
}
"""By compute capability, the product that a prediction is for."""


@dataclass(frozen=True)
class Prediction:
    """Predicted cycles of one tile, and predicted time of the launch."""

    issue_cycles: int
    """To issue a tile's instructions."""
    tensor_cycles: int
    tile_cycles: int
    """Between two tiles of a multiprocessor, blocks resident together counted."""
    bound: str
    """The unit that sets the pace."""
    time_us: float
    ceiling: float
    """The least time by arithmetic or traffic alone, over the predicted time."""


def predicted(program: Program, arch: int, path: Path, resident: int) -> Prediction | None:
    """The prediction for a launch; None for a chip without published rates here."""
    chip = CHIPS.get(arch)
    if chip is None:
        return None
    flops_per_cycle = _flops_per_cycle(program, chip)
    loop = _cycles(path.loops, program.num_warps, chip)
    rest = _cycles(path.rest, program.num_warps, chip, prefetched=bool(path.loops.instructions))
    if program.matrix_product:
        loop["tensor"] = math.ceil(program.tile_flops / flops_per_cycle)
    together = {unit: loop[unit] + rest[unit] for unit in loop}
    alone = max(loop.values()) + max(rest.values())
    bound = max(together, key=lambda unit: together[unit])
    tile_cycles = max(together[bound], math.ceil(alone / max(1, resident)))
    if tile_cycles > together[bound]:
        bound = "one after the other"
    cycles = max(alone, math.ceil(program.blocks / chip.multiprocessors) * tile_cycles)
    compute_us = cycles / chip.ghz / 1e3
    memory_us = program.bytes_moved / chip.gb_per_s / 1e3
    if memory_us > compute_us:
        bound = "DRAM"
    rate = flops_per_cycle * chip.multiprocessors * chip.ghz * 1e3
    time_us = max(compute_us, memory_us)
    return Prediction(
        issue_cycles=together["issue"],
        tensor_cycles=together["tensor"],
        tile_cycles=tile_cycles,
        bound=bound,
        time_us=time_us,
        ceiling=max(memory_us, program.flops / rate) / time_us,
    )


def _flops_per_cycle(program: Program, chip: Chip) -> int:
    if not program.matrix_product:
        return 2 * chip.fp32_lanes
    return chip.tensor_flops // (2 if program.constants["PRECISION"] == "tf32" else 1)


def _cycles(counts: Counts, warps: int, chip: Chip, *, prefetched: bool = False) -> dict[str, int]:
    """Cycles of a multiprocessor for a block's warps, by unit.

    What is copied before a loop are its first slices: as many of its own copies are masked off.
    """
    moved = counts.bytes_moved
    cache = moved["global_stores"] + (0 if prefetched else moved["global_copies"])
    shared = moved["shared"] + moved["global_loads"]
    fp32 = counts.classes["fp32"] * 32
    return {
        "issue": math.ceil(warps * counts.instructions / 4),
        "tensor": 0,
        "exponentials": math.ceil(warps * counts.classes["mufu"] * 32 / 16),
        "fp32": math.ceil(warps * fp32 / chip.fp32_lanes),
        "L1": math.ceil(warps * shared / 128),
        "L2": math.ceil(warps * cache / chip.l2_bytes),
    }


def trips_of(program: Program, position: int, body: Counts) -> int:
    """Iterations of a loop of the machine code, which may do several of the source's at once."""
    flops = body.tensor_flops if program.matrix_product else body.fma_flops
    if program.tile_flops and flops:
        return max(1, round(program.tile_flops / program.num_warps / flops))
    return program.trips[min(position, len(program.trips) - 1)]
