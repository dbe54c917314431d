"""A language model of random weights, small enough to be written by a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_model(folder: Path, *, chat: str | None = None, always: str | None = None) -> Path:
    """A Llama of width 16 with a tokenizer of bytes that puts <s> first, as transformers saves it.

    Args:
        chat: the tokenizer's layout of a chat.
        always: the one token that the model ever says.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=chat
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=512,
            initializer_range=0.5,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
    )
    if always is not None:
        with torch.no_grad():
            model.model.norm.weight.zero_()
            model.model.norm.weight[0] = 1e3
            model.lm_head.weight.zero_()
            # The norm leaves the sign of its first number alone, so both signs are told apart here.
            model.model.embed_tokens.weight.fill_(1.0)
            layers: Any = model.model.layers
            for layer in layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.lm_head.weight[vocabulary[always], 0] = 1.0
    model.save_pretrained(folder)
    return folder
