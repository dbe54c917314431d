"""Sound data sets: their own splits, every caption, the right file, and what is missing said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flap_fast.data.preprocess.waveform import read_sound
from flap_fast.data.shards import open_shards, pack
from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.shard_tasks import Prepared
from flap_fast.preparation.sources import SOURCES
from tests.preparation.sources.layouts import RATE, sound, table, write
from tests.sounds import encode, noise, tone
from tests.tars import tar_of


def brief(entries: list[Entry], folder: Path) -> list[tuple]:
    """Split, file, captions and labels of each."""
    return [(e.split, str(e.audio.relative_to(folder)), e.captions, e.labels) for e in entries]


@pytest.fixture
def audiocaps(tmp_path: Path) -> Path:
    header = "audiocap_id,youtube_id,start_time,caption"
    five = [(n, "-_val", 30, f"caption {n}, of five") for n in range(5)]
    files = {
        "train.csv": table(
            header,
            (91139, "r1nicOVtvkQ", 130, "A woman talks nearby, as water pours"),
            (58146, "UDGBjjwyaqE", 20, "Clanking"),
            (58147, "UDGBjjwyaqE", 50, "Clanking, later"),
            (5, "whole", 1, "cut out of a recording"),
            (6, "gone", 0, "no longer on YouTube"),
        ),
        "val.csv": table(header, *five[:2], (9, "other", 0, "between"), *five[2:]),
        "audio/train/91139.wav": sound(200),
        "audio/train/YUDGBjjwyaqE_20.flac": sound(300, format="FLAC"),
        "audio/train/UDGBjjwyaqE_50000_60000.wav": sound(400),
        "audio/train/whole.wav": encode(tone(440, 12.5, RATE), RATE, "WAV"),
        "audio/val/2.wav": sound(500),
        "audio/val/other.ogg": sound(600, format="OGG"),
    }
    return write(tmp_path / "AudioCaps", files)


def test_audiocaps_has_one_caption_in_train_and_five_in_val(audiocaps):
    clips = SOURCES["audiocaps"].read(audiocaps)
    assert brief(clips, audiocaps) == [
        ("train", "audio/train/91139.wav", ["A woman talks nearby, as water pours"], []),
        ("train", "audio/train/YUDGBjjwyaqE_20.flac", ["Clanking"], []),
        ("train", "audio/train/UDGBjjwyaqE_50000_60000.wav", ["Clanking, later"], []),
        ("train", "audio/train/whole.wav", ["cut out of a recording"], []),
        ("train", "gone_0.wav", ["no longer on YouTube"], []),
        ("val", "audio/val/2.wav", [f"caption {n}, of five" for n in range(5)], []),
        ("val", "audio/val/other.ogg", ["between"], []),
    ]
    # The one file that is longer than a clip is a whole recording.
    assert [(clip.start_s, clip.duration_s) for clip in clips] == [
        (1.0, 10.0) if clip.id == "whole_1" else (0.0, None) for clip in clips
    ]
    assert clips[5].original == {"audiocap_ids": ["0", "1", "2", "3", "4"]}


def test_missing_clips_are_counted_and_listed_and_the_others_prepared(audiocaps, tmp_path):
    out = tmp_path / "out"
    assert prepare(SOURCES["audiocaps"].read(audiocaps), out, show=False) == Prepared(7, 2, 6, 1)
    (line,) = (out / "rejected.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["id"], row["reason"], row["line"]) == ("gone_0", "missing: no such file", 6)
    train = open_shards([out / "train"])
    assert len(read_sound(train.encoded(3), RATE)) == 10 * RATE
    assert len(open_shards([out / "val"]).record(0)["text"]) == 5


def test_wavcaps_finds_the_sounds_of_each_origin_and_leaves_out_what_a_blacklist_names(tmp_path):
    """Two origins have a clip 2219; AudioSet's ids end with .wav, the files with .flac."""

    def data(*clips: dict) -> str:
        return json.dumps({"num_captions_per_audio": 1, "data": clips})

    airplane = {"id": "2219", "caption": "An airplane lands.", "duration": 14.1, "author": "D. S."}
    files: dict[str, str | bytes] = {
        "json_files/SoundBible/sb_final.json": data({**airplane, "audio": "wav_path"}),
        "json_files/FreeSound/fsd_final.json": data(
            {"id": "2219", "caption": "Rain.", "duration": 3.2, "tags": ["rain"]},
            {"id": "17", "caption": "A dog.", "duration": 1.0},
        ),
        "json_files/AudioSet_SL/as_final.json": data(
            {"id": "Yb0RFKhbp.JA.wav", "caption": "Wind.", "duration": 10.0},
            {"id": "Yin_test.wav", "caption": "A test clip.", "duration": 10.0},
        ),
        "json_files/blacklist/a.json": json.dumps({"AudioSet": ["Yin_test.wav"], "FreeSound": []}),
        "json_files/blacklist/b.json": json.dumps({"AudioSet": [], "FreeSound": ["17", "2219"]}),
        "Zip_files/SoundBible/2219.flac": sound(200, format="FLAC"),
        "Zip_files/FreeSound_flac/2219.flac": sound(300, format="FLAC"),
        "AudioSet_SL/Yb0RFKhbp.JA.flac": sound(400, format="FLAC"),
    }
    folder = write(tmp_path / "WavCaps", files)
    clips = SOURCES["wavcaps"].read(folder)
    assert brief(clips, folder) == [
        ("train", "AudioSet_SL/Yb0RFKhbp.JA.flac", ["Wind."], []),
        ("train", "AudioSet_SL/Yin_test.flac", ["A test clip."], []),
        ("train", "Zip_files/FreeSound_flac/2219.flac", ["Rain."], []),
        ("train", "FreeSound/17.flac", ["A dog."], []),
        ("train", "Zip_files/SoundBible/2219.flac", ["An airplane lands."], []),
    ]
    assert clips[4].original == {"author": "D. S."}
    assert {clip.duration_s for clip in clips} == {None}
    clean = SOURCES["wavcaps-clean"].read(folder)
    assert [clip.id for clip in clean] == ["AudioSet_SL_Yb0RFKhbp.JA", "SoundBible_2219"]
    assert prepare(clips, tmp_path / "out", show=False) == Prepared(5, 1, 3, 2)
    shutil.rmtree(folder / "json_files/blacklist")
    with pytest.raises(ManifestError, match=r"wavcaps-clean must have blacklist/\*\.json"):
        SOURCES["wavcaps-clean"].read(folder)


