"""Runs the kernels' tests on a GPU, compiled: times do not count if a test fails.

They run in a process of their own, those marked `gpu`. Files that import what this
machine lacks (pydantic, say, which the trainer needs and the kernels do not) are left out by name.
"""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.deadline import in_a_group

_OURS = ("flap_fast", "flap_kernels", "tests", "bench")


def run(device: str, paths: Sequence[str], *, limit_s: float) -> dict[str, Any]:
    """Results of these files: status `passed`, `failed`, `not finished` or `not run`, and counts.

    Takes at most 3 s more than `limit_s`, in which pytest reports what it has.
    """
    if device != "cuda":
        return {"status": "not run", "reason": "no GPU; `make test` interprets the kernels"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        finished = _pytest(report, paths, limit_s)
        if not report.is_file():
            status = "failed" if finished else "not finished"
            return {"status": status, "reason": "pytest wrote no report"}
        counts = _counts(report.read_text())
        late = not finished and counts["status"] != "failed"
        return {**counts, **({"status": "not finished"} if late else {})}


def _pytest(report: Path, paths: Sequence[str], limit_s: float) -> bool:
    """Run the tests; returns whether they finished."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junit-xml={report}", "-q"]
    # Without the project's pytest options: they name plugins. What every test shares imports the
    # data's packages, which the kernels do without.
    command += ["-o", "addopts=", "-p", "no:cacheprovider"]
    if all(path.startswith("tests/kernels") for path in paths):
        command.append("--confcutdir=tests/kernels")
    command += ["--continue-on-collection-errors", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # compiling is most of it
    with in_a_group([*command, *paths]) as process:
        try:
            process.wait(limit_s)
            return True
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then writes what it has
            with suppress(subprocess.TimeoutExpired):
                process.wait(3)
            return False


def _counts(xml: str) -> dict[str, Any]:
    """Counts, names of failed tests, and skipped files with the packages that they need."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    left_out: dict[str, str] = {}
    red: list[str] = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}".strip(".")
        trouble = case.find("error") if case.find("error") is not None else case.find("failure")
        if trouble is not None:
            missing = _missing(trouble.text or "")
            if missing and trouble.get("message") == "collection failure":
                left_out[name] = missing
                continue
            counts["failed"] += 1
            red.append(name)
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    status = "failed" if counts["failed"] or not counts["passed"] else "passed"
    return {"status": status, **counts, "red": red, "left_out": left_out}


def _missing(text: str) -> str:
    """Name of the missing third-party package that a file failed to import; empty if none."""
    found = re.findall(r"ModuleNotFoundError: No module named '([^'.]+)", text)
    return found[-1] if found and found[-1] not in _OURS else ""


def is_red(found: dict[str, Any]) -> bool:
    """Whether a test failed or did not finish, so that times do not count."""
    return found["status"] in ("failed", "not finished")


def voids(result: dict[str, Any]) -> bool:
    """Whether a result's times do not count: contract tests are red, or another test failed."""
    more = result.get("more_tests", {}).values()
    return is_red(result["gpu_tests"]) or any(found.get("failed") for found in more)


def sentence(found: dict[str, Any]) -> str:
    """Results of the tests in one sentence."""
    if "passed" not in found:
        return f"GPU tests, compiled: {found['status']} ({found['reason']})."
    text = (
        f"GPU tests, compiled: {found['status']}; {found['passed']} passed, "
        f"{found['failed']} failed, {found['skipped']} skipped"
    )
    if found["red"]:
        text += f", the first red one {found['red'][0]}"
    files = [f"{name} (needs {missing})" for name, missing in found["left_out"].items()]
    return text + (f"; left out: {', '.join(files)}." if files else ".")
