"""Records of the ops on ragged batches: clips of different lengths, end to end as one long clip.

    mel (1, T, F)   ids_keep (1, K)   ids_drop (1, M)   ids_restore (1, N)

    T, N, K, M frames, patches, kept and dropped patches of all clips together

A position counts from its clip's start, so each token names its row of the positions; an error is
the mean over clips of their own means, so each row has a weight. `gather_tokens` needs neither.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flap_kernels.masked_mse import KERNEL as MASKED_MSE
from flap_kernels.patch_embed import KERNEL as PATCH_EMBED
from flap_kernels.patch_mask import PatchMask
from flap_kernels.ragged_patch_mask import draw_ragged_patch_mask_reference, ragged_sizes
from flap_kernels.spec import Inputs, Size
from flap_kernels.unshuffle_tokens import KERNEL as UNSHUFFLE_TOKENS


def _masks(size: Size, generator: torch.Generator) -> tuple[PatchMask, Tensor, Tensor]:
    """A batch's mask; of each patch its clip, and its number in that clip, both (N,)."""
    columns, rows, keep_columns = ragged_sizes(size)
    device = generator.device
    sample_index = torch.arange(len(columns), device=device)
    # All rows of a kept column stay: a clip that keeps all columns drops nothing.
    counts = (columns, rows, keep_columns, 6 if size == "paper" else None, True)
    mask = draw_ragged_patch_mask_reference(sample_index, 0, (3, 4), *counts)
    numbers = [torch.arange(C * rows, device=device) for C in columns]
    clip = [torch.full_like(n, b) for b, n in enumerate(numbers)]
    return mask, torch.cat(clip), torch.cat(numbers)


def _patch_embed(size: Size, generator: torch.Generator) -> Inputs:
    P, D, unused = {"edge": (1, 1, 0), "odd": (16, 67, 2), "paper": (16, 768, 0)}[size]
    columns, rows, _ = ragged_sizes(size)
    mask, _, number = _masks(size, generator)
    real = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    arguments = {
        "mel": torch.randn(1, sum(columns) * P, rows * P, **real),
        "ids_keep": mask.ids_keep,
        "weight": torch.randn(D, P * P, **real) / P,
        "bias": torch.randn(D, **real),
        "position": torch.randn(max(columns) * rows + unused, D, **real),
        "position_index": number[mask.ids_keep],
    }
    return Inputs(arguments, differentiable=("mel", "weight", "bias", "position"))


def _unshuffle_tokens(size: Size, generator: torch.Generator) -> Inputs:
    D, unused = {"edge": (1, 0), "odd": (67, 2), "paper": (512, 0)}[size]
    columns, rows, _ = ragged_sizes(size)
    mask, _, number = _masks(size, generator)
    real = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    arguments = {
        "y": torch.randn(1, mask.ids_keep.shape[1], D, **real),
        "ids_restore": mask.ids_restore,
        "mask_token": torch.randn(D, **real),
        "position": torch.randn(max(columns) * rows + unused, D, **real),
        "position_index": number[None],
    }
    return Inputs(arguments, differentiable=("y", "mask_token", "position"))


def _masked_mse(size: Size, generator: torch.Generator) -> Inputs:
    P, H = {"edge": (2, 1), "odd": (16, 67), "paper": (16, 512)}[size]
    columns, rows, _ = ragged_sizes(size)
    mask, clip, _ = _masks(size, generator)
    dropped = clip[mask.ids_drop]
    count = torch.zeros(len(columns), device=clip.device).index_add_(
        0, dropped[0], torch.ones(dropped.shape[1], device=clip.device)
    )
    real = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    arguments = {
        "hidden": torch.randn(1, dropped.shape[1], H, **real),
        "weight": torch.randn(P * P, H, **real) / H**0.5,
        "bias": torch.randn(P * P, **real),
        "mel": torch.randn(1, sum(columns) * P, rows * P, **real),
        "ids_drop": mask.ids_drop,
        "row_weight": 1 / (len(columns) * count.double())[dropped],
        "norm_pix": True,
    }
    return Inputs(arguments, ("hidden", "weight", "bias"), float32=("row_weight",))


RAGGED = (
    replace(PATCH_EMBED, name="ragged_patch_embed", inputs=_patch_embed),
    replace(UNSHUFFLE_TOKENS, name="ragged_unshuffle_tokens", inputs=_unshuffle_tokens),
    replace(MASKED_MSE, name="ragged_masked_mse", inputs=_masked_mse),
)
