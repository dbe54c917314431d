"""The registry of layouts: a new one is a record, and a model that no layout holds is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.interchange import convert
from flap_fast.interchange.convert import export_checkpoint, import_checkpoint
from flap_fast.interchange.layout import Export, Imported, Layout, Source
from flap_fast.interchange.tensors import save_pickle
from flap_fast.model.model_folder import load_weights, save_model
from flap_fast.model.two_towers import TwoTowers
from tests.tiny import tiny


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    config = tiny()
    model = TwoTowers(config)
    save_model(tmp_path / "model", config, model, model.state_dict())
    return tmp_path / "model"


def test_a_layout_is_added_by_one_record(model_folder: Path, tmp_path: Path, monkeypatch):
    def matches(source: Source) -> bool:
        return all(name.startswith("mine.") for name in source.tensors)

    def read(source: Source) -> Imported:
        tensors = {name.removeprefix("mine."): t for name, t in source.tensors.items()}
        return Imported(tiny(*source.overrides), tensors)

    def write(export: Export, out: Path) -> str:
        save_pickle(out, {f"mine.{name}": value for name, value in export.weights.items()})
        return "my layout"

    mine = Layout("mine (mine...)", "file", matches, read, write)
    monkeypatch.setattr(convert, "LAYOUTS", (mine, *convert.LAYOUTS))
    assert export_checkpoint(model_folder, tmp_path / "a.pt") == "my layout"
    import_checkpoint(tmp_path / "a.pt", tmp_path / "back")
    ours, back = load_weights(model_folder), load_weights(tmp_path / "back")
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    torch.save({"theirs.weight": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(ConfigError, match=r"have mine \(mine\.\.\.\), LAION-CLAP's .* or YAMNet"):
        import_checkpoint(tmp_path / "b.pt", tmp_path / "x")


def test_a_model_that_no_layout_holds_is_refused(model_folder: Path, tmp_path: Path, monkeypatch):
    kinds: dict[str, dict[str, Any]] = {
        "images": {"modality": "image"},
        "other": {"encoder": "other"},
        "never": {"why_not": lambda export: "it is no use"},
    }
    unused: Any = None
    layouts = [
        Layout(name, "file", unused, unused, lambda *_: "written", **kind)
        for name, kind in kinds.items()
    ]
    monkeypatch.setattr(convert, "LAYOUTS", layouts)
    with pytest.raises(ConfigError) as error:
        export_checkpoint(model_folder, tmp_path / "a.pt")
    for reason in (
        "not images: its encoder embeds audio",
        "not other: its encoder is vit, not other",
        "not never: it is no use",
    ):
        assert reason in str(error.value)
