"""`flap prepare`: a manifest -> shards at the front end's rate, each clip decoded once.

    OUT/SPLIT/K.tar, K.idx, sizes.json     for training and evaluation (see `shards`)
    OUT/rejected.jsonl                     what could not be used, and why
    OUT/.prepare/                          which shards are finished, for going on after a stop

Shard K of a split holds rows K*n .. K*n+n-1 of that split: its contents depend only on the
manifest, so stopping anywhere and resuming gives the same bytes, and so does any division of
the work among machines.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, TypeVar, get_args

from flap_fast.checks import require
from flap_fast.config import Audio
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.files import say
from flap_fast.places import require_on_disk
from flap_fast.preparation.encoding import ClipEncoder, FlacEncoder
from flap_fast.preparation.manifest import Entry, read_manifest
from flap_fast.preparation.ray_cluster import run_on_cluster
from flap_fast.preparation.shard_tasks import (
    Prepared,
    ShardRange,
    ShardTask,
    ShardWriter,
    shard_tasks,
)
from flap_fast.progress import progress

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
    shard_range: ShardRange | None = None,
    retry: bool = False,
    distributor: Distributor = "threads",
    show: bool = True,
    part: ShardRange | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
) -> Prepared:
    """Write the shards of every split; go on where an earlier call stopped.

    Args:
        manifest: its file, or clips that a reader of `sources` found.
        threads: decoding threads; 0 takes all cores.
        cache: write the log-mels of this front end instead of sounds.
        shard_range: write only these shards; the call that finds all finished writes the rest.
        retry: prepare shards with rejected clips again.
        distributor: threads of this process, or the running Ray cluster.
        part: the former name of shard_range.
        val_fraction: hold out this fraction of clips without a split as `val`, see `splitting`.
        test_fraction: likewise as `test`.

    Raises:
        ConfigError: an argument that cannot be; fractions of clips that have splits.
        TypeError: a manifest that is neither a file nor a source's clips.
        ManifestError: see `read_manifest`; also when OUT holds shards of another manifest or rate,
            or by another hand.
    """
    if part is not None:
        warnings.warn("part is now called shard_range", FutureWarning, stacklevel=2)
        require(
            shard_range is None, "part", "be left out with shard_range", part, "give one of them"
        )
        shard_range = part
    _check_numbers(16_000 if cache else sample_rate_hz, shard_clips, threads)
    rule, remedy = "be a ShardRange", "write flap_fast.preparation.shard_tasks.ShardRange(1, 8)"
    valid = shard_range is None or isinstance(shard_range, ShardRange)
    require(valid, "shard_range", rule, shard_range, f"{remedy}, the first of eight")
    known = get_args(Distributor)
    require(distributor in known, "distributor", f"be one of {', '.join(known)}", distributor)
    rule, remedy = "be the front end of a config", "load_config(...).audio is one"
    require(cache is None or isinstance(cache, Audio), "cache", rule, cache, remedy)
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        require(isinstance(fraction, Real), name, "be a number", fraction)
    is_path = isinstance(out, (str, os.PathLike)) and str(out)
    require(bool(is_path), "out", "be the path of a folder", out)
    require_on_disk("out", out)
    entries = _entries(manifest)
    if val_fraction or test_fraction:
        # Imports PyTorch, which takes seconds.
        from flap_fast.preparation.splitting import Fractions, held_out

        entries, counts = held_out(entries, Fractions(val_fraction, test_fraction))
        if show:
            say(counts, error=True)
    tasks = list(shard_tasks(entries, shard_clips))
    writer = ShardWriter(Path(out).absolute(), _clip_encoder(sample_rate_hz, cache))
    writer.begin(tasks)
    mine = tasks[shard_range.number - 1 :: shard_range.of] if shard_range else tasks
    if retry:
        for task in mine:
            writer.retry(task)
    todo = [task for task in mine if writer.finished(task) is None]
    with progress("prepare", sum(len(task.entries) for task in todo), shown=show) as advance:
        if distributor == "ray":
            calls = [(partial(_write_one, writer, task), len(task.entries)) for task in todo]
            run_on_cluster(calls, advance)
        else:
            write_shards(writer, todo, advance, threads=threads or os.cpu_count() or 1)
    return writer.finish(tasks)


def _check_numbers(sample_rate_hz: int, shard_clips: int, threads: int) -> None:
    """Raise `ConfigError` for numbers that would fail later, or leave clips out."""
    for name, value, least in (("shard_clips", shard_clips, 1), ("threads", threads, 0)):
        valid = isinstance(value, Integral) and not isinstance(value, bool) and value >= least
        require(valid, name, f"be at least {least}, a whole number", value)
    # A header of FLAC holds rates above 65535 in tens.
    rule = "be a whole number of Hz from 1000 to 655350, above 65535 a multiple of 10"
    valid = isinstance(sample_rate_hz, Integral) and 1000 <= sample_rate_hz <= 655_350
    valid = valid and (sample_rate_hz <= 65_535 or sample_rate_hz % 10 == 0)
    require(valid, "sample_rate_hz", rule, sample_rate_hz)


def _entries(manifest: Path | str | Sequence[Entry]) -> Sequence[Entry]:
    """The clips of a manifest's file, or those that are given."""
    if isinstance(manifest, (str, os.PathLike)):
        require_on_disk("manifest", manifest)
        return read_manifest(Path(manifest))
    given = manifest if isinstance(manifest, Sequence) else [manifest]
    others = [type(clip).__name__ for clip in given if not isinstance(clip, Entry)]
    if others or not given:
        raise TypeError(
            "manifest must be one file, or the clips of a source, got "
            f"{others[0] if others else 'none'}; write rows to a .jsonl file, one JSON object a "
            "line"
        )
    return given


def write_shards(
    writer: ShardWriter,
    tasks: Sequence[ShardTask],
    advance: Callable[[int], None],
    *,
    threads: int,
) -> None:
    """Write these shards; threads encode clips across the shards' borders."""

    def encode(entry: Entry) -> tuple[str, bytes] | str:
        try:
            return writer.encoder.encode(entry)
        except Unusable as why:
            return str(why)
        finally:
            advance(1)

    clips = (entry for task in tasks for entry in task.entries)
    limit = 4 * max((len(task.entries) for task in tasks), default=1)
    with (
        writer.encoder.encoding(),
        ThreadPoolExecutor(threads) as pool,
        # Closed: a full disk or Ctrl-C does not wait for what was begun ahead.
        closing(ahead(pool, encode, clips, limit=limit)) as encoded,
    ):
        for task in tasks:
            writer.write(task, [next(encoded) for _ in task.entries])


def _write_one(writer: ShardWriter, task: ShardTask) -> None:
    """Write one shard, as a task of a cluster."""
    write_shards(writer, [task], lambda _: None, threads=1)


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


def _clip_encoder(sample_rate_hz: int, cache: Audio | None) -> ClipEncoder:
    if cache is None:
        return FlacEncoder(sample_rate_hz)
    # Imports PyTorch, which takes seconds.
    from flap_fast.preparation.cached_mel import CachedMelEncoder

    return CachedMelEncoder(cache)
