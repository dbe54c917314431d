"""Reads a `Config` from a YAML file and overrides, and writes it; errors suggest a remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.encoders import ENCODERS


def load_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as `mask.kind=1d`.

    `base: OTHER.yaml` in a file takes missing settings from another file in its folder.

    Raises:
        ConfigError: an unreadable file, an unknown name, a value against its rule.
    """
    tree = _read_yaml(Path(file)) if file is not None else {}
    given: dict[str, Any] = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        require(bool(equals and name), "an override", "have the form section.name=value", override)
        given[name] = _parse(value, f"the value of {name}")
    _drop_other_length(tree, {"train": {n.removeprefix("train."): v for n, v in given.items()}})
    for name, value in given.items():
        _set(tree, name, value)
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


def _read_yaml(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Settings of a file merged over those of its chain of bases."""
    what = f"the base of {above[-1]}" if above else "the config"
    require(file.is_file(), what, "be an existing YAML file", file)
    require(file.resolve() not in above, what, "not lead back to itself", file)
    tree = _parse(file.read_bytes(), str(file))
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


def _parse(text: str | bytes, what: str) -> Any:
    try:
        loader = _OnceLoader(text)
        node = loader.get_single_node()
        if (size := _expanded(node, {})) > _MOST_VALUES:
            rule = f"hold {_MOST_VALUES} values or fewer, aliases written out"
            raise ConfigError(f"{what} must {rule}, got {size}")
        return loader.construct_document(node) if node is not None else None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # also numbers of thousands of digits
        raise ConfigError(f"{what} must be YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{what} must be YAML: it is nested too deeply") from None


# All settings together are a few hundred.
_MOST_VALUES = 100_000


def _expanded(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """The number of values below a node, with its aliases written out; infinite for a cycle."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # while it is being counted
        below = [n for pair in node.value for n in (pair if isinstance(pair, tuple) else (pair,))]
        sizes[id(node)] = 1 + sum(_expanded(n, sizes) for n in below)
    return sizes[id(node)]


class _OnceLoader(yaml.SafeLoader):
    """Refuses duplicate names in a section, of which PyYAML silently drops the first.

    Reads `on` as a name, which YAML 1.1 reads as `true`.
    """

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' must stand once", key.start_mark
                )
            seen.add(str(key.value))
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        tree[section] = {} if tree.get(section) is None else tree[section]
        tree = tree[section]
        require(isinstance(tree, dict), name, "name a setting inside a section", section)
    tree[last] = value


def _line(fault: dict[str, Any]) -> str:
    """One of pydantic's faults as "NAME must RULE, got VALUE"."""
    path = [str(part) for part in fault["loc"]]
    arms = ENCODERS.get(path[0], {}) if path else {}
    unknown_arm = fault["type"] == "union_tag_invalid"
    if unknown_arm or (arms and path[-1] == "encoder"):
        *others, last = (f"'{name}'" for name in arms)
        names = f"{', '.join(others)} or {last}" if others else last
        got = fault["input"].get("encoder") if unknown_arm else fault["input"]
        return f"{path[0]}.encoder must be {names}, got {got!r}"
    # Pydantic names the arm of a union in the path, unless it is the only one.
    first = next(iter(arms.values()), None)
    arm = arms[path.pop(1)] if len(path) > 1 and path[1] in arms else None
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        *sections, last = path
        if others := [n for n, other in arms.items() if last in other.model_fields]:
            encoder, mine = f"{path[0]}.encoder", arm or next(iter(arms.values()))
            return (
                f"{name} must be left out with {encoder} = {mine.name()}, "
                f"got {fault['input']!r}; it is a setting of {encoder} = {' or '.join(others)} "
                f"({name}=null leaves it out)"
            )
        known = list(_section(sections, arm or first).model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f": did you mean {'.'.join([*path[:-1], close[0]])}" if close else ""
        return f"{name} is not a setting{hint}. Known here: {', '.join(known)}"
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    rule = fault["msg"] if fault["type"] != "model_type" else "must be a section of settings"
    for theirs, ours in _WORDS.items():
        rule = rule.replace(theirs, ours)
    value = fault["input"]
    return f"{name} {rule}, got {value if isinstance(value, (int, float)) else repr(value)}"


# How pydantic's sentences begin, and how ours do.
_WORDS = {
    "Input should be": "must be",
    "String should": "must",
    "Keys should": "must",
    "Field required": "must be given",
    "a valid tuple": "a list",
    "Input is not a valid path for <class 'pathlib.Path'>": "must be a path",
}


def _section(names: Sequence[str], encoder: Any) -> Any:
    """The class of a section; of an encoder's section, the class that `encoder` selects."""
    section: Any = Config
    for number, name in enumerate(names):
        field = section.model_fields[name].annotation
        section = encoder if number == 0 and encoder is not None else field
    return section
