"""Shards of a data set on Hugging Face, against a server on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import HfFileSystem

from flap_fast.data import store
from flap_fast.data.shards import ShardError, open_shards
from tests.data.test_remote import assert_same, batches, config_of, opened, shards_in

API, FILES = "/api/datasets/ann/mine", "/datasets/ann/mine/resolve/main/"
TRAIN = "hf://datasets/ann/mine/train"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """The repository's folder of shards."""
    return Path(shutil.copytree(prepared / "train", tmp_path / "repository/train"))


@pytest.fixture
def refused() -> list[str]:
    """Beginnings of what is asked for that get the answer 403."""
    return []


@pytest.fixture(autouse=True)
def server(folder: Path, refused: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = folder.parent

    def entry(file: Path) -> dict[str, object]:
        name, data = str(file.relative_to(root)), file.read_bytes()
        return {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            status, file = 200, root / path.removeprefix(FILES)
            if any(map(path.startswith, refused)):
                status, data = 403, b"{}"
            elif path.startswith(f"{API}/tree/main/train"):
                data = json.dumps([entry(file) for file in sorted(folder.iterdir())]).encode()
            elif path.startswith(f"{API}/paths-info/main"):
                names = re.findall(r"train/[\w.]+", unquote(asked))
                found = (root / name for name in names)
                data = json.dumps([entry(file) for file in found if file.is_file()]).encode()
            elif path.startswith(API):
                data = b'{"id": "ann/mine"}'
            elif path.startswith(FILES) and file.is_file():
                first, last = re.findall(r"\d+", self.headers["Range"])
                status, data = 206, file.read_bytes()[int(first) : int(last) + 1]
            else:
                status, data = 404, b"{}"
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = "http://{}:{}".format(*served.server_address)
    files = HfFileSystem(endpoint=endpoint, token=False, skip_instance_cache=True)
    monkeypatch.setattr(store, "_scheme", lambda *_: files)
    yield
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("given", ["", "/{0..3}.tar", "/*.tar"])
def test_batches_are_those_of_the_disk(folder, tmp_path, given):
    wanted = batches(config_of(folder, tmp_path))
    assert_same(batches(config_of(f"{TRAIN}{given}", tmp_path / "cache")), wanted)
    assert shards_in(tmp_path / "cache") == ["0.tar", "1.tar", "2.tar", "3.tar"]


@pytest.mark.parametrize("change", [lambda data: data[:-1] + b"x", lambda data: data + b"x"])
def test_a_shard_that_changed_since_the_run_began_is_named(folder, tmp_path, change):
    config = config_of(TRAIN, tmp_path / "cache")
    shards, tar = opened(config), folder / "0.tar"
    tar.write_bytes(change(tar.read_bytes()))
    with pytest.raises(ShardError, match=r"train/0\.tar must stay as it was when the run began"):
        shards.encoded(0)
    assert not shards_in(tmp_path / "cache")
    assert opened(config).encoded(0) == open_shards([folder]).encoded(0)  # another run


@pytest.mark.parametrize("where", [API, f"{API}/tree", f"{FILES}train/0.tar"])
def test_what_may_not_be_read_is_named_at_once(tmp_path, refused, where):
    refused.append(where)
    started = time.monotonic()
    with pytest.raises(ShardError, match=r"^hf://.*cannot be read: .*403.*; see docs/data\.md for"):
        opened(config_of(TRAIN, tmp_path / "cache")).encoded(0)
    assert time.monotonic() - started < 2  # no second try, after data.retry_s
