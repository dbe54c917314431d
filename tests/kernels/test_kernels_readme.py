"""The README of the kernels: its trainer runs under torchrun, and it names every public op."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flap_kernels

KERNELS = Path(__file__).parents[2] / "kernels"
README = (KERNELS / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def trainer() -> str:
    (code,) = (block for block in BLOCKS if "init_process_group" in block)
    return code


def sharded_trainer() -> str:
    """The trainer with the README's lines for FSDP2 in place of DDP's."""
    (variant,) = (block for block in BLOCKS if "fully_shard(" in block and block not in trainer())
    code, changed = re.subn(
        r"^    model = DistributedDataParallel.*\n", variant, trainer(), flags=re.M
    )
    assert changed == 1
    return code


def run_on(ranks: int, code: str, folder: Path) -> list[float]:
    """The losses that the ranks printed."""
    # A thread of gloo that waits for the GIL when Python ends aborts the process, 1 in 25 times on
    # a busy machine (PyTorch 2.14): see flap_fast/ranks/__init__.py.
    (folder / "train.py").write_text(f"{code}\nimport time\ntime.sleep(0.2)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = os.environ | {"PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""  # gloo, wherever the tests run
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", str(ranks), str(folder / "train.py")],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [float(x) for x in re.findall(r"loss (\d+\.\d+)", done.stdout)]


def test_its_trainer_learns_on_two_ranks(tmp_path):
    losses = run_on(2, trainer(), tmp_path)
    assert len(losses) == 5
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_its_trainer_has_the_same_losses_with_fsdp2(tmp_path):
    losses = run_on(2, trainer(), tmp_path)
    assert run_on(2, sharded_trainer(), tmp_path) == pytest.approx(losses, abs=2e-4)


def test_its_masked_autoencoder_has_the_error_of_plain_pytorch():
    (code,) = (block for block in BLOCKS if "masked_mse(" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    mel, mask, rows = names["mel"], names["mask"], torch.arange(4)[:, None]
    patches = mel.reshape(4, 32, 16, 8, 16).permute(0, 1, 3, 2, 4).reshape(4, 256, 256)
    wanted = patches[rows, mask.ids_drop.long()]
    variance, mean = torch.var_mean(wanted, dim=2, keepdim=True)
    error = names["pixels"](names["dropped"]) - (wanted - mean) / (variance + 1e-6).sqrt()
    assert names["loss"].item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert names["patch"].weight.grad.abs().sum() > 0


def test_its_trainer_is_about_30_lines_long():
    assert len([line for line in trainer().splitlines() if line.strip()]) <= 35


def test_it_names_every_public_op_and_drop_in():
    ops = {name for name in flap_kernels.__all__ if name.islower()}
    drop_ins = {"ClipLoss", "SigLipLoss", "MultipleNegativesRankingLoss"}
    assert {name for name in ops | drop_ins if f"`{name}`" not in README} == set()
