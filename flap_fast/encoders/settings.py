"""What every encoder says of itself: the base classes of the encoders' settings.

An encoder is a folder: `encoders/NAME/settings.py` has its section, one arm of a union told apart
by `encoder`, and `encoders/NAME/model.py` its module. Nothing outside of the folder asks for the
name: it asks what stands here. So the config, FLOP counts, checkpoints, `flap plan` and
`flap profile` work for a new encoder without a line elsewhere.

    MediaEncoder   of sounds or images: AudioEncoder, ImageEncoder
    TextEncoder    of captions
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.section import (
    AFTER_FRONT_END,
    MEANS_WEIGHTS,
    Count,
    Positive,
    Ratio,
    Section,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flap_fast.config import Config, Fusion

Ability = Literal["mask", "reconstruct", "fusion", "compile", "recompute"]
"""mask: encodes the patches that masking keeps. reconstruct: its tokens are a decoder's input.
fusion: takes longer clips as four channels. compile: its blocks go through torch.compile.
recompute: its blocks' activations can be computed again in the backward pass."""


class Encoder(Section):
    """The settings of an encoder."""

    encoder: Annotated[str, MEANS_WEIGHTS]
    """The encoder's name."""

    moved: ClassVar[dict[str, tuple[object, ...]]] = {}
    """Settings that are another encoder's today and stood beside this one's in older files, with
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

    @classmethod
    def name(cls) -> str:
        """The value of `encoder` that names it."""
        return cls.model_fields["encoder"].default

    def meaning(self) -> dict[str, Any]:
        """The settings that its weights mean and no tensor's shape tells, by name."""
        return self.marked(MEANS_WEIGHTS)


