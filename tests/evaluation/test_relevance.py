"""Queries of a table with several right clips: the file, and its scores by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.embed import read_texts
from flap_fast.evaluation.evaluated_model import whole_model
from flap_fast.evaluation.relevance import EVALUATION, read_relevance
from flap_fast.evaluation.run import score
from flap_fast.evaluation.tables import markdown
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.prepare import prepare
from flap_fast.ranks import Ranks
from tests.sounds import encode, tone, write_manifest
from tests.tiny import tiny

NAMES = [("rain .wav", "rain"), ("dog.wav", "1"), ("cat.wav", "2")]
NAMES = [tuple(name.strip() for name in own) for own in NAMES]


def table(folder: Path, *rows: str) -> str:
    """A table as DCASE's, with lists as Python writes them."""
    (folder / "relevance.csv").write_text("\n".join(("query,audio_filenames", *rows)) + "\n")
    return str(folder / "relevance.csv")


def test_a_query_has_the_clips_of_its_files(tmp_path: Path):
    file = table(tmp_path, """"It rains, hard.","['rain .wav', 'cat.wav']\"""", "A dog,['1']")
    queries, pairs = read_relevance(file, NAMES, "audio")
    assert queries == ["It rains, hard.", "A dog"]
    assert pairs == [(0, 0), (0, 2), (1, 1)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("A dog,['owl.wav']", r"owl.wav of .*csv:2 must name one clip, got 0"),
        (
            "A dog,dog.wav",
            r"csv:2 must have .* names in audio_filenames, got .*; write \['a.wav', 'b.wav'\]",
        ),
        ("A dog,[]", r"csv:2 must have a query and a list of names"),
        (",['dog.wav']", r"csv:2 must have a query and a list of names"),
        ("A dog,['dog.wav'],more", r"csv:2 must have 2 cells"),
        ("", r"relevance.csv must hold queries, got 'none'"),
    ],
)
def test_a_wrong_table_is_refused(row: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        read_relevance(table(tmp_path, row), NAMES, "audio")


def test_a_name_of_two_clips_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="must name one clip, got 2"):
        read_relevance(
            table(tmp_path, "A dog,['a.wav']"), [("a.wav", "1"), ("a.wav", "2")], "audio"
        )


def test_the_task_needs_its_file():
    with pytest.raises(ConfigError, match=r"eval\.relevance must name an existing file, got ''"):
        read_relevance("", NAMES, "audio")


def test_scores_are_those_of_the_order_of_clips(tmp_path: Path):
    """The right clips of a query are put where its cosines have them."""
    for n in range(4):
        (tmp_path / f"{n}.wav").write_bytes(encode(tone(300 + 200 * n, 1.0, 16_000), 16_000, "WAV"))
    rows = [{"audio": f"{n}.wav", "caption": f"tone {n}"} for n in range(4)]
    prepare(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "data", show=False)
    file = table(tmp_path, """a tone,"['0.wav', '3.wav']\"""", "rain,['2']")
    config = tiny("frontend.backend=torch", f"eval.relevance={file}")
    model = whole_model(TwoTowers(config).eval(), config, tokenizer(config.text), Ranks())
    folder = tmp_path / "data/train"
    scores = score(model, [folder], ("relevance",))
    assert list(score(model, [folder])) == ["retrieval", "relevance", "data"]  # a table asks for it
    found = scores["relevance"]["train"]

    shards = open_shards([folder])
    e = model.clips(shards, read_texts(shards))
    order = (model.texts(["a tone", "rain"]) @ e.media.T).argsort(dim=1, descending=True).tolist()
    first, second = sorted(order[0].index(clip) + 1 for clip in (0, 3))
    only = order[1].index(2) + 1
    expected = ((1 / first + 2 / second) / 2 + 1 / only) / 2
    assert found["mAP@16"] == found["mAP@10"] == pytest.approx(expected)
    assert found["mean_rank"] == (first + only) / 2
    assert found["chance"]["R@1"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert (found["queries"], found["clips"], found["right"]) == (2, 4, 3)
    text = markdown(json.loads(json.dumps(scores)))
    assert "### Relevance, train: 2 queries, 4 clips" in text
    assert "1.50 right clips a query" in text
    assert EVALUATION.metrics is not None
    assert EVALUATION.metrics(found)["relevance/mAP@10"] == found["mAP@10"]
    assert EVALUATION.selects is not None
    assert EVALUATION.selects(found) == found["mAP@10"]
