"""Measures tasks in sequence, in a process that bench/gpu.py starts, and kills if it hangs.

    python -m bench.sweep ORDER RESULTS

ORDER is JSON: the device, the tasks, the providers to skip and why, and the time for one task.
RESULTS gets lines of JSON: `begin` before each call that can crash or hang, `rows` when a task is
done. A peer's kernel that reads out of bounds crashes only this process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Call, Timing, graphed, interleaved, peak_bytes, reason
from bench.peers import Provider, ours
from bench.tasks import Problem, Task, exact, forward, gradients, problem, providers

Begin = Callable[[str], None]

# Calls shorter than this may be bound by launches, so the device time is measured as well.
_LAUNCHES_MS = 3.0

FORWARD, BOTH = "forward", "forward + backward"


@dataclass
class Row:
    """Measurements of one provider at one task, or the reason why there are none."""

    op: str
    B: int | None
    provider: str
    call: str
    """`forward + backward` or `forward`."""
    status: str
    """`measured`, `missing`, `failed`, `too large`, `left out` or `no time`."""
    reason: str = ""
    version: str = ""
    note: str = ""
    launches: bool = True
    """False: the replay of a CUDA graph, device time only."""
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int = 0
    peak_mib: float | None = None
    """Above the arguments; includes the gradients, which `gradients_mib` gives."""
    gradients_mib: float | None = None
    error: float | None = None
    """The largest relative error of the result and of all gradients, against float64."""
    flops: float = 0.0
    bytes_moved: float = 0.0
    """Least FLOP of our op, forward and backward, including what it recomputes instead of storing.
    A provider that stores the logits does less, and may exceed the limit."""

    def timed(self, timing: Timing, **changes: Any) -> Row:
        """This row with measured times."""
        values = {**asdict(self), **asdict(timing), "status": "measured", **changes}
        return Row(**values)


def measure(
    task: Task,
    device: str,
    *,
    budget_s: float,
    barred: dict[str, str],
    begin: Begin = lambda stage: None,
) -> list[Row]:
    """Rows of all providers at a task; `barred` has `STATUS: REASON` of the providers to skip."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # each size is recompiled, and PyTorch limits recompilations
    begin("arguments")
    asked = problem(task, device)
    # draw_patch_mask has no backward.
    what = BOTH if asked.leaves else FORWARD
    truth = {} if "truth" in barred else _truth(task, asked, begin)
    rows: dict[str, Row] = {}
    runs: dict[str, _Run] = {}
    for name, make in providers(task.op, device).items():
        rows[name] = Row(task.op, task.B, name, what, "failed", flops=asked.flops)
        rows[name].bytes_moved = asked.bytes_moved
        if name in barred:
            rows[name].status, rows[name].reason = barred[name].split(": ", 1)
            continue
        begin(name)
        try:
            provider = make()
            rows[name].version, rows[name].note = provider.version, provider.note
            too_large = _too_large(task, provider, device)
            if too_large:
                rows[name].status, rows[name].reason = "too large", too_large
                continue
            run = _Run(task, asked, provider)
            _first(run, rows[name], truth, device)
            once = interleaved({name: run.both}, device, budget_s=0, least_rounds=1)[name]
        except ModuleNotFoundError as error:
            rows[name].status, rows[name].reason = "missing", str(error)
        except torch.OutOfMemoryError as error:
            rows[name].status, rows[name].reason = "too large", reason(error)
            _still_alive(device)
        except Exception as error:  # any error of a peer: reported in its row
            rows[name].reason = reason(error)
            _still_alive(device)
        else:
            rows[name] = rows[name].timed(once)
            if once.median_ms < 1000 * budget_s / 4:
                runs[name] = run
    return _timed(task, rows, runs, device, budget_s, barred, begin)


def _timed(
    task: Task,
    rows: dict[str, Row],
    runs: dict[str, _Run],
    device: str,
    budget_s: float,
    barred: dict[str, str],
    begin: Begin,
) -> list[Row]:
    """The rows with times over many rounds, then rows of the forward pass and of CUDA graphs."""
    begin("timing")
    both = {name: run.both for name, run in runs.items()}
    for name, timing in interleaved(both, device, budget_s=budget_s).items():
        rows[name] = rows[name].timed(timing)
    more: list[Row] = []
    plain = {"call": FORWARD, "peak_mib": None, "gradients_mib": None, "flops": 0, "bytes_moved": 0}
    backs = {
        name: run for name, run in runs.items() if run.leaves and not task.op.startswith("infonce")
    }
    forwards: dict[str, Call] = {name: run.forward for name, run in backs.items()}
    for name, timing in interleaved(forwards, device, budget_s=budget_s / 4).items():
        more.append(rows[name].timed(timing, **plain))
    if device == "cuda":
        for name, run in runs.items():
            long = (rows[name].median_ms or 0) > _LAUNCHES_MS
            # Peers are packages with a version: some synchronise, which breaks a capture.
            if long or rows[name].version or name + "/graph" in barred:
                continue
            begin(name + "/graph")
            calls: dict[str, tuple[Call, dict[str, Any]]] = {rows[name].call: (run.both, {})}
            if name in backs:
                calls[FORWARD] = run.forward, plain
            for call, changes in calls.values():
                try:
                    timing = interleaved({name: graphed(call)}, device, budget_s=0.5)[name]
                except RuntimeError as error:  # it synchronises: such a call has no graph
                    _still_alive(device)
                    why = {"status": "failed", "reason": f"no CUDA graph: {reason(error)}"}
                    more.append(Row(**{**asdict(rows[name]), **_UNTIMED, "call": call, **why}))
                    continue
                more.append(rows[name].timed(timing, launches=False, **changes))
    return [*rows.values(), *more]


