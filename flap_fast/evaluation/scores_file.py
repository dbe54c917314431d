"""Reads (also files of older versions), writes and merges eval.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flap_fast.checks import ConfigError
from flap_fast.files import write_atomically

Scores = dict[str, Any]


def write_scores(file: Path, scores: Scores) -> None:
    """Write the JSON atomically."""
    write_atomically(file, (json.dumps(scores, indent=1, allow_nan=False) + "\n").encode())


def read_scores(file: Path) -> Scores:
    """The scores in a file, under the current names; empty if there is no file.

    Raises:
        ConfigError: the file is not an object in JSON.
    """
    if not file.is_file():
        return {}

    def refuse(number: str) -> None:
        raise ValueError(f"it holds {number}")

    try:
        return upgraded({**json.loads(file.read_text(), parse_constant=refuse)})
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        remedy = "remove it: flap eval writes it anew"
        raise ConfigError(f"{file} must be an object in JSON: {error}; {remedy}") from None


def upgraded(scores: Scores) -> Scores:
    """Scores under the current names.

    Older versions called an image encoder's scores `audio_to_text`, `text_to_audio` and
    `uniformity_audio`, and marked retrieval and zero-shot with "sense": "image".
    """
    marked = [*scores.get("retrieval", {}).values(), *scores.get("zero_shot", {}).values()]
    if not any(isinstance(found, dict) and found.get("sense") == "image" for found in marked):
        return scores
    directions = {"audio_to_text": "image_to_text", "text_to_audio": "text_to_image"}

    def retrieval(found: Scores) -> Scores:
        chance = {directions.get(name, name): value for name, value in found["chance"].items()}
        new = {directions.get(name, name): value for name, value in found.items()}
        return {**without_sense(new), "chance": chance}

    def zero_shot(found: Scores) -> Scores:
        return {**without_sense(found), "modality": "image"}

    def geometry(found: Scores) -> Scores:
        names = {"uniformity_audio": "uniformity_image"}
        return {names.get(name, name): value for name, value in found.items()}

    def without_sense(found: Scores) -> Scores:
        return {name: value for name, value in found.items() if name != "sense"}

    rules = {"retrieval": retrieval, "zero_shot": zero_shot, "geometry": geometry}
    return {
        task: {name: rules[task](one) for name, one in found.items()} if task in rules else found
        for task, found in scores.items()
    }


def merged(before: Scores, scores: Scores) -> Scores:
    """Earlier scores updated by new ones; scores whose name now means other data are dropped."""
    data = scores["data"]
    moved = {name for name, path in before.get("data", {}).items() if data.get(name, path) != path}
    found: Scores = {}
    for task in {**before, **scores}:
        new, old = scores.get(task), before.get(task)
        if isinstance(old, dict) and (new is None or isinstance(new, dict)):
            found[task] = {n: s for n, s in old.items() if n not in moved} | (new or {})
        else:
            found[task] = old if new is None else new
    return found
