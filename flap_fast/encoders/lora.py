"""LoRA: low-rank adapters beside the linear layers of an encoder's blocks, which stay frozen.

    y = W x + b + alpha / rank  B A x        A (rank, in)   B (out, rank), at first zero

    NAME.weight  NAME.lora.a  NAME.lora.b    as the state dict has them; merged, NAME.weight alone

Source: Hu et al., arXiv 2106.09685; first values as in the library peft.
"""

from __future__ import annotations

import math
import re
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.checks import require
from flap_fast.encoders.block_depths import untrained


class Lora(nn.Module):
    """An adapter: (..., in) -> (..., out)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.a), self.b) * self.scale


class LoraLinear(nn.Linear):
    """A linear layer and its adapter."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        sizes = linear.in_features, linear.out_features
        super().__init__(*sizes, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora = Lora(linear.weight, rank, alpha)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.lora(input)


def add_lora(encoder: nn.Module, section: str, rank: int, alpha: float) -> list[nn.Module]:
    """Freeze an encoder and give the linear layers of its blocks adapters.

    A module with packed weights adds its own, by a method `add_lora(rank, alpha)`.

    Args:
        section: of the config, for errors.

    Returns:
        The modules without a trained weight, as of `block_depths.freeze`.

    Raises:
        ConfigError: its blocks have no linear layer, or one narrower than the rank.
    """
    names = getattr(encoder, "block_names", None)
    in_blocks = [name for name in dict(encoder.named_modules()) if names and re.match(names, name)]
    weights = [module.weight for module in map(encoder.get_submodule, in_blocks) if _linear(module)]
    most = min((min(weight.shape) for weight in weights), default=rank)  # type: ignore[type-var]
    rule = f"be at most {most}, the width of this encoder's narrowest layer"
    require(rank <= most, f"{section}.lora_rank", rule, rank)
    encoder.requires_grad_(False)
    for name in in_blocks:
        module = encoder.get_submodule(name)
        if _linear(module):
            above, _, own = name.rpartition(".")
            setattr(encoder.get_submodule(above), own, LoraLinear(module, rank, alpha))
        elif hasattr(module, "add_lora"):
            module.add_lora(rank, alpha)  # type: ignore[operator]
    rule = "be 0 with this encoder, whose blocks have no linear layer"
    has_any = any(isinstance(module, Lora) for module in encoder.modules())
    require(has_any, f"{section}.lora_rank", rule, rank)
    return untrained(encoder)


def _linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear


def has_lora(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(isinstance(module, Lora) for module in model.modules())


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the same model without adapters: each is added to its layer's weight.

    Args:
        weights: the whole state dict of `model`.
    """
    whole = dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, Lora) and weights:
            a, b = (whole.pop(f"{name}.{part}") for part in "ab")
            weight = f"{name.removesuffix('lora')}weight"
            whole[weight] = whole[weight] + module.scale * (b.double() @ a.double()).float()
    return whole
