"""The ops of flap_fast that PyTorch does not do fast, or not exactly. Needs torch; uses triton.

`KERNELS` names every op that has a kernel: what it names is tested, compiled and timed.
"""

from flap_kernels.cyclic import cyclic
from flap_kernels.draw_plan import KERNEL as _DRAW_PLAN
from flap_kernels.draw_plan import MaskPlan, draw_plan
from flap_kernels.infonce import KERNEL as _INFONCE
from flap_kernels.infonce import infonce
from flap_kernels.infonce_ranks import infonce_ranks
from flap_kernels.keep_tokens import KERNEL as _KEEP_TOKENS
from flap_kernels.keep_tokens import keep_tokens
from flap_kernels.masked_mse import KERNEL as _MASKED_MSE
from flap_kernels.masked_mse import masked_mse
from flap_kernels.patch_embed import KERNEL as _PATCH_EMBED
from flap_kernels.patch_embed import patch_embed
from flap_kernels.restore_tokens import KERNEL as _RESTORE_TOKENS
from flap_kernels.restore_tokens import restore_tokens
from flap_kernels.spec import Kernel

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        _INFONCE,
        _DRAW_PLAN,
        _KEEP_TOKENS,
        _MASKED_MSE,
        _PATCH_EMBED,
        _RESTORE_TOKENS,
        # one line for each kernel
    )
}

__all__ = [
    "KERNELS",
    "MaskPlan",
    "cyclic",
    "draw_plan",
    "infonce",
    "infonce_ranks",
    "keep_tokens",
    "masked_mse",
    "patch_embed",
    "restore_tokens",
]
