"""Settings of CLIP's ResNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from flap_fast.encoders.settings import ImageEncoder
from flap_fast.section import MEANS_WEIGHTS, Depth

if TYPE_CHECKING:
    from torch import nn

    from flap_fast.config import Config


class ClipResNetSettings(ImageEncoder):
    why_not = {  # noqa: RUF012 - a ClassVar of the base
        "recompute": "whose BatchNorms would count each image twice",
    }
    joint_space = True

    encoder: Annotated[Literal["resnet50"], MEANS_WEIGHTS] = "resnet50"
    """CLIP's ResNet: a stem of three convolutions, blurred strides, pooling by attention."""
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Channels after the stem; the pooled vector has 32 times as many, in heads of 64."""
    layers: tuple[Depth, Depth, Depth, Depth] = (3, 4, 6, 3)
    """Bottlenecks of each stage: ResNet-50's."""

    @property
    def heads(self) -> int:
        """Heads of the pooling, of width 64 as in all of CLIP's ResNets."""
        return self.width * 32 // 64

    def build(self, config: Config, *, recompute: bool = False) -> nn.Module:
        from flap_fast.encoders.clip_resnet.model import ClipResNet

        return ClipResNet(self, config.joint.width)
