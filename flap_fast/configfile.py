"""A `Config` from a YAML file and overrides, and back; errors that say what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flap_fast.checks import ConfigError, need
from flap_fast.config import Config


def load_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as `mask.kind=1d`.

    Raises:
        ConfigError: an unreadable file, an unknown name, a value against its rule.
    """
    tree = _read_yaml(Path(file)) if file is not None else {}
    for override in overrides:
        name, equals, value = override.partition("=")
        need(bool(equals and name), "an override", "have the form section.name=value", override)
        _set(tree, name, yaml.safe_load(value))
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping; raises `ConfigError` with one line per fault."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        lines = [_line(dict(fault)) for fault in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: Config) -> str:
    """The whole config as YAML; reading it back gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(file: Path) -> dict[str, Any]:
    need(file.is_file(), "the config", "be an existing YAML file", file)
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    need(tree is None or isinstance(tree, dict), str(file), "hold sections", type(tree).__name__)
    return tree or {}


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        need(isinstance(tree, dict), name, "name a setting inside a section", section)
    tree[last] = value


def _line(fault: dict[str, Any]) -> str:
    """One of pydantic's faults as "NAME must RULE, got VALUE"."""
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        known = _known_names(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f": did you mean {'.'.join([*path[:-1], close[0]])}" if close else ""
        return f"{name} is not a setting{hint}. Known here: {', '.join(known)}"
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    rule = fault["msg"].replace("Input should be", "must be").replace("String should", "must")
    value = fault["input"]
    return f"{name} {rule}, got {value if isinstance(value, (int, float)) else repr(value)}"


def _known_names(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in path:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
