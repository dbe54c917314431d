"""Random batches of a config's shapes, for timing and counting where there is no data.

What stands in for a text tower whose folder is not here is RoBERTa-base's shape, with random
weights; nothing is looked up anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import RobertaConfig

from flap_fast.config import Config
from flap_fast.data.batch import Batch
from flap_fast.ranks import Ranks

# Captions of 8 to 24 tokens: the clips' captions of AudioCaps and Clotho have 10 to 20 on average.
SHORTEST, LONGEST = 8, 24


@contextmanager
def without_files(config: Config) -> Iterator[Config]:
    """The config, RoBERTa-base's shape in place of a text.folder that is not there.

    Build its model with `weights=False` and inside: the shape lies in a temporary folder.
    """
    folder = config.text.folder
    if folder is None or folder.startswith("package:") or Path(folder).is_dir():
        yield config
        return
    with TemporaryDirectory() as stand_in:
        roberta_base().save_pretrained(stand_in)
        text = config.text.model_copy(update={"folder": stand_in})
        yield config.model_copy(update={"text": text})


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
    """As `TrainingLoader`, but each (micro-)batch has the same sounds and captions; masks differ.

    Args:
        encoder: the text tower's transformers config, for its vocabulary.
    """

    def __init__(self, config: Config, encoder: Any, ranks: Ranks):
        self.steps_per_epoch = 10**9
        self._config, self._encoder, self._ranks = config, encoder, ranks

    def batches(self, first: int, last: int, *, times: int = 1) -> Iterator[Batch]:
        """The (micro-)batches of steps `first` up to, not including, `last`.

        Args:
            times: how often those of a step come, all of them before they come again.
        """
        audio, ranks, device = self._config.audio, self._ranks, self._ranks.device
        parts, whole = (
            self._config.train.micro_batches(ranks.world),
            self._config.train.global_batch,
        )
        clips = whole // ranks.world // parts
        generator = torch.Generator().manual_seed(self._config.run.seed + ranks.rank)
        mel = torch.randn(clips, 1, audio.frames, audio.mel_bins, generator=generator).to(device)
        ids, attention_mask = self._captions(clips, generator)
        ids, attention_mask = ids.to(device), attention_mask.to(device)
        for step, _, part in product(range(first, last), range(times), range(parts)):
            rows = torch.arange(clips) + (ranks.rank * parts + part) * clips
            sample_index = (rows + step * whole).to(device)
            # A copy: what a step keeps of a loader's log-mels takes memory.
            yield Batch(mel.clone(), ids, attention_mask, sample_index, rows.numpy(), epoch=0)

    def _captions(
        self, clips: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor(caption_lengths(clips, self._config.text.max_tokens))
        padded = -(-int(lengths.max()) // 8) * 8
        mask = (torch.arange(padded) < lengths[:, None]).long()
        pad = self._encoder.pad_token_id or 0
        ids = torch.randint(pad + 1, self._encoder.vocab_size, (clips, padded), generator=generator)
        return ids.where(mask.bool(), torch.tensor(pad)), mask
