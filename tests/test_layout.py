"""The rules that keep the project readable: who imports whom, and how long files get."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("flap_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")])

# Left to right; a room imports from itself and from what stands to its left. Losses and encoders'
# settings are sections of the config: PyTorch, kernels and modules they import inside functions.
ORDER = (
    *("files", "checks", "checksums", "places", "hub", "tensors", "launcher", "progress", "ranks"),
    "section",
    *("losses", "encoder settings", "config", "data", "encoders", "model", "preparation"),
    *("evaluation", "interchange", "training", "tools", "report", "commands"),
)
LATE = {"losses", "encoder settings"}
ROOMS = {room: set(ORDER[:n]) for n, room in enumerate(ORDER)}
# The commands and the public names stand to the right of everything.
LAST = {"__main__", "__init__"}

# A heavy dependency has one door: the only places that import it.
DOORS = {
    "triton": {"kernels/flap_kernels/launch.py"},
    "deepspeed": {"flap_fast/training/engine.py"},
    "nvidia": {"flap_fast/data/preprocess/dali.py"},
    "xformers": {"flap_fast/encoders/attention.py"},
    "transformers": {
        "flap_fast/encoders/roberta/model.py",
        "flap_fast/data/tokenize.py",
        "flap_fast/tools/profile/synthetic.py",
        "flap_fast/tools/enrich/rewrite.py",
        "flap_fast/tools/enrich/classifier.py",
        "flap_fast/interchange/clap_hf.py",
    },
    "huggingface_hub": {"flap_fast/hub.py", "flap_fast/interchange/card.py"},
    "onnxruntime": {
        "flap_fast/tools/enrich/yamnet.py",
        "flap_fast/interchange/to_onnx/comparison.py",
        "flap_fast/interchange/to_onnx/embed.py",
        "flap_fast/interchange/to_onnx/smoothing.py",
    },
    "onnx": {
        "flap_fast/tools/enrich/yamnet.py",
        "flap_fast/interchange/to_onnx/int8.py",
        "flap_fast/interchange/yamnet.py",
        "flap_fast/interchange/to_onnx/smoothing.py",
    },
    "matplotlib": {
        "flap_fast/report/figures.py",
        "flap_fast/report/masking.py",
        "flap_fast/report/profile.py",
    },
    "fastapi": {"flap_fast/tools/serve/app.py", "flap_fast/tools/serve/gate.py"},
    "uvicorn": {"flap_fast/tools/serve/run.py"},
    "jinja2": {"flap_fast/report/page.py"},
    "faiss": {"flap_fast/tools/nearest.py"},
    "fsspec": {"flap_fast/data/store.py"},
    "ray": {"flap_fast/preparation/ray_cluster.py"},
    "mteb": {"flap_fast/tools/mteb_encoder.py"},
}
LONGEST = 320
# A kernel's file holds in one place what the style wants there: reference, kernel, launch, op.
LONGER = {"kernels": 330}


def imports(file: Path, *, at_once: bool = False) -> set[str]:
    """Every module that a file imports, inside a function too; `at_once`: as it is imported."""
    found: set[str] = set()
    tree = ast.parse(file.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    """flap_fast.data.preprocess.mel -> data; an encoder's settings are a room of their own."""
    parts = module.split(".")[1:]
    settings = any(part.endswith("settings") for part in parts)
    if parts[:1] == ["encoders"] and (len(parts) == 1 or parts[1].isupper() or settings):
        return "encoder settings"
    return parts[0] if parts and parts[0] != "__version__" else "__init__"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way_through_the_doors(file: Path):
    name = file.relative_to(ROOT).as_posix()
    found = imports(file)
    if name.startswith("kernels/"):
        assert not {m for m in found if m.startswith("flap_fast")}, name
    else:
        here = room(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        seen = imports(file, at_once=True) if here in LATE else found
        there = {room(m) for m in seen if m.split(".")[0] == "flap_fast"} - {here}
        assert here in ROOMS or here in LAST, f"{name} is in no room: add it to ROOMS"
        allowed = {*ROOMS, *LAST} if here in LAST else ROOMS[here]
        assert there <= allowed, f"{name} imports {sorted(there - allowed)}"
    for package, doors in DOORS.items():
        if package in {module.split(".")[0] for module in found}:
            assert name in doors, f"{name} imports {package}; its door is {sorted(doors)}"


def test_every_door_is_used():
    for package, doors in DOORS.items():
        for door in doors:
            used = {module.split(".")[0] for module in imports(ROOT / door)}
            assert package in used, f"{door} no longer imports {package}"


@pytest.mark.parametrize(
    "file",
    [*SOURCES, *sorted(ROOT.glob("bench/**/*.py"))],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_files_stay_readable(file: Path):
    lines = len(file.read_text().splitlines())
    most = LONGER.get(file.relative_to(ROOT).parts[0], LONGER.get(file.name, LONGEST))
    assert lines <= most, f"{file.relative_to(ROOT)} has {lines} lines: split it by what it does"


def test_kernels_need_torch_and_triton_alone():
    for file in ROOT.glob("kernels/**/*.py"):
        outside = {module.split(".")[0] for module in imports(file)}
        known = {"torch", "triton", "flap_kernels", "__future__"}
        assert outside <= known | sys.stdlib_module_names, file.name


def test_a_folder_named_kernels_shadows_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
