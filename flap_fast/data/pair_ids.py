"""What tells a batch's pairs apart: their clips, and what their captions say.

Two pairs of one clip, or of equal captions, are no true negatives of each other: a data set may
have a caption many times, and a clip with several captions may stand in a batch twice.

Equal are captions of the same words, whatever their case, punctuation and white space. Retrieval
systems remove these before they encode a caption (WavCaps; the baseline of DCASE 2025 Task 6).
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_POINT = re.compile(r"(?<=\d)\.(?=\d)")


def caption_words(caption: str) -> str:
    """The words in lower case, with the points of numbers; of nothing but punctuation all of it.

    Characters are compared in Unicode's form NFKC.
    """
    text = unicodedata.normalize("NFKC", caption)
    parts = (_without_punctuation(part) for part in _POINT.split(text))
    return " ".join(".".join(parts).casefold().split()) or caption


def _without_punctuation(text: str) -> str:
    if text.isascii():
        return text.translate(_PUNCTUATION)
    kinds = ((c, unicodedata.category(c)) for c in text)
    # Cf: a byte order mark, spaces without width, marks of direction.
    return "".join(c for c, kind in kinds if kind[0] not in "PS" and kind != "Cf")


def caption_id(caption: str) -> int:
    """A 64-bit digest of a caption's words, signed; the same in every process and version."""
    words = caption_words(caption).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little", signed=True)


def pair_ids(
    clips: np.ndarray, captions: Sequence[str], negatives: Sequence[Sequence[str]] = ()
) -> Tensor:
    """(B, 2 + n) int64 on the CPU: each pair's clip, by its number in the shards, and its caption.

    Args:
        negatives: n captions for each pair, whose ids follow.
    """
    columns = [captions, *zip(*negatives, strict=True)]
    texts = [np.array([caption_id(text) for text in column], np.int64) for column in columns]
    return torch.from_numpy(np.stack([clips, *texts], axis=1))
