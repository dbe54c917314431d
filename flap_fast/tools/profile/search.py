"""The largest train.micro_batch that fits at train.global_batch, found in a process of its own.

    python -m flap_fast.tools.profile.search CONFIG SECONDS      a line of JSON for each trial

A trial is not a whole step, which may take minutes: the losses over the whole batch, then the
trainer's two passes over two micro-batches, beside what a step holds of the others. That is the
most that a step has at one time. Sizes are doubled; then those that divide the batch are bisected.

On a GPU a trial fits unless it runs out of memory. On a CPU running out takes the machine down, so
a trial is only begun where a line through the peaks before it stays below what is free; and the
process may not allocate more than that, and is the first that the kernel would end.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flap_fast.config import Config
from flap_fast.config.file import dump_config, load_config
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import Outputs, TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.device import Memory, free_bytes
from flap_fast.tools.profile.memory import divisors, held_bytes
from flap_fast.tools.profile.synthetic import SyntheticLoader, without_files
from flap_fast.train.engine import PlainEngine
from flap_fast.train.step import Gradients

# Of the memory that is free on a CPU: the rest of the machine wants to live too.
_SAFE = 0.8


@dataclass(frozen=True)
class Trial:
    """Of a micro-batch of so many clips."""

    clips: int
    fits: bool
    peak_bytes: int = 0
    trial_s: float = 0.0
    clips_per_s: float = 0.0
    """Of a whole step, as the trial's part of it went."""


