"""Evaluation during training: scores on data.val, and the best of them so far."""

from __future__ import annotations

import time
from contextlib import nullcontext

from flap_fast.config import Config
from flap_fast.data.tokenize import Tokenizer
from flap_fast.evaluation.kept_outputs import KeptOutputs
from flap_fast.evaluation.run import evaluate, flat_scores, selection_score
from flap_fast.evaluation.scores_file import Scores, write_scores
from flap_fast.ranks import Ranks
from flap_fast.training.engine import Engine
from flap_fast.training.observers import Metrics
from flap_fast.training.state import Best, State


class Scorer:
    """Scores the engine's weights, or their average, on data.val. Collective: call on every rank.

    Args:
        state: of a run that is resumed, with its best score.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: Engine,
        tokens: Tokenizer,
        metrics: Metrics,
        state: State | None,
    ):
        self._config, self._ranks, self._engine = config, ranks, engine
        self._tokens, self._metrics = tokens, metrics
        self._last: Scores | None = None
        frozen = {"text": config.text.freeze, "media": config.encoder.freeze}
        self._kept = KeptOutputs(engine.module, ranks, **frozen)
        self._task = config.eval.tasks[0]
        best = state.best_so_far if state else None
        self.best = best if best and best.task == self._task else None

    def score(self, step: int) -> bool:
        """Score a step's weights; returns whether ckpt.keep_best keeps them as the best so far."""
        self._metrics.check_finite()
        began = time.perf_counter()
        self._last = self._evaluate()
        seconds = {"eval_s": time.perf_counter() - began}
        self._metrics.scores(step, flat_scores(self._last) | seconds)
        score = selection_score(self._last, self._task)
        if self.best is not None and score <= self.best.score:
            self.best = self.best._replace(since=self.best.since + 1)
            return False
        self.best = Best(score, 0, self._task)
        return self._config.ckpt.keep_best

    @property
    def out_of_patience(self) -> bool:
        """Whether eval.patience ends the run now."""
        patience = self._config.eval.patience
        return self.best is not None and 0 < patience <= self.best.since

    def final_scores(self) -> Scores | None:
        """The last scores, written to eval.json; computed now if the run was finished before."""
        if not self._config.data.val:
            return None
        scores = self._last or self._evaluate()
        if self._ranks.first:
            write_scores(self._config.run_folder / "eval.json", scores)
        return scores

    def _evaluate(self) -> Scores:
        module, val = self._engine.module, self._config.data.val
        self._ranks.broadcast(module.buffers())  # running statistics differ between ranks
        average = self._engine.average
        with average.in_use() if average else nullcontext():
            return evaluate(module, self._config, self._tokens, val, self._ranks, self._kept)
