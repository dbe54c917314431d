"""Two encoders, their heads and a scale: what the losses compare.

    media -> encoder -> head -> L2 -> media (B, d)         scale = exp(clamp(logit_scale))
    ids -> text encoder -> head -> L2 -> text (B, d) ..    tokens of a ViT -> Decoder -> recon ()

Media are log-mels of sounds or images, as the config's encoder takes them.

Source: FLAP, arXiv 2311.01615, sections 3 and 4, on LAION-CLAP's heads; CLIP, arXiv 2103.00020.
"""

from __future__ import annotations

import math
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.config import Config
from flap_fast.data.batch import Media
from flap_fast.encoders.audio_settings import PatchEncoder
from flap_fast.encoders.base import AnyMask, Encoded
from flap_fast.encoders.block_depths import freeze
from flap_fast.encoders.lora import add_lora
from flap_fast.losses.base import Outputs
from flap_fast.model.decoder import Decoder
from flap_fast.model.heads import media_head, text_head


class ModelInputs(TypedDict):
    """The keyword arguments of `TwoTowers.forward`."""

    media: Media
    """The encoder's input of B clips."""
    ids: Tensor
    """(S B, L) int64: the captions, then the other `Loss.sentences`."""
    attention_mask: Tensor
    """(S B, L) int64, 1 on tokens; best on the CPU, see `packing.pack`."""
    mask: AnyMask | None
    """The patches that masking keeps and drops; None keeps all."""
    target: Media | None
    """What the decoder is to reconstruct, as `media`; None skips the decoder."""
    erase: Tensor | None
    """(B, T, F) bool, what SpecAug sets to 0 inside the encoder (HTSAT)."""
    longer: Tensor | None
    """(B,) bool on the CPU: with fusion, the clips to fuse."""
    text_pooled: Tensor | None
    """(S B, D) float32, the frozen text encoder's output for the ids; None computes it."""
    media_pooled: Tensor | None
    """(B, D) float32, the frozen media encoder's output for the clips; None computes it."""
    pair_ids: Tensor | None
    """(B, 2 + n) int64, given to the losses with the embeddings; None where none asks for it."""


