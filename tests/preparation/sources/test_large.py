"""AudioSetCaps, Auto-ACD and LAION's pairs: the file of each id, and what is missing said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_fast.data.preprocess.waveform import read_sound
from flap_fast.data.shards import open_shards
from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.shard_tasks import Prepared
from flap_fast.preparation.sources import SOURCES
from tests.preparation.sources.layouts import RATE, sound, table, write
from tests.tars import tar_of


def brief(entries: list[Entry], folder: Path) -> list[tuple]:
    """Split, id, file and captions of each."""
    return [(e.split, e.id, str(e.audio.relative_to(folder)), e.captions) for e in entries]


def rejected(out: Path) -> list[tuple]:
    """Id and reason of each clip that cannot be used."""
    rows = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    return [(row["id"], row["reason"]) for row in rows]


def test_audiosetcaps_is_the_clips_of_three_origins_by_their_ids(tmp_path, capsys):
    """As published: Y and an id, an id and a start of six digits, an id with start and length.

    `-0123456789` is a clip of each of them; none gets the sound of another.
    """
    files: dict[str, str | bytes] = {
        "Dataset/AudioSetCaps_caption.csv": table(
            "id,caption", ("Y-0123456789", "A, b."), ("Y---1_cCGK4M", "c"), ("YLgone4u8_cA", "d")
        ),
        "Dataset/VGGSound_AudioSetCaps_caption.csv": table(
            "id,caption", ("-0123456789_000030", "e"), ("OxPnZzn1_L8_000883", " ")
        ),
        "Dataset/YouTube-8M_AudioSetCaps_caption.csv": table(
            "id,caption", ("-0123456789_84_10", "f"), ("-0123456789_0_10", "g"), ("again_0_10", "h")
        )
        + "again_0_10,and i\r\n",
        "Dataset/VGGSound_Qwen-Audio_Q&A.csv": table("id,answer_1", ("x", "y")),
        "audioset/unbalanced/---1_cCGK4M.wav": sound(300),
        "audioset/Y-0123456789.flac": sound(400, format="FLAC"),
        "vggsound/-0123456789_000030.wav": sound(500),
        "vggsound/OxPnZzn1_L8_000883.wav": sound(550),
        "YouTube8M/batch1/Walking/-0123456789_84_10.mp3": sound(600, format="MP3"),
        "YouTube8M/batch1/Walking/again_0_10.mp3": sound(700, format="MP3"),
    }
    folder = write(tmp_path / "AudioSetCaps", files)
    clips = SOURCES["audiosetcaps"].read(folder)
    assert brief(clips, folder) == [
        ("train", "Y-0123456789", "audioset/Y-0123456789.flac", ["A, b."]),
        ("train", "Y---1_cCGK4M", "audioset/unbalanced/---1_cCGK4M.wav", ["c"]),
        ("train", "YLgone4u8_cA", "YLgone4u8_cA.wav", ["d"]),
        ("train", "-0123456789_000030", "vggsound/-0123456789_000030.wav", ["e"]),
        ("train", "OxPnZzn1_L8_000883", "vggsound/OxPnZzn1_L8_000883.wav", []),
        ("train", "-0123456789_84_10", "YouTube8M/batch1/Walking/-0123456789_84_10.mp3", ["f"]),
        ("train", "-0123456789_0_10", "-0123456789_0_10.wav", ["g"]),
        ("train", "again_0_10", "YouTube8M/batch1/Walking/again_0_10.mp3", ["h", "and i"]),
    ]
    assert [clip.line for clip in clips] == list(range(1, 9))  # keys in a shard
    assert prepare(clips, tmp_path / "out", show=False) == Prepared(8, 1, 5, 3)
    assert rejected(tmp_path / "out") == [
        ("YLgone4u8_cA", "missing: no such file"),
        ("OxPnZzn1_L8_000883", "captionless"),
        ("-0123456789_0_10", "missing: no such file"),
    ]
    assert capsys.readouterr().err == ""


def test_autoacd_is_clips_of_audioset_and_vggsound_in_its_two_splits(tmp_path):
    """Of a byte order mark and Windows' ends of lines, as a table that went through Excel."""
    train = "\ufeff" + table(
        "youtube_id,caption",
        ("oPRC3zComfA_000117", "Horses trot, on a paved road."),
        ("--aE2O5G5WE", "Rain falls."),
        ("oPRC3zComfA_000020", "Another piece."),
        ("LgGone4u8_A", "No longer on YouTube."),
    )
    files: dict[str, str | bytes] = {
        "train.csv": train,
        "test.csv": table("youtube_id,caption", ("YUDGBjjwyaq", "Clanking.")),
        "VGGSound/oPRC3zComfA_000117.ogg": sound(300, format="OGG"),
        # It may be any piece of that video: it is not taken for the one from 20 s.
        "AudioSet/YoPRC3zComfA.wav": sound(400),
        "AudioSet/Y--aE2O5G5WE.wav": sound(500),
        "AudioSet/YYUDGBjjwyaq.wav": sound(600),
    }
    folder = write(tmp_path / "Auto-ACD", files)
    assert train.endswith("\r\n")
    clips = SOURCES["autoacd"].read(folder)
    assert brief(clips, folder) == [
        (
            *("train", "oPRC3zComfA_000117", "VGGSound/oPRC3zComfA_000117.ogg"),
            ["Horses trot, on a paved road."],
        ),
        ("train", "--aE2O5G5WE", "AudioSet/Y--aE2O5G5WE.wav", ["Rain falls."]),
        ("train", "oPRC3zComfA_000020", "oPRC3zComfA_000020.wav", ["Another piece."]),
        ("train", "LgGone4u8_A", "LgGone4u8_A.wav", ["No longer on YouTube."]),
        ("test", "YUDGBjjwyaq", "AudioSet/YYUDGBjjwyaq.wav", ["Clanking."]),
    ]
    assert [clip.line for clip in clips] == [2, 3, 4, 5, 2]
    assert prepare(clips, tmp_path / "out", show=False) == Prepared(5, 2, 3, 2)
    missing = "missing: no such file"
    assert rejected(tmp_path / "out") == [("oPRC3zComfA_000020", missing), ("LgGone4u8_A", missing)]


