"""What a run's metrics.jsonl says that is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from flap_fast.config import Config
from flap_fast.tools.doctor.records import Check, Examined, Found, Severity
from flap_fast.tools.doctor.run_files import RunFiles

# Rows from which on a curve says anything; the last part of it that is judged.
_ROWS, _LAST = 8, 4
# Of ln(batch); of chance; of joint.max_scale; of a step's time; of the clips drawn.
_LOSS, _CHANCE, _CLAMP, _WAITING, _BAD = 0.95, 2.0, 0.999, 0.5, 0.001
# How far a loss rises again, of chance, and the parts of a curve whose medians are compared.
_RISE, _PARTS = 0.25, 4


def _run(e: Examined) -> RunFiles:
    assert e.run is not None
    return e.run


def _last(run: RunFiles, name: str) -> np.ndarray:
    """The last quarter of a column; empty where there are few rows or none of it."""
    warm = run.config.sched.warmup_steps
    values = [row[name] for row in run.rows if name in row and row["step"] > warm]
    if len(values) < _ROWS:
        return np.empty(0)
    return np.array(values[-max(_LAST, len(values) // 4) :], float)


def _not_finite(e: Examined) -> Iterator[Found]:
    run = _run(e)
    for row in (*run.rows, *run.scores):
        bad = [n for n, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        if bad:
            yield Found("error", "metrics.jsonl", f"{', '.join(bad)} at step {row['step']}")
            return


def _at_chance(e: Examined) -> Iterator[Found]:
    run = _run(e)
    loss, chance = _last(run, "contrastive"), chance_loss(run.config, run.ranks)
    if len(loss) and loss.mean() > _LOSS * chance:
        got = f"contrastive = {loss.mean():.3f} at the end, {chance:.3f} is chance"
        yield Found("error", "metrics.jsonl", got)


def _rises(e: Examined) -> Iterator[Found]:
    run = _run(e)
    values = [row["contrastive"] for row in run.rows if "contrastive" in row]
    if len(values) < _PARTS * _ROWS:
        return
    medians = [float(np.median(part)) for part in np.array_split(values, _PARTS)]
    chance = chance_loss(run.config, run.ranks)
    if medians[-1] > min(medians) + _RISE * chance and medians[-1] <= _LOSS * chance:
        got = f"contrastive = {medians[-1]:.3f} at the end, {min(medians):.3f} before"
        yield Found("warning", "metrics.jsonl", got)


def chance_loss(config: Config, ranks: int) -> float:
    """InfoNCE of embeddings that say nothing: the logarithm of the captions, or clips, compared."""
    loss, train = config.loss.contrastive, config.train
    clips = train.global_batch
    if train.accumulation == "local":
        clips = ranks * train.micro_clips(ranks)
    of_clip, of_caption = math.log(clips * (1 + loss.negatives)), math.log(clips)
    both = {"symmetric": (of_clip + of_caption) / 2, "a2t": of_clip, "t2a": of_caption}
    weights = loss.prefix_weights or [1.0] * max(1, len(loss.prefixes))
    return both[loss.direction] * sum(weights)


def _recall(e: Examined) -> Iterator[Found]:
    run = _run(e)
    recall, clips = _last(run, "in_batch_R@1"), run.config.train.global_batch // run.ranks
    if len(recall) and recall.mean() < _CHANCE / clips:
        got = f"in_batch_R@1 = {recall.mean():.4f} at the end, chance is {1 / clips:.4f}"
        yield Found("error", "metrics.jsonl", got)


def _scale(e: Examined) -> Iterator[Found]:
    run = _run(e)
    scale, most = _last(run, "scale"), run.config.joint.max_scale
    if len(scale) and scale.min() >= _CLAMP * most:
        yield Found("warning", "metrics.jsonl", f"scale = {scale[-1]:g}, its clamp")


def _no_steps(e: Examined) -> Iterator[Found]:
    run = _run(e)
    for name in ("lr", "grad_norm"):
        values = [row[name] for row in run.rows if name in row]
        if len(values) >= 2 and not any(values):
            yield Found("error", "metrics.jsonl", f"{name} = 0 in all {len(values)} rows")


def _waiting(e: Examined) -> Iterator[Found]:
    waiting = _last(_run(e), "data_wait")
    if len(waiting) and np.median(waiting) > _WAITING:
        got = f"{np.median(waiting):.0%} of a step's time"
        yield Found("warning", "metrics.jsonl", got)


def _bad_clips(e: Examined) -> Iterator[Found]:
    run = _run(e)
    if run.bad_clips:
        drawn = max(1, (run.rows[-1]["step"] if run.rows else 0) * run.config.train.global_batch)
        share = run.bad_clips / drawn
        got = f"{run.bad_clips} of {drawn} drawn"
        level: Severity = "warning" if share >= _BAD else "note"
        yield Found(level, "bad_clips.jsonl", got, run.bad_clips, drawn)


NOT_FINITE = Check(
    name="values not finite",
    needs="metrics",
    rule="have finite losses, gradients and scores",
    remedy="lower optim.lr, lengthen sched.warmup_steps or set optim.clip_norm=1, in a new run",
    find=_not_finite,
)
AT_CHANCE = Check(
    name="loss at chance",
    needs="metrics",
    rule="have a contrastive loss below chance, ln(batch), after the warm-up",
    remedy="see whether captions belong to their sounds, whether both towers get gradients, and "
    "try optim.lr / 10",
    find=_at_chance,
)
RISES = Check(
    name="a loss that rises again",
    needs="metrics",
    rule="have a contrastive loss that does not rise again by a quarter of chance",
    remedy="lower optim.lr or set optim.clip_norm=1, in a new run: it diverged",
    find=_rises,
)
RECALL = Check(
    name="recall at chance",
    needs="metrics",
    rule="find more clips of the batch than chance after the warm-up",
    remedy="see whether captions belong to their sounds, and try optim.lr / 10",
    find=_recall,
)
CLAMPED = Check(
    name="scale at its clamp",
    needs="metrics",
    rule="have a scale below joint.max_scale",
    remedy="look for clips learnt by heart (few clips, many epochs) or duplicates; or raise "
    "joint.max_scale",
    find=_scale,
)
NO_STEPS = Check(
    name="no steps",
    needs="metrics",
    rule="have a learning rate and gradients above 0",
    remedy="set optim.lr and sched.warmup_steps, and see that a tower is not frozen",
    find=_no_steps,
)
WAITING = Check(
    name="waiting for data",
    needs="metrics",
    rule="wait for data less than half of a step's time",
    remedy="raise frontend.threads, prepare to the front end's rate, or cache log-mels: "
    "flap prepare --cache mel",
    find=_waiting,
)
BAD_CLIPS = Check(
    name="bad clips drawn",
    needs="metrics",
    rule="draw clips that can be decoded",
    remedy="write the shards anew without them: flap prepare --source shards",
    find=_bad_clips,
)
