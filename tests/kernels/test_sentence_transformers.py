"""The loss with sentence-transformers' signature: its values, gradients and training."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flap_kernels.infonce import infonce_reference
from flap_kernels.sentence_transformers import MultipleNegativesRankingLoss
from tests.ranks import on_ranks

KERNELS = Path(__file__).parents[2] / "kernels"
THEIRS = "sentence_transformers.sentence_transformer.losses"
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"scale": 50.0},
    {"partition_mode": "per_direction"},
    SYMMETRIC,
]


class Model(nn.Module):
    """A linear layer with the interface of a SentenceTransformer."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(6, 8, generator=draw, dtype=torch.float64))

    def forward(self, features):
        return features | {"sentence_embedding": features["input"] @ self.weight}


def features(columns, B=12):
    """A batch of `columns` texts for each row: anchors, positives that are alike, and negatives."""
    draw = torch.Generator().manual_seed(2)
    anchor = torch.randn(B, 6, generator=draw, dtype=torch.float64)
    noise = [torch.randn(B, 6, generator=draw, dtype=torch.float64) for _ in range(columns - 1)]
    return [{"input": x} for x in (anchor, anchor + noise[0], *noise[1:])]


def value_and_gradient(loss, columns):
    """The loss, and the gradient of its model."""
    value = loss(iter(columns), None)
    value.backward()
    (weight,) = loss.model.parameters()
    return value.detach(), weight.grad


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_infonce_of_normalised_columns(settings, columns):
    batch = features(columns)
    model = Model()
    anchors, *documents = (F.normalize(x["input"] @ model.weight, dim=1) for x in batch)
    direction = "symmetric" if "directions" in settings else "a2t"
    scale = torch.tensor(settings.get("scale", 20.0), dtype=torch.float64)
    exact = infonce_reference(anchors, torch.cat(documents), scale, direction=direction)
    exact.backward()
    found = value_and_gradient(MultipleNegativesRankingLoss(Model(), **settings), batch)
    torch.testing.assert_close(found, (exact.detach(), model.weight.grad), rtol=1e-11, atol=1e-13)


def test_what_it_cannot_do_is_refused_by_name():
    for name, value in {
        "scale": 0.0,
        "similarity_fct": torch.dot,
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "none",
        "hardness_mode": "all_negatives",
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            MultipleNegativesRankingLoss(Model(), **{name: value})
    with pytest.raises(ValueError, match="embeddings must be of anchors and positives"):
        MultipleNegativesRankingLoss(Model())(features(2)[:1])
    loss, x = MultipleNegativesRankingLoss(Model()), torch.rand(6, 4)
    for i, columns in ((1, [x, x[:5], x]), (2, [x, x, x[:3]]), (1, [x, x[:, :3]])):
        with pytest.raises(ValueError, match=rf"^embeddings\[{i}\] must be \(b, D\) like the anch"):
            loss.compute_loss_from_embeddings(columns)


def test_it_does_without_sentence_transformers():
    code = (
        "import sys, flap_kernels.sentence_transformers\n"
        "assert 'sentence_transformers' not in sys.modules"
    )
    env = os.environ | {"PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("settings", SETTINGS)
def test_sentence_transformers_has_these_values_and_gradients(settings, columns):
    theirs: Any = pytest.importorskip(THEIRS)
    cos_sim = importlib.import_module("sentence_transformers.util").cos_sim
    found, exact = (
        value_and_gradient(loss(Model(), similarity_fct=cos_sim, **settings), features(columns))
        for loss in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss)
    )
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-13)


def averaged(cuts, columns, settings, module):
    """On one rank: the loss and the gradient as DDP leaves it; ours, and the module's if any."""
    rank = dist.get_rank()
    batch = [{"input": x["input"][cuts[rank] : cuts[rank + 1]]} for x in features(columns)]
    losses: list[Any] = [MultipleNegativesRankingLoss]
    if module:
        losses.append(importlib.import_module(module).MultipleNegativesRankingLoss)
    found = []
    for loss in losses:
        model = DistributedDataParallel(Model())
        made = loss(model, gather_across_devices=True, **settings)
        found.append(value_and_gradient(made, batch))
    return found


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("cuts", [(0, 6, 12), (0, 5, 12)])
def test_under_ddp_it_is_the_loss_of_all_ranks(cuts, columns):
    exact = value_and_gradient(
        MultipleNegativesRankingLoss(Model(), **SYMMETRIC), features(columns)
    )
    for (ours,) in on_ranks(2, averaged, cuts, columns, SYMMETRIC, None):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("settings", [{}, SYMMETRIC], ids=["a2t", "symmetric"])
def test_over_ranks_the_gradients_are_sentence_transformers(settings, columns):
    pytest.importorskip(THEIRS)
    by_rank = on_ranks(2, averaged, (0, 6, 12), columns, settings, THEIRS)
    mean = torch.stack([theirs[0] for _, theirs in by_rank]).mean()
    for ours, theirs in by_rank:
        torch.testing.assert_close(ours[0], mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-13)


def tiny_sentence_transformer(folder):
    """A SentenceTransformer of two layers with a vocabulary of whole words and random weights."""
    transformers = importlib.import_module("transformers")
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"{kind}{i}" for kind in ("anchor", "positive", "negative") for i in range(16)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), num_hidden_layers=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **sizes,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    layers = [modules.Transformer(str(folder)), modules.Pooling(32)]
    whole = importlib.import_module("sentence_transformers").SentenceTransformer
    return whole(modules=layers, device="cpu")


def test_sentence_transformers_own_trainer_learns_the_same_with_it(tmp_path):
    theirs: Any = pytest.importorskip(THEIRS)
    pytest.importorskip("accelerate")
    datasets = pytest.importorskip("datasets")
    library = importlib.import_module("sentence_transformers")
    rows = {kind: [f"{kind}{i}" for i in range(16)] for kind in ("anchor", "positive", "negative")}
    logs = []
    for loss in (MultipleNegativesRankingLoss, theirs.MultipleNegativesRankingLoss):
        model = tiny_sentence_transformer(tmp_path / loss.__module__)
        arguments = library.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"), num_train_epochs=10, per_device_train_batch_size=8,
            learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = library.SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows),
            loss=loss(model),
        )  # fmt: skip
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        model.save_pretrained(str(tmp_path / "saved"))  # its model card asks the loss for settings
    ours, exact = logs
    assert len(ours) == 20
    assert ours[-1] < 0.2 * ours[0]
    assert ours == pytest.approx(exact, rel=1e-2, abs=1e-3)


def test_an_embedding_of_zeros_is_no_nan_in_float16():
    rows = [torch.randn(6, 16).half() for _ in range(2)]
    rows[1][2] = 0
    loss = MultipleNegativesRankingLoss(nn.Identity())
    found = [x.requires_grad_() for x in rows]
    value = loss.compute_loss_from_embeddings(found)
    value.backward()
    assert value.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in found)
