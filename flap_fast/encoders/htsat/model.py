"""HTSAT, LAION-CLAP's audio encoder: a Swin transformer over a log-mel folded into a square.

    mel (B, 1, T, F) -> bn0 -> [SpecAug] -> time stretched to side^2 / F, folded (B, 1, side, side)
        -> patches (B, N, D) -> [fusion] -> stages of windows, N / 4 and 2 D at each
        -> tokens (B, 64, 8 D)

    B clips   T frames   F mel bins   N patches   D width   h heads   L patches of a window

Names are LAION's (`layers.0.blocks.1.attn.qkv`). One product makes queries, keys and values, which
are then cut into windows once; windows of a clip and heads are one axis of one fused attention.

Source: Chen et al., HTS-AT, arXiv 2202.00874; Liu et al., Swin, arXiv 2103.14030.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flap_fast.config import Fusion
from flap_fast.encoders.base import AnyMask, Encoded, check_media
from flap_fast.encoders.blocks import Mlp
from flap_fast.encoders.fusion import (
    fuse_mels,
    fuse_patches,
    fusion_model,
    piece_mels,
    piece_patches,
)
from flap_fast.encoders.htsat.settings import HTSATSettings

# Added to logits across the seam of a shifted grid; finite, as in Swin.
_SEAM = -100.0


class HTSAT(nn.Module):
    """(B, 1, T, F) log-mels in decibels -> `Encoded`, pooled by the mean over tokens.

    With fusion, (B, 4, T, F) and which of the clips are longer.
    """

    block_names = r"layers\.\d+\.blocks\.\d+\."
    # Set only with 1-D fusion.
    mel_conv1d: nn.Module
    fusion_model: nn.Module

    def __init__(
        self, settings: HTSATSettings, fusion: Fusion | None = None, *, recompute: bool = False
    ):
        super().__init__()
        self.settings, side, self.fusion = settings, settings.image_side, fusion or Fusion()
        self.bn0 = nn.BatchNorm2d(settings.mel_bins)
        self.patch_embed = PatchEmbed(settings.patch, settings.stages[0][0], self.fusion)
        if self.fusion.type.endswith("_1d"):
            self.mel_conv1d = piece_mels(settings.mel_bins)
            self.fusion_model = fusion_model(self.fusion.type, settings.mel_bins)
        blocks = sum(depth for _, depth, _ in settings.stages)
        rates = torch.linspace(0, settings.drop_path, blocks, device="cpu").tolist()
        self.layers = nn.ModuleList()
        for n, (width, depth, heads) in enumerate(settings.stages):
            grid, drop_path, rates = side // settings.patch >> n, rates[:depth], rates[depth:]
            window = min(settings.window_patches, grid)
            last = n == len(settings.stages) - 1
            stage = Stage(width, heads, grid, window, drop_path, merge=not last)
            stage.recompute = recompute
            self.layers.append(stage)
        self.width = settings.stages[-1][0]
        self.norm = nn.LayerNorm(self.width)
        self.apply(_initialise)

    def forward(
        self,
        media: Tensor,
        mask: AnyMask | None = None,
        *,
        erase: Tensor | None = None,
        longer: Tensor | None = None,
    ) -> Encoded:
        """Encode B clips.

        Args:
            media: (B, 1, T, F) log-mels; (B, 4, T, F) with fusion.
            mask: must be None: windows need every patch.
            erase: (B, T, F) bool, what SpecAug sets to 0 after the first norm.
            longer: (B,) bool on the CPU, with fusion: the clips to fuse; none without.
        """
        check_media(media, self.settings.input_shape(self.fusion))
        if mask is not None:
            raise ValueError("mask must be None: HTSAT's windows need every patch")
        if longer is None:
            longer = torch.zeros(media.shape[0], dtype=torch.bool)
        x = self.bn0(media.float().transpose(1, 3)).transpose(1, 3)
        if self.fusion.type.endswith("_1d"):
            x = fuse_mels(self.mel_conv1d, self.fusion_model, x, longer)
        if erase is not None:
            x = x.masked_fill(erase[:, None], 0.0)
        x = self.patch_embed(fold(x, self.settings.image_side), longer)
        for stage in self.layers:
            x = stage(x)
        x = self.norm(x)
        return Encoded(x.mean(1, dtype=torch.float32), x)


def fold(mel: Tensor, side: int) -> Tensor:
    """(B, C, T, F) -> (B, C, side, side): time stretched, cut into pieces, pieces stacked.

    Rows are `piece * F + bin`, columns are time within a piece.
    """
    B, C, T, F = mel.shape
    folds = side // F
    if side * folds > T:
        size = (side * folds, F)
        mel = functional.interpolate(mel, size, mode="bicubic", align_corners=True)
    return mel.reshape(B, C, folds, side, F).transpose(3, 4).reshape(B, C, side, side)


class PatchEmbed(nn.Module):
    """(B, 1, side, side) -> (B, N, D); with 2-D fusion from (B, 4, side, side)."""

    def __init__(self, patch: int, width: int, fusion: Fusion):
        super().__init__()
        channels = fusion.channels if fusion.type == "channel_map" else 1
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.norm = nn.LayerNorm(width)
        self.fuses = fusion.type.endswith("_2d")
        if self.fuses:
            self.mel_conv2d = piece_patches(width, patch, time=3)
            self.fusion_model = fusion_model(fusion.type, width)

    def forward(self, image: Tensor, longer: Tensor) -> Tensor:
        x = self.proj(image[:, :1] if self.fuses else image)
        if self.fuses:
            pieces = image[:, 1:]
            x = fuse_patches(self.mel_conv2d, self.fusion_model, x, pieces, longer, time=3)
        return self.norm(x.flatten(2).transpose(1, 2))


class Stage(nn.Module):
    """Blocks on one grid, every second one with shifted windows; then a merge, except at the end.

    (B, N, D) -> (B, N / 4, 2 D), or (B, N, D).
    """

    def __init__(
        self, width: int, heads: int, grid: int, window: int, drop_path: list[float], *, merge: bool
    ):
        super().__init__()
        shifts = [n % 2 * (window // 2) if window < grid else 0 for n in range(len(drop_path))]
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads, grid, window, shift, rate)
            for shift, rate in zip(shifts, drop_path, strict=True)
        )
        self.downsample = PatchMerging(width, grid) if merge else None
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinBlock(nn.Module):
    """One pre-norm block; in training each branch of a clip is dropped with rate `drop_path`."""

    def __init__(
        self, width: int, heads: int, grid: int, window: int, shift: int, drop_path: float
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, grid, window, shift)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        stays = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.drop_path)
        return branch * stays / (1 - self.drop_path)


class WindowAttention(nn.Module):
    """Attention within the windows of a (grid, grid) of patches, with a bias by relative position.

    (B, grid^2, D) -> the same. With a shift the grid is rolled first; windows at the seam hold
    patches from both ends of it, which are kept apart.
    """

    relative_position_index: Tensor
    apart: Tensor | None

    def __init__(self, width: int, heads: int, grid: int, window: int, shift: int):
        super().__init__()
        self.heads, self.grid, self.window, self.shift = heads, grid, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        table = torch.empty((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        index = _relative_positions(window)
        self.register_buffer("relative_position_index", index, persistent=False)
        apart = _apart(grid, window, shift) if shift else None
        self.register_buffer("apart", apart, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        g, w, n, h = self.grid, self.window, self.grid // self.window, self.heads
        x = x.view(B, g, g, D)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        qkv = self.qkv(x).view(B, n, w, n, w, 3, h, D // h).permute(5, 0, 1, 3, 6, 2, 4, 7)
        bias = self._bias().to(qkv.dtype)
        # A bias that differs between windows needs them on the heads' axis, to be broadcast over B.
        rows = B if self.shift else B * n * n
        q, k, v = qkv.reshape(3, rows, -1, w * w, D // h)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.view(B, n, n, h, w, w, D // h).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, g, g, D)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        return self.proj(y.reshape(B, N, D))

    def _bias(self) -> Tensor:
        """(1, h, L, L), or with a shift (1, windows * h, L, L)."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if self.apart is None:
            return bias[None]
        return (bias + self.apart[:, None]).flatten(0, 1)[None]


class PatchMerging(nn.Module):
    """(B, N, D) -> (B, N / 4, 2 D): each 2 x 2 neighbours, in the order of Swin's columns."""

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        half = self.grid // 2
        x = x.view(B, half, 2, half, 2, D).permute(0, 1, 3, 4, 2, 5).reshape(B, N // 4, 4 * D)
        return self.reduction(self.norm(x))


def _relative_positions(window: int) -> Tensor:
    """(L, L) int64: the row of the table for two patches of a window."""
    at = torch.arange(window)
    apart = at[:, None] - at[None, :] + window - 1
    rows = apart[:, None, :, None] * (2 * window - 1)
    return (rows + apart[None, :, None, :]).reshape(window**2, window**2)


def _apart(grid: int, window: int, shift: int) -> Tensor:
    """(windows, L, L): 0 within a region of the rolled grid, `_SEAM` between two."""
    at = torch.arange(grid)
    part = (at >= grid - window).long() + (at >= grid - shift).long()
    n = grid // window
    region = (part[:, None] * 3 + part[None, :]).view(n, window, n, window)
    region = region.transpose(1, 2).reshape(n * n, window**2)
    return (region[:, :, None] != region[:, None, :]).float() * _SEAM


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
