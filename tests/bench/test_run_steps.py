"""`make gpu` keeps its time, whatever its steps do, and what was done by then is in the file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_tests, plan, records, run_steps
from bench.machine import ROOT, save
from bench.plan import GpuTests, Program, Step, Sweep
from bench.tasks import Task

FACTS = {"device": "a CPU", "commit": "0", "date": "2026-01-01T00:00:00Z", "dirty": False}

# Each appends a line first. `spins` starts another process as well, and both ignore signals.
MODULES = {
    "works": "",
    "spins": """
import os, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
append(sys.argv[-1], child=child.pid)
while True: pass
""",
    "sleeps": "import time; time.sleep(600)",
    "fails": "sys.exit('no such device')",
}
# Ends once the run that started it was killed.
SILENT = """
import os, time
parent = os.getppid()
while os.getppid() == parent != 1: time.sleep(0.1)
"""
FIRST = """
import sys
from bench.records import append
append(sys.argv[-1], seen=[__spec__.name])
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(FIRST + text)
    (folder / "silent.py").write_text(SILENT)
    found = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    monkeypatch.setenv("PYTHONPATH", found)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def step(name: str, estimate_s: float = 0.1, limit_s: float = 60.0, **options: Any) -> Step:
    return Step(name, Program(name, **options), estimate_s, limit_s)


def begun(folder: Path, seconds: float) -> run_steps.Run:
    result: dict[str, Any] = {"kind": "sweep", "machine": FACTS, "steps": [], "rows": []}
    result["gpu_tests"] = {"status": "not run", "reason": "not reached"}
    return run_steps.Run(
        "cpu", time.monotonic() + seconds, 0.1, 1.0, (), result, lambda: save(folder, result)
    )


def written(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "results").iterdir()
    return json.loads(file.read_text())


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {record["step"]: record["status"] for record in result["steps"]}


def is_gone(pid: int) -> bool:
    """Whether a process has ended, which takes the system a moment after the kill."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_step_that_spins_is_cut_with_its_children_and_the_file_has_what_was_done(tmp_path: Path):
    run = begun(tmp_path, 7.0)
    since = time.monotonic()
    run_steps.run_steps([step("works"), step("spins"), step("fails", estimate_s=20)], run)
    assert time.monotonic() - since < 7.0 + 4.0
    found = written(tmp_path)
    assert statuses(found) == {"works": "done", "spins": "cut off", "fails": "not reached"}
    assert found["seen"] == ["works", "spins"]
    assert is_gone(found["child"])


def test_a_step_takes_no_more_than_its_limit_and_the_next_begins(tmp_path: Path):
    run = begun(tmp_path, 60.0)
    run_steps.run_steps([step("sleeps", limit_s=0.2), step("fails"), step("works")], run)
    found = written(tmp_path)
    assert statuses(found) == {"sleeps": "cut off", "fails": "failed", "works": "done"}
    assert found["steps"][1]["reason"] == "no such device"
    assert found["steps"][0]["seconds"] < 5


def test_a_short_step_begins_where_a_long_one_would_not(tmp_path: Path):
    run = begun(tmp_path, 20.0)
    run_steps.run_steps([step("sleeps", estimate_s=100), step("works")], run)
    assert statuses(written(tmp_path)) == {"sleeps": "not reached", "works": "done"}


def test_what_is_not_installed_is_skipped_and_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_steps, "any_installed", lambda: False)
    peers = Step("peers", Sweep((Task("infonce", 8),), peers=True), 0.1, 60)
    run = begun(tmp_path, 60.0)
    run_steps.run_steps([peers, step("works", needs=("no_such_module",))], run)
    assert [(r["status"], r["reason"]) for r in written(tmp_path)["steps"]] == [
        ("skipped", "no peer is installed"),
        ("skipped", "needs no_such_module"),
    ]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch):
    """bench.gpu with a plan of this file's modules."""
    steps = [
        Step("contract tests", GpuTests(()), 0, 10),
        step("works"),
        step("spins"),
        step("fails"),
    ]
    monkeypatch.setattr(plan, "plan", lambda device, *, quick: steps)
    return steps


SMALL = ["--device", "cpu", "--quick"]


def test_a_run_ends_within_20_s_of_its_minutes(tmp_path: Path, planned):
    since = time.monotonic()
    gpu.main([*SMALL, "--minutes", str(6 / 60), "--out", str(tmp_path)])
    assert 6 <= time.monotonic() - since < 6 + 20
    (file,) = (tmp_path / "results").glob("*.json")
    found = json.loads(file.read_text())
    assert statuses(found)["works"] == "done"
    assert statuses(found)["spins"] == "cut off"
    assert statuses(found)["fails"] == "not reached"
    assert "- spins: cut off" in (tmp_path / "RESULTS.md").read_text()


