"""The compile report: what it reads from cuobjdump, what it calls a fault, whom it believes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="the report needs Triton")

from bench import static
from bench.machine_code import (
    MachineCode,
    amd_counts_of,
    instructions_of,
    resources_of,
    specialised,
)
from bench.programs import AMD, ARCHES, PAPER, Program
from flap_kernels import KERNELS

ROOT = Path(__file__).parents[2]

RESOURCES = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function dlogits_kernel:
  REG:230 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:664 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
\tFunction : dlogits_kernel
.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ; /* 0x000 */
 /* 0x000 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R5], [R2.64] ; /* 0x000 */
        /*0020*/             @!UP0 UTMALDG.2D [UR8], [UR4] ; /* 0x000 */
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ; /* 0x03e */
        /*0040*/              @UP1 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ; /* 0x03e */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ; /* 0x000 */
        /*0060*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ; /* 0x000 */
        /*0070*/                   UTCBAR [UR4], URZ ; /* 0x000 */
        /*0080*/                   STL.64 [R1+0x8], R22 ; /* 0x000 */
        /*0090*/               @P3 LDL.LU R22, [R1+0x8] ; /* 0x000 */
"""


def test_registers_and_stack_are_read():
    assert resources_of(RESOURCES) == {"registers": 230, "stack_bytes": 16}


@pytest.mark.parametrize("printed", ["", RESOURCES + RESOURCES], ids=["none", "two"])
def test_a_listing_that_is_not_of_one_kernel_is_refused(printed):
    with pytest.raises(ValueError, match="one kernel's registers"):
        resources_of(printed)


@pytest.mark.parametrize(("arch", "tensor_core"), [(80, 1), (86, 1), (90, 2), (100, 1), (120, 1)])
def test_instructions_are_counted_by_kind(arch, tensor_core):
    assert instructions_of(SASS, arch) == {
        "tensor_core": tensor_core,
        "async_copies": 1,
        "bulk_copies": 1,
        "local_memory": 2,
        "instructions": 10,
    }


def test_registers_and_spills_of_amd_are_read():
    printed = """
        global_load_dwordx4 v[0:3], v[4:5], off
        v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
        scratch_store_dword off, v0, s0
        .sgpr_spill_count: 0
        .vgpr_count:     128
        .vgpr_spill_count: 3
    """
    assert amd_counts_of(printed) == {
        "registers": 128,
        "stack_bytes": 12,
        "tensor_core": 1,
        "local_memory": 1,
        "instructions": 3,
    }
    with pytest.raises(ValueError, match="must name registers and spills"):
        amd_counts_of("")


def test_a_listing_without_instructions_is_refused():
    with pytest.raises(ValueError, match="must print instructions"):
        instructions_of("cuobjdump info : File 'x' does not contain device code", 90)


def parameter(name: str, **flags: Any) -> SimpleNamespace:
    plain = {"is_constexpr": False, "do_not_specialize": False, "default": None}
    return SimpleNamespace(name=name, **(plain | flags))


def program(**changes: Any) -> Program:
    """A made-up program of a made-up kernel."""
    kernel = SimpleNamespace(
        params=[
            parameter("x_ptr"),
            parameter("N"),
            parameter("K"),
            parameter("stride_n"),
            parameter("far"),
            parameter("scale"),
            parameter("key", do_not_specialize=True),
            parameter("BLOCK", is_constexpr=True),
            parameter("EPS", is_constexpr=True, default=0.5),
        ]
    )
    signature = {"x_ptr": "*bf16", "N": 512, "K": 306, "stride_n": 1, "far": 1 << 31}
    signature |= {"scale": "fp32", "key": "i64"}
    made: dict[str, Any] = {"signature": signature, "constants": {"BLOCK": 64}} | changes
    return Program(name="made_up", kernel=kernel, **made)


def test_arguments_are_specialised_as_a_launch_does():
    signature, constants, attributes = specialised(program())
    assert signature == {
        "x_ptr": "*bf16",
        "N": "i32",
        "K": "i32",
        "stride_n": "constexpr",
        "far": "i64",
        "scale": "fp32",
        "key": "i64",
        "BLOCK": "constexpr",
        "EPS": "constexpr",
    }
    assert constants == {(3,): 1, (7,): 64, (8,): 0.5}
    assert attributes.keys() == {(0,), (1,), (4,)}  # the pointer, 512 and 2**31


