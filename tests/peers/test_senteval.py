"""SentEval's classifiers, folds and STS, beside ours, on embeddings of the demo's captions."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flap_fast.evaluation import logistic, transfer
from flap_fast.evaluation.logistic import Fit, fit
from flap_fast.evaluation.sts import similarity
from flap_fast.ranks import Ranks
from tests.peers.conftest import DEMO, Clap

pytest.importorskip("senteval")
FOLDS, EPOCHS, PER_CLASS = 3, 40, 49
WHY = "float32; autograd's gradients there"


class Captions(NamedTuple):
    """N captions, their embeddings (N, d) and classes (N,)."""

    texts: list[str]
    x: Tensor
    y: Tensor


@pytest.fixture(scope="module")
def senteval() -> Iterator[SimpleNamespace]:
    """Its modules on a CPU and a Python of today: it calls `cuda()`, and `inspect.getargspec`."""
    from senteval import sts, utils  # pyright: ignore[reportMissingImports] - not on PyPI
    from senteval.tools import validation  # pyright: ignore[reportMissingImports]

    before = np.random.get_state()
    with (
        mock.patch.object(inspect, "getargspec", inspect.getfullargspec, create=True),
        mock.patch.object(Tensor, "cuda", lambda tensor: tensor),
        mock.patch.object(nn.Module, "cuda", lambda module: module),
        mock.patch.object(validation, "MLP", partial(validation.MLP, cudaEfficient=True)),
        torch.random.fork_rng(),
    ):
        yield SimpleNamespace(validation=validation, sts=sts, dotdict=utils.dotdict)
    np.random.set_state(before)


@pytest.fixture(scope="module")
def captions(exact: Clap) -> Captions:
    """As many of instruments, effects and percussion; embeddings of mean 0 and deviation 8, on
    which few epochs are enough."""
    rows = [json.loads(line) for line in (DEMO / "manifest.jsonl").read_text().splitlines()]
    found: list[tuple[str, int]] = []
    for number, label in enumerate(("instrument", "sfx", "percussion")):
        some = dict.fromkeys(row["caption"] for row in rows if row["labels"] == [label])
        found += [(text, number) for text in list(some)[:PER_CLASS]]
    mixed = [found[n] for n in np.random.RandomState(0).permutation(len(found))]
    texts, y = map(list, zip(*mixed, strict=True))
    x = exact.opened.embed_text(texts)
    return Captions(texts, 8 * (x - x.mean(0)) / x.std(0), torch.tensor(y))


def test_a_classifier_has_the_same_weights(captions, senteval, largest):
    train, dev = np.arange(100), np.arange(100, len(captions.y))
    x, y = captions.x.numpy(), captions.y.numpy()
    penalties = (1e-5, 1e-2, 1.0)
    ours = fit(captions.x, captions.y, [Fit(train, dev, l2) for l2 in penalties])
    differences, accuracies = [], []
    for n, l2 in enumerate(penalties):
        theirs = senteval.validation.MLP({"nhid": 0}, x.shape[1], 3, l2reg=l2, seed=1111)
        accuracy = theirs.fit(x[train], y[train], validation_data=(x[dev], y[dev]))
        layer = theirs.model[0]
        weight = torch.cat([layer.weight.T, layer.bias[None]]).detach()
        differences.append(((ours.weight[n] - weight).abs().max() / weight.abs().max()).item())
        accuracies.append(abs(ours.dev_accuracy[n].item() - accuracy))
        assert accuracy > 0.6  # of three classes of one size
    largest("SentEval", "weights of a classifier, by the largest", max(differences), 1e-5, WHY)
    largest("SentEval", "its accuracy on the dev rows", max(accuracies), 1e-12, "")


def test_nested_folds_single_folds_and_a_split_have_the_same_accuracy(
    captions, senteval, largest, monkeypatch
):
    """With the L2 weight that each chooses, which makes little difference here."""
    monkeypatch.setattr(transfer, "_FOLDS", FOLDS)
    monkeypatch.setattr(logistic, "_MAX_EPOCHS", EPOCHS)
    settings = {"nclasses": 3, "seed": 1111, "usepytorch": True, "cudaEfficient": True}
    settings["classifier"] = {"nhid": 0, "max_epoch": EPOCHS}
    x, y = captions.x.numpy(), captions.y.numpy()
    parts = [slice(0, 100), slice(100, 120), slice(120, None)]
    tensors = [(captions.x[rows], captions.y[rows]) for rows in parts]
    train, dev, test = ({"X": x[rows], "y": y[rows]} for rows in parts)
    split = {c: {"train": train[c], "valid": dev[c], "test": test[c]} for c in "Xy"}
    peer = senteval.validation
    nested = peer.InnerKFoldClassifier(x, y, settings | {"kfold": FOLDS}).run()[1]
    folded = peer.KFoldClassifier(train, test, settings | {"kfold": FOLDS}).run()[1]
    chosen = peer.SplitClassifier(split["X"], split["y"], settings).run()[1]
    pairs = [
        (transfer._nested(captions.x, captions.y, Ranks()), nested),
        (transfer._cross_validated(tensors[0], tensors[2], Ranks()), folded),
        (transfer._split(*tensors), chosen),
    ]
    assert min(theirs for _, theirs in pairs) > 45  # of three classes of one size
    difference = max(abs(100 * ours - theirs) for ours, theirs in pairs)
    why = "its are rounded to 0.01"
    largest("SentEval", "accuracy in percent: nested, folds, split", difference, 1e-2, why)


def test_sts_has_the_same_correlation(captions, senteval, largest, tmp_path: Path):
    """Of pairs of captions that are judged by the words they share."""
    pairs = list(pairwise(captions.texts))
    judged = [len(set(a.split()) & set(b.split())) for a, b in pairs]
    row_of = {text: n for n, text in enumerate(captions.texts)}

    def texts(sentences: Sequence[str]) -> Tensor:
        return captions.x[[row_of[text] for text in sentences]]

    rows = [f"g\tf\ty\t{n}\t{judged[n]}\t{a}\t{b}\n" for n, (a, b) in enumerate(pairs)]
    (tmp_path / "sts-test.csv").write_text("".join(rows))
    ours = similarity(texts, tmp_path / "sts-test.csv")["sts-test"]["spearman"]
    peer = senteval.sts.STSEval()
    peer.datasets, params = ["demo"], senteval.dotdict(batch_size=16)
    first, second = ([text.split() for text in side] for side in zip(*pairs, strict=True))
    peer.data = {"demo": (first, second, judged)}
    peer.samples = first + second
    peer.do_prepare(params, lambda *_: None)
    found = peer.run(params, lambda _, some: texts([" ".join(words) for words in some]).numpy())
    assert 0.1 < ours < 0.99
    difference = abs(found["demo"]["spearman"][0] - ours)
    largest("SentEval", "STS: Spearman's correlation", difference, 1e-6, "cosines rounded here")
