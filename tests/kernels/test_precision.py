"""Products and their sums: what is read, in which type, and whose settings come back."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("adds", [True, False], ids=["onto float32", "through a temporary"])
def test_on_a_gpu_a_product_of_bfloat16_is_not_rounded(adds, kernel_device, monkeypatch):
    if (
        adds
        and kernel_device == "cuda"
        and not precision._adds_to_float32(torch.bfloat16, torch.device("cuda"))
    ):
        pytest.skip("this torch does not add onto float32")
    monkeypatch.setattr(precision, "_adds_to_float32", lambda *_: adds)
    # 257 needs 9 bits of fraction, and bfloat16 holds 8.
    a = torch.zeros(16, 16, dtype=torch.bfloat16, device=kernel_device)
    a[:, 0], a[:, 1] = 256, 1
    out = torch.ones(16, 16, device=kernel_device)
    add_product(out, a, torch.ones_like(a))
    assert (out == 258).all()


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
