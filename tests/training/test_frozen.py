"""A frozen encoder runs once for each caption, or whole clip, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.batch import Batch
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.embedder import load
from flap_fast.training import loop
from flap_fast.training.engine import DeepSpeedEngine, PlainEngine
from flap_fast.training.frozen import Frozen, FrozenText
from flap_fast.training.loop import train, train_from
from flap_fast.training.run_folder import begin
from flap_fast.training.step import Gradients
from tests.ranks import on_ranks
from tests.tiny import YAMNET, tiny, tiny_clip
from tests.training.stopping import train_stopped_after
from tests.training.test_step import assert_same, batches, gradient_of

STEPS, CLIPS = 5, 16
SMALL = ("audio.depth=1", "text.depth=1", "text.pool=mean", "text.freeze=true", "text.dropout=0.1")
# Some clips are longer.
MEDIA = (*YAMNET, "audio.max_duration_s=1.5", "audio.freeze=true", "text.depth=1")
RESUMED = {"text": ("pool_text", SMALL), "media": ("pool_media", MEDIA)}
CAPTIONS = ["a dog", "rain on a roof of tin", "a dog", "an engine idles, then it stops", "bells"]


def settings(*overrides: str) -> Config:
    more = f"train.global_batch={CLIPS}", "loss.nli.weight=0.1"
    return tiny(*SMALL, *more, *overrides)


def caption_batches(config: Config, ranks: Ranks, times: int) -> Iterator[Batch]:
    """Micro-batches whose captions partly come again: in other steps, on other ranks, twice."""
    words, sentences = tokenizer(config.text), len(config.loss.sentences)
    for batch in batches(config, ranks, STEPS, times):
        step = batch.epoch  # an epoch of those is a step
        # Every second one is on the other of two ranks at the same time.
        captions = [f"loud {(n + 5 * step) % (12 if n % 2 else 8)}" for n in batch.clips.tolist()]
        texts = [f"{caption} {name}" for name in range(sentences) for caption in captions]
        ids, attention_mask = words(texts)
        yield replace(batch, ids=ids, attention_mask=attention_mask)


def run(config: Config, ranks: Ranks, folder: Path | None, engine: type = PlainEngine):
    """Totals of five steps, the first one's gradients, and captions of each pass of the encoder."""
    torch.manual_seed(0)
    running = engine(config, TwoTowers(config), ranks)
    embedded: list[list[tuple[int, ...]]] = []

    def note(_: Any, given: tuple[Tensor, Tensor]) -> None:
        rows = zip(*given, strict=True)
        embedded.append([tuple(row[kept.bool()].tolist()) for row, kept in rows])

    running.module.text.register_forward_pre_hook(note)
    frozen = None if folder is None else FrozenText(running.module, ranks, folder, keep=False)
    gradients = Gradients(config, ranks, running, STEPS, 1, Frozen(text=frozen))
    stream = caption_batches(config, ranks, gradients.reads)
    totals, first = [], None
    for step in range(1, STEPS + 1):
        _, terms = gradients(step, stream)
        totals.append(ranks.mean(terms["total"]).item())
        named = running.module.named_parameters()
        first = first or {name: gradient_of(p) for name, p in named if p.requires_grad}
        running.step(1e-3)
    return totals, first, embedded


@pytest.mark.parametrize(
    "overrides",
    [(), ("text.packing=padded",), ("train.micro_batch=4",), ("train.precision=bf16",)],
)
def test_losses_and_gradients_are_those_of_an_encoder_that_runs_in_each_step(
    overrides: tuple[str, ...], tmp_path: Path
):
    config = settings(*overrides)
    each_step, once = run(config, Ranks(), None), run(config, Ranks(), tmp_path)
    assert_same(once, each_step)
    ours, theirs = list(chain(*once[2])), list(chain(*each_step[2]))
    assert len(ours) == len(set(ours)) == len(set(theirs)) < len(theirs)


