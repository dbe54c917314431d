"""Starts the server of `tests.ranks` early, so that its imports overlap with the first tests."""

from __future__ import annotations

import pytest

from tests.ranks import start_server


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start it if tests that run on several ranks were collected."""
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    if not session.config.option.collectonly and any(hasattr(m, "on_ranks") for m in modules):
        start_server()
