"""The smallest settings that go through everything."""

from __future__ import annotations

import numpy as np
import torch

from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.evaluation import Crops
from flap_fast.data.preprocess.waveform import crop_positions
from flap_fast.encoders.htsat.settings import HTSATSettings
from flap_fast.encoders.vit.settings import ViTSettings
from flap_fast.model.two_towers import TwoTowers

_SMALL = (
    *("audio.size=tiny", "audio.width=32", "audio.depth=2", "audio.heads=2"),
    *("audio.duration_s=1.0", "audio.frames=112", "joint.width=16"),
    *("text.width=32", "text.depth=2", "text.heads=2", "text.dropout=0"),
    *("train.global_batch=8", "train.steps=4", "frontend.threads=1"),
)

# 101 frames of 16 bins, folded into 64 x 64 pixels: 16 x 16 patches, then 8 x 8.
HTSAT = (
    *("audio.encoder=htsat", "audio.sample_rate_hz=16000", "audio.high_hz=8000"),
    *("audio.frames=101", "audio.mel_bins=16", "audio.depth=null", "audio.depths=[2, 2]"),
    *("audio.width=16", "specaug.time_frames=16", "specaug.freq_bins=4"),
)

# Pieces of 96 x 32 cells, blocks of up to 32 channels; clips of up to 2 s, four pieces.
YAMNET = (
    *("audio.encoder=yamnet", "audio.max_duration_s=2", "audio.mel_bins=32"),
    *("audio.size=null", "audio.depth=null", "audio.heads=null"),
)

# The same with five classes, in the text encoder's space of 32 numbers.
YAMNET_NAMED = (
    *(*YAMNET, "audio.classes=5", "joint.class_names=0.5"),
    *("joint.text_head=none", "joint.width=32"),
)


def vit_of(config: Config) -> ViTSettings:
    """The audio encoder's settings, where they are a ViT's."""
    assert isinstance(config.audio, ViTSettings)
    return config.audio


def htsat_of(config: Config) -> HTSATSettings:
    """The audio encoder's settings, where they are HTSAT's."""
    assert isinstance(config.audio, HTSATSettings)
    return config.audio


def tiny(*overrides: str) -> Config:
    """Clips of 1 s (98 frames, 7 x 8 patches), towers of 32 numbers, batches of 8."""
    return load_config(None, [*_SMALL, *overrides])


_SMALL_CLIP = (
    *("image.width=8", "image.layers=[1,1,1,1]", "image.resolution=32", "joint.width=16"),
    *("text.encoder=clip", "text.width=32", "text.depth=2", "text.heads=2", "text.dropout=0"),
    *("train.global_batch=8", "train.steps=4", "frontend.threads=1"),
)


def tiny_clip(*overrides: str) -> Config:
    """Images of 32 x 32 pixels, one bottleneck a stage, a text tower of 32 numbers."""
    return load_config(None, [*_SMALL_CLIP, *overrides])


def crops(config: Config, clips: np.ndarray) -> Crops:
    """The crops of these clips under eval.crop, unless that is `whole`."""
    count = config.eval.crops
    return Crops(np.repeat(clips, count), np.tile(crop_positions(count), len(clips)))


@torch.no_grad()
def as_if_trained(model: TwoTowers) -> None:
    """Give an HTSAT's model weights and statistics that no model begins with."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(100, 400)
        elif value.is_floating_point():
            value.add_(0.05 * torch.randn_like(value))
    model.get_buffer("audio.bn0.running_mean").normal_(-30, 10)
    model.logit_scale.fill_(3.0)
