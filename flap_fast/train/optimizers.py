"""The optimizer, what weight decay applies to, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from flap_fast.config import Config


def optimizer(config: Config, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Adam or AdamW; weight decay on matrices only, not on tokens or tables of biases."""
    settings = config.optim
    decayed, others = parameter_groups(model)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    algorithm = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return algorithm(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=device.type == "cuda" or config.train.offload != "none",
    )


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters that weight decay applies to, and the others."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    not_decayed = ("_token", "_bias_table", "positional_embedding")
    matrices = {name for name, p in trained if p.ndim >= 2 and not name.endswith(not_decayed)}
    return (
        [p for name, p in trained if name in matrices],
        [p for name, p in trained if name not in matrices],
    )


def warmup_cosine(step: int, *, base: float, warmup: int, steps: int) -> float:
    """The learning rate: linear warm-up, then half a cosine to zero at `steps`; counted from 0.

    Source: the schedulers of LAION-CLAP's and CyCLIP's public code.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
