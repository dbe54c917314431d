"""Training steps on a GPU that is not there: one device, no waits, and so many copies."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flap_fast.config import Config
from flap_fast.data.batch import Batch
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import open_shards, shard_kinds
from flap_fast.data.tokenize import tokenizer
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.fake import fake_ranks
from flap_fast.training.engine import PlainEngine
from flap_fast.training.frozen import frozen
from flap_fast.training.observers import Metrics
from flap_fast.training.setup import clip_tokens
from flap_fast.training.step import Gradients, model_inputs, patch_mask_of
from flap_kernels import gather_tokens
from tests.tiny import HTSAT, YAMNET, tiny, tiny_clip
from tests.training.fake_cuda import DEVICE, Copy, DeviceError, FakeCuda, fake_cuda
from tests.training.kinds import sets_of_each_kind

STEPS = 2
RANKS = Ranks(device=DEVICE)
RECON = ("loss.recon.weight=0.5", "decoder.width=16", "decoder.depth=1", "decoder.heads=2")
CYCLIC = ("loss.cyclic.cross_weight=0.25", "loss.cyclic.in_weight=0.25")
SENTENCES = ("loss.simcse.weight=0.1", "loss.nli.weight=0.2", "text.dropout=0.1")
VARIABLE = ("audio.length=variable", "audio.max_duration_s=2")
WINDOW = ("audio.attention_window_s=0.5", "audio.pool=mean_patch", "audio.time_positions=rotary")
ALONE = "loss.contrastive.weight=0"
PAIRS = ("loss.contrastive.duplicates=mask", "loss.sigmoid.duplicates=positive")
PREFIXES = "loss.contrastive.prefixes=[4,16]"
CASES = {
    "contrastive": (),
    "contrastive of bf16": ("loss.contrastive.precision=bf16", "train.precision=fp32"),
    "cyclic": (*CYCLIC, ALONE),
    "cyclic, tiled": (*CYCLIC, ALONE, "loss.cyclic.form=tiled"),
    "cyclic, gram": (*CYCLIC, ALONE, "loss.cyclic.form=gram"),
    "simcse": ("loss.simcse.weight=0.1", "text.dropout=0.1", ALONE),
    "nli": ("loss.nli.weight=0.2", ALONE),
    "recon": (*RECON, ALONE, "mask.kind=2d"),
    "sigmoid": ("loss.sigmoid.weight=1", ALONE),
    "sigmoid, duplicates": (*PAIRS, "loss.sigmoid.weight=0.5"),
    "duplicates": ("loss.contrastive.duplicates=positive",),
    "every loss": (*CYCLIC, *SENTENCES, *RECON, *PAIRS, PREFIXES, "loss.sigmoid.weight=0.5"),
    "no mask": ("mask.kind=none",),
    "recomputed blocks": (
        *("train.checkpoint_activations=true", "audio.drop_path=0.1", "audio.depth=2"),
    ),
    "padded text": ("text.packing=padded",),
    "CLIP's text encoder": ("text.encoder=clip",),
    "frozen text": ("text.freeze=true",),
    "HTSAT": HTSAT,
    "YAMNet": YAMNET,
    "fusion": ("fusion.type=aff_2d", *RECON),
    "fusion of log-mels": ("fusion.type=iaff_1d", *HTSAT),
    "fusion as channels": ("fusion.type=channel_map", *HTSAT),
    "variable": VARIABLE,
    "variable, window, recon": (*VARIABLE, *WINDOW, *RECON),
    "micro-batches": ("train.micro_batch=4", *RECON),
    "micro-batches, decoded twice": ("train.micro_batch=4", "train.replay=decode"),
    "micro-batches of tokens": (*VARIABLE, "train.micro_tokens=200", *RECON),
    "local micro-batches": ("train.micro_batch=4", "train.accumulation=local"),
    "images": (),
}
# Of each step: waveforms, ids and sample indices; what the encoders need to know of lengths.
SOUNDS, CAPTIONS = {"__call__": 1, "_batch": 2}, {"pack": 3}
COPIES = {
    "contrastive": SOUNDS | CAPTIONS,
    "sigmoid": SOUNDS | CAPTIONS,
    "every loss": SOUNDS | CAPTIONS | {"_pair_ids": 1},
    "padded text": SOUNDS | {"_padded": 1},
    "CLIP's text encoder": SOUNDS | {"forward": 1},
    "HTSAT": SOUNDS | CAPTIONS,
    "variable": {"mels": 1, "_batch": 2, "in_order": 2, "_clips": 1, "spec_augment_packed": 1}
    | {"segments": 4}
    | CAPTIONS,
    "images": {"finish": 1, "_batch": 2, "forward": 1},
    "micro-batches": {"__call__": 2, "_batch": 4, "pack": 12},
}
# Waits that are meant: the row of numbers that is logged, and new captions of a frozen encoder,
# whose vectors go into a file. The bias of loss.sigmoid is a number more (`logged`).
LOGGED = {"check_finite": 1, "_row": 3, "in_batch_recall": 1}
FROZEN = ("flap_fast/training/frozen_vectors.py", "_gathered")


@pytest.fixture(scope="module")
def data(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sets_of_each_kind(prepared, tmp_path_factory.mktemp("data"))


def settings(data: dict[str, Path], name: str, *overrides: str) -> Config:
    make, kind = (tiny_clip, "images") if name == "images" else (tiny, "sounds")
    files = f"data.train={data[kind]}", f"data.nli={data['nli']}"
    least = () if name == "images" else ("audio.depth=1",)
    every = (*least, "text.depth=1", "optim.clip_norm=1", "frontend.backend=torch")
    return make(*files, *every, "log.every_steps=100", *CASES[name], *overrides)


def loader(config: Config, ranks: Ranks = RANKS) -> TrainingLoader:
    shards = open_shards(config.data.train, shard_kinds(config))
    tokens = clip_tokens(config, shards, Ranks())
    return TrainingLoader(config, shards, tokenizer(config.text), ranks, tokens)


def copies_of_steps(
    config: Config, gpu: FakeCuda, model: TwoTowers, folder: Path, ranks: Ranks = RANKS
) -> Iterator[list[Copy]]:
    """Run steps as `train_from` does, without its files; yields each step's copies."""
    engine, reader = PlainEngine(config, model, ranks), loader(config, ranks)
    with frozen(config, engine.module, ranks, folder) as kept:
        gradients = Gradients(config, ranks, engine, STEPS, STEPS, kept)
        metrics = Metrics(config, ranks, STEPS, [])
        gpu.copies.clear()
        batches = reader.batches(0, STEPS, times=gradients.reads)
        for step in range(1, STEPS + 1):
            outputs, terms = gradients(step, batches)
            terms["grad_norm"] = engine.step(1e-3)
            metrics.step(step, 0, 1e-3, outputs, terms, {})
            yield list(gpu.copies)
            gpu.copies.clear()


