"""Sets up a run before its first step: checked settings, data, model, engine, observers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flap_fast.config import Config, check_before_loading, check_effects
from flap_fast.data.dealing import ClipTokens
from flap_fast.data.lengths import clip_seconds
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import Shards, open_shards, shard_kinds
from flap_fast.data.tokenize import Tokenizer, tokenizer
from flap_fast.evaluation.run import check_training
from flap_fast.files import say
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.masking import check_micro_tokens, tokens_of_seconds
from flap_fast.model.model_folder import (
    AVERAGE,
    OPTIMIZER,
    TRAINED,
    put_weights,
)
from flap_fast.model.two_towers import TwoTowers
from flap_fast.progress import starting
from flap_fast.ranks import Ranks, world_size
from flap_fast.ranks.agreement import Facts, agree
from flap_fast.training.checkpoint import Checkpoints
from flap_fast.training.engine import Engine, check_engine, make_engine
from flap_fast.training.environment import environment
from flap_fast.training.facts import checksum, data_facts, weights_facts
from flap_fast.training.frozen import Frozen, frozen
from flap_fast.training.guarded import Observer
from flap_fast.training.observers import Metrics, observers
from flap_fast.training.overview import Known, overview, parameter_facts, parameters_of
from flap_fast.training.run_folder import begin, in_session
from flap_fast.training.scorer import Scorer
from flap_fast.training.state import State
from flap_fast.training.stop import Stop
from flap_fast.training.teacher import Teacher, check_teacher, teacher
from flap_fast.training.torch_optimizers import check_optimizer
from flap_fast.training.trace import tracing
from flap_fast.training.weights_and_biases import check_wandb


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step."""

    config: Config
    ranks: Ranks
    engine: Engine
    loader: TrainingLoader
    checkpoints: Checkpoints
    metrics: Metrics
    scorer: Scorer
    stop: Stop
    frozen: Frozen
    """Outputs of frozen encoders."""
    teacher: Teacher | None
    """Of loss.distill, if it has a weight."""
    trace: Observer
    """Called after each step: traces those that RUN/trace asks for."""
    first: int
    """Steps done before."""
    steps: int
    """Steps of the whole run."""
    unscored: bool
    """The evaluation due at step `first` was interrupted."""


class _Read(NamedTuple):
    """What a run reads before its ranks compute anything together."""

    tokens: Tokenizer
    shards: Shards
    model: TwoTowers
    teacher: Teacher | None
    checkpoints: Checkpoints
    state: State | None


