"""Halves the micro-batch on out-of-memory, down to one row."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch

from job.errors import OutOfMemory

log = logging.getLogger("job")

Row = TypeVar("Row")
Made = TypeVar("Made")


class MicroBatches:
    """Runs work without gradients in micro-batches of `size` rows, halving `size` when GPU memory runs out.

    `what` names the work in messages; `cure` says what to change when a single row does not fit. `whole`: never halve, since the
    other ranks of a sharded model would not.
    """

    def __init__(self, size: int, what: str, cure: str, *, whole: bool = False) -> None:
        self.size, self.what, self.cure, self.whole = size, what, cure, whole

    def map(self, rows: Sequence[Row], work: Callable[[Sequence[Row]], list[Made]]) -> list[Made]:
        """Join what `work` returns for each micro-batch. Raises OutOfMemory when a single row does not fit."""
        found: list[Made] = []
        done = 0
        while done < len(rows):
            part = rows[done : done + self.size]
            try:
                made = work(part)
            except torch.OutOfMemoryError as error:
                said = str(error).partition("\n")[0]
            else:
                found, done = found + made, done + len(part)
                continue
            self.size = half(1 if self.whole else len(part), f"{self.what} does not fit the GPU; {self.cure} ({said})")
            log.warning("%s: out of GPU memory with %d rows; continuing with %d", self.what, len(part), self.size)
        return found


def half(rows: int, refusal: str) -> int:
    """Free the memory of the failed attempt and return half of `rows`. Raises OutOfMemory with `refusal` if it had one row.

    Call it after the `except` block: the exception's frames keep the failed attempt's tensors alive.
    """
    free_cached()
    if rows == 1:
        raise OutOfMemory(refusal)
    return rows // 2


def free_cached() -> None:
    """Return unreferenced memory to the system, on the host and on the GPU.

    glibc keeps freed blocks of up to 32 MB for later (mallopt(3), M_MMAP_THRESHOLD), and a container's limit counts them.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
