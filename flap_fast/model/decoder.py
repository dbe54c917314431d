"""The decoder: the tokens of the patches kept -> the error of the patches dropped.

    tokens (B, [1 +] K, D) -> linear, mask tokens in the gaps, positions (B, [1 +] N, H) -> blocks
        -> the M patches dropped (B, M, H) -> norm, linear, compared with the log-mel: ()

Packed clips take the same way as one long clip, attention within each of them. Their error is the
mean over clips of each clip's mean over its dropped patches, 0 where it drops none.

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
from flap_fast.data.batch import Media, PackedMels
from flap_fast.encoders.audio_settings import PatchEncoder
from flap_fast.encoders.base import AnyMask, PackedMask
from flap_fast.encoders.blocks import LAYER_NORM_EPS, Blocks, initialise
from flap_fast.encoders.packing import Segments, segments
from flap_kernels import PatchMask, gather_tokens, masked_mse, unshuffle_tokens


class PatchError(nn.Linear):
    """The last layer and its error against the patches `ids_drop` (B, M) of `mel` (B, T, F), ().

    The mean over all rows, or their sum weighted by `row_weight` (B, M).

    A module of its own, so that ZeRO-3 gathers its weights when it is called.
    """

    def __init__(self, width: int, patch: int, *, norm_pix: bool):
        super().__init__(width, patch**2)
        self.norm_pix = norm_pix

    def forward(  # type: ignore[override]
        self, x: Tensor, mel: Tensor, ids_drop: Tensor, row_weight: Tensor | None = None
    ) -> Tensor:
        inputs = x, self.weight, self.bias, mel, ids_drop, row_weight
        return masked_mse(*inputs, norm_pix=self.norm_pix)


class Decoder(nn.Module):
    """Tokens (B, [1 +] K, D), their mask and the log-mel (B, C, T, F) to reconstruct -> ().

    Of packed clips, tokens ([B +] K, D) and packed mels.

    The error is the mean over the batch: every clip drops as many patches, so its mean over ranks
    is that of all clips. Of several channels the first is reconstructed.
    """

    block_names = r"blocks\.\d+\."
    pos_embed: Tensor

    def __init__(self, config: Config, encoder: PatchEncoder, encoder_width: int):
        super().__init__()
        width, self.prefix = config.decoder.width, encoder.prefix_tokens
        self._patches_of, self._window = encoder.patches_of, encoder.window_tokens(1.0)
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

    def forward(self, tokens: Tensor, mask: AnyMask | None, target: Media) -> Tensor:
        if isinstance(target, PackedMels):
            assert mask is None or isinstance(mask, PackedMask)
            if mask is None:
                return self._idle(tokens[None], target.mel[None])
            # Also where no clip here drops a patch: one of another rank may, and ZeRO-3 gathers
            # weights as all ranks call modules, in one order.
            return self._packed(tokens, mask.patches, mask.kept, target)
        mel = target[:, 0]
        assert not isinstance(mask, PackedMask)
        if mask is None or mask.ids_drop.shape[1] == 0:
            return self._idle(tokens, mel)
        ids_restore = mask.ids_restore
        if self.prefix:
            ids_restore = functional.pad(ids_restore + 1, (1, 0))
        x = self.embed(tokens)
        x = unshuffle_tokens(x, ids_restore, self.mask_token.flatten(), self.pos_embed)
        x = gather_tokens(self.blocks(x), mask.ids_drop + self.prefix)
        return self.pred(self.norm(x), mel, mask.ids_drop)

    def _packed(
        self, tokens: Tensor, mask: PatchMask, kept: tuple[int, ...], target: PackedMels
    ) -> Tensor:
        counts, device = self._patches_of(target.frames), target.device
        lengths = [n + self.prefix for n in counts]
        clips = segments(lengths, target.order, device, window=self._window)
        some = segments([n + self.prefix for n in kept], target.order, device)
        x = self.embed(tokens)[None]
        ids_restore, position = self._restored(mask.ids_restore[0], len(kept), clips, some)
        token = self.mask_token.flatten()
        x = unshuffle_tokens(x, ids_restore[None], token, self.pos_embed, position[None])
        x = self.blocks(x[0], clips)
        dropped = clips.starts.diff() - some.starts.diff()
        clip = torch.arange(len(kept), device=device)
        total = mask.ids_drop.shape[1]
        clip = clip.repeat_interleave(dropped, output_size=total)
        row_weight = (1 / (len(kept) * dropped.clamp(min=1).float()))[clip]
        x = gather_tokens(x[None], mask.ids_drop + self.prefix * (clip + 1))
        return self.pred(self.norm(x), target.mel[None], mask.ids_drop, row_weight[None])

    def _restored(
        self, ids_restore: Tensor, B: int, clips: Segments, some: Segments
    ) -> tuple[Tensor, Tensor]:
        """(N,) twice: each token's index in cat(encoder's tokens, dropped ones), and its row in the
        table of positions; [CLS] counts as a patch.

        Args:
            ids_restore: of the patches alone.
            clips, some: all tokens of the clips, and the encoder's.
        """
        clip = clips.of_tokens()
        at = torch.arange(len(clip), device=clip.device)
        position = at - clips.starts[clip]
        if not self.prefix:
            return ids_restore, position
        first = position == 0
        patch = ids_restore[(at - clip - 1).clamp(min=0)]
        # Of a patch kept, the [CLS] of its clip and of those before stand in front; else of all.
        patch = patch + torch.where(patch < some.tokens - B, clip + 1, B)
        return torch.where(first, some.starts[clip], patch), position

    def _idle(self, tokens: Tensor, mel: Tensor) -> Tensor:
        """0 if no rank drops a patch, with a gradient of 0 to every parameter.

        ZeRO-3 steps a parameter that gets none on its gradient of the step before.
        """
        x = self.blocks(self.embed(tokens[:1, :1].detach()) + self.mask_token)
        return 0 * self.pred(self.norm(x), mel[:1], x.new_zeros(1, 1, dtype=torch.int64))
