"""The parts of a training step, and where in a model's forward and backward each begins.

The backward is split by the gradients that arrive: autograd goes back through the loss first, then
through the towers in the opposite order of their forward, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

DATA_WAIT, DECODER, LOSS, OTHER = "data wait", "decoder", "loss", "other"
OPTIMIZER, COMMUNICATION = "optimizer", "communication"
TEACHER = "teacher"


def tower(name: str) -> str:
    """The part of an encoder and its head: `audio tower`, `image tower` or `text tower`."""
    return f"{name} tower"


def step_parts(modality: str, *, teacher: bool = False) -> tuple[str, ...]:
    """Every part, in the order of a step with media of this modality, with a teacher or without."""
    towers, taught = (tower(modality), tower("text"), DECODER), (TEACHER,) * teacher
    return (DATA_WAIT, *towers, *taught, LOSS, OPTIMIZER, COMMUNICATION, OTHER)


@contextmanager
def marked(model: nn.Module, mark: Callable[[str], None]) -> Iterator[None]:
    """A context that calls `mark(part)` when a part of the model's forward or backward begins.

    After a forward comes the loss: what is done with the embeddings.
    """
    with ExitStack() as hooks:
        for name, module in model.named_children():
            part = name if name == DECODER else tower(name.removesuffix("_head"))
            _mark_module(module, part, mark, hooks)
        hooks.callback(model.register_forward_hook(lambda *_: mark(LOSS)).remove)
        yield


def _mark_module(
    module: nn.Module, part: str, mark: Callable[[str], None], hooks: ExitStack
) -> None:
    def before(*_: Any) -> None:
        mark(part)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                # Runs once its gradient is computed, before the backward of its module.
                tensor.register_hook(lambda _: mark(part))
        mark(OTHER)

    hooks.callback(module.register_forward_pre_hook(before).remove)
    hooks.callback(module.register_forward_hook(after).remove)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in a module's output or an operator's arguments, nested at any depth."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors_in(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for one in output:
            yield from tensors_in(one)
