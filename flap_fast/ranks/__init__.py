"""The ranks of a run, launched by deepspeed, torchrun or by hand, and their collectives."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from flap_fast.checks import ConfigError, require
from flap_fast.launcher import launched, require_address

# When a rank dies, the others fail after this long, instead of waiting forever.
TIMEOUT = timedelta(minutes=15)

# Gloo's threads free their last collective under the GIL, and outlive the process group where DDP
# or DeepSpeed has used it. One that is still waiting for the GIL when Python ends aborts the
# process after a complete run (PyTorch 2.14): it gets this long first.
_LAST_COLLECTIVE_S = 0.2


@dataclass(frozen=True)
class Ranks:
    """This process's rank, how many ranks there are, and its device."""

    rank: int = 0
    world: int = 1
    local_world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - it cannot change
    launched: bool = False
    """A launcher started this process, even if it is the only one."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective: call on every rank."""
        if self.world == 1:
            return flag
        up = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(up, op=dist.ReduceOp.MAX)
        return bool(up.item())

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, in rank order. Collective: every rank passes as many rows."""
        if self.world == 1:
            return rows
        out = rows.new_empty(self.world * len(rows), *rows.shape[1:])
        all_gather_single(out, rows.contiguous())
        return out

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors in place with those of rank 0. Collective: call on every rank."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise mean over ranks. Collective: call on every rank."""
        if self.world == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


def all_gather_single(out: torch.Tensor, rows: torch.Tensor, group: Any = None) -> None:
    """`dist.all_gather_into_tensor` under PyTorch 2.14's name, which warns of the older one."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(out, rows, group=group)


def world_size() -> int:
    """The number of ranks, from the launcher's environment; needs no process group.

    Raises:
        ConfigError: see `launched`.
    """
    return launched().world


def join_ranks() -> Ranks:
    """Set this process's device and join the process group, if a launcher made one.

    Raises:
        ConfigError: the launcher's variables do not fit, or ranks cannot meet where they say.
    """
    rank, world, local_rank, local_world, by_launcher = launched()
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cpu")
    if on_gpu:
        # A launcher may show each rank only its own GPU.
        gpus = torch.cuda.device_count()
        # Every rank of the node refuses: only the first one says why.
        announced = {"LOCAL_WORLD_SIZE", "LOCAL_SIZE"} & os.environ.keys()
        last = local_world - 1 if announced else local_rank
        rule, remedy = f"be below the {gpus} GPUs here", "start as many ranks a node as it has GPUs"
        require(last < gpus or gpus == 1, "LOCAL_RANK", rule, last, remedy)
        device = torch.device("cuda", local_rank if gpus > 1 else 0)
        torch.cuda.set_device(device)
    if by_launcher and not dist.is_initialized():
        if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
        require_address()
        try:
            store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
            # torchrun's store outlives a process group: the next one must not read its addresses.
            joins = (store.add("flap_fast/joins", 1) - 1) // world
            store = PrefixStore(f"flap_fast/{joins}", store)
            backend = "nccl" if on_gpu else "gloo"
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT
            )
        except dist.DistNetworkError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            remedy = "set another port: --master_port, or MASTER_PORT"
            why = str(error).splitlines()[0]
            raise ConfigError(
                f"ranks must be able to meet at {where}, got: {why}; {remedy}"
            ) from None
    return Ranks(rank, world, local_world, device, by_launcher)


def leave_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        on_cpu = dist.get_backend() == "gloo"
        # DeepSpeed keeps references to groups, which would fail its next engine in this process.
        deepspeed = sys.modules.get("deepspeed.comm")
        if deepspeed and deepspeed.is_initialized():
            deepspeed.destroy_process_group()
        else:
            dist.destroy_process_group()
        if on_cpu:
            time.sleep(_LAST_COLLECTIVE_S)
