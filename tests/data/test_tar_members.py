"""Shards of others, with members that are no clip's: what is left out, and what is refused."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
from pathlib import Path

import pytest

from flap_fast.data.shards import ShardError, open_shards
from flap_fast.preparation.sources.tars import read
from tests.sounds import encode, noise
from tests.tars import tar_of

FLAC = encode(noise(0, 0.1, 16_000), 16_000)
PAIR = {"0.flac": FLAC, "0.json": b'{"text": "a dog"}'}


def texts(folder: Path) -> list[list[str]]:
    """Captions as training and evaluation see them, and as `prepare` does."""
    shards = open_shards([folder])
    found = [shards.record(clip)["text"] for clip in range(len(shards))]
    assert [entry.captions for entry in read(folder)] == found
    return found


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ({".DS_Store": b"x"}, ".DS_Store"),
        ({"README": b"x"}, "README"),
        ({"README.md": b"x"}, r"README \(md\)"),
        ({"._0.flac": b"x", "._0.json": b"x"}, "._0.flac in 0.tar, ._0.json"),
        ({"__MACOSX/0.flac": b"x", "__MACOSX/0.json": b"x"}, "__MACOSX/0.flac"),
        ({"1.json": b"{}"}, r"1 \(json\)"),
        ({"1.flac": FLAC}, r"1 \(flac\)"),
        ({"1.txt": b"a cat"}, r"1 \(txt\)"),
        ({"1.mid": b"x", "1.json": b"{}"}, r"1 \(mid, json\)"),
    ],
)
def test_an_odd_member_is_left_out_and_named(tmp_path, capsys, odd, named):
    for files in (PAIR | odd, odd | PAIR):
        (tmp_path / "0.tar").write_bytes(tar_of(files))
        assert texts(tmp_path) == [["a dog"]]
    (line,) = {*capsys.readouterr().err.splitlines()}
    assert line.startswith(f"{tmp_path}: left out {len(odd) if '1' not in named else 1} files")
    assert re.search(named, line)


def test_a_hidden_file_is_no_shard(tmp_path, capsys):
    (tmp_path / "0.tar").write_bytes(tar_of(PAIR))
    (tmp_path / "._0.tar").write_bytes(b"AppleDouble")
    assert texts(tmp_path) == [["a dog"]]
    assert "left out 1 files that are no clips: ._0.tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key", ["1.5", "Track 2.0 (Clean Version)", "a.b.c", "x.tar", "some.folder/a.b", "v1.mp3"]
)
def test_a_key_may_have_dots(tmp_path, key):
    files = {f"{key}.flac": FLAC, f"{key}.json": b'{"text": "a cat"}'}
    (tmp_path / "0.tar").write_bytes(tar_of(PAIR | files))
    assert texts(tmp_path) == [["a dog"], ["a cat"]]


def test_further_members_of_a_clip_are_none_of_their_own(tmp_path, capsys):
    more = {"0.seg.json": b"{}", "0.cls": b"3", "0.spectrogram.png": b"x"}
    (tmp_path / "0.tar").write_bytes(tar_of(PAIR | more))
    assert texts(tmp_path) == [["a dog"]]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "txt", "found"),
    [
        ('{"text": "a"}', None, ["a"]),
        ('{"text": ["a", "b"]}', "c", ["a", "b"]),
        ('{"caption": "a"}', "c", ["a"]),
        ('{"captions": ["a", "b"]}', "c", ["a", "b"]),
        ('{"text": null, "caption": "a"}', "c", ["a"]),
        ('{"text": "", "captions": ["a"]}', None, ["a"]),
        ('{"text": [null, " "], "caption": [], "captions": "a"}', None, ["a"]),
        ("{}", "c", ["c"]),
        ('{"text": null}', "\ufeff c\n", ["c"]),
        (None, "c", ["c"]),
        (None, "\ufeffc", ["c"]),
    ],
)
def test_captions_are_found_by_one_rule(tmp_path, record, txt, found):
    files = {"0.flac": FLAC}
    files |= {} if record is None else {"0.json": record.encode()}
    files |= {} if txt is None else {"0.txt": txt.encode()}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    assert texts(tmp_path) == [found]


def test_shards_without_clips_are_refused_and_one_among_others_is_named(tmp_path, capsys):
    (tmp_path / "0.tar").write_bytes(tar_of({}))
    with pytest.raises(ShardError, match=r"must hold shards with clips, got none in 0\.tar"):
        open_shards([tmp_path])
    (tmp_path / "1.tar").write_bytes(tar_of(PAIR))
    assert texts(tmp_path) == [["a dog"]]
    assert "left out 1 files that are no clips: all in 0.tar" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["1.tar.gz", "1.tgz", "1.tar.zst", "1.tar"])
def test_a_compressed_tar_is_named(tmp_path, name):
    (tmp_path / "0.tar").write_bytes(tar_of(PAIR))
    (tmp_path / name).write_bytes(gzip.compress(tar_of(PAIR)))
    with pytest.raises(ShardError, match=f"{name} must be a plain tar, got a compressed one"):
        open_shards([tmp_path])


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, make):
    (tmp_path / "0.tar").write_bytes(tar_of(PAIR))
    make(tmp_path / "1.tar")
    with pytest.raises(ShardError, match=r"1\.tar must be a regular file, got none; take it out"):
        open_shards([tmp_path])


@pytest.mark.parametrize("more", [tar_of({"1.flac": FLAC, "1.json": b"{}"}), b"x"])
def test_a_tar_that_goes_on_after_its_end_is_named(tmp_path, more):
    (tmp_path / "0.tar").write_bytes(tar_of(PAIR) + more)
    with pytest.raises(ShardError, match=r"0\.tar is spoilt: it goes on after its end mark at"):
        open_shards([tmp_path])


def test_a_tar_whose_end_a_disk_lost_is_named(tmp_path):
    """The bytes that were not written are zeros, and zeros are a tar's end mark."""
    data = tar_of({f"{n}.{ending}": FLAC for n in range(9) for ending in ("flac", "json")})
    cut = data.index(b"4.flac") + 700
    (tmp_path / "0.tar").write_bytes(data[:cut].ljust(len(data), b"\0"))
    with pytest.raises(ShardError, match=r"0\.tar is spoilt: it must end with at most 11264 zeros"):
        open_shards([tmp_path])


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_a_sparse_member_is_named(tmp_path, version):
    """What is no hole stands together in the tar: as one range it would be another sound."""
    holes = tmp_path / "1.wav"
    with holes.open("wb") as file:
        file.write(encode(noise(0, 0.1, 16_000), 16_000, "WAV"))
        file.truncate(2**20)
    (tmp_path / "1.json").write_text('{"text": "a cat"}')
    tar = ["tar", "--format=posix", f"--sparse-version={version}", "-S", "-cf", "0.tar"]
    subprocess.run([*tar, "1.wav", "1.json"], cwd=tmp_path, check=True)
    with pytest.raises(ShardError, match=r"0\.tar: 1\.wav must be stored whole, got a sparse file"):
        open_shards([tmp_path])


def test_a_shard_in_capitals_is_read_and_an_index_without_its_shard_is_named(tmp_path, capsys):
    (tmp_path / "0.TAR").write_bytes(tar_of(PAIR))
    (tmp_path / "1.idx").write_text("v1.2 0")
    assert texts(tmp_path) == [["a dog"]]
    said = f"{tmp_path}: left out 1 files that are no clips: 1.idx without 1.tar\n"
    assert capsys.readouterr().err == said
