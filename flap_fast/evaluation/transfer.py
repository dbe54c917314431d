"""Linear classifiers on sentence embeddings: SentEval's seven transfer tasks.

    MR CR SUBJ MPQA   10-fold; in each fold the L2 weight is chosen by 10-fold on its training part
    TREC MRPC         the L2 weight by 10-fold on the training file; scored on the test file
    SST2              the L2 weight on the dev file; scored on the test file

The classifier is `logistic.fit`; L2 weights are 1e-5 to 1e-2. MRPC's features are [|u - v|, u * v].
Folds and their order are those of SentEval's seed 1111.

Files as SentEval's script leaves them: FOLDER/MR/rt-polarity.pos, CR/custrev.pos,
SUBJ/subj.objective, MPQA/mpqa.pos, SST/binary/sentiment-train, TREC/train_5500.label,
MRPC/msr_paraphrase_train.txt and their counterparts.

Source: Conneau and Kiela, SentEval, arXiv 1803.05449, with the settings of Gao et al., SimCSE,
arXiv 2104.08821.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.evaluation import papers
from flap_fast.evaluation.embed import EmbedTexts, rank_slice
from flap_fast.evaluation.evaluated_model import EvaluatedModel
from flap_fast.evaluation.logistic import SEED, Fit, fit, stratified_folds
from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.sheet import Sheet, averaged
from flap_fast.ranks import Ranks

_FOLDS = 10
_L2 = (1e-5, 1e-4, 1e-3, 1e-2)
_DEV_FRACTION = 0.05

NESTED = {
    "MR": ("MR/rt-polarity.pos", "MR/rt-polarity.neg"),
    "CR": ("CR/custrev.pos", "CR/custrev.neg"),
    "SUBJ": ("SUBJ/subj.objective", "SUBJ/subj.subjective"),
    "MPQA": ("MPQA/mpqa.pos", "MPQA/mpqa.neg"),
}
SST2 = tuple(f"SST/binary/sentiment-{part}" for part in ("train", "dev", "test"))
TREC = ("TREC/train_5500.label", "TREC/TREC_10.label")
MRPC = ("MRPC/msr_paraphrase_train.txt", "MRPC/msr_paraphrase_test.txt")
_QUESTIONS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


@dataclass(frozen=True)
class Examples:
    """N sentences, or pairs of them, and their classes."""

    sentences: list[tuple[str, ...]]
    classes: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[tuple[str, ...], int]]) -> Examples:
        """Examples in SentEval's order, which the folds depend on: by words, then by class."""
        ordered = sorted(rows, key=lambda row: (*(len(s.split()) for s in row[0]), row[1]))
        return cls([row[0] for row in ordered], np.array([row[1] for row in ordered]))


def transfer(texts: EmbedTexts, folder: Path, ranks: Ranks | None = None) -> dict[str, Any]:
    """Test accuracy of each task in the folder; their average if all seven are there.

    The same on all ranks. Collective: call on every rank.

    Raises:
        ConfigError: no task there, or a file that is not as published.
    """
    ranks = ranks or Ranks()
    scores: dict[str, Any] = {}
    for name, parts in read_tasks(folder):
        match [_data(texts, part) for part in parts]:
            case [(x, y)]:
                accuracy = _nested(x, y, ranks)
            case [train, test]:
                accuracy = _cross_validated(train, test, ranks)
            case data:
                accuracy = _split(*data)
        scores[name] = {"accuracy": accuracy, "sentences": len(parts[-1].classes)}
    if len(scores) == len(NESTED) + 3:
        scores["average"] = sum(s["accuracy"] for s in scores.values()) / len(scores)
    return scores


def read_tasks(folder: Path) -> Iterator[tuple[str, list[Examples]]]:
    """Each task in the folder: all of it, or training and test, or training, dev and test examples.

    Raises:
        ConfigError: no task there, or a file that is not as published.
    """
    present = [name for name, (files, _) in _TASKS.items() if (folder / files[0]).is_file()]
    if not present:
        raise ConfigError(
            f"transfer data must be SentEval's folder with MR/, TREC/, ...: '{folder}'"
        )
    for name in present:
        files, read = _TASKS[name]
        yield name, read([folder / file for file in files])


# The three ways to choose the L2 weight


def _nested(x: Tensor, y: Tensor, ranks: Ranks) -> float:
    """Mean test accuracy over ten folds, each tuned on its own training part."""
    folds = list(stratified_folds(y.cpu().numpy(), _FOLDS, SEED))
    mine = [folds[n] for n in rank_slice(_FOLDS, ranks)]
    own = [_tuned(x, y, train, test, ranks.device) for train, test in mine]
    return ranks.gather(torch.stack(own))[: len(folds)].mean().item()


def _tuned(
    x: Tensor, y: Tensor, train: np.ndarray, test: np.ndarray, device: torch.device
) -> Tensor:
    """() float64: accuracy on `test` of the classifier tuned and trained on `train`."""
    inner = stratified_folds(y[train].cpu().numpy(), _FOLDS, SEED)
    fits = [Fit(train[a], train[b], l2) for a, b in inner for l2 in _L2]
    accuracy = fit(x, y, fits).dev_accuracy.reshape(_FOLDS, len(_L2))
    return _trained_and_tested(x, y, train, test, _best(accuracy.mean(0))).to(device)


