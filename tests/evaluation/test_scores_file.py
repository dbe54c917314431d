"""eval.json of older versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.evaluation.run import selection_score
from flap_fast.evaluation.scores_file import merged, read_scores
from flap_fast.evaluation.tables import markdown, sheets

# As flap_fast 0.1 wrote it for an image encoder.
OF_IMAGES = """{
 "retrieval": {"val": {
  "audio_to_text": {"R@1": 0.05, "R@5": 0.25, "R@10": 0.5, "mAP@10": 0.144, "mAP@10_laion": 0.1},
  "text_to_audio": {"R@1": 0.15, "R@5": 0.2, "R@10": 0.6, "mAP@10": 0.151},
  "clips": 20, "captions": 20, "sense": "image",
  "chance": {"audio_to_text": {"R@1": 0.01, "R@5": 0.02, "R@10": 0.03},
             "text_to_audio": {"R@1": 0.04, "R@5": 0.05, "R@10": 0.06}}}},
 "zero_shot": {"val": {"top_1": 0.35, "top_5": 1.0, "mAP@10": 0.625, "mAP": 0.4,
  "chance": {"top_1": 0.1, "top_5": 0.5}, "clips": 20, "unlabelled": 0, "classes": 10,
  "templates": 80, "sense": "image"}},
 "geometry": {"val": {"alignment": 0.9, "uniformity_audio": -0.5, "uniformity_text": -0.6}},
 "sts": {"sts-test.csv": {"sts-test": {"spearman": 0.1, "pairs": 9}}},
 "data": {"val": "/data/cifar10/val", "sts-test.csv": "/data/sts-test.csv"}
}"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    file = tmp_path / "eval.json"
    file.write_text(OF_IMAGES)
    return file


def test_an_older_file_of_an_image_encoder_is_read_under_the_names_of_today(old: Path):
    found = read_scores(old)
    text = json.dumps(found)
    assert "audio" not in text
    assert "sense" not in text
    val = found["retrieval"]["val"]
    assert (val["image_to_text"]["R@1"], val["text_to_image"]["R@1"]) == (0.05, 0.15)
    assert (val["chance"]["image_to_text"]["R@1"], val["clips"]) == (0.01, 20)
    assert found["geometry"]["val"]["uniformity_image"] == -0.5
    assert selection_score(found) == (0.144 + 0.151) / 2
    assert found["sts"] == json.loads(OF_IMAGES)["sts"]


def test_its_tables_are_those_of_images(old: Path):
    text = markdown(read_scores(old))
    assert "| T-I R@1 |" in text
    assert "| system | alignment | uniformity, image | uniformity, text |" in text
    assert "CLIP (Language encoder, Tables 6 and 17)" in text
    assert len(sheets(read_scores(old))) == 4


def test_new_scores_take_the_places_of_old_ones(old: Path):
    new = {"geometry": {"val": {"alignment": 0.1}}, "data": {"val": "/data/cifar10/val"}}
    found = merged(read_scores(old), new)
    assert found["geometry"]["val"] == {"alignment": 0.1}
    assert "image_to_text" in found["retrieval"]["val"]


def test_a_file_of_sounds_is_read_as_it_is(tmp_path: Path):
    file = tmp_path / "eval.json"
    file.write_text(OF_IMAGES.replace(', "sense": "image"', ""))
    assert read_scores(file) == json.loads(file.read_text())
    assert read_scores(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        '{"geometry": NaN}',
        '{"retrieval": 3}',
        '{"retrieval": {"val": {"sense": "image"}}}',
    ],
)
def test_what_is_no_file_of_scores_is_refused(text: str, tmp_path: Path):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ConfigError, match=r"eval\.json must be an object in JSON"):
        read_scores(tmp_path / "eval.json")
