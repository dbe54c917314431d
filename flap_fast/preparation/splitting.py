"""Rows without a split -> train, val and test; none of val or test is like one of train.

    group   clips that an equal caption, the same file or files of the same bytes join, in any chain
    u       a hash of the group's first clip, in [0, 1)
    split   val where u < val, test where u < val + test, train else

There is no seed: rows that are added at the end move no clip, unless they join two groups. A group
larger than its split is to be stays in train as a whole: one caption of most clips leaves
little to hold out. With so many more rows that it no longer is, it may move. Captions are equal as
in training and evaluation, see `pair_ids`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flap_fast.checks import ConfigError, require
from flap_fast.data.pair_ids import caption_words
from flap_fast.preparation.manifest import Entry

_HEAD = 1 << 16
# Files read at a time.
_READS = 16


class Fractions(NamedTuple):
    """Fractions of the clips to hold out, in [0, 1)."""

    val: float = 0.0
    test: float = 0.0


def held_out(entries: Sequence[Entry], fractions: Fractions) -> tuple[list[Entry], str]:
    """The clips in their splits, and a sentence of how many are where.

    Raises:
        ConfigError: fractions that cannot be, rows with a split, a split that gets no clip.
    """
    for name, fraction in zip(Fractions._fields, fractions, strict=True):
        valid = isinstance(fraction, (int, float)) and 0 <= fraction < 1
        require(valid, f"--{name}-fraction", "be in [0, 1)", fraction)
    rule = "be less than 1 together"
    require(sum(fractions) < 1, "--val-fraction and --test-fraction", rule, sum(fractions))
    given = next((entry for entry in entries if entry.split != "train"), None)
    if given is not None:
        raise ConfigError(
            "--val-fraction and --test-fraction must be left out where clips have splits, got "
            f"'{given.split}' on line {given.line}"
        )
    first = _first_of_group(entries)
    sizes = Counter(first)
    splits = {
        group: _split(entries[group], sizes[group] / len(entries), fractions, len(entries))
        for group in sizes
    }
    out = [replace(entry, split=splits[group]) for entry, group in zip(entries, first, strict=True)]
    counts = Counter(entry.split for entry in out)
    for name, fraction in zip(("train", *Fractions._fields), (1.0, *fractions), strict=True):
        if fraction and not counts[name]:
            options = f"--{name}-fraction" if name != "train" else "--val-fraction, --test-fraction"
            other = "smaller" if name == "train" else "larger"
            raise ConfigError(
                f"{options} must leave each split a clip, got none in {name} of {len(entries)} "
                f"clips in {len(sizes)} groups that go together; give a {other} one, or the "
                "manifest's rows a split"
            )
    return out, _said(counts, sizes, splits)


def _split(clip: Entry, share: float, fractions: Fractions, clips: int) -> str:
    """The split of a group, by its first clip and its share of all clips."""
    name = f"{clip.under}/{clip.audio.name}" if clip.under else f"{clip.audio.name}\0{clip.id}"
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    u = int.from_bytes(digest, "big") / 2**64
    above = 0.0
    for split, fraction in zip(Fractions._fields, fractions, strict=True):
        above += fraction
        if u < above:
            return split if share <= max(fraction, 1 / clips) else "train"
    return "train"


def _said(counts: Counter[str], sizes: Counter[int], splits: dict[int, str]) -> str:
    names = [name for name in ("train", *Fractions._fields) if counts[name]]
    text = ", ".join(f"{counts[name]} in {name}" for name in names)
    joined = sum(size for size in sizes.values() if size > 1)
    if not joined:
        return text
    largest, size = sizes.most_common(1)[0]
    text += f"; {joined} of them have a caption or a sound of another, which is in the same split"
    return f"{text} (the most together: {size}, in {splits[largest]})"


def _first_of_group(entries: Sequence[Entry]) -> list[int]:
    """The first clip of each clip's group."""
    above = list(range(len(entries)))  # a clip before it in its group; itself for the first

    def first(clip: int) -> int:
        while above[clip] != clip:
            above[clip] = clip = above[above[clip]]
        return clip

    for one, other in _alike(entries):
        low, high = sorted((first(one), first(other)))
        above[high] = low
    return [first(clip) for clip in range(len(entries))]


def _alike(entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    """Pairs of clips that must be in one split."""
    seen: dict[Hashable, int] = {}
    for clip, entry in enumerate(entries):
        yield clip, seen.setdefault(_Media.of(entry), clip)
        for caption in entry.captions:
            yield clip, seen.setdefault(caption_words(caption), clip)
    media = [key for key in seen if isinstance(key, _Media)]
    for same in _of_same_bytes(media):
        yield from ((seen[same[0]], seen[other]) for other in same[1:])


class _Media(NamedTuple):
    """A sound or image: a file, or a piece of a tar."""

    file: Path
    offset: int
    size: int | None

    @staticmethod
    def of(entry: Entry) -> _Media:
        offset, size = entry.inside or (0, None)
        return _Media(entry.audio, offset, size)

    def bytes(self) -> int:
        return self.file.stat().st_size if self.size is None else self.size

    def digest(self, most: int) -> bytes:
        """A hash of the first `most` bytes."""
        digest = hashlib.blake2b()
        left = min(most, self.bytes())
        with self.file.open("rb") as file:
            file.seek(self.offset)
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
        return digest.digest()


def _of_same_bytes(media: Sequence[_Media]) -> list[list[_Media]]:
    """Groups of media with the same bytes; each is read only as far as another is like it."""
    groups = [list(media)]
    with ThreadPoolExecutor(_READS) as pool:
        for key in (
            _Media.bytes,
            lambda one: one.digest(_HEAD),
            lambda one: one.digest(one.bytes()),
        ):
            groups = [same for group in groups for same in _by(pool, key, group) if len(same) > 1]
    return groups


def _by(
    pool: ThreadPoolExecutor, key: Callable[[_Media], Hashable], media: Sequence[_Media]
) -> list[list[_Media]]:
    """The media by a key; without those that cannot be read, which `prepare` rejects by name."""

    def found(one: _Media) -> Hashable:
        try:
            return key(one)
        except OSError:
            return None

    groups: dict[Hashable, list[_Media]] = {}
    for one, value in zip(media, pool.map(found, media), strict=True):
        groups.setdefault(value, []).append(one)
    groups.pop(None, None)
    return list(groups.values())
