"""What launchers say in the environment becomes ranks, or one sentence with the remedy."""

from __future__ import annotations

import os
import socket
import sys

import pytest
import torch

from flap_fast.__main__ import main
from flap_fast.checks import ConfigError
from flap_fast.launcher import Launched, launched, require_address
from flap_fast.ranks import join_ranks

PREFIXES = ("SLURM_", "OMPI_", "PMI_", "MPI_", "MASTER_")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}
ON_NODES = SLURM | {"SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "2(x2)"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
INTEL_MPI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29501"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without a launcher's variables; those that are set in a test are gone after it."""
    for name in [*os.environ, *TORCHRUN, *DEEPSPEED, *MEETING]:
        if name in TORCHRUN or name in DEEPSPEED or name.startswith(PREFIXES):
            monkeypatch.setenv(name, "")  # so that it is put back as it was
            monkeypatch.delenv(name)
    return monkeypatch


def given(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED, ON_NODES, OPEN_MPI, INTEL_MPI])
def test_every_launcher_gives_the_same_rank(
    variables: dict[str, str], environment: pytest.MonkeyPatch
):
    given(environment, variables | MEETING)
    assert launched() == Launched(3, 4, 1, 2, True) == launched()
    require_address()
    assert os.environ["RANK"] == "3"


def test_tasks_of_one_node_need_no_address(environment: pytest.MonkeyPatch):
    given(environment, SLURM | {"SLURM_LOCALID": "3", "SLURM_TASKS_PER_NODE": "4"})
    assert launched() == Launched(3, 4, 3, 4, True)
    require_address()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_mpirun_comes_before_the_job_of_slurm_that_it_runs_in(environment: pytest.MonkeyPatch):
    job = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}
    given(environment, job | OPEN_MPI | MEETING)
    assert launched().rank == 3


def test_a_jobs_script_is_no_task_though_it_has_the_variables_of_one(environment):
    script = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    given(environment, script | {"SLURM_TASKS_PER_NODE": "4"})
    assert launched() == Launched()
    given(environment, {"SLURM_STEP_ID": "0"})
    assert launched().world == 4


@pytest.mark.parametrize("one", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}])
def test_one_process_is_no_rank(one: dict[str, str], environment: pytest.MonkeyPatch):
    given(environment, {"WORLD_SIZE": "1"} | one)
    assert launched() == Launched()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (SLURM, r"MASTER_ADDR must be set for the 4 tasks of srun .*srun --ntasks-per-node=1 tor"),
        (OPEN_MPI, r"MASTER_ADDR must be set for the 4 tasks of mpirun .*unset OMPI_COMM_WORLD_SI"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MASTER_ADDR must be set for the 2 tasks of mpiexec"),
        ({"WORLD_SIZE": "8"}, "RANK must be set where WORLD_SIZE is 8, got None; unset WORLD_SIZE"),
        ({"RANK": "0"}, "WORLD_SIZE must be a whole number of at least 1, got None; launch"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number .*got 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be a whole number of .* below 2, got '2'"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number .*got '-1'"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE must be .* below 5, got '9'"),
        (TORCHRUN, "MASTER_ADDR must be set where RANK is, got None"),
        (TORCHRUN | {"MASTER_ADDR": "a"}, "MASTER_PORT must be set where RANK is, got None"),
        (TORCHRUN | MEETING | {"MASTER_PORT": "99999"}, "MASTER_PORT must be .* below 65536"),
    ],
)
def test_variables_that_make_no_ranks_are_refused(
    variables: dict[str, str], message: str, environment: pytest.MonkeyPatch
):
    given(environment, variables)
    calls = (launched, require_address)
    with pytest.raises(ConfigError, match=message):
        _ = [call() for call in calls]


@pytest.mark.parametrize("task", [0, 1])
def test_tasks_that_cannot_meet_train_nothing_and_the_first_one_says_why(
    task: int, environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    given(environment, {"SLURM_PROCID": str(task), "SLURM_NTASKS": "2"})
    environment.setattr(sys, "argv", ["flap", "train", "configs/tiny.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: MASTER_ADDR must be set" if task == 0 else "")
    assert printed.count("\n") == (task == 0)


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED])
@pytest.mark.parametrize("local_rank", ["0", "3"])
def test_more_ranks_than_gpus_are_refused_on_each_rank_so_that_the_first_one_says_it(
    local_rank: str, variables: dict[str, str], environment: pytest.MonkeyPatch
):
    four = dict.fromkeys({"LOCAL_WORLD_SIZE", "LOCAL_SIZE"} & variables.keys(), "4")
    given(environment, variables | MEETING | four | {"LOCAL_RANK": local_rank})
    environment.delenv("DS_ACCELERATOR", raising=False)
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="LOCAL_RANK must be below the 2 GPUs here, got 3; start"):
        join_ranks()


@pytest.mark.parametrize("task", [{"LOCAL_RANK": "1"}, ON_NODES | {"SLURM_STEP_ID": "0"}])
def test_a_command_that_is_no_rank_says_its_error_whatever_started_it(
    task: dict[str, str], environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    given(environment, task)
    environment.setattr(sys, "argv", ["flap", "config", "show", "absent.yaml"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("error: the config must be an existing YAML file")


def test_a_port_that_another_program_has_is_named(environment: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given(environment, two | {"DS_ACCELERATOR": "cpu"})
        with pytest.raises(ConfigError, match=f"meet at 127.0.0.1:{port}, got: .*set another port"):
            join_ranks()
