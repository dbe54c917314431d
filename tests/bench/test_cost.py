"""Counts on the executed path of machine code, and predictions from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the programs need Triton")

from bench.cost import CHIPS, predicted, trips_of
from bench.programs import PAPER
from bench.sass import CLASSES, Path, counted, parsed, path

# A prologue, a loop of two instructions and its branch, a branch around a slow part, an end.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P5 BRA 0x0050 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0040*/              @!P5 BRA 0x0020 ;
        /*0050*/               @P0 BRA P5, 0x0080 ;
        /*0060*/                   MUFU.EX2 R3, R4 ;
        /*0070*/                   MUFU.EX2 R3, R4 ;
        /*0080*/                   MUFU.EX2 R3, R4 ;
        /*0090*/                   STG.E.U16 desc[UR4][R2.64], R3 ;
        /*00a0*/                   STS.128 [R5], R4 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0x00c0 ;
"""


def test_a_loop_is_entered_and_a_slow_part_is_passed_by():
    found = path(parsed(SASS), lambda position, body: 8)
    assert found.loops.classes == {"tensor": 8, "global_copies": 8, "other": 8}
    assert found.loops.tensor_flops == 8 * 2 * 16 * 8 * 16
    assert found.rest.classes["mufu"] == 1
    assert found.rest.classes["global_stores"] == 1


def test_accesses_are_counted_by_width():
    found = path(parsed(SASS), lambda position, body: 1)
    assert found.loops.widths == {"global_copies 128": 1}
    assert found.rest.widths == {"global_stores 16": 1}
    assert found.rest.bytes_moved == {"global_stores": 64, "shared": 512}


def test_code_without_loops_is_counted_once():
    straight = "\n".join(line for line in SASS.splitlines() if "BRA" not in line)
    found = path(parsed(straight), lambda position, body: 8)
    assert found.loops.instructions == 0
    assert found.rest.instructions == 9


def test_every_class_is_an_opcode_of_its_own():
    """An instruction in two classes would be counted in the first alone."""
    opcodes = ["HGMMA", "MUFU", "SHFL", "BAR", "LDS", "LDGSTS", "LDG", "STG", "FFMA"]
    code = parsed("\n".join(f"/*{i:04x}*/ {name}.X R0 ;" for i, name in enumerate(opcodes)))
    assert counted(range(len(code)), code).classes == dict.fromkeys(CLASSES, 1)


def test_iterations_follow_from_the_arithmetic_of_the_tile():
    """Two of the source's iterations in one of the machine code's: half as many."""
    (program,) = (p for p in PAPER["infonce"].programs(90) if p.name == "infonce_dlogits")
    body = counted([2], parsed(SASS))
    program = replace(program, num_warps=1, tile_flops=6 * body.tensor_flops, trips=(12,))
    assert trips_of(program, 0, body) == 6
    assert trips_of(replace(program, tile_flops=0), 0, body) == 12


def test_a_prediction_is_no_faster_than_published_rates():
    (program,) = (p for p in PAPER["infonce"].programs(90) if p.name == "infonce_dlogits")
    executed = path(parsed(SASS), lambda position, body: 1)
    found = predicted(program, 90, executed, resident=2)
    assert found is not None
    assert found.tensor_cycles == program.tile_flops / 4096
    assert 0 < found.ceiling <= 1
    assert found.time_us >= program.bytes_moved / CHIPS[90].gb_per_s / 1e3
    assert predicted(program, 942, executed, resident=0) is None


def test_a_lone_block_takes_its_product_and_the_rest_one_after_the_other():
    (program,) = (p for p in PAPER["infonce"].programs(90) if p.name == "infonce_dlogits")
    rest = counted([2], parsed(SASS.replace("HMMA.16816.F32.BF16", "MUFU.EX2"))).times(4000)
    executed = Path(counted([], []), rest)
    alone, together = (predicted(program, 90, executed, resident=n) for n in (1, 2))
    assert alone
    assert together
    assert alone.bound == "one after the other"
    assert alone.tile_cycles == together.tile_cycles + program.tile_flops // 4096
