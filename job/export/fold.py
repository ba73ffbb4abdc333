"""Folds an adapter into one weight, in float32 with a single rounding.

A base weight lies on the grid of its dtype, and a short training often adds less than half a step of that grid. Rounding to
nearest then returns the base: of a LoRA that changes a bfloat16 weight by 0.3 % of its size a tenth is lost, of 0.1 % a half,
in the very directions that were learned. Stochastic rounding (Croci et al., 2022), up or down with the probability that makes
the mean right, preserves the sum over many columns but adds noise to each. Each weight is rounded in the way that loses less
along the adapter's own directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lora:
    """W + scale·B·A. `a` is (r, in…), `b` (out, r, …): PEFT's shapes, for linear layers and convolutions alike."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Whole:
    """A weight that was trained itself: a bias."""

    weight: Tensor


Change = Lora | Whole


def changed(weight: Tensor, change: Change, dtype: torch.dtype | None = None) -> Tensor:
    """Return the changed weight on the device of `weight`, in `dtype`, by default that of `weight`."""
    dtype = dtype or weight.dtype
    if isinstance(change, Whole):
        return change.weight.to(weight.device, dtype)
    device = weight.device
    a, b = (factor.detach().to(device, torch.float32).flatten(1) for factor in (change.a, change.b))
    sum_ = weight.to(torch.float32, copy=True).flatten(1)
    with full_precision():
        sum_.addmm_(b, a, alpha=change.scale)
        return rounded(sum_, dtype, a).view(weight.shape)


def rounded(exact: Tensor, dtype: torch.dtype, directions: Tensor) -> Tensor:
    """Round `exact` (out, in) from float32 to `dtype` in the way that loses less along `directions` (r, in)."""
    nearest = exact.to(dtype)
    if dtype not in DROPPED:
        return nearest
    dithered = torch.cat([dither(exact[rows], rows.start, dtype) for rows in _slices(exact)])
    lost = [torch.linalg.matrix_norm((each - exact) @ directions.T) for each in (nearest, dithered)]
    return dithered if lost[1] < lost[0] else nearest


DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32's mantissa that these dtypes lack."""
AT_ONCE = {"cpu": 2**16, "cuda": 2**22}
"""Numbers dithered at once; the extra memory is small. Blocks of megabytes, freed in between, leave gaps in malloc's heap: at
2**22 a CPU held 0.5 GB more after 30 weights of 17 MB, in the same time."""


def dither(exact: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Round `exact` (rows, columns) in float32 up or down at random. The randomness is a hash of the position, with rows
    counted from `first`, so that every attempt and every device rounds alike."""
    mask = (1 << DROPPED[dtype]) - 1
    count = exact.numel()
    place = torch.arange(first * exact.shape[1], first * exact.shape[1] + count, device=exact.device)
    place = (place & 0x7FFFFFFF).to(torch.int32).view_as(exact)
    for factor in (0x45D9F3B, 0x119DE1F3):  # wraps around: a multiply-xorshift hash (Wellons, 2018)
        place = (place ^ (place >> 16)) * factor
    bits = exact.view(torch.int32) + ((place ^ (place >> 15)) & mask)
    return (bits & ~mask).view(torch.float32).to(dtype)


def _slices(exact: Tensor) -> list[slice]:
    step = max(1, AT_ONCE[exact.device.type] // max(1, exact.shape[1]))
    return [slice(start, start + step) for start in range(0, max(1, exact.shape[0]), step)]


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: earlier training may have let the GPU cut their mantissas to 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
