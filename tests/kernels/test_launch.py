"""Kernels are launched on their tensors' device, whichever is current."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import flap_kernels
from flap_kernels.launch import run_kernel

FILES = sorted(Path(flap_kernels.__file__).parent.rglob("*.py"))


def launched_by_hand(source: str) -> list[str]:
    """`kernel[grid](...)`: what is called is an item, as of nothing else in the package."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [ast.unparse(call) for call in calls if isinstance(call, ast.Subscript)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_launch_goes_through_run_kernel(file: Path):
    found = launched_by_hand(file.read_text())
    assert found == (["kernel[grid]"] if file.stem == "launch" else [])


def test_a_launch_by_hand_is_found():
    assert launched_by_hand("my_kernel[(3, 4)](x, y)") == ["my_kernel[3, 4]"]


def test_a_launch_happens_on_the_device_of_its_first_tensor(monkeypatch):
    events: list[object] = []

    @contextmanager
    def device_of(x: torch.Tensor):
        events.append(x)
        yield
        events.append("left")

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *arguments, **options: events.append((grid, arguments, options))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x, y = torch.zeros(2), torch.ones(3)
    run_kernel(Kernel(), (5,), x, y, 7, BLOCK=16)
    assert events[0] is x
    assert events[1] == ((5,), (x, y, 7), {"BLOCK": 16})
    assert events[2:] == ["left"]
