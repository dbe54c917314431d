"""The same shards in the same order, however a user names them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.config.rules import check_before_loading
from flap_fast.data import listing, shards
from flap_fast.data.shards import ShardError, open_shards
from flap_fast.evaluation.run import names
from flap_fast.places import Place, Url
from tests.tars import tar_of
from tests.tiny import tiny

CLIP = {"a.flac": b"x", "a.json": b'{"text": "a dog"}'}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards 0 to 11, with an index."""
    (tmp_path / "mine").mkdir()
    for number in range(12):
        (tmp_path / f"mine/{number}.tar").write_bytes(tar_of(CLIP))
    return tmp_path / "mine"


def opened(*places: Place) -> list[str]:
    return [file.name for file in open_shards(places).files]


ALL = [f"{number}.tar" for number in range(12)]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", ALL),
        ("{0..11}.tar", ALL),
        ("{11..0}.tar", ALL),
        ("*.tar", ALL),
        ("{1,[2-9],1?}.tar", ALL[1:]),
        ("7.tar", ["7.tar"]),
    ],
)
def test_folders_tars_and_patterns_give_shards_in_natural_order(folder, given, wanted):
    assert opened(folder / given) == wanted


def test_a_list_keeps_its_order(folder):
    assert opened(folder / "7.tar", folder / "{3..4}.tar") == ["7.tar", "3.tar", "4.tar"]


def test_a_pattern_may_span_folders(folder):
    shutil.copytree(folder, folder.parent / "other")
    files = open_shards([folder.parent / "{other,mine}/{1..2}.tar"]).files
    wanted = ["mine/1.tar", "mine/2.tar", "other/1.tar", "other/2.tar"]
    assert [f"{file.parent.name}/{file.name}" for file in files] == wanted


@pytest.mark.parametrize("given", ["0.tar", "{0..1}.tar", "[0-1].tar", "{0,1}*.tar"])
def test_a_folder_with_the_signs_of_a_pattern_is_taken_by_its_name(folder, given):
    named = folder.parent / "mine[12]"
    shutil.copytree(folder, named)
    shutil.copytree(folder, folder.parent / "mine1")
    assert {file.parent for file in open_shards([named / given]).files} == {named}


@pytest.mark.parametrize("given", ["mine[12]/{0..12}.tar", "{mine[12],other}/*.tar"])
def test_a_part_of_a_pattern_that_finds_nothing_is_refused(folder, given):
    shutil.copytree(folder, folder.parent / "mine[12]")
    with pytest.raises(ShardError, match=r"12\].*no such file|other.*got none"):
        open_shards([folder.parent / given])


def test_some_shards_of_a_folder_need_not_be_all_that_its_sizes_list(folder):
    (folder / "sizes.json").write_text('{"0.tar": 1, "99.tar": 5}')
    assert opened(folder / "{0..1}.tar") == ["0.tar", "1.tar"]
    with pytest.raises(ShardError, match=r"got no 99\.tar"):
        opened(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{10..12}.tar", r"must match existing \.tar files, got '.*\}\.tar' without '.*/12\.tar'"),
        ("x*.tar", r"must match existing \.tar files, got '.*x\*\.tar'; write them with"),
        ("12.tar", r"must be existing \.tar files, got '.*/12\.tar'; write them with"),
    ],
)
def test_shards_that_are_not_there_are_refused_before_anything_is_loaded(folder, given, message):
    config = tiny(f"data.train={folder}", f"data.val={folder / given}")
    with pytest.raises(ConfigError, match=f"^data.val {message}"):
        check_before_loading(config, world=1)
    check_before_loading(tiny(f"data.train={folder}/*.tar", f"data.val={folder}/7.tar"), world=1)


@pytest.mark.parametrize("given", ["0.tar.gz", "{0..1}.tar.gz", "*.gz"])
def test_compressed_shards_are_refused_however_they_are_named(folder, given):
    for number in range(2):
        (folder / f"{number}.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ShardError, match="must be a plain tar, got a compressed one"):
        opened(folder / given)


def test_scores_are_named_by_the_folder_of_a_patterns_shards(tmp_path):
    places = [tmp_path / "a/val", tmp_path / "b/val/{0..3}.tar", Url("s3://bucket/c/test/")]
    places += [Url("https://host/d/{0..7}.tar?k=v"), Url("https://host/e/0.tar?k=v")]
    assert [*names(places)] == ["a/val", "b/val", "test", "d", "0.tar"]
    assert [*names([Url("s3://b/x/*.tar"), Url("s3://b/x/1.tar")])] == ["x", "1.tar"]
    two = [tmp_path / "val/{0..3}.tar", tmp_path / "val/{4..7}.tar"]
    assert names(two) == {"{0..3}.tar": two[0], "{4..7}.tar": two[1]}


def test_a_folder_of_splits_is_named_as_such(folder):
    """What `flap prepare mine.jsonl data/mine` writes: its folder is not one of shards."""
    out = folder.parent / "out"
    for split in ("val", "train"):
        shutil.copytree(folder, out / split)
    with pytest.raises(ShardError) as error:
        open_shards([out])
    wanted = (
        f"{out} must hold .tar shards, got folders of them: train, val; name one, as {out}/train"
    )
    assert str(error.value) == wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("{0..1}.tar", "{1..2}.tar"), r"^1 shard is named more than once, as \S*/mine/1\.tar: an"),
        (("", "7.tar", "8.tar"), r"^2 shards are named more than once, as \S*/mine/7\.tar: an"),
        (("",), r"^$"),
        (("{0..1}.tar", "{2..3}.tar"), r"^$"),
    ],
)
def test_shards_that_are_named_twice_are_said(folder, given, said, capsys):
    opened(*(folder / name for name in given))
    assert re.match(said, capsys.readouterr().err)


def test_what_all_ranks_find_alike_is_said_by_the_first(folder, capsys, monkeypatch):
    (folder / "0.tar").write_bytes(tar_of(CLIP | {"README": b"mine"}))
    for rank, lines in (("1", 0), ("0", 2)):
        monkeypatch.setenv("RANK", rank)
        listing.say_repeated.cache_clear()
        shards.say_left_out.cache_clear()
        opened(folder, folder / "1.tar")
        assert len(capsys.readouterr().err.splitlines()) == lines
