"""`flap plan`: predicts memory, communication and time of a step on other machines.

    step = FLOP / (peak x MFU) + optimizer + exposed communication

FLOP, memory and what the losses send are counted on fake tensors (`counts`, `memory`); what the
engine sends and holds follows from the formulas of `traffic` and `states`. What a device and a link
can do is assumed, printed, and settable. Latencies, loading and evaluation are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from flap_fast.checks import require
from flap_fast.config import Config, check_micro_batch
from flap_fast.model.masking import check_micro_tokens
from flap_fast.model.two_towers import takes_bf16
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.largest import StepMemory
from flap_fast.tools.profile.lengths import LengthMix, length_mix
from flap_fast.tools.profile.memory import Footprint, parameters
from flap_fast.tools.profile.parts import TEACHER
from flap_fast.tools.profile.states import Parameters
from flap_fast.tools.profile.synthetic import LONGEST
from flap_fast.tools.profile.trace import Flop
from flap_fast.tools.profile.traffic import engine_traffic, sent_bytes
from flap_fast.tools.profile.work import Work, loss_times, rank_work, two_passes, work_summary
from flap_fast.training.engine import BUCKET_NUMBERS, check_divides
from flap_fast.training.teacher import check_teacher
from flap_fast.training.torch_optimizers import check_optimizer
from flap_kernels.infonce.rank_sizes import scheme_in_force

# An optimizer reads weight, gradient and what it keeps, and writes all but the gradient: float32.
_UPDATE_BYTES, _KEPT_BYTES = 3 * 4, 2 * 4


@dataclass(frozen=True)
class Machine:
    """Assumed properties of the machine; none of them is measured."""

    gpus: int = 8
    nodes: int = 1
    tflops: float = 790.0
    """Peak of a rank in the run's precision; by default an H100's dense bf16 products."""
    mfu: float = 0.5
    """Model FLOP utilisation: the fraction of the peak over a whole step."""
    link_bytes_per_s: float = 50e9
    """Bandwidth of a rank between nodes; by default a 400 Gb/s adapter for each GPU."""
    local_bytes_per_s: float = 400e9
    """Bandwidth of a rank inside a node."""
    memory_gib: float = 80.0
    """Of a GPU."""
    memory_bytes_per_s: float = 3e12
    """Bandwidth of a GPU's memory, for the optimizer."""
    host_bytes_per_s: float = 25e9
    """Bandwidth of a CPU's memory per rank, if train.offload moves the optimizer there."""
    host_link_bytes_per_s: float = 50e9
    """Bandwidth between a GPU and its CPU's memory, in one direction."""
    caption_tokens: int = LONGEST
    """Tokens computed for a caption, padding included."""

    def check(self) -> None:
        """Raise `ConfigError` for an invalid machine."""
        require(self.gpus >= 1, "--gpus", "be at least 1", self.gpus)
        require(self.nodes >= 1, "--nodes", "be at least 1", self.nodes)
        rule = f"be a multiple of the {self.nodes} nodes"
        each = self.nodes * max(1, self.gpus // self.nodes)
        require(self.gpus % self.nodes == 0, "--gpus", rule, self.gpus, f"for example {each}")
        require(0 < self.mfu <= 1, "--mfu", "be in (0, 1]", self.mfu)
        require(self.tflops > 0, "--tflops", "be above 0", self.tflops)
        require(self.memory_gib > 0, "--memory-gib", "be above 0", self.memory_gib)
        require(self.caption_tokens > 0, "--caption-tokens", "be above 0", self.caption_tokens)

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth of a ring over all ranks: that of its slowest link."""
        return self.local_bytes_per_s if self.nodes == 1 else self.link_bytes_per_s


@dataclass(frozen=True)
class Exchange:
    """One kind of communication in a step."""

    sent_bytes: float
    seconds: float
    exposed_s: float
    """Time that does not overlap with computation."""


@dataclass(frozen=True)
class Plan:
    """A step on a machine."""

    machine: Machine
    engine: str
    stage: int
    scheme: str
    precision: str
    clips: int
    """Of a rank."""
    parameters: Parameters
    memory: Footprint
    largest_clips: int
    """The largest number of clips of a rank that fits, with train.micro_batch as it is set."""
    largest_micro_batch: int
    """The largest micro-batch of a rank's clips that fits; 0 if not even one clip fits. Of clips
    of different lengths, its tokens."""
    micro_batches: int
    """Of a rank's step."""
    lengths: dict[str, Any] | None
    """What is assumed of clips of different lengths, and what follows: `work_summary`."""
    flop: dict[str, Flop]
    compute_s: float
    optimizer_s: float
    exchanges: dict[str, Exchange]

    @property
    def step_s(self) -> float:
        """Seconds of a whole step."""
        exposed = sum(e.exposed_s for e in self.exchanges.values())
        return self.compute_s + self.optimizer_s + exposed

    @property
    def fits(self) -> bool:
        """Whether the peak stays below a GPU's memory."""
        return self.memory.peak <= self.machine.memory_gib * 2**30

    @property
    def clips_per_s(self) -> float:
        """Clips per second over all ranks."""
        return self.clips * self.machine.gpus / self.step_s

    def remedy(self) -> str:
        """One sentence with the setting that makes it fit."""
        some = self.largest_micro_batch
        most = self.largest_clips * self.machine.gpus
        first = f"set train.global_batch={most}, " if most else ""
        if some:  # the same gradients, for a forward more
            name = "micro_tokens" if self.lengths else "micro_batch"
            first = f"set train.{name}={some}, "
        return (
            f"error: a rank's step must fit in {self.machine.memory_gib:g} GiB, got "
            f"{self.memory.peak / 2**30:.1f} by this estimate; {first}"
            "train.checkpoint_activations=true, a higher train.zero_stage or more --gpus"
        )


def plan(config: Config, machine: Machine, mix: LengthMix | None = None) -> Plan:
    """Predict a step.

    Args:
        mix: with audio.length = variable, the clips' lengths; of data.train, or of the default mix,
            without.

    Raises:
        ConfigError: the batch or the ranks cannot be divided evenly, the engine cannot do it, or
            the teacher cannot take the batches.
    """
    machine.check()
    batch, world = config.train.global_batch, machine.gpus
    rule = f"be a multiple of the {world} ranks"
    nearest = max(world, round(batch / world) * world)
    remedy = f"for example train.global_batch={nearest}"
    require(batch % world == 0, "train.global_batch", rule, batch, remedy)
    check_micro_batch(config, world)
    check_micro_tokens(config)
    engine = config.train.engine
    if engine == "auto":
        engine = "plain" if world == 1 else "deepspeed"
    require(engine == "deepspeed" or world == 1, "train.engine", "be deepspeed over ranks", engine)
    offload = config.train.offload
    rule = "be 'none' in plain PyTorch"
    remedy = "set train.engine=deepspeed"
    require(engine == "deepspeed" or offload == "none", "train.offload", rule, offload, remedy)
    check_divides(config, engine)
    check_optimizer(config.optim)
    check_teacher(config)
    return _plan(config, machine, engine, mix or length_mix(config))


def _plan(config: Config, machine: Machine, engine: str, mix: LengthMix | None) -> Plan:
    world, work = machine.gpus, rank_work(config, machine.gpus, mix)
    clips = config.train.global_batch // world
    half = takes_bf16(config.train.precision, torch.device("cuda"))
    tokens = min(machine.caption_tokens, config.text.max_tokens)
    counts = StepCounts(config, half=half, mix=mix)
    flop = counts.flop([tokens] * clips * len(config.loss.sentences), world)
    rate = machine.tflops * 1e12 * machine.mfu
    stage = config.train.zero_stage if engine == "deepspeed" else 0

    memory = StepMemory(config, counts, work, tokens, world, engine)
    limit = machine.memory_gib * 2**30
    return Plan(
        machine=machine,
        engine=engine,
        stage=stage,
        scheme=_scheme(config, clips, world),
        precision="bf16" if half else "fp32",
        clips=clips,
        parameters=parameters(counts),
        memory=memory.own(),
        largest_clips=memory.largest_clips(limit),
        largest_micro_batch=memory.largest_micro_batch(limit),
        micro_batches=work.micro_batches,
        lengths=work_summary(config, world, mix),
        flop=flop,
        compute_s=sum(f.total for f in flop.values()) / rate,
        optimizer_s=_optimizer_s(config, machine, parameters(counts), stage)
        + counts.optimizer_flop / rate,
        exchanges=_exchanges(config, machine, counts, work, stage, flop, rate),
    )


def _scheme(config: Config, clips: int, world: int) -> str:
    """How ranks divide the logits of pairs: `alone`, `replicated` or `sharded`."""
    if world == 1:
        return "alone"
    of_pairs = config.loss.contrastive if config.loss.contrastive.active else config.loss.sigmoid
    return scheme_in_force(of_pairs.scheme, clips)


def _optimizer_s(config: Config, machine: Machine, parameters: Parameters, stage: int) -> float:
    """Seconds of updating a rank's slice; with offload, with transfers to the CPU and back."""
    numbers = parameters.trained / (machine.gpus if stage else 1)
    update_bytes = (_UPDATE_BYTES + _KEPT_BYTES * parameters.kept) * numbers
    if config.train.offload == "none":
        return update_bytes / machine.memory_bytes_per_s
    moved = 4 * numbers / machine.host_link_bytes_per_s
    return update_bytes / machine.host_bytes_per_s + 2 * moved


def _exchanges(
    config: Config,
    machine: Machine,
    counts: StepCounts,
    work: Work,
    stage: int,
    flop: dict[str, Flop],
    rate: float,
) -> dict[str, Exchange]:
    world, micro_batches = machine.gpus, work.micro_batches
    engine = engine_traffic(
        stage,
        counts.groups,
        world,
        micro_batches=micro_batches,
        passes=2 if two_passes(config, micro_batches) else 1,
        offload=config.train.offload != "none",
    )
    times = loss_times(config, world)
    loss = counts.loss(work.clips // times, world)
    phases = {
        "forward": Counter({kind: times * n for kind, n in loss.forward.items()}),
        "backward": Counter({kind: times * n for kind, n in loss.backward.items()}),
        "gradients": engine["backward"],
        "weights": engine.get("forward", Counter()) + engine["step"],
    }
    sent = {name: sent_bytes(traffic, world) for name, traffic in phases.items()}
    seconds = {name: n / machine.bytes_per_s for name, n in sent.items()}
    exposed = dict(seconds)
    if stage:
        # Buckets go out as the backward goes on; nothing hides the last one of a reduction.
        # ZeRO 1 reduces only in the last micro-batch's backward, 2 and 3 in each.
        buckets = -(-parameters(counts).trained // BUCKET_NUMBERS)
        hidden = sum(f.backward + f.recomputed for f in flop.values()) / rate
        hidden /= micro_batches if stage == 1 else 1
        reduced = seconds["gradients"]
        exposed["gradients"] = max(reduced / buckets, reduced - hidden)
    if stage == 3 and not two_passes(
        config, micro_batches
    ):  # gathered ahead of the forward that uses them
        ahead = sum(f.forward for part, f in flop.items() if part != TEACHER) / rate
        exposed["weights"] = max(0.0, seconds["weights"] - ahead)
    names = {
        "forward": "embeddings, forward",
        "backward": "embeddings, backward",
        "gradients": "gradients, backward",
        "weights": "weights, after the step" if stage < 3 else "weights, before their use",
    }
    return {
        label: Exchange(sent[name], seconds[name], exposed[name]) for name, label in names.items()
    }


def default_gpus(config: Config) -> int:
    """Default number of ranks of a plan: 8, or 1 with plain PyTorch."""
    return 1 if config.train.engine == "plain" else Machine.gpus


_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "": 1.0}


def parse_rate(name: str, value: str) -> float:
    """Bytes per second from `50GB/s` or, in bits, `400Gb/s`.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([kKMGT]?)(B|b|bit)/s\s*", value)
    number = float(match[1]) if match and re.fullmatch(r"\d+(\.\d+)?", match[1]) else 0.0
    rule = "be a rate above 0, as in 50GB/s or, in bits, 400Gb/s"
    require(match is not None and number > 0, name, rule, value)
    assert match is not None
    return number * _UNITS[match[2].lower()] / (1 if match[3] == "B" else 8)


def as_json(planned: Plan) -> dict[str, Any]:
    """The plan as plain numbers."""
    found = asdict(replace(planned, flop={}))
    found["flop"] = {name: asdict(f) | {"total": f.total} for name, f in planned.flop.items()}
    more = ("step_s", "clips_per_s", "fits")
    return found | {name: getattr(planned, name) for name in more}
