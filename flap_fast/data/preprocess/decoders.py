"""Decoders: batches of encoded clips -> decoded batches in order, several ahead."""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from flap_fast.checks import require
from flap_fast.config import Frontend
from flap_fast.data.batch import DecodedBatch, EncodedBatch, lay_end_to_end
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.progress import starting
from flap_fast.ranks import Ranks

Decode = Callable[[bytes, float], np.ndarray]
"""A clip's bytes and its crop position -> the decoded clip; raises `Unusable`."""


class ThreadedDecoder:
    """Decodes on threads. It is the reference implementation of `dali.DaliDecoder`.

    Args:
        batches: read from ahead of time.
        prefetch: batches decoded ahead.
    """

    def __init__(
        self, batches: Iterator[EncodedBatch], decode: Decode, *, threads: int, prefetch: int
    ):
        self._pool = ThreadPoolExecutor(threads)
        self._batches, self._decode, self._prefetch = batches, decode, prefetch
        self._waiting: deque[tuple[list[Future[np.ndarray]], np.ndarray]] = deque()

    def __iter__(self) -> ThreadedDecoder:
        return self

    def __next__(self) -> DecodedBatch:
        """The next batch; raises `Unusable` for one with a clip that cannot be decoded."""
        while len(self._waiting) < self._prefetch:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._waiting.append(self._begin(*batch[:2]))
        if not self._waiting:
            raise StopIteration
        clips, positions = self._waiting.popleft()
        return lay_end_to_end([clip.result() for clip in clips], positions)

    def _begin(
        self, clips: list[bytes], positions: np.ndarray
    ) -> tuple[list[Future[np.ndarray]], np.ndarray]:
        begun = [
            self._pool.submit(self._decode, clip, float(np.ravel(row)[0]))
            for clip, row in zip(clips, positions, strict=True)
        ]
        return begun, positions


def make_decoder(
    batches: Iterator[EncodedBatch],
    batch: int,
    frontend: Frontend,
    ranks: Ranks,
    *,
    decode: Decode,
    graph: Callable[[str], Any] | None,
    error: type[Unusable],
    dali_input: Callable[[bytes], bytes] | None = None,
) -> Iterator[DecodedBatch]:
    """The decoder that frontend.backend asks for.

    Args:
        batch: the most clips of a batch.
        decode: decodes one clip on a thread.
        graph: gives DALI's graph for a back end's name; None where DALI cannot decode the clips.
        error: what DALI's decoder raises for a clip that cannot be decoded.
        dali_input: makes of a clip what DALI can decode, on threads.

    Raises:
        ConfigError: DALI is asked for and not installed.
    """
    cores = max(1, (os.cpu_count() or 1) // ranks.local_world)
    ahead = {"threads": frontend.threads or cores, "prefetch": frontend.prefetch}
    if graph is None or (backend := decoding_backend(frontend)) == "torch":
        return ThreadedDecoder(batches, decode, **ahead)
    with starting("import DALI"):
        from flap_fast.data.preprocess.dali import DaliDecoder

    if dali_input is not None:
        batches = _for_dali(batches, dali_input, ahead["threads"])
    return DaliDecoder(
        batches, graph(backend), error=error, batch=batch, device=ranks.device, **ahead
    )


def _for_dali(
    batches: Iterator[EncodedBatch], dali_input: Callable[[bytes], bytes], threads: int
) -> Iterator[EncodedBatch]:
    pool = ThreadPoolExecutor(threads)

    def converted(batch: EncodedBatch) -> EncodedBatch:
        return batch._replace(clips=list(pool.map(dali_input, batch.clips)))

    return map(converted, batches)  # unlike a generator, goes on after an error


def decoding_backend(frontend: Frontend) -> str:
    """The decoding backend to use: `auto` is DALI if it is installed.

    Raises:
        ConfigError: DALI is asked for and not installed.
    """
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if frontend.backend == "auto":
        return "dali_wave" if found else "torch"
    require(
        found is not None or frontend.backend == "torch",
        "frontend.backend",
        "be 'torch' where DALI is not installed",
        frontend.backend,
        "pip install nvidia-dali-cuda130",
    )
    return frontend.backend
