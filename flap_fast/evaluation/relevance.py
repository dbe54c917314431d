"""Retrieval by queries of a table, which says which clips are right: any number for each.

Its columns are `query` and `audio_filenames` (of images `image_filenames`): a list, in brackets and
quotes, of files' names or clips' ids, as in the annotations of DCASE 2025 Task 6. Queries need not
be captions. All other clips of the data are wrong, also one that has the query as its caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flap_fast.checks import ConfigError, require
from flap_fast.evaluation.chance import chance_of_any
from flap_fast.evaluation.embed import Embeddings, Texts
from flap_fast.evaluation.equal_captions import Pairs
from flap_fast.evaluation.evaluated_model import EvaluatedModel
from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.retrieval import scores_of_pairs
from flap_fast.evaluation.sheet import Sheet, percent
from flap_fast.files import ManifestError, listed_texts, read_rows


def read_relevance(
    file: str, names: Sequence[Sequence[str]], modality: str
) -> tuple[list[str], Pairs]:
    """The queries of a table, and all (query, right clip).

    Args:
        names: the names of each clip.

    Raises:
        ConfigError: no such table, a row without a query or names, a name of no clip or of several.
    """
    require(Path(file).is_file(), "eval.relevance", "name an existing file", file)
    column, clips = f"{modality}_filenames", {}
    for clip, own in enumerate(names):
        for name in own:
            clips.setdefault(name, set()).add(clip)
    queries: list[str] = []
    pairs: set[tuple[int, int]] = set()
    try:
        for line, row in read_rows(Path(file)):
            query, right = str(row.get("query") or "").strip(), _listed(row.get(column))
            rule = f"have a query and a list of names in {column}"
            remedy = "write ['a.wav', 'b.wav']"
            require(bool(query and right), f"{file}:{line}", rule, dict(row), remedy)
            for name in right:
                found = clips.get(name, ())
                require(len(found) == 1, f"{name} of {file}:{line}", "name one clip", len(found))
                pairs |= {(len(queries), clip) for clip in found}
            queries.append(query)
    except ManifestError as error:
        raise ConfigError(str(error)) from None
    require(bool(queries), file, "hold queries", "none")
    return queries, sorted(pairs)


def _listed(cell: object) -> list[str]:
    """The names in a cell; none if it holds no list of texts."""
    try:
        names = listed_texts(cell) if isinstance(cell, str) else cell
    except ValueError:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return [name.strip() for name in names]


def _read(model: EvaluatedModel, data: Texts | Embeddings) -> tuple[list[str], Pairs]:
    return read_relevance(model.config.eval.relevance, data.names, model.modality)


def _score(model: EvaluatedModel, e: Embeddings) -> dict[str, Any]:
    queries, pairs = _read(model, e)
    found = scores_of_pairs(model.texts(queries), e.media, pairs, model.ranks)
    right = torch.tensor(pairs)[:, 0].bincount()
    counts = {"queries": len(queries), "clips": len(e.media), "right": len(pairs)}
    return {**found, "chance": chance_of_any(right, len(e.media)), **counts}


def _sheet(name: str, found: dict[str, Any], path: str) -> Sheet:
    columns = ("R@1", "R@5", "R@10", "mAP@10", "mAP@16")
    ours = ("this model", *(percent(found[column]) for column in columns))
    chance = ("chance", *(percent(found["chance"][column]) for column in columns[:3]), "-", "-")
    title = f"Relevance, {name}: {found['queries']} queries, {found['clips']} clips"
    note = f"In percent. {found['right'] / found['queries']:.2f} right clips a query."
    return Sheet(title, ("system", *columns), [ours, chance], note=note)


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    return {f"relevance/{n}": found[n] for n in ("R@1", "R@5", "R@10", "mAP@10", "mAP@16")}


EVALUATION = Evaluation(
    name="relevance",
    data="clips",
    check=_read,
    score=_score,
    sheet=_sheet,
    metrics=_metrics,
    selects=lambda found: found["mAP@10"],
)
