"""Two encoders, their heads and a scale: what the losses compare.

    media -> encoder -> head -> L2 -> media (B, d)         scale = exp(clamp(logit_scale))
    ids -> text encoder -> head -> L2 -> text (B, d) ..    tokens of a ViT -> Decoder -> recon ()

Media are log-mels of sounds or images, as the config's encoder takes them.

Source: FLAP, arXiv 2311.01615, sections 3 and 4, on LAION-CLAP's heads; CLIP, arXiv 2103.00020.
"""

from __future__ import annotations

import math
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.config import Config
from flap_fast.encoders.clip_text.model import ClipText, projection
from flap_fast.encoders.roberta.model import TransformersText
from flap_fast.model import AUDIO_ENCODERS, IMAGE_ENCODERS
from flap_fast.model.decoder import Decoder
from flap_kernels import PatchMask


class ModelInputs(TypedDict):
    """What `TwoTowers.forward` is called with, by name."""

    media: Tensor
    """(B, 1, T, F) float32; (B, 4, T, F) with fusion; images: (B, 3, R, R)."""
    ids: Tensor
    """(S B, L) int64: the captions, then the other `Loss.sentences`."""
    attention_mask: Tensor
    """(S B, L) int64, 1 on tokens; best on the CPU, see `packing.pack`."""
    mask: PatchMask | None
    """The patches that masking keeps and drops; None keeps all."""
    target: Tensor | None
    """(B, 1, T, F) float32, what the decoder is to reconstruct; None skips the decoder."""
    erase: Tensor | None
    """(B, T, F) bool, what SpecAug sets to 0 inside the encoder (HTSAT)."""
    longer: Tensor | None
    """(B,) bool on the CPU: with fusion, the clips to fuse."""


class Outputs(TypedDict):
    """Float32 results of `TwoTowers.forward`. A plain dict: ZeRO-3's hooks rebuild it by type."""

    media: Tensor
    """(B, d), unit norm: of sounds, or of images."""
    text: Tensor
    """(B, d), unit norm."""
    scale: Tensor
    """(), what cosines are multiplied by."""
    text_again: NotRequired[Tensor]
    """(B, d), the captions under another dropout; it and those below where a loss asks for them."""
    premise: NotRequired[Tensor]
    """(B, d), sentences that have nothing to do with the clips."""
    premise_again: NotRequired[Tensor]
    """(B, d), under another dropout."""
    entailment: NotRequired[Tensor]
    """(B, d), what follows from the premises."""
    contradiction: NotRequired[Tensor]
    """(B, d), what contradicts them."""
    recon: Tensor
    """(), the decoder's error on the patches dropped; 0 without a decoder or a target."""


class TwoTowers(nn.Module):
    """The two-tower model.

    Args:
        weights: load the text tower's weights from its folder (a checkpoint brings its own).
    """

    def __init__(self, config: Config, *, weights: bool = True):
        super().__init__()
        recompute = config.train.checkpoint_activations
        self.precision = config.train.precision
        self.sentences = config.loss.sentences
        joint, image, clip = config.joint.width, config.image, config.text.encoder == "clip"
        if image is None:
            kind = AUDIO_ENCODERS[config.audio.encoder]
            self.audio = kind(config.audio, config.fusion, recompute="audio" in recompute)
            self.image = None
        else:
            self.image, self.audio = IMAGE_ENCODERS[image.encoder](image, joint), None
        kind = ClipText if clip else TransformersText
        self.text = kind(config.text, recompute="text" in recompute, weights=weights)
        self.audio_head = None if self.audio is None else _head(self.audio.width, joint)
        self.text_head = (projection if clip else _head)(self.text.width, joint)
        # Shape (1,), not (): DeepSpeed cannot broadcast a parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.joint.temperature)]))
        self.max_logit_scale = math.log(config.joint.max_scale)
        # Last, so that the towers start from the same weights with and without it.
        self.decoder = None
        if self.audio is not None and config.loss.recon.weight > 0:
            self.decoder = Decoder(config, self.audio.width)

    def forward(
        self,
        media: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        mask: PatchMask | None = None,
        target: Tensor | None = None,
        erase: Tensor | None = None,
        longer: Tensor | None = None,
    ) -> Outputs:
        """Embed both sides of B pairs; the arguments are those of `ModelInputs`."""
        scale = _Clamp.apply(self.logit_scale, self.max_logit_scale).exp().squeeze(0)
        keep = None if mask is None else mask.ids_keep
        media_rows, tokens = self._encode(media, keep, erase, longer)
        # All sentences in one pass: one dropout of their own for each row, one use of each weight.
        sentences = self.embed_text(ids, attention_mask).chunk(len(self.sentences))
        if self.decoder is None or target is None:
            recon = scale.new_zeros(())
        else:
            with self._autocast(media.device):
                recon = self.decoder(tokens, mask, target)
        found = {"media": media_rows, "scale": scale, "recon": recon}
        return cast(Outputs, found | dict(zip(self.sentences, sentences, strict=True)))

    def embed_media(
        self, media: Tensor, keep: Tensor | None = None, *, longer: Tensor | None = None
    ) -> Tensor:
        """(B, 1, T, F), fused (B, 4, T, F), images (B, 3, R, R) -> (B, d), unit norm, float32."""
        return self._encode(media, keep, None, longer)[0]

    def _encode(
        self, media: Tensor, keep: Tensor | None, erase: Tensor | None, longer: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, d), and the encoder's tokens."""
        with self._autocast(media.device):
            if self.image is not None:
                x, tokens = self.image(media)
            else:
                assert self.audio is not None
                assert self.audio_head is not None
                pooled, tokens = self.audio(media, keep, erase=erase, longer=longer)
                x = self.audio_head(pooled)
        return functional.normalize(x.float(), dim=-1), tokens

    def embed_text(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids and mask -> (B, d), unit norm, float32."""
        with self._autocast(ids.device):
            x = self.text_head(self.text(ids, attention_mask))
        return functional.normalize(x.float(), dim=-1)

    def _autocast(self, device: torch.device) -> torch.autocast:
        on = takes_bf16(self.precision, device)
        return torch.autocast(device.type, torch.bfloat16, enabled=on)


def takes_bf16(precision: str, device: torch.device) -> bool:
    """Whether the towers' products are bf16 with this train.precision on this device."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def _head(width: int, joint: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, joint), nn.ReLU(), nn.Linear(joint, joint))


class _Clamp(torch.autograd.Function):
    """Clamp to [0, most] in forward; the gradient passes unless it would push further outside.

    Clamping the parameter itself has no effect under ZeRO: the optimizer owns another copy.
    """

    @staticmethod
    def forward(ctx, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp(0, most)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        # Descent moves against the gradient: up where it is negative.
        outward = ((x >= ctx.most) & (grad < 0)) | ((x <= 0) & (grad > 0))
        return grad.masked_fill(outward, 0), None
