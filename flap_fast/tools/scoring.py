"""Scores of a model on data, as `flap eval` prints and writes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.config.file import load_config, parse_config
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.evaluated_model import EvaluatedModel, text_only_model, whole_model
from flap_fast.evaluation.run import score
from flap_fast.evaluation.scores_file import Scores
from flap_fast.interchange.opened import opened
from flap_fast.model.model_folder import load_model
from flap_fast.places import place_of
from flap_fast.ranks import Ranks
from flap_fast.ranks.failure import joined
from flap_fast.tools.embedder import Embedder
from flap_fast.tools.inputs import shown


def evaluate(
    model: Embedder | str | Path,
    data: str | Path | Sequence[str | Path] = (),
    tasks: str | Sequence[str] = (),
    *,
    classes: Sequence[str] = (),
    length: str | None = None,
    pool: str = "mean",
    **settings: Any,
) -> Scores:
    """Score a model on data sets; nothing is written. Collective: call on every rank.

        scores = flap_fast.evaluate("runs/mine", "data/mine/val")
        scores["retrieval"]["val"]["audio_to_text"]["R@10"]

    Args:
        model: what `flap_fast.load` gives or takes; for sentences also a text encoder's folder.
        data: shards, as in data.train; for sentences STS files or SentEval's folder.
        tasks: names in `flap_fast.evaluation.TASKS`; by the data when not given.
        classes: of zero-shot classification; the labels of the data when not given.
        length: audio.length, if not the one that the model was trained with.
        pool: of a text encoder without a model: mean, cls or pooler.
        settings: of the section `eval`, such as `crop="whole"`; what the run had when not given.

    Returns:
        Scores as in eval.json, fractions in [0, 1]: {task: {name of the data set: {..}}}.

    Raises:
        ConfigError: no model, an unknown task, data that no task is for.
        ShardError: data that are not shards.
    """
    rule, paths = "be a model's folder, hf://OWNER/NAME or what flap_fast.load gives", (str, Path)
    require(isinstance(model, (Embedder, str, os.PathLike)), "model", rule, shown(model))
    require(_is_list(tasks, str), "tasks", "be a name or a list of names", shown(tasks))
    rule = "be a place or a list of places"
    require(_is_list(data, *paths), "data", rule, shown(data))
    names = not isinstance(classes, str) and _is_list(classes) and {*map(type, classes)} <= {str}
    require(names, "classes", "be a list of names", classes)
    asked = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    given = (data,) if isinstance(data, paths) else data
    places = [place_of("data", text) for text in given]
    with joined() as ranks:
        if isinstance(model, Embedder):
            rule = "be left out with a model that is loaded, which has its own"
            require(length is None, "length", rule, length, "give its folder instead of it")
            config = with_eval(model.config, settings)
            here = Ranks(device=model.device) if ranks.world == 1 else ranks
            towers = whole_model(model.model, config, model.tokenizer, here, tuple(classes))
            return score(towers, places, asked)
        with opened(model) as folder:
            found = open_model(str(folder), settings, pool, ranks, tuple(classes), length=length)
        return score(found, places, asked)


def _is_list(value: Any, *one: type) -> bool:
    """Whether a value is a list, or one of the types `one`, which stand for a list of one."""
    return isinstance(value, one) or (
        isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    )


def with_eval(config: Config, settings: dict[str, Any]) -> Config:
    """A config with other settings of its section `eval`; None leaves one as it is."""
    given = {name: value for name, value in settings.items() if value is not None}
    tree = config.model_dump()
    return parse_config({**tree, "eval": {**tree["eval"], **given}})


def open_model(
    model: str,
    settings: dict[str, Any],
    pool: str,
    ranks: Ranks,
    classes: tuple[str, ...] = (),
    *,
    length: str | None = None,
) -> EvaluatedModel:
    """A checkpoint or only a text encoder, ready for evaluation.

    Args:
        settings: of the section `eval`; None leaves what the run had.
        length: audio.length; None leaves what the run had.
    """
    if is_text_encoder(model):
        base = load_config(None, [f"text.folder={model}", f"text.pool={pool}", "text.dropout=0"])
        config = with_eval(base, settings)
        encoder = config.text.build().to(ranks.device).eval()
        return text_only_model(encoder, config, tokenizer(config.text), ranks)
    towers, trained = load_model(Path(model), ranks.device, length=length)
    config = with_eval(trained, settings)
    return whole_model(towers, config, tokenizer(config.text), ranks, classes)


def is_text_encoder(model: str) -> bool:
    """Whether transformers saved it: a config.json without a config.yaml of ours, no ClapModel."""
    folder = Path(model)
    bare = (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()
    if not bare:
        return model.startswith("package:")
    from flap_fast.interchange.convert import importable

    return not importable(folder)
