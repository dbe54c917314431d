"""Cached log-mels: computed once, in fp16, and read instead of sounds.

    KEY.npy          (t, F) float16, a clip's log-mel, not normalised: all of its frames, or those
                     of audio.duration_s where the clip is no longer and was filled
    frontend.json    beside the shards: every setting that the numbers depend on

A longer clip is cropped at a frame (10 ms), which Kaldi's frames allow: each sees its own 25 ms of
sound alone. Statistics and rows of zeros come with the batch, so that they may still be changed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_fast.checks import ConfigError, require
from flap_fast.config import Audio, Config
from flap_fast.data.preprocess.mel import LogMel, kaldi_log_mel
from flap_fast.data.preprocess.waveform import BadSound, fill, read_sound
from flap_fast.preparation.encoding import Flac, Picture, checked_wave, read_source
from flap_fast.preparation.manifest import Entry

BESIDE = "frontend.json"
_MAGIC = b"\x93NUMPY"
_INFINITE = 0x7C00  # the exponent of fp16's infinities and NaNs


def front_end(audio: Audio) -> dict[str, Any]:
    """What a cached log-mel depends on, as the settings say it."""
    return audio.front_end()


@dataclass(frozen=True)
class CachedMel:
    """The form of shards with log-mels of one front end; see `forms.Form`."""

    audio: Audio

    def __post_init__(self):
        rule = "be kaldi to be cached: CLAP's frames mirror the sound at a crop's edges"
        require(self.audio.mel == "kaldi", "audio.mel", rule, self.audio.mel)

    @property
    def identity(self) -> dict[str, Any]:
        return front_end(self.audio)

    @property
    def beside(self) -> dict[str, bytes]:
        return {BESIDE: (json.dumps(self.identity, indent=1) + "\n").encode()}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """One thread an operation: clips are many, and sums come in one order."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @cached_property
    def _mel(self) -> LogMel:
        return kaldi_log_mel(self.audio)

    def encode(self, entry: Entry) -> tuple[str, bytes]:
        """The log-mel of what training would read; raises `BadSound`."""
        source = read_source(entry)
        if isinstance(source, Picture):
            raise BadSound("a picture: it has no log-mel")
        rate = self.audio.sample_rate_hz
        if isinstance(source, bytes):
            wave = checked_wave(entry, source, rate)
        else:  # of a file through the 16 bits of the shard that stands for it
            wave = read_sound(Flac(rate).encode(entry)[1], rate)
        buffer = io.BytesIO()
        np.save(buffer, log_mel_of(wave, self._mel).astype(np.float16))
        return "npy", buffer.getvalue()


def log_mel_of(wave: np.ndarray, mel: LogMel) -> np.ndarray:
    """(t, F) float32: all frames of a clip, or of the clip filled to audio.duration_s.

    In pieces of audio.duration_s, the last one ending with the last frame: they are what the front
    end gives for crops that begin there.
    """
    audio = mel.audio
    wave = fill(wave, audio.samples, audio.filling) if len(wave) < audio.samples else wave
    chunk = frames_of(audio.samples, audio)
    total = frames_of(len(wave), audio)
    rows = np.empty((total, audio.mel_bins), np.float32)
    for start in [*range(0, total - chunk, chunk), total - chunk]:
        at = start * audio.hop
        piece = torch.from_numpy(wave[at : at + audio.samples])
        rows[start : start + chunk] = mel(piece[None])[0, :chunk].numpy()
    return rows


def frames_of(samples: int, audio: Audio) -> int:
    """Frames that fit whole into so many samples."""
    return 1 + (samples - audio.window) // audio.hop


def crop_cached(data: bytes, where: float, audio: Audio) -> np.ndarray:
    """(t, F) float16: audio.duration_s of a cached log-mel; raises `BadSound`.

    From frame `floor(where * (frames - t + 1))`, as `sound.crop` from a sample.
    """
    if not data.startswith(_MAGIC):  # np.load would take a zip, or a pickle, as well
        raise BadSound("unreadable: no cached log-mel: it does not begin as .npy does")
    try:
        mel = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # the header is Python, and its faults are of any kind
        raise BadSound(f"unreadable: no cached log-mel: {error}") from None
    chunk = frames_of(audio.samples, audio)
    spare = len(mel) - chunk if mel.ndim == 2 else -1
    if spare < 0 or mel.shape[1] != audio.mel_bins or mel.dtype != np.float16:
        raise BadSound(f"unreadable: a cached log-mel of {mel.shape} {mel.dtype}")
    if (mel.view(np.uint16) & _INFINITE == _INFINITE).any():  # np.isfinite takes ten times as long
        raise BadSound("unreadable: a cached log-mel that is not finite")
    start = int(np.floor(np.float64(where) * (spare + 1)))
    return mel[start : start + chunk]


def check_front_end(folders: Sequence[Path], config: Config) -> None:
    """Raise `ConfigError` where the log-mels of a folder were cached with other settings."""
    audio, fusion = config.audio, config.fusion
    rule = "be none with cached log-mels, which hold no whole clips"
    require(not fusion.on, "fusion.type", rule, fusion.type, "train on the sounds' shards")
    wanted = front_end(audio)
    remedy = "cache them again with this config (flap prepare --cache mel --config), or train on"
    for folder in dict.fromkeys(folders):
        try:
            found = json.loads((folder / BESIDE).read_text())
            names = sorted(found.keys() | wanted.keys())
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{folder / BESIDE} must say how the log-mels were cached: {error}"
            ) from None
        for name in names:
            rule = f"be {found.get(name)!r}, as in the log-mels cached in '{folder}'"
            fits = found.get(name) == wanted.get(name)
            require(fits, f"audio.{name}", rule, wanted.get(name), f"{remedy} the sounds' shards")
