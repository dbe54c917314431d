"""How deep each weight of an encoder lies: what layer decay and freezing of first blocks go by.

    0   before the blocks: the embeddings of patches or tokens, positions, a stem
    1   the first block .. N, the last one; what lies between two goes with the earlier
    N+1 behind them: the last norm, a pooler

An encoder says by `block_names`, a regular expression, which names are of a block.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from flap_fast.checks import require


def block_depths(encoder: nn.Module) -> tuple[dict[str, int], int]:
    """Depth of each parameter by its name, and the number N of blocks; 0 if none are named."""
    given: Any = getattr(encoder, "block_names", None)
    names = [name for name, _ in encoder.named_parameters()]
    found = [re.match(given, name) if given else None for name in names]
    blocks = {block: n + 1 for n, block in enumerate(dict.fromkeys(m[0] for m in found if m))}
    last = max((n for n, match in enumerate(found) if match), default=-1)
    depths, depth = {}, 0
    for n, (name, match) in enumerate(zip(names, found, strict=True)):
        depth = blocks[match[0]] if match else depth if n < last else len(blocks) + 1
        depths[name] = depth
    return depths, len(blocks)


def freeze(encoder: nn.Module, section: str, *, whole: bool, blocks: int) -> list[nn.Module]:
    """Freeze an encoder, or its input layers and first blocks.

    Args:
        section: of the config, for errors.

    Returns:
        The modules without a trained weight, for which training is off: no dropout, and the
        statistics of a BatchNorm as they are.

    Raises:
        ConfigError: it has fewer blocks.
    """
    if whole:
        encoder.requires_grad_(False)
        return [encoder]
    if not blocks:
        return []
    depths, most = block_depths(encoder)
    rule = f"be at most {most}, the blocks of this encoder"
    require(blocks <= most, f"{section}.freeze_blocks", rule, blocks)
    for name, parameter in encoder.named_parameters():
        if depths[name] <= blocks:
            parameter.requires_grad_(False)
    return untrained(encoder)


def untrained(encoder: nn.Module) -> list[nn.Module]:
    """The modules whose weights are all frozen."""
    modules = [module for module in encoder.modules() if any(True for _ in module.parameters())]
    return [m for m in modules if not any(p.requires_grad for p in m.parameters())]
