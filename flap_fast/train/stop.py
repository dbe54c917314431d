"""Ctrl-C and SIGTERM as a question that all ranks answer alike, one step later."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from flap_fast.ranks import Ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """While open, the first signal only raises a flag; a second Ctrl-C interrupts at once."""

    def __init__(self, ranks: Ranks):
        self._asked = False
        # Flags travel over gloo on the CPU: reading them never waits for the GPU.
        self._group: Any = dist.new_group(backend="gloo") if ranks.world > 1 else None
        self._flag = torch.zeros(1)
        self._sent: Any = None
        self._before = {}

    def __enter__(self) -> Stop:
        self._before = {s: signal.signal(s, self._ask) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._sent is not None:
            self._sent.wait()  # a message on its way may not outlive the process group

    def agreed(self) -> bool:
        """Whether any rank had been asked to stop; every rank must ask, once a step.

        Over ranks the answer is of the step before, so that nobody waits for it.
        """
        if self._group is None:
            return self._asked
        answer = False
        if self._sent is not None:
            self._sent.wait()
            answer = bool(self._flag.item())
        self._flag = torch.full((1,), float(self._asked))
        self._sent = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return answer

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
