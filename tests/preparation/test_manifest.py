"""Manifests: what a row may say, and which line is named when it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import read_manifest


@pytest.fixture
def manifest(tmp_path: Path):
    """Writes rows as JSON lines, or a text as it stands."""

    def write(rows: list | str, name: str = "m.jsonl") -> Path:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_a_row_needs_no_more_than_a_sound(manifest):
    (entry,) = read_manifest(manifest([{"audio": "a/dog.wav"}]))
    assert entry.audio == manifest([]).parent / "a/dog.wav"
    assert (entry.id, entry.split, entry.captions, entry.labels) == ("dog", "train", [], [])
    assert (entry.line, entry.start_s, entry.duration_s, entry.original) == (1, 0.0, None, {})


FULL = {
    "audio": "x.wav",
    "captions": ["a dog, barking", "a bark"],
    "id": "7",
    "split": "val",
    "labels": ["dog", "animal"],
    "negatives": ["a cat, barking", "a hiss"],
    "start_s": 1.5,
    "duration_s": 2.0,
    "licence": "CC0",
}


def test_json_lines_and_csv_say_the_same(manifest):
    table = (
        "\ufeffaudio,captions,id,split,labels,negatives,start_s,duration_s,licence,empty\n"
        'x.wav,"a dog, barking| a bark",7,val,dog|animal,"a cat, barking|a hiss",1.5,2,CC0,\n'
    )
    (line,) = read_manifest(manifest([FULL]))
    for name in ("m.csv", "m.CSV"):
        (row,) = read_manifest(manifest(table, name))
        line.line = row.line
        assert row == line
    assert row.captions == ["a dog, barking", "a bark"]
    assert row.negatives == ["a cat, barking", "a hiss"]
    assert row.original == {"licence": "CC0"}


def test_a_caption_keeps_its_bars_and_captions_are_split_at_them(manifest):
    table = "audio,caption,captions\na.wav,one|two,three|four\n"
    (row,) = read_manifest(manifest(table, "m.csv"))
    assert row.captions == ["three", "four", "one|two"]


def test_blank_lines_and_blank_captions_are_nothing(manifest):
    text = '\n{"audio": "a.wav", "captions": [" ", "", " x "]}\n\n{"audio": "b.wav"}\n'
    first, second = read_manifest(manifest(text))
    assert (first.captions, first.line, second.line) == (["x"], 2, 4)


def test_a_clips_negatives_are_those_of_its_rows_each_once(manifest):
    rows = [
        {"audio": "a.wav", "caption": "one", "negatives": ["x", "y", "x"]},
        {"audio": "a.wav", "caption": "two", "negatives": ["y", " z "]},
        {"audio": "b.wav", "caption": "three"},
    ]
    first, second = read_manifest(manifest(rows))
    assert (first.negatives, second.negatives) == (["x", "y", "z"], [])
    with pytest.raises(
        ManifestError, match=r"m\.jsonl:1: negatives must be a text or a list of te"
    ):
        read_manifest(manifest([{"audio": "a.wav", "negatives": 3}]))


def test_rows_of_one_piece_are_one_clip_with_several_captions(manifest):
    """AudioCaps' evaluation has a row and an id for each of five captions of a clip."""
    rows = [
        {"audio": "a.wav", "caption": "one", "id": 1},
        {"audio": "b.wav", "caption": "two", "id": 2},
        {"audio": "a.wav", "caption": "three", "id": 3},
        {"audio": "a.wav", "caption": "four", "start_s": 10},
        {"audio": "a.wav", "caption": "five", "split": "val"},
    ]
    clips = read_manifest(manifest(rows))
    assert [clip.captions for clip in clips] == [["one", "three"], ["two"], ["four"], ["five"]]
    assert [clip.id for clip in clips] == ["1", "2", "a", "a"]


def test_rows_of_one_piece_have_the_labels_of_all(manifest):
    rows = [{"audio": "a.wav", "labels": names} for names in (["dog"], ["cat", "dog"], ["rain"])]
    (clip,) = read_manifest(manifest(rows))
    assert clip.labels == ["dog", "cat", "rain"]


def test_half_an_emoji_in_a_text_is_a_mark_in_its_place(manifest):
    rows = [{"audio": "a.wav", "caption": "a dog \ud83d", "labels": ["\ude00", "\U0001f600"]}]
    (clip,) = read_manifest(manifest(rows))
    assert (clip.captions, clip.labels) == (["a dog \ufffd"], ["\ufffd", "\U0001f600"])


