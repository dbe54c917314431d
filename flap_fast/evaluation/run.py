"""A model and data sets -> scores, as a dictionary, a row of metrics and one number to select by.

{"retrieval": {NAME: {"audio_to_text": {"R@1": ..}, "text_to_audio": {..}, "chance": {..},
                      "clips": .., "captions": ..}},      of images "image_to_text", ..
 "relevance": {NAME: {..}}, "zero_shot": {NAME: {..}}, "probe": {NAME: {..}},
 "geometry": {NAME: {..}}, "sts": {NAME: {..}}, "transfer": {NAME: {..}},
 "flops": [..], "data": {NAME: PATH}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.shards import Shards, open_shards, shard_kinds
from flap_fast.data.tokenize import Tokenizer
from flap_fast.evaluation import TASKS, load_evaluation
from flap_fast.evaluation.embed import Texts, evaluating, read_texts
from flap_fast.evaluation.evaluated_model import TEXT_ONLY, EvaluatedModel, whole_model
from flap_fast.evaluation.kept_outputs import KeptOutputs
from flap_fast.evaluation.record import Data, Evaluation
from flap_fast.evaluation.scores_file import Scores
from flap_fast.model.two_towers import TwoTowers
from flap_fast.places import Place, Url, is_pattern, shown
from flap_fast.ranks import Ranks

_SENTEVAL = ("STS", "SICK", "MR", "CR", "SUBJ", "MPQA", "SST", "TREC", "MRPC")


def evaluate(
    model: TwoTowers,
    config: Config,
    tokenizer: Tokenizer,
    folders: Sequence[Place],
    ranks: Ranks | None = None,
    kept: KeptOutputs | None = None,
) -> Scores:
    """Scores of each folder of shards, by eval.tasks. Collective: call on every rank.

    Args:
        kept: what frozen encoders gave before.
    """
    evaluated = whole_model(model, config, tokenizer, ranks or Ranks(), kept=kept)
    with evaluating(model):
        return score(evaluated, folders, config.eval.tasks)


def check_training(config: Config) -> None:
    """Check that training can score data.val, before a model is loaded.

    Raises:
        ConfigError: eval.tasks names what it cannot, or data.val is not fit for it.
        ShardError: a folder of data.val is not one of shards.
    """
    tasks, evaluations = config.eval.tasks, {task: load_evaluation(task) for task in TASKS}
    able = [name for name, own in evaluations.items() if own.metrics]
    for task in tasks:
        require(task in able, "eval.tasks", f"name some of {', '.join(able)}", task)
    selecting = [name for name in able if evaluations[name].selects]
    rule = f"begin with one that chooses a checkpoint: {', '.join(selecting)}"
    require(tasks[0] in selecting, "eval.tasks", rule, tasks[0])

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a check embeds nothing")

    unloaded = EvaluatedModel(config, Ranks(), never, never, never)
    for folder in config.data.val:
        texts = read_texts(open_shards([folder], shard_kinds(config), config.data))
        without = len(texts.labels) - len(set(texts.clip_of_caption))
        rule, remedy = "hold no clip without a caption", "prepare it without them"
        require(not without, f"data.val, {shown(folder)},", rule, without, remedy)
        for task in tasks:
            evaluations[task].check(unloaded, texts)


def score(model: EvaluatedModel, data: Sequence[Place], tasks: Sequence[str] = ()) -> Scores:
    """Scores of all tasks on their data, the same on all ranks. Collective.

    Args:
        data: shards, as in data.train; files or folders of sentences.
        tasks: names in `TASKS`; without any, retrieval of clips, relevance where eval.relevance
            names a table, and STS of sentences.

    Raises:
        ConfigError: an unknown task, data that no task is for, a task without data.
    """
    kinds: dict[Place, Data] = {p: "sentences" if holds_sentences(p) else "clips" for p in data}
    defaults = {"retrieval": "clips", "relevance": "clips", "sts": "sentences"}
    if not model.config.eval.relevance:
        del defaults["relevance"]
    tasks = tuple(dict.fromkeys(tasks)) or [
        t for t, kind in defaults.items() if kind in kinds.values()
    ]
    _check(tasks, kinds)
    if model.text_only and _of("clips", tasks):
        raise ConfigError(TEXT_ONLY)

    # Checks come before anything is embedded.
    for own in _of("settings", tasks):
        own.check(model, None)
    opened: dict[str, tuple[Shards, Texts]] = {}
    for name, path in names(data).items():
        if kinds[path] == "clips":
            shards = open_shards([path], shard_kinds(model.config), model.config.data)
            opened[name] = shards, read_texts(shards)
        for own in _of(kinds[path], tasks):
            own.check(model, opened[name][1] if kinds[path] == "clips" else path)

    found: Scores = {task: {} for task in tasks}
    found["data"] = {name: shown(_resolved(path)) for name, path in names(data).items()}
    for own in _of("settings", tasks):
        found[own.name] = own.score(model, None)
    for name, path in names(data).items():
        asked = _of(kinds[path], tasks)
        pooled = any(own.pooled for own in asked)
        source = model.clips(*opened[name], pooled) if kinds[path] == "clips" else path
        for own in asked:
            found[own.name][name] = own.score(model, source)
    return found


def _of(data: Data, tasks: Sequence[str]) -> list[Evaluation]:
    """The evaluations among `tasks` of this kind of data, in the order of the registry."""
    return [load_evaluation(t) for t in TASKS if t in tasks and load_evaluation(t).data == data]


_CALLED: dict[Data, str] = {
    "clips": "a folder of shards",
    "sentences": "a file or folder of sentences",
}


def _check(tasks: Sequence[str], kinds: dict[Place, Data]) -> None:
    """Raise `ConfigError` unless each task has data and all data has a task."""
    require(bool(tasks), "DATA or --tasks", "say what to score", "neither")
    for task in tasks:
        require(task in TASKS, "a task", f"be one of {', '.join(TASKS)}", task)
    for kind, called in _CALLED.items():
        asked = [own.name for own in _of(kind, tasks)]
        given = kind in kinds.values()
        require(given or not asked, f"the data of {', '.join(asked)}", f"name {called}", "none")
    for path, kind in kinds.items():
        rule = f"be wanted by a task, one of {', '.join(own.name for own in _of(kind, TASKS))}"
        require(bool(_of(kind, tasks)), shown(path), rule, ", ".join(tasks))


def holds_sentences(path: Place) -> bool:
    """Whether a path holds sentences: a file, or a folder with one of SentEval's files."""
    if isinstance(path, Url) or path.suffix.lower() == ".tar":
        return False
    return path.is_file() or any((path / name).is_dir() for name in _SENTEVAL)


