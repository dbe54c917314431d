"""A trained model as a tool: sounds and captions in, embeddings and rankings out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.captions import Tokenizer, tokenizer
from flap_fast.data.frontend import MelFrontEnd, fitted, together
from flap_fast.data.fusion import PIECES
from flap_fast.data.mel import normalise
from flap_fast.data.sound import read_sound
from flap_fast.model.flap import Flap
from flap_fast.model.interop import load_model

Sound = str | Path | np.ndarray | Tensor


class Embedder:
    """Embeds sounds and captions in the joint space; made by `flap_fast.load`."""

    def __init__(self, model: Flap, config: Config, tokenizer: Tokenizer, device: torch.device):
        self.model, self.config, self.device = model.to(device).eval(), config, device
        self._tokenizer = tokenizer
        self._mel = MelFrontEnd(config.audio, config.fusion, device)

    @torch.inference_mode()
    def embed_audio(self, sounds: Sequence[Sound], batch: int = 64) -> Tensor:
        """(N, d) unit rows, float32, on the CPU.

        Longer sounds than audio.duration_s (with fusion, than fusion.max_duration_s) are cropped
        around their middle, shorter ones filled as in training.

        Args:
            sounds: files (WAV, FLAC, OGG, MP3), or mono waveforms at audio.sample_rate_hz.

        Raises:
            BadSound: a file that cannot be read.
        """
        parts = [self._embed_waves(sounds[i : i + batch]) for i in range(0, len(sounds), batch)]
        return torch.cat(parts) if parts else torch.empty(0, self.config.joint.width)

    @torch.inference_mode()
    def embed_text(self, captions: Sequence[str], batch: int = 256) -> Tensor:
        """(M, d) unit rows, float32, on the CPU."""
        some = (captions[i : i + batch] for i in range(0, len(captions), batch))
        tokens = (tuple(t.to(self.device) for t in self._tokenizer(texts)) for texts in some)
        parts = [self.model.embed_text(*both).cpu() for both in tokens]
        return torch.cat(parts) if parts else torch.empty(0, self.config.joint.width)

    def rank(self, sound: Sound, captions: Sequence[str]) -> list[tuple[str, float]]:
        """The captions with their cosines to the sound, best first."""
        cosines = (self.embed_text(captions) @ self.embed_audio([sound])[0]).tolist()
        return sorted(zip(captions, cosines, strict=True), key=lambda pair: -pair[1])

    def _embed_waves(self, sounds: Sequence[Sound]) -> Tensor:
        middle = np.full((len(sounds), 1 + PIECES), 0.5)
        mel, longer = self._mel(together([self._wave(sound) for sound in sounds], middle))
        mel = normalise(mel, self.config.audio)
        return self.model.embed_audio(mel, longer=longer).cpu()

    def _wave(self, sound: Sound) -> np.ndarray:
        audio = self.config.audio
        if isinstance(sound, (str, Path)):
            wave = read_sound(Path(sound), audio.sample_rate_hz)
        else:
            wave = np.asarray(sound, np.float32)
        if wave.ndim != 1 or not len(wave):
            raise ValueError(f"a waveform must be mono, (samples,), got shape {wave.shape}")
        return fitted(wave, 0.5, audio, self.config.fusion)


def load(path: str | Path, device: str | torch.device | None = None) -> Embedder:
    """Open a run's folder (its last checkpoint) or a checkpoint's.

    Args:
        device: where to compute; the GPU if there is one, when not given.

    Raises:
        ConfigError: there is no checkpoint.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, config = load_model(Path(path), place)
    return Embedder(model, config, tokenizer(config.text), place)
