"""Hard negatives: captions that a shard lists as wrong for their clip, `negatives` of its JSON.

A step draws some of each clip's, without replacement as far as they go: where more are asked for,
all come once before one comes again.

Source: NegCLIP, arXiv 2210.01936, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.data.shards import ShardError, Shards
from flap_fast.files import whole_characters


class Negatives:
    """Draws the negatives of a clip that the losses ask for.

    Raises:
        ShardError: the first clip of a folder has none; all other clips are read in training.
    """

    def __init__(self, config: Config, shards: Shards):
        self.count = config.loss.negatives
        self._shards = shards
        asking = {
            f"loss.{name}.negatives": len(loss.sentences)
            for name, loss in config.loss.active.items()
            if "negative_1" in loss.sentences
        }
        self._asking = " and ".join(f"{name} = {count}" for name, count in asking.items())
        if not self.count:
            return
        parents = [str(file.parent) for file in shards.files]
        _, first_files = np.unique(parents, return_index=True)
        for clip in np.searchsorted(shards.locations[:, 0], np.sort(first_files)).tolist():
            try:
                record = shards.record(clip)
            except Unusable:  # training replaces it, or stops at it
                continue
            self.of(clip, record, [0.0] * self.count)

    def uniforms(self, seed: int, sample_index: Tensor) -> list[list[float]]:
        """(B, n) random numbers of (B,) samples, for `of`."""
        if not self.count:
            return [[]] * len(sample_index)
        return uniforms(seed, Stream.NEGATIVES, sample_index, self.count).tolist()

    def of(self, clip: int, record: dict[str, Any], u: Sequence[float]) -> list[str]:
        """A negative for each number in [0, 1).

        Raises:
            ShardError: the clip has none.
        """
        listed = negatives_of(record)
        if self.count and not listed:
            name = self._shards.name(clip)
            what = f"'{record['id']}' ({name})" if record.get("id") else name
            raise ShardError(
                f"{what} must have `negatives`, captions that are wrong for it, for {self._asking},"
                " got none; give its row of the manifest some and prepare it again, or set 0"
            )
        found: list[str] = []
        left: list[str] = []
        for each in u:
            left = left or list(listed)
            found.append(left.pop(int(each * len(left))))
        return found


def negatives_of(record: dict[str, Any]) -> list[str]:
    """The negatives of a clip's JSON, each once."""
    value = record.get("negatives")
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    texts = [whole_characters(t.strip()) for t in texts if isinstance(t, str) and t.strip()]
    return list(dict.fromkeys(texts))
