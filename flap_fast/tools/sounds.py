"""Sounds as users pass them -> waveforms at the model's rate, in crops of the model's length."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.data.preprocess.sound_file import LOWEST_HZ, MOST_CHANNELS, QUIETEST
from flap_fast.data.preprocess.waveform import (
    BadSound,
    Starts,
    Unusable,
    crop_and_fill,
    crop_positions,
    crop_start,
    mono_at,
    read_pieces,
    window_counts,
)
from flap_fast.tools.inputs import file_or_bytes, listed, require_batch, shown

Array = np.ndarray | Tensor
Waveform = Array | tuple[Array, float] | Mapping[str, Any]
Sound = str | os.PathLike[str] | bytes | BinaryIO | Waveform | Any
"""A file, the bytes of one, or an open one; a waveform, at the rate that the call gives or at the
model's; a waveform with its rate, as librosa, torchaudio and soundfile load them; a row of an Audio
column of Hugging Face datasets: {"array": .., "sampling_rate": ..}, not decoded {"bytes": ..,
"path": ..}, or a decoder of torchcodec (with `get_all_samples`), or what that gives."""

_RULE = "be a file, its bytes, a waveform, a pair of waveform and rate, or a row of an Audio column"

Crops = Iterator[np.ndarray]
"""Crops of a sound, (samples,) float32 each; with fusion, their lengths differ. Raises `BadSound`,
also after some of them: a file is read as its crops are taken."""

_ARRAYS = (np.ndarray, Tensor)

# Crops of one sound that are decoded ahead: an hour has hundreds.
PART = 16


def refuse_one_waveform(sounds: Any) -> None:
    """Raise `TypeError` for an array that is a waveform, not a list of them.

    Its samples, or the few channels of each, would be embedded as sounds.
    """
    shape = tuple(getattr(sounds, "shape", ()))
    numbers = getattr(getattr(sounds, "dtype", None), "kind", "f") in "biufc"  # PyTorch has none
    if numbers and (len(shape) == 1 or (len(shape) == 2 and shape[1] <= MOST_CHANNELS)):
        raise TypeError(f"sounds must be a list, got one waveform of shape {shape}: put it in []")


def checked_rate(config: Config, sounds: Any, batch: int, sample_rate_hz: float | None) -> float:
    """Return the rate of waveforms without one; raises unless such sounds can be embedded."""
    refuse_one_waveform(listed(sounds, "sounds"))
    require_batch(batch)
    modality = config.encoder.modality
    rule, remedy = "have an audio encoder to embed sounds", f"call embed_{modality}"
    require(modality == "audio", "the model", rule, f"an {modality} encoder", remedy)
    return config.audio.sample_rate_hz if sample_rate_hz is None else sample_rate_hz


def default_crop(config: Config) -> str:
    """Return how commands crop long sounds: `center`, or `whole` where clips are taken whole."""
    return "whole" if config.audio.variable else "center"


def crop_policy(config: Config, crop: str | None) -> str:
    """Return how long sounds are cropped: `crop`, or eval.crop; `center` if that is random.

    Raises:
        ConfigError: it is none of center, multi:K and whole.
    """
    policy = crop or ("center" if config.eval.crop == "random" else config.eval.crop)
    known = re.fullmatch(r"center|whole|multi:[1-9]\d*", str(policy))
    require(bool(known), "crop", "be center, multi:K or whole", policy)
    return policy


def crop_count(policy: str) -> int:
    """Return the number of crops of a long sound, unless the policy is `whole`."""
    return int(policy[6:]) if policy.startswith("multi:") else 1


def crops_of(sound: Sound, rate_hz: float, policy: str, config: Config) -> Crops:
    """Yield the crops of a sound that the model embeds; of a file only these are kept.

    Args:
        rate_hz: rate of a waveform that has no rate of its own.

    Raises:
        BadSound: the sound cannot be used; the message does not name it.
    """
    longest = config.fusion.longest(config.audio)

    def starts(length: int) -> list[int]:
        crops = int(window_counts(length / longest)) if policy == "whole" else crop_count(policy)
        positions = crop_positions(crops if length > longest else 1)
        return [crop_start(length, longest, float(at)) for at in positions]

    return pieces_of(sound, rate_hz, longest, starts, config)


def pieces_of(sound: Sound, rate_hz: float, samples: int, starts: Starts, config: Config) -> Crops:
    """Yield pieces of a sound, at most so many samples from each start, as the model takes them.

    Raises:
        BadSound: the sound cannot be used; the message does not name it.
    """
    audio = config.audio
    try:
        source = file_or_bytes(sound)
        if isinstance(source, (Path, bytes)):
            pieces = read_pieces(source, audio.sample_rate_hz, samples, starts)
        else:
            wave = _waveform(source, rate_hz, audio.sample_rate_hz)
            # Copies: a view of a piece would keep the whole recording in memory.
            pieces = (wave[start : start + samples].copy() for start in starts(len(wave)))
        for piece in pieces:
            yield crop_and_fill(piece, 0.0, audio, config.fusion)
    except BadSound:
        raise
    except Unusable as error:
        raise BadSound(str(error)) from None


def sound_name(sound: Any, number: int, what: str = "sound") -> str:
    """Return a sound's or image's path, or its number in its list, for error messages."""
    named = isinstance(sound, (str, os.PathLike))
    return str(sound) if named else f"{what} number {number}"


@dataclass(frozen=True)
class Part:
    """Some of a sound's crops, decoded."""

    crops: list[np.ndarray]
    rest: Crops
    """Those behind them, not decoded."""
    error: BadSound | None
    """Why there are no more of them, if they cannot be read."""


