"""Counts the instructions that a warp executes, from NVIDIA's machine code (SASS).

The path is the shortest one from entry to exit that enters every loop which does work: what it
leaves out are branches for tiles on an edge or a diagonal, retries and subroutines. A loop does
work if it holds tensor-core instructions, or, in a program that has none in loops, a multiply-add,
a comparison or an access to global memory.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

# /*0a30*/   @!UP0 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;   /* 0x... */
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);", re.MULTILINE
)
_TENSOR = re.compile(r"HMMA|HGMMA|UTC\w*MMA|QMMA|IMMA")
_WORK = re.compile(r"FFMA|ISETP|LDG|STG|UTMALDG")

CLASSES: dict[str, str] = {
    "tensor": r"HMMA|HGMMA|UTC\w*MMA|QMMA|IMMA",
    "mufu": r"MUFU",
    "shuffles": r"SHFL|REDUX|CREDUX",
    "barriers": r"BAR|SYNCS|WARPSYNC|DEPBAR|LDGDEPBAR|WARPGROUP|UTCBAR|ARRIVES",
    "shared": r"LDS|LDSM|STS|STSM",
    "global_copies": r"LDGSTS|UTMALDG|UTMASTG|UBLKCP",
    "global_loads": r"LDG",
    "global_stores": r"STG",
    "fp32": r"FFMA\d?|FADD\d?|FMUL\d?|FMNMX\d?|FSEL|FSETP",
}
"""Classes of instructions by opcode; what is in none is `other`."""

_LANES = 32


@dataclass(frozen=True)
class Instruction:
    predicate: str
    opcode: str
    operands: str
    target: int | None = None
    """The index that a branch goes to."""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def bytes_of_warp(self) -> int:
        """What a load or store of shared or global memory moves for a warp."""
        if self.name in ("LDSM", "STSM"):
            return 128 * int((re.search(r"\.([124])$", self.opcode) or [0, "1"])[1])
        width = re.search(r"\.[US]?(8|16|64|128|256)(\.|$)", self.opcode)
        return _LANES * (int(width[1]) // 8 if width else 4)


@dataclass(frozen=True)
class Counts:
    """Instructions that a warp executes."""

    classes: Counter[str] = field(default_factory=Counter)
    bytes_moved: Counter[str] = field(default_factory=Counter)
    """Of a warp, by class, of the accesses to memory."""
    widths: Counter[str] = field(default_factory=Counter)
    """Accesses of global memory, by class and bits of a thread."""
    tensor_flops: int = 0
    """Of a warp; 0 for tcgen05, whose instructions do not name their shape."""
    fma_flops: int = 0
    """Of a warp's multiply-adds outside of tensor cores."""

    @property
    def instructions(self) -> int:
        return self.classes.total()

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.classes + other.classes,
            self.bytes_moved + other.bytes_moved,
            self.widths + other.widths,
            self.tensor_flops + other.tensor_flops,
            self.fma_flops + other.fma_flops,
        )

    def times(self, n: int) -> Counts:
        return Counts(
            *(
                Counter({name: n * x for name, x in part.items()})
                for part in (self.classes, self.bytes_moved, self.widths)
            ),
            tensor_flops=n * self.tensor_flops,
            fma_flops=n * self.fma_flops,
        )


@dataclass(frozen=True)
class Path:
    """What a warp executes of a program, in its loops and outside of them."""

    loops: Counts
    rest: Counts

    @property
    def tensor_instructions(self) -> int:
        """Of any kind."""
        return (self.loops + self.rest).classes["tensor"]


def parsed(printed: str) -> list[Instruction]:
    """The instructions that `cuobjdump -sass` prints."""
    lines = _LINE.findall(printed)
    index = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    found = []
    for _, predicate, opcode, operands in lines:
        to = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        target = index.get(int(to[1], 16)) if to else None
        found.append(Instruction(predicate.strip(), opcode, operands, target))
    return found


def path(code: Sequence[Instruction], trips_of: Callable[[int, Counts], int]) -> Path:
    """The executed path; `trips_of` a loop's position and its counts gives its iterations."""
    loops, rest, at = [], Counts(), 0
    for position, (header, latch) in enumerate(_outermost(_loops(code))):
        rest += counted(_shortest(code, at, header)[:-1], code)
        body = counted(_shortest(code, header, latch), code)
        loops.append(body.times(trips_of(position, body)))
        at = latch + 1 if _falls_through(code[latch]) else header
    rest += counted(_shortest(code, at, None), code)
    return Path(sum(loops, Counts()), rest)


def counted(indices: Iterable[int], code: Sequence[Instruction]) -> Counts:
    """The counts of these instructions."""
    classes, moved, widths = Counter(), Counter(), Counter()
    tensor_flops = fma_flops = 0
    for i in indices:
        one = code[i]
        name = next((n for n, p in CLASSES.items() if re.fullmatch(p, one.name)), "other")
        classes[name] += 1
        if name in ("shared", "global_copies", "global_loads", "global_stores"):
            moved[name] += one.bytes_of_warp
        if name.startswith("global"):
            widths[f"{name} {one.bytes_of_warp * 8 // _LANES}"] += 1
        tensor_flops += _tensor_flops(one)
        fma_flops += 2 * _LANES * {"FFMA": 1, "FFMA2": 2}.get(one.name, 0)
    return Counts(classes, moved, widths, tensor_flops, fma_flops)


def _tensor_flops(one: Instruction) -> int:
    if shape := re.match(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", one.opcode):
        rows, columns, depth = map(int, shape.groups())
        return 2 * rows * columns * depth // 4
    if shape := re.match(r"HMMA\.(16)(8)(\d+)", one.opcode):
        rows, columns, depth = map(int, shape.groups())
        return 2 * rows * columns * depth
    return 0


def _falls_through(one: Instruction) -> bool:
    """Whether the next instruction may follow this one."""
    if one.name in ("EXIT", "RET"):
        return bool(one.predicate)
    plain = one.name == "BRA" and one.operands.lstrip().startswith("0x")
    return bool(one.predicate) or not plain or one.opcode.startswith("BRA.DIV")


def _loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last instruction of each loop that does work."""
    back = [(x.target, i) for i, x in enumerate(code) if x.target is not None and x.target < i]
    for work in (_TENSOR, _WORK):
        found = [
            (first, last)
            for first, last in back
            if any(work.match(one.name) for one in code[first:last])
            and _shortest(code, 0, first)
            and _shortest(code, first, last)
        ]
        if found:
            return sorted(found)
    return []


def _outermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [
        (first, last)
        for first, last in loops
        if not any((f, e) != (first, last) and f <= first and last <= e for f, e in loops)
    ]


def _shortest(code: Sequence[Instruction], start: int, stop: int | None) -> list[int]:
    """Indices on the shortest way, both ends included; [] if there is none.

    Without a stop, to the exit.
    """
    best, before, heap = {start: 1}, {start: -1}, [(1, start)]
    while heap:
        steps, i = heapq.heappop(heap)
        if steps > best[i]:
            continue
        if i == stop or (stop is None and code[i].name == "EXIT"):
            found = [i]
            while before[found[-1]] >= 0:
                found.append(before[found[-1]])
            return found[::-1]
        one = code[i]
        follow = [i + 1] if _falls_through(one) and i + 1 < len(code) else []
        if one.target is not None and not one.opcode.startswith("BRA.DIV"):
            follow.append(one.target)
        for n in follow:
            if steps + 1 < best.get(n, 1 << 30):
                best[n], before[n] = steps + 1, i
                heapq.heappush(heap, (steps + 1, n))
    return []
