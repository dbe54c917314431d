"""Shards: any clip at once, by us and by others, and no word about a tar that is not whole."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from flap_fast.data.preprocess.waveform import Unusable, read_sound
from flap_fast.data.shards import ShardError, open_shards, pack
from flap_fast.files import write_atomically
from tests.sounds import encode, noise, tone
from tests.tars import tar_of

SAMPLES = [
    (f"{n:09d}", encode(noise(n, 0.1 + 0.05 * n, 16_000), 16_000), {"text": [f"noise {n}"], "n": n})
    for n in range(5)
]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A tar of five clips, without an index."""
    (tmp_path / "0.tar").write_bytes(pack(SAMPLES)[0])
    return tmp_path / "0.tar"


@pytest.mark.parametrize("indexed", [True, False])
def test_every_clip_is_read_back_with_and_without_an_index(shard, indexed):
    if indexed:
        shard.with_suffix(".idx").write_text(pack(SAMPLES)[1])
    shards = open_shards([shard.parent])
    assert len(shards) == 5
    for clip in (3, 0, 4, 1, 2):
        assert shards.encoded(clip) == SAMPLES[clip][1]
        assert shards.record(clip) == SAMPLES[clip][2]
    assert shards.name(0) == f"{shard} at byte 512"


def test_a_tar_is_the_same_bytes_each_time_and_its_index_agrees_with_a_scan(shard):
    tar, index, clips = pack(SAMPLES)
    assert (tar, index, clips) == pack(iter(SAMPLES))
    assert (
        tar == pack([(key, sound, dict(reversed(row.items()))) for key, sound, row in SAMPLES])[0]
    )
    scanned = open_shards([shard.parent]).locations
    shard.with_suffix(".idx").write_text(index)
    assert (open_shards([shard.parent]).locations == scanned).all()


def test_folders_and_files_follow_one_another_in_their_natural_order(tmp_path):
    for name, key in (("a/10.tar", "10"), ("a/2.tar", "2"), ("a/0.tar", "0"), ("b/0.tar", "b")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pack([(key, b"fLaC", {"text": key})])[0])
    shards = open_shards([tmp_path / "b", tmp_path / "a"])
    assert [shards.record(clip)["text"] for clip in range(4)] == [["b"], ["0"], ["2"], ["10"]]
    assert shards.locations[:, 0].tolist() == [0, 1, 2, 3]


