"""A web server on loopback for a folder, with faults: what an object store may do on a bad day."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from flap_fast.places import Url

Fault = Callable[[BaseHTTPRequestHandler, bytes], bool]
"""Answers in place of the server; False where the server is to answer after all."""


class Served:
    """A folder by URL.

    Attributes:
        asked: how often each (method, name) was asked for.
        faults: by name, what happens at the next GETs, first come first.
        ranges: by name, the offset that each GET began at.
    """

    def __init__(self, folder: Path, port: int):
        self.folder, self.url = folder, Url(f"http://127.0.0.1:{port}")
        self.asked: Counter[tuple[str, str]] = Counter()
        self.faults: dict[str, list[Fault]] = {}
        self.ranges: dict[str, list[int]] = {}

    def fetched(self, ending: str) -> int:
        """How many GETs there were of names with an ending."""
        counts = self.asked.items()
        return sum(n for (how, name), n in counts if how == "GET" and name.endswith(ending))


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Serve a folder while entered: sizes, ETags, ranges; no listings."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer("HEAD")

        def do_GET(self) -> None:
            self._answer("GET")

        def _answer(self, method: str) -> None:
            name = unquote(self.path.partition("?")[0].lstrip("/"))
            served.asked[method, name] += 1
            file = folder / name
            if not file.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = file.read_bytes()
            start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
            if method == "GET":
                served.ranges.setdefault(name, []).append(start)
                faults = served.faults.get(name, [])
                if faults and faults.pop(0)(self, data):
                    return
            send(self, data[start:], data, status=206 if start else 200, body=method == "GET")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(folder, server.server_address[1])
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def send(
    to: BaseHTTPRequestHandler, body_bytes: bytes, whole: bytes, *, status: int, body: bool
) -> None:
    """Send an answer with the whole file's ETag."""
    to.send_response(status)
    to.send_header("Content-Length", str(len(body_bytes)))
    to.send_header("ETag", f'"{hashlib.md5(whole).hexdigest()}"')
    to.end_headers()
    if body:
        to.wfile.write(body_bytes)


def busy(to: BaseHTTPRequestHandler, data: bytes) -> bool:
    """A 503."""
    to.send_response(503)
    to.send_header("Content-Length", "0")
    to.end_headers()
    return True


def refused(to: BaseHTTPRequestHandler, data: bytes) -> bool:
    """A 403."""
    to.send_response(403)
    to.send_header("Content-Length", "0")
    to.end_headers()
    return True


def cut(to: BaseHTTPRequestHandler, data: bytes) -> bool:
    """Half of the bytes, then a lost connection."""
    to.send_response(200)
    to.send_header("Content-Length", str(len(data)))
    to.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
    to.end_headers()
    to.wfile.write(data[: len(data) // 2])
    to.close_connection = True
    return True


def slow(seconds: float) -> Fault:
    """An answer that takes its time."""

    def wait(to: BaseHTTPRequestHandler, data: bytes) -> bool:
        time.sleep(seconds)
        return False

    return wait
