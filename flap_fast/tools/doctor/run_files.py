"""The files of a run or of a model that `flap doctor` looks at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.interchange.tensors import read_json
from flap_fast.model.model_folder import step_folders
from flap_fast.training.run_folder import written_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """A run's folder, or a model's: then there is no row and one checkpoint."""

    folder: Path
    config: Config
    rows: list[Row]
    """Rows of training steps, in their order."""
    scores: list[Row]
    """Rows of evaluations."""
    checkpoints: list[Path]
    """In the order of their steps."""
    ranks: int
    bad_clips: int
    """Rows of bad_clips*.jsonl."""


def is_run(path: Path) -> bool:
    """Whether a path is a run's or a model's folder."""
    return (path / "config.yaml").is_file() and not any(path.glob("*.tar"))


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder, also of one that goes on or was killed."""
    checkpoints = step_folders(folder / "checkpoints")
    if (folder / "model.safetensors").is_file():
        checkpoints = [folder]
    environment = folder / "environment.json"
    ranks = read_json(environment).get("ranks", 1) if environment.is_file() else 1
    bad = [file.read_text().splitlines() for file in folder.glob("bad_clips*.jsonl")]
    rows = [row for _, row in written_rows(folder / "metrics.jsonl")]
    return RunFiles(
        folder=folder,
        config=load_config(folder / "config.yaml"),
        rows=[row for row in rows if "loss" in row],
        scores=[row for row in rows if "loss" not in row],
        checkpoints=checkpoints,
        ranks=int(str(ranks).split()[0]),
        bad_clips=sum(map(len, bad)),
    )
