"""Probes: classifiers beside scikit-learn's, folds, and that no clip is seen before its test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.evaluation import classifiers
from flap_fast.evaluation.classifiers import (
    LINEAR,
    Classifier,
    logistic_regressions,
    train_linear,
    train_nearest,
)
from flap_fast.evaluation.folds import grouped_folds, make_folds
from flap_fast.evaluation.probe import _cross_validated, probe
from flap_fast.ranks import Ranks


def clusters(n: int, D: int, C: int) -> tuple[Tensor, Tensor]:
    """(n, D) features of different scales and offsets around C centres, and their classes."""
    random = np.random.default_rng(n)
    y = random.permutation(np.arange(n) % C)
    x = random.normal(size=(n, D)) * random.uniform(0.01, 10, D) + 3
    return torch.tensor(x + 0.5 * random.normal(size=(C, D))[y]), torch.tensor(y)


@pytest.mark.parametrize(("n", "D", "C"), [(200, 16, 5), (60, 100, 3), (90, 8, 2)])
def test_logistic_regressions_are_scikit_learns(n: int, D: int, C: int):
    x, y = clusters(n, D, C)
    z = StandardScaler().fit_transform(x)
    found = logistic_regressions(torch.tensor(z), y, LINEAR.settings, 1e-7)
    for l2, weight in zip(LINEAR.settings, found, strict=True):
        theirs = LogisticRegression(C=1 / (n * l2), tol=1e-10, max_iter=100_000).fit(z, y)
        if C == 2:  # theirs has one weight vector, whose penalty is twice that of two
            theirs = LogisticRegression(C=2 / (n * l2), tol=1e-10, max_iter=100_000).fit(z, y)
            between = weight[:, 1] - weight[:, 0]
            np.testing.assert_allclose(between[:-1], theirs.coef_[0], atol=1e-4)
            continue
        np.testing.assert_allclose(weight[:-1].T, theirs.coef_, atol=1e-4)
        probabilities = (torch.tensor(z) @ weight[:-1] + weight[-1]).softmax(1)
        np.testing.assert_allclose(probabilities, theirs.predict_proba(z), atol=1e-4)


def test_a_probe_predicts_what_scikit_learn_predicts():
    x, y = clusters(300, 40, 6)
    scaled = StandardScaler().fit(x[:100])
    predicted = train_linear(x[:100], y[:100], LINEAR.settings)(x[100:])
    for l2, found in zip(LINEAR.settings, predicted, strict=True):
        theirs = LogisticRegression(C=1 / (100 * l2), tol=1e-10, max_iter=100_000)
        theirs.fit(scaled.transform(x[:100]), y[:100])
        np.testing.assert_array_equal(found, theirs.predict(scaled.transform(x[100:])))


def test_the_least_loss_is_found_in_few_steps_where_features_are_nearly_one(
    monkeypatch: pytest.MonkeyPatch,
):
    """The gradient over the weights, by hand. Without scaled axes L-BFGS takes up to 449 steps."""
    monkeypatch.setattr(classifiers, "_MAX_STEPS", 20)
    x, y = clusters(200, 64, 8)
    random = torch.Generator().manual_seed(0)
    axes = torch.randn(2, 64, generator=random, dtype=torch.float64)
    x = 1e-3 * x + torch.randn(200, 2, generator=random, dtype=torch.float64) @ axes
    z = (x - x.mean(0)) / x.std(0, correction=0)
    found = logistic_regressions(z, y, LINEAR.settings)
    for l2, weight in zip(LINEAR.settings, found, strict=True):
        error = (z @ weight[:-1] + weight[-1]).softmax(1) - torch.eye(8)[y]
        assert (z.T @ error / 200 + l2 * weight[:-1]).abs().max() < 1e-5
        assert error.mean(0).abs().max() < 1e-5


def test_a_fit_that_does_not_converge_is_an_error(monkeypatch: pytest.MonkeyPatch):
    x, y = clusters(20, 4, 2)
    monkeypatch.setattr(classifiers, "_MAX_STEPS", 2)
    with pytest.raises(ArithmeticError, match=r"of 20 clips must converge .* with l2 = 0\.001"):
        logistic_regressions(x, y, [1e-3])


def test_a_feature_that_never_changes_and_a_class_that_is_absent_change_nothing():
    x, y = clusters(60, 6, 3)
    plain = train_linear(x, y, LINEAR.settings)(x)
    constant = torch.cat([x, torch.full((60, 1), 7.0)], 1)
    assert torch.equal(train_linear(constant, y, LINEAR.settings)(constant), plain)
    assert torch.equal(train_linear(x, 2 * y, LINEAR.settings)(x), 2 * plain)


def test_nearest_neighbours_are_scikit_learns():
    x, y = clusters(301, 12, 2)
    predicted = train_nearest(x[:200], y[:200], [1, 3, 5, 21])(x[200:])
    for k, found in zip([1, 3, 5, 21], predicted, strict=True):
        theirs = KNeighborsClassifier(k, metric="cosine").fit(x[:200], y[:200])
        np.testing.assert_array_equal(found, theirs.predict(x[200:]))


def test_of_classes_with_equally_many_neighbours_the_nearer_one_is_taken():
    angles = torch.tensor([40.0, 60.0, -45.0, -46.0]).deg2rad()
    x = torch.stack([angles.cos(), angles.sin()], 1).double()
    query = torch.tensor([[1.0, 0.0]]).double()
    # The nearest is of class 0, the two of class 1 are nearer than the two of class 0.
    y = torch.tensor([0, 0, 1, 1])
    assert train_nearest(x, y, [1, 4, 20])(query)[:, 0].tolist() == [0, 1, 1]


@pytest.mark.parametrize("seed", range(8))
def test_folds_of_whole_sources_are_scikit_learns(seed: int):
    random = np.random.default_rng(seed)
    groups = np.unique(random.integers(0, 11 + 6 * seed, 300), return_inverse=True)[1]
    classes = random.integers(0, 6, 300)
    expected = np.empty(300, int)
    for n, (_, test) in enumerate(StratifiedGroupKFold(5).split(classes, classes, groups)):
        expected[test] = n
    np.testing.assert_array_equal(grouped_folds(classes, groups, 5), expected)


def test_folds_are_the_datas_else_of_sources_else_stratified():
    classes, none = np.arange(24) % 2, [""] * 24
    given = [str(10 - n % 3) for n in range(24)]
    found = make_folds(classes, given, given[::-1])
    assert (found.names, found.made_by) == (("8", "9", "10"), "the data's 3 folds")
    beside = ["a", ""] + [""] * 22  # some have none, which is not asked
    assert make_folds(classes, given, beside).made_by == "the data's 3 folds"
    split = [f"take {n // 3}" for n in range(24)]
    assert make_folds(classes, given, split).made_by.endswith("3 folds, 8 sources in several")
    assert found.of_clip[:4].tolist() == [2, 1, 0, 2]
    found = make_folds(classes, none, given)
    assert (found.names, found.made_by) == (("8", "9", "10"), "one of 3 sources left out")
    found = make_folds(classes, none, [f"take {n // 2}" for n in range(24)])
    assert found.made_by == "5 folds of 12 whole sources"
    assert all(len(set(found.of_clip[n : n + 2])) == 1 for n in range(0, 24, 2))
    for sources in (none, ["one"] * 24):
        found = make_folds(classes, none, sources)
        assert found.made_by == "5 stratified folds"
        assert np.bincount(found.of_clip[classes == 0]).max() == 3
        assert np.bincount(found.of_clip).tolist() == [5, 5, 5, 5, 4]


@pytest.mark.parametrize(
    ("folds", "sources", "message"),
    [
        (["1", "", "2"], [""] * 3, "must have a fold each, or none, got '1 of 3 without'"),
        (["1", "1", "2"], [""] * 3, r"folds of a probe's clips must be three .* got '2 \(1, 2\)';"),
        ([""] * 3, ["a", "b", "a"], r"sources of .* `source`, or leave that column out"),
        ([""] * 3, ["a", "b", ""], "must have a source each, or none, got '1 of 3 without'"),
    ],
)
def test_folds_that_cannot_be_are_refused(
    folds: Sequence[str], sources: Sequence[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        make_folds(np.array([0, 1, 0]), folds, sources)


def told(settings: Sequence[float], calls: list) -> Classifier:
    """Says a clip's class where the setting is 0, its opposite where it is 1; notes what it saw."""

    def train(x: Tensor, y: Tensor, settings: Sequence[float]):
        seen = set(x[:, 0].long().tolist())

        def predict(x: Tensor) -> Tensor:
            calls.append((seen, set(x[:, 0].long().tolist())))
            return torch.stack([(x[:, 1] + setting).long() % 2 for setting in settings])

        return predict

    return Classifier("turn", tuple(settings), train)


