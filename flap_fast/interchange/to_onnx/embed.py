"""Embeds sounds, images and captions with onnxruntime: python embed.py FILE CAPTION [CAPTION]...

Needs numpy, onnxruntime, tokenizers, and soundfile for sounds (soxr for those at another sample
rate) or Pillow for images.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer


class Model:
    """The model in a folder of `flap export --onnx`; with int8, that of its int8 files."""

    def __init__(self, folder, *, int8=False):
        folder, end = Path(folder), ".int8.onnx" if int8 else ".onnx"
        self.settings = json.loads((folder / "model.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._frontend = InferenceSession(folder / "frontend.onnx")
        self._media = InferenceSession(folder / f"{self.settings['modality']}{end}")
        self._text = InferenceSession(folder / f"text{end}")

    def embed(self, file):
        """(1, d) float32, unit norm: a sound or an image, as the model takes.

        Raises ValueError, which names the file, where it cannot be used.
        """
        read = {"audio": _read_sound, "image": _read_image}[self.settings["modality"]]
        try:
            name, value = read(file, self.settings)
        except ValueError as why:
            raise ValueError(f"{file}: {why}") from None
        (media,) = self._frontend.run(None, {name: value})
        return np.asarray(self._media.run(None, {"media": media})[0])

    def embed_text(self, captions, batch=256):
        """(M, d) float32, unit norm, of a list of M captions."""
        if isinstance(captions, (str, bytes)):
            raise TypeError(f"captions must be a list, got one: [{captions[:60]!r}]")
        captions = list(captions)
        for number, text in enumerate(captions):
            if not isinstance(text, str):
                raise TypeError(f"captions[{number}] must be a text, got {text!r}")
            if any("\ud800" <= sign <= "\udfff" for sign in text):
                raise ValueError(f"captions[{number}] must be valid Unicode, got {text[:60]!r}")
        found = [np.empty((0, self.settings["width"]), np.float32)]
        for at in range(0, len(captions), batch):
            some = [text.removeprefix("\ufeff") for text in captions[at : at + batch]]
            rows = self._tokenizer.encode_batch(some)
            ids = np.array([row.ids for row in rows], np.int64)
            mask = np.array([row.attention_mask for row in rows], np.int64)
            found.append(np.asarray(self._text.run(None, {"ids": ids, "attention_mask": mask})[0]))
        return np.concatenate(found)


def _read_sound(file, settings):
    import soundfile

    _require(Path(file).is_file(), "missing: no such file")
    try:
        source = file if _says_its_length(file) else _Longer(file)
        with soundfile.SoundFile(source) as sound:
            rate, subtype = sound.samplerate, sound.subtype
            _require(1000 <= rate <= 1e6, f"its rate must be 1 kHz to 1 MHz, got {rate} Hz")
            sound.seekable = lambda: False  # else no more than the header says is read, or less
            channels = np.concatenate(list(_blocks(sound)))
            said = 0 if sound.format == "MP3" or sound.frames > 2**35 else sound.frames
    except soundfile.LibsndfileError as error:
        raise ValueError(f"unreadable: {error.error_string}") from None
    _require(len(channels) > 0, "empty: no samples")
    rule = f"truncated, its header says {said} samples, got {len(channels)}; fetch it again"
    _require(len(channels) >= said, f"unreadable: {rule}")
    wave, wanted = channels.mean(1), settings["sample_rate_hz"]
    peak, loudest = float(np.abs(wave).max()), float(np.abs(channels).max())
    _require(np.isfinite(peak), "unreadable: samples are not finite")
    rule = "its samples must be in [-1, 1], with peaks up to 4"
    _require(peak <= 4, f"unreadable: {rule}, got {peak:.6g}; divide 16-bit values by 32768")
    rule = f"its channels must not cancel out, got a peak of {loudest:.2g} and {peak:.2g}"
    remedy = "in their average (left = -right?); keep one of them"
    _require(peak >= 1e-4 or loudest <= 1e-3, f"unreadable: {rule} {remedy}")
    small = subtype == "PCM_32" and 0 < peak <= 2**-16
    rule = "its 32-bit samples must use more than 16 of their bits; store them as 16-bit ones"
    _require(not small, f"unreadable: {rule}")
    if rate != wanted:
        import soxr

        wave = soxr.resample(wave, rate, wanted)
        _require(len(wave) > 0, "empty: no samples")
    return "wave", wave[None]


class _Longer(io.FileIO):
    """A file that says it is 256 times as long: libsndfile reads no more of an MP3 without a count
    of its frames than it estimates from that.
    """

    times = 1

    def seek(self, offset, whence=0):
        self.times = 256 if whence == 2 else 1
        return super().seek(offset, whence)

    def tell(self):
        return self.times * super().tell()


def _says_its_length(file):
    """Whether a sound is no MP3, or its first frame counts the others."""
    with open(file, "rb") as opened:
        head = opened.read(10)
        while head[:3] == b"ID3":  # tags, with a size of 7 bits a byte
            size = sum((byte & 127) << 7 * n for n, byte in enumerate(head[:5:-1]))
            opened.seek(size, 1)
            head = opened.read(10)
        sync = head[:1] == b"\xff" and head[1:2] >= b"\xe0"
        frame = head + opened.read(200)
    return not sync or any(tag in frame for tag in (b"Xing", b"Info", b"VBRI"))


def _blocks(sound):
    count = 2**20
    while count == 2**20:
        block = sound.read(2**20, dtype="float32", always_2d=True)
        count = len(block)
        yield block


def _read_image(file, settings):
    from PIL import Image

    _require(Path(file).is_file(), "missing: no such file")
    try:
        image = Image.open(file)
        image.load()
    except (OSError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable: {error}") from None
    if image.mode.startswith("I;16"):  # Pillow's own conversion takes the low byte
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    _require(image.mode not in ("I", "F"), f"unreadable: pixels of 32 bits (mode {image.mode})")
    (width, height), side = image.size, settings["resolution"]
    strip = max(width, height) > 50 * min(width, height)
    _require(not strip, f"a strip: {width} x {height} pixels")
    sides = tuple(side * n // min(width, height) for n in (width, height))
    left, top = (round((n - side) / 2) for n in sides)
    image = image.convert("RGB").resize(sides, Image.Resampling.BICUBIC)
    return "pixels", np.asarray(image.crop((left, top, left + side, top + side)))[None]


def _require(holds, why):
    if not holds:
        raise ValueError(why)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model = Model(Path(__file__).parent)
    try:
        cosines = model.embed(sys.argv[1]) @ model.embed_text(sys.argv[2:]).T
    except ValueError as why:
        sys.exit(str(why))
    for caption, cosine in zip(sys.argv[2:], cosines[0], strict=True):
        print(f"{cosine:6.3f}  {caption}")
