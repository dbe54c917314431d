"""A checkpoint layout: how it is recognised, read and written. `convert.LAYOUTS` lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flap_fast.config import Config
from flap_fast.interchange.tensors import Saved, Tensors
from flap_fast.model.two_towers import TwoTowers


@dataclass(frozen=True)
class Source:
    """A checkpoint to import, and the options of the command."""

    path: Path
    work: Path
    """A folder for files that are needed until the import has ended."""
    tensors: Tensors = field(default_factory=dict)
    """Of a file, under names without prefixes; a folder's layout reads its own."""
    saved: Saved | None = None
    """Of a file: the tensors and values as they were stored."""
    model_type: object = None
    """Of a folder: `model_type` in its config.json."""
    overrides: Sequence[str] = ()
    """Settings that the checkpoint does not hold."""
    strip: Sequence[str] = ()
    """Prefixes to remove from names."""
    partial: bool = False
    """Take the tensors that fit; the others keep their initial values."""
    decoder: bool = False
    """Read the decoder too."""


@dataclass(frozen=True)
class Imported:
    """A checkpoint under this project's names."""

    config: Config
    tensors: Tensors
    unused: Tensors = field(default_factory=dict)
    """Tensors that this project has no use for; an export writes them again."""
    origin: dict[str, Any] | None = None
    """How the file was laid out, for `origin.json`."""
    encoder_only: bool = False
    """It holds an audio encoder, not a whole model."""
    decoder: bool = False
    """It holds an audio encoder and a decoder."""
    classifier: Tensors = field(default_factory=dict)
    """Of an audio encoder: its classifier, for joint.class_names."""
    class_names: Sequence[str] = ()
    """The names of the classes that it scores."""
    why_no_classifier: str = ""
    """Why it has none, where its layout can have one."""


@dataclass(frozen=True)
class Export:
    """A model to export."""

    folder: Path
    """The model folder."""
    config: Config
    model: TwoTowers
    weights: Tensors
    unused: Tensors
    """What the import of this model did not use; empty otherwise."""
    prefix: str
    """The prefix of all names in the imported file."""

    @property
    def text_config(self) -> Any:
        """The text encoder's transformers config, or None: CLIP's has none."""
        return getattr(getattr(self.model.text, "inner", None), "config", None)

    @property
    def why_not_own_heads(self) -> str:
        """Why its heads are not those of its encoders' authors; empty if they are."""
        joint, own = self.config.joint, self.config.text.head
        if joint.text_head not in ("encoder", own):
            return f"it has joint.text_head = {joint.text_head}"
        own_hidden = joint.hidden in (None, joint.width)
        return "" if own_hidden else f"it has joint.hidden = {joint.hidden}"


@dataclass(frozen=True)
class CardFields:
    """What only whoever shares a model knows; what is left out is said to be not stated."""

    name: str | None = None
    """The model's name: OWNER/NAME on the Hub; run.name without it."""
    license: str | None = None
    """The Hub's name of a licence, such as `apache-2.0`; `other` with name and link."""
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    """Codes of the captions' languages, such as `en`."""
    datasets: tuple[str, ...] = ()
    """The Hub's names of the data sets it was trained on."""


def _nothing(export: Export) -> str:
    return ""


@dataclass(frozen=True)
class Layout:
    """One project's checkpoint layout."""

    names: str
    """The names or the `model_type` that identify it, for error messages."""
    form: Literal["file", "folder"]
    matches: Callable[[Source], bool]
    read: Callable[[Source], Imported]
    write: Callable[[Export, Path], str] | None = None
    """Writes a model and returns what was written; None for a layout that is only read."""
    why_not: Callable[[Export], str] = _nothing
    """Why a model cannot be written so; empty if it can."""
    modality: str | None = None
    """The modality of the encoders that it can hold, if not any."""
    encoder: str | None = None
    """The one encoder that it can hold, if not any."""
    own_heads: bool = True
    """It has a place only for the captions' projection of its own text encoder."""
    holds_bias: bool = False
    """It has a place for the `logit_bias` of loss.sigmoid."""

    def refusal(self, export: Export) -> str:
        """Why a model cannot be written in this layout; empty if it can."""
        encoder = export.config.encoder
        if self.modality not in (None, encoder.modality):
            return f"its encoder embeds {'images' if encoder.modality == 'image' else 'audio'}"
        if self.encoder not in (None, encoder.encoder):
            return f"its encoder is {encoder.encoder}, not {self.encoder}"
        if self.own_heads and (why_not := export.why_not_own_heads):
            return why_not
        return self.why_not(export)
