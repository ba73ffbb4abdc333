"""What the ranks of a run add up in every step: gradients, losses, tokens.

Each rank trains as if it were alone, on its share of the rows, with a loss that is divided by the tokens of the whole
step. The sum of the gradients is then that of the step, and it is all that training wants of the other ranks: one that
runs out of memory and goes on in halves, or has fewer micro-batches, or rows without pictures, disturbs nobody.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore

from job.errors import Unavailable
from job.ranks import Ranks

MEETING_SECONDS = 1800.0
"""For all ranks to come to the end of a step, or of a measurement: the first step compiles."""
GONE_SECONDS = 5.0
"""After a connection broke, without a sign of life: then that rank is dead."""
BUCKET = 2**24
"""Numbers that are added up at once, 64 MB."""


class Together:
    """Sums over `ranks`; those of one rank are its own. All ranks must call these in the same order.

    `waited` says how long the last sum of gradients took, in seconds, from when this rank's own were computed: the rank
    with the least of it is the one that the others waited for.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.waited = 0.0

    def sums(self, *values: float) -> list[float]:
        """Each value summed over all ranks. Who was asked to stop, and so may have counted half, adds nothing."""
        if self.ranks.world == 1:
            return list(values)
        self.ranks.preemption.check()
        total = torch.tensor(values, dtype=torch.float64)
        self._wait(distributed.all_reduce(total, async_op=True), total)
        found: list[float] = total.tolist()
        return found

    def add_up(self, weights: Sequence[torch.Tensor], loss: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of `weights`, in place, and return the sum of `loss`."""
        given = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.uint8)
        self._wait(distributed.all_reduce(given, distributed.ReduceOp.MAX, async_op=True), given)
        # What no rank has a gradient for stays without: the optimizer leaves it alone, as it would with one rank.
        trained = [weight for weight, one in zip(weights, given.tolist(), strict=True) if one]
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trained]
        total = loss.detach().float().reshape(1).clone()
        computed, began = _mark(total), None
        for bucket in buckets([*gradients, total]):
            flat = torch.cat([tensor.reshape(-1).float() for tensor in bucket])
            work = distributed.all_reduce(flat, async_op=True)
            if began is None:
                computed()
                began = time.monotonic()
            self._wait(work, flat)
            for tensor, part in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
        for weight, gradient in zip(trained, gradients, strict=True):
            weight.grad = gradient
        self.waited = time.monotonic() - (began or time.monotonic())
        return total[0]

    def as_first(self, model: Any) -> None:
        """Give every rank the trained weights of rank 0."""
        if self.ranks.world > 1:
            for weight in model.parameters():
                if weight.requires_grad:
                    self._wait(distributed.broadcast(weight.data, 0, async_op=True), weight)

    def _wait(self, work: Any, tensor: torch.Tensor) -> None:
        """Until all ranks have come, or one is known to be gone: no wait in here is deaf to that."""
        what = "all ranks to add up a step"
        if tensor.is_cuda:
            # NCCL calls work with a dead rank completed, while its kernel goes on: the stream that copies the last
            # checkpoint must not wait for that.
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                work.wait()
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
            self.ranks.until(done.query, what, MEETING_SECONDS)
            return
        self.ranks.until(work.is_completed, what, MEETING_SECONDS)
        try:
            work.wait()
        except RuntimeError:  # a connection broke; who it was is known in a moment
            self.ranks.silence = min(self.ranks.silence, GONE_SECONDS)
            self.ranks.until(lambda: False, what, 4 * GONE_SECONDS)


def _mark(tensor: torch.Tensor) -> Callable[[], object]:
    """What waits until all that computes `tensor` is done, and nothing that is begun later."""
    if not tensor.is_cuda:
        return lambda: None
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    waits: Callable[[], object] = done.synchronize
    return waits


def buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in order, in lists of up to `BUCKET` numbers."""
    bucket, size = list[torch.Tensor](), 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    yield bucket


@contextmanager
def together(ranks: Ranks) -> Iterator[Together]:
    """The ranks connected with each other while the block runs: by NCCL for GPUs, by gloo for words and for CPUs."""
    if ranks.world == 1:
        yield Together(ranks)
        return

    # Or torch ends this process with SIGABRT a minute after NCCL has lost a peer, before it is known who that was.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")

    def connect() -> None:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("sums", ranks.store),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=MEETING_SECONDS),
        )

    try:
        ranks.apart(connect, "all ranks to connect")
    except RuntimeError as error:
        raise Unavailable(
            f"rank {ranks.rank} cannot reach the others ({str(error).splitlines()[0]}); name the network between the nodes in "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    yield Together(ranks)
    distributed.destroy_process_group()
