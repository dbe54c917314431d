"""CLIP's text transformer: causal, pre-norm, with OpenAI's names.

    ids (B, L) -> token + position (B, L, D) -> blocks -> ln_final -> its end-of-text row (B, D)

A token attends to those before it and to itself. So padding, which comes last, changes nothing, and
the last token of a caption has seen all of it. OpenAI takes the row of the highest id, which is
that same token where a caption has one end.

B captions   L tokens   D width   H heads

Source: Radford et al., CLIP, arXiv 2103.00020, and its published code, which has no dropout.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flap_fast.data.tokenize import tokenizer
from flap_fast.encoders.clip_text.settings import ClipTextSettings
from flap_fast.encoders.lora import Lora


class ClipText(nn.Module):
    """(B, L) token ids and mask -> (B, D) float32; initialised at random."""

    block_names = r"transformer\.resblocks\.\d+\."
    # No transformers model, whose sizes the formulas of FLOP and memory ask: they refuse it.
    inner: Any = None

    def __init__(self, text: ClipTextSettings, *, recompute: bool = False):
        super().__init__()
        self.width, self.recompute = text.width, recompute
        self.dropout = text.dropout
        words = tokenizer(text).inner
        self.vocabulary, self.pad_token_id = len(words), words.pad_token_id or 0
        self.token_embedding = nn.Embedding(self.vocabulary, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.max_tokens, text.width))
        self.transformer = Transformer(text)
        self.ln_final = nn.LayerNorm(text.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def save_config(self, folder: Path) -> None:
        """Write nothing: all sizes are in the model's config.yaml."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed captions.

        Args:
            attention_mask: 1 on tokens, which stand first; best on the CPU, wherever the ids are.

        Raises:
            ValueError: a caption without a token, or with more than text.max_tokens.
        """
        last = _last_tokens(attention_mask, len(self.positional_embedding))
        ids = ids[:, : len(self.positional_embedding)]  # batches are padded to a multiple of 8
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = functional.dropout(x, self.dropout, self.training)
        for block in self.transformer.resblocks:
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        rows = torch.arange(len(ids), device=ids.device)
        if ids.is_cuda:
            last = last.pin_memory()
        return self.ln_final(x[rows, last.to(ids.device, non_blocking=True)]).float()


class Transformer(nn.Module):
    """Holds the blocks, for OpenAI's names."""

    def __init__(self, text: ClipTextSettings):
        super().__init__()
        sizes = text.width, text.heads, text.depth
        self.resblocks = nn.ModuleList(Block(*sizes, text.dropout) for _ in range(text.depth))


class Block(nn.Module):
    """x = x + attention(norm(x));  x = x + mlp(norm(x)), dropout behind each branch.

    What leads back to x starts the smaller, the more blocks (`depth`) add to it.
    """

    def __init__(self, width: int, heads: int, depth: int, dropout: float):
        super().__init__()
        self.attn = CausalAttention(width, heads, dropout)
        self.ln_1 = nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))
        self.ln_2 = nn.LayerNorm(width)
        self.dropout = dropout
        back = width**-0.5 * (2 * depth) ** -0.5
        nn.init.normal_(self.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=back)
        nn.init.normal_(c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(c_proj.weight, std=back)

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.dropout(self.attn(self.ln_1(x)), self.dropout, self.training)
        return x + functional.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


class CausalAttention(nn.Module):
    """Multi-head self-attention of a token to those up to it, (B, L, D) -> (B, L, D).

    Names and first biases are those of PyTorch's nn.MultiheadAttention.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.in_proj_lora: Lora | None = None
        nn.init.zeros_(self.out_proj.bias)

    def add_lora(self, rank: int, alpha: float) -> None:
        """Add an adapter to the packed weight."""
        self.in_proj_lora = Lora(self.in_proj_weight, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        qkv = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        if self.in_proj_lora is not None:
            qkv = qkv + self.in_proj_lora(x)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _last_tokens(attention_mask: Tensor, most: int) -> Tensor:
    """(B, L) -> (B,) int64 on the CPU: where each caption ends."""
    last = attention_mask.cpu().sum(1) - 1
    if int(last.min()) < 0 or int(last.max()) >= most:
        shortest, longest = int(last.min()) + 1, int(last.max()) + 1
        raise ValueError(
            f"captions must have 1 to {most} tokens (text.max_tokens), got {shortest} to {longest}"
        )
    return last