def test_clotho_keeps_its_official_split_names_and_five_captions(tmp_path):
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
    said = ["Rain, on tin", "two", "three", "four", "five"]
    files: dict[str, str | bytes] = {
        f"clotho_captions_{split}.csv": table(header, (f"{split} (1).wav", *said))
        for split in ("development", "validation", "evaluation")
    }
    files |= {f"{split}/{split} (1).wav": sound(300) for split in ("validation", "evaluation")}
    files["clotho_audio_development/development/development (1).wav"] = sound(300)
    folder = write(tmp_path, files)
    assert brief(SOURCES["clotho"].read(folder), folder) == [
        ("development", "clotho_audio_development/development/development (1).wav", said, []),
        ("validation", "validation/validation (1).wav", said, []),
        ("evaluation", "evaluation/evaluation (1).wav", said, []),
    ]
    out = tmp_path / "out"
    assert prepare(SOURCES["clotho"].read(folder), out, show=False) == Prepared(3, 3, 3, 0)
    assert open_shards([out / "evaluation"]).record(0)["text"] == said


def test_esc50_is_five_folds_of_labels_without_underscores(tmp_path):
    header = "filename,fold,target,category,esc10,src_file,take"
    rows = [
        ("1-100032-A-0.wav", 1, 0, "dog", "True", 100032, "A"),
        ("5-9032-A-42.wav", 5, 42, "crackling_fire", "False", 9032, "A"),
    ]
    files = {f"audio/{row[0]}": sound(300) for row in rows}
    folder = write(tmp_path, {"meta/esc50.csv": table(header, *rows), **files})
    clips = SOURCES["esc50"].read(folder)
    assert brief(clips, folder) == [
        ("fold1", "audio/1-100032-A-0.wav", [], ["dog"]),
        ("fold5", "audio/5-9032-A-42.wav", [], ["crackling fire"]),
    ]
    assert clips[1].original == {"target": "42", "fold": 5}
    assert prepare(clips, tmp_path / "out", show=False) == Prepared(2, 2, 2, 0)
    assert open_shards([tmp_path / "out/fold5"]).record(0, captionless=True)["tag"] == [
        "crackling fire"
    ]


