"""The heads: an encoder's vectors -> the joint space.

    media (B, D) -> MlpHead            -> (B, d)
    media (B, D) -> MlpHead, L2        -> (B, d)      with joint.class_names: D is a vector's
               C -> scores x names, L2 ---^           width and C scores of classes
    text (B, D)  -> MlpHead, LinearHead or nothing -> (B, d)

Source: LAION-CLAP's projections, CLIP's; the mean of names by scores: ConSE, Norouzi et al., arXiv
1312.5650, of all classes here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.checks import require
from flap_fast.config import Config, Joint


class MlpHead(nn.Sequential):
    """LAION-CLAP's head, with dropout before each layer."""

    def __init__(self, width: int, joint: Joint):
        hidden = joint.hidden or joint.width
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, joint.width))
        self.dropout = joint.dropout

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, nn.Linear):
                input = functional.dropout(input, self.dropout, self.training)
            input = layer(input)
        return input


class ClassNamesHead(MlpHead):
    """An `MlpHead`, and beside it the mean of classes' embeddings, each weighted by its score.

    The vector of either has length 1 before they are added, the second times joint.class_names.
    The embeddings begin as those of the classes' names (`first_weights`) and are trained.

    Args:
        width: of the vector and the scores behind it.
        classes: how many scores.
    """

    def __init__(self, width: int, classes: int, joint: Joint):
        super().__init__(width - classes, joint)
        self.class_names = nn.Parameter(torch.empty(classes, joint.width))
        self.weight = joint.class_names
        with torch.random.fork_rng(devices=()):  # adapters begin as without names
            nn.init.normal_(self.class_names, std=joint.width**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        classes = len(self.class_names)
        vector, scores = input.split((input.shape[-1] - classes, classes), -1)
        named = functional.linear(scores, self.class_names.T)
        own = functional.normalize(super().forward(vector).float(), dim=-1)
        return own + self.weight * functional.normalize(named.float(), dim=-1)


class LinearHead(nn.Linear):
    """CLIP's head: a linear map without bias, with dropout before it."""

    def __init__(self, width: int, joint: Joint):
        super().__init__(width, joint.width, bias=False)
        self.dropout = joint.dropout
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.dropout(input, self.dropout, self.training))


def media_head(config: Config, encoder: nn.Module) -> nn.Module:
    """The projection of a media encoder's vectors."""
    width: int = encoder.width  # type: ignore[assignment]
    if config.joint.class_names:
        return ClassNamesHead(width, encoder.classes, config.joint)  # type: ignore[arg-type]
    return MlpHead(width, config.joint)


def text_head(config: Config, width: int) -> nn.Module:
    """The captions' projection that joint.text_head names."""
    kind, joint = config.joint.text_head, config.joint
    if kind != "none":
        return _HEADS[config.text.head if kind == "encoder" else kind](width, joint)
    rule = f"be {width}, the text encoder's width, with joint.text_head = none"
    require(joint.width == width, "joint.width", rule, joint.width)
    return nn.Identity()


_HEADS = {"mlp": MlpHead, "linear": LinearHead}