def forward(config: Config, model: TwoTowers, batch: Batch) -> dict[str, Tensor]:
    mask = patch_mask_of(batch, config, STEPS, STEPS)
    return total_loss(model(**model_inputs(batch, mask, config)), config)


def counts(copies: list[Copy], *, to_host: bool) -> dict[str, int]:
    """Number of copies in one direction, by the function that asked for them."""
    return dict(Counter(copy.line.function for copy in copies if copy.to_host == to_host))


def logged(config: Config) -> dict[str, int]:
    found = LOGGED | {"_row": LOGGED["_row"] + config.loss.sigmoid.active}
    if not config.loss.reads_text:
        del found["in_batch_recall"]
    return found


def is_meant(copy: Copy) -> bool:
    return not copy.waits or (copy.line.file, copy.line.function) == FROZEN


@pytest.mark.parametrize("name", CASES)
def test_a_step_stays_on_its_device_copies_its_batch_and_waits_only_to_log(
    name: str, data, tmp_path: Path
):
    config = settings(data, name)
    with fake_cuda(backward=True) as gpu:
        first, last = copies_of_steps(config, gpu, TwoTowers(config), tmp_path)
    assert not [str(copy) for copy in first if not is_meant(copy)]
    assert counts([copy for copy in last if not is_meant(copy)], to_host=True) == logged(config)
    assert not [str(copy) for copy in last if copy.waits and not copy.to_host]
    if name in COPIES:
        assert counts(first, to_host=False) == counts(last, to_host=False) == COPIES[name]
        assert counts(first, to_host=True) == {}
        assert counts(last, to_host=True) == logged(config)
    assert gpu.launched or not config.loss.contrastive.weight


@pytest.mark.parametrize("scheme", ["replicated", "sharded"])
def test_losses_over_ranks_wait_for_no_values(scheme: str, data, tmp_path: Path):
    """On rank 0 of two, whose collectives send nothing."""
    ranks = Ranks(world=2, local_world=2, device=DEVICE, launched=True)
    config = settings(data, "every loss", f"loss.contrastive.scheme={scheme}")
    with fake_ranks(2), fake_cuda(backward=True) as gpu:
        first = next(copies_of_steps(config, gpu, TwoTowers(config), tmp_path, ranks))
    assert not [str(copy) for copy in first if copy.waits]


# Micro-batches are forwards like others.
@pytest.mark.parametrize("name", [name for name in CASES if "micro-batches" not in name])
def test_a_forward_of_cuda_tensors_under_autocast_never_waits(name: str, data):
    config = settings(data, name)
    with fake_cuda() as gpu:
        model, batches = TwoTowers(config).to(DEVICE), loader(config).batches(0, 1)
        products: list[Tensor] = []
        model.text_head.register_forward_hook(lambda *given: products.append(given[-1]))
        gpu.copies.clear()
        terms = forward(config, model, next(batches))
    half = config.train.precision == "auto"
    assert {x.dtype for x in products} == {torch.bfloat16 if half else torch.float32}
    assert {term.device for term in terms.values()} == {DEVICE}
    assert not [str(copy) for copy in gpu.copies if copy.waits]