@pytest.mark.parametrize(
    ("source", "file", "text", "said"),
    [
        (
            *("audiosetcaps", "Dataset/AudioSetCaps_caption.csv", "name,caption\r\na,b\r\n"),
            r"AudioSetCaps_caption\.csv:2 must have the columns id, caption, got none called id",
        ),
        (
            *("audiosetcaps", "VGGSound_AudioSetCaps_caption.csv", "id,caption\r\na,b\r\n ,d\r\n"),
            r"VGGSound_AudioSetCaps_caption\.csv:3: id must name a clip, got ' '",
        ),
        (
            *("autoacd", "train.csv", "audiocap_id,youtube_id,start_time\r\n1,b,3\r\n"),
            r"train\.csv:2 must have .* got none called caption; .* prepare --source audiocaps ",
        ),
        (
            *("audiocaps", "train.csv", "youtube_id,caption\r\na,b\r\n"),
            r"train\.csv:2 must have .* prepare --source autoacd ",
        ),
    ],
)
def test_a_table_without_a_column_or_an_id_names_it_and_what_reads_it(
    source, file, text, said, tmp_path
):
    with pytest.raises(ManifestError, match=said):
        SOURCES[source].read(write(tmp_path, {file: text}))


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    fsd = {
        "text": ["The sounds of Harp and Music"],
        "tag": ["Music", "Harp"],
        "original_data": {"title": "Oriental Harp 3", "fname": "145450"},
        "text_augment_t5": "A harp plays.",
    }
    files: dict[str, str | bytes] = {
        "FSD50K/train/1.flac": sound(300, format="FLAC"),
        "FSD50K/train/1.json": json.dumps(fsd),
        "FSD50K/train/2.flac": sound(310, format="FLAC"),
        "FSD50K/train/2.json": json.dumps({"text": "One caption.", "tag": "x", "original_data": 3}),
        "FSD50K/valid/1.flac": sound(320, format="FLAC"),
        "FSD50K/valid/1.json": json.dumps({"text": [" ", ""], "captions": ["Another's field."]}),
        "BBC/test/Track 2.0.WAV": sound(330),
        "BBC/test/Track 2.0.txt": "A caption in a text.\n",
        "BBC/test/3.json": json.dumps({"text": ["Its sound was not fetched."]}),
        "BBC/test/4.flac": sound(340, format="FLAC"),
        "BBC/test/4.json": '{"text":',
        "BBC/test/5.flac": sound(350, format="FLAC"),
        "own/6.flac": sound(360, format="FLAC"),
        "own/6.json": "\ufeff" + json.dumps({"text": ["Of a data set without splits."]}),
        "own/6.wav": sound(370),
        "own/sizes.json": '{"0.tar": 1}',
        "own/._6.flac": b"",
    }
    return write(tmp_path / "LAION", files)


