"""The sections `audio`, `fusion`, `specaug` and `mask`: what a model hears, and its encoder.

Defaults follow `audio.encoder` and `audio.mel` where those are set.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.config.section import Count, CountOrZero, Positive, Ratio, Section

# Width, depth and heads of the audio encoder. Source: SPEC 4.1; `tiny` is the demo's.
SIZES = {
    "tiny": (192, 4, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
# HTSAT's first width and heads, doubled at each stage, and the blocks of each. Source: LAION-CLAP.
HTSAT_SIZES = {
    "tiny": (96, (2, 2, 6, 2), 4),
    "base": (128, (2, 2, 12, 2), 4),
    "large": (256, (2, 2, 12, 2), 4),
}
# Defaults that follow audio.encoder and audio.mel. Sources: SPEC 3.2, 3.5, 4.6.
_HTSAT = {"mel": "clap", "size": "tiny", "patch": 4, "drop_path": 0.1}
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
    encoder: Literal["vit", "htsat"] = "vit"
    """FLAP's ViT, or LAION-CLAP's HTSAT: a Swin transformer, which cannot be masked."""
    size: Literal["tiny", "small", "base", "large"] = "base"
    """Width, depth and heads of the ViT: 192/4/3, 384/12/6, 768/12/12, 1024/24/16. HTSAT: `tiny`
    (the default there), `base` or `large`, which begin 96, 128 or 256 wide."""
    width: Count | None = None
    """Overrides the size's width D (HTSAT: of the first stage, doubled at each)."""
    depth: Count | None = None
    """Overrides the size's number of blocks (ViT)."""
    depths: tuple[Count, ...] | None = None
    """Overrides the size's blocks of each stage (HTSAT)."""
    heads: Count | None = None
    """Overrides the size's number of heads (HTSAT: of the first stage, doubled at each)."""
    window_patches: Count = 8
    """Side of HTSAT's windows of attention."""
    duration_s: Positive = 10.0
    """Seconds of sound the model sees: longer clips are cropped, shorter ones filled."""
    mel: Literal["kaldi", "clap"] = "kaldi"
    """The front end: Kaldi's (25 ms windows, 16 kHz, natural logarithm), or LAION-CLAP's (1024
    samples at 48 kHz, decibels; HTSAT's default). Rate, bins and statistics follow it."""
    mel_variant: Literal["slaney_norm", "htk_none"] = "slaney_norm"
    """CLAP's mel matrix: Slaney's scale and areas (librosa), or HTK's scale (torchaudio; with
    fusion.type)."""
    low_hz: Annotated[float, Field(ge=0)] = 50.0
    """CLAP's lowest frequency; Kaldi's is 20 Hz."""
    high_hz: Positive = 14_000.0
    """CLAP's highest frequency; Kaldi's is half the rate."""
    int16_roundtrip: bool = False
    """Round samples to 16 bits, towards zero, as LAION-CLAP does (on with audio.mel = clap)."""
    sample_rate_hz: int = Field(default=16_000, ge=1000)
    """Rate of the front end; 48 kHz with audio.mel = clap."""
    mel_bins: Count = 128
    """Mel bins F; 64 with audio.mel = clap."""
    frames: Count = 1024
    """Frames T of the log-mel: 998 frames of 10 s, then rows of zeros; 1001 with audio.mel = clap,
    none of them of zeros."""
    patch: Count = 16
    """Side of a square patch, in frames and in bins; 4 for HTSAT."""
    mean: float = -4.2677393
    """Mean of AudioSet's log-mels, subtracted; 0 with audio.mel = clap."""
    std: Positive = 4.5689974
    """Their standard deviation; twice it divides. 0.5 with audio.mel = clap."""
    filling: Literal["repeatpad", "pad", "repeat"] = "repeatpad"
    """How a short clip is filled: whole repeats then zeros, zeros, or repeats cut off."""
    use_cls: bool = True
    """ViT: prepend a [CLS] token (as AudioMAE's checkpoints do)."""
    pool: Literal["mean_patch", "cls", "mean_all"] = "mean_patch"
    """ViT: what becomes the clip's vector; HTSAT's is the mean of its tokens."""
    norm_position: Literal["tokens", "pooled"] = "tokens"
    """ViT: the final LayerNorm on the tokens before pooling, or on the pooled vector."""
    pos_grid: Literal["correct", "audiomae_legacy"] = "correct"
    """ViT: grid of the fixed positions; AudioMAE's own table was built for the transposed grid."""
    drop_path: Ratio = 0.0
    """Stochastic depth at the last block, growing linearly from 0; 0.1 for HTSAT."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """PyTorch's attention, or xformers' (CUDA only)."""

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, tree):
        """Defaults that follow the encoder, then those that follow the front end."""
        if isinstance(tree, dict) and tree.get("encoder") == "htsat":
            tree = {**_HTSAT, **tree}
        if isinstance(tree, dict) and tree.get("mel") == "clap":
            tree = {**_CLAP, **tree}
        return tree

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and along frequency; of HTSAT along both sides of its folded image."""
        if self.encoder == "htsat":
            return self.image_side // self.patch, self.image_side // self.patch
        return self.frames // self.patch, self.mel_bins // self.patch

    @property
    def samples(self) -> int:
        """Samples of a crop."""
        return round(self.duration_s * self.sample_rate_hz)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The ViT's width, depth and heads in force."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    @property
    def stages(self) -> tuple[tuple[int, int, int], ...]:
        """Width, depth and heads of each of HTSAT's stages."""
        width, depths, heads = HTSAT_SIZES[self.size]
        width, depths, heads = self.width or width, self.depths or depths, self.heads or heads
        return tuple((width << n, depth, heads << n) for n, depth in enumerate(depths))

    @property
    def image_side(self) -> int:
        """Side of the square into which HTSAT folds a log-mel, in pixels: 256 of 1001 x 64.

        The smallest that holds all frames and that the stages can halve; 0 if there is none.
        """
        least = math.isqrt((self.frames - 1) // self.mel_bins) + 1
        sides = (folds * self.mel_bins for folds in range(least, 2 * least + 1))
        return next((side for side in sides if self._divides(side)), 0)

    def _divides(self, side: int) -> bool:
        grids = [side // self.patch >> n for n in range(len(self.stages))]
        whole = side % (self.patch << (len(grids) - 1)) == 0
        return whole and all(grid % min(self.window_patches, grid) == 0 for grid in grids)

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

    @model_validator(mode="after")
    def _fits(self):
        spoken = self.frames_of(self.samples)
        least = self.window
        rule = f"hold one window of {least * 1000 / self.sample_rate_hz:g} ms"
        require(self.samples >= least, "audio.duration_s", rule, self.duration_s)
        if self.mel == "clap":
            rule = f"be in (audio.low_hz = {self.low_hz:g}, half of audio.sample_rate_hz]"
            fits = self.low_hz < self.high_hz <= self.sample_rate_hz / 2
            require(fits, "audio.high_hz", rule, self.high_hz)
        (self._fits_htsat if self.encoder == "htsat" else self._fits_vit)(spoken)
        return self

    def _fits_vit(self, spoken: int) -> None:
        width, _, heads = self.shape
        require(width % heads == 0, "audio.width", f"be a multiple of audio.heads = {heads}", width)
        require(width % 4 == 0, "audio.width", "be a multiple of 4 (2-D sine positions)", width)
        for name in ("frames", "mel_bins"):
            value = getattr(self, name)
            require(
                value % self.patch == 0, f"audio.{name}", f"be a multiple of {self.patch}", value
            )
        require(
            self.frames >= spoken,
            "audio.frames",
            f"hold the {spoken} frames of audio.duration_s = {self.duration_s:g}",
            self.frames,
            f"set audio.frames={math.ceil(spoken / self.patch) * self.patch}",
        )
        require(
            self.use_cls or self.pool != "cls",
            "audio.pool",
            "not be 'cls' without audio.use_cls",
            self.pool,
        )
        rule, remedy = "be left out for a ViT", "set audio.depth, or audio.encoder=htsat"
        require(self.depths is None, "audio.depths", rule, self.depths, remedy)

    def _fits_htsat(self, spoken: int) -> None:
        remedy = "set audio.depths, the blocks of each stage"
        require(self.depth is None, "audio.depth", "be left out for HTSAT", self.depth, remedy)
        sizes = ", ".join(HTSAT_SIZES)
        require(self.size in HTSAT_SIZES, "audio.size", f"be one of HTSAT's {sizes}", self.size)
        width, _, heads = self.stages[0]
        require(width % heads == 0, "audio.width", f"be a multiple of audio.heads = {heads}", width)
        require(
            self.frames == spoken,
            "audio.frames",
            f"be the {spoken} frames of audio.duration_s = {self.duration_s:g} for HTSAT",
            self.frames,
            f"set audio.frames={spoken}",
        )
        require(self.attention == "sdpa", "audio.attention", "be 'sdpa' for HTSAT", self.attention)
        require(
            self.image_side > 0,
            "audio.window_patches",
            f"divide each of {len(self.stages)} stages of a log-mel of {self.frames} frames and "
            f"{self.mel_bins} bins, folded into a square",
            self.window_patches,
            "change it, or shorten audio.depths",
        )


class Fusion(Section):
    type: Literal[
        "none", "aff_2d", "iaff_2d", "daf_2d", "channel_map", "aff_1d", "iaff_1d", "daf_1d"
    ] = "none"
    """How clips longer than audio.duration_s are seen: cropped, or whole beside three pieces of
    them. The pieces join the patches' embeddings (`_2d`) or the log-mel (`_1d`) by attention, by
    attention twice or by a sum, or are channels of the patch embedding. LAION's is `aff_2d`."""
    max_duration_s: Positive = 30.0
    """Seconds of a clip that are decoded for it; still longer ones are cropped to as much."""
    force_one: bool = True
    """Take one clip for a longer one in a batch without any, so that each batch trains the fusion
    (LAION's; each rank's own). Needed by train.zero_stage = 3."""

    @property
    def on(self) -> bool:
        """Whether longer clips are seen whole."""
        return self.type != "none"

    def longest(self, audio: Audio) -> int:
        """Samples at most that are kept of a clip."""
        if not self.on:
            return audio.samples
        return round(self.max_duration_s * audio.sample_rate_hz)


class SpecAug(Section):
    time_frames: CountOrZero = 192
    """Widest time mask, exclusive; 0 turns it off."""
    freq_bins: CountOrZero = 48
    """Widest frequency mask, exclusive; 0 turns it off."""
    stripes: Count = 1
    """Masks of each kind. HTSAT's defaults are 2 of up to 63 frames and 2 of up to 7 bins."""
    domain: Literal["pre_norm", "post_norm"] = "pre_norm"
    """Zeros before normalisation (AudioMAE's order) or after; HTSAT's lie behind its BatchNorm."""


class Mask(Section):
    kind: Literal["none", "1d", "2d"] = "2d"
    """Which patches training drops: none, of the flat sequence, or whole rows and columns."""
    ratio: Ratio = 0.4
    """Share dropped by 1-D masking."""
    unit: Literal["token", "frame"] = "token"
    """What 1-D masking drops: patches, or whole time columns of them."""
    time_ratio: Ratio = 0.2
    """Share of time columns dropped by 2-D masking."""
    freq_ratio: Ratio = 0.2
    """Share of frequency rows dropped by 2-D masking."""
    shared_inner: bool = True
    """2-D: one draw of frequency rows a clip, or one for each time column."""
    rounding: Literal["floor", "round", "ceil"] = "floor"
    """How a kept count becomes whole."""
    unmasked_tail_epochs: CountOrZero = 0
    """Epochs at the end that train without masking (FLIP)."""
