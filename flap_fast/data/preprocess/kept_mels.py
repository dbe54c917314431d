"""Log-mels of whole clips, kept in memory, so that a clip is decoded once.

batch -> clips that are not kept -> decoder -> front end -> their log-mels
      -> clips that are kept     --------------------------------- theirs  -> the batch's
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from flap_fast.data.batch import DecodedBatch, EncodedBatch
from flap_fast.data.preprocess.waveform import Unusable


class KeptMels:
    """Iterates over the log-mels (frames, F) of batches' clips, those of a batch in its order.

    A batch with a clip that cannot be decoded raises `Unusable` at its turn; the next follows.

    Args:
        batches: with the numbers of their clips; without, they are not kept.
        decoder: gives the decoded batches of encoded ones, reading ahead.
        mels: the log-mels of a decoded batch.
        is_whole: which clips of a decoded batch were not cropped.
        most_bytes: once as much is kept, it stays, and nothing is added.
    """

    def __init__(
        self,
        batches: Iterator[EncodedBatch],
        decoder: Callable[[Iterator[EncodedBatch]], Iterator[DecodedBatch]],
        mels: Callable[[DecodedBatch], list[Tensor]],
        is_whole: Callable[[DecodedBatch], list[bool]],
        most_bytes: int,
    ):
        self._kept: dict[int | None, Tensor] = {}
        self._bytes_left = most_bytes
        self._mels, self._is_whole = mels, is_whole
        self._pending: deque[tuple[Sequence[int | None], list[Tensor | None]]] = deque()
        self._decoder = decoder(self._not_kept(batches))

    def __iter__(self) -> KeptMels:
        return self

    def __next__(self) -> list[Tensor]:
        """The log-mels of the next batch."""
        try:
            decoded = next(self._decoder)
        except Unusable:
            self._pending.popleft()
            raise
        numbers, kept = self._pending.popleft()
        new = zip(self._mels(decoded), self._is_whole(decoded), strict=True)
        return [
            self._keep(number, *next(new)) if mel is None else mel
            for number, mel in zip(numbers, kept, strict=True)
        ]

    def _not_kept(self, batches: Iterator[EncodedBatch]) -> Iterator[EncodedBatch]:
        """Yield of each batch the clips to decode.

        One at least, the shortest: DALI takes no empty batch.
        """
        for clips, positions, numbers in batches:
            numbers = numbers or [None] * len(clips)
            kept = [self._kept.get(number) for number in numbers]
            rows = [row for row, mel in enumerate(kept) if mel is None]
            if not rows:
                lengths = [len(mel) for mel in kept if mel is not None]
                rows = [lengths.index(min(lengths))]
                kept[rows[0]] = None
            self._pending.append((numbers, kept))
            yield EncodedBatch([clips[row] for row in rows], positions[rows])

    def _keep(self, number: int | None, mel: Tensor, is_whole: bool) -> Tensor:
        if (
            is_whole
            and number is not None
            and number not in self._kept
            and mel.nbytes <= self._bytes_left
        ):
            mel = mel.clone()  # not a view of the whole batch's
            self._kept[number] = mel
            self._bytes_left -= mel.nbytes
        return mel
