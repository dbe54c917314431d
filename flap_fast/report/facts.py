"""What a run was: command, commit, duration, parameters, device, and numbers of its steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from flap_fast.evaluation.flops import CLIPS
from flap_fast.report.figures import gflops
from flap_fast.report.run import RunFacts
from flap_fast.training.environment import sessions_of
from flap_fast.training.overview import short

SESSION_HEAD = ("started", "duration", "outcome", "commit", "host", "command")
# Facts of environment.json that are shown elsewhere, or are no line of a table.
_SHOWN = {"started", "ended", "duration_s", "outcome", "command", "commit", "dirty", "device"}
_SHOWN |= {"ranks", "parameters", "parameters_trained", "parameters_of", "earlier_sessions"}


def facts(run: RunFacts) -> dict[str, str]:
    """The numbers at the top of the page; what an older run did not note is left out."""
    last, config, found = run.steps[-1], run.config, run.environment
    planned = config.train.steps
    _, speed = run.column("clips_per_s")
    _, memory = run.column("peak_mib")
    shown = {
        "steps": f"{last['step']:,}" + (f" of {planned:,}" if planned else ""),
        "duration": _total(sessions_of(found)),
        "ended": _end(found),
        "code": commit(found),
        "parameters": _parameters(found),
        "device": _device(found),
        "global batch": f"{config.train.global_batch:,} clips",
        "last loss": f"{last['loss']:.4g}",
        "clips/s, median (range)": _spread(speed),
        "peak memory of a rank": f"{memory.max():,.0f} MiB",
        f"{run.modality} encoder": f"{gflops(run):.1f} GFLOPs for {CLIPS} clips",
    }
    return {name: value for name, value in shown.items() if value}


def versions(run: RunFacts) -> dict[str, Any]:
    """Host, launcher, platform and package versions."""
    return {name: value for name, value in run.environment.items() if name not in _SHOWN}


def session_rows(run: RunFacts) -> list[tuple[str, ...]]:
    """A row for each session of a run that was resumed, by `SESSION_HEAD`."""
    found = sessions_of(run.environment)
    if len(found) < 2:
        return []
    return [
        (
            one.get("started", "-"),
            duration(one["duration_s"]) if "duration_s" in one else "-",
            one.get("outcome", "not known"),
            commit(one) or "-",
            one.get("host", "-"),
            one.get("command", "-"),
        )
        for one in found
    ]


def commit(found: dict[str, Any]) -> str:
    """A session's commit; empty where it is not known."""
    if "commit" not in found:
        return ""
    return found["commit"][:10] + (" with uncommitted changes" if found.get("dirty") else "")


def duration(seconds: float) -> str:
    """Seconds as people say them: 53 s, 4 min 10 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for size, name, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // below} {smaller}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def _total(sessions: list[dict[str, Any]]) -> str:
    known = [one["duration_s"] for one in sessions if "duration_s" in one]
    if not known:
        return ""
    least = "" if len(known) == len(sessions) else "at least "
    several = f" in {len(sessions)} sessions" if len(sessions) > 1 else ""
    return f"{least}{duration(sum(known))}{several}"


def _end(found: dict[str, Any]) -> str:
    """How the last session ended, where there is more to say than that it did."""
    unknown = "" if "command" not in found else "not yet, or killed"
    outcome = found.get("outcome", unknown)
    return "" if outcome == "complete" else outcome


def _parameters(found: dict[str, Any]) -> str:
    if "parameters" not in found:
        return ""
    return f"{short(found['parameters'])}, {short(found['parameters_trained'])} trained"


def _device(found: dict[str, Any]) -> str:
    if "device" not in found:
        return ""
    ranks = int(found.get("ranks", 1))
    return (f"{ranks:,} ranks, each " if ranks > 1 else "") + found["device"]


def _spread(values: np.ndarray) -> str:
    """Median and range."""
    return f"{np.median(values):,.0f} ({values.min():,.0f} to {values.max():,.0f})"
