"""Shards written by the workers of a Ray cluster: the same jobs, the same bytes.

All machines must see OUT, the sounds and the working folder under the same paths, and have what
this package needs installed. The only file that imports ray.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from flap_fast.checks import ConfigError
from flap_fast.data.jobs import Job, Place


def write_on_cluster(place: Place, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
    """Write these shards, one a task, each on a core of the cluster that is running.

    Its address is RAY_ADDRESS, or that of the cluster which this machine is part of. The first
    error of a task stops the others; what is finished stays.

    Raises:
        ConfigError: Ray is not installed, or no cluster is there.
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
    write = ray.remote(num_cpus=1)(_write)
    running = {write.remote(place, job, os.getcwd()): len(job.entries) for job in jobs}
    try:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            ray.get(done)
            advance(running.pop(done))
    finally:
        for task in running:
            ray.cancel(task)


def _write(place: Place, job: Job, folder: str) -> None:
    from flap_fast.data.prepare import write_shards

    os.chdir(folder)  # a manifest's paths may be relative to it
    write_shards(place, [job], lambda _: None, threads=1)
