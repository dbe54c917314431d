"""The texts of a step besides its captions: these a second time, negatives, triples of sentences.

    FILE.jsonl     {"premise": "A man sings.", "entailment": "Someone sings.", "contradiction": ...}
    FILE.tsv .csv  the same columns, or SimCSE's: sent0, sent1, hard_neg

Triples have a separate sampler, a function of only the seed and the step, with epochs of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flap_fast.config import Config
from flap_fast.data.random_streams import Stream
from flap_fast.data.sampler import Sampler
from flap_fast.files import ManifestError, read_rows, whole_characters
from flap_fast.losses.pairs import negative_names

Triple = tuple[str, str, str]

# Each sentence's name and, in SimCSE's file (SNLI and MultiNLI), its column.
_COLUMNS = {"premise": "sent0", "entailment": "sent1", "contradiction": "hard_neg"}
_SUFFIXES = (".jsonl", ".tsv", ".csv")


class Sentences:
    """The texts of a step, in the order of `Loss.sentences`.

    Raises:
        ManifestError: see `read_triples`.
        ConfigError: fewer triples than clips in a step, which would be each other's negatives.
    """

    def __init__(self, config: Config):
        self._names = config.loss.sentences
        self._triples: list[Triple] = []
        if "premise" in self._names:
            self._triples = read_triples(config.data.nli)
            self._sampler = Sampler(
                np.zeros(len(self._triples), np.int64),
                config.train.global_batch,
                config.run.seed,
                stream=Stream.NLI,
                what="triples of data.nli",
            )

    def __call__(
        self,
        step: int,
        rows: np.ndarray,
        captions: Sequence[str],
        negatives: Sequence[Sequence[str]] = (),
    ) -> list[str]:
        """A sentence of each name for each caption, `text` first.

        Args:
            rows: (B,) which of the step's global batch these are.
            negatives: as many of each caption's clip as the losses ask for.
        """
        texts: dict[str, Sequence[str]] = {"text": captions}
        columns = list(zip(*negatives, strict=True))
        texts |= zip(negative_names(len(columns)), columns, strict=True)
        if self._triples:
            triples = (self._triples[row] for row in self._sampler.samples(step)[rows])
            texts |= zip(_COLUMNS, zip(*triples, strict=True), strict=True)
        return [text for name in self._names for text in texts[name.removesuffix("_again")]]


def read_triples(paths: Sequence[Path]) -> list[Triple]:
    """Premise, entailment and contradiction of every row, the files of a folder by name.

    Raises:
        ManifestError: a folder without such files, a line that is not a row, a row that lacks a
            sentence.
    """
    files = [file for path in paths for file in triple_files(path)]
    return [_triple(file, line, row) for file in files for line, row in read_rows(file)]


def triple_files(path: Path) -> Iterator[Path]:
    """The files of one path of data.nli, by name."""
    if not path.is_dir():
        yield path
        return
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not found:
        raise ManifestError(f"data.nli must hold {', '.join(_SUFFIXES)} files, got none in {path}")
    yield from found


def _triple(file: Path, line: int, row: dict[str, Any]) -> Triple:
    first, second, third = (_text(file, line, row, name) for name in _COLUMNS)
    return first, second, third


def _text(file: Path, line: int, row: dict[str, Any], name: str) -> str:
    value = row.get(name, row.get(_COLUMNS[name]))
    if not isinstance(value, str) or not value.strip():
        found = f"; its columns are {', '.join(map(repr, row))}" if value is None else ""
        raise ManifestError(
            f"{file}:{line}: {name} must be a text with words, got {value!r}{found}"
        )
    return whole_characters(value.strip())
