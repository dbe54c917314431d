"""Files by URL, through fsspec (s3, gs, hf, ...) or HTTP: what is there, and their bytes.

Whatever may pass (a timeout, a 503, a lost connection) is tried again, after pauses that double,
until `retry_s` has gone by, 0 for one try. What will not is an error at once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from flap_fast.checks import ConfigError, in_one_line
from flap_fast.data import web
from flap_fast.data.tar_members import ShardError
from flap_fast.files import is_full, say
from flap_fast.places import Url

Result = TypeVar("Result")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
# Pauses from this one on are told.
_SAID_PAUSE_S = 4.0
_PIECE = 8 << 20
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, web.Refused)
# What stores call the status of an answer, and those of who may not read.
_STATUS, _FORBIDDEN = ("status_code", "status", "code"), (401, 403)
# What stores call the version of a file, the surest first.
_MARKS = (
    *("ETag", "etag", "generation", "blob_id", "md5Hash", "content_md5", "md5"),
    *("LastModified", "last_modified", "updated", "mtime", "created"),
)
# Schemes whose packages are in the extra `remote`.
_EXTRA = ("s3", "s3a", "gs", "gcs")


class Stamp(NamedTuple):
    """What changes when a file does."""

    size: int
    """In bytes."""
    mark: str
    """Its ETag, generation or time."""


class Changed(ShardError):
    """A file is no longer what it was when the run began."""


def stamp(url: Url, retry_s: float) -> Stamp | None:
    """The stamp of a file; None where there is none.

    Raises:
        ConfigError: a package is missing, or the scheme is none.
        ShardError: the store cannot be read.
    """

    def once() -> Stamp | None:
        try:
            found = web.info(url) if url.on_web else _fsspec(url)[0].info(_fsspec(url)[1])
        except FileNotFoundError:
            return None
        return _stamp(url, found)

    return retried(url, once, retry_s)


class Listing(NamedTuple):
    """What a folder holds, by name."""

    files: dict[str, Stamp]
    folders: list[str]


def listing(folder: Url, retry_s: float) -> Listing:
    """What a folder holds; nothing where there is none. Not over HTTP."""

    def once() -> Listing:
        files, path = _fsspec(folder)
        try:
            found = files.ls(path, detail=True, **_now(folder))
        except FileNotFoundError:
            return Listing({}, [])
        every = [(info["name"].rstrip("/").rpartition("/")[2], info) for info in found]
        stamps = {name: _stamp(folder / name, i) for name, i in every if i["type"] == "file"}
        return Listing(stamps, [name for name, i in every if i["type"] == "directory"])

    return retried(folder, once, retry_s)


def pieces(url: Url, wanted: Stamp, start: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each piece of a file, about from `start` on; not tried again.

    Raises:
        Changed: the file has another stamp.
        Exception: any of the store's own.
    """
    if url.on_web:
        with web.opened(url, start) as (info, at, body):
            _require_same(url, wanted, _stamp(url, info))
            while data := body.read(_PIECE):
                yield at, data
                at += len(data)
        return
    files, path = _fsspec(url)
    _require_same(url, wanted, _stamp(url, files.info(path, **_now(url, expand_info=True))))
    with files.open(path, "rb", block_size=_PIECE, cache_type="none") as body:
        body.seek(start)
        while data := body.read(min(_PIECE, wanted.size - start)):
            yield start, data
            start += len(data)
    _require_same(url, wanted, _stamp(url, files.info(path, **_now(url, expand_info=True))))