def test_no_clip_is_seen_before_it_is_tested_and_its_class_chooses_nothing():
    """Four folds of three clips; in the first, classes are the opposite of the features'."""
    fold = torch.arange(12) % 4
    feature = torch.arange(12) // 4 % 2
    x = torch.stack([torch.arange(12), feature], 1).double()
    y = torch.where(fold == 0, 1 - feature, feature)
    calls: list = []
    found = _cross_validated(told([1, 0], calls), x, y, fold, 4, Ranks(), "a test")
    assert all(not seen & tested for seen, tested in calls)
    pairs, tests = calls[:12], calls[12:]  # each of six pairs is tested on both of its folds
    assert {len(seen) for seen, _ in pairs} == {6}
    assert [sorted(tested) for _, tested in tests] == [[n, n + 4, n + 8] for n in range(4)]
    assert {len(seen) for seen, _ in tests} == {9}
    # The others say that a feature is the class; on the first fold it is its opposite.
    assert found["turn"] == [0, 0, 0, 0]
    assert found["of_fold"] == [0, 1, 1, 1]
    assert found["accuracy"] == 0.75
    assert found["std"] == 0.5


def test_of_settings_that_are_equally_good_the_first_is_taken():
    x, y = clusters(40, 3, 2)
    x[:, 1] = y
    found = _cross_validated(told([2, 0], []), x, y, torch.arange(40) % 5, 5, Ranks(), "a test")
    assert found["turn"] == [2] * 5


