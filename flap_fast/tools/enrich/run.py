"""`flap enrich`: captions -> OUT/captions.jsonl, a line for each, in their order.

    OUT/captions.jsonl        whole, or not there (see `data/enriched.py` for its use)
    OUT/captions.jsonl.part   what is done so far, a batch at a time
    OUT/enrich.json           the settings; when it is whole, how many were kept and why

A line: id, original, caption (what to train with), reason (why the original was kept, or null),
aed ([[event, probability], ...]), prompt, generated, model, seed, version.

Stopped in whatever way, the next call goes on after the last whole batch: batches have the same
captions then, so the file has the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from flap_fast.checks import ConfigError
from flap_fast.data.enriched import FILE, caption_key
from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.files import write_atomically
from flap_fast.preparation.prepare import ahead
from flap_fast.tools.enrich.events import Tag, Tagger, strongest
from flap_fast.tools.enrich.filter import REASONS, caption_or_reason
from flap_fast.tools.enrich.prompts import Prompt
from flap_fast.tools.enrich.rewrite import Writer, Written
from flap_fast.tools.enrich.sources import Clip, Source

_CAPTION_TOKENS = 77


@dataclass(frozen=True)
class Recipe:
    """All that a caption's enrichment depends on, but the captions."""

    writer: Writer
    prompt: Prompt
    tagger: Tagger | None
    threshold: float = 0.2
    most_events: int = 5
    batch: int = 8
    seed: int = 3407
    settings: tuple[tuple[str, Any], ...] = ()
    """Of the writer, as they are to stand in enrich.json."""

    def described(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What must be the same for going on."""
        text = json.dumps([(row.clip.id, row.original) for row in rows])
        return {
            "captions": len(rows),
            "captions_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tagger": self.tagger.name if self.tagger else "none",
            "threshold": self.threshold,
            "most_events": self.most_events,
            "model": self.writer.name,
            "prompt": self.prompt.text,
            "batch": self.batch,
            "seed": self.seed,
            **dict(self.settings),
        }


@dataclass(frozen=True)
class Row:
    """One caption of a clip."""

    clip: Clip
    original: str


def enrich(
    source: Source,
    out: Path,
    recipe: Recipe,
    advance: Callable[[int], None] = lambda captions: None,
) -> dict[str, int]:
    """Write OUT/captions.jsonl; gives how many were enriched, and kept for which reason.

    Args:
        advance: told how many captions are done, also of an earlier call.

    Raises:
        ConfigError: OUT holds captions of other settings, or another process writes there.
    """
    rows = [Row(clip, text) for clip in source.clips for text in clip.captions]
    out.mkdir(parents=True, exist_ok=True)
    described = json.loads(json.dumps(recipe.described(rows)))
    with _locked(out / f"{FILE}.part") as part:
        _same_settings(out, described)
        if not (out / FILE).is_file():
            done = _whole_batches(part, rows, recipe.batch)
            advance(done)
            for lines in _batches(rows[done:], recipe):
                text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
                part.write(text.encode())
                part.flush()
                os.fsync(part.fileno())
                advance(len(lines))
            Path(part.name).replace(out / FILE)
        else:
            advance(len(rows))
    counts = _counted(out / FILE)
    _write_json(out / "enrich.json", {"settings": described, "counts": counts})
    return counts


def _batches(rows: Sequence[Row], recipe: Recipe) -> Iterator[list[dict[str, Any]]]:
    """The lines of each batch of rows, sounds being tagged on a thread ahead of it."""
    tags_of = _hearing(recipe)
    with (
        ThreadPoolExecutor(1) as pool,
        closing(ahead(pool, tags_of, rows, limit=4 * recipe.batch)) as heard,
    ):
        for first in range(0, len(rows), recipe.batch):
            some = rows[first : first + recipe.batch]
            tags = [next(heard) for _ in some]
            yield _lines(some, tags, recipe)


def _lines(
    rows: Sequence[Row], heard: Sequence[list[Tag] | None], recipe: Recipe
) -> list[dict[str, Any]]:
    """What stands in the file for a batch; a clip that cannot be heard is not asked about."""
    prompts = [
        None if tags is None else recipe.prompt.fill(tags, row.original)
        for row, tags in zip(rows, heard, strict=True)
    ]
    keys = [caption_key(row.clip.id, row.original) for row in rows]
    asked = [(p, key) for p, key in zip(prompts, keys, strict=True) if p is not None]
    answers = iter(recipe.writer(*zip(*asked, strict=True)) if asked else ())
    lines = []
    for row, tags, text in zip(rows, heard, prompts, strict=True):
        written = next(answers) if text is not None else None
        caption, reason = _judged(row, tags, written, recipe)
        lines.append(
            {
                "id": row.clip.id,
                "original": row.original,
                "caption": row.original if caption is None else caption,
                "reason": reason,
                "aed": [[name, round(probability, 4)] for name, probability in tags or ()],
                "prompt": text,
                "generated": written.text if written else None,
                "model": recipe.writer.name,
                "seed": recipe.seed,
                "version": version("flap_fast"),
            }
        )
    return lines


def _judged(
    row: Row, tags: list[Tag] | None, written: Written | None, recipe: Recipe
) -> tuple[str | None, str | None]:
    if written is None:
        return None, "unheard"
    return caption_or_reason(
        written.text,
        instruction=recipe.prompt.instruction,
        events=" ".join(name for name, _ in tags or ()),
        original=row.original,
        cut_off=written.cut_off,
        tokens=recipe.writer.tokens,
        most_tokens=_CAPTION_TOKENS,
    )


def _hearing(recipe: Recipe) -> Callable[[Row], list[Tag] | None]:
    """Row -> its clip's events; none without a tagger, None for a sound that cannot be read."""
    tagger = recipe.tagger
    if tagger is None:
        return lambda row: []
    last: list[tuple[Clip, list[Tag] | None]] = []  # a clip's captions follow one another

    def tags_of(row: Row) -> list[Tag] | None:
        if not last or last[0][0] is not row.clip:
            try:
                wave = row.clip.read(tagger.sample_rate_hz)
                found = strongest(tagger(wave), recipe.threshold, recipe.most_events)
            except BadSound:
                found = None
            last[:] = [(row.clip, found)]
        return last[0][1]

    return tags_of


@contextmanager
def _locked(file: Path) -> Iterator[IO[bytes]]:
    """The file, open for reading and appending, if no other process has it."""
    with file.open("a+b") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{file} must be written by one process; another is at it") from None
        try:
            yield part
        finally:
            if file.is_file() and not file.stat().st_size:
                file.unlink()


def _same_settings(out: Path, described: dict[str, Any]) -> None:
    """Note the settings of a new OUT; refuse an OUT of others."""
    file = out / "enrich.json"
    if not file.is_file():
        if (out / FILE).is_file() or (out / f"{FILE}.part").stat().st_size:
            raise ConfigError(
                f"OUT must be new or made by flap enrich, got {FILE} without enrich.json in '{out}'"
            )
        _write_json(file, {"settings": described})
        return
    before = json.loads(file.read_text())["settings"]
    other = [name for name in described if before.get(name) != described[name]]
    if other:
        name = other[0]
        raise ConfigError(
            f"OUT must be new or hold captions of the same settings, got {name} = "
            f"{before.get(name)!r} in '{file}', not {described[name]!r}; "
            f"delete {out / FILE}* and {file}, or name another folder"
        )


def _whole_batches(part: IO[bytes], rows: Sequence[Row], batch: int) -> int:
    """How many captions are done; what follows the last whole batch is cut off."""
    part.seek(0)
    *lines, _ = part.read().split(b"\n")  # the last one is empty, or torn
    done = len(lines) if len(lines) == len(rows) else len(lines) // batch * batch
    part.truncate(sum(len(line) + 1 for line in lines[:done]))
    part.seek(0, os.SEEK_END)
    for line, row in zip(lines[:done], rows, strict=False):
        found = json.loads(line)
        if (found["id"], found["original"]) != (row.clip.id, row.original):
            raise ConfigError(f"{part.name} must follow the captions' order; delete it")
    return done


def _counted(file: Path) -> dict[str, int]:
    with file.open(encoding="utf-8") as lines:
        reasons = Counter(json.loads(line)["reason"] for line in lines)
    kept = {reason: reasons[reason] for reason in (*REASONS, "unheard")}
    return {"enriched": reasons[None], **kept}


def _write_json(file: Path, tree: dict[str, Any]) -> None:
    write_atomically(file, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())
