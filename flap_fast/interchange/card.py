"""The model card of an exported folder: README.md, as the Hugging Face Hub reads it.

What is known of a run is written; what is not, is said to be unknown. No path and no account of
whoever trained is in it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.lengths import clip_seconds
from flap_fast.data.shards import open_shards, shard_kinds
from flap_fast.data.tar_members import ShardError
from flap_fast.evaluation import TASKS, load_evaluation, tables
from flap_fast.evaluation.papers import data_set
from flap_fast.evaluation.scores_file import Scores, read_scores
from flap_fast.files import visible
from flap_fast.interchange.layout import CardFields, Export
from flap_fast.interchange.tensors import read_json
from flap_fast.places import Place, Url, Weighted, shared_name, shown
from flap_fast.ranks import Ranks

CARD = "README.md"
_UNKNOWN = "not known where this card was written"
_PIPELINES = {
    "audio": "zero-shot-audio-classification",
    "image": "zero-shot-image-classification",
}
# Of environment.json: they name folders, accounts and machines of whoever trained.
_PRIVATE = {"command", "host", "outcome", "earlier_sessions"}
_SOUNDS = {"audio": "sounds", "image": "images"}


def write_card(
    folder: Path, export: Export, run: Path, fields: CardFields, *, use: str | None = None
) -> None:
    """Write the card of an exported folder into it.

    Args:
        run: the folder that was exported, with the eval.json and environment.json of the run.
        use: how to use it, where it is a folder for onnxruntime.
    """
    # As it was trained: its text encoder is not yet a folder of the model's.
    config = load_config(export.folder / "config.yaml")
    scores, modality = _shared(read_scores(run / "eval.json")), config.encoder.modality
    name = fields.name or config.run.name
    clap = not use and read_json(folder / "config.json").get("model_type") == "clap"
    data = ModelCardData(
        license=fields.license,
        license_name=fields.license_name,
        license_link=fields.license_link,
        language=list(fields.languages) or None,
        library_name="onnx" if use else "transformers" if clap else "flap_fast",
        pipeline_tag=_PIPELINES[modality],
        tags=["flap_fast", "clap" if modality == "audio" else "clip", "contrastive", modality],
        datasets=list(fields.datasets) or None,
        model_name=name.rpartition("/")[2],
        eval_results=list(_results(scores)) or None,
    )
    sections = (
        f"# {visible(name, document=True)}",
        _about(export, config),
        "## How to use it\n\n" + (use or _loading(fields.name or "OWNER/NAME", config, clap)),
        "## Data\n\n" + _data(config, export.folder / "state.json", fields),
        "## Scores\n\n" + _scores(scores),
        "## Settings\n\nWhat differs from flap_fast's defaults:\n\n" + _settings(config),
        "## Environment\n\n" + _environment(run),
        "## Limits\n\n" + _limits(config),
        f"## Licence\n\n{fields.license_name or fields.license or 'Not stated'}.",
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    card.save(folder / CARD)


def _about(export: Export, config: Config) -> str:
    encoder, sizes = config.encoder, Counter[str]()
    what = _SOUNDS[encoder.modality]
    for name, weight in export.model.named_parameters():
        sizes[name.partition(".")[0]] += weight.numel()
    rows = [
        (f"{encoder.modality} encoder", f"{encoder.encoder}, {_millions(sizes[encoder.modality])}"),
        ("text encoder", f"{_text_name(config)}, {_millions(sizes['text'])}"),
        ("whole, with its heads", _millions(sizes.total() - sizes["decoder"])),
        ("embedding", f"{config.joint.width} numbers, unit norm"),
        *_front_end(config),
    ]
    return (
        f"Embeds {what} and captions in one space, a caption near the {what} it describes: for "
        f"retrieval and zero-shot classification. Trained with flap_fast.\n\n{_table(rows)}"
    )


def _front_end(config: Config) -> list[tuple[str, str]]:
    if config.encoder is not config.audio:
        return [("input", f"RGB, {config.encoder.input_shape(config.fusion)[-1]} pixels square")]
    audio = config.audio
    length = f"as long as they are, up to {audio.max_duration_s:g} s"
    if audio.length == "fixed":
        length = f"{audio.duration_s:g} s; shorter ones are filled ({audio.filling})"
    low, high = audio.range_hz
    mels = f"{audio.mel_bins} mel bins, {audio.mel}'s log-mel, {low:g} to {high:g} Hz"
    rows = [
        ("input", f"{audio.sample_rate_hz:,} Hz, {mels}"),
        ("length", length),
    ]
    if config.fusion.on:
        fused = f"fused by {config.fusion.type}, up to {config.fusion.max_duration_s:g} s"
        rows.append(("longer clips", fused))
    return rows


def _loading(name: str, config: Config, clap: bool) -> str:
    clip = {"audio": "dog.wav", "image": "dog.jpg"}[config.encoder.modality]
    ours = (
        "```python\nimport flap_fast\n\n"
        f'model = flap_fast.load("hf://{name}")\n'
        f'model.rank("{clip}", ["a dog barks", "rain on a roof"])\n```'
    )
    if not clap:
        return ours
    theirs = (
        "With transformers:\n\n```python\nfrom transformers import ClapModel, ClapProcessor\n\n"
        f'model = ClapModel.from_pretrained("{name}")\n'
        f'processor = ClapProcessor.from_pretrained("{name}")\n```\n\n'
        "Its numbers there are others: transformers does not round samples to 16 bits, takes a "
        "random crop of a longer sound"
    )
    fused = ", and treats one sound as longer in a batch without any"
    return f"{ours}\n\n{theirs}{fused if config.fusion.on else ''}."


def _data(config: Config, state: Path, fields: CardFields) -> str:
    clips = read_json(state).get("clips") if state.is_file() else None
    rows = [
        ("data sets", ", ".join(fields.datasets) or "not stated"),
        ("trained on", ", ".join(_told_apart(map(_named, config.data.train))) or "not stated"),
        ("clips", f"{clips:,}" if isinstance(clips, int) else _UNKNOWN),
    ]
    if config.encoder is config.audio:
        hours = _hours(config, clips)
        rows.append(("hours", _UNKNOWN if hours is None else f"{hours:.1f}"))
    rows.append(("captions", config.data.captions))
    return _table(rows)


def _named(entry: Place | Weighted) -> str:
    """The last part of a path or URL, with the data set that the whole one names."""
    if isinstance(entry, Weighted):
        return f"{_named(entry.path)}, weight {entry.weight:g}"
    name = shared_name(entry) or "data"
    known = data_set(shown(entry), "audio") or data_set(shown(entry), "image")
    return f"{name} ({known})" if known and known.lower() not in name.lower() else name


def _told_apart(names: Iterable[str]) -> list[str]:
    """The names, numbered where they are equal: `train`, `train (2)`. Folders above tell more, but
    they may be called as an account is."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in count(2))
        found.append(next(one for one in chain([name], numbered) if one not in found))
    return found