def test_urbansound8k_is_one_split_over_its_fold_folders(tmp_path):
    header = "slice_file_name,fsID,start,end,salience,fold,classID,class"
    rows = [
        ("100032-3-0-0.wav", 100032, 0.0, 0.317551, 1, 5, 3, "dog_bark"),
        ("99812-1-0-1.wav", 99812, 30.2, 34.2, 1, 10, 1, "car_horn"),
    ]
    folder = write(tmp_path, {"metadata/UrbanSound8K.csv": table(header, *rows)})
    clips = SOURCES["urbansound8k"].read(folder)
    # A slice is a file of its own: its `start` is where it was in the recording.
    assert brief(clips, folder) == [
        ("all", "audio/fold5/100032-3-0-0.wav", [], ["dog bark"]),
        ("all", "audio/fold10/99812-1-0-1.wav", [], ["car horn"]),
    ]
    assert [clip.start_s for clip in clips] == [0, 0]
    assert [clip.original["fold"] for clip in clips] == [5, 10]


def test_labels_are_the_names_of_the_folders_that_sounds_lie_in(tmp_path):
    files = {
        "car_horn/1.wav": sound(200),
        "dog/1.wav": sound(300),
        "dog/puppies/2.flac": sound(400, format="FLAC"),
        "dog/._1.wav": b"of another system",
        "README.md": "ours",
    }
    folder = write(tmp_path / "data", files)
    clips = SOURCES["labels"].read(folder)
    assert brief(clips, folder) == [
        ("all", "car_horn/1.wav", [], ["car horn"]),
        ("all", "dog/1.wav", [], ["dog"]),
        ("all", "dog/puppies/2.flac", [], ["dog"]),
    ]
    assert [clip.id for clip in clips] == ["car_horn_1", "dog_1", "dog_puppies_2"]
    assert prepare(clips, tmp_path / "out", show=False) == Prepared(3, 1, 3, 0)
    write(folder, {"dog/1.ogg": sound(300, format="OGG")})
    with pytest.raises(ManifestError, match="id must name one clip of a split, got 'dog_1' again"):
        SOURCES["labels"].read(folder)
    write(folder, {"stray.wav": sound(300)})
    (folder / "dog/1.ogg").unlink()
    with pytest.raises(ManifestError, match=r"label's folder, got 'stray\.wav' beside them"):
        SOURCES["labels"].read(folder)
    with pytest.raises(ManifestError, match="in folders of labels, got none below"):
        SOURCES["labels"].read(write(tmp_path / "empty", {"dog/notes.txt": "none"}))


def test_sounds_without_captions_are_those_of_a_folder_and_below(tmp_path):
    files = {
        "b/1.wav": sound(200),
        "b/1.flac": sound(300, format="FLAC"),
        "a_1.ogg": sound(400, format="OGG"),
        "a/1.wav": sound(500),
        "._1.wav": b"of another system",
        "list.csv": "a,b",
    }
    folder = write(tmp_path / "data", files)
    clips = SOURCES["sounds"].read(folder)
    names = ["a/1.wav", "a_1.ogg", "b/1.flac", "b/1.wav"]
    assert brief(clips, folder) == [("train", name, [], []) for name in names]
    assert [clip.id for clip in clips] == names
    out = tmp_path / "out"
    assert prepare(clips, out, show=False) == Prepared(4, 1, 4, 0)
    assert prepare(SOURCES["sounds"].read(folder), out, show=False) == Prepared(4, 1, 4, 0)
    with pytest.raises(ManifestError, match="there must be sounds, got none below"):
        SOURCES["sounds"].read(write(tmp_path / "empty", {"notes.txt": "none"}))


