"""Transformers' audio classifiers as taggers, such as AST with the 527 classes of AudioSet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from flap_fast.checks import ConfigError, refuse_code

_WINDOW_S = 10


class Classifier:
    """An `events.Tagger`: sigmoids of the classes, averaged over windows of 10 s.

    The mean is weighted by the windows' lengths; a last window shorter than 0.5 s is dropped.

    Raises:
        ConfigError: the folder holds no audio classifier.
    """

    def __init__(self, name: str, folder: Path):
        self.name = name
        refuse_code("--tagger", folder)
        try:
            self._features = AutoFeatureExtractor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model = AutoModelForAudioClassification.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--tagger must hold an audio classifier, got '{folder}': {error}"
            ) from None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()
        self.sample_rate_hz = int(self._features.sampling_rate)

    @torch.inference_mode()
    def __call__(self, wave: np.ndarray) -> list[tuple[str, float]]:
        """Return every class with its probability for a waveform, (samples,) float32."""
        size = _WINDOW_S * self.sample_rate_hz
        windows = [wave[start : start + size] for start in range(0, len(wave), size)]
        if len(windows) > 1 and len(windows[-1]) < self.sample_rate_hz / 2:
            windows.pop()
        # Features need at least one frame of 25 ms.
        windows[0] = np.pad(windows[0], (0, max(0, self.sample_rate_hz // 40 - len(windows[0]))))
        inputs = self._features(windows, sampling_rate=self.sample_rate_hz, return_tensors="pt")
        logits = self._model(**inputs.to(self._device)).logits
        lengths = torch.tensor([len(window) for window in windows], device=logits.device)
        weights = lengths / lengths.sum()
        probabilities = (weights @ logits.float().sigmoid()).tolist()
        names = self._model.config.id2label
        return [(names[n], probability) for n, probability in enumerate(probabilities)]
