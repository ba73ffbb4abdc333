"""Orders samples as a pure function of seed and epoch, so that a resumed run continues the order exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """A new permutation of `rows` for each epoch, from a generator seeded only by (seed, epoch).

    The global RNG is not used: neither dropout in a model nor the number of resumes may change the order. `set_epoch` is
    called before each epoch.

    Every step has the next `batch` rows, whatever the number of ranks; rank r takes its rows r, r + world, and so on. The last
    step of an epoch may be short: a rank without a row in it is given one, so that it takes part in the step; with `even`, all
    ranks are given as many. Only the first `own` rows of a rank count.
    """

    def __init__(self, rows: int, seed: int, batch: int = 1, rank: int = 0, world: int = 1, even: bool = False) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0
        self.batch, self.rank, self.world, self.even = batch, rank, world, even
        self.steps = math.ceil(rows / batch)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def own(self, step: int) -> int:
        """Count this rank's rows in a step, counted from 0 over all epochs, without those that were added."""
        start = step % self.steps * self.batch
        return len(range(start + self.rank, min(start + self.batch, self.rows), self.world))

    def __len__(self) -> int:
        whole, left = divmod(self.rows, self.batch)
        return whole * (self.batch // self.world) + (self._given(left) if left else 0)

    def _given(self, rows: int) -> int:
        """Count this rank's rows in a step of `rows` rows, with those that are added."""
        return -(-rows // self.world) if self.even else max(len(range(self.rank, rows, self.world)), 1)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.rows, self.batch):
            step = order[start : start + self.batch]
            mine = step[self.rank :: self.world]
            yield from mine + step[:1] * (self._given(len(step)) - len(mine))
