"""The project's targets for speed and memory, and how they are read from results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from bench.peers import ours

Result = dict[str, Any]
Value = Callable[[Result], float | None]
Relation = Literal["<=", ">="]


@dataclass(frozen=True)
class Target:
    """One target. `value` reads a result of `kind`; None if the result does not hold it."""

    what: str
    kind: Literal["sweep", "infonce_cpu", "losses_cpu", "loading"]
    relation: Relation
    bound: float
    unit: str
    value: Value
    device: str = ""
    """Part of the device's name: the target is for that device."""

    def met(self, value: float) -> bool:
        """Whether a value meets the target."""
        return value <= self.bound if self.relation == "<=" else value >= self.bound


def _row(result: Result, op: str, B: int, provider: str, **wanted: Any) -> dict[str, Any] | None:
    """A measured row of a sweep, or None."""
    wanted = {"launches": True, "call": "forward + backward", **wanted}
    for row in result["rows"]:
        same = (row["op"], row["B"], row["provider"]) == (op, B, provider)
        if same and row["status"] == "measured" and all(row[k] == v for k, v in wanted.items()):
            return row
    return None


def _time(op: str, B: int, factor: float = 1.0, **wanted: Any) -> Value:
    def value(result: Result) -> float | None:
        row = _row(result, op, B, ours("cuda"), **wanted)
        return row["median_ms"] * factor if row else None

    return value


def _against(B: int, *peers: str, launches: bool = True) -> Value:
    """Time of the fastest of these peers divided by ours; without launches, of CUDA graphs."""

    def value(result: Result) -> float | None:
        mine = _row(result, "infonce", B, ours("cuda"), launches=launches)
        theirs = [_row(result, "infonce", B, peer, launches=launches) for peer in peers]
        times = [row["median_ms"] for row in theirs if row]
        return min(times) / mine["median_ms"] if mine and times else None

    return value


def _memory(B: int) -> Value:
    def value(result: Result) -> float | None:
        row = _row(result, "infonce", B, ours("cuda"))
        if row is None or row["peak_mib"] is None:
            return None
        return (row["peak_mib"] - row["gradients_mib"]) * 2**20 / 1e9

    return value


def _rate(B: int) -> Value:
    def value(result: Result) -> float | None:
        row = _row(result, "infonce", B, ours("cuda"))
        return row["flops"] / row["median_ms"] / 1e9 if row else None

    return value


def _named(name: str) -> Value:
    """A figure of the result, by name."""
    return lambda result: result.get("figures", {}).get(name)


def _sweep(what: str, relation: Relation, bound: float, unit: str, value: Value) -> Target:
    return Target(what, "sweep", relation, bound, unit, value, device="H100")


def _cpu(what: str, bound: float, unit: str, name: str) -> Target:
    return Target(what, "infonce_cpu", "<=", bound, unit, _named(name))


def _loss(what: str, bound: float, unit: str, name: str) -> Target:
    return Target(what, "losses_cpu", "<=", bound, unit, _named(name))


def _loading(what: str, bound: float, unit: str, name: str) -> Target:
    return Target(what, "loading", ">=", bound, unit, _named(name))


def _step(what: str, bound: float, unit: str, name: str) -> Target:
    return Target(what, "sweep", ">=", bound, unit, _named(name), device="H100")


_FASTER = "times as fast"
_PEER = "DALI, 10 s clips to waveforms, against soundfile + torchaudio"
_EAGER_AND_COMPILED = ("reference", "reference, compiled", "open_clip's form")
_EMBED = _time("patch_embed", 288, 1000, call="forward", launches=False)
_MSE = _time("masked_mse", 288, 1000, launches=False)

TARGETS = (
    _sweep(
        "InfoNCE, forward + backward, 65,536 x 512 bf16", "<=", 28, "ms", _time("infonce", 65_536)
    ),
    _sweep("... of its 8 B B D", ">=", 630, "TFLOP/s", _rate(65_536)),
    _sweep("... memory above inputs and gradients", "<=", 0.6, "GB", _memory(65_536)),
    _sweep("... against memeff", ">=", 2, _FASTER, _against(65_536, "memeff")),
    _sweep("... against inf_cl", ">=", 3, _FASTER, _against(65_536, "inf_cl")),
    _sweep("InfoNCE, 262,144 x 512 bf16", "<=", 500, "ms", _time("infonce", 262_144)),
    _sweep("... memory above inputs and gradients", "<=", 2.5, "GB", _memory(262_144)),
    *(
        _sweep(
            f"InfoNCE{how}, {B:,} x 512 bf16, against the fastest of eager and compiled",
            ">=",
            1,
            _FASTER,
            _against(B, *_EAGER_AND_COMPILED, launches=not how),
        )
        for B in (2304, 4608)
        for how in ("", " in CUDA graphs")
    ),
    _sweep("sigmoid loss, 65,536 x 768 bf16", "<=", 44, "ms", _time("sigmoid_loss", 65_536)),
    _sweep("masked patch embedding, 288 clips, forward, device alone", "<=", 110, "us", _EMBED),
    _sweep("masked MSE, 288 clips, forward + backward, device alone", "<=", 80, "us", _MSE),
    _cpu("InfoNCE on a CPU, 8,192 x 512 fp32: time over open_clip's", 0.75, "", "time_ratio"),
    _cpu("... extra peak memory over open_clip's", 1 / 6, "", "memory_ratio"),
    _cpu("... 32,768 x 512 fp32: memory above the inputs", 1, "GB", "large_gb"),
    _loss("several positives, 8,192 x 512: time over InfoNCE's", 1.1, "", "positive_ratio"),
    _loss("... sigmoid loss", 0.85, "", "sigmoid_ratio"),
    _loss("... four prefixes", 1.3, "", "prefixes_ratio"),
    _loss("... most memory of these above inputs and gradients", 50, "MB", "most_extra_mb"),
    _loading(f"{_PEER}, same 16 kHz shards, all cores each", 2, _FASTER, "same_shards"),
    _loading("... that on one core", 2, _FASTER, "same_shards_one_core"),
    _loading("... that from 48 kHz FLAC, all cores each", 8, _FASTER, "usual_path"),
    _loading("... that from 48 kHz on one core", 8, _FASTER, "usual_path_one_core"),
    _loading("... on 16 cores", 1500, "clips/s", "clips_per_s_16_cores"),
    _step("training step, ViT-B + RoBERTa-base, 2-D masking", 400, "TFLOP/s", "tflops"),
    _step("... without reconstruction", 1500, "clips/s", "clips_per_s"),
    _step("... largest global batch on one GPU, exact gradients", 4608, "clips", "global_batch"),
)
