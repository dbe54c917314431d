"""Measures what a matrix product and a copy reach on this machine.

python -m bench.ceilings [--device cpu] RESULTS
"""

from __future__ import annotations

import argparse

from bench.measure import ceilings
from bench.records import append


def main(arguments: list[str] | None = None) -> None:
    """Append the ceilings to the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("results")
    asked = parser.parse_args(arguments)
    small = {"size": 512, "copy_mib": 32} if asked.device == "cpu" else {}
    append(asked.results, ceilings=ceilings(asked.device, **small))


if __name__ == "__main__":
    main()
