"""Weights & Biases: a run's rows and config, sent to its server."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.files import write_atomically
from flap_fast.places import without_secrets
from flap_fast.training.guarded import Observer

Result = TypeVar("Result")


def weights_and_biases(config: Config, open_files: ExitStack, *, first: int = 0) -> Observer:
    """Logs to the run's own Weights & Biases run, which goes on when training is resumed.

    No call takes longer than log.wandb_timeout_s; wandb's init_timeout is half of it, since it
    asks once more after that. It never prompts for a key.

    Args:
        first: steps done before.

    Raises:
        TimeoutError: from a call that took longer, and from each one after it.
    """
    check_wandb(config)
    log, folder = config.log, config.run_folder
    limit = Limit(log.wandb_timeout_s)

    def init() -> Any:
        import wandb  # type: ignore[import-not-found]

        settings: dict[str, Any] = dict.fromkeys(
            ("init_timeout", "login_timeout"), log.wandb_timeout_s / 2
        )
        if "finish_timeout" in getattr(getattr(wandb, "Settings", None), "model_fields", ()):
            # Without it, wandb waits for its uploads when the process exits, however long.
            settings |= {"finish_timeout": log.wandb_timeout_s / 2, "finish_timeout_raises": True}
        return wandb.init(
            project=log.wandb_project,
            entity=log.wandb_entity,
            group=log.wandb_group,
            name=config.run.name,
            id=wandb_id(config, first=first),
            resume="allow",
            dir=folder,
            config=json.loads(without_secrets(config.model_dump_json())),
            settings=settings,
        )

    with _no_terminal():
        run = limit(init)
    open_files.callback(limit, lambda: run.finish())
    return lambda row: limit(lambda: run.log(row, step=row["step"]))


def wandb_id(config: Config, *, first: int) -> str:
    """The id of the run's Weights & Biases run: a random one, kept in RUN/wandb_id.

    Runs that began before that file was written go on under their names.
    """
    folder = config.run_folder
    file = folder / "wandb_id"
    if file.is_file() and (kept := file.read_text().strip()):
        return kept
    new = config.run.name if first and (folder / "wandb").is_dir() else secrets.token_hex(8)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, f"{new}\n".encode())
    return new


def check_wandb(config: Config) -> None:
    """Raise `ConfigError` if log.wandb is on and Weights & Biases is not installed."""
    require(
        not config.log.wandb or importlib.util.find_spec("wandb") is not None,
        "log.wandb",
        "be off where Weights & Biases is not installed",
        config.log.wandb,
        "pip install wandb",
    )


class Limit:
    """Waits for calls, each in a thread of its own, for so many seconds at most."""

    def __init__(self, seconds: float):
        self._seconds, self._over = seconds, False

    def __call__(self, call: Callable[[], Result]) -> Result:
        """What a call returns or raises.

        Raises:
            TimeoutError: it takes too long, or an earlier one did and was left to itself.
        """
        message = f"no answer in log.wandb_timeout_s = {self._seconds:g} s"
        if self._over:
            raise TimeoutError(message)
        done: Future[Result] = Future()

        def work() -> None:
            try:
                done.set_result(call())
            except Exception as error:  # raised where the result is asked for
                done.set_exception(error)
            except BaseException as error:  # there, an interrupt of its own would end the run
                done.set_exception(RuntimeError(repr(error)))

        thread = Thread(target=work, daemon=True)  # which keeps no process from its end
        thread.start()
        thread.join(self._seconds)
        if thread.is_alive():
            self._over = True
            raise TimeoutError(message)
        return done.result()


@contextmanager
def _no_terminal() -> Iterator[None]:
    """A context in which no terminal can be read: a prompt would hold the run, and its end, up."""
    kept = sys.stdin
    with Path(os.devnull).open() as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = kept
