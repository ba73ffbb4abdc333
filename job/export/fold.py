"""What an adapter does to one weight, in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lora:
    """W + scale·B·A. `a` is (r, in…), `b` (out, r, …): the shapes of PEFT, for linear layers and convolutions alike.

    With `magnitude`, of shape (out,), each row of that is then brought to its length: DoRA (Liu et al., 2024, equation 5).
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Whole:
    """A weight that was trained itself: a bias, or a module of `modules_to_save`."""

    weight: Tensor


Change = Lora | Whole


def changed(weight: Tensor, change: Change) -> Tensor:
    """The weight after the change, with the dtype and on the device of `weight`."""
    if isinstance(change, Whole):
        return change.weight.to(weight)
    device = weight.device
    a, b = (factor.detach().to(device, torch.float32).flatten(1) for factor in (change.a, change.b))
    sum_ = weight.to(torch.float32, copy=True).flatten(1)
    with full_precision():
        sum_.addmm_(b, a, alpha=change.scale)
    if change.magnitude is not None:
        lengths = torch.linalg.vector_norm(sum_, dim=1, keepdim=True)
        sum_ *= change.magnitude.detach().to(device, torch.float32).unsqueeze(1) / lengths
    return sum_.view(weight.shape).to(weight.dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32: who trained before us may have allowed the GPU to cut their mantissas to 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
