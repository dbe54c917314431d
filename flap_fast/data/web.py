"""Files over HTTP, with the standard library: sizes and ETags, bytes from any offset."""

from __future__ import annotations

import base64
import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from flap_fast.places import Url

TIMEOUT_S = 60.0
"""Seconds without a byte after which a request is given up; it may be made again."""

# Servers that sign URLs for one method, or know no HEAD.
_NO_HEAD = {HTTPStatus.FORBIDDEN, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED}
_MAY_PASS = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


class Refused(OSError):
    """An answer that will be the same at the next try."""


def info(url: Url) -> dict[str, Any]:
    """Size and ETag (or time) of a file.

    Raises:
        FileNotFoundError: there is none.
        Refused: any other answer that will not change, or one without a size.
        OSError: anything else, which may pass.
    """
    try:
        with _opened(url, method="HEAD") as answer:
            return _info(url, answer)
    except urllib.error.HTTPError as error:
        if error.code not in _NO_HEAD:
            raise _as_os_error(url, error) from None
    try:
        with _opened(url) as answer:
            return _info(url, answer)
    except urllib.error.HTTPError as error:
        raise _as_os_error(url, error) from None


@contextmanager
def opened(url: Url, start: int) -> Iterator[tuple[dict[str, Any], int, Any]]:
    """What `info` says, the offset that a body begins at, and the body, to be read.

    Args:
        start: the offset to begin at, where the server can.
    """
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        with _opened(url, headers) as answer:
            partial = answer.status == HTTPStatus.PARTIAL_CONTENT
            found = _info(url, answer)
            first = start if partial else 0
            found["size"] += first
            yield found, first, answer
    except urllib.error.HTTPError as error:
        raise _as_os_error(url, error) from None
    except http.client.HTTPException as error:  # a body that ends early, say
        raise OSError(f"{type(error).__name__}: {error}") from None


@contextmanager
def _opened(url: Url, headers: dict[str, str] | None = None, method: str = "GET") -> Iterator[Any]:
    about = {"User-Agent": "flap_fast", **(headers or {})}
    # As browsers do: spaces and letters beyond ASCII are encoded, what is encoded stays.
    text = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    scheme, _, rest = text.partition("://")
    login, at, _ = rest.partition("/")[0].rpartition("@")
    text = f"{scheme}://{rest.removeprefix(login + at)}"
    request = urllib.request.Request(text, headers=about, method=method)
    if login:
        basic = base64.b64encode(urllib.parse.unquote_to_bytes(login)).decode()
        request.add_unredirected_header("Authorization", f"Basic {basic}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            yield answer
    except http.client.InvalidURL as error:
        raise Refused(f"{error}; correct the URL") from None


def _info(url: Url, answer: Any) -> dict[str, Any]:
    size = answer.headers.get("Content-Length")
    if size is None or answer.headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(f"{url.shown} must be served as it is, with its size, got no Content-Length")
    return {
        "size": int(size),
        "ETag": answer.headers.get("ETag"),
        "LastModified": answer.headers.get("Last-Modified"),
    }


def _as_os_error(url: Url, error: urllib.error.HTTPError) -> OSError:
    said = f"{error.code} {error.reason}"
    if error.code in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return FileNotFoundError(said)
    if error.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return PermissionError(said)
    final = error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in _MAY_PASS
    return Refused(said) if final else OSError(said)
