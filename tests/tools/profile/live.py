"""How many bytes tensors take, now and at most, through any number of forwards and backwards."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Inside, the storages of all tensors that operators give; those `given` count from the start.

    What an operator allocates and frees within itself is not seen.
    """

    def __init__(self, given: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()
        for tensor in given:
            self._hold(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen or tensor.device.type == "meta":  # DeepSpeed keeps shapes as such
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def tensors_of(*owners: Any) -> list[Tensor]:
    """Parameters, buffers, gradients and an optimizer's moments."""
    found: list[Tensor] = []
    for clip_of_caption in owners:
        if isinstance(clip_of_caption, torch.nn.Module):
            found += [*clip_of_caption.parameters(), *clip_of_caption.buffers()]
            found += [p.grad for p in clip_of_caption.parameters() if p.grad is not None]
        else:
            leaves = tree_leaves(list(clip_of_caption.state.values()))
            found += [x for x in leaves if isinstance(x, Tensor)]
    return found
