"""The order of samples: a pure function of seed and epoch, so that a resumed run continues it exactly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """Each epoch a fresh permutation of `rows`, drawn from a generator seeded by (seed, epoch) alone.

    Not from the global RNG: what a model draws for dropout, or how often a run was resumed, must not change the
    order. `set_epoch` is called before each epoch.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        yield from torch.randperm(self.rows, generator=generator).tolist()
