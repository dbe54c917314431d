"""Scores as documents, in the order of the registry: Markdown, LaTeX, and the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table

from flap_fast.evaluation import TASKS, load_evaluation, sheet
from flap_fast.evaluation.sheet import Sheet


def sheets(scores: dict[str, Any]) -> list[Sheet]:
    """A table for each data set of each evaluation."""
    return [one for task in TASKS if task in scores for one in _sheets(task, scores)]


def markdown(scores: dict[str, Any]) -> str:
    """One document."""
    return "\n".join(map(sheet.markdown, sheets(scores)))


def latex(scores: dict[str, Any]) -> str:
    """`table` environments for a document that uses booktabs."""
    return "\n".join(map(sheet.latex, sheets(scores)))


def terminal(scores: dict[str, Any]) -> Iterator[Group | Table]:
    """Only our scores, without the papers' rows."""
    for task in TASKS:
        if task not in scores:
            continue
        own = load_evaluation(task).terminal
        if own is None:
            yield from map(sheet.terminal, _sheets(task, scores))
        else:
            yield own(scores[task])


def _sheets(task: str, scores: dict[str, Any]) -> list[Sheet]:
    record, found, paths = load_evaluation(task), scores[task], scores.get("data", {})
    if record.data == "settings":
        return [record.sheet("", found, "")]
    return [record.sheet(name, one, paths.get(name, name)) for name, one in found.items()]
