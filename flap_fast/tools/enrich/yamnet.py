"""YAMNet as ONNX: log-mel patches of 0.96 s -> 521 AudioSet classes, averaged over the clip.

    frames = stft(wave, window 400, hop 160, fft 512, periodic Hann)       at 16 kHz
    mel    = log(|frames| M + 0.001)             M: 64 triangles in HTK's mel, 125 to 7,500 Hz
    patch  = 96 frames, every 48; the last one is padded with silence

Quantised exports (Qualcomm's) have uint8 inputs and outputs, `real = scale * (q - zero_point)`,
with the scales as initialisers of the graph. Outputs are logits.

Source: Google's YAMNet, params.py and features.py; AudioSet's display names, unchanged.
"""

from __future__ import annotations

import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flap_fast.checks import ConfigError, require
from flap_fast.data.preprocess.kaldi_mel import mel_matrix
from flap_fast.interchange.yamnet_classes import class_names

SAMPLE_RATE_HZ = 16_000
_WINDOW, _HOP, _FFT = 400, 160, 512
_FRAMES, _PATCH_HOP, _BINS = 96, 48, 64
_OFFSET = 1e-3
_HINT = "pip install 'flap_fast[enrich]'"


@dataclass(frozen=True)
class Scale:
    """Scale of a quantised tensor: `real = scale * (q - zero_point)`."""

    scale: float
    zero_point: int

    def quantise(self, real: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(real / self.scale) + self.zero_point, 0, 255).astype(np.uint8)

    def real(self, quantised: np.ndarray) -> np.ndarray:
        return self.scale * (quantised.astype(np.float64) - self.zero_point)


class Yamnet:
    """An `events.Tagger`.

    Args:
        file: an .onnx, or a .zip with one, next to a `*class_map*.csv`.

    Raises:
        ConfigError: onnxruntime is not installed, or class map, input or output are wrong.
    """

    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, name: str, file: Path):
        self.name = name
        self._names = class_names(file.parent, "--tagger")
        self._mel = mel_matrix(_BINS, _WINDOW, SAMPLE_RATE_HZ, 125.0, 7500.0).T  # (257, 64)
        with tempfile.TemporaryDirectory() as folder:
            if file.suffix == ".zip":
                with zipfile.ZipFile(file) as archive:
                    archive.extractall(folder)
                (file,) = sorted(Path(folder).rglob("*.onnx"))[:1] or (file,)
            self._session, scales = _open(file)
        (given,), (wanted,) = self._session.get_outputs(), self._session.get_inputs()
        rule = f"map patches of {_FRAMES} x {_BINS} to {len(self._names)} classes"
        supported = (wanted.shape[-2:], given.shape[-1]) == ([_FRAMES, _BINS], len(self._names))
        require(supported, "--tagger", rule, f"{wanted.shape} to {given.shape}")
        self._input, self._in, self._out = wanted.name, scales[wanted.name], scales[given.name]

    def __call__(self, wave: np.ndarray) -> list[tuple[str, float]]:
        """Return every class and its mean probability over patches, for (samples,) at 16 kHz."""
        patches = log_mel_patches(wave, self._mel)
        patches = self._in.quantise(patches) if self._in else patches.astype(np.float32)
        # One patch per call: the exported batch size is 1.
        found = [self._session.run(None, {self._input: p[None, None]})[0] for p in patches]
        logits = np.concatenate([np.asarray(one) for one in found])
        logits = self._out.real(logits) if self._out else logits
        probabilities = (1 / (1 + np.exp(-logits))).mean(0)
        return list(zip(self._names, probabilities.tolist(), strict=True))


def log_mel_patches(wave: np.ndarray, mel: np.ndarray) -> np.ndarray:
    """Return log-mel patches (P, 96, 64) float64 of (samples,) at 16 kHz, the last one padded.

    Args:
        mel: (257, 64), from power bins to mel bins.
    """
    patch, hop = _WINDOW + (_FRAMES - 1) * _HOP, _PATCH_HOP * _HOP
    patches = 1 + max(0, -(-(len(wave) - patch) // hop))
    wave = np.pad(wave.astype(np.float64), (0, max(0, patch + (patches - 1) * hop - len(wave))))
    frames = np.lib.stride_tricks.sliding_window_view(wave, _WINDOW)[::_HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    magnitude = np.abs(np.fft.rfft(frames * hann, _FFT))
    logmel = np.log(magnitude @ mel + _OFFSET)
    starts = np.arange(patches) * _PATCH_HOP
    return np.stack([logmel[start : start + _FRAMES] for start in starts])


def _open(file: Path) -> tuple[Any, dict[str, Scale | None]]:
    """Open a session of one thread (reproducible), and the scales of its inputs and outputs."""
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"--tagger must be 'none' without {error.name}; {_HINT}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(str(file), load_external_data=False).graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    scales: dict[str, Scale | None] = {}
    for tensor in (*session.get_inputs(), *session.get_outputs()):
        scales[tensor.name] = None
        if tensor.type == "tensor(uint8)":
            scale, zero = (known[f"{tensor.name}_{what}"] for what in ("scale", "zero_point"))
            read = onnx.numpy_helper.to_array
            scales[tensor.name] = Scale(float(read(scale)), int(read(zero)))
    return session, scales
