"""Tasks to measure, an op at a batch size, and their providers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import compiled
from bench.patches import AUDIOMAE, arguments, reconstruction
from bench.peers import SCALE, Function, Provider, infonce_providers, ours, sigmoid_providers
from bench.programs import PAPER
from flap_kernels import KERNELS, cyclic, infonce
from flap_kernels.cyclic import cyclic_reference
from flap_kernels.infonce import infonce_reference
from flap_kernels.infonce.backend import Duplicates
from flap_kernels.spec import Size

D = 512
PAPER_CLIPS = 288
_MOST_SQUARED, _MOST_CHECKED = 8192, 65_536
# Their arguments are made in bench/patches.py, for any number of clips.
OF_PATCHES = ("patch_embed", "masked_mse", "reconstruction", "gather_tokens", "unshuffle_tokens")
ALL_PATCHES = (*OF_PATCHES, "draw_patch_mask")
# InfoNCE with ids, as the trainer passes them: the clip's and the caption's.
_DUPLICATES: dict[str, Duplicates] = {"infonce_mask": "mask", "infonce_positive": "positive"}
_LOSSES = ("infonce", "cyclic", "sigmoid_loss", *_DUPLICATES)
_SIGMOID_D = 768


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


def others(size: Size) -> list[Task]:
    """Kernels for which this file has no arguments: their own `inputs` are used."""
    assert size in get_args(Size)
    supported = ("infonce", "sigmoid_loss", *ALL_PATCHES)
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
    if task.op in _LOSSES and task.B is not None:
        width = _SIGMOID_D if task.op == "sigmoid_loss" else D
        given = pairs(task.B, device, D=width)
        if task.op == "sigmoid_loss":
            with torch.no_grad():  # SigLIP's first values
                given["scale"].fill_(10.0)
            given["bias"] = torch.full((), -10.0, device=device, requires_grad=True)
            # The loss and the gradients from one product, then one for each gradient.
            return Problem(given, 6 * task.B**2 * width, 4 * 2 * 2 * task.B * width)
        if task.op in _DUPLICATES:
            # A row shares each of its two ids with one other row on average.
            given["ids"] = torch.randint(task.B, (task.B, 2), generator=draw, device=device)
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
    ratio = task.B / PAPER_CLIPS
    given = arguments(task.op, task.B, device)
    return Problem(given, least.flops * ratio, least.bytes_moved * ratio)


def pairs(B: int, device: str, dtype: torch.dtype | None = None, *, D: int = D) -> dict[str, Any]:
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
    if op == "sigmoid_loss":
        return sigmoid_providers(device)
    mine: Function
    reference: Function | None
    if op == "cyclic":
        mine, reference = (
            lambda audio, text, function=function: sum(function(audio, text))
            for function in (cyclic, cyclic_reference)
        )
    elif op in _DUPLICATES:
        mine, reference = (
            partial(function, duplicates=_DUPLICATES[op])
            for function in (infonce, infonce_reference)
        )
    elif op == "reconstruction":
        mine, reference = reconstruction, None
    else:
        mine, reference = KERNELS[op].op, KERNELS[op].reference
    logits = {"cyclic": 12.0, **dict.fromkeys(_DUPLICATES, 16.0)}.get(op, 0.0)
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
    if op in _LOSSES and (B or 0) > _MOST_SQUARED:
        # In float64 the backend in plain PyTorch, which the tests compare with the reference.
        tiled = op != "cyclic" and (B or 0) <= _MOST_CHECKED
        return providers(op, "cpu")[ours("cpu")]().function if tiled else None
    if op == "reconstruction":
        return AUDIOMAE[op]
    return providers(op, "cpu")["reference"]().function


def forward(function: Function, task_op: str, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Outputs of the op; a model's ops run in bfloat16 autocast on a GPU, as in training."""
    autocast = torch.cuda.is_available() and task_op not in _LOSSES
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = function(**given)
    return tuple(found) if isinstance(found, tuple) else (found,)


def gradients(
    first: Tensor, leaves: Mapping[str, Tensor], upstream: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of the leaves, without accumulation into `.grad`; none without leaves."""
    return torch.autograd.grad(first, list(leaves.values()), upstream) if leaves else ()
