"""The members of a shard that others wrote: which of them are a clip's, and what is left out."""

from __future__ import annotations

import tarfile
from collections.abc import Collection
from pathlib import Path

Members = dict[str, tuple[int, int]]
"""Offset and size in the tar of each file of a clip, by its ending."""

# The end mark fills the last record, which has another size only where `tar -b` gave it.
_PADDING = tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


class ShardError(ValueError):
    """A shard that cannot be read; the message gives the reason and the remedy."""


def scan(file: Path, media: Collection[str]) -> tuple[list[tuple[str, Members]], list[str]]:
    """Key and members of each clip of a tar, and the names that can be no clip's.

    A key ends at the first dot (webdataset), or at the last one where that gives an ending of
    `media`, a .json or a .txt: `Track 2.0.flac` is `Track 2.0`.

    Raises:
        ShardError: truncated, compressed or no tar; a member that is sparse or stands twice.
    """
    with file.open("rb") as opened:
        if opened.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise ShardError(f"{file} must be a plain tar, got a compressed one; unpack it")
    clips: dict[str, Members] = {}
    others: list[str] = []
    known = {*media, "json", "txt"}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.issparse():  # its bytes do not stand one after the other
                    raise ShardError(
                        f"{file}: {member.name} must be stored whole, got a sparse file; pack it "
                        "again without tar's --sparse"
                    )
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                if ending.lower() not in known:
                    last, _, maybe = name.rpartition(".")
                    key, ending = (last, maybe) if maybe.lower() in known else (key, ending)
                if name.startswith(".") or not ending or "__MACOSX" in folder.split("/"):
                    others.append(member.name)  # .DS_Store, ._0.flac, README
                    continue
                files = clips.setdefault(f"{folder}/{key}" if folder else key, {})
                if ending.lower() in files:
                    raise ShardError(f"{file}: {member.name} must stand once; it stands twice")
                files[ending.lower()] = (member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise ShardError(f"{file} is truncated or no tar: {error}; fetch it again") from None
    _check_end(file, end)
    return list(clips.items()), others


def _check_end(file: Path, end: int) -> None:
    """Raise `ShardError` where a tar does not end with zeros, from `end` on.

    tarfile takes a file for a whole one that was cut or spoilt between two members, and a block of
    zeros for the end of all: a header that was never written, another tar after this one.
    """
    with file.open("rb") as whole:
        whole.seek(end)
        if whole.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ShardError(
                f"{file} is truncated or no tar: it has no end mark at byte {end}; fetch it again"
            )
        while rest := whole.read(2**20):
            if rest.count(0) != len(rest):
                raise ShardError(
                    f"{file} is spoilt: it goes on after its end mark at byte {end}; fetch it "
                    "again, or unpack tars that were joined"
                )
    if (zeros := file.stat().st_size - end) > _PADDING:
        raise ShardError(
            f"{file} is spoilt: it must end with at most {_PADDING} zeros, got {zeros}, as where a "
            "disk lost what was written; fetch it again, or pack its files again"
        )


def tars_of(folder: Path) -> tuple[list[Path], list[str]]:
    """The shards of a folder, unsorted; hidden files that look like some, indices without any.

    Raises:
        ShardError: a shard that is compressed, or no regular file.
    """
    packed = (file for file in folder.glob("*.t*") if file.name.lower().endswith(COMPRESSED))
    if first := min(packed, default=None):
        raise ShardError(f"{first} must be a plain tar, got a compressed one; unpack it")
    found = [file for file in folder.glob("*") if file.suffix.lower() == ".tar"]
    shards = [file for file in found if not file.name.startswith(".")]
    for file in shards:
        if not file.is_file():  # a FIFO would be waited for
            raise ShardError(f"{file} must be a regular file, got none; take it out of the folder")
    others = [file.name for file in found if file.name.startswith(".")]
    if not (folder / "sizes.json").is_file():  # which says what shards there are
        names = {file.stem for file in shards}
        indices = sorted(index for index in folder.glob("[!.]*.idx") if index.stem not in names)
        others += [f"{index.name} without {index.stem}.tar" for index in indices]
    return shards, others
