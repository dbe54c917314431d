"""The base of every section of settings: frozen, and strict about names and numbers.

What a setting implies elsewhere stands on its field, as a mark in `Annotated[...]`, never in a list
of names far away:

    heads: Annotated[Count, MEANS_WEIGHTS] = 4      weights mean something else with another value

A mark on a field that is a section marks all of the section's fields.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flap_fast.hub import on_hub
from flap_fast.places import Url, Weighted, on_disk, shared_name

Ratio = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Depth = Annotated[int, Field(ge=1, le=1000)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Folders = Annotated[
    tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, (str, Path)) else v)
]


class Mark(Enum):
    """An effect of a setting outside its own section."""

    MEANS_WEIGHTS = "part of what weights mean, and no tensor's shape tells it"
    FREE_ON_RESUME = "may change when a run is resumed: it moves no weight"
    AFTER_FRONT_END = "does not change a cached log-mel"
    NAMES_FILES = "names files of this machine: a model that is shared has only their last part"
    NAMES_MODEL = "names a model: a folder, or hf://OWNER/NAME"
    NAMES_ACCOUNT = "names an account: a model that is shared has the default"


MEANS_WEIGHTS, FREE_ON_RESUME, AFTER_FRONT_END, NAMES_FILES, NAMES_MODEL, NAMES_ACCOUNT = Mark


class Section(BaseModel):
    """Frozen settings; an unknown name is refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, tree):
        """`mask:` with all its lines commented out means the defaults."""
        return {} if tree is None else tree

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps: true` is no number, though Python takes it for 1."""
        takes = str(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, (list, tuple)) else (value,)
        numbers = re.search("int|float", takes) and "bool" not in takes
        if numbers and any(isinstance(one, bool) for one in values):
            raise PydanticCustomError("no_number", "must not be true or false")
        return value

    @field_validator("*")
    @classmethod
    def _files(cls, value: Any, info: ValidationInfo) -> Any:
        """`run.folder: s3://bucket` is no folder `s3:` beside the others."""
        marks = cls.model_fields[str(info.field_name)].metadata
        for path in value if isinstance(value, tuple) else (value,):
            prompt_or_place = isinstance(path, Url) or "{" in str(path)
            if NAMES_FILES not in marks or prompt_or_place:
                continue
            if isinstance(path, (str, Path)) and not (NAMES_MODEL in marks and on_hub(path)):
                on_disk(path)
        return value

    def marked(self, mark: Mark) -> dict[str, Any]:
        """The settings that carry a mark, by their names inside this section: {"a.b": value}."""
        return {name: value for name, (value, marks) in self._settings().items() if mark in marks}

    def shareable(self) -> Self:
        """The same settings without folders and accounts of whoever trained."""
        update: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Section):
                update[name] = value.shareable()
            elif NAMES_FILES in field.metadata:
                update[name] = _last_part(value)
            elif NAMES_ACCOUNT in field.metadata:
                update[name] = field.get_default()
        return self.model_copy(update=update)

    def _settings(self, above: frozenset[Mark] = frozenset()) -> dict[str, Any]:
        """Each setting's value and marks, by its dotted name."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            marks = above | {mark for mark in field.metadata if isinstance(mark, Mark)}
            if isinstance(value, Section):
                inside = value._settings(marks)
                found |= {f"{name}.{inner}": setting for inner, setting in inside.items()}
            else:
                found[name] = value, marks
        return found


def _last_part(value: Any) -> Any:
    """The last part of a path or URL, "." where that would name an account or a host.

    A prompt, a name of the Hub or of a package is no path.
    """
    if isinstance(value, tuple):
        return tuple(map(_last_part, value))
    if isinstance(value, Weighted):
        return Weighted(_last_part(value.path), value.weight)
    text = "" if value is None else str(value)
    prompt = type(value) is str and "{" in text
    if not text or prompt or text.startswith("package:") or on_hub(text):
        return value
    last = shared_name(value if isinstance(value, Url) else Path(text)) or "."
    return last if type(value) is str else Path(last)
