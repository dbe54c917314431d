"""The tasks of bench/gpu.py: an op at a batch size, and its providers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import compiled
from bench.patches import AUDIOMAE, arguments, reconstruction
from bench.peers import SCALE, Function, Provider, infonce_providers, ours
from bench.programs import PAPER
from flap_kernels import KERNELS, cyclic, infonce
from flap_kernels.cyclic import cyclic_reference
from flap_kernels.spec import Size

D = 512
_PAPER_CLIPS = 288
_MOST_SQUARED, _MOST_CHECKED = 8192, 65_536
# Their arguments are made in bench/patches.py, for any number of clips.
_OF_PATCHES = ("patch_embed", "masked_mse", "reconstruction", "gather_tokens", "unshuffle_tokens")


@dataclass(frozen=True)
class Task:
    """An op at a batch size; `B` is None for a kernel that is called with its own `inputs`."""

    op: str
    B: int | None
    size: Size = "paper"

    @property
    def name(self) -> str:
        """Name for messages and tables."""
        return f"{self.op} B={self.B}" if self.B else f"{self.op} ({self.size})"


def tasks(device: str, *, quick: bool) -> list[Task]:
    """The tasks to measure, the most important first, since time may run out."""
    if device == "cpu":
        sizes = [Task("infonce", 256), Task("infonce", 512), Task("cyclic", 256)]
        return sizes + [Task(op, 2) for op in (*_OF_PATCHES, "draw_patch_mask")] + _others("odd")
    of_patches = [Task(op, _PAPER_CLIPS) for op in (*_OF_PATCHES, "draw_patch_mask")]
    if quick:
        return [Task("infonce", 65_536), Task("infonce", 4608), *of_patches, *_others("paper")]
    return [
        *(Task("infonce", B) for B in (65_536, 4608)),
        *of_patches,
        *(Task("infonce", B) for B in (262_144, 2304)),
        *_others("paper"),
        *(Task("infonce", B) for B in (32_768, 8192)),
        *(Task("cyclic", B) for B in (4608, 32_768)),
        *(Task(op, clips) for clips in (72, 36) for op in _OF_PATCHES),
    ]


def _others(size: Size) -> list[Task]:
    """Kernels for which this file has no arguments: their own `inputs` are used."""
    assert size in get_args(Size)
    supported = ("infonce", "draw_patch_mask", *_OF_PATCHES)
    return [Task(op, None, size) for op in KERNELS if op not in supported]


@dataclass(frozen=True)
class Problem:
    """Random arguments of a task, and its least arithmetic and traffic."""

    given: dict[str, Any]
    flops: float
    bytes_moved: float
    """Forward and backward; 0 if not counted."""

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The arguments that take gradients."""
        tensors = {name: x for name, x in self.given.items() if isinstance(x, Tensor)}
        return {name: x for name, x in tensors.items() if x.requires_grad}


def problem(task: Task, device: str) -> Problem:
    """Arguments of a task on a device, the same for every provider."""
    draw = torch.Generator(device).manual_seed(0)
    if task.op in ("infonce", "cyclic"):
        assert task.B is not None
        given = pairs(task.B, device)
        if task.op == "cyclic":
            del given["scale"]
            # Gram matrices forward, 3 products; backward 4.
            least = min(14 * task.B * D**2, 24 * task.B**2 * D)
            return Problem(given, least, 4 * 2 * 2 * task.B * D)
        return Problem(given, 8 * task.B**2 * D, 4 * 2 * 2 * task.B * D)
    if task.B is None:
        kernel = KERNELS[task.op]
        inputs = kernel.inputs(task.size, draw)
        least, paper = PAPER[task.op], task.size == "paper"
        given = inputs.cast(torch.float32)
        if "y" in given and device == "cuda":  # what autocast's product before it gives
            given["y"] = given["y"].detach().bfloat16().requires_grad_()
        return Problem(given, least.flops * paper, least.bytes_moved * paper)
    # Reconstruction also writes the whole decoder's gradient: its limit is a little too low.
    least = PAPER["masked_mse" if task.op == "reconstruction" else task.op]
    ratio = task.B / _PAPER_CLIPS
    given = arguments(task.op, task.B, device)
    return Problem(given, least.flops * ratio, least.bytes_moved * ratio)


def pairs(B: int, device: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Matched unit rows, as early in training, and the scale: three leaves."""
    draw = torch.Generator(device).manual_seed(0)
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    audio = F.normalize(torch.randn(B, D, generator=draw, device=device), dim=1)
    noise = torch.randn(B, D, generator=draw, device=device) / D**0.5
    text = F.normalize(audio + 2 * noise, dim=1)
    leaves = {"audio": audio.to(dtype), "text": text.to(dtype)}
    leaves["scale"] = torch.full((), SCALE, device=device)
    return {name: x.requires_grad_() for name, x in leaves.items()}


def providers(op: str, device: str) -> dict[str, Callable[[], Provider]]:
    """Providers of an op: ours first, then its reference, then peers."""
    if op == "infonce":
        return infonce_providers(device)
    mine: Function
    reference: Function | None
    if op == "cyclic":
        mine, reference = (
            lambda audio, text, function=function: sum(function(audio, text))
            for function in (cyclic, cyclic_reference)
        )
    elif op == "reconstruction":
        mine, reference = reconstruction, None
    else:
        mine, reference = KERNELS[op].op, KERNELS[op].reference
    logits = 12.0 if op == "cyclic" else 0.0
    found = {ours(device): lambda: Provider(mine)}
    if reference is not None:
        found["reference"] = lambda: Provider(reference, logit_bytes=logits)
        found["reference, compiled"] = lambda: Provider(compiled(reference), logit_bytes=logits)
    if op in AUDIOMAE:
        found["AudioMAE"] = lambda: Provider(AUDIOMAE[op])
        found["AudioMAE, compiled"] = lambda: Provider(compiled(AUDIOMAE[op]))
    return found


def exact(op: str, B: int | None) -> Function | None:
    """The float64 reference of an op, where memory suffices for B x B numbers."""
    if op in ("infonce", "cyclic") and (B or 0) > _MOST_SQUARED:
        # In float64 the backend in plain PyTorch, which the tests compare with the reference.
        return infonce if op == "infonce" and (B or 0) <= _MOST_CHECKED else None
    if op == "reconstruction":
        return AUDIOMAE[op]
    return providers(op, "cpu")["reference"]().function


def forward(function: Function, task_op: str, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Outputs of the op; a model's ops run in bfloat16 autocast on a GPU, as in training."""
    autocast = torch.cuda.is_available() and task_op not in ("infonce", "cyclic")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = function(**given)
    return tuple(found) if isinstance(found, tuple) else (found,)


def gradients(
    first: Tensor, leaves: Mapping[str, Tensor], upstream: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of the leaves, without accumulation into `.grad`; none without leaves."""
    return torch.autograd.grad(first, list(leaves.values()), upstream) if leaves else ()
