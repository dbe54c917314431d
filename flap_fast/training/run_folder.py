"""A run's folder: started once, resumed only with the settings that it was started with.

runs/NAME/config.yaml  environment.json  metrics.jsonl  bad_clips.jsonl  eval.json
          tensorboard/  checkpoints/  wandb/  wandb_id

One in which no step was done is none yet: it is begun anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os.path import lexists
from pathlib import Path
from typing import Any

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.config.file import dump_config, load_config
from flap_fast.files import parsed_json, write_atomically
from flap_fast.places import as_shown
from flap_fast.section import FREE_ON_RESUME
from flap_fast.training.checkpoint import latest
from flap_fast.training.environment import session


def begin(config: Config, *, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a new run; writes nothing.

    Raises:
        ConfigError: the folder holds a run and `resume` is off, or a run that another config
            started, or checkpoints without a config.
    """
    folder = config.run_folder
    last = latest(folder / "checkpoints")
    if not (folder / "config.yaml").is_file():
        rule, remedy = "hold the config.yaml of its checkpoints", f"copy the one in {last} there"
        require(last is None, str(folder), rule, "none", f"{remedy}, or set run.name=ANOTHER")
        rule = "hold the config.yaml of its metrics.jsonl"  # whose rows a new run would drop
        alone = not (folder / "metrics.jsonl").is_file()
        require(alone, str(folder), rule, "none", "set run.name=ANOTHER")
        return None
    if _without_step(folder):
        return None
    if not resume:
        raise ConfigError(
            f"run.name must be new, got '{config.run.name}', whose run lies in {folder}; "
            f"add --resume to continue it, or set run.name=ANOTHER"
        )
    changed = differences(_started_with(folder / "config.yaml", last), config)
    if changed:
        lines = "\n".join(f"  {name}: {then} -> {now}" for name, then, now in changed)
        raise ConfigError(
            f"--resume must keep the settings that {folder} started with, got\n{lines}\n"
            f"set them back, or set run.name=ANOTHER{_longer(changed, folder)}"
        )
    return last


def _without_step(folder: Path) -> bool:
    """Whether a run ended before its first step there, and nothing but its config is replaced.

    A config.yaml that people wrote, or a model's, is left alone.
    """
    rows = (folder / "metrics.jsonl", *folder.glob("bad_clips*.jsonl"))
    trained = (*folder.glob("checkpoints/*"), *folder.glob("*.safetensors"), folder / "eval.json")
    if any(file.exists() and file.stat().st_size for file in rows) or any(map(lexists, trained)):
        return False
    return (folder / "environment.json").is_file()


def _started_with(file: Path, last: Path | None) -> Config:
    try:
        require(b":" in file.read_bytes(), str(file), "hold settings", "none")
        return load_config(file)
    except ConfigError as error:
        why = " ".join(str(error).split())
        remedy = f"copy {last / 'config.yaml'} over it" if last else f"remove {file.parent}"
        raise ConfigError(
            f"{file} must be the config that the run started with, got: {why}; {remedy}"
        ) from None


def _longer(changed: list[tuple[str, Any, Any]], folder: Path) -> str:
    """The remedy for who wants to train on: the learning rate's schedule has one length."""
    if {name for name, *_ in changed} - {"train.steps", "train.epochs"}:
        return ""
    return f" with train.init_from={folder}, which goes on from its weights in a new schedule"


@contextmanager
def in_session(config: Config, facts: dict[str, Any]) -> Iterator[None]:
    """A context in which a run trains: config.yaml and environment.json say what, and its end."""
    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    anew = _without_step(folder)
    write_atomically(folder / "config.yaml", dump_config(config).encode())
    with session(folder / "environment.json", facts, resumed=not anew):
        yield


def _shown(config: Config) -> Config:
    """The config with the URLs of data.train as they are shown: signatures end, logins change."""
    train = tuple(map(as_shown, config.data.train))
    return config.model_copy(update={"data": config.data.model_copy(update={"train": train})})


def differences(then: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """Name, old and new value of each setting that changed and must not."""
    before, after = (flat(_shown(config).model_dump(mode="json")) for config in (then, now))
    approximate = "dali_mel" in (then.frontend.backend, now.frontend.backend)
    free = now.marked(FREE_ON_RESUME).keys() | then.marked(FREE_ON_RESUME).keys()
    free |= set() if approximate else {"frontend.backend"}
    names = [name for name in {**before, **after} if name not in free]
    return [(n, before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            out.update(flat(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = value
    return out


def written_rows(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines of metrics.jsonl or bad_clips*.jsonl, and their rows; none without the file.

    A last line that is half written is left out: the run goes on, or was killed.

    Raises:
        ConfigError: another line is damaged.
    """
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = parsed_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            yield line, row
        elif number < len(lines):
            rule, remedy = "be a JSON object with a step", "take out the line"
            got = line[:60].decode(errors="replace")
            require(False, f"{file}:{number}", rule, got, remedy)


def cut_after(file: Path, step: int) -> None:
    """Drop rows after `step`, which a resumed run repeats, and a half-written last row.

    Raises:
        ConfigError: another row is damaged.
    """
    if file.is_file():
        kept = [line + b"\n" for line, row in written_rows(file) if row["step"] <= step]
        write_atomically(file, b"".join(kept))
