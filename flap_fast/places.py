"""Where data lies: a path, or a URL that stays as it was written; and patterns of either.

data/mine/train    s3://bucket/mine/train    a folder of shards
data/mine/0.tar    https://host/mine/0.tar   one shard
{0000..0127}.tar   {a,b}/0.tar               each of these, as bash writes it
data/*/*.tar       gs://bucket/mine/1*.tar   those that there are; not over https
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import BeforeValidator, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from flap_fast.checks import ConfigError, require
from flap_fast.files import visible

_SCHEME = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]+):/+")
_BRACES = re.compile(r"\{([^{}]*,[^{}]*|-?\d+\.\.-?\d+)\}")
# Up to a space, a quote or a bracket, or the next URL of a list.
_WEB = re.compile(r"""https?://(?:(?!,\s*["']?https?://)[^\s"'\]])+""", re.IGNORECASE)
_MOST_NAMES = 1_000_000


class Url(str):
    """A URL, with the parts of a path. It is no `Path`, which takes a slash out of `s3://`."""

    __slots__ = ()

    @property
    def scheme(self) -> str:
        """What stands before `://`, in small letters."""
        return self.partition("://")[0].lower()

    @property
    def on_web(self) -> bool:
        """Whether it is served by HTTP, which lists no folders; there a `?` begins a query."""
        return self.scheme in ("http", "https")

    @property
    def shown(self) -> str:
        """The URL for messages and names: without its login and query, which may hold passwords."""
        before = self._split()[0]
        return re.sub(r"://[^/@]*@", "://", before) if self.on_web else before

    @property
    def name(self) -> str:
        """Its last part."""
        return self.shown.rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Its last part without the ending."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of its last part: `.tar`."""
        return Path(self.name).suffix

    @property
    def parent(self) -> Url:
        """The folder that it is in."""
        before, query = self._split()
        return Url(before.rstrip("/").rpartition("/")[0] + query)

    def with_suffix(self, suffix: str) -> Url:
        """The URL with another ending of its last part."""
        before, query = self._split()
        return Url(before.removesuffix(self.suffix) + suffix + query)

    def __truediv__(self, name: str) -> Url:
        before, query = self._split()
        return Url(f"{before.rstrip('/')}/{name}{query}")

    def _split(self) -> tuple[str, str]:
        before, mark, query = self.partition("?") if self.on_web else (str(self), "", "")
        return before, mark + query


Place = Path | Url


def shown(place: Place) -> str:
    """A place for a message."""
    return place.shown if isinstance(place, Url) else str(place)


def without_secrets(text: str) -> str:
    """A text, such as a command or a config, whose web URLs have no login and no query."""
    return _WEB.sub(lambda found: Url(found[0]).shown, text)


def place(value: Any) -> Place:
    """A path or a URL from what a config or a command line says.

    Raises:
        PydanticCustomError: neither, or a URL that lost a slash.
    """
    if isinstance(value, Url):
        return value
    if not isinstance(value, (str, Path)):
        raise PydanticCustomError("path_type", "must be a path or a URL")
    found = _SCHEME.match(str(value))
    if found is None:
        return Path(value)
    start, scheme, rest = found[0].lower(), found[1].lower(), str(value)[found.end() :]
    if scheme == "file":
        # file:/a and file:///a are one path.
        return Path(unquote(start[len("file:") if start == "file:/" else len("file://") :] + rest))
    if start != f"{scheme}://":
        raise PydanticCustomError(
            "path_type",
            "must have two slashes after {scheme}:, as {right}",
            {"scheme": scheme, "right": f"{scheme}://{rest}"},
        )
    if not rest:
        rule = "must name a server or a bucket, as s3://bucket/mine"
        raise PydanticCustomError("path_type", rule)
    return Url(start + rest)


def place_of(name: str, text: str | Path) -> Place:
    """The place that an option of a command names; raises `ConfigError`."""
    try:
        return place(text)
    except PydanticCustomError as error:
        raise ConfigError(f"{name} {error.message()}, got '{text}'") from None


# What folders with a home for each account are called.
_HOMES = ("home", "Users")


def shared_name(place: Place) -> str:
    """The last part of a place, for what others read; "" where that names an account or a host."""
    if isinstance(place, Url):
        return place.name if "/" in place.shown.partition("://")[2].rstrip("/") else ""
    whole, own = Path(os.path.abspath(place)), Path(os.path.expanduser("~"))
    is_home = whole.parent.name in _HOMES or whole.name == own.name or whole == Path("/root")
    return "" if is_home or place.name.startswith("~") else place.name


def on_disk(path: str | Path) -> None:
    """Raise `PydanticCustomError` for a URL where only a path can be."""
    if scheme := _SCHEME.match(str(path)):
        remedy = "copy it here; shards alone are read by URL: data.train, flap eval, flap doctor"
        host = str(path)[scheme.end() :].partition("/")[0].lower()
        if scheme[1].lower() == "hf" or host == "huggingface.co":
            remedy = "hf download OWNER/NAME --local-dir FOLDER copies it here"
        if scheme[1].lower() == "file":
            remedy = f"write {place(as_typed(path))}"
        raise PydanticCustomError("path_type", "must be a path on this machine", {"remedy": remedy})


