"""mteb's audio tasks on a model of ours, with data that the test makes; left out without mteb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import Embedder
from tests.sounds import tone
from tests.tiny import tiny, tiny_clip

mteb = pytest.importorskip("mteb", reason="needs mteb (pip install 'flap_fast[mteb]')")
abstasks = pytest.importorskip("mteb.abstasks")
datasets = pytest.importorskip("datasets")

RATE = 16_000


def embedder(config: Any) -> Embedder:
    torch.manual_seed(0)
    return Embedder(TwoTowers(config), config, tokenizer(config.text), torch.device("cpu"))


def row(n: int) -> dict[str, Any]:
    """A low or a high tone, at a rate that is not the model's, as long as its number says."""
    wave = tone((300, 3000)[n % 2] + n, 0.4 + 0.02 * n, 2 * RATE)
    return {"audio": {"array": wave, "sampling_rate": 2 * RATE}, "label": n % 2}


def metadata(kind: str, modalities: list[str]) -> Any:
    return pytest.importorskip("mteb.abstasks.task_metadata").TaskMetadata(
        name=f"Tones{kind}",
        description="Low and high tones.",
        dataset={"path": "none/none", "revision": "none"},
        type=f"Audio{kind}",
        category="a2c",
        eval_splits=["test"],
        eval_langs=["zxx-Zxxx"],
        main_score="accuracy",
        modalities=modalities,
        reference=None,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation="",
    )


def data(self: Any, **_: Any) -> None:
    """Loads what mteb would have downloaded."""
    rows = [row(n) for n in range(24)]
    parts = {"train": rows[:16], "test": rows[16:]}
    loaded = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    self.dataset = datasets.DatasetDict(loaded)
    self.data_loaded = True


def accuracy(task: Any, model: Any, folder: Path) -> float:
    cache = pytest.importorskip("mteb.cache").ResultCache(folder)
    found = mteb.evaluate(model, task, cache=cache, encode_kwargs={"batch_size": 5})
    (result,) = found.task_results
    return result.get_score()


def test_a_classification_task_scores_our_embeddings(tmp_path: Path):
    """mteb's classifier, trained on all 16 sounds: eight of each class in each of its trials."""
    from sklearn.linear_model import LogisticRegression

    from flap_fast.tools.mteb_encoder import MtebEncoder

    class Tones(abstasks.AbsTaskClassification):
        metadata = metadata("Classification", ["audio"])
        input_column_name = "audio"
        load_data = data

    model = embedder(tiny())
    rows = [row(n) for n in range(24)]
    x, y = model.embed_audio([r["audio"] for r in rows]), [r["label"] for r in rows]
    expected = LogisticRegression(max_iter=100).fit(x[:16], y[:16]).score(x[16:], y[16:])
    assert accuracy(Tones(), MtebEncoder(model), tmp_path) == pytest.approx(expected)


def test_a_zero_shot_task_ranks_texts_by_our_cosines(tmp_path: Path):
    from flap_fast.tools.mteb_encoder import MtebEncoder

    labels = ["a low tone", "a high tone"]

    class Tones(abstasks.AbsTaskZeroShotClassification):
        metadata = metadata("ZeroshotClassification", ["audio", "text"])
        input_column_name = "audio"
        load_data = data

        def get_candidate_labels(self) -> list[str]:
            return labels

    model = embedder(tiny())
    rows = [row(n) for n in range(16, 24)]
    cosines = model.embed_audio([r["audio"] for r in rows]) @ model.embed_text(labels).T
    right = (cosines.argmax(1) == torch.tensor([r["label"] for r in rows])).float().mean()
    assert accuracy(Tones(), MtebEncoder(model), tmp_path) == pytest.approx(right.item())


def test_what_has_sounds_and_texts_is_their_sum_and_what_has_neither_is_refused():
    from flap_fast.tools.mteb_encoder import MtebEncoder

    model, named = embedder(tiny()), metadata("Classification", ["audio"])
    waves, texts = [row(n)["audio"] for n in range(3)], ["a", "b", "c"]
    given = {"task_metadata": named, "hf_split": "test", "hf_subset": "default"}
    encoder = MtebEncoder(model)
    both = encoder.encode([{"audio": waves, "text": texts}], **given)
    torch.testing.assert_close(both, model.embed_audio(waves) + model.embed_text(texts))
    with pytest.raises(ConfigError, match="Classification must have sounds or texts, got 'image'"):
        encoder.encode([{"image": [np.zeros(3)]}], **given)


def test_a_model_of_images_is_refused():
    from flap_fast.tools.mteb_encoder import MtebEncoder

    with pytest.raises(ConfigError, match="must have an audio encoder, got 'image'"):
        MtebEncoder(embedder(tiny_clip()))
