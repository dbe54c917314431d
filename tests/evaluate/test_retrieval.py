"""Ranks and scores, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from flap_fast.evaluate.retrieval import (
    audio_to_text,
    caption_ranks,
    chance,
    retrieval,
    sound_ranks,
    text_to_audio,
)

# Cosines of two sounds (rows) with five captions; captions 0 to 2 are of sound 0, 3 and 4 of 1.
COSINES = torch.tensor([[0.9, 0.5, 0.7, 0.8, 0.1], [0.2, 0.6, 0.3, 0.6, 0.4]])
OWNER = torch.tensor([0, 0, 0, 1, 1])


def by_hand(ranks: list[int], owner: list[int], sounds: int) -> dict[str, float]:
    return audio_to_text(torch.tensor(ranks), torch.tensor(owner), sounds)


def as_embeddings(cosines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sounds and captions whose products are `cosines`, exactly."""
    return torch.eye(len(cosines)), cosines.T.contiguous()


def test_captions_find_their_sounds():
    assert sound_ranks(*as_embeddings(COSINES), OWNER).tolist() == [0, 1, 0, 1, 0]


def test_sounds_find_their_captions():
    assert caption_ranks(*as_embeddings(COSINES), OWNER).tolist() == [0, 3, 2, 1, 2]


def test_of_equal_scores_the_smaller_index_comes_first():
    equal = torch.zeros(3, 3)
    audio, text = as_embeddings(equal)
    assert sound_ranks(audio, text, torch.arange(3)).tolist() == [0, 1, 2]
    assert caption_ranks(audio, text, torch.arange(3)).tolist() == [0, 1, 2]


def test_chunks_do_not_change_ranks(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    # Few distinct values: many ties.
    audio, text = torch.randint(-2, 3, (40, 4)).float(), torch.randint(-2, 3, (97, 4)).float()
    owner = torch.arange(97) % 40
    whole = sound_ranks(audio, text, owner), caption_ranks(audio, text, owner)
    monkeypatch.setattr("flap_fast.evaluate.retrieval._CHUNK", 7)
    assert torch.equal(sound_ranks(audio, text, owner), whole[0])
    assert torch.equal(caption_ranks(audio, text, owner), whole[1])
    order = (text @ audio.T).argsort(dim=1, descending=True, stable=True)
    assert torch.equal((order == owner[:, None]).int().argmax(1), whole[0])


def test_text_to_audio_scores():
    scores = text_to_audio(torch.tensor([0, 1, 9, 10]))
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
    ranks, owner = torch.randperm(60), torch.arange(60) % 13
    shuffled = torch.randperm(60)
    one, other = (
        audio_to_text(ranks, owner, 13),
        audio_to_text(ranks[shuffled], owner[shuffled], 13),
    )
    for name in one.keys() - {"mAP@10_laion"}:
        assert one[name] == pytest.approx(other[name], abs=1e-12), name


def test_perfect_embeddings_score_one():
    scores = retrieval(torch.eye(20), torch.eye(20), torch.arange(20))
    assert (scores["clips"], scores["captions"]) == (20, 20)
    for direction in ("audio_to_text", "text_to_audio"):
        found = scores[direction]
        assert isinstance(found, dict)
        assert found["R@1"] == found["mAP@10"] == found["mean_rank"] == 1


def test_chance_is_what_random_orders_score():
    torch.manual_seed(0)
    owner = torch.tensor([0] * 5 + [1] * 2 + list(range(2, 20)))
    expected = chance(owner, 20)
    drawn = [audio_to_text(torch.randperm(25), owner, 20)["R@5"] for _ in range(400)]
    mean = sum(drawn) / len(drawn)
    assert expected["audio_to_text"]["R@5"] == pytest.approx(mean, abs=0.01)
    assert expected["audio_to_text"]["R@1"] == pytest.approx(
        1 - (20 / 25 + 23 / 25 + 18 * 24 / 25) / 20
    )
    assert expected["text_to_audio"]["R@10"] == 0.5
    assert math.isclose(chance(torch.arange(64), 64)["audio_to_text"]["R@10"], 10 / 64)


def test_a_sound_without_captions_is_refused():
    with pytest.raises(ValueError, match="each of the 3 sounds"):
        retrieval(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 1]))
