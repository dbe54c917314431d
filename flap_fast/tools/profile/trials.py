"""The order in which micro-batches are tried, and what follows from the trials.

Sizes are doubled, then the divisors of the batch are bisected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flap_fast.tools.profile.memory import divisors


@dataclass(frozen=True)
class Trial:
    """One trial: a micro-batch of `clips` clips, and whether it fits."""

    clips: int
    fits: bool
    peak_bytes: int = 0
    trial_s: float = 0.0
    clips_per_s: float = 0.0
    """Of a whole step, extrapolated from the trial."""
    tokens: int = 0
    """Of the larger micro-batch, of clips of different lengths."""


def trials(
    attempt: Callable[[int], Trial],
    *,
    batch: int,
    limit_bytes: int | None,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Trial]:
    """Yield trials until the largest micro-batch is found or the time is over.

    Args:
        batch: clips of the whole batch; above half of it, only the whole batch is tried.
        limit_bytes: trials whose expected peak is above it are not started; None starts all.
        seconds: trials that are expected to end later are not started.
    """
    until, done = clock() + seconds, []
    possible = divisors(batch)
    fits, fails, clips = 0, None, min(2, batch)
    while True:
        late = bool(done) and clock() + _expected(done, clips, "trial_s") * 2 > until
        if late:
            return
        too_much = limit_bytes is not None and _expected(done, clips, "peak_bytes") > limit_bytes
        trial = None if too_much else attempt(clips)
        if trial:
            yield trial
        if trial and trial.fits:
            done.append(trial)
            fits = clips
        else:
            fails = clips
        if fails is None:
            if fits == batch:
                return
            clips = 2 * clips if 4 * clips <= batch else batch
        else:
            between = [n for n in possible if fits < n < fails]
            if not between:
                return
            clips = between[len(between) // 2]


def largest(found: Sequence[Trial], batch: int, limit_bytes: int | None) -> dict[str, Any]:
    """The largest trial that fits, and the limit that a line through the peaks predicts.

    `micro_batch` is a valid train.micro_batch: the largest divisor of the batch that is not larger
    than the largest trial that fits; 0 if not even the smallest fits.
    """
    good = sorted((t for t in found if t.fits), key=lambda t: t.clips)
    tried = good[-1].clips if good else 0
    predicted = None
    if limit_bytes is not None and len(good) >= 2:
        slope = (good[-1].peak_bytes - good[-2].peak_bytes) / (good[-1].clips - good[-2].clips)
        if slope > 0:
            more = tried + int((limit_bytes - good[-1].peak_bytes) / slope)
            predicted = _divisor(batch, max(tried, more))
    return {
        "global_batch": batch,
        "tried": tried,
        "micro_batch": _divisor(batch, tried),
        "predicted": predicted,
        "trials": [asdict(t) for t in found],
    }


def _divisor(batch: int, most: int) -> int:
    return max((n for n in divisors(batch) if n <= most), default=0)


def _expected(done: Sequence[Trial], clips: int, what: str) -> float:
    """Value on a line through the last two trials that fit; 0 with fewer than two."""
    if len(done) < 2:
        return 0.0
    (a, b) = done[-2:]
    slope = (getattr(b, what) - getattr(a, what)) / (b.clips - a.clips)
    return getattr(b, what) + max(0.0, slope) * (clips - b.clips)
