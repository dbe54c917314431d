"""The arguments of the contrastive ops: what they must be, and the backend that they mean."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from flap_kernels.checks import (
    check_above,
    check_choice,
    check_floats,
    check_integers,
    check_shape,
    check_together,
)
from flap_kernels.infonce.backend import (
    Backend,
    Direction,
    Duplicates,
    Precision,
    TileBackend,
)
from flap_kernels.infonce.prefixes import ByPrefix
from flap_kernels.infonce.torch_prefixes import TorchPrefixes
from flap_kernels.infonce.torch_tiled import TorchTiled
from flap_kernels.infonce.triton_launch import TritonTiled
from flap_kernels.launch import runs_triton
from flap_kernels.precision import accumulator_dtype


class Options(NamedTuple):
    """How the sums are computed, and of which prefixes."""

    precision: str
    workspace_mib: float | None
    prefixes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def choose_backend(x: Tensor, precision: str, workspace_mib: float | None) -> TileBackend:
    """The backend for this tensor; `precision` and `workspace_mib` apply to the Triton kernels."""
    if len(x) and runs_triton(x):
        return TritonTiled("tf32" if precision == "tf32" else "ieee", workspace_mib)
    return TorchTiled()


def choose_prefix_backend(x: Tensor, options: Options) -> Backend:
    """The backend for this tensor and these prefixes, if any."""
    backend = choose_backend(x, options.precision, options.workspace_mib)
    if not options.prefixes:
        return backend
    # Filled on the device: a list that is copied to it is waited for.
    dtype = accumulator_dtype(x.dtype)
    weights = torch.stack([x.new_full((), weight, dtype=dtype) for weight in options.weights])
    if isinstance(backend, TorchTiled):
        return TorchPrefixes(options.prefixes, weights)
    return ByPrefix(backend, options.prefixes, weights)


def operands(audio: Tensor, text: Tensor, precision: Precision) -> tuple[Tensor, Tensor, str]:
    """The operands of the products, and the kernels' precision if they are float32."""
    if precision != "bf16":
        return audio, text, precision
    if audio.dtype == torch.float32:
        audio, text = audio.bfloat16(), text.bfloat16()
    return audio, text, "ieee"


def checked_scalar(name: str, x: Tensor | float, audio: Tensor) -> Tensor:
    """A number as a tensor () beside `audio`, in the accumulator's dtype; a tensor as it is."""
    if not isinstance(x, Tensor):
        return audio.new_full((), x, dtype=accumulator_dtype(audio.dtype))
    check_shape(name, x, (), "()")
    check_floats(**{name: x})
    return x


def check_arguments(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    direction: str,
    ids: Tensor | None,
    duplicates: str,
    precision: str,
    workspace_mib: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments of the public ops; returns the scale as a tensor, and ids as (N, K)."""
    check_choice("direction", direction, get_args(Direction))
    check_choice("duplicates", duplicates, get_args(Duplicates))
    check_choice("precision", precision, get_args(Precision))
    check_above("workspace_mib", workspace_mib, 0)
    check_shape("audio", audio, (None, None), "(B, D)")
    extra = text.ndim == 2 and len(text) > len(audio)
    check_shape("text", text, (len(text) if extra else len(audio), audio.shape[1]), "(N, D)")
    if extra and direction == "t2a":
        raise ValueError(
            "direction must be symmetric or a2t where text has more rows than audio, got 't2a'"
        )
    check_floats(audio=audio, text=text)
    if audio.dtype != text.dtype:
        raise TypeError(f"audio and text must be of one type, got {audio.dtype} and {text.dtype}")
    scale = checked_scalar("scale", scale, audio)
    check_together(audio=audio, text=text, scale=scale)
    if ids is not None:
        check_integers(ids=ids)
        wide = ids.ndim == 2 and ids.shape[1] > 0
        check_shape("ids", ids, (len(text), None) if wide else (len(text),), "(N,) or (N, K)")
        check_together(audio=audio, ids=ids)
        ids = ids if wide else ids[:, None]
        if extra and duplicates == "positive":
            raise ValueError(
                "duplicates must be mask where text has more rows than audio, got 'positive'"
            )
    return scale, ids
