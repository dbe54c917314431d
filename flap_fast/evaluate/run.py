"""A model and data sets -> scores, as a dictionary, a table and one number to select by.

{"retrieval": {NAME: {"audio_to_text": {"R@1": ..}, "text_to_audio": {..}, "chance": {..},
                      "clips": .., "captions": ..}}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from flap_fast.config import Config
from flap_fast.data.captions import Tokenizer
from flap_fast.data.shards import open_shards, write_atomically
from flap_fast.evaluate.embed import embed
from flap_fast.evaluate.retrieval import TOP, chance, retrieval
from flap_fast.model.flap import Flap
from flap_fast.ranks import Ranks

Scores = dict[str, dict[str, Any]]


def evaluate(
    model: Flap,
    config: Config,
    tokenizer: Tokenizer,
    folders: Sequence[Path],
    ranks: Ranks | None = None,
) -> Scores:
    """Score each folder of shards under its name; every rank must ask, all get the same."""
    ranks = ranks or Ranks()
    found = {}
    for name, folder in names(folders).items():
        e = embed(model, config, tokenizer, open_shards([folder]), ranks)
        scores = retrieval(e.audio, e.text, e.owner)
        found[name] = {**scores, "chance": chance(e.owner, len(e.audio))}
    return {"retrieval": found}


def names(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder under its own name, with its parents' where two are called alike."""
    resolved = [folder.resolve() for folder in folders]
    out: dict[str, Path] = {}
    for folder, whole in zip(folders, resolved, strict=True):
        parts = 1
        while sum(o.parts[-parts:] == whole.parts[-parts:] for o in set(resolved)) > 1:
            parts += 1
        out["/".join(whole.parts[-parts:])] = folder
    return out


def selection_score(scores: Scores) -> float:
    """Mean over data sets of both directions' mAP@10 (SPEC 13.1)."""
    sets = scores["retrieval"].values()
    both = [s[d]["mAP@10"] for s in sets for d in ("audio_to_text", "text_to_audio")]
    return sum(both) / len(both)


def flat_scores(scores: Scores) -> dict[str, float]:
    """{"val/audio_to_text/R@10": ..}: what a step's row in metrics.jsonl holds."""
    return {
        f"{name}/{direction}/{metric}": value
        for name, found in scores["retrieval"].items()
        for direction in ("audio_to_text", "text_to_audio")
        for metric, value in found[direction].items()
        if metric.startswith("R@") or metric == "mAP@10"
    }


def write_scores(file: Path, scores: Scores) -> None:
    """Write the JSON, whole or not at all."""
    write_atomically(file, (json.dumps(scores, indent=1) + "\n").encode())


def table(scores: Scores) -> Table:
    """What a person wants to see, chance beside it."""
    found = scores["retrieval"]
    metrics = [*(f"R@{k}" for k in TOP), "mAP@10"]
    sizes = [f"{n}: {s['clips']} clips, {s['captions']} captions" for n, s in found.items()]
    out = Table(box=box.SIMPLE_HEAD, caption="\n".join(sizes), caption_justify="left")
    for heading in ("data", "query to answer", *metrics, "chance R@10"):
        out.add_column(heading, no_wrap=True)
    for name, s in found.items():
        for direction in ("audio_to_text", "text_to_audio"):
            values = (f"{s[direction][metric]:.3f}" for metric in metrics)
            by_chance = f"{s['chance'][direction]['R@10']:.3f}"
            out.add_row(name, direction.replace("_", " "), *values, by_chance)
    return out
