"""The paper's prompt, and the layouts of chats."""

from __future__ import annotations

import pytest

from flap_fast.checks import ConfigError
from flap_fast.tools.enrich.prompts import CHATS, prompt

TAGS = [("Ambulance (siren)", 0.9), ("Accelerating, revving, vroom", 0.3)]


def test_the_papers_wording_with_its_slots_filled():
    assert prompt(None, events=True).fill(TAGS, "A car goes by.") == (
        "Describe a situation with Ambulance (siren), Accelerating, revving, vroom sounds and "
        "combine it with the A car goes by together."
    )


def test_without_events_the_caption_is_rewritten():
    assert prompt(None, events=False).fill([], "a car") == (
        "Rewrite the following sound description in one fluent sentence: a car"
    )


def test_a_caption_with_braces_is_left_as_it_is():
    asked = prompt("{events}: {caption} {events}", events=True)
    assert asked.fill([("Dog", 1.0)], "{events} {caption} {x}") == "Dog: {events} {caption} {x} Dog"
    assert asked.instruction.split() == [":"]


@pytest.mark.parametrize(
    ("text", "events", "message"),
    [
        (
            "papre",
            True,
            "--prompt must be one of paper, tags, rewrite, or a text with {caption} once",
        ),
        (
            "{events}",
            True,
            "--prompt must be one of paper, tags, rewrite, or a text with {caption} once",
        ),
        ("{caption} {caption}", False, "with {caption} once"),
        ("paper", False, "hold {events} with a tagger and not without one"),
        ("rewrite", True, "hold {events} with a tagger and not without one"),
    ],
)
def test_a_prompt_without_its_slots_is_refused(text, events, message):
    with pytest.raises(ConfigError) as error:
        prompt(text, events=events)
    assert message in str(error.value)


def test_vicunas_layout_is_that_of_its_training():
    """FastChat, `vicuna_v1.1`: roles USER and ASSISTANT, separated by spaces."""
    assert CHATS["vicuna"].replace("{prompt}", "Hi") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hi ASSISTANT:"
    )
    assert all(layout.count("{prompt}") == 1 for layout in CHATS.values())