def _cross_validated(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], ranks: Ranks
) -> float:
    """Accuracy on the test file; each rank cross-validates some of the folds."""
    x, y = (torch.cat(both) for both in zip(train, test, strict=True))
    n = len(train[1])
    folds = list(stratified_folds(train[1].cpu().numpy(), _FOLDS, SEED))
    mine = [folds[n] for n in rank_slice(_FOLDS, ranks)]
    fits = [Fit(fold, held, l2) for fold, held in mine for l2 in _L2]
    accuracy = fit(x, y, fits).dev_accuracy.reshape(-1, len(_L2)).to(ranks.device)
    l2 = _best(ranks.gather(accuracy)[:_FOLDS].mean(0))
    return _trained_and_tested(x, y, np.arange(n), np.arange(n, len(y)), l2).item()


def _split(
    train: tuple[Tensor, Tensor], dev: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> float:
    """Accuracy on the test file of the fit that is best on the dev file."""
    x, y = (torch.cat(parts) for parts in zip(train, dev, test, strict=True))
    ends = np.cumsum([len(part[1]) for part in (train, dev, test)])
    parts = np.split(np.arange(ends[-1]), ends[:2])
    fitted = fit(x, y, [Fit(parts[0], parts[1], l2) for l2 in _L2])
    best = _L2.index(_best(fitted.dev_accuracy))
    return fitted.accuracy(best, x[parts[2]], y[parts[2]]).item()


def _best(accuracy: Tensor) -> float:
    """The L2 weight of the best accuracy in hundredths of a percent; the smallest of equals."""
    return _L2[int(np.argmax(np.round(100 * accuracy.cpu().numpy(), 2)))]


def _trained_and_tested(
    x: Tensor, y: Tensor, train: np.ndarray, test: np.ndarray, l2: float
) -> Tensor:
    random_state = np.random.RandomState(SEED)
    mixed = train[random_state.permutation(len(train))]
    dev = int(_DEV_FRACTION * len(train))
    fitted = fit(x, y, [Fit(mixed[dev:], mixed[:dev], l2)], random_state)
    return fitted.accuracy(0, x[test], y[test])


# Features and files


def _data(texts: EmbedTexts, examples: Examples) -> tuple[Tensor, Tensor]:
    """(N, D) float32 features and (N,) int64 classes."""
    rows = [texts(side).float() for side in map(list, zip(*examples.sentences, strict=True))]
    x = rows[0] if len(rows) == 1 else torch.cat([(rows[0] - rows[1]).abs(), rows[0] * rows[1]], 1)
    return x, torch.from_numpy(examples.classes).to(x.device)


def _opinions(positive: Path, negative: Path) -> Examples:
    yes, no = (_lines(file, "latin-1") for file in (positive, negative))
    return Examples.of([*(((_spaced(s),), 1) for s in yes), *(((_spaced(s),), 0) for s in no)])


def _questions(file: Path) -> Examples:
    """`DESC:manner How did serfdom develop ?`: the class before the colon."""
    rows = []
    for number, line in enumerate(_lines(file, "latin-1"), 1):
        label, _, rest = line.strip().partition(":")
        if label not in _QUESTIONS or " " not in rest:
            raise ConfigError(
                f"{file}:{number} must be CLASS:kind and a question, got '{line[:60]}'"
            )
        rows.append(((_spaced(rest.partition(" ")[2]),), _QUESTIONS.index(label)))
    return Examples.of(rows)


def _paraphrases(file: Path) -> Examples:
    return Examples.of([_cells(file, n, line, 0, (3, 4)) for n, line in _numbered(file)[1:]])


def _sentiments(file: Path) -> Examples:
    return Examples.of([_cells(file, n, line, 1, (0,)) for n, line in _numbered(file)])


def _cells(
    file: Path, number: int, line: str, label: int, sentences: tuple[int, ...]
) -> tuple[tuple[str, ...], int]:
    cells = line.strip().split("\t")
    try:
        return tuple(_spaced(cells[n]) for n in sentences), int(cells[label])
    except (IndexError, ValueError) as error:
        raise ConfigError(
            f"{file}:{number} must be as SentEval has it, tab-separated: {error}"
        ) from None


def _numbered(file: Path) -> list[tuple[int, str]]:
    return [(n, line) for n, line in enumerate(_lines(file, "utf-8-sig"), 1) if line.strip()]


def _lines(file: Path, encoding: str) -> list[str]:
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig" if data.startswith(codecs.BOM_UTF8) else encoding)
        return text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} must be a {encoding} text file: {error}") from None


def _spaced(text: str) -> str:
    return " ".join(text.split())


# The files of each task, and what reads them.
_TASKS: dict[str, tuple[tuple[str, ...], Callable[[list[Path]], list[Examples]]]] = {
    **{name: (files, lambda files: [_opinions(*files)]) for name, files in NESTED.items()},
    "TREC": (TREC, lambda files: [_questions(file) for file in files]),
    "MRPC": (MRPC, lambda files: [_paraphrases(file) for file in files]),
    "SST2": (SST2, lambda files: [_sentiments(file) for file in files]),
}


# The evaluation


def _check(model: EvaluatedModel, path: Path) -> None:
    for _ in read_tasks(path):
        pass


def _score(model: EvaluatedModel, path: Path) -> dict[str, Any]:
    return transfer(model.sentences, path, model.ranks)


def _sheet(name: str, found: dict[str, Any], path: str) -> Sheet:
    reported = [(papers.cited(row), row.transfer) for row in papers.SENTEVAL]
    return averaged(f"Transfer, {name}: accuracy x 100", found, "accuracy", reported)


EVALUATION = Evaluation(
    name="transfer", data="sentences", check=_check, score=_score, sheet=_sheet, metrics=None
)