def _shared(scores: Scores) -> Scores:
    """The scores without folders above the data sets, which eval.json names some by."""
    places = dict(scores.get("data", {}))
    tasks = {task: scores[task] for task in TASKS if isinstance(scores.get(task), dict)}
    own = list(dict.fromkeys(name for sets in tasks.values() for name in sets))
    called = dict(zip(own, _told_apart(_named(_place(n, places.get(n))) for n in own), strict=True))
    renamed = {
        task: {called[name]: one for name, one in sets.items()} for task, sets in tasks.items()
    }
    return (
        scores
        | renamed
        | {"data": {called[n]: where for n, where in places.items() if n in called}}
    )


def _place(name: str, where: str | None) -> Place:
    """The place that a name of eval.json stands for: of a pattern's shards, their folder."""
    place = Url(where) if where and "://" in where else Path(where or name)
    return place if place.name == name.rpartition("/")[2] else place.parent


def _hours(config: Config, clips: object) -> float | None:
    """The hours of data.train, if its shards are here and are those that were trained on."""
    local = [place for place in config.data.train_places if isinstance(place, Path)]
    if not local or len(local) != len(config.data.train):
        return None
    try:
        shards = open_shards(local, shard_kinds(config))
        if len(shards) != clips:
            return None
        return clip_seconds(shards, Ranks()).sum().item() / 3600
    except (ShardError, ConfigError, OSError):
        return None


def _scores(scores: Scores) -> str:
    return tables.markdown(scores).strip() or "None: the run has no eval.json."


def _results(scores: Scores) -> Iterator[EvalResult]:
    """The scores for the card's model-index, but for those of single sentence sets."""
    for task in TASKS:
        sets = scores.get(task, {})
        metrics = load_evaluation(task).metrics or _floats
        for name, found in sets.items() if isinstance(sets, dict) else ():
            for metric, value in metrics(found).items():
                yield EvalResult(
                    task_type=task.replace("_", "-"),
                    dataset_type=re.sub(r"[^A-Za-z0-9_./-]+", "_", name),
                    dataset_name=visible(name, document=True),
                    metric_type=metric,
                    metric_value=round(value, 4),
                )


def _floats(found: Scores) -> dict[str, float]:
    return {name: value for name, value in found.items() if isinstance(value, float)}


def _settings(config: Config) -> str:
    shared = config.shareable()
    tree: dict[str, Any] = shared.model_dump(mode="json", exclude_defaults=True)
    for name, section in ((shared.encoder.modality, shared.encoder), ("text", shared.text)):
        tree[name] = {"encoder": section.encoder, **tree.get(name, {})}
    return f"```yaml\n{yaml.safe_dump(tree, sort_keys=False).strip()}\n```"


def _environment(run: Path) -> str:
    """environment.json of the run that a folder is, or is a checkpoint of."""
    beside = [run, *(run.parents[1:2] if run.parent.name == "checkpoints" else ())]
    file = next((f for f in (b / "environment.json" for b in beside) if f.is_file()), None)
    if file is None:
        return f"{_UNKNOWN[0].upper()}{_UNKNOWN[1:]}."
    facts = read_json(file).items()
    return _table([(name, str(value)) for name, value in facts if name not in _PRIVATE])


def _limits(config: Config) -> str:
    what = _SOUNDS[config.encoder.modality]
    lines = [
        "Scores hold for the data above; other recordings, languages and wordings were not tried.",
        "Cosines rank; they are no probabilities. Zero-shot classification answers with one of the "
        "classes it is given, also where none is right.",
        f"Captions are cut after {config.text.max_tokens} tokens.",
        f"What is wrong or one-sided in the {what} and captions of training is in the model.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _text_name(config: Config) -> str:
    folder = getattr(config.shareable().text, "folder", None)
    return f"{config.text.encoder}{f' ({folder})' if folder else ''}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M parameters"


def _table(rows: list[tuple[str, str]]) -> str:
    """A table without headings, which Markdown has as empty ones."""
    cells = [
        tuple(visible(cell, document=True).replace("|", r"\|") for cell in row) for row in rows
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])
