"""The lengths of the clips that a plan or a profile is for, with audio.length = variable.

    --lengths FILE       a number of seconds a line, or a manifest's `duration_s`
    data.train           else the headers of its clips, if its folders are there
    the default mix      else WavCaps-like

WavCaps is 262,300 clips of FreeSound (mean 85.98 s), 31,201 of BBC Sound Effects (115.04 s), 1,232
of SoundBible (13.12 s) and 108,317 of AudioSet (10 s each): 67.59 s on average. The means are
published, the spread is not: a lognormal with sigma = 2 is assumed of all but AudioSet.

Source: Mei et al., WavCaps, arXiv 2303.17395.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from flap_fast.checks import read_text, require
from flap_fast.config import Audio, Config
from flap_fast.data.enriched import CaptionChoice
from flap_fast.data.lengths import clip_seconds
from flap_fast.data.sampler import Sampler
from flap_fast.data.shards import open_shards, shard_kinds
from flap_fast.places import Place, Url, is_pattern
from flap_fast.ranks import Ranks

# Clips and mean seconds of WavCaps' sources whose clips differ.
_WAVCAPS = ((262_300, 85.98), (31_201, 115.04), (1_232, 13.12))
_AUDIOSET = 108_317
_SIGMA = 2.0
# Clips that stand for one of the default mix.
_CLIPS_OF_ONE = 50


@dataclass(frozen=True)
class LengthMix:
    """Lengths of clips, before cropping."""

    source: str
    """What they are of, in words."""
    seconds: np.ndarray
    """(N,) float64, ascending, above 0."""

    def spread(self, clips: int) -> np.ndarray:
        """(clips,) float64: quantiles at equal steps, so that any number stands for the mix."""
        at = (np.arange(clips) + 0.5) / clips * len(self.seconds)
        return self.seconds[at.astype(np.int64)]

    def summary(self, config: Config) -> dict[str, Any]:
        """What is printed of the mix."""
        longest = config.audio.max_duration_s
        return {
            "source": self.source,
            "clips": len(self.seconds),
            "mean_s": float(self.seconds.mean()),
            "median_s": float(np.median(self.seconds)),
            "longest_s": float(self.seconds[-1]),
            "cropped": float((self.seconds > longest).mean()),
        }


def has_lengths(config: Config) -> bool:
    """Whether clips have lengths of their own."""
    return config.encoder is config.audio and config.audio.variable


def length_mix(config: Config, file: Path | None = None) -> LengthMix | None:
    """The mix of a config's clips; None where all have one length.

    Args:
        file: of --lengths.

    Raises:
        ConfigError: a file that cannot be read, or one where all clips have one length.
        ShardError: a folder of data.train is not one of shards.
    """
    if not has_lengths(config):
        rule = "be left out where all clips have one length"
        require(file is None, "--lengths", rule, file, "or set audio.length=variable")
        return None
    if file is not None:
        return LengthMix(str(file), np.sort(read_lengths(file)))
    if config.data.train and all(map(_is_there, config.data.train_places)):
        shards = open_shards(config.data.train, shard_kinds(config), config.data)
        seconds = clip_seconds(shards, Ranks())
        if shards.sets:  # each as often as an epoch takes it
            choice = CaptionChoice(config.data, shards)
            samples = Sampler(choice.files, 1, config.run.seed, parts=choice.parts).taken(0)
            seconds = seconds[choice.clips(samples, [0.0] * len(samples))[0]]
        seconds = seconds[seconds > 0]  # training replaces a clip that cannot be read
        rule = "hold a clip whose header says how long it is"
        require(len(seconds) > 0, "data.train", rule, "none", "give --lengths")
        return LengthMix("data.train", np.sort(seconds))
    return wavcaps_like()


def _is_there(place: Place) -> bool:
    """Whether a plan can read shards: a config may name a folder of another machine."""
    return isinstance(place, Url) or place.exists() or is_pattern(place)


def read_lengths(file: Path) -> np.ndarray:
    """(N,) float64 seconds, of a number a line or of the `duration_s` of JSON objects.

    Raises:
        ConfigError: no such file, or a line that is neither.
    """
    found = []
    for number, line in enumerate(read_text("--lengths", file).splitlines(), 1):
        if line.strip():
            rule = "be seconds above 0, or a JSON object with duration_s"
            seconds = _seconds(line)
            require(0 < seconds < math.inf, f"--lengths {file}, line {number},", rule, line[:80])
            found.append(seconds)
    require(bool(found), "--lengths", "hold at least one length", file)
    return np.array(found)


def _seconds(line: str) -> float:
    """A line's seconds; NaN if it says none."""
    try:
        value = json.loads(line)
        return float(value["duration_s"] if isinstance(value, dict) else value)
    except (ValueError, TypeError, KeyError):
        return math.nan


def wavcaps_like() -> LengthMix:
    """The default mix: see the module's docstring."""
    seconds = [np.full(_AUDIOSET // _CLIPS_OF_ONE, 10.0)]
    for clips, mean in _WAVCAPS:
        count = clips // _CLIPS_OF_ONE
        normal = [NormalDist().inv_cdf((n + 0.5) / count) for n in range(count)]
        seconds.append(mean * np.exp(_SIGMA * np.array(normal) - _SIGMA**2 / 2))
    return LengthMix("a WavCaps-like default", np.sort(np.concatenate(seconds)))


def frames_of(config: Config, seconds: np.ndarray) -> tuple[int, ...]:
    """The frames of clips in the encoder's input, ascending; see `PackedMels.frames`."""
    audio = config.audio
    held = audio.frames_of(_samples(audio, seconds))
    return tuple(np.sort(audio.padded_frames(held)).tolist())


def sound_frames(config: Config, seconds: np.ndarray) -> int:
    """Frames of clips that hold sound: without what fills their last patches."""
    audio = config.audio
    return int(audio.frames_of(_samples(audio, seconds)).sum())


def _samples(audio: Audio, seconds: np.ndarray) -> np.ndarray:
    samples = np.rint(seconds * audio.sample_rate_hz).astype(np.int64)
    return samples.clip(audio.least_samples, audio.samples)
