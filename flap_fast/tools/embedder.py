"""A trained model as a tool: sounds and captions in, embeddings, rankings and classes out."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.batch import stack_clips
from flap_fast.data.preprocess import waveform
from flap_fast.data.preprocess.fusion import PIECES
from flap_fast.data.preprocess.image import Picture, any_square
from flap_fast.data.preprocess.preprocessor import make_preprocessor
from flap_fast.data.preprocess.waveform import BadSound, crop_positions, mono_at, read_sound
from flap_fast.data.tokenize import Tokenizer, tokenizer
from flap_fast.evaluate.embed import text_embedder
from flap_fast.evaluate.prompts import SOUND, prompts
from flap_fast.evaluate.zero_shot import class_vectors
from flap_fast.model.model_folder import load_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.prepare import ahead
from flap_fast.ranks import Ranks

Array = np.ndarray | Tensor
Sound = str | Path | Array | tuple[Array, float] | Mapping[str, Any]
"""A file; a waveform at the rate that the call names, or the model's; a waveform with its rate, as
librosa, torchaudio and soundfile load them; or a row of an Audio column of Hugging Face datasets:
{"array": .., "sampling_rate": ..}."""

Crops = list[np.ndarray]
"""Of a sound: (samples,) float32 each; with fusion of lengths of their own."""
Embedded = Generator[Tensor | BadSound]
"""Of each sound its (d,) unit row, or why there is none."""


class Embedder:
    """Embeds sounds and captions in the joint space; made by `flap_fast.load`."""

    def __init__(
        self, model: TwoTowers, config: Config, tokenizer: Tokenizer, device: torch.device
    ):
        self.model, self.config, self.device = model.to(device).eval(), config, device
        self._preprocessor = make_preprocessor(config, Ranks(device=device))
        self._tokenizer = tokenizer

    def embed_audio(
        self,
        sounds: Sequence[Sound],
        batch: int = 64,
        *,
        sample_rate_hz: float | None = None,
        crop: str | None = None,
    ) -> Tensor:
        """(N, d) unit rows, float32, on the CPU.

        Args:
            sounds: files (WAV, FLAC, OGG, MP3) or waveforms of any length and rate: see `Sound`.
                Of a waveform with two axes the shorter one are the channels. Integers are PCM.
            batch: crops that the model embeds at a time; files are decoded ahead on threads.
            sample_rate_hz: rate of waveforms that come without one; the model's when not given.
            crop: see `embed_each`.

        Raises:
            BadSound: the first that cannot be used, by its name or number.
        """
        if isinstance(sounds, (str, Path, Mapping)):
            raise TypeError(f"sounds must be a list of them, got one {type(sounds).__name__}: [it]")
        rows = torch.empty(len(sounds), self.config.joint.width)
        found = self.embed_each(sounds, batch, sample_rate_hz=sample_rate_hz, crop=crop)
        with closing(found):
            for row, embedding in zip(rows, found, strict=True):
                if isinstance(embedding, BadSound):
                    raise embedding
                row.copy_(embedding)
        return rows

    def embed_each(
        self,
        sounds: Iterable[Sound],
        batch: int = 64,
        *,
        sample_rate_hz: float | None = None,
        crop: str | None = None,
    ) -> Embedded:
        """Of each sound in its turn a (d,) unit row, or the `BadSound` that it is.

        Any number of sounds passes through in constant memory.

        Args:
            crop: of sounds longer than audio.duration_s, with fusion than fusion.max_duration_s:
                `center`, `multi:K` (the mean of K crops at equal steps) or `whole` (the mean of as
                many as cover it). eval.crop when not given, `center` where that is random. Shorter
                ones are filled as in training.
        """
        require(batch >= 1, "batch", "be at least 1", batch)
        rule, remedy = "have an audio tower to embed sounds", "call embed_image"
        require(self.config.image is None, "the model", rule, "an image tower", remedy)
        policy = crop or ("center" if self.config.eval.crop == "random" else self.config.eval.crop)
        rule = "be center, multi:K or whole"
        require(bool(re.fullmatch(r"center|whole|multi:[1-9]\d*", policy)), "crop", rule, policy)
        rate = float(sample_rate_hz or self.config.audio.sample_rate_hz)

        def decode(numbered: tuple[int, Sound]) -> Crops | BadSound:
            try:
                return self._crops(numbered[1], numbered[0], rate, policy)
            except BadSound as why:
                return why

        # Of a sound that is heard whole, the crops are known when it is decoded.
        crops = batch if policy == "whole" else _multi(policy)
        return self._embed_each(sounds, decode, batch, ahead_sounds=2 * batch // crops)

    def _embed_each(
        self,
        sounds: Iterable[Sound],
        decode: Callable[[tuple[int, Sound]], Crops | BadSound],
        batch: int,
        ahead_sounds: int,
    ) -> Embedded:
        threads = self.config.frontend.threads or os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            decoded = ahead(pool, decode, enumerate(sounds), limit=ahead_sounds + threads)
            with closing(decoded):
                waiting: list[Crops | BadSound] = []
                crops = 0
                for sound in decoded:
                    waiting.append(sound)
                    crops += 0 if isinstance(sound, BadSound) else len(sound)
                    if crops >= batch:
                        yield from self._finish(waiting, batch)
                        waiting, crops = [], 0
                yield from self._finish(waiting, batch)

    def embed_image(self, images: Sequence[Picture], batch: int = 64) -> Tensor:
        """(N, d) unit rows, float32, on the CPU.

        Args:
            images: files, Pillow's images, or (h, w, 3) uint8 arrays, of any size.
            batch: how many the model embeds at a time; files are decoded ahead on threads.

        Raises:
            BadImage: the first that cannot be used, by its name or number.
        """
        require(batch >= 1, "batch", "be at least 1", batch)
        image, rule = self.config.image, "have an image tower to embed images"
        if image is None:
            raise ConfigError(f"the model must {rule}, got an audio tower; call embed_audio")
        if isinstance(images, (str, Path)):
            raise TypeError(f"images must be a list of them, got one: ['{images}']")

        def decode(numbered: tuple[int, Picture]) -> np.ndarray:
            return any_square(numbered[1], numbered[0], image.resolution)

        rows = torch.empty(len(images), self.config.joint.width)
        with (
            ThreadPoolExecutor(self.config.frontend.threads or os.cpu_count()) as pool,
            closing(ahead(pool, decode, enumerate(images), limit=2 * batch)) as squares,
            torch.no_grad(),
        ):
            for part in rows.split(batch) if len(rows) else ():
                clips = stack_clips([next(squares) for _ in part], np.zeros(len(part)))
                part.copy_(self.model.embed_media(self._preprocessor.finish(clips).media))
        return rows

    def embed_text(self, captions: Sequence[str], batch: int = 256) -> Tensor:
        """(M, d) unit rows, float32, on the CPU."""
        if isinstance(captions, str):
            raise TypeError(f"captions must be a list of them, got one: ['{captions}']")
        ranks = Ranks(device=self.device)
        return text_embedder(self.model.embed_text, self._tokenizer, ranks, batch)(captions).cpu()

    def embed_labels(self, labels: Sequence[str], templates: str | None = None) -> Tensor:
        """(C, d) unit rows: each class as the mean of its prompts.

        Args:
            templates: a prompt with {label}, the set `audio29` or `imagenet80`, or a text file;
                "This is a sound of {label}." when not given, for pictures `imagenet80`.
        """
        require(len(labels) > 0, "labels", "name at least one class", "none")
        templates = templates or (SOUND if self.config.image is None else "imagenet80")
        return class_vectors(self.embed_text, labels, prompts(templates))

    def rank(self, sound: Sound | Picture, captions: Sequence[str]) -> list[tuple[str, float]]:
        """The captions with their cosines to the sound or picture, best first."""
        cosines = (self.embed_text(captions) @ self._embed_one(sound)[0]).tolist()
        return sorted(zip(captions, cosines, strict=True), key=lambda pair: -pair[1])

    def classify(
        self, sound: Sound | Picture, labels: Sequence[str], templates: str | None = None
    ) -> list[tuple[str, float]]:
        """The classes with their probabilities for the clip, best first; zero-shot."""
        vectors = self.embed_labels(labels, templates)
        shares = self.probabilities(self._embed_one(sound), vectors)[0].tolist()
        return sorted(zip(labels, shares, strict=True), key=lambda pair: -pair[1])

    def probabilities(self, audio: Tensor, text: Tensor) -> Tensor:
        """(N, M) softmax over the texts of the scaled cosines, as the model was trained with."""
        scale = self.model.logit_scale.detach().clamp(0, self.model.max_logit_scale).exp().cpu()
        return (scale * audio @ text.T).softmax(-1)

    def _embed_one(self, clip: Any) -> Tensor:
        """(1, d)."""
        return (self.embed_audio if self.config.image is None else self.embed_image)([clip])

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what embeddings depend on: the weights, the front end, the pooling."""
        digest = hashlib.sha256()
        config = self.config
        sense = config.image or config.audio
        for part in (sense, config.fusion, config.text.pool, config.joint):
            digest.update(
                part.encode() if isinstance(part, str) else part.model_dump_json().encode()
            )
        for name, weights in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weights.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _finish(self, sounds: list[Crops | BadSound], batch: int) -> Embedded:
        """Embed the crops of some sounds together, and average those of a sound."""
        crops = [wave for sound in sounds if not isinstance(sound, BadSound) for wave in sound]
        rows = iter(self._embed_waves(crops, batch) if crops else ())
        for sound in sounds:
            if isinstance(sound, BadSound):
                yield sound
                continue
            own = [next(rows) for _ in sound]
            yield own[0] if len(own) == 1 else functional.normalize(torch.stack(own).mean(0), dim=0)

    @torch.no_grad()
    def _embed_waves(self, waves: Crops, batch: int) -> Tensor:
        """N crops -> (N, d), on the CPU; the pieces of a fused one come from the middles."""
        rows, positions = [], np.full((len(waves), 1 + PIECES), 0.5)
        for first in range(0, len(waves), batch):
            some = slice(first, first + batch)
            found = self._preprocessor.finish(stack_clips(waves[some], positions[some]))
            rows.append(self.model.embed_media(found.media, longer=found.longer))
        return torch.cat(rows).cpu()

    def _crops(self, sound: Sound, number: int, rate: float, policy: str) -> Crops:
        """What the model is to see of a sound."""
        audio, fusion = self.config.audio, self.config.fusion
        longest = fusion.longest(audio)
        try:
            wave = _wave(sound, rate, audio.sample_rate_hz)
        except BadSound as why:
            name = str(sound) if isinstance(sound, (str, Path)) else f"sound number {number}"
            raise type(why)(f"{name}: {why}") from None
        crops = -(-len(wave) // longest) if policy == "whole" else _multi(policy)
        starts = crop_positions(crops if len(wave) > longest else 1)
        # Copies: a view of a crop would keep the whole recording.
        return [waveform.crop_and_fill(wave, float(at), audio, fusion).copy() for at in starts]


def _multi(policy: str) -> int:
    """Crops of a long sound."""
    return int(policy[6:]) if policy.startswith("multi:") else 1


def _wave(sound: Sound, rate: float, sample_rate_hz: int) -> np.ndarray:
    """(samples,) float32 at the model's rate; raises `BadSound`."""
    if isinstance(sound, (str, Path)):
        return read_sound(Path(sound), sample_rate_hz)
    if isinstance(sound, Mapping):
        if not {"array", "sampling_rate"} <= sound.keys():
            raise BadSound(f"a mapping must have 'array' and 'sampling_rate', got {list(sound)}")
        sound = (sound["array"], sound["sampling_rate"])
    if isinstance(sound, tuple):
        if len(sound) != 2:
            raise BadSound(f"a waveform must come alone or with its rate, got {len(sound)} things")
        sound, rate = sound
    if not isinstance(rate, Real) or not 0 < rate < math.inf:
        raise BadSound(f"a waveform's rate must be a number of hertz above 0, got {rate!r}")
    if isinstance(sound, Tensor):  # NumPy has no bfloat16
        sound = (sound.float() if sound.is_floating_point() else sound).detach().cpu()
    try:
        wave = np.asarray(sound)
    except ValueError as error:
        raise BadSound(f"a waveform must be an array of numbers: {error}") from None
    if wave.ndim not in (1, 2) or not wave.size:
        rule = "be (samples,) or have channels too"
        raise BadSound(f"a waveform must {rule}, got shape {wave.shape}")
    if np.issubdtype(wave.dtype, np.signedinteger):
        wave = wave / -float(np.iinfo(wave.dtype).min)
    elif not np.issubdtype(wave.dtype, np.floating):
        raise BadSound(f"a waveform must be floats or signed integers, got {wave.dtype}")
    channels = (
        wave[:, None] if wave.ndim == 1 else wave if wave.shape[0] > wave.shape[1] else wave.T
    )
    return mono_at(channels.astype(np.float32, copy=False), rate, sample_rate_hz)


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