def test_a_program_with_an_argument_too_many_is_refused():
    with pytest.raises(ValueError, match="no arguments named BLOCK_N"):
        specialised(program(constants={"BLOCK": 64, "BLOCK_N": 64}))


CODE = MachineCode(
    registers=255,
    stack_bytes=0,
    shared_bytes=163 * 1024,
    tensor_memory_columns=512,
    tensor_core=4,
    async_copies=24,
    bulk_copies=0,
    local_memory=0,
    instructions=3000,
)
ROW = static.Row(
    kernel="infonce",
    program="infonce_dlogits",
    arch=80,
    tile="128x128x64 w8 s3",
    num_warps=8,
    matrix_product=True,
    small_tile=False,
    bytes_moved=52e6,
    flops=21.7e9,
    code=CODE,
)


def test_a_row_at_every_limit_is_no_fault():
    assert ROW.faults == []
    assert replace(ROW, arch=90, code=replace(CODE, shared_bytes=227 * 1024)).faults == []
    assert replace(ROW, matrix_product=False, code=replace(CODE, tensor_core=0)).faults == []


@pytest.mark.parametrize(
    ("arch", "changes", "says"),
    [
        (80, {"stack_bytes": 8}, "spills: 8 bytes of stack"),
        (80, {"local_memory": 2}, "spills: 0 bytes of stack, 2 loads and stores"),
        (80, {"tensor_core": 0}, "has no HMMA"),
        (90, {"tensor_core": 0}, "has no HGMMA"),
        (100, {"tensor_core": 0}, "has no UTC*MMA"),
        (80, {"shared_bytes": 163 * 1024 + 1}, "takes 166913 bytes of shared memory"),
        (86, {"shared_bytes": 99 * 1024 + 1}, "takes 101377 bytes of shared memory"),
        (120, {"shared_bytes": 104 * 1024}, "takes 106496 bytes of shared memory"),
        (90, {"shared_bytes": 227 * 1024 + 1}, "takes 232449 bytes of shared memory"),
        (100, {"shared_bytes": 227 * 1024 + 1}, "takes 232449 bytes of shared memory"),
        (100, {"tensor_memory_columns": 513}, "takes 513 columns of tensor memory"),
    ],
)
def test_a_row_over_one_limit_is_one_fault(arch, changes, says):
    fitting = {"shared_bytes": 0} if arch in (86, 120) else {}
    row = replace(ROW, arch=arch, code=replace(CODE, **(fitting | changes)))
    (fault,) = row.faults
    assert says in fault


def test_a_program_that_does_not_compile_is_a_fault():
    row = replace(ROW, code=None, error="PTXASError: out of patience")
    assert row.faults == ["does not compile: PTXASError: out of patience"]
    assert "PTXASError: out of patience" in static.report([row])


def test_blocks_of_a_multiprocessor_are_bound_by_what_runs_out_first():
    small = replace(CODE, registers=64, shared_bytes=0, tensor_memory_columns=0)
    for code, resident in (
        (replace(small, registers=65), 3),  # 72 of 256 threads: 18,432 of 65,536
        (replace(small, registers=16), 8),  # 2,048 threads
        (replace(small, shared_bytes=81 * 1024), 2),  # two of 82 KiB in 164
        (replace(small, tensor_memory_columns=256), 2),
    ):
        assert replace(ROW, code=code).resident == resident


def test_the_report_ends_with_faults_and_verdict():
    spilt = replace(ROW, code=replace(CODE, stack_bytes=8, tensor_core=0))
    *_, first, second, verdict = static.report([ROW, spilt]).splitlines()
    assert first.startswith("FAULT infonce_dlogits on sm_80 spills")
    assert second.startswith("FAULT infonce_dlogits on sm_80 has no HMMA")
    assert verdict == "static: 2 programs, 2 faults"
    assert static.report([ROW]).splitlines()[-1] == "static: 1 program, 0 faults"


