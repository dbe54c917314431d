"""Stops a run on Ctrl-C or SIGTERM, after the same step on all ranks."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from flap_fast.ranks import Ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """While entered, a first signal only sets a flag; a second Ctrl-C interrupts at once."""

    def __init__(self, ranks: Ranks):
        self._signalled = False
        # Over gloo on the CPU: reading the flag never waits for the GPU.
        self._group: Any = dist.new_group(backend="gloo") if ranks.world > 1 else None
        self._flag = torch.zeros(1)
        self._sent: Any = None
        self._handlers = {}

    def __enter__(self) -> Stop:
        self._handlers = {s: signal.signal(s, self._on_signal) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._sent is not None:
            self._sent.wait()  # it must end before the process group does

    def agreed(self) -> bool:
        """Whether any rank got a signal. Collective: call on every rank, once a step.

        Over ranks the answer is that of the step before, so that no rank waits for it.
        """
        if self._group is None:
            return self._signalled
        answer = False
        if self._sent is not None:
            self._sent.wait()
            answer = bool(self._flag.item())
        self._flag = torch.full((1,), float(self._signalled))
        self._sent = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return answer

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
