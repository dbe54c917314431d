"""Captions -> token ids, padded to the batch's own longest, never to 77; towers may pack them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, ByT5Tokenizer

from flap_fast.checks import ConfigError, need
from flap_fast.config import Text

_MULTIPLE = 8  # tensor cores' tiles, and fewer shapes to compile for
_REMEDY = "for example: hf download FacebookAI/roberta-base --local-dir models/roberta-base"


@dataclass(frozen=True)
class Tokenizer:
    """Cuts captions to `max_tokens` and pads a batch of them."""

    inner: Any
    max_tokens: int

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L) int64 ids and (B, L) int64 mask, 1 on tokens; L is a multiple of 8."""
        # Cut first, pad after: transformers refuses both at once for 77, no multiple of 8.
        cut = self.inner(list(captions), truncation=True, max_length=self.max_tokens)
        encoded = self.inner.pad(cut, pad_to_multiple_of=_MULTIPLE, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]


def tokenizer(text: Text) -> Tokenizer:
    """The tokenizer of a text tower, from its folder; nothing is fetched from a hub.

    Raises:
        ConfigError: no such folder, or no tokenizer in it.
    """
    if text.folder is None and text.tokenizer == "bytes":
        return Tokenizer(ByT5Tokenizer(), text.max_tokens)
    name = "text.folder" if text.folder is not None else "text.tokenizer"
    folder = local_folder(name, text.folder or text.tokenizer)
    try:
        inner = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} must hold a tokenizer, got '{folder}': {error}") from None
    return Tokenizer(inner, text.max_tokens)


def local_folder(name: str, value: str, remedy: str = _REMEDY) -> Path:
    """A setting's folder: a path, or `package:NAME/sub/folder` inside an installed package."""
    if not value.startswith("package:"):
        need(Path(value).is_dir(), name, "be an existing folder", value, remedy)
        return Path(value)
    package, _, inside = value.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    need(
        spec is not None and bool(spec.submodule_search_locations),
        name,
        "name an installed package",
        value,
        f"pip install {package.replace('_', '-')}",
    )
    folder = Path(spec.submodule_search_locations[0]) / inside  # type: ignore[index,union-attr]
    need(folder.is_dir(), name, "be a folder inside the package", value)
    return folder
