"""Loading: 160 clips of 10 s from FLAC shards to waveforms at 16 kHz, on all cores.

pytest bench/bench_loading.py      `python -m bench.loading` lets the ways take turns
"""

from __future__ import annotations

import pytest

pytest.importorskip("nvidia.dali", reason="DALI is not installed here")
pytest.importorskip("torchaudio", reason="torchaudio is a part of the dev extra")

from bench.loaders import BATCH, CORES, LOADER_CASES, TIMED, LoaderCase, drain, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), clips=64)


@pytest.mark.parametrize(
    "case", LOADER_CASES, ids=lambda case: f"{case.name}, {case.stored_hz // 1000} kHz"
)
def test_waveforms(benchmark, shards, case: LoaderCase):
    benchmark.group = f"{BATCH * TIMED} clips, {case.stored_hz // 1000} kHz FLAC, {CORES} cores"
    benchmark.pedantic(drain, setup=lambda: ((case.filled(shards),), {}), rounds=3)
