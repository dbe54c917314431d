"""The largest micro-batch that fits: doubled, then bisected, in a process of its own.

    python -m flap_fast.profile.search CONFIG SECONDS      a line of JSON for each trial

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
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from flap_fast.config import Config
from flap_fast.configfile import dump_config, load_config
from flap_fast.loss import total_loss
from flap_fast.model.flap import Flap
from flap_fast.model.masking import mask_plan
from flap_fast.profile.device import Memory, free_bytes
from flap_fast.profile.synthetic import SyntheticLoader, without_files
from flap_fast.ranks import Ranks
from flap_fast.train.engine import PlainEngine
from flap_fast.train.microbatch import model_inputs

# Of the memory that is free on a CPU: the rest of the machine wants to live too.
_SHARE = 0.8


@dataclass(frozen=True)
class Trial:
    """One step of a micro-batch."""

    clips: int
    fits: bool
    peak_bytes: int = 0
    step_s: float = 0.0


def trials(
    attempt: Callable[[int], Trial],
    *,
    limit_bytes: int | None,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Trial]:
    """Trials until the largest is known to a sixteenth, or the time is over.

    Args:
        limit_bytes: trials that are expected above it are not begun; None begins all.
        seconds: no trial is begun that is expected to end after these.
    """
    until, done = clock() + seconds, []
    fits, fails, clips = 0, None, 2
    while fails is None or fails - fits > max(1, fits // 16):
        late = bool(done) and clock() + _expected(done, clips, "step_s") * 2 > until
        if late:
            return
        too_much = limit_bytes is not None and _expected(done, clips, "peak_bytes") > limit_bytes
        if not too_much:
            trial = attempt(clips)
            yield trial
            if trial.fits:
                done.append(trial)
        if not too_much and trial.fits:  # type: ignore[possibly-undefined]
            fits = clips
        else:
            fails = clips
        clips = 2 * clips if fails is None else (fits + fails) // 2


def largest(found: Sequence[Trial], limit_bytes: int | None) -> dict[str, Any]:
    """The largest trial that fits, and what a line through the peaks says of the limit."""
    good = sorted((t for t in found if t.fits), key=lambda t: t.clips)
    tried = good[-1].clips if good else 0
    predicted = None
    if limit_bytes is not None and len(good) >= 2:
        slope = (good[-1].peak_bytes - good[-2].peak_bytes) / (good[-1].clips - good[-2].clips)
        if slope > 0:
            predicted = tried + int((limit_bytes - good[-1].peak_bytes) / slope)
    return {"tried": tried, "predicted": predicted, "trials": [asdict(t) for t in found]}


def search(config: Config, *, seconds: float) -> dict[str, Any]:
    """Search in a process of its own, before this one takes memory of the device.

    Raises:
        RuntimeError: the process failed, other than for want of memory.
    """
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump_config(config))
        file.flush()
        command = [sys.executable, "-m", "flap_fast.profile.search", file.name, str(seconds)]
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        environment = {k: v for k, v in os.environ.items() if k not in launcher}
        environment["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode > 0 or not rows:
        raise RuntimeError(f"the search for a micro-batch failed:\n{done.stderr[-2000:]}")
    limit = rows[0]["limit_bytes"]
    found = [Trial(**row) for row in rows[1:] if "fits" in row]
    if done.returncode < 0:  # ended by the kernel during the trial that it had announced
        found.append(Trial(rows[-1]["begun"], fits=False))
    return {"limit_bytes": limit, "seconds": seconds, **largest(found, limit)}


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
        for trial in trials(attempt, limit_bytes=limit, seconds=seconds):
            print(json.dumps(asdict(trial)), flush=True)


class Attempts:
    """Steps of one model at micro-batches of any size."""

    def __init__(self, config: Config, device: torch.device):
        torch.manual_seed(config.run.seed)
        self._config, self._ranks = config, Ranks(device=device)
        self._memory = Memory(device)
        self._engine = PlainEngine(config, Flap(config, weights=False), self._ranks)
        self._warm = False

    def __call__(self, clips: int) -> Trial:
        print(json.dumps({"begun": clips}), flush=True)
        if not self._warm:  # what only a first step costs: the optimizer's moments, libraries
            self._warm = True
            self._step(2)
        self._memory.begin()
        try:
            begun = time.perf_counter()
            self._step(clips)
            return Trial(clips, True, self._memory.peak(), time.perf_counter() - begun)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
        self._engine.module.zero_grad(set_to_none=True)
        gc.collect()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        return Trial(clips, False)

    def _step(self, clips: int) -> None:
        train = self._config.train.model_copy(update={"global_batch": clips})
        config = self._config.model_copy(update={"train": train})
        encoder = self._engine.module.text.inner.config
        batch = next(SyntheticLoader(config, encoder, self._ranks).batches(0, 1))
        plan = mask_plan(config.mask, config.audio.grid, config.run.seed, batch.visits)
        outputs = self._engine.model(*model_inputs(batch, plan, config))
        self._engine.backward(total_loss(outputs, config)["total"])
        self._engine.step(config.optim.lr)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()


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
    """Keep this process within its share of what is free; gives that share."""
    limit = int(_SHARE * free_bytes(torch.device("cpu")))
    with suppress(OSError):  # not Linux: the line through the peaks is then all there is
        Path("/proc/self/oom_score_adj").write_text("1000")
    if sys.platform == "linux":
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (mapped + limit, resource.RLIM_INFINITY))
    return limit


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
