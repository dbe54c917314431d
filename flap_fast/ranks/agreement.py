"""What all ranks must have in common, compared before they compute anything together.

    rank 0: its facts -> store -> each rank: differences from them, or its own error -> store
    rank 0: one verdict -> store -> the same `RanksError` on every rank, or none

The process group's store carries it: where ranks differ, collectives would hang.
"""

from __future__ import annotations

import json
import socket
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from flap_fast.ranks import TIMEOUT, Ranks

Result = TypeVar("Result")
Facts = Mapping[str, Any]
"""Named values that JSON can hold; of {"a": {"b": {"c": 1}}} the name is `a b.c`."""

_SHOWN = 3
_NONE = "none"


class RanksError(RuntimeError):
    """An error on any of the ranks, the same on all of them; rank 0 prints it."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def agree(ranks: Ranks, check: Callable[[], tuple[Result, Facts]]) -> Result:
    """The result of `check`, once its facts are those of rank 0 on all ranks. Collective.

    Args:
        check: gives a result and facts; is not collective itself.

    Raises:
        RanksError: `check` raised on a rank, or a rank has other facts. The same on all ranks.
        Exception: what `check` raised, on a single rank.
    """
    if ranks.world == 1:
        return check()[0]
    store = dist.distributed_c10d._get_default_store()
    key = f"agree/{store.add(f'agree/calls/{ranks.rank}', 1)}"
    failed: Exception | None = None
    report: dict[str, Any] = {"host": socket.gethostname()}
    result, facts = None, {}
    try:
        result, facts = check()
    except Exception as error:
        failed = error
        report |= {"error": str(error), "code": 2 if isinstance(error, ValueError) else 1}
        report |= {"known": isinstance(error, (ValueError, OSError, ArithmeticError))}
    if ranks.first:
        _put(store, f"{key}/facts", {name: _digest(value) for name, value in facts.items()})
        for name, value in facts.items():
            _put(store, f"{key}/fact/{name}", value)
        _put(store, f"{key}/failed", failed is not None)
    elif not failed and not _get(store, f"{key}/failed", "rank 0"):
        report["differs"] = _differences(store, key, facts)
    _put(store, f"{key}/rank/{ranks.rank}", report)
    if ranks.first:
        reports = [_get(store, f"{key}/rank/{n}", f"rank {n}") for n in range(ranks.world)]
        _put(store, f"{key}/verdict", _verdict(reports))
    verdict = _get(store, f"{key}/verdict", "rank 0")
    if failed is not None and not report["known"]:
        raise failed  # a bug: with its traceback
    if verdict:
        raise RanksError(*verdict) from failed
    return result  # type: ignore[return-value]


def _differences(store: Any, key: str, facts: Facts) -> list[tuple[str, Any, Any]]:
    """Name, value on rank 0 and value here of each fact that differs."""
    theirs = _get(store, f"{key}/facts", "rank 0")
    found = []
    for name in [*theirs, *(facts.keys() - theirs.keys())]:
        if name not in facts or name not in theirs:
            found.append((name, *("given" if name in side else _NONE for side in (theirs, facts))))
        elif theirs[name] != _digest(facts[name]):
            there = _get(store, f"{key}/fact/{name}", "rank 0")
            found += _leaves(name, " ", there, json.loads(json.dumps(facts[name])))
    return found


def _leaves(name: str, joint: str, there: Any, here: Any) -> list[tuple[str, Any, Any]]:
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return [(name, there, here)] if there != here else []
    leaves = (
        _leaves(f"{name}{joint}{n}".strip(), ".", there.get(n, _NONE), here.get(n, _NONE))
        for n in {**there, **here}
    )
    return [leaf for found in leaves for leaf in found]


def _verdict(reports: list[dict[str, Any]]) -> tuple[str, int] | None:
    """The one sentence, and the exit status; None where all agree."""
    errors = [(n, report) for n, report in enumerate(reports) if "error" in report]
    if errors:
        rank, first = next((e for e in errors if e[1]["known"]), errors[0])
        where = f" (on rank {rank}, {first['host']})"
        same = sum(report["error"] == first["error"] for _, report in errors)
        return first["error"] + ("" if same == len(reports) else where), first["code"]
    differing = [(n, report) for n, report in enumerate(reports) if report.get("differs")]
    if not differing:
        return None
    rank, report = differing[0]
    names, there, here = zip(*report["differs"], strict=True)
    more = len(names) - _SHOWN
    also = f" and {more} more" if more > 0 else ""
    others = f"; {len(differing) - 1} more ranks differ from it" if differing[1:] else ""
    return (
        f"{_listed(names)}{also} must be the same on all ranks, got {_listed(here)} on rank {rank} "
        f"({report['host']}) and {_listed(there)} on rank 0 ({reports[0]['host']}){others}; give "
        "all ranks the same command, code and files",
        2,
    )


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values[:_SHOWN])


def _digest(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _put(store: Any, key: str, value: Any) -> None:
    store.set(key, json.dumps(value))


def _get(store: Any, key: str, whose: str) -> Any:
    """A value once it is there; looked for again and again, so that signals are answered."""
    started, pause_s = time.monotonic(), 0.001
    while not store.check([key]):
        if time.monotonic() - started > TIMEOUT.total_seconds():
            raise RanksError(f"{whose} must answer within {TIMEOUT}, got nothing; see its own log")
        time.sleep(pause_s)
        pause_s = min(0.5, 2 * pause_s)
    return json.loads(store.get(key))
