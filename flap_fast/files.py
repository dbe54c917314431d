"""Files and text: atomic writes, rows of CSV and JSON lines, valid UTF-8."""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Strict: a quote that is never closed would swallow the rows after it.
_CELLS: dict[str, dict[str, Any]] = {
    ".csv": {"strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}


class ManifestError(ValueError):
    """A manifest or table that cannot be read: the line, the rule, the value, the remedy."""


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and cells of each row of a .csv, a .tsv (without quotes) or JSON-lines file.

    Raises:
        ManifestError: text that is not UTF-8, a line that is not a row.
    """
    try:
        yield from _rows(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{file} must be UTF-8 text, JSON lines or CSV: {error}") from None


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        kind = file.suffix.lower()
        if kind in _CELLS:
            reader = csv.DictReader(lines, **_CELLS[kind])
            for row in reader:
                if None in row:
                    remedy = "; put quotes around a text with commas" if kind == ".csv" else ""
                    raise ManifestError(
                        f"{file}:{reader.line_num} must have {len(reader.fieldnames or ())} cells, "
                        f"got {row[None]} beyond them{remedy}"
                    )
                yield reader.line_num, row
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ManifestError(f"{file}:{number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ManifestError(f"{file}:{number} must be an object, got {line.strip()[:60]}")
            yield number, row


def whole_characters(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON's escapes allow and UTF-8 does not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def as_utf8(json_text: str) -> bytes:
    """JSON text as UTF-8; lone surrogates (as in a path of other bytes) become JSON's escapes."""
    return json_text.encode(errors="backslashreplace")


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk or a quota is full; safetensors' says it in words."""
    words = re.search(r"os error (\d+)", str(error))
    number = int(words[1]) if error.errno is None and words else error.errno
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(file: Path, data: bytes | Callable[[], Iterable[bytes]]) -> None:
    """Write all of `data` or nothing: neither a crash, a full disk nor a second writer mixes in.

    Args:
        data: the bytes, or a function that gives them piece by piece, where they are many.
    """
    for left in file.parent.glob(f"{glob.escape(file.name)}.*.part"):
        left.unlink(missing_ok=True)  # of a process that was killed
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as out:
            out.writelines([data] if isinstance(data, bytes) else data())
            out.flush()
            os.fsync(out.fileno())
        with contextlib.suppress(FileNotFoundError):
            part.replace(file)
            return
    except OSError as error:
        # A failed write does not name the file.
        remedy = "; make room and run the same command again" if is_full(error) else ""
        raise OSError(error.errno, f"{error.strerror}{remedy}", str(file)) from None
    finally:
        part.unlink(missing_ok=True)
    write_atomically(file, data)  # another writer deleted the part as a dead writer's