def test_pieces_of_one_file_get_names_of_their_own(manifest):
    rows = [{"audio": "a.wav", "start_s": start} for start in (0, 10, 20.5)]
    assert [clip.id for clip in read_manifest(manifest(rows))] == ["a", "a@10-2", "a@20.5-3"]


def test_an_empty_cell_is_no_name(manifest):
    table = "audio,id,start_s\na.wav,,\na.wav,,10\n"
    assert [clip.id for clip in read_manifest(manifest(table, "m.csv"))] == ["a", "a@10-3"]


def test_zero_is_a_name(manifest):
    rows = [{"audio": "a.wav", "id": 0}, {"audio": "b.wav", "id": 1}]
    assert [clip.id for clip in read_manifest(manifest(rows))] == ["0", "1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ":2 is not JSON: "),
        ("[1]", r":2 must be an object, got \[1\]"),
        ({"caption": "x"}, ":2: audio must name a sound file, got None"),
        ({"audio": 3}, ":2: audio must name a sound file, got 3"),
        ({"audio": "b", "start_s": "soon"}, ":2: start_s and duration_s must be seconds: .*'soon'"),
        ({"audio": "b", "start_s": -1}, ":2: start_s must be at least 0 .* got -1 and None"),
        ({"audio": "b", "start_s": float("nan")}, ":2: start_s must be at least 0 .* got nan and"),
        ({"audio": "b", "start_s": float("inf")}, ":2: start_s .* both finite, got inf and None"),
        ({"audio": "b", "duration_s": 0}, ":2: .* duration_s above 0, both finite, got 0 and 0.0"),
        ({"audio": "b", "duration_s": float("inf")}, ":2: .* both finite, got 0 and inf"),
        ({"audio": "b", "caption": 5}, ":2: caption must be a text or a list of texts, got 5"),
        ({"audio": "b", "captions": ["x", None]}, ":2: captions must be a text .*'x', None"),
        ({"audio": "b", "labels": {"dog": 1}}, ":2: labels must be a text or a list of texts"),
        ({"audio": "b", "split": "../x"}, ":2: split must be letters, .* got '../x'"),
        ({"audio": "b", "split": ".prepare"}, ":2: split must be letters, .* got '.prepare'"),
        (
            {"audio": "b", "id": "first"},
            r":2: id must name one clip of a split, got 'first' again \(first on line 1\)",
        ),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(manifest, row, message):
    good = json.dumps({"audio": "a.wav", "id": "first"}) + "\n"
    file = manifest(good + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(ManifestError, match=f"^{file}{message}"):
        read_manifest(file)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "audio,caption\na.wav,A dog barks, loudly, twice\n",
            r":2 must have 2 cells, got \[' loudly', ' twice'\] beyond them; put quotes around",
        ),
        ('audio,caption\na.wav,"A dog\nb.wav,A cat\n', " must be UTF-8 text, .*unexpected end"),
        ("sound,caption\na.wav,A dog\n", ":2: audio must name a sound file, got None"),
        ("audio,duration_s\na.wav,0\n", ":2: start_s must be .* got 0 and 0.0"),
    ],
)
def test_a_wrong_table_is_refused(manifest, table, message):
    """A comma in a text without quotes would cut the caption off; an open quote, the rest."""
    file = manifest(table, "m.csv")
    with pytest.raises(ManifestError, match=f"^{file}{message}"):
        read_manifest(file)


def test_a_manifest_of_other_bytes_is_refused(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_bytes('{"audio": "caf\u00e9.wav"}\n'.encode("latin-1"))
    with pytest.raises(ManifestError, match=f"^{file} must be UTF-8 text, JSON lines or CSV: "):
        read_manifest(file)


@pytest.mark.parametrize(
    ("text", "name"), [("", "m.jsonl"), ("\n \n", "m.jsonl"), ("audio\n", "m.csv")]
)
def test_an_empty_manifest_is_refused(manifest, text, name):
    with pytest.raises(ManifestError, match="must hold at least one row, got none"):
        read_manifest(manifest(text, name))


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"must be an existing .jsonl or .csv file, got '.*/no"):
        read_manifest(tmp_path / "no.jsonl")


def test_the_demo_has_a_sound_and_a_caption_on_each_of_its_lines():
    demo = Path(__file__).parents[2] / "demo"
    clips = read_manifest(demo / "manifest.jsonl")
    assert len(clips) == len((demo / "manifest.jsonl").read_text().splitlines())
    assert all(clip.captions and clip.audio.is_file() for clip in clips)
    assert {clip.split for clip in clips} == {"train", "val"}
