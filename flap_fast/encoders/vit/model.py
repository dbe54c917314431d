"""The audio encoder: a ViT over the patches of a log-mel that masking left.

    mel (B, 1, T, F) -> patches (B, N, 256) -> kept, embedded, placed (B, K, D) -> blocks
        -> tokens (B, [1 +] K, D), pooled (B, D)

Dropped patches are never embedded: the gather comes before the product. With 2-D fusion all are: it
looks at whole clips, and masking comes after it.

Source: FLAP section 3; ViT as AudioMAE builds it (SPEC 4.1 to 4.4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flap_fast.config import Audio, Fusion
from flap_fast.data.preprocess.fusion import CHANNELS
from flap_fast.encoders.blocks import LAYER_NORM_EPS, Blocks, initialise
from flap_fast.encoders.fusion import (
    fuse_mels,
    fuse_patches,
    fusion_model,
    piece_mels,
    piece_patches,
)
from flap_fast.encoders.vit.patches import sine_positions
from flap_kernels import gather_tokens, patch_embed


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

    def forward(  # type: ignore[override]
        self, mel: Tensor, keep: Tensor | None, position: Tensor
    ) -> Tensor:
        return patch_embed(mel, keep, self.weight, self.bias, position)


class ViT(nn.Module):
    """(B, 1, T, F) log-mels, and the indices (B, K) of the patches kept -> `Encoded`.

    With fusion, (B, 4, T, F) and which of the clips are longer.
    """

    pos_embed: Tensor
    # There with the forms of fusion that have them.
    mel_conv2d: nn.Conv2d
    mel_conv1d: nn.Module
    fusion_model: nn.Module

    def __init__(self, audio: Audio, fusion: Fusion | None = None, *, recompute: bool = False):
        super().__init__()
        width, depth, heads = audio.shape
        self.width, self.audio, self.fusion = width, audio, fusion or Fusion()
        if self.fusion.type == "channel_map":
            self.patch_embed = nn.Conv2d(CHANNELS, width, audio.patch, audio.patch)
        else:
            self.patch_embed = PatchEmbed(audio.patch**2, width)
        if self.fusion.type.endswith("_2d"):
            self.mel_conv2d = piece_patches(width, audio.patch, time=2)
            self.fusion_model = fusion_model(self.fusion.type, width)
        elif self.fusion.type.endswith("_1d"):
            self.mel_conv1d = piece_mels(audio.mel_bins)
            self.fusion_model = fusion_model(self.fusion.type, audio.mel_bins)
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
        self,
        mel: Tensor,
        keep: Tensor | None = None,
        *,
        erase: Tensor | None = None,
        longer: Tensor | None = None,
    ) -> Encoded:
        """Encode B clips.

        Args:
            keep: (B, K), the patches that masking left; all of them without.
            erase: (B, T, F) bool, cells to set to 0.
            longer: (B,) bool on the CPU, with fusion: the clips to fuse; none without.
        """
        check_mel(mel, self.audio, self.fusion)
        mel = mel if erase is None else mel.masked_fill(erase[:, None], 0.0)
        x = self._embedded(mel, keep, longer)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)
        x = self.blocks(x)
        if self.audio.norm_position == "tokens":
            x = self.norm(x)
            return Encoded(self._pool(x).float(), x)
        return Encoded(self.norm(self._pool(x)).float(), x)

    def _embedded(self, mel: Tensor, keep: Tensor | None, longer: Tensor | None) -> Tensor:
        """(B, K, D): patches fused, embedded and placed."""
        if longer is None:
            longer = torch.zeros(len(mel), dtype=torch.bool)
        if self.fusion.type.endswith("_1d"):
            mel = fuse_mels(self.mel_conv1d, self.fusion_model, mel, longer)
        if isinstance(self.patch_embed, nn.Conv2d):
            x = self.patch_embed(mel)
        elif self.fusion.type.endswith("_2d"):
            x = self.patch_embed(mel[:, 0], None, torch.zeros_like(self.pos_embed))
            x = x.transpose(1, 2).unflatten(2, self.audio.grid)
            pieces = mel[:, 1:]
            x = fuse_patches(self.mel_conv2d, self.fusion_model, x, pieces, longer, time=2)
        else:
            return self.patch_embed(mel[:, 0], keep, self.pos_embed)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        return x if keep is None else gather_tokens(x, keep)

    def _pool(self, x: Tensor) -> Tensor:
        if self.audio.pool == "cls":
            return x[:, 0]
        first = 1 if self.audio.use_cls and self.audio.pool == "mean_patch" else 0
        return x[:, first:].mean(1, dtype=torch.float32)


def check_mel(mel: Tensor, audio: Audio, fusion: Fusion) -> None:
    """Raise ValueError unless these are the log-mels that an encoder was built for."""
    shape = (CHANNELS if fusion.on else 1, audio.frames, audio.mel_bins)
    if mel.shape[1:] != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"mel must be (B, {wanted}), got {tuple(mel.shape)}")
