"""The shards that a call of `prepare` is to write, which of them are there, and who writes which.

    OUT/.prepare/SPLIT-K.json    shard K of a split is finished: its clips, and what was rejected

A shard's job is known by its fingerprint: of its rows, and of the form that clips are brought to.
Any number of processes, on any number of machines, may work on one OUT: each writes the shards of
its part, and whoever finds all of them finished writes what is said of the whole. That is the same
bytes whoever it is, so that it does no harm when two do it.
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
from flap_fast.data.shards import pack
from flap_fast.files import ManifestError, as_utf8, write_atomically
from flap_fast.preparation.encoding import Form
from flap_fast.preparation.manifest import Entry


@dataclass(frozen=True)
class Part:
    """One of several equal shares of the shards: every `of`-th, beginning with number `number`."""

    number: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def part(text: str) -> Part:
    """`3/8`, the third of eight shares; raises `ConfigError`."""
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = (int(n) for n in numbers.groups()) if numbers else (0, 0)
    require(
        1 <= number <= of,
        "--shard-range",
        "be A/B, the A-th of B parts, with A from 1 to B",
        text,
        "for example 1/8; of a Slurm array: sbatch --array=1-8, $SLURM_ARRAY_TASK_ID/8",
    )
    return Part(number, of)


@dataclass(frozen=True)
class Prepared:
    """What OUT holds after a call of `prepare`."""

    clips: int
    shards: int
    kept: int
    rejected: int
    unfinished: int = 0
    """Shards that other calls are still to write; with them comes sizes.json."""


@dataclass(frozen=True)
class Job:
    """One shard: the rows of it."""

    split: str
    number: int
    entries: Sequence[Entry]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number}"

    def fingerprint(self, form: Form) -> str:
        """Changes with anything that the shard's bytes depend on but the sounds themselves."""
        text = json.dumps([form.identity, [_row(e) for e in self.entries]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def jobs_of(entries: Sequence[Entry], shard_clips: int) -> Iterator[Job]:
    """Shard K of a split has its rows K*n .. K*n+n-1."""
    splits: dict[str, list[Entry]] = {}
    for entry in entries:
        splits.setdefault(entry.split, []).append(entry)
    for split, rows in sorted(splits.items()):
        for number, first in enumerate(range(0, len(rows), shard_clips)):
            yield Job(split, number, rows[first : first + shard_clips])


@dataclass(frozen=True)
class Place:
    """Where shards go, and in which form."""

    out: Path
    form: Form

    @property
    def _done(self) -> Path:
        return self.out / ".prepare"

    def _record(self, job: Job) -> Path:
        return self._done / f"{job.name}.json"

    def _shard(self, job: Job) -> Path:
        return self.out / job.split / f"{job.number}.tar"

    def begin(self, jobs: Sequence[Job]) -> None:
        """Make the folders; raise `ManifestError` where other shards are in them."""
        stale = {f.stem for f in self._done.glob("*.json")} - {job.name for job in jobs}
        if stale:
            raise self._other(f"{len(stale)} shards that the manifest does not have")
        self._refuse_others(jobs)
        self._done.mkdir(parents=True, exist_ok=True)
        for split in {job.split for job in jobs}:
            folder = self.out / split
            folder.mkdir(exist_ok=True)
            for name, data in self.form.beside.items():
                there = folder / name
                if there.is_file() and there.read_bytes() != data:
                    raise self._other(f"another {split}/{name}")
                write_atomically(there, data)

    def _refuse_others(self, jobs: Sequence[Job]) -> None:
        """Raise `ManifestError` where shards that we did not write would be overwritten."""
        sources = {entry.audio for job in jobs for entry in job.entries if entry.inside}
        read = {audio.resolve().parent for audio in sources}
        shards = {self._shard(job): self._record(job) for job in jobs}
        folders = sorted({shard.parent for shard in shards})
        tars = [tar for folder in folders for tar in sorted(folder.glob("*.tar"))]
        begun = self._done.is_dir()  # asked after the tars: another part may be writing
        for tar in tars:
            # A call that was killed may have left no record; the index is written before the tar.
            marks = (shards[tar], tar.with_suffix(".idx")) if begun and tar in shards else ()
            if tar.resolve().parent in read or not any(mark.is_file() for mark in marks):
                raise ManifestError(
                    f"OUT must be new or hold this manifest's shards, got '{tar}', which is not "
                    "one of them and might be lost; name another folder"
                )

    def finished(self, job: Job) -> dict[str, Any] | None:
        """The record of a finished shard, or None; raises where it is another manifest's."""
        try:
            record = json.loads(self._record(job).read_text())
        except FileNotFoundError:
            return None
        if record["fingerprint"] != job.fingerprint(self.form):
            raise self._other(f"another {job.name}")
        shard = self._shard(job)
        there = shard.is_file() and shard.with_suffix(".idx").is_file()
        return record if there or not record["clips"] else None

    def retry(self, job: Job) -> None:
        """Take a shard for unfinished, and its split with it, if clips of it were rejected."""
        record = self.finished(job)
        if record and record["rejected"]:
            (self.out / job.split / "sizes.json").unlink(missing_ok=True)
            self._record(job).unlink(missing_ok=True)

    def write(self, job: Job, results: Sequence[tuple[str, bytes] | str]) -> None:
        """Write one shard, then the record that it is finished.

        Args:
            results: of each of the job's rows its ending and bytes, or why it is rejected.
        """
        samples, rejected = [], []
        for entry, result in zip(job.entries, results, strict=True):
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
        shard = self._shard(job)
        if clips:
            write_atomically(shard.with_suffix(".idx"), index.encode())
            write_atomically(shard, tar)
        else:
            shard.unlink(missing_ok=True)  # of a call before, when some could be used
        record = {
            "fingerprint": job.fingerprint(self.form),
            "clips": clips,
            "rejected": rejected,
        }
        write_atomically(self._record(job), json.dumps(record).encode())

    def finish(self, jobs: Sequence[Job]) -> Prepared:
        """The counts; where no shard is missing, sizes.json of each split and rejected.jsonl."""
        records = {job.name: self.finished(job) for job in jobs}
        there = [record for record in records.values() if record]
        rejected = [row for record in there for row in record["rejected"]]
        kept = sum(record["clips"] for record in there)
        shards = sum(record["clips"] > 0 for record in there)
        unfinished = len(jobs) - len(there)
        if not unfinished:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
            write_atomically(self.out / "rejected.jsonl", as_utf8(lines))
            sizes: dict[str, dict[str, int]] = {job.split: {} for job in jobs}
            for job, record in zip(jobs, there, strict=True):
                if record["clips"]:
                    sizes[job.split][f"{job.number}.tar"] = record["clips"]
            for split, counts in sizes.items():
                data = (json.dumps(counts, indent=1) + "\n").encode()
                write_atomically(self.out / split / "sizes.json", data)
        return Prepared(kept + len(rejected), shards, kept, len(rejected), unfinished)

    def _other(self, what: str) -> ManifestError:
        return ManifestError(
            f"OUT must be new or hold this manifest's shards, got {what} in '{self.out}': the "
            f"manifest, the rate, the cache or the clips of a shard changed; delete '{self.out}' "
            "or name another folder"
        )


def _row(entry: Entry) -> dict[str, Any]:
    """What a fingerprint takes of a row: of the sound's path what stays when folders move."""
    row = {name: getattr(entry, name) for name in _FIELDS} | {"audio": entry.audio.name}
    # Absent where they are empty: shards that were written before there were such are still known.
    optional = {name: getattr(entry, name) for name in _OPTIONAL}
    return row | {name: value for name, value in optional.items() if value}


_OPTIONAL = ("image", "inside", "more", "under")
_FIELDS = tuple(field.name for field in fields(Entry) if field.name not in _OPTIONAL)


def _record(entry: Entry) -> dict[str, Any]:
    """A clip's JSON in a shard."""
    original = entry.original
    if entry.inside is None:
        original = {**original, "file": entry.audio.name}
        if not entry.image:
            original["start_s"] = entry.start_s
    return {
        **entry.more,
        "text": entry.captions,
        "id": entry.id,
        "tag": entry.labels,
        "original_data": original,
    }
