"""Random batches of a config's shapes, for timing and counting without data.

In place of a text encoder whose folder is not here stands RoBERTa-base's shape with random weights,
in place of a tokenizer that is not here one with CLIP's vocabulary; nothing is downloaded.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import RobertaConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.batch import Batch, Media, PackedMels
from flap_fast.data.dealing import dealt_in_order
from flap_fast.data.tokenize import local_folder
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.lengths import LengthMix, frames_of
from flap_fast.tools.profile.work import dealt_clips

# Captions of 8 to 24 tokens: the clips' captions of AudioCaps and Clotho have 10 to 20 on average.
SHORTEST, LONGEST = 8, 24
# CLIP's file of merges, by the name that `data.tokenize` knows, and how many it reads of it.
_MERGES, _MERGES_READ = "bpe_simple_vocab_16e6.txt.gz", 49_408 - 2 * 256 - 2


@contextmanager
def without_files(config: Config) -> Iterator[Config]:
    """The config with substitutes for a missing text.folder and text.tokenizer.

    Build its model with `weights=False` and inside: stand-ins lie in a temporary folder.
    """
    setting, folder = config.text.tokenizer_files
    if folder == "bytes" or _is_here(setting, folder):
        yield config
        return
    with TemporaryDirectory() as stand_in:
        name = setting.removeprefix("text.")
        if name == "folder":
            roberta_base().save_pretrained(stand_in)
        else:
            _save_merges(Path(stand_in))
        text = config.text.model_copy(update={name: stand_in})
        yield config.model_copy(update={"text": text})


def _is_here(setting: str, folder: str) -> bool:
    try:
        local_folder(setting, folder)
    except ConfigError:
        return False
    return True


def _save_merges(folder: Path) -> None:
    """Write as many merges as CLIP has: pairs of bytes instead of CLIP's."""
    letters = list(bytes_to_unicode().values())
    pairs = (f"{a} {b}" for a, b in product(letters, letters))
    lines = ["#version: 0.2", *islice(pairs, _MERGES_READ)]
    (folder / _MERGES).write_bytes(gzip.compress("\n".join(lines).encode(), 1))


def roberta_base() -> RobertaConfig:
    """RoBERTa-base's sizes, as released."""
    return RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    )


def caption_lengths(clips: int, max_tokens: int) -> list[int]:
    """Tokens of each caption: spread evenly, the first one the longest."""
    longest = min(LONGEST, max_tokens)
    shortest = min(SHORTEST, longest)
    return [longest - 7 * i % (longest - shortest + 1) for i in range(clips)]


class SyntheticLoader:
    """A `TrainingLoader` whose steps all have the same media and captions; masks differ.

    With fusion, every clip is longer than the window. Clips of different lengths are spread over
    their mix, and dealt to ranks and micro-batches as in training.

    Args:
        text: the text encoder's module, for its vocabulary.
    """

    def __init__(self, config: Config, text: Any, ranks: Ranks, mix: LengthMix | None = None):
        self.steps_per_epoch = 10**9
        self._config, self._ranks, self._mix = config, ranks, mix
        self._ids, self._pad = text.vocabulary, text.pad_token_id

    def batches(self, first: int, last: int, *, times: int = 1) -> Iterator[Batch]:
        """The (micro-)batches of steps `first` up to, not including, `last`.

        Args:
            times: how many times a step's micro-batches are yielded, where there are several.
        """
        config, device = self._config, self._ranks.device
        generator = torch.Generator().manual_seed(config.run.seed + self._ranks.rank)
        rows, frames = self._dealt()
        most = max(len(some) for some in rows)
        media = self._media(most, frames, generator)
        captions = {n: self._captions(n, generator) for n in {len(some) for some in rows}}
        times = times if len(rows) > 1 else 1
        for step, _, micro in product(range(first, last), range(times), range(len(rows))):
            some = torch.from_numpy(rows[micro])
            ids, attention_mask = captions[len(some)]
            yield Batch(
                _taken(media, frames[micro] if frames else None),
                ids,
                attention_mask,
                (some + step * config.train.global_batch).to(device),
                rows[micro],
                epoch=0,
                micro_batches=len(rows),
                longer=torch.ones(most, dtype=torch.bool) if config.fusion.on else None,
                pair_ids=self._pair_ids(some),
            )

    def _pair_ids(self, some: Tensor) -> Tensor | None:
        """Ids that are all different."""
        loss, batch = self._config.loss, self._config.train.global_batch
        if not loss.pair_ids:
            return None
        first = torch.tensor([0, 0, *(batch * n for n in range(1, loss.negatives + 1))])
        return (some[:, None] + first).to(self._ranks.device)

    def _dealt(self) -> tuple[list[np.ndarray], list[tuple[int, ...]]]:
        """This rank's rows of each micro-batch, and, where they differ, the frames of its clips."""
        if self._mix is None:
            return dealt_in_order(self._config.train, self._ranks).micro_batches, []
        seconds, dealt = dealt_clips(self._config, self._ranks, self._mix)
        rows = dealt.micro_batches
        return rows, [frames_of(self._config, seconds[some]) for some in rows]

    def _media(
        self, clips: int, frames: list[tuple[int, ...]], generator: torch.Generator
    ) -> Tensor:
        """Media of the largest micro-batch; of clips of different lengths end to end."""
        shape: tuple[int, ...] = clips, *self._config.encoder.input_shape(self._config.fusion)
        if frames:
            shape = max(map(sum, frames)), self._config.audio.mel_bins
        return torch.randn(shape, generator=generator).to(self._ranks.device)

    def _captions(self, clips: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and mask of the clips' sentences, (S B, L) each; on the CPU for a frozen encoder."""
        sentences = len(self._config.loss.sentences)
        lengths = torch.tensor(caption_lengths(clips, self._config.text.max_tokens) * sentences)
        padded = -(-int(lengths.max()) // 8) * 8
        mask = (torch.arange(padded) < lengths[:, None]).long()
        ids = torch.randint(self._ids - 1, mask.shape, generator=generator)
        ids += ids >= self._pad
        ids = ids.where(mask.bool(), torch.tensor(self._pad))
        if self._config.text.freeze:
            return ids, mask
        return ids.to(self._ranks.device), mask.to(self._ranks.device)


def _taken(media: Tensor, frames: tuple[int, ...] | None) -> Media:
    """A micro-batch's media; a copy: what a step keeps of a loader's media takes memory."""
    if frames is None:
        return media.clone()
    return PackedMels(media[: sum(frames)].clone(), frames, tuple(range(len(frames))))
