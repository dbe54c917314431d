"""What many tests share: a synthetic corpus and its shards, written once a session."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.sounds import write_corpus

if TYPE_CHECKING:
    import torch

# Before torch is imported: many small tests on few cores are faster without its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without a search for garbage; what is imported until then stays to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)  # of 554 tests' CPU time 2 % less
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs what is not here, and begin with the files of tests over ranks.

    The closing line counts what is left out as deselected. Of two processes that take file after
    file, one would be idle at the end while the other still had a long one, and those are long.
    """
    import torch

    here = {
        "gpu": torch.cuda.is_available(),
        "browser": shutil.which("chromium") is not None,
        "ray": importlib.util.find_spec("ray") is not None,
    }
    away = [name for name, there in here.items() if not there]
    out = [item for item in items if any(item.get_closest_marker(name) for name in away)]
    config.hook.pytest_deselected(items=out)
    gone = set(out)
    items[:] = [item for item in items if item not in gone]
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "on_ranks"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 30 sounds, the last 6 of them for validation."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), 30, val=6)


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as shards of 7 clips: OUT/train/{0..3}.tar, OUT/val/0.tar."""
    from flap_fast.preparation.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(corpus, out, shard_clips=7, threads=2, show=False)
    return out


@pytest.fixture(scope="session")
def roberta_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa of random weights with a byte-level BPE tokenizer, as transformers saves them."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    folder = tmp_path_factory.mktemp("roberta")
    bpe = ByteLevelBPETokenizer()
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    text = ["a dog barks", "rain falls on a roof", "a tone that rises"] * 3
    bpe.train_from_iterator(text, vocab_size=300, min_frequency=2, special_tokens=marks)
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizerFast(f"{folder}/vocab.json", f"{folder}/merges.txt")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    RobertaModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch.compile without the compiler behind it; the graphs it was handed, by their size."""
    import torch

    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    whole = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    return found