class TwoTowers(nn.Module):
    """Two encoders and their heads; an encoder's weights are under its modality's name.

    Args:
        weights: load the text encoder's weights from its folder (a checkpoint brings its own).
    """

    def __init__(self, config: Config, *, weights: bool = True):
        super().__init__()
        recompute, encoder = config.train.checkpoint_activations, config.encoder
        self.precision = config.train.precision
        self.sentences = config.loss.sentences
        self.modality = encoder.modality
        media = encoder.build(config, recompute="audio" in recompute)
        self.add_module(self.modality, media)
        self.text = config.text.build(recompute="text" in recompute, weights=weights)
        towers = (self.modality, media, encoder), ("text", self.text, config.text)
        self._frozen = [
            module
            for name, tower, given in towers
            for module in freeze(tower, name, whole=given.freeze, blocks=given.freeze_blocks)
        ]
        width: int = media.width  # type: ignore[assignment]
        if not encoder.joint_space:
            self.add_module(f"{self.modality}_head", media_head(config, media))
        self.text_head = text_head(config, self.text.width)  # type: ignore[arg-type]
        # Shape (1,), not (): DeepSpeed cannot broadcast a parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.joint.temperature)]))
        self.max_logit_scale = math.log(config.joint.max_scale)
        self.logit_bias = None
        if config.loss.sigmoid.weight > 0:
            self.logit_bias = nn.Parameter(torch.tensor([config.loss.sigmoid.bias]))
        # Last, so that the towers start from the same weights with and without what follows.
        self.decoder = None
        if config.loss.recon.weight > 0:
            assert isinstance(encoder, PatchEncoder)  # the config has checked it
            self.decoder = Decoder(config, encoder, width)
        for name, tower, given in towers:
            if given.lora_rank:
                self._frozen += add_lora(tower, name, given.lora_rank, given.lora_alpha)
        if not config.loss.reads_text:  # no state of the optimizer, no decay
            for name, weight in self.named_parameters():
                if not name.startswith((f"{self.modality}.", "decoder.")):
                    weight.requires_grad_(False)
        self.train()

    @property
    def encoder(self) -> nn.Module:
        """The encoder of sounds or images."""
        return self.get_submodule(self.modality)

    @property
    def head(self) -> nn.Module | None:
        """The media encoder's projection to the joint space; None if its output lies there."""
        return getattr(self, f"{self.modality}_head", None)

    def train(self, mode: bool = True) -> TwoTowers:
        """What is frozen never trains."""
        super().train(mode)
        for module in self._frozen if mode else ():
            module.eval()
        return self

    def forward(
        self,
        media: Media,
        ids: Tensor,
        attention_mask: Tensor,
        mask: AnyMask | None = None,
        target: Media | None = None,
        erase: Tensor | None = None,
        longer: Tensor | None = None,
        text_pooled: Tensor | None = None,
        media_pooled: Tensor | None = None,
        pair_ids: Tensor | None = None,
    ) -> Outputs:
        """Embed media and captions of B pairs; the arguments are those of `ModelInputs`."""
        scale = _Clamp.apply(self.logit_scale, self.max_logit_scale).exp().squeeze(0)
        tokens = None
        if media_pooled is None:
            media_pooled, tokens = self._encoded(media, mask, erase, longer)
        media_rows = self.project_media(media_pooled)
        # All sentences in one pass: one dropout of their own for each row, one use of each weight.
        if text_pooled is None:
            text_pooled = self.pool_text(ids, attention_mask)
        sentences = self.project_text(text_pooled).chunk(len(self.sentences))
        if self.decoder is None or target is None:
            recon = scale.new_zeros(())
        else:
            assert tokens is not None  # the config has checked it
            with self._autocast(media.device):
                recon = self.decoder(tokens, mask, target)
        found = {"media": media_rows, "scale": scale, "recon": recon}
        found |= zip(self.sentences, sentences, strict=True)
        if self.logit_bias is not None:
            # A copy: of a view ZeRO 3 would take the memory, and cached gradients find none.
            found["bias"] = self.logit_bias.squeeze(0).clone()
        if pair_ids is not None:
            found["pair_ids"] = pair_ids
        return cast(Outputs, found)

    def embed_media(self, media: Media, *, longer: Tensor | None = None) -> Tensor:
        """Embeddings (B, d) of media as in `ModelInputs`, unit norm, float32."""
        return self.project_media(self.pool_media(media, longer=longer))

    def pool_media(self, media: Media, *, longer: Tensor | None = None) -> Tensor:
        """Media as in `ModelInputs` -> (B, D) float32, their encoder's output before the head."""
        return self._encoded(media, None, None, longer).pooled

    def vectors(self, pooled: Tensor) -> Tensor:
        """(B, D) of the media encoder without the scores of classes that may be its end."""
        return pooled[:, : pooled.shape[1] - getattr(self.encoder, "classes", 0)]

    def project_media(self, pooled: Tensor) -> Tensor:
        """(B, D) of the media encoder -> (B, d), unit norm, float32."""
        with self._autocast(pooled.device):
            x = pooled if self.head is None else self.head(pooled)
        return functional.normalize(x.float(), dim=-1)

    def _encoded(
        self, media: Media, mask: AnyMask | None, erase: Tensor | None, longer: Tensor | None
    ) -> Encoded:
        """The encoder's output, its vectors in float32."""
        with self._autocast(media.device):
            encoded = self.encoder(media, mask, erase=erase, longer=longer)
        return encoded._replace(pooled=encoded.pooled.float())

    def embed_text(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids and mask -> (B, d), unit norm, float32."""
        return self.project_text(self.pool_text(ids, attention_mask))

    def pool_text(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids and mask -> (B, D) float32, the text encoder's output before its head."""
        with self._autocast(ids.device):
            return self.text(ids, attention_mask)

    def project_text(self, pooled: Tensor) -> Tensor:
        """(B, D) of the text encoder -> (B, d), unit norm, float32."""
        with self._autocast(pooled.device):
            x = self.text_head(pooled)
        return functional.normalize(x.float(), dim=-1)

    def _autocast(self, device: torch.device) -> torch.autocast:
        on = takes_bf16(self.precision, device)
        return torch.autocast(device.type, torch.bfloat16, enabled=on)


def takes_bf16(precision: str, device: torch.device) -> bool:
    """Whether the towers' products are bf16 with this train.precision on this device."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


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
