"""open_clip's losses and its trainer's metrics, on embeddings of real sounds and captions."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from flap_fast.evaluation.retrieval import retrieval
from flap_kernels.open_clip import ClipLoss, SigLipLoss

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def embeddings(clips, exact) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the sounds and of their captions."""
    return exact.opened.embed_audio(clips.files), exact.opened.embed_text(clips.captions)


@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_losses_and_gradients_are_the_same(embeddings, largest, loss):
    peer = getattr(import_module("open_clip.loss"), loss.__name__)()
    found = []
    for one in (loss(), peer):
        leaves = [*embeddings, torch.tensor(14.3), torch.tensor(-10.0)]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        given = leaves if loss is SigLipLoss else leaves[:3]
        value = one(*given)
        found.append([value.detach(), *torch.autograd.grad(value, given)])
    differences = [
        ((mine - theirs).abs().max() / theirs.abs().max()).item()
        for mine, theirs in zip(*found, strict=True)
    ]
    name = loss.__name__
    largest("open_clip", f"{name}, by its value", differences[0], 1e-6, "float32")
    largest(
        "open_clip",
        f"its gradients ({name}), by the largest",
        max(differences[1:]),
        1e-5,
        "float32",
    )


def test_its_metrics_are_the_scores_of_retrieval(embeddings, largest):
    train = pytest.importorskip("open_clip_train.train")
    audio, text = embeddings
    theirs = train.get_clip_metrics(audio, text, 1.0)
    mine = retrieval(audio, text, torch.arange(len(text)), modality="image")
    pairs = [
        (theirs[f"{way}_{metric}"], mine[way][metric])
        for way in ("image_to_text", "text_to_image")
        for metric in ("R@1", "R@5", "R@10", "mean_rank", "median_rank")
    ]
    difference = max(abs(a - b) for a, b in pairs)
    largest("open_clip", "its trainer's R@k, mean and median rank", difference, 1e-12, "")
