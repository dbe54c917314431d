"""Clips longer than the encoder's input as four channels: the whole clip and three pieces.

    [whole, front, middle, back]  (4, C, F)        of a log-mel of M frames, M >= C

    C frames of audio.duration_s   M frames of the clip   F mel bins

The whole is resized along time, bilinear between the two nearest frames, without antialias. Pieces
begin anywhere in the first, second and last third of where they can. With M = C all four are the
same.

Source: LAION-CLAP's published data pipeline, transformers' ClapFeatureExtractor.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS = 4
# Random numbers of a clip: the positions of the three pieces.
PIECES = 3


def piece_starts(frames: Tensor, chunk: int, positions: Tensor) -> Tensor:
    """(B, 3) int64: the first frames of the front, middle and back piece.

    The `M - C + 1` starts are split as equally as can be, earlier thirds taking the rest; a third
    that is left empty is {0}.

    Args:
        frames: (B,) int64, M of each clip.
        chunk: C.
        positions: (B, 3) float64 in [0, 1), which start of each third.
    """
    starts, third = (frames - chunk + 1)[:, None], torch.arange(PIECES, device=frames.device)
    sizes = starts // PIECES + (third < starts % PIECES)
    first = (sizes.cumsum(1) - sizes).masked_fill(sizes == 0, 0)
    return first + (positions * sizes).floor().long()


def four_channels(mel: Tensor, frames: Tensor, chunk: int, positions: Tensor) -> Tensor:
    """(B, longest M, F) log-mels, valid up to each clip's own M -> (B, 4, C, F).

    Args:
        frames, chunk, positions: as `piece_starts`, on the log-mels' device.
    """
    at = torch.arange(chunk, device=mel.device)
    pieces = piece_starts(frames, chunk, positions)[:, :, None] + at
    source = (at + 0.5) * (frames[:, None].double() / chunk) - 0.5
    source = source.clamp(min=0)
    low = source.floor().long()
    high = torch.minimum(low + 1, frames[:, None] - 1)
    rows = torch.cat([low[:, None], high[:, None], pieces], 1)
    taken = mel.gather(1, rows.flatten(1)[:, :, None].expand(-1, -1, mel.shape[2]))
    low_row, high_row, *others = taken.unflatten(1, (-1, chunk)).unbind(1)
    whole = torch.lerp(low_row, high_row, (source - low).to(mel.dtype)[:, :, None])
    return torch.stack([whole, *others], 1)