def names(places: Sequence[Place]) -> dict[str, Place]:
    """Places by their folders' names, with the names above where two are equal.

    Of two patterns in one folder, what names their shards is the last part.
    """
    folders = {place: _parts(place) for place in places}
    alike = Counter(folders.values())
    parts_of = [folders[p] if alike[folders[p]] == 1 else _whole(p) for p in places]
    out: dict[str, Place] = {}
    for place, whole in zip(places, parts_of, strict=True):
        parts = 1
        while sum(o[-parts:] == whole[-parts:] for o in set(parts_of)) > 1 and parts < len(whole):
            parts += 1
        out["/".join(whole[-parts:])] = place
    return out


def _parts(place: Place) -> tuple[str, ...]:
    """The names on the way to a place; of a pattern's shards, those of their folder."""
    parts = _whole(place)
    return parts[:-1] if is_pattern(Path(parts[-1])) and len(parts) > 1 else parts


def _whole(place: Place) -> tuple[str, ...]:
    whole = _resolved(place)
    return whole.parts if isinstance(whole, Path) else tuple(whole.shown.rstrip("/").split("/"))


def _resolved(place: Place) -> Place:
    return place if isinstance(place, Url) else place.resolve()


def selection_score(scores: Scores, task: str = "retrieval") -> float:
    """The number that the best checkpoint is chosen by, the mean over data sets."""
    selects = load_evaluation(task).selects
    assert selects is not None  # `check_training` has asked
    each = [selects(found) for found in scores[task].values()]
    return sum(each) / len(each)


def flat_scores(scores: Scores) -> dict[str, float]:
    """The columns of a step's row in metrics.jsonl: {"val/audio_to_text/R@10": ..}."""
    return {
        f"{name}/{column}": value
        for task in TASKS
        if task in scores and (metrics := load_evaluation(task).metrics)
        for name, found in scores[task].items()
        for column, value in metrics(found).items()
    }
