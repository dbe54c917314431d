"""What a launcher says in the environment: torchrun's and deepspeed's variables, Slurm's, MPI's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from flap_fast.checks import ConfigError, require

# By task: rank, ranks, rank on its node, ranks of its node. mpirun in a job of Slurm comes first.
_TASKS = {
    "mpirun": (
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE"),
}
_PORT = "29500"


class TasksError(ConfigError):
    """Tasks of srun or mpirun that cannot become ranks; the same one in each of them."""


def first_of_its_node() -> bool:
    """Whether this process speaks for its node, where the ranks could not speak to each other."""
    for names in (("", "", "LOCAL_RANK", ""), *_TASKS.values()):
        local_rank = os.environ.get(names[2], os.environ.get(names[0], ""))
        if local_rank:
            return local_rank == "0"
    return True


def is_first_rank() -> bool:
    """Whether this process tells what all ranks find alike."""
    return os.environ.get("RANK", "0") == "0"


class Launched(NamedTuple):
    """This process's place among the ranks of a launcher."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    by_launcher: bool = False
    """A launcher started this process, even if it is the only one."""


def launched() -> Launched:
    """This process's rank and the number of ranks, as its launcher announces them.

    Tasks of srun or mpirun become ranks: torchrun's variables are set from theirs.

    Raises:
        ConfigError: variables that contradict each other, or that do not suffice to join.
    """
    env = os.environ
    if "RANK" not in env:
        _adopt_tasks(env)
    if "RANK" not in env:
        left = env.get("WORLD_SIZE", "1")
        remedy = "unset WORLD_SIZE, or launch with torchrun or deepspeed"
        require(left == "1", "RANK", f"be set where WORLD_SIZE is {left}", None, remedy)
        return Launched()
    world = _whole(env, "WORLD_SIZE", 1, None)
    rank = _whole(env, "RANK", 0, world)
    # torchrun's name for it, or deepspeed's.
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
    local_world = _whole(env, name, 1, world + 1) if name in env else world
    local_rank = _whole(env, "LOCAL_RANK", 0, None) if "LOCAL_RANK" in env else 0
    return Launched(rank, world, local_rank, local_world, True)


def launcher_facts() -> dict[str, str]:
    """What started this process, on how many nodes, in which job of Slurm; {} if nothing did."""
    env = os.environ
    job = {"slurm_job": env["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in env else {}
    if "RANK" not in env:
        return job
    tasks = (program for program, names in _TASKS.items() if env.get(names[0]) == env["RANK"])
    name = next(tasks, "by hand")
    name = "deepspeed" if "CROSS_SIZE" in env else name
    name = "torchrun" if "TORCHELASTIC_RUN_ID" in env else name
    now = launched()
    return {"launcher": name, "nodes": str(now.world // now.local_world)} | job


def require_address() -> None:
    """Raise `ConfigError` where the environment does not say where ranks meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        rule, remedy = "be set where RANK is", "launch with torchrun or deepspeed, which set it"
        require(bool(os.environ.get(name)), name, rule, None, remedy)
    _whole(os.environ, "MASTER_PORT", 0, 2**16)


def _adopt_tasks(env: Mapping[str, str]) -> None:
    """Set torchrun's variables from those of srun or mpirun, if one of them started several."""
    for program, names in _TASKS.items():
        rank, world, local_rank, local_world = (env.get(name) for name in names)
        if rank is None or not world or world == "1":
            continue
        # A script of sbatch has the variables of a task 0, but is in no step of the job.
        if program == "srun" and "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env:
            continue
        local_world = (re.match(r"\d+", local_world or "") or [""])[0]
        if local_world == world:  # all on one node
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if not env.get("MASTER_ADDR"):
            tasks = "--ntasks-per-node=1 " if program == "srun" else "-N 1 "
            raise TasksError(
                f"MASTER_ADDR must be set for the {world} tasks of {program} to meet as ranks, got "
                f"none; set it to the first node's name, or start one task a node: {program} "
                f"{tasks}torchrun --nnodes N --nproc_per_node GPUS --rdzv_backend c10d "
                "--rdzv_endpoint NODE:29500 -m flap_fast ..., or unset "
                f"{names[1]} for a run of one process"
            )
        found = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank or rank}
        found |= {"LOCAL_WORLD_SIZE": local_world} if local_world else {}
        os.environ.update(found)
        os.environ.setdefault("MASTER_PORT", _PORT)
        return


def _whole(env: Mapping[str, str], name: str, least: int, end: int | None) -> int:
    value = env.get(name)
    rule = f"be a whole number of at least {least}" + ("" if end is None else f" and below {end}")
    remedy = "launch with torchrun or deepspeed, which set it"
    valid = value is not None and value.isdecimal() and int(value) >= least
    valid = valid and (end is None or int(value or 0) < end)
    require(valid, name, rule, value, remedy)
    return int(value or 0)
