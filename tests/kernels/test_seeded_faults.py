"""The contract finds mistakes: each of these, put into a kernel, makes it fail."""

from __future__ import annotations

import pytest
import torch

from flap_kernels import KERNELS, infonce_tiles
from tests.kernels.faults import Fault, put_in
from tests.kernels.test_every_kernel import check_contract, strided

FAULTS = [
    Fault(
        "a wrong stride",
        "infonce",
        infonce_tiles._products,
        "offs_n[None, :] * stride_yn",
        "offs_n[None, :] * stride_xm",
    ),
    Fault(
        "the width's end unmasked",
        "infonce",
        infonce_tiles._products,
        "mask=mask_m & (offs_d[None, :] < D - d)",
        "mask=mask_m",
    ),
    Fault(
        "rows and columns past the end counted",
        "infonce",
        infonce_tiles.negatives_kernel,
        "out = is_positive | ~(mask_m[:, None] & mask_n[None, :])",
        "out = is_positive",
    ),
    Fault(
        "the positive counted as its own negative",
        "infonce",
        infonce_tiles.negatives_kernel,
        "out = is_positive | ",
        "out = ",
    ),
    Fault(
        "the positive not subtracted",
        "infonce",
        infonce_tiles.weights_kernel,
        "tl.where(is_positive & mask_n[None, :], at_positive, weight)",
        "weight",
    ),
    Fault(
        "row and column sums swapped",
        "infonce",
        infonce_tiles.weights_kernel,
        "tl.load(row_negative_ptr + offs_m",
        "tl.load(column_negative_ptr + offs_m",
    ),
    Fault(
        "a tile's columns stored in another tile's place",
        "infonce",
        infonce_tiles.negatives_kernel,
        "column_part_ptr + pid_m.to(tl.int64) * N",
        "column_part_ptr + pid_n.to(tl.int64) * N",
    ),
    Fault(
        "the last parts left out of a sum",
        "infonce",
        infonce_tiles.add_parts_kernel,
        "(offs_p[:, None] < parts)",
        "(offs_p[:, None] < parts - 1)",
    ),
    Fault(
        "weights stored past a row's end",
        "infonce",
        infonce_tiles.weights_kernel,
        "tl.arange(0, BLOCK_M)[:, None] * stride_wm",
        "tl.arange(0, BLOCK_M)[:, None] * N",
    ),
]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.op}: {fault.says}")
def test_contract_finds(fault, kernel_device, monkeypatch, tmp_path):
    put_in(fault, monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match=fault.op):
        check_contract(
            KERNELS[fault.op], "odd", torch.float32, kernel_device, draws=1, prepare=strided
        )
