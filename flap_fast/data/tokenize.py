"""Captions -> token ids, padded to the longest caption of the batch."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as PortableTokenizer
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, ByT5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flap_fast.checks import ConfigError, in_one_line, refuse_code, require
from flap_fast.encoders.settings import TextEncoder

# Cases, digits, punctuation, other scripts, white space: what tokenizers treat differently.
_PROBE = "A dog's bark, 3.5 s  LONG; e\u0301tude №7 \N{SNOWMAN} 雨\tend"
_PROBES = (_PROBE, "", " a  b ", "A dog barks at the moon. " * 50, "<s> </s> <pad> <extra_id_1>")
_MULTIPLE = 8  # tensor cores' tiles, and fewer shapes to compile for
_REMEDY = "for example: hf download FacebookAI/roberta-base --local-dir models/roberta-base"


@dataclass(frozen=True)
class Tokenizer:
    """Cuts captions to `max_tokens` and pads a batch of them."""

    inner: Any
    max_tokens: int

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L) int64 ids and (B, L) int64 mask, 1 on tokens; L is a multiple of 8."""
        cut = self.inner(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
        # Padded here: transformers refuses 77, no multiple of 8, and takes as long as for the rest.
        counts = np.array([len(row) for row in cut])
        columns = np.arange(-(-int(counts.max()) // _MULTIPLE) * _MULTIPLE)
        if self.inner.padding_side == "left":
            columns = columns[::-1]
        mask = columns < counts[:, None]
        ids = np.full(mask.shape, self.inner.pad_token_id, np.int64)
        ids[mask] = np.concatenate(cut)
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def tokenizer_digest(tokens: Tokenizer) -> int:
    """A number that is another one where tokenizers give other ids, as far as their words and a
    text tell.
    """
    inner = tokens.inner
    vocabulary = sorted(inner.get_vocab().items())
    return zlib.crc32(repr((inner.padding_side, inner(_PROBE)["input_ids"], vocabulary)).encode())


def portable_tokenizer(tokenizer: Tokenizer) -> PortableTokenizer:
    """The same tokenizer as one of the package `tokenizers`, which needs neither PyTorch nor
    transformers; it cuts captions and pads a batch to its longest.

    Raises:
        ConfigError: it has none, or one that gives other ids.
    """
    inner, name = tokenizer.inner, type(tokenizer.inner).__name__
    if isinstance(inner, ByT5Tokenizer):
        portable = _portable_bytes(inner)
    else:
        rule = "have a tokenizer.json"
        require(hasattr(inner, "backend_tokenizer"), "the tokenizer", rule, f"a {name}")
        portable = PortableTokenizer.from_str(inner.backend_tokenizer.to_str())
    portable.enable_truncation(tokenizer.max_tokens, direction=inner.truncation_side)
    padding = {"pad_id": inner.pad_token_id, "pad_token": inner.pad_token}
    portable.enable_padding(direction=inner.padding_side, **padding)
    ids, mask = tokenizer(_PROBES)
    for text, row, is_token in zip(_PROBES, ids, mask.bool(), strict=True):
        same = portable.encode(text).ids == row[is_token].tolist()
        require(same, "the tokenizer", f"give the ids of its tokenizer.json, a {name}", text)
    return portable


def _portable_bytes(inner: ByT5Tokenizer) -> PortableTokenizer:
    """ByT5's: of each byte its value + 3, and an end."""
    added, pieces = inner.added_tokens_decoder, bytes_to_unicode()
    numbers = inner.convert_tokens_to_ids([chr(n) for n in range(256)])
    assert isinstance(numbers, list)
    ids = {pieces[n]: number for n, number in enumerate(numbers)}
    ids |= {token.content: n for n, token in added.items()}
    portable = PortableTokenizer(models.BPE(vocab=ids, merges=[]))
    portable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    portable.add_special_tokens([added[n] for n in sorted(added)])
    end = str(inner.eos_token), int(inner.eos_token_id)  # type: ignore[arg-type]
    portable.post_processor = processors.TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    return portable


def tokenizer(text: TextEncoder) -> Tokenizer:
    """The tokenizer of a text encoder, from its folder; nothing is fetched from a hub.

    Raises:
        ConfigError: no such folder, no tokenizer in it, or one with code of its own.
    """
    name, files = text.tokenizer_files
    if files == "bytes":
        return Tokenizer(ByT5Tokenizer(), text.max_tokens)
    folder = local_folder(name, files)
    if (folder / _CLIP_MERGES).is_file():
        return Tokenizer(_clip_tokenizer(folder / _CLIP_MERGES), text.max_tokens)
    refuse_code(name, folder)
    try:
        inner = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises all kinds for values that do not belong
        why = in_one_line(error)
        raise ConfigError(f"{name} must hold a tokenizer, got '{folder}': {why}") from None
    rule = "hold a tokenizer that can pad"
    require(inner.pad_token_id is not None, name, rule, str(folder))
    return Tokenizer(inner, text.max_tokens)


# What OpenAI's `clip` and `open_clip` ship: a line of no use, then the pairs to merge, best first.
_CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_MARKS = ("<|startoftext|>", "<|endoftext|>")
CLIP_TOKENS = 49_408
# Packages that the index has under another name.
_ON_THE_INDEX = {"open_clip": "--no-deps open_clip_torch"}


def _clip_tokenizer(file: Path) -> Any:
    """CLIP's byte-pair encoding: 256 bytes, the same as word ends, the merges, two special tokens.

    The file has more merges than CLIP uses. Unlike OpenAI's code, which mends HTML's entities and
    broken encodings in a text first, this one takes it as it is.
    """
    most = CLIP_TOKENS - 2 * 256 - len(_CLIP_MARKS)
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    merges = lines[1 : most + 1]
    pieces = list(bytes_to_unicode().values())
    pieces += [f"{piece}</w>" for piece in pieces]
    pieces += [merge.replace(" ", "") for merge in merges]
    ids = {piece: n for n, piece in enumerate([*pieces, *_CLIP_MARKS])}
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(ids))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        kind = {"tokenizer_class": "CLIPTokenizer"}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(kind))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def local_folder(name: str, value: str, remedy: str = _REMEDY) -> Path:
    """A setting's folder: a path, or `package:NAME/sub/folder` inside an installed package."""
    if not value.startswith("package:"):
        require(os.path.isdir(value), name, "be an existing folder", value, remedy)
        return Path(value)
    package, _, inside = value.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    require(
        spec is not None and bool(spec.submodule_search_locations),
        name,
        "name an installed package",
        value,
        f"pip install {_ON_THE_INDEX.get(package, package.replace('_', '-'))}",
    )
    folder = Path(spec.submodule_search_locations[0]) / inside  # type: ignore[index,union-attr]
    require(folder.is_dir(), name, "be a folder inside the package", value)
    return folder
