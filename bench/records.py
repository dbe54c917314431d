"""What a step's process hands to bench/gpu.py: lines of JSON, each written when it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(file: str | Path, **found: Any) -> None:
    """Add a line to the file."""
    with Path(file).open("a") as out:
        out.write(json.dumps(found) + "\n")


def merge(result: dict[str, Any], found: dict[str, Any]) -> None:
    """Add what a line says to a result: lists grow, all else is replaced."""
    for name, value in found.items():
        if isinstance(value, list):
            result.setdefault(name, []).extend(value)
        elif isinstance(value, dict):
            result.setdefault(name, {}).update(value)
        else:
            result[name] = value


def merge_rows(result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put rows of a sweep in place of those of the same op and size.

    Providers that are compared were measured in turns, so rows of one op and size stay together.
    """
    new = {(row["op"], row["B"]) for row in rows}
    old = [row for row in result.setdefault("rows", []) if (row["op"], row["B"]) not in new]
    result["rows"] = old + rows
