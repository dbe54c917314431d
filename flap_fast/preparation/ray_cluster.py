"""Tasks on a Ray cluster. The only file that imports ray.

All machines must see the files and the working folder under the same paths, and have what this
package needs installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from flap_fast.checks import ConfigError


def run_on_cluster(
    tasks: Sequence[tuple[Callable[[], None], int]],
    advance: Callable[[int], object],
    *,
    cores: int = 1,
    gpu: bool = False,
) -> None:
    """Run these on the cluster that is running.

    Its address is RAY_ADDRESS, or that of the cluster which this machine is part of. The first
    error of a task stops the others; what is finished stays.

    Args:
        tasks: what to run, with a count.
        advance: called with a task's count when it is finished.
        cores: that a task takes, and threads that PyTorch has in it.
        gpu: a task takes a GPU, where the cluster has any.

    Raises:
        ConfigError: Ray is not installed, or no cluster is running.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise ConfigError("--distributor ray must have Ray; pip install 'flap_fast[ray]'") from None
    if not ray.is_initialized():
        try:
            # Workers find this package where it is found here, installed or not.
            paths = {"env_vars": {"PYTHONPATH": ":".join(path for path in sys.path if path)}}
            ray.init(address="auto", runtime_env=paths, log_to_driver=False)
        except ConnectionError:
            raise ConfigError(
                "--distributor ray must find a cluster, got none; start one with: ray start --head"
            ) from None
    gpus = 1 if gpu and ray.cluster_resources().get("GPU") else 0
    run = ray.remote(num_cpus=cores, num_gpus=gpus)(_run)
    running = {run.remote(task, os.getcwd()): count for task, count in tasks}
    try:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            ray.get(done)
            advance(running.pop(done))
    finally:
        for task in running:
            ray.cancel(task)


def _run(task: Callable[[], None], folder: str) -> None:
    os.chdir(folder)  # paths may be relative to it
    task()
