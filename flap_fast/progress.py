"""Progress of what takes longer than 2 s: a bar on a terminal, now and then a line in a file.

    with progress("embed", total=len(files)) as advance:
        for file in files:
            ...
            advance()

It goes to stderr, on the first rank. A thread shows it, so that the work never waits for a
terminal, and a wait for one long call is seen too.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, NamedTuple, Protocol

from flap_fast.files import say, visible
from flap_fast.launcher import is_first_rank

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

AFTER_S = 2.0
"""What is shorter is not shown."""
EVERY_S = 30.0
"""Between two lines in a file."""
_FRAME_S = 0.2


class Advance(Protocol):
    """Adds to what is done."""

    def __call__(self, count: int = 1, /) -> None: ...


class Pace(NamedTuple):
    """How long the rest takes, at the mean pace since some time."""

    total: int | None
    done: int
    """Then."""
    since: float

    def left(self, done: int, now: float) -> float | None:
        """Seconds; None where nothing was done since."""
        if not self.total or done <= self.done:
            return None
        return (self.total - done) * (now - self.since) / (done - self.done)


@contextmanager
def progress(what: str, total: int | None = None, *, shown: bool = True) -> Iterator[Advance]:
    """A context whose progress is shown; yields a function to call with how much more is done.

    Args:
        what: what is done, in a word or two.
        total: how much there is to do; None, or 0, where only the time is shown.
    """
    done, lock = 0, Lock()

    def advance(count: int = 1, /) -> None:
        nonlocal done
        with lock:  # threads share the work
            done += count

    if not shown or not is_first_rank() or sys.stderr is None:
        yield advance
        return
    ended = Event()
    thread = Thread(target=_show, args=(visible(what), total, lambda: done, ended), daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()


@contextmanager
def starting(what: str) -> Iterator[None]:
    """`progress` of imports and of opening models, in a context without garbage collection.

    What PyTorch and transformers make as they are imported stays: to look among it for garbage,
    again and again while it grows, would only take time.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        with progress(what):
            yield
    finally:
        if collected:
            # What was made goes to the oldest generation, which is seldom looked at.
            gc.freeze()
            gc.unfreeze()
            gc.enable()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:30."""
    whole = round(max(seconds, 0))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@cache
def console() -> Console:
    """The one console of stderr: bars of one console make room for each other."""
    from rich.console import Console

    return Console(stderr=True)


def _show(what: str, total: int | None, done: Callable[[], int], ended: Event) -> None:
    began = time.monotonic()
    if ended.wait(AFTER_S):
        return
    # What was done at once, by an earlier call, says nothing of the pace.
    pace = Pace(total, done(), time.monotonic())
    try:
        if sys.stderr.isatty():
            with _display().bar(what, total) as update:
                while not ended.is_set():
                    update(done(), _said(total, done(), time.monotonic() - began, pace))
                    ended.wait(_FRAME_S)
            return
        while not ended.is_set():
            said = _said(total, done(), time.monotonic() - began, pace)
            say(f"{what}: {said}", error=True)
            ended.wait(EVERY_S)
    except (OSError, ValueError, SystemExit):
        pass  # stderr is gone, with whoever read it: the work goes on


def _said(total: int | None, done: int, elapsed_s: float, pace: Pace) -> str:
    """12 of 64, 0:00:04, 0:00:18 left"""
    left = pace.left(done, time.monotonic())
    counted = [f"{done:,} of {total:,}"] if total else []
    remaining = [] if left is None else [f"{clock(left)} left"]
    return ", ".join([*counted, clock(elapsed_s), *remaining])


class _Display:
    """The bars of this process: one display, since one that ends may not be inside another."""

    def __init__(self):
        self._lock, self._count = Lock(), 0
        self._bars: Progress | None = None

    @contextmanager
    def bar(self, what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        """A context with a bar; yields a function to set what is done and what is said of it."""
        with self._lock:
            bars = self._bars = self._bars or _started()
            task = bars.add_task(what, total=total, shown="")
            self._count += 1

        def update(done: int, shown: str) -> None:
            bars.update(task, completed=done, shown=shown)
            bars.refresh()

        try:
            yield update
        finally:
            with self._lock:
                bars.remove_task(task)
                self._count -= 1
                if not self._count:
                    self._bars = None
                    bars.stop()


@cache
def _display() -> _Display:
    return _Display()


def _started() -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    # What a command prints on stdout stays there; of stderr it is shown above the bars.
    bars = Progress(
        *columns, console=console(), auto_refresh=False, transient=True, redirect_stdout=False
    )
    bars.start()
    bars.console.show_cursor(True)  # a process that is ended by a signal could not do it later
    return bars
