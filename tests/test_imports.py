"""What commands import: a heavy package only if the command uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flap_fast.config import Config
from flap_fast.config.file import dump_config
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from tests.sounds import encode, tone
from tests.tiny import tiny

# Packages that neither `flap --help` nor a trained model need.
UNUSED = {
    *(
        "deepspeed",
        "nvidia.dali",
        "tensorboard",
        "torch.utils.tensorboard",
        "matplotlib",
        "sklearn",
    ),
    *("torchvision", "xformers", "onnxruntime", "faiss", "ray", "pandas", "fastapi", "uvicorn"),
}
# These take seconds; the start of the command must not import them.
HEAVY = UNUSED | {"torch", "transformers", "numpy", "soundfile", "triton", "PIL", "scipy"}
# Custom operators and transformers' models import these later; opening other models must not.
LATER = {"torch._dynamo", "torch._inductor", "scipy", "transformers.modeling_utils"}


def imported(*programs: tuple[str, set[str]]) -> list[set[str]]:
    """For each (program, modules) those of them that there are after it.

    All programs run in one process of their own, one after another.
    """
    lines = ["import sys"]
    for program, modules in programs:
        lines += [program, f"print('imported', *({modules!r} & sys.modules.keys()))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    found = [set(row[1:]) for row in rows if row[:1] == ["imported"]]
    assert len(found) == len(programs)
    return found


def test_the_command_starts_and_prepares_without_heavy_packages():
    of_shards = {"numpy", "soundfile", "PIL"}
    assert imported(
        ("import flap_fast.__main__", HEAVY),
        ("import flap_fast.preparation.prepare", HEAVY - of_shards),
    ) == [set(), set()]


def saved(config: Config, folder: Path) -> Path:
    model = TwoTowers(config)
    save_model(folder, config, model, model.state_dict())
    return folder


def test_the_end_of_a_command_looks_for_no_garbage():
    # What runs at exit comes after `main`; the interpreter's own collections come after that.
    program = """
import atexit, gc, sys
from flap_fast.__main__ import main
atexit.register(lambda: print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000))
sys.argv = ["flap", "--version"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["True True"], done.stderr


def test_a_run_starts_without_a_search_of_all_objects_for_garbage(prepared: Path, tmp_path: Path):
    config = tiny(f"data.train={prepared}/train", f"data.val={prepared}/val", "train.steps=1")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    program = f"""
import gc, sys
found = []
gc.callbacks.append(lambda phase, info: found.append((phase, info["generation"])))
from flap_fast.__main__ import main
sys.argv = ["flap", "train", {str(tmp_path / "config.yaml")!r}, "run.folder={tmp_path}"]
try:
    main()
finally:
    print(found.count(("start", 0)) > 0, found.count(("start", 2)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["True 0"], done.stderr


@pytest.fixture(scope="module")
def after(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What is imported after a model is opened, after another ranks, and after a training."""
    folder = tmp_path_factory.mktemp("imports")
    sound = folder / "tone.wav"
    sound.write_bytes(encode(tone(440, 1.0, 16_000), 16_000, "WAV"))
    clip, roberta = saved(tiny("text.encoder=clip"), folder / "clip"), saved(tiny(), folder / "m")
    opening = f"import flap_fast\nflap_fast.load({str(clip)!r})"
    ranking = f"flap_fast.load({str(roberta)!r}).rank({str(sound)!r}, ['a', 'b'])"
    settings = [f"data.train={prepared}/train", f"data.val={prepared}/val", "train.steps=1"]
    settings += [f"run.folder={folder}", "frontend.backend=torch", "log.tensorboard=false"]
    training = f"""
from flap_fast.training.loop import train
from tests.tiny import tiny
train(tiny(*{settings!r}))
"""
    found = imported((opening, UNUSED | LATER), (ranking, UNUSED), (training, UNUSED))
    return dict(zip(("opening", "ranking", "training"), found, strict=True))


def test_opening_a_model_imports_no_compiler(after: dict[str, set[str]]):
    assert after["opening"] == set()


def test_ranking_imports_no_package_of_other_commands(after: dict[str, set[str]]):
    assert after["ranking"] == set()


def test_training_imports_no_package_that_the_run_does_not_use(after: dict[str, set[str]]):
    assert after["training"] == set()
