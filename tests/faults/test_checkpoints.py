"""Damaged checkpoints: the saved weights bit for bit, or the file that changed is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.checksums import SUMS
from flap_fast.config import Config
from flap_fast.data.shards import Shards, open_shards
from flap_fast.model.model_folder import load_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.checkpoint import Checkpoints
from flap_fast.training.loop import train
from flap_fast.training.optimizer_state import OptimizerState, whole_fragments
from tests.faults.cases import assert_sentence, run_cases, sampled
from tests.faults.damage import edited, leaves, of_bytes, value
from tests.tiny import tiny


class Saved(NamedTuple):
    """A run of four steps, with checkpoints 2 and 4, and the weights of the latter."""

    config: Config
    folder: Path
    data: Shards
    weights: dict[str, Tensor]
    model: TwoTowers

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints/step-000004"


@pytest.fixture(scope="module")
def saved(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    # The config's bytes, and so what a case damages, are the same wherever the tests run.
    folder = tmp_path_factory.mktemp("saved")
    os.symlink(prepared, folder / "data")
    with chdir(folder):
        config = tiny(
            *("run.folder=runs", "data.train=data/train", "sched.warmup_steps=2"),
            *("audio.depth=1", "text.depth=1", "ckpt.every_steps=2", "log.tensorboard=false"),
        )
        train(config)
        weights = load_file(config.run_folder / "checkpoints/step-000004/model.safetensors")
        model, _ = load_model(config.run_folder)  # what it imports is no case's memory
        yield Saved(config, config.run_folder, open_shards(config.data.train), weights, model)


def of_file(draw: Random, file: Path) -> None:
    """Bytes of a file."""
    file.write_bytes(of_bytes(file.read_bytes(), draw)[0])


def of_place(draw: Random, file: Path) -> None:
    """A file that is gone, empty, a folder, a link to nothing, or that of another step."""
    how = draw.choice(("gone", "empty", "folder", "link", "other", "old"))
    file.unlink()
    other = file.parent.parent / "step-000002" / file.name
    if how == "empty":
        file.touch()
    elif how == "folder":
        file.mkdir()
    elif how == "link":
        os.symlink("nowhere", file)
    elif how in ("other", "old") and other.is_file():
        shutil.copy(other, file)


def of_value(draw: Random, file: Path) -> None:
    """A value of a JSON file, or of a tensor or its header, in a file that is whole."""
    if file.suffix == ".json":
        tree = json.loads(file.read_text())
        if path := draw.choice(leaves(tree)):
            file.write_text(json.dumps(edited(tree, path, value(draw))))
        return None
    if file.suffix != ".safetensors":
        return of_file(draw, file)
    if draw.random() < 0.25:
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        header = json.dumps(edited(header, draw.choice(leaves(header)), value(draw))).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
        return None
    tensors = load_file(file)
    name, other = draw.sample(sorted(tensors), 2)
    how = draw.choice(("nan", "nan", "nan", "type", "shape", "gone", "more", "swapped"))
    if how == "nan":
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = draw.choice((float("nan"), float("inf")))
    elif how == "type":
        tensors[name] = tensors[name].to(torch.int32)
    elif how == "shape":
        tensors[name] = tensors[name].reshape(-1)[:-1].clone()
    elif how == "gone":
        del tensors[name]
    elif how == "more":
        tensors["more"] = torch.zeros(2)
    else:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return None


def of_code(draw: Random, file: Path) -> None:
    """A class of the folder's own in one of transformers' files, or what `of_value` does."""
    if not re.fullmatch(r".*config.*\.json", file.name):
        return of_value(draw, file)
    code = {"AutoTokenizer": ["own.Tokenizer", None], "AutoModel": "own.Model"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": code}))
    return None


def resumed(saved: Saved, folder: Path) -> None:
    """Read what a run would go on from; raises as a run does."""
    config = saved.config.model_copy(
        update={"run": saved.config.run.model_copy(update={"folder": folder.parent})}
    )
    checkpoints = Checkpoints(config, Ranks(), saved.data)
    last = folder / "checkpoints/step-000004"
    checkpoints.state(last)
    with checkpoints.verified(last):
        load_file(last / "model.safetensors")
        optimizer = torch.optim.AdamW(saved.model.parameters())
        fragments = whole_fragments(optimizer, saved.model)
        state = OptimizerState(optimizer, fragments, Ranks(), sharded=False)
        state.load(last / "optimizer.safetensors")
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert values
    assert all(value.isfinite().all() for value in values), "a state of Adam that is not finite"


def damage_and_read(saved: Saved, draw: Random, place: Path, *, sums: bool) -> str:
    folder = shutil.copytree(saved.folder, place / saved.folder.name, symlinks=True)
    last = folder / "checkpoints/step-000004"
    if not sums:
        (last / SUMS).unlink()
    files = sorted(file for file in last.rglob("*") if file.is_file())
    tensors = [file for file in files if file.suffix == ".safetensors"]
    file = draw.choice(draw.choice((files, files, tensors)))
    whole = file.read_bytes()
    damage = draw.choice((of_file, of_file, of_place, of_value, of_value, of_code))
    damage(draw, file)
    same = file.is_file() and file.read_bytes() == whole
    named = (file.name, file.parent.name, "text", "step-")
    if file.name == "config.yaml":
        named += (" must ", " is not a setting")  # which it names
    kind = f"{damage.__name__[3:]} of {file.suffix or file.name}"
    outcomes = []
    for read in (lambda: load_model(last), lambda: resumed(saved, folder)):
        with torch.no_grad(), errors_name(*named) as refused:
            found = read()
            if found is not None:
                weights = found[0].state_dict()
                for name, tensor in saved.weights.items():
                    assert not sums or torch.equal(weights[name], tensor), f"{name} changed"
                    assert weights[name].isfinite().all(), f"{name} is not finite"
        outcomes.append(bool(refused))
    if sums and not same and file.name not in (SUMS, "state.json", "optimizer.safetensors"):
        assert outcomes[0], f"{kind}: loaded as if nothing had changed"
    as_it_was = file.name == "state.json" and _values(file) == _values_of(whole)
    if sums and not same and not as_it_was and file.name != SUMS:
        assert outcomes[1], f"{kind}: gone on from as if nothing had changed"
    assert not same or not any(outcomes), f"{kind}: refused though nothing changed"
    own = file.is_file() and b'"auto_map": {"AutoTokenizer"' in file.read_bytes()
    assert not own or outcomes[0], f"{kind}: code of its own is not refused"
    return ("load refused" if outcomes[0] else "loaded") + (", resume refused" * outcomes[1])


def _values(file: Path) -> dict[str, Any] | None:
    return _values_of(file.read_bytes()) if file.is_file() else None


def _values_of(data: bytes) -> dict[str, Any] | None:
    """A state's values; one that is none may be left out. None if it is no JSON object."""
    try:
        return {name: value for name, value in json.loads(data).items() if value is not None}
    except (ValueError, AttributeError):
        return None


@contextmanager
def errors_name(*named: str) -> Iterator[list[ConfigError]]:
    """A list that gets the `ConfigError` of the body, which must be a sentence."""
    found: list[ConfigError] = []
    try:
        yield found
    except ConfigError as error:
        for line in str(error).splitlines():
            if not line.startswith(" "):
                assert_sentence(ConfigError(line), *named)
        found.append(error)


def try_checkpoints(kind: str, cases, tmp_path: Path, saved: Saved, *, sums: bool) -> None:
    def check(draw: Random, place: Path) -> str:
        found = damage_and_read(saved, draw, place, sums=sums)
        shutil.rmtree(place)
        return found

    run_cases(kind, cases, check, tmp_path)


@sampled(40, 300)
def test_a_damaged_checkpoint_is_bit_equal_or_its_file_is_named(
    cases, tmp_path: Path, saved: Saved
):
    try_checkpoints("checkpoints", cases, tmp_path, saved, sums=True)


@sampled(20, 100)
def test_a_damaged_checkpoint_without_sums_is_finite_or_refused(
    cases, tmp_path: Path, saved: Saved
):
    try_checkpoints("older checkpoints", cases, tmp_path, saved, sums=False)
