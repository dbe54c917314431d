"""The text encoder: a transformers model from a folder, or a RoBERTa of random weights.

    padded   ids, attention_mask (B, L) -> states (B, L, D) -> pooled (B, D)
    packed   the same -> ids (N,) of the N tokens there are -> states (N, D) -> pooled (B, D)

The same numbers within rounding. The folder must be local: nothing is fetched from a hub.

Source: LAION-CLAP's text branch (RoBERTa and its pooler).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, RobertaConfig
from transformers.utils.logging import disable_progress_bar

from flap_fast.checks import ConfigError, in_one_line, refuse_code, require
from flap_fast.data.tokenize import local_folder, tokenizer
from flap_fast.encoders.attention import varlen_serves, xformers_ops
from flap_fast.encoders.packing import pack
from flap_fast.encoders.roberta.packed import FAMILIES, is_bert, packed_states
from flap_fast.encoders.roberta.settings import RobertaSettings
from flap_fast.encoders.roberta.weights import check_weights

# Names of dropouts in transformers' configs: BERT's, DistilBERT's and ModernBERT's.
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("embedding_dropout", "mlp_dropout"),
)


class TransformersText(nn.Module):
    """(B, L) token ids and mask -> (B, D) float32.

    Args:
        weights: load the folder's weights; without, only its shape (for a checkpoint).

    Raises:
        ConfigError: text.folder, text.pool, text.dropout, text.max_tokens, text.packing or
            text.attention does not suit the encoder.
    """

    # BERT's and RoBERTa's `encoder.layer.N`, DistilBERT's `transformer.layer.N`, `layers.N`.
    block_names = r"inner\.(?:[a-z]+\.)?layers?\.\d+\."

    def __init__(self, text: RobertaSettings, *, recompute: bool = False, weights: bool = True):
        super().__init__()
        self.pool, self.recompute = text.pool, recompute
        self.packing, self.attention = text.packing, text.attention
        self.inner = _from_folder(text, weights) if text.folder else _random(text)
        self.width: int = self.inner.config.hidden_size
        if getattr(self.inner, "pooler", None) is None:
            require(
                text.pool != "pooler", "text.pool", "be mean or cls: it has no pooler", text.pool
            )
        elif text.pool != "pooler":
            self.inner.pooler = None  # no weights without a gradient
        family, self.positions = self.inner.config.model_type, _positions(self.inner)
        has_dropout = any(hasattr(self.inner.config, name) for name in _DROPOUTS)
        rule = f"be 0 for '{family}', whose dropouts have unknown names"
        require(
            text.dropout == 0 or has_dropout,
            "text.dropout",
            rule,
            text.dropout,
            "set text.dropout=0",
        )
        rule = f"be at most {self.positions}, the positions of this '{family}'"
        supported = self.positions is None or text.max_tokens <= self.positions
        remedy = f"set text.max_tokens={self.positions}"
        require(supported, "text.max_tokens", rule, text.max_tokens, remedy)
        if text.packing == "packed":
            rule = f"be auto or padded: '{family}' is none of {FAMILIES}"
            require(is_bert(self.inner), "text.packing", rule, text.packing)
        if text.attention == "xformers":
            xformers_ops("text.attention")
        if recompute:
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})
        self.train()  # from_pretrained leaves evaluation on: no dropout, nothing recomputed

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the embedding table."""
        return self.inner.config.vocab_size

    @property
    def pad_token_id(self) -> int:
        """The token of padding."""
        return self.inner.config.pad_token_id or 0

    def save_config(self, folder: Path) -> None:
        """Write its config.json, so that a checkpoint opens without the first folder."""
        self.inner.config.save_pretrained(folder)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed captions.

        Args:
            attention_mask: best on the CPU, wherever the ids are: see `packing.pack`.
        """
        embed = self._packed if self.packs(ids.device) else self._padded
        return embed(ids, attention_mask)

    def packs(self, device: torch.device) -> bool:
        """Whether captions are packed on a device, at the current precision."""
        if self.packing != "auto" or not is_bert(self.inner):
            return self.packing == "packed"
        if device.type != "cuda":
            return device.type == "cpu"
        half = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if half else self.inner.dtype
        heads = self.inner.config.num_attention_heads
        return self.attention == "xformers" or varlen_serves(device, dtype, self.width // heads)

    def _padded(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        # Batches are padded to a multiple of 8.
        ids, attention_mask = ids[:, : self.positions], attention_mask[:, : self.positions]
        attention_mask = attention_mask.to(ids.device, non_blocking=True)
        out = self.inner(input_ids=ids, attention_mask=self._mask_for_attention(attention_mask))
        if self.pool == "pooler":
            return out.pooler_output.float()
        states = out.last_hidden_state.float()
        if self.pool == "cls":
            return states[:, 0]
        weight = attention_mask[..., None].float()
        return (states * weight).sum(1) / weight.sum(1)

    def _packed(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        packed = pack(attention_mask, ids.device)
        states = packed_states(
            self.inner, ids, packed, backend=self.attention, recompute=self.recompute
        )
        if self.pool == "mean":
            return packed.mean(states.float())
        first = packed.first(states)
        return (first if self.pool == "cls" else self.inner.pooler(first[:, None])).float()

    def _mask_for_attention(self, attention_mask: Tensor) -> Tensor:
        """(B, 1, 1, L) where the encoder takes it: of (B, L), transformers asks `mask.all()`.

        That answer would have the host wait, in each step, for all that the GPU has still to do.
        """
        sdpa = self.inner.config._attn_implementation == "sdpa"
        if sdpa and hasattr(self.inner, "_create_attention_masks"):
            return attention_mask[:, None, None, :].bool()
        return attention_mask


def _from_folder(text: RobertaSettings, weights: bool):
    assert text.folder is not None
    folder = local_folder("text.folder", text.folder)
    refuse_code("text.folder", folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _set_dropout(config, text.dropout)
        disable_progress_bar()  # a bar for weights that load in a blink
        if not weights:
            return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        inner, report = AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        check_weights(folder, inner, report)
        return inner
    except ConfigError:
        raise
    except Exception as error:  # of a damaged file, transformers passes on what its reader raises
        why = in_one_line(error)
        raise ConfigError(f"text.folder must hold an encoder, got '{folder}': {why}") from None


def _random(text: RobertaSettings):
    """A random RoBERTa with the tokenizer's vocabulary and the released LayerNorm epsilon."""
    inner = tokenizer(text).inner
    config = RobertaConfig(
        vocab_size=len(inner),
        hidden_size=text.width,
        num_hidden_layers=text.depth,
        num_attention_heads=text.heads,
        intermediate_size=4 * text.width,
        # RoBERTa counts positions from pad + 1; batches are padded to a multiple of 8.
        max_position_embeddings=max(514, text.max_tokens + 16 + inner.pad_token_id),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=inner.pad_token_id,
        bos_token_id=inner.bos_token_id,
        eos_token_id=inner.eos_token_id,
    )
    _set_dropout(config, text.dropout)
    return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _set_dropout(config: Any, dropout: float) -> None:
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)


def _positions(inner: Any) -> int | None:
    """Number of tokens that the position table supports; RoBERTa's starts after its pad."""
    table = getattr(getattr(inner, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
