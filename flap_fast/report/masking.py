"""A figure of a log-mel and the patches of it that masking keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config import Config, Fusion
from flap_fast.data.batch import PackedMels, lay_end_to_end
from flap_fast.data.preprocess.front_end import MelFrontEnd
from flap_fast.data.preprocess.waveform import crop_and_fill, read_crop
from flap_fast.data.shards import open_shards
from flap_fast.encoders.audio_settings import PatchEncoder
from flap_fast.files import visible
from flap_fast.model.masking import patch_mask


def masking_figure(config: Config, out: Path, *, sound: Path | None = None, clip: int = 0) -> Path:
    """Write a PNG: a log-mel, and the patches of it that training keeps.

    Args:
        sound: a sound file; without one, clip number `clip` of data.train.

    Raises:
        ConfigError: matplotlib is not installed, or there is nothing to show.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures must have matplotlib; pip install 'flap_fast[report]'") from None
    audio = config.encoder
    if not isinstance(audio, PatchEncoder):
        rule = "must be one that masks patches of a log-mel to show them"
        raise ConfigError(f"{audio.modality}.encoder {rule}, got '{audio.encoder}'")
    name, caption, source = _source(config, sound, clip)
    wave = crop_and_fill(read_crop(source, audio.sample_rate_hz, audio.samples, 0.5), 0.0, audio)
    front_end = MelFrontEnd(audio, Fusion(), torch.device("cpu"))
    media = front_end(lay_end_to_end([wave], np.zeros(1))).media
    mel = media.mel if isinstance(media, PackedMels) else media[0, 0]
    grid = len(mel) // audio.patch, audio.grid[1]
    mask = patch_mask(config.mask, grid, config.run.seed, torch.tensor([clip]))
    keep = torch.arange(grid[0] * grid[1]) if mask is None else mask.ids_keep[0]
    shown = _only_kept(mel, keep, audio.patch, grid)

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    bounds = {"vmin": float(mel.min()), "vmax": float(mel.max())}
    extent = (0, len(mel) / 100, 0, audio.mel_bins)
    kept = len(keep) / (grid[0] * grid[1])
    titles = (
        f'{name}: "{caption}"' if caption else name,
        f"{len(keep)} of {grid[0] * grid[1]} patches kept ({kept:.0%}), "
        f"mask.kind={config.mask.kind}",
    )
    for axis, cells, title in zip(axes, (mel, shown), titles, strict=True):
        image = axis.imshow(
            cells.T.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma", **bounds
        )
        axis.set_facecolor("0.85")
        axis.set_title(visible(title, document=True), fontsize=10, parse_math=False)
        axis.set_ylabel("mel bin")
    axes[1].set_xlabel("seconds")
    figure.colorbar(image, ax=axes, label="log energy")  # type: ignore[possibly-undefined]
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def _source(config: Config, sound: Path | None, clip: int) -> tuple[str, str, bytes | Path]:
    if sound is not None:
        return sound.name, "", sound
    shards = open_shards(config.data.train, ("sounds", "mels"), config.data)
    if shards.kind != "sounds":
        raise ConfigError(
            f"data.train must hold sounds for a figure, got {shards.kind}; name a --sound"
        )
    if not 0 <= clip < len(shards):
        raise ConfigError(f"--clip must be in [0, {len(shards)}), got {clip}")
    record = shards.record(clip)
    return str(record.get("id", clip)), record["text"][0], shards.encoded(clip)


def _only_kept(mel: Tensor, keep: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The log-mel with NaN in the patches that are dropped."""
    stays = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    stays[keep] = True
    whole = np.kron(stays.reshape(grid).numpy(), np.ones((patch, patch), dtype=bool))
    return mel.masked_fill(~torch.from_numpy(whole), float("nan"))
