"""Losses over pairs: the sigmoid loss by hand, and pairs of one clip or of equal captions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from flap_fast.config import Config
from flap_fast.data.pair_ids import pair_ids
from flap_fast.losses import total_loss
from tests.losses.test_losses import outputs_of, unit
from tests.ranks import on_ranks
from tests.tiny import tiny

SIGMOID = ("loss.contrastive.weight=0", "loss.sigmoid.weight=1")
EYE = torch.eye(2)
# The first and the last say the same; the second and the third are of one clip.
CLIPS = np.array([0, 1, 1, 2])
CAPTIONS = ["A dog barks.", "rain falls", "Rain falls hard", "a dog  barks"]
SAME = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]).bool()


def test_the_sigmoid_loss_of_two_pairs_by_hand():
    """Cosines 1 and 0 at scale 1 and bias -1 are logits 0 and -1, two of each, over 2 clips."""
    outputs = outputs_of(EYE, EYE, bias=torch.tensor(-1.0))
    terms = total_loss(outputs, tiny(*SIGMOID))
    assert list(terms) == ["sigmoid", "total"]
    assert terms["sigmoid"].item() == pytest.approx(math.log(2) + math.log1p(math.exp(-1)))


def test_only_losses_that_have_a_weight_ask_for_ids():
    assert not tiny().loss.pair_ids
    assert tiny("loss.contrastive.duplicates=mask").loss.pair_ids
    assert not tiny(*SIGMOID, "loss.contrastive.duplicates=mask").loss.pair_ids
    assert tiny(*SIGMOID, "loss.sigmoid.duplicates=positive").loss.pair_ids


def dlogits(config: Config, ids: Tensor) -> Tensor:
    """(B, B), the loss's derivatives by the cosines where all of these are 0."""
    B = len(ids)
    media = torch.zeros(B, B, requires_grad=True)
    outputs = outputs_of(media, torch.eye(B), bias=torch.tensor(-2.0), pair_ids=ids)
    total_loss(outputs, config)["total"].backward()
    assert media.grad is not None
    return media.grad


LOSSES = {"contrastive": (), "sigmoid": SIGMOID}


@pytest.mark.parametrize("loss", LOSSES)
def test_no_pairs_of_a_clip_or_of_equal_captions_are_pushed_apart_unless_ignored(loss: str):
    def of_same(duplicates: str) -> Tensor:
        config = tiny(*LOSSES[loss], f"loss.{loss}.duplicates={duplicates}")
        found = dlogits(config, pair_ids(CLIPS, CAPTIONS))
        others = ~SAME & ~torch.eye(4).bool()
        assert (found[others] > 0).all()
        assert (found.diag() < 0).all()
        return found[SAME]

    assert (of_same("ignore") > 0).all()
    assert (of_same("mask") == 0).all()
    assert (of_same("positive") < 0).all()


def test_the_losses_of_masked_and_of_positive_duplicates_by_hand():
    """Two pairs with equal captions, cosines 1 and 0 at scale 1."""
    ids = pair_ids(np.arange(2), ["rain", "Rain!"])

    def term(loss: str, duplicates: str) -> float:
        config = tiny(*LOSSES[loss], f"loss.{loss}.duplicates={duplicates}")
        bias = torch.tensor(-1.0)
        return total_loss(outputs_of(EYE, EYE, bias=bias, pair_ids=ids), config)["total"].item()

    pull, push = math.log(2), math.log1p(math.exp(-1))
    assert term("contrastive", "mask") == pytest.approx(0, abs=1e-6)
    # -log p of the own pair is log(e + 1) - 1, of the other log(e + 1).
    assert term("contrastive", "positive") == pytest.approx(math.log(math.e + 1) - 0.5)
    assert term("sigmoid", "mask") == pytest.approx(pull)
    assert term("sigmoid", "positive") == pytest.approx(pull + math.log1p(math.e))
    assert term("sigmoid", "ignore") == pytest.approx(pull + push)


