"""What frozen encoders give, computed once: for each caption, and for each clip that is whole.

    batch -> FrozenText     token ids -> vectors (S B, D)   text.freeze
          -> FrozenMedia    clips     -> vectors (B, D)     audio.freeze or image.freeze

S B sentences of B clips   D width of the encoder

A clip has one vector if nothing about it is drawn at random: no mask, no SpecAug, no crop. Of
sounds that is known with audio.length = variable: those that are cropped are embedded each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.batch import Batch, Media, PackedMels, to_device
from flap_fast.data.shards import Shards
from flap_fast.model.two_towers import ModelInputs, TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.frozen_vectors import KEY_BYTES, FrozenVectors


@dataclass(frozen=True)
class Frozen:
    """The outputs of a model's frozen encoders; None of those that run in each step."""

    text: FrozenText | None = None
    media: FrozenMedia | None = None

    def fill(self, inputs: ModelInputs, batch: Batch) -> None:
        """Put them into the model's inputs of a batch. Collective: call on every rank."""
        if self.text is not None:
            inputs["text_pooled"] = self.text(batch.ids, batch.attention_mask)
        if self.media is not None:
            inputs["media_pooled"] = self.media(batch)

    def counts(self) -> tuple[int, int]:
        """How many captions and clips are kept."""
        kept = [() if part is None else part for part in (self.text, self.media)]
        return len(kept[0]), len(kept[1])

    def delete(self) -> None:
        """Delete this node's files, once nothing more is asked."""
        for part in (self.text, self.media):
            if part is not None:
                part.delete()


@contextmanager
def frozen(
    config: Config,
    model: TwoTowers,
    ranks: Ranks,
    folder: Path | None = None,
    *,
    shards: Shards | None = None,
    keep: bool = False,
) -> Iterator[Frozen]:
    """A context with the outputs of a model's frozen encoders.

    Args:
        folder: in which the folders of the files are; None makes a temporary one.
        shards: of the clips, whose vectors are not taken for those of other files; None for others.
        keep: see `FrozenVectors`.
    """
    with ExitStack() as stack:
        folder = folder or Path(stack.enter_context(TemporaryDirectory()))
        text = media = None
        if config.text.freeze:
            text = FrozenText(model, ranks, folder / "text_vectors", keep=keep)
            stack.callback(text.close)
        if config.media_once:
            names = ClipNames(shards)
            media = FrozenMedia(config, model, ranks, folder / "media_vectors", names, keep=keep)
            stack.callback(media.close)
        yield Frozen(text, media)


class FrozenText(FrozenVectors):
    """Outputs of a model's frozen text encoder. Collective: call on every rank."""

    def __init__(self, model: TwoTowers, ranks: Ranks, folder: Path, *, keep: bool):
        width: int = model.text.width  # type: ignore[assignment]
        super().__init__(width, ranks, folder, keep=keep)
        self._model = model

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(R, L) ids and mask, best on the CPU -> (R, D) float32 on the ranks' device.

        Raises:
            OSError: no space for the rows.
        """
        ids, attention_mask = ids.cpu(), attention_mask.cpu()
        rows = zip(ids, attention_mask.bool(), strict=True)

        def embed(some: list[int]) -> Tensor:
            on_device = to_device(ids[some], self._ranks.device)
            return self._model.pool_text(on_device, attention_mask[some])

        return self.of([_digest(row[kept].numpy().tobytes()) for row, kept in rows], embed)


class FrozenMedia(FrozenVectors):
    """Outputs of a model's frozen media encoder. Collective: call on every rank."""

    def __init__(
        self,
        config: Config,
        model: TwoTowers,
        ranks: Ranks,
        folder: Path,
        names: ClipNames,
        *,
        keep: bool,
    ):
        width: int = model.encoder.width  # type: ignore[assignment]
        super().__init__(width, ranks, folder, keep=keep)
        self._config, self._model, self._names = config, model, names

    def __call__(self, batch: Batch) -> Tensor:
        """(B, D) float32 on the ranks' device.

        Raises:
            OSError: no space for the rows.
        """
        media = batch.media

        def embed(some: list[int]) -> Tensor:
            return self._model.pool_media(_rows(media, some))

        keys: list[bytes | None] = [self._names(clip) for clip in batch.clips.tolist()]
        if isinstance(media, PackedMels):
            most = self._config.audio.most_frames  # a crop is as long
            for row, frames in zip(media.order, media.frames, strict=True):
                keys[row] = keys[row] if frames < most else None
        return self.of(keys, embed)


def _rows(media: Media, rows: list[int]) -> Media:
    """Some clips of a batch, in the order of `rows`."""
    return media.rows(rows) if isinstance(media, PackedMels) else media[rows]


class ClipNames:
    """Keys of the clips of shards; others once a shard is written anew between two sessions.

    Of shards by URL a checkpoint refuses other versions.
    """

    def __init__(self, shards: Shards | None):
        files = shards.files if shards else ()
        stats = [file.stat() if isinstance(file, Path) else None for file in files]
        self._marks = [f"{stat.st_size} {stat.st_mtime_ns}" if stat else "" for stat in stats]
        self._shards = shards

    def __call__(self, clip: int) -> bytes:
        """The key of a clip, by its number."""
        mark = self._marks[int(self._shards.locations[clip, 0])] if self._shards else ""
        return _digest(f"{clip} {mark}".encode())


def _digest(what: bytes) -> bytes:
    return hashlib.blake2b(what, digest_size=KEY_BYTES).digest()
