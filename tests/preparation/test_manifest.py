"""Manifests: what a row may say, and which line is named when it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import read_manifest
from flap_fast.preparation.sources import SOURCES


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
        ("[1]", r":2 must be an object, got \[1\]; write one object a line$"),
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
            r":2 must have 2 cells, got \[' loudly', ' twice'\] beyond them; .*; put quotes around",
        ),
        ('audio,caption\na.wav,"A dog\nb.wav,A cat\n', ":2 must be a row of CSV: unexpected end"),
        (
            'audio,caption\na.wav,dog\n\nb.wav,"A cat\nc.wav,"A cow"\n',
            ":3 must be a row of CSV: ',' expected after '\"'$",
        ),
        (
            "audio;caption\na.wav;A dog barks, loudly\n",
            r":2 must have 1 cells, .*; its columns are 'audio;caption'; separate .* not by ';'$",
        ),
        (
            '"audio";"caption"\n"a.wav";"A dog barks, loudly"\n',
            ":1 must be a row of CSV: .*; separate the columns by commas, not by ';'$",
        ),
        (
            "# my sounds\naudio,caption\na.wav,A dog\n",
            ":2 must have 1 cells, .*'# my sounds'; the first line must name the columns$",
        ),
        (
            "\naudio,caption\na.wav,A dog\n",
            ":2 must have 0 cells, .*are none; the first line must name the columns$",
        ),
        ("sound,caption\na.wav,A dog\n", ":2: audio must name a sound file, got None"),
        ("audio,duration_s\na.wav,0\n", ":2: start_s must be .* got 0 and 0.0"),
    ],
)
def test_a_wrong_table_is_refused(manifest, table, message):
    """A comma in a text without quotes would cut the caption off; an open quote, the rest."""
    file = manifest(table, "m.csv")
    with pytest.raises(ManifestError, match=f"^{file}{message}"):
        read_manifest(file)


ACCEPTED = r", accepted are audio \(or image\), caption \(or captions\), labels, negatives, "


@pytest.mark.parametrize(
    ("name", "table", "columns", "remedy"),
    [
        ("m.csv", "audio;caption\na.wav;dog\n", "'audio;caption'", "by commas, not by ';'"),
        ("m.csv", "audio;caption, short\na.wav;a, b\n", "'audio;caption', .*", "not by ';'"),
        ("m.csv", "audio\tcaption\na.wav\tdog\n", r"'audio\\tcaption'", "commas, not by tabs"),
        ("m.tsv", "audio,caption\na.wav,dog\n", "'audio,caption'", "by tabs, not by commas"),
        ("m.csv", "a.wav,dog\nb.wav,cat\n", "'a.wav', 'dog'", "the first line must name the col"),
        ("m.csv", "Audio,Caption\na.wav,dog\n", "'Audio', 'Caption'", "write audio for 'Audio', c"),
        ("m.csv", "audio,Caption\na.wav,dog\n", "'audio', 'Caption'", "write caption for 'Capti"),
        ("m.csv", "audio, caption\na.wav, dog\n", "'audio', ' caption'", "caption for ' caption'"),
        ("m.csv", "filename,text\na.wav,dog\n", "'filename', 'text'", "prepare --source folder "),
        ("m.csv", "audio,text\na.wav,dog\n", "'audio', 'text'", "prepare --source folder "),
        ("m.csv", "youtube_id,start_time,caption\nx,3,dog\n", "'youtube_id', .*", "ce audiocaps "),
        ("m.jsonl", '{"ytid": "x", "caption": "dog"}', "'ytid', 'caption'", "--source musiccaps "),
        (
            "m.jsonl",
            '{"Audio": "a.wav", "caption": "dog"}',
            "'Audio', 'caption'",
            "write audio for",
        ),
    ],
)
def test_a_table_of_another_layout_is_told_its_columns_and_what_reads_them(
    manifest, name, table, columns, remedy
):
    file = manifest(table, name)
    with pytest.raises(ManifestError, match=f"; its columns are {columns}{ACCEPTED}.*{remedy}"):
        read_manifest(file)


def test_a_folder_of_that_layout_is_read_by_the_source_it_names(manifest, tmp_path):
    manifest("filename,text\na.wav,\"['a dog', 'a cat']\"\nb.wav,rain\n", "m.csv")
    assert [clip.captions for clip in SOURCES["folder"].read(tmp_path)] == [
        ["a dog", "a cat"],
        ["rain"],
    ]
    (tmp_path / "m.csv").unlink()
    table = manifest("filename\ttext\na.wav\twind\n", "m.tsv")
    with pytest.raises(ManifestError, match=f"flap prepare --source folder {tmp_path} OUT"):
        read_manifest(table)
    assert [clip.captions for clip in SOURCES["folder"].read(tmp_path)] == [["wind"]]
    table.unlink()
    manifest("filename;text\na.wav;rain\n", "m.csv")
    with pytest.raises(ManifestError, match="separate the columns by commas, not by ';'"):
        SOURCES["folder"].read(tmp_path)
    (tmp_path / "m.csv").rename(tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"without, but with m.parquet; read_parquet"):
        SOURCES["folder"].read(tmp_path)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PAR1\x15\x04", r"a parquet .*read_parquet\('.*m.jsonl'\).to_json\('/.*m.jsonl'"),
        (b"PK\x03\x04", "a spreadsheet or a zip archive"),
        (b"\x1f\x8b\x08", "a compressed file; gunzip"),
        (b"BZh91AY", "a compressed file; bunzip2"),
        (b"\xfd7zXZ\0", "a compressed file; unxz"),
        (b"\x28\xb5\x2f\xfd", "a compressed file; unzstd"),
        (b"\xd0\xcf\x11\xe0\xa1", "a spreadsheet; save the table as CSV"),
        (b"ARROW1\0\0", r"a Feather file; .*read_feather\('.*m.jsonl'\).to_json\('/.*m.jsonl'"),
        ('{"audio"'.encode("utf-16-le"), "NUL characters; convert it: iconv"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, data, what):
    file = tmp_path / "m.jsonl"
    file.write_bytes(data)
    with pytest.raises(ManifestError, match=f"^{file} must be UTF-8 text, .*, got {what}"):
        read_manifest(file)


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("['a dog', 'a cat']", ["a dog", "a cat"]),
        ('["a dog", "caf\\u00e9"]', ["a dog", "caf\u00e9"]),
        ("""["it's", 'b']""", ["it's", "b"]),
        ("['one|two']", ["one|two"]),
        ("[]", []),
        ("[music] a dog [end]", ["[music] a dog [end]"]),
        ("('a dog', 'a cat')", ["a dog", "a cat"]),
        ("('a dog',)", ["a dog"]),
        ("{'b dog', 'a cat', 'c'}", ["b dog", "a cat", "c"]),
        ("('a dog')", ["('a dog')"]),
        ("('hello' she says)", ["('hello' she says)"]),
        ('{"en": "a dog"}', ['{"en": "a dog"}']),
    ],
)
def test_a_list_in_a_cell_is_read_as_python_and_json_write_it(manifest, cell, captions):
    for column in ("captions", "caption"):
        table = f'audio,{column}\na.wav,"{cell.replace(chr(34), 2 * chr(34))}"\n'
        (clip,) = read_manifest(manifest(table, "m.csv"))
        assert clip.captions == captions


@pytest.mark.parametrize("cell", ["['a dog' 'a cat']", "['a', 3]", "['a', b]", "['a' * 9]"])
def test_a_list_that_is_written_otherwise_is_refused(manifest, cell):
    """NumPy's: Python would join its texts to one."""
    with pytest.raises(ManifestError, match=r":2: captions must be .* separate several by \|"):
        read_manifest(manifest(f'audio,captions\na.wav,"{cell}"\n', "m.csv"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '"split": NaN',
            "split must neither be a missing value .* got 'nan'; leave the cell empty",
        ),
        ('"split": "None"', "split must neither be a missing value .* got 'None'"),
        ('"split": "rejected.jsonl"', "nor end with .jsonl, .* got 'rejected.jsonl'; rename it"),
        ('"split": "0.tar"', "nor end with .* got '0.tar'"),
        ('"id": NaN', "id must be a value of JSON, without NaN .* got nan; write null"),
        (f'"more": {"[" * 900 + "]" * 900}', "more must be a value of JSON, .* nested 100 deep"),
        ('"caption": NaN', "caption must be a text or a list of texts, got nan"),
        ('"more": {"x": [1, Infinity]}', r"more must be a value of JSON, .*'x': .*inf"),
        ('"more": 1e999', "more must be a value of JSON, .* got inf"),
    ],
)
def test_missing_values_and_splits_that_are_files_are_refused(manifest, row, message):
    file = manifest('{"audio": "a.wav", ' + row + "}\n")
    with pytest.raises(ManifestError, match=f"^{file}:1: .*{message}"):
        read_manifest(file)


def test_a_column_that_is_named_twice_is_refused(manifest):
    with pytest.raises(ManifestError, match=r"must name each column once, got \['caption'\]"):
        read_manifest(manifest("audio,caption,caption\na.wav,x,y\n", "m.csv"))


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


def test_nan_is_a_missing_value_of_a_table(manifest):
    rows = "audio,caption,captions,labels\na.wav,nan,a dog|NaN,nan\nb.wav,Nan tells,,\n"
    clips = read_manifest(manifest(rows, "m.csv"))
    assert [(clip.captions, clip.labels) for clip in clips] == [
        (["a dog"], []),
        (["Nan tells"], []),
    ]
    with pytest.raises(ManifestError, match=r"^\S+:2: audio must name a sound file, got 'nan'"):
        read_manifest(manifest("audio,caption\nnan,a dog\n", "m.csv"))
