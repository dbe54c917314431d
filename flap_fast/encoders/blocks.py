"""Pre-norm transformer blocks, and the attention backends: PyTorch's and xformers'.

x = x + attention(norm(x));  x = x + mlp(norm(x))

B clips   L tokens   D width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flap_fast.checks import ConfigError

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Unmasked multi-head self-attention, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int, backend: str = "sdpa"):
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if backend == "xformers":
            xformers_ops("audio.attention")

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads)
        if self.backend == "xformers":
            q, k, v = qkv.unbind(2)
            attention = xformers_ops("audio.attention").memory_efficient_attention
            return self.proj(attention(q, k, v).reshape(B, L, D))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    """Two layers with an exact GELU; the hidden width is four times as large."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm block; in training each branch of a clip is dropped with rate `drop_path`.

    Drop-path is drawn outside of `forward`: so all blocks are one function of tensors, whatever
    their rates, and a compiled block draws no random numbers.
    """

    def __init__(self, width: int, heads: int, drop_path: float = 0.0, backend: str = "sdpa"):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads, backend)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)
        self.drop_path = drop_path

    def forward(self, x: Tensor, keep_scale: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); `keep_scale` (2, B, 1, 1) scales each clip's branches."""
        attended = self.attn(self.norm1(x))
        x = x + (attended if keep_scale is None else attended * keep_scale[0])
        more = self.mlp(self.norm2(x))
        return x + (more if keep_scale is None else more * keep_scale[1])

    def draw(self, x: Tensor) -> Tensor | None:
        """(2, B, 1, 1): 1 / (1 - drop_path) for the branches kept, 0 for those dropped."""
        if not self.training or self.drop_path == 0:
            return None
        rest = 1 - self.drop_path
        return x.new_empty(2, len(x), 1, 1).bernoulli_(rest) / rest


class Blocks(nn.ModuleList):
    """A stack of blocks, each recomputed in the backward pass if asked.

    Drop-path grows linearly from 0 at the first block to `drop_path` at the last.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        drop_path: float = 0.0,
        backend: str = "sdpa",
        recompute: bool = False,
    ):
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        super().__init__(Block(width, heads, rate, backend) for rate in rates)
        self.recompute = recompute
        self._training_run: Run = _run

    def compile_training(self) -> None:
        """Run the blocks through torch.compile in training: one graph for all of a shape.

        Evaluation is not compiled: its batches come in other shapes. Names in the state dict
        do not change.
        """
        self._training_run = torch.compile(_run, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        run = self._training_run if self.training else _run
        for block in self:
            keep_scale = block.draw(x)  # type: ignore[operator]
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(run, block, x, keep_scale, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = run(block, x, keep_scale)
        return x


Run = Callable[[nn.Module, Tensor, "Tensor | None"], Tensor]


def _run(block: nn.Module, x: Tensor, keep_scale: Tensor | None) -> Tensor:
    return block(x, keep_scale)


def initialise(module: nn.Module) -> None:
    """Initialise matrices Xavier-uniform and biases zero, as AudioMAE does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def packed_xformers_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout: float
) -> Tensor:
    """(N, H, d) three times -> (N, H, d), within segments of these lengths."""
    ops = xformers_ops("text.attention")
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=q.device)
    packed = (x[None] for x in (q, k, v))
    return ops.memory_efficient_attention(*packed, attn_bias=mask, p=dropout)[0]


def xformers_ops(setting: str) -> Any:
    """xformers' operators, for the setting that asks for them.

    Raises:
        ConfigError: xformers is not there, or does not import.
    """
    try:
        from xformers import ops  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"{setting} must be 'sdpa' where xformers does not import ({error}); "
            "pip install 'flap_fast[xformers]'"
        ) from None
    return ops
