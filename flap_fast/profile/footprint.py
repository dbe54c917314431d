"""Memory of a rank, by formula: what is there all the time, and what a step adds.

    states       weights, gradients, Adam's two moments, by engine and ZeRO stage
    activations  what the forward keeps for the backward, per token of width D, inner width I:
                     fp32   4 (8 D + 2 I)      a block's two norms, q, k, v, attention, MLP
                     bf16   20 D + 4 I         norms in fp32, products in bf16; and bf16 weights
                     checkpointed   4 D        a block's input, and one block's worth at a time
    loss         gathered embeddings, their gradients, the kernels' workspace

Left out: the front end, allocators' rounding and fragments, a library's own workspaces, and the
probabilities of an attention that keeps them (a CPU's, with dropout).

    P parameters   W ranks   b clips of a rank   m of them at once   B = b W   d joint width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flap_fast.checks import need
from flap_fast.config import Config
from flap_fast.model.flap import Flap
from flap_fast.profile.flop import TextShape, scheme_in_force
from flap_fast.train.engine import BUCKET_NUMBERS, parameter_groups

_FLOAT = 4


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has."""

    trained: int
    frozen: int = 0


@dataclass(frozen=True)
class Sizes:
    """What a model is made of."""

    text: TextShape
    groups: tuple[tuple[int, ...], ...]
    """Numbers in each trained parameter, by group of the optimizer."""
    frozen: int

    @classmethod
    def of(cls, model: Flap) -> Sizes:
        """Those of a model, which may be on the meta device."""
        groups = tuple(tuple(p.numel() for p in group) for group in parameter_groups(model))
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        return cls(TextShape.of(model.text.inner.config), groups, frozen)

    @property
    def parameters(self) -> Parameters:
        """In all."""
        return Parameters(sum(map(sum, self.groups)), self.frozen)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank, by name, and the most at one time."""

    states: dict[str, int]
    activations: dict[str, int]
    loss: dict[str, int]
    peak: int


def footprint(
    config: Config,
    sizes: Sizes,
    lengths: Sequence[int],
    world: int,
    *,
    engine: str,
    kept: int,
    half: bool,
    overlap: bool = True,
) -> Footprint:
    """Of a rank with a clip for each caption; the arguments are those of the functions below."""
    states = state_bytes(engine, config.train.zero_stage, sizes.parameters, world, overlap=overlap)
    activations = activation_bytes(config, sizes.text, lengths, kept=kept, half=half)
    loss = loss_bytes(config, len(lengths), world)
    last = last_block_bytes(config, len(lengths), kept, half=half)
    return Footprint(states, activations, loss, peak_bytes(states, activations, loss, last))


def check_formulas(config: Config) -> None:
    """Raise `ConfigError` for a step that the formulas of FLOP and memory leave a part of out."""
    rule = "be {} here: the formulas of FLOP and memory do not know it yet"
    need(config.image is None, "image", rule.format("left out"), "one")
    clip = config.text.encoder
    need(clip == "roberta", "text.encoder", rule.format("roberta"), clip)
    encoder, fusion = config.audio.encoder, config.fusion.type
    need(encoder == "vit", "audio.encoder", rule.format("vit"), encoder)
    need(fusion == "none", "fusion.type", rule.format("none"), fusion)
    for name, value in (
        ("loss.recon.weight", config.loss.recon.weight),
        ("loss.cyclic.cross_weight", config.loss.cyclic.cross_weight),
        ("loss.cyclic.in_weight", config.loss.cyclic.in_weight),
        ("loss.simcse.weight", config.loss.simcse.weight),
        ("loss.nli.weight", config.loss.nli.weight),
    ):
        need(value == 0, name, rule.format("0"), value)
    micro = config.train.micro_batch
    remedy = "set train.global_batch to what fits in one pass"
    need(micro is None, "train.micro_batch", rule.format("unset"), micro, remedy)


def state_bytes(
    engine: str, stage: int, parameters: Parameters, world: int, *, overlap: bool = True
) -> dict[str, int]:
    """Bytes a rank holds whatever its batch, by name; all in fp32.

    Args:
        engine: `plain` or `deepspeed`.
        overlap: gradients are reduced while the backward goes on (DeepSpeed's on a GPU).
    """
    trained, all_of_them = parameters.trained, parameters.trained + parameters.frozen
    share, bucket = -(-trained // world), (2 if overlap else 1) * BUCKET_NUMBERS
    whole = {
        "weights": all_of_them,
        "gradients": trained,
        "optimizer": 2 * trained,
        "engine": 0,
    }
    if engine == "deepspeed" and stage == 0:
        whole["engine"] = trained if world > 1 else 0  # the gradients, flat, to be reduced
    elif engine == "deepspeed":
        # The optimizer works on a copy of its share of the weights.
        whole |= {"gradients": share, "optimizer": 3 * share, "engine": bucket}
        if stage == 3:
            # Its shards, and what is gathered: kept from forward to backward below 1e9 numbers.
            whole["weights"] = -(-all_of_them // world) + min(all_of_them, 10**9)
    return {name: _FLOAT * numbers for name, numbers in whole.items()}


def block_bytes(
    tokens: int, width: int, inner: int, depth: int, *, half: bool, recompute: bool
) -> int:
    """What `depth` transformer blocks keep of so many tokens."""
    one = tokens * (20 * width + 4 * inner if half else _FLOAT * (8 * width + 2 * inner))
    if recompute:
        return depth * tokens * _FLOAT * width + one
    return depth * one


def last_block_bytes(config: Config, clips: int, kept: int, *, half: bool) -> int:
    """What the end of the backward needs: the audio's first block, its gradients, the log-mels."""
    audio, tokens = config.audio, clips * (kept + config.audio.use_cls)
    width = audio.shape[0]
    block = block_bytes(tokens, width, 4 * width, 1, half=half, recompute=False)
    gradients = tokens * 10 * width * (2 if half else _FLOAT)
    return block + gradients + _FLOAT * clips * audio.frames * audio.mel_bins


def activation_bytes(
    config: Config,
    text: TextShape,
    lengths: Sequence[int],
    *,
    kept: int,
    half: bool,
) -> dict[str, int]:
    """What the forward of the captions' clips, all at once, keeps for the backward, by part.

    Args:
        lengths: tokens of each caption as they are computed, with their padding.
        half: bf16 autocast is on.
    """
    audio, again = config.audio, config.train.checkpoint_activations
    width, depth, _ = audio.shape
    clips, tokens = len(lengths), len(lengths) * (kept + audio.use_cls)
    mel = _FLOAT * clips * audio.frames * audio.mel_bins
    sound, words = "audio" in again, "text" in again
    heard = mel + block_bytes(tokens, width, 4 * width, depth, half=half, recompute=sound)
    heard += _FLOAT * tokens * width  # the final norm's input
    read = 0
    if not config.text.freeze:
        sizes = sum(lengths), text.width, text.inner, text.depth
        read = block_bytes(*sizes, half=half, recompute=words)
        if config.text.dropout:  # a mask of bytes after the embeddings and after each branch
            read += sum(lengths) * text.width * (1 + 2 * text.depth)
    if half:
        # Autocast's copies of the blocks' weights live as long as the activations.
        heard += 2 * depth * 12 * width**2
        if not config.text.freeze:
            read += 2 * text.depth * (4 * text.width**2 + 2 * text.width * text.inner)
    return {"audio tower": heard, "text tower": read}


def loss_bytes(config: Config, clips: int, world: int) -> dict[str, int]:
    """Of InfoNCE in float32: what ranks gather, and the kernels' workspace in the backward."""
    B, d = clips * world, config.joint.width
    scheme = scheme_in_force(config, clips, world)
    gathered = {
        "alone": 2 * clips * d,  # the gradient of the text, summed up in float32, and a product
        "replicated": 2 * B * d + 2 * clips * d,  # all audio and text, and this rank's, packed
        "sharded": 2 * B * d,  # all text and its gradients
    }[scheme]
    # A chunk of rows of the logits' weights at a time: 2048 of them, or as many as 64 MiB hold.
    rows = min(clips, max(2048, 2**26 // (_FLOAT * B)))
    return {"gathered": _FLOAT * gathered, "workspace": _FLOAT * rows * (B + d)}


def peak_bytes(
    states: dict[str, int], activations: dict[str, int], loss: dict[str, int], last: int
) -> int:
    """The most at one time: gradients come as activations go, so it is early or late."""
    early = sum(activations.values()) + sum(loss.values())
    late = states["gradients"] + last
    return sum(states.values()) - states["gradients"] + max(early, late)
