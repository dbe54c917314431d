"""The memory of a planned step, and the largest batch and micro-batch that fit in a GPU's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flap_fast.config import Config
from flap_fast.model.masking import least_micro_tokens
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.memory import Footprint, divisors, footprint
from flap_fast.tools.profile.work import Work

# Of a search for the most clips that fit.
_MOST_CLIPS = 2**24


@dataclass(frozen=True)
class StepMemory:
    """The memory of a rank's step, with other numbers of clips than the config's, too.

    Args:
        tokens: of each sentence, padding included.
        engine: `plain` or `deepspeed`.
    """

    config: Config
    counts: StepCounts
    work: Work
    tokens: int
    world: int
    engine: str

    def own(self) -> Footprint:
        """Of the step as it is set."""
        return self._of(self.work.clips, self.work.at_once)

    def largest_clips(self, limit: float) -> int:
        """The largest number of clips of a rank that fits, with train.micro_batch as it is set."""
        clips = self.work.clips
        if self.own().peak <= limit:
            return self._largest_clips(clips, limit)
        return self._largest_clips(self._largest_clips(clips, limit) or clips, limit)

    def largest_micro_batch(self, limit: float) -> int:
        """The largest micro-batch that fits, in clips; in tokens where clips differ. 0: none."""
        clips, lengths = self.work.clips, self.work.lengths
        if lengths is None:
            fitting = (m for m in divisors(clips) if self._of(clips, m).peak <= limit)
            return max(fitting, default=0)
        whole, mean = lengths.rank_tokens, self._mean_tokens
        if self._of(clips, clips).peak <= limit:
            return max(whole, least_micro_tokens(self.config))  # less would be refused

        def peak(tokens: int) -> float:
            # Just below the whole it would be two micro-batches, each of about a half.
            return self._of(clips, tokens / mean).peak if tokens < whole else math.inf

        most = _largest(peak, limit)
        return most if most >= least_micro_tokens(self.config) else 0

    def _largest_clips(self, clips: int, limit: float) -> int:
        """The same, with the losses of about `clips`."""
        step, batch = 1, clips * self.world
        if self.work.lengths is None:
            step = self.config.train.micro_batch or 1
        most = _largest(lambda n: self._of(n * step, self._at_once(n * step), batch).peak, limit)
        return step * most

    def _at_once(self, clips: int) -> float:
        """Clips of the largest micro-batch, of so many clips of a rank."""
        train, lengths = self.config.train, self.work.lengths
        if lengths is None or not train.micro_tokens:
            return train.micro_batch or clips
        fewest = math.ceil(clips * self._mean_tokens / train.micro_tokens)
        return clips / max(fewest, math.ceil(clips / (train.micro_batch or clips)))

    @property
    def _mean_tokens(self) -> float:
        assert self.work.lengths is not None
        return self.work.lengths.tokens / (self.work.clips * self.world)

    def _of(self, clips: int, at_once: float, global_batch: int | None = None) -> Footprint:
        config = self.config
        if global_batch is not None:
            train = config.train.model_copy(update={"global_batch": global_batch})
            config = config.model_copy(update={"train": train})
        return footprint(
            config,
            self.counts,
            clips,
            self.tokens,
            self.world,
            engine=self.engine,
            at_once=min(at_once, clips),
        )


def _largest(peak: Callable[[int], float], limit: float) -> int:
    """The largest number whose peak is within the limit; 0 if not even that of 1 is."""
    low, high = 0, 1
    while peak(high) <= limit and high < _MOST_CLIPS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= limit else (low, middle)
    return low
