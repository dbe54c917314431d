"""`flap prepare`: a manifest or a published data set -> shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flap_fast.checks import require
from flap_fast.commands.shard_range import DistributorOption, ShardRangeOption, work_division
from flap_fast.files import say
from flap_fast.preparation.sources import SOURCES

if TYPE_CHECKING:
    from flap_fast.config import Audio
    from flap_fast.preparation.shard_tasks import Prepared, ShardRange


def prepare(
    data: Annotated[
        Path, typer.Argument(help="JSON lines or CSV: audio, caption(s), ...; a source's folder.")
    ],
    out: Annotated[Path, typer.Argument(help="Gets OUT/SPLIT/*.tar and OUT/rejected.jsonl.")],
    source: Annotated[
        str | None,
        typer.Option(help=f"Published layout: {', '.join(SOURCES)}; see docs/data.md."),
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
    val_fraction: Annotated[
        float, typer.Option(help="Hold out this fraction as val, where clips have no split.")
    ] = 0.0,
    test_fraction: Annotated[float, typer.Option(help="Likewise, as test.")] = 0.0,
    retry: Annotated[
        bool, typer.Option("--retry", help="Prepare shards with rejected clips again.")
    ] = False,
    shard_range: ShardRangeOption = None,
    distributor: DistributorOption = "threads",
) -> None:
    """Decode every clip once and write WebDataset shards; goes on where it was stopped."""
    from flap_fast.preparation.prepare import prepare as write_shards

    names = ", ".join(SOURCES)
    require(source is None or source in SOURCES, "--source", f"be one of {names}", source)
    require(cache in (None, "mel"), "--cache", "be mel", cache)
    require(shard_clips >= 1, "--shard-clips", "be at least 1", shard_clips)
    require(threads >= 0, "--threads", "be at least 0", threads)
    wanted, distribution = work_division(shard_range, distributor)
    audio = _front_end(config, sample_rate_hz)
    if source is None and data.is_dir():
        shards = any(data.glob("*.tar")) or any(data.glob("*/*.tar"))
        require(shards, "--source", f"be given for a folder, one of {names}", "nothing")
        source = "shards"
    found = None if source is None else SOURCES[source]
    if found is not None:
        require(data.is_dir(), f"the data of --source {source}", "be an existing folder", data)
    if found is not None and found.kind == "sentences":
        options = {"--cache": cache, "--shard-range": shard_range, "--retry": retry or None}
        options |= {
            "--val-fraction": val_fraction or None,
            "--test-fraction": test_fraction or None,
        }
        for name, value in options.items():
            rule = f"be left out with --source {source}, which is text"
            require(value is None, name, rule, value)
        _write_sentences(found.read(data), out)
        return
    done = write_shards(
        data if found is None else found.read(data),
        out,
        sample_rate_hz=audio.sample_rate_hz,
        shard_clips=shard_clips,
        threads=threads,
        cache=audio if cache else None,
        shard_range=wanted,
        retry=retry,
        distributor=distribution,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )
    summary = _summary(out, done, wanted)
    say(summary)
    if not (done.kept or done.unfinished):
        hint = "captions are read from caption or captions, and --source sounds needs none"
        why = f"; {hint}" if "captionless" in summary else ""
        say(f"error: no clip can be used{why}", error=True)
        raise typer.Exit(1)
    splits = {file.parent.name for file in out.glob("*/sizes.json")}
    # Sounds without captions cannot be evaluated.
    if not done.unfinished and splits == {"train"} and source != "sounds":
        say(
            f"all clips are in {out / 'train'}, none for data.val; to hold some out, prepare into "
            "another folder with --val-fraction 0.05",
            error=True,
        )


def _front_end(config: Path | None, sample_rate_hz: int | None) -> Audio:
    """The front end of a config file, or of the defaults at a rate."""
    from flap_fast.config.file import load_config

    rate = () if sample_rate_hz is None else (f"audio.sample_rate_hz={sample_rate_hz}",)
    return load_config(config, list(rate)).audio


def _write_sentences(splits: dict[str, list[Any]], out: Path) -> None:
    from flap_fast.files import write_atomically

    out.mkdir(parents=True, exist_ok=True)
    files = {
        out / f"{split}.jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        for split, rows in splits.items()
    }
    for file, lines in files.items():
        same = not file.exists() or file.read_bytes() == lines.encode()
        rule, remedy = "be new or hold the same sentences", "name another folder, or delete it"
        require(same, "OUT", rule, f"{file} with others", remedy)
    for file, lines in files.items():
        write_atomically(file, lines.encode())
    say(f"{out}: " + ", ".join(f"{len(rows)} in {split}.jsonl" for split, rows in splits.items()))


def _summary(out: Path, done: Prepared, shard_range: ShardRange | None) -> str:
    """The contents of OUT, in a sentence."""
    text = f"{out}: {done.kept} clips in {done.shards} shards"
    text += f", {done.rejected} of {done.clips} rejected"
    if done.unfinished:
        return (
            f"{text}; shard range {shard_range} is done, {done.unfinished} shards of the others "
            "are not: the last to finish completes the folder"
        )
    if not done.rejected:
        return text
    file = out / "rejected.jsonl"
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    why = Counter(row["reason"].partition(":")[0] for row in rows)
    counts = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
    return f"{text}: {counts} (reasons in {file}; --retry tries them again)"
