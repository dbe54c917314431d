"""Killed anywhere and gone on with: the outcome is that of a work that nothing disturbed."""

from __future__ import annotations

import shutil
import signal
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults.cases import assert_sentence, run_cases, sampled
from tests.faults.works import WORKS, Ended, Inputs, ended, outcome, run, start, work


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By a work's name: its outcome, and how many times it touches its files."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def found(name: str) -> tuple[dict[str, Any], int]:
        out = folder / name
        done = run(name, inputs, out, watch=watched(name, out))
        assert done.code == 0, done
        assert done.events > 10
        return outcome(name, out), done.events

    return found


def watched(name: str, out: Path) -> Path:
    """The folder whose files count: of `save`, only the checkpoints."""
    return out / "flap/checkpoints" if name == "save" else out


def assert_same(name: str, out: Path, whole: dict[str, Any]) -> None:
    """Fail where an outcome is not the undisturbed one."""
    found = outcome(name, out)
    left = {file for file in found.keys() - whole.keys() if file.endswith(".part")}
    assert found.keys() - left == whole.keys(), sorted(found.keys() ^ whole.keys())
    other = [file for file in whole if found[file] != whole[file]]
    assert not other, f"not as undisturbed: {other}"


@sampled(5, 100)
def test_killed_anywhere_the_outcome_is_the_undisturbed_one(
    cases, inputs: Inputs, undisturbed: Any, tmp_path: Path
):
    def check(draw: Random, place: Path) -> str:
        name = WORKS[int(place.name) % len(WORKS)]
        whole, events = undisturbed(name)
        out = place / "out"
        kills = draw.choice((1, 1, 2))
        for _ in range(kills):
            killed = run(
                name, inputs, out, watch=watched(name, out), die_at=draw.randrange(1, events + 1)
            )
            # Going on touches fewer files: it may be done before.
            assert killed.code in (-signal.SIGKILL, 0), killed
        done = run(name, inputs, out)
        assert done.code == 0, done
        assert_same(name, out, whole)
        shutil.rmtree(place)
        return f"{name} killed {kills} times"

    run_cases("kills", cases, check, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["prepare", "train", *(pytest.param(name, marks=pytest.mark.slow) for name in WORKS[1:3])],
)
def test_two_writers_in_one_folder_finish_it_or_one_is_refused(
    name: str, inputs: Inputs, undisturbed: Any, tmp_path: Path
):
    whole, _ = undisturbed(name)
    out = tmp_path / "out"
    both = [start(work, out, name, inputs, out) for _ in range(2)]
    found = [ended(process) for process in both]
    assert 0 in [one.code for one in found], found
    for one in found:
        assert_done_or_refused(one, out)
    assert_same(name, out, whole)


def assert_done_or_refused(one: Ended, out: Path) -> None:
    """Fail unless a process ended well, or with a sentence that names its folder."""
    if one.code:
        assert one.error in ("ConfigError", "ManifestError", "ShardError"), one
        assert_sentence(Exception(one.message), str(out), "run.name")
