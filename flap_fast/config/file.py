"""Reads a `Config` from a YAML file and overrides, and writes it; errors suggest a remedy."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.config.faults import sentence
from flap_fast.config.yaml_text import comment_after, parse_yaml, with_quotes


def load_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as `mask.kind=1d`.

    `base: OTHER.yaml` in a file takes missing settings from another file in its folder.

    Raises:
        ConfigError: an unreadable file, an unknown name, a value against its rule.
    """
    known = file is None or isinstance(file, (str, os.PathLike))
    require(known, "the config", "be a file's path", file)
    listed = isinstance(overrides, Sequence) and not isinstance(overrides, str)
    if not listed or not all(isinstance(one, str) for one in overrides):
        raise TypeError(f"overrides must be a list such as ['mask.kind=1d'], got {overrides!r}")
    tree = _read_yaml(Path(file)) if file is not None else {}
    given: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        require(bool(equals and name), "an override", "have the form section.name=value", override)
        both = (value, texts.get(name, "")) if name in ("data.train", "data.val") else ()
        expanded = bool(both) and all(text.endswith(".tar") for text in both)
        remedy = f"put it in quotes, that the shell leaves its braces: '{name}=.../{{0..7}}.tar'"
        require(not expanded, name, "be given once", value, remedy)
        texts[name] = value
        given[name] = _override(name, value)
    _drop_other_length(tree, {"train": {n.removeprefix("train."): v for n, v in given.items()}})
    for name, value in given.items():
        _set(tree, name, value)
    return parse_config(tree)


def _override(name: str, text: str) -> Any:
    """The value of an override, which is YAML, but without comments."""
    right, remedy = with_quotes(text.strip()), "put the texts inside of it in quotes"
    if right:
        remedy = f"in quotes it is a text: {shlex.quote(f'{name}={right}')}"
    try:
        value, rest = parse_yaml(text, f"the value of {name}"), comment_after(text)
    except ConfigError as error:
        raise ConfigError(f"{error}; {remedy}") from None
    require(not rest, f"the value of {name}", "hold no comment of YAML", rest, remedy)
    return value


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping; raises `ConfigError` with one line per fault."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        lines = [sentence(dict(fault), tree) for fault in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: Config) -> str:
    """The whole config as YAML; reading it back gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Settings of a file merged over those of its chain of bases."""
    what = f"the base of {above[-1]}" if above else "the config"
    require(os.path.isfile(file), what, "be an existing YAML file", file)  # may be too long
    require(file.resolve() not in above, what, "not lead back to itself", file)
    tree = parse_yaml(file.read_bytes(), str(file))
    require(tree is None or isinstance(tree, dict), str(file), "hold sections", type(tree).__name__)
    tree = tree or {}
    base = tree.pop("base", None)
    if base is None:
        return tree
    require(isinstance(base, str), f"base in {file}", "name a YAML file in the same folder", base)
    below = _read_yaml(file.parent / base, (*above, file.resolve()))
    _drop_other_length(below, tree)
    return _over(below, tree)


def _over(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Merge setting by setting; `section: null` and lists replace."""
    both = {
        name: _over(base[name], value)
        for name, value in tree.items()
        if isinstance(value, dict) and isinstance(base.get(name), dict)
    }
    return {**base, **tree, **both}


def _drop_other_length(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Let `train.steps` of the upper file replace `train.epochs` of its base, and vice versa."""
    mine, theirs = above.get("train"), below.get("train")
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if mine.get(one) is not None and other not in mine:
                theirs.pop(other, None)


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        tree[section] = {} if tree.get(section) is None else tree[section]
        tree = tree[section]
        require(isinstance(tree, dict), name, "name a setting inside a section", section)
    tree[last] = value
