"""The tables of the compile report: what programs take, and what is predicted of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.cost import CHIPS
from bench.machine_code import TENSOR_CORE
from bench.programs import AMD, Arch
from flap_kernels.cards import KIB

if TYPE_CHECKING:
    from bench.static import Row

_HEAD = (
    *("program", "chip", "tile", "regs", "stack", "KiB", "tmem", "tensor core"),
    *("cp.async", "TMA", "per SM", "MB", "GFLOP"),
)
LEGEND = """\
tile: sizes of blocks, warps, stages. regs, stack: of a thread, words and bytes; a stack is spilt.
KiB, tmem: of a block, shared memory and columns of tensor memory. per SM: blocks that fit there.
tensor core, cp.async, TMA: instructions in the machine code.
MB, GFLOP: least traffic and arithmetic of a launch."""

_PATH_HEAD = (
    *("program", "chip", "tensor", "MUFU", "shuffle", "barrier", "shared", "copies", "loads"),
    *("stores", "fp32", "other", "issue", "tensor cycles", "tile", "us", "ceiling", "bound by"),
)
_PATH_LEGEND = """\
Instructions that a warp executes, those of global memory by bits of a thread's access. Predicted
(bench/cost.py), not measured: cycles to issue a tile, of its product on tensor cores, and between
two tiles of a multiprocessor; time of a launch, and the least by arithmetic or traffic over it. For
"""


def table(found: Sequence[Row]) -> str:
    """What the programs take, as text, at most 120 columns wide."""
    return _aligned([_HEAD, *(_cells(row) for row in found)], left=3)


def path_table(found: Sequence[Row]) -> str:
    """What a warp executes, and what is predicted of it; "" if no row has it."""
    lines = [cells for row in found if (cells := _path_cells(row))]
    if not lines:
        return ""
    products = ", ".join(f"sm_{arch} {c.name}" for arch, c in CHIPS.items())
    return f"{_aligned([_PATH_HEAD, *lines], left=2)}\n\n{_PATH_LEGEND}{products}."


def _aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        " ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _path_cells(row: Row) -> tuple[str, ...]:
    path, prediction = row.code and row.code.executed, row.prediction
    if not path or not prediction:
        return ()
    counts = path.loops + path.rest

    def widths(name: str) -> str:
        found = {k.removeprefix(name + " "): n for k, n in counts.widths.items() if name in k}
        return "+".join(f"{n}x{bits}" for bits, n in sorted(found.items())) or "-"

    classes = ("tensor", "mufu", "shuffles", "barriers", "shared")
    return (
        row.program,
        chip(row.arch),
        *(str(counts.classes[name]) for name in classes),
        *(widths(f"global_{name}") for name in ("copies", "loads", "stores")),
        *(str(counts.classes[name]) for name in ("fp32", "other")),
        *(str(n) for n in (prediction.issue_cycles, prediction.tensor_cycles)),
        str(prediction.tile_cycles),
        f"{prediction.time_us:.1f}",
        f"{prediction.ceiling:.0%}",
        prediction.bound,
    )


def _cells(row: Row) -> tuple[str, ...]:
    code = row.code
    name = (row.program, chip(row.arch), row.tile)
    cost = (f"{row.bytes_moved / 1e6:.1f}", f"{row.flops / 1e9:.1f}" if row.flops else "-")
    if code is None:
        return *name, *("?",) * (len(_HEAD) - len(name) - len(cost)), *cost
    return (
        *name,
        str(code.registers),
        str(code.stack_bytes),
        f"{code.shared_bytes / KIB:.1f}",
        str(code.tensor_memory_columns or "-"),
        f"{code.tensor_core} {TENSOR_CORE[row.arch]}" if code.tensor_core else "-",
        str(code.async_copies or "-"),
        str(code.bulk_copies or "-"),
        str(row.resident or "-"),
        *cost,
    )


def chip(arch: Arch) -> str:
    """The maker's name for a chip."""
    return f"gfx{arch}" if arch == AMD else f"sm_{arch}"
