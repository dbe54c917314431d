"""The kernels' compile report: resources of each program on each chip; needs no GPU.

    python -m bench.static [--kernel NAME] [--arch 90] [--paper] [--json FILE]

Every program of bench/programs is compiled afresh: at the paper's sizes, and unless --paper is
given at the other sizes and types that training launches. Those that Triton would not tell apart
are compiled once. Exits with 1 if one spills, does without the tensor cores that it is meant for,
or does not fit on its chip.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton

from bench.cost import Prediction, predicted
from bench.machine_code import TENSOR_CORE, MachineCode, compiled, specialised
from bench.programs import AMD, ARCHES, PAPER, Arch, Program
from bench.static_tables import LEGEND, chip, path_table, table
from flap_kernels.cards import KIB, SHARED_BYTES
from flap_kernels.launch import interpreted

TENSOR_MEMORY_COLUMNS = 512
_WARPS: dict[int, int] = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
"""The most warps of a multiprocessor."""

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
    small_tile: bool
    """Whether its tile has fewer than 64 rows: HGMMA and UTC*MMA need them, HMMA does not."""
    bytes_moved: float
    """Least traffic of a launch."""
    flops: float
    code: MachineCode | None
    error: str = ""
    """Why it does not compile."""
    prediction: Prediction | None = None

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
        older = self.small_tile and code.executed and code.executed.tensor_instructions
        if self.matrix_product and not code.tensor_core and not older:
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
        """Number of blocks that fit on a multiprocessor at a time; 0 if it is not known."""
        if self.code is None or self.arch == AMD:
            return 0
        registers = 256 * math.ceil(self.code.registers * 32 / 256) * self.num_warps
        bounds = [65_536 // registers, _WARPS[self.arch] // self.num_warps, 32]
        bounds.append((SHARED_BYTES[self.arch] + KIB) // (self.code.shared_bytes + KIB))
        if self.code.tensor_memory_columns:
            bounds.append(TENSOR_MEMORY_COLUMNS // self.code.tensor_memory_columns)
        return min(bounds)


def rows(
    kernels: Sequence[str] | None = None,
    arches: Sequence[Arch] = ARCHES,
    *,
    paper_only: bool = False,
) -> list[Row]:
    """Compile the programs of these kernels (all, if not given) for these chips.

    Raises RuntimeError under Triton's interpreter.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET must be unset: interpreted kernels do not compile")
    compilations = _compilations(kernels or list(PAPER), arches, paper_only)
    # Another process takes as long to start as several programs to compile.
    processes = min(os.cpu_count() or 1, math.ceil(len(compilations) / 12))
    with _fresh_cache():
        if processes == 1:
            return [row(compilation) for compilation in compilations]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            return list(pool.map(row, compilations, chunksize=4))


def _compilations(
    kernels: Sequence[str], arches: Sequence[Arch], paper_only: bool
) -> list[Compilation]:
    """The kernels' compilations, each a program that Triton would compile for itself.

    A program for each chip, then the next program.
    """
    found: dict[str, Compilation] = {}
    for kernel in kernels:
        for arch in arches:
            for p in programs(kernel, arch, paper_only=paper_only):
                options = p.kernel.fn.__name__, p.num_warps, p.num_stages, arch
                found.setdefault(repr((specialised(p), options)), (kernel, p.name, arch))
    names = list(dict.fromkeys((kernel, name) for kernel, name, _ in found.values()))
    return sorted(found.values(), key=lambda compilation: names.index(compilation[:2]))


def programs(kernel: str, arch: Arch, *, paper_only: bool = False) -> tuple[Program, ...]:
    """A kernel's programs on a chip, with unique names."""
    paper = PAPER[kernel]
    return paper.programs(arch) + (() if paper_only else paper.others(arch))


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


def program_of(kernel: str, name: str, arch: Arch) -> Program:
    """A kernel's program by its name."""
    return next(p for p in programs(kernel, arch) if p.name == name)


def row(compilation: Compilation) -> Row:
    """Compile a program for a chip; an error of the compiler's stands in the row."""
    kernel, name, arch = compilation
    program = program_of(*compilation)
    code, error = None, ""
    try:
        code = compiled(program, arch)
    except Exception as failed:  # of any type: the report lists it among the faults
        lines = [line for line in str(failed).splitlines() if line.strip()]
        error = f"{type(failed).__name__}: {lines[-1] if lines else ''}"
    found = Row(
        kernel=kernel,
        program=name,
        arch=arch,
        tile=_tile(program),
        num_warps=program.num_warps,
        matrix_product=program.matrix_product,
        small_tile=program.constants.get("BLOCK_ROWS", 64) < 64,
        bytes_moved=program.bytes_moved,
        flops=program.flops,
        code=code,
        error=error,
    )
    if code is None or code.executed is None:
        return found
    return replace(found, prediction=predicted(program, arch, code.executed, found.resident))


def _tile(program: Program) -> str:
    sizes = (str(v) for name, v in program.constants.items() if name.startswith("BLOCK"))
    return f"{'x'.join(sizes)} w{program.num_warps} s{program.num_stages}"


def faults(found: Sequence[Row]) -> list[str]:
    """All faults, one line each."""
    return [f"{row.program} on {chip(row.arch)} {fault}" for row in found for fault in row.faults]


def report(found: Sequence[Row]) -> str:
    """The table, the faults and a summary line."""
    wrong = faults(found)
    counts = ((len(found), "program"), (len(wrong), "fault"))
    verdict = "static: " + ", ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in counts)
    lines = [f"triton {triton.__version__}", table(found), "", LEGEND, "", path_table(found), ""]
    return "\n".join([*lines, *(f"FAULT {fault}" for fault in wrong), verdict])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if there are faults, 2 if there can be no report."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=list(PAPER), help="only this one")
    parser.add_argument("--arch", action="append", choices=ARCHES, type=int, help="only this chip")
    parser.add_argument("--paper", action="store_true", help="only at the paper's sizes")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    chosen = parser.parse_args(arguments)
    if interpreted():
        print("static: TRITON_INTERPRET=1 is set, and interpreted kernels do not compile; unset it")
        return 2
    found = rows(chosen.kernel, chosen.arch or ARCHES, paper_only=chosen.paper)
    if chosen.json:
        chosen.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    print(report(found))
    return int(bool(faults(found)))


def as_json(found: Sequence[Row]) -> dict[str, object]:
    """The report as JSON: the compiler, and each row with its faults."""
    listed = []
    for row in found:
        path = row.code.executed if row.code else None
        plain = row if row.code is None else replace(row, code=replace(row.code, executed=None))
        executed = None
        if path is not None:
            executed = {"loops": dict(path.loops.classes), "rest": dict(path.rest.classes)}
        more = {"resident": row.resident, "executed": executed, "faults": row.faults}
        listed.append({**asdict(plain), **more})
    return {"triton": triton.__version__, "rows": listed}


if __name__ == "__main__":
    sys.exit(main())
