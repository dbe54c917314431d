"""The facts in a run's folder, without its model.

config.yaml  metrics.jsonl  eval.json  environment.json  checkpoints/  ->  RunFacts
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.evaluation.scores_file import read_scores
from flap_fast.interchange.tensors import read_json
from flap_fast.model.model_folder import step_folders, step_of
from flap_fast.training.run_folder import written_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """One run. Rows are in the order of their steps."""

    folder: Path
    config: Config
    steps: list[Row]
    """Rows of training steps."""
    scored: list[Row]
    """Rows of scores on data.val, as `NAME/DIRECTION/METRIC`."""
    scores: dict[str, Any]
    """eval.json; empty where there is none."""
    environment: dict[str, Any]
    """environment.json; empty where the run is older than that file."""
    checkpoints: dict[int, Path]
    """The kept checkpoints by step."""

    @property
    def name(self) -> str:
        """The setting run.name."""
        return self.config.run.name

    @property
    def modality(self) -> str:
        """`audio` or `image`."""
        return self.config.encoder.modality

    @property
    def chosen(self) -> Path | None:
        """The checkpoint to embed with: the best on data.val, else the last."""
        best = self.folder / "checkpoints" / "best"
        if (best / "model.safetensors").is_file():
            return best
        return self.checkpoints[max(self.checkpoints)] if self.checkpoints else None

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(n,) steps and (n,) values of a column; rows without it are left out."""
        rows = [row for row in (*self.steps, *self.scored) if row.get(name) is not None]
        return np.array([r["step"] for r in rows]), np.array([r[name] for r in rows], dtype=float)


def read_run(folder: Path) -> RunFacts:
    """Read a run's folder, also of a run that is still going on or was killed.

    Raises:
        ConfigError: it is no run's folder, the run has no rows yet, or one of its files is damaged.
    """
    config = folder / "config.yaml"
    remedy = "name the folder that flap train printed, such as runs/demo"
    require(config.is_file(), "the run", "be a folder with config.yaml", folder, remedy)
    rows = [row for _, row in written_rows(folder / "metrics.jsonl")]
    steps = [row for row in rows if "loss" in row]
    rule = "have reached its first row in metrics.jsonl"
    remedy = "wait for log.every_steps steps; of a run without any, eval.json has the scores"
    require(bool(steps), "the run", rule, folder, remedy)
    environment = folder / "environment.json"
    return RunFacts(
        folder=folder,
        config=load_config(config),
        steps=steps,
        scored=[row for row in rows if "loss" not in row],
        scores=read_scores(folder / "eval.json"),
        environment=read_json(environment) if environment.is_file() else {},
        checkpoints={step_of(kept): kept for kept in step_folders(folder / "checkpoints")},
    )
