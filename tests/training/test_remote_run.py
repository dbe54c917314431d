"""Training on shards by URL: killed and resumed, over ranks, on a bad day of the server's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.shards import ShardError
from flap_fast.preparation.prepare import prepare
from flap_fast.training.loop import train
from flap_fast.training.run_folder import begin
from tests.ranks import on_ranks, start_server
from tests.serving import Served, refused, serving, slow
from tests.tiny import tiny
from tests.training.stopping import train_stopped_after


@pytest.fixture(scope="module")
def shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in shards of two clips: twelve to train on, three to score."""
    out = tmp_path_factory.mktemp("shards")
    prepare(corpus, out, shard_clips=2, threads=2, show=False)
    return out


@pytest.fixture
def served(shards: Path, tmp_path: Path) -> Iterator[Served]:
    with serving(Path(shutil.copytree(shards, tmp_path / "served"))) as found:
        yield found


def settings(data: object, out: Path, *overrides: str) -> Config:
    """Batches of four clips, of two shards at a time; two epochs."""
    return tiny(
        *(f"data.train={data}/train", f"data.val={data}/val", f"data.cache={out / 'cache'}"),
        *(f"run.folder={out}", "log.tensorboard=false", "ckpt.every_steps=2", "train.steps=12"),
        *("data.shuffle_shards=2", "frontend.backend=torch", "frontend.prefetch=1"),
        *("data.retry_s=5", "train.global_batch=4", *overrides),
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "flap/checkpoints/step-000012/model.safetensors")


def assert_same_run(url: Path, disk: Path) -> None:
    """Fail unless both runs have the same weights and scores, bit for bit."""
    found, wanted = weights(url), weights(disk)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    scores = (json.loads((out / "flap/eval.json").read_text())["retrieval"] for out in (url, disk))
    assert next(scores) == next(scores)


def killed(config: Config, now: Callable[[], bool]) -> None:
    """Train in a process of its own, which is killed as soon as `now` is true."""
    process = start_server().Process(target=train, args=(config,), daemon=True)
    process.start()
    while not now():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_run_killed_while_it_fetches_resumes_to_the_weights_of_the_disk(shards, served, tmp_path):
    disk, url = tmp_path / "disk", tmp_path / "url"
    train(settings(shards, disk))
    # Room for ten of the twelve shards: the second epoch fetches some again, and stalls there.
    largest = sorted(file.stat().st_size for file in shards.glob("train/*.tar"))[-10:]
    config = settings(served.url, url, f"data.cache_gib={sum(largest) / 2**30}")
    names = [f"train/{number}.tar" for number in range(12)]
    served.faults |= {name: [slow(0), slow(60)] for name in names}
    saved = "flap/checkpoints/step-*/state.json"

    def now() -> bool:
        return any(url.glob(saved)) and any(served.ranges.get(name, [])[1:] for name in names)

    killed(config, now)
    assert [*(url / "cache/shards").glob("*.part")]
    served.faults.clear()
    train(config, resume=True)
    assert_same_run(url, disk)
    held = [file.stat().st_size for file in (url / "cache/shards").iterdir()]
    assert sum(held) <= sum(largest)
    assert not [*(url / "cache/shards").glob("*.part")]


def test_a_shard_that_changed_before_a_run_is_resumed_is_refused(served, tmp_path):
    config = settings(served.url, tmp_path, "data.val=[]")
    train_stopped_after(4, config)
    tar = served.folder / "train/5.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    message = r"data\.train must hold the shards .*, got 'another size or ETag of http\S*/5\.tar'"
    with pytest.raises(ConfigError, match=message):
        train(config, resume=True)
    tar.write_bytes(tar.read_bytes()[:-1] + b"\0")
    train(config, resume=True)


def test_a_run_resumes_with_another_signature_which_is_not_printed(served, tmp_path, capsys):
    def signed(key: str, *more: str) -> Config:
        places = (
            f"data.{name}={served.url}/{name}/{{0..1}}.tar?{key}" for name in ("train", "val")
        )
        return settings(served.url, tmp_path, *places, *more)

    train_stopped_after(2, signed("secret1"))
    said = capsys.readouterr().err
    assert f"scored on {served.url}/val/{{0..1}}.tar" in said
    assert "secret" not in said
    assert begin(signed("secret2"), resume=True) == tmp_path / "flap/checkpoints/step-000002"
    with pytest.raises(ConfigError, match=r"got\n  train\.steps: 12 -> 13\nset them back"):
        begin(signed("secret3", "train.steps=13"), resume=True)
    other = f"data.train={served.url}/train/0.tar?secret4"
    with pytest.raises(ConfigError, match=r"got\n  data\.train: .*/train/0\.tar'\]\nset") as error:
        begin(signed("secret4", other), resume=True)
    assert "secret" not in str(error.value)


def trained_on_rank(config: Config) -> None:
    train(config)


def test_ranks_fetch_each_shard_once_and_train_as_on_disk(shards, served, tmp_path):
    on_ranks(2, trained_on_rank, settings(shards, tmp_path / "disk"))
    on_ranks(2, trained_on_rank, settings(served.url, tmp_path / "url"))
    assert_same_run(tmp_path / "url", tmp_path / "disk")
    assert served.fetched(".tar") == 15


@pytest.mark.parametrize(
    ("window", "part", "remedy"),
    [
        (0, 0.9, r"whose batches read from all shards .* set data\.shuffle_shards=\d, or "),
        (4, 0.9, r"read from the 4 shards mixed at a time, .* set data\.shuffle_shards=\d, or "),
        (1, 0.2, r"read from the 1 shards mixed at a time, got .*; set it higher"),
    ],
)
def test_a_cache_that_holds_too_few_shards_is_refused_before_training(
    shards, served, tmp_path, window, part, remedy
):
    whole = sum(file.stat().st_size for file in shards.glob("train/*.tar")) / 2**30
    more = (f"data.shuffle_shards={window}", f"data.cache_gib={part * whole:.9f}")
    with pytest.raises(ConfigError, match=rf"^data\.cache_gib must be at least 0\.000.*{remedy}"):
        train(settings(served.url, tmp_path, *more))
    assert not (tmp_path / "flap/checkpoints").exists()


def test_a_shard_that_is_refused_in_a_run_ends_it_by_name_and_it_resumes(shards, served, tmp_path):
    train(settings(shards, tmp_path / "disk"))
    config = settings(served.url, tmp_path / "url")
    served.faults["train/3.tar"] = [refused] * 99
    with pytest.raises(ShardError, match=r"train/3\.tar cannot be read: 403"):
        train(config)
    served.faults.clear()
    train(config, resume=True)
    assert_same_run(tmp_path / "url", tmp_path / "disk")
