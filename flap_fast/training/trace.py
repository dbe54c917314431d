"""A trace of the next steps of a running job, asked for by a file.

    echo 5 > RUN/trace     ->     RUN/traces/step-000123.json, of steps 123 to 127 on rank 0

It is a Chrome trace: ui.perfetto.dev or chrome://tracing shows it. The file is looked for every
log.every_steps; other steps do nothing here. What fails here is named, and training goes on.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.files import say
from flap_fast.ranks import Ranks
from flap_fast.training.guarded import Guarded, Observer, Row

_MOST_STEPS = 50
_MOST_EVENTS = 1_000_000  # 256 bytes each in the file, measured on a CPU


def tracing(config: Config, ranks: Ranks, open_files: ExitStack) -> Observer:
    """A function to call with {"step": ..} after each step; only the first rank traces."""
    if not ranks.first:
        return lambda row: None
    every, running = config.log.every_steps, list[_Trace]()
    guarded = Guarded("the trace of steps", lambda files: _observer(config, ranks, running, files))
    open_files.callback(guarded.close)

    def after(row: Row) -> None:
        if running or row["step"] % every == 0:
            guarded(row)

    return after


def _observer(
    config: Config, ranks: Ranks, running: list[_Trace], open_files: ExitStack
) -> Observer:
    asked, folder = config.run_folder / "trace", config.run_folder / "traces"

    def observe(row: Row) -> None:
        step = row["step"]
        if running:
            if step >= running[0].last:
                running.pop().write()
        elif asked.is_file():
            steps = _steps_asked(asked)
            if steps:
                running.append(_Trace(folder, step + 1, steps, ranks))

    # A run that ends in the midst of a trace writes what there is of it.
    open_files.callback(lambda: running and running.pop().write())
    return observe


def _steps_asked(file: Path) -> int:
    """The number in the file, which is removed; 0, and a sentence, where it is none."""
    text = file.read_text(errors="replace").strip()
    file.unlink()
    try:
        valid = text.isdecimal() and 1 <= int(text) <= _MOST_STEPS
        rule = f"hold a number of steps from 1 to {_MOST_STEPS}"
        require(valid, str(file), rule, text[:20] or "nothing", f"echo 5 > {file}")
    except ValueError as error:
        say(f"warning: nothing is traced: {error}", error=True)
        return 0
    return int(text)


class _Trace:
    """The profiler from its start to the file that it writes."""

    def __init__(self, folder: Path, first: int, steps: int, ranks: Ranks):
        self.last = first + steps - 1
        self._file = folder / f"step-{first:06}.json"
        activities = [ProfilerActivity.CPU]
        if ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()
        say(f"tracing steps {first} to {self.last}", error=True)

    def write(self) -> None:
        """Stop, and write the trace unless it is larger than a browser opens."""
        self._profile.stop()
        found = self._profile.profiler
        events = len(found.kineto_results.events()) if found and found.kineto_results else 0
        if events > _MOST_EVENTS:
            rule, remedy = f"have at most {_MOST_EVENTS:,} events", "ask for fewer steps"
            say(f"warning: {self._file} must {rule}, got {events:,}; {remedy}", error=True)
            return
        self._file.parent.mkdir(exist_ok=True)
        part = self._file.with_suffix(".part")
        try:
            self._profile.export_chrome_trace(str(part))
            part.replace(self._file)
        finally:
            part.unlink(missing_ok=True)
        say(f"{self._file}: open it in ui.perfetto.dev or chrome://tracing", error=True)