def test_a_resumed_run_repeats_no_step_that_is_done(tmp_path: Path, planned):
    arguments = [*SMALL, "--minutes", str(6 / 60), "--out", str(tmp_path)]
    gpu.main(arguments)
    planned[2:] = [step("sleeps", limit_s=0.2), step("fails")]
    gpu.main([*arguments, "--resume"])
    (file,) = (tmp_path / "results").glob("*.json")
    found = json.loads(file.read_text())
    assert found["seen"].count("works") == 1
    assert statuses(found)["fails"] == "failed"


KILLED = """
from bench import gpu, plan
from bench.plan import Program, Step
steps = [Step(name, Program(name), 0.1, 600) for name in ("works", "silent", "fails")]
plan.plan = lambda device, *, quick: steps
gpu.main({arguments})
"""


def test_a_killed_run_leaves_what_was_done_and_says_where_it_ended(tmp_path: Path):
    code = KILLED.format(arguments=[*SMALL, "--out", str(tmp_path)])
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        files: list[Path] = []
        try:
            results = tmp_path / "results"
            for _ in range(600):
                time.sleep(0.1)
                files = list(results.glob("*.json"))
                if files and statuses(json.loads(files[0].read_text()))["silent"] == "cut off":
                    break
        finally:
            process.send_signal(signal.SIGKILL)
    (file,) = files
    found = json.loads(file.read_text())
    assert statuses(found) == {"works": "done", "silent": "cut off", "fails": "not reached"}
    assert found["steps"][1]["reason"] == "the run ended in it"


def test_a_call_that_nothing_interrupts_ends_the_run_all_the_same():
    code = (
        "import time\nfrom bench.deadline import last_resort\n"
        "with last_resort(time.monotonic() + 0.5, lambda: print('saved', flush=True)):\n"
        "    while True: pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "saved\n")


def test_lines_of_a_step_add_to_lists_and_rows_of_one_size_stay_together():
    result: dict[str, Any] = {}
    records.merge(result, {"tiles": [1], "figures": {"a": 1}})
    records.merge(result, {"tiles": [2], "figures": {"b": 2}, "child": 7})
    assert result == {"tiles": [1, 2], "figures": {"a": 1, "b": 2}, "child": 7}
    rows = [{"op": "infonce", "B": B, "provider": name} for B in (1, 2) for name in ("ours", "x")]
    records.merge_rows(result, rows)
    again = [{"op": "infonce", "B": 1, "provider": name} for name in ("ours", "peer")]
    records.merge_rows(result, again)
    assert result["rows"] == [*rows[2:], *again]


@pytest.mark.parametrize("quick", [False, True])
def test_the_plan_has_the_tests_first_and_fits_its_time(quick: bool):
    steps = plan.plan("cuda", quick=quick)
    assert isinstance(steps[0].work, GpuTests)
    assert isinstance(steps[2].work, Sweep)
    assert steps[2].work.tasks[0] == Task("infonce", 65_536)
    assert sum(s.estimate_s for s in steps) <= 60 * gpu._LIMITS[quick][0]
    assert all(0 < s.estimate_s <= s.limit_s for s in steps)
    assert len({s.name for s in steps}) == len(steps)


def test_every_path_and_module_of_the_plan_is_there():
    for each in plan.plan("cuda", quick=False):
        if isinstance(each.work, GpuTests):
            assert all((ROOT / path).exists() for path in each.work.paths)
        elif isinstance(each.work, Program):
            assert (ROOT / f"{each.work.module.replace('.', '/')}.py").is_file()


def test_steps_and_ops_can_be_chosen():
    steps = plan.plan("cuda", quick=False)
    chosen = plan.only(steps, ops=(), names=("tiles",))
    assert [s.name for s in chosen[2:]] == ["tiles and library products"]
    ops = plan.only(steps, ops=("sigmoid_loss",), names=())
    works = [s.work for s in ops[2:]]
    assert works == [Sweep((Task("sigmoid_loss", 65_536),))]


def test_another_red_test_voids_the_times_and_an_unfinished_one_does_not():
    green = {"status": "passed", "passed": 3, "failed": 0, "skipped": 0}
    late = green | {"status": "not finished"}
    red = green | {"status": "failed", "failed": 1}
    assert not gpu_tests.voids({"gpu_tests": green, "more_tests": {"a": late}})
    assert gpu_tests.voids({"gpu_tests": green, "more_tests": {"a": green, "b": red}})
    assert gpu_tests.voids({"gpu_tests": late})
