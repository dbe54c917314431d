"""Sounds, or cached log-mels -> the audio encoder's input.

bytes -> decode, crop, fill    waveform.py on threads, or dali.py     waves end to end
      -> log-mel, fusion       front_end.py                           (B, 1 or 4, T, F), or packed
      -> normalise             log_mel.py
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import soundfile

from flap_fast.config import Config
from flap_fast.data.batch import DecodedBatch, EncodedBatch, MediaInput, PackedMels, lay_end_to_end
from flap_fast.data.preprocess.cached_mel import SETTINGS_FILE, check_front_end, crop_cached
from flap_fast.data.preprocess.dali_input import dali_input
from flap_fast.data.preprocess.decoders import make_decoder
from flap_fast.data.preprocess.front_end import MelFrontEnd
from flap_fast.data.preprocess.kept_mels import KeptMels
from flap_fast.data.preprocess.log_mel import normalise
from flap_fast.data.preprocess.waveform import BadSound, decode_clip
from flap_fast.data.shards import Shards
from flap_fast.files import say
from flap_fast.places import shown
from flap_fast.ranks import Ranks


class AudioPreprocessor:
    """A `Preprocessor` of sounds: log-mels (B, 1, T, F), (B, 4, T, F) with fusion, or packed.

    Raises:
        ConfigError: shards of log-mels that were cached with other settings.
    """

    def __init__(self, config: Config, ranks: Ranks, shards: Shards | None = None):
        self._config, self._ranks = config, ranks
        self._front_end = MelFrontEnd(config.audio, config.fusion, ranks.device)
        self._cached = shards is not None and shards.kind == "mels"
        on_cpu, cache_mib = ranks.device.type == "cpu", config.frontend.cache_mib
        self._keeps_mels = config.audio.variable and on_cpu and not self._cached and cache_mib > 0
        if shards is None:
            return
        if self._cached:
            folders = dict.fromkeys(file.parent for file in shards.files)
            found = {shown(folder): shards.beside(folder, SETTINGS_FILE) for folder in folders}
            check_front_end(found, config)
        elif ranks.first and len(shards):
            _warn_of_rate(shards, config.audio.sample_rate_hz)

    def stream(self, batches: Iterator[EncodedBatch], batch: int) -> Iterator[MediaInput]:
        """Preprocess batches in order; raises `BadSound` when it reaches a bad clip."""
        decoder = functools.partial(
            make_decoder,
            batch=batch,
            frontend=self._config.frontend,
            ranks=self._ranks,
            decode=self._decode,
            graph=None if self._cached else self._dali_graph,
            error=BadSound,
            dali_input=dali_input,
        )
        # Unlike a generator, `map` goes on after it has raised.
        if not self._keeps_mels:
            return map(self.finish, decoder(batches))
        front_end, most = self._front_end, self._config.frontend.cache_mib * 2**20
        mels = KeptMels(batches, decoder, front_end.mels, front_end.are_whole, most)
        return map(self._normalised, map(front_end.packed, mels))

    def check(self, clip: bytes) -> None:
        """Raise `BadSound` if a clip cannot be decoded."""
        self._decode(clip, 0.0)

    def decode(self, clips: Sequence[bytes], positions: np.ndarray) -> MediaInput:
        """Preprocess one batch at once, on this thread; raises `BadSound`."""
        pairs = zip(clips, positions[:, 0].tolist(), strict=True)
        return self.finish(lay_end_to_end([self._decode(*pair) for pair in pairs], positions))

    def finish(self, decoded: DecodedBatch) -> MediaInput:
        """The normalised log-mels of waveforms, or of log-mels as long as they are."""
        media, longer = self._front_end(decoded)
        if isinstance(media, PackedMels):
            return self._normalised(media)
        return MediaInput(normalise(media, self._config.audio), longer)

    def _normalised(self, packed: PackedMels) -> MediaInput:
        return MediaInput(packed._replace(mel=normalise(packed.mel, self._config.audio)), None)

    def _decode(self, clip: bytes, position: float) -> np.ndarray:
        """One clip's waveform (samples,), or its cached log-mel (frames, F), cropped."""
        audio = self._config.audio
        if self._cached:
            return crop_cached(clip, position, audio)
        return decode_clip(clip, position, audio, self._config.fusion)

    def _dali_graph(self, backend: str) -> Any:
        from flap_fast.data.preprocess.dali import audio_graph

        return audio_graph(self._config.audio, self._config.fusion, mel=backend == "dali_mel")


def _warn_of_rate(shards: Shards, wanted_hz: int) -> None:
    """Warn of sounds prepared at a lower rate than the front end's, judged by their first clip."""
    try:
        rate = soundfile.info(io.BytesIO(shards.encoded(0))).samplerate  # type: ignore[arg-type]
    except soundfile.LibsndfileError:
        return  # reported at its turn
    if rate < wanted_hz:
        _warn_once(shown(shards.folder(0)), rate, wanted_hz)


@functools.cache  # once a process: each evaluation makes a new preprocessor
def _warn_once(folder: str, rate_hz: int, wanted_hz: int) -> None:
    say(
        f"{folder} holds sounds at {rate_hz} Hz and audio.sample_rate_hz is {wanted_hz}: above "
        f"{rate_hz // 2} Hz the model hears silence; prepare them for it: flap prepare --config",
        error=True,
    )
