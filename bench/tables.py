"""Formats RESULTS.md's numbers, tables and machines."""

from __future__ import annotations

from typing import Any


def facts(machine: dict[str, Any]) -> str:
    """The machine and the versions in one sentence."""
    state = {True: ", with uncommitted changes", False: "", None: ", no git"}[machine["dirty"]]
    driver = f", driver {machine['driver']}, CUDA {machine['cuda']}" if machine["driver"] else ""
    return (
        f"{machine['date']}, commit {machine['commit']}{state}; torch {machine['torch']}, triton "
        f"{machine['triton']}, Python {machine['python']}{driver}; {machine['cpu']}, "
        f"{machine['threads']} threads, {machine['memory_gib']} GiB, load before: {machine['load']}"
    )


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def number(value: float | None) -> str:
    """Three digits, no exponent."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
