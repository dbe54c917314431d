"""Packed clips of any lengths give what each of them gives alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flap_fast.config import Config
from flap_fast.data.batch import Batch, lay_end_to_end
from flap_fast.data.preprocess.audio import AudioPreprocessor
from flap_fast.losses.base import Outputs
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.step import model_inputs, patch_mask_of
from tests.sounds import noise
from tests.tiny import tiny

RATE = 16_000
# The shortest is filled to one patch, the longest cropped to 3 s; not in order, and two alike.
SECONDS = (1.0, 0.3, 3.5, 0.05, 1.0, 0.62)
VARIABLE = ("audio.length=variable", "audio.max_duration_s=3")
RECON = ("loss.recon.weight=1", "decoder.width=32", "decoder.depth=1", "decoder.heads=2")


def variable(*overrides: str) -> Config:
    return tiny(*VARIABLE, *overrides)


def batch(config: Config, rows: list[int]) -> Batch:
    """The clips at these rows of SECONDS, each with its own sample index and caption."""
    waves = [noise(row, SECONDS[row], RATE)[: config.audio.samples] for row in rows]
    least = config.audio.least_samples
    waves = [np.pad(wave, (0, max(0, least - len(wave)))).astype(np.float32) for wave in waves]
    decoded = lay_end_to_end(waves, np.zeros(len(rows)))
    media = AudioPreprocessor(config, Ranks()).finish(decoded).media
    ids = torch.tensor([[1, row + 3, row + 9, 2] for row in rows])
    index = torch.tensor([1000 + 7 * row for row in rows])
    return Batch(media, ids, torch.ones_like(ids), index, np.array(rows), epoch=0, micro_batches=1)


def outputs(model: TwoTowers, config: Config, rows: list[int]) -> Outputs:
    some = batch(config, rows)
    mask = patch_mask_of(some, config, steps=10, per_epoch=1)
    return model(**model_inputs(some, mask, config))


@pytest.mark.parametrize(
    "overrides",
    [
        ("mask.kind=none",),
        ("mask.kind=2d",),
        ("mask.kind=2d", "mask.shared_inner=false", "audio.use_cls=false"),
        ("mask.kind=1d", "mask.ratio=0.6", "audio.pool=cls"),
        ("mask.kind=1d", "mask.unit=frame", "audio.norm_position=pooled"),
        ("mask.kind=2d", "audio.pool=mean_all", *RECON),
        ("mask.kind=1d", "mask.ratio=0.9", *RECON),
        # One column is kept whole: the shortest clip drops nothing.
        ("mask.kind=1d", "mask.unit=frame", "audio.use_cls=false", *RECON),
        ("mask.kind=2d", "mask.time_ratio=0.5", "loss.recon.target=augmented", *RECON),
        ("audio.mel=clap", "audio.sample_rate_hz=16000", "audio.high_hz=8000", *RECON),
        ("mask.kind=2d", "audio.time_positions=rotary", *RECON),
        ("mask.kind=1d", "audio.time_positions=rotary", "audio.use_cls=false"),
        ("mask.kind=2d", "audio.attention_window_s=0.4", *RECON),
        ("mask.kind=none", "audio.attention_window_s=0.2", "audio.pool=mean_all"),
    ],
)
def test_packed_clips_give_what_each_gives_alone(overrides):
    """Embeddings, the decoder's error and gradients, with masking and SpecAug."""
    config = variable("specaug.time_frames=60", "specaug.freq_bins=20", *overrides)
    torch.manual_seed(0)
    model, rows = TwoTowers(config).train(), list(range(len(SECONDS)))
    weights = torch.randn(len(rows), config.joint.width)

    packed = outputs(model, config, rows)
    ((packed["media"] * weights).sum() + packed["recon"]).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = [outputs(model, config, [row]) for row in rows]
    for row, out in enumerate(alone):
        ((out["media"] * weights[row]).sum() + out["recon"] / len(rows)).backward()

    media = torch.cat([out["media"] for out in alone])
    assert (packed["media"] - media).abs().max() < 1e-6
    recon = torch.stack([out["recon"] for out in alone]).mean()
    assert abs(packed["recon"] - recon) <= 1e-6 * abs(recon)
    assert (recon > 0) == (config.loss.recon.weight > 0)
    for name, p in model.named_parameters():
        if p.grad is None:
            assert name not in grads
        else:
            assert (grads[name] - p.grad).norm() <= 1e-5 * max(p.grad.norm(), 1e-3), name


@pytest.mark.parametrize("time_positions", ["sines", "rotary"])
def test_a_clip_of_the_fixed_length_gives_what_it_gives_on_the_fixed_grid(time_positions: str):
    common = ("audio.frames=96", f"audio.time_positions={time_positions}", *RECON)
    fixed = tiny("audio.duration_s=0.975", *common)
    config = variable(*common)
    torch.manual_seed(0)
    model = TwoTowers(config).train()
    torch.manual_seed(0)
    other = TwoTowers(fixed).train()
    wave = noise(0, 0.975, RATE)
    decoded = lay_end_to_end([wave, wave[::-1].copy()], np.zeros(2))
    ids, index = torch.tensor([[1, 5, 2], [1, 7, 2]]), torch.tensor([4, 9])
    found = []
    for m, c in ((model, config), (other, fixed)):
        media = AudioPreprocessor(c, Ranks()).finish(decoded).media
        b = Batch(media, ids, torch.ones_like(ids), index, np.arange(2), epoch=0, micro_batches=1)
        found.append(m(**model_inputs(b, patch_mask_of(b, c, 10, 1), c)))
    assert (found[0]["media"] - found[1]["media"]).abs().max() < 1e-6
    assert abs(found[0]["recon"] - found[1]["recon"]) < 1e-6
