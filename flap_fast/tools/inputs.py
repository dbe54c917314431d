"""What users pass to the embedder: lists of texts, of sounds and of images.

A list is anything that gives its items in an order: a list, a tuple, an array, a column of a
table, a generator. One text, one sound, a mapping and a set are none.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from flap_fast.checks import ConfigError, require
from flap_fast.data.preprocess.waveform import Unusable

BOM = "\ufeff"


def listed(values: Any, name: str) -> Iterable[Any]:
    """Return `values` if they are a list; raises `TypeError` with the name and the remedy."""
    kind = type(values).__name__
    single = isinstance(values, (str, bytes, bytearray, memoryview, os.PathLike, Mapping))
    with_rate = isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], Real)
    whole = getattr(values, "ndim", 1) == 0 or hasattr(values, "get_all_samples")
    if single or with_rate or whole or readable(values):
        if isinstance(values, (str, os.PathLike)):
            raise TypeError(f"{name} must be a list, got one: ['{str(values)[:60]}']")
        raise TypeError(f"{name} must be a list, got one {kind}: put it in []")
    if isinstance(values, (set, frozenset)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a list, got {'None' if values is None else kind}")
    return values


def texts(values: Any, name: str) -> list[str]:
    """Return a list of texts as strings.

    Raises:
        TypeError: not a list, or an item that is no text.
        ConfigError: a lone surrogate, as in a file's name that is not UTF-8.
    """
    dimensions = getattr(values, "ndim", 1)
    if dimensions != 1:
        rule = "be a list of texts, an array of one axis or one column of a table"
        raise TypeError(f"{name} must {rule}, got {type(values).__name__} of {dimensions} axes")
    found = []
    for number, text in enumerate(listed(values, name)):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{number}] must be a text, got {shown(text)}")
        if not _is_unicode(text):
            raise ConfigError(f"{name}[{number}] must be valid Unicode, got {text[:60]!r}")
        found.append(str(text).removeprefix(BOM))
    return found


def distinct(labels: Iterable[str]) -> list[str]:
    """The labels, of those that read the same the first: one given twice would share its softmax.

    The same but for white space, and for how Unicode composes their letters.
    """
    first: dict[str, str] = {}
    for label in labels:
        first.setdefault(unicodedata.normalize("NFC", " ".join(label.split())), label)
    return list(first.values())


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in text)


def shown(value: Any) -> str:
    """A value for a message: one that is short itself, of others the type."""
    plain = value is None or isinstance(value, (bool, int, float, str, bytes))
    return repr(value)[:60] if plain else type(value).__name__


def file_or_bytes(value: Any) -> Any:
    """Return a `Path`, or the bytes of an encoded file, if `value` is one; else `value` as it is.

    A file object is read from where it stands, and left there. Of a row of Hugging Face datasets
    that is not decoded, {"bytes": .., "path": ..}, the bytes come first.

    Raises:
        Unusable: a file object that gives no bytes.
    """
    if isinstance(value, Mapping) and value.get("array") is None:
        encoded = value.get("bytes")
        value = value if encoded is None and value.get("path") is None else encoded or value["path"]
    if isinstance(value, (str, os.PathLike)):
        return Path(os.fsdecode(value))
    if isinstance(value, (bytes, bytearray)) or (
        isinstance(value, memoryview) and value.format == "B"
    ):
        return bytes(value)
    return _read(value) if readable(value) else value


def readable(value: Any) -> bool:
    """Whether a value is an open file."""
    return callable(getattr(value, "read", None))


def _read(file: Any) -> bytes:
    try:
        start = file.tell() if file.seekable() else None
        data = file.read()
        if start is not None:
            file.seek(start)
    except (OSError, ValueError) as error:  # ValueError: closed
        raise Unusable(f"unreadable: {error}") from None
    if not isinstance(data, bytes):
        raise Unusable(
            f"a file object must give bytes, got {type(data).__name__}; open it with mode 'rb'"
        )
    return data


def counted(values: Any, name: str) -> Sequence[Any]:
    """A list whose length is known: of a generator, what it gives."""
    values = listed(values, name)
    return values if hasattr(values, "__len__") else list(values)  # type: ignore[return-value]


def class_names(labels: Any) -> list[str]:
    """Labels, of which none is empty; raises `ConfigError`."""
    names = texts(labels, "labels")
    require(bool(names), "labels", "name at least one class", "none")
    for number, name in enumerate(names):
        require(bool(name.strip()), f"labels[{number}]", "name a class", name)
    return names


def require_batch(batch: int) -> None:
    """Raise unless a batch is a whole number above 0."""
    if not isinstance(batch, Integral):
        raise TypeError(f"batch must be an integer, got {shown(batch)}")
    require(batch >= 1, "batch", "be at least 1", batch)
