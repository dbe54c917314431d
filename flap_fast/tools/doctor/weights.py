"""What a run's checkpoints say that is wrong: values, towers that do not move, the front end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.hub import local_folder
from flap_fast.model.model_folder import OPTIMIZER, model_folder
from flap_fast.tensors import is_finite, load_tensors
from flap_fast.tools.doctor.records import Check, Examined, Found
from flap_fast.tools.doctor.run_files import RunFiles

# The rms change of a tower that trains, over the rms of its weights.
_MOVED = 1e-6
_WEIGHTS = "model.safetensors"
_FIRST_MOMENT = "/exp_avg"


def _not_finite(e: Examined) -> Iterator[Found]:
    assert e.run is not None
    for folder in e.run.checkpoints[-1:]:
        weights = load_tensors(folder / _WEIGHTS)
        bad = [n for n, v in weights.items() if v.is_floating_point() and not is_finite(v)]
        if bad:
            yield Found("error", folder.name, bad[0], len(bad), len(weights), tuple(bad[:3]))


def _unmoved(e: Examined) -> Iterator[Found]:
    assert e.run is not None
    run = e.run
    last = run.checkpoints[-1]
    both = {run.config.encoder.modality: run.config.encoder, "text": run.config.text}
    towers = [name for name, settings in both.items() if not settings.freeze]
    begun = first_weights(run)
    for tower in towers:
        change, since = None, ""
        if begun is not None:
            since, first = begun
            change = moved(first, load_tensors(last / _WEIGHTS), f"{tower}.")
        elif (last / OPTIMIZER).is_file():
            since, change = "by its gradients", _gradients(last / OPTIMIZER, f"{tower}.")
        if change is not None and change < _MOVED:
            got = f"the {tower} tower changed by {change:.1e} of its size, {since}"
            yield Found("error", last.name, got)


def first_weights(run: RunFiles) -> tuple[str, dict[str, Tensor]] | None:
    """The earliest weights of a run that are still there, and what they are."""
    last, start = run.checkpoints[-1], run.config.train.init_from
    if start is not None and start.is_dir():
        return f"since {start}", load_tensors(model_folder(start) / _WEIGHTS)
    first = run.checkpoints[0]
    return None if first == last else (f"since {first.name}", load_tensors(first / _WEIGHTS))


def moved(before: dict[str, Tensor], after: dict[str, Tensor], tower: str) -> float | None:
    """The rms change of a tower's weights over their rms; None where it has none in common."""
    change = size = 0.0
    for name, value in after.items():
        first = before.get(name)
        if name.startswith(tower) and first is not None and first.shape == value.shape:
            change += float((value.double() - first.double()).square().sum())
            size += float(value.double().square().sum())
    return (change / size) ** 0.5 if size else None


def _gradients(file: Path, tower: str) -> float | None:
    """The largest of the optimizer's mean gradients of a tower."""
    means = [
        float(value.abs().max())
        for name, value in load_tensors(file).items()
        if name.startswith(tower) and name.endswith(_FIRST_MOMENT)
    ]
    return max(means) if means else None


def _front_end(e: Examined) -> Iterator[Found]:
    assert e.run is not None
    config = e.run.config
    for name in ("init_from", "init_audio_from"):
        start: Path | None = getattr(config.train, name)
        if start is None:
            continue
        try:
            file = local_folder(start, ("config.yaml",)) / "config.yaml"
            theirs = _settings(load_config(file))
        except ConfigError as error:
            yield Found("note", "config.yaml", f"train.{name} cannot be compared: {error}")
            continue
        other = [
            f"{n} = {v}, and {theirs[n]} in train.{name}"
            for n, v in _settings(config).items()
            if n in theirs and theirs[n] != v
        ]
        if other:
            yield Found("error", "config.yaml", other[0], len(other), len(theirs), tuple(other[:3]))


def _settings(config: Config) -> dict[str, object]:
    """What the encoder's input is made of, as far as its weights know: rate, bins, statistics."""
    encoder = config.encoder
    names = ("sample_rate_hz", "mel", "mel_bins", "mel_variant", "low_hz", "high_hz", "mean", "std")
    if getattr(encoder, "mel", None) in ("kaldi", "yamnet"):
        names = ("sample_rate_hz", "mel", "mel_bins", "mean", "std")
    return {f"audio.{n}": getattr(encoder, n) for n in names if hasattr(encoder, n)}


NOT_FINITE = Check(
    name="weights not finite",
    needs="weights",
    rule="be finite",
    remedy="take an earlier checkpoint",
    find=_not_finite,
)
UNMOVED = Check(
    name="a tower that does not move",
    needs="weights",
    rule="change in training, unless it is frozen",
    remedy="see that it is not left out of the loss, and that its learning rate is not 0",
    find=_unmoved,
)
FRONT_END = Check(
    name="another front end than the weights'",
    needs="weights",
    rule="be the front end that the first weights were trained with",
    remedy="set these as in the config.yaml of the weights",
    find=_front_end,
)
