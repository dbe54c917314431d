"""Tensors of files: what a model does not take."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.tensors import fault, is_finite, load_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    x = torch.randn(7, 33).to(dtype)
    assert is_finite(x)
    assert fault(x, torch.float32) is None
    x[6, 32] = value
    assert not is_finite(x)
    assert fault(x, torch.float32) == "with values that are not finite"


def test_the_largest_numbers_and_no_numbers_are_finite():
    assert is_finite(torch.full((100,), torch.finfo(torch.float32).max))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.zeros((3,), dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (torch.int32, torch.float32),
        (torch.float32, torch.int64),
        (torch.int32, torch.int64),
        (torch.bool, torch.uint8),
        (torch.complex64, torch.float32),
    ],
)
def test_numbers_of_another_kind_are_refused(found, wanted):
    assert "which must be" in (fault(torch.zeros(2, dtype=found), wanted) or "")


def test_a_header_that_holds_much_else_is_named_in_a_short_line(tmp_path):
    """What safetensors says of it quotes the value."""
    header = json.dumps({"a": "x" * 5000}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigError, match=r"a\.safetensors cannot be read: ") as caught:
        load_tensors(file)
    assert len(str(caught.value)) < 700


def test_a_number_that_is_infinite_only_in_the_model_is_found():
    x = torch.zeros(2, 3, dtype=torch.float64)
    x[1, 2] = 1e300
    assert fault(x, torch.float64) is None
    assert fault(x, torch.float32) == "with values that are not finite"
