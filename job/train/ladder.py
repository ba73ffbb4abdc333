"""Out of memory inside a step costs the step nothing: the same rows go through in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from job.model.oom_retry import half

log = logging.getLogger("job")


class Ladder:
    """How many rows go through the model at once: `rows_at_once` until the card says no, then half of it, down to one.

    The loss of every part is a sum over its tokens divided by those of the whole step, so a step in parts has the
    gradients of a step in one, but for rounding. `cure` says what to change when one row alone does not fit.
    """

    def __init__(self, rows_at_once: int, cure: str = "take a GPU with more memory") -> None:
        self.rows_at_once = rows_at_once
        self.cure = cure

    def climb(self, rows: int, model: Any, part: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """The summed loss of `part(start, stop)` over `rows` rows. Gradients of a failed try are taken back.

        Raises OutOfMemory when one row alone does not fit.
        """
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        before = [None if weight.grad is None else weight.grad.detach().clone() for weight in trained]
        while True:
            try:
                return sum_of(part(start, stop) for start, stop in self.spans(rows))
            except torch.OutOfMemoryError as error:
                said = str(error).partition("\n")[0]
            for weight, gradient in zip(trained, before, strict=True):
                weight.grad = None if gradient is None else gradient.clone()
            self._halve(min(self.rows_at_once, rows), said)

    def spans(self, rows: int) -> Iterator[tuple[int, int]]:
        for start in range(0, rows, self.rows_at_once):
            yield start, min(start + self.rows_at_once, rows)

    def _halve(self, tried: int, said: str) -> None:
        self.rows_at_once = half(tried, f"one row at a time does not fit the GPU; {self.cure} ({said})")
        log.warning("out of GPU memory with %d rows at once; going on with %d (%s)", tried, self.rows_at_once, said)


def sum_of(losses: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(losses)
    for loss in losses:
        total = total + loss
    return total
