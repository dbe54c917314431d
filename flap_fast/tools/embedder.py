"""`Embedder`: embeddings, rankings and classes of sounds, images and captions."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.batch import lay_end_to_end
from flap_fast.data.preprocess.fusion import PIECES
from flap_fast.data.preprocess.image import BadImage, ImageSource, any_square
from flap_fast.data.preprocess.preprocessor import make_preprocessor
from flap_fast.data.preprocess.waveform import BadSound, Unusable
from flap_fast.data.tokenize import Tokenizer, tokenizer
from flap_fast.encoders.settings import ImageEncoder
from flap_fast.evaluation.embed import finite, text_embedder
from flap_fast.evaluation.prompts import SOUND, prompts
from flap_fast.evaluation.zero_shot import class_vectors
from flap_fast.interchange.opened import opened
from flap_fast.model.model_folder import load_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.prepare import ahead
from flap_fast.ranks import Ranks
from flap_fast.tools.inputs import (
    class_names,
    counted,
    distinct,
    file_or_bytes,
    require_batch,
    shown,
    texts,
)
from flap_fast.tools.pooling import Embedded, embedded
from flap_fast.tools.sounds import (
    PART,
    Part,
    Sound,
    checked_rate,
    crop_count,
    crop_policy,
    crops_of,
    decode_part,
    sound_name,
)
from flap_fast.tools.windows import EmbeddedWindows, window_decoder, with_spans

# Of sound that the model embeds at a time, for memory; more would not be faster.
_SECONDS_AT_A_TIME = {"cpu": 160.0}

# Default prompts of class names.
_TEMPLATES = {"audio": SOUND, "image": "imagenet80"}


class Embedder:
    """Embeds sounds or images, and captions; `flap_fast.load` opens one."""

    def __init__(
        self, model: TwoTowers, config: Config, tokenizer: Tokenizer, device: torch.device
    ):
        self.model, self.config, self.device = model.to(device).eval(), config, device
        self._preprocessor = make_preprocessor(config, Ranks(device=device))
        self.tokenizer = tokenizer

    def embed_audio(
        self,
        sounds: Iterable[Sound],
        batch: int = 64,
        *,
        sample_rate_hz: float | None = None,
        crop: str | None = None,
    ) -> Tensor:
        """Embed sounds: (N, d) unit rows, float32, on the CPU.

        Args:
            sounds: files (WAV, FLAC, OGG, MP3) or waveforms of any length and rate: see `Sound`.
                The shorter axis of a waveform with two axes is the channels. Integers are PCM.
            batch: crops that the model embeds at a time, on a CPU fewer if they are long; files are
                decoded ahead on threads.
            sample_rate_hz: rate of waveforms without a rate; the model's by default.
            crop: see `embed_each`.

        Raises:
            BadSound: a sound cannot be used, or its embedding is not finite; names the first one.
        """
        sounds = counted(sounds, "sounds")
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
        """Yield a (d,) unit row for each sound in order, or the `BadSound` it raised.

        Any number of sounds of any length is embedded in constant memory.

        Args:
            crop: how sounds longer than audio.duration_s (with fusion, fusion.max_duration_s; with
                audio.length = variable, audio.max_duration_s) are cropped: `center`, `multi:K`
                (the mean of K crops at equal steps) or `whole` (the mean of as many as cover the
                sound). eval.crop by default, `center` if that is random. Shorter sounds are filled
                as in training, or taken as they are.
        """
        rate_hz = checked_rate(self.config, sounds, batch, sample_rate_hz)
        policy = crop_policy(self.config, crop)

        def decode(numbered: tuple[int, Sound]) -> Part:
            return decode_part(crops_of(numbered[1], rate_hz, policy, self.config))

        # With `whole`, the number of crops is known only after decoding.
        crops = PART if policy == "whole" else crop_count(policy)
        return self._embed_each(sounds, decode, batch, crops)

    def embed_windows(
        self,
        sounds: Iterable[Sound],
        windows: str = "auto",
        batch: int = 64,
        *,
        sample_rate_hz: float | None = None,
    ) -> EmbeddedWindows:
        """Yield for each sound in order its `WindowRows`, or the `BadSound` it raised.

        A window's row is that of the same cut given as a sound of its own.

        Args:
            windows: `SECONDS[:HOP]` or `auto[:HOP]`: see `flap_fast.tools.windows`.
        """
        rate_hz = checked_rate(self.config, sounds, batch, sample_rate_hz)
        decode, spans_s = window_decoder(self.config, windows, rate_hz)
        return with_spans(self._embed_each(sounds, decode, batch, PART, mean=False), spans_s)

    def _embed_each(
        self,
        sounds: Iterable[Sound],
        decode: Callable[[tuple[int, Sound]], Part],
        batch: int,
        crops: int,
        *,
        mean: bool = True,
    ) -> Embedded:
        seconds = _SECONDS_AT_A_TIME.get(self.device.type, math.inf)
        return embedded(
            sounds,
            decode,
            self._embed_waves,
            batch,
            threads=self.config.frontend.threads or os.cpu_count() or 1,
            ahead_sounds=2 * batch // min(crops, PART, batch),
            most_samples=seconds * self.config.audio.sample_rate_hz,
            mean=mean,
        )

    def embed_image(self, images: Iterable[ImageSource], batch: int = 64) -> Tensor:
        """Embed images: (N, d) unit rows, float32, on the CPU.

        Args:
            images: files, the bytes of files or open ones, Pillow's images, (h, w, 3) uint8 arrays,
                or rows of an Image column of Hugging Face datasets; of any size.
            batch: images that the model embeds at a time; files are decoded ahead on threads.

        Raises:
            BadImage: an image cannot be used; names the first one.
            ArithmeticError: an embedding is not finite; names the first one.
        """
        images = counted(images, "images")
        require_batch(batch)
        encoder = self.config.encoder
        rule, remedy = "have an image encoder to embed images", f"call embed_{encoder.modality}"
        if not isinstance(encoder, ImageEncoder):
            raise ConfigError(f"the model must {rule}, got an {encoder.modality} encoder; {remedy}")

        def decode(numbered: tuple[int, ImageSource]) -> np.ndarray:
            number, image = numbered
            try:
                source = file_or_bytes(image)
            except Unusable as why:
                raise BadImage(f"image number {number}: {why}") from None
            return any_square(source, number, encoder.resolution)

        rows = torch.empty(len(images), self.config.joint.width)
        with (
            ThreadPoolExecutor(self.config.frontend.threads or os.cpu_count()) as pool,
            closing(ahead(pool, decode, enumerate(images), limit=2 * batch)) as squares,
            torch.no_grad(),
        ):
            for part in rows.split(batch) if len(rows) else ():
                clips = lay_end_to_end([next(squares) for _ in part], np.zeros(len(part)))
                part.copy_(self.model.embed_media(self._preprocessor.finish(clips).media))
        return finite(rows, lambda n: sound_name(images[n], n, "image"))

    def embed_text(self, captions: Iterable[str], batch: int = 256) -> Tensor:
        """Embed captions: (M, d) unit rows, float32, on the CPU.

        Raises:
            TypeError, ConfigError: see `flap_fast.tools.inputs.texts`.
        """
        captions = texts(captions, "captions")
        require_batch(batch)
        ranks = Ranks(device=self.device)
        return text_embedder(self.model.embed_text, self.tokenizer, ranks, batch)(captions).cpu()

    def embed_labels(self, labels: Iterable[str], templates: str | Path | None = None) -> Tensor:
        """Embed class names as the means of their prompts: (C, d) unit rows.

        Args:
            templates: a prompt with {label}, the set `audio29` or `imagenet80`, or a text file;
                by default "This is a sound of {label}.", or `imagenet80` for images.
        """
        labels = class_names(labels)
        templates = _TEMPLATES[self.config.encoder.modality] if templates is None else templates
        if not isinstance(templates, (str, Path)):
            rule = "be a prompt with {label}, a set's name or a text file"
            raise TypeError(f"templates must {rule}, got {type(templates).__name__}")
        return class_vectors(self.embed_text, labels, prompts(str(templates)))

    def rank(self, sound: Sound | ImageSource, captions: Iterable[str]) -> list[tuple[str, float]]:
        """Return captions with their cosine similarities to a sound or image, best first."""
        captions = texts(captions, "captions")
        cosines = (self.embed_text(captions) @ self._embed_one(sound)[0]).tolist()
        return sorted(zip(captions, cosines, strict=True), key=lambda pair: -pair[1])

    def classify(
        self,
        sound: Sound | ImageSource,
        labels: Iterable[str],
        templates: str | Path | None = None,
    ) -> list[tuple[str, float]]:
        """Return classes with their probabilities for a sound or image, best first (zero-shot).

        A label that is given twice is one class.
        """
        labels = distinct(class_names(labels))
        vectors = self.embed_labels(labels, templates)
        probabilities = self.probabilities(self._embed_one(sound), vectors)[0].tolist()
        return sorted(zip(labels, probabilities, strict=True), key=lambda pair: -pair[1])

    def probabilities(self, media: Tensor, text: Tensor) -> Tensor:
        """Return the softmax over texts of the cosines times the trained scale: (N, M)."""
        scale = self.model.logit_scale.detach().clamp(0, self.model.max_logit_scale).exp().cpu()
        return (scale * media @ text.T).softmax(-1)

    def _embed_one(self, clip: Any) -> Tensor:
        """Embed one sound or image: (1, d)."""
        embed = {"audio": self.embed_audio, "image": self.embed_image}
        return embed[self.config.encoder.modality]([clip])

    @torch.no_grad()
    def _embed_waves(self, waves: list[np.ndarray]) -> Tensor:
        """Embed crops: (R, d); fusion takes its crops from the middle of each third."""
        positions = np.full((len(waves), 1 + PIECES), 0.5)
        found = self._preprocessor.finish(lay_end_to_end(waves, positions))
        return self.model.embed_media(found.media, longer=found.longer).cpu()

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all that embeddings depend on: weights, front end and pooling."""
        digest = hashlib.sha256()
        config = self.config
        for section in (config.encoder, config.fusion, config.joint):
            digest.update(section.model_dump_json().encode())
        digest.update(json.dumps(config.text.meaning(), sort_keys=True).encode())
        for name, weights in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weights.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    length: str | None = None,
    verify: bool = True,
) -> Embedder:
    """Open a model: the folder of a run (its last checkpoint), of a checkpoint or of transformers'
    `ClapModel`, or one on the Hugging Face Hub, `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`.

    Args:
        device: where to compute; by default the GPU, or the CPU without one.
        length: audio.length, `fixed` or `variable`; by default as the model was trained.
        verify: compare the folder's files with its SHA256SUMS, if it has one.

    Raises:
        ConfigError: the folder holds no checkpoint, or its encoder cannot take clips so; a file
            changed since it was written; or the Hub has no such model for you.
    """
    rule = "be the folder of a run or of a checkpoint, or hf://OWNER/NAME"
    require(isinstance(path, str | os.PathLike), "path", rule, path)
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        rule = "be a device of PyTorch, such as cuda, cuda:1 or cpu"
        raise ConfigError(f"device must {rule}, got {shown(device)}") from None
    with opened(path, verify=verify) as folder:
        model, config = load_model(folder, chosen, length=length, verify=verify)
        return Embedder(model, config, tokenizer(config.text), chosen)