class MediaEncoder(Encoder):
    """The settings of an encoder of sounds or of images."""

    modality: ClassVar[Literal["audio", "image"]]
    """The section of the config, the prefix of its weights' names, and the word in tables."""
    can: ClassVar[frozenset[Ability]] = frozenset()
    """What it can do beside encoding."""
    why_not: ClassVar[dict[Ability, str]] = {}
    """Why it cannot do the rest: the end of a sentence "with audio.encoder = NAME, ..."."""
    specaug: ClassVar[Literal["before", "inside", "none"]] = "none"
    """Where SpecAug erases: in the encoder's input, inside it (`erase`), or nowhere."""
    joint_space: ClassVar[bool] = False
    """Whether its pooled vector lies in the joint space already and needs no head."""
    defaults: ClassVar[dict[str, dict[str, object]]] = {}
    """What other sections are by themselves with this encoder: {"mask": {"kind": "none"}}."""

    @property
    def named(self) -> str:
        """How an error speaks of it: `audio.encoder = vit`."""
        return f"{self.modality}.encoder = {self.encoder}"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and along frequency, of an encoder that can be masked."""
        raise NotImplementedError(f"{self.named} has no patches to mask")

    def input_shape(self, fusion: Fusion) -> tuple[int, ...]:
        """The shape of one clip as the encoder takes it."""
        raise NotImplementedError

    def build(self, config: Config, *, recompute: bool = False) -> nn.Module:
        """The module: (media, ids_keep=None, *, erase=None, longer=None) -> `Encoded`.

        It has the attribute `width`, that of the pooled vector.

        Args:
            recompute: compute its blocks' activations again in the backward pass.
        """
        raise NotImplementedError


# Defaults that follow audio.mel = clap. Source: LAION-CLAP's configuration.
_CLAP = {
    "sample_rate_hz": 48_000,
    "mel_bins": 64,
    "frames": 1001,
    "int16_roundtrip": True,
    # Decibels stay as they are: HTSAT begins with a BatchNorm.
    "mean": 0.0,
    "std": 0.5,
}


class Audio(Section):
    """The front end of an audio encoder: from a waveform to a log-mel."""

    duration_s: Positive = 10.0
    """Seconds of sound that the model takes: longer clips are cropped, shorter ones filled."""
    mel: Annotated[Literal["kaldi", "clap"], MEANS_WEIGHTS] = "kaldi"
    """The front end: Kaldi's (25 ms windows, 16 kHz, natural logarithm), or LAION-CLAP's (1024
    samples at 48 kHz, decibels; HTSAT's default). Rate, bins and statistics follow it."""
    mel_variant: Literal["slaney_norm", "htk_none"] = "slaney_norm"
    """CLAP's mel matrix: Slaney's scale and areas (librosa), or HTK's scale (torchaudio; with
    fusion.type)."""
    low_hz: Annotated[float, Field(ge=0)] = 50.0
    """CLAP's lowest frequency; Kaldi's is 20 Hz."""
    high_hz: Positive = 14_000.0
    """CLAP's highest frequency; Kaldi's is half the rate."""
    int16_roundtrip: Annotated[bool, MEANS_WEIGHTS] = False
    """Round samples to 16 bits, towards zero, as LAION-CLAP does (on with audio.mel = clap)."""
    sample_rate_hz: Annotated[int, Field(ge=1000), MEANS_WEIGHTS] = 16_000
    """Sample rate of the front end; 48 kHz with audio.mel = clap."""
    mel_bins: Count = 128
    """Mel bins F; 64 with audio.mel = clap."""
    frames: Annotated[Count, AFTER_FRONT_END] = 1024
    """Frames T of the log-mel: 998 frames of 10 s, then rows of zeros; 1001 with audio.mel = clap,
    none of them of zeros."""
    mean: Annotated[float, MEANS_WEIGHTS, AFTER_FRONT_END] = -4.2677393
    """Mean of AudioSet's log-mels, subtracted; 0 with audio.mel = clap."""
    std: Annotated[Positive, MEANS_WEIGHTS, AFTER_FRONT_END] = 4.5689974
    """Standard deviation; log-mels are divided by 2 * std. 0.5 with audio.mel = clap."""
    filling: Literal["repeatpad", "pad", "repeat"] = "repeatpad"
    """How a short clip is filled: whole repeats then zeros, zeros, or repeats cut off."""

    @model_validator(mode="before")
    @classmethod
    def _follow_mel(cls, tree):
        """Defaults that follow the front end."""
        mel = cls.model_fields["mel"].default
        if isinstance(tree, dict) and tree.get("mel", mel) == "clap":
            return {**_CLAP, **tree}
        return tree

    @property
    def samples(self) -> int:
        """Samples of a crop."""
        return round(self.duration_s * self.sample_rate_hz)

    @property
    def window(self) -> int:
        """Samples of a frame: Kaldi's 25 ms, or CLAP's 1024."""
        return 1024 if self.mel == "clap" else self.sample_rate_hz * 25 // 1000

    @property
    def hop(self) -> int:
        """Samples of the 10 ms shift."""
        return self.sample_rate_hz // 100

    def frames_of(self, samples):
        """Frames of a sound: those that fit whole into it (Kaldi), or one at each shift (CLAP).

        Of a number, or of a tensor of them.
        """
        whole = samples if self.mel == "clap" else samples - self.window
        return 1 + whole // self.hop

    def front_end(self) -> dict[str, Any]:
        """The settings that a cached log-mel depends on."""
        names = Audio.model_fields.keys() - self.marked(AFTER_FRONT_END).keys()
        return self.model_dump(mode="json", include=set(names))

    @model_validator(mode="after")
    def _fits(self):
        least = self.window
        rule = f"hold one window of {least * 1000 / self.sample_rate_hz:g} ms"
        require(self.samples >= least, "audio.duration_s", rule, self.duration_s)
        if self.mel == "clap":
            rule = f"be in (audio.low_hz = {self.low_hz:g}, half of audio.sample_rate_hz]"
            fits = self.low_hz < self.high_hz <= self.sample_rate_hz / 2
            require(fits, "audio.high_hz", rule, self.high_hz)
        self._check_frames(self.frames_of(self.samples))
        return self

    def _check_frames(self, held: int, multiple: int = 1) -> None:
        require(
            self.frames >= held,
            "audio.frames",
            f"hold the {held} frames of audio.duration_s = {self.duration_s:g}",
            self.frames,
            f"set audio.frames={-(-held // multiple) * multiple}",
        )


class AudioEncoder(MediaEncoder, Audio):
    """The settings of an audio encoder and its front end."""

    modality = "audio"
    specaug = "before"
    defaults = {"mask": {"kind": "none"}}  # noqa: RUF012 - a ClassVar of the base
    moved = {  # noqa: RUF012 - a ClassVar of the base
        "size": ("tiny", "small", "base", "large"),
        "width": (None,),
        "depth": (None,),
        "depths": (None,),
        "heads": (None,),
        "patch": (4, 16),
        "window_patches": (8,),
        "use_cls": (True,),
        "pool": ("mean_patch",),
        "norm_position": ("tokens",),
        "pos_grid": ("correct",),
        "drop_path": (0.0, 0.1),
        "attention": ("sdpa",),
    }

    def input_shape(self, fusion: Fusion) -> tuple[int, ...]:
        """(1, T, F); (4, T, F) with fusion."""
        return fusion.channels, self.frames, self.mel_bins

    def meaning(self) -> dict[str, Any]:
        found = super().meaning()
        if self.mel == "clap":
            found |= {name: getattr(self, name) for name in ("mel_variant", "low_hz", "high_hz")}
        return found


class PatchEncoder(AudioEncoder):
    """The settings of an audio encoder that masking and a decoder can work with.

    Its tokens are those of the patches kept, in their order, behind `prefix_tokens` others.
    """

    can = frozenset({"mask", "reconstruct"})
    defaults = {}  # noqa: RUF012 - a ClassVar of the base

    patch: Count = 16
    """Side of a square patch, in frames and in bins."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """PyTorch's attention, or xformers' (CUDA only)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and along frequency."""
        return self.frames // self.patch, self.mel_bins // self.patch

    @property
    def prefix_tokens(self) -> int:
        """Tokens before those of the patches, such as [CLS]."""
        return 0

    def positions(self, width: int) -> Tensor:
        """(N, width) float32: what is added to the patches' embeddings."""
        raise NotImplementedError


class ImageEncoder(MediaEncoder):
    """The settings of an image encoder; the section `image` puts it in the audio one's place."""

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

    tokenizer: str = "bytes"
    """For random weights: a tokenizer's folder (CLIP's: `package:open_clip`), or `bytes` (UTF-8
    bytes, needs no file)."""
    width: Count = 768
    """Random weights: width."""
    depth: Count = 12
    """Random weights: layers."""
    heads: Count = 12
    """Random weights: heads."""
    max_tokens: Count = 77
    """Longer captions are cut; batches are padded to their own longest, to a multiple of 8."""
    dropout: Ratio = 0.1
    """Dropout everywhere in the encoder."""
    freeze: bool = False
    """Keep the encoder as it is and train the projection alone."""

    @property
    def tokenizer_files(self) -> tuple[str, str]:
        """The setting that names the tokenizer, and its value: a folder or `bytes`."""
        return "text.tokenizer", self.tokenizer

    def with_files(self, folder: str) -> TextEncoder:
        """The same settings, its files (config, tokenizer) taken from a model's text/."""
        return self.model_copy(update={"tokenizer": folder})

    def build(self, *, recompute: bool = False, weights: bool = True) -> nn.Module:
        """The module: ids and mask (B, L) -> (B, D) float32.

        It has the attributes `width`, `vocabulary` and `pad_token_id`, and `save_config(folder)`.

        Args:
            weights: load the folder's weights; without, only its shape.
        """
        raise NotImplementedError
