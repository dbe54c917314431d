"""Terms and their total: by hand, by weight, over ranks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config import Config, Loss
from flap_fast.loss import LOSSES, total_loss
from flap_fast.model.flap import Outputs
from flap_kernels.infonce import infonce_reference
from tests.ranks import on_ranks
from tests.tiny import tiny

BOTH = ("loss.cyclic.cross_weight=0.25", "loss.cyclic.in_weight=0.5")


def outputs_of(audio: Tensor, text: Tensor, recon: float = 0.0) -> Outputs:
    ones = torch.ones(())
    return {"audio": audio, "text": text, "scale": ones, "recon": ones * recon}


def unit(seed: int, rows: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 4, generator=generator), dim=-1)


def test_every_loss_has_its_section_of_settings():
    assert list(LOSSES) == list(Loss.model_fields)


def test_the_cyclic_terms_of_two_pairs_by_hand():
    """a1.t2 - a2.t1 = 1 - 0.8 and a1.a2 - t1.t2 = 0.6 - 0, each there and back, over 2 clips."""
    audio = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    terms = total_loss(outputs_of(audio, text), tiny(*BOTH))
    assert terms["cyclic_cross"].item() == pytest.approx(0.2**2)
    assert terms["cyclic_in"].item() == pytest.approx(0.6**2)


def test_the_total_is_the_weighted_sum_of_the_terms_that_have_a_weight():
    audio, text = unit(0), unit(1)
    config = tiny(*BOTH, "loss.contrastive.weight=2", "loss.recon.weight=0.125")
    terms = total_loss(outputs_of(audio, text, recon=3.0), config)
    assert list(terms) == ["contrastive", "cyclic_cross", "cyclic_in", "recon", "total"]
    weights = (2, 0.25, 0.5, 0.125)
    expected = sum(w * terms[n] for w, n in zip(weights, list(terms)[:-1], strict=True))
    torch.testing.assert_close(terms["total"], expected)
    assert list(total_loss(outputs_of(audio, text), tiny())) == ["contrastive", "total"]
    assert list(total_loss(outputs_of(audio, text), tiny(BOTH[0]))) == [
        *("contrastive", "cyclic_cross", "total")
    ]


def test_both_cyclic_terms_cost_one_call(monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    module = importlib.import_module("flap_fast.loss.cyclic")
    real = module.both_ways
    monkeypatch.setattr(module, "both_ways", lambda *a, **k: calls.append(k) or real(*a, **k))
    for overrides in (("loss.cyclic.form=gram", *BOTH), BOTH[:1], ()):
        total_loss(outputs_of(unit(0), unit(1)), tiny(*overrides))
    assert calls == [{"form": "gram"}, {"form": "auto"}]


def test_the_contrastive_loss_is_exact_unless_another_precision_is_asked_for():
    audio, text = unit(0), unit(1)
    terms = [
        total_loss(outputs_of(audio, text), tiny(*overrides))["contrastive"]
        for overrides in ((), *((f"loss.contrastive.precision={p}",) for p in ("ieee", "bf16")))
    ]
    exact = infonce_reference(audio.double(), text.double(), torch.ones((), dtype=torch.float64))
    away = [abs(term.double() - exact).item() for term in terms]
    assert away[0] == away[1] < 1e-6
    assert 1e-6 < away[2] < 1e-2
    with pytest.raises(ConfigError, match=r"loss\.contrastive\.precision must be 'ieee', 'tf32' or"):
        tiny("loss.contrastive.precision=fp16")


def test_without_any_loss_there_is_nothing_to_train_on():
    with pytest.raises(ConfigError, match=r"loss.contrastive.weight must be above 0 where no othe"):
        tiny("loss.contrastive.weight=0")
    assert tiny("loss.contrastive.weight=0", BOTH[0]).loss.contrastive.weight == 0


def total_and_gradients(config: Config, audio: Tensor, text: Tensor) -> list[Tensor]:
    leaves = audio.clone().requires_grad_(), text.clone().requires_grad_()
    total = total_loss(outputs_of(*leaves), config)["total"]
    return [total.detach(), *torch.autograd.grad(total, leaves)]


FORMS = [tiny(*BOTH, f"loss.cyclic.form={form}") for form in ("tiled", "gram")]


def shares(audio: Tensor, text: Tensor) -> list[list[Tensor]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [x.chunk(world)[rank] for x in (audio, text)]
    return [total_and_gradients(config, *mine) for config in FORMS]


def test_the_total_of_all_ranks_is_that_of_the_whole_batch_in_either_form():
    found = on_ranks(3, shares, unit(0), unit(1))
    for form, config in enumerate(FORMS):
        total, *whole = total_and_gradients(config, unit(0), unit(1))
        for rank in found:
            torch.testing.assert_close(rank[form][0], total)
        for which, expected in enumerate(whole, 1):
            # Engines average over ranks, so each rank's part is three times its own.
            parts = torch.cat([rank[form][which] for rank in found]) / 3
            torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-6)
