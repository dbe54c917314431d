"""`flap prepare`: a manifest -> shards at the front end's rate, each clip decoded once.

Pictures stay the bytes that they are where they are JPEG or PNG in RGB or grey, 8 bits deep; others
become PNG in RGB. So every reader of the shards sees the same pixels.

    OUT/SPLIT/K.tar, K.idx, sizes.json     for training and evaluation (see `shards`)
    OUT/rejected.jsonl                     what could not be used, and why
    OUT/.prepare/                          which shards are finished, for going on after a stop

Shard K of a split holds rows K*n .. K*n+n-1 of that split: what it contains depends on the
manifest alone, so stopping anywhere and going on gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flap_fast.data.image import BadImage, decoded, rgb, square
from flap_fast.data.manifest import Entry, ManifestError, read_manifest
from flap_fast.data.shards import pack, write_atomically
from flap_fast.data.sound import BadSound, Unusable, read_sound

# Quieter than -80 dB of full scale at its loudest: nothing to hear, and a constant log-mel.
_SILENT = 1e-4
_SHORTEST_S = 0.025
_AS_IT_IS = {(kind, mode) for kind in ("JPEG", "PNG") for mode in ("RGB", "L")}

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Prepared:
    """What a call of `prepare` did."""

    clips: int
    shards: int
    kept: int
    rejected: int


def prepare(
    manifest: Path,
    out: Path,
    *,
    sample_rate_hz: int = 16_000,
    shard_clips: int = 512,
    threads: int = 0,
    show: bool = True,
) -> Prepared:
    """Write the shards of every split; go on where an earlier call stopped.

    Raises:
        ManifestError: see `read_manifest`; also when OUT holds shards of another manifest or rate.
    """
    entries = read_manifest(manifest)
    jobs = list(_jobs(entries, shard_clips))
    done = out / ".prepare"
    done.mkdir(parents=True, exist_ok=True)
    finished = {job.name: _finished(done, job, sample_rate_hz) for job in jobs}
    stale = {f.stem for f in done.glob("*.json")} - set(finished)
    if stale:
        raise _other(out, f"{len(stale)} shards that the manifest does not have")
    todo = [job for job in jobs if finished[job.name] is None]
    columns = (TextColumn("prepare"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, disable=not show) as bar,
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
    ):
        task = bar.add_task("", total=sum(len(job.entries) for job in todo))

        def decode(entry: Entry) -> bytes | str:
            try:
                return _picture(entry) if entry.image else _flac(entry, sample_rate_hz)
            except Unusable as why:
                return str(why)
            finally:
                bar.advance(task)

        clips = (entry for job in todo for entry in job.entries)
        # Closed: a full disk or Ctrl-C does not wait for what was begun ahead.
        with closing(ahead(pool, decode, clips, limit=4 * shard_clips)) as decoded:
            for job in todo:
                results = [next(decoded) for _ in job.entries]
                finished[job.name] = _write(out, job, results, sample_rate_hz)
    return _summarise(out, jobs, {name: done for name, done in finished.items() if done})


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[In], Out], items: Iterable[In], limit: int
) -> Generator[Out]:
    """`map` in order, with at most `limit` items begun and not yet taken."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@dataclass(frozen=True)
