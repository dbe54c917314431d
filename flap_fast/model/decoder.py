"""The decoder: the tokens of the patches kept -> the error of the patches dropped.

    tokens (B, [1 +] K, D) -> linear, mask tokens in the gaps, positions (B, [1 +] N, H) -> blocks
        -> the M patches dropped (B, M, H) -> norm, linear, compared with the log-mel: ()

The last norm and layer see the dropped patches alone, and neither what they predict nor what they
are compared with is stored.

    B clips   N = K + M patches of a clip   D encoder's width   H decoder's width

Source: FLAP section 4; the decoder of AudioMAE (SPEC 6.6).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.config import Config
from flap_fast.encoders.blocks import LAYER_NORM_EPS, Blocks, initialise
from flap_fast.encoders.vit.patches import sine_positions
from flap_kernels import PatchMask, gather_tokens, masked_mse, unshuffle_tokens


class PatchError(nn.Linear):
    """The last layer and its error against the patches `drop` (B, M) of `mel` (B, T, F), ().

    A module of its own, so that ZeRO-3 gathers its weights when it is called.
    """

    def __init__(self, width: int, patch: int, *, norm_pix: bool):
        super().__init__(width, patch**2)
        self.norm_pix = norm_pix

    def forward(  # type: ignore[override]
        self, x: Tensor, mel: Tensor, drop: Tensor
    ) -> Tensor:
        return masked_mse(x, self.weight, self.bias, mel, drop, norm_pix=self.norm_pix)


class Decoder(nn.Module):
    """Tokens (B, [1 +] K, D), their plan and the log-mel (B, C, T, F) to rebuild -> ().

    The error is the mean over the batch: every clip drops as many patches, so its mean over ranks
    is that of all clips. Of several channels the first is rebuilt.
    """

    pos_embed: Tensor

    def __init__(self, config: Config, encoder_width: int):
        super().__init__()
        audio, width = config.audio, config.decoder.width
        self.cls = int(audio.use_cls)
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        positions = sine_positions(width, audio.grid, audio.pos_grid)
        self.register_buffer("pos_embed", functional.pad(positions, (0, 0, self.cls, 0)))
        self.blocks = Blocks(
            width,
            config.decoder.depth,
            config.decoder.heads,
            backend=audio.attention,
            recompute="decoder" in config.train.checkpoint_activations,
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pred = PatchError(width, audio.patch, norm_pix=config.loss.recon.norm_pix)
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, plan: PatchMask | None, mel: Tensor) -> Tensor:
        mel = mel[:, 0]
        if plan is None or plan.ids_drop.shape[1] == 0:
            return self._idle(tokens, mel)
        restore = plan.ids_restore
        if self.cls:
            restore = functional.pad(restore + 1, (1, 0))
        x = self.embed(tokens)
        x = unshuffle_tokens(x, restore, self.mask_token.flatten(), self.pos_embed)
        x = gather_tokens(self.blocks(x), plan.ids_drop + self.cls)
        return self.pred(self.norm(x), mel, plan.ids_drop)

    def _idle(self, tokens: Tensor, mel: Tensor) -> Tensor:
        """0 where nothing is dropped, with a gradient of 0 to every parameter.

        ZeRO-3 steps a parameter that gets none on its gradient of the step before.
        """
        x = self.blocks(self.embed(tokens[:1, :1].detach()) + self.mask_token)
        return 0 * self.pred(self.norm(x), mel[:1], x.new_zeros(1, 1, dtype=torch.int64))
