"""The ops of flap_fast that PyTorch does not do fast, or not exactly. Needs torch; uses triton.

`KERNELS` names every op that has a kernel: what it names is tested, compiled and timed.
"""

from flap_kernels.infonce import KERNEL as _INFONCE
from flap_kernels.infonce import infonce
from flap_kernels.infonce_ranks import infonce_ranks
from flap_kernels.spec import Kernel

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        _INFONCE,
        # one line for each kernel
    )
}

__all__ = ["KERNELS", "infonce", "infonce_ranks"]
