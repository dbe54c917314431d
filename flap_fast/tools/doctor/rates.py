"""Sounds whose spectrum ends below the front end's: of a lower rate, or resampled from one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flap_fast.tools.doctor.records import Check, Examined, Found, over_share

# Fractions of a split, and of the front end's highest frequency.
_LOWER, _UPSAMPLED, _REACHED = 0.1, 0.2, 0.85


def _lower(e: Examined) -> Iterator[Found]:
    wanted = getattr(e.config.encoder, "sample_rate_hz", 0)
    for split in e.splits:
        if split.sounds is None:
            continue
        rates = split.sounds.rate_hz
        rows = np.flatnonzero((rates < wanted) & split.sounds.read)
        found = ", ".join(f"{rate} Hz" for rate in np.unique(rates[rows])[:4].tolist())
        got = f"{found}, and audio.sample_rate_hz is {wanted}"
        yield from over_share(split, rows, got, most=_LOWER, total=int(split.sounds.read.sum()))


def _upsampled(e: Examined) -> Iterator[Found]:
    wanted = getattr(e.config.encoder, "sample_rate_hz", 0) / 2
    for split in e.splits:
        if split.sounds is None:
            continue
        sounds = split.sounds
        top = np.minimum(sounds.rate_hz / 2, wanted)
        rows = np.flatnonzero((sounds.edge_hz < _REACHED * top) & sounds.read)
        got = (
            f"half of them end below {np.median(sounds.edge_hz[rows]):.0f} Hz" if len(rows) else ""
        )
        yield from over_share(split, rows, got, most=_UPSAMPLED, total=int(sounds.read.sum()))


LOWER_RATE = Check(
    name="lower rate",
    needs="sounds",
    rule="have the front end's sample rate or a higher one",
    remedy="fetch them at a higher rate, or take a front end of theirs: above half their rate the "
    "model gets silence",
    find=_lower,
)
UPSAMPLED = Check(
    name="upsampled sounds",
    needs="sounds",
    rule=f"have a spectrum that reaches {_REACHED:.0%} of the front end's",
    remedy="go back to the originals, or take a front end of their real rate: they were resampled "
    "from a lower one, or went through a codec that cuts it off",
    find=_upsampled,
)
