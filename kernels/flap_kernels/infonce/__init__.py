"""InfoNCE without a B x B matrix, on one process and over ranks.

`op` is the public op, `reference` says what it means. Two backends compute it, both with the
interface `backend.Backend`: `torch_tiled` in plain PyTorch, `triton_launch` with the kernels of
`triton_kernels`. `distributed` is the op over ranks.
"""

from flap_kernels.infonce.distributed import distributed_infonce
from flap_kernels.infonce.op import KERNEL, infonce
from flap_kernels.infonce.reference import infonce_reference

__all__ = ["KERNEL", "distributed_infonce", "infonce", "infonce_reference"]
