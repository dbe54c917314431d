"""Checks of settings; errors give the name, the rule, the value and the remedy."""

from __future__ import annotations

import json
from pathlib import Path


class ConfigError(ValueError):
    """An invalid setting."""


def require(holds: bool, name: str, rule: str, value: object, remedy: str | None = None) -> None:
    """Raise `ConfigError` "NAME must RULE, got VALUE; REMEDY" unless `holds`."""
    if not holds:
        got = value if isinstance(value, (int, float, type(None))) else f"'{value}'"
        raise ConfigError(f"{name} must {rule}, got {got}" + (f"; {remedy}" if remedy else ""))


def refuse_code(name: str, folder: Path) -> None:
    """Raise `ConfigError` where a folder of transformers' names Python files to run (auto_map).

    What its files hold else is for transformers to judge, which is told not to run any.
    """
    for file in sorted(folder.glob("*config*.json")):
        found: list[object] = []

        def note(tree: dict, found: list[object] = found) -> dict:
            found.extend([tree["auto_map"]] if tree.get("auto_map") else [])
            return tree

        try:
            json.loads(file.read_bytes(), object_hook=note)
        except (ValueError, RecursionError, OSError):
            continue  # transformers says so
        rule = "name no code of its own to run"
        remedy = "if transformers has the class itself, delete auto_map there"
        require(not found, name, rule, f"auto_map in {file}", remedy)
