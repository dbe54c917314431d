"""YAMNet: MobileNet v1 over pieces of a log-mel.

    packed mels (T, F) -> pieces (P, 1, 96, F), a new one every 48 frames of a clip
        -> stem, 13 blocks, mean of the cells -> tokens (P, D) -> mean of each clip -> pooled (B, D)
                            -> classifier -> scores (P, C) -> mean, behind it: (B, D + C)

A block is a 3 x 3 convolution of each channel and a 1 x 1 convolution, each with a ReLU. Batch
norms are in the convolutions' weights and biases, as in exports of the trained model.

B clips   P pieces of all clips   F mel bins   D width   C classes, with joint.class_names

Source: Google's YAMNet, yamnet.py; Howard et al., MobileNets, arXiv 1704.04861.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.data.batch import Media, PackedMels
from flap_fast.encoders.base import AnyMask, Encoded, check_media
from flap_fast.encoders.packing import Segments, segments
from flap_fast.encoders.yamnet.settings import HALF_FRAMES, YamnetSettings

# Channels of a block, as parts of the width, and its stride.
_BLOCKS = (
    *((16, 1), (8, 2), (8, 1), (4, 2), (4, 1), (2, 2)),
    *((2, 1), (2, 1), (2, 1), (2, 1), (2, 1), (1, 2), (1, 1)),
)
_STEM = 32


class Yamnet(nn.Module):
    """Log-mels -> `Encoded`, whose tokens are a clip's pieces.

    Args:
        scores: of the classes stand behind the pooled vector: probabilities, a clip's mean.
    """

    block_names = r"blocks\.\d+\."

    def __init__(self, settings: YamnetSettings, *, scores: bool = False):
        super().__init__()
        self.settings, self.width = settings, settings.width
        channels = self.width // _STEM
        self.stem = nn.Conv2d(1, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        for part, stride in _BLOCKS:
            self.blocks.append(Block(channels, self.width // part, stride))
            channels = self.width // part
        self.apply(_initialise)
        self.classes, self.classifier = 0, None
        if scores:
            self.classes = settings.classes
            with torch.random.fork_rng(devices=()):  # the text encoder begins as without one
                self.classifier = nn.Linear(settings.width, self.classes)
            self.width += self.classes

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
            media: packed, or rows (B, 1, T, F) of a multiple of 48 frames, 96 at least.
        """
        assert (mask, erase, longer) == (None, None, None)  # the config has checked it
        if isinstance(media, PackedMels):
            clips = segments(self.settings.patches_of(media.frames), media.order, media.device)
            tokens = self._encoded(_pieces(media.mel).index_select(0, _within(clips)))
            return Encoded(clips.mean(self._scored(tokens)), tokens)
        frames = max(2, media.shape[2] // HALF_FRAMES) * HALF_FRAMES
        check_media(media, (1, frames, self.settings.mel_bins))
        pieces = _pieces(media[:, 0])
        tokens = self._encoded(pieces.flatten(0, 1)).unflatten(0, pieces.shape[:2])
        return Encoded(self._scored(tokens).mean(1), tokens)

    def _scored(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D + C) with a classifier."""
        if self.classifier is None:
            return tokens
        return torch.cat([tokens, self.classifier(tokens).float().sigmoid()], -1)

    def _encoded(self, pieces: Tensor) -> Tensor:
        """(P, 96, F) -> (P, D) float32."""
        x = functional.relu(self.stem(_padded(pieces[:, None], 2)))
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


def _pieces(mel: Tensor) -> Tensor:
    """(..., T, F) -> (..., T / 48 - 1, 96, F): each two neighbouring halves."""
    halves = mel.unflatten(-2, (-1, HALF_FRAMES))
    return torch.cat([halves[..., :-1, :, :], halves[..., 1:, :, :]], -2)


def _within(clips: Segments) -> Tensor:
    """(P,): of a pack's pieces those of one clip; one lies between each two clips."""
    return torch.arange(clips.tokens, device=clips.starts.device) + clips.of_tokens()


def _padded(x: Tensor, stride: int) -> Tensor:
    """Zeros around, as TensorFlow's "same" has them: a stride of 2 has none before."""
    before = 2 - stride
    return functional.pad(x, (before, 1, before, 1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