def as_typed(path: str | Path) -> str:
    """A path's text, with the slashes of a URL that `Path` takes out."""
    found, text = _SCHEME.match(str(path)), str(path)
    if found is None or not isinstance(path, Path):
        return text
    return f"{found[1]}:{'///' if found[1].lower() == 'file' else '//'}{text[found.end() :]}"


def require_on_disk(name: str, path: str | Path) -> None:
    """Raise `ConfigError` for a URL where a command or a function reads or writes files."""
    try:
        on_disk(path)
    except PydanticCustomError as error:
        remedy, got = (error.context or {})["remedy"], visible(as_typed(path))
        raise ConfigError(f"{name} {error.message()}, got '{got}'; {remedy}") from None


Places = Annotated[
    tuple[Annotated[Place, PlainValidator(place), PlainSerializer(str, when_used="json")], ...],
    BeforeValidator(lambda v: (v,) if isinstance(v, (str, Path, dict)) else v),
]
"""A setting of places; one alone is a list of one."""

# More copies of a clip in an epoch than this are no mixture.
_MOST_COPIES = 1000


@dataclass(frozen=True)
class Weighted:
    """A place, and how many times an epoch takes each of its clips; 0.5: half of them."""

    path: Place
    weight: float

    def __str__(self) -> str:
        return f"{shown(self.path)} (weight {self.weight:g})"


def mixed_place(value: Any) -> Place | Weighted:
    """A place, or one with a weight, `{path: ..., weight: ...}`; of weight 1 it is the place alone.

    Raises:
        PydanticCustomError: see `place`; for other keys; a weight that is no number above 0.
    """
    if isinstance(value, Weighted):
        return value
    if not isinstance(value, dict):
        return place(value)
    if "path" not in value or not {"path", "weight"} >= set(value):
        rule = "must be a path, a URL or {form}"
        raise PydanticCustomError("path_type", rule, {"form": "{path: ..., weight: ...}"})
    weight = value.get("weight", 1)
    number = math.nan
    if isinstance(weight, (int, float, str)) and not isinstance(weight, bool):
        with suppress(ValueError, OverflowError):
            number = float(weight)  # also of 1e-1, a text in YAML
    if not 0 < number <= _MOST_COPIES:
        raise PydanticCustomError(
            "weight", "must have a weight above 0 and at most {most}", {"most": _MOST_COPIES}
        )
    found = place(value["path"])
    return found if number == 1 else Weighted(found, number)


def place_in(entry: Place | Weighted) -> Place:
    """The place of an entry, whatever its weight."""
    return entry.path if isinstance(entry, Weighted) else entry


def as_shown(entry: Place | Weighted) -> Place | Weighted:
    """An entry without the login and the query of its URL."""
    if isinstance(entry, Weighted):
        return Weighted(place(shown(entry.path)), entry.weight)
    return place(entry.shown) if isinstance(entry, Url) else entry


def _as_json(entry: Place | Weighted) -> str | dict[str, str | float]:
    if isinstance(entry, Weighted):
        return {"path": str(entry.path), "weight": entry.weight}
    return str(entry)


MixedPlaces = Annotated[
    tuple[
        Annotated[
            Place | Weighted,
            PlainValidator(mixed_place),
            PlainSerializer(_as_json, when_used="json"),
        ],
        ...,
    ],
    BeforeValidator(lambda v: (v,) if isinstance(v, (str, Path, dict, Weighted)) else v),
]
"""A setting of places with weights."""


def is_pattern(place: Place) -> bool:
    """Whether a place stands for several: `{0..7}`, `{a,b}`, `*`, `?`, `[0-9]`."""
    return bool(_BRACES.search(str(place))) or is_glob(place)


def is_glob(place: Place) -> bool:
    """Whether what a place stands for must be looked up: `*`, `?`, `[0-9]`."""
    text = place.shown if isinstance(place, Url) else str(place)
    return bool(re.search(r"[*?]|\[[^]/]+\]", text))


def expanded(text: str) -> list[str]:
    """The texts that braces stand for, as in bash: `{08..10}` is 08, 09, 10; `{a,b}` is a, b.

    Raises:
        ConfigError: a range of more names than a folder holds.
    """
    return list(dict.fromkeys(_expanded(text)))  # braces in braces give some twice


def _expanded(text: str) -> Iterator[str]:
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    before, after = text[: found.start()], text[found.end() :]
    for item in _items(found[1]):
        yield from _expanded(before + item + after)


def _items(inside: str) -> Iterator[str]:
    if "," in inside:
        yield from inside.split(",")
        return
    first, last = inside.split("..")
    padded = any(re.match(r"-?0\d", end) for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    rule, count = f"stand for at most {_MOST_NAMES} names", abs(int(last) - int(first)) + 1
    require(count <= _MOST_NAMES, f"{{{inside}}}", rule, count)
    for number in range(int(first), int(last) + step, step):
        yield f"{number:0{width}d}"
