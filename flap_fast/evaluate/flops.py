"""Floating-point operations: of the audio encoder as fvcore counts them, and of a whole step.

    conv N*P^2*D + depth * (12 n D^2 + 2 n^2 D) + (2 depth + 1) * 5 n D        n = K [+ 1 for CLS]

`encoder_flops` is SPEC 14's table: one multiply-add is one FLOP; softmax, GELU and additions are
free. The paper embeds all N patches and masks after; we embed the K that stay (`fused=True`).
HTSAT's attention is within windows of w patches, and merges of 2 N D^2 follow all stages but one:

    conv N*P^2*D + sum over stages of depth * (12 N D^2 + 2 N w D) + 2 N D^2 + norms

Both are without the pieces that feature fusion adds.

`step_flop` is what a device has to do in a step, to be set against what it can do: matrix products
alone, and two FLOP a multiply-add, as makers of devices and PyTorch's counter have it. Backward is
twice the forward, but where an input wants no gradient: the patches, a frozen tower's vector.

    N patches   K kept   P patch side   D width   L tokens   J joint width   b clips of B   W ranks

Source: FLAP section 6.3; SPEC 14, which equals fvcore to the last digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flap_fast.config import Audio, Config, Mask
from flap_fast.model.masking import kept_patches
from flap_kernels.infonce_ranks import REPLICATED_ROWS


@dataclass(frozen=True)
class Flop:
    """Of one part of a step."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0
    """A second forward of blocks, with train.checkpoint_activations."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.forward + self.backward + self.recomputed


@dataclass(frozen=True)
class TextShape:
    """Sizes of a BERT-like text tower."""

    width: int
    depth: int
    heads: int
    inner: int
    """Width inside of a layer's MLP."""

    @classmethod
    def of(cls, encoder: Any) -> TextShape:
        """Those of a transformers config."""
        c = encoder
        return cls(c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.intermediate_size)


def encoder_flops(audio: Audio, mask: Mask, *, clips: int = 1, fused: bool = False) -> int:
    """Multiply-adds of the audio encoder's forward pass over `clips` clips."""
    if audio.encoder == "htsat":
        conv, blocks, merges = _htsat_products(audio)
        return clips * (conv + sum(blocks) + merges + _htsat_norms(audio))
    width, depth, _ = audio.shape
    kept = kept_patches(mask, audio.grid)
    embedded = kept if fused else audio.grid[0] * audio.grid[1]
    n = kept + audio.use_cls
    conv = embedded * audio.patch**2 * width
    blocks = block_products(n, width, 4 * width) * depth
    norms = (2 * depth + 1) * 5 * n * width
    return clips * (conv + blocks + norms)


