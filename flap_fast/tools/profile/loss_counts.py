"""Counts of the losses: run once on fake embeddings, as many as a step has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from flap_fast.config import Config
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import Outputs
from flap_fast.tools.profile.fake import FakeMode, duplicates_of_a_gpu, fake_ranks
from flap_fast.tools.profile.trace import Flop, Trace, summed
from flap_fast.tools.profile.traffic import CountTraffic, Traffic


@dataclass(frozen=True)
class LossCounts:
    """The losses of one rank, over its clips or a micro-batch of them."""

    flop: Flop
    forward: Traffic
    backward: Traffic
    peak_bytes: int
    """Peak of all tensors but the embeddings."""
    compared: tuple[str, ...]
    """The outputs of the model that get a gradient."""


def count_losses(
    config: Config, mode: FakeMode, clips: int, world: int, *, teacher_width: int = 0
) -> LossCounts:
    """Counts of the losses over `clips` clips of each of `world` ranks.

    Args:
        teacher_width: of the embeddings of loss.distill's teacher, which get no gradient; 0 without
            one.
    """
    loss, width = config.loss, config.joint.width
    names = ("media", *loss.sentences)
    with fake_ranks(world), duplicates_of_a_gpu(), mode:
        outputs = {name: torch.empty(clips, width, requires_grad=True) for name in names}
        scalars = ("scale", "recon", *["bias"] * loss.sigmoid.active)
        outputs |= {n: torch.empty((), requires_grad=True) for n in scalars}
        if loss.pair_ids:
            outputs["pair_ids"] = torch.empty(clips, 2 + loss.negatives, dtype=torch.int64)
        if teacher_width:
            taught = ("teacher_media", "teacher_text")
            outputs |= {name: torch.empty(clips, teacher_width) for name in taught}
            outputs["teacher_scale"] = torch.empty(())
        with Trace(outputs.values()) as trace:
            with CountTraffic() as forward:
                total = total_loss(cast(Outputs, outputs), config)["total"]
            trace.in_backward = True
            with CountTraffic() as backward:
                total.backward()
    flop = summed(trace.flop().values())
    compared = tuple(name for name, x in outputs.items() if x.grad is not None)
    peak = int(trace.allocated()[0].max())
    return LossCounts(flop, forward.traffic, backward.traffic, peak, compared)
