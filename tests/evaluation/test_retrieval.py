"""Places and scores: by hand, beside scikit-learn, and in chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flap_fast.checks import ConfigError
from flap_fast.evaluation.retrieval import (
    _COSINES,
    answer_positions,
    caption_positions,
    chance,
    media_positions,
    media_to_text_scores,
    retrieval,
    text_to_media_scores,
)
from flap_fast.ranks import Ranks

# Cosines of two sounds (rows) with five captions; captions 0 to 2 are of sound 0, 3 and 4 of 1.
COSINES = torch.tensor([[0.9, 0.5, 0.7, 0.8, 0.1], [0.2, 0.6, 0.3, 0.6, 0.4]])
CLIP_OF_CAPTION = torch.tensor([0, 0, 0, 1, 1])


def by_hand(ranks: list[int], clip_of_caption: list[int], sounds: int) -> dict[str, float]:
    return media_to_text_scores(torch.tensor(ranks), torch.tensor(clip_of_caption), sounds)


def as_embeddings(cosines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sounds and captions whose products are `cosines`, exactly."""
    return torch.eye(len(cosines)), cosines.T.contiguous()


def test_captions_find_their_sounds():
    assert media_positions(*as_embeddings(COSINES), CLIP_OF_CAPTION, Ranks()).tolist() == [
        0,
        1,
        0,
        1,
        0,
    ]


def test_sounds_find_their_captions():
    assert caption_positions(*as_embeddings(COSINES), CLIP_OF_CAPTION, Ranks()).tolist() == [
        0,
        3,
        2,
        1,
        2,
    ]


def test_of_equal_scores_the_smaller_index_comes_first():
    equal = torch.zeros(3, 3)
    audio, text = as_embeddings(equal)
    assert media_positions(audio, text, torch.arange(3), Ranks()).tolist() == [0, 1, 2]
    assert caption_positions(audio, text, torch.arange(3), Ranks()).tolist() == [0, 1, 2]


def many_ties() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """40 sounds and 97 captions in few distinct values, whose products are exact."""
    draws = torch.Generator().manual_seed(0)
    audio, text = (torch.randint(-2, 3, (n, 4), generator=draws).float() for n in (40, 97))
    return audio, text, torch.arange(97) % 40


def test_chunks_do_not_change_places(monkeypatch: pytest.MonkeyPatch):
    audio, text, clip_of_caption = many_ties()
    whole = (
        media_positions(audio, text, clip_of_caption, Ranks()),
        caption_positions(audio, text, clip_of_caption, Ranks()),
    )
    order = (text @ audio.T).argsort(dim=1, descending=True, stable=True)
    assert torch.equal((order == clip_of_caption[:, None]).int().argmax(1), whole[0])
    monkeypatch.setattr("flap_fast.evaluation.retrieval._COSINES", 7 * 97)
    assert torch.equal(media_positions(audio, text, clip_of_caption, Ranks()), whole[0])
    assert torch.equal(caption_positions(audio, text, clip_of_caption, Ranks()), whole[1])


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor that was made has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(
    ("sounds", "answers", "asked"),
    [(100_000, 100_000, 100_000), (1_000_000, 1_000_000, 3000), (300_000, 10, 300_000)],
)
def test_a_million_pairs_fit(sounds: int, answers: int, asked: int):
    """Shapes alone, on the device `meta`: no product is computed, each tensor is counted."""
    rows, table = (torch.empty(n, 512, device="meta") for n in (sounds, answers))
    asks = torch.empty(asked, dtype=torch.int64, device="meta")
    with Largest() as largest:
        assert answer_positions(rows, asks, table, asks, Ranks()).shape == (asked,)
    assert largest.elements <= max(_COSINES, table.numel())


def test_text_to_audio_scores():
    scores = text_to_media_scores(torch.tensor([0, 1, 9, 10]))
    assert [scores[f"R@{k}"] for k in (1, 5, 10)] == [0.25, 0.5, 0.75]
    assert scores["mAP@10"] == pytest.approx((1 + 1 / 2 + 1 / 10) / 4)
    assert scores["mean_rank"] == 6
    assert scores["median_rank"] == 6  # the places 1, 2, 10, 11: floor(5) + 1


def test_a_sound_is_found_by_any_of_its_captions():
    # Sound 0 has captions at 12 and 3, sound 1 one at 0: ragged.
    scores = by_hand([12, 3, 0], [0, 0, 1], 2)
    assert [scores[f"R@{k}"] for k in (1, 5, 10)] == [0.5, 1.0, 1.0]
    assert scores["frac_R@5"] == (0.5 + 1) / 2
    assert scores["mAP@10"] == pytest.approx((1 / 4 / 2 + 1) / 2)


