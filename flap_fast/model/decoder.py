"""The decoder: the tokens of the patches kept -> the error of the patches dropped.

    tokens (B, [1 +] K, D) -> linear, mask tokens in the gaps, positions (B, [1 +] N, H) -> blocks
        -> the M patches dropped (B, M, H) -> norm, linear, compared with the log-mel: ()

The last norm and layer see only the dropped patches, and neither what they predict nor what they
are compared with is stored.

    B clips   N = K + M patches of a clip   D encoder's width   H decoder's width

Source: FLAP, arXiv 2311.01615, section 4; the decoder of AudioMAE, arXiv 2207.06405.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.config import Config
from flap_fast.encoders.audio_settings import PatchEncoder
from flap_fast.encoders.blocks import LAYER_NORM_EPS, Blocks, initialise
from flap_kernels import PatchMask, gather_tokens, masked_mse, unshuffle_tokens


class PatchError(nn.Linear):
    """The last layer and its error against the patches `ids_drop` (B, M) of `mel` (B, T, F), ().

    A module of its own, so that ZeRO-3 gathers its weights when it is called.
    """

    def __init__(self, width: int, patch: int, *, norm_pix: bool):
        super().__init__(width, patch**2)
        self.norm_pix = norm_pix

    def forward(  # type: ignore[override]
        self, x: Tensor, mel: Tensor, ids_drop: Tensor
    ) -> Tensor:
        return masked_mse(x, self.weight, self.bias, mel, ids_drop, norm_pix=self.norm_pix)


class Decoder(nn.Module):
    """Tokens (B, [1 +] K, D), their mask and the log-mel (B, C, T, F) to reconstruct -> ().

    The error is the mean over the batch: every clip drops as many patches, so its mean over ranks
    is that of all clips. Of several channels the first is reconstructed.
    """

    pos_embed: Tensor

    def __init__(self, config: Config, encoder: PatchEncoder, encoder_width: int):
        super().__init__()
        width, self.prefix = config.decoder.width, encoder.prefix_tokens
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        positions = functional.pad(encoder.positions(width), (0, 0, self.prefix, 0))
        self.register_buffer("pos_embed", positions)
        self.blocks = Blocks(
            width,
            config.decoder.depth,
            config.decoder.heads,
            backend=encoder.attention,
            recompute="decoder" in config.train.checkpoint_activations,
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pred = PatchError(width, encoder.patch, norm_pix=config.loss.recon.norm_pix)
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, mask: PatchMask | None, mel: Tensor) -> Tensor:
        mel = mel[:, 0]
        if mask is None or mask.ids_drop.shape[1] == 0:
            return self._idle(tokens, mel)
        ids_restore = mask.ids_restore
        if self.prefix:
            ids_restore = functional.pad(ids_restore + 1, (1, 0))
        x = self.embed(tokens)
        x = unshuffle_tokens(x, ids_restore, self.mask_token.flatten(), self.pos_embed)
        x = gather_tokens(self.blocks(x), mask.ids_drop + self.prefix)
        return self.pred(self.norm(x), mel, mask.ids_drop)

    def _idle(self, tokens: Tensor, mel: Tensor) -> Tensor:
        """0 if nothing is dropped, with a gradient of 0 to every parameter.

        ZeRO-3 steps a parameter that gets none on its gradient of the step before.
        """
        x = self.blocks(self.embed(tokens[:1, :1].detach()) + self.mask_token)
        return 0 * self.pred(self.norm(x), mel[:1], x.new_zeros(1, 1, dtype=torch.int64))
