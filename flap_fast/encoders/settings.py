"""The base classes of the encoders' settings.

An encoder is a folder: `encoders/NAME/settings.py` has its section, one arm of a union told apart
by `encoder`, and `encoders/NAME/model.py` its module. Nothing outside of the folder asks for the
name: it asks what stands here. So the config, FLOP counts, checkpoints, `flap plan` and
`flap profile` work for a new encoder without a line elsewhere.

    MediaEncoder   of sounds or images: AudioEncoder (`audio_settings`), ImageEncoder
    TextEncoder    of captions
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.section import (
    MEANS_WEIGHTS,
    NAMES_FILES,
    Count,
    CountOrZero,
    Depth,
    Positive,
    Ratio,
    Section,
)

if TYPE_CHECKING:
    from torch import nn

    from flap_fast.config import Config, Fusion

Ability = Literal["mask", "reconstruct", "variable", "fusion", "compile", "recompute", "classes"]
"""mask: encodes the patches that masking keeps. reconstruct: its tokens are a decoder's input.
variable: takes packed clips of any lengths. fusion: takes longer clips as four channels.
compile: its blocks go through torch.compile. recompute: its blocks' activations can be computed
again in the backward pass. classes: it can have a classifier, whose `classes` scores stand behind
the pooled vector where joint.class_names asks for them."""


class Encoder(Section):
    """The settings of an encoder."""

    encoder: Annotated[Any, MEANS_WEIGHTS] = None
    """The encoder's name: a `Literal` of each arm."""

    lora_rank: CountOrZero = 0
    """LoRA: keep the encoder frozen and train low-rank adapters of this rank beside the linear
    layers of its blocks (8 or 16 is usual), and its head; 0 is off. Checkpoints hold them merged
    into the weights, and apart to resume from."""
    lora_alpha: Positive = 16.0
    """The adapters' scale, times the rank; only with a rank."""

    moved: ClassVar[dict[str, tuple[object, ...]]] = {}
    """Settings that now belong to another encoder but were in this section in older files, with
    the values that meant nothing here: they are dropped."""

    @model_validator(mode="before")
    @classmethod
    def _drop_moved(cls, tree):
        if not isinstance(tree, dict):
            return tree
        own = cls.model_fields

        def idle(name: str, value: object) -> bool:
            return name not in own and name in cls.moved and value in cls.moved[name]

        return {name: value for name, value in tree.items() if not idle(name, value)}

    @model_validator(mode="after")
    def _adapters(self):
        settings: Any = self
        section = getattr(self, "modality", "text")
        rule = f"be 0 with {section}.freeze or {section}.freeze_blocks, which it includes"
        supported = self.lora_rank == 0 or not (settings.freeze or settings.freeze_blocks)
        require(supported, f"{section}.lora_rank", rule, self.lora_rank)
        return self

    @classmethod
    def name(cls) -> str:
        """The value of `encoder` that names it."""
        return cls.model_fields["encoder"].default

    def meaning(self) -> dict[str, Any]:
        """The settings that its weights depend on and no tensor's shape determines, by name."""
        return self.marked(MEANS_WEIGHTS)

    def portable(self) -> Self:
        """The same encoder by PyTorch's plain operations on rows of one length, as ONNX has them.

        The same numbers within rounding.
        """
        return self


