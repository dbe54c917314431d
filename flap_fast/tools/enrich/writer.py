"""What answers prompts: a language model (`rewrite.LanguageModel`), or nothing but the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Written:
    """An answer."""

    text: str
    cut_off: bool
    """Generation was stopped: after `most_tokens`, or after the sentences of a caption."""


class Writer(Protocol):
    """Answers prompts."""

    @property
    def name(self) -> str:
        """The value of --model."""
        ...

    @property
    def is_caption(self) -> bool:
        """Whether an answer is the caption as it is, so that none needs to be found in it."""
        ...

    def __call__(self, prompts: Sequence[str], keys: Sequence[int]) -> list[Written]:
        """Answer each prompt; the same key gives the same answer, whatever the batch holds."""
        ...

    def tokens(self, text: str) -> int:
        """Count the tokens of a text."""
        ...


class PromptItself:
    """A `Writer` without a model: the caption is the prompt with its slots filled."""

    name, is_caption = "none", True

    def __call__(self, prompts: Sequence[str], keys: Sequence[int]) -> list[Written]:
        return [Written(prompt, False) for prompt in prompts]

    def tokens(self, text: str) -> int:
        """Words: nothing is left out for its length, which a text encoder cuts."""
        return len(text.split())
