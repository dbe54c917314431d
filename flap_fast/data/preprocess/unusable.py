"""What is raised for clips that cannot be used."""

from __future__ import annotations


class Unusable(ValueError):
    """A clip that cannot be used, and the reason."""


class BadSound(Unusable):
    """A sound that cannot be used, and the reason."""


class Unread(BadSound):
    """A sound that the system failed to read; a retry may succeed."""
