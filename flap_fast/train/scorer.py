"""Evaluation during training: scores on data.val, and the best of them so far."""

from __future__ import annotations

import time
from contextlib import nullcontext

from flap_fast.config import Config
from flap_fast.data.tokenize import Tokenizer
from flap_fast.evaluate.run import evaluate, flat_scores, selection_score
from flap_fast.evaluate.scores_file import Scores, write_scores
from flap_fast.ranks import Ranks
from flap_fast.train.engine import Engine
from flap_fast.train.observers import Metrics


class Scorer:
    """Scores the engine's weights, or their average, on data.val. Collective: call on every rank.

    Args:
        best: the best score before, of a run that is resumed.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: Engine,
        tokens: Tokenizer,
        metrics: Metrics,
        best: float | None,
    ):
        self._config, self._ranks, self._engine = config, ranks, engine
        self._tokens, self._metrics = tokens, metrics
        self._last: Scores | None = None
        self.best = best

    def score(self, step: int) -> bool:
        """Score a step's weights; returns whether ckpt.keep_best keeps them as the best so far."""
        self._metrics.check_finite()
        began = time.perf_counter()
        self._last = self._evaluate()
        seconds = {"eval_s": time.perf_counter() - began}
        self._metrics.scores(step, flat_scores(self._last) | seconds)
        score = selection_score(self._last)
        if self.best is not None and score <= self.best:
            return False
        self.best = score
        return self._config.ckpt.keep_best

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
            return evaluate(module, self._config, self._tokens, val, self._ranks)
