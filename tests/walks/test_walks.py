"""Three users' first days, from an empty folder: commands work, errors say what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WALKS = Path(__file__).parent
ROOT = WALKS.parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "who", sorted(path.stem for path in WALKS.glob("*.sh") if path.stem != "steps")
)
def test_a_walk_has_no_stumble(who, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [WALKS / f"{who}.sh", tmp_path],
        cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    print(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
