"""Tables of a profile and of a plan: at most 80 columns, also through a pipe."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flap_fast.files import visible
from flap_fast.tools.profile.plan import Machine, Plan

_MIB = 2**20


def profile_table(found: dict[str, Any]) -> RenderableType:
    """The output of `flap profile`, from a profile.json."""
    step_ms, ceiling = found["step_ms"], found["ceiling_flop_per_s"]
    least, median, most = found["step_ms_least_median_most"]
    unit, name = (1e12, "TFLOP") if ceiling >= 1e12 else (1e9, "GFLOP")
    table = _table("part", "ms", "of the step", name, f"{name}/s", "of ceiling")
    for part, ms in found["parts_ms"].items():
        flop = found["flop"].get(part, {}).get("total", 0)
        table.add_row(part, f"{ms:.1f}", _percent(ms / step_ms), *_rates(flop, ms, ceiling, unit))
    table.add_section()
    total = sum(part["total"] for part in found["flop"].values())
    table.add_row("a step", f"{step_ms:.1f}", "100 %", *_rates(total, step_ms, ceiling, unit))
    memory = found["memory_mib"]
    lines = [
        f"{found['clips_per_s']:.1f} clips/s; ceiling {ceiling / unit:.1f} {name}/s: "
        f"a matrix product in {found['precision']}, measured",
        f"memory: peak {memory['peak']:.0f} MiB, steady {memory['steady']:.0f} MiB, "
        f"{found['memory_is']}",
        f"a step allocates {found['allocated_in_a_step_mib']:.0f} MiB above the steady state",
    ]
    for encoder, what in (("text", "captions"), ("media", "clips")):
        if new := found.get(f"new_{what}_per_step"):
            lines.append(f"the frozen {encoder} encoder embedded {new:.1f} new {what} a step")
    if found["world"] > 1:
        lines.append(f"each rank sends {found['sent_mib_per_step']:.2f} MiB a step")
    lines += [*_lengths(found.get("lengths")), _micro_batch(found["micro_batch"])]
    title = (
        f"{found['config']}: {found['global_batch']} clips a step on {found['world']} rank(s), "
        f"{found['precision']}, {found['batches']}{_passes(found)}\n{found['device']}\nmeans of "
        f"{found['steps']} steps of {least:.1f} to {most:.1f} ms, median {median:.1f}"
    )
    return Group(Text(title), table, Text("\n".join(lines)))


def _passes(found: dict[str, Any]) -> str:
    parts = found["micro_batches"]
    if parts == 1:
        return ""
    passes = "two passes" if found["passes"] == 2 else "one pass"
    return f"\n{parts} micro-batches of a rank, {passes}"


def plan_table(planned: Plan) -> RenderableType:
    """The output of `flap plan`."""
    return Group(
        Text(_head(planned)), _memory(planned), _time(planned), Text(_assumptions(planned.machine))
    )


def _head(planned: Plan) -> str:
    machine, parameters = planned.machine, planned.parameters
    size = f"{(parameters.trained + parameters.frozen) / 1e6:.1f} M parameters"
    if parameters.frozen:
        size += f", {parameters.frozen / 1e6:.1f} M of them frozen"
    parts = ""
    if planned.micro_batches > 1:
        parts = f", in {planned.micro_batches} micro-batches"
        if planned.lengths is None:
            parts = f", {planned.clips // planned.micro_batches} at a time"
    engine = f"{planned.engine}, ZeRO {planned.stage}" if planned.engine != "plain" else "plain"
    head = (
        f"{planned.clips * machine.gpus} clips a step: {planned.clips} on each of {machine.gpus} "
        f"GPU(s), {machine.nodes} node(s){parts}\n"
        f"{engine}, {planned.precision}, logits {planned.scheme}, {size}"
    )
    return "\n".join([head, *_lengths(planned.lengths)])


def _lengths(found: dict[str, Any] | None) -> list[str]:
    """What is assumed of the clips' lengths, and what follows for tokens: `work_summary`."""
    if found is None:
        return []
    cropped = f", {_percent(found['cropped'])} are cropped" if found["cropped"] else ""
    return [
        f"lengths of {found['clips']:,} clips ({visible(found['source'])}): "
        f"mean {found['mean_s']:.1f} s,",
        f"  median {found['median_s']:.1f} s, longest {found['longest_s']:,.1f} s{cropped}",
        f"audio tokens: {found['tokens_per_clip']:.0f} a clip, {found['rank_tokens']:,} a rank, "
        f"{found['micro_tokens']:,} at a time;",
        f"  balance of ranks {_percent(found['balance'])}, "
        f"{_percent(found['real_frames'])} of the frames are sound",
    ]


