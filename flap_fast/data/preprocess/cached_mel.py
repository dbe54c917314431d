"""Cached log-mels, read instead of sounds; `flap prepare --cache mel` writes them.

    KEY.npy          (t, F) float16, a clip's log-mel, not normalised: all of its frames, or those
                     of audio.duration_s where the clip is no longer and was filled (with
                     audio.length = variable, of one patch); after the array, where readers of .npy
                     files stop, the SHA-256 of all before it (not in caches of before)
    frontend.json    in the shards' folder: every setting that the numbers depend on

A longer clip is cropped at a frame (10 ms), which Kaldi's frames allow: each sees only its 25 ms of
sound. Statistics and rows of zeros come with the batch, so that they may still be changed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flap_fast.checks import ConfigError, require
from flap_fast.config import Audio, Config
from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.files import parsed_json

SETTINGS_FILE = "frontend.json"
_MAGIC = b"\x93NUMPY"
# What settings say that do not name the length.
_FIXED = {"length": "fixed"}
_INFINITE = 0x7C00  # the exponent of fp16's infinities and NaNs


def front_end_settings(audio: Audio) -> dict[str, Any]:
    """The settings of `audio` that a cached log-mel depends on."""
    return audio.front_end()


def npy_of(mel: np.ndarray) -> bytes:
    """A log-mel (t, F) as the bytes of KEY.npy."""
    file = io.BytesIO()
    np.save(file, mel.astype(np.float16))
    data = file.getvalue()
    return data + hashlib.sha256(data).digest()


def crop_cached(data: bytes, position: float, audio: Audio) -> np.ndarray:
    """(t, F) float16: a cached log-mel, cropped as its sound would be; raises `BadSound`.

    From frame `floor(position * (frames - t + 1))`, as `waveform.crop` from a sample.
    """
    if not data.startswith(_MAGIC):  # np.load would take a zip, or a pickle, as well
        raise BadSound("unreadable: no cached log-mel: it does not begin as .npy does")
    file = io.BytesIO(data)
    try:
        mel = np.load(file, allow_pickle=False)
    except Exception as error:  # the header is Python, and its faults are of any kind
        raise BadSound(f"unreadable: no cached log-mel: {error}") from None
    end = file.tell()
    if end < len(data) and data[end:] != hashlib.sha256(memoryview(data)[:end]).digest():
        raise BadSound("unreadable: a cached log-mel that changed since it was written (SHA-256)")
    most, least = (audio.frames_of(n) for n in (audio.samples, audio.least_samples))
    whole = mel.ndim == 2 and len(mel) >= least
    if not whole or mel.shape[1] != audio.mel_bins or mel.dtype != np.float16:
        raise BadSound(f"unreadable: a cached log-mel of {mel.shape} {mel.dtype}")
    if (mel.view(np.uint16) & _INFINITE == _INFINITE).any():  # np.isfinite takes ten times as long
        raise BadSound("unreadable: a cached log-mel that is not finite")
    start = int(np.floor(np.float64(position) * (max(0, len(mel) - most) + 1)))
    return mel[start : start + most]


def check_front_end(files: Mapping[str, Path | None], config: Config) -> None:
    """Raise `ConfigError` where log-mels were cached with other settings.

    Args:
        files: the frontend.json of each folder of shards, by the folder's name.
    """
    audio, fusion = config.audio, config.fusion
    rule = "be none with cached log-mels, which hold no whole clips"
    require(not fusion.on, "fusion.type", rule, fusion.type, "train on the sounds' shards")
    wanted = _FIXED | front_end_settings(audio)
    remedy = "cache them again with this config (flap prepare --cache mel --config), or train on"
    for folder, file in files.items():
        try:
            if file is None:
                raise FileNotFoundError("there is no such file")
            found = {**_FIXED, **parsed_json(file.read_bytes())}
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder}/{SETTINGS_FILE} must say how the log-mels were cached: {error}"
            ) from None
        # The length comes first: which other settings there are follows from it.
        for name in sorted(found.keys() | wanted.keys(), key=lambda name: (name != "length", name)):
            rule = f"be {found.get(name)!r}, as in the log-mels cached in '{folder}'"
            same = found.get(name) == wanted.get(name)
            require(same, f"audio.{name}", rule, wanted.get(name), f"{remedy} the sounds' shards")
