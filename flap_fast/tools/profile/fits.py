"""Whether a step fits in a CPU's memory: asked first, or it would take the machine down."""

from __future__ import annotations

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.model.masking import kept_patches
from flap_fast.model.two_towers import TwoTowers, takes_bf16
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.device import free_bytes
from flap_fast.tools.profile.footprint import Sizes, divisors, footprint
from flap_fast.tools.profile.synthetic import caption_lengths
from flap_fast.train.engine import check_engine

# Of what is free: the formulas leave out heaps, libraries and an optimizer's temporaries.
_SAFE = 0.7


def check_that_it_fits(config: Config, model: TwoTowers, ranks: Ranks) -> None:
    """On a CPU, by the formulas; a GPU says so itself.

    Raises:
        ConfigError: the step takes more than is safe; with what would do.
    """
    if ranks.device.type == "cuda":
        return
    setting = "train.micro_batch" if config.train.micro_batch else "train.global_batch"
    clips = config.train.micro_batch or config.train.global_batch // ranks.world
    here, free = ranks.local_world, free_bytes(ranks.device)
    one, most = (_predicted(config, model, ranks, n) for n in (1, clips))
    each = max(1, (most - one) // max(1, clips - 1))
    fitting = max(1, int((_SAFE * free / here - one) // each))
    if config.train.micro_batch:
        fitting = max(n for n in divisors(config.train.global_batch // ranks.world) if n <= fitting)
    else:
        fitting *= ranks.world
    require(
        most * here <= _SAFE * free,
        setting,
        f"fit in {_SAFE:.0%} of the {free / 2**30:.1f} GiB that are free: {clips} clips at a time "
        f"take {most / 2**30:.1f} GiB a rank by the formulas of `flap plan`",
        getattr(config.train, setting.removeprefix("train.")),
        f"try {setting}={fitting}"
        if one * here <= _SAFE * free
        else "not even one clip does: take a smaller tower, or a machine with more memory",
    )


def _predicted(config: Config, model: TwoTowers, ranks: Ranks, at_once: int) -> int:
    """Of a rank's step with so many clips in a micro-batch, or in all without micro-batches."""
    micro, share = config.train.micro_batch, config.train.global_batch // ranks.world
    train = config.train.model_copy(update={"micro_batch": at_once if micro else None})
    tokens = caption_lengths(1, config.text.max_tokens)[0]
    found = footprint(
        config.model_copy(update={"train": train}),
        Sizes.of(model),
        [-(-tokens // 8) * 8] * (share if micro else at_once),
        ranks.world,
        engine=check_engine(config, ranks.world),
        kept=kept_patches(config.mask, config.audio.grid),
        half=takes_bf16(config.train.precision, ranks.device),
        on_gpu=False,
    )
    return found.peak + sum(found.on_cpu.values())
