"""Pre-norm transformer blocks over rows of tokens (B, L, D), or over packed tokens (N, D).

x = x + attention(norm(x));  x = x + mlp(norm(x))

B clips   L tokens of a clip   N tokens in all   D width
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flap_fast.encoders.attention import attention, packed_attention, xformers_ops
from flap_fast.encoders.packing import Segments
from flap_fast.encoders.rotary import rotated

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention, each token to all of its clip, in three parts.

    Of packed clips the middle one decides by numbers on the host, and stays out of compiled code.
    """

    def __init__(self, width: int, heads: int, backend: str = "sdpa"):
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if backend == "xformers":
            xformers_ops("audio.attention")

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> q, k and v (..., H, d)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v

    def attended(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        """(..., H, d) three times -> (..., H, d)."""
        if segments is None:
            return attention(q, k, v, backend=self.backend)
        return packed_attention(q, k, v, segments, backend=self.backend)

    def merged(self, y: Tensor) -> Tensor:
        """(..., H, d) -> (..., D)."""
        return self.proj(y.flatten(-2))


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

    def forward(
        self,
        x: Tensor,
        keep_scale: Tensor | None = None,
        segments: Segments | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), or (N, D) -> (N, D).

        Args:
            keep_scale: (2, B, 1, 1) or (2, N, 1), scales each clip's branches.
            segments: of packed clips.
            rotation: of queries and keys, with rotary positions.
        """
        y = self.attn.attended(*self.before_attention(x, rotation), segments)
        return self.after_attention(x, y, keep_scale)

    def before_attention(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> q, k and v (..., H, d)."""
        q, k, v = self.attn.split(self.norm1(x))
        if rotation is None:
            return q, k, v
        return rotated(q, rotation), rotated(k, rotation), v

    def after_attention(self, x: Tensor, y: Tensor, keep_scale: Tensor | None) -> Tensor:
        """The block's input (..., D) and what attention gave (..., H, d) -> (..., D)."""
        attended = self.attn.merged(y)
        x = x + (attended if keep_scale is None else attended * keep_scale[0])
        more = self.mlp(self.norm2(x))
        return x + (more if keep_scale is None else more * keep_scale[1])

    def draw(self, x: Tensor, segments: Segments | None) -> Tensor | None:
        """The `keep_scale`: 1 / (1 - drop_path) for the branches kept, 0 for those dropped."""
        if not self.training or self.drop_path == 0:
            return None
        rest = 1 - self.drop_path
        if segments is None:
            return x.new_empty(2, len(x), 1, 1).bernoulli_(rest) / rest
        clips = x.new_empty(len(segments.index), 2).bernoulli_(rest) / rest
        return segments.of_tokens(clips).T[..., None]


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
        self._packed_training_run: Run = _run

    def compile_training(self) -> None:
        """Run the blocks through torch.compile in training: one graph for all of a shape.

        Of packed clips, whose total differs from batch to batch, one graph for any total of what
        comes before attention and one of what comes after it; attention itself is not compiled.

        Evaluation is not compiled: its batches come in other shapes. Names in the state dict
        do not change.
        """
        self._training_run = torch.compile(_run, dynamic=False)
        self._packed_training_run = partial(
            _run_around_attention,
            torch.compile(Block.before_attention, dynamic=True),
            torch.compile(Block.after_attention, dynamic=True),
        )

    def forward(
        self, x: Tensor, segments: Segments | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        run = self._training_run if segments is None else self._packed_training_run
        if not self.training:
            run = _run
        for block in self:
            inputs = block, x, block.draw(x, segments), segments, rotation  # type: ignore[operator]
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(run, *inputs, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = run(*inputs)  # type: ignore[arg-type]
        return x


Run = Callable[[Block, Tensor, "Tensor | None", "Segments | None", "Tensor | None"], Tensor]


def _run(
    block: Block,
    x: Tensor,
    keep_scale: Tensor | None,
    segments: Segments | None,
    rotation: Tensor | None,
) -> Tensor:
    return block(x, keep_scale, segments, rotation)


def _run_around_attention(
    before: Callable[[Block, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]],
    after: Callable[[Block, Tensor, Tensor, Tensor | None], Tensor],
    block: Block,
    x: Tensor,
    keep_scale: Tensor | None,
    segments: Segments | None,
    rotation: Tensor | None,
) -> Tensor:
    y = block.attn.attended(*before(block, x, rotation), segments)
    return after(block, x, y, keep_scale)


def initialise(module: nn.Module) -> None:
    """Initialise matrices Xavier-uniform and biases zero, as AudioMAE does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
