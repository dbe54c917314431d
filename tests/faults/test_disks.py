"""Disks that fill: the file is named, what was complete stays, and with room the work goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults.cases import run_cases, sampled
from tests.faults.test_kills import assert_same
from tests.faults.test_kills import undisturbed as undisturbed
from tests.faults.works import WORKS, Inputs, run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder]).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)


def used_kib(folder: Path) -> int:
    return sum(f.stat().st_blocks for f in folder.rglob("*") if f.is_file()) // 2


@sampled(5, 50)
def test_a_disk_that_fills_is_named_and_with_room_the_outcome_is_the_undisturbed_one(
    cases, inputs: Inputs, undisturbed: Any, disk: Path, tmp_path: Path
):
    def check(draw: Random, place: Path) -> str:
        name = WORKS[int(place.name) % len(WORKS)]
        whole, _ = undisturbed(name)
        most = sum(len(data) for data in whole.values() if isinstance(data, bytes)) // 1024
        out = disk / place.name
        resize(disk, used_kib(disk) + draw.randrange(8, 2 * most + 16))
        full = run(name, inputs, out)
        if full.code:
            assert full.error == "OSError", full
            assert "\n" not in full.message, full.message
            assert str(out) in full.message, full.message
            assert "No space left" in full.message, full.message
        resize(disk, 64 * 1024)
        done = run(name, inputs, out)
        assert done.code == 0, done
        assert_same(name, out, whole)
        subprocess.run(["rm", "-r", out], check=True)
        return f"{name} {'filled it' if full.code else 'had room'}"

    run_cases("disks", cases, check, tmp_path)
