"""Shards by URL: the batches of the same shards on disk, whatever the server does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from flap_fast.config import Config
from flap_fast.data import store
from flap_fast.data.batch import Batch
from flap_fast.data.lengths import clip_seconds
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import ShardError, Shards, open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.embed import read_texts
from flap_fast.places import Url
from flap_fast.ranks import Ranks
from tests.data.test_enriched import write_captions
from tests.serving import Served, busy, cut, refused, serving, slow
from tests.tars import tar_of
from tests.tiny import tiny


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """24 clips in 4 shards, with their indices."""
    return Path(shutil.copytree(prepared / "train", tmp_path / "served"))


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serving(folder) as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FIRST_PAUSE_S", 0.01)


def config_of(place: object, cache: Path, *overrides: str) -> Config:
    settings = (f"data.train='{place}'", f"data.cache={cache}", "frontend.backend=torch")
    return tiny(*settings, "data.retry_s=5", *overrides)


def opened(config: Config) -> Shards:
    return open_shards(config.data.train, ("sounds", "mels"), config.data)


def batches(config: Config, last: int = 4) -> list[Batch]:
    loader = TrainingLoader(config, opened(config), tokenizer(config.text), Ranks())
    return list(loader.batches(0, last))


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    for a, b in zip(found, wanted, strict=True):
        for name in ("media", "ids", "attention_mask", "sample_index"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.clips.tolist() == b.clips.tolist()


def shards_in(cache: Path) -> list[str]:
    return sorted(file.name.rpartition("-")[2] for file in (cache / "shards").iterdir())


@pytest.mark.parametrize("given", ["", "{0..3}.tar", "{0..3}.tar?key=secret"])
@pytest.mark.parametrize("window", [0, 1])
def test_batches_are_those_of_the_disk_and_each_file_is_fetched_once(
    folder, served, cache, given, window
):
    overrides = (f"data.shuffle_shards={window}",)
    wanted = batches(config_of(folder, cache, *overrides), 6)
    for _ in range(2):
        assert_same(batches(config_of(f"{served.url}/{given}", cache, *overrides), 6), wanted)
    assert served.fetched(".tar") == served.fetched(".idx") == 4
    assert shards_in(cache) == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_shards_without_an_index_are_fetched_once_to_be_scanned(folder, served, cache):
    (folder / "9.tar").write_bytes(
        tar_of({"a.flac": b"x", "a.json": b'{"text": "a"}', "README": b""})
    )
    for file in (*folder.glob("*.idx"), folder / "sizes.json", folder / "SHA256SUMS"):
        file.unlink()
    wanted = open_shards([folder])
    config = config_of(f"{served.url}/{{0..3}}.tar", cache)
    places = [*config.data.train, served.url / "9.tar"]
    for _ in range(2):
        found = open_shards(places, ("sounds", "mels"), config.data)
        assert np.array_equal(found.locations, wanted.locations)
        assert found.encoded(24) == b"x"
    assert served.fetched(".tar") == 5


def test_a_slow_answer_a_503_and_a_lost_connection_pass(folder, served, cache):
    wanted = batches(config_of(folder, cache))
    served.faults["0.tar"] = [busy, busy, cut, busy]
    served.faults["1.idx"] = [busy, cut]
    served.faults["1.tar"] = [slow(0.5)]
    assert_same(batches(config_of(served.url, cache)), wanted)
    # What came before the connection was lost is not fetched again.
    assert served.ranges["0.tar"] == [0, 0, 0, *[(folder / "0.tar").stat().st_size // 2] * 2]


def test_a_server_that_stays_busy_ends_the_run_by_name(served, cache):
    served.faults["2.tar"] = [busy] * 1000
    config = config_of(served.url, cache, "data.retry_s=0.1")
    message = r"2\.tar cannot be read, tried for 0 s: 503 .*; try again later, or set data.retry_s"
    with pytest.raises(ShardError, match=message):
        batches(config)


def test_a_wait_is_said(served, cache, monkeypatch, capsys):
    monkeypatch.setattr(store, "_SAID_PAUSE_S", 0.02)
    monkeypatch.setattr("flap_fast.data.shard_cache._SAID_S", 0.1)
    served.faults["0.tar"] = [busy, busy, slow(0.5)]
    shards = opened(config_of(served.url, cache))
    shards.encoded(0)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{served.url}/0.tar: 503 Service Unavailable; trying again in 0 s",
        f"waiting for {served.url}/0.tar (0 MiB)",
    ]


def test_a_shard_that_changed_since_the_run_began_is_named(folder, served, cache):
    shards = opened(config_of(served.url, cache))
    shards.encoded(0)
    for number in range(2):
        tar = folder / f"{number}.tar"
        tar.write_bytes(tar.read_bytes().replace(b"a", b"b"))
    shards.encoded(0)  # fetched before
    with pytest.raises(ShardError, match=r"1\.tar must stay as it was when .* another ETag"):
        shards.encoded(7)
    assert shards_in(cache) == ["0.tar"]
    # Another run sees the new shard, and takes no old copy of it.
    assert opened(config_of(served.url, cache)).encoded(0) == open_shards([folder]).encoded(0)


def test_an_index_that_is_not_the_one_of_the_checksums_is_named(folder, served, cache):
    index = folder / "2.idx"
    index.write_bytes(index.read_bytes().replace(b"12", b"13"))
    with pytest.raises(ShardError, match=r"2\.idx must be the file that SHA256SUMS lists"):
        opened(config_of(served.url, cache))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", r"nowhere must hold a sizes\.json, .* as http.*/nowhere/\{0\.\.127\}\.tar$"),
        ("*.tar", r"\*\.tar must have its \*.* not over HTTP.*; write the names in braces"),
        ("{0..9}.tar", r"/4\.tar must be a shard, got no such file"),
        ("0.tar.gz", r"must be a plain tar, got a compressed one"),
    ],
)
def test_urls_that_lead_to_no_shards_are_refused_with_the_remedy(served, cache, given, message):
    with pytest.raises(ShardError, match=message):
        opened(config_of(f"{served.url}/{given}", cache))


def test_a_shard_that_may_not_be_read_is_named_without_its_key(served, cache):
    served.faults["0.tar"] = [refused] * 9
    shards = opened(config_of(f"{served.url}/0.tar?key=secret", cache))
    with pytest.raises(ShardError, match=r"0\.tar cannot be read: 403 .*; see docs/data.md") as e:
        shards.encoded(0)
    assert "secret" not in str(e.value)
    assert served.fetched(".tar") == 1


class _HttpError(Exception):
    """As gcsfs raises it."""

    code = 401


@pytest.mark.parametrize("error", [_HttpError("who are you?"), OSError("Forbidden: b/bucket/o")])
def test_an_answer_of_google_that_will_not_change_is_no_reason_to_wait(error):
    tries = []

    def call() -> None:
        tries.append(1)
        raise error

    with pytest.raises(ShardError, match=r"^gs://b cannot be read: .*; see docs/data\.md for"):
        store.retried(Url("gs://b"), call, 5.0)
    assert len(tries) == 1


def test_the_login_of_a_url_is_sent_and_not_printed(folder, served, cache):
    def wants_login(to: Any, data: bytes) -> bool:
        """A 401 for who is not ann, with the password p@ss."""
        right = to.headers.get("Authorization") == "Basic YW5uOnBAc3M="
        return not right and refused(to, data)

    served.faults["0.tar"] = [wants_login, wants_login]
    right, wrong = (
        opened(config_of(f"http://{login}@{served.url[7:]}/0.tar", cache / login))
        for login in ("ann:p%40ss", "ann:pass")
    )
    assert right.encoded(0) == open_shards([folder]).encoded(0)
    with pytest.raises(ShardError, match=r"^http://127\.0\.0\.1:\d+/0\.tar cannot be read: 403"):
        wrong.encoded(0)


def test_a_package_that_is_missing_is_named_with_the_command(cache, monkeypatch):
    store._scheme.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"^s3:// needs a .*pip install 'flap_fast\[remote\]'$"):
        opened(config_of("s3://bucket/x", cache))
    store._scheme.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "paramiko", None)
    with pytest.raises(ValueError, match=r"^sftp:// needs a .*paramiko.*; install it with pip$"):
        opened(config_of("sftp://host/x", cache))
    with pytest.raises(ValueError, match=r"^a URL must begin with s3, .*got sx://"):
        opened(config_of("sx://bucket/x", cache))


class _OnServer(LocalFileSystem):
    """Files of a server that must be named, as sftp's."""

    protocol = "there"

    def __init__(self, host: str, **settings: Any):
        assert host == "ann@host:22"
        super().__init__(**settings)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("there://ann@host:22")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"host": path.removeprefix("there://").rstrip("/")}


