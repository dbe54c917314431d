"""A step on a GPU that is not there: fake CUDA tensors, and what would make the host wait.

    with fake_cuda() as gpu:      CPU tensors are real, CUDA tensors have no values
        ...                       the project's own code, unchanged
    gpu.copies                    each copy between host and device: its line, and whether it waits
    gpu.launched                  the names of our kernels that would have run

What this proves: on the lines that ran, no operator mixes CPU and CUDA tensors (numbers of no
dimension on the CPU are PyTorch's own way to pass a scalar), every shape and type fits, and the
host reads nothing from the device but what `copies` names. An operator whose output's shape
depends on values (`nonzero`, a boolean mask as an index) waits, and ends the run.

Our own operators run up to the launch of their kernels, and must give what their fake
implementations say.

What it cannot: values; that a kernel compiles or runs; a wait inside an operator of PyTorch's, such
as in cuDNN, or for memory; lifetimes on other streams; code of other threads and processes;
torch.compile, DeepSpeed and NCCL, which need a driver. A backend that C++ chooses by the GPU (of
attention, of convolutions) is not the one that a GPU takes.

Autograd's engine of a CUDA build starts a thread for each GPU of the driver, so a backward of CUDA
tensors fails without one. `backward=True` therefore tells C++ that they are on the CPU; Python, and
the checks here, see CUDA. Autocast is then the CPU's, whose list of operators differs a little.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.nn.utils import clip_grad
from torch.utils import _foreach_utils

from flap_fast.data.batch import to_device
from flap_fast.tools.profile.parts import tensors_in
from flap_kernels import launch

DEVICE = torch.device("cuda", 0)
_PROJECT = Path(__file__).parents[2]
_CPU = torch.device("cpu")
_HOST = torch.device("cpu", 0)  # the CPU where Python names it, and not C++
_ATEN = torch.ops.aten
_INDEXED = (_ATEN.index, _ATEN._unsafe_index, _ATEN.index_put, _ATEN.index_put_)

_BY_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class DeviceError(AssertionError):
    """An operator that a GPU would refuse, or that has the host wait and cannot go on here."""


@dataclass(frozen=True)
class Line:
    """The innermost line of the project that was running."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number} {self.function}"


@dataclass(frozen=True)
class Copy:
    """A copy between host and device."""

    to_host: bool
    waits: bool
    """Whether the host waits: always for a copy to it, and for one from memory not pinned."""
    operator: str
    line: Line

    def __str__(self) -> str:
        direction = "device to host" if self.to_host else "host to device"
        return f"{self.line}: {self.operator}, {direction}" + (", waits" if self.waits else "")


class FakeCuda(FakeTensorMode):
    """CUDA tensors without values among real CPU tensors; records copies between them.

    All that is read from the device is 0.
    """

    def __init__(self, *, backward: bool):
        super().__init__(allow_non_fake_inputs=True)
        self.copies: list[Copy] = []
        self.launched: set[str] = set()
        self._hidden = backward
        self._pinned: list[Tensor] = []  # held: another tensor would get their addresses

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # C++ asks, very often
            device = _CPU if self._hidden else args[0].fake_device
            return torch.device("meta") if self.in_kernel_invocation else device
        if _is_composite(func):  # inside an operator of ours, autograd has not taken it apart
            with self:
                return func.decompose(*args, **kwargs)
        if func is _ATEN._pin_memory.default:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if func is _ATEN.is_pinned.default:
            return self._is_pinned(args[0])
        given = list(tensors_in((args, kwargs)))
        on_gpu = any(isinstance(x, FakeTensor) for x in given)
        if self._hidden and kwargs.get("device") == _CPU and (on_gpu or _called_by_engine()):
            kwargs = {**kwargs, "device": DEVICE}  # C++ took the device from a tensor of ours
        target = torch.device(kwargs.get("device") or (DEVICE if on_gpu else _CPU))
        if not on_gpu and target.type == "cpu":
            return func(*args, **kwargs)
        if func is _ATEN._local_scalar_dense.default:
            self.copies.append(Copy(True, True, str(func), _line()))
            return torch.zeros((), dtype=args[0].dtype).tolist()
        if func in (_ATEN._to_copy.default, _ATEN.copy_.default):
            zeros = self._copied(func, args, kwargs, target)
            if zeros is not None:
                return zeros
        elif on_gpu:
            _check(func, args, given)
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "flap_kernels":
            with self:
                ours = OPDEFS[func._name.split(".")[0]]._init_fn(*args, **kwargs)
            if (real := _shapes(ours)) != (fake := _shapes(found)):
                raise DeviceError(f"{func} gives {real}, and its fake implementation {fake}")
        return found

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **_: Any) -> None:
        """Take a launch's arguments as `run_kernel` does; no kernel runs."""
        if any(x.device != DEVICE for x in tensors_in(arguments)):
            raise DeviceError(f"{_line()}: a kernel is launched on tensors of another device")
        assert all(size > 0 for size in grid)
        self.launched.add(kernel.__name__)

    def _copied(self, func: Any, args: Any, kwargs: Any, target: torch.device) -> Tensor | None:
        """Record a copy; what one to the host gives, and None for one to the device."""
        in_place = func is _ATEN.copy_.default
        source = args[1] if in_place else args[0]
        to_host = not isinstance(args[0], FakeTensor) if in_place else target.type == "cpu"
        if to_host == isinstance(source, FakeTensor):  # else from the device to the device
            quick = bool(kwargs.get("non_blocking") or args[2:]) and self._is_pinned(source)
            self.copies.append(Copy(to_host, to_host or not quick, str(func), _line()))
        if not to_host:
            return None
        zeros = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return args[0].copy_(zeros) if in_place else zeros

    def _is_pinned(self, x: Tensor) -> bool:
        if isinstance(x, FakeTensor):
            return False
        start = x.untyped_storage().data_ptr()
        return any(start == pinned.untyped_storage().data_ptr() for pinned in self._pinned)


