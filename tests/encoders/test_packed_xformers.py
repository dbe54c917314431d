"""Packed clips and captions under xformers: within each of them, and errors by the right name."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.encoders import attention as backends
from flap_fast.encoders.attention import packed_attention
from flap_fast.encoders.blocks import Blocks
from flap_fast.encoders.packing import pack, segments
from flap_fast.encoders.roberta.packed import _layer
from tests.closeness import assert_as_exact
from tests.tiny import tiny

LENGTHS = [1, 3, 3, 20]


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """xformers in plain words; the settings that its operators were wanted for."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: list[int], p: float) -> Tensor:
        assert (len(q), p) == (1, 0.0)
        parts = [x[0].as_subclass(Tensor).split(attn_bias) for x in (q, k, v)]
        heads_first = ([x.transpose(0, 1) for x in part] for part in zip(*parts, strict=True))
        plain = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([plain(*some).transpose(0, 1) for some in heads_first])[None]

    settings: list[str] = []

    def ops(setting: str) -> SimpleNamespace:
        settings.append(setting)
        mask = SimpleNamespace(from_seqlens=lambda lengths, *, device: lengths)
        fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=mask))
        return SimpleNamespace(fmha=fmha, memory_efficient_attention=attention)

    monkeypatch.setattr(backends, "xformers_ops", ops)
    monkeypatch.setattr("flap_fast.encoders.blocks.xformers_ops", ops)
    return settings


def test_clips_get_a_mask_of_their_lengths(asked: list[str]):
    torch.manual_seed(0)
    theirs, ours = Blocks(16, 2, 2, backend="xformers"), Blocks(16, 2, 2)
    ours.load_state_dict(theirs.state_dict())
    clips = segments(LENGTHS, range(len(LENGTHS)), torch.device("cpu"))
    x = torch.randn(sum(LENGTHS), 16)
    found = theirs(x.as_subclass(OnGpu), clips).as_subclass(Tensor)
    torch.testing.assert_close(found, ours(x, clips))
    assert asked == ["audio.attention"] * 4  # two blocks, built and run


def test_captions_ask_by_their_own_setting(asked: list[str]):
    text = tiny("text.packing=packed", "text.depth=1").text.build().eval()
    layer = text.get_submodule("inner.encoder.layer.0")
    mask = (torch.arange(20) < torch.tensor(LENGTHS)[:, None]).long()
    captions, x = pack(mask, torch.device("cpu")), torch.randn(sum(LENGTHS), 32)
    found = _layer(layer, x.as_subclass(OnGpu), captions, "xformers")
    wanted = _layer(layer, x, captions, "sdpa")
    torch.testing.assert_close(found.as_subclass(Tensor), wanted)
    assert asked == ["text.attention"]


def test_xformers_that_is_not_there_is_named_by_the_setting_of_clips(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "xformers", None)
    variable = ("audio.length=variable", "audio.attention=xformers")
    config = tiny(*variable)
    with pytest.raises(ConfigError, match=r"audio\.attention must be 'sdpa' where xformers"):
        config.audio.build(config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_xformers_is_as_close_as_pytorch():
    pytest.importorskip("xformers")
    q, k, v = torch.randn(3, sum(LENGTHS), 2, 32, dtype=torch.float64)
    rows = range(len(LENGTHS))
    exact = packed_attention(q, k, v, segments(LENGTHS, rows, torch.device("cpu")))
    clips = segments(LENGTHS, rows, torch.device("cuda"))
    q, k, v = (x.bfloat16().cuda() for x in (q, k, v))
    found, reference = (
        packed_attention(q, k, v, clips, backend=backend).cpu() for backend in ("xformers", "sdpa")
    )
    assert_as_exact("y", found, reference, exact, slack=4)
