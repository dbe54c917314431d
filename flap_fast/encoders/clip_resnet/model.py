"""CLIP's ResNet: the image tower, with OpenAI's names.

    image (B, 3, R, R) -> stem (B, D, R/4, R/4) -> layer1 .. layer4 (B, 32 D, R/32, R/32)
        -> attention pooling -> (B, d)

Unlike a plain ResNet: three convolutions in the stem; but for the first of them none skips pixels,
strides are means of squares; and the vector is what the mean of the grid attends to. The last map
of that attention leads into the joint space, so the tower needs no head.

B images   R resolution   D width   d joint width   N = (R / 32)^2 cells of the last grid

Source: Radford et al., CLIP, arXiv 2103.00020, and its published code.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.encoders.base import AnyMask, Encoded, check_media
from flap_fast.encoders.clip_resnet.settings import ClipResNetSettings

_EXPANSION = 4


class ClipResNet(nn.Module):
    """(B, 3, R, R) normalised images -> `Encoded`, `pooled` in the joint space (not normalised).

    The tokens are the last grid's cells, (B, N, 32 D).
    """

    block_names = r"layer\d\.\d+\."

    def __init__(self, settings: ClipResNetSettings, joint_width: int):
        super().__init__()
        width, self.resolution, self.width = settings.width, settings.resolution, joint_width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inner = [width << n for n in range(4)]
        outer = [width, *(_EXPANSION * channels for channels in inner)]
        self.layer1 = _layer(outer[0], inner[0], settings.layers[0], stride=1)
        self.layer2 = _layer(outer[1], inner[1], settings.layers[1], stride=2)
        self.layer3 = _layer(outer[2], inner[2], settings.layers[2], stride=2)
        self.layer4 = _layer(outer[3], inner[3], settings.layers[3], stride=2)
        side = settings.resolution // 32
        self.attnpool = AttentionPool(side, outer[4], settings.heads, joint_width)

    def forward(
        self,
        media: Tensor,
        mask: AnyMask | None = None,
        *,
        erase: Tensor | None = None,
        longer: Tensor | None = None,
    ) -> Encoded:
        """Encode B images (B, 3, R, R); nothing of them is masked, erased or fused."""
        check_media(media, (3, self.resolution, self.resolution))
        if mask is not None or erase is not None or longer is not None:
            raise ValueError("mask, erase and longer must be None: images are taken whole")
        x = functional.relu(self.bn1(self.conv1(media)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = functional.relu(self.bn3(self.conv3(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.avgpool(x)))))
        tokens = x.flatten(2).transpose(1, 2)
        return Encoded(self.attnpool(tokens).float(), tokens)


class Bottleneck(nn.Module):
    """(B, C, H, W) -> (B, 4 inner, H / stride, W / stride): 1x1, 3x3, [mean], 1x1, and the rest.

    The last norm's weight is 0 at first: training starts from only the shortcuts.
    """

    def __init__(self, channels: int, inner: int, stride: int):
        super().__init__()
        outer = _EXPANSION * inner
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        nn.init.zeros_(self.bn3.weight)
        self.downsample = None
        if stride > 1 or channels != outer:
            shortcut = {
                "-1": nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
                "0": nn.Conv2d(channels, outer, 1, bias=False),
                "1": nn.BatchNorm2d(outer),
            }
            self.downsample = nn.Sequential(OrderedDict(shortcut))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.avgpool(functional.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """(B, N, D) cells -> (B, d): their mean, as a token before them, attends to all and itself."""

    def __init__(self, side: int, width: int, heads: int, joint_width: int):
        super().__init__()
        self.heads, std = heads, width**-0.5
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) * std)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, joint_width)
        for projection in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=std)

    def forward(self, cells: Tensor) -> Tensor:
        x = torch.cat([cells.mean(1, keepdim=True), cells], 1)
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = self._heads(self.q_proj(x[:, :1])), self._heads(self.k_proj(x)), self.v_proj(x)
        y = functional.scaled_dot_product_attention(q, k, self._heads(v))
        return self.c_proj(y.transpose(1, 2).flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, heads, L, D / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _layer(channels: int, inner: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(_EXPANSION * inner, inner, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(channels, inner, stride), *rest)
