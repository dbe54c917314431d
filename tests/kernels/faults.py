"""A fault put into a kernel: its source with one piece replaced, wherever the kernel is used."""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Fault:
    """One mistake in one `@jit` function."""

    says: str
    """What is wrong then."""
    op: str
    """The op of `KERNELS` that must be found out."""
    kernel: Any
    """The `@jit` function."""
    right: str
    """A piece of its source, which stands there once."""
    wrong: str


def put_in(fault: Fault, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Replace the kernel by its faulty copy in every module that knows it, for one test."""
    function = fault.kernel.fn
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(fault.right) == 1, (
        f"stands {source.count(fault.right)} times: {fault.right}"
    )
    file = folder / f"{function.__name__}.py"  # Triton reads a kernel's source from its file
    file.write_text(source.replace(fault.right, fault.wrong))
    namespace = dict(function.__globals__)
    exec(compile(file.read_text(), str(file), "exec", dont_inherit=True), namespace)
    for name, module in list(sys.modules.items()):
        if name.startswith("flap_kernels"):
            for attribute, value in list(vars(module).items()):
                if value is fault.kernel:
                    monkeypatch.setattr(module, attribute, namespace[function.__name__])