class _Job:
    split: str
    number: int
    entries: list[Entry]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number}"

    def fingerprint(self, sample_rate_hz: int) -> str:
        """Changes with anything that the shard's bytes depend on but the sounds themselves."""
        rows = [{**asdict(e), "audio": e.audio.name} for e in self.entries]
        for row in rows:  # what was prepared before there were pictures stays finished
            if not row["image"]:
                del row["image"]
        text = json.dumps([sample_rate_hz, rows], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _jobs(entries: list[Entry], shard_clips: int) -> Iterator[_Job]:
    for split in sorted({entry.split for entry in entries}):
        rows = [entry for entry in entries if entry.split == split]
        for number, first in enumerate(range(0, len(rows), shard_clips)):
            yield _Job(split, number, rows[first : first + shard_clips])


def _finished(done: Path, job: _Job, sample_rate_hz: int) -> dict[str, Any] | None:
    """The record of a finished shard, or None; raises where it is another manifest's."""
    file = done / f"{job.name}.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text())
    if record["fingerprint"] != job.fingerprint(sample_rate_hz):
        raise _other(done.parent, f"another {job.name}")
    shard = done.parent / job.split / f"{job.number}.tar"
    there = shard.is_file() and shard.with_suffix(".idx").is_file()
    return record if there or not record["clips"] else None


def _other(out: Path, what: str) -> ManifestError:
    return ManifestError(
        f"OUT must be new or hold this manifest's shards, got {what} in '{out}': the manifest, the "
        f"rate or the clips of a shard changed; delete '{out}' or name another folder"
    )


def _flac(entry: Entry, sample_rate_hz: int) -> bytes:
    """The clip as 16-bit mono FLAC; raises `BadSound` with the reason for rejecting it."""
    if not entry.captions and not entry.labels:  # a clip with labels alone can be classified
        raise BadSound("captionless")
    wave = read_sound(
        entry.audio, sample_rate_hz, start_s=entry.start_s, duration_s=entry.duration_s
    )
    if len(wave) < _SHORTEST_S * sample_rate_hz:
        raise BadSound(f"empty: {len(wave) / sample_rate_hz * 1000:.1f} ms, shorter than a window")
    if np.abs(wave).max() < _SILENT:
        raise BadSound("silent: below -80 dB of full scale throughout")
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, sample_rate_hz, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _picture(entry: Entry) -> bytes:
    """The picture's file, or a PNG of it; raises `BadImage` with the reason for rejecting it."""
    if not entry.captions and not entry.labels:
        raise BadImage("captionless")
    picture = decoded(entry.audio)
    colours = rgb(picture)
    square(colours, 1)  # a strip is rejected here, not in training
    # RGBA, palettes, CMYK, 16 bits: each decoder has its own way with them.
    if (picture.format, picture.mode) in _AS_IT_IS and "transparency" not in picture.info:
        return entry.audio.read_bytes()
    buffer = io.BytesIO()
    colours.save(buffer, "PNG")
    return buffer.getvalue()


def _write(out: Path, job: _Job, results: list[bytes | str], sample_rate_hz: int) -> dict[str, Any]:
    """Write one shard, then the record that it is finished."""
    folder = out / job.split
    folder.mkdir(parents=True, exist_ok=True)
    samples, rejected = [], []
    for entry, result in zip(job.entries, results, strict=True):
        if isinstance(result, bytes):
            original = {**entry.original, "file": entry.audio.name}
            if not entry.image:
                original["start_s"] = entry.start_s
            record = {
                "text": entry.captions,
                "id": entry.id,
                "tag": entry.labels,
                "original_data": original,
            }
            samples.append((f"{entry.line:09d}", result, record))
        else:
            rejected.append(
                {
                    "line": entry.line,
                    "id": entry.id,
                    "image" if entry.image else "audio": str(entry.audio),
                    "split": entry.split,
                    "reason": result,
                }
            )
    tar, index, clips = pack(samples)
    if clips:
        write_atomically(folder / f"{job.number}.idx", index.encode())
        write_atomically(folder / f"{job.number}.tar", tar)
    record = {
        "fingerprint": job.fingerprint(sample_rate_hz),
        "clips": clips,
        "rejected": rejected,
    }
    write_atomically(out / ".prepare" / f"{job.name}.json", json.dumps(record).encode())
    return record


def _summarise(out: Path, jobs: list[_Job], finished: dict[str, dict[str, Any]]) -> Prepared:
    """sizes.json of each split, rejected.jsonl, and the counts."""
    rejected = [row for job in jobs for row in finished[job.name]["rejected"]]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    write_atomically(out / "rejected.jsonl", lines.encode())
    for split in {job.split for job in jobs}:
        sizes = {
            f"{job.number}.tar": finished[job.name]["clips"]
            for job in jobs
            if job.split == split and finished[job.name]["clips"]
        }
        write_atomically(out / split / "sizes.json", (json.dumps(sizes, indent=1) + "\n").encode())
    kept = sum(record["clips"] for record in finished.values())
    shards = sum(record["clips"] > 0 for record in finished.values())
    return Prepared(kept + len(rejected), shards, kept, len(rejected))