def test_captions_that_embed_alike_are_positives_of_infonce_already():
    """Which of equal columns is the target changes no softmax, so that `ignore` is `positive`."""
    ids = pair_ids(np.arange(12), [*"abcdefghij", "A", "a."])

    def gradients(duplicates: str) -> list[Tensor]:
        config = tiny(f"loss.contrastive.duplicates={duplicates}")
        media, text = (unit(seed, dtype=torch.float64).requires_grad_() for seed in (0, 1))
        captions = torch.cat([text[:10], text[:1], text[:1]])
        total = total_loss(outputs_of(media, captions, pair_ids=ids), config)["total"]
        return [total.detach(), *torch.autograd.grad(total, [media, text])]

    ignored, masked, positive = map(gradients, ("ignore", "mask", "positive"))
    torch.testing.assert_close(positive, ignored, rtol=1e-6, atol=1e-8)
    assert (masked[1] - ignored[1]).abs().max() > 1e-3


def whole_total(outputs: dict[str, Tensor], duplicates: tuple[str, str]) -> Tensor:
    """InfoNCE and half of the sigmoid loss from all logits, in float64."""
    ids, own = outputs["pair_ids"], torch.eye(len(outputs["media"])).bool()
    same = (ids[:, None] == ids[None]).any(-1)
    cosines = outputs["media"].double() @ outputs["text"].double().T
    infonce = torch.zeros((), dtype=torch.float64)
    for S in (cosines, cosines.T):
        if duplicates[0] == "mask":
            S = S.masked_fill(same & ~own, -torch.inf)
        positives = own if duplicates[0] == "mask" else same
        of_pairs = S.log_softmax(1).where(positives, 0).sum(1) / positives.sum(1)
        infonce = infonce - of_pairs.mean() / 2
    logits = cosines + outputs["bias"].double()
    positives = own if duplicates[1] == "mask" else same
    asked = ~same | own if duplicates[1] == "mask" else torch.ones_like(own)
    each = logsigmoid(torch.where(positives, logits, -logits))
    return infonce - 0.5 * each.where(asked, 0).sum() / len(own)


EACH = [("mask", "positive"), ("positive", "mask")]


def config_of(duplicates: tuple[str, str]) -> Config:
    first, second = duplicates
    return tiny(
        *(f"loss.contrastive.duplicates={first}", f"loss.sigmoid.duplicates={second}"),
        "loss.sigmoid.weight=0.5",
    )


def batch_of(rows: slice) -> dict[str, Tensor]:
    """12 pairs of 9 clips, with 5 captions."""
    ids = torch.stack([torch.arange(12) % 9, torch.arange(12) * 7 % 5], 1)
    return {"media": unit(0)[rows], "text": unit(1)[rows], "pair_ids": ids[rows]}


def of_a_rank() -> list[list[Tensor]]:
    size = 12 // dist.get_world_size()
    rows = slice(size * dist.get_rank(), size * (dist.get_rank() + 1))
    return [total_and_gradients(config_of(each), batch_of(rows)) for each in EACH]


def total_and_gradients(config: Config, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = [given[name].clone().requires_grad_() for name in ("media", "text")]
    bias = torch.tensor(-1.0, requires_grad=True)
    outputs = outputs_of(*leaves, bias=bias, pair_ids=given["pair_ids"])
    total = total_loss(outputs, config)["total"]
    return [total.detach(), *torch.autograd.grad(total, [*leaves, bias])]


def test_over_ranks_pairs_are_told_apart_as_in_the_whole_batch():
    found = on_ranks(2, of_a_rank)
    for n, duplicates in enumerate(EACH):
        batch = batch_of(slice(None))
        leaves = [batch[name].double().requires_grad_() for name in ("media", "text")]
        bias = torch.tensor(-1.0, requires_grad=True)
        given = {"media": leaves[0], "text": leaves[1], "bias": bias}
        whole = whole_total(given | {"pair_ids": batch["pair_ids"]}, duplicates)
        expected = [x.float() for x in torch.autograd.grad(whole, [*leaves, bias])]
        alone = total_and_gradients(config_of(duplicates), batch)
        # Engines average over ranks, so each rank's gradient is twice its own.
        halves = [torch.cat([rank[n][which] for rank in found]) / 2 for which in (1, 2)]
        by_bias = torch.stack([rank[n][3] for rank in found]).mean()
        for total, *gradients in (alone, [found[1][n][0], *halves, by_bias]):
            assert total.item() == pytest.approx(whole.item(), rel=1e-5)
            torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
