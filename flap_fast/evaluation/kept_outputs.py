"""Frozen encoders' outputs for the texts and clips of a run's evaluations: always the same.

    batch -> kept?  encoder, once -> (B, D) -> trained head -> (B, d)

B texts or clips   D width of the encoder   d width of the joint space
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from flap_fast.data.batch import MediaInput, to_device
from flap_fast.data.shards import Shards
from flap_fast.model.two_towers import TwoTowers
from flap_fast.places import Place
from flap_fast.ranks import Ranks


class KeptOutputs:
    """A model's encoders, of which one that is kept is run once for each batch.

    Collective: call on every rank. Whole batches are kept, and give the same bits again: a row's
    last ones may depend on the rows beside it. They are kept on the CPU, D numbers a text or crop;
    on each rank its own.

    Args:
        text: keep the text encoder's, which is frozen.
        media: keep the media encoder's, which is frozen.
    """

    def __init__(self, model: TwoTowers, ranks: Ranks, *, text: bool = False, media: bool = False):
        self._model, self._ranks = model, ranks
        self._keeps_text, self._keeps_media = text, media
        self._texts: dict[bytes, Tensor] = {}
        self._media: dict[tuple[Path | Place, ...], list[Tensor]] = {}

    def embed_text(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids and mask -> (B, d), unit norm, float32, on the ids' device."""
        if not self._keeps_text:
            return self._model.embed_text(ids, attention_mask)
        key = _digest(ids, attention_mask)
        # ZeRO 3 gathers weights in step: all ranks run the encoder, or none.
        if self._ranks.any(key not in self._texts):
            self._texts[key] = self._model.pool_text(ids, attention_mask).cpu()
        return self._model.project_text(to_device(self._texts[key], ids.device))

    def pool_media(self, shards: Shards, batches: Iterator[MediaInput]) -> Iterator[Tensor]:
        """The encoder's output (B, D) for each batch of a data set, which is read if need be.

        Args:
            batches: this rank's, the same at each call.
        """
        key = tuple(shards.files)
        kept = self._media.get(key)
        if kept is not None:
            yield from (to_device(pooled, self._ranks.device) for pooled in kept)
            return
        found = []
        for media, longer in batches:
            pooled = self._model.pool_media(media, longer=longer)
            if self._keeps_media:
                found.append(pooled.cpu())
            yield pooled
        if self._keeps_media:
            self._media[key] = found


def _digest(*tensors: Tensor) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(repr(tuple(tensor.shape)).encode())
        found.update(tensor.cpu().numpy().tobytes())
    return found.digest()