def test_webdataset_reads_what_prepare_writes(prepared):
    shards = open_shards([prepared / "train"])
    urls = [str(file) for file in shards.files]
    theirs = list(WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(theirs) == len(shards)
    for clip, sample in enumerate(theirs):
        assert sample["flac"] == shards.encoded(clip)
        assert json.loads(sample["json"]) == shards.record(clip)


def test_dali_reads_our_index(prepared):
    from nvidia.dali import fn
    from nvidia.dali.pipeline import pipeline_def

    shards = open_shards([prepared / "train"])

    @pipeline_def(batch_size=7, num_threads=1, device_id=None)  # type: ignore[arg-type]
    def graph():
        paths = [str(file) for file in shards.files]
        index = [str(file.with_suffix(".idx")) for file in shards.files]
        read = fn.readers.webdataset(paths=paths, index_paths=index, ext=["flac", "json"])
        return tuple(read)  # type: ignore[arg-type]

    sounds, records = graph().run()
    for clip in range(7):
        assert bytes(np.asarray(sounds[clip])) == shards.encoded(clip)
        assert json.loads(bytes(np.asarray(records[clip]))) == shards.record(clip)


def test_shards_in_laions_layout_are_read_as_they_are(tmp_path):
    """48 kHz FLAC, `text` one string or several, written by webdataset itself, no index."""
    waves = [tone(400, 0.5, 48_000), noise(3, 1.5, 48_000)]
    texts = ["a tone", ["a noise", "a hiss"]]
    with TarWriter(str(tmp_path / "0.tar")) as tar:
        for n, (wave, text) in enumerate(zip(waves, texts, strict=True)):
            tar.write(
                {
                    "__key__": f"./{n}",
                    "flac": encode(wave, 48_000),
                    "json": {"text": text, "tag": ["x"], "original_data": {"title": "t"}},
                }
            )
    (tmp_path / "sizes.json").write_text('{"0.tar": 2}')
    shards = open_shards([tmp_path])
    assert [shards.record(clip)["text"] for clip in range(2)] == [["a tone"], ["a noise", "a hiss"]]
    assert shards.record(1)["tag"] == ["x"]
    assert [len(read_sound(shards.encoded(clip), 16_000)) for clip in range(2)] == [8000, 24_000]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("folder", ["", "./", "some.folder/", "a/b/"])
def test_a_key_may_have_a_folder(tmp_path, folder, indexed):
    """`tar cf x.tar ./` puts `./` before each name."""
    files = {}
    for key in "ab":
        files |= {
            f"{folder}{key}.flac": b"fLaC",
            f"{folder}{key}.json": b'{"text": "%s"}' % key.encode(),
        }
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    if indexed:
        lines = [
            f"FLAC {at} 4 {folder}{key}.FLAC json {at + 1024} 13 {folder}{key}.json"
            for key, at in (("a", 512), ("b", 2560))
        ]
        (tmp_path / "0.idx").write_text("\n".join(["v1.2 2", *lines]))
    shards = open_shards([tmp_path])
    assert [shards.record(clip)["text"] for clip in range(len(shards))] == [["a"], ["b"]]


@pytest.mark.parametrize("indexed", [True, False])
def test_one_name_in_two_folders_is_two_clips(tmp_path, indexed):
    files = {}
    for folder in "ab":
        files |= {
            f"{folder}/x.flac": b"fLaC",
            f"{folder}/x.json": b'{"text": "%s"}' % folder.encode(),
        }
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    if indexed:
        lines = (
            "flac 512 4 a/x.flac json 1536 13 a/x.json",
            "flac 2560 4 b/x.flac json 3584 13 b/x.json",
        )
        (tmp_path / "0.idx").write_text("\n".join(["v1.2 2", *lines]))
    shards = open_shards([tmp_path])
    assert [shards.record(clip)["text"] for clip in range(len(shards))] == [["a"], ["b"]]


def test_other_formats_and_members_are_seen(tmp_path):
    files = {
        "b.ogg": b"OggS",
        "b.JSON": b'{"text": "b"}',
        "b.txt": b"b",
        "a.json": b"{}",
        "a.wav": b"",
    }
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    shards = open_shards([tmp_path])
    assert [shards.encoded(clip) for clip in range(2)] == [b"OggS", b""]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_shard_is_named_wherever_it_was_cut(shard, indexed):
    """Inside a sound, inside a header, between two clips, before the end mark."""
    whole, index, _ = pack(SAMPLES)
    places = [int(word) for word in index.split() if word.isdecimal() and int(word) % 512 == 0]
    end_of_third = places[6] - 512
    last, bytes_of_last = places[9], int(index.split()[-2])
    cuts = [places[4] + 700, places[5] - 300, end_of_third, last + bytes_of_last - 1]
    if indexed:
        shard.with_suffix(".idx").write_text(index)
    else:
        cuts.append(len(whole.rstrip(b"\0")) // 512 * 512 + 512)
    for cut in cuts:
        shard.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=f"^{shard} is truncated"):
            open_shards([shard.parent])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is truncated or no tar: empty file; fetch it again"),
        (b"<html>404</html>" * 100, "is truncated or no tar: .*; fetch it again"),
        (tar_of({"a.flac": b"x"}), r": clip a must have a sound and a .json, got \['flac'\]"),
        (tar_of({"a.json": b"{}", "README": b"x"}), r": clip a must have a sound .*got \['json'\]"),
        (tar_of({"a.mid": b"x", "a.json": b"{}"}), r": clip a must have .*, got \['mid', 'json'\]"),
    ],
)
def test_a_tar_that_is_no_shard_is_named(tmp_path, data, message):
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ShardError, match=f"^{tmp_path / '0.tar'} ?{message}"):
        open_shards([tmp_path])


