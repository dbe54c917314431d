"""What the works of these tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.works import Inputs


@pytest.fixture(scope="module")
def inputs(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Sounds, shards of them, and a model of random weights."""
    from flap_fast.model.model_folder import save_model
    from flap_fast.model.two_towers import TwoTowers
    from tests.tiny import tiny

    folder = tmp_path_factory.mktemp("model")
    config = tiny("audio.depth=1", "text.depth=1")
    model = TwoTowers(config)
    save_model(folder, config, model, model.state_dict())
    return Inputs(corpus, prepared, folder)
