"""The kernels' compile report: resources of each program on three chips; needs no GPU.

    python -m bench.static [--kernel NAME] [--arch 90] [--json FILE]

Every program of bench/programs is compiled afresh at the paper's sizes. Exits with 1 if one
spills, does without the tensor cores that it is meant for, or does not fit on its chip.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from bench.machine_code import TENSOR_CORE, MachineCode, compiled
from bench.programs import ARCHES, PAPER, Arch, Program
from flap_kernels.launch import interpreted

KIB = 1024
SHARED_BYTES: dict[int, int] = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
"""The most shared memory of a block; a multiprocessor has 1 KiB more."""
TENSOR_MEMORY_COLUMNS = 512

Compilation = tuple[str, str, Arch]
"""A kernel, one of its programs, a chip."""


@dataclass(frozen=True)
class Row:
    """A program on a chip."""

    kernel: str
    program: str
    arch: Arch
    tile: str
    """Sizes of its blocks, and its warps and stages."""
    num_warps: int
    matrix_product: bool
    """Whether the code must use tensor cores."""
    bytes_moved: float
    """Least traffic of a launch."""
    flops: float
    code: MachineCode | None
    error: str = ""
    """Why it does not compile."""

    @property
    def faults(self) -> list[str]:
        """Faults with their remedies; empty if there are none."""
        code, limit = self.code, SHARED_BYTES[self.arch]
        if code is None:
            return [f"does not compile: {self.error}"]
        found = []
        if code.stack_bytes or code.local_memory:
            found.append(
                f"spills: {code.stack_bytes} bytes of stack, {code.local_memory} loads and stores "
                "of it; take a smaller tile, more warps or fewer live values"
            )
        if self.matrix_product and not code.tensor_core:
            found.append(
                f"has no {TENSOR_CORE[self.arch]}: its product does not use the tensor cores"
            )
        if code.shared_bytes > limit:
            found.append(
                f"takes {code.shared_bytes} bytes of shared memory, a block has {limit}; "
                "take a smaller tile or fewer stages"
            )
        if code.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(
                f"takes {code.tensor_memory_columns} columns of tensor memory, "
                f"there are {TENSOR_MEMORY_COLUMNS}; take a smaller tile"
            )
        return found

    @property
    def resident(self) -> int:
        """Number of blocks that fit on a multiprocessor at a time; 0 if it does not compile."""
        if self.code is None:
            return 0
        registers = 256 * math.ceil(self.code.registers * 32 / 256) * self.num_warps
        bounds = [65_536 // registers, 64 // self.num_warps, 32]
        bounds.append((SHARED_BYTES[self.arch] + KIB) // (self.code.shared_bytes + KIB))
        if self.code.tensor_memory_columns:
            bounds.append(TENSOR_MEMORY_COLUMNS // self.code.tensor_memory_columns)
        return min(bounds)


def rows(kernels: Sequence[str] | None = None, arches: Sequence[Arch] = ARCHES) -> list[Row]:
    """Compile the programs of these kernels (all, if not given) for these chips.

    Raises RuntimeError under Triton's interpreter.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET must be unset: interpreted kernels do not compile")
    compilations = [each for name in kernels or PAPER for each in _compilations(name, arches)]
    # Another process takes as long to start as several programs to compile.
    processes = min(os.cpu_count() or 1, math.ceil(len(compilations) / 12))
    with _fresh_cache():
        if processes == 1:
            return [_row(compilation) for compilation in compilations]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            return list(pool.map(_row, compilations))


def _compilations(kernel: str, arches: Sequence[Arch]) -> list[Compilation]:
    """A kernel's compilations: a program for each chip, then the next program."""
    found: list[Compilation] = [
        (kernel, p.name, arch) for arch in arches for p in PAPER[kernel].programs(arch)
    ]
    names = list(dict.fromkeys(name for _, name, _ in found))
    return sorted(found, key=lambda compilation: names.index(compilation[1]))


@contextmanager
def _fresh_cache() -> Iterator[None]:
    """Compile into an empty Triton cache, so that the installed compiler is what is reported."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before


def _row(compilation: Compilation) -> Row:
    kernel, name, arch = compilation
    program = next(p for p in PAPER[kernel].programs(arch) if p.name == name)
    code, error = None, ""
    try:
        code = compiled(program, arch)
    except Exception as failed:  # of any type: the report lists it among the faults
        lines = [line for line in str(failed).splitlines() if line.strip()]
        error = f"{type(failed).__name__}: {lines[-1] if lines else ''}"
    return Row(
        kernel=kernel,
        program=name,
        arch=arch,
        tile=_tile(program),
        num_warps=program.num_warps,
        matrix_product=program.matrix_product,
        bytes_moved=program.bytes_moved,
        flops=program.flops,
        code=code,
        error=error,
    )


def _tile(program: Program) -> str:
    sizes = (str(v) for name, v in program.constants.items() if name.startswith("BLOCK"))
    return f"{'x'.join(sizes)} w{program.num_warps} s{program.num_stages}"


_HEAD = (
    *("program", "chip", "tile", "regs", "stack", "KiB", "tmem", "tensor core"),
    *("cp.async", "TMA", "per SM", "MB", "GFLOP"),
)
_LEGEND = """\
tile: sizes of blocks, warps, stages. regs, stack: of a thread, words and bytes; a stack is spilt.
KiB, tmem: of a block, shared memory and columns of tensor memory. per SM: blocks that fit there.
tensor core, cp.async, TMA: instructions in the machine code.
MB, GFLOP: least traffic and arithmetic of a launch at the paper's sizes."""


def table(found: Sequence[Row]) -> str:
    """The rows as text, at most 120 columns wide."""
    lines = [_HEAD, *(_cells(row) for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = ("program", "chip", "tile")
    return "\n".join(
        " ".join(
            cell.ljust(width) if head in left else cell.rjust(width)
            for head, cell, width in zip(_HEAD, line, widths, strict=True)
        )
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    code = row.code
    name = (row.program, f"sm_{row.arch}", row.tile)
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
        str(row.resident),
        *cost,
    )


def faults(found: Sequence[Row]) -> list[str]:
    """All faults, one line each."""
    return [f"{row.program} on sm_{row.arch} {fault}" for row in found for fault in row.faults]


def report(found: Sequence[Row]) -> str:
    """The table, the faults and a summary line."""
    wrong = faults(found)
    counts = ((len(found), "program"), (len(wrong), "fault"))
    verdict = "static: " + ", ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in counts)
    lines = [f"triton {triton.__version__}", table(found), "", _LEGEND, ""]
    return "\n".join([*lines, *(f"FAULT {fault}" for fault in wrong), verdict])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if there are faults, 2 if there can be no report."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=list(PAPER), help="only this one")
    parser.add_argument("--arch", action="append", choices=ARCHES, type=int, help="only this chip")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    chosen = parser.parse_args(arguments)
    if interpreted():
        print("static: TRITON_INTERPRET=1 is set, and interpreted kernels do not compile; unset it")
        return 2
    found = rows(chosen.kernel, chosen.arch or ARCHES)
    if chosen.json:
        chosen.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    print(report(found))
    return int(bool(faults(found)))


def as_json(found: Sequence[Row]) -> dict[str, object]:
    """The report as JSON: the compiler, and each row with its faults."""
    listed = [{**asdict(row), "resident": row.resident, "faults": row.faults} for row in found]
    return {"triton": triton.__version__, "rows": listed}


if __name__ == "__main__":
    sys.exit(main())
