"""Peers of InfoNCE, each as (audio, text, scale) -> (), and of the sigmoid loss (a bias as well),
called as their authors document.

Both directions, mean over the batch, all of them; a peer of one direction is called twice. What a
peer cannot do or does otherwise stands in its `note`. Peers are other people's packages, and none
is needed: making one that is not installed raises ModuleNotFoundError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import compiled
from flap_kernels import infonce, sigmoid_loss
from flap_kernels.infonce import infonce_reference
from flap_kernels.sigmoid_loss import sigmoid_loss_reference

# 1 / 0.07, the value at the start of training. Fixed for all, since some peers take a number.
SCALE = 1 / 0.07

Function = Callable[..., Any]


@dataclass(frozen=True)
class Provider:
    """An implementation of an op; called with the op's arguments by name."""

    function: Function
    version: str = ""
    logit_bytes: float = 0.0
    """Least peak memory for each of the B x B logits, in bytes."""
    learns_scale: bool = True
    same: bool = True
    """Whether it computes the same function, so that its result can be checked."""
    note: str = ""


def open_clip_form(audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The loss of open_clip's trainer in one process: two matrices, two losses."""
    target = torch.arange(len(audio), device=audio.device)
    by_audio = scale * audio @ text.T
    by_text = scale * text @ audio.T
    return (F.cross_entropy(by_audio, target) + F.cross_entropy(by_text, target)) / 2


def _both_directions(one_direction: Function) -> Function:
    """Mean of a loss over rows against columns and over columns against rows."""

    def loss(audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        target = torch.arange(len(audio), device=audio.device)
        by_audio = one_direction(audio, text, target, scale)
        return (by_audio + one_direction(text, audio, target, scale)) / 2

    return loss


def _linear_cross_entropy() -> Provider:
    function: Any = getattr(F, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise ModuleNotFoundError("torch >= 2.13 has F.linear_cross_entropy")

    def one_direction(rows: Tensor, columns: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        return function(scale * rows, columns, target, options=options())

    return Provider(_both_directions(one_direction), torch.__version__)


def _open_clip() -> Provider:
    loss = import_module("open_clip.loss").ClipLoss()
    return Provider(
        lambda audio, text, scale: loss(audio, text, scale),
        version("open_clip_torch"),
        logit_bytes=8.0,
    )


def _memeff() -> Provider:
    # Its default, stable=True, multiplies the gradients by sqrt(B * temperature).
    loss = import_module("memeff").MemoryEfficientCLIPLoss(
        temperature=1 / SCALE, normalized_inputs=True, stable=False
    )
    return Provider(
        lambda audio, text, scale: loss(audio, text),
        version("memeff"),
        learns_scale=False,
        note="no gradient of the scale",
    )


def _inf_cl() -> Provider:
    loss = import_module("inf_cl").cal_flash_loss
    return Provider(
        _both_directions(
            lambda rows, columns, target, scale: loss(rows, columns, target, scale).mean()
        ),
        version("inf-cl"),
        note="tf32; D a multiple of 256",
    )


def _liger() -> Provider:
    apply = import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction.apply

    def one_direction(rows: Tensor, columns: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        found = apply(scale * rows, columns, target)
        return found[0] if isinstance(found, tuple) else found

    return Provider(_both_directions(one_direction), version("liger-kernel"))


def _liger_scaled() -> Provider:
    apply = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction.apply

    def one_direction(rows: Tensor, columns: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        return apply(rows, columns, target, 1 / SCALE).mean()

    return Provider(
        _both_directions(one_direction),
        version("liger-kernel"),
        learns_scale=False,
        note="no gradient of the scale",
    )


def _cut_cross_entropy() -> Provider:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return Provider(
        _both_directions(lambda rows, columns, target, scale: loss(scale * rows, columns, target)),
        version("cut-cross-entropy"),
        note="leaves out small gradients",
    )


def _siglip() -> Provider:
    loss = import_module("siglip_kernel").fused_siglip_loss

    def sigmoid(audio: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return loss(audio, text, scale.log(), bias)

    return Provider(sigmoid, version("siglip-kernel"))


def ours(device: str) -> str:
    """Name of our provider on a device: a CPU runs plain PyTorch, not the kernels."""
    return "ours" if device == "cuda" else "ours, plain PyTorch"


def infonce_providers(device: str) -> dict[str, Callable[[], Provider]]:
    """All implementations of InfoNCE by name; each is constructed when it is called."""
    return {
        ours(device): lambda: Provider(infonce),
        "reference": lambda: Provider(infonce_reference, logit_bytes=12.0),
        "reference, compiled": lambda: Provider(compiled(infonce_reference), logit_bytes=4.0),
        "open_clip's form": lambda: Provider(open_clip_form, logit_bytes=8.0),
        "open_clip": _open_clip,
        "F.linear_cross_entropy": _linear_cross_entropy,
        "memeff": _memeff,
        "inf_cl": _inf_cl,
        "liger": _liger,
        "liger, scaled": _liger_scaled,
        "cut_cross_entropy": _cut_cross_entropy,
    }


def sigmoid_providers(device: str) -> dict[str, Callable[[], Provider]]:
    """All implementations of the sigmoid loss by name."""
    return {
        ours(device): lambda: Provider(sigmoid_loss),
        "reference": lambda: Provider(sigmoid_loss_reference, logit_bytes=12.0),
        "reference, compiled": lambda: Provider(compiled(sigmoid_loss_reference), logit_bytes=8.0),
        "siglip-kernel": _siglip,
    }


PACKAGES = {
    "open_clip": "open_clip",
    "memeff": "memeff",
    "inf_cl": "inf_cl",
    "liger": "liger_kernel",
    "cut_cross_entropy": "cut_cross_entropy",
    "siglip-kernel": "siglip_kernel",
}
"""The modules of peers that are other people's packages, by (the start of) a provider's name."""


def is_package(provider: str) -> bool:
    """Whether a provider is another's package."""
    # "open_clip's form" is in this file.
    return provider != "open_clip's form" and provider.startswith(tuple(PACKAGES))


def any_installed() -> bool:
    """Whether one of the peers' packages is here."""
    return any(find_spec(module) is not None for module in PACKAGES.values())
