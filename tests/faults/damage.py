"""Damage to files, drawn from a seeded generator: a case is its number alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Damage = Callable[[bytes, Random], bytes]

# Bytes that mean something to a parser of text, of tars or of sounds.
_INSERTED = (b"\0", b"\xff", b"\xef\xbb\xbf", b'"', b"\n", b"\r\n", b"{", b"]", b":", b"#", b"\t")


def flip(data: bytes, draw: Random) -> bytes:
    """Some bits in one neighbourhood, anywhere."""
    out, at = bytearray(data), draw.randrange(len(data))
    for _ in range(draw.choice((1, 1, 2, 8))):
        out[min(at + draw.randrange(16), len(out) - 1)] ^= 1 << draw.randrange(8)
    return bytes(out)


def flip_head(data: bytes, draw: Random) -> bytes:
    """One byte of the first 100, where headers are."""
    out = bytearray(data)
    out[draw.randrange(min(100, len(out)))] = draw.choice(
        (0, 1, 127, 128, 255, draw.randrange(256))
    )
    return bytes(out)


def zero(data: bytes, draw: Random) -> bytes:
    """A range that was never written."""
    at, size = _range(data, draw)
    return data[:at] + bytes(size) + data[at + size :]


def cut(data: bytes, draw: Random) -> bytes:
    """The end is missing."""
    return data[: draw.randrange(len(data))]


def splice(data: bytes, draw: Random) -> bytes:
    """A range is missing."""
    at, size = _range(data, draw)
    return data[:at] + data[at + size :]


def swap(data: bytes, draw: Random) -> bytes:
    """Two ranges of the same size are exchanged."""
    size = max(1, min(_range(data, draw)[1], len(data) // 2))
    one = draw.randrange(len(data) - 2 * size + 1)
    other = draw.randrange(one + size, len(data) - size + 1)
    first, second = data[one : one + size], data[other : other + size]
    return data[:one] + second + data[one + size : other] + first + data[other + size :]


def repeat(data: bytes, draw: Random) -> bytes:
    """A range stands twice."""
    at, size = _range(data, draw)
    return data[: at + size] + data[at:]


def insert(data: bytes, draw: Random) -> bytes:
    """Bytes of nobody, one that parsers read as something among them."""
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice((*_INSERTED, draw.randbytes(draw.randrange(1, 600)))) + data[at:]


BYTES: tuple[Damage, ...] = (flip, flip_head, zero, cut, splice, swap, repeat, insert)


def of_bytes(data: bytes, draw: Random) -> tuple[bytes, str]:
    """Data damaged in one of the ways of `BYTES`, at least by one byte, and the way's name."""
    while True:
        damage = draw.choice(BYTES)
        if (found := damage(data, draw)) != data:
            return found, damage.__name__


# What JSON, YAML and tables hold where something else belongs.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e-300, 1e308, 2**31, 2**63, 10**30),
    *(float("nan"), float("inf"), "", " ", "nan", "null", "1", "-1", "0x10", "1e3", "1,2", "a|b"),
    *("é", "\ufeff", "a\nb", "\x1b[31m", "\ud800", "../x", "/", "x" * 5000, "a" * 300, "=1+1"),
    *([], [None], [1, 2], ["a"], [[1]], {}, {"a": 1}, {"a": {"b": []}}, [[[[[[]]]]]]),
)


def value(draw: Random) -> Any:
    """A value that may not be what belongs there."""
    return draw.choice(VALUES)


def leaves(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of the values in nested dicts and lists."""
    if isinstance(tree, dict) and tree:
        return [leaf for name in tree for leaf in leaves(tree[name], (*path, name))]
    if isinstance(tree, list) and tree:
        return [leaf for n, item in enumerate(tree) for leaf in leaves(item, (*path, n))]
    return [path]


def edited(tree: Any, path: tuple, new: Any) -> Any:
    """A copy of a tree with another value at a path."""
    copy = json.loads(json.dumps(tree))
    inside = copy
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = new
    return copy


def _range(data: bytes, draw: Random) -> tuple[int, int]:
    """Offset and size of a range: a few bytes, a block, or much of it."""
    at = draw.randrange(len(data))
    size = draw.choice((1, draw.randrange(1, 64), 512, draw.randrange(1, len(data) + 1)))
    return at, min(size, len(data) - at)
