"""A sound file or its bytes -> mono blocks at the file's own rate (CPU, NumPy).

Files: what libsndfile reads, and ffmpeg where it is installed (see `sound_formats`). They are read
forward, a block at a time: memory does not grow with a sound, nor with what its header claims.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from flap_fast.data.preprocess.mpeg_frames import (
    count_frames,
    counted_frames,
    first_frame,
    frame_samples,
    is_mpeg,
)
from flap_fast.data.preprocess.patched import Patched, SoundBytes
from flap_fast.data.preprocess.sound_formats import as_wav, ffmpeg_format
from flap_fast.data.preprocess.sound_header import check_flac_end, mended
from flap_fast.data.preprocess.unusable import BadSound as BadSound
from flap_fast.data.preprocess.unusable import Unread as Unread
from flap_fast.data.preprocess.unusable import Unusable as Unusable

Source = Path | bytes
"""A file, or the bytes of one."""

# Values (frames times channels) read at a time.
_BLOCK = 2**18

# Frames decoded before a wanted one: at most what MP3 keeps of earlier frames, 511 bytes.
_PREROLL = 32 * 1152

# A peak above it (12 dB over full scale) says that samples are not in [-1, 1] but integers.
LOUDEST = 4.0
# A peak up to it, of 32-bit integers, says that they are 16-bit ones.
QUIETEST = 2.0**-16
# Quieter than -80 dB of full scale at its loudest: nothing to hear, and a constant log-mel.
SILENT = 1e-4

# Other rates say that the header is wrong: of a lower one a sound becomes a thousand times larger.
LOWEST_HZ = 1000
RATES_HZ = range(LOWEST_HZ, 1_000_001)
# As many as ambisonics of the seventh order has.
MOST_CHANNELS = 64
# The longest sound, and the latest start and longest duration of a piece of one: a day.
LONGEST_S = 24 * 3600

# Encodings in which a sample stands at a place of its own, and FLAC, which finds samples by number.
_ADDRESSED = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}

# Frames; of a FLAC that does not say, libsndfile says 2**63 - 1.
_LONGEST = 2**35

# Missing samples that are no damage: fewer than a window has, or than a few frames of MP3.
_SLACK_S = 0.025
_MP3_SLACK = 4 * 1152

# Formats that libsndfile cuts to what there is, but for what it logs of their headers.
_LOGGED = {"AVR", "MAT4", "MAT5", "MPC2K", "WVE"}
_CLAIM = re.compile(r"(?:Frames|Cols)\s*: (\d+)|Data length (\d+) should be")

# libsndfile's code for an error of the system.
_SYSTEM = 2


class SoundFile(soundfile.SoundFile):
    """An open file that is only read forward, in blocks.

    soundfile seeks to the end of each read, if it can: MP3 then loses what it kept of the frame
    before, and FLAC with a wrong length fails.
    """

    longer = False
    """It says that it is longer than it is."""
    stream: BinaryIO | None = None
    """A FLAC's file, at the byte to which libsndfile has read."""
    counted = 0
    """The samples of an MP3 by the headers of its frames."""

    def seekable(self) -> bool:
        return False

    def mono_blocks(self, frames: int) -> Iterator[np.ndarray]:
        """Yield the next `frames`, or those up to the end: (n,) float32, channels averaged.

        Raises what `checked_blocks` raises.
        """
        return (wave for _, wave in self.checked_blocks(frames))

    def checked_blocks(self, frames: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield them as (n, channels) float32 and averaged to (n,).

        Raises:
            BadSound: a sample is not finite, or beyond `LOUDEST`; more than `LONGEST_S`; after the
                last block, channels that cancel out, or 16-bit values stored as 32-bit ones.
        """
        peak = loudest = 0.0
        left = LONGEST_S * self.samplerate
        for block in self.raw_blocks(frames):
            left -= len(block)
            if left < 0:
                raise BadSound(too_long("it"))
            wave, its_peak = mono(block)
            peak = max(peak, its_peak)
            if peak < SILENT:
                loudest = max(loudest, float(np.abs(block).max(initial=0)))
            yield block, wave
        self._check_end(frames, LONGEST_S * self.samplerate - left)
        check_peaks(peak, loudest)
        if self.subtype == "PCM_32" and 0 < peak <= QUIETEST:
            raise BadSound(
                "unreadable: its 32-bit samples must use more than 16 of their bits; "
                "store them as 16-bit ones"
            )

    def _check_end(self, wanted: int, read: int) -> None:
        """Raise `BadSound` where all was wanted, and fewer frames came than the header says."""
        slack = _MP3_SLACK if self.format == "MP3" else _SLACK_S * self.samplerate
        claim = 0 if self.longer or self.frames > _LONGEST else self.frames
        claim = max(claim, self.counted)
        if wanted == self.frames and claim - read > slack:
            raise BadSound(
                f"unreadable: damaged, its header says {claim} samples, got {read}; fetch it again"
            )
        if wanted == self.frames and self.stream is not None:
            check_flac_end(self.stream)

    def skip(self, frames: int, *, seek: bool) -> None:
        """Leave out the first `frames`, or all if there are fewer; `seek` if the file `seeks`."""
        if seek:
            frames = min(frames, self.frames)
            self.seek(max(0, frames - _PREROLL))
            frames = min(frames, _PREROLL)
        for _ in self.raw_blocks(frames):
            pass

    def raw_blocks(self, frames: int) -> Iterator[np.ndarray]:
        """Yield them as (n, channels) float32."""
        while frames > 0:
            wanted = min(frames, max(1, _BLOCK // self.channels))
            block = self.read(wanted, dtype="float32", always_2d=True)
            yield block
            frames = frames - wanted if len(block) == wanted else 0


def too_long(what: str) -> str:
    """Why a sound, or a piece of it, is refused."""
    return f"unreadable: {what} must last {LONGEST_S // 3600} hours or less; cut it into clips"


def mono(block: np.ndarray) -> tuple[np.ndarray, float]:
    """Average the channels of (n, channels) float32: (n,), and its peak.

    Raises:
        BadSound: a sample is not finite, or beyond `LOUDEST`.
    """
    # Channel by channel: the mean along so short an axis takes NumPy fifteen times as long.
    wave = block[:, 0].copy()
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
        for channel in range(1, block.shape[1]):
            wave += block[:, channel]
    if block.shape[1] > 1:
        wave /= block.shape[1]
    # NaN is in both, so that no pass over the samples is for them alone.
    peak = float(np.maximum(wave.max(initial=0), -wave.min(initial=0)))
    if not peak <= LOUDEST:
        if not np.isfinite(peak):
            raise BadSound("unreadable: samples are not finite")
        raise BadSound(
            f"unreadable: its samples must be in [-1, 1], with peaks up to {LOUDEST:g}, got "
            f"{peak:.6g}; divide 16-bit values by 32768"
        )
    return wave, peak


def check_peaks(average: float, loudest: float) -> None:
    """Raise `BadSound` where the average of channels is silent, and the loudest of them is not."""
    if average < SILENT and loudest > 10 * SILENT:
        raise BadSound(
            f"unreadable: its channels must not cancel out, got a peak of {loudest:.2g} and "
            f"{average:.2g} in their average (left = -right?); keep one of them"
        )


@contextmanager
def open_sound(source: Source) -> Iterator[SoundFile]:
    """Open a sound; errors of libsndfile in the `with` block become these.

    Raises:
        BadSound: unreadable, or a sample rate or number of channels that cannot be true.
        Unread: missing, or refused by the system.
    """
    if isinstance(source, Path) and not os.path.isfile(source):  # a name may be too long to ask
        raise Unread("missing: no such file")
    try:
        with _open(source) as file:
            if file.samplerate not in RATES_HZ:
                limit = (
                    "1 MHz or less" if file.samplerate > LOWEST_HZ else f"{LOWEST_HZ} Hz or more"
                )
                raise BadSound(
                    f"unreadable: its sample rate must be {limit}, got {file.samplerate} Hz"
                )
            if file.channels > MOST_CHANNELS:
                rule = f"it must have {MOST_CHANNELS} channels or fewer"
                raise BadSound(f"unreadable: {rule}, got {file.channels}")
            if file.format in _LOGGED:
                numbers = (int(n) for found in _CLAIM.findall(file.extra_info) for n in found if n)
                if (claim := max(numbers, default=0)) > file.frames:
                    raise BadSound(
                        f"unreadable: truncated, its header says {claim} samples, got "
                        f"{file.frames}; fetch it again"
                    )
            yield file
    except soundfile.LibsndfileError as error:
        kind = Unread if error.code == _SYSTEM else BadSound
        raise kind(f"unreadable: {error.error_string}") from None
    except (OSError, soundfile.SoundFileError) as error:
        kind = Unread if isinstance(error, OSError) else BadSound
        raise kind(f"unreadable: {error}") from None


@contextmanager
def _open(source: Source) -> Iterator[SoundFile]:
    with (
        SoundBytes(source) if isinstance(source, bytes) else source.open("rb", buffering=0)
    ) as opened:
        if opened.seek(0, os.SEEK_END) == 0:
            raise BadSound("empty: the file has no bytes; fetch it again")
        start = opened.seek(first_frame(opened))
        head = opened.read(64)
        if name := ffmpeg_format(head):
            with as_wav(source, name) as wav, SoundFile(os.fspath(wav)) as file:
                yield file
            return
        flac = start == 0 and head.startswith(b"fLaC")
        data, counted = _mended(opened)
        if data is None:
            opened.seek(0)
            data = opened
            if isinstance(source, Path):
                # As bytes, for names that are no UTF-8: soundfile cannot encode them.
                data = opened.fileno() if flac else os.fsencode(source)
        try:
            # Takes bytes and files, says str.
            file = SoundFile(data, closefd=False)  # type: ignore[arg-type]
        except TypeError as error:  # x.raw, which has no header
            raise BadSound(f"unreadable: {error}") from None
        file.longer = isinstance(data, Patched) and data.longer
        file.stream = opened if flac and not isinstance(data, Patched) else None
        file.counted = counted
        with file:
            yield file


def _mended(file: BinaryIO) -> tuple[Patched | None, int]:
    """The file as libsndfile reads all of it, None where it does as it is; `SoundFile.counted`."""
    if not is_mpeg(file):
        patches = mended(file)
        return Patched(file, patches) if patches else None, 0
    tag = counted_frames(file)
    if tag is None:
        return Patched(file, {}, longer=True), 0
    offset, frames = tag
    there = count_frames(file)
    if there < frames:
        raise BadSound(
            f"unreadable: truncated, its header says {frames} frames, got {there}; fetch it again"
        )
    # A frame with the tag, and one that some writers do not count.
    longer, samples = there > frames + 2, frames * frame_samples(file)
    return Patched(file, {offset: bytes(4)}, longer=True) if longer else None, samples


def sound_seconds(source: Source) -> float:
    """The duration: as the header says, or counted where none does; raises as `open_sound`."""
    with open_sound(source) as file:
        frames = file.frames
        if file.longer or frames > _LONGEST:
            frames = sum(len(block) for block in file.raw_blocks(sys.maxsize))
        return frames / file.samplerate


def seeks(source: Source) -> bool:
    """Whether a file can be sought in: its last sample is where its header says, or it is MP3."""
    try:
        with open_sound(source) as file:
            if file.format == "MP3":
                return True
            file.seek(file.frames - 1)
            return len(file.read(2)) == 1
    except BadSound:
        return False


def seeks_exactly(source: Source) -> bool:
    """Whether, moreover, its length is true and sought samples are those of reading forward."""
    with open_sound(source) as file:
        addressed = file.subtype in _ADDRESSED and file.format != "OGG"
    return addressed and seeks(source)
