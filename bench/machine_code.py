"""Compiles a Triton program for a GPU, present or not, and reads what its machine code uses.

`cuobjdump`, which ships inside Triton, prints registers, stack and the instructions (SASS).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import sass
from bench.cost import trips_of
from bench.programs import AMD, Arch, Program
from flap_kernels.launch import interpreted

_HMMA = (r"HMMA\b", "HMMA")
_TENSOR_CORE: dict[int, tuple[str, str]] = {
    80: _HMMA,
    86: _HMMA,
    89: _HMMA,
    90: (r"HGMMA\b", "HGMMA"),
    100: (r"UTC\w*MMA\b", "UTC*MMA"),
    120: _HMMA,
    AMD: (r"v_s?mfma", "MFMA"),
}
TENSOR_CORE = {arch: name for arch, (_, name) in _TENSOR_CORE.items()}
"""The instruction that multiplies matrices at a chip's full rate; HGMMA is a warp group's."""

_PATTERNS = {
    "async_copies": r"LDGSTS\b",
    "bulk_copies": r"(UTMALDG|UTMASTG|UTMAREDG|UBLKCP)\b",
    "local_memory": r"(LDL|STL)\b",
}


@dataclass(frozen=True)
class MachineCode:
    """Resources of one program on one chip."""

    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread: what did not fit in registers."""
    shared_bytes: int
    """Of a block, without the 1 KiB that the system keeps from sm_90 on."""
    tensor_core: int
    """Instructions of the chip's `TENSOR_CORE`."""
    local_memory: int
    """Loads and stores of the stack."""
    instructions: int
    tensor_memory_columns: int = 0
    """Of a block, on sm_100."""
    async_copies: int = 0
    """cp.async: from global to shared memory, past the registers."""
    bulk_copies: int = 0
    """Of the copy engine, TMA."""
    executed: sass.Path | None = None
    """What a warp executes; None for AMD's."""


def compiled(program: Program, arch: Arch) -> MachineCode:
    """Compile for a chip; raises errors of Triton and ptxas, and RuntimeError if interpreted."""
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET must be unset: interpreted kernels do not compile")
    signature, constants, attributes = specialised(program)
    kernel = triton.compile(
        ASTSource(program.kernel, signature, constants, attributes),
        target=target(arch),
        options={"num_warps": program.num_warps, "num_stages": program.num_stages},
    )
    if arch == AMD:
        counts = amd_counts_of(kernel.asm["amdgcn"])
        return MachineCode(**counts, shared_bytes=kernel.metadata.shared, executed=None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources, printed = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    return MachineCode(
        **resources_of(resources),
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=getattr(kernel.metadata, "tmem_size", 0) or 0,
        **instructions_of(printed, arch),
        executed=sass.path(sass.parsed(printed), partial(trips_of, program)),
    )


def target(arch: Arch) -> GPUTarget:
    """Triton's name for a chip."""
    return GPUTarget("hip", "gfx942", 64) if arch == AMD else GPUTarget("cuda", arch, 32)


def amd_counts_of(assembly: str) -> dict[str, int]:
    """Registers, spills and instructions, from AMD's assembly of one kernel."""
    found = {
        name: re.search(rf"\.{name}:\s+(\d+)", assembly)
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    numbers = {name: int(match[1]) for name, match in found.items() if match}
    if len(numbers) != len(found):
        raise ValueError(f"AMD's assembly must name registers and spills, got {assembly[:200]!r}")
    opcodes = Counter(re.findall(r"^\s+([a-z]\w+)", assembly, re.MULTILINE))
    return {
        "registers": numbers["vgpr_count"],
        "stack_bytes": 4 * numbers["vgpr_spill_count"],
        "tensor_core": _matching(opcodes, _TENSOR_CORE[AMD][0]),
        "local_memory": _matching(opcodes, r"scratch_(load|store)"),
        "instructions": opcodes.total(),
    }


def _matching(opcodes: Counter[str], pattern: str) -> int:
    return sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))


def specialised(program: Program) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and attributes that Triton's launcher would derive from the arguments.

    It takes an integer of 1 for a constant, and notes which integers are multiples of 16 and which
    pointers are aligned to 16 bytes: those of whole tensors are.
    """
    signature, constants, attributes = {}, {}, {}
    divisible = [["tt.divisibility", 16]]
    for i, parameter in enumerate(program.kernel.params):
        name, key = parameter.name, (i,)
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[key] = program.constants.get(name, parameter.default)
            continue
        value = program.signature[name]
        if value == 1 and not parameter.do_not_specialize:
            signature[name], constants[key] = "constexpr", 1
            continue
        whole = isinstance(value, int)
        signature[name] = ("i32" if abs(value) < 1 << 31 else "i64") if whole else value
        aligned = value % 16 == 0 if whole else value.startswith("*")
        if aligned and not parameter.do_not_specialize:
            attributes[key] = divisible
    unknown = (program.signature.keys() | program.constants.keys()) - signature.keys()
    if unknown:
        raise ValueError(f"{program.name} has no arguments named {', '.join(sorted(unknown))}")
    return signature, constants, attributes


def resources_of(printed: str) -> dict[str, int]:
    """Registers and stack, from what `cuobjdump -res-usage` prints of one kernel."""
    found = re.findall(r"REG:(\d+) STACK:(\d+)", printed)
    if len(found) != 1:
        raise ValueError(f"cuobjdump must list one kernel's registers, got {printed!r}")
    return {"registers": int(found[0][0]), "stack_bytes": int(found[0][1])}


def instructions_of(printed: str, arch: Arch) -> dict[str, int]:
    """Counts of instructions, from what `cuobjdump -sass` prints."""
    # /*0a30*/   @!UP0 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;   /* 0x... */
    line = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    opcodes = Counter(re.findall(line, printed, re.MULTILINE))
    if not opcodes:
        raise ValueError(f"cuobjdump must print instructions, got {printed[:200]!r}")
    patterns = {"tensor_core": _TENSOR_CORE[arch][0], **_PATTERNS}
    counts = {name: _matching(opcodes, pattern) for name, pattern in patterns.items()}
    return {**counts, "instructions": opcodes.total()}


def _cuobjdump(flag: str, cubin: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool.name} {flag} failed: {done.stderr.strip()}")
    return done.stdout
