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

import torch
from torch import Tensor
from transformers import RobertaConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.batch import Batch
from flap_fast.data.tokenize import local_folder
from flap_fast.ranks import Ranks

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
    """A `TrainingLoader` whose (micro-)batches all have the same media and captions; masks differ.

    With fusion, every clip is longer than the window.

    Args:
        text: the text encoder's module, for its vocabulary.
    """

    def __init__(self, config: Config, text: Any, ranks: Ranks):
        self.steps_per_epoch = 10**9
        self._config, self._ranks = config, ranks
        self._ids, self._pad = text.vocabulary, text.pad_token_id

    def batches(self, first: int, last: int, *, times: int = 1) -> Iterator[Batch]:
        """The (micro-)batches of steps `first` up to, not including, `last`.

        Args:
            times: how many times a step's micro-batches are yielded, where there are several.
        """
        config, ranks, device = self._config, self._ranks, self._ranks.device
        whole, micro_batches = config.train.global_batch, config.train.micro_batches(ranks.world)
        clips = whole // ranks.world // micro_batches
        generator = torch.Generator().manual_seed(config.run.seed + ranks.rank)
        media = torch.randn(
            clips, *config.encoder.input_shape(config.fusion), generator=generator
        ).to(device)
        ids, attention_mask = self._captions(clips, generator)
        ids = ids if config.text.freeze else ids.to(device)
        attention_mask = attention_mask if config.text.freeze else attention_mask.to(device)
        longer = torch.ones(clips, dtype=torch.bool) if config.fusion.on else None
        micros = range(micro_batches)
        times = times if micro_batches > 1 else 1
        for step, _, micro in product(range(first, last), range(times), micros):
            rows = torch.arange(clips) + (ranks.rank * micro_batches + micro) * clips
            index = (rows + step * whole).to(device)
            # A copy: what a step keeps of a loader's media takes memory.
            yield Batch(
                media.clone(),
                ids,
                attention_mask,
                index,
                rows.numpy(),
                epoch=0,
                micro_batches=micro_batches,
                longer=longer,
            )

    def _captions(self, clips: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and mask of the clips' sentences, (S B, L) each."""
        sentences = len(self._config.loss.sentences)
        lengths = torch.tensor(caption_lengths(clips, self._config.text.max_tokens) * sentences)
        padded = -(-int(lengths.max()) // 8) * 8
        mask = (torch.arange(padded) < lengths[:, None]).long()
        ids = torch.randint(self._ids - 1, mask.shape, generator=generator)
        ids += ids >= self._pad
        return ids.where(mask.bool(), torch.tensor(self._pad)), mask