def check_run(config: Config, *, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a new run. Loads no data and no model.

    Raises:
        ConfigError: the settings are wrong, or do not fit the run's folder.
        ShardError: a folder of data.val is not one of shards.
    """
    check_before_loading(config, world_size())
    check_engine(config, world_size())
    check_optimizer(config.optim)
    check_micro_tokens(config)
    check_wandb(config)
    check_teacher(config)
    start = begin(config, resume=resume)
    if start is None:
        check_effects(config, config.train.steps, config.train.epochs)
    check_training(config)
    return start


def set_up(
    config: Config,
    ranks: Ranks,
    start: Path | None,
    open_files: ExitStack,
    more: Sequence[Observer] = (),
) -> Run:
    """Build a run, with the weights of checkpoint `start` if there is one.

    Collective: call on every rank. What must be closed is closed with `open_files`.

    Args:
        more: observers besides the config's.
    """
    with starting("set up the run"):
        read = agree(ranks, lambda: _read(config, ranks, start))
        tokens, shards, model, taught_by, checkpoints, state = read
        first = state.step if state else 0
        seconds = own_seconds(config, shards, ranks)
        lengths = None if seconds is None else tokens_of_seconds(config, seconds)
        loader = TrainingLoader(config, shards, tokens, ranks, lengths)
        per_epoch = loader.sampler.steps_per_epoch
        steps = config.train.run_steps(per_epoch)
        if start is None:
            check_effects(config, steps, -(-steps // per_epoch))
        parts = parameters_of(model)  # before ZeRO 3 shards them
        engine = make_engine(config, model, ranks)
        if start:
            if first:  # it has no state before the first step
                engine.optimizer_state.load(start / OPTIMIZER)
            if engine.average:
                before_merge = start / AVERAGE
                file = before_merge if before_merge.is_file() else start / "model.safetensors"
                engine.average.load(file, first)
        resumed = {"resumed_from_step": first} if first else {}
        opened = in_session(config, environment(ranks) | parameter_facts(parts) | resumed)
        # Every rank needs the run's folder.
        agree(ranks, lambda: (open_files.enter_context(opened) if ranks.first else None, {}))
    stop = open_files.enter_context(Stop(ranks, checkpoints.folder))
    of_run = engine.module, ranks, config.run_folder
    kept = open_files.enter_context(frozen(config, *of_run, shards=shards, keep=start is not None))
    if ranks.first:
        samples = loader.sampler.epoch_samples
        known = Known(engine.name, parts, len(shards), seconds, steps, per_epoch, samples)
        say(overview(config, ranks, known, start, first), error=True)
    own = observers(config, ranks, open_files, first=first, steps=steps)
    metrics = Metrics(config, ranks, steps, [*own, *(more if ranks.first else ())])
    return Run(
        config=config,
        ranks=ranks,
        engine=engine,
        loader=loader,
        checkpoints=checkpoints,
        metrics=metrics,
        scorer=Scorer(config, ranks, engine, tokens, metrics, state),
        stop=stop,
        frozen=kept,
        teacher=taught_by,
        trace=tracing(config, ranks, open_files),
        first=first,
        steps=steps,
        unscored=bool(state and not state.scored and config.data.val),
    )


def _read(config: Config, ranks: Ranks, start: Path | None) -> tuple[_Read, Facts]:
    """What each rank reads and builds for itself, and the facts that must be the same."""
    (shards, tokens), facts = data_read(config)
    taught_by = teacher(config, ranks)
    of_teacher = taught_by and checksum(taught_by.model)
    checkpoints = Checkpoints(config, ranks, shards, of_teacher)
    state = checkpoints.state(start) if start else None
    with checkpoints.verified(start) if start else nullcontext():
        model = _model(config, start)
    if ranks.world > 1:
        facts |= {"the first weights": weights_facts(model), "the teacher's weights": of_teacher}
    return _Read(tokens, shards, model, taught_by, checkpoints, state), facts


def data_read(config: Config) -> tuple[tuple[Shards, Tokenizer], dict[str, Any]]:
    """The shards of data.train and the tokenizer, and the facts of both."""
    tokens = tokenizer(config.text)
    shards = open_shards(config.data.train, shard_kinds(config), config.data)
    return (shards, tokens), data_facts(config, shards, tokens) if world_size() > 1 else {}


def clip_tokens(config: Config, shards: Shards, ranks: Ranks) -> ClipTokens | None:
    """Tokens of each clip, where clips keep their own lengths. Collective: call on every rank."""
    seconds = own_seconds(config, shards, ranks)
    return None if seconds is None else tokens_of_seconds(config, seconds)


def own_seconds(config: Config, shards: Shards, ranks: Ranks) -> np.ndarray | None:
    """Seconds of each clip, where clips keep their own lengths. Collective: call on every rank."""
    if config.encoder is not config.audio or not config.audio.variable:
        return None
    return clip_seconds(shards, ranks)


def _model(config: Config, start: Path | None) -> TwoTowers:
    """The model with the weights of a checkpoint, or with initial weights."""
    torch.manual_seed(config.run.seed)
    model = TwoTowers(config, weights=start is None and config.train.init_from is None)
    if start:
        trained = start / TRAINED
        put_weights(model, trained if trained.is_file() else start / "model.safetensors")
    else:
        put_first_weights(model, config)
    return model