def test_musiccaps_is_split_by_count_or_by_name(tmp_path):
    header = (
        "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,"
        "is_balanced_subset,is_audioset_eval"
    )
    rows = [
        ("-0Gj8-vB1q4", 30, 40, "/m/0140xf", "['ballad', 'piano']", "A ballad.", 4, False, True),
        ("0-vB1q4-0Gj", 0, 10, "/m/02cjck", "['hiss']", "Hiss, noise.", 4, False, False),
    ]
    files = {
        "musiccaps-public.csv": table(header, *rows),
        "wav/[-0Gj8-vB1q4]-[30-40].wav": sound(300),
        "wav/0-vB1q4-0Gj.wav": sound(300),
    }
    folder = write(tmp_path, files)
    by_count = brief(SOURCES["musiccaps"].read(folder), folder)
    assert by_count == [
        ("train", "wav/[-0Gj8-vB1q4]-[30-40].wav", ["A ballad."], []),
        ("val", "wav/0-vB1q4-0Gj.wav", ["Hiss, noise."], []),
    ]
    by_name = brief(SOURCES["musiccaps-by-name"].read(folder), folder)
    assert [clip[0] for clip in by_name] == ["val", "train"]
    assert [clip[1:] for clip in by_name] == [clip[1:] for clip in by_count]


def test_others_shards_are_brought_to_the_rate_and_keep_all_that_they_say(tmp_path):
    wave = noise(1, 0.2, RATE, rms=0.3)
    at_rate, at_48 = encode(wave, RATE), encode(noise(2, 0.2, 48_000), 48_000)
    rows = [
        {"text": "one", "tag": ["dog"], "original_data": {"title": "a"}, "text_augment_t5": "t5"},
        {"text": ["two", "2"], "text_llm": ["a model's"], "id": "seven"},
    ]
    for split, key in (("train", "a"), ("test", "b")):
        samples = [("0", at_rate, rows[0]), ("1", at_48, rows[1])]
        write(tmp_path, {f"bbc/{split}/{key}.tar": pack(samples)[0]})
    # Without an index and with empty folders beside them, as LAION has them.
    (tmp_path / "bbc/valid").mkdir()
    assert prepare(
        SOURCES["shards"].read(tmp_path / "bbc"), tmp_path / "out", show=False
    ) == Prepared(4, 2, 4, 0)
    shards = open_shards([tmp_path / "out/train"])
    assert shards.record(0) == {**rows[0], "text": ["one"], "id": "a@512"}
    assert shards.record(1) == {**rows[1], "tag": [], "original_data": {}}
    # What is at the rate and has 16 bits keeps its samples, loud ones too.
    assert (read_sound(shards.encoded(0), RATE) == read_sound(at_rate, RATE)).all()
    assert len(read_sound(shards.encoded(1), RATE)) == 0.2 * RATE
    assert sorted(f.name for f in (tmp_path / "out").iterdir() if f.is_dir()) == [
        ".prepare",
        "test",
        "train",
    ]


def test_clips_of_all_splits_are_numbered_through(prepared):
    clips = SOURCES["shards"].read(prepared)
    assert [clip.line for clip in clips] == list(range(1, 31))
    assert [clip.split for clip in clips] == ["train"] * 24 + ["val"] * 6


def test_half_an_emoji_in_others_shards_is_a_mark_in_its_place(tmp_path):
    record = {"text": [], "captions": ["a dog \ud83d"], "tag": ["\ude00"]}
    write(tmp_path, {"train/0.tar": pack([("0", b"x", record)])[0]})
    (clip,) = SOURCES["shards"].read(tmp_path)
    assert (clip.captions, clip.labels) == (["a dog \ufffd"], ["\ufffd"])


def test_preparing_our_own_shards_again_changes_no_sound(prepared, tmp_path):
    prepare(SOURCES["shards"].read(prepared), tmp_path / "out", show=False)
    ours, again = open_shards([prepared / "train"]), open_shards([tmp_path / "out/train"])
    assert len(ours) == len(again) == 24
    for clip in range(len(ours)):
        assert again.encoded(clip) == ours.encoded(clip)
        assert again.record(clip) == ours.record(clip)


