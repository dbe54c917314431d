"""The tests of every kernel find mistakes: each of these, put into a kernel, makes them fail."""

from __future__ import annotations

import pytest
import torch

from flap_kernels import KERNELS
from flap_kernels.infonce import triton_kernels, triton_product, triton_sigmoid
from tests.kernels.faults import Fault, put_in
from tests.kernels.test_every_kernel import check_as_exact, strided

FAULTS = [
    Fault(
        "a wrong stride",
        "infonce",
        triton_product.products,
        "offs_n[None, :] * stride_yn",
        "offs_n[None, :] * stride_xm",
    ),
    Fault(
        "the width's end unmasked",
        "infonce",
        triton_product.products,
        "mask=mask_m & (offs_d[None, :] < D - d)",
        "mask=mask_m",
    ),
    Fault(
        "rows and columns past the end counted",
        "infonce",
        triton_kernels.lse_negatives_kernel,
        "out = is_positive | ~(mask_m[:, None] & mask_n[None, :])",
        "out = is_positive",
    ),
    Fault(
        "the positive counted as its own negative",
        "infonce",
        triton_kernels.lse_negatives_kernel,
        "out = is_positive | ",
        "out = ",
    ),
    Fault(
        "the positive not subtracted",
        "infonce",
        triton_kernels.dlogits_kernel,
        "tl.where(is_positive & mask_n[None, :], at_positive, dlogits)",
        "dlogits",
    ),
    Fault(
        "row and column sums swapped",
        "infonce",
        triton_kernels.dlogits_kernel,
        "tl.load(row_lse_ptr + offs_m",
        "tl.load(column_lse_ptr + offs_m",
    ),
    Fault(
        "a tile's columns stored over another tile's",
        "infonce",
        triton_kernels.lse_negatives_kernel,
        "column_partial_ptr + pid_m.to(tl.int64) * N",
        "column_partial_ptr + pid_n.to(tl.int64) * N",
    ),
    Fault(
        "the last partial sums left out",
        "infonce",
        triton_kernels.add_partial_lse_kernel,
        "(offs_p[:, None] < partials)",
        "(offs_p[:, None] < partials - 1)",
    ),
    Fault(
        "dlogits stored past a row's end",
        "infonce",
        triton_kernels.dlogits_kernel,
        "start_m.to(tl.int64) * stride_gm",
        "start_m.to(tl.int64) * N",
    ),
    Fault(
        "the positive's loss taken for that of another",
        "sigmoid_loss",
        triton_sigmoid.sigmoid_kernel,
        "tl.maximum(-logits, 0.0) + log1p",
        "tl.maximum(logits, 0.0) + log1p",
    ),
    Fault(
        "columns past the end given a loss",
        "sigmoid_loss",
        triton_sigmoid.sigmoid_kernel,
        "losses = tl.where(out, 0.0, losses)",
        "losses = losses",
    ),
    Fault(
        "the positive not subtracted",
        "sigmoid_loss",
        triton_sigmoid.sigmoid_kernel,
        "-tl.where(logits >= 0.0, e, 1.0) / above_one",
        "tl.where(logits >= 0.0, 1.0, e) / above_one",
    ),
    Fault(
        "the bias' gradient without its last slab",
        "sigmoid_loss",
        triton_sigmoid.sigmoid_kernel,
        "bias_sum += tl.sum(dlogits)",
        "bias_sum = bias_sum",
    ),
]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.op}: {fault.says}")
def test_every_kernels_tests_find(fault, kernel_device, monkeypatch, tmp_path):
    put_in(fault, monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match=fault.op):
        check_as_exact(
            KERNELS[fault.op], "odd", torch.float32, kernel_device, draws=1, prepare=strided
        )
