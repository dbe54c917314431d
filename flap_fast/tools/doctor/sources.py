"""What `flap doctor` is pointed at -> splits of clips: shards, manifests, or a run's data.

FOLDER/*.tar              one split; also a .tar, a pattern or a URL, as in data.train
FOLDER/SPLIT/*.tar        a split for each folder, as `flap prepare` writes them
manifest.jsonl, .csv      its column `split`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flap_fast.checks import require
from flap_fast.config import Data
from flap_fast.data.listing import Remote, shard_sets
from flap_fast.data.preprocess.sound_file import Source
from flap_fast.data.preprocess.unusable import Unread, Unusable
from flap_fast.data.shard_cache import shard_cache
from flap_fast.data.shards import KINDS, Shards, open_shards
from flap_fast.evaluation.run import names
from flap_fast.places import Place, Url, is_pattern, shown
from flap_fast.preparation.manifest import Entry, read_manifest

_REMEDY = "write shards with: flap prepare MANIFEST OUT"


@dataclass(frozen=True)
class Piece:
    """A clip's sound: a file or its bytes, and which part of it."""

    source: Source
    start_s: float = 0.0
    duration_s: float | None = None


@dataclass(frozen=True)
class Clips:
    """N clips, read one at a time."""

    count: int
    kind: str
    """`sounds`, `images` or `mels`."""
    name: Callable[[int], str]
    piece: Callable[[int], Piece]
    """Raises `Unusable`."""
    captions: Callable[[int], list[str]]
    """Raises `Unusable`."""
    shards: Shards | None = None
    """Where they lie in shards."""


def open_data(paths: Sequence[Place]) -> dict[str, Clips]:
    """The splits of shards, folders of splits and manifests, by name.

    Raises:
        ConfigError: a path that is neither.
        ShardError, ManifestError: one that cannot be read.
    """
    every = [(path, name, clips) for path in paths for name, clips in _splits(path)]
    count = Counter(name for _, name, _ in every)
    found: dict[str, Clips] = {}
    for path, name, clips in every:
        # Splits of one name are told apart by where they lie.
        if count[name] > 1 and isinstance(path, Path):
            name = f"{(path.parent if path.is_file() else path).resolve().name}/{name}"
        found[f"{shown(path)}: {name}" if name in found else name] = clips
    return found


def _splits(path: Place) -> Iterator[tuple[str, Clips]]:
    pattern = isinstance(path, Path) and is_pattern(path) and not path.exists()
    if isinstance(path, Url):
        require_reached(path)
    if isinstance(path, Url) or pattern or path.suffix.lower() == ".tar":
        yield next(iter(names([path]))), of_shards([path])
        return
    if path.is_file():
        entries = read_manifest(path)
        for name in dict.fromkeys(entry.split for entry in entries):
            yield name, of_entries([entry for entry in entries if entry.split == name])
        return
    rule = "be shards as in data.train, a folder of such folders, a manifest or a run's folder"
    require(path.is_dir(), "DATA", rule, path, _REMEDY)
    if any(path.glob("*.tar")):
        yield path.resolve().name, of_shards([path])
        return
    inside = sorted({tar.parent for tar in path.glob("*/*.tar")})
    require(bool(inside), "DATA", rule, path, _REMEDY)
    for folder in inside:
        yield folder.name, of_shards([folder])


def require_reached(url: Url, reading: Data = Data()) -> None:  # noqa: B008 - frozen
    """Raise `ShardError` for shards by URL that one try does not find: nobody waits for a doctor.

    What is read of them afterwards is tried as in training.
    """
    remote = Remote(shard_cache(reading.model_copy(update={"retry_s": 0.0})))
    for found in shard_sets(url, remote):
        for file in found.files[:1]:
            assert isinstance(file, Url)
            remote.shard(file)


def of_shards(
    places: Sequence[Place],
    reading: Data = Data(),  # noqa: B008 - frozen
) -> Clips:
    """The clips of shards, together one split.

    Args:
        reading: the settings of the cache, for shards by URL.
    """
    shards = open_shards(places, tuple(KINDS), reading)
    return Clips(
        count=len(shards),
        kind=shards.kind,
        name=lambda clip: _name(shards, clip),
        piece=lambda clip: Piece(shards.encoded(clip)),
        captions=lambda clip: shards.record(clip, captionless=True)["text"],
        shards=shards,
    )


def of_entries(entries: list[Entry]) -> Clips:
    """The clips of a manifest's rows."""

    def piece(clip: int) -> Piece:
        entry = entries[clip]
        if not entry.audio.is_file():
            raise Unread("missing: no such file")
        return Piece(entry.audio, entry.start_s, entry.duration_s)

    return Clips(
        count=len(entries),
        kind="images" if entries[0].image else "sounds",
        name=lambda clip: entries[clip].id,
        piece=piece,
        captions=lambda clip: entries[clip].captions,
    )


def _name(shards: Shards, clip: int) -> str:
    """A clip's id, where its JSON has one, else its shard and offset."""
    try:
        name = shards.record(clip, captionless=True).get("id")
    except Unusable:
        name = None
    file, offset, *_ = shards.locations[clip].tolist()
    return str(name) if name else f"{shards.files[file].name} at byte {offset}"
