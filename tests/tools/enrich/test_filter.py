"""The filter: what a model wrote becomes a caption, or the original stays, and why."""

from __future__ import annotations

import pytest

from flap_fast.tools.enrich.filter import REASONS, caption_or_reason, is_complete
from flap_fast.tools.enrich.prompts import PROMPTS, Prompt


def judged(written: str, *, prompt: str = "paper", cut_off: bool = False, most_tokens: int = 77):
    return caption_or_reason(
        written,
        instruction=Prompt(PROMPTS[prompt]).instruction,
        events="Dog Bark",
        original="A dog barks at night.",
        cut_off=cut_off,
        tokens=lambda text: len(text.split()),
        most_tokens=most_tokens,
    )


@pytest.mark.parametrize(
    ("written", "caption"),
    [
        ("  A dog barks in a yard. \n", "A dog barks in a yard."),
        ("A dog barks. Rain falls. A car passes.", "A dog barks. Rain falls."),
        ("A dog barks\n\nRain falls on it\nmore", "A dog barks Rain falls on it"),
        ('"A dog barks in a yard."', "A dog barks in a yard."),
        ("A dog barks at 3.5 m. then stops. So.", "A dog barks at 3.5 m. then stops. So."),
        (
            '"Stop!" A dog barks, and he says "No." Rain falls.',
            'Stop! A dog barks, and he says "No."',
        ),
        ("Sure! Here is one:\n\nA dog barks as rain falls.", "Sure! A dog barks as rain falls."),
        ("A dog\u2019s bark echoes.", "A dog's bark echoes."),
    ],
)
def test_the_first_two_sentences_are_the_caption(written, caption):
    assert judged(written) == (caption, None)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "empty"),
        (" \n ... \n", "empty"),
        ("Here is your caption:", "empty"),
        ("I'm sorry, but I can't describe dogs.", "refusal"),
        ("As an AI language model, I hear no dog barking.", "refusal"),
        ("A dog barks. Unfortunately, I cannot go on.", "refusal"),
        ("I don\u2019t have ears for a dog.", "refusal"),
        ("Describe a situation with Dog sounds and combine it with the night.", "echo"),
        ("A dog barks. COMBINE it with  the night!", "echo"),
        ("Dog, Bark sounds and together.", "echo"),
        ("A cat sleeps in a quiet room.", "stray"),
        ("a dog BARKS, at night", "unchanged"),
    ],
)
def test_the_original_stays_for_a_reason(written, reason):
    assert judged(written) == (None, reason)
    assert reason in REASONS


def test_the_other_prompt_is_recognised_too():
    echo = "Rewrite the following sound description: a dog barks."
    assert judged(echo, prompt="rewrite") == (None, "echo")
    assert judged(echo) == (echo, None)


@pytest.mark.parametrize(
    "written",
    [
        "A dog barks. Rain falls. A car passes by. The end.",
        "Sure! Here is one:\n\nA dog barks at 3.5 m. then stops. Rain falls. More",
        'A dog barks at\n"Rain falls"\n\n\nA car:\nmore\n',
        "A dog barks.\n\nRain\u2019s end.\n\nThe end",
    ],
)
def test_writing_may_stop_as_soon_as_the_rest_cannot_change_the_caption(written):
    enough = [is_complete(written[:n]) for n in range(len(written) + 1)]
    first = enough.index(True)
    assert all(enough[first:])
    caption, _ = judged(written)
    assert caption
    for n in range(first, len(written)):
        assert judged(written[:n], cut_off=True) == (caption, None)
    assert not is_complete("A dog barks. Rain falls.")


def test_a_caption_longer_than_a_tower_reads_is_refused():
    assert judged("A dog barks in a yard.", most_tokens=6) == ("A dog barks in a yard.", None)
    assert judged("A dog barks in a yard.", most_tokens=5) == (None, "long")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("A dog barks in the dark and", (None, "long")),
        ("A dog barks. Then it", ("A dog barks.", None)),
        ("A dog barks. It rains. Then it", ("A dog barks. It rains.", None)),
        ("A dog barks in the dark.", ("A dog barks in the dark.", None)),
        ("I'm sorry, but I cannot describe a", (None, "refusal")),
    ],
)
def test_a_sentence_that_was_cut_off_is_left_out(written, expected):
    assert judged(written, cut_off=True) == expected
