"""Two towers and a scale: everything the losses need comes out of `forward`.

    mel -> audio encoder -> head -> L2 -> audio (B, d)   scale = exp(clamp(logit_scale))
    ids -> TextEncoder -> head -> L2 -> text (B, d)

Source: FLAP section 3, on LAION-CLAP's heads (SPEC 4.5, 5.1).
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.config import Config
from flap_fast.model import AUDIO_ENCODERS
from flap_fast.model.text_encoder import TextEncoder


class Outputs(TypedDict):
    """What `Flap.forward` gives, in float32. A plain dict: ZeRO-3's hooks rebuild it by type."""

    audio: Tensor
    """(B, d), unit norm."""
    text: Tensor
    """(B, d), unit norm."""
    scale: Tensor
    """(), what cosines are multiplied by."""


class Flap(nn.Module):
    """The two-tower model.

    Args:
        weights: load the text tower's weights from its folder (a checkpoint brings its own).
    """

    def __init__(self, config: Config, *, weights: bool = True):
        super().__init__()
        recompute = config.train.checkpoint_activations
        self.precision = config.train.precision
        self.audio = AUDIO_ENCODERS[config.audio.encoder](
            config.audio, config.fusion, recompute=recompute
        )
        self.text = TextEncoder(config.text, recompute=recompute, weights=weights)
        self.audio_head = _head(self.audio.width, config.joint.width)
        self.text_head = _head(self.text.width, config.joint.width)
        # Shape (1,), not (): DeepSpeed cannot broadcast a parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.joint.temperature)]))
        self.max_logit_scale = math.log(config.joint.max_scale)

    def forward(
        self,
        mel: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        keep: Tensor | None = None,
        erase: Tensor | None = None,
        longer: Tensor | None = None,
    ) -> Outputs:
        """Embed both sides of B pairs.

        Args:
            mel: (B, 1, T, F) float32; (B, 4, T, F) with fusion.
            ids, attention_mask: (B, L) int64.
            keep: (B, K) int64, the patches that masking left; all of them without.
            erase: (B, T, F) bool, what SpecAug sets to 0 inside the encoder (HTSAT).
            longer: (B,) bool on the CPU, the clips to fuse.
        """
        scale = _Clamp.apply(self.logit_scale, self.max_logit_scale).exp().squeeze(0)
        return {
            "audio": self.embed_audio(mel, keep, erase=erase, longer=longer),
            "text": self.embed_text(ids, attention_mask),
            "scale": scale,
        }

    def embed_audio(
        self,
        mel: Tensor,
        keep: Tensor | None = None,
        *,
        erase: Tensor | None = None,
        longer: Tensor | None = None,
    ) -> Tensor:
        """(B, 1, T, F), with fusion (B, 4, T, F) -> (B, d), unit norm, float32."""
        with self._autocast(mel.device):
            x = self.audio_head(self.audio(mel, keep, erase=erase, longer=longer).pooled)
        return functional.normalize(x.float(), dim=-1)

    def embed_text(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids and mask -> (B, d), unit norm, float32."""
        with self._autocast(ids.device):
            x = self.text_head(self.text(ids, attention_mask))
        return functional.normalize(x.float(), dim=-1)

    def _autocast(self, device: torch.device) -> torch.autocast:
        on = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.autocast(device.type, torch.bfloat16, enabled=on)


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
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        # Descent moves against the gradient: up where it is negative.
        outward = ((x >= ctx.most) & (grad < 0)) | ((x <= 0) & (grad > 0))
        return grad.masked_fill(outward, 0), None
