"""The benchmarks of patches pass the types that a training step under autocast passes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flap_fast.encoders.vit.model as vit
import flap_kernels
from bench.patches import arguments
from flap_fast.model import decoder
from flap_fast.model.two_towers import TwoTowers
from tests.tiny import tiny
from tests.training.fake_cuda import DEVICE, fake_cuda
from tests.training.test_fake_cuda import RECON, forward, loader

OPS = {
    "patch_embed": vit,
    **dict.fromkeys(("gather_tokens", "unshuffle_tokens", "masked_mse"), decoder),
}


def types(op: Any, *given: Any, **named: Any) -> dict[str, torch.dtype]:
    """Of an op's arguments that are numbers, by name."""
    bound = inspect.signature(op).bind(*given, **named).arguments
    tensors = {name: x for name, x in bound.items() if isinstance(x, Tensor)}
    return {name: x.dtype for name, x in tensors.items() if x.is_floating_point()}


@pytest.fixture
def in_training(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict]]:
    """By op, the types of each of its calls in a forward with masks and reconstruction."""
    found: dict[str, list[dict]] = {name: [] for name in OPS}

    def noted(name: str, op: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            found[name].append(types(op, *given, **named))
            return op(*given, **named)

        return call

    files = f"data.train={prepared / 'train'}", "frontend.backend=torch"
    config = tiny(*files, *RECON, "mask.kind=2d")
    with fake_cuda():
        for name, module in OPS.items():
            monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
        model = TwoTowers(config).to(DEVICE)
        forward(config, model, next(loader(config).batches(0, 1)))
    return found


def test_patches_are_measured_in_the_types_of_training(in_training):
    for name, calls in in_training.items():
        assert calls, name
        with fake_cuda():
            measured = types(getattr(flap_kernels, name), **arguments(name, 2, "cuda"))
        assert all(call == measured for call in calls), (name, measured, calls)