class Planted(nn.Module):
    """A layer with a fault behind another layer."""

    def __init__(self, layer: nn.Module, fault: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer, self.fault = layer, fault

    def forward(self, x: Tensor) -> Tensor:
        return self.fault(self.layer(x))


def in_backward(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad * grad.sum().item())
    return x


# A fault, and what the checker says of it.
WAITS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "item": (lambda x: x + x.sum().item(), "_local_scalar_dense.default, device to host, waits"),
    "if": (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense.default, device to host"),
    "tolist": (lambda x: x + sum(x[0].tolist()), "_to_copy.default, device to host, waits"),
    "print": (lambda x: x + len(str(x)), "_to_copy.default, device to host, waits"),
    "cpu": (lambda x: x + x.mean(0).cpu().mean(), "_to_copy.default, device to host, waits"),
    "to": (lambda x: x + x.to("cpu").mean(), "_to_copy.default, device to host, waits"),
    "copy_": (lambda x: x + torch.empty(1).copy_(x[0, :1]).mean(), "copy_.default, device to host"),
    "not pinned": (
        lambda x: x + torch.ones(x.shape[1]).to(x.device, non_blocking=True),
        "_to_copy.default, host to device, waits",
    ),
    "blocking": (
        lambda x: x + torch.ones(x.shape[1]).pin_memory().to(x.device),
        "_to_copy.default, host to device, waits",
    ),
    "a list": (lambda x: x + torch.tensor([1.0], device=x.device), "host to device, waits"),
}
ERRORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "CPU tensor": (lambda x: x + torch.ones(x.shape[1]), "mixes CUDA tensors with CPU tensors"),
    "CPU index": (lambda x: x[torch.arange(len(x))], "mixes CUDA tensors with CPU tensors"),
    "nonzero": (lambda x: x[x.sum(1).nonzero()[:, 0]], "nonzero.default has the host wait"),
    "mask": (lambda x: x[x.sum(1) > 0], "index.Tensor has the host wait"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select.default has the host"),
    "unique": (lambda x: x.unique(), "_unique2.default has the host wait"),
    "equal": (lambda x: x * torch.equal(x, -x), "equal.default has the host wait"),
    "synchronize": (lambda x: torch.cuda.synchronize() or x, "synchronize has the host wait"),
}
HERE = f"tests/training/{Path(__file__).name}"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", WAITS)
def test_a_planted_wait_is_named_with_its_line(name: str, backward: bool):
    fault, said = WAITS[name]
    with fake_cuda(backward=backward) as gpu:
        layer = Planted(nn.Linear(4, 4), fault).to(DEVICE)
        x = torch.ones(3, 4, device=DEVICE)
        gpu.copies.clear()
        layer(x)
    (found,) = (str(copy) for copy in gpu.copies if copy.waits)
    assert found.startswith(HERE)
    assert said in found


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ERRORS)
def test_a_planted_fault_that_cannot_go_on_is_an_error(name: str, backward: bool):
    fault, said = ERRORS[name]
    with fake_cuda(backward=backward):
        layer = Planted(nn.Linear(4, 4), fault).to(DEVICE)
        with pytest.raises(DeviceError, match=HERE) as found:
            layer(torch.ones(3, 4, device=DEVICE))
    assert said in str(found.value)


def test_a_wait_planted_in_an_operator_of_ours_is_named(monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["flap_kernels.gather_tokens"]
    monkeypatch.setattr(module, "runs_triton", lambda x: bool(x.sum().item()) or True)
    with fake_cuda() as gpu:
        ids = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
        gather_tokens(torch.ones(2, 3, 4, device=DEVICE), ids)
    assert gpu.launched == {"gather_tokens_kernel"}
    assert [copy.line.file for copy in gpu.copies] == [HERE]


@pytest.mark.parametrize("fault", [WAITS["item"][0], WAITS["cpu"][0], in_backward])
def test_a_wait_planted_in_the_model_fails_a_step(
    fault: Callable[[Tensor], Tensor], data, tmp_path: Path
):
    config = settings(data, "contrastive")
    with fake_cuda(backward=True) as gpu:
        model = TwoTowers(config)
        model.text_head = Planted(model.text_head, fault)
        first = next(copies_of_steps(config, gpu, model, tmp_path))
    assert [copy.line.file for copy in first if not is_meant(copy)] == [HERE]


def test_a_cpu_tensor_planted_in_the_model_fails_a_step(data, tmp_path: Path):
    config = settings(data, "contrastive")
    with fake_cuda(backward=True) as gpu:
        model = TwoTowers(config)
        # Neither a parameter nor a buffer: `model.to(device)` leaves it where it is.
        model.text_head = Planted(model.text_head, torch.ones(16).mul)
        with pytest.raises(DeviceError, match=rf"{HERE}:\d+ forward: aten.mul.Tensor mixes CUDA"):
            next(copies_of_steps(config, gpu, model, tmp_path))