def test_laions_pairs_are_in_the_splits_that_their_folders_are_called(laion, tmp_path, capsys):
    clips = SOURCES["laion"].read(laion)
    assert brief(clips, laion) == [
        ("test", "BBC_3", "BBC/test/3.flac", ["Its sound was not fetched."]),
        ("test", "BBC_4", "BBC/test/4.flac", []),
        ("test", "BBC_5", "BBC/test/5.flac", []),
        ("test", "BBC_Track 2.0", "BBC/test/Track 2.0.WAV", ["A caption in a text."]),
        ("train", "FSD50K_1", "FSD50K/train/1.flac", ["The sounds of Harp and Music"]),
        ("train", "FSD50K_2", "FSD50K/train/2.flac", ["One caption."]),
        ("valid", "FSD50K_1", "FSD50K/valid/1.flac", ["Another's field."]),
        ("own", "6", "own/6.flac", ["Of a data set without splits."]),
    ]
    said = "left out 3 files that are no clips: own/._6.flac, own/6.wav, own/sizes.json\n"
    assert capsys.readouterr().err == f"{laion}: {said}"
    out = tmp_path / "out"
    assert prepare(clips, out, show=False) == Prepared(8, 4, 5, 3)
    assert [(name, why.partition(" (")[0]) for name, why in rejected(out)] == [
        ("BBC_3", "missing: no such file"),
        ("BBC_4", "unreadable: its JSON cannot be read: Expecting value: line 1 column 9"),
        ("BBC_5", "captionless"),
    ]
    train = open_shards([out / "train"])
    record = json.loads((laion / "FSD50K/train/1.json").read_text())
    assert train.record(0) == {
        **record,
        "id": "FSD50K_1",
        "original_data": {**record["original_data"], "file": "1.flac", "start_s": 0.0},
    }
    heard = read_sound(laion / "FSD50K/train/1.flac", RATE)
    assert (read_sound(train.encoded(0), RATE) == heard).all()


def test_a_folder_of_laions_pairs_is_its_own_split_where_it_is_called_so(laion):
    for name, split in (("FSD50K/valid", "valid"), ("own", "train")):
        clips = SOURCES["laion"].read(laion / name)
        assert {clip.split for clip in clips} == {split}, name
    assert [clip.id for clip in SOURCES["laion"].read(laion / "FSD50K/valid")] == ["1"]


def test_laions_tars_are_named_with_the_source_that_reads_them(laion, tmp_path):
    pair = {"1.flac": sound(300, format="FLAC"), "1.json": b'{"text": "a dog"}'}
    write(tmp_path / "tars", {"train/0.tar": tar_of(pair)})
    with pytest.raises(ManifestError, match=r"must be KEY\.flac and KEY\.json.*--source shards"):
        SOURCES["laion"].read(tmp_path / "tars")
    (clip,) = SOURCES["shards"].read(tmp_path / "tars")
    assert (clip.split, clip.captions) == ("train", ["a dog"])


@pytest.mark.parametrize("source", ["laion", "autoacd", "wavcaps"])
def test_sounds_in_linked_folders_are_found(source: str, tmp_path: Path):
    write(tmp_path / "disk", {"a_1.wav": sound(300), "a_1.json": '{"text": ["a"]}'})
    clip = {"data": [{"id": "a_1", "caption": "a"}]}
    files: dict[str, str | bytes] = {
        "train.csv": table("youtube_id,caption", ("a_1", "a")),
        "json_files/FreeSound/fsd_final.json": json.dumps(clip),
        "FreeSound/readme.md": "",
    }
    folder = write(tmp_path / "set", files)
    (folder / "FreeSound/train").symlink_to(tmp_path / "disk", target_is_directory=True)
    (folder / "FreeSound/again").symlink_to(folder, target_is_directory=True)
    assert [str(clip.audio.relative_to(folder)) for clip in SOURCES[source].read(folder)] == [
        "FreeSound/train/a_1.wav"
    ]


@pytest.mark.parametrize(
    ("source", "name", "text"),
    [
        ("audiosetcaps", "AudioSetCaps_caption.csv", "id,caption\na,b\n"),
        ("wavcaps", "FreeSound/fsd_final.json", '{"data": [{"id": "a", "caption": "b"}]}'),
    ],
)
def test_a_table_that_is_there_twice_is_named(source: str, name: str, text: str, tmp_path: Path):
    folder = write(tmp_path / "set", {f"new/{name}": text})
    (folder / "again").symlink_to(folder / "new", target_is_directory=True)  # is one, not two
    assert len(SOURCES[source].read(folder)) == 1
    write(folder, {f"old/{name}": text})
    with pytest.raises(ManifestError, match=f"one {name}, got '.*/new/.*' and '.*/old/.*'; join"):
        SOURCES[source].read(folder)


def test_texts_beside_laions_pairs_are_no_clips(tmp_path: Path, capsys: pytest.CaptureFixture):
    pair = {"BBC/train/1.wav": sound(300), "BBC/train/1.json": '{"text": ["a"]}'}
    notes = {"README.txt": "What this is.\n", "BBC/LICENSE.txt": "Whose it is.\n"}
    folder = write(tmp_path / "LAION", {**pair, **notes})
    clips = SOURCES["laion"].read(folder)
    assert brief(clips, folder) == [("train", "BBC_1", "BBC/train/1.wav", ["a"])]
    assert "left out 2 files that are no clips: BBC/LICENSE.txt, README.txt" in (
        capsys.readouterr().err
    )
