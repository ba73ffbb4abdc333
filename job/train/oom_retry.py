"""Retries a step in smaller micro-batches when it runs out of GPU memory, without losing the step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from job.model.oom_retry import half

log = logging.getLogger("job")


class StepRetry:
    """Halves `micro_batch`, the rows per forward, on out-of-memory, down to one.

    Each part's loss is a sum over its tokens divided by the tokens of the whole step, so a step in parts has the same
    gradients as a step in one, except for rounding. `cure` says what to change when a single row does not fit. `whole`: never
    halve, since the other ranks of a sharded model would not.
    """

    def __init__(self, micro_batch: int, cure: str = "use a GPU with more memory", *, whole: bool = False) -> None:
        self.micro_batch = micro_batch
        self.cure, self.whole = cure, whole

    def run(self, rows: int, model: Any, part: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """Return the summed loss of `part(start, stop)` over `rows` rows. A failed attempt's gradients are undone.

        Raises OutOfMemory when a single row does not fit.
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
            self._halve(min(self.micro_batch, rows), said)

    def spans(self, rows: int) -> Iterator[tuple[int, int]]:
        for start in range(0, rows, self.micro_batch):
            yield start, min(start + self.micro_batch, rows)

    def _halve(self, tried: int, said: str) -> None:
        rows, cure = "one row", self.cure
        if self.whole and tried > 1:
            rows, cure = f"{tried} rows", f"lower training.per_device_train_batch_size, {cure}"
        refusal = f"a micro-batch of {rows} does not fit the GPU; {cure} ({said})"
        self.micro_batch = half(1 if self.whole else tried, refusal)
        log.warning("out of GPU memory with micro-batch %d; continuing with %d (%s)", tried, self.micro_batch, said)


def sum_of(losses: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(losses)
    for loss in losses:
        total = total + loss
    return total
