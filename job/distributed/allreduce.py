"""Sums over the ranks of a run in every step: gradients, losses, tokens. And what ranks do at the same time.

Each rank trains as if it were the only one, on its share of the rows, with a loss divided by the tokens of the whole step. The
sum of the gradients is then that of the step, and training needs nothing else from other ranks: one that runs out of memory and
continues in halves, or has fewer micro-batches, or rows without images, affects no other.

A sharded model (`job.model.sharding`) is another matter: inside it, each rank waits for all. Ranks then have the same number of
rows, evaluate in `rounds`, and leave only where all `agree`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore

from job.distributed.ranks import Ranks
from job.errors import Unavailable

T = TypeVar("T")
R = TypeVar("R")

MEETING_SECONDS = 1800.0
"""Seconds for all ranks to reach the end of a step, or of an evaluation: the first step compiles."""
GONE_SECONDS = 5.0
"""Seconds without a heartbeat after a broken connection: then that rank is dead."""
BUCKET = 2**24
"""Numbers to sum at once: 64 MB."""


class AllReduce:
    """Sums over `ranks`; with a single rank, its own values. All ranks must call these in the same order.

    `waited` is how long the last sum of gradients took, in seconds, from when this rank's own were computed: the rank with the
    smallest value is the one that the others waited for.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.waited = 0.0

    def sums(self, *values: float) -> list[float]:
        """Sum each value over all ranks. A rank that was asked to stop, and so may have counted only half, adds nothing."""
        if self.ranks.world == 1:
            return list(values)
        self.ranks.preemption.check()
        total = torch.tensor(values, dtype=torch.float64)
        self._wait(distributed.all_reduce(total, async_op=True), total)
        found: list[float] = total.tolist()
        return found

    def agree(self) -> None:
        """Raise Preempted on every rank if any was asked to stop, so that none waits inside the model for one that left."""
        asked = torch.tensor([self.ranks.preemption.requested], dtype=torch.uint8)
        self._wait(distributed.all_reduce(asked, distributed.ReduceOp.MAX, async_op=True), asked, patient=True)
        if asked.item():
            self.ranks.until(lambda: False, "the notice of another rank")

    def rounds(self, name: str, pieces: Sequence[T], work: Callable[[T], R]) -> Iterator[R]:
        """Like `Ranks.spread`, but all ranks work at the same time: those without a piece of their own on the last one."""
        for start in range(0, len(pieces), self.ranks.world):
            self.agree()
            with self.connected():
                made = work(pieces[min(start + self.ranks.rank, len(pieces) - 1)])
            yield from self.ranks.gathered(name, made)[: len(pieces) - start]

    @contextmanager
    def connected(self, sharded: bool = True) -> Iterator[None]:
        """Run the model, inside which ranks wait for each other if it is `sharded`. If a connection breaks, raises what is then
        known of its rank. Of another model nothing changes: a rank that loses another one has its grace period to save."""
        if not sharded:
            yield
            return
        self.ranks.inside = True
        try:
            yield
        except RuntimeError as error:
            self.ranks.inside = False  # so that there is time to save
            if isinstance(error, distributed.DistError) or "gloo" in str(error):
                self._find_gone("the other ranks' shares of the weights")
            raise
        finally:
            self.ranks.inside = False

    def add_up(self, weights: Sequence[torch.Tensor], loss: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of `weights`, in place, and return the sum of `loss`."""
        given = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.uint8)
        self._wait(distributed.all_reduce(given, distributed.ReduceOp.MAX, async_op=True), given)
        # Weights without a gradient on any rank stay without: the optimizer skips them, as it would with one rank.
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
        """Copy the trained weights of rank 0 to every rank."""
        if self.ranks.world > 1:
            for weight in model.parameters():
                if weight.requires_grad:
                    self._wait(distributed.broadcast(weight.data, 0, async_op=True), weight)

    def _wait(self, work: Any, tensor: torch.Tensor, *, patient: bool = False) -> None:
        """Wait until all ranks have arrived, or one is known to be gone: every wait here checks for that."""
        what = "all ranks to add up a step"
        if tensor.is_cuda:
            # NCCL reports work with a dead rank as completed, while its kernel goes on: the stream that copies the last
            # checkpoint must not wait for that.
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                work.wait()
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
            self.ranks.until(done.query, what, MEETING_SECONDS, patient=patient)
            return
        self.ranks.until(work.is_completed, what, MEETING_SECONDS, patient=patient)
        try:
            work.wait()
        except RuntimeError:
            self._find_gone(what)

    def _find_gone(self, what: str) -> None:
        """A connection broke; which rank's is known in a moment, and then raised."""
        self.ranks.silence = min(self.ranks.silence, GONE_SECONDS)
        self.ranks.until(lambda: False, what, 4 * GONE_SECONDS)


def _mark(tensor: torch.Tensor) -> Callable[[], object]:
    """Return a function that waits until everything that computes `tensor` is done, but for nothing started later."""
    if not tensor.is_cuda:
        return lambda: None
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    waits: Callable[[], object] = done.synchronize
    return waits


def buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors in order, in lists of up to `BUCKET` numbers."""
    bucket, size = list[torch.Tensor](), 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    yield bucket


@contextmanager
def all_reduce(ranks: Ranks) -> Iterator[AllReduce]:
    """Connect the ranks with each other while the block runs, unless they are connected."""
    if connects := ranks.world > 1 and not distributed.is_initialized():
        connect(ranks)
    yield AllReduce(ranks)
    if connects:
        distributed.destroy_process_group()


def connect(ranks: Ranks) -> None:
    """Connect the ranks with each other: by NCCL for tensors on GPUs, by gloo for tensors on CPUs."""
    # Otherwise torch ends this process with SIGABRT a minute after NCCL has lost a peer, before it is known which one.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")

    def meet() -> None:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("sums", ranks.store),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=MEETING_SECONDS),
        )

    try:
        ranks.apart(meet, "all ranks to connect")
    except RuntimeError as error:
        raise Unavailable(
            f"rank {ranks.rank} cannot reach the others ({str(error).splitlines()[0]}); set GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME to the network between the nodes"
        ) from error
