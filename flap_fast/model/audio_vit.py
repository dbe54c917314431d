"""The audio encoder: a ViT over the patches of a log-mel that masking left.

    mel (B, 1, T, F) -> patches (B, N, 256) -> kept, embedded, placed (B, K, D) -> blocks
        -> tokens (B, [1 +] K, D), pooled (B, D)

Dropped patches are never embedded: the gather comes before the product.

Source: FLAP section 3; ViT as AudioMAE builds it (SPEC 4.1 to 4.4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flap_fast.config import Audio
from flap_fast.model.patches import sine_positions
from flap_fast.model.transformer import LAYER_NORM_EPS, Blocks, initialise
from flap_kernels import patch_embed


class Encoded(NamedTuple):
    """What an audio encoder gives."""

    pooled: Tensor
    """(B, D)."""
    tokens: Tensor
    """(B, [1 +] K, D), the [CLS] token first if there is one."""


class PatchEmbed(nn.Linear):
    """(B, T, F) log-mels -> the kept patches' embeddings at their positions, (B, K, D).

    A module of its own, so that ZeRO-3 gathers its weights when it is called.
    """

    def forward(self, mel: Tensor, keep: Tensor | None, position: Tensor) -> Tensor:
        return patch_embed(mel, keep, self.weight, self.bias, position)


class AudioViT(nn.Module):
    """(B, 1, T, F) log-mels, and the indices (B, K) of the patches kept -> `Encoded`."""

    def __init__(self, audio: Audio, *, recompute: bool = False):
        super().__init__()
        width, depth, heads = audio.shape
        self.width, self.audio = width, audio
        self.patch_embed = PatchEmbed(audio.patch**2, width)
        positions = sine_positions(width, audio.grid, audio.pos_grid)
        self.register_buffer("pos_embed", positions)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if audio.use_cls else None
        self.blocks = Blocks(
            width,
            depth,
            heads,
            drop_path=audio.drop_path,
            backend=audio.attention,
            recompute=recompute,
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.apply(initialise)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def forward(
        self, mel: Tensor, keep: Tensor | None = None, *, erase: Tensor | None = None
    ) -> Encoded:
        T, F = self.audio.frames, self.audio.mel_bins
        if mel.shape[1:] != (1, T, F):
            raise ValueError(f"mel must be (B, 1, {T}, {F}), got {tuple(mel.shape)}")
        mel = mel if erase is None else mel.masked_fill(erase[:, None], 0.0)
        x = self.patch_embed(mel[:, 0], keep, self.pos_embed)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)
        x = self.blocks(x)
        if self.audio.norm_position == "tokens":
            x = self.norm(x)
            return Encoded(self._pool(x).float(), x)
        return Encoded(self.norm(self._pool(x)).float(), x)

    def _pool(self, x: Tensor) -> Tensor:
        if self.audio.pool == "cls":
            return x[:, 0]
        first = 1 if self.audio.use_cls and self.audio.pool == "mean_patch" else 0
        return x[:, first:].mean(1, dtype=torch.float32)
