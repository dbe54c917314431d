"""Which clip is visited when: a function of the seed and the step alone."""

from __future__ import annotations

from functools import partial

import numpy as np

from flap_fast.checks import require
from flap_fast.data.random_streams import Stream, permutation


class Sampler:
    """Every clip once an epoch, in an order of its own each epoch; incomplete batches dropped.

    Args:
        files: (N,) the shard of each clip, ascending.
        shuffle_shards: shards mixed at a time; 0 mixes all clips.
        stream: of its own for each order of a run.
        what: is ordered, for a message.
    """

    def __init__(
        self,
        files: np.ndarray,
        global_batch: int,
        seed: int,
        shuffle_shards: int = 0,
        *,
        stream: Stream = Stream.ORDER,
        what: str = "clips of data.train",
    ):
        rule = f"be at most the {len(files)} {what}"
        require(len(files) >= global_batch, "train.global_batch", rule, global_batch)
        self.steps_per_epoch = len(files) // global_batch
        self._files, self._batch, self._seed = files, global_batch, seed
        self._window, self._stream = shuffle_shards, stream
        self._epoch, self._clips = -1, np.empty(0, np.int64)

    def epoch(self, step: int) -> int:
        """The epoch of a step; both count from 0."""
        return step // self.steps_per_epoch

    def clips(self, step: int) -> np.ndarray:
        """(global_batch,) int64: the clips of a step, over all ranks."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._clips = epoch, self._shuffled(epoch)
        return self._clips[at * self._batch : (at + 1) * self._batch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        draw = partial(permutation, self._seed, epoch, stream=self._stream)
        if not self._window:
            return draw(len(self._files))
        starts = np.searchsorted(self._files, np.arange(self._files[-1] + 2))
        shards = draw(len(starts) - 1)
        mixed = []
        for salt, first in enumerate(range(0, len(shards), self._window), 1):
            window = shards[first : first + self._window]
            clips = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in window])
            mixed.append(clips[draw(len(clips), salt)])
        return np.concatenate(mixed)
