"""Windowed attention over packed clips: each token to so many of its clip on either side."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.batch import PackedMels
from flap_fast.encoders import attention as backends
from flap_fast.encoders.attention import packed_attention
from flap_fast.encoders.packing import segments
from flap_fast.encoders.vit.model import ViT
from flap_fast.model.masking import kept_patches, packed_patch_mask
from tests.closeness import assert_as_exact
from tests.tiny import tiny, vit_of

CPU = torch.device("cpu")
# Alone, shorter than a window, two alike, and longer than a tile of queries, whole tiles and not.
LENGTHS = [1, 4, 9, 9, 128, 301]
VARIABLE = ("audio.length=variable", "audio.max_duration_s=3")


def dense(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Over all tokens at once, those out of reach masked."""
    clip = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    token = torch.arange(len(clip))
    near = (token[:, None] - token).abs() <= window
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~((clip[:, None] == clip) & near), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def with_gradients(attend, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    y = attend(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


@pytest.mark.parametrize("window", [1, 5, 8, 64, 70, 300])
def test_a_window_is_attention_with_all_else_masked(window: int):
    q, k, v = torch.randn(3, sum(LENGTHS), 2, 8, dtype=torch.float64)
    clips = segments(LENGTHS, range(len(LENGTHS)), CPU, window=window)
    found = with_gradients(partial(packed_attention, segments=clips), q, k, v)
    wanted = with_gradients(partial(dense, window=window), q, k, v)
    for value, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-12)


def test_no_product_is_taken_of_tokens_far_apart(monkeypatch: pytest.MonkeyPatch):
    """Else a window would cost what all costs."""
    products: list[int] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, **options):
        products.append(len(q) * q.shape[2] * k.shape[2])
        return plain(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    x = torch.randn(2000, 1, 8)
    packed_attention(x, x, x, segments([1000, 1000], [0, 1], CPU, window=100))
    assert sum(products) <= 2 * 1000 * 300


class Windows(TorchDispatchMode):
    """The window that each variable-length kernel was called with."""

    def __init__(self):
        super().__init__()
        self.found: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_varlen_attn":
            self.found.append(tuple(next(x for x in args if isinstance(x, list))))
        elif name == "_flash_attention_forward":
            left, right = (kwargs or {})["window_size_left"], (kwargs or {})["window_size_right"]
            self.found.append((left, right))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_gpus_kernel_gets_the_window_on_both_sides(
    dropout: float, monkeypatch: pytest.MonkeyPatch
):
    """On tensors without memory, whose kernels check their arguments."""
    monkeypatch.setattr(backends, "varlen_serves", lambda *_: True)
    meta = torch.device("meta")
    x = torch.empty(sum(LENGTHS), 2, 8, dtype=torch.bfloat16, device=meta)
    clips = segments(LENGTHS, range(len(LENGTHS)), meta, window=5)
    with Windows() as windows:
        packed_attention(x, x, x, clips, dropout=dropout)
    assert windows.found == [(5, 5)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [1, 8, 70, 300])
def test_on_a_gpu_a_window_is_as_close_as_a_dense_mask(window: int):
    q, k, v = torch.randn(3, sum(LENGTHS), 2, 32, dtype=torch.float64)
    exact = with_gradients(partial(dense, window=window), q, k, v)
    clips = segments(LENGTHS, range(len(LENGTHS)), torch.device("cuda"), window=window)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    reference = with_gradients(partial(dense, window=window), q, k, v)
    found = with_gradients(
        partial(packed_attention, segments=clips), *(x.cuda() for x in (q, k, v))
    )
    for name, y, other, value in zip(("y", "q", "k", "v"), found, reference, exact, strict=True):
        assert_as_exact(name, y.cpu(), other, value, slack=4)


def config(*overrides: str) -> Config:
    return tiny(*VARIABLE, "audio.attention_window_s=0.32", *overrides)


def test_seconds_are_columns_of_patches_and_masking_thins_them():
    """0.32 s are 32 frames: two columns of 8 patches."""
    audio = vit_of(config())
    assert audio.window_tokens(1.0) == 16
    assert audio.window_tokens(0.6) == 10
    assert audio.window_tokens(0.001) == 1
    assert vit_of(tiny(*VARIABLE)).window_tokens(1.0) is None


@pytest.mark.parametrize(
    "mask",
    [
        ("mask.kind=2d", "mask.time_ratio=0.25", "mask.freq_ratio=0.3"),
        ("mask.kind=1d", "mask.ratio=0.7"),
        ("mask.kind=1d", "mask.ratio=0.7", "mask.unit=frame"),
    ],
)
def test_the_density_of_a_mask_is_what_long_clips_keep(mask: tuple[str, ...]):
    masking = config(*mask).mask
    packed = packed_patch_mask(masking, [3, 5], 8, 0, torch.arange(2))
    assert packed is not None
    kept = kept_patches(masking, (100_000, 8))
    assert packed.density == pytest.approx(kept / 800_000, rel=1e-4)


def test_with_one_block_what_is_out_of_reach_changes_no_bit():
    model = ViT(vit_of(config("audio.depth=1", "audio.use_cls=false"))).eval()
    mel = torch.randn(160, 128)
    other = mel.clone()
    other[-16:] = 1  # the last of ten columns, which the two before it see
    a, b = (model(PackedMels(x, (160,), (0,))).tokens for x in (mel, other))
    changed = (a != b).any(1)
    assert not changed[: 7 * 8].any()
    assert changed[7 * 8 :].all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("audio.length=fixed",), r"must be left out with audio\.length = fixed"),
        (("audio.pool=cls",), r"must be left out with audio\.pool = cls"),
        (("audio.attention=xformers",), r"must be left out with audio\.attention = xformers"),
        (("audio.attention_window_s=0",), r"attention_window_s"),
        (("audio.encoder=htsat",), r"audio\.attention_window_s"),
    ],
)
def test_a_window_is_refused_by_name_where_it_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)
