"""Cached gradients: the gradients of one pass, with the memory of a micro-batch."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config import Config, Data, Train, check_before_loading
from flap_fast.data.batch import Batch
from flap_fast.data.dealing import dealt_equally, dealt_in_order
from flap_fast.data.shards import ShardError
from flap_fast.data.tokenize import tokenizer
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.engine import DeepSpeedEngine, PlainEngine
from flap_fast.training.loop import train
from flap_fast.training.step import Gradients, dropout_seed, model_inputs, patch_mask_of
from tests.ranks import on_ranks
from tests.tiny import tiny
from tests.training.stopping import train_stopped_after

STEPS = 10
CLIPS = 64
RECON = ("loss.recon.weight=0.5", "decoder.width=16", "decoder.depth=1", "decoder.heads=2")
CYCLIC = ("loss.cyclic.cross_weight=0.25", "loss.cyclic.in_weight=0.25")
# Two views ask for dropout, and the same numbers in other micro-batches for none that is ever seen.
OF_TEXT = ("loss.simcse.weight=0.2", "loss.nli.weight=0.1", "text.dropout=1e-12")


def settings(*overrides: str, clips: int = CLIPS) -> Config:
    """2-D masked FLAP with every loss, none of whose gradients is lost beside the others'."""
    small = (f"train.global_batch={clips}", "audio.depth=1", "text.depth=1", "text.pool=mean")
    return tiny(*small, *RECON, *CYCLIC, *OF_TEXT, *overrides)


# Of 50 clips and 40 captions, some of them in other micro-batches and on other ranks.
PAIR_IDS = torch.arange(CLIPS)[:, None] % torch.tensor([50, 40])


def pair_ids_of(config: Config) -> Tensor:
    """Of pairs and their negatives, most of which say what another clip's caption says."""
    numbers = torch.arange(CLIPS)[:, None]
    negatives = (7 * numbers + torch.arange(config.loss.negatives)) % 45
    return torch.cat([PAIR_IDS, negatives], dim=1)[: config.train.global_batch]


Deal = Callable[[Config, Ranks, int], list[np.ndarray]]
"""A rank's micro-batches of a step, as rows of the global batch."""


def in_order(config: Config, ranks: Ranks, step: int) -> list[np.ndarray]:
    return dealt_in_order(config.train, ranks).micro_batches


def by_tokens(config: Config, ranks: Ranks, step: int) -> list[np.ndarray]:
    """Of clips of 1 to 30 tokens, 100 in a micro-batch; in the second step there is one."""
    tokens = np.random.default_rng(step).integers(1, 31, config.train.global_batch)
    train = config.train.model_copy(update={"micro_tokens": 100 if step != 1 else 2000})
    return dealt_equally(train, ranks, tokens).micro_batches


def batches(
    config: Config, ranks: Ranks, steps: int, times: int = 1, deal: Deal = in_order
) -> Iterator[Batch]:
    """A rank's micro-batches of synthetic clips: the same clips for any number of them."""
    clips = config.train.global_batch
    captions = [f"{chr(97 + n % 26) * 9} sounds {n}" + " again" * (n % 3) for n in range(clips)]
    names = [name.removesuffix("_again") for name in config.loss.sentences]
    texts = [c if name == "text" else f"{name} {c[-9:]}" for name in names for c in captions]
    ids, attention_mask = (x.unflatten(0, (-1, clips)) for x in tokenizer(config.text)(texts))
    for step in range(steps):
        mel = torch.randn(clips, 1, 112, 128, generator=torch.Generator().manual_seed(step))
        dealt = deal(config, ranks, step)
        for rows in dealt * (times if len(dealt) > 1 else 1):
            yield Batch(
                media=mel[rows],
                ids=ids[:, rows].flatten(0, 1),
                attention_mask=attention_mask[:, rows].flatten(0, 1),
                sample_index=torch.arange(clips)[rows] + step * clips,
                clips=np.arange(clips)[rows],
                epoch=step,
                micro_batches=len(dealt),
                pair_ids=pair_ids_of(config)[rows] if config.loss.pair_ids else None,
            )


