"""Checks of settings; errors give the name, the rule, the value and the remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

from flap_fast.files import visible

# Characters of a value that an error shows.
_LONG = 500


class ConfigError(ValueError):
    """An invalid setting."""


def require(holds: bool, name: str, rule: str, value: object, remedy: str | None = None) -> None:
    """Raise `ConfigError` "NAME must RULE, got VALUE; REMEDY" unless `holds`."""
    if not holds:
        got = value
        if not isinstance(value, (int, float, type(None))):
            text = visible(value)
            got = f"'{text}'" if len(text) <= _LONG else f"'{text[:_LONG]}...'"
        raise ConfigError(f"{name} must {rule}, got {got}" + (f"; {remedy}" if remedy else ""))


def in_one_line(error: Exception) -> str:
    """What another library says of a file, for the end of a sentence: its type where it is odd."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONG else f"{text[:_LONG]}..."
    known = text and isinstance(error, (OSError, ValueError))
    return text if known else f"{type(error).__name__} {text}".strip()


def read_text(name: str, file: str | Path) -> str:
    """The text of a file that a setting or an option names, without byte order marks.

    Raises:
        ConfigError: no such file, or text that is not UTF-8.
    """
    require(os.path.isfile(file), name, "name an existing file", file)  # a name may be too long
    rule, remedy = "be a UTF-8 text file", f"iconv -f CHARSET -t UTF-8 {file} converts another"
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} must {rule}, got '{file}': {error}; {remedy}") from None
    # UTF-16 without a mark; files that were joined have a mark in each part.
    if "\0" in text:
        raise ConfigError(f"{name} must {rule}, got '{file}' with NUL characters; {remedy}")
    return text.replace("\n\ufeff", "\n")


def refuse_code(name: str, folder: Path) -> None:
    """Raise `ConfigError` where a folder of transformers' names code to run: Python files of its
    own (auto_map), or a kernel of a hub (attn_implementation: OWNER/NAME).

    What its files hold else is for transformers to judge, which is told not to run any.
    """
    for file in sorted(folder.glob("*config*.json")):
        found: list[str] = []

        def note(tree: dict, found: list[str] = found) -> dict:
            found.extend(["auto_map"] if tree.get("auto_map") else [])
            for key, value in tree.items():
                names = value.values() if isinstance(value, dict) else [value]
                if key.endswith("_implementation") and any("/" in str(name) for name in names):
                    found.append(key)
            return tree

        try:
            json.loads(file.read_bytes(), object_hook=note)
        except (ValueError, RecursionError, OSError):
            continue  # transformers says so
        rule = "name no code of its own to run"
        for key in found:
            has = "the class" if key == "auto_map" else "what is needed"
            remedy = f"if transformers has {has} itself, delete {key} there"
            require(False, name, rule, f"{key} in {file}", remedy)