def test_the_exit_status_tells_of_faults(monkeypatch, capsys):
    for code, status in ((CODE, 0), (replace(CODE, stack_bytes=8), 1)):
        monkeypatch.setattr(static, "rows", lambda *_, code=code, **__: [replace(ROW, code=code)])
        assert static.main([]) == status
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert static.main([]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().out


def test_every_kernel_has_its_programs():
    """A kernel without a file in bench/programs would be neither compiled nor timed."""
    assert PAPER.keys() == KERNELS.keys()
    for name in PAPER:
        names = {arch: [p.name for p in static.programs(name, arch)] for arch in ARCHES}
        assert all(found and len(found) == len(set(found)) for found in names.values()), name


def test_infonce_takes_its_tiles_on_hopper():
    programs = {p.name: p for p in PAPER["infonce"].programs(90)}
    for name, columns, warps in (("lse_negatives", 128, 4), ("dlogits", 256, 8)):
        program = programs[f"infonce_{name}"]
        assert (program.constants["BLOCK_M"], program.constants["BLOCK_N"]) == (128, columns)
        assert program.num_warps == warps
        assert program.matrix_product


def compiling(*command: str) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: here the kernels are interpreted."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def test_a_kernel_is_compiled_and_reported(tmp_path):
    file = tmp_path / "static.json"
    chosen = ("--kernel", "gather_tokens", "--arch", "80", "--paper", "--json", str(file))
    done = compiling("-m", "bench.static", *chosen)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "static: 4 programs, 0 faults"
    found = json.loads(file.read_text())["rows"]
    assert [(row["program"], row["arch"]) for row in found] == [
        ("gather_tokens", 80),
        ("scatter_tokens", 80),
        ("gather_tokens_bf16", 80),
        ("scatter_tokens_bf16", 80),
    ]
    for row in found:
        assert 16 < row["code"]["registers"] < 128
        assert row["code"]["instructions"] > 100
        assert row["faults"] == []
        assert 0 < row["prediction"]["ceiling"] <= 1


@pytest.mark.parametrize("arch", ["86", str(AMD)])
def test_patch_embed_fits_on_the_cards_with_least_shared_memory(arch):
    """With one tile for all it took 104 KiB in tf32 on sm_86, of 99, and spilt in float32."""
    done = compiling("-m", "bench.static", "--kernel", "patch_embed", "--arch", arch, "--paper")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "static: 5 programs, 0 faults"


def test_programs_that_triton_would_not_tell_apart_are_compiled_once():
    listed = """if True:
        from bench import static
        names = {p.name for p in static.programs("infonce", 90)}
        compiled = static._compilations(["infonce"], [90], False)
        print(*sorted(names - {name for _, name, _ in compiled}))
    """
    done = compiling("-c", listed)
    assert done.returncode == 0, done.stderr
    left_out = done.stdout.split()
    assert {"large_infonce_dlogits", "large_infonce_lse_negatives"} <= set(left_out)
    assert "odd_infonce_dlogits" not in left_out


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    """By chip: each kernel's programs, and what its op launches there, as Triton sees both."""
    done = compiling("tests/bench/launches.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", [arch for arch in ARCHES if arch != AMD])
def test_each_program_is_a_launch_of_its_op(arch, compared):
    """In types, alignment, constants, sizes, warps and stages, in the tile of that chip."""
    found = compared[str(arch)]
    assert found["programs"].keys() == KERNELS.keys()
    for kernel, programs in found["programs"].items():
        missing = [name for name, said in programs.items() if said not in found["launches"][kernel]]
        assert not missing, f"not launched on sm_{arch}: {missing}"


@pytest.mark.parametrize("arch", [arch for arch in ARCHES if arch != AMD])
def test_each_kernel_that_an_op_launches_is_in_the_report(arch, compared):
    found = compared[str(arch)]
    said = {p["kernel"] for programs in found["programs"].values() for p in programs.values()}
    launched = {x["kernel"] for launches in found["launches"].values() for x in launches}
    assert launched == said
