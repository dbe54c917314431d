"""The record of an evaluation: what it needs, how it scores, how its scores are printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.table import Table

from flap_fast.evaluation.evaluated_model import EvaluatedModel
from flap_fast.evaluation.sheet import Sheet

Data = Literal["clips", "sentences", "settings"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation. `source` is what `data` says:

    clips       folders of shards; `check` gets a folder's `Texts`, `score` its `Embeddings`
    sentences   files or folders of sentences; both get the path
    settings    nothing but the model; both get None
    """

    name: str
    """As in `--tasks`, in eval.json, and of its file."""
    data: Data
    check: Callable[[EvaluatedModel, Any], object]
    """(model, source), before any embedding; raises `ConfigError` on what cannot be scored."""
    score: Callable[[EvaluatedModel, Any], Any]
    """(model, source) -> the scores, as JSON stores them. Collective: call on every rank."""
    sheet: Callable[[str, Any, str], Sheet]
    """(name of the data set, scores, its path) -> the table in Markdown, LaTeX and the report.

    With `data="settings"` the name and the path are empty.
    """
    metrics: Callable[[Any], dict[str, float]] | None
    """Scores -> columns of metrics.jsonl; with it, eval.tasks may name it, to score data.val."""
    selects: Callable[[Any], float] | None = None
    """Scores -> what the best checkpoint has most of, if eval.tasks names this first."""
    pooled: bool = False
    """With `data="clips"`: `Embeddings.pooled`, what the head is given, is set."""
    terminal: Callable[[dict[str, Any]], Table] | None = None
    """{name of the data set: scores} -> the table on the terminal; the sheets without it."""

    def __post_init__(self):
        for name in ("check", "score", "sheet"):
            if not callable(getattr(self, name)):
                self._refuse(name, "be a function")
        for name in ("metrics", "selects", "terminal"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                self._refuse(name, "be a function or None")
        if self.data not in get_args(Data):
            self._refuse("data", f"be one of {', '.join(get_args(Data))}")
        if self.metrics and self.data != "clips":
            self._refuse("metrics", "be None unless data is 'clips': training scores data.val")
        if self.pooled and self.data != "clips":
            self._refuse("pooled", "be False unless data is 'clips'")
        if not self.name.isidentifier() or self.name == "data":
            self._refuse("name", "be an identifier other than 'data', which eval.json uses")

    def _refuse(self, field: str, rule: str) -> None:
        got = getattr(self, field)
        raise TypeError(f"{field} of the evaluation {self.name} must {rule}, got {got!r}")
