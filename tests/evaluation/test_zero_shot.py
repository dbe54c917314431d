"""Classes from what they are called: by hand, and beside scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.evaluation.prompts import AUDIO_29, IMAGENET_80, prompts
from flap_fast.evaluation.zero_shot import average_precision, class_vectors, zero_shot

# Cosines of four sounds with the classes cat, cow and dog.
COSINES = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.6, 0.3], [0.4, 0.4, 0.2], [0.1, 0.2, 0.3]])
CLASSES = ("cat", "cow", "dog")


def texts(prompts: Sequence[str]) -> Tensor:
    """Each of the three classes on an axis of its own, whatever is said around it."""
    return torch.eye(3)[[next(n for n, c in enumerate(CLASSES) if c in p) for p in prompts]]


def scored(labels: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> dict:
    return zero_shot(COSINES, labels, classes, ("a {label}",), texts)


def test_the_class_with_the_highest_cosine_counts_and_of_equal_ones_the_first():
    found = scored([("cat",), ("dog",), ("cow",), ("cow",)])
    # Places of the right classes: 0, 1, 1 (a tie that cat wins) and 1.
    assert found["top_1"] == 0.25
    assert found["top_5"] == 1
    assert found["mAP@10"] == (1 + 3 / 2) / 4
    assert found["chance"]["top_1"] == pytest.approx(1 / 3)
    assert (found["clips"], found["classes"], found["unlabelled"]) == (4, 3, 0)


def test_any_of_a_sounds_labels_is_right():
    found = scored([("dog", "cow"), ("cow",), ("dog", "cat"), ("dog",)])
    assert found["top_1"] == 0.75
    assert found["chance"]["top_1"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_sounds_without_labels_are_counted_and_left_out():
    found = scored([("cat",), (), ("cow",), ()], CLASSES)
    assert (found["clips"], found["unlabelled"]) == (2, 2)
    assert found["top_1"] == 0.5


def test_labels_that_are_no_class_and_data_without_labels_are_refused():
    with pytest.raises(ConfigError, match="a label must be one of the 3 classes, got 'owl'"):
        scored([("owl",), (), (), ()], CLASSES)
    with pytest.raises(ConfigError, match="zero-shot data must have labels"):
        scored([(), (), (), ()])


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draws = torch.Generator().manual_seed(0)
    audio = torch.nn.functional.normalize(torch.randn(30, 3, generator=draws), dim=1)
    audio[20:] = audio[:10]  # equal scores
    right = torch.rand(30, 3, generator=draws) < 0.4
    right[~right.any(1), 0] = True
    labels = [[CLASSES[n] for n in row.nonzero()[:, 0]] for row in right]
    found = zero_shot(audio, labels, CLASSES, ("{label}",), texts)
    assert found["mAP"] == pytest.approx(metrics.average_precision_score(right, audio))
    precision = metrics.label_ranking_average_precision_score(right.int(), audio)
    assert found["mAP@10"] == pytest.approx(precision)
    # One label each.
    one = right.int().argmax(1)
    found = zero_shot(audio, [[CLASSES[n]] for n in one], CLASSES, ("{label}",), texts)
    assert found["top_1"] == pytest.approx(metrics.top_k_accuracy_score(one, audio, k=1))


def test_equal_scores_make_one_step_of_precision():
    right = torch.tensor([True, False, True, False])
    # All equal: precision 2/4 at recall 1, in whatever order they stand.
    assert average_precision(torch.zeros(4), right).item() == 0.5
    assert average_precision(torch.tensor([4.0, 3.0, 2.0, 1.0]), right).item() == (1 + 2 / 3) / 2


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts():
    def lopsided(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([[3.0, 0.0] if p.startswith("A") else [0.0, 1.0] for p in prompts])

    vectors = class_vectors(lopsided, ["cat", "dog"], ("A {label}", "the {label}"))
    assert torch.allclose(vectors, torch.full((2, 2), 0.5**0.5))


def test_the_papers_templates():
    assert len(set(AUDIO_29)) == 29
    assert "A {label} " in AUDIO_29
    assert "A sound of {label} followed by a sound of {label}" in AUDIO_29
    assert len(set(IMAGENET_80)) == 80
    assert all(t.endswith(".") and t.count("{label}") == 1 for t in IMAGENET_80)


def test_templates_are_one_or_a_set_or_a_file(tmp_path: Path):
    assert prompts("I hear {label}!") == ("I hear {label}!",)
    assert prompts("audio29") is AUDIO_29
    file = tmp_path / "mine.txt"
    file.write_text("{label}\n\nA {label} \n")
    assert prompts(str(file)) == ("{label}", "A {label} ")
    file.write_text("a sound\n")
    with pytest.raises(ConfigError, match=r"contain \{label\}, got 'a sound'"):
        prompts(str(file))
    file.write_bytes("un café: {label}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"eval\.templates must .* UTF-8"):
        prompts(str(file))
    with pytest.raises(ConfigError, match=r"eval.templates must .* sets: audio29, imagenet80"):
        prompts("audio30")
