"""Clips without a split are divided once and for all, and none leaks into another split."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.data.shards import open_shards
from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry, read_manifest
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.shard_tasks import ShardRange
from flap_fast.preparation.splitting import Fractions, held_out
from tests.preparation.test_prepare import contents
from tests.sounds import encode, tone, write_manifest


def clip(number: int, caption: str = "", **more) -> Entry:
    """A clip whose file does not exist, so that only its name and captions count."""
    return Entry(
        number, Path(f"sounds/{number}.wav"), [caption or f"sound {number}"], str(number), **more
    )


def splits(entries: list[Entry], val: float = 0.1, test: float = 0.0) -> dict[str, str]:
    return {entry.id: entry.split for entry in held_out(entries, Fractions(val, test))[0]}


def test_so_many_are_held_out_and_rows_at_the_end_move_none():
    few = splits([clip(n) for n in range(2000)], 0.1, 0.05)
    added = [clip(n, f"Sound {n - 2000}" if n % 2 else "") for n in range(2000, 2500)]
    more = splits([*(clip(n) for n in range(2000)), *added], 0.1, 0.05)
    assert abs(list(few.values()).count("val") - 200) < 45  # three standard deviations: 40
    assert abs(list(few.values()).count("test") - 100) < 35
    assert {name: more[name] for name in few} == few


def test_a_test_split_moves_no_clip_of_val():
    clips = [clip(n) for n in range(300)]
    without, with_test = splits(clips), splits(clips, 0.1, 0.2)
    val = [name for name, split in without.items() if split == "val"]
    assert val == [name for name, split in with_test.items() if split == "val"]


def test_equal_captions_are_on_one_side_also_in_a_chain():
    """Clips 0 and 2 share nothing; 1 has a caption of either."""
    clips = [clip(n, f"Sound {n}!") for n in range(300)]
    for n in range(0, 300, 3):
        clips[n + 1].captions = [f"  sound {n}", f"SOUND {n + 2}."]
    found = splits(clips)
    assert {len({found[str(n + k)] for k in range(3)}) for n in range(0, 300, 3)} == {1}
    assert set(found.values()) == {"train", "val"}


def test_one_caption_of_most_clips_leaves_the_others_to_hold_out():
    for salt in range(0, 20_000, 1000):  # wherever the hash of its first clip would put it
        clips = [clip(salt + n, "a dog barks" if n < 300 else "") for n in range(400)]
        found, said = held_out(clips, Fractions(0.2))
        assert {entry.split for entry in found[:300]} == {"train"}
        assert "(the most together: 300, in train)" in said
        assert {entry.split for entry in found[300:]} == {"train", "val"}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """40 sounds; each of the last ten has the bytes of one of the first ten under another name."""
    rows = []
    for n in range(40):
        data = encode(tone(200 + 20 * (n % 30), 0.1, 16_000), 16_000, "WAV")
        (tmp_path / f"{n}.wav").write_bytes(data)
        rows.append({"audio": f"{n}.wav", "caption": f"number {n}"})
    return write_manifest(tmp_path / "mine.jsonl", rows)


def test_files_of_the_same_bytes_are_on_one_side(manifest):
    found = splits(read_manifest(manifest), 0.3)
    assert [found[str(n)] for n in range(10)] == [found[str(n + 30)] for n in range(10)]
    assert {found[str(n)] for n in range(10)} == {"train", "val"}


def test_pieces_of_one_file_are_on_one_side(manifest):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()][:30]
    pieces = [
        {**row, "caption": f"{row['caption']}, {at}", "start_s": at / 100, "duration_s": 0.05}
        for at in (1, 5)
        for row in rows
    ]
    entries = held_out(read_manifest(write_manifest(manifest, pieces)), Fractions(0.3))[0]
    assert [entry.split for entry in entries[:30]] == [entry.split for entry in entries[30:]]
    assert {entry.split for entry in entries} == {"train", "val"}


def test_prepare_divides_alike_over_machines_and_where_the_folder_moves(manifest, tmp_path):
    one, moved = tmp_path / "one", tmp_path / "moved"
    done = prepare(manifest, one, shard_clips=8, show=False, val_fraction=0.3)
    val, train = (len(open_shards([one / split])) for split in ("val", "train"))
    assert (done.kept, val + train) == (40, 40)
    assert 4 < val < 20
    for number in (2, 1):
        prepare(
            manifest,
            tmp_path / "ranges",
            shard_clips=8,
            shard_range=ShardRange(number, 2),
            show=False,
            val_fraction=0.3,
        )
    assert contents(tmp_path / "ranges") == contents(one)
    moved.mkdir()
    for file in (manifest, *tmp_path.glob("*.wav")):
        os.link(file, moved / file.name)
    prepare(moved / "mine.jsonl", moved / "out", shard_clips=8, show=False, val_fraction=0.3)
    assert contents(moved / "out") == contents(one)
    with pytest.raises(ManifestError, match="a fraction held out"):
        prepare(manifest, one, shard_clips=8, show=False, val_fraction=0.2)


@pytest.mark.parametrize(
    ("clips", "fractions", "message"),
    [
        (9, (1.0, 0.0), r"--val-fraction must be in \[0, 1\), got 1.0"),
        (9, (0.1, float("nan")), r"--test-fraction must be in \[0, 1\), got nan"),
        (9, (0.5, 0.5), "--val-fraction and --test-fraction must be less than 1 together, got 1.0"),
        (
            2,
            (1e-9, 0.0),
            "--val-fraction must leave each split a clip, got none in val of 2 .* give a larger",
        ),
        (
            2,
            (0.5, 0.499),
            "--val-fraction, --test-fraction must leave .* got none in train .* give a smaller",
        ),
    ],
)
def test_fractions_that_cannot_be_are_refused(clips, fractions, message):
    with pytest.raises(ConfigError, match=message):
        held_out([clip(n) for n in range(clips)], Fractions(*fractions))


def test_clips_that_have_splits_are_not_divided():
    given = [clip(1), clip(2, split="test")]
    with pytest.raises(
        ConfigError, match=r"left out where clips have splits, got 'test' on line 2"
    ):
        held_out(given, Fractions(0.5))
