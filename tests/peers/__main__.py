"""Run the comparisons and print their largest differences: `python -m tests.peers`."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

_PACKAGES = (
    "transformers",
    "open_clip_torch",
    "laion_clap",
    "torchlibrosa",
    "GradCache",
    "SentEval",
    "torch",
)


class Recorder:
    """A plugin that keeps what the tests found."""

    def __init__(self):
        self.rows: list[Any] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [row for name, row in report.user_properties if name == "difference"]


def installed(package: str) -> str:
    """A package's name and version; without one, that it is left out."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main() -> int:
    """Print the table; returns pytest's exit status."""
    recorder = Recorder()
    status = pytest.main([str(Path(__file__).parent), "-p", "no:cacheprovider"], [recorder])
    print(f"\n{', '.join(map(installed, _PACKAGES))}\n")
    print("| peer | what | largest difference | bound | why not less |\n|---|---|---:|---:|---|")
    for row in recorder.rows:
        print(f"| {' | '.join(row)} |")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
