"""Captions equal to another clip's as right answers: by hand, and beside a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from flap_fast.evaluation.equal_captions import equal_to_others, right_pairs, text_numbers
from flap_fast.evaluation.retrieval import chance, retrieval, text_to_media_scores
from tests.evaluation.test_retrieval import as_embeddings, by_hand, many_ties

# Clips 0, 1, 2; captions 0 and 1 are of clip 0, 2 of 1, 3 of 2. Captions 1 and 3 are equal.
CLIP_OF_CAPTION = torch.tensor([0, 0, 1, 2])
TEXTS = text_numbers(["a dog", "Rain.", "a cat", "rain"])
COSINES = torch.tensor([[0.9, 0.2, 0.8, 0.1], [0.3, 0.6, 0.7, 0.7], [0.4, 0.5, 0.1, 0.6]])


def test_captions_are_equal_but_for_case_punctuation_and_white_space():
    captions = ["A dog  barks.", "a dog barks", "a dog barked", "A dog, barks"]
    assert text_numbers(captions) == [0, 0, 1, 0]
    assert text_numbers(["Straße", "STRASSE", "?!", "..", "♪", "?!"]) == [0, 0, 1, 2, 3, 1]


def test_captions_of_one_clip_are_not_another_clips():
    assert equal_to_others([0, 0, 1, 2], TEXTS) == 2
    assert equal_to_others([0, 0, 1, 1], [5, 5, 6, 7]) == 0
    assert equal_to_others([0, 0, 1, 1], [5, 5, 6, 5]) == 3


def test_right_answers_are_ones_own_and_the_equal_ones():
    of_captions, of_clips = right_pairs([0, 0, 1, 2], TEXTS)
    assert of_captions == [(0, 0), (1, 0), (1, 2), (2, 1), (3, 0), (3, 2)]
    assert of_clips == [(0, 0), (0, 1), (0, 3), (1, 2), (2, 1), (2, 3)]


def test_scores_by_hand():
    media, text = as_embeddings(COSINES)
    found = retrieval(media, text, CLIP_OF_CAPTION, modality="audio", texts=TEXTS)
    # Caption 0: its clip first. 1 (clips 1, 2, 0): its right clips 2 and 0 second and third.
    # 2 (clips 0, 1, 2): second. 3 (clips 1, 2, 0): second and third.
    t2a, a2t = found["text_to_audio"], found["audio_to_text"]
    two = (1 / 2 + 2 / 3) / 2
    assert t2a["R@1"] == 1 / 4
    assert t2a["R@5"] == t2a["frac_R@5"] == 1
    assert t2a["frac_R@1"] == 1 / 4
    assert t2a["mAP@10"] == pytest.approx((1 + two + 1 / 2 + two) / 4)
    assert t2a["mean_rank"] == (1 + 2 + 2 + 2) / 4
    assert t2a["median_rank"] == 2
    # Clip 0 (captions 0, 2, 1, 3): 0, 1, 3 are right. 1 (2, 3, 1, 0): 2. 2 (3, 1, 0, 2): 3, 1.
    assert a2t["R@1"] == 1
    assert a2t["mAP@10"] == pytest.approx(((1 + 2 / 3 + 3 / 4) / 3 + 1 + 1) / 3)
    assert "mAP@10_laion" not in t2a
    # LAION-CLAP's statistic has own captions alone: clip 0's are first and third.
    assert a2t["mAP@10_laion"] == pytest.approx(((1 + 2 / 3) / 2 + 1 + 1) / 3)
    assert (found["clips"], found["captions"]) == (3, 4)


def brute(cosines: Tensor, right: list[set[int]]) -> dict[str, float]:
    """R@k, mAP@k and ranks of rows that each rank all columns, by a plain loop."""
    best, found, precision = [], dict.fromkeys((1, 5, 10), 0.0), {10: 0.0, 16: 0.0}
    for row, own in zip(cosines.tolist(), right, strict=True):
        order = sorted(range(len(row)), key=lambda n: (-row[n], n))
        ranks = sorted(order.index(n) + 1 for n in own)
        best.append(ranks[0])
        for k in found:
            found[k] += (ranks[0] <= k) / len(right)
        for k in precision:
            hits = [i / rank for i, rank in enumerate(ranks, 1) if rank <= k]
            precision[k] += sum(hits) / len(own) / len(right)
    best.sort()
    median = (best[(len(best) - 1) // 2] + best[len(best) // 2]) // 2
    out = {f"R@{k}": value for k, value in found.items()}
    out |= {f"mAP@{k}": value for k, value in precision.items()}
    return out | {"mean_rank": sum(best) / len(best), "median_rank": median}


@pytest.mark.parametrize("different", [1, 7, 30, 97])
def test_scores_are_those_of_a_plain_loop(different: int):
    """97 captions of 40 clips with many ties: all equal, many, some, none."""
    media, text, clip_of_caption = many_ties()
    texts = torch.randint(different, (97,), generator=torch.Generator().manual_seed(2)).tolist()
    texts = list(range(97)) if different == 97 else texts
    found = retrieval(media, text, clip_of_caption, modality="audio", texts=texts)
    pairs = list(zip(clip_of_caption.tolist(), texts, strict=True))
    clips = [{clip for clip, other in pairs if other == text} for _, text in pairs]
    captions = [
        {n for n, (_, text) in enumerate(pairs) if (clip, text) in pairs} for clip in range(40)
    ]
    cosines = media @ text.T
    for name, value in brute(cosines.T, clips).items():
        assert found["text_to_audio"][name] == pytest.approx(value, abs=1e-12), name
    for name, value in brute(cosines, captions).items():
        assert found["audio_to_text"][name] == pytest.approx(value, abs=1e-12), name


def test_all_captions_equal_makes_every_answer_right():
    """R@1 is 1; of 40 right answers 16 can be among the first 16, so mAP@16 is 16 / 40."""
    media, text, clip_of_caption = many_ties()
    found = retrieval(media, text, clip_of_caption, modality="audio", texts=[0] * 97)
    for direction, right in (("text_to_audio", 40), ("audio_to_text", 97)):
        assert found[direction]["R@1"] == found[direction]["median_rank"] == 1
        assert found[direction]["mAP@16"] == pytest.approx(16 / right)
        assert found[direction]["mAP@10"] == pytest.approx(10 / right)
    assert chance(clip_of_caption, 40, "audio", [0] * 97)["text_to_audio"]["R@1"] == 1


def test_without_equal_captions_no_number_changes():
    media, text, clip_of_caption = many_ties()
    plain = retrieval(media, text, clip_of_caption, modality="audio")
    texts = list(range(97))
    assert retrieval(media, text, clip_of_caption, modality="audio", texts=texts) == plain
    assert chance(clip_of_caption, 40, "audio", texts) == chance(clip_of_caption, 40, "audio")


def test_chance_counts_equal_captions_too():
    by_chance = chance(CLIP_OF_CAPTION, 3, "audio", TEXTS)
    # Captions 1 and 3 have two of three clips right. Of three texts clips 0, 1, 2 have 2, 1, 1.
    assert by_chance["text_to_audio"]["R@1"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 3 + 2 / 3) / 4)
    assert by_chance["audio_to_text"]["R@1"] == pytest.approx((2 + 1 + 1) / 3 / 3)


def test_equal_captions_take_places_together_by_chance():
    """Nine wrong captions of one text are before a right one half of the time, and fill R@5."""
    by_chance = chance(torch.arange(10), 10, "audio", [0] * 9 + [1])["audio_to_text"]
    # Nine clips are found at once or behind one answer; the tenth at once or behind nine.
    assert by_chance["R@5"] == pytest.approx((9 * 1 + 0.5) / 10)
    assert by_chance["R@10"] == pytest.approx(1)


def test_chance_among_as_many_captions_as_audiocaps_has():
    """Of 4,875 captions two are equal: next to nothing changes."""
    texts = [0, 0, *range(1, 4874)]
    by_chance = chance(torch.arange(4875), 4875, "audio", texts)["audio_to_text"]
    assert by_chance["R@1"] == pytest.approx(1 / 4874, rel=1e-3)
    assert by_chance["R@10"] == pytest.approx(10 / 4875, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_chance_is_what_vectors_at_random_score(seed: int):
    """60 clips of one or two captions, of 25 texts; equal ones have one vector."""
    generator = torch.Generator().manual_seed(seed)
    clip_of_caption = torch.cat([torch.arange(60), torch.arange(0, 60, 3)])
    texts = (25 * torch.rand(80, generator=generator) ** 2).long().tolist()
    scores = {way: [] for way in ("audio_to_text", "text_to_audio")}
    for _ in range(400):
        media, of_texts = (torch.randn(n, 16, generator=generator) for n in (60, 25))
        media, text = normalize(media), normalize(of_texts)[texts]
        found = retrieval(media, text, clip_of_caption, modality="audio", texts=texts)
        for way in scores:
            scores[way].append([found[way][f"R@{k}"] for k in (1, 5, 10)])
    expected = chance(clip_of_caption, 60, "audio", texts)
    for way in scores:
        for k, mean in zip((1, 5, 10), torch.tensor(scores[way]).mean(0).tolist(), strict=True):
            assert expected[way][f"R@{k}"] == pytest.approx(mean, abs=0.01)


def test_average_precision_at_16_goes_on_to_the_sixteenth():
    scores = text_to_media_scores(torch.tensor([0, 9, 10, 15, 16]))
    assert scores["mAP@10"] == pytest.approx((1 + 1 / 10) / 5)
    assert scores["mAP@16"] == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 16) / 5)
    # DCASE 2025 divides by all right answers, also by those beyond the sixteenth.
    scores = by_hand([15, 3, 20], [0, 0, 0], 1)
    assert scores["mAP@16"] == pytest.approx((1 / 4 + 2 / 16) / 3)
