"""docs/settings.md says what the settings are."""

from __future__ import annotations

from pathlib import Path

from flap_fast.config import Config
from flap_fast.config.reference import settings_reference
from flap_fast.encoders import ENCODERS
from flap_fast.section import Section

PAGE = Path(__file__).parents[1] / "docs/settings.md"


def sections() -> list[type[Section]]:
    arms = [arm for arms in ENCODERS.values() for arm in arms.values()]
    found: list[type[Section]] = [*arms]
    todo: list[type[Section]] = [Config]
    while todo:
        for name, field in todo.pop().model_fields.items():
            if isinstance(field.default, Section) and name not in ENCODERS:
                found.append(type(field.default))
                todo.append(type(field.default))
    return found


def test_the_page_is_made_of_the_fields():
    remedy = "python -m flap_fast.config.reference > docs/settings.md"
    assert PAGE.read_text() == settings_reference(), f"write it again: {remedy}"


def test_every_setting_stands_there_with_its_docstring():
    page = PAGE.read_text()
    for section in sections():
        for name, field in section.model_fields.items():
            if not isinstance(field.default, Section):
                assert field.description, f"{section.__name__}.{name} has no docstring"
                assert f".{name}`" in page
