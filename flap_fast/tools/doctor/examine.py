"""Paths -> `Examined` -> findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flap_fast.checks import ConfigError, require
from flap_fast.config import Data
from flap_fast.config.file import load_config
from flap_fast.data.tar_members import ShardError
from flap_fast.data.tokenize import Tokenizer, tokenizer
from flap_fast.evaluation.run import names
from flap_fast.files import visible
from flap_fast.model.model_folder import read_config
from flap_fast.places import Place, is_pattern, shown
from flap_fast.tools.doctor import CHECKS, weights
from flap_fast.tools.doctor.embedded import embedded_sample, evaluation_split
from flap_fast.tools.doctor.recordings import same_recordings
from flap_fast.tools.doctor.records import (
    SEVERITIES,
    Examined,
    Finding,
    Need,
    Split,
)
from flap_fast.tools.doctor.run_files import RunFiles, is_run, read_run
from flap_fast.tools.doctor.scan import Captions, scan_captions, scan_sounds
from flap_fast.tools.doctor.sources import Clips, of_shards, open_data, require_reached

# A special token or two at either end of a text; otherwise a token is a byte or more.
_SPECIAL = 4
_TOKENIZED = 1024


def examine(
    paths: Sequence[Place],
    *,
    config: Path | None = None,
    sample: int | None = None,
    embedded: int = 256,
    threads: int = 0,
    show: bool = True,
) -> Examined:
    """Look at data, or at a run or model and its data.

    Args:
        paths: shards as in data.train, folders of splits and manifests; a run's or model's folder
            first, or alone.
        config: for data without a run, the config whose front end and tokenizer it is for.
        sample: of each split only so many clips, drawn by chance; None for all.
        embedded: of an evaluation's split so many clips are embedded by the model.
        threads: 0 takes all cores.
    """
    first = next(iter(paths), None)
    run = read_run(first) if isinstance(first, Path) and is_run(first) else None
    data = paths if run is None else paths[1:]
    for path in data:
        rule = "be named once, before all DATA"
        again = isinstance(path, Path) and is_run(path)
        require(not again, "a run's folder", rule, shown(path))
    both = run is None or config is None
    require(both, "--config", "be left out with a run, which has its own", config)
    settings = run.config if run else load_config(config)
    lacking: dict[Need, str] = {}
    if not settings.loss.reads_text:
        why = "no loss of the config reads captions"
        lacking |= dict.fromkeys(("captions", "tokens", "embeddings"), why)
    found = open_data(data) if data or run is None else _data_of(run, lacking)
    splits = _scanned(found, sample, threads, show=show)
    model = read_config(run.checkpoints[-1]) if run and run.checkpoints else settings
    if run or config:
        tokens = tokenizer(model.text)
        splits = [_with_tokens(split, tokens) for split in splits]
    examined = Examined(
        config=settings,
        splits=splits,
        recordings=same_recordings(splits, threads),
        run=run,
        lacking=lacking,
    )
    _note_lacking(examined, tokens=bool(run or config), embedded=embedded)
    try:
        return replace(examined, embedded=embedded_sample(examined, embedded))
    except ArithmeticError as error:  # a fault of the weights, which a check names
        lacking["embeddings"] = "they are not finite"
        return replace(examined, not_embedded=str(error))


def findings(examined: Examined) -> list[Finding]:
    """What the checks found, errors first."""
    checks = [check for check in CHECKS if check.needs not in examined.lacking]
    found = [Finding(check, one) for check in checks for one in check.find(examined)]
    return sorted(found, key=lambda f: SEVERITIES.index(f.found.severity))


def _data_of(run: RunFiles, lacking: dict[Need, str]) -> dict[str, Clips]:
    """The splits of a run's data: all of data.train is one; what is gone is noted."""
    found: dict[str, Clips] = {}
    data = run.config.data
    gone = list(filter(None, (_gone(place, data) for place in (*data.train_places, *data.val))))
    if gone or not data.train:
        why = ", ".join(gone) or "its config names no data"
        lacking |= dict.fromkeys(("sounds", "captions", "tokens", "splits", "embeddings"), why)
        return found
    found["train"] = of_shards(data.train_places, data)
    for name, folder in names(data.val).items():
        found[f"{name} of data.val" if name in found else name] = of_shards([folder], data)
    return found


def _gone(place: Place, reading: Data) -> str:
    """Why a place of a run's data cannot be looked at, or nothing."""
    if isinstance(place, Path):
        return "" if is_pattern(place) or place.exists() else f"{place} is not there"
    try:
        require_reached(place, reading)
    except (ShardError, ConfigError) as error:
        return str(error)
    return ""


def _scanned(
    found: dict[str, Clips], sample: int | None, threads: int, *, show: bool
) -> list[Split]:
    splits = []
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        for name, clips in found.items():
            picked = np.arange(clips.count)
            if sample is not None and sample < clips.count:
                chosen = np.random.default_rng(0).choice(clips.count, sample, replace=False)
                picked = np.sort(chosen)
            task = bar.add_task(visible(name), total=len(picked))
            captions = scan_captions(clips, picked)
            sounds = None
            if clips.kind == "sounds":
                sounds = scan_sounds(clips, picked, threads, lambda n, t=task: bar.advance(t, n))
            splits.append(Split(name, clips, picked, sounds, captions))
    return splits


def _with_tokens(split: Split, tokens: Tokenizer) -> Split:
    """The split with the tokens of captions that may have more than max_tokens; 0 of others."""
    captions: Captions = split.captions
    counts = np.zeros(len(captions.texts), np.int64)
    long = [
        n
        for n, text in enumerate(captions.texts)
        if len(text.encode(errors="replace")) + _SPECIAL > tokens.max_tokens
    ]
    for at in range(0, len(long), _TOKENIZED):
        some = long[at : at + _TOKENIZED]
        ids = tokens.inner([captions.texts[n] for n in some], verbose=False)["input_ids"]
        counts[some] = [len(row) for row in ids]
    return replace(split, captions=replace(captions, tokens=counts))


def _note_lacking(e: Examined, *, tokens: bool, embedded: int) -> None:
    """Note what checks need and is not there."""
    run, lacking = e.run, e.lacking
    no_run = "no run was named"
    if e.splits and not any(split.sounds for split in e.splits):
        kind = {"mels": "cached log-mels"}.get(e.splits[0].clips.kind, e.splits[0].clips.kind)
        lacking.setdefault("sounds", f"the data are {kind}")
    if len(e.splits) < 2:
        lacking.setdefault("splits", "there is one split")
    if not tokens:
        lacking.setdefault("tokens", "no --config was named")
    if run is None or not run.rows:
        lacking.setdefault("metrics", "its metrics.jsonl has no rows" if run else no_run)
    if run is None or not run.checkpoints:
        why = "it has no checkpoint" if run else no_run
        lacking |= {"weights": why, "embeddings": why}
    elif embedded == 0:
        lacking["embeddings"] = "--embed is 0"
    elif next(iter(weights.NOT_FINITE.find(e)), None):
        lacking["embeddings"] = "the weights are not finite"
    elif e.splits and evaluation_split(e.splits).clips.shards is None:
        lacking.setdefault("embeddings", "the data are no shards")
