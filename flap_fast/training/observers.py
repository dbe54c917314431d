"""Metrics of a run, and where they go: terminal, metrics.jsonl, TensorBoard, Weights & Biases.

    loop -> Metrics.step (every step, no host sync) -> a row every log.every_steps -> observers

An observer is a function of a row, `{"step": 20, "loss": 3.1, ...}`; a new one gets a line in
`observers`. One that fails is named and left out, and training goes on (guarded.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.batch import BadClip
from flap_fast.files import visible
from flap_fast.model.model_folder import step_folders
from flap_fast.model.two_towers import Outputs
from flap_fast.progress import clock, console
from flap_fast.ranks import Ranks
from flap_fast.training.guarded import Guarded, Observer, Row, guarded
from flap_fast.training.run_folder import cut_after
from flap_fast.training.weights_and_biases import weights_and_biases

Item = TypeVar("Item")


class NotFinite(ArithmeticError):
    """The loss or a gradient became NaN or infinite."""


class Metrics:
    """Turns steps into rows for observers. Its state between rows stays on the device."""

    def __init__(self, config: Config, ranks: Ranks, steps: int, observers: Sequence[Observer]):
        self._config, self._ranks, self._steps = config, ranks, steps
        self._observers = [guarded(observer) for observer in observers]
        self._bad_step = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._since, self._waited_s, self._done = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The same batches; measures how long the loop waits for them."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def step(
        self,
        step: int,
        epoch: int,
        lr: float,
        outputs: Outputs,
        terms: dict[str, Tensor],
        work: dict[str, float],
    ):
        """Record a step; every log.every_steps, check it and pass a row to the observers."""
        finite = terms["total"].isfinite() & terms["grad_norm"].to(self._bad_step.device).isfinite()
        self._bad_step += torch.where((self._bad_step == 0) & ~finite, step, 0)
        self._done += 1
        if step % self._config.log.every_steps and step != self._steps:
            return
        self.check_finite()
        row = self._row(step, epoch, lr, outputs, terms) | work
        for observe in self._observers:
            observe(dict(row))  # its own: what one changes in it, no other sees
        self._since, self._waited_s, self._done = time.perf_counter(), 0.0, 0

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Pass an evaluation's scores to the observers."""
        for observe in self._observers:
            observe({"step": step, **scores})
        self._since, self._waited_s, self._done = time.perf_counter(), 0.0, 0

    def check_finite(self) -> None:
        """Raise `NotFinite` if a step gave NaN or infinity; synchronises with the device."""
        step = int(self._bad_step.item())
        if step:
            folder = self._config.run_folder
            last_weights = f", and train.init_from={folder} to start from its last weights"
            raise NotFinite(
                f"the loss or its gradient must be finite, got NaN or infinity at step {step}; "
                "nothing was saved after it. Lower optim.lr, lengthen sched.warmup_steps or set "
                "optim.clip_norm=1, in a new run: run.name=ANOTHER"
                + (last_weights if step_folders(folder / "checkpoints") else "")
            )

    def _row(
        self, step: int, epoch: int, lr: float, outputs: Outputs, terms: dict[str, Tensor]
    ) -> Row:
        # Terms of a rank's own clips are averaged; the others are the same on all ranks.
        names = [name for name in terms if name not in ("total", "grad_norm")]
        means = self._ranks.mean(torch.stack([terms[n].detach() for n in ("total", *names)]))
        loss, *values = means.tolist()
        seconds = time.perf_counter() - self._since
        clips = self._done * self._config.train.global_batch
        compared = self._config.loss.reads_text
        recall = {"in_batch_R@1": in_batch_recall(outputs)} if compared else {}
        return {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            **dict(zip(names, values, strict=True)),
            "grad_norm": terms["grad_norm"].item(),
            "scale": outputs["scale"].item(),
            **({"bias": outputs["bias"].item()} if "bias" in outputs else {}),
            **recall,
            "lr": lr,
            "clips_per_s": clips / seconds,
            "step_ms": seconds / self._done * 1000,
            "data_wait": min(1.0, self._waited_s / seconds),
            "peak_mib": _peak_mib(self._ranks),
        }


