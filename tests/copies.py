"""Commands run in a changed copy of the package, as what docs/adding.md says is tried there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

_END = "-- end of a command --"
_COMMANDS = f"""
import json, sys
from flap_fast.__main__ import main
commands, refused = json.loads(sys.argv[1])
for sys.argv[1:] in commands:
    try:
        main()
    except SystemExit as end:
        if bool(end.code) != refused:
            raise
    print("{_END}", flush=True)
"""


def flap(copy: Path, *commands: tuple[object, ...], refused: bool = False) -> list[str]:
    """What `flap` prints for each of these commands, one after another in one process.

    Args:
        refused: each is to be refused, and what it says of that is given too.
    """
    given = [[str(argument) for argument in command] for command in commands]
    asked = json.dumps([given, refused])
    paths = os.pathsep.join(map(str, (copy, ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, asked],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if refused else subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stderr or done.stdout)[-2000:]
    printed = done.stdout.split(_END)
    assert len(printed) == len(commands) + 1
    return printed[:-1]
