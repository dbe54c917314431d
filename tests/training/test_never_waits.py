"""On a GPU a training step never waits for it: PyTorch raises where the host would.

The configs are those of `tests.training.test_fake_cuda`, which proves as much of Python's code
without a GPU; what waits inside an operator of PyTorch's shows only here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import open_shards, shard_kinds
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.engine import PlainEngine
from flap_fast.training.setup import clip_tokens
from flap_fast.training.step import Gradients
from tests.training.kinds import sets_of_each_kind
from tests.training.test_fake_cuda import settings

# A case for each encoder of clips and of captions, each loss and each kind of micro-batch. Frozen
# captions are left out: new ones go into a file, so that step waits.
CASES = (
    *("contrastive", "every loss", "cyclic, tiled", "recomputed blocks", "padded text"),
    *("CLIP's text encoder", "HTSAT", "YAMNet", "fusion", "fusion as channels", "images"),
    *("variable, window, recon", "micro-batches", "micro-batches of tokens"),
)
WARM_UP, STEPS = 2, 3


@pytest.fixture(scope="module")
def data(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sets_of_each_kind(prepared, tmp_path_factory.mktemp("data"))


@contextmanager
def no_waits() -> Iterator[None]:
    """Within it, what has the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_steps(name: str, data: dict[str, Path], device: torch.device, last: Callable) -> float:
    """The loss of the last of some steps, which runs within `last()`; the others compile."""
    config, ranks = settings(data, name), Ranks(device=device)
    shards = open_shards(config.data.train, shard_kinds(config))
    tokens = clip_tokens(config, shards, Ranks())
    loader = TrainingLoader(config, shards, tokenizer(config.text), ranks, tokens)
    engine = PlainEngine(config, TwoTowers(config), ranks)
    gradients = Gradients(config, ranks, engine, STEPS, STEPS, None)
    batches = loader.batches(0, STEPS, times=gradients.reads)
    terms = {}
    for step in range(1, STEPS + 1):
        with last() if step > WARM_UP else nullcontext():
            _, terms = gradients(step, batches)
            engine.step(1e-3)
    return terms["total"].item()


@pytest.mark.parametrize("name", CASES)
def test_a_step_gives_a_loss(name: str, data):
    """On a CPU, so that what runs on a GPU is known to run."""
    loss = run_steps(name, data, torch.device("cpu"), nullcontext)
    assert torch.isfinite(torch.tensor(loss))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_step_never_waits_for_the_gpu(name: str, data):
    loss = run_steps(name, data, torch.device("cuda", 0), no_waits)
    assert torch.isfinite(torch.tensor(loss))


@pytest.mark.gpu
def test_a_wait_is_an_error():
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits():
        torch.ones(1, device="cuda").item()
