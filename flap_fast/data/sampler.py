"""The order of samples: a function of only the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from flap_fast.checks import require
from flap_fast.data.mixing import Part
from flap_fast.data.random_streams import Stream, permutation


class Sampler:
    """Takes each sample once an epoch, reshuffled each epoch; drops the incomplete batch.

    Args:
        files: (N,) the shard of each sample, ascending.
        shuffle_shards: shards mixed at a time; 0 mixes all samples.
        stream: the random stream; a different one for each sampler of a run.
        what: the name of the samples, for a message.
        parts: samples of which an epoch takes only some.
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
        parts: Sequence[Part] = (),
    ):
        self.epoch_samples = len(files) - sum(len(part.samples) - part.takes for part in parts)
        rule = f"be at most the {self.epoch_samples} {what}"
        fits = 2 ** int(np.log2(max(1, self.epoch_samples)))
        remedy = f"set train.global_batch={fits}, or lower"
        supported = self.epoch_samples >= global_batch
        require(supported, "train.global_batch", rule, global_batch, remedy)
        self.steps_per_epoch = self.epoch_samples // global_batch
        self._parts = parts
        self._files, self._batch, self._seed = files, global_batch, seed
        self._window, self._stream = shuffle_shards, stream
        self._epoch, self._samples = -1, np.empty(0, np.int64)

    def epoch(self, step: int) -> int:
        """The epoch of a step; both count from 0."""
        return step // self.steps_per_epoch

    def samples(self, step: int) -> np.ndarray:
        """(global_batch,) int64: the samples of a step, over all ranks."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._samples = epoch, self._shuffled(epoch)
        return self._samples[batch * self._batch : (batch + 1) * self._batch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        shuffled = partial(permutation, self._seed, epoch, stream=self._stream)
        taken = self.taken(epoch)
        if not self._window:
            return taken[shuffled(len(taken))]
        starts = np.searchsorted(self._files[taken], np.arange(self._files[-1] + 2))
        shards = shuffled(len(starts) - 1)
        mixed = []
        for salt, first in enumerate(range(0, len(shards), self._window), 1):
            window = shards[first : first + self._window]
            clips = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in window])
            mixed.append(clips[shuffled(len(clips), salt)])
        return taken[np.concatenate(mixed)]

    def taken(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, ascending."""
        taken = np.ones(len(self._files), bool)
        for salt, part in enumerate(self._parts):
            taken[part.samples] = False
            taken[part.taken(self._seed, epoch, salt)] = True
        return np.flatnonzero(taken)