@torch.no_grad()
def in_batch_recall(outputs: Outputs) -> float:
    """Recall@1 of a rank's media among its own captions, between 0 and 1."""
    nearest = torch.cat([(a @ outputs["text"].T).argmax(1) for a in outputs["media"].split(1024)])
    return (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean().item()


def observers(
    config: Config, ranks: Ranks, open_files: ExitStack, *, first: int, steps: int
) -> list[Guarded]:
    """The config's observers, on the first rank; they are closed with `open_files`.

    Raises:
        ConfigError: metrics.jsonl or bad_clips*.jsonl is damaged.
    """
    if not ranks.first:
        return []
    folder, log = config.run_folder, config.log
    for file in folder.glob("bad_clips*.jsonl"):
        cut_after(file, first)  # other ranks' too: none of them has started a step yet
    starts: dict[str, Callable[[ExitStack], Observer]] = {
        "metrics.jsonl": lambda files: metrics_file(folder / "metrics.jsonl", files, first),
        "the progress bar": lambda files: terminal(config, files, first, steps),
    }
    if log.tensorboard:
        starts["log.tensorboard"] = lambda files: tensorboard(folder / "tensorboard", files, first)
    if log.wandb:
        starts["log.wandb"] = lambda files: weights_and_biases(config, files, first=first)
    active = []
    for name, start in starts.items():
        active.append(Guarded(name, start))
        open_files.callback(active[-1].close)
    return active


def metrics_file(file: Path, open_files: ExitStack, first: int) -> Observer:
    """Writes one JSON line per row; a resumed run replaces the rows that it repeats."""
    cut_after(file, first)
    lines = open_files.enter_context(file.open("a", buffering=1))

    def observe(row: Row) -> None:
        lines.write(json.dumps(row) + "\n")

    return observe


def terminal(config: Config, open_files: ExitStack, first: int, steps: int) -> Observer:
    """A progress bar on a terminal, or a line per row where stderr is a file."""
    pace = RunPace(first, steps)
    columns = (TextColumn(config.run.name), BarColumn(), TextColumn("{task.fields[numbers]}"))
    on_terminal = console().is_terminal
    # Between rows it counts down: they may be minutes apart.
    bar = Progress(
        *(*columns, TimeLeft(pace)),
        console=console(),
        disable=not on_terminal,
        redirect_stdout=False,
    )
    task = open_files.enter_context(bar).add_task("", total=steps, completed=first, numbers="")

    def observe(row: Row) -> None:
        pace.add(row)
        if "loss" not in row:
            scores = "  ".join(f"{name} {row[name]:.3f}" for name in row if name != "step")
            _print(f"step {row['step']}  {scores}")
            return
        recall = f"R@1 {row['in_batch_R@1']:.2f}  " if "in_batch_R@1" in row else ""
        numbers = (
            f"step {row['step']}/{steps}  loss {row['loss']:.3f}  {recall}"
            f"{row['clips_per_s']:.0f} clips/s  data wait {row['data_wait']:.0%}"
        )
        bar.update(task, completed=row["step"], numbers=numbers)
        if not on_terminal:
            _print(f"{numbers}  {pace}")

    return observe


def _print(line: str) -> None:
    console().print(visible(line), highlight=False, markup=False, soft_wrap=True)


class RunPace:
    """How long a run still takes: its steps at a smoothed pace, and evaluations by their mean.

    Args:
        first: steps done before.
    """

    def __init__(self, first: int, steps: int):
        self._first, self._steps, self._done, self._rows = first, steps, first, 0
        self._step_s, self._scored_s, self._at = 0.0, 0.0, time.monotonic()

    def add(self, row: Row) -> None:
        """Count a row of steps or of scores."""
        self._done, self._at = row["step"], time.monotonic()
        self._scored_s += row.get("eval_s", 0.0)
        if "step_ms" in row:
            self._rows += 1
            # The mean of the first ten rows, then an average over about as many.
            weight = max(1 / self._rows, 0.1)
            self._step_s += weight * (row["step_ms"] / 1000 - self._step_s)

    def left_s(self) -> float | None:
        """Seconds; None before the first row."""
        if not self._rows:
            return None
        scored_s = self._scored_s / max(self._done - self._first, 1)  # of each step
        left = (self._steps - self._done) * (self._step_s + scored_s)
        return max(0.0, left - (time.monotonic() - self._at))

    def __str__(self):
        left = self.left_s()
        return "" if left is None else f"{clock(left)} left"


class TimeLeft(ProgressColumn):
    """A bar's column with the pace's time left."""

    def __init__(self, pace: RunPace):
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        return Text(str(self._pace))


def tensorboard(folder: Path, open_files: ExitStack, first: int) -> Observer:
    """Writes TensorBoard scalars; they replace the points of steps that are done again."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first + 1)  # of step 1 on, without checkpoint
    open_files.callback(writer.close)

    def observe(row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])

    return observe


def report_bad_clips(folder: Path, ranks: Ranks, bad: list[BadClip]) -> None:
    """Append a step's unusable clips to bad_clips.jsonl, print each once, and empty `bad`."""
    if not bad:
        return
    name = "bad_clips.jsonl" if ranks.first else f"bad_clips.rank{ranks.rank}.jsonl"
    with (folder / name).open("a") as lines:
        rows = (
            asdict(clip) | {"step": clip.step + 1} for clip in bad
        )  # counted from 1, as in metrics.jsonl
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    for clip in bad:
        _print(
            f"step {clip.step + 1}: {clip.clip} cannot be used ({clip.reason}); "
            f"replaced by {clip.replaced_by} (recorded in {folder / name})"
        )
    bad.clear()


def _peak_mib(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
