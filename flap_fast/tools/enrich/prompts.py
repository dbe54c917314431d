"""What a language model is asked, and how its chat is laid out.

Source: the prompt is the paper's (FLAP, section 5, its slots named here); its prompt without
events is not printed. Chat layouts: FastChat's `vicuna_v1.1`, Stanford Alpaca, Llama 2, ChatML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flap_fast.checks import require
from flap_fast.tools.enrich.events import Tag

PROMPTS = {
    "paper": "Describe a situation with {events} sounds and combine it with the {caption} "
    "together.",
    "rewrite": "Rewrite the following sound description in one fluent sentence: {caption}",
}

# `own` is not among them: the one that the model's tokenizer carries.
CHATS = {
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: {prompt} ASSISTANT:",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n",
    "llama2": "[INST] {prompt} [/INST]",
    "chatml": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "plain": "{prompt}",
}


@dataclass(frozen=True)
class Prompt:
    """A text with the slots `{caption}` and, where there is a tagger, `{events}`."""

    text: str

    @property
    def instruction(self) -> str:
        """It without its slots."""
        return self.text.replace("{events}", " ").replace("{caption}", " ")

    def fill(self, events: Sequence[Tag], caption: str) -> str:
        """Event names as they are, between commas; the caption without its last full stop."""
        # In one pass: a caption may hold a brace, or a slot's very name.
        before, _, after = self.text.partition("{caption}")
        names = ", ".join(name for name, _ in events)
        spoken = caption.strip().removesuffix(".")
        return f"{before.replace('{events}', names)}{spoken}{after.replace('{events}', names)}"


def prompt(value: str | None, *, events: bool) -> Prompt:
    """A prompt by its name, or the text itself; by whether there are events when not given.

    Raises:
        ConfigError: a slot is missing, or is one too many.
    """
    text = PROMPTS.get(value or ("paper" if events else "rewrite"), value or "")
    named = f"one of {', '.join(PROMPTS)}, or a text"
    rule = f"be {named} with {{caption}} once"
    require(text.count("{caption}") == 1, "--prompt", rule, value)
    rule = f"hold {{events}} with a tagger and not without one ({named})"
    require(("{events}" in text) == events, "--prompt", rule, value)
    return Prompt(text)
