"""What docs/adding.md says of adding an encoder or a loss, done in a copy of the package.

Evaluations, sources and kernels have such a test in their own rooms.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from flap_fast.evaluation.record import Evaluation
from flap_fast.losses.base import Loss
from flap_fast.preparation.sources.layout import Source
from tests.copies import ROOT, flap

SETTINGS = '''"""Settings of an encoder that averages the frames of a log-mel."""

from typing import Annotated, Literal

from flap_fast.encoders.audio_settings import AudioEncoder
from flap_fast.section import MEANS_WEIGHTS, Count


class FrameMeanSettings(AudioEncoder):
    encoder: Annotated[Literal["frame_mean"], MEANS_WEIGHTS] = "frame_mean"
    """The mean over frames, and a linear layer."""
    width: Count = 24
    """Width of its vector."""

    def build(self, config, *, recompute=False):
        from flap_fast.encoders.frame_mean.model import FrameMean

        return FrameMean(self)
'''
MODEL = '''"""The mean over frames, and a linear layer."""

from torch import nn

from flap_fast.encoders.base import Encoded


class FrameMean(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.width = settings.width
        self.linear = nn.Linear(settings.mel_bins, settings.width)

    def forward(self, media, mask=None, *, erase=None, longer=None):
        x = self.linear(media[:, 0].mean(1))
        return Encoded(x.float(), x[:, None])
'''
LOSS = '''"""How far a caption's embedding is from its clip's."""

from flap_fast.losses.base import Loss
from flap_fast.section import Weight


class Distance(Loss):
    weight: Weight = 0.0
    """Weight in the total."""

    @property
    def weights(self):
        return {"distance": self.weight}

    def terms(self, outputs):
        return {"distance": (outputs["media"] - outputs["text"]).square().sum(1).mean()}
'''


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package, to be changed."""
    shutil.copytree(ROOT / "flap_fast", tmp_path / "flap_fast")
    return tmp_path


def add(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def insert(file: Path, before: str, *lines: str) -> None:
    text = file.read_text()
    assert text.count(before) == 1, f"{file} no longer says {before!r}"
    file.write_text(text.replace(before, "".join(lines) + before))


SMALL = (
    *("audio.duration_s=1.0", "audio.frames=112", "joint.width=16", "text.width=32"),
    *("text.depth=2", "text.heads=2", "text.dropout=0", "train.global_batch=8", "train.steps=2"),
    *("sched.warmup_steps=1", "log.every_steps=1", "log.tensorboard=false", "frontend.threads=1"),
)


def test_an_encoder_is_a_folder_and_a_line(copy: Path, prepared: Path):
    encoders = copy / "flap_fast/encoders"
    add(encoders / "frame_mean/__init__.py", '"""The mean over frames."""\n')
    add(encoders / "frame_mean/settings.py", SETTINGS)
    add(encoders / "frame_mean/model.py", MODEL)
    line = "from flap_fast.encoders.frame_mean.settings import FrameMeanSettings\n"
    insert(encoders / "__init__.py", "from flap_fast.encoders.htsat.settings", line)
    insert(encoders / "__init__.py", "    # one line for each encoder", "    FrameMeanSettings,\n")

    empty = copy / "empty.yaml"
    empty.write_text("run: {name: mean}\naudio: {encoder: frame_mean}\n")
    data = (f"data.train={prepared}/train", f"data.val={prepared}/val")
    trained, scored, planned, profiled = flap(
        copy,
        ("train", empty, *SMALL, *data),
        ("eval", "runs/mean", prepared / "val", "--tasks", "retrieval,flops"),
        ("plan", empty, *SMALL, "--gpus", 1),
        ("profile", empty, *SMALL, "--synthetic", "--no-search", "--steps", 1),
    )
    assert "the run is complete" in trained
    weights = copy / "runs/mean/checkpoints/step-000002/model.safetensors"
    assert weights.stat().st_size > 0
    assert "audio to text" in scored
    scores = json.loads((copy / "runs/mean/eval.json").read_text())
    assert scores["retrieval"]["val"]["clips"] == 6
    (row,) = scores["flops"]  # one product of 128 bins and 24 numbers, over 8 clips
    assert row["gflops"] * 1e9 == pytest.approx(8 * 128 * 24)

    assert "audio tower" in planned
    assert "audio tower" in profiled
    found = json.loads((copy / "runs/mean/profile/profile.json").read_text())
    # Forward: the encoder's product and its head's two, 2 FLOP a multiply-add.
    forward = 2 * 8 * (128 * 24 + 24 * 16 + 16 * 16)
    assert found["flop"]["audio tower"]["forward"] == forward

    named = "with audio.encoder = frame_mean"
    rules = {
        "mask.kind=2d": f"mask.kind must be 'none' {named}, which cannot mask, got '2d'",
        "audio.size=large": f"audio.size must be left out {named}, got 'large'; it is a setting of",
        "image={}": "audio must be left out where image is set, which replaces the audio encoder",
    }
    shows = [("config", "show", empty, override) for override in rules]
    for said, rule in zip(flap(copy, *shows, refused=True), rules.values(), strict=True):
        assert rule in said


def test_a_loss_is_a_file_and_a_line_and_trains_alone(copy: Path, prepared: Path):
    losses = copy / "flap_fast/losses"
    add(losses / "distance.py", LOSS)
    line = "from flap_fast.losses.distance import Distance\n"
    insert(losses / "__init__.py", "from flap_fast.losses.nli import", line)
    insert(
        losses / "__init__.py",
        "    # one line for each loss",
        "    distance: Distance = Distance()\n",
    )

    tiny = ROOT / "configs/tiny.yaml"
    own = ("loss.contrastive.weight=0", "loss.distance.weight=0.5", "run.name=distance")
    data = (f"data.train={prepared}/train", "data.val=[]")
    _, shown = flap(
        copy,
        ("train", tiny, *SMALL, *own, *data),
        ("config", "show", copy / "runs/distance/config.yaml"),
    )
    rows = (copy / "runs/distance/metrics.jsonl").read_text().splitlines()
    first = json.loads(rows[0])
    assert 0 < first["distance"] < 4
    assert first["loss"] == pytest.approx(first["distance"] / 2)
    assert "contrastive" not in first
    assert "distance:\n    weight: 0.5" in shown


def test_the_pages_examples_are_records():
    """The Python of docs/adding.md runs as it stands and gives the records that it speaks of."""
    text = (ROOT / "docs/adding.md").read_text()
    found = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, found)
    assert issubclass(found["Distance"], Loss)
    assert isinstance(found["EVALUATION"], Evaluation)
    assert isinstance(found["FSD"], Source)
