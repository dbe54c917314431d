"""The base classes of the audio encoders' settings: front end, and encoders with patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.encoders.settings import MediaEncoder
from flap_fast.section import AFTER_FRONT_END, MEANS_WEIGHTS, Count, Positive, Section

if TYPE_CHECKING:
    from torch import Tensor

    from flap_fast.config import Fusion

# Defaults that follow audio.mel. Sources: LAION-CLAP's configuration; YAMNet's params.py.
_FOLLOW = {
    "kaldi": {"mel_bins": 128},
    "clap": {
        "sample_rate_hz": 48_000,
        "mel_bins": 64,
        "frames": 1001,
        "int16_roundtrip": True,
        # Decibels stay as they are: HTSAT begins with a BatchNorm.
        "mean": 0.0,
        "std": 0.5,
    },
    "yamnet": {"mel_bins": 64, "mean": 0.0, "std": 0.5},
}
Mel = Literal["kaldi", "clap", "yamnet"]


class Audio(Section):
    """The front end of an audio encoder: from a waveform to a log-mel."""

    length: Literal["fixed", "variable"] = "fixed"
    """`fixed`: each clip is brought to audio.duration_s, as the papers train. `variable`: each clip
    keeps its own length, up to audio.max_duration_s; clips are packed, not padded."""
    duration_s: Annotated[Positive, Field(le=86400)] = 10.0
    """audio.length = fixed: seconds of a clip; longer ones are cropped, shorter ones filled."""
    max_duration_s: Annotated[Positive, Field(le=3600), AFTER_FRONT_END] = 30.0
    """audio.length = variable: longer clips are cropped to this; evaluation takes them whole, in
    windows of it. A model and its checkpoints hold the positions of all patches up to it (size
    base: 150 KiB a second), but for audio.time_positions = rotary; take no more than clips need."""
    mel: Annotated[Mel, MEANS_WEIGHTS] = "kaldi"
    """The front end: Kaldi's (25 ms windows, 16 kHz, natural logarithm), LAION-CLAP's (1024 samples
    at 48 kHz, decibels; HTSAT's default), or YAMNet's (Kaldi's windows, magnitudes of 125 to 7,500
    Hz; YAMNet's default). Rate, bins and statistics follow it."""
    mel_variant: Literal["slaney_norm", "htk_none"] = "slaney_norm"
    """CLAP's mel matrix: Slaney's scale and areas (librosa), or HTK's scale (torchaudio; with
    fusion.type)."""
    low_hz: Annotated[float, Field(ge=0)] = 50.0
    """CLAP's lowest frequency; Kaldi's is 20 Hz, YAMNet's 125 Hz."""
    high_hz: Positive = 14_000.0
    """CLAP's highest frequency; Kaldi's is half the rate, YAMNet's 7,500 Hz."""
    int16_roundtrip: Annotated[bool, MEANS_WEIGHTS] = False
    """Round samples to 16 bits, towards zero, as LAION-CLAP does (on with audio.mel = clap)."""
    sample_rate_hz: Annotated[int, Field(ge=1000), MEANS_WEIGHTS] = 16_000
    """Sample rate of the front end; 48 kHz with audio.mel = clap."""
    mel_bins: Annotated[Count, Field(le=4096)] = 128
    """Mel bins F; 64 with audio.mel = clap or yamnet."""
    frames: Annotated[Count, Field(le=8_640_000), AFTER_FRONT_END] = 1024
    """audio.length = fixed: frames T of the log-mel: 998 frames of 10 s, then rows of zeros; 1001
    with audio.mel = clap, none of them of zeros."""
    mean: Annotated[float, MEANS_WEIGHTS, AFTER_FRONT_END] = -4.2677393
    """Mean of AudioSet's log-mels, subtracted; 0 with audio.mel = clap or yamnet."""
    std: Annotated[Positive, MEANS_WEIGHTS, AFTER_FRONT_END] = 4.5689974
    """Standard deviation; log-mels are divided by 2 * std. 0.5 with audio.mel = clap or yamnet."""
    filling: Literal["repeatpad", "pad", "repeat"] = "repeatpad"
    """How a short clip is padded: whole repeats then zeros, only zeros, or truncated repeats. With
    audio.length = variable only a clip shorter than one patch is."""

    @model_validator(mode="before")
    @classmethod
    def _follow_mel(cls, tree):
        """Defaults that follow the front end."""
        mel = cls.model_fields["mel"].default
        if not isinstance(tree, dict):
            return tree
        asked = tree.get("mel", mel)  # of any type: it is not checked yet
        defaults = next((found for name, found in _FOLLOW.items() if name == asked), {})
        return {**defaults, **tree}

    @property
    def variable(self) -> bool:
        """Whether clips keep their own lengths."""
        return self.length == "variable"

    @property
    def samples(self) -> int:
        """Most samples of a clip, to which longer ones are cropped."""
        seconds = self.max_duration_s if self.variable else self.duration_s
        return round(seconds * self.sample_rate_hz)

    @property
    def least_samples(self) -> int:
        """Fewest samples of a clip, to which shorter ones are filled."""
        if not self.variable:
            return self.samples
        frames = (self.least_frames - 1) * self.hop
        return max(self.window, frames if self.mel == "clap" else frames + self.window)

    @property
    def least_frames(self) -> int:
        """Frames that the encoder needs of a clip of any length."""
        return 1

    @property
    def patch_frames(self) -> int:
        """A clip's frames are completed to a multiple of it: those of a patch."""
        return 1

    @property
    def most_frames(self) -> int:
        """Frames T of the longest log-mel in the encoder's input."""
        return self.padded_frames(self.frames_of(self.samples)) if self.variable else self.frames

    def padded_frames(self, frames):
        """Frames of a clip of its own length with the silence behind them: whole patches.

        Of a number, or of an array of them.
        """
        # Of no negative number, whose quotient ONNX rounds the other way.
        return (frames + self.patch_frames - 1) // self.patch_frames * self.patch_frames

    @property
    def window(self) -> int:
        """Samples of a frame: Kaldi's and YAMNet's 25 ms, or CLAP's 1024."""
        return 1024 if self.mel == "clap" else self.sample_rate_hz * 25 // 1000

    @property
    def hop(self) -> int:
        """Samples of the 10 ms shift."""
        return self.sample_rate_hz // 100

    @property
    def range_hz(self) -> tuple[float, float]:
        """The lowest and the highest frequency of the mel bins."""
        if self.mel == "clap":
            return self.low_hz, self.high_hz
        return (125.0, 7500.0) if self.mel == "yamnet" else (20.0, self.sample_rate_hz / 2)

    def frames_of(self, samples):
        """Number of frames of a sound: only whole frames (Kaldi), or one per shift (CLAP, YAMNet).

        Of a number, or of a tensor of them.
        """
        least = {"kaldi": self.window, "clap": 0, "yamnet": 1}[self.mel]
        return 1 + (samples - least) // self.hop

    def front_end(self) -> dict[str, Any]:
        """The settings that a cached log-mel depends on."""
        names = Audio.model_fields.keys() - self.marked(AFTER_FRONT_END).keys()
        # Log-mels that were cached before there was another length say nothing about it.
        names -= {"duration_s"} if self.variable else {"length"}
        return self.model_dump(mode="json", include=set(names))

    @model_validator(mode="after")
    def _fits(self):
        name, least = "duration_s", self.window
        if self.variable:
            name, least = "max_duration_s", self.least_samples
        ms = f"{least * 1000 / self.sample_rate_hz:g} ms"
        rule = f"hold one window of {ms}" if least == self.window else f"hold one patch of {ms}"
        require(self.samples >= least, f"audio.{name}", rule, getattr(self, name))
        if self.mel == "clap":
            rule = f"be in (audio.low_hz = {self.low_hz:g}, half of audio.sample_rate_hz]"
            valid = self.low_hz < self.high_hz <= self.sample_rate_hz / 2
            require(valid, "audio.high_hz", rule, self.high_hz)
        if self.mel == "yamnet":
            high_hz, rate_hz = self.range_hz[1], self.sample_rate_hz
            rule = f"be at least {2 * high_hz:g} with audio.mel = yamnet, whose bands end at "
            enough, remedy = rate_hz >= 2 * high_hz, "leave it out for 16000"
            require(enough, "audio.sample_rate_hz", f"{rule}{high_hz:g} Hz", rate_hz, remedy)
        if not self.variable:
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

    def input_shape(self, fusion: Fusion) -> tuple[int, ...]:
        """(1, T, F); (4, T, F) with fusion."""
        return fusion.channels, self.most_frames, self.mel_bins

    def patches_of(self, frames: Sequence[int]) -> list[int]:
        """Patches of clips of so many frames each, multiples of a patch."""
        return [count // self.patch_frames * self.grid[1] for count in frames]

    @property
    def prefix_tokens(self) -> int:
        """Tokens before those of the patches, such as [CLS]."""
        return 0

    def meaning(self) -> dict[str, Any]:
        found = super().meaning()
        if self.mel == "clap":
            found |= {name: getattr(self, name) for name in ("mel_variant", "low_hz", "high_hz")}
        return found


class PatchEncoder(AudioEncoder):
    """The settings of an audio encoder that supports masking and a decoder.

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
        return self.most_frames // self.patch, self.mel_bins // self.patch

    @property
    def patch_frames(self) -> int:
        """The side of a patch."""
        return self.patch

    @property
    def least_frames(self) -> int:
        """One patch."""
        return self.patch

    def front_end(self) -> dict[str, Any]:
        # A clip shorter than a patch is filled to one.
        return super().front_end() | ({"patch": self.patch} if self.variable else {})

    def window_tokens(self, density: float) -> int | None:
        """How many tokens on either side a token of packed clips attends to; None: all.

        Args:
            density: tokens per patch, 1 where nothing is masked.
        """
        return None

    def portable(self) -> Self:
        return self.model_copy(update={"attention": "sdpa"})

    def positions(self, width: int) -> Tensor:
        """(N, width) float32: positions that are added to the patches' embeddings."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _has_whole_patches(self):
        for name in ("mel_bins",) if self.variable else ("frames", "mel_bins"):
            value, rule = getattr(self, name), f"be a multiple of {self.patch}"
            require(value % self.patch == 0, f"audio.{name}", rule, value)
        return self

    def _check_frames(self, held: int, multiple: int = 1) -> None:
        super()._check_frames(held, self.patch)