def trials(
    attempt: Callable[[int], Trial],
    *,
    batch: int,
    limit_bytes: int | None,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Trial]:
    """Trials until the largest micro-batch is known, or the time is over.

    Args:
        batch: clips in all; above half of them, only all at once make sense.
        limit_bytes: trials that are expected above it are not begun; None begins all.
        seconds: no trial is begun that is expected to end after these.
    """
    until, done = clock() + seconds, []
    possible = divisors(batch)
    fits, fails, clips = 0, None, min(2, batch)
    while True:
        late = bool(done) and clock() + _expected(done, clips, "trial_s") * 2 > until
        if late:
            return
        too_much = limit_bytes is not None and _expected(done, clips, "peak_bytes") > limit_bytes
        trial = None if too_much else attempt(clips)
        if trial:
            yield trial
        if trial and trial.fits:
            done.append(trial)
            fits = clips
        else:
            fails = clips
        if fails is None:
            if fits == batch:
                return
            clips = 2 * clips if 4 * clips <= batch else batch
        else:
            between = [n for n in possible if fits < n < fails]
            if not between:
                return
            clips = between[len(between) // 2]


def largest(found: Sequence[Trial], batch: int, limit_bytes: int | None) -> dict[str, Any]:
    """The largest trial that fits, and what a line through the peaks says of the limit.

    `micro_batch` is what train.micro_batch may be set to: the largest divisor of the batch that is
    no larger than what was tried; 0 where not even the smallest trial fits.
    """
    good = sorted((t for t in found if t.fits), key=lambda t: t.clips)
    tried = good[-1].clips if good else 0
    predicted = None
    if limit_bytes is not None and len(good) >= 2:
        slope = (good[-1].peak_bytes - good[-2].peak_bytes) / (good[-1].clips - good[-2].clips)
        if slope > 0:
            more = tried + int((limit_bytes - good[-1].peak_bytes) / slope)
            predicted = _divisor(batch, max(tried, more))
    return {
        "global_batch": batch,
        "tried": tried,
        "micro_batch": _divisor(batch, tried),
        "predicted": predicted,
        "trials": [asdict(t) for t in found],
    }


def _divisor(batch: int, most: int) -> int:
    return max((n for n in divisors(batch) if n <= most), default=0)


def search(config: Config, *, seconds: float) -> dict[str, Any]:
    """Search in a process of its own, before this one takes memory of the device.

    Raises:
        RuntimeError: the process failed, other than for want of memory.
    """
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump_config(config))
        file.flush()
        command = [sys.executable, "-m", "flap_fast.tools.profile.search", file.name, str(seconds)]
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        environment = {k: v for k, v in os.environ.items() if k not in launcher}
        environment["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode > 0 or not rows:
        raise RuntimeError(f"the search for a micro-batch failed:\n{done.stderr[-2000:]}")
    limit = rows[0]["limit_bytes"]
    batch = config.train.global_batch
    found = [Trial(**row) for row in rows[1:] if "fits" in row]
    if done.returncode < 0:  # ended by the kernel during the trial that it had announced
        found.append(Trial(rows[-1]["begun"], fits=False))
    return {"limit_bytes": limit, "seconds": seconds, **largest(found, batch, limit)}


def main(file: str, seconds: float) -> None:
    """The process that searches."""
    config = load_config(file)
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    limit = _bound_memory() if device.type == "cpu" else None
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else limit
    print(json.dumps({"limit_bytes": total}), flush=True)
    with without_files(config) as config:
        attempt = Attempts(config, device)
        batch = config.train.global_batch
        for trial in trials(attempt, batch=batch, limit_bytes=limit, seconds=seconds):
            print(json.dumps(asdict(trial)), flush=True)


class Attempts:
    """Parts of steps of one model, at micro-batches of any size."""

    def __init__(self, config: Config, device: torch.device):
        torch.manual_seed(config.run.seed)
        self._config, self._ranks = config, Ranks(device=device)
        self._memory = Memory(device)
        self._engine = PlainEngine(config, TwoTowers(config, weights=False), self._ranks)
        self._warm = False

    def __call__(self, clips: int) -> Trial:
        print(json.dumps({"begun": clips}), flush=True)
        if not self._warm:  # what only a first step costs: the optimizer's moments, libraries
            self._warm = True
            self._step(self._part(min(2, self._config.train.global_batch)))
        self._memory.begin()
        try:
            begun = time.perf_counter()
            self._take(clips)
            now = time.perf_counter()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
        else:
            return Trial(clips, True, self._memory.peak(), now - begun, self._rate(clips))
        self._engine.module.zero_grad(set_to_none=True)
        gc.collect()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        return Trial(clips, False)

    def _take(self, clips: int) -> None:
        part = self._part(clips)
        rest = self._config.train.global_batch - part.train.global_batch
        begun = time.perf_counter()
        exact = self._config.train.accumulation == "exact"
        beside = self._held(rest) if rest else []
        if rest and exact:
            self._lose()
        lost = time.perf_counter()
        self._step(part)
        del beside
        self._took = lost - begun, time.perf_counter() - lost

    def _part(self, clips: int) -> Config:
        """Two micro-batches of so many clips, or the whole batch at once."""
        whole = self._config.train.global_batch
        batch, micro = (2 * clips, clips) if 2 * clips <= whole else (whole, None)
        train = self._config.train.model_copy(update={"global_batch": batch, "micro_batch": micro})
        return self._config.model_copy(update={"train": train})

    def _held(self, clips: int) -> list[Tensor]:
        """What a step holds of clips in other micro-batches, written to: memory that counts."""
        device = self._ranks.device
        media_bytes = 4 * prod(self._config.encoder.input_shape(self._config.fusion))
        sizes = held_bytes(self._config, clips, media_bytes, on_gpu=device.type == "cuda")
        return [torch.ones(n // 4, device=device) for n in sizes.values()]

    def _lose(self) -> None:
        """The losses between as many embeddings as a whole step has, and their gradients."""
        whole, device = self._config.train.global_batch, self._ranks.device
        width, names = self._config.joint.width, ("media", *self._config.loss.sentences)
        rows = {name: torch.randn(whole, width, device=device) for name in names}
        outputs = {name: normalize(x, dim=1).requires_grad_() for name, x in rows.items()}
        del rows
        outputs["scale"] = torch.tensor(10.0, device=device)
        outputs["recon"] = torch.zeros((), device=device)
        total_loss(cast(Outputs, outputs), self._config)["total"].backward()

    def _step(self, config: Config) -> None:
        gradients = Gradients(config, self._ranks, self._engine, 1000, 1000)
        loader = SyntheticLoader(config, self._engine.module.text, self._ranks)
        gradients(1, loader.batches(0, 1, times=gradients.reads))
        self._engine.step(config.optim.lr)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def _rate(self, clips: int) -> float:
        """Clips a second of a whole step: its losses once, its micro-batches as often as it has."""
        whole, (lost, stepped) = self._config.train.global_batch, self._took
        return whole / (lost + stepped * whole / self._part(clips).train.global_batch)


def _out_of_memory(error: Exception) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _expected(done: Sequence[Trial], clips: int, what: str) -> float:
    """On a line through the last two trials that fit; nothing is known before them."""
    if len(done) < 2:
        return 0.0
    (a, b) = done[-2:]
    slope = (getattr(b, what) - getattr(a, what)) / (b.clips - a.clips)
    return getattr(b, what) + max(0.0, slope) * (clips - b.clips)


def _bound_memory() -> int:
    """Keep this process within a safe fraction of what is free; gives those bytes."""
    limit = int(_SAFE * free_bytes(torch.device("cpu")))
    with suppress(OSError):  # not Linux: the line through the peaks is then all there is
        Path("/proc/self/oom_score_adj").write_text("1000")
    if sys.platform == "linux":
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (mapped + limit, resource.RLIM_INFINITY))
    return limit


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
