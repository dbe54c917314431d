"""Embeds sounds, images and captions with onnxruntime: python embed.py FILE CAPTION [CAPTION]...

Needs numpy, onnxruntime, tokenizers, and soundfile for sounds (soxr for those at another sample
rate) or Pillow for images.
"""

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
        """(1, d) float32, unit norm: a sound or an image, as the model takes."""
        read = {"audio": _read_sound, "image": _read_image}[self.settings["modality"]]
        name, value = read(file, self.settings)
        (media,) = self._frontend.run(None, {name: value})
        return np.asarray(self._media.run(None, {"media": media})[0])

    def embed_text(self, captions):
        """(M, d) float32, unit norm."""
        rows = self._tokenizer.encode_batch(list(captions))
        ids = np.array([row.ids for row in rows], np.int64)
        mask = np.array([row.attention_mask for row in rows], np.int64)
        return np.asarray(self._text.run(None, {"ids": ids, "attention_mask": mask})[0])


def _read_sound(file, settings):
    import soundfile

    wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    wave, wanted = wave.mean(1), settings["sample_rate_hz"]
    if rate != wanted:
        import soxr

        wave = soxr.resample(wave, rate, wanted)
    return "wave", wave[None]


def _read_image(file, settings):
    from PIL import Image

    image, side = Image.open(file).convert("RGB"), settings["resolution"]
    width, height = image.size
    sides = tuple(side * n // min(width, height) for n in (width, height))
    left, top = (round((n - side) / 2) for n in sides)
    image = image.resize(sides, Image.Resampling.BICUBIC)
    return "pixels", np.asarray(image.crop((left, top, left + side, top + side)))[None]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model = Model(Path(__file__).parent)
    cosines = model.embed(sys.argv[1]) @ model.embed_text(sys.argv[2:]).T
    for caption, cosine in zip(sys.argv[2:], cosines[0], strict=True):
        print(f"{cosine:6.3f}  {caption}")