def test_average_precision_sorts_a_sounds_ranks():
    # Captions at 4, 0 and 20: sorted, the hits are 1/1 and 2/5; unsorted, 1/5 and 2/1.
    scores = by_hand([4, 0, 20], [0, 0, 0], 1)
    assert scores["mAP@10"] == pytest.approx((1 + 2 / 5) / 3)
    assert scores["mAP@10_laion"] == pytest.approx((1 / 5 + 2) / 3)


def test_scores_do_not_depend_on_the_order_of_captions():
    torch.manual_seed(0)
    ranks, clip_of_caption = torch.randperm(60), torch.arange(60) % 13
    shuffled = torch.randperm(60)
    one, other = (
        media_to_text_scores(ranks, clip_of_caption, 13),
        media_to_text_scores(ranks[shuffled], clip_of_caption[shuffled], 13),
    )
    for name in one.keys() - {"mAP@10_laion"}:
        assert one[name] == pytest.approx(other[name], abs=1e-12), name


def test_perfect_embeddings_score_one():
    scores = retrieval(torch.eye(20), torch.eye(20), torch.arange(20), modality="audio")
    assert (scores["clips"], scores["captions"]) == (20, 20)
    for direction in ("audio_to_text", "text_to_audio"):
        found = scores[direction]
        assert isinstance(found, dict)
        assert found["R@1"] == found["mAP@10"] == found["mean_rank"] == 1


def test_what_cannot_be_compared_is_not_found():
    nan = torch.full((20, 4), torch.nan)
    for audio, text in ((nan, nan), (nan, torch.ones(20, 4)), (torch.ones(20, 4), nan)):
        scores = retrieval(audio, text, torch.arange(20), modality="audio")
        for direction in ("audio_to_text", "text_to_audio"):
            assert scores[direction]["R@10"] == 0  # type: ignore[index]


def test_chance_is_what_random_orders_score():
    torch.manual_seed(0)
    clip_of_caption = torch.tensor([0] * 5 + [1] * 2 + list(range(2, 20)))
    expected = chance(clip_of_caption, 20, "audio")
    drawn = [
        media_to_text_scores(torch.randperm(25), clip_of_caption, 20)["R@5"] for _ in range(400)
    ]
    mean = sum(drawn) / len(drawn)
    assert expected["audio_to_text"]["R@5"] == pytest.approx(mean, abs=0.01)
    assert expected["audio_to_text"]["R@1"] == pytest.approx(
        1 - (20 / 25 + 23 / 25 + 18 * 24 / 25) / 20
    )
    assert expected["text_to_audio"]["R@10"] == 0.5
    assert math.isclose(chance(torch.arange(64), 64, "audio")["audio_to_text"]["R@10"], 10 / 64)


def test_a_sound_without_captions_is_refused():
    with pytest.raises(ConfigError, match="each of the 3 sounds must have a caption"):
        retrieval(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 1]), modality="audio")


def test_scores_are_those_of_scikit_learn():
    """Ragged captions, 10 in all, so that the first ten are all of them."""
    metrics = pytest.importorskip("sklearn.metrics")
    draws = torch.Generator().manual_seed(1)
    clip_of_caption = torch.tensor([0, 1, 1, 2, 3, 5, 6, 4, 2, 1])
    audio, text = (torch.randn(n, 6, generator=draws) for n in (7, 10))
    found = retrieval(audio, text, clip_of_caption, modality="audio")
    right = (clip_of_caption[None] == torch.arange(7)[:, None]).int().numpy()
    cosines = (audio @ text.T).numpy()
    a2t, t2a = found["audio_to_text"], found["text_to_audio"]
    assert isinstance(a2t, dict)
    assert isinstance(t2a, dict)
    ranking = metrics.label_ranking_average_precision_score
    assert a2t["mAP@10"] == pytest.approx(ranking(right, cosines))
    assert t2a["mAP@10"] == pytest.approx(ranking(right.T, cosines.T))
    for k in (1, 5):
        top_k = metrics.top_k_accuracy_score(clip_of_caption, cosines.T, k=k, labels=range(7))
        assert t2a[f"R@{k}"] == pytest.approx(top_k)


def test_a_median_between_two_places_is_rounded_down():
    assert (
        text_to_media_scores(torch.tensor([4, 0, 3, 8]))["median_rank"] == 4
    )  # of 0, 3, 4, 8: 3.5
    assert text_to_media_scores(torch.tensor([4, 0, 8]))["median_rank"] == 5
