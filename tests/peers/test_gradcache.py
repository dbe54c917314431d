"""GradCache's own loop over FLAP's towers on real sounds and captions: the loss, all gradients."""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from itertools import chain, repeat
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from flap_fast.data.batch import Batch, lay_end_to_end
from flap_fast.data.preprocess.preprocessor import make_preprocessor
from flap_fast.data.preprocess.waveform import fill, read_sound
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.engine import PlainEngine
from flap_fast.training.step import Gradients
from tests.peers.conftest import Clips, Largest
from tests.tiny import tiny

gradcache = pytest.importorskip("gradcache")
RATE = 16_000
CLIPS, MICRO_BATCH = 12, 4
WHY = "float32"
# Without masks, SpecAug and dropout: the two draw them from other streams.
CONFIG = tiny(
    *("mask.kind=none", "specaug.time_frames=0", "specaug.freq_bins=0", "frontend.backend=torch"),
    *(f"train.global_batch={CLIPS}", f"train.micro_batch={MICRO_BATCH}"),
)


def inputs(clips: Clips) -> dict[str, Tensor]:
    """Log-mels of the first second of each sound, and its caption's tokens."""
    waves = [fill(read_sound(file, RATE)[:RATE], RATE, "repeat") for file in clips.files]
    laid = lay_end_to_end(waves, np.zeros(CLIPS))
    ids, attention_mask = tokenizer(CONFIG.text)(clips.captions)
    media = make_preprocessor(CONFIG, Ranks()).finish(laid).media
    assert isinstance(media, Tensor)
    return {"media": media, "ids": ids, "attention_mask": attention_mask}


def by_ours(given: dict[str, Tensor], model: TwoTowers) -> Tensor:
    """The loss; the gradients are left in the model."""
    batches = [
        Batch(
            **{name: value[rows] for name, value in given.items()},
            sample_index=torch.from_numpy(rows),
            clips=rows,
            epoch=0,
            micro_batches=CLIPS // MICRO_BATCH,
        )
        for rows in np.split(np.arange(CLIPS), CLIPS // MICRO_BATCH)
    ]
    gradients = Gradients(CONFIG, Ranks(), PlainEngine(CONFIG, model, Ranks()), 1, 1)
    return gradients(1, chain.from_iterable(repeat(batches, gradients.reads)))[1]["total"]


def by_gradcache(given: dict[str, Tensor], model: TwoTowers) -> Tensor:
    """The same; captions are in chunks of another size than sounds."""
    # The package on PyPI is called gradcache, and imports itself as grad_cache.
    with mock.patch.dict(sys.modules, {"grad_cache": gradcache}):
        peer, loss = import_module("gradcache.grad_cache"), import_module("gradcache.loss")
    one_way = loss.SimpleContrastiveLoss()

    def both_ways(media: Tensor, text: Tensor) -> Tensor:
        scaled = model.logit_scale.exp() * media
        return (one_way(scaled, text) + one_way(text, scaled)) / 2

    step = peer.GradCache(
        [model.embed_media, model.embed_text], [MICRO_BATCH, MICRO_BATCH + 1], both_ways
    )
    return step(given["media"], {name: given[name] for name in ("ids", "attention_mask")})


def test_its_step_gives_our_loss_and_gradients(clips: Clips, largest: Largest):
    given = inputs(clips)
    torch.manual_seed(0)
    start = TwoTowers(CONFIG)
    losses, found = [], []
    for run in (by_ours, by_gradcache):
        model = copy.deepcopy(start)
        losses.append(run(given, model))
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == dict(start.named_parameters()).keys()
    difference = ((losses[0] - losses[1]) / losses[1]).abs().item()
    largest("GradCache", "loss over chunks of 4 and 5, by its value", difference, 1e-6, WHY)
    for tower, weights in (("sounds", "audio"), ("captions", "text"), ("the scale", "logit_scale")):
        names = [name for name in found[1] if name.startswith(weights)]
        most = max(found[1][name].abs().max() for name in names)
        difference = max((found[0][n] - found[1][n]).abs().max() / most for n in names).item()
        largest("GradCache", f"gradients, {tower}, by the largest", difference, 1e-5, WHY)
