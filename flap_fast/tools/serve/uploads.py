"""Sounds that a client sent: whether they may be decoded, before they are."""

from __future__ import annotations

from flap_fast.checks import ConfigError, require
from flap_fast.data.preprocess.mpeg_frames import first_frame
from flap_fast.data.preprocess.patched import SoundBytes
from flap_fast.data.preprocess.sound_file import LONGEST_S, open_sound
from flap_fast.data.preprocess.sound_formats import ffmpeg_format
from flap_fast.data.preprocess.waveform import BadSound

# Samples of a second, in all channels: 8 channels at 96 kHz have fewer. Silence of many more is a
# small file, and nobody else is answered while it is decoded.
_MOST_PER_S = 2**20


class Refused(Exception):
    """A request that is not answered: its status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def required(holds: bool, name: str, rule: str, value: object, *, status: int = 422) -> None:
    """Raise `Refused` "NAME must RULE, got VALUE" unless `holds`."""
    try:
        require(holds, name, rule, value)
    except ConfigError as error:
        raise Refused(status, str(error)) from None


def decodable(data: bytes, most_s: float) -> tuple[bytes, float]:
    """Return a sound's bytes and its seconds, counted; in constant memory.

    Raises:
        Refused: it is longer than `most_s` by its header or in fact, has more samples a second than
            recordings have, or is no sound.
    """
    try:
        with SoundBytes(data) as file:
            file.seek(first_frame(file) if data else 0)
            other = ffmpeg_format(file.read(64))
        # ffmpeg would unpack it to a file of a size that a client chooses.
        required(other is None, "the sound", "be WAV, FLAC, OGG or MP3", other, status=415)
        rule = f"last at most {most_s:g} s"
        with open_sound(data) as sound:
            rate = sound.samplerate
            densest, per_s = f"have at most {_MOST_PER_S} samples a second", rate * sound.channels
            required(per_s <= _MOST_PER_S, "the sound", densest, per_s, status=413)
            unknown = sound.longer or sound.frames > LONGEST_S * rate
            claim = 0 if unknown else sound.frames
            required(claim <= most_s * rate, "the sound", rule, round(claim / rate), status=413)
            frames = sum(map(len, sound.raw_blocks(int(most_s * rate) + 1)))
            required(frames <= most_s * rate, "the sound", rule, "a longer one", status=413)
    except BadSound as error:
        raise Refused(422, f"the sound must be readable, got one that is {error}") from None
    return data, frames / rate
