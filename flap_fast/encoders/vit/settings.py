"""Settings of FLAP's ViT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import model_validator

from flap_fast.checks import require
from flap_fast.encoders.audio_settings import PatchEncoder
from flap_fast.section import MEANS_WEIGHTS, Count, Depth, Positive, Ratio

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flap_fast.config import Config

# Width, depth and heads. Source: AudioMAE's sizes (ViT-S, B, L); `tiny` is the demo's.
SIZES = {
    "tiny": (192, 4, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


class ViTSettings(PatchEncoder):
    can = frozenset({"mask", "reconstruct", "variable", "fusion", "compile", "recompute"})
    moved = {"window_patches": (8,)}  # noqa: RUF012 - a ClassVar of the base

    encoder: Annotated[Literal["vit"], MEANS_WEIGHTS] = "vit"
    """FLAP's ViT over the patches that masking keeps."""
    size: Literal["tiny", "small", "base", "large"] = "base"
    """Width, depth and heads: 192/4/3, 384/12/6, 768/12/12, 1024/24/16."""
    width: Count | None = None
    """Overrides the size's width D."""
    depth: Depth | None = None
    """Overrides the size's number of blocks."""
    heads: Count | None = None
    """Overrides the size's number of heads."""
    use_cls: bool = True
    """Prepend a [CLS] token (as AudioMAE's checkpoints do)."""
    pool: Annotated[Literal["mean_patch", "cls", "mean_all"], MEANS_WEIGHTS] = "mean_patch"
    """The clip's vector: the mean of the patches, [CLS], or the mean of both."""
    norm_position: Annotated[Literal["tokens", "pooled"], MEANS_WEIGHTS] = "tokens"
    """The final LayerNorm on the tokens before pooling, or on the pooled vector."""
    pos_grid: Literal["correct", "audiomae_legacy"] = "correct"
    """Grid of the fixed positions; AudioMAE's own table was built for the transposed grid of
    audio.frames, also those of other lengths."""
    time_positions: Annotated[Literal["sines", "rotary"], MEANS_WEIGHTS] = "sines"
    """How a patch's place in time is told: by sines added to its embedding, with those of its
    frequency, as in AudioMAE; or by turning queries and keys (RoPE), so that attention depends on
    distances in time and lengths that training never had are no new positions."""
    attention_window_s: Annotated[Positive | None, MEANS_WEIGHTS] = None
    """With audio.length = variable, for long clips: a token attends only to tokens of its clip
    within about so many seconds on either side, in the encoder and the decoder; null: to all. It is
    counted in tokens: 10 ms a frame, audio.patch frames a column, audio.mel_bins / audio.patch
    patches a column, of them those that masking keeps. [CLS], the first token, counts as one."""
    drop_path: Ratio = 0.0
    """Stochastic depth at the last block, growing linearly from 0."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and heads in force."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    @property
    def prefix_tokens(self) -> int:
        """1 with [CLS], else 0."""
        return int(self.use_cls)

    def positions(self, width: int) -> Tensor:
        """(N, width) float32: fixed 2-D sines; with rotary positions only the decoder's."""
        from flap_fast.encoders.vit.patches import sine_positions

        legacy = self.pos_grid == "audiomae_legacy"
        # In rows as long as AudioMAE's, the table goes on beyond the clips it was trained on.
        return sine_positions(width, self.grid, self.frames // self.patch if legacy else None)

    def window_tokens(self, density: float) -> int | None:
        if self.attention_window_s is None:
            return None
        columns = self.attention_window_s * self.sample_rate_hz / (self.hop * self.patch)
        return max(1, round(columns * self.grid[1] * density))

    def added_positions(self) -> Tensor:
        """(N, D) float32 of all patches; with rotary positions (R, D), of a column's alone."""
        from flap_fast.encoders.vit.patches import frequency_positions

        width = self.shape[0]
        return frequency_positions(width, self.grid[1]) if self.rotary else self.positions(width)

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are turned by their time column."""
        return self.time_positions == "rotary"

    def meaning(self) -> dict[str, Any]:
        return super().meaning() | {"heads": self.shape[2]}

    def build(self, config: Config, *, recompute: bool = False) -> nn.Module:
        from flap_fast.encoders.vit.model import ViT

        return ViT(self, config.fusion, recompute=recompute)

    @model_validator(mode="after")
    def _has_width_and_pool(self):
        width, _, heads = self.shape
        require(width % heads == 0, "audio.width", f"be a multiple of audio.heads = {heads}", width)
        require(width % 4 == 0, "audio.width", "be a multiple of 4 (2-D sine positions)", width)
        rule = "not be 'cls' without audio.use_cls"
        require(self.use_cls or self.pool != "cls", "audio.pool", rule, self.pool)
        if self.pos_grid == "audiomae_legacy":  # whose rows are those of audio.frames
            rule = f"be a multiple of {self.patch} with audio.pos_grid = audiomae_legacy"
            require(self.frames % self.patch == 0, "audio.frames", rule, self.frames)
        if (seconds := self.attention_window_s) is not None:
            self._check_window(seconds)
        if self.rotary:
            rule = "be 'correct' with audio.time_positions = rotary, which has no table over time"
            require(self.pos_grid == "correct", "audio.pos_grid", rule, self.pos_grid)
            rule = f"be an even multiple of audio.heads = {heads} with rotary positions"
            require(width % (2 * heads) == 0, "audio.width", rule, width)
        return self

    def _check_window(self, seconds: float) -> None:
        name = "audio.attention_window_s"
        rule = "be left out with audio.length = fixed, whose clips are short"
        require(self.variable, name, rule, seconds, "set audio.length=variable")
        rule = "be left out with audio.pool = cls, which would see the first seconds alone"
        require(self.pool != "cls", name, rule, seconds, "set audio.pool=mean_patch")
        rule = "be left out with audio.attention = xformers, whose window is causal"
        require(self.attention == "sdpa", name, rule, seconds, "set audio.attention=sdpa")
