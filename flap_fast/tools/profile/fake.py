"""Models, batches and ranks of fake tensors: shapes go through a step, nothing is computed.

Fake tensors say they are on the CPU: there autocast to bfloat16 exists, captions are packed, and
attention is a fused operator, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from flap_fast.config import Config
from flap_fast.data.batch import Batch, PackedMels
from flap_fast.encoders import attention
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.profile.packed import packed_attention_in_one
from flap_fast.tools.profile.parts import tensors_in
from flap_fast.tools.profile.synthetic import without_files
from flap_kernels.infonce.positives import Positives
from flap_kernels.infonce.torch_block import Block


class FakeMode(FakeTensorMode):
    """Fake tensors mixed with real host tensors that decide shapes: masks of captions, `longer`.

    Operators on only real tensors are computed. The value of a fake scalar is 1.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # called very often
            return args[0].fake_device
        given = {isinstance(x, FakeTensor) for x in tensors_in((args, kwargs))}
        if func is torch.ops.aten._local_scalar_dense.default and given == {True}:
            return torch.ones((), dtype=args[0].dtype, device="cpu").numpy().item()
        if given == {False}:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def attention_of_a_gpu() -> Iterator[None]:
    """A context in which attention stores what a GPU's fused kernels store: no probabilities."""
    with _attention_without_dropout(), packed_attention_in_one(), _attention_as_it_is():
        yield


@contextmanager
def _attention_as_it_is() -> Iterator[None]:
    """A context in which bf16 stays bf16 on the CPU that fake tensors are on."""
    real, attention.wants_fp32 = attention.wants_fp32, lambda *_: False
    try:
        yield
    finally:
        attention.wants_fp32 = real


@contextmanager
def _attention_without_dropout() -> Iterator[None]:
    real = functional.scaled_dot_product_attention

    def without_dropout(*tensors: Any, **options: Any) -> Tensor:
        return real(*tensors, **{**options, "dropout_p": 0.0})

    # Not by a TorchFunctionMode: in the backward, where blocks are recomputed, none is active.
    functional.scaled_dot_product_attention = without_dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real


@contextmanager
def duplicates_of_a_gpu() -> Iterator[None]:
    """A context in which duplicates cost what they do on a GPU, where kernels are not to ask.

    Masked inside the kernels, they take nothing; as positives, all rows are summed.
    """
    real: Any = Block.mask_same_ids, Positives.__dict__["of"], Positives.within

    def of_all(cls: type[Positives], ids: Tensor) -> Positives:
        return cls._of_rows(ids, torch.arange(len(ids)))

    patched: Any = lambda *_: None, classmethod(of_all), lambda _, part: part
    Block.mask_same_ids, Positives.of, Positives.within = patched
    try:
        yield
    finally:
        Block.mask_same_ids, Positives.of, Positives.within = real


def traceable(config: Config, *, half: bool) -> Config:
    """The config with PyTorch's attention, and a precision that does not depend on the device."""
    precision = "bf16" if half else "fp32"
    found = {"train": config.train.model_copy(update={"precision": precision})}
    for name in ("audio", "image", "text"):
        section: Any = getattr(config, name)
        if getattr(section, "attention", "sdpa") != "sdpa":
            found[name] = section.model_copy(update={"attention": "sdpa"})
    return config.model_copy(update=found)


def fake_model(config: Config, mode: FakeMode) -> TwoTowers:
    """The config's model in training, with fake weights; needs no file."""
    with without_files(config) as complete, torch.device("meta"):
        model = TwoTowers(complete, weights=False).train()
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                value = _faked(weight, mode)
                module._parameters[name] = nn.Parameter(value, weight.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = _faked(value, mode)
    return model


def fake_batch(
    config: Config, clips: int, tokens: int, mode: FakeMode, frames: Sequence[int] | None = None
) -> Batch:
    """A batch with `tokens` in each sentence; with fusion, every clip is longer than the window.

    Args:
        frames: of packed clips, ascending.
    """
    rows = clips * len(config.loss.sentences)
    with mode:
        if frames is None:
            media = torch.empty(clips, *config.encoder.input_shape(config.fusion))
        else:
            mel = torch.empty(sum(frames), config.audio.mel_bins)
            media = PackedMels(mel, tuple(frames), tuple(range(clips)))
        ids = torch.empty(rows, tokens, dtype=torch.int64)
        sample_index = torch.empty(clips, dtype=torch.int64)
    attention_mask = torch.ones(rows, tokens, dtype=torch.int64)
    longer = torch.ones(clips, dtype=torch.bool) if config.fusion.on else None
    return Batch(media, ids, attention_mask, sample_index, np.arange(clips), 0, 1, longer)


@contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """A context in which torch.distributed is rank 0 of `world`, and collectives do nothing.

    Raises:
        RuntimeError: this process is in a process group.
    """
    joined = dist.is_available() and dist.is_initialized()
    if joined and not (world == dist.get_world_size() == 1):
        raise RuntimeError("fake ranks must come before the process joins its real ones")
    if world == 1:
        yield
        return
    # PyTorch's backend for such estimates; importing it registers it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _faked(x: Tensor, mode: FakeMode) -> Tensor:
    with mode:
        return torch.empty(x.shape, dtype=x.dtype)
