"""InfoNCE's error by precision: loss and gradients against float64.

    python -m bench.infonce_precision [--clips 4608]      half a minute on a CPU

`ieee` is the op itself. `tf32` and `bf16` round the operands by hand, as the kernels do, in all
three products (the logits, and dlogits with the embeddings of either); sums stay in float32. Tests
hold the kernels to that. `cut off` is tf32 as tensor cores truncate it. Speed is for a GPU
to say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels import infonce
from flap_kernels.infonce import infonce_reference

D, SCALE = 512, 14.3
NAMES = ("loss", "gradient of audio", "gradient of text", "gradient of scale")


def cut_off(x: Tensor) -> Tensor:
    """Float32 truncated to 10 bits of its fraction, as tensor cores read it."""
    return (x.view(torch.int32) & -0x2000).view(torch.float32)


def tf32(x: Tensor) -> Tensor:
    """Float32 with 10 bits of its fraction, rounded to the nearest."""
    return cut_off((x.view(torch.int32) + 0x1000).view(torch.float32))


def bf16(x: Tensor) -> Tensor:
    """Float32 with 7 bits of its fraction, rounded to the nearest."""
    return x.bfloat16().float()


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"tf32": tf32, "bf16": bf16, "cut off": cut_off}


def rounded(audio: Tensor, text: Tensor, scale: Tensor, precision: str) -> list[Tensor]:
    """The symmetric loss and its gradients, float32, with the operands of products rounded."""
    kept = ROUNDINGS[precision]
    a, t = kept(audio), kept(text)
    cosines = a @ t.T
    logits = scale * cosines
    B = len(audio)
    target = torch.arange(B, device=audio.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    # Minus the positive before rounding: what is left of p - 1 is small where p is nearly 1.
    dlogits = (logits.softmax(1) + logits.softmax(0) - 2 * torch.eye(B).to(logits)) / 2
    of_scale = (dlogits * cosines).sum() / B
    dlogits = kept(dlogits)
    step = scale / B
    gradients = [step * (dlogits @ t), step * (dlogits.T @ a)]
    if precision == "bf16":  # a GPU's gradients come in the embeddings' type
        gradients = [kept(gradient) for gradient in gradients]
    return [loss, *gradients, of_scale]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Norm of each error over the norm of the exact value, in the order of `NAMES`."""
    pairs = zip(found, exact, strict=True)
    return [((x.double() - true).norm() / true.norm()).item() for x, true in pairs]


def measure(B: int, d: int = D, seed: int = 0) -> dict[str, list[float]]:
    """Errors by precision, on pairs of unit vectors whose cosine is about 0.7."""
    audio, text = alike(B, d, seed)
    given = audio, text, torch.tensor(SCALE, dtype=torch.float64)
    exact = loss_and_gradients(infonce_reference, *given)
    narrow = [x.float() for x in given]
    found = {"ieee": loss_and_gradients(infonce, *narrow)}
    found |= {name: rounded(narrow[0], narrow[1], narrow[2], name) for name in ROUNDINGS}
    return {name: errors(values, exact) for name, values in found.items()}


def alike(B: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows (B, d) float64, each with a neighbour."""
    draw = torch.Generator().manual_seed(seed)
    audio = F.normalize(torch.randn(B, d, generator=draw, dtype=torch.float64), dim=1)
    noise = torch.randn(B, d, generator=draw, dtype=torch.float64) / d**0.5
    return audio, F.normalize(audio + noise, dim=1)


def loss_and_gradients(function: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    """The value and the gradients of a loss of (audio, text, scale)."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.infonce_precision")
    parser.add_argument("--clips", type=int, default=4608)
    asked = parser.parse_args(arguments)
    print(f"{asked.clips} x {D}, scale {SCALE}: relative error (norms) against float64")
    print(f"{'':8}" + "".join(f"{name:>20}" for name in NAMES))
    for name, found in measure(asked.clips).items():
        print(f"{name:8}" + "".join(f"{error:20.1e}" for error in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
