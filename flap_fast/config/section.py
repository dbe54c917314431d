"""What every section is made of: frozen, and strict about names and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Ratio = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Folders = Annotated[
    tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, (str, Path)) else v)
]


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
