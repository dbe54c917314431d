"""Semantic textual similarity: cosines against human judgements (STS12 to 16, STS-B, SICK-R).

    score = Spearman(cosine of a pair, its judgement), over all pairs of a year's subsets together

Cosines are rounded to 6 digits, so that pairs of one sentence twice, and equal pairs, are ties and
not ranked by rounding errors, as SentEval and sentence-transformers do.

Nothing is trained: SimCSE's "all" protocol. Files as SentEval publishes them, or single files:

    FOLDER/STS/STS12-en-test/STS.input.MSRpar.txt, STS.gs.MSRpar.txt, ...
    FOLDER/STS/STSBenchmark/sts-test.csv      FOLDER/SICK/SICK_test_annotated.txt

Source: Gao et al., SimCSE, arXiv 2104.08821.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional

from flap_fast.checks import ConfigError, read_text, require
from flap_fast.evaluation import papers
from flap_fast.evaluation.embed import EmbedTexts
from flap_fast.evaluation.evaluated_model import EvaluatedModel
from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.sheet import Sheet, averaged

YEARS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
SINGLE = {
    "STSBenchmark": "STS/STSBenchmark/sts-test.csv",
    "SICKRelatedness": "SICK/SICK_test_annotated.txt",
}


# Of cosines: float32 embeddings are exact to about 1e-7.
_DIGITS = 6


@dataclass
class Pairs:
    """Sentence pairs and their human judgements."""

    first: list[str]
    second: list[str]
    judged: list[float]


def read_sets(path: Path) -> dict[str, Pairs]:
    """The sets at `path` by their names.

    Raises:
        ConfigError: no such set there, a subset missing, a line that is not a pair.
    """
    found = dict(_sets(path))
    if not found:
        raise ConfigError(
            "STS data must be a file such as sts-test.csv or SICK_test_annotated.txt, or "
            f"SentEval's folder with STS/ and SICK/, got '{path}'"
        )
    for name, pairs in found.items():
        judged = len(set(pairs.judged))
        require(judged > 1, f"{path}, {name},", "hold pairs of two judgements at least", judged)
    return found


def similarity(texts: EmbedTexts, path: Path) -> dict[str, Any]:
    """Spearman's correlation of each set at `path`; their average if all seven are there.

    Collective: call on every rank. Raises `ConfigError` as `read_sets` does.
    """
    found, scores = read_sets(path), {}
    for name, pairs in found.items():
        row_of = {text: n for n, text in enumerate(dict.fromkeys(pairs.first + pairs.second))}
        rows = functional.normalize(texts(list(row_of)).double(), dim=-1).cpu()
        first, second = (rows[[row_of[t] for t in side]] for side in (pairs.first, pairs.second))
        cosines = (first * second).sum(1).numpy().round(_DIGITS)
        scores[name] = {
            "spearman": spearman(cosines, np.array(pairs.judged)),
            "pairs": len(pairs.judged),
        }
    if len(found) == len(YEARS) + len(SINGLE):
        scores["average"] = sum(s["spearman"] for s in scores.values()) / len(found)
    return scores


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of (n,) values: that of their ranks, equal values sharing the mean.

    Raises:
        ArithmeticError: some values are not finite, or all are equal.
    """
    for values in (a, b):
        if not 0 < np.ptp(values) < np.inf:
            got = f"{values.min()} to {values.max()}"
            raise ArithmeticError(f"values to correlate must be finite and differ, got {got}")
    return float(np.corrcoef(_mean_ranks(a), _mean_ranks(b))[0, 1])


def _mean_ranks(x: np.ndarray) -> np.ndarray:
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[which]


def _sets(path: Path) -> Iterator[tuple[str, Pairs]]:
    if path.is_file():
        sick = "".join(_lines(path)[:1]).startswith("pair_ID")
        yield path.stem, (_sick if sick else _benchmark)(path)
        return
    for name, subsets in YEARS.items():
        folder = path / "STS" / f"{name}-en-test"
        if folder.is_dir():
            yield name, _year(folder, subsets)
    for name, inside in SINGLE.items():
        if (path / inside).is_file():
            yield name, (_sick if name.startswith("SICK") else _benchmark)(path / inside)


def _year(folder: Path, subsets: tuple[str, ...]) -> Pairs:
    pairs = Pairs([], [], [])
    for subset in subsets:
        sentences = _lines(folder / f"STS.input.{subset}.txt")
        judged = _lines(folder / f"STS.gs.{subset}.txt")
        if len(sentences) != len(judged):
            raise ConfigError(
                f"{folder}/STS.gs.{subset}.txt must have {len(sentences)} lines, one a pair, "
                f"got {len(judged)}"
            )
        for number, (line, score) in enumerate(zip(sentences, judged, strict=True), 1):
            if score.strip():  # a pair without judgement does not count
                _add(pairs, folder / f"STS.input.{subset}.txt", number, line, (0, 1), score)
    return pairs


def _benchmark(file: Path) -> Pairs:
    """STS-B: genre, file, year, number, judgement, sentences; sometimes then a licence."""
    pairs = Pairs([], [], [])
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            _add(pairs, file, number, line, (5, 6), 4)
    return pairs


def _sick(file: Path) -> Pairs:
    """SICK-R: number, sentences, relatedness, entailment, below a header."""
    pairs = Pairs([], [], [])
    for number, line in enumerate(_lines(file)[1:], 2):
        if line.strip():
            _add(pairs, file, number, line, (1, 2), 3)
    return pairs


def _add(
    pairs: Pairs, file: Path, number: int, line: str, at: tuple[int, int], judged: int | str
) -> None:
    """Append the pair of one line; `judged` is the judgement's column, or the judgement itself."""
    cells = line.split("\t")
    wanted = 1 + max(*at, judged if isinstance(judged, int) else 0)
    rule = f"be a scored pair of at least {wanted} columns, separated by tabs"
    require(len(cells) >= wanted, f"{file}:{number}", rule, f"{len(cells)} columns")
    try:
        score = float(cells[judged] if isinstance(judged, int) else judged)
        first, second = (" ".join(cells[n].split()) for n in at)
        if not math.isfinite(score):
            raise ValueError(f"its score is {score}")
    except ValueError as error:
        raise ConfigError(
            f"{file}:{number} must be a scored pair, tab-separated: {error}"
        ) from None
    pairs.first.append(first)
    pairs.second.append(second)
    pairs.judged.append(score)


def _lines(file: Path) -> list[str]:
    """The lines of a SentEval file: quotes are not special, and only a newline ends a line."""
    text = read_text("an STS file", file)
    return text.removesuffix("\n").split("\n") if text else []


def _check(model: EvaluatedModel, path: Path) -> None:
    read_sets(path)


def _score(model: EvaluatedModel, path: Path) -> dict[str, Any]:
    return similarity(model.sentences, path)


def _sheet(name: str, found: dict[str, Any], path: str) -> Sheet:
    reported = [(papers.cited(row), row.sts) for row in papers.SENTEVAL]
    return averaged(f"STS, {name}: spearman x 100", found, "spearman", reported)


EVALUATION = Evaluation(
    name="sts", data="sentences", check=_check, score=_score, sheet=_sheet, metrics=None
)
