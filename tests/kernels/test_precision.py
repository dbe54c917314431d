"""Products and their sums: what is read, in which type, and whose settings come back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from flap_kernels import precision
from flap_kernels.precision import (
    accumulator_dtype,
    add_product,
    float32_precision,
    float32_products,
    product_dtype,
    without_autocast,
)

TYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("total", "factors"), TYPES, ids=str)
def test_without_beta_what_stands_in_the_total_is_not_read(total, factors, device):
    a, b = (torch.full((16, 16), x, dtype=factors, device=device) for x in (2.0, 3.0))
    out = torch.full((16, 16), torch.nan, dtype=total, device=device)
    assert add_product(out, a, b, beta=0, alpha=-1) is out
    assert (out == -96).all()


@pytest.mark.parametrize(("total", "factors"), TYPES, ids=str)
def test_a_product_is_added(total, factors, device):
    a, b = (torch.full((16, 16), x, dtype=factors, device=device) for x in (2.0, 3.0))
    out = torch.ones(16, 16, dtype=total, device=device)
    add_product(add_product(out, a, b), a, b, alpha=-1)
    assert (out == 1).all()
    add_product(out, a, b)
    assert (out == 97).all()


HAS = ["addmm", "mm", "upcast"]


@pytest.mark.parametrize("has", HAS)
def test_on_a_gpu_a_product_of_bfloat16_is_not_rounded(has, kernel_device, monkeypatch):
    best = precision._narrow_product(torch.ones((), dtype=torch.bfloat16, device=kernel_device))
    if HAS.index(has) < HAS.index(best):
        pytest.skip(f"this torch has no {has} of narrow factors here")
    monkeypatch.setattr(precision, "_narrow_product", lambda _: has)
    assert_product_is_not_rounded(kernel_device)


def assert_product_is_not_rounded(device: str) -> None:
    # 257 needs 9 bits of fraction, and bfloat16 holds 8.
    a = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    a[:, 0], a[:, 1] = 256, 1
    out = torch.ones(16, 16, device=device)
    add_product(out, a, torch.ones_like(a))
    assert (out == 258).all()
    add_product(out, a, torch.ones_like(a), beta=0, alpha=-1)
    assert (out == -257).all()


class Library:
    """PyTorch of a GPU, on a CPU: products of narrow factors in float32, or refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *has: str):
        self.asked: list[str] = []
        self.capturing = False
        self._has, self._addmm, self._mm = has, torch.addmm, torch.mm
        monkeypatch.setattr(precision, "_NARROW_PRODUCTS", {})
        monkeypatch.setattr(torch, "addmm", self.addmm)
        monkeypatch.setattr(torch, "mm", self.mm)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def addmm(self, total, a, b, *, out_dtype=None, **options):
        self._ask("addmm", out_dtype)
        return self._addmm(total, a.to(out_dtype), b.to(out_dtype), **options)

    def mm(self, a, b, *, out_dtype=None):
        self._ask("mm", out_dtype)
        return self._mm(a.to(out_dtype), b.to(out_dtype))

    def _ask(self, name: str, out_dtype: torch.dtype | None) -> None:
        if out_dtype is not None:
            self.asked.append(name)
            if name not in self._has:
                raise (TypeError if name == "addmm" else RuntimeError)(f"{name} is refused")


@pytest.mark.parametrize(
    ("has", "asked"),
    [
        (["addmm", "mm"], ["addmm", "addmm", "addmm"]),
        (["mm"], ["addmm", "mm", "mm", "mm"]),
        ([], ["addmm", "mm"]),
    ],
)
def test_what_a_pytorch_refuses_is_tried_once(has, asked, monkeypatch):
    library = Library(monkeypatch, *has)
    assert_product_is_not_rounded("cpu")
    assert library.asked == asked


def test_nothing_is_tried_while_a_cuda_graph_is_captured(monkeypatch):
    library = Library(monkeypatch, "addmm", "mm")
    library.capturing = True
    assert_product_is_not_rounded("cpu")
    assert library.asked == []
    library.capturing = False
    assert_product_is_not_rounded("cpu")
    assert library.asked == ["addmm"] * 3
    library.capturing = True
    assert_product_is_not_rounded("cpu")
    assert library.asked == ["addmm"] * 5


def test_nothing_is_tried_on_fake_tensors_and_nothing_learnt_of_them(monkeypatch):
    library = Library(monkeypatch, "addmm", "mm")
    with FakeTensorMode():
        a = torch.zeros(16, 16, dtype=torch.bfloat16)
        assert add_product(torch.zeros(16, 16), a, a).shape == (16, 16)
    assert library.asked == []
    assert_product_is_not_rounded("cpu")
    assert library.asked == ["addmm"] * 3


