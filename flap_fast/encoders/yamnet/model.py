"""YAMNet: MobileNet v1 over pieces of a log-mel.

    packed mels (T, F) -> pieces (P, 1, 96, F) -> stem, 13 blocks -> means (P, D)
        -> tokens (P, D), pooled (B, D)

A block is a 3 x 3 convolution of each channel and a 1 x 1 convolution, each with a ReLU. Batch
norms are in the convolutions' weights and biases, as in exports of the trained model.

B clips   P pieces of all clips   F mel bins   D width

Source: Google's YAMNet, yamnet.py; Howard et al., MobileNets, arXiv 1704.04861.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.data.batch import Media, PackedMels
from flap_fast.encoders.base import AnyMask, Encoded, check_media
from flap_fast.encoders.packing import segments
from flap_fast.encoders.yamnet.settings import PATCH_FRAMES, YamnetSettings

# Channels of a block, as parts of the width, and its stride.
_BLOCKS = (
    *((16, 1), (8, 2), (8, 1), (4, 2), (4, 1), (2, 2)),
    *((2, 1), (2, 1), (2, 1), (2, 1), (2, 1), (1, 2), (1, 1)),
)
_STEM = 32


class Yamnet(nn.Module):
    """Log-mels -> `Encoded`, whose tokens are a clip's pieces."""

    block_names = r"blocks\.\d+\."

    def __init__(self, settings: YamnetSettings):
        super().__init__()
        self.settings, self.width = settings, settings.width
        channels = self.width // _STEM
        self.stem = nn.Conv2d(1, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        for part, stride in _BLOCKS:
            self.blocks.append(Block(channels, self.width // part, stride))
            channels = self.width // part
        self.apply(_initialise)

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
            media: packed, or rows (B, 1, T, F) of a multiple of 96 frames.
        """
        assert (mask, erase, longer) == (None, None, None)  # the config has checked it
        if isinstance(media, PackedMels):
            tokens = self._pieces(media.mel)
            clips = segments(self.settings.patches_of(media.frames), media.order, media.device)
            return Encoded(clips.mean(tokens), tokens)
        frames = media.shape[2] // PATCH_FRAMES * PATCH_FRAMES
        check_media(media, (1, frames, self.settings.mel_bins))
        tokens = self._pieces(media[:, 0].flatten(0, 1)).unflatten(0, (media.shape[0], -1))
        return Encoded(tokens.mean(1), tokens)

    def _pieces(self, mel: Tensor) -> Tensor:
        """(T, F) of P pieces -> (P, D) float32."""
        x = mel.unflatten(0, (-1, 1, PATCH_FRAMES))
        x = functional.relu(self.stem(_padded(x, 2)))
        # On a CPU convolutions take half the time so.
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3), dtype=torch.float32)


class Block(nn.Module):
    """(P, inputs, t, f) -> (P, outputs, t / stride, f / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride=stride, groups=inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.depthwise(_padded(x, self.depthwise.stride[0])))
        return functional.relu(self.pointwise(x))


def _padded(x: Tensor, stride: int) -> Tensor:
    """Zeros around, as TensorFlow's "same" has them: a stride of 2 has none before."""
    before = 2 - stride
    return functional.pad(x, (before, 1, before, 1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
