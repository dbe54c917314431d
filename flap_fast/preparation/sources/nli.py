"""SNLI and MultiNLI: a premise with one sentence that follows from it and one that contradicts it.

    FOLDER/**/snli_1.0_{train,dev,test}.jsonl                     gold_label,sentence1,sentence2
    FOLDER/**/multinli_1.0_{train,dev_matched,dev_mismatched}.jsonl
    FOLDER/nli_for_simcse.csv                                     sent0,sent1,hard_neg

A premise that has both gives one triple, of the first of each in the files' order; the others give
none. Both corpora's `train` become one. Pairs without a gold label (`-`) do not count.

Source: Gao et al., "SimCSE: Simple Contrastive Learning of Sentence Embeddings", EMNLP 2021.
"""

from __future__ import annotations

import re
from pathlib import Path

from flap_fast.files import ManifestError
from flap_fast.preparation.sources.layout import Source, table

Triples = dict[str, list[dict[str, str]]]
"""Of each split: premise, entailment, contradiction."""

_FILE = re.compile(r"(?:snli|multinli)_1\.0_(\w+)\.jsonl")
_RELATIONS = ("entailment", "contradiction")


def read(folder: Path) -> Triples:
    """The triples of each split; raises `ManifestError` without any file of these names."""
    ready = folder / "nli_for_simcse.csv"
    if ready.is_file():
        names = ("sent0", "sent1", "hard_neg")
        rows = (tuple(row[name].strip() for name in names) for _, row in table(ready, names))
        keys = ("premise", *_RELATIONS)
        return {"train": [dict(zip(keys, row, strict=True)) for row in rows if all(row)]}
    files = sorted(folder.rglob("*.jsonl"), key=lambda file: (file.name[0] != "s", file))
    found = {file: match.group(1) for file in files if (match := _FILE.fullmatch(file.name))}
    if not found:
        raise ManifestError(
            f"NLI must have snli_1.0_*.jsonl, multinli_1.0_*.jsonl or nli_for_simcse.csv, got "
            f"'{folder}' without"
        )
    splits: dict[str, dict[str, dict[str, str]]] = {}
    for file, split in found.items():
        _read(file, splits.setdefault(split, {}))
    return {
        split: [
            {"premise": premise, **{relation: found[relation] for relation in _RELATIONS}}
            for premise, found in premises.items()
            if len(found) == len(_RELATIONS)
        ]
        for split, premises in splits.items()
    }


def _read(file: Path, premises: dict[str, dict[str, str]]) -> None:
    """Add a file's first entailment and first contradiction of each premise."""
    columns = ("gold_label", "sentence1", "sentence2")
    for line, row in table(file, columns):
        relation, premise, sentence = (row[name] for name in columns)
        if not isinstance(premise, str) or not isinstance(sentence, str):
            raise ManifestError(f"{file}:{line}: sentence1 and sentence2 must be texts")
        if relation in _RELATIONS and premise.strip() and sentence.strip():
            found = premises.setdefault(premise.strip(), {})
            found.setdefault(relation, sentence.strip())


NLI = Source(
    name="nli",
    kind="sentences",
    folder="snli_1.0_*.jsonl, multinli_1.0_*.jsonl, or nli_for_simcse.csv",
    splits="theirs, both corpora's train as one",
    read=read,
)
