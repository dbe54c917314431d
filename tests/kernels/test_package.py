"""flap_kernels by itself: its version, and what importing it costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import flap_kernels

KERNELS = Path(__file__).parents[2] / "kernels"


def test_the_package_and_its_project_have_one_version_and_need_torch_and_triton_alone():
    settings = tomllib.loads((KERNELS / "pyproject.toml").read_text())
    project = settings["project"]
    assert project["name"] == "flap_kernels"
    # The version stands in __init__.py alone: there it is in the root project's wheel as well.
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    source = KERNELS / settings["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{flap_kernels.__version__}"\n' in source.read_text()
    needs = {requirement.partition(">=")[0] for requirement in project["dependencies"]}
    assert needs == {"torch", "triton"}


def test_importing_it_imports_no_compiler_and_nothing_of_the_repository():
    heavy = ("torch._dynamo", "torch._inductor", "sympy", "numpy.testing")
    code = f"""
import sys
import torch
before = set(sys.modules)
import flap_kernels
new = set(sys.modules) - before
assert not new & set({heavy}), new & set({heavy})
ours = {{name.partition(".")[0] for name in new}} & {{"bench", "tests", "flap_fast"}}
assert not ours, ours
"""
    env = os.environ | {"PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
