"""Every evaluation gives on several ranks what it gives on one, where slices repeat some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.evaluation import logistic
from flap_fast.evaluation.embed import text_embedder
from flap_fast.evaluation.geometry import geometry
from flap_fast.evaluation.probe import probe
from flap_fast.evaluation.retrieval import retrieval
from flap_fast.evaluation.transfer import transfer
from flap_fast.evaluation.zero_shot import zero_shot
from flap_fast.ranks import Ranks
from tests.evaluation.test_retrieval import many_ties
from tests.evaluation.test_transfer import feeling, senteval
from tests.ranks import on_ranks

LABELS = [("cat", "dog"), ("dog",), (), ("owl",)] * 10
ALONE = [names[:1] for names in LABELS]


class Lengths:
    """A tokenizer and encoder of which a text's row is a function of its length alone."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return torch.tensor([[len(text)] for text in texts]), torch.ones(len(texts), 1)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        angles = ids.float() + torch.arange(4)
        return functional.normalize(angles.sin() * mask, dim=1)


def scores(folder: Path, ranks: Ranks) -> dict[str, Any]:
    logistic._MAX_EPOCHS = 8
    audio, text, clip_of_caption = many_ties()
    near, far = (functional.normalize(rows + 0.1, dim=1) for rows in (audio, text))
    lengths = Lengths()
    texts = text_embedder(lengths.encode, lengths, ranks, batch=3)  # type: ignore[arg-type]
    return {
        "texts": texts(["a" * (7 * n % 11) for n in range(10)]).tolist(),
        "retrieval": retrieval(audio, text, clip_of_caption, ranks, modality="audio"),
        "equal_captions": retrieval(
            *(audio, text, clip_of_caption, ranks),
            modality="audio",
            texts=[n * n % 31 for n in range(97)],
        ),
        "zero_shot": zero_shot(audio, LABELS, (), ("{label}", "a {label}"), texts, ranks),
        "probe": probe({"joint": audio}, ALONE, [""] * len(audio), [""] * len(audio), ranks),
        "geometry": geometry(near, far, clip_of_caption, ranks, modality="audio"),
        "transfer": transfer(feeling, folder, ranks),
    }


def scores_of_a_rank(folder: Path) -> dict[str, Any]:
    import torch.distributed as dist

    return scores(folder, Ranks(dist.get_rank(), dist.get_world_size()))


def test_three_ranks_score_what_one_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """97 queries, 10 texts, 3 classes, 10 folds, 10 pairs of 5 folds on 3 ranks."""
    monkeypatch.setattr(logistic, "_MAX_EPOCHS", 8)
    folder = senteval(tmp_path)
    for name in ("CR", "SUBJ", "MPQA", "SST"):  # MR and TREC stand for them
        (folder / name).rename(folder / f"no-{name}")
    whole = scores(folder, Ranks())
    assert 0.01 < whole["retrieval"]["audio_to_text"]["R@10"] < 0.99
    assert whole["equal_captions"]["text_to_audio"] != whole["retrieval"]["text_to_audio"]
    for found in on_ranks(3, scores_of_a_rank, folder):
        assert found.pop("geometry") == pytest.approx(whole["geometry"], abs=1e-12)
        assert found == {name: part for name, part in whole.items() if name != "geometry"}