def test_a_file_system_gets_the_server_that_a_url_names(folder, cache):
    fsspec.register_implementation("there", _OnServer, clobber=True)
    wanted = batches(config_of(folder, cache))
    assert_same(batches(config_of(f"there://ann@host:22{folder}", cache)), wanted)


def test_lengths_are_read_once(folder, served, cache):
    wanted = clip_seconds(open_shards([folder]), Ranks())
    config = config_of(served.url, cache)
    assert np.array_equal(clip_seconds(opened(config), Ranks()), wanted)
    shutil.rmtree(cache / "shards")
    assert np.array_equal(clip_seconds(opened(config), Ranks()), wanted)
    assert served.fetched(".tar") == 4


def test_captions_and_texts_are_read_by_url(folder, served, cache):
    write_captions(folder)
    overrides = ("data.captions=concat", "train.global_batch=16")
    wanted = batches(config_of(folder, cache, *overrides))
    assert_same(batches(config_of(served.url, cache, *overrides)), wanted)
    assert read_texts(opened(config_of(served.url, cache))) == read_texts(open_shards([folder]))
    (folder / "captions.jsonl").unlink()
    with pytest.raises(ValueError, match=r"data\.captions must be 'original' where no folder"):
        batches(config_of(served.url, cache, *overrides))


@pytest.mark.parametrize("name", ["my sounds", "données"])
def test_names_that_urls_must_encode_are_read(folder, served, cache, name):
    shutil.copytree(folder, folder / name)
    places = [served.url / name, served.url / quote(name)]
    assert [len(opened(config_of(place, cache))) for place in places] == [24, 24]


def test_a_url_that_is_none_is_refused_at_once(cache):
    with pytest.raises(ShardError, match=r"cannot be read: .*nonnumeric port.*correct the URL"):
        opened(config_of(Url("http://127.0.0.1:abc/0.tar"), cache))
