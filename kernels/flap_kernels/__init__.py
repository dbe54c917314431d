"""Ops of flap_fast for which PyTorch is slow or inexact. Requires torch; uses triton.

`KERNELS` names every op that has a kernel, and ops again on ragged batches: what it names is
tested, compiled and timed.
"""

from flap_kernels.cyclic import cyclic
from flap_kernels.gather_tokens import KERNEL as _GATHER_TOKENS
from flap_kernels.gather_tokens import gather_tokens
from flap_kernels.infonce.distributed import distributed_infonce
from flap_kernels.infonce.op import KERNEL as _INFONCE
from flap_kernels.infonce.op import infonce
from flap_kernels.masked_mse import KERNEL as _MASKED_MSE
from flap_kernels.masked_mse import masked_mse
from flap_kernels.patch_embed import KERNEL as _PATCH_EMBED
from flap_kernels.patch_embed import patch_embed
from flap_kernels.patch_mask import KERNEL as _DRAW_PATCH_MASK
from flap_kernels.patch_mask import PatchMask, draw_patch_mask
from flap_kernels.ragged import RAGGED as _RAGGED
from flap_kernels.ragged_patch_mask import KERNEL as _DRAW_RAGGED_PATCH_MASK
from flap_kernels.ragged_patch_mask import draw_ragged_patch_mask
from flap_kernels.sigmoid_loss import KERNEL as _SIGMOID_LOSS
from flap_kernels.sigmoid_loss import sigmoid_loss
from flap_kernels.soft_infonce import soft_infonce
from flap_kernels.spec import Kernel
from flap_kernels.unshuffle_tokens import KERNEL as _UNSHUFFLE_TOKENS
from flap_kernels.unshuffle_tokens import unshuffle_tokens

__version__ = "0.1.0"

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        _INFONCE,
        _SIGMOID_LOSS,
        _DRAW_PATCH_MASK,
        _DRAW_RAGGED_PATCH_MASK,
        _GATHER_TOKENS,
        _MASKED_MSE,
        _PATCH_EMBED,
        _UNSHUFFLE_TOKENS,
        *_RAGGED,
        # one line for each kernel
    )
}

__all__ = [
    "KERNELS",
    "PatchMask",
    "cyclic",
    "distributed_infonce",
    "draw_patch_mask",
    "draw_ragged_patch_mask",
    "gather_tokens",
    "infonce",
    "masked_mse",
    "patch_embed",
    "sigmoid_loss",
    "soft_infonce",
    "unshuffle_tokens",
]
