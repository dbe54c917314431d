"""A frozen text encoder's outputs for the texts of a run's evaluations, which are always the same.

    (B, L) ids and mask -> kept?  text encoder, once -> (B, D) -> trained text head -> (B, d)

B texts   L tokens   D width of the text encoder   d width of the joint space
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from flap_fast.data.batch import to_device
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks


class KeptText:
    """A model's `embed_text` that runs its frozen text encoder once for each batch of texts.

    Collective: call on every rank. Whole batches are kept, and give the same bits again: a row's
    last ones may depend on the rows beside it. They are kept on the CPU, D numbers a text; on each
    rank those of its own texts.
    """

    def __init__(self, model: TwoTowers, ranks: Ranks):
        self._model, self._ranks = model, ranks
        self._pooled: dict[bytes, Tensor] = {}

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids and mask -> (B, d), unit norm, float32, on the ids' device."""
        key = _digest(ids, attention_mask)
        # ZeRO 3 gathers weights in step: all ranks run the encoder, or none.
        if self._ranks.any(key not in self._pooled):
            self._pooled[key] = self._model.pool_text(ids, attention_mask).cpu()
        return self._model.project_text(to_device(self._pooled[key], ids.device))


def _digest(*tensors: Tensor) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(repr(tuple(tensor.shape)).encode())
        found.update(tensor.cpu().numpy().tobytes())
    return found.digest()
