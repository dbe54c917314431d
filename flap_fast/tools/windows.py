"""Windows of sounds: embeddings with time stamps.

Windows are written `SECONDS[:HOP]`, as in 5:2.5: windows of 5 s, of which one begins every 2.5 s.
`auto` is audio.duration_s, and half a window the hop that is not given: what is cut by the border
of one window is in the middle of the next. Where no window ends with the sound, one more does, so
that all of it is covered by whole windows; a sound shorter than a window is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.tools.pooling import Embedded
from flap_fast.tools.sounds import Part, Sound, decode_part, default_crop, pieces_of

if TYPE_CHECKING:
    from flap_fast.tools.embedder import Embedder

_POLICY = "windows:"

# The shortest hop: 100 rows for a second of sound.
_LEAST_HOP_S = 0.01

# Of a window: a sound is not longer by so much, as headers and resampling round.
_SLACK = 1e-4


class WindowRows(NamedTuple):
    """The windows of a sound."""

    spans_s: Tensor
    """(n, 2) float64: where each begins and ends, in seconds."""
    rows: Tensor
    """(n, d) unit rows."""


EmbeddedWindows = Generator[WindowRows | BadSound]
"""The windows of each sound, or the error that it has instead."""


def window_policy(windows: str, config: Config) -> str:
    """Return windows as a crop policy, `windows:SECONDS:HOP`, as indices and chunks have it."""
    seconds, hop = window_seconds(windows, config)
    return f"{_POLICY}{seconds:g}:{hop:g}"


def chosen_crop(config: Config, crop: str | None, windows: str | None) -> str:
    """Return the crop policy that a command's --crop and --windows mean; not both may be given."""
    if windows is None:
        return crop or default_crop(config)
    require(crop is None, "--crop", "be left out with --windows", crop)
    return window_policy(windows, config)


def is_windows(crop: str) -> bool:
    """Whether a crop policy is one of windows."""
    return crop.startswith(_POLICY)


def window_seconds(windows: str, config: Config) -> tuple[float, float]:
    """Parse `SECONDS[:HOP]` or `auto[:HOP]`.

    Raises:
        ConfigError: no such text, a window longer than the model takes, or a hop longer than it.
    """
    first, colon, second = str(windows).partition(":")
    rule = "be SECONDS[:HOP] or auto[:HOP], such as 5 or 5:2.5"
    try:
        seconds = config.audio.duration_s if first == "auto" else float(first)
        hop = float(second) if colon else seconds / 2
    except ValueError:
        raise ConfigError(f"windows must {rule}, got '{windows}'") from None
    longest = config.fusion.longest(config.audio) / config.audio.sample_rate_hz
    rule = f"be in [{2 * _LEAST_HOP_S:g}, {longest:g}] s, which the model takes at a time"
    require(2 * _LEAST_HOP_S <= seconds <= longest, "a window", rule, seconds)
    rule = f"be in [{_LEAST_HOP_S:g}, {seconds:g}] s, so that windows leave out nothing"
    require(_LEAST_HOP_S <= hop <= seconds, "the hop of windows", rule, hop)
    return seconds, hop


def window_starts(length: int, samples: int, hop: int) -> list[int]:
    """Return the first sample of each window of a sound with so many samples."""
    starts = list(range(0, max(0, length - samples) + 1, hop))
    if length - starts[-1] - samples > _SLACK * samples:
        starts.append(length - samples)
    return starts


def window_decoder(
    config: Config, windows: str, rate_hz: float
) -> tuple[Callable[[tuple[int, Sound]], Part], dict[int, Tensor]]:
    """Return a function that decodes a numbered sound's windows, and the dict of their times."""
    rate = config.audio.sample_rate_hz
    samples, hop = (max(1, round(s * rate)) for s in window_seconds(windows, config))
    spans_s: dict[int, Tensor] = {}

    def decode(numbered: tuple[int, Sound]) -> Part:
        number, sound = numbered

        def starts(length: int) -> list[int]:
            found = torch.tensor(window_starts(length, samples, hop), dtype=torch.float64)
            spans_s[number] = torch.stack([found, (found + samples).clamp(max=length)], 1) / rate
            return found.long().tolist()

        return decode_part(pieces_of(sound, rate_hz, samples, starts, config))

    return decode, spans_s


def with_spans(rows: Embedded, spans_s: dict[int, Tensor]) -> EmbeddedWindows:
    """Yield the rows of each sound's windows with their times, or its error."""
    with closing(rows):
        for number, found in enumerate(rows):
            its = spans_s.pop(number, None)
            if isinstance(found, BadSound):
                yield found
            else:
                assert its is not None
                yield WindowRows(its, found)


def embed_cropped(
    embedder: Embedder, sounds: Iterable[Sound], batch: int, crop: str
) -> Generator[Tensor | WindowRows | BadSound]:
    """Yield what a crop policy gives of each sound: a (d,) row, or with windows `WindowRows`."""
    if is_windows(crop):
        return embedder.embed_windows(sounds, crop.removeprefix(_POLICY), batch)
    return embedder.embed_each(sounds, batch, crop=crop)


def suppress(files: Tensor, spans_s: Tensor) -> Iterator[int]:
    """Yield the numbers of windows, best first, that overlap none yielded before.

    Non-maximum suppression: what several windows of one file hear, the best of them stands for.

    Args:
        files: (n,) numbers of their files.
        spans_s: (n, 2) where each begins and ends.
    """
    taken: dict[int, list[tuple[float, float]]] = {}
    for n, (file, (start, end)) in enumerate(zip(files.tolist(), spans_s.tolist(), strict=True)):
        kept = taken.setdefault(file, [])
        if all(end <= other_start or other_end <= start for other_start, other_end in kept):
            kept.append((start, end))
            yield n


def time_text(span_s: tuple[float, float]) -> str:
    """Return a span as `12.5-17.5 s`."""
    start, end = (f"{math.floor(100 * s + 0.5) / 100:.2f}".rstrip("0").rstrip(".") for s in span_s)
    return f"{start}-{end} s"
