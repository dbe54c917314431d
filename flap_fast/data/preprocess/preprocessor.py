"""The interface of preprocessors, and the choice between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from flap_fast.config import Config
from flap_fast.data.batch import DecodedBatch, EncodedBatch, MediaInput
from flap_fast.data.preprocess.audio import AudioPreprocessor
from flap_fast.data.preprocess.image import ImagePreprocessor
from flap_fast.data.shards import Shards
from flap_fast.ranks import Ranks


class Preprocessor(Protocol):
    """Turns encoded clips into the encoder's input, for training, evaluation and tools alike."""

    def stream(self, batches: Iterator[EncodedBatch], batch: int) -> Iterator[MediaInput]:
        """Preprocess batches in order, several decoded ahead.

        A batch with a clip that cannot be decoded raises `Unusable` at its turn; the next follows.

        Args:
            batch: the most clips of a batch.
        """
        ...

    def check(self, clip: bytes) -> None:
        """Raise `Unusable` if a clip cannot be decoded."""
        ...

    def decode(self, clips: Sequence[bytes], positions: np.ndarray) -> MediaInput:
        """Preprocess one batch at once, on this thread; raises `Unusable`."""
        ...

    def finish(self, decoded: DecodedBatch) -> MediaInput:
        """The encoder's input of a decoded batch, on the device."""
        ...


_OF_MODALITY = {"audio": AudioPreprocessor, "image": ImagePreprocessor}


def make_preprocessor(config: Config, ranks: Ranks, shards: Shards | None = None) -> Preprocessor:
    """The preprocessor for the config's encoder.

    Args:
        shards: where the clips come from; without, any encoded clips.

    Raises:
        ConfigError: shards of log-mels that were cached with other settings.
    """
    return _OF_MODALITY[config.encoder.modality](config, ranks, shards)
