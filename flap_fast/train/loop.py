"""The loop: batches -> loss -> weights, and what happens between steps."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config, check_before_loading
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import ShardError, open_shards, shard_kinds
from flap_fast.data.tokenize import Tokenizer, tokenizer
from flap_fast.evaluate.embed import read_texts
from flap_fast.evaluate.run import Scores, evaluate, flat_scores, selection_score, write_scores
from flap_fast.model.model_folder import put_first_weights, put_weights
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks, join_ranks, leave_ranks, world_size
from flap_fast.train.checkpoint import Checkpoints
from flap_fast.train.engine import Engine, check_engine, make_engine
from flap_fast.train.observers import Watch, check_wandb, observers, report_bad_clips
from flap_fast.train.run_folder import begin, write_config
from flap_fast.train.schedules import warmup_cosine
from flap_fast.train.step import Gradients
from flap_fast.train.stop import Stop


class Stopped(Exception):
    """A signal stopped the run after a step; `checkpoint` is where it goes on from."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"stopped after step {step}, saved in {checkpoint}")
        self.step, self.checkpoint = step, checkpoint


def train(config: Config, *, resume: bool = False) -> Scores | None:
    """Train a run to its end and score it on data.val; gives the scores, if there are any.

    Args:
        resume: go on from the run's last checkpoint; without one, begin.

    Raises:
        ConfigError: before anything is loaded, where it can be seen then.
        ShardError: a clip of data.val that cannot be scored; the step before it is saved.
        Stopped: SIGINT or SIGTERM, after a checkpoint was saved.
        NotFinite: NaN or infinity; the checkpoints before it stay.
    """
    check_before_loading(config, world_size())
    check_engine(config, world_size())
    check_wandb(config)
    start = begin(config, resume=resume)
    for folder in config.data.val:
        texts = read_texts(open_shards([folder], shard_kinds(config)))
        mute = len(texts.labels) - len(set(texts.clip_of_caption))
        rule, remedy = "hold no clip without a caption", "prepare it without them"
        require(not mute, f"data.val, {folder},", rule, mute, remedy)
    ranks = join_ranks()
    try:
        with ExitStack() as open_files:
            return _train(config, ranks, start, open_files)
    finally:
        leave_ranks()


def _train(
    config: Config, ranks: Ranks, start: Path | None, open_files: ExitStack
) -> Scores | None:
    tokens = tokenizer(config.text)
    shards = open_shards(config.data.train, shard_kinds(config))
    checkpoints = Checkpoints(config, ranks, shards)
    state = checkpoints.state(start) if start else None
    first = state.step if state else 0
    loader = TrainingLoader(config, shards, tokens, ranks)
    steps = config.train.steps or (config.train.epochs or 0) * loader.sampler.steps_per_epoch
    torch.manual_seed(config.run.seed)
    model = TwoTowers(config, weights=start is None and config.train.init_from is None)
    if start:
        put_weights(model, start)
    else:
        put_first_weights(model, config)
    engine = make_engine(config, model, ranks)
    if start:
        engine.optimizer_state.load(start / "optimizer.safetensors")
    if ranks.first:
        write_config(config, ranks)
    ranks.barrier()  # the folder is there for all
    stop = open_files.enter_context(Stop(ranks))
    after = observers(config, ranks, open_files, first=first, steps=steps)
    watch = Watch(config, ranks, steps, after)
    score = Scorer(config, ranks, engine, tokens, watch, state.best if state else None)
    if state and not state.scored and config.data.val:
        improved = score(first)
        checkpoints.mark_scored(first, score.best, is_best=improved)

    gradients = Gradients(config, ranks, engine, steps, loader.sampler.steps_per_epoch)
    batches = watch.waiting(loader.batches(first, steps, times=gradients.reads))
    for step in range(first + 1, steps + 1):
        outputs, terms = gradients(step, batches)
        report_bad_clips(config.run_folder, ranks, loader.bad)
        lr = warmup_cosine(
            step - 1, base=config.optim.lr, warmup=config.sched.warmup_steps, steps=steps
        )
        terms["grad_norm"] = engine.step(lr)
        # Still on the device: an observer that wants a number pays for its own sync.
        watch.step(step, loader.sampler.epoch(step - 1), lr, outputs, terms)

        stopped = stop.agreed() and step < steps
        to_score = bool(config.data.val) and due(step, steps, config.eval.every_steps)
        saved = None
        if stopped or due(step, steps, config.ckpt.every_steps):
            watch.check()
            saved = checkpoints.save(engine, step, score.best, scored=not to_score)
            if stopped:
                raise Stopped(step, saved)
        if not to_score:
            continue
        try:
            improved = score(step)
        except (ConfigError, ShardError):  # of data.val, on all ranks: --resume scores the step
            if not saved:
                checkpoints.save(engine, step, score.best, scored=False)
            raise
        if saved:
            checkpoints.mark_scored(step, score.best, is_best=improved)
        elif improved:
            checkpoints.save(engine, step, score.best, is_best=True)
    return score.at_the_end()


class Scorer:
    """Scores on data.val, and the best of them so far."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: Engine,
        tokens: Tokenizer,
        watch: Watch,
        best: float | None,
    ):
        self._config, self._ranks, self._engine = config, ranks, engine
        self._tokens, self._watch = tokens, watch
        self._last: Scores | None = None
        self.best = best

    def __call__(self, step: int) -> bool:
        """Score the weights of a step; whether they are the best so far and to be kept as such."""
        self._watch.check()
        self._last = self._scores()
        self._watch.scores(step, flat_scores(self._last))
        score = selection_score(self._last)
        if self.best is not None and score <= self.best:
            return False
        self.best = score
        return self._config.ckpt.keep_best

    def at_the_end(self) -> Scores | None:
        """The last scores, written to eval.json; also of a run that was finished before."""
        if not self._config.data.val:
            return None
        scores = self._last or self._scores()
        if self._ranks.first:
            write_scores(self._config.run_folder / "eval.json", scores)
        return scores

    def _scores(self) -> Scores:
        module, val = self._engine.module, self._config.data.val
        self._ranks.share(module.buffers())  # running statistics differ between ranks
        return evaluate(module, self._config, self._tokens, val, self._ranks)


def due(step: int, steps: int, every: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == steps or (every > 0 and step % every == 0)