def _htsat_products(audio: Audio) -> tuple[int, list[int], int]:
    """Of one clip: the patches' embedding, each block, all merges."""
    N, last = audio.grid[0] ** 2, len(audio.stages) - 1
    conv, blocks, merges = N * audio.patch**2 * audio.stages[0][0], [], 0
    for n, (width, depth, _) in enumerate(audio.stages):
        window = min(N, audio.window_patches**2)
        blocks += [N // window * block_products(window, width, 4 * width)] * depth
        if n < last:
            merges += 2 * N * width**2
            N //= 4
    return conv, blocks, merges


def _htsat_norms(audio: Audio) -> int:
    """Two numbers of the first norm for each cell of the log-mel, five for each of a LayerNorm."""
    N = audio.grid[0] ** 2
    numbers = N * audio.stages[0][0]
    for width, depth, _ in audio.stages:
        # Two in each block, one behind them: in the merge, or the last.
        numbers += N * width * (2 * depth + 1)
        N //= 4
    return 2 * audio.frames * audio.mel_bins + 5 * numbers


def block_products(tokens: int, width: int, inner: int) -> int:
    """Multiply-adds of one transformer block over one sequence."""
    return tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width


def step_flop(
    config: Config,
    text: TextShape,
    lengths: Sequence[int],
    *,
    kept: int,
    world: int = 1,
) -> dict[str, Flop]:
    """FLOP of one rank's share of a step, by part.

    Args:
        lengths: the tokens of each of its captions: real ones for what the step is worth, padded
            ones for what it costs.
        kept: K, the patches that masking left of each clip.
        world: ranks, each with as many clips.
    """
    return {
        "audio tower": audio_flop(config, len(lengths), kept),
        "text tower": text_flop(config, text, lengths),
        "loss": contrastive_flop(config, len(lengths), world),
    }


def audio_flop(config: Config, clips: int, kept: int) -> Flop:
    """Of the audio encoder and its head."""
    audio, joint = config.audio, config.joint.width
    if audio.encoder == "htsat":
        return _htsat_flop(config, clips)
    width, depth, _ = audio.shape
    n = kept + audio.use_cls
    embed = 2 * clips * kept * audio.patch**2 * width
    blocks = 2 * clips * depth * block_products(n, width, 4 * width)
    head = 2 * clips * (width * joint + joint**2)
    recomputed = 0
    if "audio" in config.train.checkpoint_activations:
        # PyTorch stops where the last thing saved is there: before a block's last product.
        recomputed = blocks - 2 * clips * depth * n * 4 * width**2
    return Flop(embed + blocks + head, embed + 2 * (blocks + head), recomputed)


def _htsat_flop(config: Config, clips: int) -> Flop:
    """Patches want a gradient too: the norm before them is trained."""
    audio, joint = config.audio, config.joint.width
    conv, blocks, merges = _htsat_products(audio)
    width = audio.stages[-1][0]
    head = width * joint + joint**2
    forward = 2 * clips * (conv + sum(blocks) + merges + head)
    recomputed = 0
    if "audio" in config.train.checkpoint_activations:
        # As in the ViT; but where stochastic depth draws (nowhere in the first block), it draws
        # behind the last product and so has it done.
        last, N = [], audio.grid[0] ** 2
        for n, (stage, depth, _) in enumerate(audio.stages):
            last += [4 * (N >> 2 * n) * stage**2] * depth
        spared = last[:1] if audio.drop_path else last
        recomputed = 2 * clips * (sum(blocks) - sum(spared))
    return Flop(forward, 2 * forward, recomputed)


def text_flop(config: Config, text: TextShape, lengths: Sequence[int]) -> Flop:
    """Of the text tower and its head."""
    clips, width, joint = len(lengths), text.width, config.joint.width
    blocks = 2 * text.depth * sum(block_products(n, width, text.inner) for n in lengths)
    pooler = 2 * clips * width**2 if config.text.pool == "pooler" else 0
    first, second = 2 * clips * width * joint, 2 * clips * joint**2
    forward = blocks + pooler + first + second
    if config.text.freeze:
        return Flop(forward, first + 2 * second)
    again = "text" in config.train.checkpoint_activations
    return Flop(forward, 2 * forward, blocks if again else 0)


def decoder_flop(clips: int, kept: int, patches: int, sizes: tuple[int, int, int, int]) -> Flop:
    """Of FLAP's decoder: kept tokens in, all patches (and CLS) through its blocks, pixels out.

    Args:
        sizes: the encoder's width, the decoder's width and depth, the pixels of a patch.
    """
    encoder, width, depth, pixels = sizes
    blocks = depth * block_products(patches + 1, width, 4 * width)
    forward = 2 * clips * ((kept + 1) * encoder * width + blocks + patches * width * pixels)
    return Flop(forward, 2 * forward)


def contrastive_flop(config: Config, clips: int, world: int = 1) -> Flop:
    """Of InfoNCE: 8 b B D, or 12 b B D where ranks hold the logits twice."""
    both = 2 if config.loss.contrastive.direction == "symmetric" else 1
    product = 2 * clips * (clips * world) * config.joint.width
    if not config.loss.contrastive.weight:
        return Flop()
    if scheme_in_force(config, clips, world) == "replicated":
        return Flop(both * product, 4 * product)
    return Flop(product, 3 * product)


def scheme_in_force(config: Config, clips: int, world: int) -> str:
    """How `infonce_ranks` shares the work: `alone`, `replicated` or `sharded`."""
    scheme = config.loss.contrastive.scheme
    if world == 1:
        return "alone"
    if scheme == "auto":
        return "replicated" if clips <= REPLICATED_ROWS else "sharded"
    return scheme


# Kind, unit, and the ratios of SPEC 14's table; 2-D masking drops as much of both axes.
_SCHEMES = (("none", "token", (0,)), ("1d", "token", range(1, 8)))
_SCHEMES += (("1d", "frame", range(1, 8)), ("2d", "token", range(1, 6)))


def masking_flops(audio: Audio, mask: Mask, clips: int = 8) -> list[dict[str, Any]]:
    """GFLOPs of a forward pass over masking schemes and ratios, rounded as `mask` says.

    `gflops` embeds all patches, as the papers count; `gflops_fused` those that stay, as we do.
    """
    rows = []
    # HTSAT cannot be masked: its table is one row.
    for kind, unit, tenths in _SCHEMES if audio.encoder == "vit" else _SCHEMES[:1]:
        for ratio in (n / 10 for n in tenths):
            ratios = {"ratio": ratio, "time_ratio": ratio, "freq_ratio": ratio}
            scheme = mask.model_copy(update={"kind": kind, "unit": unit, **ratios})
            whole, fused = (
                encoder_flops(audio, scheme, clips=clips, fused=fused) / 1e9
                for fused in (False, True)
            )
            row = {"kind": kind, "unit": unit, "ratio": ratio, "clips": clips}
            kept = kept_patches(scheme, audio.grid)
            rows.append({**row, "kept": kept, "gflops": whole, "gflops_fused": fused})
    return rows
