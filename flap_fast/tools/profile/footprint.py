"""Memory of a rank, by formula: what is there all the time, and what a step adds.

    states       weights, gradients, Adam's two moments, by engine, ZeRO stage and offload
    activations  what the forward keeps for the backward, per token of width D, inner width I:
                     fp32   4 (8 D + 2 I)      a block's two norms, q, k, v, attention, MLP
                     bf16   20 D + 4 I         norms in fp32, products in bf16; and bf16 weights
                     checkpointed   4 D        a block's input, and one block's worth at a time
    loss         gathered embeddings, their gradients, the kernels' workspace
    held         of micro-batches: embeddings of all, and log-mels that are not decoded again

With micro-batches, activations are those of one, and gradients are there all the time.

Left out: the front end, allocators' rounding and fragments, a library's own workspaces, and the
probabilities of an attention that keeps them (a CPU's, with dropout).

    P parameters   W ranks   b clips of a rank   m of them at once   B = b W   d joint width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flap_fast.config import Config
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.profile.flop import TextShape, cyclic_form, scheme_in_force
from flap_fast.tools.profile.states import Parameters, state_bytes
from flap_fast.train.optimizers import parameter_groups

_FLOAT, _INT64 = 4, 8
# Rows and columns of the logits that the cyclic terms take at a time.
_CYCLIC_TILE = 1024


@dataclass(frozen=True)
class Sizes:
    """What a model is made of."""

    text: TextShape
    groups: tuple[tuple[int, ...], ...]
    """Numbers in each trained parameter, by group of the optimizer."""
    frozen: int

    @classmethod
    def of(cls, model: TwoTowers) -> Sizes:
        """Those of a model, which may be on the meta device."""
        groups = tuple(tuple(p.numel() for p in group) for group in parameter_groups(model))
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        return cls(TextShape.of(model.text.inner.config), groups, frozen)

    @property
    def parameters(self) -> Parameters:
        """In all."""
        every = [n for group in self.groups for n in group]
        return Parameters(sum(every), self.frozen, max(every))


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank, by name, and the most at one time."""

    states: dict[str, int]
    on_cpu: dict[str, int]
    """What train.offload keeps in the CPU's memory; not in the peak."""
    activations: dict[str, int]
    loss: dict[str, int]
    held: dict[str, int]
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
    on_gpu: bool = True,
) -> Footprint:
    """Of a rank with a clip for each caption, in micro-batches of train.micro_batch of them.

    Args:
        lengths: tokens of each caption as they are computed, with their padding.
        engine: `plain` or `deepspeed`.
        kept: K, the patches that masking left of each clip.
        half: bf16 autocast is on.
        on_gpu: decides what train.replay=auto keeps, and whether gradients are reduced early.
    """
    clips = len(lengths)
    at_once = min(clips, config.train.micro_batch or clips)
    micro_batches = -(-clips // at_once)
    local = config.train.accumulation == "local"
    states = state_bytes(
        engine,
        config.train.zero_stage,
        sizes.parameters,
        world,
        overlap=on_gpu,
        offload=config.train.offload,
        micro_batches=micro_batches,
    )
    some = lengths[:at_once]
    activations = activation_bytes(config, sizes.text, some, kept=kept, half=half)
    loss = loss_bytes(config, at_once if local else clips, world)
    held = held_bytes(config, clips, on_gpu=on_gpu) if micro_batches > 1 else {}
    if micro_batches > 1 and not local and "log-mels" not in held and not _clean(config):
        # What SpecAug took as its input is there through a second pass's backward.
        held["log-mels"] = _mel_bytes(config, at_once) if _augments(config) else 0
    last = last_block_bytes(config, at_once, kept, half=half)
    forward, losses = sum(activations.values()), sum(loss.values())
    if micro_batches > 1 and not local:  # the loss is taken between the passes
        peak = states.peak(forward, last, apart=losses)
    else:
        peak = states.peak(forward + losses, last)
    peak += sum(held.values())
    return Footprint(states.on_device, states.on_cpu, activations, loss, held, peak)


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
    return block + gradients + _mel_bytes(config, clips)


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
    mel = _mel_bytes(config, clips)
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
    found = {"audio tower": heard, "text tower": read}
    if config.loss.recon.weight:
        found["decoder"] = decoder_bytes(config, clips, kept, half=half)
    return found


def decoder_bytes(config: Config, clips: int, kept: int, *, half: bool) -> int:
    """What FLAP's decoder keeps; its last norm and layer see the dropped patches alone."""
    audio, settings = config.audio, config.decoder
    width, depth = settings.width, settings.depth
    patches, cls = audio.grid[0] * audio.grid[1], int(audio.use_cls)
    tokens, dropped = clips * (patches + cls), clips * (patches - kept)
    again = "decoder" in config.train.checkpoint_activations
    found = block_bytes(tokens, width, 4 * width, depth, half=half, recompute=again)
    found += (2 if half else _FLOAT) * clips * (kept + cls) * audio.shape[0]
    found += 2 * _FLOAT * dropped * width + _INT64 * (tokens + 2 * dropped)
    if half:
        found += 2 * depth * 12 * width**2
    if _augments(config) and _clean(config):
        found += _mel_bytes(config, clips)
    return found


def _augments(config: Config) -> bool:
    return bool(config.specaug.time_frames or config.specaug.freq_bins)


def _clean(config: Config) -> bool:
    """Whether log-mels before SpecAug are what the decoder is to rebuild."""
    return bool(config.loss.recon.weight) and config.loss.recon.target == "clean"


def _mel_bytes(config: Config, clips: int) -> int:
    return _FLOAT * clips * config.audio.frames * config.audio.mel_bins


def loss_bytes(config: Config, clips: int, world: int) -> dict[str, int]:
    """Of the losses in float32: what ranks gather, and the kernels' workspace in the backward."""
    B, d = clips * world, config.joint.width
    gathered = workspace = 0
    if config.loss.contrastive.weight:
        gathered = {
            "alone": 2 * clips * d,  # the gradient of the text, summed up in float32, and a product
            "replicated": 2 * B * d + 2 * clips * d,  # all audio and text, and this rank's, packed
            "sharded": 2 * B * d,  # all text and its gradients
        }[scheme_in_force(config, clips, world)]
        # A chunk of rows of the logits' weights at a time: 2048, or as many as 64 MiB hold.
        workspace = min(clips, max(2048, 2**26 // (_FLOAT * B))) * (B + d)
    if form := cyclic_form(config, clips, world):
        if form == "gram":
            # The forward contracts them in float64; the backward has fewer beside its rows.
            more, work = 3 * d**2, 2 * clips * d + max(8 * d**2, 2 * clips * d + 4 * d**2)
        else:
            more = 2 * clips * d + (2 * B * d if world > 1 else 0)
            work = 2 * clips * d + 2 * min(clips, _CYCLIC_TILE) * min(B, _CYCLIC_TILE)
        gathered, workspace = gathered + more, max(workspace, work)
    return {"gathered": _FLOAT * gathered, "workspace": _FLOAT * workspace}


def held_bytes(config: Config, clips: int, *, on_gpu: bool) -> dict[str, int]:
    """Of a step's micro-batches, from the first pass to the second, by name."""
    # Each embedding, all of them joined, and their gradients.
    found = {"embeddings": 3 * _FLOAT * clips * 2 * config.joint.width}
    keeps = config.train.replay == "keep" or (config.train.replay == "auto" and on_gpu)
    if keeps and config.train.accumulation == "exact":
        found["log-mels"] = _mel_bytes(config, clips)
    return found


def divisors(clips: int) -> list[int]:
    """The micro-batches that a share of so many clips can be taken in, smallest first."""
    return [n for n in range(1, clips + 1) if clips % n == 0]
