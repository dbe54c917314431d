"""Shards on S3, against a server on loopback; left out without the dev extra's s3fs and moto."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flap_fast.data import store
from flap_fast.data.shards import ShardError, open_shards
from flap_fast.places import Url
from tests.data.test_remote import assert_same, batches, config_of, opened, shards_in

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """The file system of a server, which the environment names."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        store._scheme.cache_clear()
        yield store._scheme("s3")
        server.stop()
    store._scheme.cache_clear()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def bucket(s3: Any, prepared: Path, tmp_path: Path) -> Iterator[Url]:
    """The training shards in a bucket."""
    s3.mkdir("bucket")
    s3.put(f"{prepared / 'train'}/", "bucket/mine/train/", recursive=True)
    yield Url("s3://bucket/mine/train")
    s3.rm("bucket", recursive=True)


@pytest.mark.parametrize("given", ["", "/", "/{0..3}.tar", "/[0-3].ta?"])
def test_batches_from_s3_are_those_of_the_disk(bucket, prepared, tmp_path, given):
    wanted = batches(config_of(prepared / "train", tmp_path))
    cache = tmp_path / "cache"
    for _ in range(2):
        assert_same(batches(config_of(f"{bucket}{given}", cache)), wanted)
    assert shards_in(cache) == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_shards_of_s3_without_an_index_are_scanned(bucket, s3, prepared, tmp_path):
    for name in ("0.idx", "1.idx", "2.idx", "3.idx", "sizes.json", "SHA256SUMS"):
        s3.rm(f"bucket/mine/train/{name}")
    found = opened(config_of(bucket, tmp_path / "cache"))
    assert np.array_equal(found.locations, open_shards([prepared / "train"]).locations)


def test_an_object_that_changed_is_named(bucket, s3, tmp_path):
    shards = opened(config_of(bucket, tmp_path / "cache"))
    data = s3.cat("bucket/mine/train/0.tar")
    s3.pipe("bucket/mine/train/0.tar", data[:-1] + b"x")
    with pytest.raises(
        ShardError, match=r"^s3://bucket/mine/train/0\.tar must stay as it was when"
    ):
        shards.encoded(0)


@pytest.mark.parametrize("given", ["s3://bucket/mine/nowhere", "s3://bucket/mine/train/{4..5}.tar"])
def test_places_without_shards_are_named(bucket, tmp_path, given):
    with pytest.raises(ShardError, match=r"^s3://bucket/mine/.* got no"):
        opened(config_of(given, tmp_path / "cache"))


@pytest.mark.parametrize("given", ["s3://bucket/mine", "s3://bucket/mine/"])
def test_a_folder_of_splits_is_named_as_such(bucket, s3, tmp_path, given):
    s3.pipe("bucket/mine/.prepare/train-0.json", b"{}")
    named = (
        r"mine/? must hold \.tar shards, got folders of them: train; name one, as s3://bucket/mine/train$"
    )
    with pytest.raises(ShardError, match=named):
        opened(config_of(given, tmp_path / "cache"))


def test_a_bucket_that_is_not_there_is_named(s3, tmp_path):
    with pytest.raises(ShardError, match=r"^s3://nowhere/train"):
        opened(config_of("s3://nowhere/train", tmp_path / "cache"))


def test_missing_credentials_are_named_at_once(bucket, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(
        store, "_scheme", lambda *_: fsspec.filesystem("s3", skip_instance_cache=True)
    )
    with pytest.raises(ShardError, match=r"^s3://bucket/.*; see docs/data.md for credentials$"):
        opened(config_of(bucket, tmp_path / "cache"))
