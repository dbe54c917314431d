"""Run a test's function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0
) -> list[Any]:
    """The results of `function(*arguments)` on `world` gloo ranks, in rank order.

    The function must be importable (defined at a module's top level); what it returns is pickled,
    so it should return numbers or CPU tensors. Inside, `torch.distributed` is initialised. Raises
    AssertionError with the traceback of the first rank that failed, TimeoutError after `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_server()
        processes = [
            context.Process(
                target=_run, args=(rank, world, folder, function, arguments, timeout_s), daemon=True
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def start_server() -> Any:
    """Start the process that ranks are forked from; returns its multiprocessing context.

    It returns at once, while the process still imports what ranks need.
    """
    context = mp.get_context("forkserver")
    # What cannot be imported (on a machine for the kernels alone) is left out. `tests` comes first:
    # it decorates the kernels for the interpreter.
    ours = ["flap_kernels", "flap_fast.training.loop"]
    slow = ["pytest", "torch.distributed.tensor", "deepspeed"]
    # What the first model and the first ZeRO optimizer would import, two seconds on each rank.
    slow += ["transformers.models.roberta.modeling_roberta", "deepspeed.runtime.zero.stage3"]
    slow += ["deepspeed.runtime.zero.muon.muon_optimizer"]
    context.set_forkserver_preload(["tests", *slow, *ours])
    # Python 3.11's server does not take over sys.path, only the environment.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


def _wait(processes: list[Any], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks still ran after {timeout_s:g} s")
        # One rank that failed leaves the others waiting in a collective: do not wait with them.
        if any(process.exitcode not in (None, 0) for process in processes):
            break
        time.sleep(0.01)
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise AssertionError(f"rank {errors[0].stem} failed:\n{errors[0].read_text()}")
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise AssertionError(f"ranks ended with exit codes {codes} and no traceback")


def _run(
    rank: int,
    world: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    timeout_s: float,
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported: DeepSpeed collects garbage at each start
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
        result = function(*arguments)
        torch.save(result, f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        partial = Path(folder, f"{rank}.partial")
        partial.write_text(traceback.format_exc())
        partial.rename(Path(folder, f"{rank}.error"))
        # No clean-up: it would wait for ranks that wait for this one.
        os._exit(1)
