"""Compiles a Triton program for a GPU, present or not, and reads what its machine code uses.

`cuobjdump`, which ships inside Triton, prints registers, stack and the instructions (SASS).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.programs import Arch, Program
from flap_kernels.launch import interpreted

TENSOR_CORE: dict[int, str] = {80: "HMMA", 90: "HGMMA", 100: "UTC*MMA"}
"""The instruction that multiplies matrices at a chip's full rate; HGMMA is a warp group's."""

_PATTERNS = {
    "tensor_core": {80: r"HMMA\b", 90: r"HGMMA\b", 100: r"UTC\w*MMA\b"},
    "async_copies": dict.fromkeys(TENSOR_CORE, r"LDGSTS\b"),
    "bulk_copies": dict.fromkeys(TENSOR_CORE, r"(UTMALDG|UTMASTG|UTMAREDG|UBLKCP)\b"),
    "local_memory": dict.fromkeys(TENSOR_CORE, r"(LDL|STL)\b"),
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
    tensor_memory_columns: int
    """Of a block, on sm_100."""
    tensor_core: int
    """Instructions of the chip's `TENSOR_CORE`."""
    async_copies: int
    """cp.async: from global to shared memory, past the registers."""
    bulk_copies: int
    """Of the copy engine, TMA."""
    local_memory: int
    """Loads and stores of the stack."""
    instructions: int


def compiled(program: Program, arch: Arch) -> MachineCode:
    """Compile for a chip; raises errors of Triton and ptxas, and RuntimeError if interpreted."""
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET must be unset: interpreted kernels do not compile")
    signature, constants, attributes = specialised(program)
    kernel = triton.compile(
        ASTSource(program.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": program.num_warps, "num_stages": program.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources, sass = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    return MachineCode(
        **resources_of(resources),
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=getattr(kernel.metadata, "tmem_size", 0) or 0,
        **instructions_of(sass, arch),
    )


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
    counts = {
        name: sum(n for opcode, n in opcodes.items() if re.match(by_chip[arch], opcode))
        for name, by_chip in _PATTERNS.items()
    }
    return {**counts, "instructions": opcodes.total()}


def _cuobjdump(flag: str, cubin: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool.name} {flag} failed: {done.stderr.strip()}")
    return done.stdout
