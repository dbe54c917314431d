"""Prompts for the language model, and chat templates.

Source: the prompt `paper` is FLAP's (section 5), with names for its slots; the paper does not print
its prompt without events. `tags` is for no language model. Chat templates: FastChat's
`vicuna_v1.1`, Stanford Alpaca, Llama 2 and ChatML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flap_fast.checks import require
from flap_fast.tools.enrich.events import Tag

PROMPTS = {
    "paper": "Describe a situation with {events} sounds and combine it with the {caption} "
    "together.",
    "tags": "{caption}, {events}",
    "rewrite": "Rewrite the following sound description in one fluent sentence: {caption}",
}

# And `own`: the template of the model's tokenizer.
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
    """A text with the slot `{caption}` and, with a tagger, `{events}`."""

    text: str

    @property
    def instruction(self) -> str:
        """The text without its slots."""
        return self.text.replace("{events}", " ").replace("{caption}", " ")

    def fill(self, events: Sequence[Tag], caption: str) -> str:
        """Fill the slots with event names between commas, and the caption without a final stop."""
        # In one pass: a caption may contain braces or the name of a slot.
        before, _, after = self.text.partition("{caption}")
        names = ", ".join(name for name, _ in events)
        plain = " ".join(caption.split()).rstrip(".!?")
        return f"{before.replace('{events}', names)}{plain}{after.replace('{events}', names)}"


def prompt(value: str | None, *, events: bool, model: bool = True) -> Prompt:
    """Return a prompt by its name or its text; by default the one for a tagger or for none.

    Args:
        events: a tagger gives them.
        model: a language model answers it.

    Raises:
        ConfigError: a slot is missing or unexpected.
    """
    default = ("paper" if model else "tags") if events else "rewrite"
    asked = value in ("paper", "rewrite") and not model
    rule = "be tags or a text with --model none: it is the caption, and asks nobody"
    require(not asked, "--prompt", rule, value)
    text = PROMPTS.get(value or default, value or "")
    named = f"one of {', '.join(PROMPTS)}, or a text"
    rule = f"be {named} with {{caption}} once"
    require(text.count("{caption}") == 1, "--prompt", rule, value)
    rule = f"hold {{events}} with a tagger and not without one ({named})"
    require(("{events}" in text) == events, "--prompt", rule, value)
    return Prompt(text)
