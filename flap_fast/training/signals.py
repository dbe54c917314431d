"""Signals that stop a run, answered at once.

Python's own handlers wait for the main thread, which may wait for other ranks, the device or the
network for minutes. A thread is woken by the signal itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

# Ctrl-C, a job's end, Slurm's warning before it (--signal=USR1@...), a terminal that closes.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# What is left of a command may take this long to clean up.
_PATIENCE_S = 2.0


@contextmanager
def answered(
    answer: Callable[[int], None], in_main: Callable[[int], None], *, block: bool = False
) -> Iterator[None]:
    """A context in which a signal calls `answer` on a thread, and `in_main` on the main thread
    as soon as that runs Python. To be entered on the main thread.

    Args:
        block: spare the system calls of the main thread, some of which fail when interrupted.
    """
    handled = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    read, write = os.pipe()
    os.set_blocking(write, False)

    def answer_all() -> None:
        while number := os.read(read, 1):
            if number[0] in handled:
                answer(number[0])

    thread = Thread(target=answer_all, daemon=True)
    thread.start()  # before signals are blocked, which a thread inherits
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handlers = {s: signal.signal(s, lambda number, _: in_main(number)) for s in handled}
    how = signal.SIG_BLOCK if block else signal.SIG_UNBLOCK
    blocked = signal.pthread_sigmask(how, handled)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(write)
        thread.join()
        os.close(read)


@contextmanager
def ends_at_once(line: str, *, says: bool, imports: bool = False) -> Iterator[None]:
    """A context in which a signal ends the process with status 128 + its number.

    Args:
        line: what is printed.
        says: whether this process prints it. SIGTERM, by which a launcher ends the ranks of one
            that failed, says nothing.
        imports: modules are imported in it, and nothing is to be cleaned up: an exception in the
            midst of PyTorch's import aborts the process.
    """
    left, asked = Event(), []

    def answer(number: int) -> None:
        if says and not asked and number != signal.SIGTERM:
            say(line)
        asked.append(number)
        if imports or not left.wait(_PATIENCE_S):
            os._exit(128 + number)

    def in_main(number: int) -> None:
        if len(asked) < 2 and not imports:
            raise SystemExit(128 + number)

    with contextlib.ExitStack() as stack:
        stack.enter_context(answered(answer, in_main, block=True))
        stack.callback(left.set)
        yield


def say(line: str) -> None:
    """Print a line to stderr from any thread, over a progress bar if there is one."""
    os.write(2, f"{chr(13) if sys.stderr.isatty() else ''}{line}\n".encode())
