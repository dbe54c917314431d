"""The samples of an epoch where the sets of data.train have weights.

    weight 2      each clip twice
    weight 0.5    half of the clips, another half in the next epoch
    weight 2.3    each clip twice, and three tenths of them once more

So an epoch is sum(weight * clips) samples, of each set rounded, and always as many. The fraction is
drawn anew when all of it was taken, or is about to be: of weight 0.5 every two epochs, of 0.3 every
three, of 0.75, which leaves a quarter out, every four. Seed and epoch alone decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import floor
from typing import NamedTuple

import numpy as np

from flap_fast.checks import ConfigError
from flap_fast.data.listing import ShardsOfSet
from flap_fast.data.random_streams import Stream, permutation


class Part(NamedTuple):
    """(n,) samples, ascending, of which an epoch takes only so many."""

    samples: np.ndarray
    takes: int

    def taken(self, seed: int, epoch: int, salt: int) -> np.ndarray:
        """(takes,) samples of an epoch.

        Args:
            salt: another one for each part of a run.
        """
        total = len(self.samples)
        fewer = min(self.takes, total - self.takes)
        rounds, at = divmod(epoch, total // fewer) if fewer else (0, 0)
        mixed = permutation(seed, rounds, total, salt, Stream.MIXTURE)
        some = mixed[at * fewer : (at + 1) * fewer]
        rest = np.concatenate([mixed[: at * fewer], mixed[(at + 1) * fewer :]])
        return self.samples[some if self.takes == fewer else rest]


class Mixture(NamedTuple):
    """S samples, among which are each epoch's."""

    base: np.ndarray
    """(S,) what each is a copy of, an index below V."""
    files: np.ndarray
    """(S,) shards, ascending; copies have their own."""
    parts: tuple[Part, ...]
    """Those of which an epoch takes some; it takes all others."""


def mixture(sets: Sequence[ShardsOfSet], clip_files: np.ndarray, files: np.ndarray) -> Mixture:
    """The samples for the weights of some sets.

    Args:
        clip_files: (V,) the shard of each sample, of the sets' shards.
        files: (V,) the same, ascending, where copies of a shard have numbers of their own.

    Raises:
        ConfigError: a set so small that an epoch takes no clip of it.
    """
    set_of_file = np.repeat(np.arange(len(sets)), [one.shards for one in sets])
    of_set = set_of_file[clip_files]
    copies = np.array([-(-one.weight // 1) for one in sets], np.int64)[of_set]
    bases = [np.flatnonzero(copies > copy) for copy in range(max(copies))]
    span = int(files[-1]) + 1
    base = np.concatenate(bases)
    numbers = np.concatenate([files[some] + copy * span for copy, some in enumerate(bases)])
    numbers = np.unique(numbers, return_inverse=True)[1]  # a window is of shards that there are
    copy_of = np.repeat(np.arange(len(bases)), [len(some) for some in bases])
    return Mixture(base, numbers, tuple(_parts(sets, of_set[base], copy_of)))


def _parts(sets: Sequence[ShardsOfSet], of_set: np.ndarray, copy_of: np.ndarray) -> Iterator[Part]:
    for number, (_, weight, name) in enumerate(sets):
        samples = np.flatnonzero((of_set == number) & (copy_of == floor(weight)))
        count = floor((weight - floor(weight)) * len(samples) + 0.5)
        if weight < 1 and not count:
            raise ConfigError(
                f"data.train must take at least one clip of each set an epoch, got weight {weight} "
                f"for the {len(samples)} clips of {name}; give it a higher weight or leave it out"
            )
        if count < len(samples):
            yield Part(samples, count)


def samples_by_shard(sets: Sequence[ShardsOfSet], clips: np.ndarray) -> np.ndarray:
    """About how many samples each visit to a shard gives, of (F,) its clips."""
    weights = np.repeat([one.weight for one in sets], [one.shards for one in sets])
    return np.where(weights < 1, np.floor(weights * clips), clips).astype(np.int64)