def run(
    config: Config,
    ranks: Ranks,
    engine: type = PlainEngine,
    steps: int = STEPS,
    deal: Deal = in_order,
):
    """The totals of some steps, the gradients of the first, and what the model gave there."""
    torch.manual_seed(0)
    running = engine(config, TwoTowers(config), ranks)
    gradients = Gradients(config, ranks, running, steps, 1)
    stream = batches(config, ranks, steps, gradients.reads, deal)
    totals, first, given = [], None, None
    for step in range(1, steps + 1):
        outputs, terms = gradients(step, stream)
        shown: dict[str, Any] = {**outputs, **terms}
        assert not any(value.requires_grad for value in shown.values())
        totals.append(ranks.mean(terms["total"]).item())
        first = first or {
            name: gradient_of(parameter)
            for name, parameter in running.module.named_parameters()
            if parameter.requires_grad
        }
        given = given or outputs
        running.step(1e-3)
    return totals, first, given


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    if not dist.is_initialized():
        assert parameter.grad is not None
        return parameter.grad.clone()
    from deepspeed.utils import safe_get_full_grad

    gradient = safe_get_full_grad(parameter)
    assert gradient is not None
    return gradient.clone()


def assert_same(found: Any, whole: Any) -> None:
    """Losses to 1e-4; first-step gradients to 1e-5 of the largest, and of all of them together."""
    assert found[0] == pytest.approx(whole[0][: len(found[0])], rel=1e-4)
    assert found[1].keys() == whole[1].keys()
    most = max(gradient.abs().max().item() for gradient in whole[1].values())
    for name, gradient in whole[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * most, name
    difference = torch.cat([(found[1][n] - g).flatten() for n, g in whole[1].items()])
    assert difference.norm() <= 1e-5 * torch.cat([g.flatten() for g in whole[1].values()]).norm()


@pytest.fixture(scope="module")
def whole():
    """64 clips in one pass of one process."""
    return run(settings(), Ranks())


@pytest.mark.parametrize("micro_batch", [pytest.param(32, marks=pytest.mark.slow), 8])
def test_cached_gradients_are_those_of_one_pass_with_the_same_losses(micro_batch: int, whole):
    found = run(settings(f"train.micro_batch={micro_batch}"), Ranks())
    assert_same(found, whole)
    assert found[2] is not None
    for name, value in whole[2].items():  # what observers are shown
        torch.testing.assert_close(found[2][name], value, rtol=1e-5, atol=1e-6)


def at_every_stage(micro_batch: int, steps: int):
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    stages = (f"train.zero_stage={stage}" for stage in (0, 1, 2, 3))
    configs = [settings(f"train.micro_batch={micro_batch}", stage) for stage in stages]
    return [run(config, ranks, DeepSpeedEngine, steps)[:2] for config in configs]


@pytest.mark.parametrize("replay", ["keep", "decode"])
def test_micro_batches_of_different_sizes_and_number_give_the_gradients_of_one_pass(
    replay: str, whole
):
    counts = [len(by_tokens(settings(), Ranks(), step)) for step in range(3)]
    assert counts[1] == 1
    assert min(counts[0], counts[2]) > 5
    sizes = {len(rows) for rows in by_tokens(settings(), Ranks(), 0)}
    assert len(sizes) > 1
    found = run(settings(f"train.replay={replay}"), Ranks(), steps=3, deal=by_tokens)
    assert_same(found, whole)
    assert found[2] is not None
    torch.testing.assert_close(found[2]["recon"], whole[2]["recon"], rtol=1e-5, atol=0)


def dealt_at_every_stage(steps: int):
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    stages = ("train.zero_stage=0", "train.zero_stage=1", "train.zero_stage=2")
    offloaded = (*stages[1:], "train.offload=optimizer"), ("train.zero_stage=3",)
    configs = [settings(stage) for stage in stages] + [settings(*some) for some in offloaded]
    return [run(config, ranks, DeepSpeedEngine, steps, by_tokens)[:2] for config in configs]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_clips_dealt_by_their_tokens_agree_over_ranks_at_every_stage(world: int, whole):
    pytest.importorskip("deepspeed")
    for found in on_ranks(world, dealt_at_every_stage, 3, timeout_s=280):
        assert len(found) == 5
        for stage in found:
            assert_same(stage, whole)


SLOW = [
    pytest.param(world, micro_batch, STEPS, marks=pytest.mark.slow)
    for world, micro_batch in ((1, 64), (1, 32), (1, 8), (2, 32), (4, 16), (4, 8))
]


@pytest.mark.parametrize(("world", "micro_batch", "steps"), [(2, 8, 3), *SLOW])
def test_micro_batches_over_ranks_agree_at_every_stage(
    world: int, micro_batch: int, steps: int, whole
):
    pytest.importorskip("deepspeed")
    for found in on_ranks(world, at_every_stage, micro_batch, steps, timeout_s=280):
        assert len(found) == 4
        for stage in found:
            assert len(stage[0]) == steps
            assert_same(stage, whole)


def test_the_second_pass_draws_what_the_first_drew():
    """Dropout, drop-path, masks and SpecAug, against one graph over all micro-batches."""
    config = settings("train.micro_batch=4", "text.dropout=0.1", "audio.drop_path=0.2", clips=16)
    totals, gradients, _ = run(config, Ranks(), steps=1)
    torch.manual_seed(0)
    model = TwoTowers(config)
    each = []
    for micro, batch in enumerate(batches(config, Ranks(), 1)):
        torch.manual_seed(dropout_seed(config.run.seed, 1, 0, micro))
        each.append(model(**model_inputs(batch, patch_mask_of(batch, config, 1, 1), config)))
    names = ("media", *config.loss.sentences)
    outputs = {name: torch.cat([m[name] for m in each]) for name in names}
    outputs |= {name: torch.stack([m[name] for m in each]).mean() for name in ("scale", "recon")}
    total = total_loss(cast(Any, outputs), config)["total"]
    total.backward()
    graph = {name: gradient_of(p) for name, p in model.named_parameters()}
    assert_same((totals, gradients), ([total.item()], graph))
    with pytest.raises(AssertionError):  # and dropout does make a difference
        assert_same((totals, gradients), run(settings(clips=16), Ranks(), steps=1))


def test_micro_batches_draw_dropout_of_their_own():
    seeds = {dropout_seed(3407, step, rank, micro) % 2**32
             for step in (1, 2) for rank in range(8) for micro in range(64)}  # fmt: skip
    assert len(seeds) == 2 * 8 * 64


def test_a_frozen_text_tower_gets_no_gradient_and_its_head_the_whole():
    frozen = ("text.freeze=true", "loss.simcse.weight=0")
    whole = run(settings(*frozen, clips=16), Ranks(), steps=1)
    halves = run(settings(*frozen, "train.micro_batch=8", clips=16), Ranks(), steps=1)
    assert_same(halves, whole)
    assert not any(name.startswith("text.") for name in halves[1] or ())
    assert (halves[1] or {})["text_head.0.weight"].any()


def test_local_accumulation_averages_what_micro_batches_lose_and_says_so_once(capsys):
    config = settings("train.micro_batch=8", "train.accumulation=local", clips=16)
    totals, gradients, outputs = run(config, Ranks(), steps=2)
    printed = capsys.readouterr().err
    warning = "train.accumulation=local contrasts a clip with the 8 of its micro-batch"
    assert printed.count(warning) == 1
    assert "not with the 16 of train.global_batch" in printed
    torch.manual_seed(0)
    model = TwoTowers(config)
    losses = []
    for batch in batches(config, Ranks(), 1):
        mask = patch_mask_of(batch, config, 2, 1)
        losses.append(total_loss(model(**model_inputs(batch, mask, config)), config)["total"])
    mean = torch.stack(losses).mean()
    mean.backward()
    graph = {name: gradient_of(p) for name, p in model.named_parameters()}
    assert_same((totals[:1], gradients), ([mean.item()], graph))
    assert outputs is not None
    assert len(outputs["media"]) == 16


def test_without_micro_batches_local_is_exact_and_needs_no_warning(capsys):
    run(settings("train.accumulation=local", clips=16), Ranks(), steps=1)
    assert capsys.readouterr().err == ""


class Live:
    """The bytes that graphs hold, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def hold(self, tensor: Tensor) -> Held:
        held, size = Held(tensor), tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(held, self.drop, size)
        return held

    def drop(self, size: int) -> None:
        self.now -= size


class Held:
    """A graph's reference to a tensor; freed with the graph."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def most_held(clips: int, micro_batch: int) -> int:
    config = settings(f"train.micro_batch={micro_batch}", "text.packing=padded", clips=clips)
    engine = PlainEngine(config, TwoTowers(config), Ranks())
    gradients = Gradients(config, Ranks(), engine, 1, 1)
    stream = batches(config, Ranks(), 1, gradients.reads)
    live = Live()
    with torch.autograd.graph.saved_tensors_hooks(live.hold, lambda held: held.tensor):
        gradients(1, stream)
    return live.most


def test_graphs_hold_one_micro_batch_however_large_the_batch():
    small, large = most_held(16, 8), most_held(64, 8)
    assert large == small
    assert most_held(64, 64) > 7 * small


def test_a_run_in_micro_batches_resumes_bit_for_bit_and_logs_what_one_pass_logs(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def config(name: str, *overrides: str) -> Config:
        return tiny(
            *(f"run.folder={tmp_path}", f"run.name={name}", f"data.train={prepared}/train"),
            *("log.every_steps=1", "log.tensorboard=false", "train.steps=4", *RECON, *overrides),
        )

    def rows(name: str) -> list[dict[str, float]]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        times = ("clips_per_s", "step_ms", "data_wait", "peak_mib", "eval_s")
        return [{k: v for k, v in json.loads(n).items() if k not in times} for n in lines]

    micro = ("train.micro_batch=2", "text.dropout=0.1")
    train(config("whole", *micro))
    train_stopped_after(3, config("halted", *micro))
    train(config("halted", *micro), resume=True)
    assert rows("halted") == rows("whole")

    train(config("kept", *micro, "train.replay=keep"))
    assert rows("kept") == rows("whole")

    train(config("one"))
    train(config("two", "train.micro_batch=2"))
    for one, two in zip(rows("one"), rows("two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_a_clip_that_is_another_when_it_is_read_again_stops_the_run():
    config = settings("train.micro_batch=8", clips=16)
    gradients = Gradients(config, Ranks(), PlainEngine(config, TwoTowers(config), Ranks()), 1, 1)
    stream = list(batches(config, Ranks(), 1, gradients.reads))
    stream[3].clips[5] += 1
    said = r"step 1: a clip was readable in the first pass .*train\.replay=keep"
    with pytest.raises(ShardError, match=said):
        gradients(1, iter(stream))


@pytest.mark.parametrize(
    ("world", "micro_batch", "message"),
    [
        (1, 48, "512 clips of train.global_batch that a rank of 1 has, got 48; for example 32"),
        (16, 64, "32 clips of train.global_batch that a rank of 16 has, got 64; for example 32"),
    ],
)
def test_micro_batches_that_do_not_divide_a_ranks_clips_are_refused_before_anything_is_loaded(
    world: int, micro_batch: int, message: str, tmp_path: Path
):
    config = Config(
        train=Train(global_batch=512, micro_batch=micro_batch), data=Data(train=(tmp_path,))
    )
    with pytest.raises(ConfigError, match=f"^train.micro_batch must divide the {message}$"):
        check_before_loading(config, world)
    check_before_loading(config.model_copy(update={"train": Train(global_batch=512)}), world)
