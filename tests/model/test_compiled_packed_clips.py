"""Compiled and recomputed blocks over packed clips: few graphs, and the numbers of eager ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flap_fast.encoders.blocks import Blocks
from flap_fast.model.two_towers import TwoTowers
from tests.model.test_packed_clips import RECON, outputs, variable

# Batches of other totals, other clips and other groups of equal lengths: rows of SECONDS.
MIXES = [[0, 1, 2, 3], [5, 2], [0, 4, 1, 5], [3, 1, 2, 5, 0, 4], [2, 2, 5], [4, 0]]


def steps(*overrides: str, compiled: bool = False) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Six mixes: what each gives, the gradients of all, and how often a block's MLP ran."""
    config = variable("mask.kind=2d", "audio.depth=3", *RECON, *overrides)
    torch.manual_seed(0)
    model, runs = TwoTowers(config).train(), []
    if compiled:
        for blocks in (module for module in model.modules() if isinstance(module, Blocks)):
            blocks.compile_training()
    else:  # a hook would be another graph
        layer = model.get_submodule("audio.blocks.1.mlp.fc1")
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    found = []
    for seed, rows in enumerate(MIXES):
        torch.manual_seed(seed)
        out = outputs(model, config, rows)
        (out["media"].square() @ torch.arange(16.0)).sum().add(out["recon"]).backward()
        found += [out["media"].detach(), out["recon"].detach()]
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found, grads, len(runs)


def assert_same(found: tuple[list[Tensor], dict[str, Tensor], int], expected: Any) -> None:
    for value, wanted in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        assert (found[1][name] - wanted).norm() <= 1e-5 * max(wanted.norm(), 1e-3), name


@pytest.mark.parametrize(
    "setting",
    [
        "audio.time_positions=sines",
        "audio.time_positions=rotary",
        "train.checkpoint_activations=true",
    ],
)
def test_compiled_blocks_are_few_graphs_however_many_mixes(setting: str, graphs: list[int]):
    """Before attention twice, as the first block's input is a view; after it twice, as that block
    drops no branch; and two of the decoder's only block, of another width."""
    settings = (setting, "audio.drop_path=0.3", "decoder.width=16")
    eager = steps(*settings)
    assert graphs == []
    assert_same(steps(*settings, compiled=True), eager)
    assert len(graphs) == 6


def test_recomputed_blocks_run_twice_and_give_the_same():
    kept, again = steps(), steps("train.checkpoint_activations=[audio, decoder]")
    assert again[2] == 2 * kept[2]
    assert_same(again, kept)
