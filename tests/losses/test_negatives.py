"""Hard negatives as columns: by hand, against all logits, masked where they are a caption."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.pair_ids import pair_ids
from flap_fast.losses import total_loss
from flap_fast.losses.pairs import ids_of_pairs, with_negatives
from tests.losses.test_losses import outputs_of, unit
from tests.losses.test_pairs import EYE, SIGMOID
from tests.ranks import on_ranks
from tests.tiny import tiny


def test_a_wrong_caption_is_a_column_of_every_clip_and_no_row_of_the_captions_by_hand():
    """Cosines 1 and 0 with the captions; with the first negative 1 and 0, with the second 0."""
    outputs = outputs_of(EYE, EYE, negative_1=torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    found = total_loss(outputs, tiny("loss.contrastive.negatives=1"))["contrastive"].item()
    first, second = math.log(2 * math.e + 2) - 1, math.log(math.e + 3) - 1
    of_captions = math.log(math.e + 1) - 1
    assert found == pytest.approx((first + second) / 4 + of_captions / 2)


def test_a_wrong_caption_is_a_pair_with_no_clip_by_hand():
    wrong = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    outputs = outputs_of(EYE, EYE, negative_1=wrong, bias=torch.tensor(-1.0))
    found = total_loss(outputs, tiny(*SIGMOID, "loss.sigmoid.negatives=1"))["sigmoid"].item()
    without = math.log(2) + math.log1p(math.exp(-1))
    push = [math.log1p(math.exp(logit)) for logit in (0, -1, -1, -1)]
    assert found == pytest.approx(without + sum(push) / 2)


def test_without_negatives_the_captions_are_the_columns_as_they_are():
    outputs = outputs_of(unit(0), unit(1))
    assert with_negatives(outputs, 0) is outputs["text"]
    assert tiny().loss.negatives == 0
    assert tiny().loss.sentences == ("text",)


def test_the_text_encoder_embeds_as_many_as_the_loss_that_asks_for_most():
    both = tiny("loss.contrastive.negatives=1", "loss.sigmoid.negatives=3", "loss.sigmoid.weight=1")
    assert both.loss.negatives == 3
    assert both.loss.sentences == ("text", "negative_1", "negative_2", "negative_3")
    assert tiny("loss.sigmoid.negatives=3").loss.negatives == 0  # it has no weight


def test_ids_of_negatives_follow_in_the_order_of_the_columns_and_are_of_no_clip():
    captions, wrong = ["rain", "a dog"], [["snow", "hail"], ["a cat", "Rain!"]]
    found = pair_ids(np.array([0, 5]), captions, wrong)
    assert found.shape == (2, 4)
    ids = ids_of_pairs(outputs_of(EYE, EYE, pair_ids=found), "mask", 2)["ids"]
    assert ids[:, 0].tolist() == [0, 5, -1, -1, -1, -1]
    of_text = [pair_ids(np.array([0]), [text])[0, 1].item() for text in ("snow", "a cat", "hail")]
    assert ids[2:5, 1].tolist() == of_text
    assert ids[5, 1] == ids[0, 1]


@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_a_negative_that_is_a_clips_caption_is_no_negative_of_that_clip_alone(loss: str):
    """The second clip's negative is the first one's caption."""
    name, others = f"loss.{loss}.negatives", SIGMOID if loss == "sigmoid" else ()
    config = tiny(*others, f"{name}=1", f"loss.{loss}.duplicates=mask")
    media = torch.zeros(2, 4, requires_grad=True)
    captions, wrong = torch.eye(4).chunk(2)
    ids = pair_ids(np.array([0, 1]), ["rain", "a dog"], [["a cat"], ["Rain."]])
    bias = torch.tensor(0.0)
    outputs = outputs_of(media, captions, negative_1=wrong, pair_ids=ids, bias=bias)
    total_loss(outputs, config)["total"].backward()
    assert media.grad is not None
    assert media.grad[0, 3] == 0
    assert (media.grad[[0, 1, 1], [2, 2, 3]] > 0).all()


def config_of(duplicates: str) -> Config:
    """Two negatives in the softmax, three in the sigmoid loss."""
    return tiny(
        *("loss.sigmoid.weight=0.5", "loss.contrastive.negatives=2", "loss.sigmoid.negatives=3"),
        *(f"loss.{name}.duplicates={duplicates}" for name in ("contrastive", "sigmoid")),
    )


NAMES = ("media", "text", "negative_1", "negative_2", "negative_3")


def batch_of(rows: slice) -> dict[str, Tensor]:
    """12 pairs of 9 clips with 5 captions, and negatives of which some are one of these."""
    numbers = torch.arange(12)
    negatives = (numbers * (5 + k) % 11 for k in range(3))
    ids = torch.stack([numbers % 9, numbers * 7 % 5, *negatives], 1)
    return {name: unit(n)[rows] for n, name in enumerate(NAMES)} | {"pair_ids": ids[rows]}


def whole_total(outputs: dict[str, Tensor], duplicates: str) -> Tensor:
    """InfoNCE and half of the sigmoid loss from all logits, in float64."""
    ids, own = outputs["pair_ids"], torch.eye(12).bool()
    media, text, *wrong = (outputs[name].double() for name in NAMES)
    same = (ids[:, None, :2] == ids[None, :, :2]).any(-1) & ~own
    equal = [ids[:, 1, None] == ids[None, :, 2 + n] for n in range(3)]
    if duplicates == "ignore":
        same, equal = torch.zeros_like(same), [torch.zeros_like(same)] * 3

    def logits(negatives: int, scale: float) -> Tensor:
        blocks = [(media @ text.T).masked_fill(same, -torch.inf)]
        blocks += [
            (media @ rows.T).masked_fill(masked, -torch.inf)
            for rows, masked in zip(wrong[:negatives], equal, strict=False)
        ]
        return torch.cat(blocks, 1) * scale

    S = logits(2, 1.0)
    infonce = -S.log_softmax(1).diagonal().mean() - S[:, :12].T.log_softmax(1).diagonal().mean()
    asked = logits(3, 1.0) + outputs["bias"].double()
    pairs = torch.eye(*asked.shape).bool()
    return infonce / 2 - 0.5 * logsigmoid(torch.where(pairs, asked, -asked)).sum() / 12


def total_and_gradients(config: Config, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in NAMES}
    bias = torch.tensor(-1.0, requires_grad=True)
    outputs = outputs_of(**leaves, bias=bias, pair_ids=given["pair_ids"])
    total = total_loss(outputs, config)["total"]
    return [total.detach(), *torch.autograd.grad(total, [*leaves.values(), bias])]


def of_a_rank() -> list[list[Tensor]]:
    size = 12 // dist.get_world_size()
    rows = slice(size * dist.get_rank(), size * (dist.get_rank() + 1))
    return [total_and_gradients(config_of(each), batch_of(rows)) for each in ("ignore", "mask")]


def test_negatives_are_columns_of_the_clips_of_all_ranks():
    found = on_ranks(2, of_a_rank)
    totals = []
    for n, duplicates in enumerate(("ignore", "mask")):
        batch = batch_of(slice(None))
        leaves = {name: batch[name].double().requires_grad_() for name in NAMES}
        bias = torch.tensor(-1.0, requires_grad=True)
        whole = whole_total({**leaves, "bias": bias, "pair_ids": batch["pair_ids"]}, duplicates)
        wanted = [x.float() for x in torch.autograd.grad(whole, [*leaves.values(), bias])]
        alone = total_and_gradients(config_of(duplicates), batch)
        # Engines average over ranks, so each rank's gradient is twice its own.
        halves = [torch.cat([rank[n][m + 1] for rank in found]) / 2 for m in range(len(NAMES))]
        by_bias = torch.stack([rank[n][-1] for rank in found]).mean()
        for total, *gradients in (alone, [found[1][n][0], *halves, by_bias]):
            assert total.item() == pytest.approx(whole.item(), rel=1e-5)
            torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)
        totals.append(whole.item())
    assert abs(totals[0] - totals[1]) > 1e-3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("loss.contrastive.negatives=1", "loss.contrastive.direction=t2a"),
            r"loss\.contrastive\.direction must be symmetric or a2t with .*\.negatives.*'t2a'",
        ),
        (
            ("loss.contrastive.negatives=1", "loss.contrastive.duplicates=positive"),
            r"loss\.contrastive\.duplicates must be ignore or mask with loss\.contrastive\.neg",
        ),
        (
            ("loss.sigmoid.negatives=1", "loss.sigmoid.duplicates=positive"),
            r"loss\.sigmoid\.duplicates must be ignore or mask with loss\.sigmoid\.negatives",
        ),
        (("loss.contrastive.negatives=-1",), r"loss\.contrastive\.negatives must be"),
    ],
)
def test_what_negatives_cannot_be_combined_with_is_refused(overrides: tuple[str, ...], says: str):
    with pytest.raises(ConfigError, match=says):
        tiny(*overrides)
