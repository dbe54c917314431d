"""Runs cases by their numbers, each in bounded time and memory; an error gives the numbers.

pytest tests/faults                              the sample of every push
pytest tests/faults -m slow                      all cases
CASE=137 pytest tests/faults/test_sounds.py      one case
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest

Check = Callable[[Random, Path], str]
"""Takes a generator and a folder of its own; says how it ended, or raises AssertionError."""


def sampled(sample: int, whole: int) -> Any:
    """Decorates a test of `cases`: the first few of them on every push, all as slow."""
    if "CASE" in os.environ:
        return pytest.mark.parametrize("cases", [[int(os.environ["CASE"])]], ids=["one"])
    rest = pytest.param(range(sample, whole), marks=[pytest.mark.slow, pytest.mark.timeout(3000)])
    return pytest.mark.parametrize(
        "cases", [range(sample), rest], ids=[f"{sample}", f"{sample}-{whole}"]
    )


def run_cases(
    kind: str,
    cases: Iterable[int],
    check: Check,
    folder: Path,
    *,
    known: Iterable[int] = (),
    cpu_s: float = 10.0,
    mib: float = 256.0,
) -> None:
    """Check each case; fails with the numbers of all that are wrong.

    Args:
        known: numbers to leave out: they are expected to fail, one by one.
        cpu_s: CPU time that a case may take.
        mib: memory that it may add at its peak.
    """
    ended: Counter[str] = Counter()
    wrong: list[str] = []
    most_s = most_mib = 0.0
    started = time.monotonic()
    for case in cases:
        if case in set(known):
            continue
        place = folder / str(case)
        place.mkdir()
        begun = _rss_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        cpu = time.process_time()
        signal.signal(signal.SIGVTALRM, _too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
        try:
            ended[check(Random(f"{kind} {case}"), place)] += 1
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            wrong.append(f"{kind} case {case}: {type(error).__name__} at {at}: {str(error)[:600]}")
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        more = _rss_mib("VmHWM") - begun
        if more > mib:
            wrong.append(f"{kind} case {case}: takes {more:.0f} MiB, more than {mib:g}")
        most_s, most_mib = max(most_s, time.process_time() - cpu), max(most_mib, more)
    took = time.monotonic() - started
    print(
        f"{kind}: {sum(ended.values())} cases in {took:.1f} s, at most {most_s:.2f} s CPU and "
        f"{most_mib:.0f} MiB; {dict(ended)}"
    )
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


def assert_sentence(error: BaseException, *named: str) -> None:
    """Fail unless a message is one line, not too long, and names one of these."""
    message = str(error)
    assert "\n" not in message, f"several lines: {message[:300]}"
    assert len(message) < 1500, f"{len(message)} characters: {message[:300]}"
    assert any(name in message for name in named), f"names none of {named}: {message[:300]}"


def _too_long(*_: object) -> None:
    raise AssertionError("takes too long")


def _rss_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024
