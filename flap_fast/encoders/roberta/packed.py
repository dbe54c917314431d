"""BERT-like encoders on packed captions, with their own modules and weights.

    ids (B, L), Pack -> states (N, D)

transformers' own forward pass wants rows of equal length. This one calls the same embeddings,
linear layers, norms and dropouts (checkpoints depend on their names: they stay), with attention
within each caption between them.

Source: transformers, models/bert/modeling_bert.py and models/roberta/modeling_roberta.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flap_fast.encoders.attention import packed_attention
from flap_fast.encoders.packing import Pack

_COUNTS_FROM_PAD = {"bert": False, "camembert": True, "roberta": True, "xlm-roberta": True}
FAMILIES = ", ".join(_COUNTS_FROM_PAD)


def is_bert(inner: Any) -> bool:
    """Whether `packed_states` supports a model: a BERT-like encoder with learned positions."""
    config = inner.config
    return (
        config.model_type in _COUNTS_FROM_PAD
        # Relative positions are gone in transformers 5.
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "is_decoder", False)
    )


def packed_states(
    inner: Any, ids: Tensor, pack: Pack, *, backend: str = "sdpa", recompute: bool = False
) -> Tensor:
    """The last layer's states of all tokens.

    Args:
        ids: (B, L), padded, on the model's device.
        recompute: each layer in the backward pass instead of keeping it.
    """
    tokens = pack.packed(ids)
    x = inner.embeddings(
        input_ids=tokens[None],
        position_ids=pack.packed(positions(inner.config, ids))[None],
        token_type_ids=torch.zeros_like(tokens)[None],
    )[0]
    again = recompute and inner.training and torch.is_grad_enabled()
    for layer in inner.encoder.layer:
        if again:
            x = checkpoint(_layer, layer, x, pack, backend, use_reentrant=False)
        else:
            x = _layer(layer, x, pack, backend)
    return x


def positions(config: Any, ids: Tensor) -> Tensor:
    """(B, L) rows of the position table: BERT counts columns, RoBERTa tokens, from pad + 1."""
    if not _COUNTS_FROM_PAD[config.model_type]:
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    token = (ids != config.pad_token_id).long()
    return token.cumsum(1) * token + config.pad_token_id


def _layer(layer: nn.Module, x: Tensor, pack: Pack, backend: str) -> Tensor:
    attention: Any = layer.attention
    own = attention.self
    q, k, v = (
        linear(x).unflatten(1, (own.num_attention_heads, own.attention_head_size))
        for linear in (own.query, own.key, own.value)
    )
    dropout = own.dropout.p if own.training else 0.0
    y = packed_attention(q, k, v, pack, dropout=dropout, backend=backend, setting="text.attention")
    x = attention.output(y.flatten(1), x)
    return layer.output(layer.intermediate(x), x)  # type: ignore[operator]
