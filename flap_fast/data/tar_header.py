"""The header before each file of a tar: what says that two of them are one clip's."""

from __future__ import annotations

from collections.abc import Callable

HEADER = 512  # bytes, directly before the file's own
_NAME, _SIZE = slice(0, 100), slice(124, 136)
_TEXTS = (b"json", b"txt")


def pair_fault(
    read: Callable[[int, int], bytes], media: tuple[int, int], text: tuple[int, int]
) -> str | None:
    """What keeps two ranges of a tar from being a clip's media and its JSON; None if nothing.

    Args:
        read: gives the bytes of an offset and a size.
        media: offset and size.
    """
    keys = []
    for offset, size in (media, text):
        header = read(offset - HEADER, HEADER) if offset >= HEADER else b""
        if _size(header) != size:
            return f"no file of {size} bytes at byte {offset}"
        keys.append(_key_and_ending(header))
    (key, ending), (other, text_ending) = keys
    if ending in _TEXTS or text_ending not in (*_TEXTS, None):
        return f"{_shown(ending)} as a clip and {_shown(text_ending)} as its JSON"
    if None not in (ending, text_ending) and key != other:
        return f"clip {_shown(key)} with the JSON of {_shown(other)}"
    return None


def _size(header: bytes) -> int | None:
    numbers = header[_SIZE]
    if numbers[:1] >= b"\x80":  # GNU's form of sizes from 8 GiB
        return int.from_bytes(numbers[1:], "big")
    digits = numbers.strip(b" \0")
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None


def _key_and_ending(header: bytes) -> tuple[bytes, bytes | None]:
    """A file's key, to the first dot; the ending is None of a name that may go on elsewhere."""
    name = header[_NAME].split(b"\0", 1)[0]
    base = name.rpartition(b"/")[2]
    ending = base.rpartition(b".")[2].lower() if len(name) < 100 else None
    return base.partition(b".")[0], ending


def _shown(name: bytes | None) -> str:
    return (name or b"").decode(errors="replace")
