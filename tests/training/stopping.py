"""A run that is stopped, to be resumed."""

from __future__ import annotations

import pytest

from flap_fast.config import Config
from flap_fast.training.loop import Stopped, train
from flap_fast.training.stop import Stop


def train_stopped_after(step: int, config: Config) -> None:
    """Train as if Ctrl-C came during that step."""
    asked = iter([False] * (step - 1) + [True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self: next(asked))
        with pytest.raises(Stopped):
            train(config)
