"""Tile candidates: right ones are timed side by side, wrong ones are left out by name."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

pytest.importorskip("triton", reason="tiles are Triton's")

import torch

from bench import tile_checks, tile_profile, tiles
from bench.measure import Timing
from bench.report_gpu import gpu_sections
from bench.tile_calls import calls, candidates, named, with_tile
from flap_kernels.infonce import triton_launch
from flap_kernels.infonce.torch_tiled import TorchTiled
from flap_kernels.infonce.triton_tiles import TileShape, tile_shape

SMALL = TileShape(32, 64, 32, 1, 2, 4, 1)
KERNELS = ("sums", "dlogits", "sigmoid")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", [80, 86, 90, 120])
def test_the_tile_in_use_is_the_first_candidate(arch: int, kernel):
    found = candidates(arch, kernel)
    assert found[0] == tile_shape(arch, torch.bfloat16, "ieee", kernel)
    assert len(set(found)) == len(found) >= 3


def test_a_tile_is_that_of_its_kernel_alone():
    with with_tile("dlogits", SMALL):
        chosen = triton_launch.tile_shape
        assert chosen(90, torch.bfloat16, "ieee", "dlogits") == SMALL
        assert chosen(90, torch.bfloat16, "ieee", "sums") != SMALL
    assert triton_launch.tile_shape is tile_shape


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_candidate_is_compared_with_float64(kernel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tile_checks, "SIZE", 70)
    monkeypatch.setattr(tile_checks, "predicted", lambda *_: {"registers": 1})
    row = tile_checks.check(kernel, SMALL, 90, "cpu")
    assert (row["reason"], row["registers"]) == ("", 1)
    assert 0 < row["error"] < 1e-4
    off = tile_checks._numbers

    def wrong(kernel, call):
        return [1.1 * x if x.dtype.itemsize < 8 else x for x in off(kernel, call)]

    monkeypatch.setattr(tile_checks, "_numbers", wrong)
    assert tile_checks.check(kernel, SMALL, 90, "cpu")["reason"].startswith("wrong: 1.0e-01")
    monkeypatch.setattr(tile_checks, "_numbers", lambda *_: [torch.tensor(torch.nan)])
    assert tile_checks.check(kernel, SMALL, 90, "cpu")["reason"].startswith("wrong: ")


def test_a_candidate_that_cannot_run_or_takes_too_long_costs_itself_alone(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("there the candidate runs")
    # Not interpreted, and no GPU to compile for.
    failed = tile_checks.in_process("sums", SMALL, 90, "cpu")
    assert failed["reason"].startswith("failed: ")
    assert failed["predicted_ms"] is None
    monkeypatch.setattr(tile_checks, "LIMIT_S", 0.2)
    since = time.monotonic()
    assert tile_checks.in_process("sums", SMALL, 90, "cpu")["reason"] == "longer than 0.2 s"
    assert time.monotonic() - since < 5


def test_a_candidate_has_the_prediction_of_its_own_tile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # In a process that imports the kernels without the interpreter.
    found = subprocess.run(
        [sys.executable, "-c", PREDICTED], capture_output=True, text=True, check=True
    )
    large, small, none = json.loads(found.stdout)
    assert large["registers"] != small["registers"]
    # All launches of 65,536 rows, not one of 2,048: at least the arithmetic's 2 B B D.
    least_ms = 2 * 65_536**2 * 512 / 990e12 * 1000
    assert least_ms < large["predicted_ms"] < 20 * least_ms
    assert none == {}


PREDICTED = """
import json
from bench.tile_calls import candidates
from bench.tile_checks import predicted
first, second = candidates(90, "dlogits")[:2]
asked = (("dlogits", first), ("dlogits", second), ("sigmoid", first))
print(json.dumps([predicted(kernel, tile, 90) for kernel, tile in asked]))
"""


def test_right_candidates_are_timed_in_turns_and_wrong_ones_keep_their_reason(monkeypatch):
    asked: list[tuple[str, ...]] = []

    def timed(runs, device, *, budget_s):
        asked.append(tuple(runs))
        return {name: Timing(1.0, 0.9, 1.1, 9) for name in runs}

    monkeypatch.setattr(tiles, "interleaved", timed)
    seen = []
    first, second, third = candidates(90, "dlogits")[:3]
    checked = {
        tile: {"error": 1e-3, "registers": 2, "predicted_ms": 9.0, "reason": reason}
        for tile, reason in ((first, ""), (second, "failed: spills"), (third, ""))
    }

    def call():
        seen.append(triton_launch.tile_shape(90, torch.bfloat16, "ieee", "dlogits"))

    rows = tiles.tile_rows("dlogits", call, checked, "cpu")
    assert seen == [first, third]
    assert asked == [(named(first), named(third))]
    assert [row["in_use"] for row in rows] == [True, False, False]
    assert [row["median_ms"] for row in rows] == [1.0, None, 1.0]
    text = "\n".join(gpu_sections({"tiles": rows}))
    assert f"| dlogits | {named(first)} (in use) | 1 (0.9-1.1) | 1.0e-03 | 2 | 9 |" in text
    assert f"| dlogits | {named(second)} | failed: spills |" in text
    assert "predicted ms, not measured" in text


def test_every_workspace_is_measured_with_its_peak_memory(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = tiles.workspace_rows(64, "cpu")
    assert [row["workspace"] for row in rows] == ["default", "512 MiB", "1024 MiB"]
    assert all(row["median_ms"] > 0 for row in rows)


def test_the_launches_of_each_library_product_are_listed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = tile_profile.launches(calls(256, "cpu", backend=TorchTiled()), 256, 512, "cpu")
    assert {row["call"] for row in rows} == {"forward", "backward, dA", "backward, dT"}
    for name in ("backward, dA", "backward, dT"):
        products = [row for row in rows if row["call"] == name and row["tflops"]]
        assert len(products) == 1
        assert "mm" in products[0]["kernel"]
    assert not tile_profile._is_product("dlogits_kernel")
    assert tile_profile._is_product("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT")
