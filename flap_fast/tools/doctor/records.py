"""What a check of `flap doctor` is, what it is given and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from flap_fast.config import Config
    from flap_fast.tools.doctor.run_files import RunFiles
    from flap_fast.tools.doctor.scan import Captions, Sounds
    from flap_fast.tools.doctor.sources import Clips

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
Need = Literal["sounds", "captions", "tokens", "splits", "metrics", "weights", "embeddings"]

# Examples of one finding.
_SHOWN = 3
# Fewer faulty clips are chance in a small split, whatever their share.
FEWEST = 3


@dataclass(frozen=True)
class Split:
    """The clips of a split that were looked at; rows of `sounds` are in the order of `picked`."""

    name: str
    clips: Clips
    picked: np.ndarray
    """(n,) int64, which of the clips."""
    sounds: Sounds | None
    """None of images and of cached log-mels."""
    captions: Captions

    def names(self, rows: Iterable[int]) -> tuple[str, ...]:
        """The names of some of the clips looked at."""
        return tuple(self.clips.name(int(self.picked[row])) for row in rows)


@dataclass(frozen=True)
class Embedded:
    """Embeddings of some clips of a split, and of a caption of each: (n, d) unit rows."""

    split: str
    media: Tensor
    text: Tensor
    captions: Sequence[str]


@dataclass(frozen=True)
class Examined:
    """Everything that checks look at."""

    config: Config
    """The run's, that of --config, or the defaults."""
    splits: list[Split]
    recordings: Sequence[Sequence[tuple[int, int]]] = ()
    """Groups of clips that are one recording, as a split's number and a row of it."""
    run: RunFiles | None = None
    embedded: Embedded | None = None
    not_embedded: str = ""
    """What the model embeds to NaN or infinity, if anything."""
    lacking: dict[Need, str] = field(default_factory=dict)
    """What is not there for checks, and why."""


@dataclass(frozen=True)
class Found:
    """What a check found in one place."""

    severity: Severity
    where: str
    """The split, the two splits, or a part of the run."""
    got: str
    """The value, in words."""
    count: int = 1
    total: int = 1
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One kind of fault. To add one: a record in a file of this folder, and its name in CHECKS."""

    name: str
    needs: Need
    """What must be there; else the check is named with the reason."""
    rule: str
    """What should hold, after "must"."""
    remedy: str
    find: Callable[[Examined], Iterable[Found]]


@dataclass(frozen=True)
class Finding:
    """A check's record with what it found."""

    check: Check
    found: Found

    def as_json(self) -> dict[str, Any]:
        """The row of the JSON."""
        found, check = self.found, self.check
        return {
            "check": check.name,
            "severity": found.severity,
            "where": found.where,
            "count": found.count,
            "total": found.total,
            "rule": check.rule,
            "got": found.got,
            "remedy": check.remedy,
            "examples": list(found.examples),
        }


def is_many(count: int, total: int, most: float) -> bool:
    """Whether faulty rows are a share of `most` or more, and not just a few."""
    return count >= max(most * total, FEWEST)


def over_share(
    split: Split,
    rows: np.ndarray,
    got: str,
    *,
    most: float,
    total: int,
    severity: Severity = "warning",
    names: Callable[[Iterable[int]], tuple[str, ...]] | None = None,
) -> Iterator[Found]:
    """A finding where any row is faulty: `severity` from a share of `most` on, below it a note.

    Less than `FEWEST` are a note too, unless `most` is 0.

    Args:
        rows: the faulty ones' numbers.
        total: the rows that were looked at.
        names: of rows, if they are not the split's clips.
    """
    if len(rows) == 0:
        return
    level: Severity = severity if not most or is_many(len(rows), total, most) else "note"
    examples = (names or split.names)(rows[:_SHOWN].tolist())
    yield Found(level, split.name, got, len(rows), total, examples)
