"""`flap enrich`: write OUT/captions.jsonl, a line per caption, in order.

    OUT/captions.jsonl        complete or absent (`data/enriched.py` reads it)
    OUT/captions.jsonl.part   the finished batches so far
    OUT/enrich.json           the settings; at the end also the counts by reason

A line: id, original, caption (to train with), reason (why the original was kept, or null), aed
([[event, probability], ...]), prompt, generated, model, seed, version.

After an interruption, the next call resumes after the last complete batch: batches hold the same
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
from flap_fast.tools.enrich.sources import Clip, Source
from flap_fast.tools.enrich.writer import Writer, Written

_CAPTION_TOKENS = 77


@dataclass(frozen=True)
class Recipe:
    """All settings that the enrichment of a caption depends on."""

    writer: Writer
    prompt: Prompt
    tagger: Tagger | None
    threshold: float = 0.2
    most_events: int = 5
    batch: int = 8
    seed: int = 3407
    settings: tuple[tuple[str, Any], ...] = ()
    """The writer's settings, for enrich.json."""

    def described(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the settings and captions that a resumed call must have too."""
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
    """Write OUT/captions.jsonl; returns the number of enriched captions, and of others by reason.

    Args:
        advance: called with the number of finished captions, including an earlier call's.

    Raises:
        ConfigError: OUT holds captions of other settings, or another process writes to it.
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
    """Yield the lines of each batch; sounds are tagged ahead on a thread."""
    tags_of = _tagging(recipe)
    with (
        ThreadPoolExecutor(1) as pool,
        closing(ahead(pool, tags_of, rows, limit=4 * recipe.batch)) as tagged,
    ):
        for first in range(0, len(rows), recipe.batch):
            some = rows[first : first + recipe.batch]
            tags = [next(tagged) for _ in some]
            yield _lines(some, tags, recipe)


def _lines(
    rows: Sequence[Row], tagged: Sequence[list[Tag] | None], recipe: Recipe
) -> list[dict[str, Any]]:
    """Return a batch's lines; a clip that cannot be read gets no prompt."""
    prompts = [
        None if tags is None else recipe.prompt.fill(tags, row.original)
        for row, tags in zip(rows, tagged, strict=True)
    ]
    keys = [caption_key(row.clip.id, row.original) for row in rows]
    asked = [(p, key) for p, key in zip(prompts, keys, strict=True) if p is not None]
    answers = iter(recipe.writer(*zip(*asked, strict=True)) if asked else ())
    lines = []
    for row, tags, text in zip(rows, tagged, prompts, strict=True):
        written = next(answers) if text is not None else None
        caption, reason = _filtered(row, tags, written, recipe)
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


def _filtered(
    row: Row, tags: list[Tag] | None, written: Written | None, recipe: Recipe
) -> tuple[str | None, str | None]:
    if written is None:
        return None, "unheard"
    if recipe.writer.is_caption:
        worded = any(map(str.isalnum, row.original))
        return (written.text, None) if worded else (None, "empty")
    return caption_or_reason(
        written.text,
        instruction=recipe.prompt.instruction,
        events=" ".join(name for name, _ in tags or ()),
        original=row.original,
        cut_off=written.cut_off,
        tokens=recipe.writer.tokens,
        most_tokens=_CAPTION_TOKENS,
    )


def _tagging(recipe: Recipe) -> Callable[[Row], list[Tag] | None]:
    """Return a function from a row to its events: [] without a tagger, None for a bad sound."""
    tagger = recipe.tagger
    if tagger is None:
        return lambda row: []
    last: list[tuple[Clip, list[Tag] | None]] = []  # the captions of a clip are consecutive

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
    """Open a file for reading and appending, with an exclusive lock."""
    with file.open("a+b") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{file} must be written by one process; another one writes it"
            ) from None
        try:
            yield part
        finally:
            if file.is_file() and not file.stat().st_size:
                file.unlink()


def _same_settings(out: Path, described: dict[str, Any]) -> None:
    """Store the settings of a new OUT; raise `ConfigError` if OUT has others."""
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
    """Return the number of finished captions; truncates after the last complete batch."""
    part.seek(0)
    *lines, _ = part.read().split(b"\n")  # the last one is empty or incomplete
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
