"""Feature fusion of a longer clip: the whole clip with three pieces, as log-mels or patches.

    local = pieces, three times as coarse in time, one after the other, zeros behind
    u = whole + local;  g = sigmoid(local_att(u) + global_att(u))
    AFF   2 (whole g + local (1 - g))
    iAFF  i = whole g + local (1 - g);  h = sigmoid(local_att2(i) + global_att(i))
          whole h + local (1 - h)
    DAF   whole + local

`_2d`: on patches' embeddings, (B, D, ., .). `_1d`: on log-mels, (B, F, T). Only rows of longer
clips are fused. Names are LAION's; its iAFF takes the first global branch twice and leaves the
second without use, which is kept for its checkpoints.

Source: Dai et al., Attentional Feature Fusion, arXiv 2009.14082; LAION-CLAP's code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flap_fast.data.batch import to_device

# The branches' middle layer has a quarter of the channels.
_REDUCTION = 4


def fusion_model(type: str, channels: int) -> nn.Module:
    """The module that fuses (n, channels, ...) with (n, channels, ...), by `fusion.type`."""
    kind, _, axes = type.partition("_")
    if kind == "daf":
        return DAF()
    return (AFF if kind == "aff" else IAFF)(channels, 2 if axes == "2d" else 1)


class DAF(nn.Module):
    """Fusion by the sum."""

    def forward(self, whole: Tensor, local: Tensor) -> Tensor:
        return whole + local


class AFF(nn.Module):
    """Attentional feature fusion."""

    def __init__(self, channels: int, axes: int):
        super().__init__()
        self.local_att = Attention(channels, axes, pooled=False)
        self.global_att = Attention(channels, axes, pooled=True)

    def forward(self, whole: Tensor, local: Tensor) -> Tensor:
        u = whole + local
        g = torch.sigmoid(self.local_att(u) + self.global_att(u))
        return 2 * (whole * g + local * (1 - g))


class IAFF(AFF):
    """Iterative attentional feature fusion, as LAION-CLAP runs it."""

    def __init__(self, channels: int, axes: int):
        super().__init__(channels, axes)
        self.local_att2 = Attention(channels, axes, pooled=False)
        self.global_att2 = Attention(channels, axes, pooled=True)

    def forward(self, whole: Tensor, local: Tensor) -> Tensor:
        u = whole + local
        g = torch.sigmoid(self.local_att(u) + self.global_att(u))
        i = whole * g + local * (1 - g)
        h = torch.sigmoid(self.local_att2(i) + self.global_att(i))
        return whole * h + local * (1 - h)


class Normed(nn.Sequential):
    """A sequence of layers with float32 BatchNorms."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        # Asked of the layer, not of a class of ours: a run over GPUs puts SyncBatchNorm there.
        for layer in self:
            x = layer(x.float() if isinstance(layer, nn.modules.batchnorm._BatchNorm) else x)
        return x


class Attention(Normed):
    """Two products over channels with norms; pooled first if asked."""

    def __init__(self, channels: int, axes: int, *, pooled: bool):
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if axes == 2 else (nn.Conv1d, nn.BatchNorm1d)
        pool = nn.AdaptiveAvgPool2d(1) if axes == 2 else nn.AdaptiveAvgPool1d(1)
        narrow = channels // _REDUCTION
        super().__init__(
            *([pool] if pooled else []),
            conv(channels, narrow, 1),
            norm(narrow),
            nn.ReLU(),
            conv(narrow, channels, 1),
            norm(channels),
        )


def fuse_rows(
    model: nn.Module, whole: Tensor, local: Callable[[Tensor], Tensor], longer: Tensor
) -> Tensor:
    """`whole` (B, ...) with the rows of longer clips fused with `local(rows)`.

    Args:
        longer: (B,) bool on the CPU: how many there are decides shapes.
    """
    rows = longer.nonzero()[:, 0]
    if not len(rows) and model.training:
        return whole
    # ZeRO-3 gathers weights when a module is called, so a rank without longer clips must call it
    # like the others; it discards the result. In training fusion.force_one sees to it.
    some = to_device(rows if len(rows) else rows.new_zeros(1), whole.device)
    one, other = whole[some], local(some)
    if model.training and len(some) == 1:
        # A norm cannot do with one sample; LAION takes it twice.
        fused = model(torch.cat([one, one]), torch.cat([other, other]))[:1]
    else:
        fused = model(one, other)
    return whole.index_copy(0, some, fused.to(whole.dtype)) if len(rows) else whole


def piece_patches(width: int, patch: int, time: int) -> nn.Conv2d:
    """The embedding of pieces in 2-D fusion, with three times the stride in time (axis 2 or 3)."""
    size = (3 * patch, patch) if time == 2 else (patch, 3 * patch)
    return nn.Conv2d(1, width, size, size)


def fuse_patches(
    embed: nn.Module, model: nn.Module, whole: Tensor, pieces: Tensor, longer: Tensor, *, time: int
) -> Tensor:
    """2-D fusion: patches (B, D, ., .) of the whole clip, fused with patches of the pieces.

    Args:
        embed: `piece_patches`.
        pieces: (B, 3, ., .) log-mels or images.
        time: the axis along which patches follow one another in time, 2 or 3.
    """

    def local(rows: Tensor) -> Tensor:
        some = pieces[rows]
        each = embed(some.flatten(0, 1)[:, None]).unflatten(0, (-1, some.shape[1]))
        return _fit(torch.cat(each.unbind(1), time), whole.shape[time], time)

    return fuse_rows(model, whole, local, longer)


def piece_mels(mel_bins: int) -> nn.Module:
    """The reduction of pieces to a third in time, for 1-D fusion."""
    conv = nn.Conv1d(mel_bins, mel_bins, kernel_size=5, stride=3, padding=2)
    return Normed(conv, nn.BatchNorm1d(mel_bins))


def fuse_mels(reduce: nn.Module, model: nn.Module, mel: Tensor, longer: Tensor) -> Tensor:
    """1-D fusion: (B, 4, T, F) -> (B, 1, T, F).

    Args:
        reduce: `piece_mels`.
    """

    def local(rows: Tensor) -> Tensor:
        pieces = mel[rows, 1:]
        each = reduce(pieces.flatten(0, 1).transpose(1, 2)).unflatten(0, (-1, pieces.shape[1]))
        return _fit(torch.cat(each.unbind(1), 2), mel.shape[2], 2)

    return fuse_rows(model, mel[:, 0].transpose(1, 2), local, longer).transpose(1, 2)[:, None]


def _fit(x: Tensor, size: int, axis: int) -> Tensor:
    """Truncate or zero-pad at the end of an axis."""
    if x.shape[axis] >= size:
        return x.narrow(axis, 0, size)
    shape = list(x.shape)
    shape[axis] = size - x.shape[axis]
    return torch.cat([x, x.new_zeros(shape)], axis)