def test_a_folder_of_sounds_and_a_table_is_read_in_either_form(tmp_path):
    flat = write(
        tmp_path / "flat",
        {"metadata.csv": table("file_name,text,split", ("a/x.wav", "A dog, barking.", "val"))},
    )
    assert brief(SOURCES["folder"].read(flat), flat) == [
        ("val", "a/x.wav", ["A dog, barking."], [])
    ]
    split = write(
        tmp_path / "split",
        {
            "train/metadata.csv": table(
                "file_name,caption_1,caption_0,caption_10", ("x.wav", "second", "first", "last")
            ),
            "test/metadata.jsonl": json.dumps({"audio": "y.wav", "caption": "y", "kind": 1}) + "\n",
            "rest/readme.txt": "nothing to read",
        },
    )
    assert brief(SOURCES["folder"].read(split), split) == [
        ("test", "test/y.wav", ["y"], []),
        ("train", "train/x.wav", ["first", "second", "last"], []),
    ]
    rows = [
        {"file_name": "a.wav", "captions": ["one", "two"], "text": "three"},
        {"file_name": "b.wav", "captions": "one|two", "caption_0": "three", "text": ""},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    both = SOURCES["folder"].read(write(tmp_path / "both", {"metadata.jsonl": lines}))
    assert [clip.captions for clip in both] == [["one", "two", "three"]] * 2
    wrong = json.dumps({**rows[0], "captions": 5})
    with pytest.raises(
        ManifestError, match=r"metadata\.jsonl:1: captions must be a text or a list"
    ):
        SOURCES["folder"].read(write(tmp_path / "wrong", {"metadata.jsonl": wrong}))
    write(flat, {"manifest.csv": "", "other.csv": ""})
    with pytest.raises(ManifestError, match=r"one table of captions, got manifest\.csv, metadata"):
        SOURCES["folder"].read(flat)


def test_a_file_that_is_renamed_on_the_way_is_the_same_clip(audiocaps, tmp_path):
    """Where the folder lies does not matter: other machines may mount it elsewhere."""
    prepare(SOURCES["audiocaps"].read(audiocaps), tmp_path / "out", show=False)
    moved = tmp_path / "moved"
    shutil.copytree(audiocaps, moved)
    done = prepare(SOURCES["audiocaps"].read(moved), tmp_path / "out", show=False)
    assert done == Prepared(7, 2, 6, 1)


@pytest.mark.parametrize("name", list(SOURCES))
def test_a_folder_that_holds_something_else_is_refused_with_what_it_lacks(name, tmp_path):
    write(tmp_path, {"readme.txt": "something else"})
    read = SOURCES[name].read
    with pytest.raises(ManifestError, match=rf"must .*{tmp_path}"):
        read(tmp_path)


def test_a_table_without_a_column_is_refused_by_its_name(tmp_path):
    write(tmp_path, {"train.csv": table("youtube_id,start,caption", ("a", 0, "b"))})
    with pytest.raises(ManifestError, match=r"train\.csv:2 must .* called audiocap_id, start_time"):
        SOURCES["audiocaps"].read(tmp_path)
    write(tmp_path, {"train.csv": table("audiocap_id,youtube_id,start_time,caption", "abcd")})
    with pytest.raises(ManifestError, match=r"train\.csv:2: start_time must be seconds, got 'c'"):
        SOURCES["audiocaps"].read(tmp_path)


def test_a_json_that_cannot_be_read_is_the_reason_for_rejecting_its_clip(tmp_path):
    clip = encode(tone(300, 1.0, RATE), RATE)
    files = {"a.flac": clip, "a.json": b'{"text": "a dog"}', "b.flac": clip, "b.json": b'{"text":'}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    counts = prepare(SOURCES["shards"].read(tmp_path), tmp_path / "out", show=False)
    (row,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert (counts.kept, counts.rejected) == (1, 1)
    assert row["reason"].startswith("unreadable: its JSON cannot be read: Expecting value")