def _check(func: Any, args: Any, given: list[Tensor]) -> None:
    """Raise if the operator mixes devices, or gives a shape that depends on values."""
    on_cpu = [x for x in given if not isinstance(x, FakeTensor) and x.ndim]
    if on_cpu:
        shapes = ", ".join(str(tuple(x.shape)) for x in on_cpu)
        raise DeviceError(f"{_line()}: {func} mixes CUDA tensors with CPU tensors {shapes}")
    if func._overloadpacket in _INDEXED:  # only a mask's shape depends on values
        waits = any(x.dtype in (torch.bool, torch.uint8) for x in tensors_in(args[1]))
    else:  # without output_size, fake tensors refuse `repeat_interleave` themselves
        waits = func is not _ATEN.repeat_interleave.Tensor and not _BY_VALUES.isdisjoint(func.tags)
    if waits:
        raise DeviceError(f"{_line()}: {func} has the host wait for values of the device")


@contextmanager
def fake_cuda(*, backward: bool = False) -> Iterator[FakeCuda]:
    """A context with a fake GPU of compute capability 9.0.

    Args:
        backward: tell C++ that its tensors are on the CPU, see above.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)  # the same where there is one
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "synchronize", _refused)
        patch.setattr(FakeTensor, "tolist", lambda x: x.cpu().tolist())  # one copy, not one a value
        # Printing reads values, and a fake tensor prints none.
        patch.setattr(FakeTensor, "__repr__", lambda x, **_: repr(x.cpu()))
        # Answers are cached for the whole process, and these are a fake GPU's.
        patch.setattr(launch, "_capability", lambda device: 90)
        patch.delenv("TRITON_INTERPRET", raising=False)
        mode = FakeCuda(backward=backward)
        for name, module in list(sys.modules.items()):
            if name.startswith("flap_kernels.") and hasattr(module, "run_kernel"):
                patch.setattr(module, "run_kernel", mode.launch)
        _allow_autocast(patch)
        if backward:
            _show_cpu_to_cpp(patch)
        with mode:
            yield mode


def _allow_autocast(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)


def _show_cpu_to_cpp(patch: pytest.MonkeyPatch) -> None:
    """Have C++ see CPU tensors where Python sees CUDA tensors."""
    make = Tensor._make_subclass

    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:
        return make(*args, **{**kwargs, "device_for_backend_keys": _CPU})

    patch.setattr(Tensor, "_make_subclass", staticmethod(on_cpu), raising=False)
    for name in ("is_cuda", "is_cpu"):
        asked = property(lambda x, type=name[3:]: x.fake_device.type == type)
        patch.setattr(FakeTensor, name, asked, raising=False)
    patch.setattr(FakeTensor, "to", _to, raising=False)
    patch.setattr(FakeTensor, "cpu", lambda x: _to(x, "cpu"), raising=False)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        patch.setattr(torch, name, _of_cpu(getattr(torch, name)))
    patch.setattr(torch, "autocast", _of_cpu(torch.autocast))
    norm = functional.layer_norm

    def layer_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What autocast does on CUDA, and not on a CPU."""
        return norm(x.float() if torch.is_autocast_enabled("cuda") else x, *args, **kwargs)

    patch.setattr(functional, "layer_norm", layer_norm)
    # Gradient clipping takes the devices that it copies its factor to from C++.
    grouped = _foreach_utils._group_tensors_by_device_and_dtype

    def groups(*args: Any) -> Any:
        return {(DEVICE, dtype): of for (_, dtype), of in grouped(*args).items()}

    patch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", groups)
    patch.setattr(_foreach_utils, "_foreach_supported_types", [Tensor, FakeTensor])


def _of_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, asked for the CPU when asked for CUDA."""

    def asked(device: str | None = None, *args: Any, **kwargs: Any) -> Any:
        given = () if device is None else ("cpu" if device == "cuda" else device,)
        return function(*given, *args, **kwargs)

    return asked


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`x.to(...)`, which C++ would not call a copy when it leaves the fake GPU."""
    parse = {name: value for name, value in kwargs.items() if name != "copy"}
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **parse)  # type: ignore[attr-defined]
    if device is None:
        return Tensor.to(x, *args, **kwargs)
    if device.type == x.device.type:
        return Tensor.to(x, dtype or x.dtype, copy=kwargs.get("copy", False))
    return _ATEN._to_copy.default(x, dtype=dtype, device=_HOST, non_blocking=non_blocking)


def _refused(*_: Any) -> None:
    raise DeviceError(f"{_line()}: torch.cuda.synchronize has the host wait for the device")


@cache
def _is_composite(func: Any) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _shapes(output: Any) -> list[tuple[Any, ...]]:
    return [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in tensors_in(output)]


def _called_by_engine() -> bool:
    """Whether autograd's engine called an operator itself, not through a Python function."""
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename.endswith(("_compile.py", "eval_frame.py")):
        frame = frame.f_back  # modes are wrapped, to keep torch.compile out
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def _line() -> Line:
    frame = sys._getframe()
    while frame:
        file, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        ours = file.is_relative_to(_PROJECT) and ".venv" not in file.parts
        if ours and file != Path(__file__) and function != to_device.__name__:
            return Line(str(file.relative_to(_PROJECT)), frame.f_lineno, function)
        frame = frame.f_back
    return Line("outside the project", 0, "")
