"""The shards of a call of `prepare`: listing them, writing them, knowing which are finished.

    OUT/.prepare/SPLIT-K.json    shard K of a split is finished: its clips, and what was rejected

A shard task has a fingerprint: of its rows, and of the clip encoder. Any number of processes, on
any number of machines, may work on one OUT: each writes the shards of its shard range, and the one
that finds all of them finished writes the files about the whole. These are the same bytes from any
process, so that it does no harm when two of them write.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flap_fast.checks import require
from flap_fast.checksums import write_sums
from flap_fast.data.shards import pack
from flap_fast.files import ManifestError, as_utf8, write_atomically
from flap_fast.preparation.encoding import ClipEncoder
from flap_fast.preparation.manifest import Entry


@dataclass(frozen=True)
class ShardRange:
    """Every `of`-th shard, beginning with number `number`: one of `of` equal ranges."""

    number: int = 1
    of: int = 1

    def __post_init__(self):
        whole = isinstance(self.number, int) and isinstance(self.of, int)
        valid = whole and 1 <= self.number <= self.of
        require(valid, "ShardRange", "be the A-th of B, with A from 1 to B", self)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def shard_range(text: str) -> ShardRange:
    """The shard range that `3/8` names, the third of eight; raises `ConfigError`."""
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = (int(n) for n in numbers.groups()) if numbers else (0, 0)
    require(
        1 <= number <= of,
        "--shard-range",
        "be A/B, the A-th of B parts, with A from 1 to B",
        text,
        "for example 1/8; of a Slurm array: sbatch --array=1-8, $SLURM_ARRAY_TASK_ID/8",
    )
    return ShardRange(number, of)


@dataclass(frozen=True)
class Prepared:
    """The contents of OUT after a call of `prepare`."""

    clips: int
    shards: int
    kept: int
    rejected: int
    unfinished: int = 0
    """Shards that other calls are still to write; with them comes sizes.json."""


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: its split, number and rows."""

    split: str
    number: int
    entries: Sequence[Entry]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number}"

    def fingerprint(self, encoder: ClipEncoder) -> str:
        """Hash of all that the shard's bytes depend on but the media themselves."""
        text = json.dumps([encoder.identity, [_row(e) for e in self.entries]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def shard_tasks(entries: Sequence[Entry], shard_clips: int) -> Iterator[ShardTask]:
    """The shards of all splits; shard K of a split has its rows K*n .. K*n+n-1."""
    splits: dict[str, list[Entry]] = {}
    for entry in entries:
        splits.setdefault(entry.split, []).append(entry)
    for split, rows in sorted(splits.items()):
        for number, first in enumerate(range(0, len(rows), shard_clips)):
            yield ShardTask(split, number, rows[first : first + shard_clips])


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards and their records into a folder, and knows which are finished."""

    out: Path
    encoder: ClipEncoder

    @property
    def _records(self) -> Path:
        return self.out / ".prepare"

    def _record(self, task: ShardTask) -> Path:
        return self._records / f"{task.name}.json"

    def _shard(self, task: ShardTask) -> Path:
        return self.out / task.split / f"{task.number}.tar"

    def begin(self, tasks: Sequence[ShardTask]) -> None:
        """Make folders and metadata files; raises `ManifestError` for foreign shards in them."""
        stale = {f.stem for f in self._records.glob("*.json")} - {task.name for task in tasks}
        if stale:
            raise self._other(f"{len(stale)} shards that the manifest does not have")
        self._refuse_others(tasks)
        self._records.mkdir(parents=True, exist_ok=True)
        for split in {task.split for task in tasks}:
            folder = self.out / split
            folder.mkdir(exist_ok=True)
            for name, data in self.encoder.metadata_files.items():
                file = folder / name
                if file.is_file() and file.read_bytes() != data:
                    raise self._other(f"another {split}/{name}")
                write_atomically(file, data)

    def _refuse_others(self, tasks: Sequence[ShardTask]) -> None:
        """Raise `ManifestError` where shards that we did not write would be overwritten."""
        sources = {entry.audio for task in tasks for entry in task.entries if entry.inside}
        read = {audio.resolve().parent for audio in sources}
        shards = {self._shard(task): self._record(task) for task in tasks}
        folders = sorted({shard.parent for shard in shards})
        tars = [tar for folder in folders for tar in sorted(folder.glob("*.tar"))]
        begun = self._records.is_dir()  # asked after the tars: another range may be written now
        ours = [self.out / "rejected.jsonl"]
        ours += [f for folder in folders for f in (folder / "sizes.json", *folder.glob("*.idx"))]
        found = [file for file in ours if file.exists()]
        if found and not tars and not self._records.is_dir():
            raise self._not_ours(found[0])
        for tar in tars:
            # A call that was killed may have left no record; the index is written before the tar.
            marks = (shards[tar], tar.with_suffix(".idx")) if begun and tar in shards else ()
            if tar.resolve().parent in read or not any(mark.is_file() for mark in marks):
                raise self._not_ours(tar)

    def finished(self, task: ShardTask) -> dict[str, Any] | None:
        """The record of a finished shard, or None; raises where it is another manifest's."""
        try:
            record = json.loads(self._record(task).read_text())
        except FileNotFoundError:
            return None
        if record["fingerprint"] != task.fingerprint(self.encoder):
            raise self._other(f"another {task.name}")
        shard = self._shard(task)
        written = shard.is_file() and shard.with_suffix(".idx").is_file()
        return record if written or not record["clips"] else None

    def retry(self, task: ShardTask) -> None:
        """Mark a shard with rejected clips, and its split, as unfinished."""
        record = self.finished(task)
        if record and record["rejected"]:
            (self.out / task.split / "sizes.json").unlink(missing_ok=True)
            self._record(task).unlink(missing_ok=True)

    def write(self, task: ShardTask, results: Sequence[tuple[str, bytes] | str]) -> None:
        """Write one shard, then the record that it is finished.

        Args:
            results: ending and bytes of each of the task's rows, or why it is rejected.
        """
        samples, rejected = [], []
        for entry, result in zip(task.entries, results, strict=True):
            if isinstance(result, str):
                rejected.append(
                    {
                        "line": entry.line,
                        "id": entry.id,
                        "image" if entry.image else "audio": str(entry.audio),
                        "split": entry.split,
                        "reason": result,
                    }
                )
            else:
                ending, data = result
                samples.append((f"{entry.line:09d}.{ending}", data, _record(entry)))
        tar, index, clips = pack(samples)
        shard = self._shard(task)
        if clips:
            write_atomically(shard.with_suffix(".idx"), index.encode())
            write_atomically(shard, tar)
        else:
            shard.unlink(missing_ok=True)  # of a call before, when some could be used
        record = {
            "fingerprint": task.fingerprint(self.encoder),
            "clips": clips,
            "rejected": rejected,
        }
        write_atomically(self._record(task), json.dumps(record).encode())

    def finish(self, tasks: Sequence[ShardTask]) -> Prepared:
        """The counts; where no shard is missing, sizes.json of each split and rejected.jsonl."""
        records = {task.name: self.finished(task) for task in tasks}
        found = [record for record in records.values() if record]
        rejected = [row for record in found for row in record["rejected"]]
        kept = sum(record["clips"] for record in found)
        shards = sum(record["clips"] > 0 for record in found)
        unfinished = len(tasks) - len(found)
        if not unfinished:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
            write_atomically(self.out / "rejected.jsonl", as_utf8(lines))
            sizes: dict[str, dict[str, int]] = {task.split: {} for task in tasks}
            for task, record in zip(tasks, found, strict=True):
                if record["clips"]:
                    sizes[task.split][f"{task.number}.tar"] = record["clips"]
            for split, counts in sizes.items():
                indices = [(self.out / split / name).with_suffix(".idx") for name in counts]
                write_sums(self.out / split, indices)
                data = (json.dumps(counts, indent=1) + "\n").encode()
                write_atomically(self.out / split / "sizes.json", data)
        return Prepared(kept + len(rejected), shards, kept, len(rejected), unfinished)

    def _not_ours(self, file: Path) -> ManifestError:
        return ManifestError(
            f"OUT must be new or hold this manifest's shards, got '{file}', which is not "
            "one of them and might be lost; name another folder"
        )

    def _other(self, what: str) -> ManifestError:
        return ManifestError(
            f"OUT must be new or hold this manifest's shards, got {what} in '{self.out}': the "
            "manifest, the rate, a fraction held out, the cache or the clips of a shard changed; "
            f"delete '{self.out}' or name another folder"
        )


def _row(entry: Entry) -> dict[str, Any]:
    """A row in a fingerprint; of its path the part that stays when folders move.

    By the names of `Entry`'s fields: another name makes all shards that exist foreign.
    """
    row = {name: getattr(entry, name) for name in _FIELDS} | {"audio": entry.audio.name}
    # Left out where empty: shards written before these fields existed keep their fingerprints.
    optional = {name: getattr(entry, name) for name in _OPTIONAL}
    return row | {name: value for name, value in optional.items() if value}


_OPTIONAL = ("image", "inside", "more", "under", "negatives", "captionless")
_NOT_HASHED = (*_OPTIONAL, "fault")
_FIELDS = tuple(field.name for field in fields(Entry) if field.name not in _NOT_HASHED)


def _record(entry: Entry) -> dict[str, Any]:
    """A clip's JSON in a shard."""
    original = entry.original
    if entry.inside is None:
        original = {**original, "file": entry.audio.name}
        if not entry.image:
            original["start_s"] = entry.start_s
    return {
        **entry.more,
        # Left out where empty: the shards keep the bytes that they had before there were any.
        **({"negatives": entry.negatives} if entry.negatives else {}),
        **({"captionless": True} if entry.captionless else {}),
        "text": entry.captions,
        "id": entry.id,
        "tag": entry.labels,
        "original_data": original,
    }
