"""A log-mel's patches, and their positions.

    patches (B, N, patch * patch)    token n = F/patch * time + frequency, pixels (time, frequency)

    B clips   N patches of a clip   D width

Source: AudioMAE, arXiv 2207.06405: its patch embedding and fixed 2-D sine positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(mel: Tensor, patch: int) -> Tensor:
    """(B, 1, T, F) -> (B, N, patch * patch), time-major, each patch row by row."""
    B, _, T, F = mel.shape
    cells = mel.reshape(B, T // patch, patch, F // patch, patch)
    return cells.transpose(2, 3).reshape(B, -1, patch * patch)


def sine_positions(width: int, grid: tuple[int, int], row: int | None = None) -> Tensor:
    """(N, D) float32: the first half of D from the frequency, the second from the time.

    Args:
        grid: patches along time and along frequency.
        row: tokens n after which the second half advances; by default those of a time. AudioMAE's
            table has the time patches of its clips here, 64: unique for each token, but not aligned
            with time and frequency.
    """
    n = torch.arange(grid[0] * grid[1])
    columns = row or grid[1]
    return torch.cat([_sines(width // 2, n % columns), _sines(width // 2, n // columns)], 1).float()


def frequency_positions(width: int, rows: int) -> Tensor:
    """(R, D) float32: all of D from the frequency, for patches whose time is given otherwise."""
    return _sines(width, torch.arange(rows)).float()


def _sines(width: int, position: Tensor) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = position[:, None].double() * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)
