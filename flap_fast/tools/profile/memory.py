"""Memory of a rank: held between steps, and added by a step.

    states       weights, gradients, Adam's moments, by engine, ZeRO stage and offload (`states`)
    activations  what the forward leaves for the backward, counted on fake tensors (`counts`)
    loss         gathered embeddings, logits by tile, gradients, counted likewise
    held         of micro-batches: embeddings of all, and media that are not decoded again

With micro-batches, activations are those of one, and gradients are held all the time. A teacher's
weights are whole on each rank; its forward comes between the model's and the loss, and what it
takes is freed before the loss.

Left out: the front end, allocators' rounding and fragments, and what an operator allocates and
frees within itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flap_fast.config import Config
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.parts import OTHER, TEACHER
from flap_fast.tools.profile.states import Parameters, state_bytes

_FLOAT = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank, by name, and the most at one time."""

    states: dict[str, int]
    on_cpu: dict[str, int]
    """What train.offload keeps in the CPU's memory; not in the peak."""
    activations: dict[str, int]
    loss: dict[str, int]
    """Of the losses, and of a teacher's forward before them."""
    held: dict[str, int]
    peak: int


def footprint(
    config: Config,
    counts: StepCounts,
    clips: int,
    tokens: int,
    world: int,
    *,
    engine: str,
    on_gpu: bool = True,
    at_once: float | None = None,
) -> Footprint:
    """Memory of a rank with `clips` clips, in micro-batches of train.micro_batch clips.

    Args:
        counts: of this config, with any train.micro_batch.
        tokens: of each sentence, including padding.
        engine: `plain` or `deepspeed`.
        on_gpu: decides what train.replay=auto keeps, and whether gradients are reduced early.
        at_once: clips of the largest micro-batch, see `Work`; of train.micro_batch without.
    """
    at_once = at_once or min(clips, config.train.micro_batch or clips)
    several = clips > at_once
    both = several and config.train.accumulation == "exact"
    states = state_bytes(
        engine,
        config.train.zero_stage,
        parameters(counts),
        world,
        overlap=on_gpu,
        offload=config.train.offload,
        micro_batches=math.ceil(clips / at_once),
        average=config.train.ema_decay > 0,
    )
    counted = config.train.global_batch // world
    loss = counts.loss_bytes(
        clips if both else min(clips, math.ceil(at_once)), world, counted=counted
    )
    teacher, after, embedded = counts.teacher, {"loss": loss}, 0
    if teacher:
        states = replace(states, on_device=states.on_device | {TEACHER: teacher.weight_bytes})
        after["teacher's forward"] = teacher.peak_bytes(at_once, tokens)
        embedded = 0 if both else teacher.embedding_bytes(math.ceil(at_once))
    width = teacher.width if teacher else 0
    held = {}
    if several:
        held = held_bytes(config, clips, counts.media_bytes, on_gpu=on_gpu, teacher_width=width)
    towers = counts.towers(at_once, tokens)
    allocated = (towers.kept if both else towers.kept + towers.batch) + embedded
    if both and "media" not in held:  # those of the second pass are kept through its backward
        held["media"] = int(at_once * counts.media_bytes)
    full, without = states.with_gradients, states.without_gradients
    if states.gradients == "come":
        scale = states.on_device["gradients"] / max(1, _FLOAT * parameters(counts).trained)
        steps = without + allocated + scale * towers.gradients
        before = without
    else:  # a gradient is new before it is added up
        new = towers.gradients.copy()
        new[1:] -= towers.gradients[:-1]
        steps = full + allocated + new
        before = full
    forward = max(0, towers.forward - 1)
    losses = max(after.values()) + (without if both else before + allocated[forward])
    peak = int(max(steps.max(), losses)) + sum(held.values())
    parts = ("media" if part == OTHER else part for part in towers.parts)
    activations = {part: n for part, n in zip(parts, towers.parts.values(), strict=True) if n > 0}
    return Footprint(states.on_device, states.on_cpu, activations, after, held, peak)


def parameters(counts: StepCounts) -> Parameters:
    """Parameter counts of a counted model."""
    sizes = [n for group in counts.groups for n in group]
    return Parameters(sum(sizes), counts.frozen, max(sizes), counts.state_numbers / sum(sizes))


def held_bytes(
    config: Config, clips: int, media_bytes: int, *, on_gpu: bool, teacher_width: int = 0
) -> dict[str, int]:
    """Bytes that a step holds between its first and its second pass, by name.

    Args:
        teacher_width: of the teacher's embeddings; 0 without one.
    """
    # Each embedding, all of them joined, and their gradients, which a teacher's two have none of.
    numbers = 3 * (1 + len(config.loss.sentences)) * config.joint.width + 2 * 2 * teacher_width
    found = {"embeddings": _FLOAT * clips * numbers}
    keeps = config.train.replay == "keep" or (config.train.replay == "auto" and on_gpu)
    if keeps and config.train.accumulation == "exact":
        found["media"] = clips * media_bytes
    return found


def divisors(clips: int) -> list[int]:
    """The divisors of `clips`, which are its possible micro-batches, smallest first."""
    return [n for n in range(1, clips + 1) if clips % n == 0]
