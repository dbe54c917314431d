"""A Ray cluster writes the bytes of one machine, and its errors arrive here."""

from __future__ import annotations

import sys

import pytest

from flap_fast.checks import ConfigError
from flap_fast.preparation.manifest import read_manifest
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.shard_tasks import Prepared
from tests.preparation.test_prepare import contents


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_writes_the_bytes_of_one_machine(corpus, prepared, tmp_path, monkeypatch):
    """A cluster of two cores, which is there before the working folder changes."""
    ray = pytest.importorskip("ray")
    paths = {"env_vars": {"PYTHONPATH": ":".join(path for path in sys.path if path)}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=paths, log_to_driver=False)
    try:
        out = tmp_path / "out"
        monkeypatch.chdir(corpus.parent)
        done = prepare(corpus.name, out, shard_clips=7, distributor="ray", show=False)
        assert done == Prepared(30, 5, 30, 0)
        assert contents(out) == contents(prepared)
        # What a worker cannot do fails here, with the file.
        (tmp_path / "full/train").mkdir(parents=True)
        (tmp_path / "full/train/1.idx").mkdir()
        with pytest.raises(OSError, match=r"full/train/1\.idx"):
            prepare(corpus, tmp_path / "full", shard_clips=7, distributor="ray", show=False)
    finally:
        ray.shutdown()


@pytest.mark.ray
def test_without_a_cluster_the_remedy_is_said(corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    rows = read_manifest(corpus)
    with pytest.raises(ConfigError, match=r"must find a cluster, got none; .* ray start --head"):
        prepare(rows, tmp_path, distributor="ray", show=False)


def test_without_ray_the_remedy_is_said(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"must have Ray; pip install 'flap_fast\[ray\]'"):
        prepare(corpus, tmp_path, distributor="ray", show=False)
