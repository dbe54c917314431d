"""Checks before a step is planned or profiled; on a CPU, running out of memory would freeze it."""

from __future__ import annotations

import os

import torch

from flap_fast.checks import require
from flap_fast.config import Config, check_micro_batch
from flap_fast.model.two_towers import takes_bf16
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.device import free_bytes
from flap_fast.tools.profile.memory import divisors, footprint
from flap_fast.tools.profile.synthetic import caption_lengths
from flap_fast.train.engine import check_engine

# Fraction of the free memory: counts leave out heaps, libraries and an optimizer's temporaries.
_SAFE = 0.7


def check_equal_micro_batches(config: Config, world: int) -> None:
    """Raise `ConfigError` for micro-batches that are not equal: counts are of the longest clips."""
    budget, rule = config.train.micro_tokens, "be left out of a plan or profile"
    remedy = "set train.micro_batch to the clips of audio.max_duration_s that it holds"
    require(budget is None, "train.micro_tokens", rule, budget, remedy)
    check_micro_batch(config, world)


def check_memory(config: Config, needed: tuple[int, int], ranks: Ranks) -> None:
    """Check that a rank's step fits in a CPU's memory.

    Args:
        needed: the result of `cpu_bytes`.

    Raises:
        ConfigError: the step takes more than is safe; the message says what would fit.
    """
    setting = "train.micro_batch" if config.train.micro_batch else "train.global_batch"
    clips = config.train.micro_batch or config.train.global_batch // ranks.world
    processes, free = ranks.local_world, free_bytes(ranks.device)
    one, most = needed
    each = max(1, (most - one) // max(1, clips - 1))
    fitting = max(1, int((_SAFE * free / processes - one) // each))
    if config.train.micro_batch:
        fitting = max(n for n in divisors(config.train.global_batch // ranks.world) if n <= fitting)
    else:
        fitting *= ranks.world
    require(
        most * processes <= _SAFE * free,
        setting,
        f"fit in {_SAFE:.0%} of the {free / 2**30:.1f} GiB that are free: {clips} clips at a time "
        f"take {most / 2**30:.1f} GiB a rank as `flap plan` counts",
        getattr(config.train, setting.removeprefix("train.")),
        f"try {setting}={fitting}"
        if one * processes <= _SAFE * free
        else "not even one clip does: take a smaller encoder, or a machine with more memory",
    )


def count_here(config: Config, world: int) -> tuple[StepCounts, tuple[int, int] | None]:
    """Counts of the config's step on this machine's device, and on a CPU the bytes it takes."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    half = takes_bf16(config.train.precision, torch.device("cuda" if on_gpu else "cpu"))
    counts = StepCounts(config, half=half, on_gpu=on_gpu)
    captions = config.train.global_batch // world * len(config.loss.sentences)
    counts.flop(caption_lengths(captions, config.text.max_tokens), world)
    return counts, None if on_gpu else cpu_bytes(config, counts, world)


def cpu_bytes(config: Config, counts: StepCounts, world: int) -> tuple[int, int]:
    """Bytes of a rank's step with one clip at a time, and with as many as the config sets."""
    clips = config.train.micro_batch or config.train.global_batch // world
    one, most = (_bytes(config, counts, world, n) for n in (1, clips))
    return one, most


def _bytes(config: Config, counts: StepCounts, world: int, at_once: int) -> int:
    """Bytes of a rank's step with `at_once` clips in a micro-batch, or in all without them."""
    micro, clips = config.train.micro_batch, config.train.global_batch // world
    train = config.train.model_copy(update={"micro_batch": at_once if micro else None})
    tokens = caption_lengths(1, config.text.max_tokens)[0]
    found = footprint(
        config.model_copy(update={"train": train}),
        counts,
        clips if micro else at_once,
        -(-tokens // 8) * 8,
        world,
        engine=check_engine(config, world),
        on_gpu=False,
    )
    return found.peak + sum(found.on_cpu.values())
