"""A step that waits for nothing it need not wait for, eager or compiled: the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.batch import to_device
from flap_fast.data.preprocess.spec_augment import spec_augment
from flap_fast.losses import total_loss
from flap_fast.model.masking import patch_mask
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.traffic import CountTraffic
from flap_fast.training.engine import Engine, make_engine
from tests.ranks import on_ranks
from tests.tiny import tiny

CPU = torch.device("cpu")

# What makes the host read from the device: `item`, `bool`, `nonzero`; and a mask as an index.
READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
}
BY_INDEX = {"aten::index", "aten::index_put", "aten::index_put_"}


class Reads(TorchDispatchMode):
    """Collects the operators that a GPU would make the host wait for."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func._schema.name in BY_INDEX and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1]
        )
        if func._schema.name in READS or by_mask:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def one_step(engine: Engine, config: Config, device: torch.device) -> torch.Tensor:
    """From log-mels on the device to new weights, as the loop takes a step; gives the loss."""
    generator = torch.Generator().manual_seed(0)
    audio, clips = config.audio, config.train.global_batch
    mel = torch.randn(clips, audio.frames, audio.mel_bins, generator=generator)
    ids = torch.randint(3, 90, (clips, 16), generator=generator)
    attention_mask = (torch.arange(16) < torch.arange(9, 9 + clips)[:, None]).long()
    mel, ids, sample_index = (to_device(x, device) for x in (mel, ids, torch.arange(clips)))
    attention_mask = attention_mask.pin_memory() if device.type == "cuda" else attention_mask
    mel = spec_augment(mel[:, None], config.specaug, audio, config.run.seed, sample_index)
    torch.manual_seed(1)
    plan = patch_mask(config.mask, audio.grid, config.run.seed, sample_index)
    outputs = engine.model(mel, ids, attention_mask, plan)
    total = total_loss(outputs, config)["total"]
    engine.backward(total)
    engine.step(1e-3)
    return total.detach()


def engine_of(config: Config, device: torch.device) -> Engine:
    torch.manual_seed(0)
    return make_engine(config, TwoTowers(config), Ranks(device=device))


def test_reads_are_found_where_they_are():
    with Reads() as reads:
        _ = torch.ones(3).sum().item()
        _ = bool(torch.ones(3).all())
        _ = torch.ones(3)[torch.ones(3) > 0]
    assert reads.found == ["aten::_local_scalar_dense"] * 2 + ["aten::index"]


@pytest.mark.parametrize("clip_norm", [0, 1])
def test_a_step_reads_nothing_from_the_device(clip_norm: int):
    """On a CPU, so without the loss's own path there, which is another one than a GPU's."""
    config = tiny(
        *(f"optim.clip_norm={clip_norm}", "text.dropout=0.1", "audio.drop_path=0.1"),
        "text.packing=padded",  # packing reads the mask, which lies on the host everywhere
    )
    engine = engine_of(config, CPU)
    for group in engine._optimizer.param_groups:  # type: ignore[attr-defined]
        group["fused"] = True  # as on a GPU
    for _ in range(2):
        with Reads() as reads:
            one_step(engine, config, CPU)
        assert reads.found == []


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    config = tiny("optim.clip_norm=1", "text.dropout=0.1", "audio.drop_path=0.1")
    engine = engine_of(config, device)
    for _ in range(2):  # kernels are compiled, the optimizer's moments are made
        one_step(engine, config, device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(engine, config, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def calls_of_the_loss():
    """On one rank: the collectives of each scheme's forward."""
    found = {}
    for scheme in ("replicated", "sharded"):
        audio, text = (torch.nn.functional.normalize(torch.randn(3, 16)) for _ in range(2))
        outputs = {"media": audio, "text": text, "scale": torch.tensor(5.0)}
        with CountTraffic() as counted:
            total_loss(outputs, tiny(f"loss.contrastive.scheme={scheme}"))  # type: ignore[arg-type]
        found[scheme] = dict(counted.calls)
    assert dist.get_world_size() == 2
    return found


def test_ranks_do_not_ask_how_many_clips_the_others_hold():
    """Embeddings and sums: what would be more is the exchange of counts, and a wait for it."""
    for found in on_ranks(2, calls_of_the_loss):
        assert found["replicated"] == {"all_gather": 2}
        assert found["sharded"] == {"all_gather": 1, "all_reduce": 2}


def losses(config: Config, device: torch.device = CPU) -> tuple[list[float], list[str]]:
    """Of two steps, and the names in the state dict."""
    engine = engine_of(config, device)
    found = [one_step(engine, config, device).item() for _ in range(2)]
    return found, list(engine.weights())


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_compiled_blocks_are_one_graph_and_give_the_losses_of_eager_ones(
    recompute: str, graphs: list[int]
):
    """Whatever their drop-path rates; twice one, as the first block drops nothing."""
    settings = (
        *("audio.depth=12", "audio.drop_path=0.2"),
        f"train.checkpoint_activations={recompute}",
    )
    eager, names = losses(tiny(*settings))
    assert graphs == []
    compiled, same_names = losses(tiny(*settings, "train.compile=true"))
    assert compiled == pytest.approx(eager, abs=1e-6)
    assert names == same_names
    assert len(graphs) == 2


def test_evaluation_does_not_compile(graphs: list[int]):
    config = tiny("train.compile=true")
    engine = engine_of(config, CPU)
    engine.module.eval()
    with torch.no_grad():
        engine.module.embed_media(torch.randn(3, 1, config.audio.frames, config.audio.mel_bins))
    assert graphs == []


@pytest.mark.gpu
def test_the_compilers_code_gives_the_losses_of_eager_blocks():
    """On a CPU it holds too, and takes half a minute of the compiler's."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch._dynamo.reset()
    device = torch.device("cuda")
    eager, _ = losses(tiny("train.precision=fp32"), device)
    compiled, _ = losses(tiny("train.precision=fp32", "train.compile=true"), device)
    assert compiled == pytest.approx(eager, abs=1e-5)


def test_compiling_is_refused_where_weights_are_gathered_inside_of_blocks():
    with pytest.raises(ConfigError, match=r"train\.compile must be off with train\.zero_stage = 3"):
        tiny("train.compile=true", "train.zero_stage=3")


def test_copies_on_a_cpu_are_none():
    x = torch.ones(3)
    assert to_device(x, CPU) is x
