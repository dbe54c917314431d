"""Files and text: atomic writes, rows of CSV and JSON lines, valid UTF-8."""

from __future__ import annotations

import ast
import contextlib
import csv
import errno
import glob
import io
import json
import os
import re
import secrets
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
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
    rule, other = "must be UTF-8 text, JSON lines or CSV", f"iconv -f CHARSET -t UTF-8 {file}"
    with file.open("rb") as data:
        start = data.read(4)
    for signature, what in _BINARY.items():
        if start.startswith(signature):
            raise ManifestError(
                f"{file} {rule}, got {what.format(file, file.with_suffix('.jsonl'))}"
            )
    if b"\0" in start:
        raise ManifestError(f"{file} {rule}, got NUL characters; convert it: {other}")
    try:
        yield from _rows(file)
    except UnicodeDecodeError as error:
        raise ManifestError(f"{file} {rule}: {error}; convert it: {other}") from None


# How files of other formats begin, and what to do about them.
_BINARY = {
    b"PAR1": 'a parquet file; convert it: python -c "import pandas; '
    "pandas.read_parquet('{0}').to_json('{1}', orient='records', lines=True)\"",
    b"ARRO": 'a Feather file; convert it: python -c "import pandas; '
    "pandas.read_feather('{0}').to_json('{1}', orient='records', lines=True)\"",
    b"PK\x03\x04": "a spreadsheet or a zip archive; save the table as CSV",
    b"\xd0\xcf\x11\xe0": "a spreadsheet; save the table as CSV",
    b"\x1f\x8b": "a compressed file; gunzip {0}",
    b"BZh": "a compressed file; bunzip2 {0}",
    b"\xfd7zX": "a compressed file; unxz {0}",
    b"\x28\xb5\x2f\xfd": "a compressed file; unzstd {0}",
}


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        if file.suffix.lower() in _CELLS:
            yield from _table(file, lines)
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parsed_json(line)
            except json.JSONDecodeError as error:
                remedy = "write one object a line, or call a table .csv or .tsv"
                raise ManifestError(f"{file}:{number} is not JSON: {error}; {remedy}") from None
            if not isinstance(row, dict):
                raise ManifestError(
                    f"{file}:{number} must be an object, got {line.strip()[:60]}; "
                    "write one object a line"
                )
            yield number, row


def _table(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    kind, start, lines = file.suffix.lower(), 1, iter(lines)
    head = next(lines, "")
    reader = csv.DictReader(chain([head], lines), **_CELLS[kind])
    try:
        columns = [column for column in reader.fieldnames or () if column]
        twice = {column for column in columns if columns.count(column) > 1}
        if twice:
            raise ManifestError(f"{file}:1 must name each column once, got {sorted(twice)}")
        start = reader.line_num + 1
        for row in reader:
            if None in row:
                remedy = "; put quotes around a text with commas" if kind == ".csv" else ""
                remedy = remedy if columns[1:] else "; the first line must name the columns"
                raise ManifestError(
                    f"{file}:{reader.line_num} must have {len(reader.fieldnames or ())} cells, "
                    f"got {row[None]} beyond them; its columns are "
                    f"{', '.join(map(repr, columns)) or 'none'}"
                    f"{separator_remedy(file, head) or remedy}"
                )
            yield reader.line_num, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(
            f"{file}:{start} must be a row of CSV: {error}{separator_remedy(file, head)}"
        ) from None


_SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'", ",": "commas"}


def separator_remedy(file: Path, head: str) -> str:
    """What to do about a table whose first line is separated otherwise: "; ..." or nothing."""
    right = {".csv": ",", ".tsv": "\t"}.get(file.suffix.lower())
    found = next((sign for sign in head.strip() if sign in _SEPARATORS), right)
    if right is None or found in (right, None):
        return ""
    return f"; separate the columns by {_SEPARATORS[right]}, not by {_SEPARATORS[found]}"


def parsed_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        JSONDecodeError: no JSON, a number of thousands of digits, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        raise json.JSONDecodeError("a number has thousands of digits", "", 0) from None
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None


def listed_texts(cell: str) -> list[str] | None:
    """The texts of a cell that holds a list, or Python's tuple or set; None if it holds none.

    Raises:
        ValueError: a list of another writing, as NumPy's without commas.
    """
    cell = cell.strip()
    if not re.fullmatch(r"\[\s*(['\"].*)?\]|\(\s*['\"].*\)|\{\s*['\"].*\}", cell, re.DOTALL):
        return None
    is_list = cell.startswith("[")
    try:
        found = ast.literal_eval(cell)
        strings = [
            t
            for t in tokenize.generate_tokens(io.StringIO(cell).readline)
            if t.type == tokenize.STRING
        ]
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError) as error:
        if not is_list:
            return None
        raise ValueError(f"a list that cannot be read: {error}") from None
    if not is_list and not isinstance(found, (tuple, set)):
        return None  # a text in brackets
    # Python joins texts without a comma between them.
    if len(strings) != len(found) or not all(isinstance(text, str) for text in found):
        raise ValueError("a list that is not of texts separated by commas")
    return [ast.literal_eval(text.string) for text in strings]  # a set has no order


def files_below(folder: Path) -> list[Path]:
    """The files below a folder, sorted; links are followed, each folder is read once."""
    found, seen, queue = [], set(), [str(folder)]
    for start in queue:  # grows by links, so that a folder's own files come first
        for inside, folders, files in os.walk(start):
            real = os.path.realpath(inside)
            folders[:] = [] if real in seen else sorted(folders)
            found += [] if real in seen else [Path(inside, name) for name in files]
            seen.add(real)
            below = (os.path.join(inside, name) for name in folders)
            queue += [path for path in below if os.path.islink(path)]
    return [file for file in sorted(found) if file.is_file()]


def whole_characters(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON's escapes allow and UTF-8 does not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Controls of terminals (C0, DEL, C1), marks that turn the direction of writing, what is no text.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
# Bytes of names that are not UTF-8, as Python has them; a terminal may be able to show them.
_OTHER_BYTES = {chr(code) for code in range(0xDCA0, 0xDD00)}


def visible(text: object, *, keep: str = "", document: bool = False) -> str:
    """A name or a caption for a line that people read: no control character acts on it.

    Args:
        keep: characters to leave as they are, such as line ends.
        document: also escape bytes that are not UTF-8, which a terminal may show.
    """

    def escaped(found: re.Match[str]) -> str:
        sign = found[0]
        kept = sign in keep or (sign in _OTHER_BYTES and not document)
        return sign if kept else sign.encode("unicode_escape").decode()

    return _UNSEEN.sub(escaped, str(text))


def say(text: object, *, error: bool = False) -> None:
    """Print lines to stdout or stderr, control characters escaped."""
    print(visible(text, keep="\n\t"), file=sys.stderr if error else sys.stdout, flush=error)


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
        if re.fullmatch(r"[0-9a-f]+", left.name[len(file.name) + 1 : -len(".part")]):
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
