"""Searches for the largest train.micro_batch that fits, in a separate process.

    python -m flap_fast.tools.profile.search CONFIG SECONDS [LENGTHS]     a line of JSON a trial

A whole step may take minutes, so a trial computes only the losses over the whole batch and the
trainer's two passes over two micro-batches, while it holds what a step keeps of the others. This
has the peak memory of a step. Sizes are doubled, then the divisors of the batch are bisected. With
audio.length = variable clips are spread over their lengths, and the answer is a train.micro_tokens.

On a GPU a trial fits unless it runs out of memory. On a CPU that would freeze the machine, so a
trial only starts if a line through the earlier peaks stays below the free memory. The process may
not allocate more than that, and is the first that the kernel would kill.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from math import prod
from pathlib import Path
from statistics import mean
from tempfile import NamedTemporaryFile
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flap_fast.config import Config
from flap_fast.config.file import dump_config, load_config
from flap_fast.losses import total_loss
from flap_fast.model.masking import least_micro_tokens
from flap_fast.model.two_towers import Outputs, TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.device import Memory, free_bytes
from flap_fast.tools.profile.lengths import LengthMix, frames_of, length_mix
from flap_fast.tools.profile.memory import held_bytes
from flap_fast.tools.profile.synthetic import SyntheticLoader, without_files
from flap_fast.tools.profile.trials import Trial, largest, trials
from flap_fast.tools.profile.work import rank_work
from flap_fast.training.engine import PlainEngine
from flap_fast.training.frozen import frozen
from flap_fast.training.step import Gradients
from flap_fast.training.teacher import teacher, teacher_config

# Fraction of a CPU's free memory that the search may use.
_SAFE = 0.8


def search(config: Config, mix: LengthMix | None = None, *, seconds: float) -> dict[str, Any]:
    """Search in a separate process, before this one allocates memory on the device.

    Raises:
        RuntimeError: the process failed for another reason than running out of memory.
    """
    with NamedTemporaryFile("w", suffix=".yaml") as file, NamedTemporaryFile("w") as lengths:
        file.write(dump_config(config))
        file.flush()
        command = [sys.executable, "-m", "flap_fast.tools.profile.search", file.name, str(seconds)]
        if mix:
            lengths.writelines(f"{s!r}\n" for s in mix.seconds.tolist())
            lengths.flush()
            command.append(lengths.name)
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
    if done.returncode < 0:  # killed by the kernel during the trial that it had announced
        found.append(Trial(rows[-1]["begun"], fits=False))
    result = {"limit_bytes": limit, "seconds": seconds, **largest(found, batch, limit)}
    if mix:
        most = max((trial.tokens for trial in found if trial.fits), default=0)
        result["micro_tokens"] = most if most >= least_micro_tokens(config) else 0
    return result


def main(file: str, seconds: float, lengths: str | None = None) -> None:
    """Entry point of the search process."""
    config = load_config(file)
    mix = length_mix(config, Path(lengths)) if lengths else None
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    limit = _bound_memory() if device.type == "cpu" else None
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else limit
    print(json.dumps({"limit_bytes": total}), flush=True)
    with without_files(config) as config:
        attempt = Attempts(config, device, mix)
        batch = config.train.global_batch
        for trial in trials(attempt, batch=batch, limit_bytes=limit, seconds=seconds):
            print(json.dumps(asdict(trial)), flush=True)


class Attempts:
    """Runs trials of one model at micro-batches of any size."""

    def __init__(self, config: Config, device: torch.device, mix: LengthMix | None = None):
        torch.manual_seed(config.run.seed)
        self._mix = mix
        self._config, self._ranks = config, Ranks(device=device)
        self._memory = Memory(device)
        self._engine = PlainEngine(config, TwoTowers(config, weights=False), self._ranks)
        self._teacher, found = teacher(config, self._ranks), teacher_config(config)
        self._teacher_width = found.joint.width if found else 0
        self._warm = False

    def __call__(self, clips: int) -> Trial:
        print(json.dumps({"begun": clips}), flush=True)
        if not self._warm:  # warm-up: the optimizer's moments, loading libraries
            self._warm = True
            self._step(self._trial_config(min(2, self._config.train.global_batch)))
        self._memory.begin()
        try:
            begun = time.perf_counter()
            self._take(clips)
            now = time.perf_counter()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
        else:
            peak, rate = self._memory.peak(), self._rate(clips)
            work = rank_work(self._trial_config(clips), 1, self._mix)
            tokens = work.lengths.micro_tokens if work.lengths else 0
            return Trial(clips, True, peak, now - begun, rate, tokens)
        self._engine.module.zero_grad(set_to_none=True)
        gc.collect()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        return Trial(clips, False)

    def _take(self, clips: int) -> None:
        part = self._trial_config(clips)
        rest = self._config.train.global_batch - part.train.global_batch
        begun = time.perf_counter()
        exact = self._config.train.accumulation == "exact"
        held = self._held(rest) if rest else []
        if rest and exact:
            self._compute_losses()
        lost = time.perf_counter()
        self._step(part)
        del held
        self._took = lost - begun, time.perf_counter() - lost

    def _trial_config(self, clips: int) -> Config:
        """A config with two micro-batches of `clips` clips, or with the whole batch at once."""
        whole = self._config.train.global_batch
        batch, micro = (2 * clips, clips) if 2 * clips <= whole else (whole, None)
        sizes = {"global_batch": batch, "micro_batch": micro, "micro_tokens": None}
        train = self._config.train.model_copy(update=sizes)
        return self._config.model_copy(update={"train": train})

    def _held(self, clips: int) -> list[Tensor]:
        """Tensors of the size that a step holds for clips of other micro-batches, written to."""
        device = self._ranks.device
        if self._mix:
            frames = mean(frames_of(self._config, self._mix.seconds))
            media_bytes = int(4 * frames * self._config.audio.mel_bins)
        else:
            media_bytes = 4 * prod(self._config.encoder.input_shape(self._config.fusion))
        on_gpu, width = device.type == "cuda", self._teacher_width
        sizes = held_bytes(self._config, clips, media_bytes, on_gpu=on_gpu, teacher_width=width)
        return [torch.ones(n // 4, device=device) for n in sizes.values()]

    def _compute_losses(self) -> None:
        """Compute the losses over as many embeddings as a whole step has, and their gradients."""
        whole, device = self._config.train.global_batch, self._ranks.device
        width, names = self._config.joint.width, ("media", *self._config.loss.sentences)
        rows = {name: torch.randn(whole, width, device=device) for name in names}
        outputs = {name: normalize(x, dim=1).requires_grad_() for name, x in rows.items()}
        del rows
        if width := self._teacher_width:
            for name in ("teacher_media", "teacher_text"):
                outputs[name] = normalize(torch.randn(whole, width, device=device), dim=1)
            outputs["teacher_scale"] = torch.tensor(10.0, device=device)
        outputs["scale"] = torch.tensor(10.0, device=device)
        outputs["recon"] = torch.zeros((), device=device, requires_grad=True)
        outputs["bias"] = torch.tensor(-10.0, device=device)
        columns = 2 + self._config.loss.negatives
        ids = torch.arange(whole * columns, device=device)  # all different
        outputs["pair_ids"] = ids.unflatten(0, (whole, columns))
        total_loss(cast(Outputs, outputs), self._config)["total"].backward()

    def _step(self, config: Config) -> None:
        module = self._engine.module
        # All captions and clips are new, as in a run's first epoch: that takes the most.
        with frozen(config, module, self._ranks) as kept:
            inputs = self._ranks, self._engine, 1000, 1000, kept, self._teacher
            gradients = Gradients(config, *inputs)
            loader = SyntheticLoader(config, module.text, self._ranks, self._mix)
            gradients(1, loader.batches(0, 1, times=gradients.reads))
        self._engine.step(config.optim.lr)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def _rate(self, clips: int) -> float:
        """Clips per second of a whole step: the losses once, and all of its micro-batches."""
        whole, (lost, stepped) = self._config.train.global_batch, self._took
        return whole / (lost + stepped * whole / self._trial_config(clips).train.global_batch)


def _out_of_memory(error: Exception) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _bound_memory() -> int:
    """Limit this process to a safe fraction of the free memory; returns the limit in bytes."""
    limit = int(_SAFE * free_bytes(torch.device("cpu")))
    with suppress(OSError):  # not Linux: only the line through the peaks protects
        Path("/proc/self/oom_score_adj").write_text("1000")
    if sys.platform == "linux":
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (mapped + limit, resource.RLIM_INFINITY))
    return limit


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
