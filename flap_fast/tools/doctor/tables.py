"""What `flap doctor` says: tables for the terminal, and a JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from flap_fast.files import visible
from flap_fast.tools.doctor.records import SEVERITIES, Examined, Finding, Split

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def contents(split: Split) -> dict[str, Any]:
    """What is in a split, by name."""
    captions, words = split.captions, [len(text.split()) for text in split.captions.texts]
    found: dict[str, Any] = {"clips": split.clips.count, "looked at": len(split.picked)}
    if split.sounds is not None and split.sounds.read.any():
        sounds, read = split.sounds, split.sounds.read
        seconds = sounds.seconds[read]
        found |= {
            "hours": round(float(seconds.sum()) / 3600, 4),
            "seconds, median": round(float(np.median(seconds)), 3),
            "seconds, from": round(float(seconds.min()), 3),
            "seconds, to": round(float(seconds.max()), 3),
            "rates, Hz": _counted(sounds.rate_hz[read]),
            "channels": _counted(sounds.channels[read]),
        }
    found |= {"captions": len(captions.texts), "distinct captions": len(set(captions.texts))}
    if words:
        found |= {"words, median": float(np.median(words)), "words, to": max(words)}
    return found


def _counted(values: np.ndarray) -> dict[str, int]:
    """How many there are of each value, the most frequent first."""
    numbers, counts = np.unique(values, return_counts=True)
    return {str(numbers[n]): int(counts[n]) for n in np.argsort(-counts, kind="stable").tolist()}


def as_json(examined: Examined, found: Sequence[Finding]) -> dict[str, Any]:
    """The whole answer: what is in the data, findings, what was not looked at."""
    return {
        "splits": {split.name: contents(split) for split in examined.splits},
        "findings": [finding.as_json() for finding in found],
        "counts": {s: sum(f.found.severity == s for f in found) for s in SEVERITIES},
        "not looked at": dict(examined.lacking),
    }


def contents_table(examined: Examined) -> Table:
    """A column a split."""
    columns = {split.name: contents(split) for split in examined.splits}
    table = Table("", *map(visible, columns), box=box.SIMPLE_HEAD)
    names = dict.fromkeys(name for column in columns.values() for name in column)
    for name in names:
        table.add_row(name, *(Text(_cell(column.get(name))) for column in columns.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        shown = [f"{name}: {count}" for name, count in list(value.items())[:3]]
        return ", ".join([*shown, f"{len(value) - 3} others"] if len(value) > 3 else shown)
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else f"{value:g}"


def findings_table(found: Sequence[Finding]) -> Table:
    """A row for each error and warning, and one for all notes of a check."""
    table = Table("", "check", "where", "of them", "found", box=box.SIMPLE_HEAD)
    rows: dict[object, list[Finding]] = {}
    for number, one in enumerate(found):
        key = one.check.name if one.found.severity == "note" else number
        rows.setdefault(key, []).append(one)
    for row in rows.values():
        first = row[0].found
        count, total = (sum(getattr(one.found, n) for one in row) for n in ("count", "total"))
        share = f"{count:,} of {total:,}" if first.total > 1 else ""
        places = " / ".join(one.found.where for one in row)
        cells = (row[0].check.name, places, share, first.got)
        style = _STYLES[first.severity]
        table.add_row(Text(first.severity, style), *(Text(visible(cell)) for cell in cells))
    return table


def sentences(found: Sequence[Finding]) -> Iterator[str]:
    """A sentence for each check that found an error or a warning: rule, remedy, examples."""
    told = set()
    for one in found:
        if one.found.severity == "note" or one.check.name in told:
            continue
        told.add(one.check.name)
        examples = ", ".join(one.found.examples)
        yield f"{one.check.name}: must {one.check.rule}; {one.check.remedy}" + (
            f". For example {examples}" if examples else ""
        )


def not_looked_at(examined: Examined) -> str:
    """What was not looked at and why, in a line; empty where nothing is missing."""
    reasons: dict[str, list[str]] = {}
    for need, why in examined.lacking.items():
        reasons.setdefault(why, []).append(need)
    return "; ".join(f"{', '.join(needs)} ({why})" for why, needs in reasons.items())
