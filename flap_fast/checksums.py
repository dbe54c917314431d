"""SHA-256 of a folder's files, in its SHA256SUMS as the command `sha256sum` writes and checks it.

A file that it does not list is taken as it is, and so is a folder without one: an older checkpoint,
another project's. Paths are relative to the folder, which may be copied or renamed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from flap_fast.checks import ConfigError, require
from flap_fast.files import write_atomically

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_THREADS = 4
_SMALL = 16 << 20  # bytes, which take 10 ms


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, which are read in pieces, without the GIL."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def write_sums(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Write a folder's SHA256SUMS: of these files in it, or of all."""
    if files is None:
        files = (file for file in folder.rglob("*") if file.is_file() and file.name != SUMS)
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(sha256, (folder / name for name in names))
        lines = "".join(f"{found}  {name}\n" for found, name in zip(digests, names, strict=True))
    write_atomically(folder / SUMS, lines.encode())


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files that a folder's SHA256SUMS lists; none without one.

    Raises:
        ConfigError: it cannot be read, or names a file outside of the folder.
    """
    file = folder / SUMS
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}; delete it to check nothing") from None
    return parsed_sums(data, str(file))


def parsed_sums(data: bytes, file: str) -> dict[str, str]:
    """SHA-256 by name, of the bytes of a SHA256SUMS; raises `ConfigError` as `read_sums`."""
    try:
        lines = data.decode().splitlines()
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}; delete it to check nothing") from None
    sums = {}
    for line in filter(str.strip, lines):
        found = _LINE.fullmatch(line)
        path = PurePosixPath(found[2]) if found else None
        if found is None or path is None or path.is_absolute() or ".." in path.parts:
            raise ConfigError(
                f"{file} must have lines of a SHA-256 and a file of the folder, got '{line[:80]}'; "
                "copy it again, or delete it to check nothing"
            )
        sums[found[2]] = found[1]
    return sums


@contextmanager
def verified(
    folder: Path, *, skip: Iterable[str] = (), on: bool = True, remedy: str | None = None
) -> Iterator[None]:
    """A context that checks a folder's files: small ones first, large ones while its body runs.

    So a config that changed makes no model that fills the memory.

    Args:
        skip: names of files that are not checked, and may be missing.
        on: False checks nothing.
        remedy: what to do with a file that changed.

    Raises:
        ConfigError: a file is missing or changed since SHA256SUMS was written; on exit for a
            large one that changed.
    """
    sums = read_sums(folder) if on else {}
    cut = on and not sums and (folder / SUMS).is_file()
    again = "copy it again, or delete it to check nothing"
    require(not cut, str(folder / SUMS), "list files", "none", again)
    names = [name for name in sums if name not in set(skip)]
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise _changed(folder, missing, "no such file", remedy)

    def compare(names: list[str], digests: Iterable[Callable[[], str]]) -> None:
        for name, digest in zip(names, digests, strict=True):
            try:
                same = digest() == sums[name]
            except OSError as error:
                raise ConfigError(f"{folder / name} cannot be read: {error}") from None
            if not same:
                raise _changed(folder, name, "another SHA-256", remedy)

    large = [name for name in names if (folder / name).stat().st_size > _SMALL]
    small = [name for name in names if name not in large]
    compare(small, (partial(sha256, folder / name) for name in small))
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [pool.submit(sha256, folder / name).result for name in large]
        try:
            yield
        except Exception:
            compare(large, found)  # that a file changed says more than what came of it
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        compare(large, found)


def check_sums(folder: Path, error: type[Exception]) -> None:
    """Raise `error` where a file changed that a folder still has; one that was deleted may be."""
    try:
        gone = [name for name in read_sums(folder) if not (folder / name).is_file()]
        with verified(folder, skip=gone, remedy="copy it again, or delete it"):
            pass
    except ConfigError as changed:
        raise error(str(changed)) from None


def delete_listed(folder: Path) -> None:
    """Delete the files that a folder's SHA256SUMS lists, it too, and the folders left empty.

    What it does not list stays, and nothing behind a link is deleted.
    """
    paths = [folder / name for name in read_sums(folder)]
    own = [path for path in paths if not any(part.is_symlink() for part in _above(path, folder))]
    for path in (*own, folder / SUMS):
        path.unlink(missing_ok=True)
    for inside in sorted({part for path in own for part in _above(path, folder)}, reverse=True):
        if inside.is_dir() and not any(inside.iterdir()):
            inside.rmdir()


def _above(path: Path, folder: Path) -> list[Path]:
    """The folder and the folders in it that lead to a path."""
    return [folder, *(part for part in path.parents if folder in part.parents)]


def _changed(folder: Path, name: str, got: str, remedy: str | None) -> ConfigError:
    meant = f"if it was meant, delete its line in {folder / SUMS}"
    return ConfigError(
        f"{folder / name} must be the file that {SUMS} lists, got {got}: it changed since; "
        f"{remedy or 'copy it again'}, or, {meant}"
    )
