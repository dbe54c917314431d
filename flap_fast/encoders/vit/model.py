"""FLAP's audio encoder: a ViT over the kept patches of a log-mel.

    mel (B, 1, T, F) -> patches (B, N, P^2) -> kept, embedded, positions added (B, K, D) -> blocks
        -> tokens (B, [1 +] K, D), pooled (B, D)
    packed mels (T, F) -> (K, D), K of all clips -> [CLS] before each clip's -> blocks within clips
        -> tokens ([B +] K, D), pooled (B, D)

Dropped patches are never embedded: the gather comes before the product. With 2-D fusion all are:
fusion needs whole clips, and masking comes after it.

Source: FLAP, arXiv 2311.01615, section 3; the ViT as in AudioMAE, arXiv 2207.06405.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.config import Fusion
from flap_fast.data.batch import Media, PackedMels
from flap_fast.encoders.base import AnyMask, Encoded, PackedMask, check_media
from flap_fast.encoders.blocks import LAYER_NORM_EPS, Blocks, initialise
from flap_fast.encoders.fusion import (
    fuse_mels,
    fuse_patches,
    fusion_model,
    piece_mels,
    piece_patches,
)
from flap_fast.encoders.packing import Segments, segments
from flap_fast.encoders.rotary import rotation
from flap_fast.encoders.vit.settings import ViTSettings
from flap_kernels import gather_tokens, patch_embed


class PatchEmbed(nn.Linear):
    """(B, T, F) log-mels -> the kept patches' embeddings plus their positions, (B, K, D).

    A module of its own, so that ZeRO-3 gathers its weights when it is called.
    """

    def forward(  # type: ignore[override]
        self,
        mel: Tensor,
        ids_keep: Tensor | None,
        position: Tensor,
        position_index: Tensor | None = None,
    ) -> Tensor:
        return patch_embed(mel, ids_keep, self.weight, self.bias, position, position_index)


class ViT(nn.Module):
    """Log-mels and the patches of them that are kept -> `Encoded`.

    With fusion, (B, 4, T, F) and which of the clips are longer.
    """

    block_names = r"blocks\.\d+\."
    pos_embed: Tensor
    # Set only with 1-D or 2-D fusion.
    mel_conv2d: nn.Conv2d
    mel_conv1d: nn.Module
    fusion_model: nn.Module

    def __init__(
        self, settings: ViTSettings, fusion: Fusion | None = None, *, recompute: bool = False
    ):
        super().__init__()
        (width, depth, heads), patch = settings.shape, settings.patch
        self.width, self.settings, self.fusion = width, settings, fusion or Fusion()
        if self.fusion.type == "channel_map":
            self.patch_embed = nn.Conv2d(
                self.fusion.channels, width, settings.patch, settings.patch
            )
        else:
            self.patch_embed = PatchEmbed(patch**2, width)
        if self.fusion.type.endswith("_2d"):
            self.mel_conv2d = piece_patches(width, patch, time=2)
            self.fusion_model = fusion_model(self.fusion.type, width)
        elif self.fusion.type.endswith("_1d"):
            self.mel_conv1d = piece_mels(settings.mel_bins)
            self.fusion_model = fusion_model(self.fusion.type, settings.mel_bins)
        self.register_buffer("pos_embed", settings.added_positions())
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if settings.use_cls else None
        self.blocks = Blocks(
            width,
            depth,
            heads,
            drop_path=settings.drop_path,
            backend=settings.attention,
            recompute=recompute,
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.apply(initialise)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def forward(
        self,
        media: Media,
        mask: AnyMask | None = None,
        *,
        erase: Tensor | None = None,
        longer: Tensor | None = None,
    ) -> Encoded:
        """Encode B clips.

        Args:
            media: (B, 1, T, F) log-mels; (B, 4, T, F) with fusion; or packed. With audio.length =
                variable, T is any multiple of a patch up to that of the longest clip.
            mask: the patches that masking keeps; None keeps all.
            erase: (B, T, F) bool, cells to set to 0.
            longer: (B,) bool on the CPU, with fusion: the clips to fuse; none without.
        """
        if isinstance(media, PackedMels):
            assert mask is None or isinstance(mask, PackedMask)
            x, clips, turn = self._packed(media, mask)
        else:
            self._check(media)
            mel = media if erase is None else media.masked_fill(erase[:, None], 0.0)
            assert not isinstance(mask, PackedMask)
            ids_keep = None if mask is None else mask.ids_keep
            x, clips = self._embedded(mel, ids_keep, longer), None
            if self.cls_token is not None:
                x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
            turn = self._rotation(self._numbers(media) if ids_keep is None else ids_keep)
        x = self.blocks(x, clips, turn)
        if self.settings.norm_position == "tokens":
            x = self.norm(x)
            return Encoded(self._pool(x, clips).float(), x)
        return Encoded(self.norm(self._pool(x, clips)).float(), x)

    def _check(self, media: Tensor) -> None:
        """Refuse rows of another shape, and what only packed clips can be."""
        settings = self.settings
        channels, frames, bins = settings.input_shape(self.fusion)
        if settings.variable and media.ndim == 4:
            frames = min(frames, media.shape[2])
        check_media(media, (channels, frames, bins))
        if settings.attention_window_s is not None:
            raise ValueError("media must be PackedMels with audio.attention_window_s, got rows")

    def _numbers(self, media: Tensor) -> Tensor:
        """(N,): the numbers of a clip's patches."""
        N = media.shape[2] // self.settings.patch * self.settings.grid[1]
        return torch.arange(N, device=media.device)

    def _packed(
        self, media: PackedMels, mask: PackedMask | None
    ) -> tuple[Tensor, Segments, Tensor | None]:
        """([B +] K, D): the patches kept of all clips embedded, each clip's behind its [CLS].

        With the clips' segments of them, and their rotation.
        """
        patches = self.settings.patches_of(media.frames)
        kept = patches if mask is None else mask.kept
        own = segments(patches, media.order, media.device)
        n = torch.arange(own.tokens, device=media.device)
        # The patch's number in its own clip: its row in the table of positions.
        position = n - own.of_tokens(own.starts[:-1])
        if mask is not None:
            n = mask.patches.ids_keep[0]
            position = position.index_select(0, n)
        row = position % self.settings.grid[1] if self.settings.rotary else position
        x = self.patch_embed(media.mel[None], n[None], self.pos_embed, row[None])[0]
        prefix = self.settings.prefix_tokens
        window = self.settings.window_tokens(1.0 if mask is None else mask.density)
        lengths = [count + prefix for count in kept]
        clips = segments(lengths, media.order, media.device, window=window)
        turn = self._rotation(position, clips)
        if self.cls_token is None:
            return x, clips, turn
        cls_tokens = self.cls_token[0].to(x.dtype).expand(len(kept), -1)
        return clips.behind(cls_tokens, x), clips, turn

    def _rotation(self, n: Tensor, clips: Segments | None = None) -> Tensor | None:
        """The rotation by the time column of patches number `n` (..., K).

        [CLS] is not turned, like the patches of the first column. None with sines.
        """
        settings = self.settings
        if not settings.rotary:
            return None
        column = (n // settings.grid[1]).float()
        if settings.prefix_tokens and clips is None:
            column = functional.pad(column, (1, 0))
        elif clips is not None and settings.prefix_tokens:
            column = clips.behind(column.new_zeros(len(clips.index), 1), column[:, None])[:, 0]
        return rotation(column, self.width // settings.shape[2])

    def _positions(self, media: Tensor) -> Tensor:
        """(N, D): what is added to the patches of clips in rows."""
        columns, freqs = media.shape[2] // self.settings.patch, self.settings.grid[1]
        if self.settings.rotary:
            return self.pos_embed.repeat(columns, 1)
        return self.pos_embed[: columns * freqs]

    def _embedded(self, mel: Tensor, ids_keep: Tensor | None, longer: Tensor | None) -> Tensor:
        """(B, K, D): patches fused and embedded, their positions added."""
        if longer is None:
            longer = torch.zeros(mel.shape[0], dtype=torch.bool)
        if self.fusion.type.endswith("_1d"):
            mel = fuse_mels(self.mel_conv1d, self.fusion_model, mel, longer)
        positions = self._positions(mel)
        if isinstance(self.patch_embed, nn.Conv2d):
            x = self.patch_embed(mel)
        elif self.fusion.type.endswith("_2d"):
            x = self.patch_embed(mel[:, 0], None, torch.zeros_like(positions))
            x = x.transpose(1, 2).unflatten(2, self.settings.grid)
            pieces = mel[:, 1:]
            x = fuse_patches(self.mel_conv2d, self.fusion_model, x, pieces, longer, time=2)
        else:
            return self.patch_embed(mel[:, 0], ids_keep, positions)
        x = x.flatten(2).transpose(1, 2) + positions
        return x if ids_keep is None else gather_tokens(x, ids_keep)

    def _pool(self, x: Tensor, clips: Segments | None) -> Tensor:
        if self.settings.pool == "cls":
            return x[:, 0] if clips is None else clips.first(x)
        first = 1 if self.settings.use_cls and self.settings.pool == "mean_patch" else 0
        if clips is not None:
            return clips.mean(x, skip=first)
        return x[:, first:].mean(1, dtype=torch.float32)
