"""Shared memory of GPUs, by compute capability: what a kernel's tile must fit in.

A GPU is written as `launch.capability` writes it: 90 for NVIDIA's compute capability 9.0, 942 for
AMD's gfx942, 0 for the interpreter.
"""

from __future__ import annotations

KIB = 1024
INTERPRETER, AMD = 0, 942

SHARED_BYTES: dict[int, int] = {
    INTERPRETER: 227 * KIB,
    75: 64 * KIB,
    80: 163 * KIB,
    86: 99 * KIB,
    87: 163 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    103: 227 * KIB,
    110: 227 * KIB,
    120: 99 * KIB,
    121: 99 * KIB,
    AMD: 64 * KIB,
}
"""The most shared memory that a block may have. Source: CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"; AMD's CDNA 3 instruction set reference, LDS."""

_LEAST_BYTES = min(SHARED_BYTES.values())


def shared_bytes(arch: int) -> int:
    """Shared memory that a block may have; on a GPU not in the table, the least of those in it."""
    return SHARED_BYTES.get(arch, _LEAST_BYTES)


def buffers(arch: int, num_stages: int) -> int:
    """How many slices of an operand a pipelined loop keeps in shared memory, as of Triton 3.8.0.

    From Hopper to Blackwell's data center GPUs a product reads its operands there while the next
    are loaded; elsewhere it has read them into registers by then.
    """
    return num_stages if 90 <= arch < 120 else max(1, num_stages - 1)
