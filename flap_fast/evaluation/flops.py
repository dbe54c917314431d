"""Floating-point operations of the media encoder's forward pass, as fvcore counts them.

One multiply-add is one FLOP; a LayerNorm takes five for each number, a BatchNorm two; softmax, GELU
and additions are free. FLAP embeds all N patches and drops some after; we embed the K that stay
(`fused`). The encoder runs on the device `meta`, where nothing is computed, under PyTorch's own
counter; what feature fusion adds is left out.

What a device has to do in a whole step is counted in `tools.profile.counts`.

Source: FLAP, arXiv 2311.01615, section 6.3; the formulas of fvcore for norms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flap_fast.checks import require
from flap_fast.config import Config, Fusion
from flap_fast.evaluation.evaluated_model import EvaluatedModel
from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.sheet import Row, Sheet
from flap_fast.model.masking import kept_patches
from flap_kernels import PatchMask

CLIPS = 8
"""Clips that FLAP counts GFLOPs of."""
# Kind, unit and tenths dropped, as in FLAP's tables; 2-D drops as much along both axes.
_SCHEMES = (
    *(("none", "token", (0,)), ("1d", "token", range(1, 8))),
    *(("1d", "frame", range(1, 8)), ("2d", "token", range(1, 6))),
)


def encoder_flops(config: Config, *, clips: int = 1, fused: bool = False) -> int:
    """Multiply-adds of the encoder's forward pass over `clips` clips, masked as in training."""
    encoder = config.encoder
    kept = kept_patches(config.mask, encoder.grid) if "mask" in encoder.can else None
    return clips * _counter(config)(kept)[fused]


def masking_flops(config: Config, clips: int = CLIPS) -> list[dict[str, Any]]:
    """GFLOPs of a forward pass over masking schemes and ratios, rounded as config.mask says.

    `gflops` embeds all patches, as the papers count; `gflops_fused` those that stay, as we do. One
    row for an encoder that cannot be masked.
    """
    encoder, count, rows = config.encoder, _counter(config), []
    maskable = "mask" in encoder.can
    # Files name the modality only where it is not sound's, as they always have.
    modality = {} if encoder.modality == "audio" else {"modality": encoder.modality}
    for kind, unit, tenths in _SCHEMES if maskable else _SCHEMES[:1]:
        for ratio in (n / 10 for n in tenths):
            ratios = {"ratio": ratio, "time_ratio": ratio, "freq_ratio": ratio}
            mask = config.mask.model_copy(update={"kind": kind, "unit": unit, **ratios})
            kept = kept_patches(mask, encoder.grid) or None
            whole, fused = (clips * flops / 1e9 for flops in count(kept if maskable else None))
            row = {"kind": kind, "unit": unit, "ratio": ratio, "clips": clips, "kept": kept}
            rows.append({**row, "gflops": whole, "gflops_fused": fused, **modality})
    return rows


def _counter(config: Config) -> Callable[[int | None], tuple[int, int]]:
    """A function of K (None for all patches) that returns the multiply-adds of one clip: with all
    patches embedded, and with K of them."""
    modality = config.encoder.modality
    # Only PyTorch's attention: xformers may not be there, and takes no tensors without data.
    section = getattr(config, modality)
    attention = {"attention": "sdpa"} if hasattr(section, "attention") else {}
    plain = {"fusion": Fusion(), modality: section.model_copy(update=attention)}
    config = config.model_copy(update=plain)
    encoder = config.encoder
    with torch.device("meta"):
        model = encoder.build(config).eval()
        clip = torch.empty(1, *encoder.input_shape(config.fusion))

    @cache
    def count(kept: int | None) -> tuple[int, int]:
        dropped = 0

        def patch_embed(mel, keep, weight, *_, **__) -> int:
            nonlocal dropped
            dropped += 2 * (prod(mel) - prod(keep) * weight[1]) * weight[0]
            return 2 * prod(keep) * prod(weight)

        formulas = {**_NORMS, torch.ops.flap_kernels.patch_embed: patch_embed}
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        ids = torch.empty(1, kept or 0, dtype=torch.int64, device="meta")
        mask = () if kept is None else (PatchMask(ids, ids, ids),)
        # As plain products: the counter has no formula for a CPU's fused attention.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(clip, *mask)
        fused = counter.get_total_flops()
        return (fused + dropped) // 2, fused // 2

    return count


# Formulas of the counter, where a multiply-add is two: they get shapes in the tensors' places.


def _layer_norm(x, *_, **__) -> int:
    return 2 * 5 * prod(x)


def _batch_norm(x, *_, **__) -> int:
    return 2 * 2 * prod(x)


_aten = torch.ops.aten
_NORMS = {
    _aten.native_layer_norm: _layer_norm,
    _aten.native_batch_norm: _batch_norm,
    _aten._native_batch_norm_legit_no_training: _batch_norm,
}


def _check(model: EvaluatedModel, _: None) -> None:
    rule = "have an encoder of sounds or images"
    require(not model.text_only, "the model of flops", rule, "a text encoder alone")


def _score(model: EvaluatedModel, _: None) -> list[dict[str, Any]]:
    return masking_flops(model.config)


def _sheet(name: str, rows: list[dict[str, Any]], path: str) -> Sheet:
    head = ("masking", "ratio", "patches kept", "GFLOPs", "GFLOPs fused")
    ours: list[Row] = []
    for row in rows:
        kind = {"none": "none", "1d": f"1-D {row['unit']}", "2d": "2-D"}[row["kind"]]
        kept = "-" if row["kept"] is None else str(row["kept"])
        counts = (f"{row['gflops']:.1f}", f"{row['gflops_fused']:.1f}")
        ours.append((kind, f"{row['ratio']:.1f}", kept, *counts))
    modality = rows[0].get("modality", "audio")
    clips = f"{rows[0]['clips']} {'clips' if modality == 'audio' else modality + 's'}"
    note = (
        "One multiply-add is one FLOP, as fvcore counts. Fused: dropped patches are not embedded."
    )
    title = f"{modality.capitalize()} encoder, forward pass over {clips}"
    return Sheet(title, head, ours, note=note)


EVALUATION = Evaluation(
    name="flops", data="settings", check=_check, score=_score, sheet=_sheet, metrics=None
)
