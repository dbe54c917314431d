"""The sections `fusion`, `specaug` and `mask`: what an encoder sees of a clip in training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flap_fast.encoders.audio_settings import Audio
from flap_fast.section import Count, CountOrZero, Positive, Ratio, Section


class Fusion(Section):
    type: Literal[
        "none", "aff_2d", "iaff_2d", "daf_2d", "channel_map", "aff_1d", "iaff_1d", "daf_1d"
    ] = "none"
    """How clips longer than audio.duration_s are used: cropped, or whole and with three pieces.
    The pieces join the patches' embeddings (`_2d`) or the log-mel (`_1d`) by attention, by iterated
    attention or by a sum, or are channels of the patch embedding. LAION's is `aff_2d`."""
    max_duration_s: Annotated[Positive, Field(le=86400)] = 30.0
    """With fusion: seconds of a clip that are decoded; longer clips are cropped to this."""
    force_one: bool = True
    """With fusion: treat one clip as longer in a batch without any, so that each batch trains the
    fusion (LAION's; per rank). Required by train.zero_stage = 3."""

    @property
    def on(self) -> bool:
        """Whether longer clips are encoded whole."""
        return self.type != "none"

    @property
    def channels(self) -> int:
        """Channels of a clip's log-mel: 1, or with fusion the whole clip and three pieces."""
        return 4 if self.on else 1

    def longest(self, audio: Audio) -> int:
        """Largest number of samples kept of a clip."""
        if not self.on:
            return audio.samples
        return round(self.max_duration_s * audio.sample_rate_hz)


class SpecAug(Section):
    time_frames: CountOrZero = 192
    """Widest time mask, exclusive; 0 turns it off. With audio.length = variable that of a clip of
    audio.frames or more, and the same fraction of a shorter one."""
    freq_bins: CountOrZero = 48
    """Widest frequency mask, exclusive; 0 turns it off."""
    stripes: Count = 1
    """Masks of each kind. HTSAT's defaults are 2 of up to 63 frames and 2 of up to 7 bins."""
    domain: Literal["pre_norm", "post_norm"] = "pre_norm"
    """Zeros before normalisation (AudioMAE's order) or after; for HTSAT, after its BatchNorm."""

    @property
    def on(self) -> bool:
        """Whether it erases anything."""
        return self.time_frames > 0 or self.freq_bins > 0


class Mask(Section):
    kind: Literal["none", "1d", "2d"] = "2d"
    """Which patches training drops: none, of the flat sequence, or whole rows and columns."""
    ratio: Ratio = 0.4
    """Fraction dropped by 1-D masking."""
    unit: Literal["token", "frame"] = "token"
    """What 1-D masking drops: patches, or whole time columns of them."""
    time_ratio: Ratio = 0.2
    """Fraction of time columns dropped by 2-D masking."""
    freq_ratio: Ratio = 0.2
    """Fraction of frequency rows dropped by 2-D masking."""
    shared_inner: bool = True
    """2-D: one draw of frequency rows a clip, or one for each time column."""
    rounding: Literal["floor", "round", "ceil"] = "floor"
    """How a kept count is rounded."""
    unmasked_tail_epochs: CountOrZero = 0
    """Epochs at the end that train without masking (FLIP); the last one may be incomplete."""

    def masks(self, epoch: int, epochs: int) -> bool:
        """Whether patches are dropped in an epoch, counted from 0, of a run of `epochs`."""
        return self.kind != "none" and epoch < epochs - self.unmasked_tail_epochs
