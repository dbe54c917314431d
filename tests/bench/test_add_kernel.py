"""What docs/adding.md says of adding a kernel, done in a copy of the packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

KERNEL = '''"""scale_tokens: each token times a number of its own.

    y[n, :] = w[n] x[n, :]
"""

import torch

from flap_kernels.launch import jit, run_kernel, runs_triton, tl
from flap_kernels.spec import Inputs, Kernel


def scale_tokens_reference(x, w):
    """The product by broadcasting: what `scale_tokens` means."""
    return x * w[:, None]


@jit
def scale_tokens_kernel(
    x_ptr, w_ptr, out_ptr, D, stride_n, stride_d, stride_w, BLOCK_D: tl.constexpr
):
    n, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    mask = offs_d < D
    # y[n, :] = w[n] x[n, :]
    x = tl.load(x_ptr + n * stride_n + offs_d * stride_d, mask=mask, other=0.0)
    y = x.to(tl.float32) * tl.load(w_ptr + n * stride_w).to(tl.float32)
    tl.store(out_ptr + n * D + offs_d, y.to(x.dtype), mask=mask)


@torch.library.custom_op("flap_kernels::scale_tokens", mutates_args=())
def _scale_tokens(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if not runs_triton(x):
        return scale_tokens_reference(x, w)
    out, (N, D) = _fake(x, w), x.shape
    strides = *x.stride(), *w.stride()
    run_kernel(scale_tokens_kernel, (N,), x, w, out, D, *strides, BLOCK_D=1024)
    return out


@_scale_tokens.register_fake
def _fake(x, w):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, w = ctx.saved_tensors
    return grad * w[:, None], (grad * x).sum(1)


_scale_tokens.register_autograd(_backward, setup_context=_setup)


def scale_tokens(x, w):
    """Each token times its number, (N, D)."""
    return _scale_tokens(x, w)


def _inputs(size, generator):
    N, D = {"edge": (1, 1), "odd": (71, 67), "paper": (4096, 768)}[size]
    draw = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    return Inputs({"x": torch.randn(N, D, **draw), "w": torch.randn(N, **draw)}, ("x", "w"))


KERNEL = Kernel("scale_tokens", scale_tokens, scale_tokens_reference, _inputs)
'''
PROGRAMS = '''"""What `scale_tokens` launches."""

from bench.programs.program import PaperSizes, Program
from flap_kernels.scale_tokens import scale_tokens_kernel


def _programs(arch):
    N, D = 4096, 768
    signature = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "D": D}
    signature |= {"stride_n": D, "stride_d": 1, "stride_w": 1}
    constants = {"BLOCK_D": 1024}
    return (Program("scale_tokens", scale_tokens_kernel, signature, constants),)


PAPER = PaperSizes(_programs, bytes_moved=4 * 4096 * 768)
'''
TESTED = ("as_exact_as_its_reference", "strided", "same_bits", "proper_operator", "as_many_flop")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages and the tests of kernels, to be changed, with the kernel's files in them."""
    for folder in ("kernels", "bench", "tests/kernels"):
        skip = shutil.ignore_patterns("__pycache__", "results", "build", "*.egg-info")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    tests = ("tests/__init__.py", "tests/closeness.py", "tests/interpreter.py")
    for file in ("pyproject.toml", *tests):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "kernels/flap_kernels/scale_tokens.py").write_text(KERNEL)
    (tmp_path / "bench/programs/scale_tokens.py").write_text(PROGRAMS)
    package = tmp_path / "kernels/flap_kernels/__init__.py"
    imported = "from flap_kernels.scale_tokens import KERNEL as _SCALE_TOKENS\n"
    insert(package, "from flap_kernels.spec import", imported)
    insert(package, "        # one line for each kernel", "        _SCALE_TOKENS,\n")
    return tmp_path


def insert(file: Path, before: str, line: str) -> None:
    text = file.read_text()
    assert text.count(before) == 1, f"{file} no longer says {before!r}"
    file.write_text(text.replace(before, line + before))


def list_programs(copy: Path) -> None:
    file = copy / "bench/programs/__init__.py"
    insert(file, "    unshuffle_tokens,\n)", "    scale_tokens,\n")
    insert(file, "    # one line for each kernel", '    "scale_tokens": scale_tokens.PAPER,\n')


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(copy), str(copy / "kernels")))
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=env, capture_output=True, text=True, check=False
    )


def run_tests(copy: Path, chosen: str, *files: str) -> subprocess.CompletedProcess[str]:
    """Run the copy's tests of these files that the expression chooses."""
    return python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files)


def test_a_kernel_is_a_file_and_a_line_and_then_tested_compiled_and_timed(copy: Path):
    list_programs(copy)
    files = ("tests/kernels/test_every_kernel.py", "tests/kernels/test_flops.py")
    tested = run_tests(copy, f"scale_tokens and not cuda and ({' or '.join(TESTED)})", *files)
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert tested.stdout.split()[0] == "." * 18

    compiled = python(copy, "-m", "bench.static", "--kernel", "scale_tokens", "--arch", "90")
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    assert compiled.stdout.splitlines()[-1] == "static: 1 program, 0 faults"

    code = "from bench.tasks import others; print(*{t.op for t in others('paper')})"
    timed = python(copy, "-c", code)
    assert "scale_tokens" in timed.stdout.split(), timed.stderr[-2000:]


def test_a_kernel_that_errs_is_found_out(copy: Path):
    """The same file with a fault: the tests that it gets by being listed say so."""
    file = copy / "kernels/flap_kernels/scale_tokens.py"
    fault = file.read_text().replace("n * stride_w", "n")
    assert fault != file.read_text()
    file.write_text(fault)
    chosen = "scale_tokens and strided and interpreter"
    tested = run_tests(copy, chosen, "tests/kernels/test_every_kernel.py")
    assert tested.returncode == 1, tested.stdout[-3000:]
    assert "test_kernel_takes_strided_inputs[" in tested.stdout


def test_a_kernel_without_programs_is_refused(copy: Path):
    (copy / "tests/bench").mkdir()
    shutil.copy(ROOT / "tests/bench/test_static.py", copy / "tests/bench")
    tested = run_tests(copy, "every_kernel_has_its_programs", "tests/bench/test_static.py")
    assert tested.returncode == 1, tested.stdout[-2000:]
    assert "AssertionError" in tested.stdout
    assert "scale_tokens" in tested.stdout
