"""What a table's columns say about its layout, for messages: a separator, no header, a data set.

A table that is no manifest is nearly one: another separator, capital letters, the columns of a
published data set or of Hugging Face's folders. The message names what was found and what reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from flap_fast.files import separator_remedy

# Columns that tell which source reads a table; the first of them that a table has counts.
_SOURCES = {
    **dict.fromkeys(("audiocap_id", "start_time"), "audiocaps"),
    "youtube_id": "autoacd",
    "ytid": "musiccaps",
    "caption_5": "clotho",
    "slice_file_name": "urbansound8k",
    "esc10": "esc50",
    "sentence1": "nli",
    "sent0": "nli",
    **dict.fromkeys(("path", "file_name", "filename", "file"), "folder"),
    **dict.fromkeys(("text", "caption_0", "caption_1"), "folder"),
}
_MEDIA = re.compile(r"\.(wav|flac|mp3|ogg|oga|opus|m4a|aac|aiff?|webm|jpe?g|png|webp)$", re.I)
_TEXTS = re.compile(r"(captions?|texts?|descriptions?|sentences?|labels?|category|class)[ _]?\d*")


def listed(columns: Iterable[str]) -> str:
    """The names in quotes, so that a space in one is seen."""
    return ", ".join(map(repr, columns)) or "none"


def like_texts(columns: Iterable[str]) -> bool:
    """Whether one of the columns is called as captions or labels are elsewhere."""
    return any(_TEXTS.fullmatch(column.strip().lower()) for column in columns)


def remedy(file: Path, columns: Sequence[str], known: Iterable[str]) -> str:
    """What to do about a table without the columns of `known`: "; ..." or nothing."""
    wanted = set(known)
    if columns and (other := separator_remedy(file, columns[0])):
        return other
    if any(_MEDIA.search(column) for column in columns):
        return "; the first line must name the columns"
    renamed = {c: c.strip().lower() for c in columns if c not in wanted}
    close = [f"{name} for {c!r}" for c, name in renamed.items() if name in wanted]
    if close:
        return f"; write {', '.join(close)}"
    source = next((_SOURCES[column] for column in _SOURCES if column in columns), None)
    if source is not None:
        return f"; this layout is read by: flap prepare --source {source} {file.parent} OUT"
    return ""
