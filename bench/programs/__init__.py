"""The papers' sizes: the programs that each kernel launches, by its name in `KERNELS`.

A kernel's programs are one file here with a `PAPER` and one line below; those that it launches on
a ragged batch are in the same file.
"""

from bench.programs import (
    gather_tokens,
    infonce,
    masked_mse,
    patch_embed,
    patch_mask,
    sigmoid_loss,
    unshuffle_tokens,
)
from bench.programs.program import AMD, ARCHES, VARIANTS, Arch, PaperSizes, Program

PAPER: dict[str, PaperSizes] = {
    "infonce": infonce.PAPER,
    "sigmoid_loss": sigmoid_loss.PAPER,
    "draw_patch_mask": patch_mask.PAPER,
    "draw_ragged_patch_mask": patch_mask.RAGGED_PAPER,
    "gather_tokens": gather_tokens.PAPER,
    "masked_mse": masked_mse.PAPER,
    "patch_embed": patch_embed.PAPER,
    "unshuffle_tokens": unshuffle_tokens.PAPER,
    "ragged_masked_mse": masked_mse.RAGGED_PAPER,
    "ragged_patch_embed": patch_embed.RAGGED_PAPER,
    "ragged_unshuffle_tokens": unshuffle_tokens.RAGGED_PAPER,
    # one line for each kernel
}

__all__ = ["AMD", "ARCHES", "PAPER", "VARIANTS", "Arch", "PaperSizes", "Program"]
