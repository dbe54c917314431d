"""Stops a run on Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP, after the same step on all ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flap_fast.launcher import first_of_its_node
from flap_fast.model.model_folder import step_folders, step_of
from flap_fast.ranks import Ranks
from flap_fast.training.signals import answered, say

# A launcher hands a terminal's Ctrl-C on to ranks, which have had it.
_SAME_S = 1.0


class Stop:
    """While entered, a first signal only sets a flag; a second Ctrl-C interrupts at once, a third
    ends the process.

    Args:
        checkpoints: their folder, to say what a second Ctrl-C loses.
    """

    def __init__(self, ranks: Ranks, checkpoints: Path):
        self._checkpoints, self._signalled = checkpoints, False
        self._interrupts, self._last = 0, 0.0
        # Over gloo on the CPU: reading the flag never waits for the GPU.
        self._group: Any = dist.new_group(backend="gloo") if ranks.world > 1 else None
        self._flag = torch.zeros(1)
        self._sent: Any = None
        self._entered = ExitStack()

    def __enter__(self) -> Stop:
        self._entered.enter_context(answered(self._answer, self._in_main))
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()
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

    def _answer(self, number: int) -> None:
        self._signalled = True
        if number != signal.SIGINT or time.monotonic() - self._last < _SAME_S:
            return
        self._interrupts, self._last = self._interrupts + 1, time.monotonic()
        if self._interrupts == 3:
            os._exit(128 + number)
        if first_of_its_node():
            say(self._lost() if self._interrupts == 2 else _STOPPING)
        if self._interrupts == 2:
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _in_main(self, _: int) -> None:
        if self._interrupts == 2:
            raise KeyboardInterrupt

    def _lost(self) -> str:
        saved = [step_of(folder) for folder in step_folders(self._checkpoints)[-1:]]
        what = f"the steps after {saved[0]}, the last checkpoint," if saved else "all steps"
        return f"stopped at once: {what} of this run are lost"


_STOPPING = "stopping after this step, with a checkpoint; Ctrl-C again stops at once and loses it"
