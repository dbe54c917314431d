"""Log-mels computed once, in fp16, and stored in shards instead of sounds.

The format, and how training reads it: `flap_fast.data.preprocess.cached_mel`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from flap_fast.checks import require
from flap_fast.config import Audio
from flap_fast.data.preprocess.cached_mel import SETTINGS_FILE, front_end_settings, npy_of
from flap_fast.data.preprocess.front_end import log_mel
from flap_fast.data.preprocess.log_mel import LogMel
from flap_fast.data.preprocess.waveform import BadSound, fill, joined, read_sound
from flap_fast.preparation.encoding import EncodedImage, FlacEncoder, checked_blocks, read_source
from flap_fast.preparation.manifest import Entry


@dataclass(frozen=True)
class CachedMelEncoder:
    """A `ClipEncoder` of log-mels of one front end."""

    audio: Audio

    def __post_init__(self):
        rule = "be kaldi to be cached: the others' frames depend on where a crop ends"
        require(self.audio.mel == "kaldi", "audio.mel", rule, self.audio.mel)

    @property
    def identity(self) -> dict[str, Any]:
        return front_end_settings(self.audio)

    @property
    def metadata_files(self) -> dict[str, bytes]:
        return {SETTINGS_FILE: (json.dumps(self.identity, indent=1) + "\n").encode()}

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """One thread an operation: clips are many, and sums come in one order."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @cached_property
    def _mel(self) -> LogMel:
        return log_mel(self.audio)

    def encode(self, entry: Entry) -> tuple[str, bytes]:
        """The log-mel of the sound that training would read; raises `BadSound`."""
        source = read_source(entry)
        if isinstance(source, EncodedImage):
            raise BadSound("an image: it has no log-mel")
        rate = self.audio.sample_rate_hz
        if isinstance(source, bytes):
            wave = joined(checked_blocks(entry, source, rate))
        else:  # of a file through the 16 bits of the shard that stands for it
            wave = read_sound(FlacEncoder(rate).encode(entry)[1], rate)
        return "npy", npy_of(log_mel_of(wave, self._mel, self.audio))


def log_mel_of(wave: np.ndarray, mel: LogMel, audio: Audio) -> np.ndarray:
    """(t, F) float32: all frames of a clip, or of the clip filled to the least that training takes.

    In pieces as long as training's crops, the last one ending with the last frame: they are what
    the front end gives for crops that begin there.
    """
    wave = fill(wave, max(audio.least_samples, len(wave)), audio.filling)
    total = audio.frames_of(len(wave))
    chunk = min(total, audio.frames_of(audio.samples))
    rows = np.empty((total, audio.mel_bins), np.float32)
    for start in [*range(0, total - chunk, chunk), total - chunk]:
        at = start * audio.hop
        piece = torch.from_numpy(wave[at : at + audio.samples])
        whole = mel.whole(piece[None], torch.tensor([len(piece)]))
        rows[start : start + chunk] = whole[0, :chunk].numpy()
    return rows
