"""SentEval's transfer tasks: the classifier beside PyTorch's parts, folds beside scikit-learn's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flap_fast.checks import ConfigError
from flap_fast.evaluation import logistic
from flap_fast.evaluation.logistic import Fit, fit, stratified_folds
from flap_fast.evaluation.transfer import MRPC, NESTED, SST2, TREC, Examples, _data, transfer


def examples(rows: int, features: int, classes: int, noise: float) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=draws)
    scores = x @ torch.randn(features, classes, generator=draws)
    return x, (scores + noise * torch.randn(rows, classes, generator=draws)).argmax(1)


@pytest.mark.parametrize("classes", [2, 6])
def test_folds_are_those_of_scikit_learn(classes: int):
    model_selection = pytest.importorskip("sklearn.model_selection")
    y = np.random.default_rng(0).integers(0, classes, 130)
    theirs = model_selection.StratifiedKFold(10, shuffle=True, random_state=1111).split(y, y)
    for ours, wanted in zip(stratified_folds(y, 10, 1111), theirs, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, wanted, strict=True))


def one_after_the_other(x: Tensor, y: Tensor, train, dev, l2: float) -> tuple[float, Tensor]:
    """SentEval's procedure for one classifier, with PyTorch's layer, loss and optimizer."""
    with torch.random.fork_rng():
        torch.manual_seed(1111)
        layer = nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=l2)
    draws = np.random.RandomState(1111)
    best, kept, worse, epochs = -1.0, None, 0, 0
    while epochs <= 200 and worse < 6:
        for _ in range(4):
            order = draws.permutation(len(train))
            for first in range(0, len(train), 64):
                rows = train[order[first : first + 64]]
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
                optimizer.step()
        epochs += 4
        accuracy = (layer(x[dev]).argmax(1) == y[dev]).double().mean().item()
        if accuracy > best:
            best, kept = accuracy, torch.cat([layer.weight.T, layer.bias[None]]).detach().clone()
        else:
            worse += 1
    assert kept is not None
    return best, kept


def test_fits_side_by_side_are_those_one_after_the_other():
    """Of four sizes and three penalties; each stops when its own dev rows say so."""
    x, y = examples(150, 5, 3, 2.0)
    parts = [(np.r_[0:n, n + 20 : 150], np.r_[n : n + 20]) for n in range(0, 120, 15)]
    parts += [(train[cut:], dev) for cut, (train, dev) in enumerate(parts[:3], 1)]
    fits = [Fit(train, dev, l2) for train, dev in parts for l2 in (1e-5, 1e-2, 1.0)]
    found = fit(x, y, fits)
    for n, one in enumerate(fits):
        accuracy, weight = one_after_the_other(x, y, one.train, one.dev, one.l2)
        assert found.dev_accuracy[n].item() == pytest.approx(accuracy, abs=1e-12)
        assert torch.allclose(found.weight[n], weight, atol=1e-5)


def test_the_features_of_a_pair_are_its_distance_and_its_product():
    def two(sentences: Sequence[str]) -> Tensor:
        return torch.tensor([{"u": [1.0, 2.0], "v": [3.0, -1.0]}[s] for s in sentences])

    x, y = _data(two, Examples([("u", "v"), ("v", "v")], np.array([0, 1])))
    assert x.tolist() == [[2, 3, 3, -2], [0, 0, 9, 1]]
    assert y.tolist() == [0, 1]


def feeling(sentences: Sequence[str]) -> Tensor:
    """24 ones for each word that tells: many small weights, of which few steps are enough."""
    words = ("good", "bad", "what", "who", "where", "many", "why", "means")
    return torch.tensor([[float(w in s) for w in words] for s in sentences]).repeat(1, 24)


def write(file: Path, lines: Sequence[str], encoding: str = "utf-8") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines), encoding=encoding)


QUESTIONS = {
    "ABBR": "means",
    "DESC": "why",
    "ENTY": "what",
    "HUM": "who",
    "LOC": "where",
    "NUM": "many",
}


def senteval(folder: Path) -> Path:
    for positive, negative in NESTED.values():
        write(folder / positive, [f"a good film {n} caf\xe9" for n in range(40)], "latin-1")
        write(folder / negative, [f"a bad film {n}" for n in range(40)], "latin-1")
    for file in SST2:
        write(folder / file, [f"{('bad', 'good')[n % 2]} {n}\t{n % 2}" for n in range(40)])
    for file in TREC:
        lines = [f"{kind}:x {word} is {n} ?" for n in range(12) for kind, word in QUESTIONS.items()]
        write(folder / file, lines)
    for file in MRPC:
        pairs = [("good", "good", 1), ("good", "bad", 0)] * 20
        rows = [f"{same}\t1\t2\t{a} {n}\t{b} {n}" for n, (a, b, same) in enumerate(pairs)]
        write(folder / file, ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows])
    return folder


def test_separable_tasks_are_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logistic, "_MAX_EPOCHS", 40)
    monkeypatch.setattr("flap_fast.evaluation.transfer._FOLDS", 4)
    found = transfer(feeling, senteval(tmp_path))
    assert {name: s["accuracy"] for name, s in found.items() if name != "average"} == dict.fromkeys(
        (*NESTED, "TREC", "MRPC", "SST2"), 1.0
    )
    assert found["average"] == 1
    assert (found["MR"]["sentences"], found["TREC"]["sentences"]) == (80, 72)


def test_what_is_not_as_published_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="must be SentEval's folder"):
        transfer(feeling, tmp_path)
    write(tmp_path / TREC[0], ["FOOD:x what is it ?"])
    with pytest.raises(ConfigError, match=r"train_5500.label:1 must be CLASS:kind and a question"):
        transfer(feeling, tmp_path)
    (tmp_path / TREC[0]).unlink()
    write(tmp_path / MRPC[0], ["header", "1\t2\t3\tone sentence"])
    with pytest.raises(ConfigError, match=r"msr_paraphrase_train.txt:2 must be as SentEval has it"):
        transfer(feeling, tmp_path)
