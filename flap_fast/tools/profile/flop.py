"""Floating-point operations of a whole step: what a device has to do, against what it can do.

Matrix products alone, and two FLOP a multiply-add, as makers of devices and PyTorch's counter have
it. Backward is twice the forward, but where an input wants no gradient: the patches, a frozen
tower's vector. In two passes (`train.microbatch`) the towers' forward comes once more, without a
graph; the decoder rests then, and the loss is taken once.

    N patches   K kept   P patch side   D width   L tokens   J joint width   b clips of B   W ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flap_fast.config import Config
from flap_fast.tools.profile.products import block_products, htsat_products
from flap_kernels.cyclic import form_in_force
from flap_kernels.infonce.distributed import REPLICATED_ROWS


@dataclass(frozen=True)
class Flop:
    """Of one part of a step."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0
    """A second forward of blocks, with train.checkpoint_activations."""
    first_pass: int = 0
    """The forward without a graph of all micro-batches, where a step has two passes."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.forward + self.backward + self.recomputed + self.first_pass


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
    clips = len(lengths)
    towers = {
        "audio tower": audio_flop(config, clips, kept),
        "text tower": text_flop(config, text, lengths),
    }
    if two_passes(config, world):
        towers = {name: replace(f, first_pass=f.forward) for name, f in towers.items()}
    decoder = {"decoder": decoder_flop(config, clips, kept)} if config.loss.recon.weight else {}
    return towers | decoder | {"loss": loss_flop(config, clips, world)}


def two_passes(config: Config, world: int) -> bool:
    """Whether micro-batches go through the towers twice."""
    return config.train.micro_batches(world) > 1 and config.train.accumulation == "exact"


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
    conv, blocks, merges = htsat_products(audio)
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


def decoder_flop(config: Config, clips: int, kept: int) -> Flop:
    """Of FLAP's decoder: kept tokens in, all through its blocks, the dropped patches' pixels out.

    The backward makes the pixels again: their errors are not stored.
    """
    audio, settings = config.audio, config.decoder
    width, patches, cls = settings.width, audio.grid[0] * audio.grid[1], int(audio.use_cls)
    embed = 2 * clips * (kept + cls) * audio.shape[0] * width
    blocks = 2 * clips * settings.depth * block_products(patches + cls, width, 4 * width)
    pixels = 2 * clips * (patches - kept) * width * audio.patch**2
    recomputed = 0
    if "decoder" in config.train.checkpoint_activations:
        recomputed = blocks - 2 * clips * settings.depth * (patches + cls) * 4 * width**2
    return Flop(embed + blocks + pixels, 2 * (embed + blocks) + 3 * pixels, recomputed)


def loss_flop(config: Config, clips: int, world: int = 1) -> Flop:
    """Of the losses between embeddings: over a rank's clips, or within each micro-batch of them."""
    times = loss_times(config, world)
    each = clips // times
    parts = contrastive_flop(config, each, world), cyclic_flop(config, each, world)
    forward, backward = sum(f.forward for f in parts), sum(f.backward for f in parts)
    return Flop(times * forward, times * backward)


def loss_times(config: Config, world: int) -> int:
    """How often a step takes the losses."""
    return config.train.micro_batches(world) if config.train.accumulation == "local" else 1


def contrastive_flop(config: Config, clips: int, world: int = 1) -> Flop:
    """Of InfoNCE: 8 b B D, or 12 b B D where ranks hold the logits twice."""
    both = 2 if config.loss.contrastive.direction == "symmetric" else 1
    product = 2 * clips * (clips * world) * config.joint.width
    if not config.loss.contrastive.weight:
        return Flop()
    if scheme_in_force(config, clips, world) == "replicated":
        return Flop(both * product, 4 * product)
    return Flop(product, 3 * product)


def cyclic_flop(config: Config, clips: int, world: int = 1) -> Flop:
    """Of the cyclic terms: 8 b B D and as much again for each in the backward, or 14 b D D."""
    form, terms = cyclic_form(config, clips, world), cyclic_terms(config)
    d = config.joint.width
    if form == "gram":
        return Flop(6 * clips * d**2, 8 * clips * d**2)
    product = 2 * clips * (clips * world) * d
    return Flop(4 * product, 4 * terms * product) if form else Flop()


def cyclic_terms(config: Config) -> int:
    """How many of them have a weight."""
    return bool(config.loss.cyclic.cross_weight) + bool(config.loss.cyclic.in_weight)


def cyclic_form(config: Config, clips: int, world: int) -> str:
    """How `flap_kernels.cyclic` computes: `tiled` or `gram`; empty where nothing is."""
    if not cyclic_terms(config):
        return ""
    return form_in_force(config.loss.cyclic.form, clips * world, config.joint.width)


def scheme_in_force(config: Config, clips: int, world: int) -> str:
    """How `distributed_infonce` shares the work: `alone`, `replicated` or `sharded`."""
    scheme = config.loss.contrastive.scheme
    if world == 1:
        return "alone"
    if scheme == "auto":
        return "replicated" if clips <= REPLICATED_ROWS else "sharded"
    return scheme
