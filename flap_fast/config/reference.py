"""The settings reference, from the fields' docstrings: docs/settings.md.

python -m flap_fast.config.reference > docs/settings.md
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from flap_fast.config import Config
from flap_fast.encoders import ENCODERS
from flap_fast.places import Url, Weighted
from flap_fast.section import FREE_ON_RESUME, Section

_HEAD = """# Settings

Made from the settings' own docstrings by `python -m flap_fast.config.reference`; a test keeps it
true. A config file says what differs from these defaults, `section.name=value` on the command line
overrides, and `flap config show FILE` prints every setting in force. Settings marked ↻ may change
when a run is resumed.
"""


def settings_reference() -> str:
    """All sections and settings as one Markdown page."""
    return "\n".join([_HEAD, *_config()])


def _config() -> Iterator[str]:
    for name, field in Config.model_fields.items():
        if name in ENCODERS:
            for arm in ENCODERS[name].values():
                about = f"with `{name}.encoder: {arm.name()}`"
                yield from _section(
                    name, arm, f"## {name}, {about}", FREE_ON_RESUME in field.metadata
                )
        else:
            yield from _section(
                name, type(field.default), f"## {name}", FREE_ON_RESUME in field.metadata
            )


def _section(path: str, section: type[Section], title: str, free: bool) -> Iterator[str]:
    inner = {n: f for n, f in section.model_fields.items() if isinstance(f.default, Section)}
    plain = {n: f for n, f in section.model_fields.items() if n not in inner}
    if plain:
        yield f"{title}\n\n| setting | values | default | |\n|---|---|---|---|"
        standard = section()  # defaults may follow one another
        for name, field in plain.items():
            mark = " ↻" if free or FREE_ON_RESUME in field.metadata else ""
            about = " ".join((field.description or "").split()).replace("|", r"\|")
            cells = _values(field), _shown(getattr(standard, name)), about
            yield f"| `{path}.{name}`{mark} | {' | '.join(cells)} |"
        yield ""
    for name, field in inner.items():
        yield from _section(f"{path}.{name}", type(field.default), f"## {path}.{name}", free)


def _values(field: FieldInfo) -> str:
    bounds = {
        symbol: getattr(mark, word)
        for mark in field.metadata
        for word, symbol in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(mark, word, None) is not None
    }
    limits = ", ".join(f"{symbol} {value:.10g}" for symbol, value in bounds.items())
    return " ".join(part for part in (_type(field.annotation), limits) if part)


def _type(annotation: Any) -> str:
    """A type as YAML writes it."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inside[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        some = [_type(one) for one in inside if one is not type(None)]
        return " or ".join([*some, *(["null"] if type(None) in inside else [])])
    if origin is tuple:
        return f"list ({_type(inside[0])})"
    names = {int: "whole number", float: "number", bool: "true, false", str: "text", Path: "path"}
    names |= {Url: "URL", Weighted: "{path, weight}"}
    return names.get(annotation, "")


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:.9g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    print(settings_reference(), end="")
