"""A model and data sets -> scores, as a dictionary, a table and one number to select by.

{"retrieval": {NAME: {"audio_to_text": {"R@1": ..}, "text_to_audio": {..}, "chance": {..},
                      "clips": .., "captions": ..}},      of pictures with "sense": "image"
 "zero_shot": {NAME: {..}}, "geometry": {NAME: {..}}, "sts": {NAME: {..}}, "transfer": {NAME: {..}},
 "flops": [..], "data": {NAME: PATH}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.shards import Shards, open_shards, shard_kinds
from flap_fast.data.tokenize import Tokenizer
from flap_fast.evaluate import NEEDS, OF_CLIPS, OF_SENTENCES, OF_SETTINGS, TASKS
from flap_fast.evaluate.embed import Texts, evaluating, read_texts
from flap_fast.evaluate.evaluated_model import EvaluatedModel, whole_model
from flap_fast.evaluate.retrieval import TOP
from flap_fast.files import write_atomically
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks

Scores = dict[str, Any]

_SENTEVAL = ("STS", "SICK", "MR", "CR", "SUBJ", "MPQA", "SST", "TREC", "MRPC")


def evaluate(
    model: TwoTowers,
    config: Config,
    tokenizer: Tokenizer,
    folders: Sequence[Path],
    ranks: Ranks | None = None,
) -> Scores:
    """Retrieval of each folder of shards under its name; every rank must ask, all get the same."""
    subject = whole_model(model, config, tokenizer, ranks or Ranks())
    with evaluating(model):
        return score(subject, folders, ("retrieval",))


def score(subject: EvaluatedModel, data: Sequence[Path], tasks: Sequence[str] = ()) -> Scores:
    """All tasks on the data that each is for; every rank must ask, all get the same.

    Args:
        data: folders of shards, files or folders of sentences.
        tasks: names in `TASKS`; without any, retrieval of clips and STS of sentences.

    Raises:
        ConfigError: an unknown task, data that no task is for, a task without data.
    """
    of_sentences = {path: holds_sentences(path) for path in data}
    usual = {"retrieval": not all(of_sentences.values()), "sts": any(of_sentences.values())}
    tasks = tuple(dict.fromkeys(tasks)) or tuple(task for task, wanted in usual.items() if wanted)
    _check(tasks, of_sentences)
    found: Scores = {task: {} for task in tasks}
    found["data"] = {name: str(path.resolve()) for name, path in names(data).items()}
    for task in (task for task in OF_SETTINGS if task in tasks):
        found[task] = OF_SETTINGS[task](subject)
    of_clips = [task for task in OF_CLIPS if task in tasks]
    if subject.alone and of_clips:
        raise ConfigError("a text tower alone has no ears: name a run or a checkpoint for shards")
    folders = {name: path for name, path in names(data).items() if not of_sentences[path]}
    opened = {name: open_for(subject, path, of_clips) for name, path in folders.items()}
    for name, path in names(data).items():
        if of_sentences[path]:
            for task in (task for task in OF_SENTENCES if task in tasks):
                found[task][name] = OF_SENTENCES[task](subject, path)
            continue
        embeddings = subject.clips(*opened[name])
        for task in of_clips:
            found[task][name] = OF_CLIPS[task](subject, embeddings)
    return found


def open_for(subject: EvaluatedModel, folder: Path, tasks: Sequence[str]) -> tuple[Shards, Texts]:
    """Shards and what is written in them, held to what the tasks need; nothing is embedded yet."""
    shards = open_shards([folder], shard_kinds(subject.config))
    texts = read_texts(shards)
    for task in tasks:
        NEEDS[task](subject, texts)
    return shards, texts


def _check(tasks: Sequence[str], of_sentences: dict[Path, bool]) -> None:
    require(bool(tasks), "DATA or --tasks", "say what to score", "neither")
    for task in tasks:
        require(task in TASKS, "a task", f"be one of {', '.join(TASKS)}", task)
    kinds = (
        (OF_CLIPS, False, "a folder of shards"),
        (OF_SENTENCES, True, "a file or folder of sentences"),
    )
    for some, kind, what in kinds:
        asked = [task for task in tasks if task in some]
        there = kind in of_sentences.values()
        require(there or not asked, f"the data of {', '.join(asked)}", f"name {what}", "none")
    for path, sentences in of_sentences.items():
        some = OF_SENTENCES if sentences else OF_CLIPS
        wanted = any(task in some for task in tasks)
        rule = f"be wanted by a task, one of {', '.join(some)}"
        require(wanted, str(path), rule, ", ".join(tasks))


def holds_sentences(path: Path) -> bool:
    """Whether these are sentences: a file, or a folder with one of SentEval's."""
    return path.is_file() or any((path / name).is_dir() for name in _SENTEVAL)


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
        f"{name}/{spoken(direction, found)}/{metric}": value
        for name, found in scores["retrieval"].items()
        for direction in ("audio_to_text", "text_to_audio")
        for metric, value in found[direction].items()
        if metric.startswith("R@") or metric == "mAP@10"
    }


def spoken(direction: str, found: dict[str, Any]) -> str:
    """`audio_to_text` as a person calls it: of pictures `image_to_text`."""
    return direction.replace("audio", found.get("sense", "audio"))


def write_scores(file: Path, scores: Scores) -> None:
    """Write the JSON, whole or not at all."""
    write_atomically(file, (json.dumps(scores, indent=1, allow_nan=False) + "\n").encode())


def read_scores(file: Path) -> Scores:
    """What was written to a file; nothing where there is none."""
    if not file.is_file():
        return {}

    def refuse(number: str) -> None:
        raise ValueError(f"it holds {number}")

    try:
        found = json.loads(file.read_text(), parse_constant=refuse)
        return {**found}
    except (ValueError, TypeError) as error:
        remedy = "remove it, or name another file with --out"
        raise ConfigError(f"{file} must be an object in JSON: {error}; {remedy}") from None


def merged(before: Scores, scores: Scores) -> Scores:
    """Earlier scores with new ones in their places; what was of other data under a name goes."""
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


def table(scores: Scores) -> Table:
    """What a person wants to see, chance beside it."""
    found = scores["retrieval"]
    metrics = [*(f"R@{k}" for k in TOP), "mAP@10"]
    sizes = [f"{n}: {s['clips']} clips, {s['captions']} captions" for n, s in found.items()]
    caption = Text("\n".join(sizes))
    out = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    out.add_column("data", overflow="fold")  # a name may fold, a number must stay whole
    for heading in ("query to answer", *metrics, "chance R@10"):
        out.add_column(heading, no_wrap=True, min_width=len("0.000"))
    for name, s in found.items():
        for direction in ("audio_to_text", "text_to_audio"):
            values = (f"{s[direction][metric]:.3f}" for metric in metrics)
            by_chance = f"{s['chance'][direction]['R@10']:.3f}"
            called = spoken(direction, s).replace("_", " ")
            out.add_row(Text(name), called, *values, by_chance)
    return out