def labelled(n: int) -> list[tuple[str, ...]]:
    return [(f"class {i % 3}",) for i in range(n)]


def test_classes_that_features_tell_are_found_and_others_are_not():
    names = labelled(90)
    y = torch.tensor([i % 3 for i in range(90)])
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(90, 8, generator=random)
    features = {"joint": noise + 6 * torch.eye(8)[y], "pooled": noise}
    clear = {name: torch.cat([rows, rows[:1]]) for name, rows in features.items()}
    found = probe(clear, [*names, ()], [""] * 91, [""] * 91)
    assert (found["clips"], found["unlabelled"], found["classes"]) == (90, 1, 3)
    assert found["folds"] == "5 stratified folds"
    for kind in ("linear", "knn"):
        assert found["joint"][kind]["accuracy"] > 0.98
        assert abs(found["pooled"][kind]["accuracy"] - 1 / 3) < 0.15
    assert found["chance"]["accuracy"] == pytest.approx(1 / 3)


def test_chance_is_the_training_folds_most_frequent_class():
    """In fold 1 `a` is rare, but not in the others; in 2 and 3 the others say `a` too."""
    labels = [("b",)] * 3 + [("a",)] + [("a",), ("a",), ("b",)] * 2
    folds = ["1"] * 4 + ["2"] * 3 + ["3"] * 3
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    found = probe({"joint": x}, labels, folds, [""] * 10)
    # Without fold 2 there are 3 of `a` and 4 of `b`; the same without 3.
    assert found["chance"]["of_fold"] == pytest.approx([1 / 4, 1 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("labels", "folds", "message"),
    [
        (
            [("a",), ("b",)] * 2,
            "",
            r"a probe must be at least 5, one a fold, got '4 in \d folds",
        ),
        ([()] * 9, "", "the clips of a probe must have labels, got 'none'"),
        ([("a",)] * 9, "", r"classes of a probe must be two or more, got '1 \(a\)'"),
        ([("a",)] * 4 + [("a", "b")] * 5, "", "one label, got 5 of 9 with more, such as a and b;"),
        ([("a",)] * 8 + [("b",)], "", r"class 'b' .* two folds or more, got '\d alone \(5 strat"),
        ([("a",), ("b",), ("b",)] * 3, "123", r"class 'a' .* got '1 alone \(the data's 3 folds\)'"),
    ],
)
def test_labels_that_make_no_probe_are_refused(labels: list, folds: str, message: str):
    clips = len(labels)
    given = list(folds * 3) or [""] * clips
    with pytest.raises(ConfigError, match=message):
        probe({"joint": torch.zeros(clips, 2)}, labels, given, [""] * clips)
