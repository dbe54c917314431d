"""Checks before a profile: its settings, and that a step on a CPU does not freeze the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config, check_before_loading, check_micro_batch
from flap_fast.model.masking import check_micro_tokens, least_micro_tokens
from flap_fast.model.two_towers import takes_bf16
from flap_fast.ranks import Ranks, world_size
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.device import free_bytes
from flap_fast.tools.profile.lengths import LengthMix, has_lengths
from flap_fast.tools.profile.memory import divisors, footprint
from flap_fast.tools.profile.synthetic import caption_lengths
from flap_fast.tools.profile.work import rank_work
from flap_fast.training.engine import check_engine
from flap_fast.training.teacher import check_teacher

# Fraction of the free memory: counts leave out heaps, libraries and an optimizer's temporaries.
_SAFE = 0.7


@dataclass(frozen=True)
class Needed:
    """Bytes of a rank's step on a CPU."""

    least: int
    """With one clip at a time; the longest, where they differ."""
    most: int
    """As the config sets it."""
    least_units: float
    units: float
    """What is taken at a time: clips; tokens where clips differ."""


def check_settings(config: Config, *, synthetic: bool) -> None:
    """Raise `ConfigError` for settings that cannot be trained, or lack data that is needed."""
    if synthetic:
        world, batch = world_size(), config.train.global_batch
        require(batch % world == 0, "train.global_batch", f"be a multiple of {world} ranks", batch)
        check_micro_batch(config, world)
    else:
        try:
            check_before_loading(config, world_size())
        except ConfigError as error:
            raise ConfigError(f"{error}. Without data: --synthetic") from None
    check_engine(config, world_size())
    check_micro_tokens(config)
    check_teacher(config)


def check_memory(config: Config, needed: Needed, ranks: Ranks) -> None:
    """Check that a rank's step fits in a CPU's memory.

    Raises:
        ConfigError: the step takes more than is safe; the message says what would fit.
    """
    processes, free = ranks.local_world, free_bytes(ranks.device)
    variable = has_lengths(config)
    each = (needed.most - needed.least) / max(1, needed.units - needed.least_units)
    more = (_SAFE * free / processes - needed.least) / max(1, each)
    fitting = max(1, int(needed.least_units + max(0, more)))
    if variable:
        setting = "train.micro_tokens"
    elif config.train.micro_batch:
        setting = "train.micro_batch"
        clips = config.train.global_batch // ranks.world
        fitting = max(n for n in divisors(clips) if n <= fitting)
    else:
        setting = "train.global_batch"
        fitting *= ranks.world
    what = "tokens" if variable else "clips"
    require(
        needed.most * processes <= _SAFE * free,
        setting,
        f"fit in {_SAFE:.0%} of the {free / 2**30:.1f} GiB that are free: {needed.units:.0f} "
        f"{what} at a time take {needed.most / 2**30:.1f} GiB a rank as `flap plan` counts",
        getattr(config.train, setting.removeprefix("train.")),
        f"try {setting}={fitting}"
        if needed.least * processes <= _SAFE * free
        else "not even one clip does: take a smaller encoder, or a machine with more memory",
    )


def count_here(
    config: Config, world: int, mix: LengthMix | None
) -> tuple[StepCounts, Needed | None]:
    """Counts of the config's step on this machine's device, and on a CPU the bytes it takes."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    half = takes_bf16(config.train.precision, torch.device("cuda" if on_gpu else "cpu"))
    counts = StepCounts(config, half=half, on_gpu=on_gpu, mix=mix)
    captions = config.train.global_batch // world * len(config.loss.sentences)
    counts.flop(caption_lengths(captions, config.text.max_tokens), world)
    return counts, None if on_gpu else cpu_bytes(config, counts, world)


def cpu_bytes(config: Config, counts: StepCounts, world: int) -> Needed:
    """Bytes of a rank's step with one clip at a time, and with as many as the config sets."""
    work = rank_work(config, world, counts.mix)
    lengths = work.lengths
    if lengths is None:
        least, most = 1.0, work.at_once
        clips = work.clips if config.train.micro_batch else 1
        sizes = least, most
    else:
        mean = lengths.tokens / (work.clips * world)
        least, most = least_micro_tokens(config) / mean, work.at_once
        clips, sizes = work.clips, (least_micro_tokens(config), lengths.micro_tokens)
    few = _bytes(config, counts, world, clips, least)
    return Needed(few, _bytes(config, counts, world, work.clips, most), *sizes)


def _bytes(config: Config, counts: StepCounts, world: int, clips: int, at_once: float) -> int:
    """Bytes of a rank's step of `clips` clips, `at_once` of them in a micro-batch."""
    tokens = caption_lengths(1, config.text.max_tokens)[0]
    found = footprint(
        config,
        counts,
        clips,
        -(-tokens // 8) * 8,
        world,
        engine=check_engine(config, world),
        on_gpu=False,
        at_once=min(at_once, clips),
    )
    return found.peak + sum(found.on_cpu.values())