def test_a_clip_that_stands_twice_is_refused(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.flac", "a.json", "a.flac", "a.json"):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    with pytest.raises(ShardError, match=r"a\.flac must stand once; it stands twice"):
        open_shards([tmp_path])


@pytest.mark.parametrize(
    "index",
    [
        "",
        "v1.1 5\n",
        "v1.2 5\n",
        "v1.2 ",
        "v1.2 1\n\n",
        "v1.2 1\nflac 512",
        "v1.2 1\nflac 512 many a.flac json 1 2 a.json",
        "v1.2 1\nflac 512 4 a b.flac json 1 2 a.json",
    ],
)
def test_a_spoilt_index_is_named_with_what_to_do(shard, index):
    shard.with_suffix(".idx").write_text(index)
    with pytest.raises(
        ShardError, match=r"0\.idx must be a whole index of version 1\.2: .*delete it"
    ):
        open_shards([shard.parent])


def test_a_shard_that_did_not_arrive_is_named(prepared, tmp_path):
    shutil.copytree(prepared / "train", tmp_path / "train")
    (tmp_path / "train/2.tar").unlink()
    with pytest.raises(ShardError, match=r"train must hold the shards of its .*, got no 2\.tar; "):
        open_shards([tmp_path / "train"])
    for ending in ("tar", "idx"):  # another shard in its place
        shutil.copy(prepared / f"train/3.{ending}", tmp_path / f"train/2.{ending}")
    with pytest.raises(
        ShardError, match=r"sizes\.json, got 3 of 7 clips in 2\.tar; fetch it or run"
    ):
        open_shards([tmp_path / "train"])
    (tmp_path / "train/sizes.json").write_text('{"0.tar": 7, "1.tar": 7, ')
    with pytest.raises(ShardError, match=r"sizes\.json must be a JSON object: .*; fetch it again"):
        open_shards([tmp_path / "train"])


def test_laions_sizes_need_not_be_right_but_its_shards_must_be_there(shard):
    sizes = shard.with_name("sizes.json")
    sizes.write_text('{"0.tar": 4}')
    assert len(open_shards([shard.parent])) == 5
    sizes.write_text('{"0.tar": 4, "1.tar": 5}')
    with pytest.raises(ShardError, match=r"got no 1\.tar; .*, or take it out of sizes\.json$"):
        open_shards([shard.parent])


HALF = json.dumps({"text": "a dog \ud83d", "title": "\ude00"})


def test_half_an_emoji_in_a_caption_is_no_text_and_keeps_the_rest(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of({"a.flac": b"x", "a.json": HALF.encode()}))
    (tmp_path / "1.tar").write_bytes(pack([("a", b"x", json.loads(HALF))])[0])
    shards = open_shards([tmp_path])
    for clip in range(2):
        assert shards.record(clip) == {"text": ["a dog \ufffd"], "title": "\ude00"}


def test_a_folder_without_shards_is_refused_with_the_command_that_writes_them(tmp_path):
    with pytest.raises(ShardError, match=r"must hold .tar shards, got none; write .* flap prepare"):
        open_shards([tmp_path])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no json", "its JSON cannot be read: "),
        ("[1]", "its JSON cannot be read: it must be an object, got a list"),
        ('"x"', "its JSON cannot be read: "),
        ("{}", "captionless: its JSON holds no text"),
        ('{"text": []}', "captionless"),
        ('{"text": " "}', "captionless"),
        ('{"text": 5}', "captionless"),
        ('{"text": {"a": 1}}', "captionless"),
        ('{"text": [null, ""]}', "captionless"),
    ],
)
def test_a_clip_without_a_caption_says_so(tmp_path, text, reason):
    (tmp_path / "0.tar").write_bytes(tar_of({"a.flac": b"x", "a.json": text.encode()}))
    with pytest.raises(Unusable, match=f"^{reason}"):
        open_shards([tmp_path]).record(0)


def test_a_shard_that_shrinks_while_it_is_read_is_no_clips_fault(shard):
    """Not a bad clip to be replaced: the whole run has lost its data."""
    shards = open_shards([shard.parent])
    with shard.open("r+b") as file:
        file.truncate(600)
    for read, clip in ((shards.encoded, 0), (shards.record, 0), (shards.record, 3)):
        with pytest.raises(ShardError, match=r"0\.tar ends before byte \d+, inside a clip"):
            read(clip)


def test_many_more_shards_than_may_be_open_at_once_are_read(tmp_path):
    for n in range(300):
        (tmp_path / f"{n}.tar").write_bytes(tar_of({"a.flac": b"%d" % n, "a.json": b"{}"}))
    shards, before = open_shards([tmp_path]), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [int(shards.encoded(clip)) for clip in range(300)] == list(range(300))
    assert len(os.listdir("/proc/self/fd")) <= before + 256


def test_a_full_disk_leaves_the_old_file_and_says_which(tmp_path, monkeypatch):
    """A link to /dev/full stands where the part is written: each write fails with ENOSPC."""
    file = tmp_path / "0.tar"
    write_atomically(file, b"old")

    def linked(_: int) -> str:
        (tmp_path / "0.tar.x.part").symlink_to("/dev/full")
        return "x"

    monkeypatch.setattr("flap_fast.files.secrets.token_hex", linked)
    with pytest.raises(
        OSError, match=r"No space left .*; make room .* again: '.*/0\.tar'"
    ) as error:
        write_atomically(file, b"new" * 1000)
    assert error.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["0.tar"]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    (tmp_path / "0.tar.5eed.part").write_bytes(b"hal")
    (tmp_path / "10.tar.5eed.part").write_bytes(b"another file's")
    write_atomically(tmp_path / "0.tar", b"whole")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0.tar", "10.tar.5eed.part"]