class MediaEncoder(Encoder):
    """The settings of an encoder of sounds or of images."""

    modality: ClassVar[Literal["audio", "image"]]
    """The section of the config, the prefix of its weights' names, and the word in tables."""
    can: ClassVar[frozenset[Ability]] = frozenset()
    """Optional features that it supports."""
    why_not: ClassVar[dict[Ability, str]] = {}
    """Why it cannot do the rest: the end of a sentence "with audio.encoder = NAME, ..."."""
    specaug: ClassVar[Literal["before", "inside", "none"]] = "none"
    """Where SpecAug erases: in the encoder's input, inside it (`erase`), or nowhere."""
    joint_space: ClassVar[bool] = False
    """Whether its pooled vector lies in the joint space already and needs no head."""
    freeze: bool = False
    """Keep the encoder frozen, without dropout and as evaluation runs it; its head is trained. A
    clip that masks, SpecAug and crops leave as it is (an image; a sound that is shorter than
    audio.max_duration_s, with audio.length = variable) is embedded once, into `media_vectors/` of
    the run's folder."""
    freeze_blocks: CountOrZero = 0
    """The same for the encoder's input layers and this many first blocks."""

    defaults: ClassVar[dict[str, dict[str, object]]] = {}
    """What other sections are by themselves with this encoder: {"mask": {"kind": "none"}}."""

    @property
    def named(self) -> str:
        """Its name in errors: `audio.encoder = vit`."""
        return f"{self.modality}.encoder = {self.encoder}"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and along frequency; (0, 0) of an encoder without such patches."""
        return 0, 0

    def input_shape(self, fusion: Fusion) -> tuple[int, ...]:
        """The shape of one clip in the encoder's input."""
        raise NotImplementedError

    def build(self, config: Config, *, recompute: bool = False) -> nn.Module:
        """The module: (media, mask=None, *, erase=None, longer=None) -> `Encoded`.

        It has the attribute `width`, that of the pooled vector; with joint.class_names also
        `classes`, how many scores of its `classifier` are the end of that vector.

        Args:
            recompute: compute its blocks' activations again in the backward pass.
        """
        raise NotImplementedError


class ImageEncoder(MediaEncoder):
    """The settings of an image encoder; the section `image` replaces the audio encoder by it."""

    resolution: Annotated[int, Field(ge=32, multiple_of=32)] = 224
    """Side of the model's square input: the shorter side is resized to it, the middle cut out."""
    mean: Annotated[tuple[float, float, float], MEANS_WEIGHTS] = (0.48145466, 0.4578275, 0.40821073)
    """CLIP's mean of red, green and blue in [0, 1], subtracted."""
    std: Annotated[tuple[Positive, Positive, Positive], MEANS_WEIGHTS] = (
        0.26862954,
        0.26130258,
        0.27577711,
    )
    """CLIP's standard deviations, which divide."""

    modality = "image"
    defaults = {  # noqa: RUF012 - a ClassVar of the base
        "mask": {"kind": "none"},
        "specaug": {"time_frames": 0, "freq_bins": 0},
        "eval": {"crop": "center", "templates": "imagenet80"},
    }

    def input_shape(self, fusion: Fusion) -> tuple[int, ...]:
        """(3, R, R)."""
        return 3, self.resolution, self.resolution


class TextEncoder(Encoder):
    """The settings of a text encoder."""

    head: ClassVar[Literal["mlp", "linear"]] = "mlp"
    """The map into the joint space: LAION-CLAP's two layers, or CLIP's matrix without bias."""

    tokenizer: Annotated[str, NAMES_FILES] = "bytes"
    """For random weights: a tokenizer's folder (CLIP's: `package:open_clip`), or `bytes` (UTF-8
    bytes, needs no file)."""
    width: Count = 768
    """Random weights: width."""
    depth: Depth = 12
    """Random weights: layers."""
    heads: Count = 12
    """Random weights: heads."""
    max_tokens: Annotated[Count, Field(le=65_536)] = 77
    """Longer captions are cut; batches are padded to their own longest, to a multiple of 8."""
    dropout: Ratio = 0.1
    """Dropout everywhere in the encoder."""
    freeze: bool = False
    """Keep the encoder frozen, without dropout, and train only the projection. Each caption is
    embedded once, into `text_vectors/` of the run's folder."""
    freeze_blocks: CountOrZero = 0
    """Keep the embeddings and this many first blocks frozen, without dropout."""

    @property
    def tokenizer_files(self) -> tuple[str, str]:
        """The setting that names the tokenizer, and its value: a folder or `bytes`."""
        return "text.tokenizer", self.tokenizer

    def with_files(self, folder: str) -> TextEncoder:
        """The same settings with the files (config, tokenizer) of a model's text/."""
        return self.model_copy(update={"tokenizer": folder})

    def build(self, *, recompute: bool = False, weights: bool = True) -> nn.Module:
        """The module: ids and mask (B, L) -> (B, D) float32.

        It has the attributes `width`, `vocabulary` and `pad_token_id`, and `save_config(folder)`.

        Args:
            weights: load the folder's weights; without, only its shape.
        """
        raise NotImplementedError
