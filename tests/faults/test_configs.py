"""Damaged configs: each loads as what it says, or a sentence names the setting that is wrong."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from flap_fast.checks import ConfigError
from flap_fast.config import Config, check_before_loading
from flap_fast.config.file import dump_config, load_config
from flap_fast.training.run_folder import flat
from tests.faults.cases import assert_sentence, run_cases, sampled
from tests.faults.damage import edited, leaves, of_bytes, value

FOLDER = Path(__file__).parents[2] / "configs"


@cache
def shipped() -> list[Path]:
    """Configs without a base, so that each is its own file."""
    return [file for file in sorted(FOLDER.glob("*.yaml")) if "base:" not in file.read_text()]


@cache
def whole(file: Path) -> dict[str, Any]:
    """All settings of a config, also those that it leaves at their defaults."""
    return load_config(file).model_dump(mode="json")


def same(said: Any, got: Any) -> bool:
    """Whether a setting is what a file says: 1 is 1.0, `a` a list of it, `a//b` the path a/b."""
    if isinstance(said, (list, tuple)) and isinstance(got, list):
        return len(said) == len(got) and all(map(same, said, got))
    if isinstance(got, list):
        return len(got) == 1 and same(said, got[0])
    if isinstance(said, dict) and isinstance(got, dict):
        return all(name in got and same(said[name], got[name]) for name in said)
    if isinstance(said, bool) or isinstance(got, bool):
        return said is got or str(said).lower() in _TRUTH[bool(got)]
    if isinstance(said, (int, float)) and isinstance(got, (int, float)):
        return math.isclose(said, got)
    if isinstance(got, (int, float)) and isinstance(said, str):
        return float(said.replace("_", "")) == got
    if isinstance(got, str) and isinstance(said, str):
        return said == got or os.path.normpath(said) == os.path.normpath(got)
    return said == got or said is None  # a null may stand for a default


_TRUTH = {True: ("true", "1", "1.0", "on", "yes", "y", "t"), False: ("false", "0", "off", "no")}


def assert_says(config: Config, tree: dict[str, Any]) -> None:
    """Fail where a setting is not what the tree says."""
    got = config.model_dump(mode="json")
    for name, said in flat(tree).items():
        inside: Any = got
        for part in name.split("."):
            if inside is None or (isinstance(inside, dict) and part not in inside):
                inside = None
                break
            inside = inside[part] if isinstance(inside, dict) else inside
        assert said in (None, {}) or same(said, inside), f"{name}: says {said!r}, is {inside!r}"


def loaded(name: str, file: Path, overrides: tuple[str, ...] = ()) -> str:
    """Loads a config and says so, or says that it was refused; fails where it says too little.

    Args:
        name: of the setting that was changed; empty where any may have been.
    """
    try:
        config = load_config(file, overrides)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert_sentence(ConfigError(line), *_names(name), file.name)
        return "refused"
    if not overrides:
        assert_says(config, yaml.load(file.read_bytes(), _AsText) or {})
    copy = file.with_name("copy.yaml")
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    try:
        check_before_loading(config, 1)
    except ConfigError as error:
        assert_sentence(error, *_names(""))
        return "refused before a run"
    return "loaded"


class _AsText(yaml.SafeLoader):
    """Reads `on` as a name."""


_AsText.yaml_implicit_resolvers = {
    sign: [(tag, found) for tag, found in resolvers if tag != "tag:yaml.org,2002:bool"]
    for sign, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@cache
def _names(name: str) -> tuple[str, ...]:
    """What an error about a setting may name: it, the setting it depends on, the section."""
    if name:
        return (name, name.rpartition(".")[2], name.partition(".")[0])
    every = {setting for file in shipped() for setting in flat(whole(file))}
    return tuple(every | {setting.partition(".")[0] for setting in every})


def of_text(draw: Random, folder: Path) -> str:
    """Bytes of the file."""
    data, _ = of_bytes(draw.choice(shipped()).read_bytes(), draw)
    file = folder / "damaged.yaml"
    file.write_bytes(data)
    return loaded("", file)


def of_value(draw: Random, folder: Path) -> str:
    """Another value of a setting, in the file."""
    tree = whole(draw.choice(shipped()))
    path = draw.choice(leaves(tree))
    file = folder / "damaged.yaml"
    new = value(draw)
    file.write_text(yaml.dump(edited(tree, path, new), allow_unicode=True, width=10**6))
    return loaded(".".join(str(part) for part in path if isinstance(part, str)), file)


def of_name(draw: Random, folder: Path) -> str:
    """A setting under another name, in another section, or twice."""
    tree = whole(draw.choice(shipped()))
    sections = [section for section in tree if isinstance(tree[section], dict)]
    section, other = draw.choice(sections), draw.choice(sections)
    name = draw.choice(sorted(tree[section]))
    new = draw.choice((name[1:], name + "s", name.upper(), name.replace("_", "-"), f"{name} ", "x"))
    where, new = (section, new) if draw.random() < 0.5 else (other, name)
    file = folder / "damaged.yaml"
    changed = edited(tree, (where, new), tree[section][name])
    file.write_text(yaml.safe_dump(changed))
    outcome = loaded("", file)
    known = new in tree[where]
    assert known or outcome == "refused", f"{where}.{new} is taken"
    return outcome


def of_override(draw: Random, folder: Path) -> str:
    """A value on the command line."""
    file = draw.choice(shipped())
    name = draw.choice(sorted(flat(whole(file))))
    new = value(draw)
    text = draw.choice((str(new), yaml.safe_dump(new, width=10**6).removesuffix("...\n").strip()))
    copy = folder / file.name
    copy.write_bytes(file.read_bytes())
    return loaded(name, copy, (f"{name}={text}",))


def check(draw: Random, folder: Path) -> str:
    damage = draw.choice((of_text, of_value, of_name, of_override))
    return f"{damage.__name__[3:]} {damage(draw, folder)}"


@sampled(60, 1000)
def test_a_damaged_config_is_what_it_says_or_is_refused_by_the_settings_name(cases, tmp_path: Path):
    run_cases("configs", cases, check, tmp_path)
