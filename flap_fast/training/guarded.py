"""Observers, and a guard around them: what they do never stops training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from flap_fast.checks import ConfigError
from flap_fast.files import say

Row = dict[str, Any]
Observer = Callable[[Row], None]


def guarded(observer: Observer) -> Guarded:
    """An observer that never raises; one that is guarded is returned as it is."""
    if isinstance(observer, Guarded):
        return observer
    name = getattr(observer, "__qualname__", type(observer).__name__).split(".")[0]
    return Guarded(name, lambda _: observer)


class Guarded:
    """An observer whose first error is named on stderr; it is left out from then on.

    Args:
        name: what the error is said of.
        start: gives the observer; what it must close is closed with the `ExitStack`.

    Raises:
        ConfigError: `start` refuses the settings, or a file of the run is damaged.
    """

    def __init__(self, name: str, start: Callable[[ExitStack], Observer]):
        self._name, self._open = name, ExitStack()
        self._observe: Observer | None = None
        self._failed = False
        with self._named(refuses=True):
            self._observe = start(self._open)

    def __call__(self, row: Row) -> None:
        """Pass a row on, unless an earlier call failed."""
        if self._observe and not self._failed:
            with self._named():
                self._observe(row)

    def close(self) -> None:
        """Close what the observer opened."""
        with self._named():
            self._open.close()

    @contextmanager
    def _named(self, *, refuses: bool = False) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # rich exits where stderr is closed
            if refuses and isinstance(error, ConfigError):
                raise
            if self._failed:
                return  # said before
            self._failed = True
            why = " ".join(f"{type(error).__name__}: {error}".split())
            with suppress(OSError, ValueError):  # stderr itself may be what failed
                say(
                    f"warning: {self._name} is left out of the rest of this run, got {why}; "
                    "training goes on without it, --resume tries it again",
                    error=True,
                )