def test_nothing_is_tried_while_torch_compile_traces(monkeypatch):
    library = Library(monkeypatch, "addmm", "mm")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_product_is_not_rounded("cpu")
    assert library.asked == []


def test_a_trial_without_memory_is_no_refusal(monkeypatch):
    library = Library(monkeypatch, "addmm", "mm")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("on purpose")

    with monkeypatch.context() as full:
        full.setattr(torch, "addmm", fail)
        with pytest.raises(torch.OutOfMemoryError):
            assert_product_is_not_rounded("cpu")
    assert_product_is_not_rounded("cpu")
    assert library.asked == ["addmm"] * 3


def fail_within_float32_products() -> None:
    with float32_products("tf32"):
        assert float32_precision() == "tf32"
        with float32_products("ieee"):
            assert float32_precision() == "ieee"
        assert float32_precision() == "tf32"
        raise RuntimeError("on purpose")


def test_the_programs_precision_comes_back():
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="on purpose"):
        fail_within_float32_products()
    assert torch.backends.cuda.matmul.fp32_precision == before


BACKENDS: Any = torch.backends


@pytest.fixture
def unset() -> Iterator[None]:
    """Every setting of float32 products as a new process has it, before and after."""
    forget_precisions()
    yield
    forget_precisions()


def forget_precisions() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    BACKENDS.mkldnn.matmul.fp32_precision = "none"
    BACKENDS.cudnn.fp32_precision = "none"  # all of CUDA's operations
    BACKENDS.fp32_precision = "none"


def readings() -> list[object]:
    """What every getter says, or that it refuses to, as of mixed settings."""
    getters: list[Callable[[], object]] = [
        lambda: BACKENDS.fp32_precision,
        lambda: BACKENDS.cudnn.fp32_precision,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: BACKENDS.cudnn.conv.fp32_precision,
        lambda: BACKENDS.cudnn.rnn.fp32_precision,
        lambda: BACKENDS.mkldnn.matmul.fp32_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: BACKENDS.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ]
    found: list[object] = []
    for getter in getters:
        try:
            found.append(getter())
        except RuntimeError as mixed:
            found.append(str(mixed)[:60])
    return found


def readings_as_settings_change(
    before: list[Callable[[], None]],
    later: list[Callable[[], None]],
    context: Callable[..., AbstractContextManager[None]],
) -> list[list[object]]:
    """All readings after a context entered with settings, and after each later setting."""
    forget_precisions()
    for setting in before:
        setting()
    with context("tf32"), context("ieee"):
        pass
    found = [readings()]
    for setting in later:
        setting()
        found.append(readings())
    return found


def setter(module: object, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


@pytest.mark.usefixtures("unset")
def test_afterwards_settings_are_followed_and_read_as_without_the_context():
    generic, cuda, matmul = BACKENDS, BACKENDS.cudnn, BACKENDS.cuda.matmul
    later = [
        *(setter(generic, "fp32_precision", value) for value in ("tf32", "ieee", "none")),
        *(setter(cuda, "fp32_precision", value) for value in ("tf32", "ieee", "none")),
        setter(generic, "fp32_precision", "tf32"),
        setter(matmul, "fp32_precision", "none"),
    ]
    legacy: list[list[Callable[[], None]]] = [
        [],
        *([lambda p=p: torch.set_float32_matmul_precision(p)] for p in ("highest", "high")),
        [lambda: torch.set_float32_matmul_precision("medium")],
        *([setter(matmul, "allow_tf32", value)] for value in (True, False)),
    ]
    values = ["none", "ieee", "tf32"]
    for old, g, c, m in product(legacy, [*values, "bf16"], values, [None, *values]):
        new = [setter(generic, "fp32_precision", g), setter(cuda, "fp32_precision", c)]
        own = [] if m is None else [setter(matmul, "fp32_precision", m)]
        for before in ([*old, *new, *own], [*own, *new, *old], [*new, *own, *old]):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = readings_as_settings_change(before, later, float32_products)
            expected = readings_as_settings_change(before, later, nullcontext)
            assert found == expected, (g, c, m)


def test_factors_are_rounded_to_autocasts_type_where_there_is_one():
    weight = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(weight) == torch.bfloat16
        assert product_dtype(weight.double()) == torch.float64
        with without_autocast(weight.device):
            assert product_dtype(weight) == torch.float32
    with without_autocast(torch.device("meta")):
        assert product_dtype(weight.to("meta")) == torch.float32


def test_sums_are_in_float32_at_least():
    found = [accumulator_dtype(x) for x in (torch.bfloat16, torch.float32, torch.float64)]
    assert found == [torch.float32, torch.float32, torch.float64]