_UNTIMED = {"launches": False, "median_ms": None, "low_ms": None, "high_ms": None, "rounds": 0}


class _Run:
    """A provider's calls at a task."""

    def __init__(self, task: Task, asked: Problem, provider: Provider):
        leaves = dict(asked.leaves)
        if not provider.learns_scale:
            leaves.pop("scale", None)
        self.leaves, self._op, self._given = leaves, task.op, asked.given
        self._function = provider.function
        self.provider = provider
        self.upstream: Tensor | None = None

    def forward(self) -> tuple[Tensor, ...]:
        return forward(self._function, self._op, self._given)

    def both(self) -> tuple[Tensor, ...]:
        if not self.leaves:
            return self.forward()
        return gradients(self.forward()[0], self.leaves, self.upstream)


def _first(run: _Run, row: Row, truth: dict[str, Tensor], device: str) -> None:
    """Run the first calls: compile, check the results, then measure memory."""
    outputs = run.forward()
    first = outputs[0]
    if run.leaves and first.ndim:
        run.upstream = _upstream(first)
    found = gradients(first, run.leaves, run.upstream)
    if truth and run.provider.same:
        named = {"output": first, **dict(zip(run.leaves, found, strict=True))}
        row.error = max(_relative(x.detach(), truth[name]) for name, x in named.items())
    row.gradients_mib = sum(x.nbytes for x in found) / 2**20
    del outputs, first, found
    peak = peak_bytes(run.both, device)
    row.peak_mib = None if peak is None else peak / 2**20


def _truth(task: Task, asked: Problem, begin: Begin) -> dict[str, Tensor]:
    """The result and the gradients in float64; none if that costs too much."""
    function = exact(task.op, task.B)
    if function is None:
        return {}
    begin("truth")
    double: dict[str, Any] = {}
    for name, x in asked.given.items():
        real = isinstance(x, Tensor) and x.is_floating_point()
        double[name] = x.detach().double().requires_grad_(x.requires_grad) if real else x
    leaves = {name: double[name] for name in asked.leaves}
    found = function(**double)
    first = found[0] if isinstance(found, tuple) else found
    upstream = _upstream(first) if first.ndim and leaves else None
    grads = gradients(first, leaves, upstream)
    return {"output": first.detach(), **dict(zip(leaves, grads, strict=True))}


def _upstream(like: Tensor) -> Tensor:
    """A gradient of an output, the same numbers for every dtype."""
    draw = torch.Generator(like.device).manual_seed(1)
    drawn = torch.randn(like.shape, generator=draw, device=like.device)
    return drawn.bfloat16().to(like.dtype)


def _relative(found: Tensor, truth: Tensor) -> float:
    """Largest error divided by the largest value."""
    largest = truth.abs().max().double()
    return ((found.double() - truth).abs().max() / largest.clamp(min=1e-300)).item()


def _too_large(task: Task, provider: Provider, device: str) -> str:
    """Why a provider with B x B logits is skipped; empty if it is not."""
    need = provider.logit_bytes * (task.B or 0) ** 2
    # On a CPU, the system kills a process that runs out of memory: keep a large margin.
    room = 0.95 * torch.cuda.mem_get_info()[1] if device == "cuda" else 0.5 * _available_bytes()
    if need <= room:
        return ""
    return f"its logits need more than {need / 2**30:.0f} GiB, there are {room / 2**30:.0f}"


def _available_bytes() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return 0.0


def _still_alive(device: str) -> None:
    """Raise if the device is unusable in this process, so that a new one is started."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main() -> None:
    """Measure the tasks of an ORDER file."""
    order = json.loads(Path(sys.argv[1]).read_text())
    device = order["device"]
    assert ours(device)
    with Path(sys.argv[2]).open("a") as results:

        def write(**event: Any) -> None:
            results.write(json.dumps(event) + "\n")
            results.flush()

        for number, fields in order["tasks"]:
            task = Task(**fields)
            rows = measure(
                task,
                device,
                budget_s=order["budget_s"],
                barred=order["barred"].get(task.name, {}),
                begin=lambda stage, number=number: write(begin=stage, task=number),
            )
            write(rows=[asdict(row) for row in rows], task=number)


if __name__ == "__main__":
    main()