def at_every_stage(folder: Path, local_world: int):
    """On one rank, what `run` gives at ZeRO 0 to 3."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), local_world, launched=True)
    micro = ("train.micro_batch=4",)
    configs = [settings(*micro, f"train.zero_stage={stage}") for stage in (0, 1, 2, 3)]
    return [run(c, ranks, folder / str(n), DeepSpeedEngine) for n, c in enumerate(configs)]


@pytest.mark.parametrize("local_world", [1, 2])
def test_over_ranks_a_caption_is_embedded_by_one_of_them_at_every_stage(
    local_world: int, tmp_path: Path
):
    """Two ranks of a node that share its files, or of two nodes."""
    pytest.importorskip("deepspeed")
    whole = run(settings(), Ranks(), None)
    one, two = on_ranks(2, at_every_stage, tmp_path, local_world, timeout_s=280)
    for found in (*one, *two):
        assert_same(found, whole)
    for ours, theirs in zip(one, two, strict=True):
        passes = [*ours[2], *theirs[2]]
        assert set(chain(*passes)) == set(chain(*whole[2]))
        # A rank that has nothing new repeats one caption while the other embeds.
        several = list(chain(*(captions for captions in passes if len(captions) > 1)))
        assert len(several) == len(set(several)) > CLIPS
    files = {path.name for path in (tmp_path / "0").iterdir()}
    nodes = range(2 // local_world)
    assert files == {f"node-{n}.{end}" for n in nodes for end in ("keys", "float32")}


def of_run(runs: Path, name: str, data: Path) -> tuple[str, ...]:
    named = f"run.folder={runs}", f"run.name={name}", f"data.train={data}/train"
    return *named, "log.every_steps=1", "log.tensorboard=false", "train.steps=6"


def given(config: Config, captions: list[str]) -> tuple[Tensor, Tensor]:
    return tokenizer(config.text)(captions)


@pytest.mark.parametrize(
    "config", [settings(), settings("text.packing=padded"), tiny_clip(SMALL[3])]
)
def test_a_caption_has_the_same_vector_whichever_captions_are_beside_it(
    config: Config, tmp_path: Path
):
    model = TwoTowers(config)
    frozen = FrozenText(model, Ranks(), tmp_path, keep=False)
    for caption in CAPTIONS:
        frozen(*given(config, [caption]))
    together = model.pool_text(*given(config, CAPTIONS))
    torch.testing.assert_close(frozen(*given(config, CAPTIONS)), together, rtol=1e-5, atol=1e-6)
    assert len(frozen) == 4


@pytest.mark.parametrize("broken", ["keys", "vectors"])
def test_rows_are_read_again_bit_for_bit_and_an_incomplete_one_is_embedded_again(
    broken: str, tmp_path: Path
):
    config = settings()
    model = TwoTowers(config)
    first = FrozenText(model, Ranks(), tmp_path, keep=False)
    vectors = first(*given(config, CAPTIONS))
    first.close()
    keys = tmp_path / "node-0.keys"
    if broken == "keys":  # as a process that was killed leaves it
        keys.write_bytes(keys.read_bytes()[:-3])
    else:  # as a machine that went down leaves it
        file, width = tmp_path / "node-0.float32", 4 * config.text.width
        file.write_bytes(file.read_bytes()[: -width // 2] + bytes(width // 2))
    second = FrozenText(model, Ranks(), tmp_path, keep=True)
    assert len(second) == 3
    assert torch.equal(second(*given(config, CAPTIONS[:4])), vectors[:4])
    torch.testing.assert_close(second(*given(config, CAPTIONS)), vectors)
    assert len(second) == 4
    assert len(FrozenText(model, Ranks(), tmp_path, keep=False)) == 0
    second.delete()
    assert not tmp_path.exists()


def test_rows_behind_an_incomplete_one_are_gone(tmp_path: Path):
    """Or a row that is written again would stand in the files twice."""
    config = settings()
    model = TwoTowers(config)
    FrozenText(model, Ranks(), tmp_path, keep=False)(*given(config, CAPTIONS))
    file = tmp_path / "node-0.float32"
    file.write_bytes(bytes(8) + file.read_bytes()[8:])
    FrozenText(model, Ranks(), tmp_path, keep=True)(*given(config, CAPTIONS[3:]))
    last = FrozenText(model, Ranks(), tmp_path, keep=True)
    assert len(last) == 2
    expected = model.pool_text(*given(config, CAPTIONS))
    torch.testing.assert_close(last(*given(config, CAPTIONS)), expected)


def with_a_node_that_has_no_files(folder: Path) -> tuple[int, Tensor, Tensor]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), launched=True)
    config = settings()
    torch.manual_seed(0)
    model = TwoTowers(config)
    FrozenText(model, ranks, folder, keep=False)(*given(config, CAPTIONS))
    if ranks.rank == 1:
        for file in folder.glob("node-1.*"):
            file.unlink()
    frozen = FrozenText(model, ranks, folder, keep=True)
    mine = given(config, CAPTIONS[ranks.rank :])
    return len(frozen), frozen(*mine), model.pool_text(*mine)


def test_a_node_that_has_no_files_embeds_again(tmp_path: Path):
    one, two = on_ranks(2, with_a_node_that_has_no_files, tmp_path)
    assert (one[0], two[0]) == (4, 0)
    for _, found, expected in (one, two):
        torch.testing.assert_close(found, expected)


def halted_and_whole(data: Path, runs: Path, name_of: str) -> list[int]:
    """On one of two ranks of a node, a run, and the same from its step 2.

    The result is how many inputs it embedded before that step, after it, and again after it.
    """
    ranks = Ranks(dist.get_rank(), 2, 2, launched=True)
    embedded = [0]
    pool, small = RESUMED[name_of]
    setattr(TwoTowers, pool, counting(getattr(TwoTowers, pool), embedded))  # of this process alone
    for name in ("whole", "halted"):
        if name == "halted" and ranks.first:
            shutil.copytree(runs / "kept", runs / name)
        ranks.barrier()
        config = tiny(
            *small, *of_run(runs / name, "flap", data), "train.zero_stage=3", "ckpt.every_steps=2"
        )
        with ExitStack() as open_files, pytest.MonkeyPatch.context() as patch:
            if name == "whole":
                patch.setattr(loop, "save_and_score", keeping(runs / name, ranks, embedded))
            train_from(config, ranks, begin(config, resume=True), open_files)
        embedded.append(0)
    return embedded[:-1]


def counting(real: Any, embedded: list[int]) -> Any:
    def counted(model: TwoTowers, *inputs: Any) -> Tensor:
        vectors = real(model, *inputs)
        embedded[-1] += len(vectors)
        return vectors

    return counted


def keeping(folder: Path, ranks: Ranks, embedded: list[int]) -> Any:
    """Copies the run as it is after step 2, as a machine that went down leaves it."""
    real = loop.save_and_score

    def saved(run: Any, step: int, *, stopped: bool) -> None:
        real(run, step, stopped=stopped)
        if step == 2:
            if ranks.first:
                shutil.copytree(folder, folder.with_name("kept"))
            ranks.barrier()
            embedded.append(0)

    return saved


@pytest.mark.parametrize("name", ["text", "media"])
def test_a_resumed_run_over_ranks_is_the_uninterrupted_one_bit_for_bit(
    name: str, prepared: Path, tmp_path: Path
):
    pytest.importorskip("deepspeed")
    for first_steps, rest, halted in on_ranks(2, halted_and_whole, prepared, tmp_path, name):
        assert halted == rest > 0 < first_steps
    one, two = (
        (tmp_path / name / "flap/checkpoints/step-000006/model.safetensors").read_bytes()
        for name in ("whole", "halted")
    )
    assert one == two


def test_a_full_disk_is_said_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = settings()
    frozen = FrozenText(TwoTowers(config), Ranks(), tmp_path, keep=False)
    frozen._vectors.close()
    frozen._vectors = open("/dev/full", "r+b")  # type: ignore  # noqa: SIM115
    with pytest.raises(OSError, match=r"node-0\.float32: .*; make room and run the same command"):
        frozen(*given(config, CAPTIONS))
    assert len(frozen) == 0


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_and_leaves_no_vectors(
    name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pool, small = RESUMED[name]

    def config(name: str) -> Config:
        return tiny(*small, *of_run(tmp_path, name, prepared))

    train(config("whole"))
    embedded = [0]
    monkeypatch.setattr(TwoTowers, pool, counting(getattr(TwoTowers, pool), embedded))
    train_stopped_after(2, config("halted"))
    assert (tmp_path / f"halted/{name}_vectors").is_dir()
    train(config("halted"), resume=True)
    assert 8 < embedded[0] < 6 * 8
    assert rows(tmp_path / "halted") == rows(tmp_path / "whole")
    ours, theirs = (
        load(tmp_path / name / "checkpoints/step-000006").model.state_dict()
        for name in ("halted", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / f"halted/{name}_vectors").exists()


def rows(run: Path) -> list[dict[str, float]]:
    """Its metrics but those of time and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    times = ("clips_per_s", "step_ms", "data_wait", "peak_mib", "eval_s")
    return [{k: v for k, v in json.loads(n).items() if k not in times} for n in lines]
