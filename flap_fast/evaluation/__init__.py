"""The registry of evaluations, which `flap eval`, its tables and the report use.

Only names: a file is imported on first use, so that `flap --help` does not load PyTorch.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flap_fast.evaluation.record import Evaluation

# `evaluation/NAME.py` holds the record EVALUATION; scores are printed in this order.
TASKS = (
    "retrieval",
    "relevance",
    "zero_shot",
    "probe",
    "geometry",
    "sts",
    "transfer",
    "flops",
    # one line for each evaluation
)


@cache
def load_evaluation(name: str) -> Evaluation:
    """The record of one of `TASKS`.

    Raises:
        TypeError: its file holds no record of that name.
    """
    from flap_fast.evaluation.record import Evaluation

    found = getattr(import_module(f"flap_fast.evaluation.{name}"), "EVALUATION", None)
    if not isinstance(found, Evaluation) or found.name != name:
        got = found.name if isinstance(found, Evaluation) else found
        raise TypeError(
            f"flap_fast/evaluation/{name}.py must hold EVALUATION = Evaluation(name='{name}', "
            f"...), got {got}"
        )
    return found