def retried(
    url: Url,
    call: Callable[[], Result],
    retry_s: float,
    *,
    reached: Callable[[], int] = int,
    stopped: Callable[[float], Any] | None = None,
) -> Result:
    """What `call` returns, tried again while it fails for a reason that may pass.

    Args:
        reached: how far `call` came; the time counts anew where it came further.
        stopped: waits for so many seconds; True where nobody wants the result any more.

    Raises:
        ShardError: it still fails after `retry_s` seconds, or for a reason that will not pass.
    """
    started, pause_s, before = time.monotonic(), _FIRST_PAUSE_S, reached()
    while True:
        try:
            return call()
        except (ConfigError, ShardError):
            raise
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise  # a bug
            if reached() > before:
                started, pause_s, before = time.monotonic(), _FIRST_PAUSE_S, reached()
            gone_s = time.monotonic() - started
            if _is_final(error):
                raise ShardError(f"{url.shown} cannot be read: {_why(error)}") from error
            if gone_s + pause_s > retry_s:
                tried = f", tried for {gone_s:.0f} s" if retry_s else ""
                longer = ", or set data.retry_s higher" if retry_s else ""
                raise ShardError(
                    f"{url.shown} cannot be read{tried}: {_why(error)}; try again later{longer}"
                ) from error
            if pause_s >= _SAID_PAUSE_S:
                say(f"{url.shown}: {_why(error)}; trying again in {pause_s:.0f} s", error=True)
        if (stopped or time.sleep)(pause_s):
            raise ShardError(f"{url.shown} is not wanted any more")
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _is_final(error: Exception) -> bool:
    here = isinstance(error, OSError) and is_full(error)  # the disk, not the store
    return here or isinstance(error, _FINAL) or forbidden(error)


def forbidden(error: BaseException | None) -> bool:
    """Whether who asks may not read; gcsfs and huggingface_hub say so by the answer's status."""
    answer = getattr(error, "response", error)
    denied = any(getattr(answer, name, None) in _FORBIDDEN for name in _STATUS)
    said = isinstance(error, OSError) and str(error).startswith("Forbidden: ")  # gcsfs's 403
    known = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
    return known or denied or said


def _why(error: Exception) -> str:
    said, remedy = in_one_line(error), ""
    if forbidden(error):
        remedy = "see docs/data.md for credentials"
    elif isinstance(error, FileNotFoundError):
        remedy = "there is no such file"
    return f"{said}; {remedy}" if remedy else said


def _require_same(url: Url, wanted: Stamp, found: Stamp) -> None:
    if found != wanted:
        what = ("size", "ETag or time") if found.size != wanted.size else ("ETag or time", "size")
        raise Changed(
            f"{url.shown} must stay as it was when the run began, got another {what[0]}; put it "
            "back, or start a new run"
        )


def _stamp(url: Url, info: dict[str, Any]) -> Stamp:
    size = info.get("size")
    if not isinstance(size, int):
        raise ShardError(f"{url.shown} must be a file with a size, got {info.get('type', 'none')}")
    marks = (info[name] for name in _MARKS if info.get(name) is not None)
    return Stamp(size, str(next(marks, "")))


@functools.cache
def _scheme(scheme: str, server: str = "") -> Any:
    """The file system of a scheme, and of the server of a URL where the scheme wants one."""
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(scheme)
        named = kind._get_kwargs_from_urls(f"{scheme}://{server}/")
        # Without its own cache of listings: a stamp must be of now.
        return kind(use_listings_cache=False, **named)
    except ImportError as error:
        remedy = "pip install 'flap_fast[remote]'" if scheme in _EXTRA else "install it with pip"
        raise ConfigError(
            f"{scheme}:// needs a package that is not installed ({in_one_line(error)}); {remedy}"
        ) from None
    except ValueError as error:
        known = "s3, gs, hf, https or another that fsspec knows"
        raise ConfigError(f"a URL must begin with {known}, got {scheme}://: {error}") from None


def _fsspec(url: Url) -> tuple[Any, str]:
    """The file system of a URL, and its path there."""
    files = _scheme(url.scheme, url.partition("://")[2].partition("/")[0])
    return files, files._strip_protocol(str(url))


def _now(url: Url, **more: bool) -> dict[str, bool]:
    """Arguments for what is there now: huggingface_hub keeps listings whatever it is told."""
    return {"refresh": True, **more} if url.scheme == "hf" else {}
