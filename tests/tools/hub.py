"""A stand-in for the Hugging Face Hub on loopback: the part of its HTTP interface that
huggingface_hub's own client asks for to make a repository, upload a folder and download it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_of_the_tests"
_LFS = (".safetensors", ".bin", "tokenizer.json")


def digest(*parts: bytes) -> str:
    """40 hexadecimal digits, as git's."""
    return hashlib.sha1(b"".join(parts)).hexdigest()


@dataclass
class Repo:
    """A repository: its commits' files, and what its branches and tags name."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add files to the branch main; returns the new commit."""
        whole = {**self.commits.get(self.refs.get("main", ""), {}), **files}
        sha = digest(*(name.encode() + data for name, data in sorted(whole.items())))
        self.commits[sha], self.refs["main"] = whole, sha
        return sha


@dataclass
class Hub:
    """The server's state."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    down: int = 0
    """The status of every answer, if not 0."""
    sent: list[str] = field(default_factory=list)
    """The files that were downloaded."""

    def put(self, name: str, folder: Path, *, private: bool = False, gated: bool = False) -> Repo:
        """Make a repository of a folder's files."""
        repo = self.repos[name] = Repo(private, gated)
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        repo.commit({str(file.relative_to(folder)): file.read_bytes() for file in files})
        return repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests' output is theirs."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if (repo := self._repo(found[1])) and (sha := self._sha(repo, found[2] or "main")):
                self._answer(200, {"id": found[1], "sha": sha, "siblings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            if (repo := self._repo(found[1])) and (sha := self._sha(repo, found[2])):
                self._answer(200, [_entry(*item) for item in repo.commits[sha].items()])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (repo := self._repo(found[1])) and (sha := self._sha(repo, found[2])):
                data = repo.commits[sha][found[3]]
                headers = {"X-Repo-Commit": sha, "ETag": f'"{_etag(found[3], data)}"'}
                self.hub.sent += [found[3]] if self.command == "GET" else []
                self._answer(200, data, headers)
        else:
            self._answer(404, {"error": f"no such page: {path}"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = front.get("license", "mit") not in ("mit", "apache-2.0", "other")
            errors = [{"message": '"license" must be one of [...]'}] if wrong else []
            self._answer(400 if wrong else 200, {"errors": errors, "warnings": []})
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name, there = f"{asked['organization']}/{asked['name']}", self.hub.repos
            status = 409 if name in there else 200
            private = asked.get("private") or asked.get("visibility") == "private"
            there.setdefault(name, Repo(private=bool(private)))
            self._answer(status, {"url": f"{self.hub.url}/{name}"})
        elif path.endswith(".git/info/lfs/objects/batch"):
            found = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": found})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(_LFS) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = {}
            for line in map(json.loads, body.splitlines()):
                one = line["value"]
                if line["key"] == "file":
                    files[one["path"]] = base64.b64decode(one["content"])
                elif line["key"] == "lfsFile":
                    files[one["path"]] = self.hub.blobs[one["oid"]]
            sha = self.hub.repos[found[1]].commit(files)
            url = f"{self.hub.url}/{found[1]}/commit/{sha}"
            self._answer(200, {"commitUrl": url, "commitOid": sha})
        else:
            self._answer(404, {"error": f"no such page: {path}"})

    def do_PUT(self) -> None:
        data = self._body()
        oid = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.blobs[oid] = data
        self._answer(200, {})

    def _repo(self, name: str) -> Repo | None:
        """The repository that a request may read; None once another answer is given."""
        repo, allowed = self.hub.repos.get(name), self.headers["Authorization"] == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not allowed):
            self._answer(404 if allowed else 401, {}, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and not allowed:
            self._answer(401, {}, {"X-Error-Code": "GatedRepo"})
        else:
            return repo
        return None

    def _sha(self, repo: Repo, revision: str) -> str | None:
        sha = repo.refs.get(revision, revision if revision in repo.commits else None)
        if sha is None:
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        return sha

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(self.hub.down or status)
        for name, value in ({} if self.hub.down else headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(name: str, data: bytes) -> str:
    lfs = name.endswith(_LFS)
    return hashlib.sha256(data).hexdigest() if lfs else digest(b"blob %d\0" % len(data), data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    git = digest(b"blob %d\0" % len(data), data)
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git}
    if name.endswith(_LFS):
        entry["lfs"] = {"oid": _etag(name, data), "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A Hub without repositories, which huggingface_hub takes for the real one."""
    from huggingface_hub import constants

    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # Its environment variables are read as it is imported.
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(cache / "no token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
