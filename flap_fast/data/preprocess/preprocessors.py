"""Preprocessors of sounds and of images: encoded clips -> what an encoder is given.

The loader asks both for the same, so order, resuming and repairs are the same for both:

    stream     batches of bytes -> batches on the device, decoded ahead
    check      whether a clip's bytes can be decoded
    together   a batch decoded here and now, for repairs
    finish     a batch -> the tower's input, float32
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.preprocess.cached_mel import check_front_end
from flap_fast.data.preprocess.decode import Encoded, backend, log_mels, reader
from flap_fast.data.preprocess.front_end import MediaInput, MelFrontEnd, to_device, together
from flap_fast.data.preprocess.image import PillowDecoder, normalise_image, read_image
from flap_fast.data.preprocess.mel import normalise
from flap_fast.data.shards import Shards
from flap_fast.encoders.settings import ImageEncoder
from flap_fast.ranks import Ranks


class AudioPreprocessor:
    """Sounds -> log-mels (B, 1, T, F), or (B, 4, T, F) with fusion."""

    def __init__(self, config: Config, ranks: Ranks, shards: Shards):
        """Raises `ConfigError` where log-mels were cached otherwise than the config asks for."""
        if shards.kind == "mels":
            check_front_end([file.parent for file in shards.files], config)
        self._config, self._ranks, self._kind = config, ranks, shards.kind
        self._mel = MelFrontEnd(config.audio, config.fusion, ranks.device)
        self._read = reader(shards.kind, config.audio, config.fusion)
        if ranks.first and shards.kind == "sounds" and len(shards):
            _warn_of_rate(shards, config.audio.sample_rate_hz)

    def stream(self, batches: Iterator[Encoded], batch: int) -> Iterator[MediaInput]:
        """Raises `BadSound` at the turn of a batch with a clip that cannot be decoded."""
        return log_mels(
            batches,
            mel=self._mel,
            frontend=self._config.frontend,
            batch=batch,
            local_ranks=self._ranks.local_world,
            shards=self._kind,
        )

    def check(self, sound: bytes) -> None:
        """Raises `BadSound`."""
        self._read(sound, 0.0)

    def together(self, sounds: Sequence[bytes], where: np.ndarray) -> MediaInput:
        """Raises `BadSound`."""
        pairs = zip(sounds, where[:, 0].tolist(), strict=True)
        return self._mel(together([self._read(sound, at) for sound, at in pairs], where))

    def finish(self, heard: MediaInput) -> MediaInput:
        """Normalised."""
        return MediaInput(normalise(heard.media, self._config.audio), heard.longer)


def _warn_of_rate(shards: Shards, wanted_hz: int) -> None:
    """Say where sounds were prepared at a lower rate than the front end's, by their first clip."""
    try:
        rate = soundfile.info(io.BytesIO(shards.sound(0))).samplerate  # type: ignore[arg-type]
    except soundfile.LibsndfileError:
        return  # reported at its turn
    if rate < wanted_hz:
        _say_rate(shards.files[shards.place[0, 0]].parent, rate, wanted_hz)


@functools.cache  # once a process: each evaluation listens anew
def _say_rate(folder: Path, rate_hz: int, wanted_hz: int) -> None:
    print(
        f"{folder} holds sounds at {rate_hz} Hz and audio.sample_rate_hz is {wanted_hz}: above "
        f"{rate_hz // 2} Hz the model hears silence; prepare them for it: flap prepare --config",
        file=sys.stderr,
    )


class ImagePreprocessor:
    """Pictures -> squares (B, R, R, 3) uint8 -> (B, 3, R, R)."""

    def __init__(self, config: Config, image: ImageEncoder, ranks: Ranks):
        self._frontend, self._image, self._ranks = config.frontend, image, ranks
        # Made once: a copy to a GPU in each step would have the host wait.
        self._mean, self._std = (
            torch.tensor(of, device=ranks.device) for of in (image.mean, image.std)
        )

    def stream(self, batches: Iterator[Encoded], batch: int) -> Iterator[MediaInput]:
        """Raises `BadImage` at the turn of a batch with a picture that cannot be decoded."""
        pictures = (encoded for encoded, _ in batches)
        cores = max(1, (os.cpu_count() or 1) // self._ranks.local_world)
        threads, ahead = self._frontend.threads or cores, self._frontend.prefetch
        if backend(self._frontend) == "torch":
            decoder = PillowDecoder(pictures, self._image, threads=threads, prefetch=ahead)
        else:
            from flap_fast.data.preprocess.dali_image import DaliImageDecoder

            decoder = DaliImageDecoder(
                pictures,
                self._image,
                batch=batch,
                threads=threads,
                prefetch=ahead,
                device=self._ranks.device,
            )
        return _OnDevice(decoder, self._ranks.device)

    def check(self, picture: bytes) -> None:
        """Raises `BadImage`."""
        read_image(picture, self._image.resolution)

    def together(self, pictures: Sequence[bytes], where: np.ndarray) -> MediaInput:
        """Raises `BadImage`."""
        squares = [read_image(picture, self._image.resolution) for picture in pictures]
        return MediaInput(to_device(torch.from_numpy(np.stack(squares)), self._ranks.device), None)

    def finish(self, seen: MediaInput) -> MediaInput:
        """(B, 3, R, R), normalised."""
        return MediaInput(normalise_image(seen.media, self._mean, self._std), None)


def sense(config: Config, ranks: Ranks, shards: Shards) -> AudioPreprocessor | ImagePreprocessor:
    """What the config's tower is fed by from these shards."""
    if config.image is None:
        return AudioPreprocessor(config, ranks, shards)
    return ImagePreprocessor(config, config.image, ranks)


class _OnDevice:
    """An iterator, not a generator: it goes on after it has raised."""

    def __init__(self, decoder: Iterator[Tensor], device: torch.device):
        self._decoder, self._device = decoder, device

    def __iter__(self) -> _OnDevice:
        return self

    def __next__(self) -> MediaInput:
        return MediaInput(to_device(next(self._decoder), self._device), None)
