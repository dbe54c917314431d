"""What a rank gets to do in a step: its clips and micro-batches, dealt as training deals them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flap_fast.config import Config
from flap_fast.data.dealing import Dealt, deal, dealt_equally
from flap_fast.model.masking import tokens_of_seconds
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.lengths import LengthMix, frames_of, sound_frames


@dataclass(frozen=True)
class Lengths:
    """Of a step whose clips have lengths of their own, while masking drops patches."""

    tokens: int
    """Of the audio encoder, of all ranks."""
    rank_tokens: int
    """Of the rank that has most."""
    micro_tokens: int
    """Of the largest micro-batch."""
    balance: float
    """Tokens of the mean rank over those of the one with most."""
    real_frames: float
    """The fraction of all frames that hold sound; the others fill last patches."""
    frames: tuple[int, ...]
    """Of the clips of the rank that has most tokens, ascending."""


@dataclass(frozen=True)
class Work:
    """A rank's work in a step."""

    clips: int
    micro_batches: int
    at_once: float
    """Clips of the largest micro-batch; of clips of different lengths, its tokens in mean clips."""
    lengths: Lengths | None = None
    """None where all clips have one length."""


def rank_work(config: Config, world: int, mix: LengthMix | None) -> Work:
    """The work of the rank that has most, of `world`; clips are spread over the mix."""
    train = config.train
    clips = train.global_batch // world
    if mix is None:
        micro_batches = train.micro_batches(world)
        return Work(clips, micro_batches, clips // micro_batches)
    seconds = mix.spread(train.global_batch)
    tokens = tokens_of_seconds(config, seconds).masked
    load = tokens[deal(tokens, world)].sum(1)
    dealt = dealt_equally(train, Ranks(int(load.argmax()), world), tokens)
    largest = max(int(tokens[rows].sum()) for rows in dealt.micro_batches)
    own = seconds[np.concatenate(dealt.micro_batches)]
    lengths = Lengths(
        tokens=dealt.tokens,
        rank_tokens=int(load.max()),
        micro_tokens=largest,
        balance=dealt.balance,
        real_frames=sound_frames(config, seconds) / sum(frames_of(config, seconds)),
        frames=frames_of(config, own),
    )
    return Work(clips, len(dealt.micro_batches), float(largest / tokens.mean()), lengths)


def dealt_clips(config: Config, ranks: Ranks, mix: LengthMix) -> tuple[np.ndarray, Dealt]:
    """(global_batch,) float64 seconds of a step's clips, and which of them are this rank's."""
    seconds = mix.spread(config.train.global_batch)
    tokens = tokens_of_seconds(config, seconds).masked
    return seconds, dealt_equally(config.train, ranks, tokens)


def work_summary(config: Config, world: int, mix: LengthMix | None) -> dict[str, Any] | None:
    """What is known of the clips' lengths and of the work that follows; None with one length."""
    work = rank_work(config, world, mix)
    if mix is None or work.lengths is None:
        return None
    found = asdict(work.lengths)
    del found["frames"]  # of every clip
    return {
        **mix.summary(config),
        **found,
        "tokens_per_clip": found["tokens"] / (work.clips * world),
    }


def two_passes(config: Config, micro_batches: int) -> bool:
    """Whether a step's micro-batches go through the towers twice."""
    return micro_batches > 1 and config.train.accumulation == "exact"


def loss_times(config: Config, world: int) -> int:
    """How many times a step computes the losses."""
    return config.train.micro_batches(world) if config.train.accumulation == "local" else 1
