"""What stands before the endpoints: limits that hold while a body arrives, and who may ask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from fastapi import HTTPException  # pyright: ignore[reportMissingImports] - an extra

ASGI = Callable[
    [dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Any
]

# Of a body that is JSON: texts within their limits are far below it.
_JSON_BYTES = 2**20

_PAGES = ("/", "/docs")

# The page takes nothing from elsewhere, and none of ours runs where a sound should be.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; img-src data:; media-src 'self' blob:; connect-src 'self'; "
        b"style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Limits(NamedTuple):
    """What one client may ask of the server."""

    body_bytes: int = 64 * 2**20
    sound_s: float = 600.0
    texts: int = 256
    text_characters: int = 2000
    windows: int = 1000
    results: int = 100
    """Results of one search."""
    waiting: int = 8
    """Requests that are received or computed at a time."""
    receive_s: float = 60.0
    """Time for a body to arrive."""


def gated(app: ASGI, limits: Limits, hosts: frozenset[str] | None) -> ASGI:
    """Return an ASGI application that refuses before `app` reads what it must not.

    Args:
        hosts: names that a request's Host may have, None for any. A page elsewhere whose name was
            made to lead here (DNS rebinding) has another.
    """
    running = 0

    async def call(scope, receive, send):
        nonlocal running
        if scope["type"] != "http":
            return await app(scope, receive, send)
        send = _with_headers(send)
        refused = _refusal(scope, limits, hosts)
        if refused is not None:
            return await _refuse(send, *refused)
        if scope["method"] == "HEAD":  # uvicorn leaves out the body
            scope = scope | {"method": "GET"}
        if scope["method"] != "POST" and scope["path"] != "/search":
            return await app(scope, receive, send)
        if running >= limits.waiting:
            return await _refuse(
                send, 503, "the server must have time, got too many requests; ask again"
            )
        running += 1
        try:
            return await app(scope, _bounded(receive, _most_bytes(scope, limits), limits), send)
        finally:
            running -= 1

    return call


def _refusal(
    scope: dict[str, Any], limits: Limits, hosts: frozenset[str] | None
) -> tuple[int, str] | None:
    """Return the status and the sentence of a request that is refused by its headers alone."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    host = headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if hosts is not None and name.lower() not in hosts:
        return 403, f"Host must be one of {', '.join(sorted(hosts))}, got {name[:60]!r}"
    # A link on another site may lead to a page, which asks for the rest itself.
    link = headers.get("sec-fetch-mode") == "navigate" and scope["path"] in _PAGES
    linked = link and scope["method"] == "GET"
    if not linked and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return 403, "requests of a browser must come from this server's page, got another site's"
    if scope["method"] != "POST":
        return None
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    wanted = "application/json" if scope["path"] == "/embed/text" else "multipart/form-data"
    if kind != wanted:
        return 415, f"Content-Type must be {wanted}, got {kind[:60]!r}"
    length, most = headers.get("content-length", "0"), _most_bytes(scope, limits)
    if not (length.isascii() and length.isdigit()):
        return 422, f"Content-Length must be a number, got {length[:60]!r}"
    return (413, _too_large(most)) if len(length) > 18 or int(length) > most else None


def _most_bytes(scope: dict[str, Any], limits: Limits) -> int:
    texts = scope["path"] == "/embed/text"
    return min(_JSON_BYTES, limits.body_bytes) if texts else limits.body_bytes


def _too_large(most: int) -> str:
    return f"a request must have at most {most} bytes, got more"


def _bounded(receive: Callable[[], Awaitable[Any]], most: int, limits: Limits):
    """Return `receive` that raises once more than `most` bytes, or too late ones, have come."""
    loop = asyncio.get_running_loop()
    due, seen = loop.time() + limits.receive_s, 0
    ended = False

    async def bounded():
        nonlocal seen, ended
        if ended:
            return await receive()  # a client's going away
        try:
            async with asyncio.timeout_at(due):
                message = await receive()
        except TimeoutError:
            late = f"a request must arrive within {limits.receive_s:g} s, got a part of it"
            raise HTTPException(408, late, {"connection": "close"}) from None
        seen += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        # FastAPI hands on its own type of exception alone.
        if seen > most:
            raise HTTPException(413, _too_large(most), {"connection": "close"})
        return message

    return bounded


def _with_headers(send: Callable[[Any], Awaitable[None]]):
    async def sending(message):
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", ()), *_HEADERS]}
        await send(message)

    return sending


async def _refuse(send: Callable[[Any], Awaitable[None]], status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *([(b"retry-after", b"1")] if status == 503 else []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