def decode_part(crops: Crops) -> Part:
    """Decode the next `PART` crops of a sound, or all if there are fewer."""
    decoded: list[np.ndarray] = []
    try:
        decoded.extend(islice(crops, PART))
    except BadSound as error:
        return Part(decoded, crops, error)
    return Part(decoded, crops, None)


def crops_from(part: Part, pool: ThreadPoolExecutor) -> Crops:
    """Yield the crops of a part, then the rest; the next part is decoded while one is taken."""
    while True:
        more = pool.submit(decode_part, part.rest) if len(part.crops) == PART else None
        yield from part.crops
        if part.error:
            raise part.error
        if more is None:
            return
        part = more.result()


def _waveform(sound: Any, rate_hz: float, sample_rate_hz: int) -> np.ndarray:
    """Return a waveform as (samples,) float32 at the model's rate; raises `BadSound`."""
    sound, rate_hz = _with_rate(sound, rate_hz)
    if not isinstance(rate_hz, Real) or not 0 < rate_hz < math.inf:
        raise BadSound(f"a waveform's rate must be a number of hertz above 0, got {shown(rate_hz)}")
    if rate_hz < LOWEST_HZ:
        raise BadSound(f"a waveform's rate must be {LOWEST_HZ} Hz or more, got {rate_hz:g} Hz")
    if isinstance(sound, Tensor):  # NumPy has no bfloat16
        sound = (sound.float() if sound.is_floating_point() else sound).detach().cpu()
    try:
        wave = np.asarray(sound)
    except ValueError as error:
        raise BadSound(f"a waveform must be an array of numbers: {error}") from None
    if wave.dtype.kind not in "biufc" or (wave.ndim == 0 and not isinstance(sound, _ARRAYS)):
        raise BadSound(f"a sound must {_RULE}, got {shown(sound)}")
    if wave.ndim not in (1, 2) or not wave.size:
        rule = "be (samples,) or have channels too"
        raise BadSound(f"a waveform must {rule}, got shape {wave.shape}")
    if np.issubdtype(wave.dtype, np.signedinteger):
        dtype, wave = wave.dtype, wave / -float(np.iinfo(wave.dtype).min)
        if dtype.itemsize > 2 and 0 < np.abs(wave).max() <= QUIETEST:
            raise BadSound(
                f"a waveform of {dtype} must use more than 16 of its bits; "
                "pass 16-bit values as int16"
            )
    elif not np.issubdtype(wave.dtype, np.floating):
        raise BadSound(f"a waveform must be floats or signed integers, got {wave.dtype}")
    channels_last = (
        wave[:, None] if wave.ndim == 1 else wave if wave.shape[0] > wave.shape[1] else wave.T
    )
    return mono_at(channels_last.astype(np.float32, copy=False), rate_hz, sample_rate_hz)


def _with_rate(sound: Any, rate_hz: float) -> tuple[Any, Any]:
    """Return the array of a waveform, and its own rate or, without one, `rate_hz`."""
    if isinstance(sound, Mapping):
        if sound.get("array") is None or "sampling_rate" not in sound:
            rule = "have 'array' and 'sampling_rate', or 'bytes' or 'path'"
            column = "; pass the cell of its column 'audio'" if "audio" in sound else ""
            raise BadSound(f"a mapping must {rule}, got {list(sound)}{column}")
        return sound["array"], sound["sampling_rate"]
    if isinstance(sound, tuple):
        if len(sound) != 2:
            rule = "be an array or a pair of array and rate"
            raise BadSound(f"a waveform must {rule}, got {len(sound)} items")
        return sound
    if hasattr(sound, "get_all_samples"):
        try:
            sound = sound.get_all_samples()
        except (RuntimeError, ValueError, OSError) as error:
            raise BadSound(f"unreadable: {error}") from None
    if hasattr(sound, "data") and hasattr(sound, "sample_rate"):
        return sound.data, sound.sample_rate
    return sound, rate_hz
