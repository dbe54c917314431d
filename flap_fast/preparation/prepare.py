"""`flap prepare`: a manifest -> shards at the front end's rate, each clip decoded once.

    OUT/SPLIT/K.tar, K.idx, sizes.json     for training and evaluation (see `shards`)
    OUT/rejected.jsonl                     what could not be used, and why
    OUT/.prepare/                          which shards are finished, for going on after a stop

Shard K of a split holds rows K*n .. K*n+n-1 of that split: what it contains depends on the
manifest alone, so stopping anywhere and going on gives the same bytes, and so does sharing the
work among machines.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flap_fast.config import Audio
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.preparation.encoding import Flac, Form
from flap_fast.preparation.manifest import Entry, read_manifest
from flap_fast.preparation.ray_cluster import run_on_cluster
from flap_fast.preparation.shard_tasks import Job, Part, Place, Prepared, jobs_of

Distributor = Literal["threads", "ray"]

In = TypeVar("In")
Out = TypeVar("Out")


def prepare(
    manifest: Path | str | Sequence[Entry],
    out: Path | str,
    *,
    sample_rate_hz: int = 16_000,
    shard_clips: int = 512,
    threads: int = 0,
    cache: Audio | None = None,
    part: Part | None = None,
    retry: bool = False,
    distributor: Distributor = "threads",
    show: bool = True,
) -> Prepared:
    """Write the shards of every split; go on where an earlier call stopped.

    Args:
        manifest: its file, or clips that a reader of `sources` found.
        threads: decoding threads; 0 takes all cores.
        cache: write the log-mels of this front end instead of sounds.
        part: write these shards alone; whichever call finds all finished writes the rest.
        retry: prepare shards with rejected clips anew.
        distributor: threads of this process, or the Ray cluster that is there.

    Raises:
        ManifestError: see `read_manifest`; also when OUT holds shards of another manifest or rate,
            or by another hand.
    """
    entries = read_manifest(Path(manifest)) if isinstance(manifest, (str, Path)) else manifest
    jobs = list(jobs_of(entries, shard_clips))
    place = Place(Path(out).absolute(), _form(sample_rate_hz, cache))
    place.begin(jobs)
    mine = jobs[part.number - 1 :: part.of] if part else jobs
    if retry:
        for job in mine:
            place.retry(job)
    todo = [job for job in mine if place.finished(job) is None]
    columns = (TextColumn("prepare"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task("", total=sum(len(job.entries) for job in todo))

        def advance(clips: int) -> None:
            bar.advance(task, clips)

        if distributor == "ray":
            tasks = [(partial(_write_there, place, job), len(job.entries)) for job in todo]
            run_on_cluster(tasks, advance)
        else:
            write_shards(place, todo, advance, threads=threads or os.cpu_count() or 1)
    return place.finish(jobs)


def write_shards(
    place: Place, jobs: Sequence[Job], advance: Callable[[int], None], *, threads: int
) -> None:
    """Write these shards, clips decoded on threads, across the shards' borders."""

    def encode(entry: Entry) -> tuple[str, bytes] | str:
        try:
            return place.form.encode(entry)
        except Unusable as why:
            return str(why)
        finally:
            advance(1)

    clips = (entry for job in jobs for entry in job.entries)
    limit = 4 * max((len(job.entries) for job in jobs), default=1)
    with (
        place.form.at_work(),
        ThreadPoolExecutor(threads) as pool,
        # Closed: a full disk or Ctrl-C does not wait for what was begun ahead.
        closing(ahead(pool, encode, clips, limit=limit)) as encoded,
    ):
        for job in jobs:
            place.write(job, [next(encoded) for _ in job.entries])


def _write_there(place: Place, job: Job) -> None:
    """A task of a cluster."""
    write_shards(place, [job], lambda _: None, threads=1)


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


def _form(sample_rate_hz: int, cache: Audio | None) -> Form:
    if cache is None:
        return Flac(sample_rate_hz)
    from flap_fast.data.preprocess.cached_mel import (
        CachedMel,
    )  # brings PyTorch, which takes seconds

    return CachedMel(cache)
