"""A run's progress, as state.json of a checkpoint has it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field


class Best(NamedTuple):
    """The best evaluation so far."""

    score: float
    since: int
    """Evaluations after it, none of them better."""
    task: str
    """What the score is of: the first of eval.tasks."""


@dataclass(frozen=True)
class State:
    """A run's progress. The position in the data, masks and dropout follow from the step."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step: Annotated[int, Field(ge=0)]
    """Steps done."""
    best: float | None
    """The best score on data.val so far, and ..."""
    since_best: int | None = None
    """... evaluations after it, and ..."""
    best_task: str | None = None
    """... what it is of."""
    scored: bool = True
    """False until the evaluation that is due at this step, if any, is done."""
    clips: int | None = None
    """Clips of data.train."""
    shards: str | None = None
    """Hash of the shards' names, and of where each clip lies in them."""
    versions: list[str] | None = None
    """Hash of the size and ETag of each shard by URL, "" of each on disk."""
    teacher: int | None = None
    """Checksum of the weights of loss.distill's teacher."""
    sha256: str | None = None
    """Of the others, as JSON: this file is written anew, once its step is scored."""

    @property
    def best_so_far(self) -> Best | None:
        """The best evaluation; of a run of before, by retrieval."""
        if self.best is None:
            return None
        return Best(self.best, self.since_best or 0, self.best_task or "retrieval")

    def digest(self) -> str:
        """What `sha256` must be."""
        others = {n: value for n, value in asdict(self).items() if n != "sha256"}
        others = {n: value for n, value in others.items() if value is not None}
        return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()