def test_two_who_write_one_file_at_once_both_succeed(tmp_path, monkeypatch):
    """The second writer begins, and clears away the first one's part, before that is in place."""
    file, fsync, written = tmp_path / "0.tar", os.fsync, []

    def other_first(descriptor: int) -> None:
        fsync(descriptor)
        written.append(descriptor)
        if len(written) == 1:
            write_atomically(file, b"the same bytes")

    monkeypatch.setattr("flap_fast.files.os.fsync", other_first)
    write_atomically(file, b"the same bytes")
    assert len(written) == 3
    assert file.read_bytes() == b"the same bytes"
    assert [f.name for f in tmp_path.iterdir()] == ["0.tar"]


def test_writing_takes_the_place_of_what_was_there(tmp_path):
    write_atomically(tmp_path / "x", b"old and long")
    with (tmp_path / "x").open("rb") as being_read:
        write_atomically(tmp_path / "x", b"new")
        assert being_read.read() == b"old and long"
    assert (tmp_path / "x").read_bytes() == b"new"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def swapped(index: str, first: int, second: int) -> str:
    """The index with two of its words exchanged, counted from its first clip's."""
    head, *lines = index.splitlines()
    words = [line.split(" ") for line in lines]
    (a, i), (b, j) = divmod(first, 8), divmod(second, 8)
    words[a][i], words[b][j] = words[b][j], words[a][i]
    return "\n".join([head, *map(" ".join, words)]) + "\n"


def read_all(folder: Path) -> None:
    shards = open_shards([folder])
    for clip in range(len(shards)):
        shards.encoded(clip)
        shards.record(clip)


# Words of a line: ending, offset, size and name, first of the sound, then of the JSON.
@pytest.mark.parametrize("words", [(1, 9), (5, 13), (1, 5), (2, 10), (5, 21)])
def test_an_index_that_is_not_its_tars_trains_no_wrong_pairs(shard, words):
    shard.with_suffix(".idx").write_text(pack(SAMPLES)[1])
    read_all(shard.parent)
    shard.with_suffix(".idx").write_text(swapped(pack(SAMPLES)[1], *words))
    with pytest.raises(ShardError, match=r"0\.idx must be the index of 0\.tar, got "):
        read_all(shard.parent)


def test_clips_of_one_size_are_told_apart_by_their_names(tmp_path):
    tar, index, _ = pack([(f"{n}", b"fLaC", {"text": str(n)}) for n in range(3)])
    (tmp_path / "0.tar").write_bytes(tar)
    for words in ((1, 9), (5, 13)):
        (tmp_path / "0.idx").write_text(swapped(index, *words))
        with pytest.raises(ShardError, match=r"got clip \d with the JSON of \d; delete it"):
            read_all(tmp_path)
    (tmp_path / "0.idx").write_text(swapped(index, 1, 5))
    with pytest.raises(ShardError, match="must be the index of "):
        read_all(tmp_path)
    (tmp_path / "0.idx").unlink()
    read_all(tmp_path)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, 1, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["a", "./in/a", "\u00e9t\u00e9/\u00e9", "x" * 60 + "/" + "y" * 90])
def test_an_index_of_others_agrees_with_their_tars(tmp_path, tar_format, key):
    lines = []
    with tarfile.open(tmp_path / "0.tar", "w", format=tar_format) as tar:
        for ending, data in (("flac", b"fLaC"), ("json", b'{"text": "a"}')):
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(tmp_path / "0.tar") as tar:
        for m in tar:
            lines.append(f"{m.name[-4:]} {m.offset_data} {m.size} {m.name}")
    (tmp_path / "0.idx").write_text("v1.2 1\n" + " ".join(lines))
    read_all(tmp_path)


def test_an_index_that_changed_since_it_was_prepared_is_named(prepared, tmp_path):
    folder = shutil.copytree(prepared / "train", tmp_path / "renamed")
    read_all(folder)
    index = folder / "0.idx"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([lines[0], *lines[:0:-1]]))
    with pytest.raises(ShardError, match=r"0\.idx must be the file that SHA256SUMS lists"):
        open_shards([folder])
    index.unlink()
    read_all(folder)
