"""Retrieval examples: a run's model on its validation clips, the best and the worst retrievals.

A clip's position is that of the first of its own captions among all captions, counted from 0.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config.file import parse_config
from flap_fast.data.preprocess.image import decoded, rgb
from flap_fast.data.preprocess.waveform import BadSound, read_crop
from flap_fast.data.shards import ShardError, Shards, open_shards, shard_kinds
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.embed import Embeddings, embed
from flap_fast.evaluation.geometry import geometry
from flap_fast.evaluation.retrieval import caption_positions
from flap_fast.evaluation.run import names
from flap_fast.model.model_folder import load_model
from flap_fast.ranks import Ranks
from flap_fast.report.run import RunFacts

_SHOWN = 128
"""Clips in the similarity matrix."""
_EXAMPLES = 5
_ANSWERS = 3
_PLAYED_S, _PLAYED_HZ = 10.0, 16_000


@dataclass(frozen=True)
class Example:
    """One clip and the model's answers for it."""

    clip: str
    caption: str
    position: int
    cosine: float
    """That of its own best caption."""
    answers: list[tuple[str, float, bool]]
    """The first captions, their cosines, and whether they are its own."""
    sound: str
    """A data URI of OGG; empty for an image and for a clip that cannot be played."""
    image: str
    """A data URI of JPEG; empty for a sound."""


@dataclass(frozen=True)
class RetrievalExamples:
    """Examples from one validation set."""

    name: str
    modality: str
    """`audio` or `image`."""
    clips: int
    similarity: np.ndarray
    """(n, n) cosines of the first n clips (rows) with each one's first caption (columns)."""
    best: list[Example]
    worst: list[Example]
    geometry: dict[int, dict[str, float | None]]
    """Alignment and uniformity by the step of the checkpoint."""


def retrieval_examples(run: RunFacts) -> tuple[list[RetrievalExamples], list[str]]:
    """Examples from each validation set, and why a set has none."""
    if not run.config.data.val:
        return [], ["The run has no data.val, so nothing was embedded."]
    if run.chosen is None:
        return [], ["The run has no checkpoint yet, so nothing was embedded."]
    found, missing = [], []
    for name, folder in names(run.config.data.val).items():
        try:
            shards = open_shards([folder], shard_kinds(run.config))
            found.append(_examples(run, name, shards))
        except (ShardError, ConfigError) as why:
            missing.append(f"{name} is left out: {why}.")
    return found, missing


def _examples(run: RunFacts, name: str, shards: Shards) -> RetrievalExamples:
    assert run.chosen is not None
    chosen = _embeddings(run.chosen, run, shards)
    by_step = {}
    for step, folder in run.checkpoints.items():
        same = folder.samefile(run.chosen)
        e = chosen if same else _embeddings(folder, run, shards)
        by_step[step] = geometry(e.media, e.text, e.clip_of_caption, modality=run.modality)
    first = _first_captions(chosen.clip_of_caption, len(shards))[:_SHOWN]
    similarity = chosen.media[:_SHOWN] @ chosen.text[first].T
    positions = caption_positions(chosen.media, chosen.text, chosen.clip_of_caption, Ranks())
    own = torch.full((len(shards),), len(positions)).scatter_reduce(
        0, chosen.clip_of_caption, positions, "amin"
    )
    best, worst = _extremes(
        own, (chosen.media[chosen.clip_of_caption] * chosen.text).sum(1), chosen.clip_of_caption
    )
    return RetrievalExamples(
        name=name,
        modality=run.modality,
        clips=len(shards),
        similarity=similarity.numpy(),
        best=[_example(clip, own, chosen, shards) for clip in best],
        worst=[_example(clip, own, chosen, shards) for clip in worst],
        geometry=by_step,
    )


def _embeddings(folder: Path, run: RunFacts, shards: Shards) -> Embeddings:
    """Embeddings by a checkpoint, with the run's own settings of evaluation; on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_model(folder, device)
    tree = config.model_dump()
    config = parse_config({**tree, "eval": run.config.eval.model_dump()})
    found = embed(model, config, tokenizer(config.text), shards, Ranks(device=device))
    return replace(
        found,
        media=found.media.cpu(),
        text=found.text.cpu(),
        clip_of_caption=found.clip_of_caption.cpu(),
    )


def _first_captions(clip_of_caption: Tensor, clips: int) -> Tensor:
    """(clips,) the first caption of each clip; captions come in the order of their clips."""
    return torch.searchsorted(clip_of_caption, torch.arange(clips))


def _extremes(own: Tensor, cosines: Tensor, clip_of_caption: Tensor) -> tuple[list[int], list[int]]:
    """The best and the worst clips; none is in both."""
    most = torch.full((len(own),), -2.0).scatter_reduce(0, clip_of_caption, cosines.float(), "amax")
    order = np.lexsort((-most.numpy(), own.numpy()))  # by position, then by cosine, highest first
    count = min(_EXAMPLES, len(order) // 2)
    return order[:count].tolist(), order[::-1][:count].tolist()


def _example(clip: int, own: Tensor, e: Embeddings, shards: Shards) -> Example:
    captions = _captions_of(e.clip_of_caption, shards)
    cosines = e.text @ e.media[clip]
    first = cosines.argsort(descending=True, stable=True)[:_ANSWERS].tolist()
    mine = (e.clip_of_caption == clip).nonzero()[:, 0]
    nearest = int(mine[cosines[mine].argmax()])
    return Example(
        clip=str(shards.record(clip).get("id", shards.name(clip))),
        caption=captions(nearest),
        position=int(own[clip]),
        cosine=float(cosines[nearest]),
        answers=[
            (captions(i), float(cosines[i]), int(e.clip_of_caption[i]) == clip) for i in first
        ],
        sound="" if shards.kind == "images" else _playable(shards.encoded(clip)),
        image=_thumbnail(shards.encoded(clip)) if shards.kind == "images" else "",
    )


def _captions_of(clip_of_caption: Tensor, shards: Shards):
    """A function from a caption's index to its words."""

    def caption(number: int) -> str:
        clip = int(clip_of_caption[number])
        return shards.record(clip)["text"][number - int(torch.searchsorted(clip_of_caption, clip))]

    return caption


def _playable(sound: bytes) -> str:
    """The middle of a sound as a data URI for a browser; empty if it cannot be read."""
    try:
        wave = read_crop(sound, _PLAYED_HZ, int(_PLAYED_S * _PLAYED_HZ), 0.5)
    except BadSound:
        return ""
    file = io.BytesIO()
    soundfile.write(file, wave, _PLAYED_HZ, format="OGG", subtype="VORBIS")
    return "data:audio/ogg;base64," + base64.b64encode(file.getvalue()).decode()


def _thumbnail(image: bytes) -> str:
    """A small copy of an image as a data URI."""
    file = io.BytesIO()
    small = rgb(decoded(image))
    small.thumbnail((256, 256))
    small.save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
