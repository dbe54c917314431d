"""The crops of sounds, embedded in batches and averaged for each sound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.preparation.prepare import ahead
from flap_fast.tools.sounds import Crops, Part, Sound, crops_from, sound_name

Embedded = Generator[Tensor | BadSound]
"""A (d,) unit row for each sound, or the error that it has instead."""


def embedded(
    sounds: Iterable[Sound],
    decode: Callable[[tuple[int, Sound]], Part],
    embed: Callable[[list[np.ndarray]], Tensor],
    batch: int,
    *,
    threads: int,
    ahead_sounds: int,
    most_samples: float,
    mean: bool = True,
) -> Embedded:
    """Yield what `pooled` yields of sounds, which are decoded ahead on threads; errors name them.

    Args:
        decode: takes a sound and its number.
        ahead_sounds: sounds that are decoded ahead, besides one for each thread.
    """
    names: deque[str] = deque()

    def noted() -> Iterator[tuple[int, Sound]]:
        for number, sound in enumerate(sounds):
            names.append(sound_name(sound, number))
            yield number, sound

    with ThreadPoolExecutor(threads) as pool:
        parts = ahead(pool, decode, noted(), limit=ahead_sounds + threads)
        sounds_crops = (crops_from(part, pool) for part in parts)
        with closing(parts):
            for row in pooled(sounds_crops, embed, batch, most_samples, mean=mean):
                name = names.popleft()
                yield row if isinstance(row, Tensor) else type(row)(f"{name}: {row}")


def pooled(
    sounds: Iterable[Crops],
    embed: Callable[[list[np.ndarray]], Tensor],
    batch: int,
    most_samples: float,
    *,
    mean: bool = True,
) -> Embedded:
    """Yield the mean of each sound's crops, in order; without `mean` the rows themselves, (n, d).

    Args:
        embed: R crops -> (R, d) unit rows on the CPU.
        batch: most crops that are embedded at a time.
        most_samples: most samples that are embedded at a time, unless one crop has more.
    """
    waiting: deque[_Sound] = deque()
    waves: list[np.ndarray] = []
    owners: list[_Sound] = []

    def embed_waves() -> None:
        if not waves:
            return
        rows = embed(waves)
        for n in (~rows.isfinite().all(1)).nonzero()[:, 0].tolist():
            rows[n] = embed([waves[n]])[0]  # by itself: its neighbours in the batch may be why
        for owner, row in zip(owners, rows, strict=True):
            owner.rows.append(row)
        waves.clear()
        owners.clear()

    for crops in sounds:
        sound = _Sound()
        waiting.append(sound)
        try:
            for wave in crops:
                if sum(map(len, waves)) + len(wave) > most_samples:
                    embed_waves()
                waves.append(wave)
                owners.append(sound)
                sound.crops += 1
                if len(waves) == batch:
                    embed_waves()
            sound.ended = True
        except BadSound as error:
            sound.error = error
        while waiting and waiting[0].complete:
            yield waiting.popleft().result(mean=mean)
    embed_waves()
    for sound in waiting:
        yield sound.result(mean=mean)


@dataclass
class _Sound:
    """A sound whose crops are being embedded."""

    crops: int = 0
    rows: list[Tensor] = field(default_factory=list)
    ended: bool = False
    """Whether `crops` counts all of them."""
    error: BadSound | None = None

    @property
    def complete(self) -> bool:
        """Whether there is a result."""
        return self.error is not None or (self.ended and len(self.rows) == self.crops)

    def result(self, *, mean: bool) -> Tensor | BadSound:
        """The (d,) unit row of the sound, or the rows of its crops, or its error."""
        if self.error is not None:
            return self.error
        row = self.rows[0]
        if not mean:
            row = torch.stack(self.rows)
        elif len(self.rows) > 1:
            row = functional.normalize(torch.stack(self.rows).mean(0), dim=0)
        finite = bool(row.isfinite().all())
        return row if finite else BadSound("not finite: its embedding has NaN or infinity")