def _memory(planned: Plan) -> Table:
    memory = planned.memory
    table = _table("memory of a rank", "MiB")
    for group in (memory.states, memory.activations, memory.loss, memory.held):
        for name, size in group.items():
            label = f"{name} (activations)" if group is memory.activations else name
            label = f"{name} (all micro-batches)" if group is memory.held else label
            table.add_row(label, f"{size / _MIB:,.0f}")
    table.add_section()
    verdict = "fits" if planned.fits else "DOES NOT FIT"
    table.add_row(
        f"peak: {verdict} in {planned.machine.memory_gib:g} GiB", f"{memory.peak / _MIB:,.0f}"
    )
    table.add_row("clips of a rank that would fit", f"{planned.largest_clips:,}")
    name = "micro_tokens" if planned.lengths else "micro_batch"
    table.add_row(f"largest train.{name} that fits", f"{planned.largest_micro_batch:,}")
    if memory.on_cpu:
        table.add_section()
        for name, size in memory.on_cpu.items():
            table.add_row(f"{name} (in the CPU's memory)", f"{size / _MIB:,.0f}")
        table.add_row(
            "in the CPU's memory, of a rank", f"{sum(memory.on_cpu.values()) / _MIB:,.0f}"
        )
    return table


def _time(planned: Plan) -> Table:
    table = _table("a step", "GFLOP", "MB sent", "ms", "exposed ms")
    rate = planned.machine.tflops * planned.machine.mfu * 1e12
    for name, flop in planned.flop.items():
        ms = f"{flop.total / rate * 1000:.2f}"
        table.add_row(name, f"{flop.total / 1e9:,.0f}", "", ms, ms)
    optimizer = f"{planned.optimizer_s * 1000:.2f}"
    table.add_row("optimizer", "", "", optimizer, optimizer)
    for name, e in planned.exchanges.items():
        ms, exposed = (f"{s * 1000:.2f}" for s in (e.seconds, e.exposed_s))
        table.add_row(name, "", f"{e.sent_bytes / 1e6:,.2f}", ms, exposed)
    table.add_section()
    total = f"{sum(f.total for f in planned.flop.values()) / 1e9:,.0f}"
    sent = f"{sum(e.sent_bytes for e in planned.exchanges.values()) / 1e6:,.2f}"
    step = f"{planned.step_s * 1000:.2f}"
    table.add_row(f"{planned.clips_per_s:,.0f} clips/s", total, sent, "", step)
    return table


def _assumptions(machine: Machine) -> str:
    def rate(bytes_per_s: float) -> str:
        return f"{bytes_per_s / 1e9:g}GB/s"

    lines = (
        f"--tflops {machine.tflops:g}: the most a rank does; --mfu {machine.mfu:g}: the fraction "
        "of it in a step",
        f"--link {rate(machine.link_bytes_per_s)}: what a rank sends between nodes",
        f"--local-link {rate(machine.local_bytes_per_s)}: what it sends inside of a node",
        f"--memory-gib {machine.memory_gib:g}, --memory-rate {rate(machine.memory_bytes_per_s)}",
        f"--host-rate {rate(machine.host_bytes_per_s)}, --host-link "
        f"{rate(machine.host_link_bytes_per_s)}: of a rank, for train.offload",
        f"--caption-tokens {machine.caption_tokens}: computed for each, padding included",
        "gradients hide behind the backward but for their last bucket (ZeRO 1 to 3)",
        "the loss's products, in fp32, at the same rate: they are few",
        "left out: latencies, loading, evaluation, fragments of memory, frozen encoders' pass",
    )
    return "Assumed, not measured:\n" + "\n".join(f"  {line}" for line in lines)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for at, heading in enumerate(headings):
        table.add_column(heading, no_wrap=True, justify="right" if at else "left")
    return table


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _rates(flop: int, ms: float, ceiling: float, unit: float) -> tuple[str, str, str]:
    if not flop or not ms:
        return "", "", ""
    rate = flop / ms * 1000
    return f"{flop / unit:.3f}", f"{rate / unit:.2f}", _percent(rate / ceiling)


def _micro_batch(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"largest micro-batch: not searched ({found['skipped']})"
    if "micro_tokens" in found:
        limit = f"{found['limit_bytes'] / 2**30:.1f} GiB"
        return f"largest train.micro_tokens: {found['micro_tokens']:,}, tried and fits in {limit}"
    limit, batch = f"{found['limit_bytes'] / 2**30:.1f} GiB", found["global_batch"]
    tried = f"largest train.micro_batch of {batch}: {found['micro_batch']}, tried and fits"
    if found["predicted"] and found["predicted"] > found["micro_batch"]:
        more = f"by a line through their peaks, {found['predicted']} would in {limit}"
        return f"{tried};\n  {more}"
    return f"{tried} in {limit}"
