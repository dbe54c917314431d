"""`flap prepare`: a manifest or a published data set -> shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flap_fast.checks import require
from flap_fast.commands.share import Distributors, ShardRange, shares

if TYPE_CHECKING:
    from flap_fast.config import Audio
    from flap_fast.preparation.shard_tasks import Part, Prepared


def prepare(
    data: Annotated[
        Path, typer.Argument(help="JSON lines or CSV: audio, caption(s), ...; a source's folder.")
    ],
    out: Annotated[Path, typer.Argument(help="Gets OUT/SPLIT/*.tar and OUT/rejected.jsonl.")],
    source: Annotated[
        str | None, typer.Option(help="A published layout: audiocaps, clotho, ...; see README.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="mel: write log-mels in fp16, with --config's front end.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config, for its front end: rate, bins, duration, ...")
    ] = None,
    sample_rate_hz: Annotated[
        int | None, typer.Option(help="The front end's rate; the config's, or 16000.")
    ] = None,
    shard_clips: Annotated[int, typer.Option(help="Clips a shard.")] = 512,
    threads: Annotated[int, typer.Option(help="Decoding threads; 0 takes all cores.")] = 0,
    retry: Annotated[
        bool, typer.Option("--retry", help="Prepare shards with rejected clips anew.")
    ] = False,
    shard_range: ShardRange = None,
    distributor: Distributors = "threads",
) -> None:
    """Decode every clip once and write WebDataset shards; goes on where it was stopped."""
    from flap_fast.preparation.prepare import prepare as write_shards
    from flap_fast.preparation.sources import SENTENCES, SOURCES

    known = (*SOURCES, *SENTENCES)
    require(source is None or source in known, "--source", f"be one of {', '.join(known)}", source)
    require(cache in (None, "mel"), "--cache", "be mel", cache)
    require(shard_clips >= 1, "--shard-clips", "be at least 1", shard_clips)
    require(threads >= 0, "--threads", "be at least 0", threads)
    share, kind = shares(shard_range, distributor)
    audio = _front_end(config, sample_rate_hz)
    if source is None and data.is_dir():
        shards = any(data.glob("*.tar")) or any(data.glob("*/*.tar"))
        require(shards, "--source", f"be given for a folder, one of {', '.join(known)}", "nothing")
        source = "shards"
    if source is not None:
        require(data.is_dir(), f"the data of --source {source}", "be an existing folder", data)
    if source in SENTENCES:
        options = {"--cache": cache, "--shard-range": shard_range, "--retry": retry or None}
        for name, value in options.items():
            require(
                value is None, name, f"be left out with --source {source}, which is text", value
            )
        _write_sentences(SENTENCES[source](data), out)
        return
    done = write_shards(
        data if source is None else SOURCES[source](data),
        out,
        sample_rate_hz=audio.sample_rate_hz,
        shard_clips=shard_clips,
        threads=threads,
        cache=audio if cache else None,
        part=share,
        retry=retry,
        distributor=kind,
    )
    print(_said(out, done, share))


def _front_end(config: Path | None, sample_rate_hz: int | None) -> Audio:
    """The front end of a config file, or of the defaults at a rate."""
    from flap_fast.config.file import load_config

    rate = () if sample_rate_hz is None else (f"audio.sample_rate_hz={sample_rate_hz}",)
    return load_config(config, list(rate)).audio


def _write_sentences(splits: dict[str, list[Any]], out: Path) -> None:
    from flap_fast.files import write_atomically

    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(out / f"{split}.jsonl", lines.encode())
    print(f"{out}: " + ", ".join(f"{len(rows)} in {split}.jsonl" for split, rows in splits.items()))


def _said(out: Path, done: Prepared, share: Part | None) -> str:
    """What there is now, in a sentence."""
    text = f"{out}: {done.kept} clips in {done.shards} shards"
    text += f", {done.rejected} of {done.clips} rejected"
    if done.unfinished:
        return (
            f"{text}; part {share} is done, {done.unfinished} shards of other parts are not: the "
            "last part to finish completes the folder"
        )
    if not done.rejected:
        return text
    file = out / "rejected.jsonl"
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    why = Counter(row["reason"].partition(":")[0] for row in rows)
    counts = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
    return f"{text}: {counts} (reasons in {file}; --retry tries them again)"
