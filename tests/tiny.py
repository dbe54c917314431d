"""The smallest settings that go through everything."""

from __future__ import annotations

from flap_fast.config import Config
from flap_fast.configfile import load_config

_SMALL = (
    *("audio.size=tiny", "audio.width=32", "audio.depth=2", "audio.heads=2"),
    *("audio.duration_s=1.0", "audio.frames=112", "joint.width=16"),
    *("text.width=32", "text.depth=2", "text.heads=2", "text.dropout=0"),
    *("train.global_batch=8", "train.steps=4", "frontend.threads=1"),
)


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
