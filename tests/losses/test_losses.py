"""Terms and their total: by hand, by weight, over ranks."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import flap_kernels
from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.losses import Outputs, total_loss
from flap_fast.losses.pairs import product_precision
from flap_kernels.infonce import infonce_reference
from tests.ranks import on_ranks
from tests.tiny import tiny

BOTH = ("loss.cyclic.cross_weight=0.25", "loss.cyclic.in_weight=0.5")


OF_TEXT = ("loss.simcse.weight=0.1", "loss.nli.weight=0.3", "text.dropout=0.1")


def outputs_of(
    media: Tensor, text: Tensor, recon: float | Tensor = 0.0, **sentences: Tensor
) -> Outputs:
    ones = torch.ones(())
    outputs = {"media": media, "text": text, "scale": ones, "recon": ones * recon}
    return cast(Outputs, outputs | sentences)


def unit(seed: int, rows: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows_of = torch.randn(rows, 4, generator=generator, dtype=dtype)
    return torch.nn.functional.normalize(rows_of, dim=-1)


def test_the_cyclic_terms_of_two_pairs_by_hand():
    """a1.t2 - a2.t1 = 1 - 0.8 and a1.a2 - t1.t2 = 0.6 - 0, each there and back, over 2 clips."""
    audio = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    terms = total_loss(outputs_of(audio, text), tiny(*BOTH))
    assert terms["cyclic_cross"].item() == pytest.approx(0.2**2)
    assert terms["cyclic_in"].item() == pytest.approx(0.6**2)


def test_the_total_is_the_weighted_sum_of_the_terms_that_have_a_weight():
    audio, text = unit(0), unit(1)
    config = tiny(*BOTH, *OF_TEXT, "loss.contrastive.weight=2", "loss.recon.weight=0.125")
    sentences = {name: unit(seed) for seed, name in enumerate(config.loss.sentences[1:], 2)}
    terms = total_loss(outputs_of(audio, text, recon=3.0, **sentences), config)
    names = ["contrastive", "cyclic_cross", "cyclic_in", "simcse", "nli", "recon", "total"]
    assert list(terms) == names
    weights = (2, 0.25, 0.5, 0.1, 0.3, 0.125)
    expected = sum(w * terms[n] for w, n in zip(weights, list(terms)[:-1], strict=True))
    torch.testing.assert_close(terms["total"], expected)
    assert list(total_loss(outputs_of(audio, text), tiny())) == ["contrastive", "total"]
    assert list(total_loss(outputs_of(audio, text), tiny(BOTH[0]))) == [
        *("contrastive", "cyclic_cross", "total")
    ]


def test_both_cyclic_terms_cost_one_call(monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    real = flap_kernels.cyclic
    monkeypatch.setattr(flap_kernels, "cyclic", lambda *a, **k: calls.append(k) or real(*a, **k))
    for overrides in (("loss.cyclic.form=gram", *BOTH), BOTH[:1], ()):
        total_loss(outputs_of(unit(0), unit(1)), tiny(*overrides))
    assert calls == [{"form": form, "equal_sizes": True} for form in ("gram", "auto")]


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
    with pytest.raises(ConfigError, match=r"loss\.contrastive\.precision must be 'auto', 'ieee'"):
        tiny("loss.contrastive.precision=fp16")


@pytest.mark.parametrize(
    ("device", "hip", "supported", "precision"),
    [
        ("cuda", None, True, "tf32"),
        ("cuda", None, False, "ieee"),
        ("cuda", "6.4", True, "ieee"),
        ("cpu", None, True, "ieee"),
    ],
)
def test_the_contrastive_loss_takes_tf32_where_the_gpu_has_it(
    device, hip, supported, precision, monkeypatch
):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: supported)
    for loss in (tiny().loss.contrastive, tiny().loss.sigmoid):
        assert loss.precision == "auto"
    assert product_precision("auto", torch.device(device)) == precision
    for asked in ("ieee", "tf32", "bf16"):
        assert product_precision(asked, torch.device(device)) == asked


def test_prefixes_must_not_all_weigh_nothing():
    """They would turn the loss off while it counts as active."""
    says = r"loss.contrastive.prefix_weights must be above 0 for a prefix, got '\[0.0, 0.0\]'"
    with pytest.raises(ConfigError, match=says):
        tiny(
            "joint.width=4",
            "loss.contrastive.prefixes=[2,4]",
            "loss.contrastive.prefix_weights=[0,0]",
        )


def test_prefixes_of_the_embeddings_have_losses_of_their_own():
    media, text = unit(0), unit(1)
    asked = "loss.contrastive.prefixes=[2,4]", "loss.contrastive.prefix_weights=[0.5,2]"
    loss = tiny("joint.width=4", *asked).loss.contrastive
    found = loss.terms(outputs_of(media, text))["contrastive"]
    x, y = (torch.nn.functional.normalize(v[:, :2], dim=1) for v in (media, text))
    one = torch.ones(())
    expected = 0.5 * infonce_reference(x, y, one) + 2 * infonce_reference(media, text, one)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("prefixes=[8,4]", "loss.contrastive.prefixes must be ascending widths"),
        ("prefixes=[8,1024]", "loss.contrastive.prefixes must end with joint.width = 16"),
        ("prefixes=[4,8]", "loss.contrastive.prefixes must end with joint.width = 16"),
        ("prefix_weights=[1]", "prefix_weights must be one for each of 0 prefixes, or none"),
        ("prefixes=8", "loss.contrastive.prefixes must be a list, got 8"),
    ],
)
def test_prefixes_that_do_not_fit_are_refused(setting, says):
    with pytest.raises(ConfigError, match=says):
        tiny(f"loss.contrastive.{setting}")


EYE = torch.eye(2)


def test_simcse_of_two_captions_by_hand():
    """At temperature 0.5 cosines 1 and 0 are logits 2 and 0: the loss is log(1 + e^-2)."""
    config = tiny("loss.simcse.weight=1", "loss.simcse.temperature=0.5", "text.dropout=0.1")
    terms = total_loss(outputs_of(EYE, EYE, text_again=EYE), config)
    assert terms["simcse"].item() == pytest.approx(math.log1p(math.exp(-2)))
    other = tiny("loss.simcse.weight=1", "loss.simcse.on=nli", "text.dropout=0.1")
    terms = total_loss(outputs_of(EYE, EYE, premise=EYE, premise_again=EYE.flip(0)), other)
    assert terms["simcse"].item() == pytest.approx(20 + math.log1p(math.exp(-20)))


def test_nli_of_two_triples_by_hand():
    """Each premise has four columns, cosines 1 and 0 twice: log(2 e + 2) - 1 at temperature 1."""
    config = tiny("loss.nli.weight=1", "loss.nli.temperature=1")
    given = {"premise": EYE, "entailment": EYE, "contradiction": EYE.flip(0)}
    terms = total_loss(outputs_of(EYE, EYE, **given), config)
    assert terms["nli"].item() == pytest.approx(math.log(2 * math.e + 2) - 1)


def by_formula(z: Tensor, columns: Tensor) -> list[Tensor]:
    """The loss, and its gradients by G = (P - I) / B, of temperature 0.05."""
    logits = 20 * z @ columns.T
    shares = logits.softmax(1)
    G = (shares - torch.eye(len(z), len(columns), dtype=z.dtype)) / len(z)
    return [-shares.diag().log().mean(), 20 * G @ columns, 20 * G.T @ z]


@pytest.mark.parametrize("name", ["simcse", "nli"])
def test_losses_of_text_have_the_gradients_of_their_formulas_in_float64(name: str):
    z, *others = (unit(seed, dtype=torch.float64).requires_grad_() for seed in (2, 3, 4))
    audio, text = unit(0, dtype=torch.float64), unit(1, dtype=torch.float64)
    if name == "simcse":
        config, others = tiny("loss.simcse.weight=1", "text.dropout=0.1"), others[:1]
        given = {"text": z, "text_again": others[0]}
    else:
        config = tiny("loss.nli.weight=1")
        given = {"text": text, "premise": z, "entailment": others[0], "contradiction": others[1]}
    outputs = outputs_of(audio, **given)
    outputs["scale"] = outputs["scale"].double().requires_grad_()
    found = total_loss(outputs, config)[name]
    loss, by_z, by_columns = by_formula(z.detach(), torch.cat(others).detach())
    torch.testing.assert_close(found.detach(), loss, rtol=1e-12, atol=0)
    *gradients, by_scale = torch.autograd.grad(
        found, [z, *others, outputs["scale"]], allow_unused=True
    )
    assert by_scale is None  # the temperature is fixed
    torch.testing.assert_close(gradients[0], by_z, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat(gradients[1:]), by_columns, rtol=1e-12, atol=1e-14)


def test_without_any_loss_there_is_nothing_to_train_on():
    with pytest.raises(ConfigError, match=r"loss.contrastive.weight must be above 0 where no othe"):
        tiny("loss.contrastive.weight=0")
    assert tiny("loss.contrastive.weight=0", BOTH[0]).loss.contrastive.weight == 0


def total_and_gradients(config: Config, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    total = total_loss(outputs_of(**leaves), config)["total"]
    return [total.detach(), *torch.autograd.grad(total, list(leaves.values()))]


FORMS = [tiny(*BOTH, *OF_TEXT, f"loss.cyclic.form={form}") for form in ("tiled", "gram")]
# SimCSE on the premises too, so that an embedding is pulled by two losses.
FORMS.append(tiny(*OF_TEXT, "loss.simcse.on=nli"))
GIVEN = ("media", "text", "text_again", "premise", "premise_again", "entailment", "contradiction")


def embeddings(config: Config) -> dict[str, Tensor]:
    names = [name for name in GIVEN if name in ("media", *config.loss.sentences)]
    return {name: unit(GIVEN.index(name)) for name in names}


def shares() -> list[list[Tensor]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for config in FORMS:
        mine = {name: x.chunk(world)[rank] for name, x in embeddings(config).items()}
        found.append(total_and_gradients(config, mine))
    return found


def test_the_total_of_all_ranks_is_that_of_the_whole_batch_in_either_form():
    found = on_ranks(3, shares)
    for form, config in enumerate(FORMS):
        total, *whole = total_and_gradients(config, embeddings(config))
        assert len(whole) == 1 + len(config.loss.sentences)
        for rank in found:
            torch.testing.assert_close(rank[form][0], total)
        for which, expected in enumerate(whole, 1):
            # Engines average over ranks, so each rank's part is three times its own.
            parts = torch.cat([rank[form][which] for rank in found]) / 3
            torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-6)
